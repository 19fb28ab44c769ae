/* simd_cka.c - losses on hidden states: Gram matrices, CKA and Gram-Frobenius between two of them,
 * and the row-wise rivals cosine and relative MSE. Formulas are kernels/ref/geometry.inc.h's.
 *
 * Rows are split into at most PARTS runs whatever the number of threads; each run sums in double in
 * its own slot and the slots are added in order. A Gram is computed below the diagonal and
 * mirrored.
 */
#include <math.h>

#include "core/base/error.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

enum { PARTS = 64, PANEL = 16, WIDE = 32 };

/// Threads for so many elements: waking one costs as much as a pass over tens of thousands.
static int threads_for(int64_t n, int threads) { return n < 1 << 16 ? 1 : threads; }

/// First item of part `part` of n.
static int64_t part_start(int64_t n, int64_t part) { return n * part / PARTS; }

/// to = x - column means, for `cols` <= PANEL columns.
static void centre_columns(float *to, const float *x, int64_t n, int64_t dim, int64_t cols) {
    double mean[PANEL] = {0};
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < cols; c++)
            mean[c] += (double)x[i * dim + c];
    for (int64_t c = 0; c < cols; c++)
        mean[c] /= (double)n;
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < cols; c++)
            to[i * dim + c] = (float)((double)x[i * dim + c] - mean[c]);
}

/// Columns j .. j + PANEL of X X' from row j down, and their mirror image.
static void gram_panel(float *gram, const float *x, int64_t n, int64_t dim, int64_t j) {
    float panel[TILE_DEPTH * PANEL];
    int64_t cols = n - j < PANEL ? n - j : PANEL;
    for (int64_t k = 0; k < dim; k += TILE_DEPTH) {
        int64_t depth = dim - k < TILE_DEPTH ? dim - k : TILE_DEPTH;
        tile_transpose(panel, PANEL, x + j * dim + k, dim, cols, depth);
        tile_product(&(tile_args){n - j, cols, depth, x + j * dim + k, dim, 1, panel, PANEL,
                                  gram + j * n + j, n},
                     k > 0);
    }
    for (int64_t i = j; i < n; i++)
        for (int64_t c = j; c < j + cols; c++)
            if (c < i)
                gram[c * n + i] = gram[i * n + c];
}

/// K_ij - (r_i + r_j) / (n-2) + t / ((n-1)(n-2)), diagonal 0. The row sums r wait on the diagonal,
/// whose own values are not needed.
static void u_centre(float *g, int64_t n, int threads) {
    double total = 0.0, m = (double)(n - 2);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        double sum = 0.0;
        g[i * n + i] = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++)
            sum += (double)g[i * n + j];
        g[i * n + i] = (float)(sum / m);
    }
    for (int64_t i = 0; i < n; i++)
        total += (double)g[i * n + i];
    float shift = (float)(total / (double)(n - 1));
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            if (i != j)
                g[i * n + j] = g[i * n + j] - (g[i * n + i] + g[j * n + j]) + shift;
    for (int64_t i = 0; i < n; i++)
        g[i * n + i] = 0.0f;
}

static int one_gram(cq_stream *s, const cq_gram_args *a) {
    int64_t n = a->n, dim = a->dim, least = a->unbiased ? 4 : 2;
    if (n < least)
        return cq_fail(CQ_ESHAPE, "gram: %lld rows, wanted at least %lld", (long long)n,
                       (long long)least);
    const float *x = a->x;
    float *centred = a->scratch, *gram = a->gram;
#pragma omp parallel num_threads(s->threads)
    {
#pragma omp for
        for (int64_t c = 0; c < dim; c += PANEL)
            centre_columns(centred + c, x + c, n, dim, dim - c < PANEL ? dim - c : PANEL);
#pragma omp for schedule(dynamic)
        for (int64_t j = 0; j < n; j += PANEL)
            gram_panel(gram, centred, n, dim, j);
    }
    if (a->unbiased)
        u_centre(gram, n, threads_for(n * n, s->threads));
    return CQ_OK;
}

int CQ_OP(gram)(cq_stream *s, const cq_gram_args *a) {
    CQ_F32_OR_REF(gram);
    int64_t rows = a->n * a->dim;
    for (int64_t i = 0; i == 0 || i < a->batch; i++) {
        cq_gram_args one = *a;
        one.x = (const float *)a->x + i * rows;
        one.scratch = (float *)a->scratch + i * rows;
        one.gram = (float *)a->gram + i * a->n * a->n;
        CQ_TRY(one_gram(s, &one));
    }
    return CQ_OK;
}

