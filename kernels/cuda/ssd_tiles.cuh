/// ssd_tiles.cuh - products of 64 x 64 tiles by a block of 128 threads, for ssd.cu.
///
/// Operands go through shared memory in FP32, or through tensor cores as two BF16 parts each where
/// the stream computes in BF16. (Rounded to one BF16, they double the error of the gradient of
/// A_log: a small sum of large terms.)
#pragma once
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/float4.cuh"

namespace {

constexpr int CHUNK = 64, THREADS = 128, PER_THREAD = CHUNK * CHUNK / THREADS;

// ---- operands -----------------------------------------------------------------------------------

/// EXACT operands hold nothing but BF16 values, and `raw` gives four of them as they are.

/// n rows of `cols` values, ld apart; zeros around them.
template <typename T> struct rows {
    static constexpr bool EXACT = sizeof(T) == sizeof(__nv_bfloat16);
    const T *p;
    int64_t ld;
    int n, cols;
    bool vec;
    __device__ __forceinline__ float4 at(int r, int c) const {
        if (r >= n || c >= cols)
            return cq_zero4();
        const T *from = p + r * ld + c;
        if (vec)
            return cq_load4(from, true);
        return make_float4(cq_value(from[0]), c + 1 < cols ? cq_value(from[1]) : 0.0f,
                           c + 2 < cols ? cq_value(from[2]) : 0.0f,
                           c + 3 < cols ? cq_value(from[3]) : 0.0f);
    }
    __device__ __forceinline__ uint2 raw(int r, int c) const {
        if (r >= n || c >= cols)
            return make_uint2(0u, 0u);
        const T *from = p + r * ld + c;
        if (vec)
            return *(const uint2 *)from;
        T zero = T(0.0f);
        return make_uint2(
            cq_bf16_pair(from[0], c + 1 < cols ? from[1] : zero),
            cq_bf16_pair(c + 2 < cols ? from[2] : zero, c + 3 < cols ? from[3] : zero));
    }
};
/// The same, row r times weight[r].
template <typename T> struct weighted {
    static constexpr bool EXACT = false;
    rows<T> of;
    const float *weight;
    __device__ __forceinline__ float4 at(int r, int c) const {
        return r < of.n ? cq_scale4(of.at(r, c), weight[r]) : cq_zero4();
    }
};
/// A 64 x 64 tile in shared memory.
struct tile {
    static constexpr bool EXACT = false;
    const float *p;
    __device__ __forceinline__ float4 at(int r, int c) const {
        return *(const float4 *)(p + r * CHUNK + c);
    }
};

// ---- engines ------------------------------------------------------------------------------------

/// acc += A B for a 64 x 64 result, all threads. A(m, k) is fa.at(m, k..k+3) when A_ALONG_K, else
/// fa.at(k, m..m+3); B(k, n) is fb.at(n, k..) or fb.at(k, n..). Operands read as zero beyond their
/// sizes. `room` is shared memory that is no longer in use when the product returns to all threads.
/// A thread's value (q, u, j) is row row(q), column column(u) + j; `sharer` numbers the threads of
/// one row.

/// FP32: a thread has 8 rows and 4 columns. Values of one k lie side by side, in quarters that are
/// exchanged by k / 4 so that both ways of filling hit all banks.
struct engine_f32 {
    static constexpr int ROWS = 8, RUNS = 1, RUN = 4, SHARERS = 16;
    static constexpr int SLICE = 32, ROOM = 2 * SLICE * CHUNK;
    static __device__ __forceinline__ int index(int q, int u, int j) { return q * 4 + u * 4 + j; }
    static __device__ __forceinline__ int row(int q) { return (int)(threadIdx.x / 16) * 8 + q; }
    static __device__ __forceinline__ int column(int) { return (int)(threadIdx.x % 16) * 4; }
    static __device__ __forceinline__ int sharer() { return (int)(threadIdx.x % 16); }

