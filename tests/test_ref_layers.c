/* test_ref_layers.c - ref against closed forms and finite differences: matrix products, norms,
   activations.

   Whole numbers make the matrix products exact, so those are compared for equality; gradients are
   held to the bound of tests/finite.h. */
#include "kernels/nvfp4.h"
#include "tests/finite.h"
#include "tests/plain_kernels.h"

enum { SEED = 20240 };
#define NEAR(got, want, tol)                                                                       \
    cr_expect(fabs((double)(got) - (double)(want)) <= (tol), "%s is %.17g, wanted %.17g", #got,    \
              (double)(got), (double)(want))
#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())
#define RUN(op)                                                                                    \
    static int run_##op(const void *a) { return cq_ref_##op(NULL, a); }

RUN(rmsnorm_forward)
RUN(gatednorm_forward)
RUN(headnorm_forward)
RUN(swiglu_forward)
RUN(relu2_forward)
RUN(matmul_grouped)

/* logical element (i, j) of the two operands and of C */
static double a_at(int64_t i, int64_t k) { return (double)((3 * i + 5 * k) % 7 - 3); }
static double b_at(int64_t k, int64_t j) { return (double)((2 * k + 7 * j) % 11 - 5); }
static double c_at(int64_t i, int64_t j) { return (double)((i + 2 * j) % 5 - 2); }

static void set(void *p, cq_dtype dtype, int64_t i, double v) {
    if (dtype == CQ_F32)
        ((float *)p)[i] = (float)v;
    else
        ((double *)p)[i] = v;
}
static double get(const void *p, cq_dtype dtype, int64_t i) {
    return dtype == CQ_F32 ? (double)((const float *)p)[i] : ((const double *)p)[i];
}

static void check_matmul(const cq_kernels *table, cq_dtype dtype, bool ta, bool tb, double alpha,
                         double beta) {
    enum { M = 3, N = 5, K = 7, LD = 9 };
    double a[LD * LD], b[LD * LD], c[LD * LD];
    for (int i = 0; i < LD * LD; i++)
        set(a, dtype, i, NAN), set(b, dtype, i, NAN), set(c, dtype, i, 99);
    for (int64_t i = 0; i < M; i++)
        for (int64_t k = 0; k < K; k++)
            set(a, dtype, ta ? k * (LD - 1) + i : i * (LD - 1) + k, a_at(i, k));
    for (int64_t k = 0; k < K; k++)
        for (int64_t j = 0; j < N; j++)
            set(b, dtype, tb ? j * LD + k : k * LD + j, b_at(k, j));
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N; j++)
            set(c, dtype, i * (N + 2) + j, beta == 0 ? NAN : c_at(i, j));
    cq_matmul_args m = {.dtype = dtype,
                        .ta = ta,
                        .tb = tb,
                        .m = M,
                        .n = N,
                        .k = K,
                        .a = a,
                        .lda = LD - 1,
                        .b = b,
                        .ldb = LD,
                        .c = c,
                        .ldc = N + 2,
                        .alpha = alpha,
                        .beta = beta};
    OK(table->matmul(NULL, &m));
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N + 2; j++) {
            double want = 0, got = get(c, dtype, i * (N + 2) + j);
            for (int64_t k = 0; j < N && k < K; k++)
                want += alpha * a_at(i, k) * b_at(k, j);
            want = j < N ? want + beta * c_at(i, j) : 99;
            cr_expect(got == want,
                      "%s dtype %d ta %d tb %d alpha %g beta %g: C[%ld, %ld] is %g, wanted %g",
                      table->name, (int)dtype, ta, tb, alpha, beta, (long)i, (long)j, got, want);
        }
}

Test(ref_matmul, every_transposition_with_strides_alpha_and_beta_is_exact_on_whole_numbers) {
    static const double alpha[] = {1, -2, 0.5}, beta[] = {0, 1, -0.25};
    for (int form = 0; form < 36; form++) {
        bool ta = form & 1, tb = form & 2;
        double al = alpha[form / 4 % 3], be = beta[form / 12];
        check_matmul(&cq_ref_kernels, CQ_F64, ta, tb, al, be);
        check_matmul(&cq_ref_kernels, CQ_F32, ta, tb, al, be);
        check_matmul(&cq_plain_kernels, CQ_F32, ta, tb, al, be);
    }
}

