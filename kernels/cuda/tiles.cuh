/// tiles.cuh - small matrices in shared memory and their products, for kernels that are bound by
/// neither: THREADS threads of a block work together, four by four results each.
#pragma once
#include "kernels/cuda/float4.cuh"

/// A matrix in shared memory; an odd ld keeps columns on different banks.
struct cq_tile {
    float *p;
    int ld;
    __device__ __forceinline__ float &at(int i, int j) const { return p[i * ld + j]; }
};

/// n rows of `cols` values, ld apart, into a tile; scaled row by row where `by` is not NULL.
template <typename T>
__device__ __forceinline__ void cq_load_rows(const cq_tile &to, const T *from, int64_t ld, int n,
                                             int cols, const float *by) {
    for (int i = (int)threadIdx.x; i < n * cols; i += (int)blockDim.x) {
        int r = i / cols, c = i - r * cols;
        float v = cq_value(from[(int64_t)r * ld + c]);
        to.at(r, c) = by ? v * by[r] : v;
    }
}

/// store(i, j, sum over k < depth of left(i, k) right(j, k)) for i < m, j < n: 4 x 4 results a
/// thread.
template <typename Left, typename Right, typename Store>
__device__ __forceinline__ void cq_product(int m, int n, int depth, const Left &left,
                                           const Right &right, const Store &store) {
    int across = (n + 3) / 4, down = (m + 3) / 4;
    for (int job = (int)threadIdx.x; job < across * down; job += (int)blockDim.x) {
        int i0 = job / across, j0 = job - i0 * across; /* rows i0 + r down, columns j0 + c across */
        float sum[4][4];
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                sum[r][c] = 0.0f;
        for (int k = 0; k < depth; k++) {
            float l[4], q[4];
#pragma unroll
            for (int r = 0; r < 4; r++)
                l[r] = i0 + r * down < m ? left(i0 + r * down, k) : 0.0f;
#pragma unroll
            for (int c = 0; c < 4; c++)
                q[c] = j0 + c * across < n ? right(j0 + c * across, k) : 0.0f;
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    sum[r][c] += l[r] * q[c];
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (i0 + r * down < m && j0 + c * across < n)
                    store(i0 + r * down, j0 + c * across, sum[r][c]);
    }
}
