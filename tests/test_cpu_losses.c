/* test_cpu_losses.c - losses on logits and hidden states of the cpu backend against ref
 * in F64; with WAYS_CUDA the same of a device. */
#include "tests/three_ways.h"

enum { SEEDS = WAYS_SEEDS(2, 4) };

static int32_t *labels_of(int64_t rows, int64_t vocab, uint64_t seed) {
    int32_t *labels = malloc((size_t)(rows + 1) * sizeof(*labels));
    cr_assert_not_null(labels);
    for (int64_t i = 0; i < rows; i++)
        labels[i] = i % 5 == 2 ? -100 : (int32_t)cq_random_below(seed, 99, (uint64_t)i, vocab);
    return labels;
}

/// Student logits are the teacher's with noise; where `ties`, logits are multiples of 1/4.
static void run_kl(ways *w, cq_kl_form form, int64_t rows, int64_t vocab, int64_t top_k,
                   double size, bool ties) {
    cq_kl_args a = {.rows = rows,
                    .vocab = vocab,
                    .form = form,
                    .top_k = top_k,
                    .scale = 0.37,
                    .gradient = true,
                    .labels = labels_of(rows, vocab, w->seed)};
    snprintf(w->what, sizeof(w->what), "kl form %d, top %lld of %lld, logits of %g, seed %llu",
             (int)form, (long long)top_k, (long long)vocab, size, (unsigned long long)w->seed);
    float *t = WAYS_IN(w, kl, teacher, rows, vocab, vocab, size);
    float *s = WAYS_OUT(w, kl, student, rows, vocab, vocab, 3);
    for (int64_t i = 0; i < rows * vocab; i++) {
        t[i] = ties ? rintf(4.0f * t[i]) / 4.0f : t[i];
        s[i] = t[i] + 0.2f * s[i];
    }
    WAYS_DOUBLE(w, kl, sum, 1);
    WAYS_DOUBLE(w, kl, nll_teacher, 1);
    WAYS_DOUBLE(w, kl, nll_student, 1);
    WAYS_RAW(w, kl, labels, rows * 4);
    WAYS_RUN(w, kl, a);
    free((void *)(uintptr_t)a.labels);
}
static void check_kl(cq_kl_form form, int64_t rows, int64_t vocab, int64_t top_k, double size,
                     bool ties, uint64_t seed) {
    ways w = {.seed = 0};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + SEEDS; w.seed++, w.drawn = 0)
            run_kl(&w, form, rows, vocab, top_k, size, ties);
}

Test(cpu_losses, full_kl_agrees_with_ref) {
    check_kl(CQ_KL_FULL, 37, 1024, 0, 3.0, false, 100);
    check_kl(CQ_KL_FULL, 70, 131, 0, 10.0, false, 110);
    check_kl(CQ_KL_FULL, 1, 1, 0, 1.0, false, 120);
    check_kl(CQ_KL_FULL, 3, 9001, 0, 5.0, false, 130);
}
Test(cpu_losses, top_k_kl_agrees_with_ref_in_every_form) {
    for (cq_kl_form form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++) {
        uint64_t seed = 200 + 100 * (uint64_t)form;
        check_kl(form, 25, 130, 16, 3.0, false, seed);
        check_kl(form, 25, 130, 1, 3.0, false, seed + 10);
        check_kl(form, 25, 130, 129, 3.0, false, seed + 20);
        check_kl(form, 25, 130, 130, 3.0, false, seed + 30);
        check_kl(form, 25, 33, 7, 1.0, true, seed + 40);
        check_kl(form, 4, 5003, 1024, 6.0, false, seed + 50);
    }
}

