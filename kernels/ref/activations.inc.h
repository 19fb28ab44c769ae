/* activations.inc.h - SwiGLU h = silu(gate) up and squared ReLU h = max(x, 0)^2, with their
   gradients.

   The quantized copy is made from the stored values, so hq is the same whether or not h is kept. */

static int CQ_FN(swiglu_forward)(const cq_swiglu_forward_args *a) {
    const real *gu = a->gu;
    real *h = a->h ? a->h : a->hq;
    if (!h)
        return CQ_OK;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t i = 0; i < a->dim; i++) {
            acc gate = (acc)gu[r * 2 * a->dim + i], up = (acc)gu[(r * 2 + 1) * a->dim + i];
            h[r * a->dim + i] = (real)(gate * CQ_SIGMOID(gate) * up);
        }
    if (!a->hq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->dim, h, a->hq, NULL, 448.0f);
}

static int CQ_FN(swiglu_backward)(const cq_swiglu_backward_args *a) {
    const real *gu = a->gu, *dh = a->dh;
    real *dgu = a->dgu;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t i = 0; i < a->dim; i++) {
            int64_t at_gate = r * 2 * a->dim + i, at_up = at_gate + a->dim;
            acc gate = (acc)gu[at_gate], up = (acc)gu[at_up], d = (acc)dh[r * a->dim + i];
            acc s = CQ_SIGMOID(gate);
            dgu[at_gate] = (real)(d * up * s * (1 + gate * (1 - s)));
            dgu[at_up] = (real)(d * gate * s);
        }
    return CQ_OK;
}

static int CQ_FN(relu2_forward)(const cq_relu2_forward_args *a) {
    const real *x = a->x;
    real *h = a->h ? a->h : a->hq;
    if (!h)
        return CQ_OK;
    for (int64_t i = 0; i < a->rows * a->dim; i++) {
        acc v = (acc)x[i] > 0 ? (acc)x[i] : 0;
        h[i] = (real)(v * v);
    }
    if (!a->hq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->dim, h, a->hq, NULL, 448.0f);
}

static int CQ_FN(relu2_backward)(const cq_relu2_backward_args *a) {
    const real *x = a->x, *dh = a->dh;
    real *dx = a->dx;
    for (int64_t i = 0; i < a->rows * a->dim; i++)
        dx[i] = (real)((acc)x[i] > 0 ? 2 * (acc)x[i] * (acc)dh[i] : 0);
    return CQ_OK;
}
