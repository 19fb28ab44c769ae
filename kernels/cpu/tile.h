/// tile.h - products of small matrices for code that already runs inside a thread (attention, SSD,
/// Gram).
///
///     C[m, n] (+)= sum_k A[i, k] B[k, j]        A by two strides, so A or A' alike; B and C by
///     rows
///
/// A block of 4 to 8 rows by a few vectors of columns stays in registers and k runs in ascending
/// order, in blocks of 256 so that B's panel stays in the first-level cache. The order of the sum
/// over k does not depend on m or n, so equal inputs give equal bits whatever tile they fall into.
/// oneDNN costs a microsecond or two per call, as much as a whole product of 64 x 32 x 64: these
/// blocks are too small for it.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { TILE_W = 16, TILE_ROWS = 8, TILE_VECS = 2 };
typedef float tile_vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef float tile_reg __attribute__((vector_size(64)));
#define TILE_FMA(a, b, c) (tile_reg) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#elif defined(__AVX2__)
enum { TILE_W = 8, TILE_ROWS = 6, TILE_VECS = 2 };
typedef float tile_vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float tile_reg __attribute__((vector_size(32)));
#define TILE_FMA(a, b, c) (tile_reg) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#else
enum { TILE_W = 4, TILE_ROWS = 4, TILE_VECS = 2 };
typedef float tile_vec __attribute__((vector_size(16), aligned(4), may_alias));
typedef float tile_reg __attribute__((vector_size(16)));
#define TILE_FMA(a, b, c) ((a) * (b) + (c))
#endif
enum { TILE_DEPTH = 256 };
#ifdef __clang__
#define TILE_UNROLL _Pragma("unroll")
#else
#define TILE_UNROLL _Pragma("GCC unroll 8")
#endif
#define TILE_INLINE static inline __attribute__((always_inline, unused))

/// The operands of one product; ar and ac are A's distances between rows and between columns.
typedef struct tile_args {
    int64_t m, n, k;
    const float *a;
    int64_t ar, ac;
    const float *b;
    int64_t ldb;
    float *c;
    int64_t ldc;
} tile_args;

/// n rounded up to whole vectors of any instruction set: the row length of padded buffers.
TILE_INLINE int64_t tile_pad(int64_t n) { return (n + 15) & ~(int64_t)15; }

TILE_INLINE tile_reg tile_load(const float *p, int64_t lanes) {
    if (lanes >= TILE_W)
        return *(const tile_vec *)p;
    tile_reg v = {0};
    for (int64_t i = 0; i < lanes; i++)
        v[i] = p[i];
    return v;
}
TILE_INLINE void tile_store(float *p, tile_reg v, int64_t lanes) {
    if (lanes >= TILE_W) {
        *(tile_vec *)p = v;
        return;
    }
    for (int64_t i = 0; i < lanes; i++)
        p[i] = v[i];
}

/// `rows` by `vecs` vectors of C at (i, j) over k0 <= k < k1; the last vector has `lanes` columns.
TILE_INLINE void tile_block(const int rows, const int vecs, int64_t lanes, const tile_args *t,
                            int64_t i, int64_t j, int64_t k0, int64_t k1, bool add) {
    const float *a = t->a + i * t->ar + k0 * t->ac, *b = t->b + k0 * t->ldb + j;
    float *c = t->c + i * t->ldc + j;
    int64_t ar = t->ar, ac = t->ac, ldb = t->ldb, ldc = t->ldc;
    tile_reg sum[TILE_ROWS][TILE_VECS];
    TILE_UNROLL
    for (int r = 0; r < rows; r++) {
        TILE_UNROLL
        for (int v = 0; v < vecs; v++)
            sum[r][v] = add ? tile_load(c + r * ldc + v * TILE_W, lanes) : (tile_reg){0};
    }
    for (int64_t k = k0; k < k1; k++, a += ac, b += ldb) {
        tile_reg row[TILE_VECS];
        TILE_UNROLL
        for (int v = 0; v < vecs; v++)
            row[v] = tile_load(b + v * TILE_W, lanes);
        TILE_UNROLL
        for (int r = 0; r < rows; r++) {
            tile_reg x = a[r * ar] - (tile_reg){0};
            TILE_UNROLL
            for (int v = 0; v < vecs; v++)
                sum[r][v] = TILE_FMA(x, row[v], sum[r][v]);
        }
    }
    TILE_UNROLL
    for (int r = 0; r < rows; r++) {
        TILE_UNROLL
        for (int v = 0; v < vecs; v++)
            tile_store(c + r * ldc + v * TILE_W, sum[r][v], lanes);
    }
}

