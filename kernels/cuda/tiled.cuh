/// tiled.cuh - what a product of NVFP4 matrices is given beside their codes (tiled.cu).
#pragma once
#include "kernels/cuda/cq_cuda.h"

/// Bytes of the block scales of `rows` rows of `cols` scales in the order of the tensor cores.
static inline int64_t cq_tiled_bytes(int64_t rows, int64_t cols) {
    return (rows + 127) / 128 * ((cols + 3) / 4) * 512;
}
/// Writes them.
extern "C" int cq_cuda_tile_scales(cq_stream *s, int64_t rows, int64_t cols, const uint8_t *scales,
                                   void *out);
/// out[0] = product of both tensor scales, out[1] = beta.
extern "C" int cq_cuda_nvfp4_factors(cq_stream *s, const cq_matmul_nvfp4_args *a, float *out);
