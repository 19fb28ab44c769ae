/// wide.cuh - several consecutive floats in one access, and the norms that the losses on hidden
/// states divide by.
#pragma once
#include "kernels/cuda/cq_cuda.h"

namespace {

/// W consecutive floats.
template <int W> struct __align__(4 * W) pack { float v[W]; };
template <int W> __device__ __forceinline__ pack<W> load(const float *x, int64_t i) {
    return reinterpret_cast<const pack<W> *>(x)[i];
}
template <int W> __device__ __forceinline__ void store(float *x, int64_t i, const pack<W> &p) {
    reinterpret_cast<pack<W> *>(x)[i] = p;
}

__device__ __forceinline__ bool is_norm(double squared) {
    return squared > 0.0 && isfinite(squared);
}

bool aligned(const void *p) { return (uintptr_t)p % 16 == 0; }

} // namespace