/// All rows of C under `vecs` vectors of columns from j on.
TILE_INLINE void tile_columns(const int vecs, int64_t lanes, const tile_args *t, int64_t j,
                              int64_t k0, int64_t k1, bool add) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= t->m; i += TILE_ROWS)
        tile_block(TILE_ROWS, vecs, lanes, t, i, j, k0, k1, add);
    if (TILE_ROWS > 4 && i + 4 <= t->m) {
        tile_block(4, vecs, lanes, t, i, j, k0, k1, add);
        i += 4;
    }
    if (i + 2 <= t->m) {
        tile_block(2, vecs, lanes, t, i, j, k0, k1, add);
        i += 2;
    }
    if (i < t->m)
        tile_block(1, vecs, lanes, t, i, j, k0, k1, add);
}

/// C = A B, or C += A B when `add`.
__attribute__((unused)) static void tile_product(const tile_args *t, bool add) {
    for (int64_t k0 = 0; k0 < t->k || k0 == 0; k0 += TILE_DEPTH, add = true) {
        int64_t k1 = k0 + TILE_DEPTH < t->k ? k0 + TILE_DEPTH : t->k, j = 0;
        for (; j + TILE_VECS * TILE_W <= t->n; j += TILE_VECS * TILE_W)
            tile_columns(TILE_VECS, TILE_W, t, j, k0, k1, add);
        for (; j + TILE_W <= t->n; j += TILE_W)
            tile_columns(1, TILE_W, t, j, k0, k1, add);
        if (j < t->n)
            tile_columns(1, t->n - j, t, j, k0, k1, add);
    }
}

typedef float tile_four __attribute__((vector_size(16), aligned(4), may_alias));
/// A 4 x 4 block of tile_transpose.
TILE_INLINE void tile_transpose_four(float *to, int64_t ld, const float *from, int64_t ld_from) {
    tile_four a = *(const tile_four *)from, b = *(const tile_four *)(from + ld_from);
    tile_four c = *(const tile_four *)(from + 2 * ld_from),
              d = *(const tile_four *)(from + 3 * ld_from);
    tile_four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
              cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    tile_four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7),
              cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(tile_four *)to = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(tile_four *)(to + ld) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    *(tile_four *)(to + 2 * ld) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
    *(tile_four *)(to + 3 * ld) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}

/// to [cols, ld] = the transpose of from [rows, cols], with zeros up to tile_pad(rows) <= ld.
__attribute__((unused)) static void tile_transpose(float *to, int64_t ld, const float *from,
                                                   int64_t ld_from, int64_t rows, int64_t cols) {
    int64_t whole_rows = rows & ~(int64_t)3, whole_cols = cols & ~(int64_t)3;
    for (int64_t i = 0; i < whole_rows; i += 4)
        for (int64_t j = 0; j < whole_cols; j += 4)
            tile_transpose_four(to + j * ld + i, ld, from + i * ld_from + j, ld_from);
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t i = j < whole_cols ? whole_rows : 0; i < rows; i++)
            to[j * ld + i] = from[i * ld_from + j];
        for (int64_t i = rows; i < tile_pad(rows); i++)
            to[j * ld + i] = 0.0f;
    }
}

/// Sum of the lanes, by halves.
TILE_INLINE float tile_fold(tile_reg v) {
    float lanes[TILE_W];
    memcpy(lanes, &v, sizeof(lanes));
    for (int width = TILE_W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}
/// <x, y> and the sum of x; two chains of vectors.
TILE_INLINE float tile_dot(const float *x, const float *y, int64_t n) {
    tile_reg a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 2 * TILE_W <= n; i += 2 * TILE_W) {
        a = TILE_FMA(tile_load(x + i, TILE_W), tile_load(y + i, TILE_W), a);
        b = TILE_FMA(tile_load(x + i + TILE_W, TILE_W), tile_load(y + i + TILE_W, TILE_W), b);
    }
    for (; i < n; i += TILE_W)
        a = TILE_FMA(tile_load(x + i, n - i), tile_load(y + i, n - i), a);
    return tile_fold(a + b);
}
TILE_INLINE float tile_sum(const float *x, int64_t n) {
    tile_reg a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 2 * TILE_W <= n; i += 2 * TILE_W) {
        a += tile_load(x + i, TILE_W);
        b += tile_load(x + i + TILE_W, TILE_W);
    }
    for (; i < n; i += TILE_W)
        a += tile_load(x + i, n - i);
    return tile_fold(a + b);
}
