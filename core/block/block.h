/// block.h - the layers a decoder block is made of: a norm and one mixer on the residual stream.
///
///     h_out = h_in + mixer(rmsnorm(h_in))        kinds: M mamba-2, E moe, * attention, - relu2
///     mlp, S swiglu mlp
///
/// Each layer has plan / forward / backward. Linear layers multiply with the fake-quantized weight
/// and, in W4A4, the fake-quantized input; the backward uses the same two (straight-through), so
/// only those are kept.
///
/// Storage. `dtype`: the residual stream and its gradient, what the norm's backward reads (dx),
/// rstd, log-sum-exps, router logits and weights and their gradients, parameters and their
/// gradients, what slots keep. `act`, BF16 where the model says so (a device with BF16 products):
/// all that lies between the norm and the addition to the residual stream, and its gradients; each
/// value is rounded once, when an operation writes it, except what a backward accumulates, which
/// stays F32.
#pragma once
#include "core/block/config.h"
#include "core/block/param.h"
#include "core/comm/comm.h"
#include "core/tensor/plan.h"
#include "core/text/batch.h"
#include "kernels/kernels.h"

/// Weights that read the same input, stacked: [q; k; v], [gate; up], or the experts of one
/// projection.
typedef struct cq_linear {
    int64_t groups;  ///< 1, or the number of experts
    int64_t held;    ///< groups that are here, all unless experts are dealt out over ranks
    int64_t first;   ///< the first of them
    int64_t n, k;    ///< rows of one group's stack, columns
    int64_t n_parts; ///< parameters in the stack
    cq_param **part; ///< in stacking order
    cq_tensor value; ///< [held * n, k] master weights; the same shape below
    cq_tensor low;   ///< their low halves where the master is split, else no data
    cq_tensor fq;   ///< what forward multiplies with; BF16, the same as fq16: only products read it
    cq_tensor grad; ///< no data when none is trainable
    cq_tensor fq16; ///< fq in BF16 where products on a device are BF16, else no data
    cq_tensor codes, scales; ///< packed fq: [held * n, k / 2], [held * n, k / 16]; fq has no data
    cq_tensor amax_w;        ///< [n_parts] maxima of the parts where the kernels run
    bool half;               ///< products read BF16 weights and these lie as they want them
    bool quantized;          ///< all parts are
    bool act_quant;          ///< inputs are fake-quantized too
    float *amax_x;           ///< [groups] frozen input maxima
    cq_tensor amax;          ///< [groups] the same where the kernels run
} cq_linear;

/// What the documents of a pass of generation go on from. Each layer keeps keys and values, or its
/// states, in slots, one for each sequence that is alive.
typedef struct cq_past {
    int64_t slots, room; ///< positions of a slot, a multiple of 16
    cq_tensor slot;      ///< [n_docs] of the pass at hand, I32
    cq_tensor past;      ///< [n_docs] tokens of the slot's sequence before this pass, I32
} cq_past;

/// The experts of every mixture dealt out over ranks, with room for what one layer's exchange needs
/// on the host.
typedef struct cq_expert_ranks {
    cq_comm *comm;
    int ranks;
    int64_t experts;     ///< of a mixture
    int64_t first, held; ///< those of this rank
    int64_t *offsets;    ///< [experts + 1] of this rank's sorted rows
    int64_t *counts;     ///< [experts] rows of each
    int64_t *theirs;     ///< [ranks, held + 1] offsets of the rows that each rank sends here
    int64_t *in, *out;   ///< [ranks] rows that come from each, and go there
} cq_expert_ranks;

/// `experts` of a mixture over the ranks of `comm`, whose size divides them.
int cq_expert_ranks_open(cq_expert_ranks **out, cq_comm *comm, int64_t experts);
/// Accepts NULL.
void cq_expert_ranks_close(cq_expert_ranks *x);

