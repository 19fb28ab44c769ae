/* test_cpu_dense.c - matrix products, norms, activations and updates of cpu against ref in F64 and
   the plain FP32 loops, on odd shapes and strided views, under every instruction set the machine
   has; with WAYS_CUDA the same of a device. */
#include "core/base/dtype.h"
#include "kernels/cpu/vec.h"
#include "kernels/nvfp4.h"
#include "tests/three_ways.h"

enum { SEEDS = WAYS_SEEDS(1, 5) };

/* Runs `body` SEEDS times under each instruction set, then judges; `w` and `seed` are visible. */
#define EVERY_ISA(first, body)                                                                     \
    for (int at_ = -1; ways_next(&at_);) {                                                         \
        ways w = {.scratch_bytes = 1 << 20, .at = at_};                                            \
        for (uint64_t seed = (first); seed < (first) + SEEDS; seed++) {                            \
            w.seed = seed, w.drawn = 0;                                                            \
            body                                                                                   \
        }                                                                                          \
        ways_judge(&w);                                                                            \
    }

/* Tensor cores cut what they add to the length of the largest term: on an H200 products over k =
   1000 were off by 2.2 times what the plain loops are. */
#if defined(WAYS_CUDA) && !defined(WAYS_EMULATED)
enum { TENSOR_TIMES = 3 };
#else
enum { TENSOR_TIMES = 2 };
#endif
typedef struct product_case {
    int64_t m, n, k, more; /* more: columns between the rows */
    bool ta, tb;
    double alpha, beta;
} product_case;
static const product_case products[] = {
    {1, 1, 1, 0, false, false, 1, 0},      {7, 5, 3, 2, true, false, 1, 0},
    {65, 33, 129, 1, false, true, 1, 0},   {65, 33, 129, 0, true, true, 0.5, 1},
    {128, 200, 300, 5, true, false, 1, 1}, {257, 96, 64, 0, false, true, -2, 0.5},
    {3, 300, 17, 3, false, false, 1, 2},   {192, 96, 1000, 0, true, false, 1, 1},
    {512, 70, 300, 0, true, false, 2, 1},  {512, 65, 270, 0, true, true, 1, 0.5},
};
/* acts: those of a, b and c that w->act is of */
static void run_product(ways *w, const product_case *c, const char *acts) {
    snprintf(w->what, sizeof(w->what), "%s matmul %lldx%lldx%lld ta %d tb %d, seed %llu",
             ways_name(w->at), (long long)c->m, (long long)c->n, (long long)c->k, c->ta, c->tb,
             (unsigned long long)w->seed);
    int64_t ar = c->ta ? c->k : c->m, ac = c->ta ? c->m : c->k;
    int64_t br = c->tb ? c->n : c->k, bc = c->tb ? c->k : c->n;
    float *a = WAYS_IN(w, matmul, a, ar, ac, ac + c->more, 1.0);
    float *b = WAYS_IN(w, matmul, b, br, bc, bc + 2 * c->more, 1.0);
    if (w->compute == CQ_COMPUTE_BF16) {
        for (int64_t i = 0; i < ar * (ac + c->more); i++)
            a[i] = vec_bf16(a[i]);
        for (int64_t i = 0; i < br * (bc + 2 * c->more); i++)
            b[i] = vec_bf16(b[i]);
    }
    WAYS_OUT(w, matmul, c, c->m, c->n, c->n + c->more,
             w->compute == CQ_COMPUTE_BF16 ? TENSOR_TIMES : 2);
    bool narrow = ways_act(w, acts) == CQ_BF16;
    cq_matmul_args args = {.a_bf16 = narrow && strchr(acts, 'a'),
                           .b_bf16 = narrow && strchr(acts, 'b'),
                           .c_bf16 = narrow && strchr(acts, 'c'),
                           .ta = c->ta,
                           .tb = c->tb,
                           .m = c->m,
                           .n = c->n,
                           .k = c->k,
                           .lda = ac + c->more,
                           .ldb = bc + 2 * c->more,
                           .ldc = c->n + c->more,
                           .alpha = c->alpha,
                           .beta = c->beta};
    WAYS_RUN(w, matmul, args);
}
Test(cpu_dense, matrix_products_of_every_transposition_and_stride) {
    for (size_t i = 0; i < sizeof(products) / sizeof(*products); i++)
        EVERY_ISA(100 * i + 1, w.by_team = true; run_product(&w, &products[i], "");)
}
Test(cpu_dense, bf16_products_of_bf16_operands_are_as_exact_as_fp32_ones) {
    for (size_t i = 0; i < sizeof(products) / sizeof(*products); i++)
        EVERY_ISA(100 * i + 2, w.by_team = true; w.compute = CQ_COMPUTE_BF16;
                  /* enough for a third of k at a time */
                  w.bf16_bytes = 4 * (products[i].m + products[i].n) * (products[i].k / 3 + 16);
                  run_product(&w, &products[i], "");)
}
#ifdef WAYS_CUDA
Test(cpu_dense, products_of_matrices_that_are_stored_as_bf16) {
    static const char *const acts[] = {"a", "b", "c", "a b", "a c", "b c", "a b c"};
    for (size_t i = 1; i < sizeof(products) / sizeof(*products); i += WAYS_PICK(3, 1))
        for (int k = WAYS_JUDGES ? 0 : 6; k < 7; k++) {
            const product_case c = products[i];
            EVERY_ISA(100 * i + 3, w.compute = CQ_COMPUTE_BF16; w.act = CQ_BF16;
                      w.bf16_bytes = 4 * (c.m + c.n + 16) * (c.k + 16);
                      run_product(&w, &c, acts[k]);)
        }
}
Test(cpu_dense, matrices_in_bf16_want_bf16_products) {
    uint16_t a = 0, c = 0;
    float b = 1.0f;
    ways w = {.seed = 0};
    cq_stream s = ways_stream(&w, CPU_WAY);
    cq_matmul_args args = {
        .m = 1, .n = 1, .k = 1, .lda = 1, .ldb = 1, .ldc = 1, .a = &a, .b = &b, .c = &c};
    args.a_bf16 = args.c_bf16 = true;
    cr_expect_eq(WAYS_CALL(&s, matmul, args, WAYS_AT(a, 2), WAYS_AT(b, 4), WAYS_AT(c, 2)),
                 CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "BF16"), "%s", cq_error());
    ways_stream_free(&s);
}
#endif
Test(cpu_dense, bf16_products_round_their_operands_to_the_nearest_even) {
    /* 1 + 2^-8 is a tie and goes down to 1, 1 + 3 2^-8 goes up to 1 + 2^-6 */
    float a[2] = {1.0f + 0x1p-8f, 1.0f + 3 * 0x1p-8f}, b[1] = {1.0f}, c[2];
    ways w = {.compute = CQ_COMPUTE_BF16, .bf16_bytes = 256};
    cq_stream s = ways_stream(&w, CPU_WAY);
    cq_matmul_args args = {.dtype = CQ_F32,
                           .m = 2,
                           .n = 1,
                           .k = 1,
                           .a = a,
                           .lda = 1,
                           .b = b,
                           .ldb = 1,
                           .c = c,
                           .ldc = 1,
                           .alpha = 1.0};
    cr_assert_eq(WAYS_CALL(&s, matmul, args, WAYS_AT(a, sizeof(a)), WAYS_AT(b, sizeof(b)),
                           WAYS_AT(c, sizeof(c))),
                 CQ_OK, "%s", cq_error());
    cr_expect_eq(c[0], 1.0f);
    cr_expect_eq(c[1], 1.0f + 0x1p-6f);
#ifndef WAYS_CUDA
    s.bf16_scratch_bytes = 4;
    cr_expect_eq(s.table->matmul(&s, &args), CQ_ENOMEM);
#endif
    ways_stream_free(&s);
}

