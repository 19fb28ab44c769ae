/// scales.c - NVFP4 of whole matrices: bytes and block scales out, values back, static maxima
/// searched.
///
///     bytes[r, j] = code(2j) + 16 code(2j + 1)      scale[r, b] = E4M3 of block b, row major,
///     never swizzled
///
/// Policy: a block has exactly one arithmetic, the one of kernels/nvfp4.h, and what cannot be
/// encoded faithfully (NaN, Inf, a subnormal tensor scale) is refused rather than written.
#include "core/quant/scales.h"
#include "core/base/error.h"
#include "kernels/nvfp4.h"
#include <float.h>
#include <string.h>

enum { BLOCK = 16, N_SWEEP = 126, TILE = 32 /* blocks whose scales are computed together */ };

static int check_matrix(const char *verb, int64_t rows, int64_t cols) {
    if (rows < 0 || cols < 0 || cols % BLOCK)
        return cq_fail(CQ_ESHAPE, "nvfp4 %s: matrix is [%ld, %ld], wanted columns in blocks of 16",
                       verb, (long)rows, (long)cols);
    return CQ_OK;
}

static int check_amax(const char *verb, float amax, float range) {
    if (!isfinite(amax) || amax < 0)
        return cq_fail(CQ_ENUMERIC, "nvfp4 %s: tensor maximum is %g, wanted a finite one >= 0",
                       verb, (double)amax);
    if (amax > 0 && cq_nvfp4_tensor_scale(amax, range) < FLT_MIN)
        return cq_fail(CQ_ENUMERIC,
                       "nvfp4 %s: tensor maximum %g gives a subnormal scale, wanted at least %g",
                       verb, (double)amax, (double)(FLT_MIN * 6.0f * range));
    return CQ_OK;
}

int cq_nvfp4_scale_2(float *scale_2, float amax, float range) {
    CQ_TRY(check_amax("pack", amax, range));
    *scale_2 = amax > 0 ? cq_nvfp4_tensor_scale(amax, range) : 1.0f;
    return CQ_OK;
}

/* Index of the first value that is not finite, or -1. */
static int64_t find_bad(const float *x, int64_t n) {
    int64_t bad = n;
#pragma omp parallel for reduction(min : bad)
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i]) && i < bad)
            bad = i;
    return bad < n ? bad : -1;
}

static int check_finite(const char *what, const float *x, int64_t rows, int64_t cols) {
    int64_t i = find_bad(x, rows * cols);
    if (i < 0)
        return CQ_OK;
    return cq_fail(CQ_ENUMERIC, "nvfp4 %s: [%ld, %ld] is %g, wanted a finite number", what,
                   (long)(i / cols), (long)(i % cols), (double)x[i]);
}

static bool all_zero(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (x[i] != 0.0f)
            return false;
    return true;
}

/* The codes of one block, as cq_nvfp4_block_encode gives them: a magnitude's code is the number of
 * midpoints that it has passed, ties to the even code. */
static void encode(uint8_t bytes[8], const float x[BLOCK], float den) {
    int32_t c[BLOCK];
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) {
        float v = x[i] / den, a = fabsf(v);
        c[i] = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) +
               (a > 5.0f) + 8 * (v < 0.0f);
    }
    for (int j = 0; j < 8; j++)
        bytes[j] = (uint8_t)(c[2 * j] | c[2 * j + 1] << 4);
}

/* Largest magnitudes of n blocks; they order like their bits. */
static void maxima(float *b, const float *x, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        int32_t bits[BLOCK], top = 0;
        memcpy(bits, x + BLOCK * k, sizeof bits);
#pragma omp simd reduction(max : top)
        for (int i = 0; i < BLOCK; i++)
            top = (bits[i] & 0x7fffffff) > top ? (bits[i] & 0x7fffffff) : top;
        memcpy(&b[k], &top, sizeof top);
    }
}

void cq_nvfp4_pack_part(uint8_t *bytes, uint8_t *scales, const float *x, int64_t n, float amax,
                        const float *block_amax, float top) {
    float ws2 = cq_nvfp4_tensor_scale(amax, block_amax ? top : 448.0f), b[TILE];
    int saturated;
    if (!(amax > 0)) { /* 0 / 0 of the reference would write NaN scales */
        memset(bytes, 0, (size_t)n / 2);
        memset(scales, 0x38, (size_t)n / BLOCK);
        return;
    }
    for (int64_t at = 0; at < n / BLOCK; at += TILE) {
        int64_t m = n / BLOCK - at < TILE ? n / BLOCK - at : TILE;
        if (!block_amax)
            maxima(b, x + BLOCK * at, m);
        for (int64_t k = 0; k < m; k++) {
            scales[at + k] = block_amax ? cq_nvfp4_scale_static(block_amax[at + k], amax, top)
                                        : cq_nvfp4_scale_dynamic(b[k], ws2, &saturated);
            encode(bytes + 8 * (at + k), x + BLOCK * (at + k),
                   cq_e4m3_decode(scales[at + k]) * ws2);
        }
    }
}

