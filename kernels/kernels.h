/// kernels.h - the arguments of every operation in kernels.def, and the table of one backend.
///
/// Raw pointers and sizes, no tensors. Every floating buffer of one call has the element type
/// `dtype` (CQ_F32 or CQ_F64; `cpu` runs F32, `ref` both) unless a comment says otherwise. Where
/// there is `act`, the buffers it names are stored as BF16 when it is CQ_BF16 (arithmetic in F32,
/// rounded to nearest even when written), else they are of `dtype`. Only devices have BF16 forms;
/// what such a call gives is what `ref` gives on the widened values, rounded. T tokens lie in one
/// row; `starts` [n_docs + 1] are the positions where documents begin, the last entry is T. `ld*`
/// is the distance between rows in elements. Gradients named `d*` are overwritten; those marked +=
/// are added to. A call returns CQ_OK or cq_fail(...). All results are a function of the arguments
/// and the thread count. Models: Nemotron-H (arXiv 2504.03624), Mamba-2 (arXiv 2405.21060), Qwen3
/// (arXiv 2505.09388).
#pragma once
#include "kernels/losses.h"
#include "kernels/stream.h"

/// Fake quantization of rows: groups of consecutive rows each with their own frozen maximum.
typedef struct cq_fq {
    const float *amax;      ///< [n_groups] per-tensor maxima; NULL: no quantization
    const int64_t *offsets; ///< [n_groups + 1] first row of each group; NULL: one group
    int64_t n_groups;
    int64_t *saturated; ///< += number of blocks whose scale had to be clamped at 448; may be NULL
} cq_fq;

/// C[m, n] = alpha op(A) op(B) + beta C; ta: A is stored [k, m]; tb: B is stored [n, k].
typedef struct cq_matmul_args {
    cq_dtype dtype;
    bool ta, tb;
    int64_t m, n, k;
    const void *a;
    int64_t lda;
    const void *b;
    int64_t ldb;
    void *c;
    int64_t ldc;
    double alpha, beta;
    const void *b16; ///< b rounded to BF16, rows ldb apart as well: saves a pass over b where
                     ///< products are BF16; may be NULL. On a device b may be NULL instead there
    bool a_bf16, b_bf16, c_bf16; ///< on a device: a, b, c hold BF16 (b_bf16: b16 is not read)
} cq_matmul_args;

/// For each group e, over rows offsets[e] .. offsets[e + 1] of x and y (dense rows), weights w[e]
/// [n, k]:
///   CQ_GROUPED_FORWARD  y[r, n]  = x[r, k] w[e]'            x, w -> y
///   CQ_GROUPED_INPUT    x[r, k]  = y[r, n] w[e]             y, w -> x
///   CQ_GROUPED_WEIGHT   w[e]    += y' x                     x, y -> w (a group without rows adds
///   nothing)
typedef enum cq_grouped { CQ_GROUPED_FORWARD, CQ_GROUPED_INPUT, CQ_GROUPED_WEIGHT } cq_grouped;
typedef struct cq_matmul_grouped_args {
    cq_dtype dtype;
    cq_grouped mode;
    int64_t groups, n, k;
    const int64_t *offsets; ///< [groups + 1]
    void *x, *w, *y;
    const void *w16; ///< w rounded to BF16, as b16 of matmul; not read in mode WEIGHT; may be NULL
    bool x_bf16, y_bf16; ///< on a device: x, y hold BF16
} cq_matmul_grouped_args;

/// C[m, n] = A B' + beta C of matrices as `pack` leaves them: codes [., k / 2], scales [., k / 16]
/// and the maximum [1] of each; those of A are dynamic. k is a multiple of 32. On a device with FP4
/// tensor cores products of codes are exact and added up in FP32; elsewhere both are opened to
/// BF16.
typedef struct cq_matmul_nvfp4_args {
    cq_dtype dtype; ///< of c
    int64_t m, n, k;
    const uint8_t *a_codes, *a_scales, *b_codes, *b_scales;
    const float *a_amax, *b_amax;
    float b_top; ///< 448, or what the static scales of B were made for
    void *c;
    int64_t ldc;
    double beta;
    bool c_bf16; ///< on a device: c holds BF16
} cq_matmul_nvfp4_args;

