/// scales.h - NVFP4 of whole matrices: packing, unpacking and the search for static block maxima.
///
/// Arithmetic is kernels/nvfp4.h. Matrices are [rows, cols] FP32, cols a multiple of 16.
#pragma once
#include "core/base/types.h"

typedef enum cq_scale_method { CQ_SCALE_MAX, CQ_SCALE_MSE, CQ_SCALE_FOUR_OVER_SIX } cq_scale_method;

/// Packs a matrix: bytes [rows, cols / 2], scales [rows, cols / 16]; *scale_2 is the tensor scale.
/// block_amax NULL: dynamic (nvfp4.md 2.1); else static with `top` 448 or 256 (2.2). A zero matrix
/// gives codes 0, scales 0x38 and *scale_2 of `amax` (1.0 when amax is 0 too). CQ_ENUMERIC on NaN
/// or Inf, and when scale_2 is subnormal.
CQ_API int cq_nvfp4_pack(uint8_t *bytes, uint8_t *scales, float *scale_2, const float *x,
                         int64_t rows, int64_t cols, float amax, const float *block_amax,
                         float top);
/// y = decode(bytes) in FP32: code * (e4m3(scale) * scale_2).
CQ_API int cq_nvfp4_unpack(float *y, const uint8_t *bytes, const uint8_t *scales, float scale_2,
                           int64_t rows, int64_t cols);
/// Block maxima that minimize each block's squared error, first minimum wins (nvfp4.md 3.1, 3.4):
/// CQ_SCALE_MSE tries the 126 finite positive E4M3 values / 448 times amax; CQ_SCALE_FOUR_OVER_SIX
/// tries 1.0 and 1.5 times the block's maximum (top 256). block_amax [rows, cols / 16].
CQ_API int cq_nvfp4_search(float *block_amax, const float *x, int64_t rows, int64_t cols,
                           float amax, cq_scale_method method);
