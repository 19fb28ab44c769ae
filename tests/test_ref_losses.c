/* test_ref_losses.c - the reference losses on logits: KL in its four forms and cross-entropy,
   against PyTorch's F64 values, finite differences and the identities between the forms. */
#include "tests/ref_check.h"

enum { T = 7, V = 13 };
static const int32_t all_labels[T] = {0, 12, 3, 4, 5, 6, 1};
static const int32_t some_labels[T] = {4, -100, 0, 12, -1, 7, -100};

/* Runs kl over rows [first, first + n) of T x V logits; z becomes the gradient when `scale`. */
static double run_kl(cq_kl_form form, int64_t k, const double *teacher, double *z,
                     const int32_t *labels, int64_t first, int64_t n, double scale) {
    double sum = 0;
    REF(kl, .rows = n, .vocab = V, .form = form, .top_k = k, .teacher = teacher + first * V,
        .student = z + first * V, .labels = labels + first, .scale = scale, .gradient = scale != 0,
        .sum = &sum);
    return sum;
}

static double kl_value(cq_kl_form form, int64_t k, const double *teacher, double *z) {
    return run_kl(form, k, teacher, z, all_labels, 0, T, 0);
}

typedef struct kl_case {
    cq_kl_form form;
    int64_t k;
    const double *teacher;
    double *student;
    const int32_t *labels;
    double *value;
} kl_case;

static int kl_forward(const void *args) {
    const kl_case *c = args;
    *c->value = run_kl(c->form, c->k, c->teacher, c->student, c->labels, 0, T, 0);
    return CQ_OK;
}

static void check_kl_gradient(const char *what, cq_kl_form form, int64_t k, const double *teacher,
                              double *student, const int32_t *labels) {
    double value, one = 1, *dz = check_copy(student, T * V);
    kl_case c = {form, k, teacher, student, labels, &value};
    run_kl(form, k, teacher, dz, labels, 0, T, 1);
    finite_check(what, &(finite_forward){kl_forward, &c, &value, &one, 1},
                 &(finite_input){"student", student, dz, T * V, 1}, 1);
    free(dz);
}

Test(kl, gradients_equal_finite_differences) {
    double *teacher = finite_normal(T * V, 11, 0, 2, 0),
           *student = finite_normal(T * V, 12, 0, 2, 0);
    const int64_t ks[] = {1, 3, V - 1, V, V + 5};
    for (int form = CQ_KL_FULL; form <= CQ_KL_TAIL_BUCKET; form++)
        for (int i = 0; i < 5; i++) {
            if (form == CQ_KL_RENORMALIZED && ks[i] == 1)
                continue; /* one entry renormalized is always 1: no gradient to compare */
            char what[64];
            snprintf(what, sizeof(what), "kl form %d top %d, seeds 11 12", form, (int)ks[i]);
            check_kl_gradient(what, (cq_kl_form)form, ks[i], teacher, student, all_labels);
        }
    check_kl_gradient("kl with masked rows, seeds 11 12", CQ_KL_TAIL_BUCKET, 4, teacher, student,
                      some_labels);
    free(teacher);
    free(student);
}

static const char *const form_names[] = {"full", "renormalized", "truncated", "tail_bucket"};

static void check_golden_form(const cq_safetensors *file, int form, int k) {
    cq_tensor t = check_tensor(file, "kl", "teacher");
    int64_t rows = t.shape.dim[0], vocab = t.shape.dim[1], valid = 0;
    double *teacher = check_as(t, CQ_F64), sum = 0;
    double *z = check_as(check_tensor(file, "kl", "student"), CQ_F64);
    const int32_t *mask = check_tensor(file, "kl", "mask").data;
    int32_t *labels = calloc((size_t)rows, sizeof(*labels));
    for (int64_t r = 0; r < rows; r++) {
        labels[r] = mask[r] ? 0 : -100;
        valid += mask[r] != 0;
    }
    char key[64], gradient[80];
    snprintf(key, sizeof(key), form == CQ_KL_FULL ? "%s" : "%s_top%d", form_names[form], k);
    snprintf(gradient, sizeof(gradient), "%s.grad", key);
    REF(kl, .rows = rows, .vocab = vocab, .form = (cq_kl_form)form, .top_k = k, .teacher = teacher,
        .student = z, .labels = labels, .scale = 1 / (double)valid, .gradient = true, .sum = &sum);
    double mean = sum / (double)valid;
    const double *want = check_tensor(file, "kl", key).data;
    const double *want_gradient = check_tensor(file, "kl", gradient).data;
    check_near(mean, *want, 1e-9 * fabs(*want), key);
    if (form == CQ_KL_RENORMALIZED && k == 1)
        for (int64_t i = 0; i < rows * vocab; i++)
            cr_expect(z[i] == 0 && want_gradient[i] == 0, "%s at %lld", gradient, (long long)i);
    else
        check_close(z, want_gradient, rows * vocab, 1e-9, gradient);
    free(teacher);
    free(z);
    free(labels);
}