static const int64_t group_offsets[] = {0, 0, 5, 90, 90, 91, 160, 300, 300};
static void run_grouped(ways *w, cq_grouped mode, int64_t n, int64_t k, bool w16_too) {
    enum { GROUPS = 8, ROWS = 300 };
    snprintf(w->what, sizeof(w->what), "%s grouped mode %d [%lld, %lld], seed %llu",
             ways_name(w->at), (int)mode, (long long)n, (long long)k, (unsigned long long)w->seed);
    float *x = ways_add(w, "x", offsetof(cq_matmul_grouped_args, x), ROWS, k, k, 1.0, 0.0,
                        mode == CQ_GROUPED_INPUT ? 2 : 0);
    float *weight = ways_add(w, "w", offsetof(cq_matmul_grouped_args, w), GROUPS * n, k, k, 1.0,
                             0.0, mode == CQ_GROUPED_WEIGHT ? 2 : 0);
    float *y = ways_add(w, "y", offsetof(cq_matmul_grouped_args, y), ROWS, n, n, 1.0, 0.0,
                        mode == CQ_GROUPED_FORWARD ? 2 : 0);
    if (w->compute == CQ_COMPUTE_BF16) {
        w->bf16_bytes = 4 * (2 * ROWS * (n > k ? n : k) + n * k);
        for (int64_t i = 0; i < ROWS * k; i++)
            x[i] = vec_bf16(x[i]);
        for (int64_t i = 0; i < ROWS * n; i++)
            y[i] = vec_bf16(y[i]);
        for (int64_t i = 0; i < GROUPS * n * k; i++)
            weight[i] = vec_bf16(weight[i]);
    }
    bool narrow = ways_act(w, "x y") == CQ_BF16;
    cq_matmul_grouped_args args = {.mode = mode,
                                   .groups = GROUPS,
                                   .n = n,
                                   .k = k,
                                   .offsets = group_offsets,
                                   .x_bf16 = narrow,
                                   .y_bf16 = narrow};
    uint16_t *w16 = narrow && w16_too ? malloc((size_t)(GROUPS * n * k) * 2) : NULL;
    if (w16) {
        cq_convert(w16, CQ_BF16, weight, CQ_F32, GROUPS * n * k);
        WAYS_RAW(w, matmul_grouped, w16, GROUPS * n * k * 2);
        args.w16 = w16;
    }
    WAYS_RAW(w, matmul_grouped, offsets, sizeof(group_offsets));
    WAYS_RUN(w, matmul_grouped, args);
    free(w16);
}
Test(cpu_dense, grouped_products_in_every_mode_with_empty_groups) {
    for (int mode = 0; mode < 3; mode++) {
        EVERY_ISA(11, w.by_team = true; run_grouped(&w, (cq_grouped)mode, 33, 70, false);)
        EVERY_ISA(21, w.by_team = true; run_grouped(&w, (cq_grouped)mode, 96, 192, false);)
        EVERY_ISA(31, w.by_team = true; w.compute = CQ_COMPUTE_BF16;
                  run_grouped(&w, (cq_grouped)mode, 40, 64, false);)
    }
}
#ifdef WAYS_CUDA
Test(cpu_dense, grouped_products_of_rows_in_bf16) {
    static const int64_t sizes[][2] = {{33, 70}, {36, 60}, {40, 64}, {264, 136}};
    for (int mode = 0; mode < 3; mode++)
        for (int i = 0; i < 8;
             i += !WAYS_JUDGES ? 7 : WAYS_PICK(i % 2 ? 1 : 3, 1)) /* 0, 3, 4, 7 or all */
            EVERY_ISA(35, w.by_team = true; w.compute = CQ_COMPUTE_BF16; w.act = CQ_BF16;
                      run_grouped(&w, (cq_grouped)mode, sizes[i / 2][0], sizes[i / 2][1], i % 2);)
}
#endif

