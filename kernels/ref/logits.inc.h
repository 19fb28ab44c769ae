/* logits.inc.h - the losses on logits, over `real` and `acc` (see ref.h).

   p, q = softmax of a teacher and a student row; S = the teacher's k largest entries, the lower id
   first of equals; P, Q = their mass; hats = renormalized over S:
                      value of a row                          gradient in S       outside S
     full             sum p log(p/q)                          q - p               q - p
     A renormalized   sum_S p^ log(p^/q^)                     q^ - p^             0
     B truncated      sum_S p log(p/q)                        q P - p             q P
     C tail bucket    B + (1-P) log((1-P)/(1-Q))              q - p               q - (1-P) q/(1-Q)
     cross-entropy    -log q[label]                           q - [j = label]
       weighted       -w log q[label]                         w (q - [j = label])

   1-P and 1-Q are summed over the entries outside S, all of which are here, rather than taken as
   the difference 1 - P or as log(-expm1(log P)), which know nothing of a tail below the rounding
   of P: a student that is sure and wrong keeps its gradient. With k >= vocabulary every form is the
   full KL. Hinton et al. 2015, arXiv:1503.02531.

   A cached teacher is its k largest log-probabilities l and the log of the tail's mass. They count
   relative to each other, p_j = (1 - tail) exp(l_j) / sum_k exp(l): rounding them to half precision
   then leaves a distribution, and moves KL by sum p d log(p/q) with |d| <= 2^-11 |l|, small where
   the student is near, rather than by sum p d. */

/* log sum exp of the entries whose membership in S equals `inside`; of all without `kept`. */
static acc CQ_FN(log_sum_exp)(const real *z, int64_t n, const bool *kept, bool inside) {
    acc top = -(acc)INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++)
        if ((!kept || kept[j] == inside) && !((acc)z[j] <= top))
            top = (acc)z[j];
    if (top == -(acc)INFINITY)
        return top;
    for (int64_t j = 0; j < n; j++)
        if (!kept || kept[j] == inside)
            sum += exp((acc)z[j] - top);
    return top + log(sum);
}

static int64_t CQ_FN(arg_max)(const real *z, int64_t n) {
    int64_t best = 0;
    for (int64_t j = 1; j < n; j++)
        if (z[j] > z[best])
            best = j;
    return best;
}

/* Marks the k largest entries of z; `order` is scratch [n]. */
static void CQ_FN(keep_largest)(bool *kept, cq_ref_ranked *order, const real *z, int64_t n,
                                int64_t k) {
    for (int64_t j = 0; j < n; j++)
        order[j] = (cq_ref_ranked){.value = (double)z[j], .id = j};
    qsort(order, (size_t)n, sizeof(*order), cq_ref_by_rank);
    memset(kept, 0, (size_t)n * sizeof(*kept));
    for (int64_t i = 0; i < k; i++)
        kept[order[i].id] = true;
}

/* One row of the forms that look at every entry alike (kept NULL) or at S only (form A): both
   softmaxes are over the same set, whose log sums are lt and ls. */
static acc CQ_FN(kl_same_set)(const cq_kl_args *a, const real *zt, real *zs, const bool *kept,
                              acc lt, acc ls) {
    acc value = 0;
    for (int64_t j = 0; j < a->vocab; j++) {
        bool in = !kept || kept[j];
        acc log_p = (acc)zt[j] - lt, log_q = (acc)zs[j] - ls, p = exp(log_p);
        if (in && p > 0)
            value += p * (log_p - log_q);
        if (a->gradient)
            zs[j] = in ? (real)((acc)a->scale * (exp(log_q) - p)) : 0;
    }
    return value;
}

