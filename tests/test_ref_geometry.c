/* test_ref_geometry.c - Gram matrices, CKA and its rivals of the reference backend, against
   PyTorch's F64 values, finite differences, other forms of the same estimator, and the invariances
   that define it. */
#include "tests/ref_check.h"

typedef struct pair {
    int64_t n, dim;
    bool unbiased;
    cq_gram_loss loss;
    double stats[4];
} pair;

static double *gram(const pair *p, const double *x) {
    double *k = finite_zeros(p->n * p->n), *scratch = finite_zeros(p->n * p->dim);
    REF(gram, .n = p->n, .dim = p->dim, .x = x, .unbiased = p->unbiased, .scratch = scratch,
        .gram = k);
    free(scratch);
    return k;
}

/* Fills p->stats; returns the loss. dx, unless NULL, becomes weight * dloss/dX. */
static double loss(pair *p, const double *x, const double *y, double weight, double *dx) {
    double *k = gram(p, x), *l = gram(p, y);
    REF(cka, .loss = p->loss, .n = p->n, .k = k, .l = l, .out = p->stats);
    if (dx)
        REF(cka_backward, .loss = p->loss, .n = p->n, .dim = p->dim, .k = k, .l = l, .x = x,
            .weight = weight, .stats = p->stats, .dx = dx);
    free(k);
    free(l);
    return p->stats[3];
}

static double cka(pair *p, const double *x, const double *y) {
    loss(p, x, y, 0, NULL);
    return p->stats[0] / sqrt(p->stats[1] * p->stats[2]);
}

/* Y plus noise: correlated as teacher and student are. */
static double *near_rows(const double *y, int64_t n, double noise, uint64_t seed) {
    double *x = finite_normal(n, seed, 1, noise, 0);
    for (int64_t i = 0; i < n; i++)
        x[i] += y[i];
    return x;
}

static void check_golden_cka(const cq_safetensors *file, bool unbiased) {
    cq_tensor t = check_tensor(file, "cka", "student");
    pair p = {.n = t.shape.dim[0], .dim = t.shape.dim[1], .unbiased = unbiased};
    double *x = check_as(t, CQ_F64), *y = check_as(check_tensor(file, "cka", "teacher"), CQ_F64);
    double *dx = finite_zeros(p.n * p.dim);
    const char *key = unbiased ? "unbiased" : "biased";
    double want = *(const double *)check_tensor(file, "cka", key).data;
    double value = loss(&p, x, y, -1, dx);
    check_near(1 - value, want, 1e-9 * want, key);
    check_near(p.stats[0] / sqrt(p.stats[1] * p.stats[2]), want, 1e-9 * want, key);
    check_close(dx, check_tensor(file, "cka", unbiased ? "unbiased.grad" : "biased.grad").data,
                p.n * p.dim, 1e-9, key);
    free(x);
    free(y);
    free(dx);
}

Test(cka, equals_pytorch_with_gradients) {
    cq_safetensors *file = check_golden("losses");
    check_golden_cka(file, false);
    check_golden_cka(file, true);
    cq_safetensors_close(file);
}

typedef struct loss_case {
    pair *p;
    const double *x, *y;
    double *value;
} loss_case;

static int loss_forward(const void *args) {
    const loss_case *c = args;
    *c->value = loss(c->p, c->x, c->y, 0, NULL);
    return CQ_OK;
}

Test(cka, gradients_equal_finite_differences) {
    const double weight = 0.7;
    for (int i = 0; i < 4; i++) {
        pair p = {.n = 7, .dim = 5, .unbiased = i & 1, .loss = (cq_gram_loss)(i >> 1)};
        double *y = finite_normal(35, 31, 0, 1, 0.5), *x = near_rows(y, 35, 0.4, 32), dx[35], value;
        loss(&p, x, y, weight, dx);
        loss_case c = {&p, x, y, &value};
        char what[64];
        snprintf(what, sizeof(what), "loss %d, unbiased %d, seeds 31 32", i >> 1, i & 1);
        finite_check(what, &(finite_forward){loss_forward, &c, &value, &weight, 1},
                     &(finite_input){"x", x, dx, 35, 1}, 1);
        free(x);
        free(y);
    }
}

