/// attention_tiles.cuh - what attention_bf16.cu and attention_bf16_backward.cu share: tiles of BF16
/// in shared memory, products of them on tensor cores, rows on their way to BF16.
#pragma once
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/float4.cuh"

namespace {

typedef __nv_bfloat16 half_t;
constexpr int THREADS = 128, SIDE = 64;
constexpr float LOG2_E = 1.44269504088896341f;

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
template <typename T> __device__ __forceinline__ void put_two(T *at, float x, float y, bool pairs) {
    if (pairs)
        store_pair(at, x, y);
    else
        cq_put(at, x), cq_put(at + 1, y);
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
            put_two(at + 8 * d, x, y, pairs);
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

/// Whether rows of T, ld apart, can be moved n elements at a time.
template <typename T> bool rows_on(const void *p, int64_t ld, int64_t n) {
    return ((uintptr_t)p & (uintptr_t)(n * (int64_t)sizeof(T) - 1)) == 0 && ld % n == 0;
}

/// Takes pieces from a block of scratch; from NULL it only counts.
struct pieces {
    unsigned char *from;
    int64_t bytes;
};
inline void *piece(pieces *p, int64_t bytes) {
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

} // namespace
