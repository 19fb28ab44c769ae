/* test_cpu_experts.c - routing and row moves of the cpu backend against ref in F64; with WAYS_CUDA
 * the same of a device. */
#include "tests/three_ways.h"

enum { SEEDS = WAYS_SEEDS(2, 4) };

static void check_route(int64_t tokens, int64_t experts, int64_t top_k, int64_t n_group,
                        int64_t topk_group, bool normalize, uint64_t seed) {
    ways w = {.seed = 0};
    float *bias = malloc((size_t)experts * sizeof(*bias));
    int32_t *sel = malloc((size_t)(tokens * top_k) * sizeof(*sel)), *same = NULL;
    cr_assert(bias && sel);
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + SEEDS; w.seed++, w.drawn = 0) {
            for (int64_t e = 0; e < experts; e++)
                bias[e] = (float)(0.2 * cq_random_normal(w.seed, 77, (uint64_t)e));
            cq_route_forward_args a = {.dtype = CQ_F32,
                                       .tokens = tokens,
                                       .experts = experts,
                                       .top_k = top_k,
                                       .n_group = n_group,
                                       .topk_group = topk_group,
                                       .normalize = normalize,
                                       .scaling = 2.5,
                                       .bias = bias,
                                       .sel = sel};
            snprintf(w.what, sizeof(w.what), "route %lld of %lld, %lld of %lld groups, seed %llu",
                     (long long)top_k, (long long)experts, (long long)topk_group,
                     (long long)n_group, (unsigned long long)w.seed);
            WAYS_IN(&w, route_forward, logits, tokens, experts, experts, 1.5);
            WAYS_OUT(&w, route_forward, weight, tokens, top_k, top_k, 2);
            WAYS_RAW(&w, route_forward, bias, experts * 4);
            WAYS_RAW(&w, route_forward, sel, tokens * top_k * 4);
            WAYS_RUN(&w, route_forward,
                     a); /* the last of the runs was the backend's, so sel is its choice */

            same = malloc((size_t)(tokens * top_k) * sizeof(*same));
            w.drawn = 0;
            float *logits = WAYS_IN(&w, route_backward, logits, tokens, experts, experts, 1.5);
            float *weight = malloc((size_t)(tokens * top_k) * sizeof(*weight));
            a.logits = logits, a.weight = weight, a.sel = same;
            cr_assert_eq(cq_ref_route_forward(NULL, &a), CQ_OK);
            cr_expect(memcmp(same, sel, (size_t)(tokens * top_k) * sizeof(*sel)) == 0,
                      "%s: another choice than ref's", w.what);
            free(weight);
            cq_route_backward_args b = {.tokens = tokens,
                                        .experts = experts,
                                        .top_k = top_k,
                                        .normalize = normalize,
                                        .scaling = 2.5,
                                        .sel = same};
            WAYS_IN(&w, route_backward, dweight, tokens, top_k, top_k, 1.0);
            WAYS_OUT(&w, route_backward, dlogits, tokens, experts, experts, 3);
            WAYS_RAW(&w, route_backward, sel, tokens * top_k * 4);
            WAYS_RUN(&w, route_backward, b);
            free(same);
        }
    free(bias);
    free(sel);
}
Test(cpu_experts, routing_agrees_with_ref) {
    check_route(150, 8, 2, 1, 1, true, 1400);
    check_route(60, 128, 6, 1, 1, true, 1410);
    check_route(60, 24, 3, 6, 2, true, 1420);
    check_route(60, 5, 5, 5, 5, false, 1430);
    check_route(9, 1, 1, 1, 1, true, 1440);
}

/// `n` distinct positions below n, shuffled.
static int32_t *shuffled(int64_t n, uint64_t seed) {
    int64_t *order = malloc((size_t)n * sizeof(*order));
    int32_t *out = malloc((size_t)n * sizeof(*out));
    cr_assert(order && out);
    cq_random_permutation(order, n, seed, 5);
    for (int64_t i = 0; i < n; i++)
        out[i] = (int32_t)order[i];
    free(order);
    return out;
}