Test(cka, gradient_is_orthogonal_to_scaling_and_to_shifts) {
    for (int unbiased = 0; unbiased < 2; unbiased++) {
        pair p = {.n = 12, .dim = 9, .unbiased = unbiased};
        double *y = finite_normal(108, 33, 0, 1, 1), *x = near_rows(y, 108, 0.5, 34), dx[108];
        loss(&p, x, y, 1, dx);
        double size = sqrt(check_dot(dx, dx, 108));
        cr_expect_gt(size, 1e-3);
        check_near(check_dot(dx, x, 108), 0, 1e-13 * size * sqrt(check_dot(x, x, 108)), "<G, X>");
        for (int c = 0; c < 9; c++) {
            double sum = 0;
            for (int i = 0; i < 12; i++)
                sum += dx[i * 9 + c];
            check_near(sum, 0, 1e-14, "column sum");
        }
        free(x);
        free(y);
    }
}

/* x times a product of plane rotations */
static void rotate(double *x, int64_t n, int64_t dim) {
    for (int64_t a = 0; a + 1 < dim; a++) {
        double c = cos(0.3 + (double)a), s = sin(0.3 + (double)a);
        for (int64_t i = 0; i < n; i++) {
            double u = x[i * dim + a], v = x[i * dim + a + 1];
            x[i * dim + a] = c * u - s * v;
            x[i * dim + a + 1] = s * u + c * v;
        }
    }
}

Test(cka, ignores_rotation_scale_and_shift_and_is_symmetric) {
    for (int unbiased = 0; unbiased < 2; unbiased++) {
        pair p = {.n = 12, .dim = 9, .unbiased = unbiased};
        double *y = finite_normal(108, 35, 0, 1, 0), *x = near_rows(y, 108, 0.6, 36);
        double want = cka(&p, x, y), *z = check_copy(x, 108);
        cr_expect(want > 0.3 && want < 0.97, "%g", want);
        check_near(cka(&p, y, x), want, 1e-14, "symmetric");
        rotate(z, 12, 9);
        check_near(cka(&p, z, y), want, 1e-13, "rotated");
        for (int i = 0; i < 108; i++)
            z[i] = 37 * x[i];
        check_near(cka(&p, z, y), want, 1e-13, "scaled");
        for (int i = 0; i < 108; i++)
            z[i] = x[i] + 3 + i % 9;
        check_near(cka(&p, z, y), want, 1e-13, "shifted");
        free(x);
        free(y);
        free(z);
    }
}

Test(cka, of_a_matrix_with_itself_is_one_and_has_no_gradient) {
    for (int i = 0; i < 4; i++) {
        pair p = {.n = 8, .dim = 20, .unbiased = i & 1, .loss = (cq_gram_loss)(i >> 1)};
        double *x = finite_normal(160, 37, 0, 1, 0), dx[160];
        cr_expect_eq(loss(&p, x, x, 1, dx), 0);
        check_near(p.stats[0] / sqrt(p.stats[1] * p.stats[2]), 1, 1e-15, "cka");
        check_near(check_dot(dx, dx, 160), 0, 1e-30, "gradient");
        free(x);
    }
}

Test(gram, rows_sum_to_zero_and_the_matrix_is_symmetric) {
    for (int unbiased = 0; unbiased < 2; unbiased++) {
        pair p = {.n = 9, .dim = 6, .unbiased = unbiased};
        double *x = finite_normal(54, 38, 0, 1, 10), *k = gram(&p, x);
        for (int i = 0; i < 9; i++) {
            double sum = 0;
            for (int j = 0; j < 9; j++) {
                sum += k[i * 9 + j];
                cr_expect_eq(k[i * 9 + j], k[j * 9 + i]);
            }
            check_near(sum, 0, 1e-12, "row sum");
            cr_expect_eq(k[i * 9 + i] == 0, unbiased, "diagonal");
        }
        free(x);
        free(k);
    }
}