    template <bool ALONG_K, typename F>
    static __device__ __forceinline__ void fetch(float4 (&v)[4], const F &f, int k0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = (int)threadIdx.x + THREADS * i;
            v[i] = ALONG_K ? f.at(at >> 3, k0 + 4 * (at & 7)) : f.at(k0 + (at >> 4), 4 * (at & 15));
        }
    }
    template <bool ALONG_K>
    static __device__ __forceinline__ void put(float *to, const float4 (&v)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = (int)threadIdx.x + THREADS * i;
            if (ALONG_K) {
                int k4 = at & 7, m = at >> 3;
                float *p = to + 4 * k4 * CHUNK + 4 * ((m >> 2) ^ k4) + (m & 3);
                p[0] = v[i].x, p[CHUNK] = v[i].y, p[2 * CHUNK] = v[i].z, p[3 * CHUNK] = v[i].w;
            } else {
                int k = at >> 4, m4 = at & 15;
                *(float4 *)(to + k * CHUNK + 4 * (m4 ^ (k >> 2))) = v[i];
            }
        }
    }
    template <bool A_ALONG_K, bool B_ALONG_K, typename A, typename B>
    static __device__ __forceinline__ void product(float *room, float (&acc)[PER_THREAD],
                                                   const A &fa, const B &fb, int depth) {
        float *as = room, *bs = room + SLICE * CHUNK;
        int down = (int)(threadIdx.x / 16), across = (int)(threadIdx.x % 16);
        for (int k0 = 0; k0 < depth; k0 += SLICE) {
            float4 va[4], vb[4];
            fetch<A_ALONG_K>(va, fa, k0);
            fetch<B_ALONG_K>(vb, fb, k0);
            __syncthreads();
            put<A_ALONG_K>(as, va);
            put<B_ALONG_K>(bs, vb);
            __syncthreads();
#pragma unroll
            for (int k4 = 0; k4 < SLICE / 4; k4++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *ak = as + (4 * k4 + i) * CHUNK, *bk = bs + (4 * k4 + i) * CHUNK;
                    float4 top = *(const float4 *)(ak + 4 * ((2 * down) ^ k4));
                    float4 bottom = *(const float4 *)(ak + 4 * ((2 * down + 1) ^ k4));
                    float4 b4 = *(const float4 *)(bk + 4 * (across ^ k4));
                    float a[8] = {top.x,    top.y,    top.z,    top.w,
                                  bottom.x, bottom.y, bottom.z, bottom.w};
                    float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
                    for (int q = 0; q < 8; q++)
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            acc[q * 4 + j] += a[q] * b[j];
                }
        }
    }
};

/// Tensor cores: a warp has 32 x 32 of the result. An operand is the sum of two BF16 values, three
/// products of which are added: about 16 bits are right. Of an EXACT operand the second value is
/// zero, and so are its products, which are left out. Operands lie as they are read, [m][k] or
/// [k][m], rows padded by 8 values.
struct engine_bf16 {
    static constexpr int ROWS = 4, RUNS = 4, RUN = 2, SHARERS = 8, SLICE = 32;
    static constexpr int LARGEST = CHUNK * (SLICE + 8) /* values of a part */;
    static constexpr int ROOM = 2 * LARGEST;
    static constexpr int FETCHES = CHUNK * SLICE / 4 / THREADS;
    static __device__ __forceinline__ int index(int q, int u, int j) {
        return (q >> 1) * 16 + u * 4 + (q & 1) * 2 + j;
    }
    static __device__ __forceinline__ int row(int q) {
        int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
        return (warp >> 1) * 32 + (q >> 1) * 16 + (lane >> 2) + 8 * (q & 1);
    }
    static __device__ __forceinline__ int column(int u) {
        int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
        return (warp & 1) * 32 + u * 8 + 2 * (lane & 3);
    }
    static __device__ __forceinline__ int sharer() {
        return (int)(threadIdx.x / 32 & 1) * 4 + (int)(threadIdx.x & 3);
    }