/// y = w * x / sqrt(mean(x^2) + eps); yq = fake quantization of y. y or yq may be NULL.
typedef struct cq_rmsnorm_forward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *x, *w;
    double eps;
    void *y, *yq;
    cq_fq fq;     ///< used when yq is set
    void *rstd;   ///< [rows] 1 / sqrt(mean(x^2) + eps); may be NULL
    cq_dtype act; ///< of y, yq
} cq_rmsnorm_forward_args;
/// dx = rstd (g - xhat mean(g xhat)), g = w dy; added to dx when `accumulate`. dw += sum dy xhat
/// (may be NULL).
typedef struct cq_rmsnorm_backward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *x, *w, *rstd, *dy;
    void *dx, *dw;
    bool accumulate;
} cq_rmsnorm_backward_args;

/// Mamba-2 gated norm, gate first: u = y silu(z), out = w * u / sqrt(mean over its group(u^2) +
/// eps). y [rows, dim] dense, z rows with ldz, `groups` equal groups of channels, rstd [rows,
/// groups].
typedef struct cq_gatednorm_forward_args {
    cq_dtype dtype;
    int64_t rows, dim, groups;
    const void *y, *z;
    int64_t ldz;
    const void *w;
    double eps;
    void *out, *outq; ///< either may be NULL
    cq_fq fq;
    void *rstd;   ///< may be NULL
    cq_dtype act; ///< of y, z, out, outq
} cq_gatednorm_forward_args;
typedef struct cq_gatednorm_backward_args {
    cq_dtype dtype;
    int64_t rows, dim, groups;
    const void *y, *z;
    int64_t ldz;
    const void *w, *rstd, *dout;
    void *dy, *dz;
    int64_t lddz;
    void *dw;     ///< += ; may be NULL
    cq_dtype act; ///< of y, z, dout, dy, dz
} cq_gatednorm_backward_args;

/// Per-head RMSNorm (skipped when w is NULL) and then rotary embedding (skipped when positions is
/// NULL) of `heads` heads in each row. Channel i pairs with i + head_dim / 2; angle position *
/// theta^(-2i / head_dim).
typedef struct cq_headnorm_forward_args {
    cq_dtype dtype;
    int64_t rows, heads, head_dim;
    const void *x;
    int64_t ldx;
    const void *w; ///< [head_dim]
    double eps;
    const int32_t *positions; ///< [rows]
    double theta;
    void *y;
    int64_t ldy;
    cq_dtype act; ///< of x, y
} cq_headnorm_forward_args;
/// x is the forward's input (rstd is recomputed). dx may alias dy. dw += over rows and heads; may
/// be NULL.
typedef struct cq_headnorm_backward_args {
    cq_dtype dtype;
    int64_t rows, heads, head_dim;
    const void *x;
    int64_t ldx;
    const void *w;
    double eps;
    const int32_t *positions;
    double theta;
    const void *dy;
    int64_t lddy;
    void *dx;
    int64_t lddx;
    void *dw;
    cq_dtype act; ///< of x, dy, dx
} cq_headnorm_backward_args;

/// Causal grouped-query attention inside each document: out = softmax(scale q k') v; query head h
/// reads kv head h / (heads / kv_heads). lse [tokens, heads] is the log-sum-exp of the scaled
/// scores.
typedef struct cq_attention_forward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t heads, kv_heads, head_dim;
    double scale;
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv;
    void *out;  ///< [tokens, heads * head_dim] dense
    void *lse;  ///< may be NULL
    void *outq; ///< like out, which it is the fake quantization of as it is stored; may be NULL
    cq_fq fq;
    cq_dtype act; ///< of q, k, v, out, outq
} cq_attention_forward_args;
typedef struct cq_attention_backward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t heads, kv_heads, head_dim;
    double scale;
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv;
    const void *out, *lse, *dout; ///< dense
    void *dq, *dk, *dv;
    int64_t lddq, lddk, lddv;
    cq_dtype act; ///< of q, k, v, out, dout, dq, dk, dv
} cq_attention_backward_args;
/// The same for documents that go on from a past: document d continues what slot `slot[d]` holds,
/// `past[d]` tokens, and its own tokens are added there, so past[d] + length <= room. Query i of
/// document d sees past[d] + i + 1 keys. No two documents name the same slot; slot and past are
/// trusted.
typedef struct cq_attention_cached_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    const int32_t *slot, *past; ///< [n_docs]
    int64_t heads, kv_heads, head_dim;
    int64_t room; ///< positions of a slot, a multiple of 16
    double scale;
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv;
    void *k_cache; ///< [slots, kv_heads, head_dim, room]
    void *v_cache; ///< [slots, kv_heads, room, head_dim]
    void *out;     ///< [tokens, heads * head_dim] dense
    cq_dtype act;  ///< of q, k, v, out
} cq_attention_cached_args;
/// Scratch of `cpu` attention per thread, forward or backward, for documents of up to `longest`
/// tokens.
CQ_API int64_t cq_attention_scratch_bytes(int64_t longest, int64_t head_dim);

