/// norms.cu - RMSNorm of rows, Mamba-2's gated group norm, and RMSNorm of heads with rotary
/// embedding; formulas are kernels/ref/norms.inc.h's.
///
/// All are bound by memory. Times at 4 TB/s, 8192 tokens, bytes per element of the input:
///   rmsnorm_forward    Nano 2688 wide: 8 (yq alone), 12 (y and yq)      176 MB, 44 us
///   rmsnorm_backward   12, 16 when it accumulates                       264 MB, 66 us
///   gatednorm_forward  Nano 4096 wide in 8 groups: 12 (out alone)       403 MB, 100 us
///   gatednorm_backward 20                                               671 MB, 168 us
///   headnorm_forward   Qwen3-4B 32 heads x 128 of q: 8                  268 MB, 67 us
///   headnorm_backward  12                                               403 MB, 100 us
/// A value is read once: rows and groups stay in registers between the sum and the result. Weight
/// gradients are summed in registers over the rows that a block takes, then over blocks in order.
#include "kernels/cuda/fake.cuh"
#include "kernels/cuda/parts.cuh"

/// Rows that one block of a persistent grid takes, and the number of such blocks.
struct row_share {
    int64_t rows, blocks;
};
static row_share share_rows(int64_t rows, int64_t most) {
    row_share s;
    s.rows = (rows + most - 1) / most;
    s.blocks = (rows + s.rows - 1) / s.rows;
    return s;
}
enum { SMS = 132, MOST_PARTS = 1024 /* where a thread sums one column */ };

// ---- RMSNorm ------------------------------------------------------------------------------------

/// How a block of whole warps covers n quarters of a row: `steps` per thread, threads apart. No
/// more than 512 threads and 4 steps; steps 0 where that is not enough.
struct row_cover {
    int steps, threads;
};
static row_cover cover_row(int64_t n) {
    row_cover best = {0, 0};
    for (int steps = 1; steps <= 4; steps++) {
        int64_t threads = (n + steps * CQ_WARP - 1) / (steps * CQ_WARP) * CQ_WARP;
        if (threads > 512)
            continue;
        bool better = best.steps == 0 || (best.threads > 256 && threads < best.threads) ||
                      (best.threads > 128 && threads * steps < best.threads * best.steps);
        if (better)
            best = {steps, (int)threads};
    }
    return best;
}

/// A block takes rows blockIdx.x, + gridDim.x ..., the next one is read while this one is worked
/// on.
template <int STEPS, typename T>
static __global__ void __launch_bounds__(512)
    rmsnorm_forward_rows(cq_rmsnorm_forward_args a, int64_t quarters) {
    CQ_SHARED(float, room, [32]);
    const float *X = (const float *)a.x;
    T *y = (T *)a.y, *yq = (T *)a.yq;
    float *rstd = (float *)a.rstd;
    float4 x[STEPS];
    bool quantize = yq && a.fq.amax;
    int saturated = 0;
    cq_fake_group group =
        cq_fake_group_from(quantize && !a.fq.offsets ? a.fq.amax[0] : 0.0f, 448.0f);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
        x[k] = cq_load4_if(at < quarters, X + ((int64_t)blockIdx.x * quarters + at) * 4);
    }
    for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
        float4 v[STEPS];
        float sum = 0.0f;
        int64_t next = r + gridDim.x < a.rows ? r + gridDim.x : r;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            v[k] = x[k];
            if (at < quarters)
                x[k] = cq_load4(X + (next * quarters + at) * 4, true);
            sum += cq_dot4(v[k], v[k]);
        }
        float by = cq_rstd(cq_block_sum(sum, room), a.dim, (float)a.eps);
        if (rstd && threadIdx.x == 0)
            rstd[r] = by;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            float4 w = cq_load4_if(at < quarters, (const float *)a.w + 4 * at);
            v[k] = cq_times4(w, cq_scale4(v[k], by));
            if (y && at < quarters)
                cq_store4(y + (r * quarters + at) * 4, v[k], true);
        }
        if (quantize) {
            if (a.fq.offsets)
                group = cq_fake_group_of(a.fq, cq_warp_group_of_row(a.fq.offsets, a.fq.n_groups, r),
                                         448.0f);
            saturated += cq_fake_quads<STEPS, false>(v, group, -1.0f);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            if (yq && at < quarters)
                cq_store4(yq + (r * quarters + at) * 4, v[k], true);
        }
    }
    if (quantize)
        cq_fake_count(a.fq.saturated, saturated);
}
/// Any width: one row per block, read twice; `out` is quantized later.
template <typename Out>
static __global__ void __launch_bounds__(256)
    rmsnorm_forward_any(cq_rmsnorm_forward_args a, Out *out) {
    CQ_SHARED(float, room, [32]);
    int64_t r = blockIdx.x;
    const float *x = (const float *)a.x + r * a.dim, *w = (const float *)a.w;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x)
        sum += x[i] * x[i];
    float by = cq_rstd(cq_block_sum(sum, room), a.dim, (float)a.eps);
    if (a.rstd && threadIdx.x == 0)
        ((float *)a.rstd)[r] = by;
    for (int64_t i = threadIdx.x; out && i < a.dim; i += blockDim.x)
        cq_put(out + r * a.dim + i, w[i] * (x[i] * by));
}

