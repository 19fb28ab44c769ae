/* rows.inc.h - moving rows: gather, scatter, the combination of expert outputs, embedding; over
   `real` and `acc` (see ref.h).

   Indices come from the sampler and the router, which own their range; token ids come from files,
   so they are checked here. Sums run over slots and tokens in ascending order. */

static int CQ_FN(gather_rows)(const cq_gather_rows_args *a) {
    const real *x = a->x;
    for (int64_t i = 0; i < a->rows; i++) {
        const real *row = x + (int64_t)a->index[i] * a->dim;
        if (a->y)
            memcpy((real *)a->y + i * a->dim, row, (size_t)a->dim * sizeof(real));
        if (a->yq)
            memcpy((real *)a->yq + i * a->dim, row, (size_t)a->dim * sizeof(real));
    }
    if (!a->yq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->dim, a->yq, a->yq, NULL, 448);
}

static int CQ_FN(scatter_rows)(const cq_scatter_rows_args *a) {
    for (int64_t i = 0; i < a->rows; i++) {
        real *x = (real *)a->x + (int64_t)a->index[i] * a->dim;
        const real *y = (const real *)a->y + i * a->dim;
        for (int64_t c = 0; c < a->dim; c++)
            x[c] = (real)((acc)x[c] + (acc)y[c]);
    }
    return CQ_OK;
}

static int CQ_FN(combine_forward)(const cq_combine_forward_args *a) {
    const real *y = a->y, *weight = a->weight;
    real *out = a->out;
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t c = 0; c < a->dim; c++) {
            acc sum = (acc)out[t * a->dim + c];
            for (int64_t j = t * a->top_k; j < (t + 1) * a->top_k; j++)
                sum += (acc)weight[j] * (acc)y[(int64_t)a->position[j] * a->dim + c];
            out[t * a->dim + c] = (real)sum;
        }
    return CQ_OK;
}

static int CQ_FN(combine_backward)(const cq_combine_backward_args *a) {
    for (int64_t i = 0; i < a->tokens * a->top_k; i++) {
        const real *dout = (const real *)a->dout + i / a->top_k * a->dim;
        const real *y = (const real *)a->y + (int64_t)a->position[i] * a->dim;
        real *dy = (real *)a->dy + (int64_t)a->position[i] * a->dim;
        acc weight = (acc)((const real *)a->weight)[i], dot = 0;
        for (int64_t c = 0; c < a->dim; c++) {
            dot += (acc)dout[c] * (acc)y[c];
            dy[c] = (real)(weight * (acc)dout[c]);
        }
        ((real *)a->dweight)[i] = (real)dot;
    }
    return CQ_OK;
}

static int CQ_FN(ungather_rows)(const cq_ungather_rows_args *a) {
    const real *dy = a->dy;
    real *dx = a->dx;
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t c = 0; c < a->dim; c++) {
            acc sum = (acc)dx[t * a->dim + c];
            for (int64_t j = t * a->top_k; j < (t + 1) * a->top_k; j++)
                sum += (acc)dy[(int64_t)a->position[j] * a->dim + c];
            dx[t * a->dim + c] = (real)sum;
        }
    return CQ_OK;
}

static int CQ_FN(check_ids)(const int32_t *ids, int64_t n, int64_t vocab) {
    for (int64_t t = 0; t < n; t++)
        if (ids[t] < 0 || ids[t] >= vocab)
            return cq_fail(CQ_EDATA, "embedding: token id %d at %lld, wanted 0 .. %lld", ids[t],
                           (long long)t, (long long)vocab - 1);
    return CQ_OK;
}

static int CQ_FN(embed_forward)(const cq_embed_forward_args *a) {
    CQ_TRY(CQ_FN(check_ids)(a->ids, a->tokens, a->vocab));
    for (int64_t t = 0; t < a->tokens; t++)
        memcpy((real *)a->h + t * a->dim, (const real *)a->table + a->ids[t] * a->dim,
               (size_t)a->dim * sizeof(real));
    return CQ_OK;
}

static int CQ_FN(embed_backward)(const cq_embed_backward_args *a) {
    CQ_TRY(CQ_FN(check_ids)(a->ids, a->tokens, a->vocab));
    for (int64_t t = 0; t < a->tokens; t++) {
        real *dtable = (real *)a->dtable + a->ids[t] * a->dim;
        const real *dh = (const real *)a->dh + t * a->dim;
        for (int64_t c = 0; c < a->dim; c++)
            dtable[c] = (real)((acc)dtable[c] + (acc)dh[c]);
    }
    return CQ_OK;
}
