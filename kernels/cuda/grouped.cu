/// grouped.cu - products of sorted rows with one weight matrix per expert.
///
///     forward  y = x w[e]'        input  x = y w[e]        weight  w[e] += y' x
///
/// Only the device knows how many rows a group has. A block of the first two modes goes through the
/// tiles of all groups with a fixed stride and finds the group of a tile by a running sum over
/// `offsets`, 32 groups at a time; a block of the third has one tile of one w[e], and its reduction
/// runs over the group's rows in order. Each element of a result is one thread's sum over r
/// ascending, so results do not depend on the grid.
///
/// Nemotron 3 Nano, 8192 tokens: 49152 rows in 128 groups, [1856, 2688]: 490 GFLOP a call. In FP32
/// 8.2 ms at 60 TF/s. In BF16 0.6 ms at the tensor rate, but the tiles of 128 x 256 read 3.8 GB of
/// x in FP32 and 3.8 GB of w16 (7.6 GB of w where there is no w16) from the second-level cache: 1.4
/// (2.1) ms at 5.5 TB/s. That is the bound; the memory's, 2.2 (3.5) GB at 4.3 TB/s, is 0.5 (0.8)
/// ms. With x and y in BF16 the tiles read 1.9 GB less and the memory gives 0.45 GB less; the
/// hardware copies both operands, in all three modes.
#include "kernels/cuda/cq_cuda.h"
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/float4.cuh"

namespace {

enum { THREADS = 256, PERSISTENT = 1024 };

/// C [m, n] = A B over r, or C += A B. A is [m, r] or, turned, [r, m]; B is [n, r] or, turned,
/// [r, n]. Pointers to the tile's first element; m, n are what is left of C from there.
template <typename A, typename B, typename C> struct tile_job {
    const A *a;
    const B *b;
    C *c;
    int64_t lda, ldb, ldc, r;
    int m, n;
};

/// What a kernel needs, by value.
struct grouped {
    const int64_t *offsets;
    int64_t groups, n, k;
    void *x, *w, *y; ///< of the types that a kernel is made for
    const __nv_bfloat16 *w16;
};

/// Tiles of all groups in order, as one warp sees them: 32 groups at a time.
struct group_walk {
    int first;       ///< of the groups in view
    int before;      ///< tiles of the groups before them
    int tiles, upto; ///< of this lane's group, and the sum from `first` to it
};

__device__ __forceinline__ void walk_look(group_walk *w, const grouped &g, int rows_per_tile,
                                          int columns) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t e = (int64_t)w->first + lane;
    int64_t rows = e < g.groups ? g.offsets[e + 1] - g.offsets[e] : 0;
    w->tiles = (int)((rows + rows_per_tile - 1) / rows_per_tile) * columns;
    w->upto = w->tiles;
    for (int d = 1; d < CQ_WARP; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, w->upto, d);
        w->upto += lane >= d ? other : 0;
    }
}

/// Group and place inside it of tile `t`, which is never below the one asked before; false behind
/// the last tile.
__device__ __forceinline__ bool walk_find(group_walk *w, const grouped &g, int rows_per_tile,
                                          int columns, int t, int *group, int *inside) {
    for (;;) {
        unsigned hit = __ballot_sync(0xffffffffu, w->before + w->upto > t);
        if (hit != 0) {
            int lane = __ffs((int)hit) - 1;
            int start = __shfl_sync(0xffffffffu, w->upto - w->tiles, lane);
            *group = w->first + lane;
            *inside = t - w->before - start;
            return true;
        }
        w->before += __shfl_sync(0xffffffffu, w->upto, CQ_WARP - 1);
        w->first += CQ_WARP;
        if (w->first >= g.groups)
            return false;
        walk_look(w, g, rows_per_tile, columns);
    }
}

__device__ __forceinline__ int least(int64_t a, int b) { return a < b ? (int)a : b; }