/// Quantizes (or copies) `out` to `quantized` where the norm itself did not.
static int quantize_rows(cq_stream *s, cq_dtype act, int64_t rows, int64_t dim, const void *out,
                         void *quantized, const cq_fq &fq) {
    if (!quantized)
        return CQ_OK;
    cq_fake_quant_args q = {};
    q.rows = rows;
    q.cols = dim;
    q.x = out;
    q.y = quantized;
    q.fq = fq;
    q.top = 448.0f;
    q.act = act;
    return cq_cuda_fake_quant(s, &q);
}
/// Rows in F32 for a norm that does not quantize itself and whose results are T: rounded first they
/// would be quantized to other values. NULL where there is no need.
template <typename T>
static int wide_rows(cq_stream *s, float **wide, int64_t values, const void *quantized,
                     const cq_fq &fq) {
    *wide = NULL;
    if (sizeof(T) == sizeof(float) || !quantized || !fq.amax)
        return CQ_OK;
    *wide = (float *)cq_cuda_scratch(s, values * (int64_t)sizeof(float));
    return *wide ? CQ_OK : CQ_ENOMEM;
}
/// Both results of such rows.
template <typename T>
static void store_rows(cq_stream *s, const float *wide, int64_t rows, int64_t dim, void *out,
                       void *quantized, const cq_fq &fq) {
    cq_fake_dense<float> source = {wide, true};
    cq_fake_launch<false>(s, source, cq_fake_job_make<T>(rows, dim, out, quantized, fq));
}

template <typename T>
static int rmsnorm_forward_unaligned(cq_stream *s, const cq_rmsnorm_forward_args *a) {
    T *out = (T *)(a->y ? a->y : a->yq);
    float *wide;
    CQ_TRY(wide_rows<T>(s, &wide, a->rows * a->dim, a->yq, a->fq));
    if (wide) {
        CQ_LAUNCH(rmsnorm_forward_any<float>, (unsigned)a->rows, 256, 0, s, *a, wide);
        store_rows<T>(s, wide, a->rows, a->dim, a->y, a->yq, a->fq);
    } else {
        CQ_LAUNCH(rmsnorm_forward_any<T>, (unsigned)a->rows, 256, 0, s, *a, out);
        CQ_TRY(quantize_rows(s, a->act, a->rows, a->dim, out, a->yq, a->fq));
    }
    CQ_CUDA_END("rmsnorm_forward");
}

template <typename T> static int rmsnorm_forward(cq_stream *s, const cq_rmsnorm_forward_args *a) {
    row_cover c = cover_row(a->dim / 4);
    bool whole = a->dim % 4 == 0 && c.steps && cq_aligned16(a->x) && cq_aligned16(a->w) &&
                 cq_aligned4<T>(a->y) && cq_aligned4<T>(a->yq);
    if (!whole)
        return rmsnorm_forward_unaligned<T>(s, a);
    int64_t most = SMS * (int64_t)(1024 / c.threads); /* at once, with 64 registers */
    unsigned blocks = (unsigned)share_rows(a->rows, most).blocks;
    int64_t n = a->dim / 4;
    if (c.steps == 1)
        CQ_LAUNCH((rmsnorm_forward_rows<1, T>), blocks, c.threads, 0, s, *a, n);
    else if (c.steps == 2)
        CQ_LAUNCH((rmsnorm_forward_rows<2, T>), blocks, c.threads, 0, s, *a, n);
    else if (c.steps == 3)
        CQ_LAUNCH((rmsnorm_forward_rows<3, T>), blocks, c.threads, 0, s, *a, n);
    else
        CQ_LAUNCH((rmsnorm_forward_rows<4, T>), blocks, c.threads, 0, s, *a, n);
    CQ_CUDA_END("rmsnorm_forward");
}

