/// attention_bf16.cu - attention with its products on tensor cores: operands rounded to BF16, sums
/// and the softmax in FP32.
///
/// What is read once per tile of the other side is rounded into scratch first, or read where it is
/// when it is stored as BF16 in rows on 16 bytes; tiles then come as asynchronous copies while the
/// products before them run. Four warps of 16 or 32 rows each; the result of one product stays in
/// registers and is the left side of the next, also in the backward for k and v, whose rows are
/// keys: S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q. The backward for q computes P and dS
/// again. Tiles that a warp's rows do not see are skipped.
///
/// Qwen3-4B, 8192 tokens in documents of 4096: forward 0.27 TFLOP, 0.9 ms at 300 TF/s; backward
/// with the second computation 0.96 TFLOP. Rounding moves 0.1 GB, 0.6 GB in the backward; of BF16
/// only <dout, out> is left, 0.13 GB.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/float4.cuh"

namespace {

typedef __nv_bfloat16 half_t;
constexpr int THREADS = 128, SIDE = 64;
constexpr float LOG2_E = 1.44269504088896341f;

/// Of the backward: dout in BF16, dense, and in scratch lse / log 2 and <dout, out> as [heads,
/// padded], zero from the last token on.
struct slopes {
    const half_t *dout;
    float *lse2, *delta;
    int64_t padded;
};

/// A strided matrix and where it goes, dense.
struct matrix {
    const void *from;
    half_t *to;
    int64_t ld, width;
    bool aligned;
};
struct matrices {
    matrix m[4];
    int n;
};

__device__ __forceinline__ uint2 round4(float4 v) {
    uint2 r;
    r.x = cq_bf16_pair(v.x, v.y);
    r.y = cq_bf16_pair(v.z, v.w);
    return r;
}

/// A block: one row of one matrix.
template <typename T> __global__ void __launch_bounds__(THREADS) round_rows(matrices all) {
    matrix m = blockIdx.y == 0   ? all.m[0]
               : blockIdx.y == 1 ? all.m[1]
               : blockIdx.y == 2 ? all.m[2]
                                 : all.m[3];
    const T *from = (const T *)m.from + (int64_t)blockIdx.x * m.ld;
    half_t *to = m.to + (int64_t)blockIdx.x * m.width;
    for (int64_t c = (int64_t)threadIdx.x * 4; c < m.width; c += THREADS * 4)
        *reinterpret_cast<uint2 *>(to + c) = round4(cq_load4(from + c, m.aligned));
}

/// A warp: dout of one token and head, rounded into `to` where it is not BF16; delta from the
/// rounded values, as dP is.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS)
    round_slopes(const T *dout, const T *out, const float *lse, half_t *to, slopes b,
                 int64_t tokens, int64_t heads, bool aligned) {
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
        if (sizeof(T) == sizeof(float))
            *reinterpret_cast<uint2 *>(to + i) = r;
        sum = cq_dot4(g, cq_load4(out + i, aligned));
    }
    sum = cq_warp_sum(sum);
    if (lane == 0) {
        b.delta[at] = sum;
        b.lse2[at] = t < tokens ? lse[row] * LOG2_E : 0.0f;
    }
}