Test(ref_matmul, a_dtype_that_is_not_a_float_buffer_is_refused) {
    cq_matmul_args m = {.dtype = CQ_BF16};
    cr_expect_eq(cq_ref_matmul(NULL, &m), CQ_EUSAGE);
    cr_expect_eq(cq_plain_matmul(NULL, &(cq_matmul_args){.dtype = CQ_F64}), CQ_EUSAGE);
}

Test(ref_matmul, grouped_forms_are_a_product_and_its_two_gradients_and_skip_empty_groups) {
    enum { E = 5, N = 3, K = 4, ROWS = 8 };
    static const int64_t offsets[E + 1] = {0, 0, 3, 4, 4, 8};
    double *x = finite_normal(ROWS * K, SEED, 1, 1, 0),
           *w = finite_normal(E * N * K, SEED, 2, 1, 0);
    double *g = finite_normal(ROWS * N, SEED, 3, 1, 0), *y = finite_zeros(ROWS * N);
    double *dx = finite_zeros(ROWS * K), *dw = finite_zeros(E * N * K);
    cq_matmul_grouped_args f = {.dtype = CQ_F64,
                                .mode = CQ_GROUPED_FORWARD,
                                .groups = E,
                                .n = N,
                                .k = K,
                                .offsets = offsets,
                                .x = x,
                                .w = w,
                                .y = y};
    cq_matmul_grouped_args in = {.dtype = CQ_F64,
                                 .mode = CQ_GROUPED_INPUT,
                                 .groups = E,
                                 .n = N,
                                 .k = K,
                                 .offsets = offsets,
                                 .x = dx,
                                 .w = w,
                                 .y = g};
    cq_matmul_grouped_args weight = {.dtype = CQ_F64,
                                     .mode = CQ_GROUPED_WEIGHT,
                                     .groups = E,
                                     .n = N,
                                     .k = K,
                                     .offsets = offsets,
                                     .x = x,
                                     .w = dw,
                                     .y = g};
    OK(cq_ref_matmul_grouped(NULL, &f));
    NEAR(y[3 * N + 1],
         w[2 * N * K + K] * x[3 * K] + w[2 * N * K + K + 1] * x[3 * K + 1] +
             w[2 * N * K + K + 2] * x[3 * K + 2] + w[2 * N * K + K + 3] * x[3 * K + 3],
         1e-14);
    for (int twice = 0; twice < 2; twice++) {
        OK(cq_ref_matmul_grouped(NULL, &in));
        OK(cq_ref_matmul_grouped(NULL, &weight));
    }
    finite_check("matmul_grouped seed 20240",
                 &(finite_forward){run_matmul_grouped, &f, y, g, ROWS * N},
                 (finite_input[]){{"x", x, dx, ROWS * K, 1}, {"w", w, dw, E * N * K, 2}}, 2);
    for (int i = 0; i < N * K; i++)
        cr_expect(dw[i] == 0 && dw[3 * N * K + i] == 0, "a group without rows got a gradient");
    free(x), free(w), free(g), free(y), free(dx), free(dw);
}

Test(ref_rmsnorm, a_constant_row_becomes_the_weight_over_the_root_of_one_plus_eps) {
    enum { N = 6 };
    double x[N], w[N], y[N], rstd;
    for (int i = 0; i < N; i++)
        x[i] = i % 2 ? -3 : 3, w[i] = i + 1;
    OK(cq_ref_rmsnorm_forward(NULL, &(cq_rmsnorm_forward_args){.dtype = CQ_F64,
                                                               .rows = 1,
                                                               .dim = N,
                                                               .x = x,
                                                               .w = w,
                                                               .eps = 7,
                                                               .y = y,
                                                               .rstd = &rstd}));
    NEAR(rstd, 0.25, 1e-15);
    for (int i = 0; i < N; i++)
        NEAR(y[i], (i + 1) * x[i] / 4, 1e-14);
}

/* quantized copies: by groups of rows, whether or not y is kept; blocks above the frozen maximum
 * are counted */
