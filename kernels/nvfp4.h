/// nvfp4.h - the NVFP4 codec: blocks of 16, E2M1 codes, E4M3 block scales, one FP32 scale per
/// tensor.
///
///     ws2 = amax / 2688        s8 = e4m3(clamp(B / (6 ws2), 2^-9, 448))        code = e2m1(x / (s8
///     ws2))
///
/// Bit-exact with ModelOpt's export (modelopt/torch/quantization/qtensor/nvfp4_tensor.py at
/// a2fbac7b): every step is one FP32 operation, division is true division. This header is the only
/// codec: calibration, fake quantization, export and import use it, on the host and in CUDA.
/// Compile without fast-math and without contraction.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __CUDACC__
#define CQ_HD __host__ __device__ static inline
#else
#define CQ_HD static inline
#endif

/// Magnitude code 0..7 of |v|: nearest of {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code; NaN
/// gives 7.
CQ_HD uint8_t cq_e2m1_code(float a) {
    return (uint8_t)(a <= 0.25f   ? 0
                     : a < 0.75f  ? 1
                     : a <= 1.25f ? 2
                     : a < 1.75f  ? 3
                     : a <= 2.5f  ? 4
                     : a < 3.5f   ? 5
                     : a <= 5.0f  ? 6
                                  : 7);
}
/// Code with the sign in bit 3, taken from v < 0 (so -0.0 gives 0).
CQ_HD uint8_t cq_e2m1_encode(float v) {
    return (uint8_t)((v < 0.0f ? 8 : 0) | cq_e2m1_code(fabsf(v)));
}
CQ_HD float cq_e2m1_decode(uint8_t code) {
    int c = code & 7;
    float v = c < 2 ? 0.5f * (float)c : (float)(2 + (c & 1)) * (float)(1 << (c >> 1)) * 0.25f;
    return (code & 8) ? -v : v;
}

/// E4M3FN of a non-negative float: round to nearest even, saturating at 448 (0x7E); NaN gives 0x7F.
CQ_HD uint8_t cq_e4m3_encode(float v) {
    uint32_t u;
    if (v != v)
        return 0x7f;
    if (v >= 448.0f)
        return 0x7e;
    if (v < 0.015625f) /* subnormal: a multiple of 2^-9; adding 2^14 rounds to that grid, ties to
                          even */
    {
        float r = v + 16384.0f;
        memcpy(&u, &r, 4);
        return (uint8_t)(u & 0x0f);
    }
    memcpy(&u, &v, 4);
    u += 0x7ffffu + ((u >> 20) & 1u);
    u = (u >> 20) - (120u << 3);
    return (uint8_t)(u > 0x7eu ? 0x7eu : u);
}
CQ_HD float cq_e4m3_decode(uint8_t b) {
    uint32_t e = (b >> 3) & 15u, m = b & 7u, u;
    float f;
    if (e == 15u && m == 7u)
        u = 0x7fc00000u;
    else if (e == 0u) {
        f = (float)m * 0.001953125f;
        return (b & 0x80) ? -f : f;
    } else
        u = ((e + 120u) << 23) | (m << 20);
    u |= (uint32_t)(b & 0x80) << 24;
    memcpy(&f, &u, 4);
    return f;
}

/// Largest |x| of a block of 16, compared as bit patterns, so that a NaN is the largest of all and
/// the block becomes NaN.
CQ_HD float cq_nvfp4_block_amax(const float x[16]) {
    uint32_t b = 0, u;
    float f;
    for (int i = 0; i < 16; i++) {
        memcpy(&u, &x[i], 4);
        u &= 0x7fffffffu;
        b = u > b ? u : b;
    }
    memcpy(&f, &b, 4);
    return f;
}
/// Tensor scale `weight_scale_2` of a frozen maximum; `top` is 448, or 256 for four-over-six.
CQ_HD float cq_nvfp4_tensor_scale(float amax, float top) { return amax / (6.0f * top); }

/// Block scale of the dynamic form (nvfp4.md 2.1 steps 2-5). *saturated becomes 1 when the clamp at
/// 448 acted.
CQ_HD uint8_t cq_nvfp4_scale_dynamic(float block_amax, float ws2, int *saturated) {
    float d = 6.0f * ws2;
    float p = block_amax / d;
    if (p == 0.0f)
        p = 1.0f;
    *saturated = p > 448.0f;
    p = p < 0.001953125f ? 0.001953125f : p > 448.0f ? 448.0f : p;
    return cq_e4m3_encode(p);
}
/// Block scale of the static form (nvfp4.md 2.2): block maximum b and tensor maximum g chosen by
/// calibration.
CQ_HD uint8_t cq_nvfp4_scale_static(float b, float g, float top) {
    float smax = g / 6.0f;
    float p = b / 6.0f;
    if (p == 0.0f)
        p = 1.0f;
    p = p * top;
    p = p / smax;
    p = p < 0.001953125f ? 0.001953125f : p > 448.0f ? 448.0f : p;
    return cq_e4m3_encode(p);
}
/// Codes of one block under its scale; bytes[j] holds element 2j in the low nibble, 2j + 1 in the
/// high one.
CQ_HD void cq_nvfp4_block_encode(uint8_t bytes[8], const float x[16], uint8_t s8, float ws2) {
    float den = cq_e4m3_decode(s8) * ws2;
    for (int j = 0; j < 8; j++)
        bytes[j] =
            (uint8_t)(cq_e2m1_encode(x[2 * j] / den) | (cq_e2m1_encode(x[2 * j + 1] / den) << 4));
}
CQ_HD void cq_nvfp4_block_decode(float y[16], const uint8_t bytes[8], uint8_t s8, float ws2) {
    float den = cq_e4m3_decode(s8) * ws2;
    for (int j = 0; j < 8; j++) {
        y[2 * j] = cq_e2m1_decode(bytes[j] & 15) * den;
        y[2 * j + 1] = cq_e2m1_decode(bytes[j] >> 4) * den;
    }
}
/// Fake quantization of one block: decode(encode(x)). With block_amax >= 0 the static form, else
/// the dynamic one. amax <= 0 (a zero tensor) gives zeros. Returns 1 when the block scale
/// saturated.
CQ_HD int cq_nvfp4_block_fake(float y[16], const float x[16], float amax, float block_amax,
                              float top) {
    int saturated = 0;
    if (!(amax > 0.0f)) {
        for (int i = 0; i < 16; i++)
            y[i] = 0.0f;
        return 0;
    }
    float ws2 = cq_nvfp4_tensor_scale(amax, block_amax >= 0.0f ? top : 448.0f);
    uint8_t s8 = block_amax >= 0.0f
                     ? cq_nvfp4_scale_static(block_amax, amax, top)
                     : cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(x), ws2, &saturated);
    float den = cq_e4m3_decode(s8) * ws2;
    for (int i = 0; i < 16; i++)
        y[i] = cq_e2m1_decode(cq_e2m1_encode(x[i] / den)) * den;
    return saturated;
}
