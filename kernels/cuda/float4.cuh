/// float4.cuh - four neighbouring values of a row in one thread, and what norms and activations
/// compute of them.
#pragma once
#include "kernels/cuda/cq_cuda.h"

/// True when p is NULL or on a 16-byte boundary.
static inline bool cq_aligned16(const void *p) { return ((uintptr_t)p & 15u) == 0; }
__device__ __forceinline__ float4 cq_load4(const float *p, bool aligned) {
    return aligned ? *(const float4 *)p : make_float4(p[0], p[1], p[2], p[3]);
}
__device__ __forceinline__ void cq_store4(float *p, float4 v, bool aligned) {
    if (aligned)
        *(float4 *)p = v;
    else
        p[0] = v.x, p[1] = v.y, p[2] = v.z, p[3] = v.w;
}
/// The same of values stored as BF16, which widen exactly and are rounded to nearest even when
/// stored; aligned: on 8 bytes.
__device__ __forceinline__ float4 cq_load4(const __nv_bfloat16 *p, bool aligned) {
    if (aligned) {
        uint2 raw = *(const uint2 *)p;
        return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                           __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
    }
    return make_float4(__bfloat162float(p[0]), __bfloat162float(p[1]), __bfloat162float(p[2]),
                       __bfloat162float(p[3]));
}
__device__ __forceinline__ unsigned cq_bf16_pair(__nv_bfloat16 low, __nv_bfloat16 high) {
    return (unsigned)__bfloat16_as_ushort(low) | (unsigned)__bfloat16_as_ushort(high) << 16;
}
__device__ __forceinline__ void cq_store4(__nv_bfloat16 *p, float4 v, bool aligned) {
    __nv_bfloat16 x = __float2bfloat16(v.x), y = __float2bfloat16(v.y);
    __nv_bfloat16 z = __float2bfloat16(v.z), w = __float2bfloat16(v.w);
    if (aligned)
        *(uint2 *)p = make_uint2(cq_bf16_pair(x, y), cq_bf16_pair(z, w));
    else
        p[0] = x, p[1] = y, p[2] = z, p[3] = w;
}
/// True when p is NULL or four values of T can be moved there at once.
template <typename T> static inline bool cq_aligned4(const void *p) {
    return ((uintptr_t)p & (4 * sizeof(T) - 1)) == 0;
}
/// One activation, whatever it is stored as.
__device__ __forceinline__ float cq_value(float x) { return x; }
__device__ __forceinline__ float cq_value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void cq_put(float *p, float x) { *p = x; }
__device__ __forceinline__ void cq_put(__nv_bfloat16 *p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ float4 cq_zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
/// The values at an aligned p, or zeros.
__device__ __forceinline__ float4 cq_load4_if(bool there, const float *p) {
    return there ? *(const float4 *)p : cq_zero4();
}
__device__ __forceinline__ float4 cq_load4_if(bool there, const __nv_bfloat16 *p) {
    return there ? cq_load4(p, true) : cq_zero4();
}
__device__ __forceinline__ float cq_dot4(float4 a, float4 b) {
    return a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
}
__device__ __forceinline__ float4 cq_times4(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 cq_scale4(float4 a, float by) {
    return make_float4(a.x * by, a.y * by, a.z * by, a.w * by);
}
__device__ __forceinline__ float4 cq_plus4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float cq_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float4 cq_sigmoid4(float4 v) {
    return make_float4(cq_sigmoid(v.x), cq_sigmoid(v.y), cq_sigmoid(v.z), cq_sigmoid(v.w));
}

/// 1 / rms of n values from the sum of their squares.
__device__ __forceinline__ float cq_rstd(float sum, int64_t n, float eps) {
    return 1.0f / sqrtf(sum / (float)n + eps);
}
/// The gradient of x / rms(x) from g, with xhat = x by and m = mean(g xhat).
__device__ __forceinline__ float4 cq_norm_slope4(float4 g, float4 xhat, float m, float by) {
    return make_float4(by * (g.x - xhat.x * m), by * (g.y - xhat.y * m), by * (g.z - xhat.z * m),
                       by * (g.w - xhat.w * m));
}
