/* update.inc.h - AdamW and the vector operations around it, over `real` and `acc` (see ref.h).

     g' = grad_scale g        m = b1 m + (1 - b1) g'        v = b2 v + (1 - b2) g'^2
     w -= lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w )

   The step uses m and v before they are rounded for storage; the decay acts on the weight before
   the step. wq is quantized from the stored weight, so a checkpoint reproduces it. Narrow forms
   (kernels/formats.h) are blocks of 256 that are widened, updated and stored again.
   Loshchilov and Hutter, arXiv 1711.05101, algorithm 2. */

static void CQ_FN(adamw_values)(const cq_adamw_args *a, real *w, real *m, real *v, const real *g,
                                int64_t n) {
    const cq_adamw_now *now = a->now;
    acc b1 = (acc)a->beta1, b2 = (acc)a->beta2, lr = now ? (acc)now->lr : (acc)a->lr;
    acc c1 = now ? (acc)now->c1 : (acc)(1 - pow(a->beta1, (double)a->step));
    acc c2 = now ? (acc)now->c2 : (acc)(1 - pow(a->beta2, (double)a->step));
    acc scale = now ? (acc)now->grad_scale : (acc)a->grad_scale;
    for (int64_t i = 0; i < n; i++) {
        acc grad = (acc)g[i] * scale;
        acc mi = b1 * (acc)m[i] + (1 - b1) * grad;
        acc vi = b2 * (acc)v[i] + (1 - b2) * grad * grad;
        acc step = mi / c1 / (sqrt(vi / c2) + (acc)a->eps) + (acc)a->weight_decay * (acc)w[i];
        m[i] = (real)mi;
        v[i] = (real)vi;
        w[i] = (real)((acc)w[i] - lr * step);
    }
}

/* One block of at most 256 values through F32 and back; what the stored weight is goes to wq. */
static void CQ_FN(adamw_block)(const cq_adamw_args *a, int64_t at, int64_t n) {
    float f[3][CQ_MOMENT_BLOCK];
    real w[CQ_MOMENT_BLOCK], m[CQ_MOMENT_BLOCK], v[CQ_MOMENT_BLOCK];
    cq_update_read(a, at, n, f[0], f[1], f[2]);
    for (int64_t i = 0; i < n; i++)
        w[i] = (real)f[0][i], m[i] = (real)f[1][i], v[i] = (real)f[2][i];
    CQ_FN(adamw_values)(a, w, m, v, (const real *)a->g + at, n);
    for (int64_t i = 0; i < n; i++)
        f[0][i] = (float)w[i], f[1][i] = (float)m[i], f[2][i] = (float)v[i];
    cq_update_write(a, at, n, f[0], f[1], f[2]);
    for (int64_t i = 0; i < n && a->wq; i++)
        ((real *)a->wq)[at + i] = (real)f[0][i];
}

static int CQ_FN(adamw)(const cq_adamw_args *a) {
    int64_t n = a->rows * a->cols;
    CQ_TRY(cq_update_check(a));
    if (a->master == CQ_MASTER_F32 && a->moments == CQ_MOMENTS_F32)
        CQ_FN(adamw_values)(a, a->w, a->m, a->v, a->g, n);
    for (int64_t at = 0; (a->master || a->moments) && at < n; at += CQ_MOMENT_BLOCK)
        CQ_FN(adamw_block)(a, at, n - at < CQ_MOMENT_BLOCK ? n - at : CQ_MOMENT_BLOCK);
    if (!a->wq)
        return CQ_OK;
    const void *now = a->master || a->moments ? a->wq : a->w;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->cols, now, a->wq, a->block_amax, a->top);
}

static int CQ_FN(widen)(const cq_widen_args *a) {
    const uint16_t *x = a->x, *low = a->low;
    real *y = a->y;
    for (int64_t i = 0; i < a->n; i++)
        y[i] = (real)(low ? cq_split_join(x[i], low[i]) : cq_bf16_value(x[i]));
    return CQ_OK;
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