/// Causal depthwise convolution and silu: y[t, c] = silu(b[c] + sum_k w[c, k] x[t - width + 1 + k,
/// c]), reading zero across the document's start. w [channels, width]. b may be NULL.
typedef struct cq_conv_forward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t channels, width;
    const void *x;
    int64_t ldx;
    const void *w, *b;
    void *y;      ///< [tokens, channels] dense
    cq_dtype act; ///< of x, y
} cq_conv_forward_args;
typedef struct cq_conv_backward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t channels, width;
    const void *x;
    int64_t ldx;
    const void *w, *b, *dy; ///< dy dense
    void *dx;
    int64_t lddx;
    void *dw, *db; ///< += ; may be NULL
    cq_dtype act;  ///< of x, dy, dx
} cq_conv_backward_args;

/// The same for documents that go on from a past, as attention_cached's: slot s holds its last
/// width - 1 inputs, which are read where past[d] reaches back to them and written anew.
typedef struct cq_conv_cached_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    const int32_t *slot, *past; ///< [n_docs]
    int64_t channels, width;
    const void *x;
    int64_t ldx;
    const void *w, *b;
    void *state;  ///< [slots, width - 1, channels], the oldest first
    void *y;      ///< [tokens, channels] dense
    cq_dtype act; ///< of x, y
} cq_conv_cached_args;

/// Mamba-2 SSD. Per head, zero state at every document's start, A = -exp(a_log), dt =
/// softplus(dt_raw + dt_bias):
///   S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t'      y_t = S_t C_t + D x_t
/// x [tokens, heads, head_dim], B and C [tokens, groups, state], dt_raw [tokens, heads], each with
/// its ld. Head h reads group h / (heads / groups). `chunk` is the block length of the scan (any
/// value gives the same result up to rounding). No clamp on dt (time_step_limit is (0, inf)).
typedef struct cq_ssd_forward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t heads, head_dim, groups, state, chunk;
    const void *x, *B, *C, *dt_raw;
    int64_t ldx, ldB, ldC, ld_dt;
    const void *dt_bias, *a_log, *d; ///< [heads]
    void *y;                         ///< [tokens, heads * head_dim] dense
    cq_dtype act;                    ///< of x, B, C, dt_raw, y
} cq_ssd_forward_args;
typedef struct cq_ssd_backward_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t heads, head_dim, groups, state, chunk;
    const void *x, *B, *C, *dt_raw;
    int64_t ldx, ldB, ldC, ld_dt;
    const void *dt_bias, *a_log, *d;
    const void *dy; ///< dense
    void *dx, *dB, *dC, *ddt_raw;
    int64_t lddx, lddB, lddC, ldd_dt;
    void *ddt_bias, *da_log, *dd; ///< [heads] += ; all three NULL or none
    cq_dtype act;                 ///< of x, B, C, dt_raw, dy, dx, dB, dC, ddt_raw
} cq_ssd_backward_args;
/// The forward for documents that go on from a past, as attention_cached's: S of slot `slot[d]` is
/// what the document starts from, zero where past[d] is 0, and holds S after its last token
/// afterwards.
typedef struct cq_ssd_cached_args {
    cq_dtype dtype;
    int64_t tokens, n_docs;
    const int64_t *starts;
    const int32_t *slot, *past; ///< [n_docs]
    int64_t heads, head_dim, groups, state, chunk;
    const void *x, *B, *C, *dt_raw;
    int64_t ldx, ldB, ldC, ld_dt;
    const void *dt_bias, *a_log, *d; ///< [heads]
    void *S;                         ///< [slots, heads, state, head_dim]
    void *y;                         ///< [tokens, heads * head_dim] dense
    cq_dtype act;                    ///< of x, B, C, dt_raw, y
} cq_ssd_cached_args;
/// Scratch of `cpu` ssd per thread, forward or backward; `longest` tokens in one document.
CQ_API int64_t cq_ssd_scratch_bytes(int64_t longest, int64_t chunk, int64_t heads, int64_t head_dim,
                                    int64_t groups, int64_t state);

