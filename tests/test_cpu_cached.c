/* test_cpu_cached.c - KL against a cached teacher on the cpu backend, and what it is cached by,
 * against ref in F64; with WAYS_CUDA the same of a device. */
#include "tests/three_ways.h"

enum { SEEDS = WAYS_SEEDS(2, 8) }; /* a sum is one number: few seeds are luck */

/* Labels with gaps; at[r] counts the labelled rows. Returns how many. */
static int64_t draw(int32_t *labels, int32_t *at, int64_t rows, int64_t vocab, uint64_t seed) {
    int64_t n = 0;
    for (int64_t i = 0; i < rows; i++) {
        labels[i] = i % 5 == 2 ? -100 : (int32_t)cq_random_below(seed, 99, (uint64_t)i, vocab);
        at[i] = labels[i] < 0 ? -1 : (int32_t)n++;
    }
    return n;
}

static void run(ways *w, cq_kl_form form, int64_t rows, int64_t vocab, int64_t k, int64_t top,
                double size, bool half) {
    int32_t *labels = malloc((size_t)rows * 8), *at = labels + rows;
    cr_assert_not_null(labels);
    int64_t n = draw(labels, at, rows, vocab, w->seed);
    int32_t *ids = malloc((size_t)(n * k) * sizeof *ids);
    uint16_t *rounded = malloc((size_t)(n * k) * sizeof *rounded);
    float *t = malloc((size_t)(rows * vocab) * sizeof *t), *log_p = malloc((size_t)(n * k) * 4);
    cr_assert(ids && rounded && t && log_p);
    for (int64_t i = 0; i < rows * vocab; i++)
        t[i] = (float)(size * cq_random_normal(w->seed, 50, (uint64_t)i));
    snprintf(w->what, sizeof w->what, "cached kl form %d, top %lld of %lld of %lld, half %d, %llu",
             (int)form, (long long)top, (long long)k, (long long)vocab, half,
             (unsigned long long)w->seed);
    cq_kl_cached_args a = {.rows = rows,
                           .vocab = vocab,
                           .form = form,
                           .top_k = top,
                           .k = k,
                           .ids = ids,
                           .half = half,
                           .at = at,
                           .labels = labels,
                           .scale = 0.37,
                           .gradient = true};
    float *tail = WAYS_IN(w, kl_cached, log_tail, 1, n, n, 1.0);
    float *of_label = WAYS_IN(w, kl_cached, log_label, 1, n, n, 1.0);
    cq_top_logits_args top_args = {.dtype = CQ_F32,
                                   .rows = rows,
                                   .vocab = vocab,
                                   .k = k,
                                   .logits = t,
                                   .labels = labels,
                                   .at = at,
                                   .ids = ids,
                                   .log_p = log_p,
                                   .log_tail = tail,
                                   .log_label = of_label};
    cr_assert_eq(cq_ref_top_logits(NULL, &top_args), CQ_OK, "%s", cq_error());
    cr_assert_eq(cq_convert(rounded, CQ_F16, log_p, CQ_F32, n * k), CQ_OK);
    a.log_p = rounded;
    if (!half)
        memcpy(WAYS_IN(w, kl_cached, log_p, n, k, k, 1.0), log_p, (size_t)(n * k) * 4);
    float *s = WAYS_OUT(w, kl_cached, student, rows, vocab, vocab, 3);
    for (int64_t i = 0; i < rows * vocab; i++)
        s[i] = t[i] + 0.2f * s[i];
    WAYS_DOUBLE(w, kl_cached, sum, 1);
    WAYS_DOUBLE(w, kl_cached, nll_teacher, 1);
    WAYS_DOUBLE(w, kl_cached, nll_student, 1);
    WAYS_RAW(w, kl_cached, labels, rows * 4);
    WAYS_RAW(w, kl_cached, at, rows * 4);
    WAYS_RAW(w, kl_cached, ids, n * k * 4);
    if (half)
        WAYS_RAW(w, kl_cached, log_p, n * k * 2);
    WAYS_RUN(w, kl_cached, a);
    free(labels);
    free(ids);
    free(rounded);
    free(t);
    free(log_p);
}

static void check(cq_kl_form form, int64_t rows, int64_t vocab, int64_t k, int64_t top, double size,
                  uint64_t seed) {
    for (int half = 0; half < 2; half++) {
        ways w = {.seed = 0};
        for (w.at = -1; ways_next(&w.at); ways_judge(&w))
            for (w.seed = seed; w.seed < seed + SEEDS; w.seed++, w.drawn = 0)
                run(&w, form, rows, vocab, k, top, size, half);
    }
}

Test(cpu_cached, kl_agrees_with_ref_in_every_form) {
    for (cq_kl_form form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++) {
        uint64_t seed = 200 + 100 * (uint64_t)form;
        check(form, 25, 130, 16, 16, 3.0, seed);
        check(form, 25, 130, 16, 5, 3.0, seed + 10);
        check(form, 25, 130, 129, 129, 3.0, seed + 20);
        check(form, 25, 130, 130, 130, 3.0, seed + 30);
        check(form, WAYS_PICK(2, 4), WAYS_PICK(1001, 5003), 900, 700, 6.0, seed + 40);
    }
    check(CQ_KL_FULL, 9, 131, 131, 131, 5.0, 600);
}

