/// model.h - a nemotron_h or qwen3 model: parameters, blocks, and their buffers.
///
/// A decoder block is one layer (nemotron_h: norm and one mixer) or two (qwen3: attention, MLP).
/// Life of a model: open (names, shapes, no bytes) - quantize - plan - commit - load - calibrate -
/// forward/backward - export. Values are `dtype` (F32; F64 in checks). A student shares config and,
/// for frozen parameters, storage with its teacher.
#pragma once
#include "core/block/param.h"
#include "core/comm/comm.h"
#include "core/model/config.h"
#include "core/quant/rules.h"
#include "core/tensor/plan.h"
#include "core/tensor/safetensors.h"
#include "core/text/batch.h"
#include "kernels/kernels.h"

typedef struct cq_model cq_model; ///< the rest is core/model/model_impl.h

/// Opens a checkpoint folder, BF16/F32/F16 or an exported NVFP4 one, and checks every tensor's
/// name, shape and dtype against the config. `dtype` is CQ_F32 or CQ_F64.
CQ_API int cq_model_open(cq_model **out, const char *dir, cq_dtype dtype);
/// A model with the architecture of `dir/config.json` and no weights yet; `cq_model_init` fills
/// them.
CQ_API int cq_model_create(cq_model **out, const char *dir, cq_dtype dtype);
/// Random weights as models.md 2.10: matrices N(0, initializer_range), norms 1, Mamba A_log, D,
/// dt_bias; after commit.
CQ_API int cq_model_init(cq_model *m, uint64_t seed);
/// The 4-bit student of a teacher: same checkpoint, quantization decided by `o`.
CQ_API int cq_model_quantize(cq_model **student, cq_model *teacher, const cq_quant_options *o);
/// A student whose teacher never gets memory (a cache stands in for it): frozen parameters get
/// memory of their own, and loading reads the teacher's files. Before the plan.
CQ_API int cq_model_alone(cq_model *student);
/// Deals the experts of each mixture out over the ranks of `comm`, E / R to each: it computes them
/// for all, and only it has their weights, gradients and moments. From then on all ranks run each
/// pass together, one without a micro-batch by the serve functions. After open or quantize, of
/// teacher and student alike, before the optimizer and the plan. CQ_EUSAGE without a mixture, or
/// where R does not divide E.
CQ_API int cq_model_share_experts(cq_model *m, cq_comm *comm);
CQ_API void cq_model_close(cq_model *m);

CQ_API const cq_config *cq_model_config(const cq_model *m);
/// What it computes in: CQ_F32 or CQ_F64.
CQ_API cq_dtype cq_model_dtype(const cq_model *m);
CQ_API const char *cq_model_dir(const cq_model *m);
CQ_API int64_t cq_model_n_params(const cq_model *m);
CQ_API cq_param *cq_model_param(cq_model *m, int64_t i);
CQ_API cq_param *cq_model_find(cq_model *m, const char *name);
/// True when the folder it was opened from holds NVFP4 weights; they load as already fake-quantized
/// values.
CQ_API bool cq_model_is_nvfp4(const cq_model *m);

/// Declares weights (and, when `trained`, gradients) in the plan; a frozen parameter of a student
/// declares nothing.
CQ_API int cq_model_plan_params(cq_model *m, cq_plan *p, bool trained);
/// Precision of matrix products; before plan_work. Default CQ_COMPUTE_F32.
CQ_API void cq_model_set_compute(cq_model *m, cq_compute compute);
/// How a model of an exported NVFP4 folder keeps its weights: opened when they are loaded
/// (default), or packed, as a student's copies may be; before plan_params. A student's options say
/// it of it.
CQ_API void cq_model_set_copies(cq_model *m, cq_copies copies);
/// Products of quantized linears' forwards on FP4 tensor cores, where copies are packed and
/// products BF16 otherwise, on a device that has them (cq_stream_has_fp4); before plan_work.
CQ_API void cq_model_set_fp4(cq_model *m, bool on);
/// How activations inside of layers are stored (core/block/block.h): CQ_F32 (default), as values of
/// the model, or CQ_BF16, on a device with CQ_COMPUTE_BF16; before plan_work.
CQ_API void cq_model_set_activations(cq_model *m, cq_dtype act);
/// How the master weights of trained quantized linears are kept (kernels/formats.h); before
/// plan_params. The optimizer says it. All else stays F32: the forward reads it as it is.
CQ_API void cq_model_set_master(cq_model *m, cq_master master);
/// What a model on a device keeps in pinned host memory; before plan_params.
typedef enum cq_offload {
    CQ_OFFLOAD_NONE = 0,
    CQ_OFFLOAD_TEACHER =
        1, ///< the blocks of a model that only runs forward: fetched block by block
    CQ_OFFLOAD_OPTIMIZER = 2, ///< moments, and master weights of quantized linears: used in place
    CQ_OFFLOAD_BOTH = 3
} cq_offload;
CQ_API void cq_model_set_offload(cq_model *m, cq_offload offload);
/// Where the plan puts its moments.
CQ_API cq_purpose cq_model_moments_purpose(const cq_model *m, const cq_plan *p);
/// A parameter's master weight on the host in the dtype its model computes in: the tensor itself,
/// or a copy in new memory, *owned, which the caller frees (NULL for none). CQ_EUSAGE for an expert
/// that another rank has.
CQ_API int cq_param_master(cq_tensor *out, void **owned, const cq_param *p);
/// What a product reads of a weight besides `fq16`: `fq`, or NULL where that is BF16 itself.
CQ_API const void *cq_param_wide(const cq_param *p);
/// A parameter's fake-quantized weight on the host in FP32 (F64 in such a model), whatever form it
/// is kept in; *owned as in cq_param_master. Of one that is not quantized: the weight itself.
CQ_API int cq_param_copy(cq_tensor *out, void **owned, const cq_param *p);
/// Writes the fake-quantized copy of a quantized parameter from its master weight.
CQ_API int cq_model_write_copy(cq_model *m, cq_stream *s, cq_param *p);
/// Declares activations for micro-batches of up to `tokens` tokens, no document longer than
/// `longest`; also the kernel scratch. `threads` as in the stream.
CQ_API int cq_model_plan_work(cq_model *m, cq_plan *p, int64_t tokens, int64_t longest,
                              cq_mode mode, int threads);