    struct piece {
        uint2 high, low;
    };
    static __device__ __forceinline__ piece pack(float4 v) {
        piece p;
        p.high = make_uint2(cq_bf16_pair(v.x, v.y), cq_bf16_pair(v.z, v.w));
        v.x -= __uint_as_float(p.high.x << 16);
        v.y -= __uint_as_float(p.high.x & 0xffff0000u);
        v.z -= __uint_as_float(p.high.y << 16);
        v.w -= __uint_as_float(p.high.y & 0xffff0000u);
        p.low = make_uint2(cq_bf16_pair(v.x, v.y), cq_bf16_pair(v.z, v.w));
        return p;
    }
    template <bool ALONG_K> static __device__ __forceinline__ int ld() {
        return (ALONG_K ? SLICE : CHUNK) + 8;
    }
    template <bool ALONG_K, typename F>
    static __device__ __forceinline__ void fetch(piece (&v)[FETCHES], const F &f, int k0) {
        const int quarters = (ALONG_K ? SLICE : CHUNK) / 4;
#pragma unroll
        for (int i = 0; i < FETCHES; i++) {
            int at = (int)threadIdx.x + THREADS * i, r = at / quarters, c = 4 * (at % quarters);
            if constexpr (F::EXACT)
                v[i].high = ALONG_K ? f.raw(r, k0 + c) : f.raw(k0 + r, c);
            else
                v[i] = pack(ALONG_K ? f.at(r, k0 + c) : f.at(k0 + r, c));
        }
    }
    template <bool ALONG_K, bool EXACT>
    static __device__ __forceinline__ void put(__nv_bfloat16 *to, const piece (&v)[FETCHES]) {
        const int quarters = (ALONG_K ? SLICE : CHUNK) / 4;
#pragma unroll
        for (int i = 0; i < FETCHES; i++) {
            int at = (int)threadIdx.x + THREADS * i, r = at / quarters, c = 4 * (at % quarters);
            __nv_bfloat16 *p = to + r * ld<ALONG_K>() + c;
            *(uint2 *)p = v[i].high;
            if (!EXACT)
                *(uint2 *)(p + LARGEST) = v[i].low;
        }
    }
    /// Two fragments of A, rows m0 on, or of B, columns n0 on, at k.
    template <bool ALONG_K>
    static __device__ __forceinline__ void load_a(unsigned (&a)[2][4], const __nv_bfloat16 *from,
                                                  int m0, int k) {
        int lane = (int)(threadIdx.x % 32);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (ALONG_K)
                cq_ldmatrix_x4(a[i], from + (m0 + 16 * i + (lane & 15)) * ld<true>() + k +
                                         8 * (lane >> 4));
            else
                cq_ldmatrix_x4_trans(a[i], from + (k + (lane & 7) + 8 * (lane >> 4)) * ld<false>() +
                                               m0 + 16 * i + 8 * ((lane >> 3) & 1));
    }
    template <bool ALONG_K>
    static __device__ __forceinline__ void load_b(unsigned (&b)[2][4], const __nv_bfloat16 *from,
                                                  int n0, int k) {
        int lane = (int)(threadIdx.x % 32);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (ALONG_K)
                cq_ldmatrix_x4(b[i], from +
                                         (n0 + 16 * i + (lane & 7) + 8 * (lane >> 4)) * ld<true>() +
                                         k + 8 * ((lane >> 3) & 1));
            else
                cq_ldmatrix_x4_trans(b[i], from + (k + (lane & 15)) * ld<false>() + n0 + 16 * i +
                                               8 * (lane >> 4));
    }
    static __device__ __forceinline__ void
    multiply(float (&acc)[PER_THREAD], const unsigned (&a)[2][4], const unsigned (&b)[2][4]) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int u = 0; u < 4; u++)
                cq_mma_bf16(&acc[i * 16 + u * 4], a[i], &b[u >> 1][2 * (u & 1)]);
    }
    template <bool A_ALONG_K, bool B_ALONG_K, typename A, typename B>
    static __device__ __forceinline__ void product(float *room, float (&acc)[PER_THREAD],
                                                   const A &fa, const B &fb, int depth) {
        __nv_bfloat16 *as = reinterpret_cast<__nv_bfloat16 *>(room), *bs = as + 2 * LARGEST;
        int warp = (int)(threadIdx.x / 32), m0 = (warp >> 1) * 32, n0 = (warp & 1) * 32;
        for (int k0 = 0; k0 < depth; k0 += SLICE) {
            piece va[FETCHES], vb[FETCHES];
            fetch<A_ALONG_K>(va, fa, k0);
            fetch<B_ALONG_K>(vb, fb, k0);
            __syncthreads();
            put<A_ALONG_K, A::EXACT>(as, va);
            put<B_ALONG_K, B::EXACT>(bs, vb);
            __syncthreads();
            int end = depth - k0 < SLICE ? depth - k0 : SLICE;
            for (int k = 0; k < end; k += 16) {
                unsigned a[2][4], b[2][4], low[2][4];
                load_a<A_ALONG_K>(a, as, m0, k);
                load_b<B_ALONG_K>(b, bs, n0, k);
                if (!A::EXACT) {
                    load_a<A_ALONG_K>(low, as + LARGEST, m0, k);
                    multiply(acc, low, b);
                }
                if (!B::EXACT) {
                    load_b<B_ALONG_K>(low, bs + LARGEST, n0, k);
                    multiply(acc, a, low);
                }
                multiply(acc, a, b);
            }
        }
    }
};

