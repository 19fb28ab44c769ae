/* simd_adamw.c - AdamW and the fake-quantized copy of the new weights in one pass; the formula is
 * kernels/ref/update.inc.h's.
 *
 * A unit of work is a few rows: they are still in the first-level cache when they are quantized, so
 * the copy costs its own bytes and nothing more.
 */
#include <math.h>

#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

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

int CQ_OP(adamw)(cq_stream *s, const cq_adamw_args *a) {
    if (a->dtype != CQ_F32 || a->step < 1)
        return cq_ref_adamw(s, a); /* which also words the error */
    if (a->wq)
        CQ_TRY(fq_check("adamw", &a->fq, a->cols));
    rates k = {.scale = (float)a->grad_scale,
               .b1 = (float)a->beta1,
               .b2 = (float)a->beta2,
               .a1 = (float)(1.0 - a->beta1),
               .a2 = (float)(1.0 - a->beta2),
               .lr = (float)a->lr,
               .c1 = (float)(1.0 - pow(a->beta1, (double)a->step)),
               .c2 = (float)(1.0 - pow(a->beta2, (double)a->step)),
               .eps = (float)a->eps,
               .decay = (float)a->weight_decay};
    /* without a quantized copy rows mean nothing, and a long vector may be cut anywhere */
    int64_t total = a->rows * a->cols, saturated = 0;
    int64_t unit = !a->wq ? UNIT : a->cols < UNIT ? UNIT / a->cols * a->cols : a->cols;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, total, a->wq ? 1.3 : 0.8)) reduction(+ : saturated)
    for (int64_t at = 0; at < total; at += unit) {
        int64_t n = total - at < unit ? total - at : unit;
        float *w = (float *)a->w + at;
        step(w, (float *)a->m + at, (float *)a->v + at, (const float *)a->g + at, n, &k);
        if (a->wq)
            saturated += fq_rows(&a->fq, at / a->cols, n / a->cols, a->cols, (float *)a->wq + at, w,
                                 a->block_amax ? a->block_amax + at / FQ_BLOCK : NULL, a->top);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}
