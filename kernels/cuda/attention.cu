/// attention.cu - causal grouped-query attention inside documents, forward and backward, in FP32.
///
/// Never more than a tile of the scores exists: the forward keeps a running maximum and sum of each
/// row, the backward computes the probabilities again from lse. Gradients of k and v are summed
/// over the query heads of their group and all later tokens by one block, those of q by another
/// kernel: no atomics, the same order each time. With CQ_COMPUTE_BF16 attention_bf16.cu does the
/// products on tensor cores where head_dim allows.
///
/// Qwen3-4B, 8192 tokens in documents of 4096, 32 heads x 128: 0.27 TFLOP forward; 27 ms at 10
/// TF/s.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/tiles.cuh"

namespace {

constexpr int THREADS = 256, ROWS = 64, KEYS = 32, SIDE = 32;

/// A block: ROWS queries of one head. Thread (y, x) of 16 x 16 has rows 4 y .. 4 y + 3 and columns
/// x + 16 c of the scores and of the result.
template <typename T, int NC>
__global__ void __launch_bounds__(THREADS) forward(cq_heads a, cq_attended<T> to) {
    CQ_DYN_SMEM(float, room);
    CQ_SHARED(int32_t, begin, [ROWS]);
    int64_t q0 = (int64_t)blockIdx.x * ROWS, h = blockIdx.y, kh = h / (a.heads / a.kv_heads);
    int n = (int)(a.tokens - q0 < ROWS ? a.tokens - q0 : ROWS), dim = (int)a.dim;
    cq_tile q = {room, dim + 1}, k = {q.p + ROWS * (dim + 1), dim + 1};
    cq_tile v = {k.p + KEYS * (dim + 1), dim + 1}, p = {v.p + KEYS * (dim + 1), KEYS + 1};
    int x = (int)(threadIdx.x & 15u), y = (int)(threadIdx.x >> 4) * 4;
    cq_load_rows(q, (const T *)a.q + q0 * a.ldq + h * a.dim, a.ldq, n, dim, NULL);
    cq_find_begins(begin, a, q0, n);
    __syncthreads();
    float o[4][NC], most[4], sum[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        most[r] = -INFINITY;
        sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < NC; c++)
            o[r][c] = 0.0f;
    }
    for (int64_t k0 = begin[0]; k0 < q0 + n; k0 += KEYS) {
        int m = (int)(a.tokens - k0 < KEYS ? a.tokens - k0 : KEYS);
        cq_load_rows(k, (const T *)a.k + k0 * a.ldk + kh * a.dim, a.ldk, m, dim, NULL);
        cq_load_rows(v, (const T *)a.v + k0 * a.ldv + kh * a.dim, a.ldv, m, dim, NULL);
        __syncthreads();
        float s[4][2];
#pragma unroll
        for (int r = 0; r < 4; r++)
            s[r][0] = s[r][1] = 0.0f;
        for (int d = 0; d < dim; d++) {
            float k1 = k.at(x, d), k2 = k.at(x + 16, d);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float qv = q.at(y + r, d);
                s[r][0] += qv * k1;
                s[r][1] += qv * k2;
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int64_t row = q0 + y + r;
            bool in = y + r < n;
            float top = most[r];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int64_t key = k0 + x + 16 * c;
                bool seen = in && x + 16 * c < m && key <= row && key >= begin[in ? y + r : 0];
                s[r][c] = seen ? s[r][c] * a.scale : -INFINITY;
                top = fmaxf(top, s[r][c]);
            }
            for (int d = 8; d > 0; d >>= 1)
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
            float shrink = top == -INFINITY ? 1.0f : expf(most[r] - top), added = 0.0f;
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float e = top == -INFINITY ? 0.0f : expf(s[r][c] - top);
                p.at(y + r, x + 16 * c) = e;
                added += e;
            }
            for (int d = 8; d > 0; d >>= 1)
                added += __shfl_xor_sync(0xffffffffu, added, d);
            sum[r] = sum[r] * shrink + added;
            most[r] = top;
#pragma unroll
            for (int c = 0; c < NC; c++)
                o[r][c] *= shrink;
        }
        __syncthreads();
        for (int j = 0; j < m; j++) {
            float pv[4];
#pragma unroll
            for (int r = 0; r < 4; r++)
                pv[r] = p.at(y + r, j);
#pragma unroll
            for (int c = 0; c < NC; c++) {
                int d = x + 16 * c;
                float vv = d < dim ? v.at(j, d) : 0.0f;
#pragma unroll
                for (int r = 0; r < 4; r++)
                    o[r][c] += pv[r] * vv;
            }
        }
        __syncthreads();
    }
    int saturated = 0;
    cq_fake_group group = {};
    if (to.outq)
        group = cq_fake_group_of(to.fq, 0, 448.0f);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int64_t row = q0 + y + r, at = (row * a.heads + h) * a.dim + x;
        bool in = y + r < n;