/// A tile of an operand on its way from memory: SIDE rows of A or columns of B by DEPTH of r, four
/// consecutive values at a time. Outside of the matrix it is zero.
template <typename T, bool TURNED, int SIDE, int DEPTH, bool VEC> struct piece {
    enum {
        COLS = TURNED ? SIDE : DEPTH,
        PER_ROW = COLS / 4,
        N = SIDE * DEPTH / 4 / THREADS,
        STEP = THREADS / PER_ROW ///< rows between two of a thread's
    };
    static_assert(THREADS % PER_ROW == 0 && N * THREADS * 4 == SIDE * DEPTH, "whole rows");
    float4 v[N];

    static __device__ __forceinline__ int row(int i) {
        return (int)threadIdx.x / PER_ROW + i * STEP;
    }
    static __device__ __forceinline__ int col() { return (int)threadIdx.x % PER_ROW * 4; }

    /// p [side, depth], or turned [depth, side], is where the tile starts; `side` and `depth` are
    /// what is left of the matrix from there.
    __device__ __forceinline__ void load(const T *p, int64_t ld, int side, int depth) {
        int rows = TURNED ? depth : side, cols = TURNED ? side : depth;
        int left = cols - col();
        p += row(0) * ld + col();
#pragma unroll
        for (int i = 0; i < N; i++) {
            bool in = row(i) < rows;
            if (VEC) { /* a chunk is inside as a whole: cols is a multiple of 4 */
                v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (in && left > 0)
                    v[i] = cq_load4(p, true);
            } else {
                v[i].x = in && left > 0 ? cq_value(p[0]) : 0.0f;
                v[i].y = in && left > 1 ? cq_value(p[1]) : 0.0f;
                v[i].z = in && left > 2 ? cq_value(p[2]) : 0.0f;
                v[i].w = in && left > 3 ? cq_value(p[3]) : 0.0f;
            }
            p += STEP * ld;
        }
    }
    /// As FP32 to [DEPTH][LD], r first.
    template <int LD> __device__ __forceinline__ void store_by_depth(float *to) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (TURNED) {
                *reinterpret_cast<float4 *>(to + row(i) * LD + col()) = v[i];
            } else {
                to[(col() + 0) * LD + row(i)] = v[i].x;
                to[(col() + 1) * LD + row(i)] = v[i].y;
                to[(col() + 2) * LD + row(i)] = v[i].z;
                to[(col() + 3) * LD + row(i)] = v[i].w;
            }
        }
    }
    /// Rounded to BF16, in the order of memory: rows of LD.
    template <int LD> __device__ __forceinline__ void store_rounded(__nv_bfloat16 *to) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint2 two;
            two.x = cq_bf16_pair(v[i].x, v[i].y);
            two.y = cq_bf16_pair(v[i].z, v[i].w);
            *reinterpret_cast<uint2 *>(to + row(i) * LD + col()) = two;
        }
    }
};

/// One C tile in FP32: 128 x 128 by 256 threads, 8 x 8 sums each, r in steps of 16.
struct simt {
    typedef float A;
    typedef float B;
    typedef float C;
    enum { M = 128, N = 128, DEPTH = 16, LD = 128 + 4, STAGE = 2 * DEPTH * LD };
    enum { BYTES = 2 * STAGE * 4, PER_SM = 2 };