static void run_rmsnorm(ways *w, int64_t rows, int64_t dim, bool accumulate) {
    snprintf(w->what, sizeof(w->what), "%s rmsnorm %lldx%lld, seed %llu", ways_name(w->at),
             (long long)rows, (long long)dim, (unsigned long long)w->seed);
    WAYS_IN(w, rmsnorm_forward, x, rows, dim, dim, 2.0);
    WAYS_IN(w, rmsnorm_forward, w, 1, dim, dim, 1.0);
    WAYS_OUT(w, rmsnorm_forward, y, rows, dim, dim, 2);
    WAYS_OUT(w, rmsnorm_forward, rstd, 1, rows, rows, 2);
    cq_rmsnorm_forward_args f = {.rows = rows, .dim = dim, .eps = 1e-5, .act = ways_act(w, "y")};
    WAYS_RUN(w, rmsnorm_forward, f);
    WAYS_IN(w, rmsnorm_backward, x, rows, dim, dim, 2.0);
    WAYS_IN(w, rmsnorm_backward, w, 1, dim, dim, 1.0);
    ways_add(w, "rstd", offsetof(cq_rmsnorm_backward_args, rstd), 1, rows, rows, 0.02, 0.5, 0);
    WAYS_IN(w, rmsnorm_backward, dy, rows, dim, dim, 1.0);
    WAYS_OUT(w, rmsnorm_backward, dx, rows, dim, dim, 3);
    WAYS_OUT(w, rmsnorm_backward, dw, 1, dim, dim, 3);
    cq_rmsnorm_backward_args b = {.rows = rows, .dim = dim, .accumulate = accumulate};
    WAYS_RUN(w, rmsnorm_backward, b);
}
Test(cpu_dense, rmsnorm_of_odd_and_wide_rows) {
    EVERY_ISA(41, run_rmsnorm(&w, 1, 1, false);)
    EVERY_ISA(51, run_rmsnorm(&w, 37, 83, true);)
    EVERY_ISA(61, run_rmsnorm(&w, WAYS_ROWS(40, WAYS_PICK(200, 1100)), 192, false);)
    EVERY_ISA(71, run_rmsnorm(&w, WAYS_ROWS(3, 9), 5003, true);)
}

