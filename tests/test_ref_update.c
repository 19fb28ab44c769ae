/* test_ref_update.c - the reference AdamW against a double loop written out by hand, the weight it
   quantizes in the same pass, and the vector operations around it. */
#include "tests/ref_check.h"

enum { ROWS = 3, COLS = 32, N = ROWS * COLS, STEPS = 6 };
static const double lr = 0.01, beta1 = 0.9, beta2 = 0.95, eps = 1e-6, decay = 0.1, grad_scale = 0.5;

static double gradient(int step, int i) {
    return cq_random_normal(90, (uint64_t)step, (uint64_t)i);
}

/* Kingma and Ba's moments with bias correction, decay apart from them. */
static void by_hand(double *w, int steps) {
    for (int i = 0; i < N; i++) {
        double m = 0, v = 0, power1 = 1, power2 = 1;
        for (int t = 1; t <= steps; t++) {
            double g = grad_scale * gradient(t, i), old = w[i];
            m = beta1 * m + (1 - beta1) * g;
            v = beta2 * v + (1 - beta2) * g * g;
            power1 *= beta1;
            power2 *= beta2;
            w[i] =
                old - lr * (m / (1 - power1)) / (sqrt(v / (1 - power2)) + eps) - lr * decay * old;
        }
    }
}

Test(adamw, equals_the_loop_written_by_hand) {
    double *w = finite_normal(N, 91, 0, 1, 0), *want = check_copy(w, N), m[N] = {0}, v[N] = {0},
           g[N];
    double *start = check_copy(w, N);
    for (int t = 1; t <= STEPS; t++) {
        for (int i = 0; i < N; i++)
            g[i] = gradient(t, i);
        REF(adamw, .rows = ROWS, .cols = COLS, .w = w, .m = m, .v = v, .g = g, .lr = lr,
            .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = decay,
            .grad_scale = grad_scale, .step = t);
        memcpy(want, start, sizeof(m));
        by_hand(want, t);
        check_close(w, want, N, 1e-13, "weights");
    }
    free(w);
    free(want);
    free(start);
}

Test(adamw, first_step_is_the_learning_rate_against_the_sign) {
    double w[2] = {1, 1}, m[2] = {0}, v[2] = {0}, g[2] = {1e-3, -40};
    REF(adamw, .rows = 1, .cols = 2, .w = w, .m = m, .v = v, .g = g, .lr = lr, .beta1 = 0.9,
        .beta2 = 0.999, .eps = 0, .grad_scale = 1, .step = 1);
    check_near(w[0], 1 - lr, 1e-12, "down");
    check_near(w[1], 1 + lr, 1e-12, "up");
    check_near(m[1], -4, 1e-12, "first moment");
    check_near(v[1], 1.6, 1e-12, "second moment");
}

Test(adamw, zero_gradient_only_decays) {
    double w[2] = {1, -2}, m[2] = {0}, v[2] = {0}, g[2] = {0};
    REF(adamw, .rows = 1, .cols = 2, .w = w, .m = m, .v = v, .g = g, .lr = lr, .beta1 = beta1,
        .beta2 = beta2, .eps = eps, .weight_decay = decay, .grad_scale = 1, .step = 3);
    check_near(w[0], 1 - lr * decay, 1e-16, "w[0]");
    check_near(w[1], -2 * (1 - lr * decay), 1e-15, "w[1]");
}

/* One F32 step with the quantized copy, dynamic or with block maxima. */
static void check_copy_bits(const float *block_amax, float top) {
    double *wide = finite_round(finite_normal(N, 92, 0, 0.02, 0), N);
    float *w = finite_narrow(wide, N), m[N] = {0}, v[N] = {0}, g[N], wq[N], want[N], amax = 0.05f;
    int64_t saturated[2] = {0, 0};
    cq_fq fq = {.amax = &amax, .saturated = &saturated[0]};
    for (int i = 0; i < N; i++)
        g[i] = (float)gradient(1, i);
    OK(REF_STATUS(adamw, .dtype = CQ_F32, .rows = ROWS, .cols = COLS, .w = w, .m = m, .v = v,
                  .g = g, .lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps,
                  .weight_decay = decay, .grad_scale = grad_scale, .step = 1, .wq = wq, .fq = fq,
                  .block_amax = block_amax, .top = top));
    by_hand(wide, 1);
    int64_t moved = 0;
    for (int i = 0; i < N; i++) {
        check_near((double)w[i], wide[i], 2e-9, "F32 weight");
        check_near((double)m[i], 0.1 * grad_scale * (double)g[i], 1e-8, "F32 moment");
        moved += wq[i] != w[i];
    }
    fq.saturated = &saturated[1];
    OK(REF_STATUS(fake_quant, .dtype = CQ_F32, .rows = ROWS, .cols = COLS, .x = w, .y = want,
                  .fq = fq, .block_amax = block_amax, .top = top));
    cr_expect_arr_eq(wq, want, sizeof(want));
    cr_expect_eq(saturated[0], saturated[1]);
    cr_expect_gt(moved, N / 2);
    free(wide);
    free(w);
}

Test(adamw, quantized_copy_is_the_fake_quantization_of_the_new_weight) {
    float block_amax[N / 16];
    for (int i = 0; i < N / 16; i++)
        block_amax[i] = 0.01f * (float)(1 + i);
    check_copy_bits(NULL, 448);
    check_copy_bits(block_amax, 448);
    check_copy_bits(block_amax, 256);
}

Test(adamw, step_zero_is_refused) {
    double w = 1, m = 0, v = 0, g = 1;
    cr_expect_eq(REF_STATUS(adamw, .dtype = CQ_F64, .rows = 1, .cols = 1, .w = &w, .m = &m, .v = &v,
                            .g = &g, .lr = lr, .beta1 = beta1, .beta2 = beta2),
                 CQ_EUSAGE);
    cr_expect_eq(w, 1);
}

Test(sumsq, adds_to_its_result_and_shows_what_is_not_finite) {
    double x[3] = {1, -2, 3}, out = 10;
    REF(sumsq, .n = 3, .x = x, .out = &out);
    cr_expect_eq(out, 24);
    float small[2] = {1e-30f, 1e30f};
    OK(REF_STATUS(sumsq, .dtype = CQ_F32, .n = 1, .x = small, .out = &out));
    out = 0;
    OK(REF_STATUS(sumsq, .dtype = CQ_F32, .n = 2, .x = small, .out = &out));
    check_near(out, 1e60, 1e53, "squares beyond the range of float");
    x[1] = NAN;
    REF(sumsq, .n = 3, .x = x, .out = &out);
    cr_expect(isnan(out));
    out = 0;
    x[1] = INFINITY;
    REF(sumsq, .n = 3, .x = x, .out = &out);
    cr_expect(isinf(out));
}

Test(axpy, scales_and_adds_and_with_beta_zero_never_reads_y) {
    double x[3] = {1, 2, 3}, y[3] = {10, 20, 30};
    REF(axpy, .n = 3, .alpha = 2, .beta = 0.5, .x = x, .y = y);
    cr_expect_eq(y[0], 7);
    cr_expect_eq(y[2], 21);
    y[1] = NAN;
    REF(axpy, .n = 3, .alpha = -1, .x = x, .y = y);
    cr_expect_eq(y[1], -2);
}

Test(ref, other_dtypes_are_refused_by_name) {
    float x[16] = {0};
    cr_expect_eq(REF_STATUS(axpy, .dtype = CQ_BF16, .n = 16, .alpha = 1, .x = x, .y = x),
                 CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "axpy"), "%s", cq_error());
}
