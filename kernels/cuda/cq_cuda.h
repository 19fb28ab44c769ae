/// cq_cuda.h - what a kernel file of this folder includes, and nothing else.
///
/// The same sources are compiled by nvcc for a GPU and by a host compiler for the tests, where
/// tests/cuda_on_cpu/ comes first on the include path and emulates blocks, threads, barriers, warp
/// operations and shared memory. That works because launches and shared memory go through these
/// macros:
///
///     CQ_LAUNCH(kernel, grid, block, dynamic_bytes, s, arguments...)   on the queue of stream s
///     CQ_SHARED(float, tile, [32][33]);                               static shared memory
///     CQ_DYN_SMEM(float, rows);                                       dynamic: float *rows
///
/// An operation is `extern "C" int cq_cuda_<op>(cq_stream *s, const cq_<op>_args *a)`; its buffers
/// lie in device memory, and so do the scalars it writes (`sum`, `out`, `saturated` ...). It
/// returns CQ_CUDA_END("op") after its last launch. Nothing here waits for the device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
extern "C" {
#include "core/base/error.h"
#include "kernels/kernels.h"
}
#include "kernels/cuda/batch.h"
#include "kernels/nvfp4.h"

enum { CQ_WARP = 32 };

#ifndef CQ_CUDA_ON_CPU
#define CQ_LAUNCH(kernel, grid, block, bytes, s, ...)                                              \
    kernel<<<(grid), (block), (bytes), (cudaStream_t)(s)->queue>>>(__VA_ARGS__)
#define CQ_SHARED(T, name, dims) __shared__ T name dims
#define CQ_DYN_SMEM(T, name)                                                                       \
    extern __shared__ __align__(16) unsigned char cq_dynamic_[];                                   \
    T *name = reinterpret_cast<T *>(cq_dynamic_)
#endif

/// Device memory that belongs to the stream, at least `bytes` of it, 256-byte aligned, until the
/// next call for the same stream; NULL with the error set. It grows when a larger piece is wanted.
extern "C" void *cq_cuda_scratch(cq_stream *s, int64_t bytes);
/// Asks for more than 48 KiB of dynamic shared memory for a kernel; CQ_OK or the error set.
extern "C" int cq_cuda_shared_bytes(const void *kernel, int64_t bytes, const char *op);
/// A matrix product whose a and b are BF16 already, accumulated in FP32 (matmul.cu). Rows on 16
/// bytes are fastest.
extern "C" int cq_cuda_matmul_bf16(cq_stream *s, const cq_matmul_args *a);
/// Products of one shape, a and b in F32, or in BF16 already (`bf16`), whatever the stream computes
/// in. Each has the bits that it has alone.
extern "C" int cq_cuda_matmul_batch(cq_stream *s, const cq_matmul_args *a, const cq_cuda_batch *b,
                                    bool bf16);
/// CQ_OK, or the pending error of a launch, named.
extern "C" int cq_cuda_status(const char *op);
#define CQ_CUDA_END(op) return cq_cuda_status(op)
/// For an operation that has no instance for this dtype.
#define CQ_CUDA_F32(op, a)                                                                         \
    do {                                                                                           \
        if ((a)->dtype != CQ_F32)                                                                  \
            return cq_fail(CQ_EUSAGE, "cuda: %s: dtype is %s, wanted F32", op,                     \
                           cq_dtype_name((a)->dtype));                                             \
    } while (0)

/// For one that has instances for activations of F32 and of BF16.
#define CQ_CUDA_ACT(op, a)                                                                         \
    do {                                                                                           \
        CQ_CUDA_F32(op, a);                                                                        \
        if ((a)->act != CQ_F32 && (a)->act != CQ_BF16)                                             \
            return cq_fail(CQ_EUSAGE, "cuda: %s: activations are %s, wanted F32 or BF16", op,      \
                           cq_dtype_name((a)->act));                                               \
    } while (0)

/// Number of blocks that cover n items, at least 1.
static inline unsigned cq_blocks(int64_t n, int64_t per_block) {
    int64_t blocks = (n + per_block - 1) / per_block;
    return (unsigned)(blocks > 1 ? blocks : 1);
}

/// Sum over a warp, the same in every lane; the order is fixed.
__device__ __forceinline__ float cq_warp_sum(float v) {
    for (int d = 16; d > 0; d >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
__device__ __forceinline__ double cq_warp_sum(double v) {
    for (int d = 16; d > 0; d >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
__device__ __forceinline__ float cq_warp_max(float v) {
    for (int d = 16; d > 0; d >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}
/// Sum over a block of whole warps, the same in every thread. `room` [32] is shared memory; call it
/// with all threads.
template <typename T> __device__ __forceinline__ T cq_block_sum(T v, T *room) {
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int warps = (int)(blockDim.x / CQ_WARP);
    v = cq_warp_sum(v);
    if (lane == 0)
        room[warp] = v;
    __syncthreads();
    T total = lane < warps ? room[lane] : T(0);
    total = cq_warp_sum(total);
    __syncthreads();
    return total;
}
