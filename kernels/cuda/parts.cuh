/// parts.cuh - the second step of a sum over many rows: each block of a kernel left its part in
/// scratch, here they are added in an order that depends on their number alone.
#pragma once
#include "kernels/cuda/cq_cuda.h"

enum { CQ_PART_COLUMNS = 8, CQ_PART_THREADS = 1024, CQ_PART_SLICES = 128, CQ_PART_AHEAD = 8 };

/// out[i] += sum over p of part[p][i], i < n. A block takes 8 columns (32 bytes of each part), a
/// thread every 128th part of one of them.
template <typename T>
__global__ void __launch_bounds__(CQ_PART_THREADS)
    cq_add_parts(int64_t n, int64_t parts, const T *part, T *out) {
    CQ_SHARED(T, sums, [CQ_PART_THREADS / CQ_WARP][CQ_PART_COLUMNS]);
    int column = (int)(threadIdx.x % CQ_PART_COLUMNS), warp = (int)(threadIdx.x / CQ_WARP);
    int64_t i = (int64_t)blockIdx.x * CQ_PART_COLUMNS + column,
            slice = threadIdx.x / CQ_PART_COLUMNS;
    T sum = T(0);
    for (int64_t first = slice; first < parts; first += CQ_PART_SLICES * CQ_PART_AHEAD) {
        T v[CQ_PART_AHEAD];
#pragma unroll
        for (int k = 0; k < CQ_PART_AHEAD; k++) {
            int64_t p = first + k * CQ_PART_SLICES;
            v[k] = i < n && p < parts ? part[p * n + i] : T(0);
        }
#pragma unroll
        for (int k = 0; k < CQ_PART_AHEAD; k++)
            sum += v[k];
    }
    /* four slices of a warp, then the 32 warps: four lanes each add eight of them */
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (threadIdx.x % CQ_WARP < CQ_PART_COLUMNS)
        sums[warp][column] = sum;
    __syncthreads();
    if (warp != 0)
        return;
    sum = T(0);
    for (int k = 0; k < CQ_PART_THREADS / CQ_WARP / 4; k++)
        sum += sums[slice * (CQ_PART_THREADS / CQ_WARP / 4) + k][column];
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (threadIdx.x < CQ_PART_COLUMNS && i < n)
        out[i] += sum;
}
template <typename T>
static inline void cq_add_parts_to(cq_stream *s, int64_t n, int64_t parts, const T *part, T *out) {
    CQ_LAUNCH(cq_add_parts<T>, cq_blocks(n, CQ_PART_COLUMNS), CQ_PART_THREADS, 0, s, n, parts, part,
              out);
}
