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
#include "core/base/dtype.h"

typedef struct cq_kernels cq_kernels;

/// CQ_COMPUTE_BF16 rounds the operands of matrix products to BF16 and accumulates in FP32; all else
/// stays FP32.
typedef enum cq_compute { CQ_COMPUTE_F32 = 0, CQ_COMPUTE_BF16 = 1 } cq_compute;

/// What runs an operation: a table, its threads, and scratch that the plan paid for.
typedef struct cq_stream {
    const cq_kernels *table;
    int threads;
    cq_compute compute;
    void *scratch;         ///< threads * scratch_bytes, 64-byte aligned; owned by the plan
    int64_t scratch_bytes; ///< per thread; an operation that needs more fails with CQ_ENOMEM
    void *bf16_scratch;    ///< operands of one matmul in BF16, or NULL; owned by the plan
    int64_t bf16_scratch_bytes;
    bool fp4; ///< of a device, where compute is BF16: products of a quantized linear's forward may
              ///< be matmul_nvfp4
    bool by_row;  ///< FP32 products C = A W' sum every row of C in an order that the other rows do
                  ///< not change: a row's bits are the same in any batch (generation)
    void *queue;  ///< of a device: its CUDA stream
    void *device; ///< of a device: its scratch and handles; memory->open makes both
} cq_stream;

/// The memory of a backend whose buffers the host may not touch. Calls are ordered like operations
/// of their stream.
typedef struct cq_memory {
    /// Makes s->queue and s->device for device `index`; close frees them.
    int (*open)(cq_stream *s, int index);
    void (*close)(cq_stream *s);
    /// Zeroed memory of the open device. `shared` memory is the host's, pinned, and the device
    /// reaches it, too.
    int (*take)(void **out, int64_t bytes, bool shared);
    void (*give)(void *memory, int64_t bytes, bool shared);
    /// Either side may be host memory; when it returns, host memory may be read or changed.
    int (*copy)(cq_stream *s, void *to, const void *from, int64_t bytes);
    int (*zero)(cq_stream *s, void *to, int64_t bytes);
    /// Waits until all that was asked of the stream is done; an error of any of it is reported.
    int (*wait)(cq_stream *s);
    /// Copies shared memory to the device beside the operations that are asked from now on, but
    /// after those asked before; `arrived` makes what is asked after it wait for that. Slots are 0
    /// and 1.
    int (*fetch)(cq_stream *s, int slot, void *to, const void *from, int64_t bytes);
    int (*arrived)(cq_stream *s, int slot);
    int (*available)(int64_t *bytes);
    /// "NVIDIA H200, compute capability 9.0" into text[size].
    int (*describe)(char *text, int64_t size);
    /// Devices of this machine; an error where none can be used.
    int (*count)(int *n);
    /// Whether the stream's device has FP4 tensor cores.
    bool (*has_fp4)(const cq_stream *s);
} cq_memory;

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
    void *out;    ///< [tokens, heads * head_dim] dense
    void *lse;    ///< may be NULL
    cq_dtype act; ///< of q, k, v, out
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