Test(ref_rmsnorm, the_quantized_copy_is_the_codec_of_y_by_groups_with_or_without_y) {
    enum { ROWS = 5, N = 32 };
    double *wide = finite_normal(ROWS * N, SEED, 4, 1, 0);
    float *x = finite_narrow(wide, ROWS * N), y[ROWS * N], yq[ROWS * N], alone[ROWS * N], w[N],
          want[16];
    for (int i = 0; i < N; i++)
        w[i] = 1 + (float)i / 16;
    const float amax[3] = {0.5f, 9, 4};
    const int64_t offsets[4] = {0, 2, 2, ROWS};
    int64_t saturated = 10, expected = 10;
    cq_rmsnorm_forward_args a = {
        .dtype = CQ_F32, .rows = ROWS, .dim = N, .x = x, .w = w, .eps = 1e-5};
    a.y = y, a.yq = yq, a.fq = (cq_fq){amax, offsets, 3, &saturated};
    OK(cq_ref_rmsnorm_forward(NULL, &a));
    for (int b = 0; b < ROWS * N / 16; b++) {
        expected += cq_nvfp4_block_fake(want, y + b * 16, amax[b < 4 ? 0 : 2], -1, 448);
        cr_expect(!memcmp(want, yq + b * 16, sizeof want), "block %d differs", b);
    }
    cr_expect(saturated == expected && expected > 10, "saturated %ld, wanted %ld", (long)saturated,
              (long)expected);
    a.y = NULL, a.yq = alone;
    OK(cq_ref_rmsnorm_forward(NULL, &a));
    cr_expect(!memcmp(yq, alone, sizeof yq), "yq depends on whether y is kept");
    a.fq = (cq_fq){0};
    OK(cq_ref_rmsnorm_forward(NULL, &a));
    cr_expect(!memcmp(y, alone, sizeof y), "without maxima yq is not y");
    a.dim = 24, a.fq = (cq_fq){amax, offsets, 3, NULL};
    cr_expect_eq(cq_ref_rmsnorm_forward(NULL, &a), CQ_ESHAPE);
    free(wide), free(x);
}

Test(ref_rmsnorm, gradients_agree_with_differences_overwritten_accumulated_and_without_dw) {
    enum { ROWS = 4, N = 7 };
    double *x = finite_normal(ROWS * N, SEED, 5, 2, 0.5), *w = finite_normal(N, SEED, 6, 1, 1);
    double *g = finite_normal(ROWS * N, SEED, 7, 1, 0), y[ROWS * N], rstd[ROWS];
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        double *dx = finite_zeros(ROWS * N), *dw = finite_zeros(N);
        cq_rmsnorm_forward_args f = {.dtype = CQ_F64,
                                     .rows = ROWS,
                                     .dim = N,
                                     .x = x,
                                     .w = w,
                                     .eps = 0.1,
                                     .y = y,
                                     .rstd = rstd};
        cq_rmsnorm_backward_args b = {.dtype = CQ_F64,
                                      .rows = ROWS,
                                      .dim = N,
                                      .x = x,
                                      .w = w,
                                      .rstd = rstd,
                                      .dy = g,
                                      .dx = dx,
                                      .dw = dw,
                                      .accumulate = accumulate};
        OK(cq_ref_rmsnorm_forward(NULL, &f));
        OK(cq_ref_rmsnorm_backward(NULL, &b));
        OK(cq_ref_rmsnorm_backward(NULL, &b));
        finite_check(
            "rmsnorm seed 20240", &(finite_forward){run_rmsnorm_forward, &f, y, g, ROWS * N},
            (finite_input[]){{"x", x, dx, ROWS * N, 1 + accumulate}, {"w", w, dw, N, 2}}, 2);
        double first = dx[0];
        b.dw = NULL, b.accumulate = false;
        OK(cq_ref_rmsnorm_backward(NULL, &b));
        NEAR(dx[0] * (1 + accumulate), first, 1e-14);
        free(dx), free(dw);
    }
    free(x), free(w), free(g);
}

Test(ref_gatednorm, scaling_one_group_changes_nothing_and_the_gate_comes_first) {
    enum { N = 12, G = 3 };
    double y[N], z[N], w[N], out[N], again[N], rstd[G];
    for (int i = 0; i < N; i++)
        y[i] = i % 2 ? 2 : -2, z[i] = 40, w[i] = i;
    cq_gatednorm_forward_args a = {.dtype = CQ_F64,
                                   .rows = 1,
                                   .dim = N,
                                   .groups = G,
                                   .y = y,
                                   .z = z,
                                   .ldz = N,
                                   .w = w,
                                   .out = out,
                                   .rstd = rstd};
    OK(cq_ref_gatednorm_forward(NULL, &a));
    for (int i = 0; i < N; i++)
        NEAR(out[i], i % 2 ? i : -i, 1e-14);
    for (int i = 4; i < 8; i++)
        y[i] *= 5, z[i] = 3;
    a.out = NULL, a.outq = again;
    OK(cq_ref_gatednorm_forward(NULL, &a));
    for (int i = 0; i < N; i++)
        NEAR(again[i], out[i], 1e-14);
    NEAR(rstd[0], 1.0 / 80, 1e-15);
    NEAR(rstd[1], (1 + exp(-3)) / 30, 1e-15);
}