extern "C" int cq_cuda_rmsnorm_forward(cq_stream *s, const cq_rmsnorm_forward_args *a) {
    CQ_CUDA_ACT("rmsnorm_forward", a);
    if (a->yq)
        CQ_TRY(cq_fake_columns(a->fq, a->dim));
    if (a->rows == 0 || a->dim == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? rmsnorm_forward<__nv_bfloat16>(s, a) : rmsnorm_forward<float>(s, a);
}

/// A block takes `share` rows in a row; its sum of dy xhat goes to part[blockIdx.x]. dx may be dy.
template <int STEPS>
static __global__ void __launch_bounds__(512)
    rmsnorm_backward_rows(cq_rmsnorm_backward_args a, int64_t quarters, int64_t share,
                          float *part) {
    CQ_SHARED(float, room, [32]);
    const float *rstd = (const float *)a.rstd;
    float4 dw[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        dw[k] = cq_zero4();
    int64_t first = blockIdx.x * share, end = first + share < a.rows ? first + share : a.rows;
    for (int64_t r = first; r < end; r++) {
        const float *X = (const float *)a.x + r * a.dim, *DY = (const float *)a.dy + r * a.dim;
        float *DX = (float *)a.dx + r * a.dim;
        float by = rstd[r], sum = 0.0f;
        float4 x[STEPS], g[STEPS], old[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            x[k] = cq_load4_if(at < quarters, X + 4 * at);
            g[k] = cq_load4_if(at < quarters, DY + 4 * at);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            float4 w = cq_load4_if(at < quarters, (const float *)a.w + 4 * at);
            x[k] = cq_scale4(x[k], by);
            dw[k] = cq_plus4(dw[k], cq_times4(g[k], x[k]));
            g[k] = cq_times4(w, g[k]);
            sum += cq_dot4(g[k], x[k]);
            old[k] = cq_load4_if(a.accumulate && at < quarters, DX + 4 * at);
        }
        float m = cq_block_sum(sum, room) / (float)a.dim;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
            if (at < quarters)
                cq_store4(DX + 4 * at, cq_plus4(old[k], cq_norm_slope4(g[k], x[k], m, by)), true);
        }
    }
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = threadIdx.x + (int64_t)k * blockDim.x;
        if (part && at < quarters)
            cq_store4(part + (blockIdx.x * quarters + at) * 4, dw[k], true);
    }
}
/// Any width: sums of dy xhat over `share` rows, a thread per column; then dx, a block per row.
static __global__ void __launch_bounds__(128)
    rmsnorm_weight_any(cq_rmsnorm_backward_args a, int64_t share, float *part) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t first = blockIdx.y * share;
    if (i >= a.dim)
        return;
    float sum = 0.0f;
    for (int64_t r = first; r < first + share && r < a.rows; r++)
        sum += ((const float *)a.dy)[r * a.dim + i] *
               (((const float *)a.x)[r * a.dim + i] * ((const float *)a.rstd)[r]);
    part[blockIdx.y * a.dim + i] = sum;
}
static __global__ void __launch_bounds__(256) rmsnorm_backward_any(cq_rmsnorm_backward_args a) {
    CQ_SHARED(float, room, [32]);
    int64_t r = blockIdx.x;
    const float *x = (const float *)a.x + r * a.dim, *w = (const float *)a.w;
    const float *dy = (const float *)a.dy + r * a.dim;
    float *dx = (float *)a.dx + r * a.dim;
    float by = ((const float *)a.rstd)[r], sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x)
        sum += w[i] * dy[i] * (x[i] * by);
    float m = cq_block_sum(sum, room) / (float)a.dim;
    for (int64_t i = threadIdx.x; i < a.dim; i += blockDim.x) {
        float d = by * (w[i] * dy[i] - x[i] * by * m);
        dx[i] = a.accumulate ? dx[i] + d : d;
    }
}