/// Forward KL(teacher || student) of a chunk of rows, and d/d(student logits) written over the
/// student logits. Rows with labels < 0 count nothing and get a zero gradient row. Top-k forms are
/// method.md 3.2: A renormalized, B truncated, C tail bucket; top_k >= vocab is the full KL in
/// every form.
typedef enum cq_kl_form {
    CQ_KL_FULL,
    CQ_KL_RENORMALIZED,
    CQ_KL_TRUNCATED,
    CQ_KL_TAIL_BUCKET
} cq_kl_form;
typedef struct cq_kl_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    cq_kl_form form;
    int64_t top_k;
    const void *teacher; ///< [rows, vocab]
    void *student; ///< in: logits; out: scale * gradient of the row's KL when `gradient`, else
                   ///< unchanged
    const int32_t *labels; ///< [rows]
    double scale;          ///< usually 1 / valid tokens
    bool gradient;
    double *sum;                       ///< += sum of KL over valid rows, nats
    double *nll_teacher, *nll_student; ///< += negative log-likelihood of the labels; may be NULL
    int64_t *agree; ///< += valid rows whose top-1 tokens agree (ties to the lowest id); may be NULL
    int64_t *valid; ///< += valid rows; may be NULL
} cq_kl_args;
/// What a cache keeps of a teacher's row: its k largest log-probabilities, the larger first (the
/// lower id first of equals), and the log of the mass of all others (-inf where k = vocab).
typedef struct cq_top_logits_args {
    cq_dtype dtype;
    int64_t rows, vocab, k; ///< 1 <= k <= vocab
    const void *logits;     ///< [rows, vocab]
    const int32_t *labels;  ///< [rows] rows with labels < 0 are left out
    const int32_t *at;      ///< [rows] row of ids, log_p, log_tail and log_label that each fills
    int32_t *ids;           ///< [.., k]
    void *log_p;            ///< [.., k]
    void *log_tail;         ///< [..]
    void *log_label;        ///< [..] of the label; may be NULL
} cq_top_logits_args;
/// `kl` against a teacher of which top_logits is all there is. The k log-probabilities count
/// relative to each other and their mass is 1 - tail, so rounded ones are a distribution too. S is
/// the first top_k of them; the others count as tail. top_k >= vocab, or CQ_KL_FULL, needs k =
/// vocab.
typedef struct cq_kl_cached_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    cq_kl_form form;
    int64_t top_k, k;
    const int32_t *ids;               ///< [.., k] distinct, below vocab
    const void *log_p;                ///< [.., k]
    bool half;                        ///< log_p is F16
    const void *log_tail, *log_label; ///< [..]; log_label may be NULL
    const int32_t *at; ///< [rows] the row of each row with a label in the four before
    void *student;     ///< from here on as in `kl`; nll_teacher += -log_label
    const int32_t *labels;
    double scale;
    bool gradient;
    double *sum, *nll_teacher, *nll_student;
    int64_t *agree, *valid;
} cq_kl_cached_args;
/// Cross-entropy of rows with labels >= 0; logits become scale * gradient when `gradient`. A row
/// counts weights[r] times in sum and gradient, once in `correct` and `valid`; weights below 0 make
/// its label less likely.
typedef struct cq_cross_entropy_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    void *logits;
    const int32_t *labels;
    const float *weights; ///< [rows]; NULL: all 1
    double scale;
    bool gradient;
    double *sum;
    int64_t *correct, *valid; ///< += ; may be NULL
} cq_cross_entropy_args;

