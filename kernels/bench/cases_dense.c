/* cases_dense.c - matrix products, norms, activations, quantization and updates, at the sizes of
 * the two small gsm8k models in training (8 sequences of 256 tokens, hidden size 192) and, where
 * memory is what counts, on 64 MiB.
 */
#include "kernels/bench/bench.h"
#include <stdio.h>

enum { T = 2048, D = 192, INNER = 512, MAMBA = 384, BIG = 16 << 20 };

typedef struct product {
    int64_t m, n, k;
    bool ta, tb;
} product;
static void product_case(bench *b, const product *p) {
    char label[64];
    snprintf(label, sizeof(label), "%lldx%lldx%lld %s", (long long)p->m, (long long)p->n,
             (long long)p->k,
             p->ta   ? "TN"
             : p->tb ? "NT"
                     : "NN");
    MEASURE(b, matmul, label, 2.0 * (double)(p->m * p->n * p->k),
            4 * (p->m * p->k + p->k * p->n + p->m * p->n), .ta = p->ta, .tb = p->tb, .m = p->m,
            .n = p->n, .k = p->k, .a = bench_floats(b, p->m * p->k), .lda = p->ta ? p->m : p->k,
            .b = bench_floats(b, p->k * p->n), .ldb = p->tb ? p->k : p->n,
            .c = bench_floats(b, p->m * p->n), .ldc = p->n, .alpha = 1.0,
            .beta = p->ta ? 1.0 : 0.0);
}
void bench_matmul(bench *b) {
    static const product all[] = {
        {T, D, D, false, true},       {T, 2 * INNER, D, false, true},
        {T, D, INNER, false, true},   {T, D, 2 * INNER, false, false},
        {T, INNER, D, false, false},  {2 * INNER, D, T, true, false},
        {D, INNER, T, true, false},   {384, 96, D, false, true},
        {2048, 1024, D, false, true}, {512, 2560, 2560, false, true},
        {64, 96, D, false, true},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
        product_case(b, &all[i]);
}

void bench_matmul_grouped(bench *b) {
    enum { E = 8, N = 96, ROWS = 2 * T };
    static const char *const name[] = {"forward", "input", "weight"};
    for (int mode = 0; mode < 3; mode++) {
        char label[64];
        snprintf(label, sizeof(label), "%s 8x512x96x192", name[mode]);
        MEASURE(b, matmul_grouped, label, 2.0 * ROWS * N * D, 4 * (ROWS * (N + D) + E * N * D),
                .mode = (cq_grouped)mode, .groups = E, .n = N, .k = D,
                .offsets = bench_bounds(b, E, ROWS), .x = bench_floats(b, ROWS * D),
                .w = bench_floats(b, E * N * D), .y = bench_floats(b, ROWS * N));
    }
}

void bench_rmsnorm_forward(bench *b) {
    MEASURE(b, rmsnorm_forward, "2048x192", 0, 8 * T * D, .rows = T, .dim = D,
            .x = bench_floats(b, T * D), .w = bench_floats(b, D), .eps = 1e-5,
            .y = bench_floats(b, T * D), .rstd = bench_floats(b, T));
    MEASURE(b, rmsnorm_forward, "2048x192 quantized", 0, 8 * T * D, .rows = T, .dim = D,
            .x = bench_floats(b, T * D), .w = bench_floats(b, D), .eps = 1e-5,
            .yq = bench_floats(b, T * D), .rstd = bench_floats(b, T),
            .fq = {.amax = bench_float(b, 1.0f)});
}
void bench_rmsnorm_backward(bench *b) {
    MEASURE(b, rmsnorm_backward, "2048x192", 0, 12 * T * D, .rows = T, .dim = D,
            .x = bench_floats(b, T * D), .w = bench_floats(b, D), .rstd = bench_floats(b, T),
            .dy = bench_floats(b, T * D), .dx = bench_floats(b, T * D), .dw = bench_floats(b, D));
}
void bench_gatednorm_forward(bench *b) {
    MEASURE(b, gatednorm_forward, "2048x384 quantized", 0, 12 * T * MAMBA, .rows = T, .dim = MAMBA,
            .groups = 2, .y = bench_floats(b, T * MAMBA), .z = bench_floats(b, T * MAMBA),
            .ldz = MAMBA, .w = bench_floats(b, MAMBA), .eps = 1e-5,
            .outq = bench_floats(b, T * MAMBA), .fq = {.amax = bench_float(b, 1.0f)},
            .rstd = bench_floats(b, 2 * T));
}
void bench_gatednorm_backward(bench *b) {
    MEASURE(b, gatednorm_backward, "2048x384", 0, 20 * T * MAMBA, .rows = T, .dim = MAMBA,
            .groups = 2, .y = bench_floats(b, T * MAMBA), .z = bench_floats(b, T * MAMBA),
            .ldz = MAMBA, .w = bench_floats(b, MAMBA), .rstd = bench_floats(b, 2 * T),
            .dout = bench_floats(b, T * MAMBA), .dy = bench_floats(b, T * MAMBA),
            .dz = bench_floats(b, T * MAMBA), .lddz = MAMBA, .dw = bench_floats(b, MAMBA));
}
void bench_headnorm_forward(bench *b) {
    MEASURE(b, headnorm_forward, "2048x6x32", 0, 8 * T * D, .rows = T, .heads = 6, .head_dim = 32,
            .x = bench_floats(b, T * D), .ldx = D, .w = bench_floats(b, 32), .eps = 1e-6,
            .positions = bench_ints(b, T, 256), .theta = 1e6, .y = bench_floats(b, T * D),
            .ldy = D);
}
void bench_headnorm_backward(bench *b) {
    MEASURE(b, headnorm_backward, "2048x6x32", 0, 12 * T * D, .rows = T, .heads = 6, .head_dim = 32,
            .x = bench_floats(b, T * D), .ldx = D, .w = bench_floats(b, 32), .eps = 1e-6,
            .positions = bench_ints(b, T, 256), .theta = 1e6, .dy = bench_floats(b, T * D),
            .lddy = D, .dx = bench_floats(b, T * D), .lddx = D, .dw = bench_floats(b, 32));
}

void bench_swiglu_forward(bench *b) {
    MEASURE(b, swiglu_forward, "2048x512 quantized", 0, 12 * T * INNER, .rows = T, .dim = INNER,
            .gu = bench_floats(b, 2 * T * INNER), .hq = bench_floats(b, T * INNER),
            .fq = {.amax = bench_float(b, 1.0f)});
}
void bench_swiglu_backward(bench *b) {
    MEASURE(b, swiglu_backward, "2048x512", 0, 20 * T * INNER, .rows = T, .dim = INNER,
            .gu = bench_floats(b, 2 * T * INNER), .dh = bench_floats(b, T * INNER),
            .dgu = bench_floats(b, 2 * T * INNER));
}
void bench_relu2_forward(bench *b) {
    MEASURE(b, relu2_forward, "2048x512 quantized", 0, 8 * T * INNER, .rows = T, .dim = INNER,
            .x = bench_floats(b, T * INNER), .hq = bench_floats(b, T * INNER),
            .fq = {.amax = bench_float(b, 1.0f)});
}
void bench_relu2_backward(bench *b) {
    MEASURE(b, relu2_backward, "2048x512", 0, 12 * T * INNER, .rows = T, .dim = INNER,
            .x = bench_floats(b, T * INNER), .dh = bench_floats(b, T * INNER),
            .dx = bench_floats(b, T * INNER));
}

void bench_fake_quant(bench *b) {
    MEASURE(b, fake_quant, "64 MiB", 0, 8.0 * BIG, .rows = BIG / 1024, .cols = 1024,
            .x = bench_floats(b, BIG), .y = bench_floats(b, BIG),
            .fq = {.amax = bench_float(b, 1.0f)});
    MEASURE(b, fake_quant, "64 MiB static", 0, 8.25 * BIG, .rows = BIG / 1024, .cols = 1024,
            .x = bench_floats(b, BIG), .y = bench_floats(b, BIG),
            .fq = {.amax = bench_float(b, 1.0f)}, .block_amax = bench_floats(b, BIG / 16),
            .top = 448.0f);
    MEASURE(b, fake_quant, "1 MiB", 0, 8 * (BIG / 64), .rows = BIG / 64 / 1024, .cols = 1024,
            .x = bench_floats(b, BIG / 64), .y = bench_floats(b, BIG / 64),
            .fq = {.amax = bench_float(b, 1.0f)});
}
void bench_matmul_nvfp4(bench *b) {
    enum { M = 64, N = 512, K = 512 };
    MEASURE(b, matmul_nvfp4, "64 x 512 x 512", 2.0 * M * N * K, 0, .m = M, .n = N, .k = K,
            .a_codes = bench_zeros(b, M * K / 2), .a_scales = bench_zeros(b, M * K / 16),
            .a_amax = bench_float(b, 1.0f), .b_codes = bench_zeros(b, N * K / 2),
            .b_scales = bench_zeros(b, N * K / 16), .b_amax = bench_float(b, 1.0f), .b_top = 448.0f,
            .c = bench_floats(b, M * N), .ldc = N);
}
void bench_pack(bench *b) {
    MEASURE(b, pack, "64 MiB", 0, 4.5625 * BIG, .rows = BIG / 1024, .cols = 1024,
            .x = bench_floats(b, BIG), .fq = {.amax = bench_float(b, 1.0f)},
            .codes = bench_zeros(b, BIG / 2), .scales = bench_zeros(b, BIG / 16));
}
void bench_unpack(bench *b) {
    MEASURE(b, unpack, "64 MiB", 0, 4.5625 * BIG, .rows = BIG / 1024, .cols = 1024,
            .codes = bench_zeros(b, BIG / 2), .scales = bench_zeros(b, BIG / 16),
            .amax = bench_float(b, 1.0f), .n_groups = 1, .top = 448.0f, .y = bench_floats(b, BIG));
}
void bench_amax(bench *b) {
    MEASURE(b, amax, "64 MiB", 0, 4.0 * BIG, .rows = BIG / 1024, .cols = 1024,
            .x = bench_floats(b, BIG), .amax = bench_floats(b, 1));
}
void bench_adamw(bench *b) {
    enum { N = BIG / 4 };
    MEASURE(b, adamw, "16 MiB", 0, 28.0 * N, .rows = N / 1024, .cols = 1024,
            .w = bench_floats(b, N), .m = bench_floats(b, N), .v = bench_zeros(b, 4 * N),
            .g = bench_floats(b, N), .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
            .grad_scale = 1.0, .step = 10);
    MEASURE(b, adamw, "16 MiB quantized", 0, 32.0 * N, .rows = N / 1024, .cols = 1024,
            .w = bench_floats(b, N), .m = bench_floats(b, N), .v = bench_zeros(b, 4 * N),
            .g = bench_floats(b, N), .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
            .grad_scale = 1.0, .step = 10, .wq = bench_floats(b, N),
            .fq = {.amax = bench_float(b, 1.0f)}, .top = 448.0f);
    MEASURE(b, adamw, "16 MiB, bf16 and 8 bit", 0, 12.0 * N, .rows = N / 1024, .cols = 1024,
            .w = bench_zeros(b, 2 * N), .m = bench_zeros(b, N), .v = bench_zeros(b, N),
            .g = bench_floats(b, N), .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
            .grad_scale = 1.0, .step = 10, .wq = bench_floats(b, N),
            .fq = {.amax = bench_float(b, 1.0f)}, .top = 448.0f, .master = CQ_MASTER_BF16,
            .moments = CQ_MOMENTS_8BIT, .m_scale = bench_zeros(b, N / 64),
            .v_scale = bench_zeros(b, N / 64), .key = 1);
}
void bench_widen(bench *b) {
    MEASURE(b, widen, "64 MiB", 0, 6.0 * BIG, .n = BIG, .x = bench_zeros(b, 2 * BIG),
            .y = bench_floats(b, BIG));
}
void bench_sumsq(bench *b) {
    MEASURE_ANY(b, sumsq, "64 MiB", 0, 4.0 * BIG, .dtype = CQ_F32, .n = BIG,
                .x = bench_floats(b, BIG), .out = bench_zeros(b, 8));
}
void bench_axpy(bench *b) {
    MEASURE(b, axpy, "64 MiB", 0, 12.0 * BIG, .n = BIG, .alpha = 0.5, .beta = 0.5,
            .x = bench_floats(b, BIG), .y = bench_floats(b, BIG));
}
void bench_round_bf16(bench *b) {
    MEASURE(b, round_bf16, "64 MiB", 0, 6.0 * BIG, .n = BIG, .x = bench_floats(b, BIG),
            .y = bench_zeros(b, 2 * BIG));
}
