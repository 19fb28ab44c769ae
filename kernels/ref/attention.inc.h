/* attention.inc.h - causal grouped-query attention inside each document, and its gradient.

       P = softmax(scale q k')   out = P v   lse = log sum exp(scale q k')
       delta = <dout, out>   dP = dout v'   dS = P (dP - delta)
       dv = P' dout   dq = scale dS k   dk = scale dS' q

   The backward makes P again from lse. dk and dv are summed over the query heads of a kv head,
   heads ascending. */

/* The end of the longest document, as a length. */
static int64_t CQ_FN(attention_longest)(int64_t n_docs, const int64_t *starts) {
    int64_t longest = 0;
    for (int64_t d = 0; d < n_docs; d++)
        longest = starts[d + 1] - starts[d] > longest ? starts[d + 1] - starts[d] : longest;
    return longest;
}

static acc CQ_FN(dot)(const real *x, const real *y, int64_t n) {
    acc sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (acc)x[i] * (acc)y[i];
    return sum;
}

/* One query t of head h over the keys begin .. t; p holds that many weights. */
static void CQ_FN(attention_row)(const cq_attention_forward_args *a, int64_t begin, int64_t t,
                                 int64_t h, acc *p) {
    int64_t n = a->head_dim, kv = h / (a->heads / a->kv_heads), count = t - begin + 1;
    const real *q = (const real *)a->q + t * a->ldq + h * n;
    const real *k = (const real *)a->k + begin * a->ldk + kv * n;
    const real *v = (const real *)a->v + begin * a->ldv + kv * n;
    real *out = (real *)a->out + (t * a->heads + h) * n, *lse = a->lse;
    acc top = 0, sum = 0;
    for (int64_t s = 0; s < count; s++) {
        p[s] = (acc)a->scale * CQ_FN(dot)(q, k + s * a->ldk, n);
        top = s == 0 || p[s] > top ? p[s] : top;
    }
    for (int64_t s = 0; s < count; s++) {
        p[s] = exp(p[s] - top);
        sum += p[s];
    }
    for (int64_t i = 0; i < n; i++) {
        acc value = 0;
        for (int64_t s = 0; s < count; s++)
            value += p[s] * (acc)v[s * a->ldv + i];
        out[i] = (real)(value / sum);
    }
    if (lse)
        lse[t * a->heads + h] = (real)(top + log(sum));
}

static int CQ_FN(attention_forward)(const cq_attention_forward_args *a) {
    acc *p = cq_ref_zeros(CQ_FN(attention_longest)(a->n_docs, a->starts), sizeof(acc));
    if (!p)
        return cq_fail(CQ_ENOMEM, "attention: no memory for one row of weights");
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++)
            for (int64_t h = 0; h < a->heads; h++)
                CQ_FN(attention_row)(a, a->starts[d], t, h, p);
    free(p);
    return a->outq ? cq_ref_fake_rows(&a->fq, a->dtype, a->tokens, a->heads * a->head_dim, a->out,
                                      a->outq, NULL, 448.0f)
                   : CQ_OK;
}

/* Query t of head h: writes dq, adds to the sums dk and dv [document, head_dim]. dq_sum holds one
 * head. */
static void CQ_FN(attention_row_backward)(const cq_attention_backward_args *a, int64_t begin,
                                          int64_t t, int64_t h, acc *dq_sum, acc *dk_sum,
                                          acc *dv_sum) {
    int64_t n = a->head_dim, kv = h / (a->heads / a->kv_heads), at = (t * a->heads + h) * n;
    const real *q = (const real *)a->q + t * a->ldq + h * n;
    const real *out = (const real *)a->out + at, *dout = (const real *)a->dout + at;
    real *dq = (real *)a->dq + t * a->lddq + h * n;
    acc scale = (acc)a->scale, lse = (acc)((const real *)a->lse)[t * a->heads + h];
    acc delta = CQ_FN(dot)(dout, out, n);
    for (int64_t i = 0; i < n; i++)
        dq_sum[i] = 0;
    for (int64_t s = begin; s <= t; s++) {
        const real *k = (const real *)a->k + s * a->ldk + kv * n;
        const real *v = (const real *)a->v + s * a->ldv + kv * n;
        acc p = exp(scale * CQ_FN(dot)(q, k, n) - lse);
        acc ds = scale * p * (CQ_FN(dot)(dout, v, n) - delta);
        for (int64_t i = 0; i < n; i++) {
            dq_sum[i] += ds * (acc)k[i];
            dk_sum[(s - begin) * n + i] += ds * (acc)q[i];
            dv_sum[(s - begin) * n + i] += p * (acc)dout[i];
        }
    }
    for (int64_t i = 0; i < n; i++)
        dq[i] = (real)dq_sum[i];
}