Test(cpu_losses, a_sure_and_wrong_student_keeps_its_gradient) {
    /* the student's logits outside S lie 200 below the top, where an exponential against one
     * maximum is zero */
    for (cq_kl_form form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++) {
        ways w = {.seed = 700 + (uint64_t)form};
        cq_kl_args a = {.rows = 1,
                        .vocab = 40,
                        .form = form,
                        .top_k = 3,
                        .scale = 1.0,
                        .gradient = true,
                        .labels = (int32_t[]){5}};
        snprintf(w.what, sizeof(w.what), "sure and wrong, form %d", (int)form);
        float *t = WAYS_IN(&w, kl, teacher, 1, 40, 40, 1.0);
        float *s = WAYS_OUT(&w, kl, student, 1, 40, 40, 3);
        for (int i = 0; i < 3; i++)
            t[7 * i] = 1.5f + t[7 * i];
        for (int i = 0; i < 40; i++)
            s[i] -= i == 20 ? 0.0f : 200.0f;
        WAYS_DOUBLE(&w, kl, sum, 1);
        WAYS_RAW(&w, kl, labels, 4);
        WAYS_RUN(&w, kl, a);
        ways_judge(&w);
    }
}

Test(cpu_losses, kl_counts_agreement_and_valid_rows_and_leaves_logits_without_gradient) {
    enum { ROWS = 90, VOCAB = 17 };
    float t[ROWS * VOCAB], s[ROWS * VOCAB], before[ROWS * VOCAB];
    int32_t *labels = labels_of(ROWS, VOCAB, 3);
    for (int i = 0; i < ROWS * VOCAB; i++) {
        t[i] = (float)cq_random_below(1, 1, (uint64_t)i, 6);
        s[i] = (float)cq_random_below(1, 2, (uint64_t)i, 6);
    }
    memcpy(before, s, sizeof(s));
    ways w = {.seed = 0};
    cq_stream stream = ways_stream(&w, CPU_WAY);
    double sum[2] = {0}, nll[2] = {0};
    int64_t agree[2] = {0}, valid[2] = {0};
    for (int i = 0; i < 2; i++) {
        cq_kl_args a = {.dtype = CQ_F32,
                        .rows = ROWS,
                        .vocab = VOCAB,
                        .form = CQ_KL_TAIL_BUCKET,
                        .top_k = 4,
                        .teacher = t,
                        .student = s,
                        .labels = labels,
                        .scale = 1.0,
                        .sum = &sum[i],
                        .nll_student = &nll[i],
                        .agree = &agree[i],
                        .valid = &valid[i]};
        cr_assert_eq(i ? cq_ref_kl(NULL, &a)
                       : WAYS_CALL(&stream, kl, a, WAYS_AT(teacher, sizeof(t)),
                                   WAYS_AT(student, sizeof(s)), WAYS_AT(labels, ROWS * 4),
                                   WAYS_AT(sum, 8), WAYS_AT(nll_student, 8), WAYS_AT(agree, 8),
                                   WAYS_AT(valid, 8)),
                     CQ_OK, "%s", cq_error());
        cr_expect(memcmp(before, s, sizeof(s)) == 0, "logits changed without gradient");
    }
    cr_expect_eq(valid[0], valid[1]);
    cr_expect_eq(agree[0], agree[1]);
    cr_expect(agree[0] > 5 && valid[0] == 72, "agree %lld", (long long)agree[0]);
    cr_expect_float_eq(sum[0], sum[1], 1e-4);
    cr_expect_float_eq(nll[0], nll[1], 1e-4);
#ifndef WAYS_CUDA
    cq_kl_args bad = {.dtype = CQ_F32,
                      .rows = 1,
                      .vocab = VOCAB,
                      .teacher = t,
                      .student = s,
                      .labels = (int32_t[]){VOCAB},
                      .sum = sum};
    cr_expect_eq(stream.table->kl(&stream, &bad), CQ_EDATA);
#endif
    free(labels);
    ways_stream_free(&stream);
}