extern "C" int cq_cuda_rmsnorm_backward(cq_stream *s, const cq_rmsnorm_backward_args *a) {
    CQ_CUDA_F32("rmsnorm_backward", a);
    if (a->rows == 0 || a->dim == 0)
        return CQ_OK;
    row_cover c = cover_row(a->dim / 4);
    bool whole = a->dim % 4 == 0 && c.steps && cq_aligned16(a->x) && cq_aligned16(a->w) &&
                 cq_aligned16(a->dy) && cq_aligned16(a->dx);
    /* as many blocks as there is room for at once, by the registers of a thread */
    static const int registers[] = {0, 40, 64, 96, 120};
    int64_t most = MOST_PARTS, fit = whole ? 65536 / (c.threads * registers[c.steps]) : 0;
    if (whole)
        most = (int64_t)SMS * (fit > 1 ? fit : 1);
    row_share share = share_rows(a->rows, most);
    float *part = NULL;
    if (a->dw) {
        part = (float *)cq_cuda_scratch(s, share.blocks * a->dim * (int64_t)sizeof(float));
        if (!part)
            return CQ_ENOMEM;
    }
    int64_t n = a->dim / 4;
    unsigned blocks = (unsigned)share.blocks;
    if (!whole) {
        if (part)
            CQ_LAUNCH(rmsnorm_weight_any, dim3(cq_blocks(a->dim, 128), blocks), 128, 0, s, *a,
                      share.rows, part);
        CQ_LAUNCH(rmsnorm_backward_any, (unsigned)a->rows, 256, 0, s, *a);
    } else if (c.steps == 1)
        CQ_LAUNCH(rmsnorm_backward_rows<1>, blocks, c.threads, 0, s, *a, n, share.rows, part);
    else if (c.steps == 2)
        CQ_LAUNCH(rmsnorm_backward_rows<2>, blocks, c.threads, 0, s, *a, n, share.rows, part);
    else if (c.steps == 3)
        CQ_LAUNCH(rmsnorm_backward_rows<3>, blocks, c.threads, 0, s, *a, n, share.rows, part);
    else
        CQ_LAUNCH(rmsnorm_backward_rows<4>, blocks, c.threads, 0, s, *a, n, share.rows, part);
    if (part)
        cq_add_parts_to(s, a->dim, share.blocks, part, (float *)a->dw);
    CQ_CUDA_END("rmsnorm_backward");
}

// ---- gated group norm ---------------------------------------------------------------------------