    template <bool TA, bool TB, bool ADD, bool VEC>
    static __device__ void tile(const tile_job<A, B, C> &j, unsigned char *room) {
        float *stage = reinterpret_cast<float *>(room);
        int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
        piece<A, TA, M, DEPTH, VEC> a;
        piece<B, TB, N, DEPTH, VEC> b;
        float sum[8][8] = {};
        int64_t a_step = DEPTH * (TA ? j.lda : 1), b_step = DEPTH * (TB ? j.ldb : 1);
        const float *pa = j.a, *pb = j.b;
        a.load(pa, j.lda, j.m, least(j.r, DEPTH));
        b.load(pb, j.ldb, j.n, least(j.r, DEPTH));
        a.template store_by_depth<LD>(stage);
        b.template store_by_depth<LD>(stage + DEPTH * LD);
        __syncthreads();
        int steps = (int)((j.r + DEPTH - 1) / DEPTH);
        for (int s = 0; s < steps; s++) {
            const float *now = stage + (s & 1) * STAGE;
            bool more = s + 1 < steps;
            if (more) {
                int left = least(j.r - (int64_t)(s + 1) * DEPTH, DEPTH);
                pa += a_step;
                pb += b_step;
                a.load(pa, j.lda, j.m, left);
                b.load(pb, j.ldb, j.n, left);
            }
#pragma unroll
            for (int r = 0; r < DEPTH; r++) {
                const float *ra = now + r * LD + ty * 4, *rb = now + (DEPTH + r) * LD + tx * 4;
                float4 a0 = *reinterpret_cast<const float4 *>(ra);
                float4 a1 = *reinterpret_cast<const float4 *>(ra + 64);
                float4 b0 = *reinterpret_cast<const float4 *>(rb);
                float4 b1 = *reinterpret_cast<const float4 *>(rb + 64);
                const float av[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
                const float bv[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
                for (int p = 0; p < 8; p++)
#pragma unroll
                    for (int q = 0; q < 8; q++)
                        sum[p][q] = fmaf(av[p], bv[q], sum[p][q]);
            }
            if (more) {
                float *next = stage + (~s & 1) * STAGE;
                a.template store_by_depth<LD>(next);
                b.template store_by_depth<LD>(next + DEPTH * LD);
            }
            __syncthreads();
        }
#pragma unroll
        for (int p = 0; p < 8; p++) {
            int row = ty * 4 + (p & 3) + (p >> 2) * 64;
            float *c = j.c + row * j.ldc;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int col = tx * 4 + h * 64;
                if (row >= j.m)
                    continue;
                if (VEC) {
                    if (col < j.n) {
                        float4 *at = reinterpret_cast<float4 *>(c + col);
                        float4 old = ADD ? *at : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                        *at = make_float4(old.x + sum[p][h * 4], old.y + sum[p][h * 4 + 1],
                                          old.z + sum[p][h * 4 + 2], old.w + sum[p][h * 4 + 3]);
                    }
                } else {
#pragma unroll
                    for (int q = 0; q < 4; q++)
                        if (col + q < j.n)
                            c[col + q] = (ADD ? c[col + q] : 0.0f) + sum[p][h * 4 + q];
                }
            }
        }
    }
};

/// `weights` as the type that a kernel wants B of.
__device__ __forceinline__ void weights_of(const grouped &g, const float **w) {
    *w = (const float *)g.w;
}
__device__ __forceinline__ void weights_of(const grouped &g, const __nv_bfloat16 **w) {
    *w = g.w16;
}

/// One C tile on tensor cores: operands rounded to BF16 on their way into shared memory, sums in
/// FP32. 128 x 256 by 8 warps of 64 x 64, r in steps of 32. COPY_A, COPY_B: that operand is BF16
/// already and is copied by the hardware, three steps ahead; else it goes through registers, one
/// step ahead.
template <typename TypeA, typename TypeB, typename TypeC, bool COPY_A, bool COPY_B> struct tensor {
    typedef TypeA A;
    typedef TypeB B;
    typedef TypeC C;
    enum { M = 128, N = 256, DEPTH = 32, WARP_M = 64, WARP_N = 64, ACROSS = N / WARP_N };
    enum { A_SIZE = M * (DEPTH + 8), B_SIZE = N * (DEPTH + 8), AHEAD = 4 };
    enum {
        A_STAGES = COPY_A ? AHEAD : 2,
        B_STAGES = COPY_B ? AHEAD : 2,
        COPIES = COPY_A || COPY_B
    };
    enum { BYTES = 2 * (A_STAGES * A_SIZE + B_STAGES * B_SIZE), PER_SM = 1 };
    /// Rows are 16 bytes longer than their content: eight rows of a fragment fall into different
    /// banks.
    template <bool TURNED, int SIDE> struct place {
        enum { LD = (TURNED ? SIDE : DEPTH) + 8 };
    };

    template <bool TA>
    static __device__ __forceinline__ void load_a(uint32_t f[4], const __nv_bfloat16 *a, int row,
                                                  int r) {
        enum { LD = place<TA, M>::LD };
        int lane = (int)(threadIdx.x % CQ_WARP);
        if (TA)
            cq_ldmatrix_x4_trans(f, a + (r + (lane & 7) + 8 * (lane >> 4)) * LD + row +
                                        8 * ((lane >> 3) & 1));
        else
            cq_ldmatrix_x4(f, a + (row + (lane & 15)) * LD + r + 8 * (lane >> 4));
    }
    /// Two fragments: columns col .. col + 7 in f[0], f[1], the next eight in f[2], f[3].
    template <bool TB>
    static __device__ __forceinline__ void load_b(uint32_t f[4], const __nv_bfloat16 *b, int col,
                                                  int r) {
        enum { LD = place<TB, N>::LD };
        int lane = (int)(threadIdx.x % CQ_WARP);
        if (TB)
            cq_ldmatrix_x4_trans(f, b + (r + (lane & 15)) * LD + col + 8 * (lane >> 4));
        else
            cq_ldmatrix_x4(f, b + (col + (lane & 7) + 8 * (lane >> 4)) * LD + r +
                                  8 * ((lane >> 3) & 1));
    }
    template <bool TA, bool TB>
    static __device__ __forceinline__ void multiply(float sum[WARP_M / 16][WARP_N / 8][4],
                                                    const __nv_bfloat16 *a, const __nv_bfloat16 *b,
                                                    int row0, int col0) {
#pragma unroll
        for (int r = 0; r < DEPTH; r += 16) {
            uint32_t fa[WARP_M / 16][4];
#pragma unroll
            for (int p = 0; p < WARP_M / 16; p++)
                load_a<TA>(fa[p], a, row0 + p * 16, r);
#pragma unroll
            for (int q = 0; q < WARP_N / 8; q += 2) {
                uint32_t fb[4];
                load_b<TB>(fb, b, col0 + q * 8, r);
#pragma unroll
                for (int p = 0; p < WARP_M / 16; p++) {
                    cq_mma_bf16(sum[p][q], fa[p], fb);
                    cq_mma_bf16(sum[p][q + 1], fa[p], fb + 2);
                }
            }
        }
    }

    /// Starts the copy of one step of an operand, `side` by `depth`, into its stage. Chunks of 8
    /// values are inside of the matrix as a whole.
    template <bool TURNED, int SIDE>
    static __device__ __forceinline__ void copy(__nv_bfloat16 *to, const __nv_bfloat16 *from,
                                                int64_t ld, int side, int depth) {
        enum { LD = place<TURNED, SIDE>::LD, PER_ROW = (TURNED ? SIDE : DEPTH) / 8 };
        enum { STEP = THREADS / PER_ROW };
        int rows = TURNED ? depth : side, cols = TURNED ? side : depth;
        int row = (int)threadIdx.x / PER_ROW, col = (int)threadIdx.x % PER_ROW * 8;
        to += row * LD + col;
#pragma unroll
        for (int i = 0; i < SIDE * DEPTH / 8 / THREADS; i++) {
            bool in = row + i * STEP < rows && col < cols;
            cq_cp_async16(to + i * STEP * LD, in ? from + (row + i * STEP) * ld + col : from,
                          in ? 16 : 0);
        }
    }
    /// Starts what is copied of step s, if there is such a step, and closes a group.
    template <bool TA, bool TB>
    static __device__ __forceinline__ void copy_step(__nv_bfloat16 *stage_a, __nv_bfloat16 *stage_b,
                                                     const tile_job<A, B, C> &j, int s, int steps) {
        if (s < steps) {
            int depth = least(j.r - (int64_t)s * DEPTH, DEPTH);
            if constexpr (COPY_A)
                copy<TA, M>(stage_a + s % A_STAGES * A_SIZE,
                            j.a + (int64_t)s * DEPTH * (TA ? j.lda : 1), j.lda, j.m, depth);
            if constexpr (COPY_B)
                copy<TB, N>(stage_b + s % B_STAGES * B_SIZE,
                            j.b + (int64_t)s * DEPTH * (TB ? j.ldb : 1), j.ldb, j.n, depth);
        }
        cq_cp_commit();
    }
    /// Values of C at col and col + 1 of a row of n, as far as they are in it.
    template <bool ADD, bool VEC>
    static __device__ __forceinline__ void put_two(float *c, int col, int n, float s0, float s1) {
        if (VEC) {
            if (col < n) {
                float2 *at = reinterpret_cast<float2 *>(c + col);
                float2 old = ADD ? *at : make_float2(0.0f, 0.0f);
                *at = make_float2(old.x + s0, old.y + s1);
            }
        } else {
            if (col < n)
                c[col] = (ADD ? c[col] : 0.0f) + s0;
            if (col + 1 < n)
                c[col + 1] = (ADD ? c[col + 1] : 0.0f) + s1;
        }
    }
    template <bool ADD, bool VEC>
    static __device__ __forceinline__ void put_two(__nv_bfloat16 *c, int col, int n, float s0,
                                                   float s1) {
        static_assert(!ADD, "sums are F32");
        if (VEC && col < n)
            *reinterpret_cast<unsigned *>(c + col) = cq_bf16_pair(s0, s1);
        if (!VEC && col < n)
            c[col] = __float2bfloat16(s0);
        if (!VEC && col + 1 < n)
            c[col + 1] = __float2bfloat16(s1);
    }

    template <bool TA, bool TB, bool ADD, bool VEC>
    static __device__ void tile(const tile_job<A, B, C> &j, unsigned char *room) {
        enum { LDA = place<TA, M>::LD, LDB = place<TB, N>::LD };
        __nv_bfloat16 *stage_a = reinterpret_cast<__nv_bfloat16 *>(room);
        __nv_bfloat16 *stage_b = stage_a + A_STAGES * A_SIZE;
        int warp = (int)threadIdx.x / CQ_WARP, lane = (int)threadIdx.x % CQ_WARP;
        int row0 = warp / ACROSS * WARP_M, col0 = warp % ACROSS * WARP_N;
        bool busy = row0 < j.m && col0 < j.n;
        int steps = (int)((j.r + DEPTH - 1) / DEPTH);
        piece<A, TA, M, DEPTH, VEC> a;
        piece<B, TB, N, DEPTH, VEC> b;
        float sum[WARP_M / 16][WARP_N / 8][4] = {};
        int64_t a_step = DEPTH * (TA ? j.lda : 1), b_step = DEPTH * (TB ? j.ldb : 1);
        const A *pa = j.a;
        const B *pb = j.b;
        if (COPIES) {
#pragma unroll
            for (int s = 0; s < AHEAD - 1; s++)
                copy_step<TA, TB>(stage_a, stage_b, j, s, steps);
        }
        if (!COPY_B)
            b.load(pb, j.ldb, j.n, least(j.r, DEPTH));
        if (!COPY_A) {
            a.load(pa, j.lda, j.m, least(j.r, DEPTH));
            a.template store_rounded<LDA>(stage_a);
        }
        if (COPIES)
            cq_cp_wait<AHEAD - 2>();
        if (!COPY_B)
            b.template store_rounded<LDB>(stage_b);
        __syncthreads();
        for (int s = 0; s < steps; s++) {
            bool more = s + 1 < steps;
            int left = least(j.r - (int64_t)(s + 1) * DEPTH, DEPTH);
            if (COPIES)
                copy_step<TA, TB>(stage_a, stage_b, j, s + AHEAD - 1, steps);
            if (more) {
                if (!COPY_A) {
                    pa += a_step;
                    a.load(pa, j.lda, j.m, left);
                }
                if (!COPY_B) {
                    pb += b_step;
                    b.load(pb, j.ldb, j.n, left);
                }
            }
            if (busy)
                multiply<TA, TB>(sum, stage_a + s % A_STAGES * A_SIZE,
                                 stage_b + s % B_STAGES * B_SIZE, row0, col0);
            if (more) {
                if (!COPY_A)
                    a.template store_rounded<LDA>(stage_a + (s + 1) % 2 * A_SIZE);
                if (!COPY_B)
                    b.template store_rounded<LDB>(stage_b + (s + 1) % 2 * B_SIZE);
            }
            if (COPIES)
                cq_cp_wait<AHEAD - 2>();
            __syncthreads();
        }
        if (COPIES)
            cq_cp_wait<0>();
#pragma unroll
        for (int p = 0; p < WARP_M / 16; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = row0 + p * 16 + h * 8 + (lane >> 2);
                C *c = j.c + row * j.ldc;
#pragma unroll
                for (int q = 0; q < WARP_N / 8; q++) {
                    int col = col0 + q * 8 + (lane & 3) * 2;
                    float s0 = sum[p][q][h * 2], s1 = sum[p][q][h * 2 + 1];
                    if (row >= j.m)
                        continue;
                    put_two<ADD, VEC>(c, col, j.n, s0, s1);
                }
            }
    }
};

/// Rows of y, or with INPUT of x. Neighbouring tiles are of the same columns of w[e]: blocks that
/// run together read it once from memory.
template <typename HOW, bool INPUT, bool VEC>
__global__ void __launch_bounds__(THREADS, HOW::PER_SM) grouped_rows(grouped g) {
    typedef typename HOW::A A; /* of the rows that are read */
    typedef typename HOW::C C;
    CQ_DYN_SMEM(unsigned char, room);
    const typename HOW::B *weights;
    weights_of(g, &weights);
    int64_t width = INPUT ? g.k : g.n, depth = INPUT ? g.n : g.k;
    int columns = (int)((width + HOW::N - 1) / HOW::N), group, inside;
    group_walk walk = {0, 0, 0, 0};
    walk_look(&walk, g, HOW::M, columns);
    for (int t = (int)blockIdx.x; walk_find(&walk, g, HOW::M, columns, t, &group, &inside);
         t += (int)gridDim.x) {
        int64_t first = g.offsets[group], end = g.offsets[group + 1];
        int down = (int)((end - first + HOW::M - 1) / HOW::M);
        int64_t row = first + (int64_t)(inside % down) * HOW::M;
        int64_t col = (int64_t)(inside / down) * HOW::N;
        int64_t at = (int64_t)group * g.n * g.k + (INPUT ? col : col * g.k);
        tile_job<A, typename HOW::B, C> j;
        j.a = (const A *)(INPUT ? g.y : g.x) + row * depth;
        j.b = weights ? weights + at : nullptr;
        j.c = (C *)(INPUT ? g.x : g.y) + row * width + col;
        j.lda = depth;
        j.ldb = g.k;
        j.ldc = width;
        j.r = depth;
        j.m = least(end - row, HOW::M);
        j.n = least(width - col, HOW::N);
        HOW::template tile<false, INPUT, false, VEC>(j, room);
    }
}

/// One tile of one w[e].
template <typename HOW, bool VEC>
__global__ void __launch_bounds__(THREADS) grouped_weight(grouped g) {
    CQ_DYN_SMEM(unsigned char, room);
    int64_t down = (g.n + HOW::M - 1) / HOW::M, across = (g.k + HOW::N - 1) / HOW::N;
    int64_t group = blockIdx.x / (down * across), inside = blockIdx.x % (down * across);
    int64_t row = inside % down * HOW::M, col = inside / down * HOW::N;
    int64_t first = g.offsets[group], rows = g.offsets[group + 1] - first;
    if (rows == 0) /* the whole block */
        return;
    tile_job<typename HOW::A, typename HOW::B, float> j;
    j.a = (const typename HOW::A *)g.y + first * g.n + row;
    j.b = (const typename HOW::B *)g.x + first * g.k + col;
    j.c = (float *)g.w + (group * g.n + row) * g.k + col;
    j.lda = g.n;
    j.ldb = g.k;
    j.ldc = g.k;
    j.r = rows;
    j.m = least(g.n - row, HOW::M);
    j.n = least(g.k - col, HOW::N);
    HOW::template tile<true, true, true, VEC>(j, room);
}

template <typename HOW>
int launch(void (*kernel)(grouped), int64_t grid, cq_stream *s, const grouped &g) {
    if (grid > 0x7fffffff)
        return cq_fail(CQ_ESHAPE, "matmul_grouped: %lld tiles in one call", (long long)grid);
    CQ_TRY(cq_cuda_shared_bytes((const void *)kernel, HOW::BYTES, "matmul_grouped"));
    CQ_LAUNCH(kernel, (unsigned)grid, THREADS, HOW::BYTES, s, g);
    CQ_CUDA_END("matmul_grouped");
}

template <typename HOW, bool VEC>
int run_rows(cq_stream *s, const cq_matmul_grouped_args *a, const grouped &g) {
    return a->mode == CQ_GROUPED_FORWARD
               ? launch<HOW>(grouped_rows<HOW, false, VEC>, PERSISTENT, s, g)
               : launch<HOW>(grouped_rows<HOW, true, VEC>, PERSISTENT, s, g);
}
template <typename HOW, bool VEC>
int run_weight(cq_stream *s, const cq_matmul_grouped_args *a, const grouped &g) {
    int64_t tiles = ((a->n + HOW::M - 1) / HOW::M) * ((a->k + HOW::N - 1) / HOW::N);
    return launch<HOW>(grouped_weight<HOW, VEC>, a->groups * tiles, s, g);
}
template <typename HOW, bool VEC>
int run(cq_stream *s, const cq_matmul_grouped_args *a, const grouped &g) {
    return a->mode == CQ_GROUPED_WEIGHT ? run_weight<HOW, VEC>(s, a, g)
                                        : run_rows<HOW, VEC>(s, a, g);
}

bool on_chunks(const cq_matmul_grouped_args *a, int64_t values, const void *x, int64_t bytes) {
    return a->n % values == 0 && a->k % values == 0 && ((uintptr_t)x & (uintptr_t)(bytes - 1)) == 0;
}
/// Whether products can read w16; a kernel that does, copies it.
bool has_w16(const cq_matmul_grouped_args *a) {
    return a->w16 && a->mode != CQ_GROUPED_WEIGHT && on_chunks(a, 8, a->w16, 16);
}

/// Rows in F32.
int run_wide(cq_stream *s, const cq_matmul_grouped_args *a, const grouped &g) {
    typedef tensor<float, float, float, false, false> rounded;
    typedef tensor<float, __nv_bfloat16, float, false, true> copied;
    bool whole =
        on_chunks(a, 4, a->x, 16) && on_chunks(a, 4, a->y, 16) && on_chunks(a, 4, a->w, 16);
    if (s->compute != CQ_COMPUTE_BF16)
        return whole ? run<simt, true>(s, a, g) : run<simt, false>(s, a, g);
    if (!whole)
        return run<rounded, false>(s, a, g);
    return has_w16(a) ? run_rows<copied, true>(s, a, g) : run<rounded, true>(s, a, g);
}
/// Rows in BF16.
int run_narrow(cq_stream *s, const cq_matmul_grouped_args *a, const grouped &g) {
    typedef __nv_bfloat16 T;
    bool chunks = on_chunks(a, 8, a->x, 16) && on_chunks(a, 8, a->y, 16);
    bool whole = on_chunks(a, 4, a->x, 8) && on_chunks(a, 4, a->y, 8) && on_chunks(a, 4, a->w, 16);
    if (a->mode == CQ_GROUPED_WEIGHT)
        return chunks ? run_weight<tensor<T, T, float, true, true>, true>(s, a, g)
                      : run_weight<tensor<T, T, float, false, false>, false>(s, a, g);
    if (chunks && has_w16(a))
        return run_rows<tensor<T, T, T, true, true>, true>(s, a, g);
    return whole ? run_rows<tensor<T, float, T, false, false>, true>(s, a, g)
                 : run_rows<tensor<T, float, T, false, false>, false>(s, a, g);
}

} // namespace

extern "C" int cq_cuda_matmul_grouped(cq_stream *s, const cq_matmul_grouped_args *a) {
    CQ_CUDA_F32("matmul_grouped", a);
    int64_t width = a->mode == CQ_GROUPED_FORWARD ? a->n
                    : a->mode == CQ_GROUPED_INPUT ? a->k
                                                  : a->n * a->k;
    if (a->groups == 0 || width == 0)
        return CQ_OK;
    if (a->x_bf16 != a->y_bf16 || (a->x_bf16 && s->compute != CQ_COMPUTE_BF16))
        return cq_fail(CQ_EUSAGE,
                       "cuda: matmul_grouped: rows in BF16 want BF16 products, and x and "
                       "y both to be");
    grouped g = {a->offsets, a->groups, a->n, a->k,
                 a->x,       a->w,      a->y, (const __nv_bfloat16 *)a->w16};
    return a->x_bf16 ? run_narrow(s, a, g) : run_wide(s, a, g);
}