#pragma unroll
        for (int c = 0; c < NC; c++) {
            T value;
            cq_put(&value, in ? o[r][c] / sum[r] : 0.0f);
            if (in && x + 16 * c < dim)
                to.out[at + 16 * c] = value;
            if (to.outq && 16 * c < dim) { /* sixteen lanes have the values of a block */
                int clamped;
                float q = cq_fake_lanes16(cq_value(value), group, &clamped);
                if (in)
                    cq_put(to.outq + at + 16 * c, q);
                saturated += clamped && in && x == 0;
            }
        }
        if (to.lse && in && x == 0)
            to.lse[row * a.heads + h] = most[r] + logf(sum[r]);
    }
    cq_fake_count(to.fq.saturated, saturated);
}

/// Probabilities and gradients of the scores of a tile: rows are queries q0 .. q0 + n, columns keys
/// k0 .. k0 + m. p and ds are SIDE x SIDE.
__device__ __forceinline__ void scores(const cq_heads &a, const cq_tile &q, const cq_tile &dout,
                                       const cq_tile &k, const cq_tile &v, const cq_tile &p,
                                       const cq_tile &ds, const float *lse, const float *delta,
                                       const int32_t *begin, int64_t q0, int n, int64_t k0, int m,
                                       int64_t h) {
    int dim = (int)a.dim;
    cq_product(
        n, m, dim, [&](int i, int d) { return q.at(i, d); },
        [&](int j, int d) { return k.at(j, d); },
        [&](int i, int j, float r) {
            int64_t row = q0 + i, key = k0 + j;
            bool seen = key <= row && key >= begin[i];
            p.at(i, j) = seen ? expf(r * a.scale - lse[row * a.heads + h]) : 0.0f;
        });
    cq_product(
        n, m, dim, [&](int i, int d) { return dout.at(i, d); },
        [&](int j, int d) { return v.at(j, d); }, [&](int i, int j, float r) { ds.at(i, j) = r; });
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n * m; i += THREADS) {
        int r = i / m, c = i - r * m;
        ds.at(r, c) = p.at(r, c) * (ds.at(r, c) - delta[(q0 + r) * a.heads + h]) * a.scale;
    }
    __syncthreads();
}

/// A block: SIDE keys of one kv head.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    backward_kv(cq_heads a, const T *dout, const float *lse, const float *delta, T *dk, T *dv,
                int64_t lddk, int64_t lddv) {
    CQ_DYN_SMEM(float, room);
    CQ_SHARED(int32_t, begin, [SIDE]);
    int64_t k0 = (int64_t)blockIdx.x * SIDE, kh = blockIdx.y, per = a.heads / a.kv_heads;
    int m = (int)(a.tokens - k0 < SIDE ? a.tokens - k0 : SIDE), dim = (int)a.dim, ld = dim + 1;
    cq_tile k = {room, ld}, v = {k.p + SIDE * ld, ld}, q = {v.p + SIDE * ld, ld};
    cq_tile g = {q.p + SIDE * ld, ld}, sk = {g.p + SIDE * ld, ld}, sv = {sk.p + SIDE * ld, ld};
    cq_tile p = {sv.p + SIDE * ld, SIDE + 1}, ds = {p.p + SIDE * (SIDE + 1), SIDE + 1};
    cq_load_rows(k, (const T *)a.k + k0 * a.ldk + kh * a.dim, a.ldk, m, dim, NULL);
    cq_load_rows(v, (const T *)a.v + k0 * a.ldv + kh * a.dim, a.ldv, m, dim, NULL);
    for (int i = (int)threadIdx.x; i < SIDE * ld; i += THREADS)
        sk.p[i] = sv.p[i] = 0.0f;
    int64_t end = a.starts[cq_document_of(a.starts, a.n_docs, k0 + m - 1) + 1];
    for (int64_t h = kh * per; h < (kh + 1) * per; h++)
        for (int64_t q0 = k0; q0 < end; q0 += SIDE) {
            int n = (int)(end - q0 < SIDE ? end - q0 : SIDE);
            __syncthreads();
            cq_load_rows(q, (const T *)a.q + q0 * a.ldq + h * a.dim, a.ldq, n, dim, NULL);
            cq_load_rows(g, dout + (q0 * a.heads + h) * a.dim, a.heads * a.dim, n, dim, NULL);
            cq_find_begins(begin, a, q0, n);
            __syncthreads();
            scores(a, q, g, k, v, p, ds, lse, delta, begin, q0, n, k0, m, h);
            cq_product(
                m, dim, n, [&](int i, int j) { return p.at(j, i); },
                [&](int d, int j) { return g.at(j, d); },
                [&](int i, int d, float r) { sv.at(i, d) += r; });
            cq_product(
                m, dim, n, [&](int i, int j) { return ds.at(j, i); },
                [&](int d, int j) { return q.at(j, d); },
                [&](int i, int d, float r) { sk.at(i, d) += r; });
        }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < m * dim; i += THREADS) {
        int r = i / dim, d = i - r * dim;
        cq_put(dk + (k0 + r) * lddk + kh * a.dim + d, sk.at(r, d));
        cq_put(dv + (k0 + r) * lddv + kh * a.dim + d, sv.at(r, d));
    }
}