__device__ __forceinline__ void clear(float (&acc)[PER_THREAD]) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
        acc[i] = 0.0f;
}
__device__ __forceinline__ void store2(float *p, float x, float y) {
    *(float2 *)p = make_float2(x, y);
}
__device__ __forceinline__ void store2(__nv_bfloat16 *p, float x, float y) {
    *(unsigned *)p = cq_bf16_pair(x, y);
}
/// RUN neighbours of a row to p, those before column `cols`.
template <int RUN, typename T>
__device__ __forceinline__ void store_run(T *p, const float *v, int c, int cols, bool vec) {
    if (vec && RUN == 4 && c + 4 <= cols) {
        cq_store4(p + c, make_float4(v[0], v[1], v[RUN - 2], v[RUN - 1]), true);
    } else if (vec && RUN == 2 && c + 2 <= cols) {
        store2(p + c, v[0], v[1]);
    } else {
#pragma unroll
        for (int j = 0; j < RUN; j++)
            if (c + j < cols)
                cq_put(p + c + j, v[j]);
    }
}
/// The tile's first n rows and `cols` columns to p.
template <typename E, typename T>
__device__ __forceinline__ void store_tile(T *p, int64_t ld, const float (&acc)[PER_THREAD], int n,
                                           int cols, bool vec) {
#pragma unroll
    for (int q = 0; q < E::ROWS; q++)
        if (E::row(q) < n)
#pragma unroll
            for (int u = 0; u < E::RUNS; u++)
                store_run<E::RUN>(p + E::row(q) * ld, &acc[E::index(q, u, 0)], E::column(u), cols,
                                  vec);
}
/// to[r] += sum over columns of the tile times v, rows r < n; `room` is free before and after the
/// next barrier.
template <typename E, typename T>
__device__ __forceinline__ void dot_rows(float *room, float *to, const float (&acc)[PER_THREAD],
                                         const rows<T> &v) {
    __syncthreads();
#pragma unroll
    for (int q = 0; q < E::ROWS; q++) {
        float sum = 0.0f;
        const T *p = v.p + E::row(q) * v.ld;
        if (E::row(q) < v.n)
#pragma unroll
            for (int u = 0; u < E::RUNS; u++)
#pragma unroll
                for (int j = 0; j < E::RUN; j++)
                    if (E::column(u) + j < v.cols)
                        sum += acc[E::index(q, u, j)] * cq_value(p[E::column(u) + j]);
        room[E::row(q) * (E::SHARERS + 1) + E::sharer()] = sum;
    }
    __syncthreads();
    if (threadIdx.x < CHUNK) {
        float sum = 0.0f;
        for (int i = 0; i < E::SHARERS; i++)
            sum += room[threadIdx.x * (E::SHARERS + 1) + i];
        to[threadIdx.x] += sum;
    }
}

} // namespace
