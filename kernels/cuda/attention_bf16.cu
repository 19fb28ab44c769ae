/// attention_bf16.cu - attention with its products on tensor cores: operands rounded to BF16, sums
/// and the softmax in FP32.
///
/// What is read once per tile of the other side is rounded into scratch first; tiles then come as
/// asynchronous copies while the products before them run. Four warps of 16 or 32 rows each; the
/// result of one product stays in registers and is the left side of the next, also in the backward
/// for k and v, whose rows are keys: S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q. The backward
/// for q computes P and dS again. Tiles that a warp's rows do not see are skipped.
///
/// Qwen3-4B, 8192 tokens in documents of 4096: forward 0.27 TFLOP, 0.9 ms at 300 TF/s; backward
/// with the second computation 0.96 TFLOP. Rounding moves 0.2 GB, 0.4 GB in the backward.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/float4.cuh"

namespace {

typedef __nv_bfloat16 half_t;
constexpr int THREADS = 128, SIDE = 64;
constexpr float LOG2_E = 1.44269504088896341f;

/// The inputs of an operation as dense rows of BF16 in scratch, and of the backward also
/// lse / log 2 and <dout, out> as [heads, padded], zero from the last token on.
struct rounded {
    half_t *q, *k, *v, *dout;
    float *lse2, *delta;
    int64_t padded;
};

/// A strided matrix and where it goes, dense.
struct matrix {
    const float *from;
    half_t *to;
    int64_t ld, width;
    bool aligned;
};
struct matrices {
    matrix m[3];
};

__device__ __forceinline__ uint2 round4(float4 v) {
    uint2 r;
    r.x = cq_bf16_pair(v.x, v.y);
    r.y = cq_bf16_pair(v.z, v.w);
    return r;
}

/// A block: one row of one matrix.
__global__ void __launch_bounds__(THREADS) round_rows(matrices all) {
    matrix m = blockIdx.y == 0 ? all.m[0] : blockIdx.y == 1 ? all.m[1] : all.m[2];
    const float *from = m.from + (int64_t)blockIdx.x * m.ld;
    half_t *to = m.to + (int64_t)blockIdx.x * m.width;
    for (int64_t c = (int64_t)threadIdx.x * 4; c < m.width; c += THREADS * 4)
        *reinterpret_cast<uint2 *>(to + c) = round4(cq_load4(from + c, m.aligned));
}

/// A warp: dout of one token and head, rounded; delta from the rounded values, as dP is.
template <int D>
__global__ void __launch_bounds__(THREADS)
    round_slopes(const float *dout, const float *out, const float *lse, rounded b, int64_t tokens,
                 int64_t heads, bool aligned) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t row = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + threadIdx.x / CQ_WARP;
    int64_t t = row / heads, at = (row - t * heads) * b.padded + t;
    if (t >= b.padded)
        return;
    float sum = 0.0f;
    if (t < tokens && lane * 4 < D) {
        int64_t i = row * D + lane * 4;
        uint2 r = round4(cq_load4(dout + i, aligned));
        float4 g = make_float4(__uint_as_float(r.x << 16), __uint_as_float(r.x & 0xffff0000u),
                               __uint_as_float(r.y << 16), __uint_as_float(r.y & 0xffff0000u));
        *reinterpret_cast<uint2 *>(b.dout + i) = r;
        sum = cq_dot4(g, cq_load4(out + i, aligned));
    }
    sum = cq_warp_sum(sum);
    if (lane == 0) {
        b.delta[at] = sum;
        b.lse2[at] = t < tokens ? lse[row] * LOG2_E : 0.0f;
    }
}

/// dk and dv of `parts` parts of the heads of a group, added in order. A block: one token.
__global__ void __launch_bounds__(THREADS)
    add_parts(const float *pk, const float *pv, int parts, int64_t part, int64_t width, float *dk,
              float *dv, int64_t lddk, int64_t lddv) {
    const float *from = (blockIdx.y ? pv : pk) + (int64_t)blockIdx.x * width;
    float *to = blockIdx.y ? dv + (int64_t)blockIdx.x * lddv : dk + (int64_t)blockIdx.x * lddk;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float sum = from[c];
        for (int p = 1; p < parts; p++)
            sum += from[p * part + c];
        to[c] = sum;
    }
}