static void run_gatednorm(ways *w, int64_t rows, int64_t dim, int64_t groups, int64_t more) {
    int64_t ldz = dim + more, lddz = dim + (more == 7 ? 2 : more);
    snprintf(w->what, sizeof(w->what), "%s gatednorm %lldx%lld in %lld, seed %llu",
             ways_name(w->at), (long long)rows, (long long)dim, (long long)groups,
             (unsigned long long)w->seed);
    WAYS_IN(w, gatednorm_forward, y, rows, dim, dim, 1.0);
    WAYS_IN(w, gatednorm_forward, z, rows, dim, ldz, 3.0);
    WAYS_IN(w, gatednorm_forward, w, 1, dim, dim, 1.0);
    WAYS_OUT(w, gatednorm_forward, out, rows, dim, dim, 2);
    WAYS_OUT(w, gatednorm_forward, rstd, rows, groups, groups, 2);
    cq_gatednorm_forward_args f = {.rows = rows,
                                   .dim = dim,
                                   .groups = groups,
                                   .ldz = ldz,
                                   .eps = 1e-5,
                                   .act = ways_act(w, "y z out")};
    WAYS_RUN(w, gatednorm_forward, f);
    WAYS_IN(w, gatednorm_backward, y, rows, dim, dim, 1.0);
    WAYS_IN(w, gatednorm_backward, z, rows, dim, ldz, 3.0);
    WAYS_IN(w, gatednorm_backward, w, 1, dim, dim, 1.0);
    ways_add(w, "rstd", offsetof(cq_gatednorm_backward_args, rstd), rows, groups, groups, 0.02, 0.6,
             0);
    WAYS_IN(w, gatednorm_backward, dout, rows, dim, dim, 1.0);
    WAYS_OUT(w, gatednorm_backward, dy, rows, dim, dim, 3);
    WAYS_OUT(w, gatednorm_backward, dz, rows, dim, lddz, 3);
    WAYS_OUT(w, gatednorm_backward, dw, 1, dim, dim, 3);
    cq_gatednorm_backward_args b = {.rows = rows,
                                    .dim = dim,
                                    .groups = groups,
                                    .ldz = ldz,
                                    .lddz = lddz,
                                    .act = ways_act(w, "y z dout dy dz")};
    WAYS_RUN(w, gatednorm_backward, b);
}
Test(cpu_dense, gated_norm_by_group_with_a_strided_gate) {
    EVERY_ISA(81, run_gatednorm(&w, 1, 4, 4, 7);)
    EVERY_ISA(91, run_gatednorm(&w, 53, 99, 3, 7);)
    EVERY_ISA(101, run_gatednorm(&w, WAYS_ROWS(40, WAYS_PICK(150, 700)), 384, 8, 7);)
}
#ifdef WAYS_CUDA
Test(cpu_dense, norms_of_activations_in_bf16) {
    EVERY_ISA(45, w.act = CQ_BF16; run_rmsnorm(&w, 37, 83, true);)
    EVERY_ISA(55, w.act = CQ_BF16;
              run_rmsnorm(&w, WAYS_ROWS(40, WAYS_PICK(200, 1100)), 192, false);)
    EVERY_ISA(65, w.act = CQ_BF16; run_rmsnorm(&w, WAYS_ROWS(3, 9), 5004, true);)
    EVERY_ISA(85, w.act = CQ_BF16; run_gatednorm(&w, 53, 99, 3, 7);)
    EVERY_ISA(95, w.act = CQ_BF16; run_gatednorm(&w, WAYS_ROWS(20, 70), 384, 8, 4);)
    EVERY_ISA(105, w.act = CQ_BF16; run_gatednorm(&w, WAYS_ROWS(20, 70), 1536, 3, 12);)
    EVERY_ISA(108, w.act = CQ_BF16; run_gatednorm(&w, 5, 400, 2, 8);)
}
#endif