static __device__ __forceinline__ float gated(float y, float z) { return y * z * cq_sigmoid(z); }
/// A warp takes one group of one row, `quarters` <= 32 STEPS of them.
template <int STEPS, typename T>
static __global__ void __launch_bounds__(256)
    gatednorm_forward_groups(cq_gatednorm_forward_args a, int64_t quarters, cq_divider groups) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t task = (int64_t)blockIdx.x * (blockDim.x / CQ_WARP) + threadIdx.x / CQ_WARP;
    if (task >= a.rows * a.groups) /* the whole warp */
        return;
    int64_t r = cq_divide(task, groups), first = (task - r * a.groups) * quarters;
    const T *y = (const T *)a.y + r * a.dim + 4 * first;
    const T *z = (const T *)a.z + r * a.ldz + 4 * first;
    const float *w = (const float *)a.w + 4 * first;
    T *out = (T *)a.out, *outq = (T *)a.outq;
    float4 u[STEPS], v[STEPS], weight[STEPS];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = k * CQ_WARP + lane;
        u[k] = cq_load4_if(at < quarters, y + 4 * at);
        v[k] = cq_load4_if(at < quarters, z + 4 * at);
        weight[k] = cq_load4_if(at < quarters, w + 4 * at);
    }
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        u[k] = cq_times4(cq_times4(u[k], v[k]), cq_sigmoid4(v[k]));
        sum += cq_dot4(u[k], u[k]);
    }
    float by = cq_rstd(cq_warp_sum(sum), 4 * quarters, (float)a.eps);
    if (a.rstd && lane == 0)
        ((float *)a.rstd)[task] = by;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = k * CQ_WARP + lane;
        u[k] = cq_times4(weight[k], cq_scale4(u[k], by));
        if (out && at < quarters)
            cq_store4(out + r * a.dim + 4 * (first + at), u[k], true);
    }
    if (!outq)
        return;
    if (a.fq.amax) {
        int64_t group = cq_warp_group_of_row(a.fq.offsets, a.fq.n_groups, r);
        cq_fake_count(a.fq.saturated,
                      cq_fake_quads<STEPS, false>(u, cq_fake_group_of(a.fq, group, 448.0f), -1.0f));
    }
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = k * CQ_WARP + lane;
        if (at < quarters)
            cq_store4(outq + r * a.dim + 4 * (first + at), u[k], true);
    }
}
/// Any width: a block per group of a row.
template <typename T, typename Out>
static __global__ void __launch_bounds__(128)
    gatednorm_forward_any(cq_gatednorm_forward_args a, Out *out) {
    CQ_SHARED(float, room, [32]);
    int64_t width = a.dim / a.groups, r = blockIdx.x / a.groups, g = blockIdx.x % a.groups;
    const T *y = (const T *)a.y + r * a.dim + g * width;
    const T *z = (const T *)a.z + r * a.ldz + g * width;
    const float *w = (const float *)a.w + g * width;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        float u = gated(cq_value(y[i]), cq_value(z[i]));
        sum += u * u;
    }
    float by = cq_rstd(cq_block_sum(sum, room), width, (float)a.eps);
    if (a.rstd && threadIdx.x == 0)
        ((float *)a.rstd)[blockIdx.x] = by;
    for (int64_t i = threadIdx.x; out && i < width; i += blockDim.x)
        cq_put(out + r * a.dim + g * width + i,
               w[i] * (gated(cq_value(y[i]), cq_value(z[i])) * by));
}

template <typename T>
static int gatednorm_forward_unaligned(cq_stream *s, const cq_gatednorm_forward_args *a) {
    unsigned tasks = (unsigned)(a->rows * a->groups);
    T *out = (T *)(a->out ? a->out : a->outq);
    float *wide;
    CQ_TRY(wide_rows<T>(s, &wide, a->rows * a->dim, a->outq, a->fq));
    if (wide) {
        CQ_LAUNCH((gatednorm_forward_any<T, float>), tasks, 128, 0, s, *a, wide);
        store_rows<T>(s, wide, a->rows, a->dim, a->out, a->outq, a->fq);
    } else {
        CQ_LAUNCH((gatednorm_forward_any<T, T>), tasks, 128, 0, s, *a, out);
        CQ_TRY(quantize_rows(s, a->act, a->rows, a->dim, out, a->outq, a->fq));
    }
    CQ_CUDA_END("gatednorm_forward");
}

template <typename T>
static int gatednorm_forward(cq_stream *s, const cq_gatednorm_forward_args *a) {
    int64_t width = a->dim / a->groups, n = width / 4;
    bool whole = width % (a->outq && a->fq.amax ? 16 : 4) == 0 && width <= 512 && a->ldz % 4 == 0 &&
                 cq_aligned4<T>(a->y) && cq_aligned4<T>(a->z) && cq_aligned16(a->w) &&
                 cq_aligned4<T>(a->out) && cq_aligned4<T>(a->outq);
    if (!whole)
        return gatednorm_forward_unaligned<T>(s, a);
    unsigned blocks = cq_blocks(a->rows * a->groups, 8);
    cq_divider groups = cq_divider_make(a->groups);
    if (width <= 128)
        CQ_LAUNCH((gatednorm_forward_groups<1, T>), blocks, 256, 0, s, *a, n, groups);
    else if (width <= 256)
        CQ_LAUNCH((gatednorm_forward_groups<2, T>), blocks, 256, 0, s, *a, n, groups);
    else
        CQ_LAUNCH((gatednorm_forward_groups<4, T>), blocks, 256, 0, s, *a, n, groups);
    CQ_CUDA_END("gatednorm_forward");
}