Test(cpu_losses, a_logit_that_is_not_a_number_shows_in_the_sum) {
    ways w = {.seed = 0};
    cq_stream stream = ways_stream(&w, CPU_WAY);
    for (int form = CQ_KL_FULL; form <= CQ_KL_TAIL_BUCKET; form++)
        for (int side = 0; side < 2; side++) {
            float t[40] = {1.0f, 2.0f, 3.0f}, s[40] = {0.5f};
            double sum = 0.0;
            (side ? s : t)[23] = NAN;
            cq_kl_args a = {.dtype = CQ_F32,
                            .rows = 1,
                            .vocab = 40,
                            .form = (cq_kl_form)form,
                            .top_k = 30,
                            .teacher = t,
                            .student = s,
                            .labels = (int32_t[]){1},
                            .scale = 1.0,
                            .sum = &sum};
            cr_assert_eq(WAYS_CALL(&stream, kl, a, WAYS_AT(teacher, sizeof(t)),
                                   WAYS_AT(student, sizeof(s)), WAYS_AT(labels, 4),
                                   WAYS_AT(sum, 8)),
                         CQ_OK, "%s", cq_error());
            cr_expect(isnan(sum), "form %d, side %d: %g", form, side, sum);
        }
    ways_stream_free(&stream);
}

Test(cpu_losses, cross_entropy_agrees_with_ref) {
    ways w = {.seed = 0};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = 1000; w.seed < 1000 + 3 * SEEDS; w.seed++, w.drawn = 0) {
            int64_t rows = 41, vocab = (int64_t[]){1024, 77, 1}[(w.seed - 1000) % 3];
            float weights[41];
            bool weighted = w.seed % 2 == 0;
            for (int64_t r = 0; r < rows; r++)
                weights[r] = (float)cq_random_normal(w.seed, 5, (uint64_t)r);
            cq_cross_entropy_args a = {.rows = rows,
                                       .vocab = vocab,
                                       .scale = 0.2,
                                       .gradient = true,
                                       .weights = weighted ? weights : NULL,
                                       .labels = labels_of(rows, vocab, w.seed)};
            snprintf(w.what, sizeof(w.what), "cross-entropy %lld, weighted %d, seed %llu",
                     (long long)vocab, weighted, (unsigned long long)w.seed);
            WAYS_OUT(&w, cross_entropy, logits, rows, vocab, vocab, 3);
            WAYS_DOUBLE(&w, cross_entropy, sum, 1);
            WAYS_RAW(&w, cross_entropy, labels, rows * 4);
            if (weighted)
                WAYS_RAW(&w, cross_entropy, weights, rows * 4);
            WAYS_RUN(&w, cross_entropy, a);
            free((void *)(uintptr_t)a.labels);
        }
}

/* Where the stream computes in BF16, Grams may be products of two BF16 parts: 13 times what FP32
   loops are off by, at most 128 times (2^-17 against 2^-24). */
enum { PARTS_TIMES = 32 };

static void check_gram(int64_t n, int64_t dim, bool unbiased, double mean, cq_compute compute,
                       uint64_t seed) {
    ways w = {.compute = compute};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + SEEDS; w.seed++, w.drawn = 0) {
            cq_gram_args a = {.n = n, .dim = dim, .unbiased = unbiased};
            snprintf(w.what, sizeof(w.what), "gram %lld x %lld, unbiased %d, seed %llu",
                     (long long)n, (long long)dim, unbiased, (unsigned long long)w.seed);
            float *x = WAYS_IN(&w, gram, x, n, dim, dim, 1.0);
            for (int64_t i = 0; i < n * dim; i++)
                x[i] += (float)(mean * (double)(i % dim % 3));
            WAYS_IN(&w, gram, scratch, n, dim, dim, 1.0);
            WAYS_OUT(&w, gram, gram, n, n, n, compute == CQ_COMPUTE_BF16 ? PARTS_TIMES : 2);
            WAYS_RUN(&w, gram, a);
        }
}
Test(cpu_losses, gram_agrees_with_ref) {
    check_gram(128, 192, true, 3.0, CQ_COMPUTE_F32, 1100);
    check_gram(128, 192, false, 3.0, CQ_COMPUTE_F32, 1110);
    check_gram(37, 530, true, 0.0, CQ_COMPUTE_F32, 1120);
    check_gram(4, 5, true, 1.0, CQ_COMPUTE_F32, 1130);
    check_gram(2, 3, false, 1.0, CQ_COMPUTE_F32, 1140);
    check_gram(65, 1, true, 0.0, CQ_COMPUTE_F32, 1150);
    check_gram(64, 200, true, 3.0, CQ_COMPUTE_BF16, 1160);
    check_gram(37, 530, false, 0.0, CQ_COMPUTE_BF16, 1170);
}