/* |Yc' Xc|^2 and, for the unbiased form, its correction by squared row norms. */
static double feature_form(const pair *p, const double *x, const double *y) {
    int64_t n = p->n, d = p->dim;
    double *xc = check_copy(x, n * d), *yc = check_copy(y, n * d), sum = 0, both = 0, xx, yy;
    for (int64_t c = 0; c < d; c++) {
        double mx = 0, my = 0;
        for (int64_t i = 0; i < n; i++) {
            mx += x[i * d + c] / (double)n;
            my += y[i * d + c] / (double)n;
        }
        for (int64_t i = 0; i < n; i++) {
            xc[i * d + c] -= mx;
            yc[i * d + c] -= my;
        }
    }
    for (int64_t a = 0; a < d; a++)
        for (int64_t b = 0; b < d; b++) {
            double cross = 0;
            for (int64_t i = 0; i < n; i++)
                cross += yc[i * d + a] * xc[i * d + b];
            sum += cross * cross;
        }
    for (int64_t i = 0; i < n; i++)
        both += check_dot(xc + i * d, xc + i * d, d) * check_dot(yc + i * d, yc + i * d, d);
    xx = check_dot(xc, xc, n * d);
    yy = check_dot(yc, yc, n * d);
    free(xc);
    free(yc);
    double m = (double)n;
    return p->unbiased ? sum - m / (m - 2) * both + xx * yy / ((m - 1) * (m - 2)) : sum;
}

Test(gram, inner_product_equals_the_feature_form) {
    for (int unbiased = 0; unbiased < 2; unbiased++) {
        pair p = {.n = 10, .dim = 4, .unbiased = unbiased};
        double *y = finite_normal(40, 39, 0, 1, 0), *x = near_rows(y, 40, 1, 40);
        loss(&p, x, y, 0, NULL);
        const double want[3] = {feature_form(&p, x, y), feature_form(&p, x, x),
                                feature_form(&p, y, y)};
        for (int i = 0; i < 3; i++)
            check_near(p.stats[i], want[i], 1e-12 * want[1], "inner product");
        free(x);
        free(y);
    }
}

/* HSIC_1 of Song et al. 2012, written from raw Gram matrices with a zero diagonal. */
Test(gram, unbiased_inner_product_is_hsic_1) {
    enum { N = 9, D = 5 };
    pair p = {.n = N, .dim = D, .unbiased = true};
    double *y = finite_normal(N * D, 41, 0, 1, 0.3), *x = near_rows(y, N * D, 1, 42);
    double k[N][N], l[N][N], trace = 0, sk = 0, sl = 0, cross = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            k[i][j] = i == j ? 0 : check_dot(x + i * D, x + j * D, D);
            l[i][j] = i == j ? 0 : check_dot(y + i * D, y + j * D, D);
            trace += k[i][j] * l[i][j];
            sk += k[i][j];
            sl += l[i][j];
        }
    for (int i = 0; i < N; i++)
        for (int a = 0; a < N; a++)
            for (int b = 0; b < N; b++)
                cross += k[a][i] * l[i][b];
    double hsic = trace + sk * sl / ((N - 1) * (N - 2)) - 2.0 / (N - 2) * cross;
    loss(&p, x, y, 0, NULL);
    check_near(p.stats[0], hsic, 1e-11 * fabs(hsic), "HSIC_1 n (n - 3)");
    free(x);
    free(y);
}

