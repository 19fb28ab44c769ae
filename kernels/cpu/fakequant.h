/// fakequant.h - NVFP4 fake quantization of rows, as vector code; for the operations that quantize
/// what they write.
///
///     s8 = e4m3(clamp(B / (6 ws2), 2^-9, 448))    den = s8 ws2    y = e2m1(x / den) den
///
/// Bit-exact with kernels/nvfp4.h for every input without NaN; a NaN makes its whole block NaN, so
/// that it reaches the loss. Rounding to a float with fewer bits: adding M = 2^(E + k) and taking
/// it away again rounds to multiples of 2^(E + k - 23), ties to even, where E is the value's
/// exponent or the format's lowest one. No step is a product followed by a sum, so contraction
/// changes nothing.
///
/// Usage, in an operation with a `cq_fq fq` in its arguments:
///     CQ_TRY(fq_check("gather_rows", &a->fq, a->dim));
///     ... per thread: saturated += fq_rows(&a->fq, row, 1, a->dim, yq_row, y_row, NULL, 448.0f);
///     fq_count(&a->fq, saturated);
#pragma once
#include "core/base/error.h"
#include "kernels/cpu/vec.h"
#include "kernels/kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum {
    FQ_BLOCK = 16,
    FQ_TILE = 32 /* blocks whose scales are computed together */,
    FQ_AHEAD = 1024
};

/// CQ_ESHAPE unless rows of `cols` can be quantized.
static inline int fq_check(const char *name, const cq_fq *fq, int64_t cols) {
    if (!fq->amax || cols % FQ_BLOCK == 0)
        return CQ_OK;
    return cq_fail(CQ_ESHAPE, "%s: rows of %lld, wanted a multiple of 16", name, (long long)cols);
}