/// Starts to copy n rows of D values into a tile of ROWS rows of D + 8; what is missing becomes
/// zero.
template <int D, int ROWS>
__device__ __forceinline__ void fetch(half_t *to, const half_t *from, int64_t ld, int n) {
    constexpr int PIECES = D / 8;
#pragma unroll 4
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        int at = (int)threadIdx.x + i * THREADS, row = at / PIECES, col = at % PIECES * 8;
        bool there = row < n;
        cq_cp_async16(to + row * (D + 8) + col, from + (there ? row : 0) * ld + col,
                      there ? 16 : 0);
    }
}

/// Fragments: rows row .. row + 15 and columns col .. col + 15 of a tile, as A; sixteen rows as two
/// B of a product with the tile's transpose; sixteen columns as two B of a product with the tile.
template <int LD>
__device__ __forceinline__ void frag_a(unsigned f[4], const half_t *t, int row, int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4(f, t + (row + (lane & 15)) * LD + col + 8 * (lane >> 4));
}
template <int LD>
__device__ __forceinline__ void frag_b_rows(unsigned f[4], const half_t *t, int row, int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4(f, t + (row + (lane & 7) + 8 * (lane >> 4)) * LD + col + 8 * ((lane >> 3) & 1));
}
template <int LD>
__device__ __forceinline__ void frag_b_cols(unsigned f[4], const half_t *t, int row, int col) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    cq_ldmatrix_x4_trans(f, t + (row + (lane & 15)) * LD + col + 8 * (lane >> 4));
}

template <int M, int N> __device__ __forceinline__ void clear(float (&s)[M][N][4]) {
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int t = 0; t < N; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[u][t][i] = 0.0f;
}

/// s = 16 M rows of left, from `row` on, times the 64 rows of right, transposed.
template <int D, int M>
__device__ __forceinline__ void scores(float (&s)[M][8][4], const half_t *left, const half_t *right,
                                       int row) {
    clear(s);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        unsigned a[M][4], b[4];
#pragma unroll
        for (int u = 0; u < M; u++)
            frag_a<D + 8>(a[u], left, row + 16 * u, d);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            frag_b_rows<D + 8>(b, right, 16 * p, d);
#pragma unroll
            for (int u = 0; u < M; u++) {
                cq_mma_bf16(s[u][2 * p], a[u], b);
                cq_mma_bf16(s[u][2 * p + 1], a[u], b + 2);
            }
        }
    }
}

/// sum += s t, where s (16 M x 64) lies in registers as the result of a product and t is a tile.
template <int D, int M>
__device__ __forceinline__ void times_tile(float (&sum)[M][D / 8][4], const float (&s)[M][8][4],
                                           const half_t *t) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        unsigned a[M][4], b[4];
#pragma unroll
        for (int u = 0; u < M; u++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[u][i] = cq_bf16_pair(s[u][2 * j + (i >> 1)][2 * (i & 1)],
                                       s[u][2 * j + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            frag_b_cols<D + 8>(b, t, 16 * j, 16 * d);
#pragma unroll
            for (int u = 0; u < M; u++) {
                cq_mma_bf16(sum[u][2 * d], a[u], b);
                cq_mma_bf16(sum[u][2 * d + 1], a[u], b + 2);
            }
        }
    }
}