/* Isotropic, n = 64, d = 512: the biased estimator says 0.89 of nothing, the unbiased one 0. */
Test(cka, of_independent_rows_shows_the_bias) {
    enum { N = 64, D = 512 };
    double *x = finite_normal(N * D, 43, 0, 1, 0), *y = finite_normal(N * D, 44, 0, 1, 0);
    pair biased = {.n = N, .dim = D}, unbiased = {.n = N, .dim = D, .unbiased = true};
    check_near(cka(&biased, x, y), 1 / (1 + (N - 1) / (double)D), 0.02, "biased");
    check_near(cka(&unbiased, x, y), 0, 0.06, "unbiased");
    free(x);
    free(y);
}

/* The loss grows with the square of the noise; 1 - cka in plain subtraction has no digit of it. */
Test(cka, small_losses_keep_their_digits) {
    for (int unbiased = 0; unbiased < 2; unbiased++) {
        pair p = {.n = 16, .dim = 24, .unbiased = unbiased};
        double *y = finite_normal(384, 45, 0, 1, 0);
        double *near = near_rows(y, 384, 1e-7, 46), *far = near_rows(y, 384, 1e-6, 46);
        double small = loss(&p, near, y, 0, NULL), large = loss(&p, far, y, 0, NULL);
        cr_expect(small > 0 && small < 1e-12, "%g", small);
        check_near(large / small, 100, 0.01, "ratio");
        free(y);
        free(near);
        free(far);
    }
}

Test(cka, without_a_norm_the_loss_is_zero_and_so_is_the_gradient) {
    double *y = finite_normal(40, 47, 0, 1, 0), dx[40];
    double flat[40], endless[40], huge[40]; /* huge: K is finite, |K| is not */
    for (int i = 0; i < 40; i++) {
        flat[i] = i % 5;
        endless[i] = i == 7 ? INFINITY : y[i];
        huge[i] = y[i] * 1e100;
    }
    const double *odd[3] = {flat, endless, huge};
    for (int i = 0; i < 12; i++) {
        pair p = {.n = 8, .dim = 5, .unbiased = i & 1, .loss = CQ_GRAM_CKA};
        const double *x = i & 2 ? y : odd[i >> 2], *z = i & 2 ? odd[i >> 2] : y;
        dx[3] = 1;
        cr_expect_eq(loss(&p, x, z, 1, dx), 0, "case %d", i);
        for (int j = 0; j < 40; j++)
            cr_expect_eq(dx[j], 0, "case %d", i);
        p.loss = CQ_GRAM_FROBENIUS;
        double value = loss(&p, x, z, 1, dx);
        cr_expect_eq(value, i < 2 ? 1 : 0, "Frobenius, case %d: %g", i, value);
        for (int j = 0; j < 40; j++)
            cr_expect(isfinite(dx[j]), "Frobenius, case %d", i);
    }
    free(y);
}

Test(gram, too_few_rows_are_refused) {
    double x[6] = {1, 2, 3, 4, 5, 6}, k[9], scratch[6];
    for (int unbiased = 0; unbiased < 2; unbiased++)
        cr_expect_eq(REF_STATUS(gram, .dtype = CQ_F64, .n = unbiased ? 3 : 1, .dim = 2, .x = x,
                                .unbiased = unbiased, .scratch = scratch, .gram = k),
                     CQ_ESHAPE);
    OK(REF_STATUS(gram, .dtype = CQ_F64, .n = 2, .dim = 2, .x = x, .scratch = scratch, .gram = k));
}

typedef struct row_case {
    cq_rowloss_form form;
    const double *x, *y;
    double *value;
} row_case;

static int row_forward(const void *args) {
    const row_case *c = args;
    REF(rowloss, .form = c->form, .n = 6, .dim = 5, .x = c->x, .y = c->y, .out = c->value);
    return CQ_OK;
}

static double row_loss(cq_rowloss_form form, const double *x, const double *y) {
    double value = -1;
    row_case c = {form, x, y, &value};
    row_forward(&c);
    return value;
}