/// The group that row `row` belongs to: the last one that begins at or before it.
static inline int64_t fq_group(const int64_t *offsets, int64_t n_groups, int64_t row) {
    int64_t low = 0, high = offsets ? n_groups : 1;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (offsets[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/// Rows of `cols` that are written and then quantized together, while they are in the first-level
/// cache: one short row alone would wait for its own latencies.
static inline int64_t fq_batch(int64_t cols) { return cols < 4096 ? 4096 / cols : 1; }

/// Adds to the counter; integers, so the order of threads does not show.
static inline void fq_count(const cq_fq *fq, int64_t saturated) {
    if (fq->saturated && saturated)
        __atomic_fetch_add(fq->saturated, saturated, __ATOMIC_RELAXED);
}

/// n rounded up to whole vectors.
VEC_INLINE int64_t fq_whole(int64_t n) { return (n + 7) & ~(int64_t)7; }

/// p > 0 rounded to E4M3, p in [2^-9, 448].
VEC_INLINE float fq_e4m3(float p) {
    uint32_t e = vec_bits(p) & 0x7f800000u, lowest = 121u << 23;
    float m = vec_float((e > lowest ? e : lowest) + (20u << 23));
    return (p + m) - m;
}
/// v rounded to E2M1; the sign is that of v < 0, so -0 becomes 0 and what rounds to 0 keeps it.
VEC_INLINE float fq_e2m1(float v) {
    uint32_t sign = v < 0.0f ? 0x80000000u : 0u, lowest = 127u << 23;
    float a = fabsf(v);
    a = a < 6.0f ? a : 6.0f;
    uint32_t e = vec_bits(a) & 0x7f800000u;
    float m = vec_float((e > lowest ? e : lowest) + (22u << 23));
    return vec_float(vec_bits((a + m) - m) | sign);
}

#if defined(__AVX2__)
/// Largest bits of a magnitude in lanes i and i + 8 of a block.
VEC_INLINE __m256i fq_halves(const float *x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i a = _mm256_castps_si256(_mm256_loadu_ps(x));
    __m256i b = _mm256_castps_si256(_mm256_loadu_ps(x + 8));
    return _mm256_max_epi32(_mm256_and_si256(a, magnitude), _mm256_and_si256(b, magnitude));
}
/// Maxima of pairs of neighbours: those of a in the low half of each 128 bits, those of b in the
/// high half.
VEC_INLINE __m256i fq_pairs(__m256i a, __m256i b) {
    __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_max_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
}
/// Largest magnitudes of 8 blocks, of which those after `last` repeat it: a tree of maxima that
/// also turns rows into lanes.
VEC_INLINE void fq_eight_maxima(float *b, const float *x, int64_t last) {
    __m256i h[8];
    for (int64_t k = 0; k < 8; k++)
        h[k] = fq_halves(x + (k < last ? k : last) * FQ_BLOCK);
    __m256i low = fq_pairs(fq_pairs(h[0], h[1]), fq_pairs(h[2], h[3]));
    __m256i high = fq_pairs(fq_pairs(h[4], h[5]), fq_pairs(h[6], h[7]));
    __m256i top = _mm256_max_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                                   _mm256_permute2x128_si256(low, high, 0x31));
    _mm256_storeu_ps(b, _mm256_castsi256_ps(top));
}
#endif

/// Largest magnitudes of n blocks; b has room for whole vectors of 8, and what is over repeats the
/// last block. Magnitudes order like their bits.
VEC_INLINE void fq_block_maxima(float *b, const float *x, int64_t n) {
#if defined(__AVX2__)
    for (int64_t k = 0; k < n; k += 8)
        fq_eight_maxima(b + k, x + k * FQ_BLOCK, n - 1 - k);
#else
    for (int64_t k = 0; k < n; k++) {
        const float *v = x + k * FQ_BLOCK;
        int32_t top = 0;
        for (int i = 0; i < FQ_BLOCK; i++) {
            int32_t u = (int32_t)(vec_bits(v[i]) & 0x7fffffffu);
            top = u > top ? u : top;
        }
        b[k] = vec_float((uint32_t)top);
    }
    for (int64_t k = n; k < fq_whole(n); k++)
        b[k] = b[n - 1];
#endif
}

/// den of n blocks: the dynamic form from block maxima b (cq_nvfp4_scale_dynamic); returns the
/// saturated ones.
VEC_INLINE int64_t fq_dynamic(float *den, const float *b, int64_t n, float ws2) {
    float d = 6.0f * ws2;
    int32_t saturated = 0, end = (int32_t)n, whole = (int32_t)fq_whole(n);
    for (int32_t k = 0; k < whole; k++) {
        float p = b[k] / d;
        p = p == 0.0f ? 1.0f : p;
        saturated += (p > 448.0f) & (k < end);
        p = p < 0.001953125f ? 0.001953125f : p;
        p = p > 448.0f ? 448.0f : p;
        den[k] = fq_e4m3(p) * ws2;
    }
    return saturated;
}
/// The static form from chosen block maxima b (cq_nvfp4_scale_static).
VEC_INLINE void fq_static(float *den, const float *b, int64_t n, float amax, float top, float ws2) {
    float smax = amax / 6.0f;
    for (int64_t k = 0; k < n; k++) {
        float p = b[k] / 6.0f;
        p = p == 0.0f ? 1.0f : p;
        p = p * top;
        p = p / smax;
        p = p < 0.001953125f ? 0.001953125f : p;
        p = p > 448.0f ? 448.0f : p;
        den[k] = fq_e4m3(p) * ws2;
    }
}

/// n elements (whole blocks) under one tensor maximum; y may be x. Returns the saturated blocks.
static __attribute__((unused)) int64_t fq_span(float *y, const float *x, int64_t n, float amax,
                                               const float *block_amax, float top) {
    if (!(amax > 0.0f)) {
        memset(y, 0, (size_t)n * sizeof(float));
        return 0;
    }
    float ws2 = amax / (6.0f * (block_amax ? top : 448.0f)), b[FQ_TILE], den[FQ_TILE];
    int64_t saturated = 0, blocks = n / FQ_BLOCK;
    for (int64_t at = 0; at < blocks; at += FQ_TILE) {
        int64_t m = blocks - at < FQ_TILE ? blocks - at : FQ_TILE;
        const float *from = x + at * FQ_BLOCK;
        float *to = y + at * FQ_BLOCK;
        if (block_amax) {
            fq_static(den, block_amax + at, m, amax, top, ws2);
        } else {
            fq_block_maxima(b, from, m);
            saturated += fq_dynamic(den, b, m, ws2);
        }
        for (int64_t k = 0; k < m; k++) {
            float by = den[k];
            __builtin_prefetch(from + k * FQ_BLOCK + FQ_AHEAD);
#pragma omp simd
            for (int64_t i = k * FQ_BLOCK; i < (k + 1) * FQ_BLOCK; i++)
                to[i] = fq_e2m1(from[i] / by) * by;
        }
    }
    return saturated;
}

/// Rows row .. row + rows of the operation; x, y and block_amax (or NULL: the dynamic form) point
/// at row `row`; y may be x. Without maxima a copy. Returns the saturated blocks.
static __attribute__((unused)) int64_t fq_rows(const cq_fq *fq, int64_t row, int64_t rows,
                                               int64_t cols, float *y, const float *x,
                                               const float *block_amax, float top) {
    if (!fq->amax) {
        if (y != x)
            memcpy(y, x, (size_t)(rows * cols) * sizeof(float));
        return 0;
    }
    int64_t saturated = 0, end = row + rows, n_groups = fq->offsets ? fq->n_groups : 1;
    for (int64_t r = row; r < end;) {
        int64_t g = fq_group(fq->offsets, n_groups, r), stop = end, skip = (r - row) * cols;
        if (g + 1 < n_groups && fq->offsets[g + 1] < end)
            stop = fq->offsets[g + 1];
        saturated += fq_span(y + skip, x + skip, (stop - r) * cols, fq->amax[g],
                             block_amax ? block_amax + skip / FQ_BLOCK : NULL, top);
        r = stop;
    }
    return saturated;
}