/// A block: SIDE queries of one head.
template <typename T>
__global__ void __launch_bounds__(THREADS) backward_q(cq_heads a, const T *dout, const float *lse,
                                                      const float *delta, T *dq, int64_t lddq) {
    CQ_DYN_SMEM(float, room);
    CQ_SHARED(int32_t, begin, [SIDE]);
    int64_t q0 = (int64_t)blockIdx.x * SIDE, h = blockIdx.y, kh = h / (a.heads / a.kv_heads);
    int n = (int)(a.tokens - q0 < SIDE ? a.tokens - q0 : SIDE), dim = (int)a.dim, ld = dim + 1;
    cq_tile k = {room, ld}, v = {k.p + SIDE * ld, ld}, q = {v.p + SIDE * ld, ld};
    cq_tile g = {q.p + SIDE * ld, ld}, sq = {g.p + SIDE * ld, ld};
    cq_tile p = {sq.p + SIDE * ld, SIDE + 1}, ds = {p.p + SIDE * (SIDE + 1), SIDE + 1};
    cq_load_rows(q, (const T *)a.q + q0 * a.ldq + h * a.dim, a.ldq, n, dim, NULL);
    cq_load_rows(g, dout + (q0 * a.heads + h) * a.dim, a.heads * a.dim, n, dim, NULL);
    for (int i = (int)threadIdx.x; i < SIDE * ld; i += THREADS)
        sq.p[i] = 0.0f;
    cq_find_begins(begin, a, q0, n);
    for (int64_t k0 = a.starts[cq_document_of(a.starts, a.n_docs, q0)]; k0 < q0 + n; k0 += SIDE) {
        int m = (int)(q0 + n - k0 < SIDE ? q0 + n - k0 : SIDE);
        __syncthreads();
        cq_load_rows(k, (const T *)a.k + k0 * a.ldk + kh * a.dim, a.ldk, m, dim, NULL);
        cq_load_rows(v, (const T *)a.v + k0 * a.ldv + kh * a.dim, a.ldv, m, dim, NULL);
        __syncthreads();
        scores(a, q, g, k, v, p, ds, lse, delta, begin, q0, n, k0, m, h);
        cq_product(
            n, dim, m, [&](int i, int j) { return ds.at(i, j); },
            [&](int d, int j) { return k.at(j, d); },
            [&](int i, int d, float r) { sq.at(i, d) += r; });
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n * dim; i += THREADS) {
        int r = i / dim, d = i - r * dim;
        cq_put(dq + (q0 + r) * lddq + h * a.dim + d, sq.at(r, d));
    }
}

/// delta[t, h] = <dout, out>, summed as dP is, so that a token that sees itself alone gets zero.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    row_products(const T *dout, const T *out, float *delta, int64_t rows, int64_t dim) {
    int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows)
        return;
    float sum = 0.0f;
    for (int64_t d = 0; d < dim; d++)
        sum += cq_value(dout[row * dim + d]) * cq_value(out[row * dim + d]);
    delta[row] = sum;
}

