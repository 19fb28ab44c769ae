/* simd_adamw.c - AdamW and the fake-quantized copy of the new weights in one pass; the formula is
 * kernels/ref/update.inc.h's.
 *
 * A unit of work is a few rows: they are still in the first-level cache when they are quantized, so
 * the copy costs its own bytes and nothing more. Narrow weights and moments (kernels/formats.h) go
 * through F32 in blocks of 256, which are whole blocks of the quantizer too.
 */
#include <math.h>

#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"
#include "kernels/update.h"

enum { UNIT = 2048 };

typedef struct rates {
    float scale, b1, b2, a1, a2, lr, c1, c2, eps, decay;
} rates;

static void step(float *w, float *m, float *v, const float *g, int64_t n, const rates *k) {
    float scale = k->scale, b1 = k->b1, b2 = k->b2, a1 = k->a1, a2 = k->a2, lr = k->lr;
    float c1 = k->c1, c2 = k->c2, eps = k->eps, decay = k->decay;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float grad = g[i] * scale;
        float mi = vec_fma(b1, m[i], a1 * grad);
        float vi = vec_fma(b2, v[i], a2 * grad * grad);
        float change = (mi / c1) / (sqrtf(vi / c2) + eps) + decay * w[i];
        m[i] = mi;
        v[i] = vi;
        w[i] = vec_fma(-lr, change, w[i]);
    }
}

/* Blocks at, at + 256, ... of narrow weights or moments; returns the saturated blocks. */
static int64_t narrow(const cq_adamw_args *a, const rates *k, int64_t at, int64_t end) {
    float w[CQ_MOMENT_BLOCK], m[CQ_MOMENT_BLOCK], v[CQ_MOMENT_BLOCK];
    int64_t saturated = 0;
    for (; at < end; at += CQ_MOMENT_BLOCK) {
        int64_t n = end - at < CQ_MOMENT_BLOCK ? end - at : CQ_MOMENT_BLOCK;
        cq_update_read(a, at, n, w, m, v);
        step(w, m, v, (const float *)a->g + at, n, k);
        cq_update_write(a, at, n, w, m, v);
        if (a->wq)
            saturated += fq_rows(&a->fq, 0, 1, n, (float *)a->wq + at, w,
                                 a->block_amax ? a->block_amax + at / FQ_BLOCK : NULL, a->top);
    }
    return saturated;
}

int CQ_OP(adamw)(cq_stream *s, const cq_adamw_args *a) {
    bool wide = a->master == CQ_MASTER_F32 && a->moments == CQ_MOMENTS_F32;
    if (a->dtype != CQ_F32)
        return cq_ref_adamw(s, a); /* which also words the error */
    CQ_TRY(cq_update_check(a));
    if (a->wq)
        CQ_TRY(fq_check("adamw", &a->fq, a->cols));
    cq_adamw_now now = cq_update_now(a);
    rates k = {.scale = now.grad_scale,
               .b1 = (float)a->beta1,
               .b2 = (float)a->beta2,
               .a1 = (float)(1.0 - a->beta1),
               .a2 = (float)(1.0 - a->beta2),
               .lr = now.lr,
               .c1 = now.c1,
               .c2 = now.c2,
               .eps = (float)a->eps,
               .decay = (float)a->weight_decay};
    /* without a quantized copy rows mean nothing, and a long vector may be cut anywhere */
    int64_t total = a->rows * a->cols, saturated = 0;
    int64_t unit = !a->wq || !wide ? UNIT : a->cols < UNIT ? UNIT / a->cols * a->cols : a->cols;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, total, a->wq ? 1.3 : 0.8)) reduction(+ : saturated)
    for (int64_t at = 0; at < total; at += unit) {
        int64_t n = total - at < unit ? total - at : unit;
        if (!wide) {
            saturated += narrow(a, &k, at, at + n);
            continue;
        }
        float *w = (float *)a->w + at;
        step(w, (float *)a->m + at, (float *)a->v + at, (const float *)a->g + at, n, &k);
        if (a->wq)
            saturated += fq_rows(&a->fq, at / a->cols, n / a->cols, a->cols, (float *)a->wq + at, w,
                                 a->block_amax ? a->block_amax + at / FQ_BLOCK : NULL, a->top);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

int CQ_OP(widen)(cq_stream *s, const cq_widen_args *a) {
    CQ_F32_OR_REF(widen);
    const uint16_t *x = a->x, *low = a->low;
    float *y = a->y;
#pragma omp parallel for simd schedule(static) num_threads(cq_team(s, a->n, 0.5))
    for (int64_t i = 0; i < a->n; i++)
        y[i] = low ? cq_split_join(x[i], low[i]) : cq_bf16_value(x[i]);
    return CQ_OK;
}