Test(kl, equals_pytorch_in_all_forms) {
    cq_safetensors *file = check_golden("losses");
    const int ks[] = {1, 16, 130};
    check_golden_form(file, CQ_KL_FULL, 0);
    for (int form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++)
        for (int i = 0; i < 3; i++)
            check_golden_form(file, form, ks[i]);
    cq_safetensors_close(file);
}

Test(kl, gradient_rows_sum_to_zero) {
    double *teacher = finite_normal(T * V, 13, 0, 3, 0);
    for (int form = CQ_KL_FULL; form <= CQ_KL_TAIL_BUCKET; form++) {
        double *z = finite_normal(T * V, 14, 0, 3, 0);
        run_kl((cq_kl_form)form, 4, teacher, z, all_labels, 0, T, 1);
        for (int r = 0; r < T; r++) {
            double sum = 0;
            for (int j = 0; j < V; j++)
                sum += z[r * V + j];
            check_near(sum, 0, 1e-15, form_names[form]);
        }
        free(z);
    }
    free(teacher);
}

Test(kl, tail_bucket_bounds_the_full_loss_from_below_and_grows_with_k) {
    double *teacher = finite_normal(T * V, 15, 0, 2, 0), *z = finite_normal(T * V, 16, 0, 2, 0);
    double full = kl_value(CQ_KL_FULL, 0, teacher, z), last = 0;
    for (int k = 1; k <= V; k++) {
        double c = kl_value(CQ_KL_TAIL_BUCKET, k, teacher, z);
        cr_expect(c >= last - 1e-15 && c <= full + 1e-14, "top %d: %g after %g, full %g", k, c,
                  last, full);
        last = c;
    }
    cr_expect_lt(kl_value(CQ_KL_TAIL_BUCKET, 2, teacher, z), 0.95 * full);
    for (int form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++)
        cr_expect_eq(kl_value((cq_kl_form)form, V, teacher, z), full, "%s", form_names[form]);
    memcpy(z, teacher, T * V * sizeof(*z));
    cr_expect_eq(kl_value(CQ_KL_FULL, 0, teacher, z), 0);
    free(teacher);
    free(z);
}

/* Almost no student mass outside the teacher's top entry, half of the teacher's there: the tail
   masses are below the rounding of 1 - kept. */
Test(kl, sure_and_wrong_student_keeps_its_tail_gradient) {
    double teacher[T * V] = {0}, student[T * V] = {0};
    for (int r = 0; r < T; r++) {
        teacher[r * V] = 2 + 0.01 * r;
        student[r * V] = 50 + r;
    }
    check_kl_gradient("sure and wrong", CQ_KL_TAIL_BUCKET, 1, teacher, student, all_labels);
    double sum = kl_value(CQ_KL_TAIL_BUCKET, 1, teacher, student), want = 0;
    for (int r = 0; r < T; r++) {
        double p = exp(teacher[r * V]) / (exp(teacher[r * V]) + V - 1);
        double log_q = -log1p((V - 1) * exp(-student[r * V]));
        double log_tail = log(V - 1) - student[r * V] + log_q;
        want += p * (log(p) - log_q) + (1 - p) * (log1p(-p) - log_tail);
    }
    check_near(sum, want, 1e-13 * want, "value");
}

Test(kl, equal_teacher_logits_keep_the_lowest_ids) {
    double teacher[T * V] = {0}, *z = finite_normal(T * V, 17, 0, 1, 0);
    teacher[5] = teacher[9] = 1;
    run_kl(CQ_KL_RENORMALIZED, 4, teacher, z, all_labels, 0, T, 1);
    for (int r = 0; r < T; r++)
        for (int j = 0; j < V; j++) {
            bool kept = r ? j < 4 : j < 2 || j == 5 || j == 9;
            cr_expect_eq(z[r * V + j] != 0, kept, "row %d entry %d", r, j);
        }
    free(z);
}

