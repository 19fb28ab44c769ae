/* simd_matmul.c - matrix products, dense and grouped by expert.
 *
 *     C[m, n] = alpha op(A) op(B) + beta C
 *
 * With oneDNN every product is one call; without it blocks of C are shared out among the threads
 * and computed by tile.h. A grouped product cuts the work into one contiguous part per thread,
 * group boundaries or not, and every part is a few products on one thread: groups of any sizes
 * balance, and one element of a result is one thread's.
 *
 * stream.by_row: C' = W A' by tile.h, whose sums run over k in one order for every element.
 *
 * compute == BF16: operands are rounded into the stream's bf16_scratch, in pieces of k if it is
 * small, and accumulated in FP32: as BF16 on tiles where the processor has them, elsewhere as FP32
 * numbers that hold BF16 values. The sums are the same up to FP32 rounding.
 */
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "core/base/error.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/vec.h"

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

#ifdef CQ_ONEDNN
static int gemm(const cq_stream *s, const cq_matmul_args *a) {
    return cq_cpu_sgemm(s, a, cq_team(s, a->m * a->n * a->k, 0.025));
}
#else
enum { ROWS = 192, COLS = 128, DEPTH = 256 };

/// One block of C.
static void gemm_block(const cq_matmul_args *a, int64_t i0, int64_t j0) {
    float tile[ROWS * COLS], panel[DEPTH * COLS];
    int64_t m = min64(ROWS, a->m - i0), n = min64(COLS, a->n - j0);
    int64_t ar = a->ta ? 1 : a->lda, ac = a->ta ? a->lda : 1;
    const float *left = (const float *)a->a + i0 * ar, *right = a->b;
    memset(tile, 0, sizeof(tile));
    for (int64_t k0 = 0; k0 < a->k; k0 += DEPTH) {
        int64_t k = min64(DEPTH, a->k - k0);
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++)
                panel[p * COLS + j] =
                    a->tb ? right[(j0 + j) * a->ldb + k0 + p] : right[(k0 + p) * a->ldb + j0 + j];
        tile_product(&(tile_args){m, n, k, left + k0 * ac, ar, ac, panel, COLS, tile, COLS}, true);
    }
    float alpha = (float)a->alpha, beta = (float)a->beta;
    for (int64_t i = 0; i < m; i++) {
        float *c = (float *)a->c + (i0 + i) * a->ldc + j0;
        for (int64_t j = 0; j < n; j++)
            c[j] = alpha * tile[i * COLS + j] + (a->beta == 0.0 ? 0.0f : beta * c[j]);
    }
}
static int gemm(const cq_stream *s, const cq_matmul_args *a) {
    int64_t down = (a->m + ROWS - 1) / ROWS, across = (a->n + COLS - 1) / COLS;
#pragma omp parallel for schedule(static)                                                          \
    num_threads(cq_team(s, a->m * a->n * a->k, 0.03)) if (!omp_in_parallel())
    for (int64_t u = 0; u < down * across; u++)
        gemm_block(a, u % down * ROWS, u / down * COLS);
    return CQ_OK;
}
#endif

enum { BY_ROWS = 64, BY_COLS = 192, BY_DEPTH = 256 };

/// C[i0 .. i0 + m, j0 .. j0 + n] of C = alpha A W' + beta C, as a block of its transpose.
static void by_row_block(const cq_matmul_args *a, int64_t i0, int64_t m, int64_t j0, int64_t n) {
    float tile[BY_COLS * BY_ROWS], panel[BY_DEPTH * BY_ROWS];
    int64_t wide = (m + TILE_W - 1) / TILE_W * TILE_W;
    for (int64_t k0 = 0; k0 < a->k; k0 += BY_DEPTH) {
        int64_t k = min64(BY_DEPTH, a->k - k0);
        tile_transpose(panel, BY_ROWS, (const float *)a->a + i0 * a->lda + k0, a->lda, m, k);
        tile_product(&(tile_args){n, wide, k, (const float *)a->b + j0 * a->ldb + k0, a->ldb, 1,
                                  panel, BY_ROWS, tile, BY_ROWS},
                     k0 > 0);
    }
    float alpha = (float)a->alpha, beta = (float)a->beta;
    for (int64_t i = 0; i < m; i++) {
        float *c = (float *)a->c + (i0 + i) * a->ldc + j0;
        for (int64_t j = 0; j < n; j++)
            c[j] = alpha * tile[j * BY_ROWS + i] + (a->beta == 0.0 ? 0.0f : beta * c[j]);
    }
}
static int by_row(const cq_stream *s, const cq_matmul_args *a) {
    int team = omp_in_parallel() ? 1 : cq_team(s, a->m * a->n * a->k, 0.03);
    int64_t share = (a->n + team - 1) / team, cols = min64(BY_COLS, (share + 31) / 32 * 32);
    int64_t down = (a->m + BY_ROWS - 1) / BY_ROWS, across = (a->n + cols - 1) / cols;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t u = 0; u < down * across; u++) {
        int64_t i0 = u % down * BY_ROWS, j0 = u / down * cols;
        by_row_block(a, i0, min64(BY_ROWS, a->m - i0), j0, min64(cols, a->n - j0));
    }
    return CQ_OK;
}

