/* test_cpu_quant.c - fake quantization in the cpu backend, alone and fused, bit for bit against the
   codec of kernels/nvfp4.h, under every instruction set the machine has. */
#include "core/base/rng.h"
#include "kernels/nvfp4.h"
#include "kernels/ref/ref.h"
#include <criterion/criterion.h>
#include <stdio.h>

static const char *const isas[] = {"generic", "avx2", "avx512"};
static bool take_isa(int i, cq_stream *s) {
    setenv("CKAQAD_ISA", isas[i], 1);
    *s = (cq_stream){.table = cq_kernels_find("cpu"), .threads = cq_threads_set(2)};
    return strcmp(cq_cpu_isa(), isas[i]) == 0;
}
static float *floats(int64_t n) {
    float *x = calloc((size_t)n, sizeof(*x));
    cr_assert_not_null(x);
    return x;
}

/* Values of five kinds: normal, spread over many exponents, ties of both roundings, zeros of both
   signs, any bits but NaN. */
static float value(uint64_t seed, int64_t i, int kind, float amax) {
    uint64_t bits = cq_random_bits(seed, 1, (uint64_t)i);
    float u = (float)((double)(bits >> 11) * 0x1p-53 * 2.0 - 1.0) * amax;
    int low = (int)(bits & 63);
    if (kind == 1)
        return ldexpf(u, -(low / 2));
    if (kind == 2)
        return (float)(low - 32) * 0.125f * (cq_nvfp4_tensor_scale(amax, 448.0f) * 64.0f);
    if (kind == 3)
        return low < 16 ? -0.0f : low < 40 ? 0.0f : u;
    if (kind == 4) {
        uint32_t any = (uint32_t)bits;
        memcpy(&u, &any, 4);
        return u != u ? 0.0f : u;
    }
    return u;
}
static int64_t differences(const float *x, const float *y, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++)
        count += memcmp(x + i, y + i, 4) != 0 && !(x[i] != x[i] && y[i] != y[i]);
    return count;
}

/* One tensor through the codec, block by block, and through cpu. */
static void check_tensor(cq_stream *s, uint64_t seed, int kind, float amax, float top) {
    enum { ROWS = 2048, COLS = 16 * 33, N = ROWS * COLS };
    float *x = floats(N), *right = floats(N), *y = floats(N), *block = floats(N / 16);
    int64_t saturated = 0, counted = 0;
    for (int64_t i = 0; i < N; i++)
        x[i] = value(seed, i, kind, amax);
    for (int64_t k = 0; k < N / 16; k++) {
        float share = cq_random_bits(seed, 2, (uint64_t)k) & 1 ? 1.0f : 0.75f;
        block[k] = top > 0.0f ? share * cq_nvfp4_block_amax(x + 16 * k) : -1.0f;
        saturated += cq_nvfp4_block_fake(right + 16 * k, x + 16 * k, amax, block[k], top);
    }
    cq_fake_quant_args a = {.dtype = CQ_F32,
                            .rows = ROWS,
                            .cols = COLS,
                            .x = x,
                            .y = y,
                            .fq = {.amax = &amax, .saturated = &counted},
                            .block_amax = top > 0.0f ? block : NULL,
                            .top = top};
    cr_assert_eq(s->table->fake_quant(s, &a), CQ_OK, "%s", cq_error());
    cr_expect_eq(differences(y, right, N), 0,
                 "%s: kind %d, amax %g, top %g, seed %llu: %lld differ", cq_cpu_isa(), kind,
                 (double)amax, (double)top, (unsigned long long)seed,
                 (long long)differences(y, right, N));
    cr_expect_eq(counted, saturated, "%lld counted, %lld saturated", (long long)counted,
                 (long long)saturated);
    a.y = x;
    cr_assert_eq(s->table->fake_quant(s, &a), CQ_OK);
    cr_expect_eq(differences(x, right, N), 0, "%s: in place differs", cq_cpu_isa());
    free(x), free(right), free(y), free(block);
}
Test(cpu_quant, every_value_is_the_codecs_on_millions) {
    static const float maxima[] = {0.25f, 3.0e-8f, 7.7e5f, 1.0e-36f};
    static const float tops[] = {0.0f, 448.0f, 256.0f};
    for (int isa = 0; isa < 3; isa++) {
        cq_stream s;
        for (int kind = 0; take_isa(isa, &s) && kind < 5; kind++)
            check_tensor(&s, 7, kind, maxima[kind % 4], tops[kind % 3]);
        for (int kind = 0; take_isa(isa, &s) && kind < 5; kind++)
            check_tensor(&s, 8, kind, maxima[(kind + 1) % 4], tops[(kind + 1) % 3]);
    }
}

