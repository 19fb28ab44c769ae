/// geometry.c - linear CKA of two sets of rows in four ways.
///
/// With rows centred, K1 = 0, so all that HSIC_1 needs of the Grams is |X'Y|^2 and squared norms:
///
///     n (n - 3) HSIC_1 = |X'Y|^2 - q + a b / ((n - 1)(n - 2)) - 2 q / (n - 2)
///     a = sum |x_i|^2, b = sum |y_i|^2, q = sum |x_i|^2 |y_i|^2
#include "core/train/geometry.h"
#include "core/base/error.h"
#include <math.h>
#include <stdlib.h>

/* Rows in double, less their mean: [n, dim]. */
static double *centred(cq_tensor t) {
    int64_t n = t.shape.dim[0], dim = t.shape.dim[1];
    double *out = malloc((size_t)(n * dim) * sizeof *out);
    for (int64_t c = 0; out && c < dim; c++) {
        double mean = 0;
        for (int64_t i = 0; i < n; i++) {
            int64_t at = i * dim + c;
            out[at] = t.dtype == CQ_F64 ? ((double *)t.data)[at] : (double)((float *)t.data)[at];
            mean += out[at] / (double)n;
        }
        for (int64_t i = 0; i < n; i++)
            out[i * dim + c] -= mean;
    }
    return out;
}

static double squares(const double *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

/* Divides every dimension by the standard deviation of y's; one that y does not have is dropped. */
static void standardize(double *x, double *y, int64_t n, int64_t dim) {
    for (int64_t c = 0; c < dim; c++) {
        double variance = 0;
        for (int64_t i = 0; i < n; i++)
            variance += y[i * dim + c] * y[i * dim + c] / (double)n;
        double scale = variance > 0 ? 1 / sqrt(variance) : 0;
        for (int64_t i = 0; i < n; i++) {
            x[i * dim + c] *= scale;
            y[i * dim + c] *= scale;
        }
    }
}

/* Adds the two estimates of <K, L>; cross [dx, dy] is scratch. */
static void add_product(double *unbiased, double *biased, double *cross, const double *x,
                        int64_t dx, const double *y, int64_t dy, int64_t n) {
    double m = (double)n, a = 0, b = 0, q = 0;
    for (int64_t c = 0; c < dx * dy; c++)
        cross[c] = 0;
    for (int64_t i = 0; i < n; i++) {
        double xx = squares(x + i * dx, dx), yy = squares(y + i * dy, dy);
        a += xx;
        b += yy;
        q += xx * yy;
        for (int64_t c = 0; c < dx; c++)
            for (int64_t d = 0; d < dy; d++)
                cross[c * dy + d] += x[i * dx + c] * y[i * dy + d];
    }
    double f = squares(cross, dx * dy);
    *biased += f / (m * m);
    *unbiased += (f - q + a * b / ((m - 1) * (m - 2)) - 2 * q / (m - 2)) / (m * (m - 3));
}

static void add_ways(cq_geometry *g, int way, double *cross, const double *x, int64_t dx,
                     const double *y, int64_t dy, int64_t n) {
    double *unbiased = g->sum[way], *biased = g->sum[way + 1];
    add_product(unbiased, biased, cross, x, dx, y, dy, n);
    add_product(unbiased + 1, biased + 1, cross, x, dx, x, dx, n);
    add_product(unbiased + 2, biased + 2, cross, y, dy, y, dy, n);
}

int cq_geometry_add(cq_geometry *g, cq_tensor x, cq_tensor y) {
    int64_t n = x.shape.dim[0], dx = x.shape.dim[1], dy = y.shape.dim[1],
            widest = dx > dy ? dx : dy;
    double *xs = centred(x), *ys = centred(y);
    double *cross = malloc((size_t)(widest * widest) * sizeof *cross);
    bool room = xs && ys && cross;
    if (room) {
        add_ways(g, CQ_RAW_UNBIASED, cross, xs, dx, ys, dy, n);
        if (dx == dy) {
            standardize(xs, ys, n, dx);
            add_ways(g, CQ_STANDARD_UNBIASED, cross, xs, dx, ys, dy, n);
        }
    }
    free(xs);
    free(ys);
    free(cross);
    return room ? CQ_OK : cq_fail(CQ_ENOMEM, "compare: no memory for %ld rows", (long)n);
}

double cq_geometry_cka(const cq_geometry *g, int way) {
    const double *s = g->sum[way];
    double norm = sqrt(s[1]) * sqrt(s[2]);
    return norm > 0 ? s[0] / norm : (double)NAN;
}
