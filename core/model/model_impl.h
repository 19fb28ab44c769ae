/// model_impl.h - the inside of a model, for core/model/*.c only.
#pragma once
#include "core/block/block.h"
#include "core/model/model.h"

struct cq_model {
    cq_config config;
    char *dir;
    cq_safetensors *files; ///< the checkpoint; NULL for a created model
    cq_model *teacher;     ///< of a student
    bool alone;            ///< the teacher has no memory
    bool nvfp4;            ///< opened from an exported folder
    bool trained;          ///< gradients are planned
    bool weights_only;
    cq_scale_method scales;
    cq_compute compute;
    bool fp4; ///< products of packed weights with quantized inputs are those of codes
    cq_copies copies;
    cq_offload offload;
    bool streamed;       ///< its blocks lie on the host and are fetched as a forward comes to them
    cq_tensor window[2]; ///< [bytes] where block b is during its forward: window b % 2
    struct {
        int64_t block;     ///< -1: none
        char *first, *end; ///< its bytes on the host, from the first to behind the last
    } in_window[2];
    ptrdiff_t moved;  ///< of the pointers of the block that runs
    cq_master master; ///< form of the master weights of trained quantized linears
    bool widened;     ///< while calibrating: `fq` holds the F32 form of narrow master weights
    cq_layer_env env;
    cq_param **param;
    int64_t n_params, cap_params;
    cq_linear **linear;
    int64_t n_linears, cap_linears;
    cq_layer *layer;
    int64_t n_layers;
    int64_t *first_layer; ///< [n_blocks + 1]
    cq_param *embed, *norm_f, *head;
    cq_tensor *h; ///< [n_layers + 1] inputs of the layers and the last output; one when inferring
    cq_tensor xf, rstd_f, dh, kernel_scratch, bf16_scratch;
    cq_batch now;                             ///< the batch taken last, where the kernels run
    cq_tensor ids, labels, positions, starts; ///< its memory on a device
    int threads;
};

/// Fills params, linears and layers from the config; `o` decides what is quantized (NULL: nothing,
/// or what the files say when they are NVFP4).
int cq_model_build(cq_model *m, const cq_quant_options *o);
/// Input maxima of experts that are dealt out, and their weights' maxima, from the holders to all.
int cq_model_gather_inputs(cq_model *m);
int cq_model_gather_weights(cq_model *m);
/// A tensor of an expert, which its holder has on the host, to rank 0 in new memory, *owned, for
/// the caller to free. All ranks call it, with the shape and dtype in `mine`; elsewhere *out gets
/// no data. Not for one of rank 0 itself.
int cq_model_fetch(cq_tensor *out, void **owned, const cq_model *m, const cq_param *p,
                   cq_tensor mine);
/// Brings the frozen maxima to where the kernels run.
int cq_model_send_amax(cq_model *m);
/// The master weight where the kernels run, in the model's dtype: itself, or widened into the
/// parameter's `fq`, or where that is no place for it, into the scratch for opened stacks.
int cq_model_master_now(cq_model *m, cq_stream *s, const cq_param *p, const void **out);
/// Where the blocks are streamed: has block `block` in its window, asks for the next one, and
/// points its layers there; `out` points them back. `out` after `in`, whatever failed between them.
int cq_model_block_in(cq_model *m, cq_stream *s, int64_t block);
int cq_model_block_out(cq_model *m, cq_stream *s, int64_t block);
/// Declares the windows, after the blocks.
int cq_model_plan_windows(cq_model *m, cq_plan *p);
/// Declares the copy of a quantized stack, in its form.
int cq_model_plan_copy(cq_model *m, cq_plan *p, cq_linear *w);
/// Bytes of scratch that opening stacks, and writing copies, takes.
int64_t cq_model_opened_bytes(const cq_model *m);
/// Writes the F32 form of narrow master weights into `fq`, for a calibration.
int cq_model_widen(cq_model *m, cq_stream *s);
/// Points parameters into the stacks that the plan allocated; a frozen stack of a student into its
/// teacher's.
int cq_model_bind(cq_model *m);
/// The checkpoint entry of a parameter under its published name or a known older one; NULL when
/// missing.
const cq_entry *cq_model_entry(const cq_model *m, const char *name);
/// `<module><suffix>` for a parameter name that ends in `.weight`.
void cq_module_name(char out[160], const char *weight, const char *suffix);
/// Whether a parameter lives in one of the linear stacks (all linears but the head).
bool cq_param_stacked(const cq_model *m, const cq_param *p);
/// cq_model_plan_work where mixtures of experts, which look at each token alone, take `moe_tokens`
/// of them at a time.
int cq_model_plan_apart(cq_model *m, cq_plan *p, int64_t tokens, int64_t moe_tokens,
                        int64_t longest, cq_mode mode, int threads);
/// Makes `b` the batch that cq_model_block_forward runs on.
int cq_model_send_batch(cq_model *m, const cq_batch *b);
/// Experts that saw no token take the largest maximum of their layer's experts; returns how many.
int64_t cq_model_fill_unreached(cq_linear *w);
/// Parameters of one group get the group's largest maxima; `block` alone, or all with -1.
void cq_model_unite(cq_model *m, int32_t block);
/// CQ_ENUMERIC naming the first value that is not finite.
int cq_model_check_finite(const cq_model *m, const cq_param *p, cq_tensor t);