/* `even`: rows that can be read four values at a time. */
static void run_headnorm(ways *w, int64_t rows, int64_t heads, int64_t dim, bool norm, bool turn,
                         int64_t most, bool even) {
    int64_t width = heads * dim, ld = width + (even ? 8 : 5);
    int64_t ldy = width + (even ? 0 : 1), lddy = width + (even ? 4 : 3);
    int32_t *positions = malloc((size_t)rows * sizeof(*positions));
    cr_assert_not_null(positions);
    for (int64_t r = 0; r < rows; r++)
        positions[r] = (int32_t)cq_random_below(w->seed, 99, (uint64_t)r, most);
    snprintf(w->what, sizeof(w->what),
             "%s headnorm %lldx%lldx%lld norm %d turn %d act %d, seed %llu", ways_name(w->at),
             (long long)rows, (long long)heads, (long long)dim, norm, turn, w->act,
             (unsigned long long)w->seed);
    WAYS_IN(w, headnorm_forward, x, rows, width, ld, 2.0);
    if (norm)
        WAYS_IN(w, headnorm_forward, w, 1, dim, dim, 1.0);
    WAYS_OUT(w, headnorm_forward, y, rows, width, ldy, 2);
    cq_headnorm_forward_args f = {.rows = rows,
                                  .heads = heads,
                                  .head_dim = dim,
                                  .ldx = ld,
                                  .eps = 1e-6,
                                  .positions = turn ? positions : NULL,
                                  .theta = 1e6,
                                  .ldy = ldy,
                                  .act = ways_act(w, "x y")};
    WAYS_RAW(w, headnorm_forward, positions, rows * 4);
    WAYS_RUN(w, headnorm_forward, f);
    WAYS_IN(w, headnorm_backward, x, rows, width, ld, 2.0);
    if (norm)
        WAYS_IN(w, headnorm_backward, w, 1, dim, dim, 1.0);
    WAYS_IN(w, headnorm_backward, dy, rows, width, lddy, 1.0);
    WAYS_OUT(w, headnorm_backward, dx, rows, width, ld, 3);
    if (norm)
        WAYS_OUT(w, headnorm_backward, dw, 1, dim, dim, 3);
    cq_headnorm_backward_args b = {.rows = rows,
                                   .heads = heads,
                                   .head_dim = dim,
                                   .ldx = ld,
                                   .eps = 1e-6,
                                   .positions = turn ? positions : NULL,
                                   .theta = 1e6,
                                   .lddy = lddy,
                                   .lddx = ld,
                                   .act = ways_act(w, "x dy dx")};
    WAYS_RAW(w, headnorm_backward, positions, rows * 4);
    WAYS_RUN(w, headnorm_backward, b);
    free(positions);
}
Test(cpu_dense, head_norm_and_rotation_together_and_alone) {
    EVERY_ISA(111, run_headnorm(&w, 40, 3, 10, true, true, 300, false);)
    EVERY_ISA(121, run_headnorm(&w, 300, 6, 32, true, true, 40000, false);)
    EVERY_ISA(131, run_headnorm(&w, 21, 2, 33, true, false, 1, false);)
    EVERY_ISA(141, run_headnorm(&w, 33, 5, 128, false, true, 2000000, false);)
    EVERY_ISA(151, run_headnorm(&w, 5, 1, 8, false, false, 1, false);)
    EVERY_ISA(152, run_headnorm(&w, 17, 3, 40, true, true, 300, true);)
}
#ifdef WAYS_CUDA
Test(cpu_dense, head_norm_and_rotation_of_values_in_bf16) {
    EVERY_ISA(153, w.act = CQ_BF16; run_headnorm(&w, 40, 3, 10, true, true, 30, false);)
    EVERY_ISA(154, w.act = CQ_BF16; run_headnorm(&w, 21, 2, 33, true, false, 1, false);)
    EVERY_ISA(155, w.act = CQ_BF16; run_headnorm(&w, 5, 1, 8, false, false, 1, false);)
    EVERY_ISA(156, w.act = CQ_BF16; run_headnorm(&w, 35, 5, 32, true, true, 30, true);)
    EVERY_ISA(157, w.act = CQ_BF16; run_headnorm(&w, 17, 3, 64, true, false, 1, true);)
    EVERY_ISA(158, w.act = CQ_BF16; run_headnorm(&w, 9, 2, 128, false, true, 30, true);)
    EVERY_ISA(159, w.act = CQ_BF16; run_headnorm(&w, 5, 2, 136, true, true, 30, true);)
}
/* dx written over dy, as a model does it. */
static void check_headnorm_in_place(cq_dtype act, int64_t dim) {
    enum { ROWS = 9, HEADS = 2, MOST = ROWS * HEADS * 40 };
    int32_t positions[ROWS];
    float wide[2][MOST], w[40];
    char x[MOST * 4], dy[MOST * 4], dx[MOST * 4];
    int64_t n = ROWS * HEADS * dim, bytes = n * cq_dtype_bytes(act);
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 2; k++)
            wide[k][i] = (float)cq_random_normal(10, (uint64_t)k, (uint64_t)i);
    for (int64_t i = 0; i < dim; i++)
        w[i] = (float)cq_random_normal(10, 2, (uint64_t)i);
    for (int r = 0; r < ROWS; r++)
        positions[r] = r;
    cq_convert(x, act, wide[0], CQ_F32, n);
    cq_convert(dy, act, wide[1], CQ_F32, n);
    for (int at = -1; ways_next(&at);) {
        ways u = {.at = at};
        cq_stream s = ways_stream(&u, CPU_WAY);
        cq_headnorm_backward_args a = {.rows = ROWS,
                                       .heads = HEADS,
                                       .head_dim = dim,
                                       .x = x,
                                       .ldx = HEADS * dim,
                                       .w = w,
                                       .eps = 1e-6,
                                       .positions = positions,
                                       .theta = 1e4,
                                       .dy = dy,
                                       .lddy = HEADS * dim,
                                       .dx = dx,
                                       .lddx = HEADS * dim,
                                       .act = act};
        char same[MOST * 4];
        memcpy(same, dy, (size_t)bytes);
        for (int in_place = 0; in_place < 2; in_place++) {
            if (in_place)
                a.dy = a.dx = same;
            cr_assert_eq(WAYS_CALL(&s, headnorm_backward, a, WAYS_AT(x, bytes), WAYS_AT(w, dim * 4),
                                   WAYS_AT(positions, sizeof(positions)), WAYS_AT(dy, bytes),
                                   WAYS_AT(dx, bytes)),
                         CQ_OK, "%s", cq_error());
        }
        ways_stream_free(&s);
        cr_expect(memcmp(dx, same, (size_t)bytes) == 0, "%s, act %d, head_dim %ld", ways_name(at),
                  act, (long)dim);
        cr_expect(memcmp(dy, same, (size_t)bytes) != 0);
    }
}
Test(cpu_dense, head_norm_in_place_gives_the_same_bits) {
    check_headnorm_in_place(CQ_F32, 40);
    check_headnorm_in_place(CQ_F32, 10);
    check_headnorm_in_place(CQ_BF16, 40);
    check_headnorm_in_place(CQ_BF16, 10);
}
#endif