extern "C" int cq_cuda_gatednorm_forward(cq_stream *s, const cq_gatednorm_forward_args *a) {
    CQ_CUDA_ACT("gatednorm_forward", a);
    if (a->outq)
        CQ_TRY(cq_fake_columns(a->fq, a->dim));
    if (a->rows == 0 || a->dim == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? gatednorm_forward<__nv_bfloat16>(s, a)
                             : gatednorm_forward<float>(s, a);
}

/// dy and dz of one element: du is the gradient of u = y z s.
static __device__ __forceinline__ void gate_slopes(float y, float z, float du, float *dy,
                                                   float *dz) {
    float s = cq_sigmoid(z);
    *dy = du * z * s;
    *dz = du * y * s * (1.0f + z * (1.0f - s));
}
enum { GATE_WARPS = 8 };
/// A block takes group blockIdx.x of `share` rows in a row, a warp every eighth of them; its sum of
/// dout uhat goes to part[blockIdx.y].
template <int STEPS, typename T>
static __global__ void __launch_bounds__(GATE_WARPS *CQ_WARP)
    gatednorm_backward_groups(cq_gatednorm_backward_args a, int64_t quarters, int64_t share,
                              float *part) {
    CQ_SHARED(float4, sums, [GATE_WARPS][STEPS * CQ_WARP]);
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int64_t column = 4 * blockIdx.x * quarters, first = blockIdx.y * share;
    int64_t end = first + share < a.rows ? first + share : a.rows;
    float4 w[STEPS], dw[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t at = k * CQ_WARP + lane;
        w[k] = cq_load4_if(at < quarters, (const float *)a.w + column + 4 * at);
        dw[k] = cq_zero4();
    }
    for (int64_t r = first + warp; r < end; r += GATE_WARPS) {
        const T *Y = (const T *)a.y + r * a.dim + column;
        const T *Z = (const T *)a.z + r * a.ldz + column;
        const T *D = (const T *)a.dout + r * a.dim + column;
        float by = ((const float *)a.rstd)[r * a.groups + blockIdx.x], sum = 0.0f;
        float4 y[STEPS], z[STEPS], g[STEPS], u[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = k * CQ_WARP + lane;
            y[k] = cq_load4_if(at < quarters, Y + 4 * at);
            z[k] = cq_load4_if(at < quarters, Z + 4 * at);
            g[k] = cq_load4_if(at < quarters, D + 4 * at);
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            u[k] = cq_scale4(cq_times4(cq_times4(y[k], z[k]), cq_sigmoid4(z[k])), by);
            dw[k] = cq_plus4(dw[k], cq_times4(g[k], u[k]));
            g[k] = cq_times4(w[k], g[k]);
            sum += cq_dot4(g[k], u[k]);
        }
        float m = cq_warp_sum(sum) / (float)(4 * quarters);
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t at = k * CQ_WARP + lane;
            float4 du = cq_norm_slope4(g[k], u[k], m, by), dy, dz;
            gate_slopes(y[k].x, z[k].x, du.x, &dy.x, &dz.x);
            gate_slopes(y[k].y, z[k].y, du.y, &dy.y, &dz.y);
            gate_slopes(y[k].z, z[k].z, du.z, &dy.z, &dz.z);
            gate_slopes(y[k].w, z[k].w, du.w, &dy.w, &dz.w);
            if (at < quarters) {
                cq_store4((T *)a.dy + r * a.dim + column + 4 * at, dy, true);
                cq_store4((T *)a.dz + r * a.lddz + column + 4 * at, dz, true);
            }
        }
    }
    if (!part) /* the whole grid */
        return;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        sums[warp][k * CQ_WARP + lane] = dw[k];
    __syncthreads();
    for (int64_t at = threadIdx.x; at < quarters; at += blockDim.x) {
        float4 sum = sums[0][at];
        for (int k = 1; k < GATE_WARPS; k++)
            sum = cq_plus4(sum, sums[k][at]);
        cq_store4(part + blockIdx.y * a.dim + column + 4 * at, sum, true);
    }
}
/// Any width: sums over `share` rows, a thread per column; then a block per group of a row.
template <typename T>
static __global__ void __launch_bounds__(128)
    gatednorm_weight_any(cq_gatednorm_backward_args a, int64_t share, float *part) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t first = blockIdx.y * share;
    if (i >= a.dim)
        return;
    float sum = 0.0f;
    for (int64_t r = first; r < first + share && r < a.rows; r++) {
        float z = cq_value(((const T *)a.z)[r * a.ldz + i]);
        float u = gated(cq_value(((const T *)a.y)[r * a.dim + i]), z);
        sum += cq_value(((const T *)a.dout)[r * a.dim + i]) *
               (u * ((const float *)a.rstd)[r * a.groups + i / (a.dim / a.groups)]);
    }
    part[blockIdx.y * a.dim + i] = sum;
}
template <typename T>
static __global__ void __launch_bounds__(128) gatednorm_backward_any(cq_gatednorm_backward_args a) {
    CQ_SHARED(float, room, [32]);
    int64_t width = a.dim / a.groups, r = blockIdx.x / a.groups, g = blockIdx.x % a.groups;
    const T *y = (const T *)a.y + r * a.dim + g * width;
    const T *z = (const T *)a.z + r * a.ldz + g * width;
    const T *dout = (const T *)a.dout + r * a.dim + g * width;
    const float *w = (const float *)a.w + g * width;
    T *dy = (T *)a.dy + r * a.dim + g * width;
    T *dz = (T *)a.dz + r * a.lddz + g * width;
    float by = ((const float *)a.rstd)[blockIdx.x], sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x)
        sum += w[i] * cq_value(dout[i]) * (gated(cq_value(y[i]), cq_value(z[i])) * by);
    float m = cq_block_sum(sum, room) / (float)width;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        float v = cq_value(y[i]), gate = cq_value(z[i]), u = gated(v, gate) * by, a_slope, b_slope;
        gate_slopes(v, gate, by * (w[i] * cq_value(dout[i]) - u * m), &a_slope, &b_slope);
        cq_put(dy + i, a_slope);
        cq_put(dz + i, b_slope);
    }
}