/* All queries that read one kv head of one document. work: [1 + 2 * document, head_dim]. */
static void CQ_FN(attention_kv_backward)(const cq_attention_backward_args *a, int64_t begin,
                                         int64_t end, int64_t kv, acc *work) {
    int64_t n = a->head_dim, share = a->heads / a->kv_heads;
    acc *dk_sum = work + n, *dv_sum = dk_sum + (end - begin) * n;
    memset(dk_sum, 0, (size_t)(2 * (end - begin) * n) * sizeof(acc));
    for (int64_t h = kv * share; h < (kv + 1) * share; h++)
        for (int64_t t = begin; t < end; t++)
            CQ_FN(attention_row_backward)(a, begin, t, h, work, dk_sum, dv_sum);
    for (int64_t t = begin; t < end; t++)
        for (int64_t i = 0; i < n; i++) {
            ((real *)a->dk)[t * a->lddk + kv * n + i] = (real)dk_sum[(t - begin) * n + i];
            ((real *)a->dv)[t * a->lddv + kv * n + i] = (real)dv_sum[(t - begin) * n + i];
        }
}

static int CQ_FN(attention_backward)(const cq_attention_backward_args *a) {
    int64_t longest = CQ_FN(attention_longest)(a->n_docs, a->starts);
    acc *work = cq_ref_zeros((1 + 2 * longest) * a->head_dim, sizeof(acc));
    if (!work)
        return cq_fail(CQ_ENOMEM,
                       "attention: no memory for the sums of one document of %lld tokens",
                       (long long)longest);
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t kv = 0; kv < a->kv_heads; kv++)
            CQ_FN(attention_kv_backward)(a, a->starts[d], a->starts[d + 1], kv, work);
    free(work);
    return CQ_OK;
}

/* Document d of the cached form: its keys and values go into the slot, then each query looks at
   all that the slot holds up to itself. p holds that many weights. */
static void CQ_FN(attention_continue)(const cq_attention_cached_args *a, int64_t d, int64_t h,
                                      acc *p) {
    int64_t n = a->head_dim, kv = h / (a->heads / a->kv_heads), past = a->past[d];
    int64_t at = (a->slot[d] * a->kv_heads + kv) * n * a->room;
    real *keys = (real *)a->k_cache + at, *values = (real *)a->v_cache + at;
    for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++, past++) {
        const real *q = (const real *)a->q + t * a->ldq + h * n;
        real *out = (real *)a->out + (t * a->heads + h) * n;
        acc top = 0, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            keys[i * a->room + past] = ((const real *)a->k)[t * a->ldk + kv * n + i];
            values[past * n + i] = ((const real *)a->v)[t * a->ldv + kv * n + i];
        }
        for (int64_t s = 0; s <= past; s++) {
            p[s] = 0;
            for (int64_t i = 0; i < n; i++)
                p[s] += (acc)q[i] * (acc)keys[i * a->room + s];
            p[s] *= (acc)a->scale;
            top = s == 0 || p[s] > top ? p[s] : top;
        }
        for (int64_t s = 0; s <= past; s++) {
            p[s] = exp(p[s] - top);
            sum += p[s];
        }
        for (int64_t i = 0; i < n; i++) {
            acc value = 0;
            for (int64_t s = 0; s <= past; s++)
                value += p[s] * (acc)values[s * n + i];
            out[i] = (real)(value / sum);
        }
    }
}

static int CQ_FN(attention_cached)(const cq_attention_cached_args *a) {
    acc *p = cq_ref_zeros(a->room, sizeof(acc));
    if (!p)
        return cq_fail(CQ_ENOMEM, "attention: no memory for one row of weights");
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t h = 0; h < a->heads; h++)
            CQ_FN(attention_continue)(a, d, h, p);
    free(p);
    return CQ_OK;
}