/// k and l are Grams of random rows, l's rows being k's with noise.
static void fill_grams(float *k, float *l, int64_t n, double noise, uint64_t seed) {
    enum { DIM = 20 };
    double *x = malloc((size_t)(2 * n * DIM) * sizeof(*x)), *y = x + n * DIM;
    cr_assert_not_null(x);
    for (int64_t i = 0; i < n * DIM; i++) {
        x[i] = cq_random_normal(seed, 50, (uint64_t)i);
        y[i] = x[i] + noise * cq_random_normal(seed, 51, (uint64_t)i);
    }
    cq_gram_args a = {.dtype = CQ_F64, .n = n, .dim = DIM, .unbiased = true};
    double *gram = malloc((size_t)(n * n + n * DIM) * sizeof(*gram));
    for (int side = 0; side < 2; side++) {
        a.x = side ? y : x;
        a.gram = gram;
        a.scratch = gram + n * n;
        cr_assert_eq(cq_ref_gram(NULL, &a), CQ_OK);
        for (int64_t i = 0; i < n * n; i++)
            (side ? l : k)[i] = (float)gram[i];
    }
    free(gram);
    free(x);
}

static void check_cka(cq_gram_loss loss, int64_t n, double noise, cq_compute compute,
                      uint64_t seed) {
    ways w = {.compute = compute};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + SEEDS; w.seed++, w.drawn = 0) {
            double stats[4];
            int64_t dim = compute == CQ_COMPUTE_BF16 ? 40 : 29;
            snprintf(w.what, sizeof(w.what), "cka loss %d, n %lld, noise %g, seed %llu", (int)loss,
                     (long long)n, noise, (unsigned long long)w.seed);
            cq_cka_args a = {.dtype = CQ_F32, .loss = loss, .n = n};
            float *k = WAYS_IN(&w, cka, k, n, n, n, 1.0), *l = WAYS_IN(&w, cka, l, n, n, n, 1.0);
            fill_grams(k, l, n, noise, w.seed);
            a.k = k, a.l = l, a.out = stats;
            cr_assert_eq(cq_ref_cka(NULL, &a), CQ_OK);
            WAYS_DOUBLE(&w, cka, out, 4);
            WAYS_RUN(&w, cka, ((cq_cka_args){.loss = loss, .n = n}));

            cq_cka_backward_args b = {
                .loss = loss, .n = n, .dim = dim, .weight = -1.7, .stats = stats};
            k = WAYS_IN(&w, cka_backward, k, n, n, n, 1.0);
            l = WAYS_IN(&w, cka_backward, l, n, n, n, 1.0);
            fill_grams(k, l, n, noise, w.seed);
            WAYS_IN(&w, cka_backward, x, n, dim, dim, 1.0);
            WAYS_OUT(&w, cka_backward, dx, n, dim, dim,
                     compute == CQ_COMPUTE_BF16 ? PARTS_TIMES : 3);
            WAYS_RAW(&w, cka_backward, stats, sizeof(stats));
            WAYS_RUN(&w, cka_backward, b);
        }
}
Test(cpu_losses, cka_and_gram_frobenius_agree_with_ref) {
    for (cq_gram_loss loss = CQ_GRAM_CKA; loss <= CQ_GRAM_FROBENIUS; loss++) {
        check_cka(loss, 128, 0.1, CQ_COMPUTE_F32, 1200 + 50 * (uint64_t)loss);
        check_cka(loss, 37, 1e-3, CQ_COMPUTE_F32, 1210 + 50 * (uint64_t)loss);
        check_cka(loss, 4, 3.0, CQ_COMPUTE_F32, 1220 + 50 * (uint64_t)loss);
        check_cka(loss, 64, 0.1, CQ_COMPUTE_BF16, 1230 + 50 * (uint64_t)loss);
    }
}
Test(cpu_losses, cka_of_a_zero_gram_is_zero_and_so_is_its_gradient) {
    float k[36] = {0}, l[36], x[12], dx[12];
    double out[4] = {9.0, 9.0, 9.0, 9.0};
    for (int i = 0; i < 36; i++)
        l[i] = i < 12 ? (x[i] = 1.0f) : 2.0f;
    ways w = {.seed = 0};
    cq_stream s = ways_stream(&w, CPU_WAY);
    cq_cka_args a = {.dtype = CQ_F32, .n = 6, .k = k, .l = l, .out = out};
    cr_assert_eq(WAYS_CALL(&s, cka, a, WAYS_AT(k, sizeof(k)), WAYS_AT(l, sizeof(l)),
                           WAYS_AT(out, sizeof(out))),
                 CQ_OK, "%s", cq_error());
    cr_expect(out[3] == 0.0);
    memset(dx, 1, sizeof(dx));
    cq_cka_backward_args b = {.dtype = CQ_F32,
                              .n = 6,
                              .dim = 2,
                              .k = k,
                              .l = l,
                              .x = x,
                              .weight = 1.0,
                              .stats = out,
                              .dx = dx};
    cr_assert_eq(WAYS_CALL(&s, cka_backward, b, WAYS_AT(k, sizeof(k)), WAYS_AT(l, sizeof(l)),
                           WAYS_AT(x, sizeof(x)), WAYS_AT(stats, sizeof(out)),
                           WAYS_AT(dx, sizeof(dx))),
                 CQ_OK, "%s", cq_error());
    for (int i = 0; i < 12; i++)
        cr_expect(dx[i] == 0.0f);
    ways_stream_free(&s);
}