Test(cpu_cached, the_largest_logits_are_those_of_ref) {
    enum { ROWS = 70, VOCAB = 300 };
    static float z[ROWS * VOCAB], p[2][ROWS * VOCAB], tail[2][ROWS], label[2][ROWS];
    static int32_t labels[ROWS], at[ROWS], ids[2][ROWS * VOCAB];
    const int64_t ks[] = {1, 7, 64, VOCAB - 1, VOCAB};
    int64_t n = draw(labels, at, ROWS, VOCAB, 9);
    for (int i = 0; i < ROWS * VOCAB; i++) /* with many equals */
        z[i] = rintf(8.0f * (float)cq_random_normal(8, 1, (uint64_t)i)) / 4.0f;
    ways w = {.seed = 0};
    cq_stream stream = ways_stream(&w, CPU_WAY);
    for (int c = 0; c < 5; c++) {
        int64_t size = 4 * n * ks[c];
        for (int way = 0; way < 2; way++) {
            cq_top_logits_args a = {.dtype = CQ_F32,
                                    .rows = ROWS,
                                    .vocab = VOCAB,
                                    .k = ks[c],
                                    .logits = z,
                                    .labels = labels,
                                    .at = at,
                                    .ids = ids[way],
                                    .log_p = p[way],
                                    .log_tail = tail[way],
                                    .log_label = label[way]};
            cr_assert_eq(way ? WAYS_CALL(&stream, top_logits, a, WAYS_AT(logits, sizeof z),
                                         WAYS_AT(labels, sizeof labels), WAYS_AT(at, sizeof at),
                                         WAYS_AT(ids, size), WAYS_AT(log_p, size),
                                         WAYS_AT(log_tail, sizeof tail[0]),
                                         WAYS_AT(log_label, sizeof label[0]))
                             : cq_ref_top_logits(NULL, &a),
                         CQ_OK, "%s", cq_error());
        }
        cr_expect_arr_eq(ids[0], ids[1], (size_t)(n * ks[c]) * 4, "k = %d", (int)ks[c]);
        for (int64_t i = 0; i < n * ks[c]; i++)
            cr_expect(fabsf(p[0][i] - p[1][i]) <= 4e-6f, "log p of k = %d", (int)ks[c]);
        for (int64_t i = 0; i < n; i++) {
            cr_expect(fabsf(label[0][i] - label[1][i]) <= 4e-6f, "label, k = %d", (int)ks[c]);
            cr_expect(tail[0][i] == tail[1][i] || fabsf(tail[0][i] - tail[1][i]) <= 4e-6f,
                      "tail, k = %d: %g, %g", (int)ks[c], (double)tail[0][i], (double)tail[1][i]);
        }
    }
    ways_stream_free(&stream);
}

#ifndef WAYS_CUDA
Test(cpu_cached, logits_without_gradient_stay_and_agreement_is_counted) {
    enum { ROWS = 40, VOCAB = 17, K = 5 };
    float t[ROWS * VOCAB], z[ROWS * VOCAB], before[ROWS * VOCAB], p[ROWS * K], tail[ROWS];
    int32_t labels[ROWS], at[ROWS], ids[ROWS * K];
    int64_t n = draw(labels, at, ROWS, VOCAB, 3), agree[2] = {0}, valid = 10;
    double sum = 0;
    for (int i = 0; i < ROWS * VOCAB; i++) {
        t[i] = (float)cq_random_below(1, 1, (uint64_t)i, 6);
        z[i] = (float)cq_random_below(1, 2, (uint64_t)i, 6);
    }
    memcpy(before, z, sizeof z);
    cq_stream s = {.threads = 2};
    cq_top_logits_args take = {.dtype = CQ_F32,
                               .rows = ROWS,
                               .vocab = VOCAB,
                               .k = K,
                               .logits = t,
                               .labels = labels,
                               .at = at,
                               .ids = ids,
                               .log_p = p,
                               .log_tail = tail};
    cr_assert_eq(cq_cpu_top_logits(&s, &take), CQ_OK);
    cq_kl_cached_args a = {.dtype = CQ_F32,
                           .rows = ROWS,
                           .vocab = VOCAB,
                           .form = CQ_KL_TAIL_BUCKET,
                           .top_k = K,
                           .k = K,
                           .ids = ids,
                           .log_p = p,
                           .log_tail = tail,
                           .at = at,
                           .student = z,
                           .labels = labels,
                           .sum = &sum,
                           .agree = &agree[0],
                           .valid = &valid};
    cr_assert_eq(cq_cpu_kl_cached(&s, &a), CQ_OK);
    cr_expect_arr_eq(z, before, sizeof z);
    cr_expect_eq(valid, 10 + n);
    cq_kl_args b = {.dtype = CQ_F32,
                    .rows = ROWS,
                    .vocab = VOCAB,
                    .teacher = t,
                    .student = z,
                    .labels = labels,
                    .sum = &sum,
                    .agree = &agree[1]};
    cr_assert_eq(cq_cpu_kl(&s, &b), CQ_OK);
    cr_expect_eq(agree[0], agree[1]);
}
#endif
