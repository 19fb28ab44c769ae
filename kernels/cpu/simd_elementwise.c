/* simd_elementwise.c - SwiGLU, squared ReLU, axpy, sum of squares, maxima and fake quantization.
 * Formulas are kernels/ref/activations.inc.h's, quant.inc.h's and update.inc.h's.
 *
 * Sums and maxima are taken over blocks whose size does not depend on the thread count.
 */
#include <math.h>

#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

enum { UNIT = 16384 /* elements of one unit of work: 64 KiB */, MOST_SUMS = 1024 };

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
/// Rows of one unit of work.
static int64_t unit_rows(int64_t cols) { return cols < UNIT ? UNIT / cols : 1; }

int CQ_OP(swiglu_forward)(cq_stream *s, const cq_swiglu_forward_args *a) {
    CQ_F32_OR_REF(swiglu_forward);
    if (a->hq)
        CQ_TRY(fq_check("swiglu", &a->fq, a->dim));
    int64_t n = a->dim, step = fq_batch(n), saturated = 0;
    float *to = a->h ? a->h : a->hq, *hq = a->hq;
    if (!to)
        return CQ_OK;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * n, 1.4))                     \
    reduction(+ : saturated)
    for (int64_t first = 0; first < a->rows; first += step) {
        int64_t rows = min64(step, a->rows - first);
        for (int64_t r = first; r < first + rows; r++) {
            const float *gate = (const float *)a->gu + 2 * r * n, *up = gate + n;
            float *h = to + r * n;
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                h[i] = vec_silu(gate[i]) * up[i];
        }
        if (hq)
            saturated +=
                fq_rows(&a->fq, first, rows, n, hq + first * n, to + first * n, NULL, 448.0f);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

int CQ_OP(swiglu_backward)(cq_stream *s, const cq_swiglu_backward_args *a) {
    CQ_F32_OR_REF(swiglu_backward);
    int64_t n = a->dim;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows *n, 1.2))
    for (int64_t r = 0; r < a->rows; r++) {
        const float *gate = (const float *)a->gu + 2 * r * n, *up = gate + n;
        const float *dh = (const float *)a->dh + r * n;
        float *dgate = (float *)a->dgu + 2 * r * n, *dup = dgate + n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float z = gate[i], u = up[i], d = dh[i], sigmoid = vec_sigmoid(z);
            dgate[i] = d * u * vec_silu_slope(z, sigmoid);
            dup[i] = d * (z * sigmoid);
        }
    }
    return CQ_OK;
}