enum { LAYERS = 3 };

/* Grams, losses and gradients of LAYERS pairs of [n, dim] by calls for `together` of them. */
typedef struct layer_results {
    float *gram[2], *dx;
    double stats[4 * LAYERS];
} layer_results;

static layer_results run_layers(cq_stream *s, cq_gram_loss loss, int64_t n, int64_t dim,
                                const float *x, int64_t together) {
    static const double weights[LAYERS] = {0.5, 0.0, -1.25};
    int64_t rows = n * dim, square = n * n, size = (int64_t)sizeof(float);
    float *scratch = calloc((size_t)(LAYERS * rows), sizeof(*scratch));
    float *pulls = calloc((size_t)(LAYERS * square), sizeof(*pulls));
    layer_results r = {.dx = calloc((size_t)(LAYERS * rows), sizeof(*r.dx))};
    for (int side = 0; side < 2; side++) {
        r.gram[side] = calloc((size_t)(LAYERS * square), sizeof(*r.gram[side]));
        for (int64_t i = 0; i < LAYERS; i += together) {
            cq_gram_args a = {.dtype = CQ_F32,
                              .batch = together,
                              .n = n,
                              .dim = dim,
                              .x = x + (side * LAYERS + i) * rows,
                              .unbiased = true,
                              .scratch = scratch,
                              .gram = r.gram[side] + i * square};
            cr_assert_eq(WAYS_CALL(s, gram, a, WAYS_AT(x, together * rows * size),
                                   WAYS_AT(scratch, together * rows * size),
                                   WAYS_AT(gram, together * square * size)),
                         CQ_OK, "%s", cq_error());
        }
    }
    for (int64_t i = 0; i < LAYERS; i += together) {
        cq_cka_args a = {.dtype = CQ_F32,
                         .loss = loss,
                         .batch = together,
                         .n = n,
                         .k = r.gram[0] + i * square,
                         .l = r.gram[1] + i * square,
                         .out = r.stats + 4 * i};
        cr_assert_eq(WAYS_CALL(s, cka, a, WAYS_AT(k, together * square * size),
                               WAYS_AT(l, together * square * size), WAYS_AT(out, together * 32)),
                     CQ_OK, "%s", cq_error());
        memcpy(pulls + i * square, a.k, (size_t)(together * square * size));
        cq_cka_backward_args b = {.dtype = CQ_F32,
                                  .loss = loss,
                                  .batch = together,
                                  .n = n,
                                  .dim = dim,
                                  .k = pulls + i * square,
                                  .l = a.l,
                                  .x = x + i * rows,
                                  .weight = weights[i],
                                  .stats = r.stats + 4 * i,
                                  .dx = r.dx + i * rows};
        b.weights = together > 1 ? weights + i : NULL;
        cr_assert_eq(WAYS_CALL(s, cka_backward, b, WAYS_AT(k, together * square * size),
                               WAYS_AT(l, together * square * size),
                               WAYS_AT(x, together * rows * size), WAYS_AT(weights, together * 8),
                               WAYS_AT(stats, together * 32), WAYS_AT(dx, together * rows * size)),
                     CQ_OK, "%s", cq_error());
    }
    free(scratch);
    free(pulls);
    return r;
}