static bool is_norm(double squared) { return squared > 0.0 && isfinite(squared); }

/// *xy = <x, y>, *xx = <x, x>, *yy = <y, y>.
static void inner_products(const float *x, const float *y, int64_t n, double *xy, double *xx,
                           double *yy) {
    double a = 0.0, b = 0.0, c = 0.0;
#pragma omp simd reduction(+ : a, b, c)
    for (int64_t i = 0; i < n; i++) {
        a += (double)x[i] * (double)y[i];
        b += (double)x[i] * (double)x[i];
        c += (double)y[i] * (double)y[i];
    }
    *xy = a;
    *xx = b;
    *yy = c;
}
/// |of_x x - of_y y|^2
static double squared_distance(const float *x, double of_x, const float *y, double of_y,
                               int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        double d = (double)x[i] * of_x - (double)y[i] * of_y;
        sum += d * d;
    }
    return sum;
}

/// The three inner products over n elements in PARTS runs.
static void all_inner_products(const float *x, const float *y, int64_t n, int threads,
                               double out[3]) {
    double part[PARTS][3];
#pragma omp parallel for num_threads(threads_for(n, threads))
    for (int64_t p = 0; p < PARTS; p++) {
        int64_t i = part_start(n, p);
        inner_products(x + i, y + i, part_start(n, p + 1) - i, &part[p][0], &part[p][1],
                       &part[p][2]);
    }
    out[0] = out[1] = out[2] = 0.0;
    for (int64_t p = 0; p < PARTS; p++)
        for (int i = 0; i < 3; i++)
            out[i] += part[p][i];
}
static double whole_distance(const float *x, double of_x, const float *y, double of_y, int64_t n,
                             int threads) {
    double part[PARTS], sum = 0.0;
#pragma omp parallel for num_threads(threads_for(n, threads))
    for (int64_t p = 0; p < PARTS; p++) {
        int64_t i = part_start(n, p);
        part[p] = squared_distance(x + i, of_x, y + i, of_y, part_start(n, p + 1) - i);
    }
    for (int64_t p = 0; p < PARTS; p++)
        sum += part[p];
    return sum;
}

int CQ_OP(cka)(cq_stream *s, const cq_cka_args *a) {
    CQ_F32_OR_REF(cka);
    int64_t n = a->n * a->n;
    const float *k = a->k, *l = a->l;
    double *out = a->out;
    for (int64_t i = 0; i == 0 || i < a->batch; i++, k += n, l += n, out += 4) {
        all_inner_products(k, l, n, s->threads, out);
        double kk = out[1], ll = out[2];
        out[3] = 0.0;
        if (a->loss == CQ_GRAM_CKA && is_norm(kk) && is_norm(ll))
            out[3] = whole_distance(k, 1.0 / sqrt(kk), l, 1.0 / sqrt(ll), n, s->threads) / 2.0;
        if (a->loss == CQ_GRAM_FROBENIUS && is_norm(ll) && isfinite(kk))
            out[3] = whole_distance(k, 1.0, l, 1.0, n, s->threads) / ll;
    }
    return CQ_OK;
}

/// `cols` <= WIDE columns of dx = m x, m [n, n]; x is packed, for its rows lie far apart.
static void product_panel(float *dx, const float *m, const float *x, int64_t n, int64_t dim,
                          int64_t cols) {
    float panel[TILE_DEPTH * WIDE];
    for (int64_t k = 0; k < n; k += TILE_DEPTH) {
        int64_t depth = n - k < TILE_DEPTH ? n - k : TILE_DEPTH;
        for (int64_t i = 0; i < depth; i++)
            memcpy(panel + i * WIDE, x + (k + i) * dim, (size_t)cols * sizeof(float));
        tile_product(&(tile_args){n, cols, depth, m + k, n, 1, panel, WIDE, dx, dim}, k > 0);
    }
}

static void one_cka_backward(cq_stream *s, const cq_cka_backward_args *a) {
    int64_t n = a->n, dim = a->dim;
    double kk = a->stats[1], ll = a->stats[2], of_k = 0.0, of_l = 0.0;
    if (a->loss == CQ_GRAM_CKA && is_norm(kk) && is_norm(ll)) {
        double b = sqrt(kk), c = sqrt(ll), factor = 2.0 * a->weight / b;
        of_k = factor * (a->stats[0] / (b * c)) / b;
        of_l = -factor / c;
    }
    if (a->loss == CQ_GRAM_FROBENIUS && is_norm(ll) && isfinite(kk)) {
        of_k = 4.0 * a->weight / ll;
        of_l = -of_k;
    }
    float *k = a->k, *dx = a->dx;
    const float *l = a->l;
    if (of_l == 0.0) {
        memset(dx, 0, (size_t)(n * dim) * sizeof(float));
        return;
    }
#pragma omp parallel num_threads(s->threads)
    {
#pragma omp for
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                k[i * n + j] = (float)(of_k * (double)k[i * n + j] + of_l * (double)l[i * n + j]);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < dim; j += WIDE)
            product_panel(dx + j, k, (const float *)a->x + j, n, dim,
                          dim - j < WIDE ? dim - j : WIDE);
    }
}