Test(cpu_dense, rotations_by_a_million_tokens_keep_their_digits) {
    enum { ROWS = 64, DIM = 64 };
    int32_t positions[ROWS];
    float x[ROWS * DIM], y[ROWS * DIM];
    double wide[ROWS * DIM], right[ROWS * DIM];
    for (int r = 0; r < ROWS; r++)
        positions[r] = (int32_t)cq_random_below(9, 1, (uint64_t)r, 1 << 21);
    for (int i = 0; i < ROWS * DIM; i++) {
        x[i] = i % DIM < DIM / 2 ? 1.0f : 0.0f;
        wide[i] = (double)x[i];
    }
    cq_headnorm_forward_args a = {.dtype = CQ_F64,
                                  .rows = ROWS,
                                  .heads = 1,
                                  .head_dim = DIM,
                                  .x = wide,
                                  .ldx = DIM,
                                  .positions = positions,
                                  .theta = 1e4,
                                  .y = right,
                                  .ldy = DIM};
    cr_assert_eq(cq_ref_headnorm_forward(NULL, &a), CQ_OK);
    a.dtype = CQ_F32, a.x = x, a.y = y;
    for (int at = -1; ways_next(&at);) {
        ways w = {.at = at};
        cq_stream s = ways_stream(&w, CPU_WAY);
        cr_assert_eq(WAYS_CALL(&s, headnorm_forward, a, WAYS_AT(x, sizeof(x)),
                               WAYS_AT(positions, sizeof(positions)), WAYS_AT(y, sizeof(y))),
                     CQ_OK, "%s", cq_error());
        ways_stream_free(&s);
        double worst = 0.0;
        for (int i = 0; i < ROWS * DIM; i++)
            worst = fmax(worst, fabs((double)y[i] - right[i]));
        cr_expect(worst < 0x1p-24, "%s: %g", ways_name(at), worst);
    }
}