/* One row of forms B and C: true log-probabilities on S, and for C the two tails. */
static acc CQ_FN(kl_bucket)(const cq_kl_args *a, const real *zt, real *zs, const bool *kept, acc lt,
                            acc ls) {
    bool bucket = a->form == CQ_KL_TAIL_BUCKET;
    acc tail_t = CQ_FN(log_sum_exp)(zt, a->vocab, kept, false);
    acc tail_s = CQ_FN(log_sum_exp)(zs, a->vocab, kept, false);
    acc mass = exp(CQ_FN(log_sum_exp)(zt, a->vocab, kept, true) - lt), rest = exp(tail_t - lt);
    acc value = 0;
    if (bucket && rest > 0)
        value = rest * ((tail_t - lt) - (tail_s - ls));
    for (int64_t j = 0; j < a->vocab; j++) {
        acc log_p = (acc)zt[j] - lt, log_q = (acc)zs[j] - ls, p = exp(log_p), q = exp(log_q);
        if (kept[j] && p > 0)
            value += p * (log_p - log_q);
        if (!a->gradient)
            continue;
        acc pull = kept[j] ? p : bucket && rest > 0 ? rest * exp((acc)zs[j] - tail_s) : 0;
        zs[j] = (real)((acc)a->scale * ((bucket ? q : q * mass) - pull));
    }
    return value;
}

static void CQ_FN(kl_row)(const cq_kl_args *a, int64_t r, bool *kept, cq_ref_ranked *order) {
    const real *zt = (const real *)a->teacher + r * a->vocab;
    real *zs = (real *)a->student + r * a->vocab;
    acc lt = CQ_FN(log_sum_exp)(zt, a->vocab, NULL, true);
    acc ls = CQ_FN(log_sum_exp)(zs, a->vocab, NULL, true);
    if (a->nll_teacher)
        *a->nll_teacher += (double)(lt - (acc)zt[a->labels[r]]);
    if (a->nll_student)
        *a->nll_student += (double)(ls - (acc)zs[a->labels[r]]);
    if (a->agree)
        *a->agree += CQ_FN(arg_max)(zt, a->vocab) == CQ_FN(arg_max)(zs, a->vocab);
    if (a->valid)
        *a->valid += 1;
    if (!kept) {
        *a->sum += (double)CQ_FN(kl_same_set)(a, zt, zs, NULL, lt, ls);
        return;
    }
    CQ_FN(keep_largest)(kept, order, zt, a->vocab, a->top_k);
    if (a->form == CQ_KL_RENORMALIZED) {
        acc st = CQ_FN(log_sum_exp)(zt, a->vocab, kept, true);
        acc ss = CQ_FN(log_sum_exp)(zs, a->vocab, kept, true);
        *a->sum += (double)CQ_FN(kl_same_set)(a, zt, zs, kept, st, ss);
    } else
        *a->sum += (double)CQ_FN(kl_bucket)(a, zt, zs, kept, lt, ls);
}

static int CQ_FN(check_labels)(const int32_t *labels, int64_t rows, int64_t vocab) {
    for (int64_t r = 0; r < rows; r++)
        if (labels[r] >= vocab)
            return cq_fail(CQ_EDATA, "loss: label %d of row %lld, wanted less than %lld", labels[r],
                           (long long)r, (long long)vocab);
    return CQ_OK;
}

static int CQ_FN(kl)(const cq_kl_args *a) {
    bool whole = a->form == CQ_KL_FULL || a->top_k >= a->vocab;
    if (!whole && a->top_k < 1)
        return cq_fail(CQ_EUSAGE, "kl: top_k is %lld, wanted at least 1", (long long)a->top_k);
    CQ_TRY(CQ_FN(check_labels)(a->labels, a->rows, a->vocab));
    bool *kept = whole ? NULL : cq_ref_zeros(a->vocab, sizeof(*kept));
    cq_ref_ranked *order = whole ? NULL : cq_ref_zeros(a->vocab, sizeof(*order));
    if (!whole && (!kept || !order)) {
        free(kept);
        free(order);
        return cq_fail(CQ_ENOMEM, "kl: no memory to rank %lld logits", (long long)a->vocab);
    }
    for (int64_t r = 0; r < a->rows; r++) {
        if (a->labels[r] >= 0)
            CQ_FN(kl_row)(a, r, kept, order);
        else if (a->gradient)
            memset((real *)a->student + r * a->vocab, 0, (size_t)a->vocab * sizeof(real));
    }
    free(kept);
    free(order);
    return CQ_OK;
}

