/// ranked.cuh - keys whose order as integers is the order of logits in kernels/ref/ranked.h.
#pragma once
#include "kernels/cuda/cq_cuda.h"

namespace {

/// The float's bits, so that they order as numbers do; -0 is 0. NaNs lie at both ends.
__device__ __forceinline__ uint32_t bits_in_order(float x) {
    uint32_t b = __float_as_uint(x + 0.0f);
    return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float float_of_bits(uint32_t b) {
    return __uint_as_float(b ^ ((b >> 31) ? 0x80000000u : 0xffffffffu));
}
/// No two keys of a row are the same. The larger comes first in the order of kernels/ref/ranked.h.
__device__ __forceinline__ uint64_t key_of(float x, int id) {
    return (uint64_t)bits_in_order(x) << 32 | (uint64_t)(0xffffffffu - (uint32_t)id);
}

} // namespace