static void run_activations(ways *w, int64_t rows, int64_t dim, double size) {
    snprintf(w->what, sizeof(w->what), "%s activations %lldx%lld, seed %llu", ways_name(w->at),
             (long long)rows, (long long)dim, (unsigned long long)w->seed);
    WAYS_IN(w, swiglu_forward, gu, rows, 2 * dim, 2 * dim, size);
    WAYS_OUT(w, swiglu_forward, h, rows, dim, dim, 2);
    cq_swiglu_forward_args sf = {.rows = rows, .dim = dim, .act = ways_act(w, "gu h")};
    WAYS_RUN(w, swiglu_forward, sf);
    WAYS_IN(w, swiglu_backward, gu, rows, 2 * dim, 2 * dim, size);
    WAYS_IN(w, swiglu_backward, dh, rows, dim, dim, 1.0);
    WAYS_OUT(w, swiglu_backward, dgu, rows, 2 * dim, 2 * dim, 3);
    cq_swiglu_backward_args sb = {.rows = rows, .dim = dim, .act = ways_act(w, "gu dh dgu")};
    WAYS_RUN(w, swiglu_backward, sb);
    WAYS_IN(w, relu2_forward, x, rows, dim, dim, size);
    WAYS_OUT(w, relu2_forward, h, rows, dim, dim, 2);
    cq_relu2_forward_args rf = {.rows = rows, .dim = dim, .act = ways_act(w, "x h")};
    WAYS_RUN(w, relu2_forward, rf);
    WAYS_IN(w, relu2_backward, x, rows, dim, dim, size);
    WAYS_IN(w, relu2_backward, dh, rows, dim, dim, 1.0);
    WAYS_OUT(w, relu2_backward, dx, rows, dim, dim, 3);
    cq_relu2_backward_args rb = {.rows = rows, .dim = dim, .act = ways_act(w, "x dh dx")};
    WAYS_RUN(w, relu2_backward, rb);
}
Test(cpu_dense, activations_of_small_and_of_large_arguments) {
    EVERY_ISA(161, run_activations(&w, 37, 53, 1.0);)
    EVERY_ISA(171, run_activations(&w, 200, 256, 60.0);)
}
#ifdef WAYS_CUDA
Test(cpu_dense, nonlinearities_of_activations_in_bf16) {
    EVERY_ISA(165, w.act = CQ_BF16; run_activations(&w, 37, 53, 1.0);)
    EVERY_ISA(175, w.act = CQ_BF16; run_activations(&w, 200, 256, 60.0);)
    EVERY_ISA(178, w.act = CQ_BF16; run_activations(&w, 7, 52, 3.0);)
}
#endif