static void check_layers(cq_gram_loss loss, int64_t n, int64_t dim, cq_compute compute,
                         uint64_t seed) {
    ways w = {.compute = compute};
    int64_t rows = n * dim;
    float *x = malloc((size_t)(2 * LAYERS * rows) * sizeof(*x));
    for (int64_t i = 0; i < 2 * LAYERS * rows; i++)
        x[i] = (float)(cq_random_normal(seed, 60, (uint64_t)(i % (LAYERS * rows))) +
                       0.2 * cq_random_normal(seed, 61, (uint64_t)i));
    for (int64_t i = 0; i < rows; i++) /* the last layer's loss has no gradient: its Gram is 0 */
        x[2 * rows + i] = 1.0f;
    for (w.at = -1; ways_next(&w.at);) {
        cq_stream s = ways_stream(&w, CPU_WAY);
        layer_results one = run_layers(&s, loss, n, dim, x, 1);
        layer_results all = run_layers(&s, loss, n, dim, x, LAYERS);
        cr_expect(memcmp(one.stats, all.stats, sizeof(one.stats)) == 0, "loss %d, n %lld: stats",
                  (int)loss, (long long)n);
        cr_expect(memcmp(one.dx, all.dx, (size_t)(LAYERS * rows) * sizeof(float)) == 0,
                  "loss %d, n %lld: gradients", (int)loss, (long long)n);
        cr_expect(all.dx[0] != 0.0f && all.stats[3] > 0.0, "n %lld: something to compare",
                  (long long)n);
        for (int side = 0; side < 2; side++) {
            cr_expect(memcmp(one.gram[side], all.gram[side],
                             (size_t)(LAYERS * n * n) * sizeof(float)) == 0,
                      "n %lld: Grams", (long long)n);
            free(one.gram[side]);
            free(all.gram[side]);
        }
        free(one.dx);
        free(all.dx);
        ways_stream_free(&s);
    }
    free(x);
}
Test(cpu_losses, layers_in_one_call_have_the_bits_they_have_alone) {
    check_layers(CQ_GRAM_CKA, 64, 40, CQ_COMPUTE_F32, 1350);
    check_layers(CQ_GRAM_CKA, 37, 29, CQ_COMPUTE_F32, 1351);
    check_layers(CQ_GRAM_CKA, 64, 40, CQ_COMPUTE_BF16, 1352);
    check_layers(CQ_GRAM_FROBENIUS, 12, 8, CQ_COMPUTE_F32, 1353);
}

