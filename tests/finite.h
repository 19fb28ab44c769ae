/// finite.h - checks a gradient in double against finite differences of the forward operation.
///
///     L = sum_i g_i y_i      dL/dx ~ (8 (L(x + h) - L(x - h)) - (L(x + 2h) - L(x - 2h))) / 12 h,
///     h = 1e-3 (1 + |x|)
///
/// The fourth-order form truncates at about 1e-12 of the fifth derivative and rounds at about 1e-13
/// of sum |g y|, so gradients are held to 1e-7 of their own value plus 1e-11 of sum |g y|. Run the
/// backward twice before the check: a buffer that is overwritten then holds the gradient once, one
/// that is added to holds it twice.
#pragma once
#include "core/base/rng.h"
#include "core/base/types.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

/// One input of the forward and what the backward says about it. Padding between rows is part of
/// both and has gradient zero.
typedef struct finite_input {
    const char *name;
    double *x;
    const double *dx;
    int64_t n;
    int times; ///< 1: overwritten by each backward, 2: added to
} finite_input;

typedef struct finite_forward {
    int (*run)(const void *args);
    const void *args;
    const double *y, *g; ///< output of the forward and dL/dy
    int64_t n;
} finite_forward;

static inline double finite_loss(const finite_forward *f, double *magnitude) {
    double sum = 0, size = 0;
    cr_assert_eq(f->run(f->args), 0);
    for (int64_t i = 0; i < f->n; i++) {
        sum += f->g[i] * f->y[i];
        size += fabs(f->g[i] * f->y[i]);
    }
    if (magnitude)
        *magnitude = size;
    return sum;
}

/// `what` names the case in messages, with its seed.
static inline void finite_check(const char *what, const finite_forward *f, const finite_input *in,
                                int n_inputs) {
    double size;
    finite_loss(f, &size);
    cr_assert(isfinite(size) && size > 0, "%s: sum |g y| is %g", what, size);
    for (int k = 0; k < n_inputs; k++) {
        double largest = 0;
        for (int64_t i = 0; i < in[k].n; i++) {
            double *x = &in[k].x[i], keep = *x, h = 1e-3 * (1 + fabs(keep)), d[4];
            for (int j = 0; j < 4; j++) {
                *x = keep + h * (double)(j < 2 ? j - 2 : j - 1);
                d[j] = finite_loss(f, NULL);
            }
            *x = keep;
            double slope = (8 * (d[2] - d[1]) - (d[3] - d[0])) / (12 * h);
            double claim = in[k].dx[i] / in[k].times;
            largest = fmax(largest, fabs(claim));
            cr_expect(fabs(claim - slope) <= 1e-7 * fabs(claim) + 1e-11 * size,
                      "%s: %s[%lld] is %.12g, differences give %.12g", what, in[k].name,
                      (long long)i, claim, slope);
        }
        cr_expect(largest > 0, "%s: %s is all zero, so the case shows nothing", what, in[k].name);
    }
    finite_loss(f, NULL);
}

/// n values from the normal distribution times `scale`, plus `shift`; malloc'd.
static inline double *finite_normal(int64_t n, uint64_t seed, uint64_t stream, double scale,
                                    double shift) {
    double *x = malloc((size_t)n * sizeof *x);
    cr_assert_not_null(x);
    for (int64_t i = 0; i < n; i++)
        x[i] = shift + scale * cq_random_normal(seed, stream, (uint64_t)i);
    return x;
}
static inline double *finite_zeros(int64_t n) {
    double *x = calloc((size_t)n, sizeof *x);
    cr_assert_not_null(x);
    return x;
}
/// The same values in FP32; malloc'd.
static inline float *finite_narrow(const double *x, int64_t n) {
    float *y = malloc((size_t)n * sizeof *y);
    cr_assert_not_null(y);
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)x[i];
    return y;
}
/// Rounds values to FP32 in place, so that both precisions start from the same numbers.
static inline double *finite_round(double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        x[i] = (double)(float)x[i];
    return x;
}
