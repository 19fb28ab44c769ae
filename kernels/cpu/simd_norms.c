/* simd_norms.c - RMSNorm and Mamba-2's gated group norm, forward and backward; formulas are
 * kernels/ref/norms.inc.h's.
 *
 * A few rows at a time, three passes over them in the first-level cache: the sums of squares, the
 * result, its fake quantization. Weight gradients go through rowsum.h.
 */
#include <math.h>

#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/rowsum.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/// Row r: its scale and, when `out` is set, the normalized row.
static void rmsnorm_row(const cq_rmsnorm_forward_args *a, float *out, int64_t r) {
    int64_t n = a->dim;
    const float *x = (const float *)a->x + r * n, *w = a->w;
    float scale = 1.0f / sqrtf(vec_dot(x, x, n) / (float)n + (float)a->eps);
    if (a->rstd)
        ((float *)a->rstd)[r] = scale;
    if (!out)
        return;
    float *y = out + r * n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        y[i] = w[i] * (x[i] * scale);
}

int CQ_OP(rmsnorm_forward)(cq_stream *s, const cq_rmsnorm_forward_args *a) {
    CQ_F32_OR_REF(rmsnorm_forward);
    if (a->yq)
        CQ_TRY(fq_check("rmsnorm", &a->fq, a->dim));
    int64_t n = a->dim, step = fq_batch(n), saturated = 0;
    float *out = a->y ? a->y : a->yq, *yq = a->yq;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * n, a->yq ? 0.8 : 0.3))                     \
    reduction(+ : saturated)
    for (int64_t first = 0; first < a->rows; first += step) {
        int64_t rows = min64(step, a->rows - first);
        for (int64_t r = first; r < first + rows; r++)
            rmsnorm_row(a, out, r);
        if (yq)
            saturated +=
                fq_rows(&a->fq, first, rows, n, yq + first * n, out + first * n, NULL, 448.0f);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

/// dx of one row, written or added.
static void rmsnorm_row_backward(float *dx, const float *x, const float *w, const float *dy,
                                 float scale, int64_t n, bool accumulate) {
    float sum;
    VEC_SUM(sum, n, (w[i] * dy[i]) * x[i]);
    float mean = sum * scale * scale / (float)n;
    if (accumulate) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            dx[i] += scale * (w[i] * dy[i] - x[i] * mean);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dx[i] = scale * (w[i] * dy[i] - x[i] * mean);
}

int CQ_OP(rmsnorm_backward)(cq_stream *s, const cq_rmsnorm_backward_args *a) {
    CQ_F32_OR_REF(rmsnorm_backward);
    rowsum sums;
    int64_t n = a->dim;
    CQ_TRY(rowsum_init(&sums, s, "rmsnorm", a->rows, n, a->dw != NULL));
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows *n, 0.4))
    for (int64_t c = 0; c < sums.chunks; c++) {
        float *part = rowsum_begin(&sums, c);
        for (int64_t r = c * sums.chunk_rows; r < rowsum_end(&sums, c); r++) {
            const float *x = (const float *)a->x + r * n, *dy = (const float *)a->dy + r * n;
            float scale = ((const float *)a->rstd)[r];
            if (part)
#pragma omp simd
                for (int64_t i = 0; i < n; i++)
                    part[i] += dy[i] * (x[i] * scale);
            rmsnorm_row_backward((float *)a->dx + r * n, x, a->w, dy, scale, n, a->accumulate);
        }
    }
    rowsum_add(&sums, a->dw);
    return CQ_OK;
}

/// One group of `n` channels: out = w u rstd with u = y silu(z), when `out` is set; returns rstd.
static float gated_group(float *out, const float *y, const float *z, const float *w, float eps,
                         int64_t n) {
    float sum;
    if (!out) {
        VEC_SUM(sum, n, (y[i] * vec_silu(z[i])) * (y[i] * vec_silu(z[i])));
        return 1.0f / sqrtf(sum / (float)n + eps);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = y[i] * vec_silu(z[i]);
    float scale = 1.0f / sqrtf(vec_dot(out, out, n) / (float)n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = w[i] * (out[i] * scale);
    return scale;
}

/// All groups of row r.
static void gated_row(const cq_gatednorm_forward_args *a, float *out, int64_t r) {
    int64_t dim = a->dim, width = dim / a->groups;
    for (int64_t g = 0; g < a->groups; g++) {
        int64_t at = r * dim + g * width;
        float scale = gated_group(out ? out + at : NULL, (const float *)a->y + at,
                                  (const float *)a->z + r * a->ldz + g * width,
                                  (const float *)a->w + g * width, (float)a->eps, width);
        if (a->rstd)
            ((float *)a->rstd)[r * a->groups + g] = scale;
    }
}

int CQ_OP(gatednorm_forward)(cq_stream *s, const cq_gatednorm_forward_args *a) {
    CQ_F32_OR_REF(gatednorm_forward);
    if (a->outq)
        CQ_TRY(fq_check("gatednorm", &a->fq, a->dim));
    int64_t n = a->dim, step = fq_batch(n), saturated = 0;
    float *out = a->out ? a->out : a->outq, *outq = a->outq;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * n, 1.6))                     \
    reduction(+ : saturated)
    for (int64_t first = 0; first < a->rows; first += step) {
        int64_t rows = min64(step, a->rows - first);
        for (int64_t r = first; r < first + rows; r++)
            gated_row(a, out, r);
        if (outq)
            saturated +=
                fq_rows(&a->fq, first, rows, n, outq + first * n, out + first * n, NULL, 448.0f);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

/// dy and dz of one group; `sigmoid` holds n floats for the time of the call.
static void gated_group_backward(float *dy, float *dz, float *part, float *sigmoid, const float *y,
                                 const float *z, const float *w, const float *dout, float scale,
                                 int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        sigmoid[i] = vec_sigmoid(z[i]);
    if (part)
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            part[i] += dout[i] * (y[i] * (z[i] * sigmoid[i]) * scale);
    float sum;
    VEC_SUM(sum, n, (w[i] * dout[i]) * (y[i] * (z[i] * sigmoid[i])));
    float mean = sum * scale * scale / (float)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float silu = z[i] * sigmoid[i], v = y[i];
        float du = scale * (w[i] * dout[i] - v * silu * mean);
        dz[i] = du * v * vec_silu_slope(z[i], sigmoid[i]);
        dy[i] = du * silu;
    }
}

int CQ_OP(gatednorm_backward)(cq_stream *s, const cq_gatednorm_backward_args *a) {
    CQ_F32_OR_REF(gatednorm_backward);
    rowsum sums;
    int64_t dim = a->dim, width = dim / a->groups;
    CQ_TRY(rowsum_init(&sums, s, "gatednorm", a->rows, dim, a->dw != NULL));
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows *dim, 1.4))
    for (int64_t c = 0; c < sums.chunks; c++) {
        float *part = rowsum_begin(&sums, c), *spare = rowsum_spare(s, &sums);
        for (int64_t r = c * sums.chunk_rows; r < rowsum_end(&sums, c); r++)
            for (int64_t g = 0; g < a->groups; g++) {
                int64_t at = r * dim + g * width;
                gated_group_backward((float *)a->dy + at, (float *)a->dz + r * a->lddz + g * width,
                                     part ? part + g * width : NULL, spare,
                                     (const float *)a->y + at,
                                     (const float *)a->z + r * a->ldz + g * width,
                                     (const float *)a->w + g * width, (const float *)a->dout + at,
                                     ((const float *)a->rstd)[r * a->groups + g], width);
            }
    }
    rowsum_add(&sums, a->dw);
    return CQ_OK;
}
