/// device.h - what an open CUDA device holds, behind cq_stream.device: the stream, the scratch of
/// operations, and what cuBLASLt needs.
///
/// device.cu makes and frees it; matmul.cu owns the fields from `lt` to `algos`. One thread at a
/// time uses a device.
#pragma once
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

typedef struct cq_cuda_device {
    int index;          ///< of cudaSetDevice
    cudaStream_t queue; ///< the same as cq_stream.queue
    void *lt;           ///< cublasLtHandle_t
    void *workspace;    ///< of cuBLASLt, device memory; calls on the queue share it
    size_t workspace_bytes;
    void *algos;        ///< the algorithm of each shape seen so far
    void *nvfp4_shapes; ///< of matmul_nvfp4.cu, malloc's
    void *scratch;
    int64_t scratch_bytes; ///< what cq_cuda_scratch has at hand
    int capability_major, capability_minor;
} cq_cuda_device;

/// Makes the cuBLASLt handle, its workspace and the table of algorithms of the device; its index
/// is set and current. On failure nothing stays open.
extern "C" int cq_cuda_matmul_open(cq_cuda_device *d);
/// Frees them; accepts what was never opened.
extern "C" void cq_cuda_matmul_close(cq_cuda_device *d);