/// dk and dv of `parts` parts of the heads of a group, added in order. A block: one token.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_parts(const float *pk, const float *pv, int parts, int64_t part, int64_t width, T *dk,
              T *dv, int64_t lddk, int64_t lddv) {
    const float *from = (blockIdx.y ? pv : pk) + (int64_t)blockIdx.x * width;
    T *to = blockIdx.y ? dv + (int64_t)blockIdx.x * lddv : dk + (int64_t)blockIdx.x * lddk;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float sum = from[c];
        for (int p = 1; p < parts; p++)
            sum += from[p * part + c];
        cq_put(to + c, sum);
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

__device__ __forceinline__ void store_pair(float *at, float x, float y) {
    *reinterpret_cast<float2 *>(at) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(half_t *at, float x, float y) {
    *reinterpret_cast<unsigned *>(at) = cq_bf16_pair(x, y);
}
/// Sixteen rows of results from `row` on, times `by`, as far as there are n.
template <int D, typename T>
__device__ __forceinline__ void store(T *to, int64_t ld, const float (&sum)[D / 8][4], int row,
                                      int n, const float by[2], bool pairs) {
    int lane = (int)(threadIdx.x % CQ_WARP);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = row + (lane >> 2) + 8 * r;
        if (i >= n)
            continue;
        T *at = to + i * ld + 2 * (lane & 3);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            float x = sum[d][2 * r] * by[r], y = sum[d][2 * r + 1] * by[r];
            if (pairs)
                store_pair(at + 8 * d, x, y);
            else
                cq_put(at + 8 * d, x), cq_put(at + 8 * d + 1, y);
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

/// The queries of a block, rounded; or as they are, by copies that the next wait is for.
template <int D, int ROWS>
__device__ __forceinline__ void put_queries(half_t *to, const float *from, int64_t ld, int n,
                                            bool aligned) {
    for (int i = (int)threadIdx.x; i < ROWS * (D / 4); i += THREADS) {
        int r = i / (D / 4), c = i % (D / 4) * 4;
        float4 x = r < n ? cq_load4(from + r * ld + c, aligned) : cq_zero4();
        *reinterpret_cast<uint2 *>(to + r * (D + 8) + c) = round4(x);
    }
}
template <int D, int ROWS>
__device__ __forceinline__ void put_queries(half_t *to, const half_t *from, int64_t ld, int n,
                                            bool) {
    fetch<D, ROWS>(to, from, ld, n);
    cq_cp_commit();
}

/// A block: 128 queries of one head; a warp: 32. k and v are BF16 in rows on 16 bytes, and so is q
/// where T is BF16.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    forward(cq_heads a, T *out, float *lse, bool aligned, bool pairs) {
    constexpr int M = 2, ROWS = 64 * M;
    CQ_DYN_SMEM(half_t, room);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y; /* long ones first */
    int64_t kh = h / (a.heads / a.kv_heads);
    int n = rows_from(q0, a.tokens, ROWS), row = (int)(threadIdx.x / CQ_WARP) * 16 * M;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *q = room, *k = q + ROWS * (D + 8), *v = k + SIDE * (D + 8);
    const half_t *from_k = (const half_t *)a.k + kh * D, *from_v = (const half_t *)a.v + kh * D;
    CQ_SHARED(int, begins, [ROWS]);       /* of the documents of the rows, from q0 */
    int at = (int)(begin_of(a, q0) - q0); /* the first key, from q0 */
    auto fetch_keys = [&](half_t *tile, const half_t *from, int64_t ld, int key) {
        fetch<D, SIDE>(tile, from + (q0 + key) * ld, ld, rows_from(q0 + key, a.tokens, SIDE));
        cq_cp_commit();
    };
    fetch_keys(k, from_k, a.ldk, at);
    begins[threadIdx.x] = (int)(begin_of(a, q0 + threadIdx.x) - q0);
    put_queries<D, ROWS>(q, (const T *)a.q + q0 * a.ldq + h * D, a.ldq, n, aligned);
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
        fetch_keys(v, from_v, a.ldv, at);
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
            fetch_keys(k, from_k, a.ldk, at + SIDE);
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
template <typename T> struct sink {
    T *k, *v;
    int64_t ldk, ldv, part;
    bool pairs;
};

/// A block: 64 keys of one kv head and the queries of `each` heads of its group; a warp: 16 keys.
/// q, k and v are BF16 in rows on 16 bytes, here and below.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kv(cq_heads a, slopes b, sink<T> to, int64_t each) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t k0 = (int64_t)blockIdx.x * SIDE, kh = blockIdx.y;
    int64_t ldo = a.heads * D, h0 = kh * (a.heads / a.kv_heads) + blockIdx.z * each;
    int m = rows_from(k0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *k = room, *v = k + TILE, *qs = v + TILE;        /* two of q, then two of dout */
    float *rows = reinterpret_cast<float *>(qs + 4 * TILE); /* two of lse / log 2, delta */
    int64_t end = end_of(a, k0 + m - 1), q0 = k0, h = h0;
    fetch<D, SIDE>(k, (const half_t *)a.k + k0 * a.ldk + kh * D, a.ldk, m);
    fetch<D, SIDE>(v, (const half_t *)a.v + k0 * a.ldv + kh * D, a.ldv, m);
    auto fetch_queries = [&](int64_t head, int64_t at, int half) {
        int n = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(qs + half * TILE, (const half_t *)a.q + at * a.ldq + head * D, a.ldq, n);
        fetch<D, SIDE>(qs + (2 + half) * TILE, b.dout + at * ldo + head * D, ldo, n);
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
template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_q(cq_heads a, slopes b, T *dq, int64_t lddq, bool pairs) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y;
    int64_t kh = h / (a.heads / a.kv_heads), ldo = a.heads * D;
    int n = rows_from(q0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *q = room, *o = q + TILE, *ks = o + TILE; /* two of k, then two of v */
    int64_t k0 = begin_of(a, q0), end = q0 + n;
    fetch<D, SIDE>(q, (const half_t *)a.q + q0 * a.ldq + h * D, a.ldq, n);
    fetch<D, SIDE>(o, b.dout + q0 * ldo + h * D, ldo, n);
    auto fetch_keys = [&](int64_t at, int half) {
        int rows = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(ks + half * TILE, (const half_t *)a.k + at * a.ldk + kh * D, a.ldk, rows);
        fetch<D, SIDE>(ks + (2 + half) * TILE, (const half_t *)a.v + at * a.ldv + kh * D, a.ldv,
                       rows);
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

/// Whether rows of T, ld apart, can be moved n elements at a time.
template <typename T> bool rows_on(const void *p, int64_t ld, int64_t n) {
    return ((uintptr_t)p & (uintptr_t)(n * (int64_t)sizeof(T) - 1)) == 0 && ld % n == 0;
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

/// Gives rows of T a place in BF16 on 16 bytes where they are not there yet, and lists them.
template <typename T>
void place(const void **rows, int64_t *ld, int64_t n, int64_t width, pieces *all, matrices *list) {
    if (sizeof(T) == sizeof(half_t) && rows_on<T>(*rows, *ld, 8))
        return;
    half_t *to = (half_t *)piece(all, n * width * 2);
    list->m[list->n++] = {*rows, to, *ld, width, rows_on<T>(*rows, *ld, 4)};
    *rows = to;
    *ld = width;
}
template <typename T> void place_keys(cq_heads *a, pieces *all, matrices *list) {
    place<T>(&a->k, &a->ldk, a->tokens, a->kv_heads * a->dim, all, list);
    place<T>(&a->v, &a->ldv, a->tokens, a->kv_heads * a->dim, all, list);
}
template <typename T> void place_queries(cq_heads *a, pieces *all, matrices *list) {
    place<T>(&a->q, &a->ldq, a->tokens, a->heads * a->dim, all, list);
}
template <typename T> void round_all(cq_stream *s, const matrices &list, int64_t tokens) {
    if (list.n > 0)
        CQ_LAUNCH(round_rows<T>, dim3((unsigned)tokens, (unsigned)list.n), THREADS, 0, s, list);
}

template <int D, typename T> int forward_of(cq_stream *s, const cq_attention_forward_args *o) {
    int64_t bytes = 4 * SIDE * (D + 8) * 2;
    cq_heads a = {};
    matrices list = {};
    pieces all = {};
    for (int pass = 0; pass < 2; pass++) {
        a = cq_heads_of(o);
        list.n = 0;
        place_keys<T>(&a, &all, &list);
        if (sizeof(T) == sizeof(half_t)) /* floats are rounded when they are used */
            place_queries<T>(&a, &all, &list);
        if (pass == 0 && list.n > 0 && !(all.from = (unsigned char *)cq_cuda_scratch(s, all.bytes)))
            return CQ_ENOMEM;
        all.bytes = 0;
    }
    CQ_TRY(cq_cuda_shared_bytes((const void *)forward<D, T>, bytes, "attention_forward"));
    dim3 grid(cq_blocks(a.tokens, 2 * SIDE), (unsigned)a.heads);
    round_all<T>(s, list, a.tokens);
    CQ_LAUNCH((forward<D, T>), grid, THREADS, (size_t)bytes, s, a, (T *)o->out, (float *)o->lse,
              rows_on<T>(a.q, a.ldq, 4), rows_on<T>(o->out, 2, 2));
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
    cq_heads a;
    matrices list;
    slopes b;
    half_t *dout; ///< where it is rounded to; NULL for one that is BF16
    float *pk, *pv;
};
template <typename T>
room_backward cut(pieces *all, const cq_attention_backward_args *o, int64_t parts) {
    room_backward r = {};
    r.a = cq_heads_of(o);
    int64_t rows = r.a.tokens * r.a.heads, kv = r.a.tokens * r.a.kv_heads * r.a.dim;
    r.b.padded = (r.a.tokens + SIDE - 1) / SIDE * SIDE;
    place_queries<T>(&r.a, all, &r.list);
    const void *dout = o->dout;
    int64_t ld = r.a.heads * r.a.dim;
    if (sizeof(T) == sizeof(half_t))
        place<T>(&dout, &ld, r.a.tokens, ld, all, &r.list);
    else
        dout = r.dout = (half_t *)piece(all, rows * r.a.dim * 2);
    r.b.dout = (const half_t *)dout;
    place_keys<T>(&r.a, all, &r.list);
    r.b.lse2 = (float *)piece(all, r.b.padded * r.a.heads * 4);
    r.b.delta = (float *)piece(all, r.b.padded * r.a.heads * 4);
    r.pk = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
    r.pv = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
    return r;
}

/// dk and dv: as parts in FP32 that are added up, or straight to where they belong.
template <int D, typename T>
int backward_keys(cq_stream *s, const room_backward &r, const cq_attention_backward_args *o,
                  int64_t parts) {
    int64_t bytes = 6 * SIDE * (D + 8) * 2 + 4 * SIDE * 4, width = r.a.kv_heads * D;
    int64_t each = r.a.heads / r.a.kv_heads / parts;
    T *dk = (T *)o->dk, *dv = (T *)o->dv;
    dim3 keys(cq_blocks(r.a.tokens, SIDE), (unsigned)r.a.kv_heads, (unsigned)parts);
    if (parts == 1) {
        sink<T> to = {dk,      dv, o->lddk,
                      o->lddv, 0,  rows_on<T>(dk, o->lddk, 2) && rows_on<T>(dv, o->lddv, 2)};
        CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D, T>, bytes, "attention_backward"));
        CQ_LAUNCH((backward_kv<D, T>), keys, THREADS, (size_t)bytes, s, r.a, r.b, to, each);
        return CQ_OK;
    }
    sink<float> some = {r.pk, r.pv, width, width, r.a.tokens * width, true};
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D, float>, bytes, "attention_backward"));
    CQ_LAUNCH((backward_kv<D, float>), keys, THREADS, (size_t)bytes, s, r.a, r.b, some, each);
    CQ_LAUNCH(add_parts<T>, dim3((unsigned)r.a.tokens, 2), THREADS, 0, s, (const float *)r.pk,
              (const float *)r.pv, (int)parts, r.a.tokens * width, width, dk, dv, o->lddk, o->lddv);
    return CQ_OK;
}

template <int D, typename T> int backward_of(cq_stream *s, const cq_attention_backward_args *o) {
    int64_t bytes = 6 * SIDE * (D + 8) * 2, parts = parts_of(cq_heads_of(o));
    pieces all = {};
    cut<T>(&all, o, parts);
    if (!(all.from = (unsigned char *)cq_cuda_scratch(s, all.bytes)))
        return CQ_ENOMEM;
    all.bytes = 0;
    room_backward r = cut<T>(&all, o, parts);
    const T *dout = (const T *)o->dout, *out = (const T *)o->out;
    round_all<T>(s, r.list, r.a.tokens);
    CQ_LAUNCH((round_slopes<D, T>), cq_blocks(r.b.padded * r.a.heads, THREADS / CQ_WARP), THREADS,
              0, s, dout, out, (const float *)o->lse, r.dout, r.b, r.a.tokens, r.a.heads,
              rows_on<T>(dout, 4, 4) && rows_on<T>(out, 4, 4));
    CQ_TRY((backward_keys<D, T>(s, r, o, parts)));
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_q<D, T>, bytes, "attention_backward"));
    dim3 queries(cq_blocks(r.a.tokens, SIDE), (unsigned)r.a.heads);
    CQ_LAUNCH((backward_q<D, T>), queries, THREADS, (size_t)bytes, s, r.a, r.b, (T *)o->dq, o->lddq,
              rows_on<T>(o->dq, o->lddq, 2));
    CQ_CUDA_END("attention_backward");
}

} // namespace

int cq_attention_bf16_forward(cq_stream *s, const cq_attention_forward_args *a) {
    if (a->act == CQ_BF16)
        return a->head_dim == 64 ? forward_of<64, half_t>(s, a) : forward_of<128, half_t>(s, a);
    return a->head_dim == 64 ? forward_of<64, float>(s, a) : forward_of<128, float>(s, a);
}

int cq_attention_bf16_backward(cq_stream *s, const cq_attention_backward_args *a) {
    if (a->act == CQ_BF16)
        return a->head_dim == 64 ? backward_of<64, half_t>(s, a) : backward_of<128, half_t>(s, a);
    return a->head_dim == 64 ? backward_of<64, float>(s, a) : backward_of<128, float>(s, a);
}