/// Gram matrix of n rows, centred: biased K = Xc Xc' with Xc = X - column means; unbiased:
/// U-centred X X' (zero diagonal). n >= 2 (biased) or 4 (unbiased). method.md 4.1.
/// Here and in the two that follow, `batch` is how many one call makes, 0 counts as 1; each has the
/// bits it has alone.
typedef struct cq_gram_args {
    cq_dtype dtype;
    int64_t batch, n, dim;
    const void *x; ///< [batch, n, dim] dense; not changed
    bool unbiased;
    void *scratch; ///< [batch, n, dim] for the centred rows
    void *gram;    ///< [batch, n, n]
} cq_gram_args;
/// Two losses of a student Gram k and a teacher Gram l [n, n], both centred the same way.
///   CQ_GRAM_CKA        loss = 1 - <K, L> / (|K| |L|), evaluated as |K/|K| - L/|L||^2 / 2 (no
///   cancellation);
///                      0 when a norm is 0 or not finite
///   CQ_GRAM_FROBENIUS  loss = |K - L|^2 / |L|^2
/// out[0] = <K, L>, out[1] = <K, K>, out[2] = <L, L>, out[3] = loss, all in double.
typedef enum cq_gram_loss { CQ_GRAM_CKA, CQ_GRAM_FROBENIUS } cq_gram_loss;
typedef struct cq_cka_args {
    cq_dtype dtype;
    cq_gram_loss loss;
    int64_t batch, n;
    const void *k, *l; ///< [batch, n, n]
    double *out;       ///< [batch, 4]
} cq_cka_args;
/// dx = weight * dloss/dX; for CKA -weight * (2/b) (L/c - cka K/b) X with b = |K|, c = |L|
/// (method.md 4.2), for Frobenius weight * 4 (K - L) X / |L|^2. k is destroyed. Zero where the loss
/// is defined as 0. x need not be centred.
typedef struct cq_cka_backward_args {
    cq_dtype dtype;
    cq_gram_loss loss;
    int64_t batch, n, dim;
    void *k;       ///< [batch, n, n]
    const void *l; ///< [batch, n, n]
    const void *x; ///< [batch, n, dim]
    double weight;
    const double *weights; ///< [batch], each in the place of `weight`; may be NULL
    const double *stats;   ///< [batch, 4] the values of cq_cka_args
    void *dx;              ///< [batch, n, dim]
} cq_cka_backward_args;
/// Rivals of CKA on the same rows: cosine: mean over rows of 1 - cos(x, y); mse: |X - Y|^2 / |Y|^2.
typedef enum cq_rowloss_form { CQ_ROWLOSS_COSINE, CQ_ROWLOSS_MSE } cq_rowloss_form;
typedef struct cq_rowloss_args {
    cq_dtype dtype;
    cq_rowloss_form form;
    int64_t n, dim;
    const void *x, *y; ///< student, teacher
    double *out;       ///< [1]
} cq_rowloss_args;
/// dx = weight * d(loss)/dX.
typedef struct cq_rowloss_backward_args {
    cq_dtype dtype;
    cq_rowloss_form form;
    int64_t n, dim;
    const void *x, *y;
    double weight;
    const double *weights; ///< [1] in the place of `weight`; may be NULL
    void *dx;
} cq_rowloss_backward_args;
/// The losses of a micro-batch where the host finds them later, and with `ratio` the weights of its
/// n layer losses, worked out where they are, in double as cq.balance.ratio does:
///     kl = sum / valid     gap = mean of 1 - cka, 0 for n = 0     cka = 1 - loss
///     weight = min(max(kl, 0) / max(gap, 1e-8), most)             each loss: weight / n * share
typedef struct cq_balance_args {
    int64_t n;
    const double *sum;    ///< of the logit loss
    const int64_t *right; ///< right answers
    const double *stats;  ///< [n, 4] of cka or rowloss, the loss last
    const int32_t *order; ///< [n] in which the losses are added up
    bool ratio;
    double valid, share, most;
    double *weights; ///< [n] of the layer losses; written by `ratio`
    double *report;  ///< [3 + n] sum, right answers, weight (0 without `ratio`), the losses
} cq_balance_args;
/// x[index[i]] += y[i]; indices are distinct.
typedef struct cq_scatter_rows_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *y;
    const int32_t *index;
    void *x;
} cq_scatter_rows_args;

/// AdamW (arXiv 1711.05101) with bias correction at step `step` (from 1): g' = g * grad_scale,
/// w -= lr (mhat / (sqrt(vhat) + eps) + weight_decay w); then wq = fake quantization of the new w
/// [rows, cols] in the same pass when wq is set. Weights, moments and gradient F32 or F64.
///
/// Weights and moments may be stored in fewer bits (kernels/formats.h; gradient and wq F32 then,
/// and one group in fq): they are widened to F32, updated as F32, and what is stored is rounded
/// from the result; wq is made from the stored weight.
typedef enum cq_master { CQ_MASTER_F32 = 0, CQ_MASTER_SPLIT = 1, CQ_MASTER_BF16 = 2 } cq_master;
typedef enum cq_moments { CQ_MOMENTS_F32 = 0, CQ_MOMENTS_BF16 = 1, CQ_MOMENTS_8BIT = 2 } cq_moments;
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
