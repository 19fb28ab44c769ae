/* route.inc.h - sigmoid routing of Nemotron 3 and its gradient, over `real` and `acc` (see ref.h).

   s = sigmoid(logits), choice = s + bias, the top_k largest choices of the groups that win,
   weight_j = scaling s_j / (sum of the selected s + 1e-20), or scaling s_j without normalize.
   The bias takes part in the choice only. A tie goes to the lower index, of experts and of groups,
   so teacher and student break it alike; sel is ordered by falling choice.
   Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, Nemotron 3 router. */

static acc CQ_FN(sigmoid)(acc v) { return 1 / (1 + exp(-v)); }

/* The sum of the two best choices of experts [first, end): what a group is ranked by. */
static acc CQ_FN(group_score)(const acc *choice, int64_t first, int64_t end) {
    int64_t best = first, second = -1;
    for (int64_t e = first + 1; e < end; e++) {
        if (choice[e] > choice[best]) {
            second = best;
            best = e;
        } else if (second < 0 || choice[e] > choice[second])
            second = e;
    }
    return choice[best] + (second < 0 ? 0 : choice[second]);
}

/* Index of the largest value not yet taken, the lowest one of equals. A NaN is never larger, but
   the first free index is the start, so the result is valid whatever the values are. */
static int64_t CQ_FN(take_best)(const acc *value, bool *taken, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || value[i] > value[best]))
            best = i;
    if (best >= 0)
        taken[best] = true;
    return best;
}

static void CQ_FN(route_token)(const cq_route_forward_args *a, int64_t t, acc *s, acc *choice,
                               acc *score, bool *taken, bool *won) {
    int64_t size = a->experts / a->n_group;
    const real *logits = (const real *)a->logits + t * a->experts;
    int32_t *sel = a->sel + t * a->top_k;
    real *weight = (real *)a->weight + t * a->top_k;
    for (int64_t e = 0; e < a->experts; e++) {
        s[e] = CQ_FN(sigmoid)((acc)logits[e]);
        choice[e] = s[e] + (acc)a->bias[e];
    }
    for (int64_t g = 0; g < a->n_group; g++)
        score[g] = CQ_FN(group_score)(choice, g * size, (g + 1) * size);
    memset(won, 0, (size_t)a->n_group * sizeof(*won));
    for (int64_t i = 0; i < a->topk_group; i++)
        CQ_FN(take_best)(score, won, a->n_group);
    for (int64_t e = 0; e < a->experts; e++)
        taken[e] = !won[e / size];

    acc sum = 0;
    for (int64_t j = 0; j < a->top_k; j++) {
        sel[j] = (int32_t)CQ_FN(take_best)(choice, taken, a->experts);
        sum += s[sel[j]];
    }
    acc factor = a->normalize ? (acc)a->scaling / (sum + (acc)1e-20) : (acc)a->scaling;
    for (int64_t j = 0; j < a->top_k; j++)
        weight[j] = (real)(factor * s[sel[j]]);
}

static int CQ_FN(route_forward)(const cq_route_forward_args *a) {
    if (a->n_group < 1 || a->experts % a->n_group || a->topk_group < 1 ||
        a->topk_group > a->n_group || a->top_k < 1 ||
        a->top_k > a->topk_group * (a->experts / a->n_group))
        return cq_fail(CQ_ESHAPE, "route: top %lld of %lld experts in %lld of %lld groups",
                       (long long)a->top_k, (long long)a->experts, (long long)a->topk_group,
                       (long long)a->n_group);
    acc *values = cq_ref_zeros(2 * a->experts + a->n_group, sizeof(*values));
    bool *flags = cq_ref_zeros(a->experts + a->n_group, sizeof(*flags));
    if (values && flags)
        for (int64_t t = 0; t < a->tokens; t++)
            CQ_FN(route_token)
    (a, t, values, values + a->experts, values + 2 * a->experts, flags, flags + a->experts);
    int status = values && flags ? CQ_OK
                                 : cq_fail(CQ_ENOMEM, "route: no memory for %lld experts",
                                           (long long)a->experts);
    free(values);
    free(flags);
    return status;
}

/* dlogit_j = factor (dw_j - mean) s_j (1 - s_j) for selected j: factor = scaling / Z and
   mean = sum_k dw_k s_k / Z with normalize, else scaling and 0. The others get 0. */
static int CQ_FN(route_backward)(const cq_route_backward_args *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        const real *logits = (const real *)a->logits + t * a->experts;
        const real *dweight = (const real *)a->dweight + t * a->top_k;
        const int32_t *sel = a->sel + t * a->top_k;
        real *dlogits = (real *)a->dlogits + t * a->experts;
        acc z = (acc)1e-20, dot = 0;
        for (int64_t j = 0; j < a->top_k; j++) {
            acc s = CQ_FN(sigmoid)((acc)logits[sel[j]]);
            z += s;
            dot += (acc)dweight[j] * s;
        }
        acc factor = a->normalize ? (acc)a->scaling / z : (acc)a->scaling;
        acc mean = a->normalize ? dot / z : 0;
        memset(dlogits, 0, (size_t)a->experts * sizeof(*dlogits));
        for (int64_t j = 0; j < a->top_k; j++) {
            acc s = CQ_FN(sigmoid)((acc)logits[sel[j]]);
            dlogits[sel[j]] = (real)(factor * ((acc)dweight[j] - mean) * s * (1 - s));
        }
    }
    return CQ_OK;
}
