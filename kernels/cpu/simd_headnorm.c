/* simd_headnorm.c - RMSNorm of each head and rotary embedding, forward and backward; formulas are
 * kernels/ref/norms.inc.h's.
 *
 *     y[i] = v[i] cos - v[i + n/2] sin    y[i + n/2] = v[i + n/2] cos + v[i] sin
 *
 * Angles are position * theta^(-2i/n) in double: a position of a million times a float frequency
 * would have no digits left after the whole turns are taken away. Sine and cosine of a row serve
 * all its heads.
 */
#include <math.h>

#include "kernels/cpu/rowsum.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

enum { MOST_DIM = 1024, HEADS = 32 /* worked on together */ };

/// The integer nearest to a double below 2^51: adding 1.5 * 2^52 rounds.
VEC_INLINE double nearest(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }

/// Sine and cosine of an angle below 2^31: quarter turns are taken away in double, the rest, at
/// most pi/4, goes into the Taylor series (error below 2^-28).
VEC_INLINE void sine_cosine(double angle, float *sine, float *cosine) {
    double k = nearest(angle * 0.63661977236758134308);
    double r = (angle - k * 1.5707963267341256) - k * 6.0771005065061922e-11, z = r * r;
    double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880))));
    double c =
        1.0 +
        z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))));
    double quarter = k - 4.0 * nearest(k * 0.25 - 0.375); /* 0 .. 3 */
    bool odd = fabs(quarter - 2.0) == 1.0;
    double turned_s = odd ? c : s, turned_c = odd ? s : c;
    *sine = (float)(quarter > 1.5 ? -turned_s : turned_s);
    *cosine = (float)(fabs(quarter - 1.5) < 1.0 ? -turned_c : turned_c);
}

/// What all rows share, and the angles of one row.
typedef struct turns {
    double frequency[MOST_DIM / 2];
    int64_t half;
} turns;
typedef struct turn {
    float sine[MOST_DIM / 2], cosine[MOST_DIM / 2];
} turn;

static void turns_init(turns *t, int64_t dim, double theta) {
    t->half = dim / 2;
    for (int64_t i = 0; i < t->half; i++)
        t->frequency[i] = pow(theta, -2.0 * (double)i / (double)dim);
}
/// sign -1 turns back.
static void turn_row(turn *to, const turns *t, int32_t position, float sign) {
    double at = position;
#pragma omp simd
    for (int64_t i = 0; i < t->half; i++) {
        float sine, cosine;
        sine_cosine(at * t->frequency[i], &sine, &cosine);
        to->sine[i] = sign * sine;
        to->cosine[i] = cosine;
    }
}
/// y may be v.
static void rotate(float *y, const float *v, const turn *t, int64_t half) {
    float *low = y, *high = y + half;
    const float *v_low = v, *v_high = v + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = v_low[i], b = v_high[i];
        low[i] = a * t->cosine[i] - b * t->sine[i];
        high[i] = b * t->cosine[i] + a * t->sine[i];
    }
}
/// y = w v scale, rotated; y may be v.
static void scale_and_rotate(float *y, const float *v, const float *w, float scale, const turn *t,
                             int64_t half) {
    float *low = y, *high = y + half;
    const float *v_low = v, *v_high = v + half, *w_high = w + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = w[i] * (v_low[i] * scale), b = w_high[i] * (v_high[i] * scale);
        low[i] = a * t->cosine[i] - b * t->sine[i];
        high[i] = b * t->cosine[i] + a * t->sine[i];
    }
}
/// The scales of `heads` heads, all sums first: a head alone would wait for its own square root.
static void head_scales(float *scale, const float *x, int64_t heads, int64_t n, float eps) {
    for (int64_t h = 0; h < heads; h++)
        scale[h] = vec_dot(x + h * n, x + h * n, n);
    for (int64_t h = 0; h < heads; h++)
        scale[h] = 1.0f / sqrtf(scale[h] / (float)n + eps);
}

static bool unusual(cq_dtype dtype, int64_t dim, const int32_t *positions) {
    return dtype != CQ_F32 || dim > MOST_DIM || (positions && dim % 2);
}