/* Bit for bit: a weight from the host and one from a device must be the same. */
static void check_balance(int64_t n, bool ratio, double kl, double gap, double most) {
    double stats[4 * 300], weights[300], report[303], wanted[300], wanted_report[303];
    int32_t order[300];
    int64_t right = 17;
    double sum = kl * 90;
    for (int64_t i = 0; i < n; i++) {
        order[i] = (int32_t)(n - 1 - i);
        for (int k = 0; k < 4; k++)
            stats[4 * i + k] = gap * (1 + 0.5 * cq_random_normal(1360, (uint64_t)k, (uint64_t)i));
        weights[i] = wanted[i] = -1;
    }
    ways w = {.seed = 0};
    for (w.at = -1; ways_next(&w.at);) {
        cq_stream s = ways_stream(&w, CPU_WAY);
        cq_balance_args a = {.n = n,
                             .sum = &sum,
                             .right = &right,
                             .stats = stats,
                             .order = order,
                             .ratio = ratio,
                             .valid = 90,
                             .share = 0.3,
                             .most = most,
                             .weights = wanted,
                             .report = wanted_report};
        cr_assert_eq(cq_ref_balance(NULL, &a), CQ_OK);
        a.weights = weights;
        a.report = report;
        cr_assert_eq(WAYS_CALL(&s, balance, a, WAYS_AT(sum, 8), WAYS_AT(right, 8),
                               WAYS_AT(stats, 32 * n), WAYS_AT(order, 4 * n),
                               WAYS_AT(weights, 8 * n), WAYS_AT(report, 8 * (3 + n))),
                     CQ_OK, "%s", cq_error());
        cr_expect(memcmp(report, wanted_report, (size_t)(8 * (3 + n))) == 0, "n %lld",
                  (long long)n);
        cr_expect(memcmp(weights, wanted, (size_t)(8 * n)) == 0, "n %lld", (long long)n);
        ways_stream_free(&s);
    }
    double loss = 0;
    for (int64_t i = n - 1; i >= 0; i--)
        loss += 1 - (1 - stats[4 * i + 3]);
    double by = fmax(n ? loss / (double)n : 0, 1e-8);
    cr_expect(wanted_report[2] == (ratio ? fmin(fmax(sum / 90, 0) / by, most) : 0));
    cr_expect(wanted_report[0] == sum && wanted_report[1] == 17);
    cr_expect(n == 0 || wanted_report[2 + n] == stats[4 * n - 1]);
    cr_expect(n == 0 || wanted[n - 1] == (ratio ? wanted_report[2] / (double)n * 0.3 : -1));
}
Test(cpu_losses, ratio_is_worked_out_with_the_same_bits_everywhere) {
    check_balance(36, true, 0.31, 0.02, 100);
    check_balance(300, true, 0.31, 0.02, 100);
    check_balance(1, true, 0.7, 1e-12, 1e30);
    check_balance(5, true, 0.7, 1e-4, 100);
    check_balance(5, true, -1e-9, 1e-4, 100);
    check_balance(0, true, 1e-8, 0, 100);
    check_balance(7, false, 0.31, 0.02, 100);
}

Test(cpu_losses, row_losses_agree_with_ref) {
    for (cq_rowloss_form form = CQ_ROWLOSS_COSINE; form <= CQ_ROWLOSS_MSE; form++) {
        ways w = {.seed = 0};
        uint64_t first = 1300 + 50 * (uint64_t)form;
        for (w.at = -1; ways_next(&w.at); ways_judge(&w))
            for (w.seed = first; w.seed < first + 2 * SEEDS; w.seed++, w.drawn = 0) {
                int64_t n = 67, dim = w.seed % 2 ? 192 : 5;
                snprintf(w.what, sizeof(w.what), "rowloss %d, %lld wide, seed %llu", (int)form,
                         (long long)dim, (unsigned long long)w.seed);
                cq_rowloss_args a = {.form = form, .n = n, .dim = dim};
                float *x = WAYS_IN(&w, rowloss, x, n, dim, dim, 1.0);
                float *y = WAYS_IN(&w, rowloss, y, n, dim, dim, 0.1);
                for (int64_t i = 0; i < n * dim; i++)
                    y[i] = i / dim == 3 ? 0.0f : y[i] + x[i];
                WAYS_DOUBLE(&w, rowloss, out, 1);
                WAYS_RUN(&w, rowloss, a);
                cq_rowloss_backward_args b = {.form = form, .n = n, .dim = dim, .weight = 0.8};
                x = WAYS_IN(&w, rowloss_backward, x, n, dim, dim, 1.0);
                y = WAYS_IN(&w, rowloss_backward, y, n, dim, dim, 0.1);
                for (int64_t i = 0; i < n * dim; i++)
                    y[i] = i / dim == 3 ? 0.0f : y[i] + x[i];
                WAYS_OUT(&w, rowloss_backward, dx, n, dim, dim, 3);
                WAYS_RUN(&w, rowloss_backward, b);
            }
    }
}