Test(ref_gatednorm, gradients_agree_with_differences_on_strided_gates) {
    enum { ROWS = 3, N = 10, G = 2, LDZ = 13 };
    double *y = finite_normal(ROWS * N, SEED, 8, 1, 0),
           *z = finite_normal(ROWS * LDZ, SEED, 9, 2, 0);
    double *w = finite_normal(N, SEED, 10, 1, 1), *g = finite_normal(ROWS * N, SEED, 11, 1, 0);
    double out[ROWS * N], rstd[ROWS * G];
    double *dy = finite_zeros(ROWS * N), *dz = finite_zeros(ROWS * LDZ), *dw = finite_zeros(N);
    cq_gatednorm_forward_args f = {.dtype = CQ_F64,
                                   .rows = ROWS,
                                   .dim = N,
                                   .groups = G,
                                   .y = y,
                                   .z = z,
                                   .ldz = LDZ,
                                   .w = w,
                                   .eps = 0.05,
                                   .out = out,
                                   .rstd = rstd};
    cq_gatednorm_backward_args b = {.dtype = CQ_F64,
                                    .rows = ROWS,
                                    .dim = N,
                                    .groups = G,
                                    .y = y,
                                    .z = z,
                                    .ldz = LDZ,
                                    .w = w,
                                    .rstd = rstd,
                                    .dout = g,
                                    .dy = dy,
                                    .dz = dz,
                                    .lddz = LDZ,
                                    .dw = dw};
    OK(cq_ref_gatednorm_forward(NULL, &f));
    OK(cq_ref_gatednorm_backward(NULL, &b));
    OK(cq_ref_gatednorm_backward(NULL, &b));
    finite_check("gatednorm seed 20240",
                 &(finite_forward){run_gatednorm_forward, &f, out, g, ROWS * N},
                 (finite_input[]){
                     {"y", y, dy, ROWS * N, 1}, {"z", z, dz, ROWS * LDZ, 1}, {"w", w, dw, N, 2}},
                 3);
    b.dw = NULL;
    OK(cq_ref_gatednorm_backward(NULL, &b));
    free(y), free(z), free(w), free(g), free(dy), free(dz), free(dw);
}

Test(ref_headnorm, rotation_by_hand_and_the_two_things_it_can_leave_out) {
    const double x[4] = {1, 2, 0, -1};
    const int32_t position = 3;
    double y[4], w[4] = {1, 1, 1, 2};
    cq_headnorm_forward_args a = {.dtype = CQ_F64,
                                  .rows = 1,
                                  .heads = 1,
                                  .head_dim = 4,
                                  .x = x,
                                  .ldx = 4,
                                  .theta = 100,
                                  .y = y,
                                  .ldy = 4};
    OK(cq_ref_headnorm_forward(NULL, &a));
    for (int i = 0; i < 4; i++)
        NEAR(y[i], x[i], 0);
    a.positions = &position;
    OK(cq_ref_headnorm_forward(NULL, &a));
    NEAR(y[0], cos(3), 1e-15);
    NEAR(y[2], sin(3), 1e-15);
    NEAR(y[1], 2 * cos(0.3) + sin(0.3), 1e-15);
    NEAR(y[3], -cos(0.3) + 2 * sin(0.3), 1e-15);
    a.positions = NULL, a.w = w, a.eps = 2.5;
    OK(cq_ref_headnorm_forward(NULL, &a));
    NEAR(y[1], 1, 1e-15);
    NEAR(y[3], -1, 1e-15);
    a.positions = &position, a.head_dim = 3;
    cr_expect_eq(cq_ref_headnorm_forward(NULL, &a), CQ_ESHAPE);
}