/// Run state that all layers of a model share.
typedef struct cq_layer_env {
    const cq_config *config;
    cq_dtype dtype;
    cq_dtype act; ///< CQ_BF16: how activations inside of layers are stored; CQ_F32: as dtype
    cq_mode mode;
    bool calibrating;    ///< unquantized, recording input maxima
    bool input_only;     ///< backward without parameter gradients
    bool again;          ///< a forward that is done again: nothing is counted
    cq_tensor saturated; ///< [1] blocks whose scale was clamped, I64; no data: not counted
    cq_tensor opened;    ///< [bytes] one stack opened for the product at hand
    cq_tensor x_codes;   ///< [bytes] codes and scales of its input, where products are of codes
    int64_t tokens;      ///< planned capacity
    int64_t longest;     ///< planned longest document
    const cq_past *past; ///< documents go on from slots; NULL: each starts anew
    cq_expert_ranks *experts; ///< experts are dealt out; NULL: all are here
} cq_layer_env;

typedef struct cq_layer {
    char kind;
    int32_t block;
    cq_layer_env *env;
    cq_param *norm;
    cq_linear *in[3]; ///< attention: one stack or q, k, v; mlp: up (or gate/up, or gate, up);
                      ///< mamba: in_proj; moe: experts' up
    int n_in;
    cq_linear *out; ///< o_proj, down_proj, out_proj, experts' down
    cq_linear *shared_up, *shared_down;
    cq_param *q_norm, *k_norm;
    cq_param *conv_w, *conv_b, *a_log, *d, *dt_bias, *gated_norm;
    cq_param *gate, *bias;
    /* kept for backward; activations but rstd, lse, rstd2 and those of routing */
    cq_tensor rstd, x, xq;       ///< norm: [T], [T, D], [T, D]
    cq_tensor proj;              ///< first projection: qkv, zxbcdt, gate/up, up, shared up
    cq_tensor mid, midq;         ///< input of the last projection, plain and quantized
    cq_tensor rotated, lse;      ///< attention
    cq_tensor conv, scan, rstd2; ///< mamba
    cq_tensor logits, sel, weight, offsets, token, position; ///< moe routing
    cq_tensor xg, up, hidden, down;                          ///< moe: sorted rows
    cq_tensor theirs, x_in; ///< moe over ranks: each rank's [held + 1] offsets, rows [ranks T k, D]
    /* of generation, by slot: as in cq_attention_cached, cq_conv_cached and cq_ssd_cached */
    cq_tensor keys, values, conv_state, states;
    /* backward scratch; activations but dx, dlogits and dweight */
    cq_tensor dproj, dmid, dx, dconv, dlogits, dweight, dsorted, dhidden;
    cq_tensor rows_in; ///< moe over ranks: results for all, and the gradients of both ways
    cq_tensor dstack;  ///< moe over ranks: [held * n, k] gradient of one rank's rows
} cq_layer;

/// The dtype that activations inside of its layers are stored as.
cq_dtype cq_layer_act(const cq_layer_env *e);
/// Number of elements per row of `proj`.
int64_t cq_layer_proj_width(const cq_layer *l);
/// Declares what forward keeps and, unless the mode is CQ_MODE_INFER, what backward needs; sizes
/// for env->tokens.
int cq_layer_plan(cq_layer *l, cq_plan *p);
/// h_out = h_in + mixer(norm(h_in)); h_out may be h_in in CQ_MODE_INFER. [tokens, hidden].
int cq_layer_forward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *h_in, void *h_out);
/// dh: gradient of h_out in, of h_in out; parameter gradients are added to.
int cq_layer_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *h_in, void *dh);

/// Declares what the layer keeps of `slots` sequences of up to `room` positions.
int cq_layer_plan_past(cq_layer *l, cq_plan *p, int64_t slots, int64_t room);
/// Copies what slot `from` holds to slot `to`.
int cq_layer_copy_past(cq_layer *l, int64_t to, int64_t from);