int CQ_OP(cka_backward)(cq_stream *s, const cq_cka_backward_args *a) {
    CQ_F32_OR_REF(cka_backward);
    int64_t rows = a->n * a->dim, square = a->n * a->n;
    for (int64_t i = 0; i == 0 || i < a->batch; i++) {
        cq_cka_backward_args one = *a;
        one.k = (float *)a->k + i * square;
        one.l = (const float *)a->l + i * square;
        one.x = (const float *)a->x + i * rows;
        one.weight = a->weights ? a->weights[i] : a->weight;
        one.stats = a->stats + 4 * i;
        one.dx = (float *)a->dx + i * rows;
        one_cka_backward(s, &one);
    }
    return CQ_OK;
}

/// Sum over rows of 1 - cos = |x/|x| - y/|y||^2 / 2.
static double cosine_rows(const float *x, const float *y, int64_t rows, int64_t dim) {
    double sum = 0.0, xy, xx, yy;
    for (int64_t i = 0; i < rows; i++, x += dim, y += dim) {
        inner_products(x, y, dim, &xy, &xx, &yy);
        if (is_norm(xx) && is_norm(yy))
            sum += squared_distance(x, 1.0 / sqrt(xx), y, 1.0 / sqrt(yy), dim) / 2.0;
    }
    return sum;
}

int CQ_OP(rowloss)(cq_stream *s, const cq_rowloss_args *a) {
    CQ_F32_OR_REF(rowloss);
    const float *x = a->x, *y = a->y;
    double part[PARTS], products[3];
    *a->out = 0.0;
    if (a->form == CQ_ROWLOSS_MSE) {
        all_inner_products(x, y, a->n * a->dim, s->threads, products);
        if (is_norm(products[2]))
            *a->out = whole_distance(x, 1.0, y, 1.0, a->n * a->dim, s->threads) / products[2];
        return CQ_OK;
    }
#pragma omp parallel for num_threads(s->threads)
    for (int64_t p = 0; p < PARTS; p++) {
        int64_t i = part_start(a->n, p);
        part[p] = cosine_rows(x + i * a->dim, y + i * a->dim, part_start(a->n, p + 1) - i, a->dim);
    }
    for (int64_t p = 0; p < PARTS; p++)
        *a->out += part[p];
    *a->out = a->n ? *a->out / (double)a->n : 0.0;
    return CQ_OK;
}

int CQ_OP(rowloss_backward)(cq_stream *s, const cq_rowloss_backward_args *a) {
    CQ_F32_OR_REF(rowloss_backward);
    double mse[3] = {0.0, 0.0, 0.0}, factor = 0.0, weight = a->weights ? *a->weights : a->weight;
    if (a->form == CQ_ROWLOSS_MSE) {
        all_inner_products(a->x, a->y, a->n * a->dim, s->threads, mse);
        factor = is_norm(mse[2]) ? 2.0 * weight / mse[2] : 0.0;
    }
#pragma omp parallel for num_threads(s->threads)
    for (int64_t i = 0; i < a->n; i++) {
        const float *x = (const float *)a->x + i * a->dim, *y = (const float *)a->y + i * a->dim;
        float *dx = (float *)a->dx + i * a->dim;
        double of_x = factor, of_y = factor, xy, xx, yy;
        if (a->form == CQ_ROWLOSS_COSINE) {
            inner_products(x, y, a->dim, &xy, &xx, &yy);
            bool known = is_norm(xx) && is_norm(yy);
            double unit = known ? weight / ((double)a->n * sqrt(xx)) : 0.0;
            of_x = known ? unit * xy / xx / sqrt(yy) : 0.0;
            of_y = known ? unit / sqrt(yy) : 0.0;
        }
        for (int64_t c = 0; c < a->dim; c++)
            dx[c] = of_y == 0.0 ? 0.0f : (float)(of_x * (double)x[c] - of_y * (double)y[c]);
    }
    return CQ_OK;
}

/* a few numbers in double, the same in all backends */
int CQ_OP(balance)(cq_stream *s, const cq_balance_args *a) { return cq_ref_balance(s, a); }