static const int64_t offsets[] = {0, 0, 5, 40, 40, 64};
static float group_amax[] = {1.0f, 0.5f, 2.0f, 1.0f, 0.0f};
enum { GROUPS = 5, ROWS = 64, DIM = 16 * 7 };
static float *normal(uint64_t stream, int64_t n) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)cq_random_normal(3, stream, (uint64_t)i);
    return x;
}
/* What the codec makes of rows in groups; returns the saturated blocks. */
static int64_t by_codec(float *q, const float *y) {
    int64_t saturated = 0;
    for (int64_t g = 0; g < GROUPS; g++)
        for (int64_t b = offsets[g] * DIM / 16; b < offsets[g + 1] * DIM / 16; b++)
            saturated += cq_nvfp4_block_fake(q + 16 * b, y + 16 * b, group_amax[g], -1.0f, 448.0f);
    return saturated;
}

/* Runs an operation that writes y and yq, then yq alone, and compares with the codec. */
#define FUSED(op, y_field, q_field, ...)                                                           \
    do {                                                                                           \
        float *y_ = floats(ROWS * DIM), *q_ = floats(ROWS * DIM), *alone_ = floats(ROWS * DIM);    \
        float *right_ = floats(ROWS * DIM);                                                        \
        int64_t counted_ = 10;                                                                     \
        cq_fq fq_ = {group_amax, offsets, GROUPS, &counted_};                                      \
        cq_##op##_args a_ = {                                                                      \
            .dtype = CQ_F32, .y_field = y_, .q_field = q_, .fq = fq_, __VA_ARGS__};                \
        cr_assert_eq(s.table->op(&s, &a_), CQ_OK, "%s", cq_error());                               \
        int64_t saturated_ = by_codec(right_, y_);                                                 \
        cr_expect_eq(differences(q_, right_, ROWS *DIM), 0, "%s " #op, cq_cpu_isa());              \
        cr_expect_eq(counted_, 10 + saturated_, "%s " #op ": %lld", cq_cpu_isa(),                  \
                     (long long)counted_);                                                         \
        a_.y_field = NULL, a_.q_field = alone_;                                                    \
        cr_assert_eq(s.table->op(&s, &a_), CQ_OK);                                                 \
        cr_expect_eq(differences(alone_, q_, ROWS *DIM), 0, "%s " #op " alone", cq_cpu_isa());     \
        free(y_), free(q_), free(alone_), free(right_);                                            \
    } while (0)

Test(cpu_quant, norms_and_activations_quantize_what_they_write) {
    float *x = normal(1, ROWS * DIM), *z = normal(2, 2 * ROWS * DIM), *w = normal(3, DIM);
    for (int isa = 0; isa < 3; isa++) {
        cq_stream s;
        if (!take_isa(isa, &s))
            continue;
        FUSED(rmsnorm_forward, y, yq, .rows = ROWS, .dim = DIM, .x = x, .w = w, .eps = 1e-5);
        FUSED(gatednorm_forward, out, outq, .rows = ROWS, .dim = DIM, .groups = 7, .y = x, .z = z,
              .ldz = DIM, .w = w, .eps = 1e-5);
        FUSED(swiglu_forward, h, hq, .rows = ROWS, .dim = DIM, .gu = z);
        FUSED(relu2_forward, h, hq, .rows = ROWS, .dim = DIM, .x = x);
    }
    free(x), free(z), free(w);
}

Test(cpu_quant, adamw_quantizes_the_new_weights) {
    for (int isa = 0; isa < 3; isa++) {
        cq_stream s;
        if (!take_isa(isa, &s))
            continue;
        float *w = normal(1, ROWS * DIM), *m = normal(2, ROWS * DIM), *v = normal(3, ROWS * DIM);
        float *g = normal(4, ROWS * DIM), *q = floats(ROWS * DIM), *right = floats(ROWS * DIM);
        for (int64_t i = 0; i < ROWS * DIM; i++)
            v[i] = v[i] * v[i];
        int64_t counted = 0;
        cq_adamw_args a = {.dtype = CQ_F32,
                           .rows = ROWS,
                           .cols = DIM,
                           .w = w,
                           .m = m,
                           .v = v,
                           .g = g,
                           .lr = 1e-2,
                           .beta1 = 0.9,
                           .beta2 = 0.95,
                           .eps = 1e-8,
                           .grad_scale = 1.0,
                           .step = 3,
                           .wq = q,
                           .fq = {group_amax, offsets, GROUPS, &counted},
                           .top = 448.0f};
        cr_assert_eq(s.table->adamw(&s, &a), CQ_OK, "%s", cq_error());
        cr_expect_eq(by_codec(right, w), counted);
        cr_expect_eq(differences(q, right, ROWS * DIM), 0, "%s", cq_cpu_isa());
        float block[ROWS * DIM / 16];
        for (int64_t b = 0; b < ROWS * DIM / 16; b++)
            block[b] = 0.1f * (float)(b % 9);
        a.block_amax = block, a.top = 256.0f;
        cr_assert_eq(s.table->adamw(&s, &a), CQ_OK);
        for (int64_t i = 0; i < GROUPS; i++)
            for (int64_t b = offsets[i] * DIM / 16; b < offsets[i + 1] * DIM / 16; b++)
                cq_nvfp4_block_fake(right + 16 * b, w + 16 * b, group_amax[i], block[b], 256.0f);
        cr_expect_eq(differences(q, right, ROWS * DIM), 0, "%s, static", cq_cpu_isa());
        free(w), free(m), free(v), free(g), free(q), free(right);
    }
}

Test(cpu_quant, maxima_are_refs_and_never_fall) {
    float *x = normal(5, ROWS * DIM);
    x[41 * DIM + 3] = -77.0f;
    for (int isa = 0; isa < 3; isa++) {
        cq_stream s;
        if (!take_isa(isa, &s))
            continue;
        float mine[GROUPS] = {0, 9, 0, 2, 0}, right[GROUPS] = {0, 9, 0, 2, 0};
        cq_amax_args a = {.dtype = CQ_F32,
                          .rows = ROWS,
                          .cols = DIM,
                          .x = x,
                          .offsets = offsets,
                          .n_groups = GROUPS,
                          .amax = mine};
        cr_assert_eq(s.table->amax(&s, &a), CQ_OK);
        a.amax = right;
        cr_assert_eq(cq_ref_amax(&s, &a), CQ_OK);
        cr_expect_arr_eq(mine, right, sizeof(mine));
        cr_expect_eq(mine[4], 77.0f);
    }
    free(x);
}

Test(cpu_quant, rows_that_are_no_whole_blocks_are_an_error) {
    float x[40] = {0}, y[40], amax = 1.0f;
    cq_stream s;
    take_isa(0, &s);
    cr_expect_eq(CQ_RUN(&s, fake_quant, .dtype = CQ_F32, .rows = 2, .cols = 20, .x = x, .y = y,
                        .fq = {.amax = &amax}),
                 CQ_ESHAPE);
    cr_expect(strstr(cq_error(), "20"), "%s", cq_error());
}

Test(cpu_quant, a_nan_stays_visible) {
    float x[32] = {0}, y[32], amax = 1.0f;
    x[3] = NAN, x[20] = 1.0f;
    for (int isa = 0; isa < 3; isa++) {
        cq_stream s;
        if (!take_isa(isa, &s))
            continue;
        cr_assert_eq(CQ_RUN(&s, fake_quant, .dtype = CQ_F32, .rows = 1, .cols = 32, .x = x, .y = y,
                            .fq = {.amax = &amax}),
                     CQ_OK);
        cr_expect(y[3] != y[3] && y[20] == 1.0f, "%s: %g, %g", isas[isa], (double)y[3],
                  (double)y[20]);
    }
}
