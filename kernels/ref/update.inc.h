/* update.inc.h - AdamW and the vector operations around it, over `real` and `acc` (see ref.h).

     g' = grad_scale g        m = b1 m + (1 - b1) g'        v = b2 v + (1 - b2) g'^2
     w -= lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w )

   The step uses m and v before they are rounded for storage; the decay acts on the weight before
   the step. wq is quantized from the stored weight, so a checkpoint reproduces it.
   Loshchilov and Hutter, arXiv 1711.05101, algorithm 2. */

static int CQ_FN(adamw)(const cq_adamw_args *a) {
    if (a->step < 1)
        return cq_fail(CQ_EUSAGE, "adamw: step %lld, wanted 1 or more", (long long)a->step);
    real *w = a->w, *m = a->m, *v = a->v;
    const real *g = a->g;
    acc b1 = (acc)a->beta1, b2 = (acc)a->beta2, lr = (acc)a->lr;
    acc c1 = (acc)(1 - pow(a->beta1, (double)a->step));
    acc c2 = (acc)(1 - pow(a->beta2, (double)a->step));
    for (int64_t i = 0; i < a->rows * a->cols; i++) {
        acc grad = (acc)g[i] * (acc)a->grad_scale;
        acc mi = b1 * (acc)m[i] + (1 - b1) * grad;
        acc vi = b2 * (acc)v[i] + (1 - b2) * grad * grad;
        acc step = mi / c1 / (sqrt(vi / c2) + (acc)a->eps) + (acc)a->weight_decay * (acc)w[i];
        m[i] = (real)mi;
        v[i] = (real)vi;
        w[i] = (real)((acc)w[i] - lr * step);
    }
    if (!a->wq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->cols, w, a->wq, a->block_amax, a->top);
}

static int CQ_FN(sumsq)(const cq_sumsq_args *a) {
    const real *x = a->x;
    acc sum = 0;
    for (int64_t i = 0; i < a->n; i++)
        sum += (acc)x[i] * (acc)x[i];
    *a->out += (double)sum;
    return CQ_OK;
}

static int CQ_FN(axpy)(const cq_axpy_args *a) {
    const real *x = a->x;
    real *y = a->y;
    acc alpha = (acc)a->alpha, beta = (acc)a->beta;
    for (int64_t i = 0; i < a->n; i++)
        y[i] = (real)(a->beta == 0 ? alpha * (acc)x[i] : alpha * (acc)x[i] + beta * (acc)y[i]);
    return CQ_OK;
}

static int CQ_FN(round_bf16)(const cq_round_bf16_args *a) {
    const real *x = a->x;
    uint16_t *y = a->y;
    for (int64_t i = 0; i < a->n; i++) {
        float f = (float)x[i];
        uint32_t u;
        memcpy(&u, &f, 4);
        if (f != f)
            u = (u >> 16 | 0x40u) << 16;
        else
            u += 0x7fffu + (u >> 16 & 1u);
        y[i] = (uint16_t)(u >> 16);
    }
    return CQ_OK;
}