static void run_updates(ways *w, int64_t rows, int64_t cols, int64_t step) {
    int64_t n = rows * cols;
    snprintf(w->what, sizeof(w->what), "%s updates %lldx%lld at step %lld, seed %llu",
             ways_name(w->at), (long long)rows, (long long)cols, (long long)step,
             (unsigned long long)w->seed);
    WAYS_OUT(w, adamw, w, rows, cols, cols, 2);
    WAYS_OUT(w, adamw, m, rows, cols, cols, 2);
    float *v = WAYS_OUT(w, adamw, v, rows, cols, cols, 2);
    for (int64_t i = 0; i < n; i++)
        v[i] = v[i] * v[i];
    WAYS_IN(w, adamw, g, rows, cols, cols, 1.0);
    cq_adamw_args a = {.rows = rows,
                       .cols = cols,
                       .lr = 1e-2,
                       .beta1 = 0.9,
                       .beta2 = 0.95,
                       .eps = 1e-8,
                       .weight_decay = 0.1,
                       .grad_scale = 0.7,
                       .step = step};
    cq_adamw_now now = {1e-2f, 0.7f, 0.5f, 0.25f, 0, 0};
    WAYS_RAW(w, adamw, now, sizeof now);
    a.now = step > 1 ? &now : NULL;
    WAYS_RUN(w, adamw, a);
    WAYS_IN(w, sumsq, x, 1, n, n, 1.0);
    WAYS_DOUBLE(w, sumsq, out, 1);
    cq_sumsq_args q = {.n = n};
    WAYS_RUN(w, sumsq, q);
    for (int beta = 0; beta < 2; beta++) {
        WAYS_IN(w, axpy, x, 1, n, n, 1.0);
        WAYS_OUT(w, axpy, y, 1, n, n, 2);
        cq_axpy_args x = {.n = n, .alpha = -1.5, .beta = 0.25 * beta};
        WAYS_RUN(w, axpy, x);
    }
}
Test(cpu_dense, adamw_sum_of_squares_and_axpy) {
    EVERY_ISA(181, run_updates(&w, 1, 1, 1);)
    EVERY_ISA(191, run_updates(&w, 123, 457, 10);)
}
Test(cpu_dense, a_sum_of_squares_that_is_not_finite_says_so) {
    float x[40000] = {0};
    for (int at = -1; ways_next(&at);) {
        ways w = {.at = at};
        cq_stream s = ways_stream(&w, CPU_WAY);
        for (int bad = 0; bad < 3; bad++) {
            double out = 0.0;
            x[39999] = bad == 0 ? INFINITY : bad == 1 ? NAN : 1e30f;
            cq_sumsq_args a = {.dtype = CQ_F32, .n = 40000, .x = x, .out = &out};
            cr_assert_eq(WAYS_CALL(&s, sumsq, a, WAYS_AT(x, sizeof(x)), WAYS_AT(out, sizeof(out))),
                         CQ_OK, "%s", cq_error());
            cr_expect(bad == 2 ? isfinite(out) : !isfinite(out), "%s: %g", ways_name(at), out);
        }
        ways_stream_free(&s);
    }
}
#ifndef WAYS_CUDA
Test(cpu_dense, vector_exponentials_reach_both_ends) {
    cr_expect_eq(vec_exp(-INFINITY), 0.0f);
    cr_expect_eq(vec_exp(-110.0f), 0.0f);
    cr_expect_eq(vec_exp(-104.0f), 0.0f);
    cr_expect_eq(vec_exp(0.0f), 1.0f);
    cr_expect(isinf(vec_exp(89.0f)) && isinf(vec_exp(INFINITY)));
    cr_expect(isnan(vec_exp(NAN)) && isnan(vec_silu(NAN)) && isnan(vec_softplus(NAN)));
    double worst = 0.0;
    for (int i = -10000; i <= 8870; i++) {
        float x = (float)i * 0.01f;
        double right = exp((double)x);
        int e;
        frexp(right, &e);
        worst =
            fmax(worst, fabs((double)vec_exp(x) - right) / ldexp(1.0, (e < -125 ? -125 : e) - 24));
    }
    cr_expect(worst < 1.5, "%g ulp", worst);
}
#endif