static int CQ_FN(top_logits)(const cq_top_logits_args *a) {
    int64_t n = a->vocab;
    if (a->k < 1 || a->k > n)
        return cq_fail(CQ_EUSAGE, "top_logits: k is %lld, wanted 1 to %lld", (long long)a->k,
                       (long long)n);
    CQ_TRY(CQ_FN(check_labels)(a->labels, a->rows, n));
    bool *kept = cq_ref_zeros(n, sizeof(*kept));
    cq_ref_ranked *order = cq_ref_zeros(n, sizeof(*order));
    for (int64_t r = 0; kept && order && r < a->rows; r++) {
        if (a->labels[r] < 0)
            continue;
        const real *z = (const real *)a->logits + r * n;
        int64_t at = a->at[r];
        acc all = CQ_FN(log_sum_exp)(z, n, NULL, true);
        CQ_FN(keep_largest)(kept, order, z, n, a->k);
        for (int64_t i = 0; i < a->k; i++) {
            a->ids[at * a->k + i] = (int32_t)order[i].id;
            ((real *)a->log_p)[at * a->k + i] = (real)((acc)z[order[i].id] - all);
        }
        ((real *)a->log_tail)[at] = (real)(CQ_FN(log_sum_exp)(z, n, kept, false) - all);
        if (a->log_label)
            ((real *)a->log_label)[at] = (real)((acc)z[a->labels[r]] - all);
    }
    int status = kept && order ? CQ_OK
                               : cq_fail(CQ_ENOMEM, "top_logits: no memory to rank %lld logits",
                                         (long long)n);
    free(kept);
    free(order);
    return status;
}

/* log p of the k entries of a cached row; returns the mass of all but the first `top`. */
static acc CQ_FN(cached_log_p)(const cq_kl_cached_args *a, int64_t at, int64_t top, acc *log_p) {
    acc tail = (acc)((const real *)a->log_tail)[at], sum = 0, rest = exp(tail);
    for (int64_t i = 0; i < a->k; i++) {
        float half = 0;
        if (a->half)
            cq_convert(&half, CQ_F32, (const uint16_t *)a->log_p + at * a->k + i, CQ_F16, 1);
        log_p[i] = a->half ? (acc)half : (acc)((const real *)a->log_p)[at * a->k + i];
    }
    acc largest = log_p[0];
    for (int64_t i = 0; i < a->k; i++)
        sum += exp(log_p[i] - largest);
    acc shift = log(-expm1(tail)) - log(sum) - largest;
    for (int64_t i = 0; i < a->k; i++) {
        log_p[i] += shift;
        rest += i < top ? 0 : exp(log_p[i]);
    }
    return rest;
}

/* One row; `kept` marks S, `log_p` holds the k entries of the teacher. */
static void CQ_FN(cached_row)(const cq_kl_cached_args *a, int64_t at, real *zs, int64_t top,
                              const bool *kept, acc *log_p) {
    const int32_t *ids = a->ids + at * a->k;
    bool alone = a->form == CQ_KL_RENORMALIZED || top == a->vocab;
    bool bucket = a->form == CQ_KL_TAIL_BUCKET && !alone;
    acc rest = CQ_FN(cached_log_p)(a, at, top, log_p), mass = 0, value = 0;
    acc ls = CQ_FN(log_sum_exp)(zs, a->vocab, alone ? kept : NULL, true);
    acc tail_s = CQ_FN(log_sum_exp)(zs, a->vocab, kept, false);
    for (int64_t i = 0; i < top; i++)
        mass += exp(log_p[i]);
    for (int64_t i = 0; i < top; i++) {
        log_p[i] -= alone ? log(mass) : 0;
        if (exp(log_p[i]) > 0)
            value += exp(log_p[i]) * (log_p[i] - ((acc)zs[ids[i]] - ls));
    }
    if (bucket && rest > 0)
        value += rest * (log(rest) - (tail_s - ls));
    *a->sum += (double)value;
    if (!a->gradient)
        return;
    for (int64_t j = 0; j < a->vocab; j++) {
        acc q = exp((acc)zs[j] - ls), outside = alone ? 0 : q * mass;
        if (bucket)
            outside = q - (rest > 0 ? rest * exp((acc)zs[j] - tail_s) : 0);
        zs[j] = (real)((acc)a->scale * (kept[j] ? alone || bucket ? q : q * mass : outside));
    }
    for (int64_t i = 0; i < top; i++)
        zs[ids[i]] = (real)((acc)zs[ids[i]] - (acc)a->scale * exp(log_p[i]));
}

