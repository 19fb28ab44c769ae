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

enum { BLOCK = 16, N_SWEEP = 126 };

static int check_matrix(const char *verb, int64_t rows, int64_t cols, float amax, float top) {
    if (rows < 0 || cols < 0 || cols % BLOCK)
        return cq_fail(CQ_ESHAPE, "nvfp4 %s: matrix is [%ld, %ld], wanted columns in blocks of 16",
                       verb, (long)rows, (long)cols);
    if (!isfinite(amax) || amax < 0)
        return cq_fail(CQ_ENUMERIC, "nvfp4 %s: tensor maximum is %g, wanted a finite one >= 0",
                       verb, (double)amax);
    if (amax > 0 && cq_nvfp4_tensor_scale(amax, top) < FLT_MIN)
        return cq_fail(CQ_ENUMERIC,
                       "nvfp4 %s: tensor maximum %g gives a subnormal scale, wanted at least %g",
                       verb, (double)amax, (double)(FLT_MIN * 6.0f * top));
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

int cq_nvfp4_pack(uint8_t *bytes, uint8_t *scales, float *scale_2, const float *x, int64_t rows,
                  int64_t cols, float amax, const float *block_amax, float top) {
    float range = block_amax ? top : 448.0f;
    CQ_TRY(check_matrix("pack", rows, cols, amax, range));
    CQ_TRY(check_finite("pack", x, rows, cols));
    int64_t n = rows * cols / BLOCK;
    if (block_amax)
        CQ_TRY(check_finite("block maxima", block_amax, rows, cols / BLOCK));
    *scale_2 = amax > 0 ? cq_nvfp4_tensor_scale(amax, range) : 1.0f;
    /* 0 / 0 of the reference would write NaN scales; with amax 0 fake quantization gives zeros too
     */
    if (amax == 0 || all_zero(x, rows * cols)) {
        memset(bytes, 0, (size_t)n * 8);
        memset(scales, 0x38, (size_t)n);
        return CQ_OK;
    }
    float ws2 = *scale_2;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        int saturated;
        const float *block = x + BLOCK * i;
        scales[i] = block_amax
                        ? cq_nvfp4_scale_static(block_amax[i], amax, top)
                        : cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(block), ws2, &saturated);
        cq_nvfp4_block_encode(bytes + 8 * i, block, scales[i], ws2);
    }
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

int cq_nvfp4_search(float *block_amax, const float *x, int64_t rows, int64_t cols, float amax,
                    cq_scale_method method) {
    float top = method == CQ_SCALE_FOUR_OVER_SIX ? 256.0f : 448.0f;
    CQ_TRY(check_matrix("search", rows, cols, amax, top));
    CQ_TRY(check_finite("search", x, rows, cols));
    int64_t n = rows * cols / BLOCK;
    if (method == CQ_SCALE_MAX || amax == 0) {
        for (int64_t i = 0; i < n; i++)
            block_amax[i] = cq_nvfp4_block_amax(x + BLOCK * i);
        return CQ_OK;
    }
    float f = 448.0f / (amax * (448.0f / top) / 6.0f), inverse = 1.0f / f;
    float sweep[N_SWEEP], scale[N_SWEEP];
    for (int i = 0; i < N_SWEEP; i++) {
        sweep[i] = amax * (cq_e4m3_decode((uint8_t)(i + 1)) / 448.0f);
        scale[i] = candidate_scale(sweep[i], f, inverse);
    }
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const float *block = x + BLOCK * i;
        float b = cq_nvfp4_block_amax(block), pair[2] = {b, 1.5f * b};
        float pair_scale[2] = {candidate_scale(pair[0], f, inverse),
                               candidate_scale(pair[1], f, inverse)};
        block_amax[i] = method == CQ_SCALE_MSE ? best_amax(block, sweep, scale, N_SWEEP)
                                               : best_amax(block, pair, pair_scale, 2);
    }
    return CQ_OK;
}