Test(kl, masked_rows_count_nothing_and_get_zero_gradients) {
    double *teacher = finite_normal(T * V, 18, 0, 2, 0), *z = finite_normal(T * V, 19, 0, 2, 0);
    double *student = check_copy(z, T * V), sum = 1, nll_teacher = 2, nll_student = 3,
           want[3] = {1, 2, 3};
    int64_t agree = 0, valid = 10, want_agree = 0;
    for (int r = 0; r < T; r++) {
        if (some_labels[r] < 0)
            continue;
        double st = 0, ss = 0;
        int at = 0, as = 0;
        for (int j = 0; j < V; j++) {
            st += exp(teacher[r * V + j]);
            ss += exp(student[r * V + j]);
            at = teacher[r * V + j] > teacher[r * V + at] ? j : at;
            as = student[r * V + j] > student[r * V + as] ? j : as;
        }
        want[1] += log(st) - teacher[r * V + some_labels[r]];
        want[2] += log(ss) - student[r * V + some_labels[r]];
        want_agree += at == as;
        for (int j = 0; j < V; j++)
            want[0] += exp(teacher[r * V + j]) / st *
                       (teacher[r * V + j] - log(st) - student[r * V + j] + log(ss));
    }
    REF(kl, .rows = T, .vocab = V, .teacher = teacher, .student = z, .labels = some_labels,
        .scale = 3, .gradient = true, .sum = &sum, .nll_teacher = &nll_teacher,
        .nll_student = &nll_student, .agree = &agree, .valid = &valid);
    check_near(sum, want[0], 1e-13, "sum");
    check_near(nll_teacher, want[1], 1e-13, "teacher's log-likelihood");
    check_near(nll_student, want[2], 1e-13, "student's log-likelihood");
    cr_expect_eq(agree, want_agree);
    cr_expect_eq(valid, 14);
    for (int r = 0; r < T; r++)
        for (int j = 0; j < V; j++)
            cr_expect_eq(z[r * V + j] != 0, some_labels[r] >= 0, "row %d", r);
    free(teacher);
    free(z);
    free(student);
}

Test(kl, agreement_breaks_ties_to_the_lowest_id) {
    double teacher[V] = {0, 1, 1}, student[V] = {0, 5, 3}, other[V] = {0, 3, 5}, sum = 0;
    int64_t agree = 0;
    REF(kl, .rows = 1, .vocab = V, .teacher = teacher, .student = student, .labels = all_labels,
        .sum = &sum, .agree = &agree);
    cr_expect_eq(agree, 1);
    REF(kl, .rows = 1, .vocab = V, .teacher = teacher, .student = other, .labels = all_labels,
        .sum = &sum, .agree = &agree);
    cr_expect_eq(agree, 1);
}

Test(kl, chunks_of_rows_change_no_gradient_bit) {
    double *teacher = finite_normal(T * V, 20, 0, 2, 0);
    for (int form = CQ_KL_FULL; form <= CQ_KL_TAIL_BUCKET; form++) {
        double *whole = finite_normal(T * V, 21, 0, 2, 0), *parts = check_copy(whole, T * V),
               sum = 0;
        double want = run_kl((cq_kl_form)form, 3, teacher, whole, some_labels, 0, T, 0.25);
        for (int r = 0; r < T; r += 3)
            sum += run_kl((cq_kl_form)form, 3, teacher, parts, some_labels, r,
                          r + 3 < T ? 3 : T - r, 0.25);
        check_near(sum, want, 1e-14, form_names[form]);
        cr_expect_arr_eq(parts, whole, T * V * sizeof(*whole), "%s", form_names[form]);
        free(whole);
        free(parts);
    }
    free(teacher);
}

Test(kl, f32_is_the_rounded_f64_result) {
    double *teacher = finite_round(finite_normal(T * V, 22, 0, 2, 0), T * V);
    double *student = finite_round(finite_normal(T * V, 23, 0, 2, 0), T * V);
    float *t32 = finite_narrow(teacher, T * V);
    for (int form = CQ_KL_FULL; form <= CQ_KL_TAIL_BUCKET; form++) {
        double *z = check_copy(student, T * V), sum = 0;
        float *z32 = finite_narrow(student, T * V);
        double want = run_kl((cq_kl_form)form, 3, teacher, z, some_labels, 0, T, 0.5);
        OK(REF_STATUS(kl, .dtype = CQ_F32, .rows = T, .vocab = V, .form = (cq_kl_form)form,
                      .top_k = 3, .teacher = t32, .student = z32, .labels = some_labels,
                      .scale = 0.5, .gradient = true, .sum = &sum));
        cr_expect_eq(sum, want, "%s", form_names[form]);
        for (int i = 0; i < T * V; i++)
            cr_expect_eq(z32[i], (float)z[i], "%s at %d", form_names[form], i);
        free(z);
        free(z32);
    }
    free(teacher);
    free(student);
    free(t32);
}

