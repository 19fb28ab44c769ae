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
/// The tensor scale of a maximum, amax / (6 range), 1.0 for amax 0; range is `top` for static
/// scales, else 448. CQ_ENUMERIC as cq_nvfp4_pack.
CQ_API int cq_nvfp4_scale_2(float *scale_2, float amax, float range);
/// A part of a matrix on the calling thread: n elements, whole blocks, of which nothing is checked.
/// amax is the tensor's maximum, 0 for a matrix that is all zero. bytes [n / 2], scales [n / 16].
CQ_API void cq_nvfp4_pack_part(uint8_t *bytes, uint8_t *scales, const float *x, int64_t n,
                               float amax, const float *block_amax, float top);
/// The same for cq_nvfp4_search: block_amax [n / 16].
CQ_API void cq_nvfp4_search_part(float *block_amax, const float *x, int64_t n, float amax,
                                 cq_scale_method method);
/// y = decode(bytes) in FP32: code * (e4m3(scale) * scale_2).
CQ_API int cq_nvfp4_unpack(float *y, const uint8_t *bytes, const uint8_t *scales, float scale_2,
                           int64_t rows, int64_t cols);
/// Block maxima that minimize each block's squared error, first minimum wins (nvfp4.md 3.1, 3.4):
/// CQ_SCALE_MSE tries the 126 finite positive E4M3 values / 448 times amax; CQ_SCALE_FOUR_OVER_SIX
/// tries 1.0 and 1.5 times the block's maximum (top 256). block_amax [rows, cols / 16].
CQ_API int cq_nvfp4_search(float *block_amax, const float *x, int64_t rows, int64_t cols,
                           float amax, cq_scale_method method);