/// Sixteen rows of results from `row` on, times `by`, as far as there are n.
template <int D>
__device__ __forceinline__ void store(float *to, int64_t ld, const float (&sum)[D / 8][4], int row,
                                      int n, const float by[2], bool pairs) {
    int lane = (int)(threadIdx.x % CQ_WARP);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row + (lane >> 2) + 8 * r;
        if (i >= n)
            continue;
        float *at = to + i * ld + 2 * (lane & 3);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            float x = sum[d][2 * r] * by[r], y = sum[d][2 * r + 1] * by[r];
            if (pairs)
                *reinterpret_cast<float2 *>(at + 8 * d) = make_float2(x, y);
            else
                at[8 * d] = x, at[8 * d + 1] = y;
        }
    }
}

/// Where the document of token t begins, or past the last token that of the last token.
__device__ __forceinline__ int64_t begin_of(const cq_heads &a, int64_t t) {
    return a.starts[cq_document_of(a.starts, a.n_docs, t < a.tokens ? t : a.tokens - 1)];
}
__device__ __forceinline__ int64_t end_of(const cq_heads &a, int64_t t) {
    return a.starts[cq_document_of(a.starts, a.n_docs, t < a.tokens ? t : a.tokens - 1) + 1];
}
__device__ __forceinline__ int rows_from(int64_t at, int64_t end, int most) {
    return end - at < most ? (int)(end - at) : most;
}

/// What a row of a tile sees: columns from .. to - 1.
struct sight {
    int from, to;
};
__device__ __forceinline__ bool sees(sight s, int column) {
    return column >= s.from && column < s.to;
}

/// One tile of the softmax: s = probabilities relative to the new maxima `most` of the rows, `sum`
/// their sums in this lane, o follows the maxima. `scale` is times log2(e).
template <int D, int M>
__device__ __forceinline__ void soften(float (&s)[M][8][4], float (&o)[M][D / 8][4],
                                       float (&most)[M][2], float (&sum)[M][2], float scale) {
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = most[u][r];
#pragma unroll
            for (int t = 0; t < 8; t++)
                top = fmaxf(top, fmaxf(s[u][t][2 * r], s[u][t][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float base = top == -INFINITY ? 0.0f : top * scale;
            float shrink = cq_exp2(most[u][r] * scale - base), added = 0.0f;
            most[u][r] = top;
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    s[u][t][i] = cq_exp2(s[u][t][i] * scale - base);
                    added += s[u][t][i];
                }
            sum[u][r] = sum[u][r] * shrink + added;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                o[u][d][2 * r] *= shrink;
                o[u][d][2 * r + 1] *= shrink;
            }
        }
}