template <typename T, int NC>
int forward_in(cq_stream *s, const cq_heads &a, const cq_attention_forward_args *o) {
    int64_t ld = a.dim + 1;
    int64_t bytes = ((ROWS + 2 * KEYS) * ld + ROWS * (KEYS + 1)) * (int64_t)sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)forward<T, NC>, bytes, "attention_forward"));
    dim3 grid(cq_blocks(a.tokens, ROWS), (unsigned)a.heads);
    CQ_LAUNCH((forward<T, NC>), grid, THREADS, (size_t)bytes, s, a, cq_attended_of<T>(o));
    CQ_CUDA_END("attention_forward");
}
template <typename T> int forward_of(cq_stream *s, const cq_attention_forward_args *a) {
    cq_heads h = cq_heads_of(a);
    if (a->head_dim <= 16)
        return forward_in<T, 1>(s, h, a);
    if (a->head_dim <= 64)
        return forward_in<T, 4>(s, h, a);
    return a->head_dim <= 128 ? forward_in<T, 8>(s, h, a) : forward_in<T, 16>(s, h, a);
}

template <typename T> int backward_of(cq_stream *s, const cq_attention_backward_args *a) {
    cq_heads h = cq_heads_of(a);
    int64_t rows = a->tokens * a->heads, ld = a->head_dim + 1;
    float *delta = (float *)cq_cuda_scratch(s, rows * (int64_t)sizeof(float));
    if (!delta)
        return CQ_ENOMEM;
    const T *dout = (const T *)a->dout;
    const float *lse = (const float *)a->lse;
    CQ_LAUNCH(row_products<T>, cq_blocks(rows, THREADS), THREADS, 0, s, dout, (const T *)a->out,
              delta, rows, a->head_dim);
    int64_t pairs = 2 * SIDE * (SIDE + 1);
    int64_t kv = (6 * SIDE * ld + pairs) * (int64_t)sizeof(float);
    int64_t q = (5 * SIDE * ld + pairs) * (int64_t)sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<T>, kv, "attention_backward"));
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_q<T>, q, "attention_backward"));
    dim3 keys(cq_blocks(a->tokens, SIDE), (unsigned)a->kv_heads);
    dim3 queries(cq_blocks(a->tokens, SIDE), (unsigned)a->heads);
    CQ_LAUNCH(backward_kv<T>, keys, THREADS, (size_t)kv, s, h, dout, lse, (const float *)delta,
              (T *)a->dk, (T *)a->dv, a->lddk, a->lddv);
    CQ_LAUNCH(backward_q<T>, queries, THREADS, (size_t)q, s, h, dout, lse, (const float *)delta,
              (T *)a->dq, a->lddq);
    CQ_CUDA_END("attention_backward");
}

int check(const char *op, int64_t dim) {
    return dim >= 1 && dim <= 256
               ? CQ_OK
               : cq_fail(CQ_ESHAPE, "cuda: %s: head_dim %lld, wanted 1 to 256", op, (long long)dim);
}

} // namespace

extern "C" int cq_cuda_attention_forward(cq_stream *s, const cq_attention_forward_args *a) {
    CQ_CUDA_ACT("attention_forward", a);
    CQ_TRY(check("attention_forward", a->head_dim));
    if (a->tokens < 1)
        return CQ_OK;
    if (a->outq)
        CQ_TRY(cq_fake_columns(a->fq, a->heads * a->head_dim));
    if (s->compute == CQ_COMPUTE_BF16 && cq_attention_has_bf16(cq_heads_of(a)))
        CQ_TRY(cq_attention_bf16_forward(s, a));
    else
        CQ_TRY(a->act == CQ_BF16 ? forward_of<__nv_bfloat16>(s, a) : forward_of<float>(s, a));
    if (!a->outq || cq_attention_fuses(a))
        return CQ_OK;
    cq_fake_quant_args after = {};
    after.rows = a->tokens, after.cols = a->heads * a->head_dim;
    after.x = a->out, after.y = a->outq;
    after.fq = a->fq, after.top = 448.0f;
    after.dtype = a->dtype, after.act = a->act;
    return cq_cuda_fake_quant(s, &after);
}

extern "C" int cq_cuda_attention_backward(cq_stream *s, const cq_attention_backward_args *a) {
    CQ_CUDA_ACT("attention_backward", a);
    CQ_TRY(check("attention_backward", a->head_dim));
    if (a->tokens < 1)
        return CQ_OK;
    if (s->compute == CQ_COMPUTE_BF16 && cq_attention_has_bf16(cq_heads_of(a)))
        return cq_attention_bf16_backward(s, a);
    return a->act == CQ_BF16 ? backward_of<__nv_bfloat16>(s, a) : backward_of<float>(s, a);
}