/// `heads` heads of row r from `first` on.
static void forward_heads(const cq_headnorm_forward_args *a, int64_t r, int64_t first,
                          int64_t heads, const turn *now) {
    int64_t n = a->head_dim;
    const float *x = (const float *)a->x + r * a->ldx + first * n, *w = a->w;
    float *y = (float *)a->y + r * a->ldy + first * n, scale[HEADS];
    if (w)
        head_scales(scale, x, heads, n, (float)a->eps);
    for (int64_t h = 0; h < heads; h++, x += n, y += n) {
        if (w && a->positions) {
            scale_and_rotate(y, x, w, scale[h], now, n / 2);
        } else if (a->positions) {
            rotate(y, x, now, n / 2);
        } else if (!w) {
            memmove(y, x, (size_t)n * sizeof(float));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                y[i] = w[i] * (x[i] * scale[h]);
        }
    }
}

int CQ_OP(headnorm_forward)(cq_stream *s, const cq_headnorm_forward_args *a) {
    int64_t n = a->head_dim;
    if (unusual(a->dtype, n, a->positions))
        return cq_ref_headnorm_forward(s, a); /* which also words the errors */
    turns all;
    if (a->positions)
        turns_init(&all, n, a->theta);
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->heads * n, 0.7))
    for (int64_t r = 0; r < a->rows; r++) {
        turn now;
        if (a->positions)
            turn_row(&now, &all, a->positions[r], 1.0f);
        for (int64_t h = 0; h < a->heads; h += HEADS)
            forward_heads(a, r, h, a->heads - h < HEADS ? a->heads - h : HEADS, &now);
    }
    return CQ_OK;
}

/// dx of `heads` heads from dn, the gradient of the normalized heads; adds dn xhat to `part`.
static void norm_backward(float *dx, float *part, const float *x, const float *w, const float *dn,
                          float eps, int64_t heads, int64_t n) {
    float scale[HEADS], mean[HEADS];
    head_scales(scale, x, heads, n, eps);
    for (int64_t h = 0; h < heads; h++) {
        const float *xh = x + h * n, *dh = dn + h * n;
        VEC_SUM(mean[h], n, (w[i] * dh[i]) * xh[i]);
    }
    for (int64_t h = 0; h < heads; h++)
        mean[h] = mean[h] * scale[h] * scale[h] / (float)n;
    for (int64_t h = 0; h < heads; h++, x += n, dn += n, dx += n) {
        float by = scale[h], m = mean[h];
        if (part)
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                part[i] += dn[i] * (x[i] * by);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            dx[i] = by * (w[i] * dn[i] - x[i] * m);
    }
}

/// `heads` heads of row r from `first` on.
static void backward_heads(const cq_headnorm_backward_args *a, int64_t r, int64_t first,
                           int64_t heads, const turn *now, float *part) {
    int64_t n = a->head_dim;
    const float *dy = (const float *)a->dy + r * a->lddy + first * n;
    float *dx = (float *)a->dx + r * a->lddx + first * n, turned[MOST_DIM];
    float *dn = a->w ? turned : dx;
    for (int64_t h = 0; h < heads; h++)
        if (a->positions)
            rotate(dn + h * n, dy + h * n, now, n / 2);
        else
            memmove(dn + h * n, dy + h * n, (size_t)n * sizeof(float));
    if (a->w)
        norm_backward(dx, part, (const float *)a->x + r * a->ldx + first * n, a->w, dn,
                      (float)a->eps, heads, n);
}

int CQ_OP(headnorm_backward)(cq_stream *s, const cq_headnorm_backward_args *a) {
    int64_t n = a->head_dim;
    if (unusual(a->dtype, n, a->positions))
        return cq_ref_headnorm_backward(s, a);
    turns all;
    if (a->positions)
        turns_init(&all, n, a->theta);
    int64_t step = MOST_DIM / n < HEADS ? MOST_DIM / n : HEADS;
    rowsum sums;
    CQ_TRY(rowsum_init(&sums, s, "headnorm", a->rows, n, a->w && a->dw));
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->heads * n, 1.2))
    for (int64_t c = 0; c < sums.chunks; c++) {
        float *part = rowsum_begin(&sums, c);
        turn now;
        for (int64_t r = c * sums.chunk_rows; r < rowsum_end(&sums, c); r++) {
            if (a->positions)
                turn_row(&now, &all, a->positions[r], -1.0f);
            for (int64_t h = 0; h < a->heads; h += step)
                backward_heads(a, r, h, a->heads - h < step ? a->heads - h : step, &now, part);
        }
    }
    rowsum_add(&sums, a->dw);
    return CQ_OK;
}
