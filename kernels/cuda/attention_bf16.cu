/// attention_bf16.cu - attention with its products on tensor cores: operands rounded to BF16, sums
/// and the softmax in FP32.
///
/// Tiles of 64 queries and 64 keys, four warps of 16 rows. Forward: the probabilities go from the
/// registers of one product to those of the next. Backward for k and v: a block has 64 keys of one
/// query head and runs over all later queries; P and dS pass through shared memory to be read
/// transposed, and the heads of a group are added afterwards, in order. Backward for q: one more
/// kernel that computes P and dS again.
///
/// Qwen3-4B, 8192 tokens in documents of 4096: forward 0.27 TFLOP, 0.9 ms at 300 TF/s; backward
/// with the second computation 0.96 TFLOP.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cq_mma.h"

namespace {

constexpr int THREADS = 128, SIDE = 64, PAIRS = SIDE + 8;

/// n rows of D values as BF16 into a tile of SIDE rows of D + 8; what is missing becomes zero.
template <int D>
__device__ __forceinline__ void load_tile(__nv_bfloat16 *to, const float *from, int64_t ld, int n,
                                          bool aligned) {
    for (int i = (int)threadIdx.x; i < SIDE * (D / 4); i += THREADS) {
        int row = i / (D / 4), col = i % (D / 4) * 4;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < n) {
            const float *at = from + row * ld + col;
            v = aligned ? *(const float4 *)at : make_float4(at[0], at[1], at[2], at[3]);
        }
        uint2 packed;
        packed.x = cq_bf16_pair(v.x, v.y);
        packed.y = cq_bf16_pair(v.z, v.w);
        *reinterpret_cast<uint2 *>(to + row * (D + 8) + col) = packed;
    }
}

/// Fragments: rows row .. row + 15 and columns col .. col + 15 of a tile, as A; of a tile that is
/// stored transposed, as A; sixteen rows as two B of a product with the tile's transpose; sixteen
/// columns as two B of a product with the tile.
template <int LD>
__device__ __forceinline__ void frag_a(unsigned f[4], const __nv_bfloat16 *t, int row, int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4(f, t + (row + (lane & 15)) * LD + col + 8 * (lane >> 4));
}
template <int LD>
__device__ __forceinline__ void frag_a_trans(unsigned f[4], const __nv_bfloat16 *t, int row,
                                             int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4_trans(f, t + (col + (lane & 7) + 8 * (lane >> 4)) * LD + row +
                                8 * ((lane >> 3) & 1));
}
template <int LD>
__device__ __forceinline__ void frag_b_rows(unsigned f[4], const __nv_bfloat16 *t, int row,
                                            int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4(f, t + (row + (lane & 7) + 8 * (lane >> 4)) * LD + col + 8 * ((lane >> 3) & 1));
}
template <int LD>
__device__ __forceinline__ void frag_b_cols(unsigned f[4], const __nv_bfloat16 *t, int row,
                                            int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4_trans(f, t + (row + (lane & 15)) * LD + col + 8 * (lane >> 4));
}

/// s = the warp's 16 rows of left times the 64 rows of right, transposed.
template <int D>
__device__ __forceinline__ void scores(float s[8][4], const __nv_bfloat16 *left,
                                       const __nv_bfloat16 *right, int row) {
#pragma unroll
    for (int t = 0; t < 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[t][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        unsigned a[4], b[4];
        frag_a<D + 8>(a, left, row, d);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            frag_b_rows<D + 8>(b, right, 16 * p, d);
            cq_mma_bf16(s[2 * p], a, b);
            cq_mma_bf16(s[2 * p + 1], a, b + 2);
        }
    }
}

/// sum += a tile product whose A lies in registers as results (16 x 64) and whose B is a tile.
template <int D>
__device__ __forceinline__ void times_tile(float sum[D / 8][4], const float s[8][4],
                                           const __nv_bfloat16 *t) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        unsigned a[4], b[4];
        a[0] = cq_bf16_pair(s[2 * j][0], s[2 * j][1]);
        a[1] = cq_bf16_pair(s[2 * j][2], s[2 * j][3]);
        a[2] = cq_bf16_pair(s[2 * j + 1][0], s[2 * j + 1][1]);
        a[3] = cq_bf16_pair(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            frag_b_cols<D + 8>(b, t, 16 * j, 16 * d);
            cq_mma_bf16(sum[2 * d], a, b);
            cq_mma_bf16(sum[2 * d + 1], a, b + 2);
        }
    }
}

struct aligned_inputs {
    bool q, k, v, g;
};