/// gu [rows, 2 dim]: gate in the first dim columns, up in the second. h = silu(gate) up.
typedef struct cq_swiglu_forward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *gu;
    void *h, *hq; ///< dense; either may be NULL
    cq_fq fq;
    cq_dtype act; ///< of gu, h, hq
} cq_swiglu_forward_args;
typedef struct cq_swiglu_backward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *gu, *dh;
    void *dgu;
    cq_dtype act; ///< of gu, dh, dgu
} cq_swiglu_backward_args;

/// h = max(x, 0)^2
typedef struct cq_relu2_forward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *x;
    void *h, *hq; ///< either may be NULL
    cq_fq fq;
    cq_dtype act; ///< of x, h, hq
} cq_relu2_forward_args;
typedef struct cq_relu2_backward_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *x, *dh;
    void *dx;     ///< may alias dh
    cq_dtype act; ///< of x, dh, dx
} cq_relu2_backward_args;

/// y = NVFP4 fake quantization of x [rows, cols] (kernels/nvfp4.h); cols is a multiple of 16.
/// Dynamic by default; with block_amax (static, nvfp4.md 2.2) those block maxima are used and `top`
/// is 448 or 256.
typedef struct cq_fake_quant_args {
    cq_dtype dtype;
    int64_t rows, cols;
    const void *x;
    void *y; ///< may alias x
    cq_fq fq;
    const float *block_amax; ///< [rows, cols / 16] or NULL
    float top;               ///< E4M3 value given to the largest block in the static form
    cq_dtype act;            ///< of x, y
} cq_fake_quant_args;
/// NVFP4 codes and block scales of x [rows, cols], those whose decoding fake_quant would write; a
/// zero tensor gives codes 0 and scales 0x38. cols is a multiple of 16, `block_amax` and `top` as
/// in fake_quant, fq is one group. A double is rounded to float first.
typedef struct cq_pack_args {
    cq_dtype dtype;
    int64_t rows, cols;
    const void *x;
    cq_fq fq;
    const float *block_amax;
    float top;
    uint8_t *codes;  ///< [rows, cols / 2], the first of two values in the low half
    uint8_t *scales; ///< [rows, cols / 16] E4M3
    cq_dtype act;    ///< of x
} cq_pack_args;
/// y = code * (e4m3(scale) * amax[g] / (6 top)), evaluated in FP32: what fake_quant wrote. The rows
/// are n_groups groups of rows / n_groups each; `top` is 448 for dynamic scales.
typedef struct cq_unpack_args {
    cq_dtype dtype; ///< of y: F32 or F64; a device also writes BF16, rounded to nearest even
    int64_t rows, cols;
    const uint8_t *codes, *scales;
    const float *amax; ///< [n_groups]
    int64_t n_groups;
    float top;
    void *y;
    const int64_t
        *offsets; ///< [n_groups + 1]: a group whose two are equal is left out; NULL: none is
} cq_unpack_args;
/// amax[g] = max(amax[g], largest |x| in group g's rows).
typedef struct cq_amax_args {
    cq_dtype dtype;
    int64_t rows, cols;
    const void *x;
    const int64_t *offsets; ///< NULL: one group
    int64_t n_groups;
    float *amax;
    cq_dtype act; ///< of x
} cq_amax_args;

