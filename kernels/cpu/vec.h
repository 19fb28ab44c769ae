/// vec.h - functions of one float that a compiler turns into vector code, and reductions of rows.
///
///     exp(x) = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2 (Cody and Waite 1980, two-part ln 2)
///
/// No tables, no branches, no calls: a loop over any of them becomes vector code for every
/// instruction set. The error of vec_exp is below 1.5 ulp; results below the smallest normal number
/// are rounded into the subnormals, far below they are 0, above they are infinite, NaN stays NaN.
/// Reductions keep partial sums, in an order that depends on n and the instruction set alone.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))

VEC_INLINE float vec_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
VEC_INLINE uint32_t vec_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

/// The BF16 nearest to x, ties to even, in the high half of a float.
VEC_INLINE float vec_bf16(float x) {
    uint32_t u = vec_bits(x), r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    return vec_float((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : r);
}

/// a b + c, rounded once where the processor can.
VEC_INLINE float vec_fma(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

VEC_INLINE float vec_exp(float x) {
    /* adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits */
    float t = vec_fma(x, 1.442695041f, 12582912.0f);
    uint32_t n = vec_bits(t) - 0x4b400000u;
    float k = t - 12582912.0f;
    float r = vec_fma(k, -0.693359375f, x);
    r = vec_fma(k, 2.12194440e-4f, r);
    /* (e^r - 1 - r) / r^2 interpolated at Chebyshev nodes: relative error of e^r below 2^-26 */
    float p = 0.0013926176119927734f;
    p = vec_fma(p, r, 0.008363173074513711f);
    p = vec_fma(p, r, 0.04166655466205065f);
    p = vec_fma(p, r, 0.1666657702559799f);
    p = vec_fma(p, r, 0.5f);
    p = vec_fma(p, r * r, r) + 1.0f;
    /* 2^n in two factors, because 2^128 and 2^-149 are results but not normal numbers */
    uint32_t half = (uint32_t)((int32_t)n >> 1);
    float low = vec_float((half + 127u) << 23), high = vec_float((n - half + 127u) << 23);
    float y = p * low * high;
    y = x < -104.0f ? 0.0f : y; /* far outside the range n is nonsense */
    return x > 89.0f ? INFINITY : y;
}
VEC_INLINE float vec_sigmoid(float x) { return 1.0f / (1.0f + vec_exp(-x)); }
VEC_INLINE float vec_silu(float x) { return x * vec_sigmoid(x); }
/// d silu / dx, given sigmoid(x).
VEC_INLINE float vec_silu_slope(float x, float sigmoid) {
    return sigmoid * (1.0f + x * (1.0f - sigmoid));
}
/// log(1 + exp(x)) = max(x, 0) + 2 atanh(u / (2 + u)), u = exp(-|x|).
VEC_INLINE float vec_softplus(float x) {
    float u = vec_exp(x < 0.0f ? x : -x), q = u / (2.0f + u), s = q * q;
    float p = 0.11612164612011674f;
    p = vec_fma(p, s, 0.10853287900440187f);
    p = vec_fma(p, s, 0.14296178997151418f);
    p = vec_fma(p, s, 0.1999985316596486f);
    p = vec_fma(p, s, 0.3333333366026371f);
    p = vec_fma(p * s, q, q);
    return (x > 0.0f ? x : 0.0f) + 2.0f * p;
}

/// Sum over i < n of the expression `term`, which reads i; sets `result`. Two halves side by side
/// hide a part of the latency of the additions; more would cost short rows too much at the end.
#define VEC_SUM(result, n, term)                                                                   \
    do {                                                                                           \
        int64_t vec_n_ = (n), vec_half_ = vec_n_ / 16 * 8;                                         \
        float vec_a_ = 0.0f, vec_b_ = 0.0f;                                                        \
        VEC_SIMD(reduction(+ : vec_a_, vec_b_))                                                    \
        for (int64_t vec_i_ = 0; vec_i_ < vec_half_; vec_i_++) {                                   \
            int64_t i = vec_i_;                                                                    \
            vec_a_ += (term);                                                                      \
            i = vec_i_ + vec_half_;                                                                \
            vec_b_ += (term);                                                                      \
        }                                                                                          \
        vec_a_ += vec_b_;                                                                          \
        for (int64_t i = 2 * vec_half_; i < vec_n_; i++)                                           \
            vec_a_ += (term);                                                                      \
        (result) = vec_a_;                                                                         \
    } while (0)
#define VEC_PRAGMA_(text) _Pragma(#text)
#define VEC_SIMD(clause) VEC_PRAGMA_(omp simd clause)

VEC_INLINE float vec_sum(const float *x, int64_t n) {
    float sum;
    VEC_SUM(sum, n, x[i]);
    return sum;
}
VEC_INLINE float vec_dot(const float *x, const float *y, int64_t n) {
    float sum;
    VEC_SUM(sum, n, x[i] * y[i]);
    return sum;
}
enum { VEC_LANES = 32 };
/// Largest of `floor` and the expression `term`, which reads i < n; sets `result`. NaN never wins.
#define VEC_MAX(result, n, floor, term)                                                            \
    do {                                                                                           \
        float vec_lane_[VEC_LANES];                                                                \
        for (int vec_j_ = 0; vec_j_ < VEC_LANES; vec_j_++)                                         \
            vec_lane_[vec_j_] = (floor);                                                           \
        int64_t vec_n_ = (n), vec_whole_ = vec_n_ - vec_n_ % VEC_LANES;                            \
        for (int64_t vec_at_ = 0; vec_at_ < vec_whole_; vec_at_ += VEC_LANES)                      \
            for (int vec_j_ = 0; vec_j_ < VEC_LANES; vec_j_++) {                                   \
                int64_t i = vec_at_ + vec_j_;                                                      \
                float vec_term_ = (term);                                                          \
                vec_lane_[vec_j_] = vec_term_ > vec_lane_[vec_j_] ? vec_term_ : vec_lane_[vec_j_]; \
            }                                                                                      \
        for (int64_t i = vec_whole_; i < vec_n_; i++)                                              \
            vec_lane_[0] = (term) > vec_lane_[0] ? (term) : vec_lane_[0];                          \
        for (int vec_j_ = 1; vec_j_ < VEC_LANES; vec_j_++)                                         \
            vec_lane_[0] = vec_lane_[vec_j_] > vec_lane_[0] ? vec_lane_[vec_j_] : vec_lane_[0];    \
        (result) = vec_lane_[0];                                                                   \
    } while (0)

/// Largest element, `floor` when all are smaller.
VEC_INLINE float vec_max(const float *x, int64_t n, float floor) {
    float top;
    VEC_MAX(top, n, floor, x[i]);
    return top;
}
/// Largest magnitude.
VEC_INLINE float vec_amax(const float *x, int64_t n) {
    float top;
    VEC_MAX(top, n, 0.0f, fabsf(x[i]));
    return top;
}