/// Points the stream at this model's kernel scratch and sets its compute precision; before each use
/// of the stream.
CQ_API void cq_model_bind_stream(cq_model *m, cq_stream *s);
/// Copies the checkpoint into the planned weights. CQ_ENUMERIC names a tensor with NaN or Inf.
CQ_API int cq_model_load(cq_model *m);

/// Calibration: begin clears the maxima; forwards between begin and end run unquantized and record
/// |input| maxima; end unites fused groups, gives experts that saw no token the largest maximum of
/// their layer, searches static scales and writes the fake-quantized weights. *unreached: number of
/// such experts.
CQ_API int cq_model_calibrate_begin(cq_model *m);
CQ_API int cq_model_calibrate_end(cq_model *m, cq_stream *s, int64_t *unreached);
/// Takes given maxima instead (golden files, checkpoints): set amax and *amax_x first. Writes the
/// fake-quantized weights.
CQ_API int cq_model_requantize(cq_model *m, cq_stream *s);
/// Whether weights take their searched block scales, as they do after calibration, or each block's
/// maximum, to measure what searching wins. Writes the fake-quantized weights; nothing to do where
/// nothing was searched.
CQ_API int cq_model_searched_scales(cq_model *m, cq_stream *s, bool on);
/// Writes the BF16 copies that products on a device read (nothing elsewhere): after loading, and
/// after each change of the weights. Requantizing and the optimizer do it.
CQ_API int cq_model_round_weights(cq_model *m, cq_stream *s, bool trained_only);
/// Blocks whose activation or weight scale was clamped since the last call.
CQ_API int64_t cq_model_saturated(cq_model *m);
/// The counter behind it, for whoever quantizes weights in another pass.
CQ_API int64_t *cq_model_saturation(cq_model *m);

/// Checks a batch and brings it to where the kernels run.
CQ_API int cq_model_take_batch(cq_model *m, const cq_batch *b);
/// The batch taken last, where the kernels run.
CQ_API const cq_batch *cq_model_batch(const cq_model *m);
/// h = embedding of the batch taken last.
CQ_API int cq_model_embed(cq_model *m, cq_stream *s);
/// cq_model_take_batch and cq_model_embed. The residual stream after block l is *cq_model_hidden(m,
/// l) right after its forward (all l stay valid in the SAVE and RECOMPUTE modes).
CQ_API int cq_model_embed_forward(cq_model *m, cq_stream *s, const cq_batch *b);
CQ_API int cq_model_block_forward(cq_model *m, cq_stream *s, const cq_batch *b, int64_t block);
CQ_API const cq_tensor *cq_model_hidden(const cq_model *m, int64_t block);
/// xf = final norm of the last block's output; *cq_model_final is [tokens, hidden].
CQ_API int cq_model_norm_forward(cq_model *m, cq_stream *s, const cq_batch *b);
CQ_API const cq_tensor *cq_model_final(const cq_model *m);
/// logits [n, vocab] of rows [begin, begin + n) of `xf`.
CQ_API int cq_model_head_forward(cq_model *m, cq_stream *s, const cq_tensor *xf, int64_t begin,
                                 int64_t n, void *logits);
/// A rank's part in a forward, and in a backward, of the others' micro-batches while it has none:
/// its experts' rows. Nothing to do where experts are not dealt out.
CQ_API int cq_model_serve_forward(cq_model *m, cq_stream *s);
CQ_API int cq_model_serve_backward(cq_model *m, cq_stream *s);
/// Whether passes of this model, once the batch is taken, are such that graph.h can record them.
CQ_API bool cq_model_recordable(const cq_model *m);
/// Whole forward without logits.
CQ_API int cq_model_forward(cq_model *m, cq_stream *s, const cq_batch *b);

/// Backward, last to first. dxf [tokens, hidden] is the gradient of the final hidden state; the
/// running gradient of the residual stream is *cq_model_dhidden(m): after norm_backward that of the
/// last block's output, after block_backward(l) that of block l's input.
CQ_API int cq_model_norm_backward(cq_model *m, cq_stream *s, const cq_batch *b, const void *dxf);
CQ_API int cq_model_block_backward(cq_model *m, cq_stream *s, const cq_batch *b, int64_t block);
CQ_API int cq_model_embed_backward(cq_model *m, cq_stream *s, const cq_batch *b);
CQ_API cq_tensor *cq_model_dhidden(cq_model *m);
/// Backward passes leave parameter gradients alone while this is on.
CQ_API void cq_model_input_only(cq_model *m, bool on);
/// Gradients to zero; nothing else does that.
CQ_API int cq_model_zero_grad(cq_model *m);
/// The same, but not of experts that are dealt out, whose gradients are of the step so far.
CQ_API int cq_model_zero_round(cq_model *m);
/// The weight the head multiplies with (the embedding when tied).
CQ_API cq_param *cq_model_head(cq_model *m);
/// Sets lr_scale = factor (0 freezes) for parameters whose names match; returns how many, or
/// CQ_EUSAGE for none.
CQ_API int64_t cq_model_lr_scale(cq_model *m, const char *globs, double factor);
