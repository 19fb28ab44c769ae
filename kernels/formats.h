/// formats.h - weights and AdamW moments in fewer bits: how they are stored.
///
///     master   split  BF16 high half (nearest, ties away from zero) and the low 16 bits: exact
///              bf16   BF16, rounded stochastically
///     moments  bf16   BF16, rounded stochastically
///              8bit   blocks of 256 consecutive elements share one FP32 scale, the largest
///                     magnitude of the block divided by the largest code's value;
///                     m: sign, 4 exponent bits, 3 of mantissa; v: 4 exponent bits, 4 of mantissa,
///                     of sqrt(v)
///
/// A code's value is (1 + f / 2^M) 2^(e - 15), with e = 0: (f / 2^M) 2^-14, for e in 0..15 and f in
/// 0..2^M - 1; the largest is 2 - 2^-M, the smallest above 0 is 2^-18 (m) or 2^-19
/// (v) of it. v
/// is stored as its root because the step divides by the root: a range of 2^38 in v, and 3 %
/// between neighbours in the step.
///
/// Stochastic rounding: 16 bits (of those dropped, the highest) meet as many random ones, so the
/// mean is the value, and changes below a half step are not lost, as they are to the nearest. The
/// random bits are a function of (key, element) alone; the key is made from seed, parameter and
/// step. The mixer is a 32-bit finalizer (two odd multipliers, found by search by C. Wellons) with
/// the key before and between.
///
/// This header is the only codec, on the host and in CUDA: every step is one FP32 or integer
/// operation.
#pragma once
#include "kernels/nvfp4.h"

enum { CQ_MOMENT_BLOCK = 256, CQ_MOMENT_M = 3, CQ_MOMENT_V = 4 };

CQ_HD uint32_t cq_float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
CQ_HD float cq_bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
CQ_HD float cq_bf16_value(uint16_t h) { return cq_bits_float((uint32_t)h << 16); }

/// 32 random bits of element i: the weight takes the high half, m the low half, v those of
/// cq_dither_v.
CQ_HD uint32_t cq_dither(uint64_t key, int64_t i) {
    uint32_t h = (uint32_t)i ^ (uint32_t)key;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) + (uint32_t)(key >> 32) + (uint32_t)((uint64_t)i >> 32) * 0x9e3779b9u;
    h = (h ^ (h >> 16)) * 0x846ca68bu;
    return h ^ (h >> 16);
}
CQ_HD uint32_t cq_dither_v(uint32_t dither) { return dither * 0x9e3779b1u >> 16; }

/// BF16 below or above x, above with the probability of its part of the way; r has 16 bits. NaN
/// stays NaN.
CQ_HD uint16_t cq_bf16_dithered(float x, uint32_t r) {
    uint32_t u = cq_float_bits(x), magnitude = u & 0x7fffffffu;
    uint32_t rounded = u + (magnitude < 0x7f800000u ? r : 0u);
    return (uint16_t)(rounded >> 16 | (magnitude > 0x7f800000u ? 0x40u : 0u));
}

CQ_HD uint16_t cq_split_high(float x) { return (uint16_t)((cq_float_bits(x) + 0x8000u) >> 16); }
CQ_HD uint16_t cq_split_low(float x) { return (uint16_t)cq_float_bits(x); }
CQ_HD float cq_split_join(uint16_t high, uint16_t low) {
    uint32_t upper = ((uint32_t)high - ((uint32_t)low >> 15)) & 0xffffu;
    return cq_bits_float(upper << 16 | low);
}

/// Value of a magnitude code with `bits` of mantissa.
CQ_HD float cq_mini_decode(uint32_t code, int bits) {
    float normal = cq_bits_float((code << (23 - bits)) + (112u << 23));
    float small = (float)(int32_t)code * cq_bits_float((uint32_t)(113 - bits) << 23);
    return code >> bits ? normal : small;
}
/// Code of x in [0, 2), rounded stochastically; what is larger gets the largest code.
CQ_HD uint32_t cq_mini_encode(float x, int bits, uint32_t r) {
    uint32_t u = cq_float_bits(x), top = (16u << bits) - 1u;
    uint32_t normal = ((u + (r << (7 - bits))) >> (23 - bits)) - (112u << bits);
    float small = u < 113u << 23 ? x * cq_bits_float((uint32_t)(157 + bits) << 23) : 0.0f;
    uint32_t code = u < 113u << 23 ? ((uint32_t)(int32_t)small + r) >> 16 : normal;
    return code < top ? code : top;
}
/// Scale of a block from the bits of its largest magnitude: 0 for a block of zeros, NaN where one
/// is NaN.
CQ_HD float cq_moment_scale(uint32_t largest, int bits) {
    return cq_bits_float(largest) / (2.0f - cq_bits_float((uint32_t)(127 - bits) << 23));
}
/// m, and sqrt(v), under the scale of their block.
CQ_HD uint8_t cq_moment_m_encode(float m, float scale, uint32_t r) {
    float x = scale > 0.0f ? fabsf(m) / scale : 0.0f;
    return (uint8_t)((cq_float_bits(m) >> 31 << 7) | cq_mini_encode(x, CQ_MOMENT_M, r));
}
CQ_HD float cq_moment_m_decode(uint8_t code, float scale) {
    float x = cq_mini_decode(code & 0x7fu, CQ_MOMENT_M) * scale;
    return code & 0x80u ? -x : x;
}
CQ_HD uint8_t cq_moment_v_encode(float root, float scale, uint32_t r) {
    return (uint8_t)cq_mini_encode(scale > 0.0f ? root / scale : 0.0f, CQ_MOMENT_V, r);
}
CQ_HD float cq_moment_v_decode(uint8_t code, float scale) {
    float root = cq_mini_decode(code, CQ_MOMENT_V) * scale;
    return root * root;
}