/// Sigmoid routing (Nemotron 3): s = sigmoid(logits); choice = s + bias picks top_k of the experts,
/// ties to the lowest index, losing groups at -inf; weight = scaling * s / (sum of the selected s +
/// 1e-20) (or scaling * s).
typedef struct cq_route_forward_args {
    cq_dtype dtype;
    int64_t tokens, experts, top_k, n_group, topk_group;
    bool normalize;
    double scaling;
    const void *logits; ///< [tokens, experts]
    const float *bias;  ///< [experts]
    int32_t *sel;       ///< [tokens, top_k]
    void *weight;       ///< [tokens, top_k]
} cq_route_forward_args;
typedef struct cq_route_backward_args {
    cq_dtype dtype;
    int64_t tokens, experts, top_k;
    bool normalize;
    double scaling;
    const void *logits;
    const int32_t *sel;
    const void *dweight; ///< [tokens, top_k]
    void *dlogits;       ///< [tokens, experts]
} cq_route_backward_args;
/// Sorts the tokens * top_k (token, slot) pairs by expert, stable in token order.
typedef struct cq_route_sort_args {
    int64_t tokens, experts, top_k;
    const int32_t *sel;
    int64_t *offsets;  ///< [experts + 1]
    int32_t *token;    ///< [tokens * top_k] source token of each sorted row
    int32_t *position; ///< [tokens, top_k] sorted row of each pair
} cq_route_sort_args;
/// y[i] = x[index[i]]; yq its fake quantization by groups of i. Either may be NULL.
typedef struct cq_gather_rows_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *x;
    const int32_t *index; ///< [rows]
    void *y, *yq;
    cq_fq fq;
    cq_dtype act; ///< of x, y, yq
} cq_gather_rows_args;
/// out[t] += sum_j weight[t, j] y[position[t, j]], j ascending.
typedef struct cq_combine_forward_args {
    cq_dtype dtype;
    int64_t tokens, top_k, dim;
    const void *y, *weight;
    const int32_t *position;
    void *out;
    cq_dtype act; ///< of y
} cq_combine_forward_args;
/// dweight[t, j] = <dout[t], y[position]>; dy[position] = weight[t, j] dout[t].
typedef struct cq_combine_backward_args {
    cq_dtype dtype;
    int64_t tokens, top_k, dim;
    const void *y, *weight, *dout;
    const int32_t *position;
    void *dy, *dweight;
    cq_dtype act; ///< of y, dy
} cq_combine_backward_args;
/// dx[t] += sum_j dy[position[t, j]], j ascending (the gradient of gathering sorted rows).
typedef struct cq_ungather_rows_args {
    cq_dtype dtype;
    int64_t tokens, top_k, dim;
    const void *dy;
    const int32_t *position;
    void *dx;
    cq_dtype act; ///< of dy
} cq_ungather_rows_args;

typedef struct cq_embed_forward_args {
    cq_dtype dtype;
    int64_t tokens, dim, vocab;
    const int32_t *ids;
    const void *table;
    void *h;
} cq_embed_forward_args;
/// dtable[ids[t]] += dh[t], t ascending.
typedef struct cq_embed_backward_args {
    cq_dtype dtype;
    int64_t tokens, dim, vocab;
    const int32_t *ids;
    const void *dh;
    void *dtable;
} cq_embed_backward_args;