int cq_nvfp4_pack(uint8_t *bytes, uint8_t *scales, float *scale_2, const float *x, int64_t rows,
                  int64_t cols, float amax, const float *block_amax, float top) {
    enum { PART = 1 << 14 };
    CQ_TRY(check_matrix("pack", rows, cols));
    CQ_TRY(cq_nvfp4_scale_2(scale_2, amax, block_amax ? top : 448.0f));
    CQ_TRY(check_finite("pack", x, rows, cols));
    if (block_amax)
        CQ_TRY(check_finite("block maxima", block_amax, rows, cols / BLOCK));
    /* what fake quantization makes of a zero tensor, whatever the maximum that it shares */
    int64_t n = rows * cols;
    float most = all_zero(x, n) ? 0.0f : amax;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += PART)
        cq_nvfp4_pack_part(bytes + i / 2, scales + i / BLOCK, x + i, n - i < PART ? n - i : PART,
                           most, block_amax ? block_amax + i / BLOCK : NULL, top);
    return CQ_OK;
}

int cq_nvfp4_unpack(float *y, const uint8_t *bytes, const uint8_t *scales, float scale_2,
                    int64_t rows, int64_t cols) {
    if (rows < 0 || cols < 0 || cols % BLOCK)
        return cq_fail(CQ_ESHAPE,
                       "nvfp4 unpack: matrix is [%ld, %ld], wanted columns in blocks of 16",
                       (long)rows, (long)cols);
#pragma omp parallel for
    for (int64_t i = 0; i < rows * cols / BLOCK; i++)
        cq_nvfp4_block_decode(y + BLOCK * i, bytes + 8 * i, scales[i], scale_2);
    return CQ_OK;
}

/* The scale that a candidate maximum b stands for, rounded as the calibrators' fake quantization
 * does it (nvfp4.md 3.1, "Triton fake quant, static"); its last bit may differ from the exported
 * scale. */
static float candidate_scale(float b, float f, float inverse) {
    float p = b / 6.0f * f;
    return cq_e4m3_decode(cq_e4m3_encode(p > 448.0f ? 448.0f : p)) * inverse;
}

static double block_error(const float x[BLOCK], float scale) {
    double e = 0;
    for (int i = 0; i < BLOCK; i++) {
        float a = fabsf(x[i]);
        float q = scale > 0 ? cq_e2m1_decode(cq_e2m1_code(a / scale)) * scale : 0.0f;
        double d = (double)(q - a);
        e += d * d;
    }
    return e;
}

/* Candidates in order; the first one with the smallest error wins. */
static float best_amax(const float x[BLOCK], const float *amax, const float *scale, int n) {
    double least = INFINITY;
    int best = 0;
    for (int i = 0; i < n; i++) {
        double e = block_error(x, scale[i]);
        if (e < least) {
            least = e;
            best = i;
        }
    }
    return amax[best];
}

void cq_nvfp4_search_part(float *block_amax, const float *x, int64_t n, float amax,
                          cq_scale_method method) {
    float top = method == CQ_SCALE_FOUR_OVER_SIX ? 256.0f : 448.0f;
    if (method == CQ_SCALE_MAX || !(amax > 0)) {
        maxima(block_amax, x, n / BLOCK);
        return;
    }
    float f = 448.0f / (amax * (448.0f / top) / 6.0f), inverse = 1.0f / f;
    float sweep[N_SWEEP], scale[N_SWEEP];
    for (int i = 0; i < N_SWEEP; i++) {
        sweep[i] = amax * (cq_e4m3_decode((uint8_t)(i + 1)) / 448.0f);
        scale[i] = candidate_scale(sweep[i], f, inverse);
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const float *block = x + BLOCK * i;
        float b = cq_nvfp4_block_amax(block), pair[2] = {b, 1.5f * b};
        float pair_scale[2] = {candidate_scale(pair[0], f, inverse),
                               candidate_scale(pair[1], f, inverse)};
        block_amax[i] = method == CQ_SCALE_MSE ? best_amax(block, sweep, scale, N_SWEEP)
                                               : best_amax(block, pair, pair_scale, 2);
    }
}

int cq_nvfp4_search(float *block_amax, const float *x, int64_t rows, int64_t cols, float amax,
                    cq_scale_method method) {
    enum { PART = 1 << 14 };
    CQ_TRY(check_matrix("search", rows, cols));
    CQ_TRY(check_amax("search", amax, method == CQ_SCALE_FOUR_OVER_SIX ? 256.0f : 448.0f));
    CQ_TRY(check_finite("search", x, rows, cols));
    int64_t n = rows * cols;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += PART)
        cq_nvfp4_search_part(block_amax + i / BLOCK, x + i, n - i < PART ? n - i : PART, amax,
                             method);
    return CQ_OK;
}