/* the mixers; h is the residual stream that the mixer's result is added to */
int cq_attention_plan(cq_layer *l, cq_plan *p);
int cq_attention_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h);
int cq_attention_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh);
int cq_mlp_plan(cq_layer *l, cq_plan *p);
int cq_mlp_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h);
int cq_mlp_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh);
int cq_mamba_plan(cq_layer *l, cq_plan *p);
int cq_mamba_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h);
int cq_mamba_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh);
int cq_moe_plan(cq_layer *l, cq_plan *p);
int cq_moe_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h);
int cq_moe_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh);
/* cq_moe_forward in parts, for who calibrates with one expert's weights in memory: `begin` routes
 * rows that the norm has written to l->x, `expert` takes those of one expert through its two
 * matrices (host kernels only) and records their maxima, `end` adds all to h, with the shared
 * expert. */
int cq_moe_begin(cq_layer *l, cq_stream *s, int64_t rows);
int cq_moe_expert(cq_layer *l, cq_stream *s, int64_t expert, const void *up, const void *down);
int cq_moe_end(cq_layer *l, cq_stream *s, int64_t rows, void *h);
/* dst [rows, k] = relu(src)^2, quantized for the linear that reads it; offsets as in cq_fq. */
int cq_moe_act(cq_layer *l, cq_stream *s, const cq_linear *reader, const int64_t *offsets,
               int64_t rows, const void *src, void *dst);
/* The experts' part of a mixture dealt out over ranks, all of which call these at the same layer:
 * xg -> down, dsorted -> dsorted; kept and scratch buffers for the rows of all of them; and what a
 * rank without a micro-batch calls in the place of the forward, before cq_moe_ranks_backward. */
int cq_moe_ranks_plan(cq_layer *l, cq_plan *p);
int cq_moe_ranks_forward(cq_layer *l, cq_stream *s);
int cq_moe_ranks_backward(cq_layer *l, cq_stream *s);
int cq_moe_ranks_serve(cq_layer *l, cq_stream *s);
/// The norm before the mixer: what cq_layer_forward does first.
int cq_layer_norm(cq_layer *l, cq_stream *s, int64_t rows, const void *h_in);

/// One buffer of a layer: kept values go to `activations` in CQ_MODE_SAVE, else to shared scratch.
int cq_layer_keep(cq_layer *l, cq_plan *p, cq_tensor *slot, const char *name, cq_dtype dtype,
                  int64_t rows, int64_t cols);
/// Scratch of the backward; declares nothing in CQ_MODE_INFER.
int cq_layer_scratch(cq_layer *l, cq_plan *p, cq_tensor *slot, const char *name, cq_dtype dtype,
                     int64_t rows, int64_t cols);

/// Whether its weights are there in BF16 only; the model's other dtype is missing then.
bool cq_linear_only_16(const cq_linear *w);
/// Whether this linear's input is fake-quantized now.
bool cq_linear_acts(const cq_layer *l, const cq_linear *w);
/// The fake-quantization request for this linear's input; offsets as in cq_fq (NULL: one group).
cq_fq cq_linear_fq(cq_layer *l, const cq_linear *w, const int64_t *offsets);
/// While calibrating, records the maximum of an input [rows, k].
int cq_linear_observe(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows,
                      const int64_t *offsets);
/// y[:, 0..n) (row distance ldy) = x W', from activations to activations.
int cq_linear_forward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *y,
                      int64_t ldy);
/// h [rows, n] += x W', from activations to the residual stream.
int cq_linear_add(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *h);
/// dx = beta dx + dy W for the norm, and grad += dy' x; of one whose input is the norm's.
int cq_linear_backward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dy,
                       int64_t lddy, int64_t rows, void *dx, double beta);
/// dx = dh W, an activation, and grad += dh' x; of one that was added to the residual stream.
int cq_linear_add_backward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dh,
                           int64_t rows, void *dx);
/// The same over `rows` sorted expert rows: y = x W[e]'.
int cq_experts_forward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                       int64_t rows, const void *x, void *y);
int cq_experts_backward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                        const void *x, const void *dy, void *dx);
/// The gradient buffer of a small parameter, or NULL when it is not trained now.
void *cq_param_grad(const cq_layer *l, const cq_param *p);