/// A block: 128 queries of one head; a warp: 32.
template <int D>
__global__ void __launch_bounds__(THREADS, 2)
    forward(cq_heads a, rounded b, float *out, float *lse, bool aligned, bool pairs) {
    constexpr int M = 2, ROWS = 64 * M;
    CQ_DYN_SMEM(half_t, room);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y; /* long ones first */
    int64_t kh = h / (a.heads / a.kv_heads), ld = a.kv_heads * D;
    int n = rows_from(q0, a.tokens, ROWS), row = (int)(threadIdx.x / CQ_WARP) * 16 * M;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *q = room, *k = q + ROWS * (D + 8), *v = k + SIDE * (D + 8);
    const half_t *from_k = b.k + kh * D, *from_v = b.v + kh * D;
    CQ_SHARED(int, begins, [ROWS]);       /* of the documents of the rows, from q0 */
    int at = (int)(begin_of(a, q0) - q0); /* the first key, from q0 */
    auto fetch_keys = [&](half_t *tile, const half_t *from, int key) {
        fetch<D, SIDE>(tile, from + (q0 + key) * ld, ld, rows_from(q0 + key, a.tokens, SIDE));
        cq_cp_commit();
    };
    fetch_keys(k, from_k, at);
    begins[threadIdx.x] = (int)(begin_of(a, q0 + threadIdx.x) - q0);
    for (int i = (int)threadIdx.x; i < ROWS * (D / 4); i += THREADS) {
        int r = i / (D / 4), c = i % (D / 4) * 4;
        float4 x = r < n ? cq_load4(a.q + (q0 + r) * a.ldq + h * D + c, aligned) : cq_zero4();
        *reinterpret_cast<uint2 *>(q + r * (D + 8) + c) = round4(x);
    }
    float o[M][D / 8][4], most[M][2], sum[M][2];
    clear(o);
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            most[u][r] = -INFINITY, sum[u][r] = 0.0f;
    for (; at < n; at += SIDE) {
        cq_cp_wait<0>();
        __syncthreads();
        fetch_keys(v, from_v, at);
        bool seen = at < row + 16 * M && at + SIDE > begins[row];
        float s[M][8][4];
        if (seen) {
            scores<D>(s, q, k, row);
            if (at + SIDE - 1 > row || at < begins[row + 16 * M - 1])
#pragma unroll
                for (int u = 0; u < M; u++)
#pragma unroll
                    for (int t = 0; t < 8; t++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int mine = row + 16 * u + g + 8 * (i >> 1);
                            sight in = {begins[mine] - at, mine - at + 1};
                            if (!sees(in, 8 * t + t2 + (i & 1)))
                                s[u][t][i] = -INFINITY;
                        }
            soften<D>(s, o, most, sum, a.scale * LOG2_E);
        }
        cq_cp_wait<0>();
        __syncthreads();
        if (at + SIDE < n)
            fetch_keys(k, from_k, at + SIDE);
        if (seen)
            times_tile<D>(o, s, v);
    }
#pragma unroll
    for (int u = 0; u < M; u++) {
        float by[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = sum[u][r] + __shfl_xor_sync(0xffffffffu, sum[u][r], 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            int i = row + 16 * u + g + 8 * r;
            by[r] = 1.0f / total;
            if (lse && (lane & 3) == 0 && i < n)
                lse[(q0 + i) * a.heads + h] = most[u][r] * a.scale + logf(total);
        }
        store<D>(out + (q0 * a.heads + h) * D, a.heads * D, o[u], row + 16 * u, n, by, pairs);
    }
}

/// Where dk or dv goes: the gradients themselves, or the partial sums of blockIdx.z.
struct sink {
    float *k, *v;
    int64_t ldk, ldv, part;
    bool pairs;
};

/// A block: 64 keys of one kv head and the queries of `each` heads of its group; a warp: 16 keys.
template <int D>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kv(cq_heads a, rounded b, sink to, int64_t each) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t k0 = (int64_t)blockIdx.x * SIDE, kh = blockIdx.y, ldk = a.kv_heads * D;
    int64_t ldq = a.heads * D, h0 = kh * (a.heads / a.kv_heads) + blockIdx.z * each;
    int m = rows_from(k0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *k = room, *v = k + TILE, *qs = v + TILE;        /* two of q, then two of dout */
    float *rows = reinterpret_cast<float *>(qs + 4 * TILE); /* two of lse / log 2, delta */
    int64_t end = end_of(a, k0 + m - 1), q0 = k0, h = h0;
    fetch<D, SIDE>(k, b.k + k0 * ldk + kh * D, ldk, m);
    fetch<D, SIDE>(v, b.v + k0 * ldk + kh * D, ldk, m);
    auto fetch_queries = [&](int64_t head, int64_t at, int half) {
        int64_t from = at * ldq + head * D;
        int n = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(qs + half * TILE, b.q + from, ldq, n);
        fetch<D, SIDE>(qs + (2 + half) * TILE, b.dout + from, ldq, n);
        if (threadIdx.x < SIDE / 2) {
            const float *line = (threadIdx.x < SIDE / 4 ? b.lse2 : b.delta) + head * b.padded + at;
            cq_cp_async16(rows + half * 2 * SIDE + threadIdx.x * 4,
                          line + threadIdx.x % (SIDE / 4) * 4);
        }
        cq_cp_commit();
    };
    int64_t ends[2]; /* of the documents of this lane's rows */
#pragma unroll
    for (int r = 0; r < 2; r++)
        ends[r] = end_of(a, k0 + row + g + 8 * r);
    int64_t first = __shfl_sync(0xffffffffu, ends[0], 0);
    int64_t last = __shfl_sync(0xffffffffu, ends[1], 31);
    float sum_k[1][D / 8][4], sum_v[1][D / 8][4], scale = a.scale * LOG2_E;
    clear(sum_k);
    clear(sum_v);
    fetch_queries(h, q0, 0);
    for (int half = 0; h < h0 + each; half ^= 1) {
        int64_t now = q0;
        cq_cp_wait<0>();
        __syncthreads();
        q0 += SIDE;
        if (q0 >= end)
            q0 = k0, h++;
        if (h < h0 + each)
            fetch_queries(h, q0, half ^ 1);
        if (now >= last)
            continue;
        const half_t *q = qs + half * TILE, *o = qs + (2 + half) * TILE;
        const float *lse2 = rows + half * 2 * SIDE + t2, *delta = lse2 + SIDE;
        float p[1][8][4], ds[1][8][4];
        scores<D>(p, k, q, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[0][t][i] = cq_exp2(p[0][t][i] * scale - lse2[8 * t + (i & 1)]);
        if (now < k0 + row + 15 || now + SIDE > first)
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sight in = {(int)(k0 - now) + row + g + 8 * (i >> 1),
                                rows_from(now, ends[i >> 1], SIDE)};
                    if (!sees(in, 8 * t + t2 + (i & 1)))
                        p[0][t][i] = 0.0f;
                }
        scores<D>(ds, v, o, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[0][t][i] = p[0][t][i] * (ds[0][t][i] - delta[8 * t + (i & 1)]);
        times_tile<D>(sum_v, p, o);
        times_tile<D>(sum_k, ds, q);
    }
    float by_k[2] = {a.scale, a.scale}, by_v[2] = {1.0f, 1.0f};
    int64_t part = blockIdx.z * to.part;
    store<D>(to.k + part + k0 * to.ldk + kh * D, to.ldk, sum_k[0], row, m, by_k, to.pairs);
    store<D>(to.v + part + k0 * to.ldv + kh * D, to.ldv, sum_v[0], row, m, by_v, to.pairs);
}

/// A block: 64 queries of one head; a warp: 16.
template <int D>
__global__ void __launch_bounds__(THREADS, 2)
    backward_q(cq_heads a, rounded b, float *dq, int64_t lddq, bool pairs) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y;
    int64_t kh = h / (a.heads / a.kv_heads), ldk = a.kv_heads * D, ldq = a.heads * D;
    int n = rows_from(q0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *q = room, *o = q + TILE, *ks = o + TILE; /* two of k, then two of v */
    int64_t k0 = begin_of(a, q0), end = q0 + n;
    fetch<D, SIDE>(q, b.q + q0 * ldq + h * D, ldq, n);
    fetch<D, SIDE>(o, b.dout + q0 * ldq + h * D, ldq, n);
    auto fetch_keys = [&](int64_t at, int half) {
        int64_t from = at * ldk + kh * D;
        int rows = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(ks + half * TILE, b.k + from, ldk, rows);
        fetch<D, SIDE>(ks + (2 + half) * TILE, b.v + from, ldk, rows);
        cq_cp_commit();
    };
    int begins[2]; /* of the documents of this lane's rows, from q0 */
    float lse2[2], delta[2], sum[1][D / 8][4], scale = a.scale * LOG2_E;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int64_t at = h * b.padded + q0 + row + g + 8 * r;
        begins[r] = (int)(begin_of(a, q0 + row + g + 8 * r) - q0);
        lse2[r] = b.lse2[at];
        delta[r] = b.delta[at];
    }
    int first = __shfl_sync(0xffffffffu, begins[0], 0);
    int last = __shfl_sync(0xffffffffu, begins[1], 31);
    clear(sum);
    fetch_keys(k0, 0);
    for (int half = 0; k0 < end; k0 += SIDE, half ^= 1) {
        int at = (int)(k0 - q0); /* of the first key, from q0 */
        cq_cp_wait<0>();
        __syncthreads();
        if (k0 + SIDE < end)
            fetch_keys(k0 + SIDE, half ^ 1);
        if (at >= row + 16 || at + SIDE <= first)
            continue;
        const half_t *k = ks + half * TILE, *v = ks + (2 + half) * TILE;
        float p[1][8][4], ds[1][8][4];
        scores<D>(p, q, k, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[0][t][i] = cq_exp2(p[0][t][i] * scale - lse2[i >> 1]);
        if (at + SIDE - 1 > row || at < last)
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sight in = {begins[i >> 1] - at, row + g + 8 * (i >> 1) - at + 1};
                    if (!sees(in, 8 * t + t2 + (i & 1)))
                        p[0][t][i] = 0.0f;
                }
        scores<D>(ds, o, v, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[0][t][i] = p[0][t][i] * (ds[0][t][i] - delta[i >> 1]);
        times_tile<D>(sum, ds, k);
    }
    float by[2] = {a.scale, a.scale};
    store<D>(dq + q0 * lddq + h * D, lddq, sum[0], row, n, by, pairs);
}

bool rows_on(const void *p, int64_t ld, int64_t floats) {
    return ((uintptr_t)p & (uintptr_t)(4 * floats - 1)) == 0 && ld % floats == 0;
}

matrix matrix_of(const float *from, int64_t ld, int64_t width, half_t *to) {
    matrix m = {from, to, ld, width, rows_on(from, ld, 4)};
    return m;
}

/// Takes pieces from a block of scratch; from NULL it only counts.
struct pieces {
    unsigned char *from;
    int64_t bytes;
};
void *piece(pieces *p, int64_t bytes) {
    void *at = p->from ? p->from + p->bytes : NULL;
    p->bytes += (bytes + 255) / 256 * 256;
    return at;
}

template <int D> int forward_of(cq_stream *s, const cq_heads &a, float *out, float *lse) {
    int64_t width = a.kv_heads * D, bytes = 4 * SIDE * (D + 8) * 2;
    rounded b = {};
    pieces all = {};
    for (int pass = 0; pass < 2; pass++) {
        b.k = (half_t *)piece(&all, a.tokens * width * 2);
        b.v = (half_t *)piece(&all, a.tokens * width * 2);
        if (pass == 0 && !(all.from = (unsigned char *)cq_cuda_scratch(s, all.bytes)))
            return CQ_ENOMEM;
        all.bytes = 0;
    }
    matrices m = {{matrix_of(a.k, a.ldk, width, b.k), matrix_of(a.v, a.ldv, width, b.v)}};
    CQ_TRY(cq_cuda_shared_bytes((const void *)forward<D>, bytes, "attention_forward"));
    dim3 grid(cq_blocks(a.tokens, 2 * SIDE), (unsigned)a.heads);
    CQ_LAUNCH(round_rows, dim3((unsigned)a.tokens, 2), THREADS, 0, s, m);
    CQ_LAUNCH(forward<D>, grid, THREADS, (size_t)bytes, s, a, b, out, lse, rows_on(a.q, a.ldq, 4),
              rows_on(out, 2, 2));
    CQ_CUDA_END("attention_forward");
}

/// Into how many parts the heads of a group are cut, for blocks enough to fill a device evenly.
int64_t parts_of(const cq_heads &a) {
    int64_t group = a.heads / a.kv_heads, blocks = cq_blocks(a.tokens, SIDE) * a.kv_heads;
    int64_t parts = 1;
    while (parts < group && (blocks * parts < 1024 || group % parts != 0))
        parts++;
    return parts;
}

struct room_backward {
    rounded b;
    float *pk, *pv;
};
void cut(room_backward *r, pieces *all, const cq_heads &a, int64_t parts) {
    int64_t q = a.tokens * a.heads * a.dim, kv = a.tokens * a.kv_heads * a.dim;
    r->b.padded = (a.tokens + SIDE - 1) / SIDE * SIDE;
    r->b.q = (half_t *)piece(all, q * 2);
    r->b.dout = (half_t *)piece(all, q * 2);
    r->b.k = (half_t *)piece(all, kv * 2);
    r->b.v = (half_t *)piece(all, kv * 2);
    r->b.lse2 = (float *)piece(all, r->b.padded * a.heads * 4);
    r->b.delta = (float *)piece(all, r->b.padded * a.heads * 4);
    r->pk = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
    r->pv = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
}

template <int D>
int round_inputs(cq_stream *s, const cq_heads &a, const cq_attention_backward_args *o,
                 const rounded &b) {
    const float *dout = (const float *)o->dout, *out = (const float *)o->out;
    int64_t width = a.kv_heads * D;
    matrices m = {{matrix_of(a.q, a.ldq, a.heads * D, b.q), matrix_of(a.k, a.ldk, width, b.k),
                   matrix_of(a.v, a.ldv, width, b.v)}};
    CQ_LAUNCH(round_rows, dim3((unsigned)a.tokens, 3), THREADS, 0, s, m);
    CQ_LAUNCH(round_slopes<D>, cq_blocks(b.padded * a.heads, THREADS / CQ_WARP), THREADS, 0, s,
              dout, out, (const float *)o->lse, b, a.tokens, a.heads,
              rows_on(dout, 4, 4) && rows_on(out, 4, 4));
    CQ_CUDA_END("attention_backward");
}

template <int D>
int backward_of(cq_stream *s, const cq_heads &a, const cq_attention_backward_args *o) {
    const char *op = "attention_backward";
    int64_t q = 6 * SIDE * (D + 8) * 2, kv = q + 4 * SIDE * 4, parts = parts_of(a);
    int64_t width = a.kv_heads * D;
    room_backward r = {};
    pieces all = {};
    cut(&r, &all, a, parts);
    if (!(all.from = (unsigned char *)cq_cuda_scratch(s, all.bytes)))
        return CQ_ENOMEM;
    all.bytes = 0;
    cut(&r, &all, a, parts);
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D>, kv, op));
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_q<D>, q, op));
    CQ_TRY(round_inputs<D>(s, a, o, r.b));
    float *dq = (float *)o->dq, *dk = (float *)o->dk, *dv = (float *)o->dv;
    sink to = {dk, dv, o->lddk, o->lddv, 0, rows_on(dk, o->lddk, 2) && rows_on(dv, o->lddv, 2)};
    sink some = {r.pk, r.pv, width, width, a.tokens * width, true};
    dim3 keys(cq_blocks(a.tokens, SIDE), (unsigned)a.kv_heads, (unsigned)parts);
    dim3 queries(cq_blocks(a.tokens, SIDE), (unsigned)a.heads);
    CQ_LAUNCH(backward_kv<D>, keys, THREADS, (size_t)kv, s, a, r.b, parts > 1 ? some : to,
              a.heads / a.kv_heads / parts);
    if (parts > 1)
        CQ_LAUNCH(add_parts, dim3((unsigned)a.tokens, 2), THREADS, 0, s, (const float *)r.pk,
                  (const float *)r.pv, (int)parts, a.tokens * width, width, dk, dv, o->lddk,
                  o->lddv);
    CQ_LAUNCH(backward_q<D>, queries, THREADS, (size_t)q, s, a, r.b, dq, o->lddq,
              rows_on(dq, o->lddq, 2));
    CQ_CUDA_END(op);
}

} // namespace

int cq_attention_bf16_forward(cq_stream *s, const cq_heads &a, float *out, float *lse) {
    return a.dim == 64 ? forward_of<64>(s, a, out, lse) : forward_of<128>(s, a, out, lse);
}

int cq_attention_bf16_backward(cq_stream *s, const cq_heads &a,
                               const cq_attention_backward_args *args) {
    return a.dim == 64 ? backward_of<64>(s, a, args) : backward_of<128>(s, a, args);
}