template <int D>
__global__ void __launch_bounds__(THREADS)
    forward(cq_heads a, float *out, float *lse, aligned_inputs in) {
    CQ_DYN_SMEM(__nv_bfloat16, room);
    CQ_SHARED(int32_t, begin, [SIDE]);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y; /* long ones first */
    int64_t kh = h / (a.heads / a.kv_heads);
    int n = (int)(a.tokens - q0 < SIDE ? a.tokens - q0 : SIDE);
    int lane = (int)(threadIdx.x % CQ_WARP), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int g = lane >> 2, t2 = 2 * (lane & 3);
    __nv_bfloat16 *q = room, *k = q + SIDE * (D + 8), *v = k + SIDE * (D + 8);
    load_tile<D>(q, a.q + q0 * a.ldq + h * D, a.ldq, n, in.q);
    cq_find_begins(begin, a, q0, n);
    __syncthreads();
    float o[D / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            o[d][i] = 0.0f;
    int64_t lowest[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        lowest[r] = row + g + 8 * r < n ? begin[row + g + 8 * r] : (int64_t)1 << 62;
    for (int64_t k0 = begin[0]; k0 < q0 + n; k0 += SIDE) {
        int m = (int)(a.tokens - k0 < SIDE ? a.tokens - k0 : SIDE);
        load_tile<D>(k, a.k + k0 * a.ldk + kh * D, a.ldk, m, in.k);
        load_tile<D>(v, a.v + k0 * a.ldv + kh * D, a.ldv, m, in.v);
        __syncthreads();
        float s[8][4], top[2] = {most[0], most[1]};
        scores<D>(s, q, k, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int64_t key = k0 + 8 * t + t2 + (i & 1), at = q0 + row + g + 8 * (i >> 1);
                bool seen = key <= at && key >= lowest[i >> 1];
                s[t][i] = seen ? s[t][i] * a.scale : -INFINITY;
                top[i >> 1] = fmaxf(top[i >> 1], s[t][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            float shrink = top[r] == -INFINITY ? 1.0f : expf(most[r] - top[r]);
            most[r] = top[r];
            sum[r] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                o[d][2 * r] *= shrink;
                o[d][2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float e = most[i >> 1] == -INFINITY ? 0.0f : expf(s[t][i] - most[i >> 1]);
                s[t][i] = e;
                sum[i >> 1] += e;
            }
        times_tile<D>(o, s, v);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum[r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (row + g + 8 * r >= n)
            continue;
        int64_t at = (q0 + row + g + 8 * r) * a.heads + h;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            out[at * D + 8 * d + t2] = o[d][2 * r] / total;
            out[at * D + 8 * d + t2 + 1] = o[d][2 * r + 1] / total;
        }
        if (lse && (lane & 3) == 0)
            lse[at] = most[r] + logf(total);
    }
}

/// p = probabilities, ds = gradients of the scores of a tile: the warp's 16 queries x 64 keys.
template <int D>
__device__ __forceinline__ void slopes(float p[8][4], float ds[8][4], const cq_heads &a,
                                       const __nv_bfloat16 *q, const __nv_bfloat16 *dout,
                                       const __nv_bfloat16 *k, const __nv_bfloat16 *v,
                                       const float *lse, const float *delta, const int32_t *begin,
                                       int64_t q0, int n, int64_t k0, int64_t h, int row) {
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    float l[2], d[2];
    int64_t lowest[2];
    scores<D>(p, q, k, row);
    scores<D>(ds, dout, v, row);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row + g + 8 * r;
        bool there = i < n;
        l[r] = there ? lse[(q0 + i) * a.heads + h] : 0.0f;
        d[r] = there ? delta[(q0 + i) * a.heads + h] : 0.0f;
        lowest[r] = there ? begin[i] : (int64_t)1 << 62;
    }
#pragma unroll
    for (int t = 0; t < 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int64_t key = k0 + 8 * t + t2 + (i & 1), at = q0 + row + g + 8 * (i >> 1);
            bool seen = key <= at && key >= lowest[i >> 1];
            float e = seen ? expf(p[t][i] * a.scale - l[i >> 1]) : 0.0f;
            p[t][i] = e;
            ds[t][i] = e * (ds[t][i] - d[i >> 1]) * a.scale;
        }
}

template <int D>
__global__ void __launch_bounds__(THREADS)
    backward_kv(cq_heads a, const float *dout, const float *lse, const float *delta, float *dk,
                float *dv, aligned_inputs in) {
    CQ_DYN_SMEM(__nv_bfloat16, room);
    CQ_SHARED(int32_t, begin, [SIDE]);
    int64_t k0 = (int64_t)blockIdx.x * SIDE, h = blockIdx.y, kh = h / (a.heads / a.kv_heads);
    int m = (int)(a.tokens - k0 < SIDE ? a.tokens - k0 : SIDE);
    int lane = (int)(threadIdx.x % CQ_WARP), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int g = lane >> 2, t2 = 2 * (lane & 3);
    __nv_bfloat16 *k = room, *v = k + SIDE * (D + 8), *q = v + SIDE * (D + 8);
    __nv_bfloat16 *o = q + SIDE * (D + 8), *sp = o + SIDE * (D + 8), *ss = sp + SIDE * PAIRS;
    load_tile<D>(k, a.k + k0 * a.ldk + kh * D, a.ldk, m, in.k);
    load_tile<D>(v, a.v + k0 * a.ldv + kh * D, a.ldv, m, in.v);
    float sum_k[D / 8][4], sum_v[D / 8][4];
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum_k[d][i] = sum_v[d][i] = 0.0f;
    int64_t end = a.starts[cq_document_of(a.starts, a.n_docs, k0 + m - 1) + 1];
    for (int64_t q0 = k0; q0 < end; q0 += SIDE) {
        int n = (int)(end - q0 < SIDE ? end - q0 : SIDE);
        __syncthreads();
        load_tile<D>(q, a.q + q0 * a.ldq + h * D, a.ldq, n, in.q);
        load_tile<D>(o, dout + (q0 * a.heads + h) * D, a.heads * D, n, in.g);
        cq_find_begins(begin, a, q0, n);
        __syncthreads();
        float p[8][4], ds[8][4];
        slopes<D>(p, ds, a, q, o, k, v, lse, delta, begin, q0, n, k0, h, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int at = (row + g + 8 * r) * PAIRS + 8 * t + t2;
                *reinterpret_cast<unsigned *>(sp + at) = cq_bf16_pair(p[t][2 * r], p[t][2 * r + 1]);
                *reinterpret_cast<unsigned *>(ss + at) =
                    cq_bf16_pair(ds[t][2 * r], ds[t][2 * r + 1]);
            }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            unsigned fp[4], fs[4], b[4];
            frag_a_trans<PAIRS>(fp, sp, row, 16 * j);
            frag_a_trans<PAIRS>(fs, ss, row, 16 * j);
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                frag_b_cols<D + 8>(b, o, 16 * j, 16 * d);
                cq_mma_bf16(sum_v[2 * d], fp, b);
                cq_mma_bf16(sum_v[2 * d + 1], fp, b + 2);
                frag_b_cols<D + 8>(b, q, 16 * j, 16 * d);
                cq_mma_bf16(sum_k[2 * d], fs, b);
                cq_mma_bf16(sum_k[2 * d + 1], fs, b + 2);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row + g + 8 * r;
        if (i >= m)
            continue;
        float *to_k = dk + ((k0 + i) * a.heads + h) * D + t2;
        float *to_v = dv + ((k0 + i) * a.heads + h) * D + t2;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            to_k[8 * d] = sum_k[d][2 * r];
            to_k[8 * d + 1] = sum_k[d][2 * r + 1];
            to_v[8 * d] = sum_v[d][2 * r];
            to_v[8 * d + 1] = sum_v[d][2 * r + 1];
        }
    }
}

template <int D>
__global__ void __launch_bounds__(THREADS)
    backward_q(cq_heads a, const float *dout, const float *lse, const float *delta, float *dq,
               int64_t lddq, aligned_inputs in) {
    CQ_DYN_SMEM(__nv_bfloat16, room);
    CQ_SHARED(int32_t, begin, [SIDE]);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y;
    int64_t kh = h / (a.heads / a.kv_heads);
    int n = (int)(a.tokens - q0 < SIDE ? a.tokens - q0 : SIDE);
    int lane = (int)(threadIdx.x % CQ_WARP), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int g = lane >> 2, t2 = 2 * (lane & 3);
    __nv_bfloat16 *k = room, *v = k + SIDE * (D + 8), *q = v + SIDE * (D + 8);
    __nv_bfloat16 *o = q + SIDE * (D + 8);
    load_tile<D>(q, a.q + q0 * a.ldq + h * D, a.ldq, n, in.q);
    load_tile<D>(o, dout + (q0 * a.heads + h) * D, a.heads * D, n, in.g);
    cq_find_begins(begin, a, q0, n);
    float sum[D / 8][4];
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[d][i] = 0.0f;
    for (int64_t k0 = a.starts[cq_document_of(a.starts, a.n_docs, q0)]; k0 < q0 + n; k0 += SIDE) {
        int m = (int)(a.tokens - k0 < SIDE ? a.tokens - k0 : SIDE);
        __syncthreads();
        load_tile<D>(k, a.k + k0 * a.ldk + kh * D, a.ldk, m, in.k);
        load_tile<D>(v, a.v + k0 * a.ldv + kh * D, a.ldv, m, in.v);
        __syncthreads();
        float p[8][4], ds[8][4];
        slopes<D>(p, ds, a, q, o, k, v, lse, delta, begin, q0, n, k0, h, row);
        times_tile<D>(sum, ds, k);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row + g + 8 * r;
        if (i >= n)
            continue;
        float *to = dq + (q0 + i) * lddq + h * D + t2;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            to[8 * d] = sum[d][2 * r];
            to[8 * d + 1] = sum[d][2 * r + 1];
        }
    }
}

/// Gradients of k or v: the query heads of each group in order.
__global__ void __launch_bounds__(THREADS)
    add_heads(cq_heads a, const float *of_heads, float *out, int64_t ld) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, per = a.heads / a.kv_heads;
    if (i >= a.tokens * a.kv_heads * a.dim)
        return;
    int64_t t = i / (a.kv_heads * a.dim), c = i - t * a.kv_heads * a.dim, kh = c / a.dim;
    const float *from = of_heads + (t * a.heads + kh * per) * a.dim + c - kh * a.dim;
    float sum = 0.0f;
    for (int64_t k = 0; k < per; k++)
        sum += from[k * a.dim];
    out[t * ld + c] = sum;
}

bool rows_aligned(const void *p, int64_t ld) { return ((uintptr_t)p & 15) == 0 && ld % 4 == 0; }

aligned_inputs inputs_of(const cq_heads &a, const float *dout) {
    aligned_inputs in;
    in.q = rows_aligned(a.q, a.ldq);
    in.k = rows_aligned(a.k, a.ldk);
    in.v = rows_aligned(a.v, a.ldv);
    in.g = rows_aligned(dout, 4);
    return in;
}

template <int D> int forward_of(cq_stream *s, const cq_heads &a, float *out, float *lse) {
    int64_t bytes = 3 * SIDE * (D + 8) * 2;
    CQ_TRY(cq_cuda_shared_bytes((const void *)forward<D>, bytes, "attention_forward"));
    dim3 grid(cq_blocks(a.tokens, SIDE), (unsigned)a.heads);
    CQ_LAUNCH(forward<D>, grid, THREADS, (size_t)bytes, s, a, out, lse, inputs_of(a, NULL));
    CQ_CUDA_END("attention_forward");
}

template <int D>
int backward_of(cq_stream *s, const cq_heads &a, const float *dout, const float *lse,
                const float *delta, float *dk, float *dv, const cq_attention_backward_args *o) {
    int64_t q = 4 * SIDE * (D + 8) * 2, kv = q + 2 * SIDE * PAIRS * 2;
    aligned_inputs in = inputs_of(a, dout);
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D>, kv, "attention_backward"));
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_q<D>, q, "attention_backward"));
    dim3 keys(cq_blocks(a.tokens, SIDE), (unsigned)a.heads);
    dim3 queries(cq_blocks(a.tokens, SIDE), (unsigned)a.heads);
    CQ_LAUNCH(backward_kv<D>, keys, THREADS, (size_t)kv, s, a, dout, lse, delta, dk, dv, in);
    int64_t n = a.tokens * a.kv_heads * D;
    CQ_LAUNCH(add_heads, cq_blocks(n, THREADS), THREADS, 0, s, a, (const float *)dk, (float *)o->dk,
              o->lddk);
    CQ_LAUNCH(add_heads, cq_blocks(n, THREADS), THREADS, 0, s, a, (const float *)dv, (float *)o->dv,
              o->lddv);
    CQ_LAUNCH(backward_q<D>, queries, THREADS, (size_t)q, s, a, dout, lse, delta, (float *)o->dq,
              o->lddq, in);
    CQ_CUDA_END("attention_backward");
}

} // namespace

int cq_attention_bf16_forward(cq_stream *s, const cq_heads &a, float *out, float *lse) {
    return a.dim == 64 ? forward_of<64>(s, a, out, lse) : forward_of<128>(s, a, out, lse);
}

int cq_attention_bf16_backward(cq_stream *s, const cq_heads &a, const float *dout, const float *lse,
                               const float *delta, float *room,
                               const cq_attention_backward_args *args) {
    float *other = room + a.tokens * a.heads * a.dim;
    return a.dim == 64 ? backward_of<64>(s, a, dout, lse, delta, room, other, args)
                       : backward_of<128>(s, a, dout, lse, delta, room, other, args);
}