/// The FP32 product of a stream.
static int product(const cq_stream *s, const cq_matmul_args *a) {
    return s->by_row && a->tb && !a->ta ? by_row(s, a) : gemm(s, a);
}

/// rows x cols, ld apart, rounded to BF16 and packed: as uint16_t, or as floats when `wide`.
static void round_operand(void *to, bool wide, const float *x, int64_t rows, int64_t cols,
                          int64_t ld, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * ld;
        if (wide) {
            float *f = (float *)to + r * cols;
            for (int64_t i = 0; i < cols; i++)
                f[i] = vec_bf16(from[i]);
        } else {
            uint16_t *h = (uint16_t *)to + r * cols;
            for (int64_t i = 0; i < cols; i++)
                h[i] = (uint16_t)(vec_bits(vec_bf16(from[i])) >> 16);
        }
    }
}

/// BF16 product with `bytes` at `buffer` for the operands.
static int gemm_bf16(const cq_stream *s, const cq_matmul_args *a, void *buffer, int64_t bytes) {
    bool wide = !cq_cpu_has_fast_bf16();
    int64_t size = wide ? 4 : 2, depth = bytes / (size * (a->m + a->n));
    if (!buffer || depth < min64(a->k, 16))
        return cq_fail(CQ_ENOMEM, "matmul: %lld bytes for BF16 operands, %lld wanted",
                       (long long)(buffer ? bytes : 0),
                       (long long)(size * (a->m + a->n) * min64(a->k, 16)));
    depth = depth < a->k ? depth / 16 * 16 : a->k;
    int threads = omp_in_parallel() ? 1 : cq_team(s, (a->m + a->n) * a->k, 0.5);
    for (int64_t k0 = 0; k0 < a->k; k0 += depth) {
        int64_t k = min64(depth, a->k - k0);
        char *left = buffer, *right = left + size * a->m * k;
        cq_matmul_args part = *a;
        part.k = k, part.a = left, part.b = right;
        part.lda = a->ta ? a->m : k, part.ldb = a->tb ? k : a->n;
        part.beta = k0 > 0 ? 1.0 : a->beta;
        round_operand(left, wide, (const float *)a->a + (a->ta ? k0 * a->lda : k0),
                      a->ta ? k : a->m, part.lda, a->lda, threads);
        round_operand(right, wide, (const float *)a->b + (a->tb ? k0 : k0 * a->ldb),
                      a->tb ? a->n : k, part.ldb, a->ldb, threads);
        CQ_TRY(wide ? gemm(s, &part) : cq_cpu_bf16gemm(&part, s->threads));
    }
    return CQ_OK;
}

/// C = beta C, for k = 0.
static void scale_only(const cq_matmul_args *a) {
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            float *c = (float *)a->c + i * a->ldc + j;
            *c = a->beta == 0.0 ? 0.0f : (float)a->beta * *c;
        }
}

int CQ_OP(matmul)(cq_stream *s, const cq_matmul_args *a) {
    CQ_F32_OR_REF(matmul);
    if (a->m == 0 || a->n == 0)
        return CQ_OK;
    if (a->k == 0) {
        scale_only(a);
        return CQ_OK;
    }
    if (s->compute == CQ_COMPUTE_BF16)
        return gemm_bf16(s, a, s->bf16_scratch, s->bf16_scratch_bytes);
    return product(s, a);
}