int CQ_OP(relu2_forward)(cq_stream *s, const cq_relu2_forward_args *a) {
    CQ_F32_OR_REF(relu2_forward);
    if (a->hq)
        CQ_TRY(fq_check("relu2", &a->fq, a->dim));
    int64_t n = a->dim, step = fq_batch(n), saturated = 0;
    float *to = a->h ? a->h : a->hq, *hq = a->hq;
    if (!to)
        return CQ_OK;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * n, a->hq ? 0.5 : 0.2))                     \
    reduction(+ : saturated)
    for (int64_t first = 0; first < a->rows; first += step) {
        int64_t rows = min64(step, a->rows - first);
        const float *x = (const float *)a->x + first * n;
        float *h = to + first * n;
#pragma omp simd
        for (int64_t i = 0; i < rows * n; i++) {
            float v = x[i] > 0.0f ? x[i] : 0.0f;
            h[i] = v * v;
        }
        if (hq)
            saturated += fq_rows(&a->fq, first, rows, n, hq + first * n, h, NULL, 448.0f);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

int CQ_OP(relu2_backward)(cq_stream *s, const cq_relu2_backward_args *a) {
    CQ_F32_OR_REF(relu2_backward);
    const float *x = a->x, *dh = a->dh;
    float *dx = a->dx;
    int64_t n = a->rows * a->dim;
#pragma omp parallel for simd schedule(static) num_threads(cq_team(s, n, 0.2))
    for (int64_t i = 0; i < n; i++)
        dx[i] = x[i] > 0.0f ? 2.0f * x[i] * dh[i] : 0.0f;
    return CQ_OK;
}

int CQ_OP(fake_quant)(cq_stream *s, const cq_fake_quant_args *a) {
    CQ_F32_OR_REF(fake_quant);
    CQ_TRY(fq_check("fake_quant", &a->fq, a->cols));
    int64_t step = unit_rows(a->cols), saturated = 0;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->cols, 0.4))               \
    reduction(+ : saturated)
    for (int64_t r = 0; r < a->rows; r += step) {
        int64_t at = r * a->cols;
        saturated += fq_rows(&a->fq, r, min64(step, a->rows - r), a->cols, (float *)a->y + at,
                             (const float *)a->x + at,
                             a->block_amax ? a->block_amax + at / FQ_BLOCK : NULL, a->top);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

/// *to = max(*to, v), also when several threads do it.
static void raise(float *to, float v) {
    float old;
    __atomic_load(to, &old, __ATOMIC_RELAXED);
    while (v > old) {
        if (__atomic_compare_exchange(to, &old, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return;
    }
}

int CQ_OP(amax)(cq_stream *s, const cq_amax_args *a) {
    CQ_F32_OR_REF(amax);
    int64_t step = unit_rows(a->cols), n_groups = a->offsets ? a->n_groups : 1;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->cols, 0.2))
    for (int64_t first = 0; first < a->rows; first += step) {
        int64_t end = min64(first + step, a->rows);
        for (int64_t r = first; r < end;) {
            int64_t g = fq_group(a->offsets, n_groups, r);
            int64_t stop = g + 1 < n_groups ? min64(end, a->offsets[g + 1]) : end;
            raise(&a->amax[g], vec_amax((const float *)a->x + r * a->cols, (stop - r) * a->cols));
            r = stop;
        }
    }
    return CQ_OK;
}

/// Sum of squares in double.
static double block_sumsq(const float *x, int64_t n) {
    double lane[16] = {0};
    int64_t whole = n - n % 16;
    for (int64_t at = 0; at < whole; at += 16)
        for (int j = 0; j < 16; j++)
            lane[j] += (double)x[at + j] * (double)x[at + j];
    for (int64_t i = whole; i < n; i++)
        lane[0] += (double)x[i] * (double)x[i];
    for (int j = 1; j < 16; j++)
        lane[0] += lane[j];
    return lane[0];
}

int CQ_OP(sumsq)(cq_stream *s, const cq_sumsq_args *a) {
    CQ_F32_OR_REF(sumsq);
    double sums[MOST_SUMS];
    int64_t step = (a->n + MOST_SUMS - 1) / MOST_SUMS;
    step = step < UNIT ? UNIT : step;
    int64_t blocks = (a->n + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->n, 0.3))
    for (int64_t b = 0; b < blocks; b++)
        sums[b] = block_sumsq((const float *)a->x + b * step, min64(step, a->n - b * step));
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; b++)
        sum += sums[b];
    *a->out += sum;
    return CQ_OK;
}

int CQ_OP(axpy)(cq_stream *s, const cq_axpy_args *a) {
    CQ_F32_OR_REF(axpy);
    const float *x = a->x;
    float *y = a->y, alpha = (float)a->alpha, beta = (float)a->beta;
    if (a->beta == 0.0) {
#pragma omp parallel for simd schedule(static) num_threads(cq_team(s, a->n, 0.4))
        for (int64_t i = 0; i < a->n; i++)
            y[i] = alpha * x[i];
        return CQ_OK;
    }
#pragma omp parallel for simd schedule(static) num_threads(cq_team(s, a->n, 0.4))
    for (int64_t i = 0; i < a->n; i++)
        y[i] = vec_fma(alpha, x[i], beta * y[i]);
    return CQ_OK;
}

/* Only a device asks for it; `cpu` rounds operands inside its products. */
int CQ_OP(round_bf16)(cq_stream *s, const cq_round_bf16_args *a) { return cq_ref_round_bf16(s, a); }
