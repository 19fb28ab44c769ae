/* test_ref_route.c - the reference router and the row movements around it: gather, combine,
   scatter, embedding. Routing is compared with a plain sort of the choices. */
#include "tests/ref_check.h"

typedef struct router {
    int64_t tokens, experts, top_k, n_group, topk_group;
    bool normalize;
    double *logits;
    float *bias;
    int32_t *sel;
    double *weight;
} router;

static router router_open(int64_t tokens, int64_t experts, int64_t top_k, int64_t n_group,
                          int64_t topk_group, uint64_t seed) {
    router r = {tokens, experts, top_k, n_group, topk_group, true, NULL, NULL, NULL, NULL};
    double *bias = finite_normal(experts, seed, 2, 0.4, 0);
    r.logits = finite_normal(tokens * experts, seed, 1, 1.5, 0);
    r.bias = finite_narrow(bias, experts);
    r.sel = calloc((size_t)(tokens * top_k), sizeof(*r.sel));
    r.weight = finite_zeros(tokens * top_k);
    free(bias);
    return r;
}

static void router_close(router *r) {
    free(r->logits);
    free(r->bias);
    free(r->sel);
    free(r->weight);
}

static void route(router *r) {
    REF(route_forward, .tokens = r->tokens, .experts = r->experts, .top_k = r->top_k,
        .n_group = r->n_group, .topk_group = r->topk_group, .normalize = r->normalize,
        .scaling = 2.5, .logits = r->logits, .bias = r->bias, .sel = r->sel, .weight = r->weight);
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* Experts by falling choice, the lower index first of equals; a losing group comes last. */
static void rank_experts(const router *r, int64_t t, int32_t *order) {
    double choice[64], best[64];
    int64_t size = r->experts / r->n_group;
    for (int64_t e = 0; e < r->experts; e++)
        choice[e] = sigmoid(r->logits[t * r->experts + e]) + (double)r->bias[e];
    for (int64_t g = 0; g < r->n_group; g++) {
        best[g] = -INFINITY;
        for (int64_t i = g * size; i < (g + 1) * size; i++)
            for (int64_t j = g * size; j < i; j++)
                best[g] = fmax(best[g], choice[i] + choice[j]);
    }
    for (int64_t g = 0; g < r->n_group; g++) {
        int64_t above = 0;
        for (int64_t h = 0; h < r->n_group; h++)
            above += best[h] > best[g] || (best[h] == best[g] && h < g);
        for (int64_t e = g * size; above >= r->topk_group && e < (g + 1) * size; e++)
            choice[e] = -INFINITY;
    }
    for (int64_t e = 0; e < r->experts; e++) {
        int64_t above = 0;
        for (int64_t f = 0; f < r->experts; f++)
            above += choice[f] > choice[e] || (choice[f] == choice[e] && f < e);
        order[above] = (int32_t)e;
    }
}

static int64_t check_routing(const router *r) {
    int64_t moved = 0;
    for (int64_t t = 0; t < r->tokens; t++) {
        int32_t order[64];
        double sum = 0;
        rank_experts(r, t, order);
        for (int64_t j = 0; j < r->top_k; j++) {
            cr_assert_eq(r->sel[t * r->top_k + j], order[j], "token %lld slot %lld", (long long)t,
                         (long long)j);
            sum += sigmoid(r->logits[t * r->experts + order[j]]);
        }
        for (int64_t j = 0; j < r->top_k; j++) {
            double s = sigmoid(r->logits[t * r->experts + order[j]]);
            check_near(r->weight[t * r->top_k + j], r->normalize ? 2.5 * s / sum : 2.5 * s, 1e-14,
                       "weight");
            for (int64_t e = 0; e < r->experts; e++)
                moved += r->logits[t * r->experts + e] > r->logits[t * r->experts + order[j]];
        }
    }
    return moved;
}

Test(route, selects_by_biased_choice_and_weights_without_the_bias) {
    const int64_t groups[][2] = {{1, 1}, {2, 1}, {4, 2}, {4, 4}};
    for (int i = 0; i < 8; i++) {
        router r = router_open(50, 16, 4, groups[i >> 1][0], groups[i >> 1][1], 60 + (uint64_t)i);
        r.normalize = i & 1;
        route(&r);
        cr_expect_gt(check_routing(&r), 200, "the bias must change the selection, seed %d", 60 + i);
        router_close(&r);
    }
}

Test(route, ties_go_to_the_lowest_expert_and_group) {
    router r = router_open(1, 8, 3, 2, 1, 70);
    memset(r.logits, 0, 8 * sizeof(*r.logits));
    memset(r.bias, 0, 8 * sizeof(*r.bias));
    route(&r);
    for (int j = 0; j < 3; j++) {
        cr_expect_eq(r.sel[j], j);
        check_near(r.weight[j], 2.5 / 3, 1e-15, "weight");
    }
    r.logits[6] = 1;
    route(&r);
    cr_expect_eq(r.sel[0], 6);
    cr_expect_eq(r.sel[1], 4);
    cr_expect_eq(r.sel[2], 5);
    router_close(&r);
}

/* Group 0 holds the best expert, group 1 the better pair; negative choices must not lose to the
   mask of group 0. */
Test(route, a_group_is_ranked_by_its_two_best_and_losers_never_return) {
    router r = router_open(1, 4, 2, 2, 1, 71);
    const double logits[4] = {3, -3, 1, 1};
    memcpy(r.logits, logits, sizeof(logits));
    for (int e = 0; e < 4; e++)
        r.bias[e] = -2;
    route(&r);
    cr_expect_eq(r.sel[0], 2);
    cr_expect_eq(r.sel[1], 3);
    router_close(&r);
}

Test(route, values_that_are_not_numbers_still_give_valid_distinct_experts) {
    router r = router_open(1, 8, 3, 2, 1, 72);
    for (int e = 0; e < 8; e++)
        r.logits[e] = NAN;
    route(&r);
    for (int j = 0; j < 3; j++)
        cr_expect(r.sel[j] >= 0 && r.sel[j] < 8 && r.sel[j] != r.sel[(j + 1) % 3], "slot %d", j);
    router_close(&r);
}

Test(route, impossible_counts_are_refused) {
    const int64_t wrong[][5] = {{8, 9, 1, 1, 0}, {8, 5, 2, 1, 0}, {8, 2, 3, 1, 0}, {8, 0, 1, 1, 0},
                                {8, 2, 2, 3, 0}, {8, 2, 0, 1, 0}, {8, 2, 2, 0, 0}};
    double logits[8] = {0}, weight[9];
    float bias[8] = {0};
    int32_t sel[9];
    for (int i = 0; i < 7; i++)
        cr_expect_eq(REF_STATUS(route_forward, .dtype = CQ_F64, .tokens = 1, .experts = wrong[i][0],
                                .top_k = wrong[i][1], .n_group = wrong[i][2],
                                .topk_group = wrong[i][3], .logits = logits, .bias = bias,
                                .sel = sel, .weight = weight),
                     CQ_ESHAPE, "case %d", i);
}

static int route_weights(const void *args) {
    route((router *)(uintptr_t)args);
    return CQ_OK;
}

Test(route, gradient_equals_finite_differences_and_is_zero_elsewhere) {
    for (int i = 0; i < 4; i++) {
        router r = router_open(5, 8, 3, i & 2 ? 2 : 1, 1, 73);
        r.normalize = i & 1;
        double *dweight = finite_normal(15, 74, 0, 1, 0), dlogits[40];
        route(&r);
        REF(route_backward, .tokens = 5, .experts = 8, .top_k = 3, .normalize = r.normalize,
            .scaling = 2.5, .logits = r.logits, .sel = r.sel, .dweight = dweight,
            .dlogits = dlogits);
        finite_check(r.normalize ? "normalized weights" : "plain weights",
                     &(finite_forward){route_weights, &r, r.weight, dweight, 15},
                     &(finite_input){"logits", r.logits, dlogits, 40, 1}, 1);
        int nonzero = 0;
        for (int k = 0; k < 40; k++)
            nonzero += dlogits[k] != 0;
        cr_expect_eq(nonzero, 15);
        router_close(&r);
        free(dweight);
    }
}

Test(route_sort, orders_pairs_by_expert_and_keeps_token_order) {
    enum { TOKENS = 40, EXPERTS = 6, K = 2, N = TOKENS * K };
    int32_t sel[N], token[N], position[N];
    int64_t offsets[EXPERTS + 1];
    for (int i = 0; i < N; i++) /* expert 3 gets nothing */
        sel[i] = (int32_t[]){0, 1, 2, 4, 5}[cq_random_below(75, 0, (uint64_t)i, 5)];
    OK(REF_STATUS(route_sort, .tokens = TOKENS, .experts = EXPERTS, .top_k = K, .sel = sel,
                  .offsets = offsets, .token = token, .position = position));
    cr_expect_eq(offsets[0], 0);
    cr_expect_eq(offsets[EXPERTS], N);
    cr_expect_eq(offsets[3], offsets[4]);
    bool seen[N] = {false};
    for (int i = 0; i < N; i++) {
        cr_assert(position[i] >= 0 && position[i] < N && !seen[position[i]]);
        seen[position[i]] = true;
        cr_expect_eq(token[position[i]], i / K);
        cr_expect(position[i] >= offsets[sel[i]] && position[i] < offsets[sel[i] + 1]);
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < i; j++)
            cr_expect(sel[i] != sel[j] || position[i] > position[j]);
    sel[7] = EXPERTS;
    cr_expect_eq(REF_STATUS(route_sort, .tokens = TOKENS, .experts = EXPERTS, .top_k = K,
                            .sel = sel, .offsets = offsets, .token = token, .position = position),
                 CQ_EDATA);
}

enum { TOKENS = 5, K = 2, ROWS = TOKENS * K, DIM = 16 };
static const int32_t position[ROWS] = {3, 8, 0, 9, 1, 5, 2, 6, 4, 7};
static const int32_t token[ROWS] = {1, 2, 3, 0, 4, 2, 3, 4, 0, 1};

typedef struct combination {
    double *y, *weight, *out;
} combination;

static int combine(const void *args) {
    const combination *c = args;
    for (int i = 0; i < TOKENS * DIM; i++)
        c->out[i] = 1;
    REF(combine_forward, .tokens = TOKENS, .top_k = K, .dim = DIM, .y = c->y, .weight = c->weight,
        .position = position, .out = c->out);
    return CQ_OK;
}

Test(combine, adds_weighted_rows_and_its_gradients_equal_finite_differences) {
    double out[TOKENS * DIM], dy[ROWS * DIM], dweight[ROWS];
    combination c = {finite_normal(ROWS * DIM, 80, 0, 1, 0), finite_normal(ROWS, 81, 0, 1, 0), out};
    double *dout = finite_normal(TOKENS * DIM, 82, 0, 1, 0);
    combine(&c);
    for (int t = 0; t < TOKENS; t++)
        for (int d = 0; d < DIM; d++)
            check_near(out[t * DIM + d],
                       1 + c.weight[t * K] * c.y[position[t * K] * DIM + d] +
                           c.weight[t * K + 1] * c.y[position[t * K + 1] * DIM + d],
                       1e-14, "combined");
    REF(combine_backward, .tokens = TOKENS, .top_k = K, .dim = DIM, .y = c.y, .weight = c.weight,
        .dout = dout, .position = position, .dy = dy, .dweight = dweight);
    const finite_input inputs[] = {{"y", c.y, dy, ROWS * DIM, 1},
                                   {"weight", c.weight, dweight, ROWS, 1}};
    finite_check("combine, seeds 80 81 82", &(finite_forward){combine, &c, out, dout, TOKENS * DIM},
                 inputs, 2);
    free(c.y);
    free(c.weight);
    free(dout);
}

Test(rows, ungather_is_the_adjoint_of_gather) {
    double *x = finite_normal(TOKENS * DIM, 83, 0, 1, 0),
           *dy = finite_normal(ROWS * DIM, 84, 0, 1, 0);
    double y[ROWS * DIM], dx[TOKENS * DIM];
    for (int i = 0; i < TOKENS * DIM; i++)
        dx[i] = 2;
    REF(gather_rows, .rows = ROWS, .dim = DIM, .x = x, .index = token, .y = y);
    for (int i = 0; i < ROWS; i++)
        cr_expect_arr_eq(y + i * DIM, x + token[i] * DIM, DIM * sizeof(*y), "row %d", i);
    REF(ungather_rows, .tokens = TOKENS, .top_k = K, .dim = DIM, .dy = dy, .position = position,
        .dx = dx);
    double twice = 0;
    for (int i = 0; i < TOKENS * DIM; i++)
        twice += 2 * x[i];
    check_near(check_dot(dx, x, TOKENS * DIM) - twice, check_dot(dy, y, ROWS * DIM), 1e-12, "dot");
    for (int t = 0; t < TOKENS; t++)
        check_near(dx[t * DIM], 2 + dy[position[t * K] * DIM] + dy[position[t * K + 1] * DIM],
                   1e-14, "added");
    free(x);
    free(dy);
}

Test(rows, gathered_rows_are_quantized_by_their_group) {
    double *x = finite_normal(TOKENS * DIM, 85, 0, 1, 0);
    double y[ROWS * DIM], yq[ROWS * DIM], alone[ROWS * DIM], want[ROWS * DIM];
    const int64_t offsets[] = {0, 4, 4, ROWS};
    float amax[3] = {3, 0, 0.5f};
    int64_t saturated[3] = {0, 0, 0};
    cq_fq fq = {.amax = amax, .offsets = offsets, .n_groups = 3, .saturated = &saturated[0]};
    REF(gather_rows, .rows = ROWS, .dim = DIM, .x = x, .index = token, .y = y, .yq = yq, .fq = fq);
    fq.saturated = &saturated[1];
    REF(gather_rows, .rows = ROWS, .dim = DIM, .x = x, .index = token, .yq = alone, .fq = fq);
    fq.saturated = &saturated[2];
    REF(fake_quant, .rows = ROWS, .cols = DIM, .x = y, .y = want, .fq = fq);
    cr_expect_arr_eq(yq, want, sizeof(want));
    cr_expect_arr_eq(alone, want, sizeof(want));
    int64_t above = 0;
    for (int i = 0; i < ROWS; i++) {
        double most = 0;
        for (int d = 0; d < DIM; d++)
            most = fmax(most, fabs(y[i * DIM + d]));
        above += most > (double)amax[i < 4 ? 0 : 2];
    }
    cr_expect_gt(above, 4);
    for (int i = 0; i < 3; i++)
        cr_expect_eq(saturated[i], above, "%lld saturated, wanted %lld", (long long)saturated[i],
                     (long long)above);
    free(x);
}

Test(rows, scatter_adds_to_the_named_rows_only) {
    double x[4 * DIM], *y = finite_normal(2 * DIM, 86, 0, 1, 0);
    const int32_t index[] = {3, 1};
    for (int i = 0; i < 4 * DIM; i++)
        x[i] = 5;
    REF(scatter_rows, .rows = 2, .dim = DIM, .y = y, .index = index, .x = x);
    for (int d = 0; d < DIM; d++) {
        cr_expect_eq(x[d], 5);
        cr_expect_eq(x[2 * DIM + d], 5);
        cr_expect_eq(x[3 * DIM + d], 5 + y[d]);
        cr_expect_eq(x[DIM + d], 5 + y[DIM + d]);
    }
    free(y);
}

Test(embed, looks_rows_up_and_adds_gradients_of_repeated_ids) {
    const int32_t ids[] = {2, 0, 2, 3};
    double *table = finite_normal(4 * DIM, 87, 0, 1, 0), *dh = finite_normal(4 * DIM, 88, 0, 1, 0);
    double h[4 * DIM], dtable[4 * DIM];
    for (int i = 0; i < 4 * DIM; i++)
        dtable[i] = 1;
    REF(embed_forward, .tokens = 4, .dim = DIM, .vocab = 4, .ids = ids, .table = table, .h = h);
    REF(embed_backward, .tokens = 4, .dim = DIM, .vocab = 4, .ids = ids, .dh = dh,
        .dtable = dtable);
    for (int t = 0; t < 4; t++)
        cr_expect_arr_eq(h + t * DIM, table + ids[t] * DIM, DIM * sizeof(*h), "token %d", t);
    for (int d = 0; d < DIM; d++) {
        cr_expect_eq(dtable[d], 1 + dh[DIM + d]);
        cr_expect_eq(dtable[DIM + d], 1);
        cr_expect_eq(dtable[2 * DIM + d], 1 + dh[d] + dh[2 * DIM + d]);
    }
    free(table);
    free(dh);
}

Test(embed, token_ids_outside_the_vocabulary_are_refused) {
    double table[2 * DIM] = {0}, h[DIM];
    const int32_t wrong[] = {-1, 2};
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(REF_STATUS(embed_forward, .dtype = CQ_F64, .tokens = 1, .dim = DIM, .vocab = 2,
                                .ids = &wrong[i], .table = table, .h = h),
                     CQ_EDATA);
        cr_expect_eq(REF_STATUS(embed_backward, .dtype = CQ_F64, .tokens = 1, .dim = DIM,
                                .vocab = 2, .ids = &wrong[i], .dh = h, .dtable = table),
                     CQ_EDATA);
    }
}