static void check_headnorm(bool with_w, bool with_positions, bool alias) {
    enum { ROWS = 4, H = 3, D = 6, LDX = 20, LDY = 19 };
    static const int32_t positions[ROWS] = {0, 1, 17, 5};
    double *x = finite_normal(ROWS * LDX, SEED, 12, 1, 0.2), *w = finite_normal(D, SEED, 13, 1, 1);
    double *g = finite_normal(ROWS * LDY, SEED, 14, 1, 0), *y = finite_zeros(ROWS * LDY);
    double *dx = finite_zeros(ROWS * LDX), *dw = finite_zeros(D);
    cq_headnorm_forward_args f = {.dtype = CQ_F64,
                                  .rows = ROWS,
                                  .heads = H,
                                  .head_dim = D,
                                  .x = x,
                                  .ldx = LDX,
                                  .w = with_w ? w : NULL,
                                  .eps = 0.01,
                                  .positions = with_positions ? positions : NULL,
                                  .theta = 1e3,
                                  .y = y,
                                  .ldy = LDY};
    cq_headnorm_backward_args b = {.dtype = CQ_F64,
                                   .rows = ROWS,
                                   .heads = H,
                                   .head_dim = D,
                                   .x = x,
                                   .ldx = LDX,
                                   .w = f.w,
                                   .eps = 0.01,
                                   .positions = f.positions,
                                   .theta = 1e3,
                                   .dy = g,
                                   .lddy = LDY,
                                   .dx = dx,
                                   .lddx = LDX,
                                   .dw = dw};
    for (int twice = 0; twice < 2; twice++)
        OK(cq_ref_headnorm_backward(NULL, &b));
    finite_check(with_w ? "headnorm with w, seed 20240" : "headnorm without w, seed 20240",
                 &(finite_forward){run_headnorm_forward, &f, y, g, ROWS * LDY},
                 (finite_input[]){{"x", x, dx, ROWS * LDX, 1}, {"w", w, dw, D, 2}}, with_w ? 2 : 1);
    for (int i = 0; !with_w && i < D; i++)
        cr_expect_eq(dw[i], 0);
    if (alias) {
        b.dx = g, b.lddx = LDY, b.dw = NULL;
        OK(cq_ref_headnorm_backward(NULL, &b));
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < H * D; i++)
                cr_expect_eq(g[r * LDY + i], dx[r * LDX + i]);
    }
    free(x), free(w), free(g), free(y), free(dx), free(dw);
}

Test(ref_headnorm, gradients_agree_with_differences_in_all_four_forms) {
    for (int form = 0; form < 4; form++)
        check_headnorm(form & 1, form & 2, true);
}

Test(ref_swiglu, values_by_hand_and_gradients_by_differences) {
    enum { ROWS = 3, N = 5 };
    double *gu = finite_normal(ROWS * 2 * N, SEED, 15, 2, 0),
           *g = finite_normal(ROWS * N, SEED, 16, 1, 0);
    double h[ROWS * N], hq[ROWS * N], dgu[ROWS * 2 * N];
    gu[0] = 0, gu[1] = 50, gu[N + 1] = 3, gu[2] = log(3), gu[N + 2] = 2;
    cq_swiglu_forward_args f = {.dtype = CQ_F64, .rows = ROWS, .dim = N, .gu = gu, .h = h};
    cq_swiglu_backward_args b = {
        .dtype = CQ_F64, .rows = ROWS, .dim = N, .gu = gu, .dh = g, .dgu = dgu};
    OK(cq_ref_swiglu_forward(NULL, &f));
    NEAR(h[0], 0, 0);
    NEAR(h[1], 150, 1e-12);
    NEAR(h[2], 1.5 * log(3), 1e-15);
    f.h = NULL, f.hq = hq;
    OK(cq_ref_swiglu_forward(NULL, &f));
    cr_expect(!memcmp(h, hq, sizeof h), "hq without maxima is not h");
    f.h = h, f.hq = NULL;
    gu[1] = -1.5;
    OK(cq_ref_swiglu_backward(NULL, &b));
    finite_check("swiglu seed 20240", &(finite_forward){run_swiglu_forward, &f, h, g, ROWS * N},
                 (finite_input[]){{"gu", gu, dgu, ROWS * 2 * N, 1}}, 1);
    free(gu), free(g);
}

Test(ref_swiglu, a_gate_far_below_zero_gives_zero_and_not_nan) {
    float gu[2] = {-200, 3}, h = 1, dh = 1, dgu[2];
    OK(cq_ref_swiglu_forward(
        NULL, &(cq_swiglu_forward_args){.dtype = CQ_F32, .rows = 1, .dim = 1, .gu = gu, .h = &h}));
    OK(cq_ref_swiglu_backward(
        NULL, &(cq_swiglu_backward_args){
                  .dtype = CQ_F32, .rows = 1, .dim = 1, .gu = gu, .dh = &dh, .dgu = dgu}));
    cr_expect(h == 0 && dgu[0] == 0 && dgu[1] == 0, "%g %g %g", (double)h, (double)dgu[0],
              (double)dgu[1]);
    OK(cq_plain_swiglu_forward(
        NULL, &(cq_swiglu_forward_args){.dtype = CQ_F32, .rows = 1, .dim = 1, .gu = gu, .h = &h}));
    cr_expect(h == 0);
}