template <typename T>
static int gatednorm_backward(cq_stream *s, const cq_gatednorm_backward_args *a) {
    int64_t width = a->dim / a->groups, n = width / 4;
    bool whole = width % 4 == 0 && width <= 512 && a->ldz % 4 == 0 && a->lddz % 4 == 0 &&
                 cq_aligned4<T>(a->y) && cq_aligned4<T>(a->z) && cq_aligned16(a->w) &&
                 cq_aligned4<T>(a->dout) && cq_aligned4<T>(a->dy) && cq_aligned4<T>(a->dz);
    int64_t most = MOST_PARTS;
    if (whole) /* about six blocks for each multiprocessor, no warp without a row */
        most = a->groups < SMS * 6 ? SMS * 6 / a->groups : 1;
    if (whole && most > (a->rows + GATE_WARPS - 1) / GATE_WARPS)
        most = (a->rows + GATE_WARPS - 1) / GATE_WARPS;
    row_share share = share_rows(a->rows, most);
    float *part = NULL;
    if (a->dw) {
        part = (float *)cq_cuda_scratch(s, share.blocks * a->dim * (int64_t)sizeof(float));
        if (!part)
            return CQ_ENOMEM;
    }
    dim3 grid((unsigned)a->groups, (unsigned)share.blocks);
    enum { THREADS = GATE_WARPS * CQ_WARP };
    if (!whole) {
        if (part)
            CQ_LAUNCH(gatednorm_weight_any<T>, dim3(cq_blocks(a->dim, 128), (unsigned)share.blocks),
                      128, 0, s, *a, share.rows, part);
        CQ_LAUNCH(gatednorm_backward_any<T>, (unsigned)(a->rows * a->groups), 128, 0, s, *a);
    } else if (width <= 128)
        CQ_LAUNCH((gatednorm_backward_groups<1, T>), grid, THREADS, 0, s, *a, n, share.rows, part);
    else if (width <= 256)
        CQ_LAUNCH((gatednorm_backward_groups<2, T>), grid, THREADS, 0, s, *a, n, share.rows, part);
    else
        CQ_LAUNCH((gatednorm_backward_groups<4, T>), grid, THREADS, 0, s, *a, n, share.rows, part);
    if (part)
        cq_add_parts_to(s, a->dim, share.blocks, part, (float *)a->dw);
    CQ_CUDA_END("gatednorm_backward");
}

extern "C" int cq_cuda_gatednorm_backward(cq_stream *s, const cq_gatednorm_backward_args *a) {
    CQ_CUDA_ACT("gatednorm_backward", a);
    if (a->rows == 0 || a->dim == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? gatednorm_backward<__nv_bfloat16>(s, a)
                             : gatednorm_backward<float>(s, a);
}