static void CQ_FN(cached_counts)(const cq_kl_cached_args *a, int64_t r, int64_t at,
                                 const real *zs) {
    if (a->nll_teacher && a->log_label)
        *a->nll_teacher -= (double)((const real *)a->log_label)[at];
    if (a->nll_student)
        *a->nll_student +=
            (double)(CQ_FN(log_sum_exp)(zs, a->vocab, NULL, true) - (acc)zs[a->labels[r]]);
    if (a->agree)
        *a->agree += a->ids[at * a->k] == CQ_FN(arg_max)(zs, a->vocab);
    if (a->valid)
        *a->valid += 1;
}

static int CQ_FN(kl_cached)(const cq_kl_cached_args *a) {
    bool whole = a->form == CQ_KL_FULL || a->top_k >= a->vocab;
    int64_t top = whole ? a->vocab : a->top_k;
    if (top < 1 || top > a->k || a->k > a->vocab)
        return cq_fail(CQ_EUSAGE, "kl_cached: top_k is %lld of %lld, wanted 1 to %lld",
                       (long long)top, (long long)a->vocab, (long long)a->k);
    CQ_TRY(CQ_FN(check_labels)(a->labels, a->rows, a->vocab));
    bool *kept = cq_ref_zeros(a->vocab, sizeof(*kept));
    acc *log_p = cq_ref_zeros(a->k, sizeof(*log_p));
    for (int64_t r = 0; kept && log_p && r < a->rows; r++) {
        real *zs = (real *)a->student + r * a->vocab;
        if (a->labels[r] < 0) {
            if (a->gradient)
                memset(zs, 0, (size_t)a->vocab * sizeof(*zs));
            continue;
        }
        int64_t at = a->at[r];
        memset(kept, 0, (size_t)a->vocab * sizeof(*kept));
        for (int64_t i = 0; i < top; i++)
            kept[a->ids[at * a->k + i]] = true;
        CQ_FN(cached_counts)(a, r, at, zs);
        CQ_FN(cached_row)(a, at, zs, top, kept, log_p);
    }
    int status = kept && log_p ? CQ_OK
                               : cq_fail(CQ_ENOMEM, "kl_cached: no memory for %lld logits",
                                         (long long)a->vocab);
    free(kept);
    free(log_p);
    return status;
}

static int CQ_FN(cross_entropy)(const cq_cross_entropy_args *a) {
    CQ_TRY(CQ_FN(check_labels)(a->labels, a->rows, a->vocab));
    for (int64_t r = 0; r < a->rows; r++) {
        real *z = (real *)a->logits + r * a->vocab;
        int32_t label = a->labels[r];
        if (label < 0) {
            if (a->gradient)
                memset(z, 0, (size_t)a->vocab * sizeof(*z));
            continue;
        }
        acc lse = CQ_FN(log_sum_exp)(z, a->vocab, NULL, true);
        acc weight = a->weights ? (acc)a->weights[r] : 1;
        *a->sum += (double)(weight * (lse - (acc)z[label]));
        if (a->correct)
            *a->correct += CQ_FN(arg_max)(z, a->vocab) == label;
        if (a->valid)
            *a->valid += 1;
        for (int64_t j = 0; a->gradient && j < a->vocab; j++)
            z[j] = (real)((acc)a->scale * weight * (exp((acc)z[j] - lse) - (j == label)));
    }
    return CQ_OK;
}