Test(ref_relu2, values_gradients_and_the_gradient_over_its_own_input) {
    enum { ROWS = 3, N = 32 };
    double *x = finite_normal(ROWS * N, SEED, 17, 1, 0),
           *g = finite_normal(ROWS * N, SEED, 18, 1, 0);
    double h[ROWS * N], hq[ROWS * N], alone[ROWS * N], dx[ROWS * N];
    for (int i = 0; i < ROWS * N; i++)
        x[i] += x[i] < 0 ? -0.1 : 0.1; /* differences must not straddle the kink */
    const float amax = 9;
    cq_relu2_forward_args f = {.dtype = CQ_F64, .rows = ROWS, .dim = N, .x = x, .h = h};
    cq_relu2_backward_args b = {.dtype = CQ_F64, .rows = ROWS, .dim = N, .x = x, .dh = g, .dx = dx};
    OK(cq_ref_relu2_backward(NULL, &b));
    finite_check("relu2 seed 20240", &(finite_forward){run_relu2_forward, &f, h, g, ROWS * N},
                 (finite_input[]){{"x", x, dx, ROWS * N, 1}}, 1);
    for (int i = 0; i < ROWS * N; i++)
        cr_expect_eq(h[i], x[i] > 0 ? x[i] * x[i] : 0);
    f.hq = hq, f.fq.amax = &amax;
    OK(cq_ref_relu2_forward(NULL, &f));
    f.h = NULL, f.hq = alone;
    OK(cq_ref_relu2_forward(NULL, &f));
    cr_expect(!memcmp(hq, alone, sizeof hq) && memcmp(hq, h, sizeof h));
    b.dx = g;
    OK(cq_ref_relu2_backward(NULL, &b));
    cr_expect(!memcmp(g, dx, sizeof dx), "dx over dh differs");
    free(x), free(g);
}

Test(ref_norms, fp32_is_the_double_result_rounded_once_and_the_plain_loop_is_near_it) {
    enum { ROWS = 5, N = 37 };
    double *x = finite_round(finite_normal(ROWS * N, SEED, 19, 1, 0), ROWS * N), w[N], y[ROWS * N];
    float *xf = finite_narrow(x, ROWS * N), wf[N], yf[ROWS * N], yp[ROWS * N];
    for (int i = 0; i < N; i++)
        w[i] = 1 + i / 64.0, wf[i] = (float)w[i];
    OK(cq_ref_rmsnorm_forward(NULL, &(cq_rmsnorm_forward_args){.dtype = CQ_F64,
                                                               .rows = ROWS,
                                                               .dim = N,
                                                               .x = x,
                                                               .w = w,
                                                               .eps = 1e-5,
                                                               .y = y,
                                                               .fq = {0},
                                                               NULL}));
    OK(cq_ref_rmsnorm_forward(NULL, &(cq_rmsnorm_forward_args){.dtype = CQ_F32,
                                                               .rows = ROWS,
                                                               .dim = N,
                                                               .x = xf,
                                                               .w = wf,
                                                               .eps = 1e-5,
                                                               .y = yf,
                                                               .fq = {0},
                                                               NULL}));
    OK(cq_plain_rmsnorm_forward(NULL, &(cq_rmsnorm_forward_args){.dtype = CQ_F32,
                                                                 .rows = ROWS,
                                                                 .dim = N,
                                                                 .x = xf,
                                                                 .w = wf,
                                                                 .eps = 1e-5,
                                                                 .y = yp,
                                                                 .fq = {0},
                                                                 NULL}));
    int plain_differs = 0;
    for (int i = 0; i < ROWS * N; i++) {
        cr_expect(yf[i] == (float)y[i], "y[%d] is %.9g, wanted %.9g", i, (double)yf[i], y[i]);
        NEAR(yp[i], y[i], 3e-6);
        plain_differs += yp[i] != yf[i];
    }
    cr_expect(plain_differs > 0, "the plain loop sums in double");
    free(x), free(xf);
}