/// The product of rows `from` .. `to` of the work in group e: rows of x and y, or with
/// CQ_GROUPED_WEIGHT rows of w[e].
static cq_matmul_args group_product(const cq_matmul_grouped_args *a, int64_t e, int64_t from,
                                    int64_t to) {
    int64_t n = a->n, k = a->k, first = a->offsets[e];
    float *x = (float *)a->x + first * k, *w = (float *)a->w + e * n * k;
    float *y = (float *)a->y + first * n;
    cq_matmul_args m = {.dtype = CQ_F32, .alpha = 1.0, .m = to - from};
    if (a->mode == CQ_GROUPED_FORWARD) {
        m.tb = true, m.n = n, m.k = k;
        m.a = x + from * k, m.lda = k, m.b = w, m.ldb = k, m.c = y + from * n, m.ldc = n;
    } else if (a->mode == CQ_GROUPED_INPUT) {
        m.n = k, m.k = n;
        m.a = y + from * n, m.lda = n, m.b = w, m.ldb = k, m.c = x + from * k, m.ldc = k;
    } else {
        m.ta = true, m.n = k, m.k = a->offsets[e + 1] - first, m.beta = 1.0;
        m.a = y + from, m.lda = n, m.b = x, m.ldb = k, m.c = w + from * k, m.ldc = k;
    }
    return m;
}

/// Work of one row in group e, and the number of such rows.
static int64_t row_work(const cq_matmul_grouped_args *a, int64_t e) {
    return a->mode == CQ_GROUPED_WEIGHT ? a->offsets[e + 1] - a->offsets[e] : 1;
}
static int64_t group_rows(const cq_matmul_grouped_args *a, int64_t e) {
    return a->mode == CQ_GROUPED_WEIGHT ? a->n : a->offsets[e + 1] - a->offsets[e];
}
/// The row of a group at which the work `done` before it reaches `goal`; a multiple of 8, so that
/// no part of a product is a sliver.
static int64_t cut(int64_t goal, int64_t done, int64_t per_row, int64_t rows) {
    if (goal <= done)
        return 0;
    if (goal >= done + per_row * rows)
        return rows;
    return (goal - done) / per_row / 8 * 8;
}

/// The part of thread `me` of `team`.
static int grouped_part(const cq_stream *s, const cq_matmul_grouped_args *a, int64_t total, int me,
                        int team) {
    int64_t done = 0, begin = total * me / team, end = total * (me + 1) / team;
    int64_t bytes = s->bf16_scratch_bytes / team / 64 * 64;
    for (int64_t e = 0; e < a->groups; e++) {
        int64_t per_row = row_work(a, e), rows = group_rows(a, e);
        int64_t from = cut(begin, done, per_row, rows), to = cut(end, done, per_row, rows);
        done += per_row * rows;
        if (per_row == 0 || from >= to)
            continue;
        cq_matmul_args m = group_product(a, e, from, to);
        char *buffer = s->bf16_scratch ? (char *)s->bf16_scratch + me * bytes : NULL;
        CQ_TRY(s->compute == CQ_COMPUTE_BF16 ? gemm_bf16(s, &m, buffer, bytes) : product(s, &m));
    }
    return CQ_OK;
}

int CQ_OP(matmul_grouped)(cq_stream *s, const cq_matmul_grouped_args *a) {
    CQ_F32_OR_REF(matmul_grouped);
    int64_t total = 0;
    for (int64_t e = 0; e < a->groups; e++)
        total += row_work(a, e) * group_rows(a, e);
    int team = cq_team(s, total * (a->mode == CQ_GROUPED_WEIGHT ? a->k : a->n * a->k), 0.025);
    int failed = CQ_OK;
    char message[256] = "";
#pragma omp parallel num_threads(team)
    {
        /* the message is the failing thread's own: it is carried over to the caller's */
        int status = grouped_part(s, a, total, omp_get_thread_num(), omp_get_num_threads());
        if (status != CQ_OK)
#pragma omp critical
        {
            failed = status;
            strncpy(message, cq_error(), sizeof(message) - 1);
        }
    }
    return failed == CQ_OK ? CQ_OK : cq_fail(failed, "%s", message);
}