/// AdamW (arXiv 1711.05101) with bias correction at step `step` (from 1): g' = g * grad_scale,
/// w -= lr (mhat / (sqrt(vhat) + eps) + weight_decay w); then wq = fake quantization of the new w
/// [rows, cols] in the same pass when wq is set. Weights, moments and gradient F32 or F64.
///
/// Weights and moments may be stored in fewer bits (kernels/formats.h; gradient and wq F32 then,
/// and one group in fq): they are widened to F32, updated as F32, and what is stored is rounded
/// from the result; wq is made from the stored weight.
typedef enum cq_master { CQ_MASTER_F32 = 0, CQ_MASTER_SPLIT = 1, CQ_MASTER_BF16 = 2 } cq_master;
typedef enum cq_moments { CQ_MOMENTS_F32 = 0, CQ_MOMENTS_BF16 = 1, CQ_MOMENTS_8BIT = 2 } cq_moments;
/// What changes from step to step, as F32 arithmetic takes it: where the kernels run, it spares a
/// recorded pass (core/tensor/graph.h) new arguments.
typedef struct cq_adamw_now {
    float lr, grad_scale, c1, c2; ///< c: 1 - beta^step
    uint64_t key, unused;         ///< 32 bytes, so that one load has the first four
} cq_adamw_now;
typedef struct cq_adamw_args {
    cq_dtype dtype;
    int64_t rows, cols;
    void *w, *m, *v;
    const void *g;
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    int64_t step;
    void *wq; ///< may be NULL
    cq_fq fq;
    const float *block_amax;
    float top;
    cq_master master;         ///< SPLIT: w holds the high halves; BF16: w holds BF16
    cq_moments moments;       ///< BF16: m and v hold BF16; 8BIT: one byte each
    void *low;                ///< [rows, cols] low halves of SPLIT, 16 bits each
    float *m_scale, *v_scale; ///< of 8BIT: [(rows * cols + 255) / 256]
    uint64_t key;             ///< of the stochastic rounding, made from seed, parameter and step
    int64_t first;            ///< number of w[0] in its parameter, a multiple of 256
    const cq_adamw_now *now;  ///< instead of lr, grad_scale, step and key, or NULL
} cq_adamw_args;
/// y = x in F32: BF16, or with `low` the split form (kernels/formats.h).
typedef struct cq_widen_args {
    cq_dtype dtype; ///< of y: F32 or F64
    int64_t n;
    const void *x, *low; ///< 16 bits each; low may be NULL
    void *y;
} cq_widen_args;
/// out[0] += sum of squares in double; non-finite input gives a non-finite sum.
typedef struct cq_sumsq_args {
    cq_dtype dtype;
    int64_t n;
    const void *x;
    double *out;
} cq_sumsq_args;
/// y = alpha x + beta y (beta 0: y is not read).
typedef struct cq_axpy_args {
    cq_dtype dtype;
    int64_t n;
    double alpha, beta;
    const void *x;
    void *y;
} cq_axpy_args;

/// y = x rounded to BF16, to nearest, ties to even; NaN stays NaN. y holds BF16.
typedef struct cq_round_bf16_args {
    cq_dtype dtype; ///< of x
    int64_t n;
    const void *x;
    void *y;
} cq_round_bf16_args;

/// One backend: a function per operation.
struct cq_kernels {
    const char *name;
    const cq_memory *memory; ///< NULL: the host's
#define CQ_KERNEL(op) int (*op)(cq_stream *, const cq_##op##_args *);
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
#ifndef CQ_CDEF
#define CQ_KERNEL(op)                                                                              \
    int cq_ref_##op(cq_stream *s, const cq_##op##_args *a);                                        \
    int cq_cpu_##op(cq_stream *s, const cq_##op##_args *a);                                        \
    int cq_cuda_##op(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
/// Runs one operation with designated initialisers: CQ_RUN(s, axpy, .dtype = CQ_F32, .n = n, ...).
#define CQ_RUN(s, op, ...) (s)->table->op((s), &(cq_##op##_args){__VA_ARGS__})
#endif

/// The table `ref` or `cpu`; NULL for another name. An operation or dtype that `cpu` lacks runs in
/// `ref`.
CQ_API const cq_kernels *cq_kernels_find(const char *name);
/// The same operations, each followed by a look at its floating results: the first NaN or Inf is a
/// CQ_ENUMERIC that names operation, buffer and row. Slow; one table at a time in a process.
CQ_API const cq_kernels *cq_kernels_checked(const cq_kernels *of);
/// The same operations, each timed (on a device: waited for); the totals go to standard error at
/// the end of the process. One table at a time in a process.
CQ_API const cq_kernels *cq_kernels_profiled(const cq_kernels *of);
/// What `cpu` dispatches to on this machine: "avx512", "avx2" or "generic".
CQ_API const char *cq_cpu_isa(void);
/// Processors of the machine that are on, whether or not this process may run on all.
CQ_API int cq_processors(void);
/// Sets the OpenMP thread count (0: the machine's cores) and passive waiting; returns the count.
CQ_API int cq_threads_set(int threads);