static void run_rows(ways *w, int64_t tokens, int64_t top_k, int64_t dim) {
    int64_t rows = tokens * top_k;
    int32_t *position = shuffled(rows, w->seed), ids[300];
    snprintf(w->what, sizeof(w->what), "rows %lld x %lld x %lld, seed %llu", (long long)tokens,
             (long long)top_k, (long long)dim, (unsigned long long)w->seed);
    for (int64_t i = 0; i < tokens; i++)
        ids[i] = (int32_t)cq_random_below(w->seed, 6, (uint64_t)i, 23);

    WAYS_IN(w, combine_forward, y, rows, dim, dim, 1.0);
    WAYS_IN(w, combine_forward, weight, tokens, top_k, top_k, 1.0);
    WAYS_OUT(w, combine_forward, out, tokens, dim, dim, 2);
    WAYS_RAW(w, combine_forward, position, rows * 4);
    WAYS_RUN(w, combine_forward,
             ((cq_combine_forward_args){.tokens = tokens,
                                        .top_k = top_k,
                                        .dim = dim,
                                        .position = position,
                                        .act = ways_act(w, "y")}));
    WAYS_IN(w, combine_backward, y, rows, dim, dim, 1.0);
    WAYS_IN(w, combine_backward, weight, tokens, top_k, top_k, 1.0);
    WAYS_IN(w, combine_backward, dout, tokens, dim, dim, 1.0);
    WAYS_OUT(w, combine_backward, dy, rows, dim, dim, 3);
    WAYS_OUT(w, combine_backward, dweight, tokens, top_k, top_k, 3);
    WAYS_RAW(w, combine_backward, position, rows * 4);
    WAYS_RUN(w, combine_backward,
             ((cq_combine_backward_args){.tokens = tokens,
                                         .top_k = top_k,
                                         .dim = dim,
                                         .position = position,
                                         .act = ways_act(w, "y dy")}));
    WAYS_IN(w, ungather_rows, dy, rows, dim, dim, 1.0);
    WAYS_OUT(w, ungather_rows, dx, tokens, dim, dim, 3);
    WAYS_RAW(w, ungather_rows, position, rows * 4);
    WAYS_RUN(w, ungather_rows,
             ((cq_ungather_rows_args){.tokens = tokens,
                                      .top_k = top_k,
                                      .dim = dim,
                                      .position = position,
                                      .act = ways_act(w, "dy")}));
    WAYS_IN(w, scatter_rows, y, rows / 2, dim, dim, 1.0);
    WAYS_OUT(w, scatter_rows, x, rows, dim, dim, 2);
    WAYS_RAW(w, scatter_rows, index, rows / 2 * 4);
    WAYS_RUN(w, scatter_rows,
             ((cq_scatter_rows_args){.rows = rows / 2, .dim = dim, .index = position}));
    WAYS_IN(w, embed_forward, table, 23, dim, dim, 1.0);
    WAYS_OUT(w, embed_forward, h, tokens, dim, dim, 2);
    WAYS_RAW(w, embed_forward, ids, tokens * 4);
    WAYS_RUN(w, embed_forward,
             ((cq_embed_forward_args){.tokens = tokens, .dim = dim, .vocab = 23, .ids = ids}));
    WAYS_IN(w, embed_backward, dh, tokens, dim, dim, 1.0);
    WAYS_OUT(w, embed_backward, dtable, 23, dim, dim, 3);
    WAYS_RAW(w, embed_backward, ids, tokens * 4);
    WAYS_RUN(w, embed_backward,
             ((cq_embed_backward_args){.tokens = tokens, .dim = dim, .vocab = 23, .ids = ids}));
    free(position);
}
Test(cpu_experts, row_moves_agree_with_ref) {
    ways w = {.seed = 0};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = 1500; w.seed < 1500 + SEEDS; w.seed++, w.drawn = 0) {
            run_rows(&w, 61, 2, 96);
            run_rows(&w, 7, 3, 5);
            run_rows(&w, 300, 1, 33);
        }
}
#ifdef WAYS_CUDA
Test(cpu_experts, rows_of_experts_in_bf16_agree_with_ref) {
    ways w = {.act = CQ_BF16};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = 1550; w.seed < 1550 + SEEDS; w.seed++, w.drawn = 0) {
            run_rows(&w, 61, 2, 96);
            run_rows(&w, 7, 3, 5);
        }
}
#endif

Test(cpu_experts, gathered_rows_carry_the_fake_quantization_of_their_group) {
    enum { ROWS = 20, DIM = 48, SOURCES = 9 };
    float x[SOURCES * DIM], y[2][ROWS * DIM], yq[2][ROWS * DIM], amax[3] = {3.0f, 0.5f, 100.0f};
    int64_t offsets[4] = {0, 6, 6, ROWS}, saturated[2] = {0, 0};
    int32_t index[ROWS];
    for (int i = 0; i < SOURCES * DIM; i++)
        x[i] = (float)cq_random_normal(9, 1, (uint64_t)i);
    for (int i = 0; i < ROWS; i++)
        index[i] = (int32_t)cq_random_below(9, 2, (uint64_t)i, SOURCES);
    ways w = {.seed = 0};
    cq_stream s = ways_stream(&w, CPU_WAY);
    for (int i = 0; i < 2; i++) {
        cq_gather_rows_args a = {
            .dtype = CQ_F32,
            .rows = ROWS,
            .dim = DIM,
            .x = x,
            .index = index,
            .y = y[i],
            .yq = yq[i],
            .fq = {.amax = amax, .offsets = offsets, .n_groups = 3, .saturated = &saturated[i]}};
        cr_assert_eq(i ? cq_ref_gather_rows(NULL, &a)
                       : WAYS_CALL(&s, gather_rows, a, WAYS_AT(x, sizeof(x)),
                                   WAYS_AT(index, sizeof(index)), WAYS_AT(y, sizeof(y[0])),
                                   WAYS_AT(yq, sizeof(yq[0])), WAYS_AT(fq.amax, sizeof(amax)),
                                   WAYS_AT(fq.offsets, sizeof(offsets)), WAYS_AT(fq.saturated, 8)),
                     CQ_OK, "%s", cq_error());
    }
    cr_expect(memcmp(y[0], y[1], sizeof(y[0])) == 0);
    cr_expect(memcmp(yq[0], yq[1], sizeof(yq[0])) == 0, "fake quantization differs from ref's");
    cr_expect_eq(saturated[0], saturated[1]);
    cr_expect(memcmp(y[0], yq[0], sizeof(y[0])) != 0);
    ways_stream_free(&s);
}

#ifndef WAYS_CUDA /* a device's ids are not looked at by the host */
Test(cpu_experts, a_token_outside_the_vocabulary_is_an_error) {
    ways w = {.seed = 0};
    cq_stream s = ways_stream(&w, CPU_WAY);
    float table[8] = {0}, h[4];
    cr_expect_eq(CQ_RUN(&s, embed_forward, .dtype = CQ_F32, .tokens = 1, .dim = 4, .vocab = 2,
                        .ids = (int32_t[]){2}, .table = table, .h = h),
                 CQ_EDATA);
    cr_expect(strstr(cq_error(), "2"), "%s", cq_error());
    ways_stream_free(&s);
}
#endif
