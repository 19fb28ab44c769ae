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

enum { MOST_DIM = 1024 };

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
static void rotate(float *restrict y, const float *restrict v, const turn *t, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        y[i] = v[i] * t->cosine[i] - v[i + half] * t->sine[i];
        y[i + half] = v[i + half] * t->cosine[i] + v[i] * t->sine[i];
    }
}

static bool unusual(cq_dtype dtype, int64_t dim, const int32_t *positions) {
    return dtype != CQ_F32 || dim > MOST_DIM || (positions && dim % 2);
}

int CQ_OP(headnorm_forward)(cq_stream *s, const cq_headnorm_forward_args *a) {
    int64_t n = a->head_dim;
    if (unusual(a->dtype, n, a->positions))
        return cq_ref_headnorm_forward(s, a); /* which also words the errors */
    turns all;
    if (a->positions)
        turns_init(&all, n, a->theta);
    const float *w = a->w;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->heads * n))
    for (int64_t r = 0; r < a->rows; r++) {
        turn now;
        float v[MOST_DIM];
        if (a->positions)
            turn_row(&now, &all, a->positions[r], 1.0f);
        for (int64_t h = 0; h < a->heads; h++) {
            const float *x = (const float *)a->x + r * a->ldx + h * n;
            float *y = (float *)a->y + r * a->ldy + h * n;
            memcpy(v, x, (size_t)n * sizeof(float));
            if (w) {
                float scale = 1.0f / sqrtf(vec_dot(v, v, n) / (float)n + (float)a->eps);
#pragma omp simd
                for (int64_t i = 0; i < n; i++)
                    v[i] = w[i] * (v[i] * scale);
            }
            if (a->positions)
                rotate(y, v, &now, n / 2);
            else
                memcpy(y, v, (size_t)n * sizeof(float));
        }
    }
    return CQ_OK;
}

/// dx of one head from dn, the gradient of the normalized head; adds dn xhat to `part`.
static void head_backward(float *dx, float *part, const float *x, const float *w, const float *dn,
                          float eps, int64_t n) {
    float scale = 1.0f / sqrtf(vec_dot(x, x, n) / (float)n + eps), sum;
    if (part)
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            part[i] += dn[i] * (x[i] * scale);
    VEC_SUM(sum, n, (w[i] * dn[i]) * x[i]);
    float mean = sum * scale * scale / (float)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dx[i] = scale * (w[i] * dn[i] - x[i] * mean);
}

int CQ_OP(headnorm_backward)(cq_stream *s, const cq_headnorm_backward_args *a) {
    int64_t n = a->head_dim;
    if (unusual(a->dtype, n, a->positions))
        return cq_ref_headnorm_backward(s, a);
    turns all;
    if (a->positions)
        turns_init(&all, n, a->theta);
    rowsum sums;
    CQ_TRY(rowsum_init(&sums, s, "headnorm", a->rows, n, a->w && a->dw));
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->heads * n))
    for (int64_t c = 0; c < sums.chunks; c++) {
        float *part = rowsum_begin(&sums, c), dn[MOST_DIM];
        turn now;
        for (int64_t r = c * sums.chunk_rows; r < rowsum_end(&sums, c); r++) {
            if (a->positions)
                turn_row(&now, &all, a->positions[r], -1.0f);
            for (int64_t h = 0; h < a->heads; h++) {
                const float *dy = (const float *)a->dy + r * a->lddy + h * n;
                float *dx = (float *)a->dx + r * a->lddx + h * n;
                if (a->positions)
                    rotate(dn, dy, &now, n / 2);
                else
                    memcpy(dn, dy, (size_t)n * sizeof(float));
                if (a->w)
                    head_backward(dx, part, (const float *)a->x + r * a->ldx + h * n, a->w, dn,
                                  (float)a->eps, n);
                else
                    memcpy(dx, dn, (size_t)n * sizeof(float));
            }
        }
    }
    rowsum_add(&sums, a->dw);
    return CQ_OK;
}