Test(rowloss, gradients_equal_finite_differences) {
    const double weight = 0.7;
    for (int form = CQ_ROWLOSS_COSINE; form <= CQ_ROWLOSS_MSE; form++) {
        double *y = finite_normal(30, 48, 0, 1, 0), *x = near_rows(y, 30, 0.8, 49), dx[30], value;
        REF(rowloss_backward, .form = (cq_rowloss_form)form, .n = 6, .dim = 5, .x = x, .y = y,
            .weight = weight, .dx = dx);
        row_case c = {(cq_rowloss_form)form, x, y, &value};
        finite_check(form ? "mse, seeds 48 49" : "cosine, seeds 48 49",
                     &(finite_forward){row_forward, &c, &value, &weight, 1},
                     &(finite_input){"x", x, dx, 30, 1}, 1);
        free(x);
        free(y);
    }
}

Test(rowloss, closed_forms) {
    double x[30] = {0}, y[30] = {0};
    for (int i = 0; i < 6; i++) {
        x[i * 5] = 2 + i;
        y[i * 5] = 3;
        y[i * 5 + 1] = 4;
    }
    check_near(row_loss(CQ_ROWLOSS_COSINE, x, y), 1 - 0.6, 1e-15, "cosine");
    double distance = 0;
    for (int i = 0; i < 6; i++)
        distance += (i - 1) * (i - 1) + 16;
    check_near(row_loss(CQ_ROWLOSS_MSE, x, y), distance / 150, 1e-15, "relative mse");
    cr_expect_eq(row_loss(CQ_ROWLOSS_COSINE, y, y), 0);
    cr_expect_eq(row_loss(CQ_ROWLOSS_MSE, y, y), 0);
}

Test(rowloss, rows_without_a_norm_count_as_no_loss) {
    double *y = finite_normal(30, 50, 0, 1, 0), zero[30] = {0}, dx[30];
    double *x = near_rows(y, 30, 1, 51);
    double whole = row_loss(CQ_ROWLOSS_COSINE, x, y);
    memset(x, 0, 5 * sizeof(*x));
    double rest = row_loss(CQ_ROWLOSS_COSINE, x, y);
    cr_expect(rest > 0 && rest < whole);
    REF(rowloss_backward, .form = CQ_ROWLOSS_COSINE, .n = 6, .dim = 5, .x = x, .y = y, .weight = 1,
        .dx = dx);
    for (int i = 0; i < 30; i++)
        cr_expect_eq(dx[i] != 0, i >= 5, "at %d", i);
    cr_expect_eq(row_loss(CQ_ROWLOSS_MSE, x, zero), 0);
    free(x);
    free(y);
}

Test(gram, f32_is_the_rounded_f64_result_of_its_own_centred_rows) {
    enum { N = 6, D = 7 };
    double *x = finite_round(finite_normal(N * D, 52, 0, 1, 0), N * D), *k, stats[4];
    float *x32 = finite_narrow(x, N * D), k32[N * N], l32[N * N], scratch[N * D];
    double wide[N * N], out[4];
    pair p = {.n = N, .dim = D, .unbiased = true};
    k = gram(&p, x);
    OK(REF_STATUS(gram, .dtype = CQ_F32, .n = N, .dim = D, .x = x32, .unbiased = true,
                  .scratch = scratch, .gram = k32));
    for (int i = 0; i < N * N; i++) {
        check_near((double)k32[i], k[i], 4e-6, "gram");
        l32[i] = k32[i] + (float)i / 64;
        wide[i] = (double)k32[i];
        k[i] = (double)l32[i];
    }
    OK(REF_STATUS(cka, .dtype = CQ_F32, .n = N, .k = k32, .l = l32, .out = out));
    REF(cka, .n = N, .k = wide, .l = k, .out = stats);
    cr_expect_arr_eq(out, stats, sizeof(out));
    free(x);
    free(x32);
    free(k);
}