Test(kl, minus_infinity_logits_of_both_sides_are_no_mass) {
    double teacher[T * V] = {0}, z[T * V] = {0};
    for (int r = 0; r < T; r++)
        for (int j = 4; j < V; j++)
            teacher[r * V + j] = z[r * V + j] = -INFINITY;
    z[2] = 1;
    double full = kl_value(CQ_KL_FULL, 0, teacher, z);
    check_near(kl_value(CQ_KL_TAIL_BUCKET, 4, teacher, z), full, 1e-15, "bucket");
    cr_expect(full > 0);
    teacher[V - 1] = 0; /* mass where the student has none */
    cr_expect_eq(kl_value(CQ_KL_TAIL_BUCKET, 4, teacher, z), INFINITY);
    teacher[V - 1] = -INFINITY;
    run_kl(CQ_KL_TAIL_BUCKET, 4, teacher, z, all_labels, 0, T, 1);
    for (int i = 0; i < T * V; i++)
        cr_expect(isfinite(z[i]) && (i % V < 4 || z[i] == 0), "at %d: %g", i, z[i]);
}

Test(kl, wrong_arguments_are_refused) {
    double z[V] = {0}, sum = 0;
    int32_t outside = V;
    cr_expect_eq(REF_STATUS(kl, .dtype = CQ_F64, .rows = 1, .vocab = V, .teacher = z, .student = z,
                            .labels = &outside, .sum = &sum),
                 CQ_EDATA);
    cr_expect_eq(REF_STATUS(kl, .dtype = CQ_F64, .rows = 1, .vocab = V, .form = CQ_KL_TRUNCATED,
                            .teacher = z, .student = z, .labels = all_labels, .sum = &sum),
                 CQ_EUSAGE);
    cr_expect_eq(REF_STATUS(cross_entropy, .dtype = CQ_F64, .rows = 1, .vocab = V, .logits = z,
                            .labels = &outside, .sum = &sum),
                 CQ_EDATA);
    cr_expect_eq(sum, 0);
}

typedef struct ce_case {
    double *z, *value;
    const float *weights;
} ce_case;

static int ce_forward(const void *args) {
    const ce_case *c = args;
    *c->value = 0;
    REF(cross_entropy, .rows = T, .vocab = V, .logits = c->z, .labels = some_labels,
        .weights = c->weights, .sum = c->value);
    return CQ_OK;
}

Test(cross_entropy, gradient_equals_finite_differences) {
    double *z = finite_normal(T * V, 24, 0, 2, 0), *dz = check_copy(z, T * V), value, scale = 0.25;
    double sum = 0;
    int64_t correct = 0, valid = 0;
    z[4] = dz[4] = 10; /* row 0 is right */
    REF(cross_entropy, .rows = T, .vocab = V, .logits = dz, .labels = some_labels, .scale = scale,
        .gradient = true, .sum = &sum, .correct = &correct, .valid = &valid);
    ce_case c = {z, &value, NULL};
    finite_check("cross-entropy, seed 24", &(finite_forward){ce_forward, &c, &value, &scale, 1},
                 &(finite_input){"logits", z, dz, T * V, 1}, 1);
    cr_expect_eq(sum, value);
    cr_expect_eq(valid, 4);
    cr_expect(correct >= 1 && correct < 4);
    for (int j = 0; j < V; j++)
        cr_expect_eq(dz[V + j], 0);
    free(z);
    free(dz);
}

Test(cross_entropy, gradient_of_weighted_rows_equals_finite_differences) {
    double *z = finite_normal(T * V, 25, 0, 2, 0), *dz = check_copy(z, T * V), value, scale = 0.25;
    double sum = 0, plain = 0;
    int64_t valid = 0;
    float weights[T];
    for (int i = 0; i < T; i++)
        weights[i] = (float)(i % 3 == 0 ? 0 : i % 2 ? -1.5 : 0.75);
    REF(cross_entropy, .rows = T, .vocab = V, .logits = dz, .labels = some_labels,
        .weights = weights, .scale = scale, .gradient = true, .sum = &sum, .valid = &valid);
    ce_case c = {z, &value, weights};
    finite_check("weighted cross-entropy, seed 25",
                 &(finite_forward){ce_forward, &c, &value, &scale, 1},
                 &(finite_input){"logits", z, dz, T * V, 1}, 1);
    cr_expect_eq(sum, value);
    cr_expect_eq(valid, 4, "a row of weight 0 is still a target");
    for (int i = 0; i < T; i++)
        weights[i] = -2;
    REF(cross_entropy, .rows = T, .vocab = V, .logits = z, .labels = some_labels, .sum = &plain);
    ce_forward(&c);
    check_near(value, -2 * plain, 1e-13, "every weight -2");
    free(z);
    free(dz);
}

Test(cross_entropy, of_equal_logits_is_the_log_of_the_vocabulary) {
    double z[T * V] = {0}, sum = 0;
    int64_t correct = 0;
    REF(cross_entropy, .rows = T, .vocab = V, .logits = z, .labels = all_labels, .sum = &sum,
        .correct = &correct);
    check_near(sum, T * log(V), 1e-13, "sum");
    cr_expect_eq(correct, 1, "the lowest id of equals is the prediction");
}
