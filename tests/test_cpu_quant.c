/* test_cpu_quant.c - fake quantization in the cpu backend, alone and fused, bit for bit against the
   codec of kernels/nvfp4.h, under every instruction set the machine has; with WAYS_CUDA the same of
   a device. */
#include "core/tensor/device.h"
#include "kernels/nvfp4.h"
#include "kernels/update.h"
#include "tests/three_ways.h"

/* A stream for the next way to run; frees the one before. False at the end. */
static bool next_stream(int *at, cq_stream *s) {
    if (*at >= 0)
        ways_stream_free(s);
    ways w = {.seed = 0};
    if (!ways_next(at))
        return false;
    *s = ways_stream(&w, CPU_WAY);
    return true;
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
static void check_tensor(cq_stream *s, int at, uint64_t seed, int kind, float amax, float top) {
    enum { ROWS = WAYS_PICK(256, 2048), COLS = 16 * 33, N = ROWS * COLS };
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
#define QUANTIZE                                                                                   \
    WAYS_CALL(s, fake_quant, a, WAYS_AT(x, 4 * N), WAYS_AT(y, 4 * N), WAYS_AT(fq.amax, 4),         \
              WAYS_AT(fq.saturated, 8), WAYS_AT(block_amax, N / 16 * 4))
    cr_assert_eq(QUANTIZE, CQ_OK, "%s", cq_error());
    cr_expect_eq(differences(y, right, N), 0,
                 "%s: kind %d, amax %g, top %g, seed %llu: %lld differ", ways_name(at), kind,
                 (double)amax, (double)top, (unsigned long long)seed,
                 (long long)differences(y, right, N));
    cr_expect_eq(counted, saturated, "%lld counted, %lld saturated", (long long)counted,
                 (long long)saturated);
    a.y = x;
    cr_assert_eq(QUANTIZE, CQ_OK, "%s", cq_error());
    cr_expect_eq(differences(x, right, N), 0, "%s: in place differs", ways_name(at));
    free(x), free(right), free(y), free(block);
}
Test(cpu_quant, every_value_is_the_codecs_on_millions) {
    static const float maxima[] = {0.25f, 3.0e-8f, 7.7e5f, 1.0e-36f};
    static const float tops[] = {0.0f, 448.0f, 256.0f};
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
        for (int kind = 0; kind < 5; kind++)
            check_tensor(&s, at, 7, kind, maxima[kind % 4], tops[kind % 3]);
        for (int kind = 0; kind < 5; kind++)
            check_tensor(&s, at, 8, kind, maxima[(kind + 1) % 4], tops[(kind + 1) % 3]);
    }
}

/* Codes and scales of a matrix are the codec's; what is made of them again is what fake
   quantization writes. The groups of unpack have maxima of their own. */
static void check_packed(cq_stream *s, int at, uint64_t seed, int kind, float top) {
    enum { GROUPS = 3, ROWS = 12, COLS = 16 * 9, N = GROUPS * ROWS * COLS };
    float amax[GROUPS] = {0.25f, 0.0f, 7.7e5f};
    float *x = floats(N), *right = floats(N), *y = floats(N), *block = floats(N / 16);
    uint8_t *codes = malloc(N / 2), *scales = malloc(N / 16), bytes[8];
    int64_t saturated = 0, counted = 0;
    cr_assert(codes && scales);
    for (int g = 0; g < GROUPS; g++) {
        int64_t first = g * ROWS * COLS, blocks = ROWS * COLS / 16;
        for (int64_t i = first; i < first + ROWS * COLS; i++)
            x[i] = amax[g] > 0 ? value(seed, i, kind, amax[g]) : 0.0f;
        for (int64_t k = first / 16; k < first / 16 + blocks; k++) {
            block[k] = top > 0.0f ? cq_nvfp4_block_amax(x + 16 * k) : -1.0f;
            saturated += cq_nvfp4_block_fake(right + 16 * k, x + 16 * k, amax[g], block[k], top);
        }
        cq_pack_args a = {.dtype = CQ_F32,
                          .rows = ROWS,
                          .cols = COLS,
                          .x = x + first,
                          .fq = {.amax = &amax[g], .saturated = &counted},
                          .block_amax = top > 0.0f ? block + first / 16 : NULL,
                          .top = top,
                          .codes = codes + first / 2,
                          .scales = scales + first / 16};
        cr_assert_eq(WAYS_CALL(s, pack, a, WAYS_AT(x, ROWS * COLS * 4), WAYS_AT(fq.amax, 4),
                               WAYS_AT(fq.saturated, 8), WAYS_AT(block_amax, blocks * 4),
                               WAYS_AT(codes, 8 * blocks), WAYS_AT(scales, blocks)),
                     CQ_OK, "%s", cq_error());
        float ws2 = cq_nvfp4_tensor_scale(amax[g], top > 0.0f ? top : 448.0f);
        for (int64_t k = first / 16; k < first / 16 + blocks && amax[g] > 0; k++) {
            cq_nvfp4_block_encode(bytes, x + 16 * k, scales[k], ws2);
            cr_expect(memcmp(bytes, codes + 8 * k, 8) == 0, "%s: codes of block %lld",
                      ways_name(at), (long long)k);
        }
    }
    cr_expect_eq(counted, saturated);
    cq_unpack_args u = {.dtype = CQ_F32,
                        .rows = GROUPS * ROWS,
                        .cols = COLS,
                        .codes = codes,
                        .scales = scales,
                        .amax = amax,
                        .n_groups = GROUPS,
                        .top = top > 0.0f ? top : 448.0f,
                        .y = y};
#define OPEN                                                                                       \
    WAYS_CALL(s, unpack, u, WAYS_AT(codes, N / 2), WAYS_AT(scales, N / 16),                        \
              WAYS_AT(amax, sizeof(amax)), WAYS_AT(y, 4 * N), WAYS_AT(offsets, 32))
    cr_assert_eq(OPEN, CQ_OK, "%s", cq_error());
    cr_expect_eq(differences(y, right, N), 0, "%s: kind %d, top %g: %lld differ", ways_name(at),
                 kind, (double)top, (long long)differences(y, right, N));
    int64_t offsets[] = {0, 3, 3, 4};
    for (int64_t i = 0; i < N; i++)
        y[i] = i / (ROWS * COLS) == 1 ? 5.0f : 0.0f;
    float *whole = right + ROWS * COLS, *kept = floats(ROWS * COLS);
    memcpy(kept, whole, ROWS * COLS * sizeof *kept);
    memcpy(right + ROWS * COLS, y + ROWS * COLS, ROWS * COLS * sizeof *y);
    u.dtype = CQ_F32, u.offsets = offsets;
    cr_assert_eq(OPEN, CQ_OK, "%s", cq_error());
    cr_expect_eq(differences(y, right, N), 0, "%s: the group without rows is left alone",
                 ways_name(at));
    memcpy(whole, kept, ROWS * COLS * sizeof *kept);
    free(kept);
    u.offsets = NULL;
#ifdef WAYS_CUDA
    u.dtype = CQ_BF16;
    cr_assert_eq(OPEN, CQ_OK, "%s", cq_error());
    cq_round_bf16_args round = {.dtype = CQ_F32, .n = N, .x = right, .y = right};
    cr_assert_eq(cq_ref_round_bf16(NULL, &round), CQ_OK);
    int64_t differ = 0;
    for (int64_t i = 0; i < N; i++)
        differ += ((uint16_t *)y)[i] != ((uint16_t *)right)[i] &&
                  (((uint16_t *)right)[i] & 0x7fff) <= 0x7f80;
    cr_expect_eq(differ, 0, "%s: %lld of BF16 differ", ways_name(at), (long long)differ);
#endif
    u.dtype = CQ_F32, u.n_groups = 5;
    cr_expect_eq(OPEN, CQ_ESHAPE);
    free(x), free(right), free(y), free(block), free(codes), free(scales);
}
Test(cpu_quant, packed_values_are_those_of_fake_quantization) {
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);)
        for (int kind = 0; kind < 5; kind++)
            for (int form = 0; form < 3; form++)
                check_packed(&s, at, 9 + (uint64_t)form, kind,
                             form == 0   ? 0
                             : form == 1 ? 448
                                         : 256);
}

/* The product of two packed matrices. A GPU without FP4 tensor cores opens both to BF16, which is
   no more exact than that. */
static uint8_t *packed(uint64_t stream, int64_t rows, int64_t cols, float *amax) {
    uint8_t *out = malloc((size_t)(rows * cols / 16 * 9));
    float *x = floats(rows * cols);
    cr_assert_not_null(out);
    for (int64_t i = 0; i < rows * cols; i++)
        x[i] = (float)cq_random_normal(5, stream, (uint64_t)i);
    cq_pack_args a = {.dtype = CQ_F32,
                      .rows = rows,
                      .cols = cols,
                      .x = x,
                      .fq = {.amax = amax},
                      .codes = out,
                      .scales = out + rows * cols / 2};
    cr_assert_eq(cq_ref_pack(NULL, &a), CQ_OK, "%s", cq_error());
    free(x);
    return out;
}
static bool has_fp4(void) {
#if defined(WAYS_CUDA) && !defined(WAYS_EMULATED)
    cq_stream s = {0};
    bool has = cq_stream_open(&s, WAYS_TABLE, 0) == CQ_OK && cq_stream_has_fp4(&s);
    cq_stream_close(&s);
    return has;
#else
    return true;
#endif
}
Test(cpu_quant, products_of_packed_matrices_are_those_of_their_values) {
    static const struct {
        int64_t m, n, k;
        double beta;
    } shape[] = {{1, 8, 32, 0}, {70, 136, 96, 1}, {130, 24, 32 * 5, 0.5}};
    float a_amax = 4.0f, b_amax = 2.5f;
    if (!has_fp4())
        cr_skip_test("no FP4 tensor cores");
    for (size_t i = 0; i < sizeof(shape) / sizeof(*shape); i++) {
        int64_t m = shape[i].m, n = shape[i].n, k = shape[i].k;
        uint8_t *a = packed(2 * i, m, k, &a_amax), *b = packed(2 * i + 1, n, k, &b_amax);
        for (int at = -1; ways_next(&at);) {
            ways w = {.scratch_bytes = 1 << 20, .at = at, .seed = 4};
            snprintf(w.what, sizeof(w.what), "%s matmul_nvfp4 %zu", ways_name(at), i);
            WAYS_OUT(&w, matmul_nvfp4, c, m, n, n + 8, 2);
            cq_matmul_nvfp4_args args = {.m = m,
                                         .n = n,
                                         .k = k,
                                         .a_codes = a,
                                         .a_scales = a + m * k / 2,
                                         .b_codes = b,
                                         .b_scales = b + n * k / 2,
                                         .a_amax = &a_amax,
                                         .b_amax = &b_amax,
                                         .b_top = 448.0f,
                                         .ldc = n + 8,
                                         .beta = shape[i].beta};
            WAYS_RAW(&w, matmul_nvfp4, a_codes, m * k / 2);
            WAYS_RAW(&w, matmul_nvfp4, a_scales, m * k / 16);
            WAYS_RAW(&w, matmul_nvfp4, b_codes, n * k / 2);
            WAYS_RAW(&w, matmul_nvfp4, b_scales, n * k / 16);
            WAYS_RAW(&w, matmul_nvfp4, a_amax, 4);
            WAYS_RAW(&w, matmul_nvfp4, b_amax, 4);
            WAYS_RUN(&w, matmul_nvfp4, args);
            ways_judge(&w);
        }
        free(a), free(b);
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
#define UNPACK(...) __VA_ARGS__
#define FUSED_CALL(op, args, y_field, q_field, ...)                                                \
    WAYS_CALL(&s, op, args, WAYS_AT(y_field, ROWS *DIM * 4), WAYS_AT(q_field, ROWS *DIM * 4),      \
              WAYS_AT(fq.amax, sizeof(group_amax)), WAYS_AT(fq.offsets, sizeof(offsets)),          \
              WAYS_AT(fq.saturated, 8), __VA_ARGS__)
#define FUSED(op, y_field, q_field, buffers, ...)                                                  \
    do {                                                                                           \
        float *y_ = floats(ROWS * DIM), *q_ = floats(ROWS * DIM), *alone_ = floats(ROWS * DIM);    \
        float *right_ = floats(ROWS * DIM);                                                        \
        int64_t counted_ = 10;                                                                     \
        cq_fq fq_ = {group_amax, offsets, GROUPS, &counted_};                                      \
        cq_##op##_args args_ = {                                                                   \
            .dtype = CQ_F32, .y_field = y_, .q_field = q_, .fq = fq_, __VA_ARGS__};                \
        cr_assert_eq(FUSED_CALL(op, args_, y_field, q_field, UNPACK buffers), CQ_OK, "%s",         \
                     cq_error());                                                                  \
        int64_t saturated_ = by_codec(right_, y_);                                                 \
        cr_expect_eq(differences(q_, right_, ROWS *DIM), 0, "%s " #op, ways_name(at));             \
        cr_expect_eq(counted_, 10 + saturated_, "%s " #op ": %lld", ways_name(at),                 \
                     (long long)counted_);                                                         \
        args_.y_field = NULL, args_.q_field = alone_;                                              \
        cr_assert_eq(FUSED_CALL(op, args_, y_field, q_field, UNPACK buffers), CQ_OK);              \
        cr_expect_eq(differences(alone_, q_, ROWS *DIM), 0, "%s " #op " alone", ways_name(at));    \
        free(y_), free(q_), free(alone_), free(right_);                                            \
    } while (0)

Test(cpu_quant, norms_and_activations_quantize_what_they_write) {
    float *x = normal(1, ROWS * DIM), *z = normal(2, 2 * ROWS * DIM), *w = normal(3, DIM);
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
        FUSED(rmsnorm_forward, y, yq, (WAYS_AT(x, ROWS * DIM * 4), WAYS_AT(w, DIM * 4)),
              .rows = ROWS, .dim = DIM, .x = x, .w = w, .eps = 1e-5);
        FUSED(gatednorm_forward, out, outq,
              (WAYS_AT(y, ROWS * DIM * 4), WAYS_AT(z, ROWS * DIM * 4), WAYS_AT(w, DIM * 4)),
              .rows = ROWS, .dim = DIM, .groups = 7, .y = x, .z = z, .ldz = DIM, .w = w,
              .eps = 1e-5);
        FUSED(swiglu_forward, h, hq, (WAYS_AT(gu, 2 * ROWS * DIM * 4)), .rows = ROWS, .dim = DIM,
              .gu = z);
        FUSED(relu2_forward, h, hq, (WAYS_AT(x, ROWS * DIM * 4)), .rows = ROWS, .dim = DIM, .x = x);
    }
    free(x), free(z), free(w);
}

#ifdef WAYS_CUDA
/* Buffers of one run of an operation whose activations are F32 or BF16. */
typedef struct act_form {
    cq_dtype act;
    int64_t rows, dim, groups; /* groups: of the gated norm */
    void *x, *z, *y, *q;       /* activations, z twice as wide; y may be NULL */
    float *wide, *w;           /* F32 in every form: rows, one row */
    int32_t *index;
    const float *block;
    int64_t counted;
} act_form;
static int run_form(cq_stream *s, int op, act_form *f) {
    int64_t n = f->rows * f->dim, size = cq_dtype_bytes(f->act), rows = f->rows, dim = f->dim;
    int64_t bounds[] = {0, rows / 3, rows / 3, rows};
    float maxima[] = {1.0f, 2.0f, 0.5f};
    cq_fq fq = {maxima, bounds, 3, &f->counted};
#define FORM(op, y_field, q_field, buffers, ...)                                                   \
    WAYS_CALL(s, op,                                                                               \
              ((cq_##op##_args){                                                                   \
                  .y_field = f->y, .q_field = f->q, .fq = fq, .act = f->act, __VA_ARGS__}),        \
              WAYS_AT(y_field, n *size), WAYS_AT(q_field, n *size),                                \
              WAYS_AT(fq.amax, sizeof(maxima)), WAYS_AT(fq.offsets, sizeof(bounds)),               \
              WAYS_AT(fq.saturated, 8), UNPACK buffers)
    switch (op) {
    case 0:
        return FORM(rmsnorm_forward, y, yq, (WAYS_AT(x, n * 4), WAYS_AT(w, dim * 4)), .rows = rows,
                    .dim = dim, .x = f->wide, .w = f->w, .eps = 1e-5);
    case 1:
        return FORM(gatednorm_forward, out, outq,
                    (WAYS_AT(y, n * size), WAYS_AT(z, n * size), WAYS_AT(w, dim * 4)), .rows = rows,
                    .dim = dim, .groups = f->groups, .y = f->x, .z = f->z, .ldz = dim, .w = f->w,
                    .eps = 1e-5);
    case 2:
        return FORM(swiglu_forward, h, hq, (WAYS_AT(gu, 2 * n * size)), .rows = rows, .dim = dim,
                    .gu = f->z);
    case 3:
        return FORM(relu2_forward, h, hq, (WAYS_AT(x, n * size)), .rows = rows, .dim = dim,
                    .x = f->x);
    case 4:
        return FORM(gather_rows, y, yq, (WAYS_AT(x, n * size), WAYS_AT(index, rows * 4)),
                    .rows = rows, .dim = dim, .x = f->x, .index = f->index);
    case 5: {
        cq_fake_quant_args a = {.rows = rows,
                                .cols = dim,
                                .x = f->x,
                                .y = f->q,
                                .fq = fq,
                                .block_amax = f->block,
                                .top = 448.0f,
                                .act = f->act};
        return WAYS_CALL(s, fake_quant, a, WAYS_AT(x, n * size), WAYS_AT(y, n * size),
                         WAYS_AT(fq.amax, sizeof(maxima)), WAYS_AT(fq.offsets, sizeof(bounds)),
                         WAYS_AT(fq.saturated, 8), WAYS_AT(block_amax, n / 16 * 4));
    }
    default: {
        cq_amax_args a = {.rows = rows,
                          .cols = dim,
                          .x = f->x,
                          .offsets = bounds,
                          .n_groups = 3,
                          .amax = f->w,
                          .act = f->act};
        return WAYS_CALL(s, amax, a, WAYS_AT(x, n * size), WAYS_AT(offsets, sizeof(bounds)),
                         WAYS_AT(amax, 12));
    }
    }
}
static uint16_t *halves(float *x, int64_t n) {
    uint16_t *h = calloc((size_t)n, 2);
    cr_assert_not_null(h);
    for (int64_t i = 0; i < n; i++) {
        h[i] = ways_bf16(x[i]);
        x[i] = ways_widened(h[i]);
    }
    return h;
}
static int64_t unlike(const uint16_t *h, const float *x, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; h && i < n; i++)
        count += h[i] != ways_bf16(x[i]);
    return count;
}
static void check_forms(cq_stream *s, int at, int op, int64_t rows, int64_t dim, int64_t groups,
                        bool plain, bool fixed) {
    int64_t n = rows * dim, one = plain ? n : 0;
    float *x = normal(1, n), *z = normal(2, 2 * n), *wide = normal(4, n), *block = floats(n / 16);
    uint16_t *x16 = halves(x, n), *z16 = halves(z, 2 * n);
    int32_t *index = calloc((size_t)rows, 4);
    for (int64_t r = 0; r < rows; r++)
        index[r] = (int32_t)cq_random_below(5, 5, (uint64_t)r, rows);
    for (int64_t b = 0; b < n / 16; b++)
        block[b] = 0.3f * (float)(1 + b % 9);
    act_form f = {CQ_F32,
                  rows,
                  dim,
                  groups,
                  x,
                  z,
                  plain ? floats(n) : NULL,
                  floats(n),
                  wide,
                  normal(3, dim),
                  index,
                  fixed ? block : NULL,
                  3};
    act_form h = f;
    h.act = CQ_BF16, h.x = x16, h.z = z16, h.w = normal(3, dim);
    h.y = plain ? calloc((size_t)n, 2) : NULL, h.q = calloc((size_t)n, 2);
    cr_assert_eq(run_form(s, op, &f), CQ_OK, "%s", cq_error());
    cr_assert_eq(run_form(s, op, &h), CQ_OK, "%s", cq_error());
    const char *what = ways_name(at);
    cr_expect_eq(unlike(h.y, f.y, one), 0, "%s: operation %d, %ld x %ld: %ld plain values", what,
                 op, (long)rows, (long)dim, (long)unlike(h.y, f.y, one));
    cr_expect_eq(unlike(h.q, f.q, n), 0, "%s: operation %d, %ld x %ld: %ld quantized", what, op,
                 (long)rows, (long)dim, (long)unlike(h.q, f.q, n));
    cr_expect_eq(h.counted, f.counted, "%s: operation %d: saturated", what, op);
    cr_expect(!memcmp(h.w, f.w, (size_t)dim * 4), "%s: operation %d: maxima", what, op);
    if (op == 5) {
        free(h.q);
        h.q = h.x; /* in place */
        cr_assert_eq(run_form(s, op, &h), CQ_OK, "%s", cq_error());
        cr_expect_eq(unlike(h.q, f.q, n), 0, "%s: in place differs", what);
        h.q = NULL;
    }
    void *owned[] = {x, z, wide, block, x16, z16, index, f.y, f.q, f.w, h.y, h.q, h.w};
    for (size_t i = 0; i < sizeof(owned) / sizeof(*owned); i++)
        free(owned[i]);
}
Test(cpu_quant, what_is_written_as_bf16_is_what_f32_would_hold_rounded) {
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
        for (int op = 0; op < 7; op++)
            for (int plain = 0; plain < 2; plain++)
                check_forms(&s, at, op, 37, 16 * 7, 7, plain, op == 5 && plain);
        check_forms(&s, at, 0, 3, 16 * 513, 1, true, false); /* too wide for registers */
        check_forms(&s, at, 0, 3, 16 * 513, 1, false, false);
        check_forms(&s, at, 1, 9, 48, 2, true, false); /* groups that are no whole blocks */
        check_forms(&s, at, 1, 9, 48, 2, false, false);
    }
}
#endif

Test(cpu_quant, adamw_quantizes_the_new_weights) {
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
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
#define UPDATE                                                                                     \
    WAYS_CALL(&s, adamw, a, WAYS_AT(w, ROWS *DIM * 4), WAYS_AT(m, ROWS *DIM * 4),                  \
              WAYS_AT(v, ROWS *DIM * 4), WAYS_AT(g, ROWS *DIM * 4), WAYS_AT(wq, ROWS *DIM * 4),    \
              WAYS_AT(fq.amax, sizeof(group_amax)), WAYS_AT(fq.offsets, sizeof(offsets)),          \
              WAYS_AT(fq.saturated, 8), WAYS_AT(block_amax, ROWS *DIM / 16 * 4))
        cr_assert_eq(UPDATE, CQ_OK, "%s", cq_error());
        cr_expect_eq(by_codec(right, w), counted);
        cr_expect_eq(differences(q, right, ROWS * DIM), 0, "%s", ways_name(at));
        float block[ROWS * DIM / 16];
        for (int64_t b = 0; b < ROWS * DIM / 16; b++)
            block[b] = 0.1f * (float)(b % 9);
        a.block_amax = block, a.top = 256.0f;
        cr_assert_eq(UPDATE, CQ_OK, "%s", cq_error());
        for (int64_t i = 0; i < GROUPS; i++)
            for (int64_t b = offsets[i] * DIM / 16; b < offsets[i + 1] * DIM / 16; b++)
                cq_nvfp4_block_fake(right + 16 * b, w + 16 * b, group_amax[i], block[b], 256.0f);
        cr_expect_eq(differences(q, right, ROWS * DIM), 0, "%s, static", ways_name(at));
        free(w), free(m), free(v), free(g), free(q), free(right);
    }
}

/* AdamW over narrow forms is AdamW of the same backend in F32 between widening and storing. */
static void check_narrow(cq_stream *s, int at, cq_master master, cq_moments moments, int64_t rows,
                         int64_t cols, bool quantized, bool fixed) {
    int64_t n = rows * cols, blocks = (n + 255) / 256, counted = 0, wanted = 0;
    float *w = normal(1, n), *m = normal(2, n), *v = normal(3, n), *g = normal(4, n);
    float *q = floats(n), *right = floats(n), scale[2][64] = {{0}}, block[1024];
    uint16_t *half[4]; /* w, low, m, v */
    cr_assert(blocks <= 64 && n / 16 <= 1024);
    for (int k = 0; k < 4; k++)
        half[k] = calloc((size_t)n, 2);
    for (int64_t i = 0; i < n; i++)
        v[i] *= v[i];
    for (int64_t b = 0; b < n / 16; b++)
        block[b] = 0.1f * (float)(1 + b % 9);
    float amax = 4.0f;
    cq_adamw_args wide = {.dtype = CQ_F32,
                          .rows = rows,
                          .cols = cols,
                          .w = w,
                          .m = m,
                          .v = v,
                          .g = g,
                          .lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.95,
                          .eps = 1e-8,
                          .weight_decay = 0.1,
                          .grad_scale = 0.7,
                          .step = 3,
                          .top = 448.0f};
    cq_adamw_args a = wide, copy;
    a.w = master ? (void *)half[0] : w, a.low = half[1];
    a.m = moments ? (void *)half[2] : m, a.v = moments ? (void *)half[3] : v;
    a.m_scale = scale[0], a.v_scale = scale[1];
    a.master = master, a.moments = moments, a.key = 0x123456789abcdefu, a.first = 512;
    a.wq = quantized ? q : NULL, a.fq = (cq_fq){&amax, NULL, 1, &counted};
    a.block_amax = fixed ? block : NULL;
    copy = a; /* stores the state that both begin with */
    for (int64_t b = 0; b < n; b += 256)
        cq_update_write(&copy, b, n - b < 256 ? n - b : 256, w + b, m + b, v + b);
    for (int64_t b = 0; b < n; b += 256)
        cq_update_read(&copy, b, n - b < 256 ? n - b : 256, w + b, m + b, v + b);
    float *wn = floats(n), *mn = floats(n), *vn = floats(n);
    memcpy(wn, w, (size_t)n * 4), memcpy(mn, m, (size_t)n * 4), memcpy(vn, v, (size_t)n * 4);
    wide.w = wn, wide.m = mn, wide.v = vn;
#define NARROW_SIZE(form) ((form) == 0 ? n * 4 : n * 2)
    cr_assert_eq(WAYS_CALL(s, adamw, wide, WAYS_AT(w, n * 4), WAYS_AT(m, n * 4), WAYS_AT(v, n * 4),
                           WAYS_AT(g, n * 4)),
                 CQ_OK, "%s", cq_error());
    cq_adamw_now now = cq_update_now(&a);
    if (quantized) /* the same numbers from memory */
        a.now = &now, a.lr = a.grad_scale = NAN, a.step = 0, a.key = 0;
    cr_assert_eq(WAYS_CALL(s, adamw, a, WAYS_AT(now, sizeof now), WAYS_AT(w, NARROW_SIZE(master)),
                           WAYS_AT(low, n * 2), WAYS_AT(m, NARROW_SIZE(moments)),
                           WAYS_AT(v, NARROW_SIZE(moments)), WAYS_AT(g, n * 4), WAYS_AT(wq, n * 4),
                           WAYS_AT(m_scale, blocks * 4), WAYS_AT(v_scale, blocks * 4),
                           WAYS_AT(fq.amax, 4), WAYS_AT(fq.saturated, 8),
                           WAYS_AT(block_amax, n / 16 * 4)),
                 CQ_OK, "%s", cq_error());
    /* what should be there now, in memory of its own */
    float *ws = floats(n), *ms = floats(n), *vs = floats(n), at_scale[2][64] = {{0}};
    uint16_t *low = calloc((size_t)n, 2);
    copy.w = ws, copy.m = ms, copy.v = vs, copy.low = low;
    copy.m_scale = at_scale[0], copy.v_scale = at_scale[1];
    for (int64_t b = 0; b < n; b += 256)
        cq_update_write(&copy, b, n - b < 256 ? n - b : 256, wn + b, mn + b, vn + b);
    const char *what = ways_name(at);
    size_t size_w = (size_t)NARROW_SIZE(master);
    size_t size_m = (size_t)(moments == CQ_MOMENTS_8BIT ? n : NARROW_SIZE(moments));
    cr_expect(!memcmp(a.w, ws, size_w), "%s: weights, %d %d", what, (int)master, (int)moments);
    cr_expect(!memcmp(a.m, ms, size_m), "%s: m, %d %d", what, (int)master, (int)moments);
    cr_expect(!memcmp(a.v, vs, size_m), "%s: v, %d %d", what, (int)master, (int)moments);
    if (master == CQ_MASTER_SPLIT)
        cr_expect(!memcmp(half[1], low, (size_t)n * 2), "%s: low halves", what);
    if (moments == CQ_MOMENTS_8BIT)
        cr_expect(!memcmp(scale, at_scale, sizeof(scale)), "%s: scales", what);
    for (int64_t b = 0; quantized && b < n / 16; b++)
        wanted += cq_nvfp4_block_fake(right + 16 * b, wn + 16 * b, amax, fixed ? block[b] : -1.0f,
                                      448.0f);
    if (quantized) {
        cr_expect_eq(differences(q, right, n), 0, "%s: quantized copy", what);
        cr_expect_eq(counted, wanted);
    }
    for (int k = 0; k < 4; k++)
        free(half[k]);
    free(w), free(m), free(v), free(g), free(q), free(right), free(wn), free(mn), free(vn);
    free(ws), free(ms), free(vs), free(low);
}

Test(cpu_quant, adamw_over_narrow_weights_and_moments) {
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);)
        for (int form = 1; form < 9; form++) {
            cq_master master = (cq_master)(form / 3);
            cq_moments moments = (cq_moments)(form % 3);
            check_narrow(&s, at, master, moments, 25, 16 * 9, true, form % 2);
            check_narrow(&s, at, master, moments, 1, 1021, false, false);
        }
}

Test(cpu_quant, maxima_are_refs_and_never_fall) {
    float *x = normal(5, ROWS * DIM);
    x[41 * DIM + 3] = -77.0f;
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
        float mine[GROUPS] = {0, 9, 0, 2, 0}, right[GROUPS] = {0, 9, 0, 2, 0};
        cq_amax_args a = {.dtype = CQ_F32,
                          .rows = ROWS,
                          .cols = DIM,
                          .x = x,
                          .offsets = offsets,
                          .n_groups = GROUPS,
                          .amax = mine};
        cr_assert_eq(WAYS_CALL(&s, amax, a, WAYS_AT(x, ROWS * DIM * 4),
                               WAYS_AT(offsets, sizeof(offsets)), WAYS_AT(amax, sizeof(mine))),
                     CQ_OK, "%s", cq_error());
        a.amax = right;
        cr_assert_eq(cq_ref_amax(&s, &a), CQ_OK);
        cr_expect_arr_eq(mine, right, sizeof(mine));
        cr_expect_eq(mine[4], 77.0f);
    }
    free(x);
}

Test(cpu_quant, rows_that_are_no_whole_blocks_are_an_error) {
    float x[40] = {0}, y[40], amax = 1.0f;
    ways w = {.seed = 0};
    cq_stream s = ways_stream(&w, CPU_WAY);
    cq_fake_quant_args a = {
        .dtype = CQ_F32, .rows = 2, .cols = 20, .x = x, .y = y, .fq = {.amax = &amax}};
    cr_expect_eq(WAYS_CALL(&s, fake_quant, a, WAYS_AT(x, sizeof(x)), WAYS_AT(y, sizeof(y)),
                           WAYS_AT(fq.amax, 4)),
                 CQ_ESHAPE);
    cr_expect(strstr(cq_error(), "20"), "%s", cq_error());
    ways_stream_free(&s);
}

Test(cpu_quant, a_nan_stays_visible) {
    float x[32] = {0}, y[32], amax = 1.0f;
    x[3] = NAN, x[20] = 1.0f;
    cq_stream s;
    for (int at = -1; next_stream(&at, &s);) {
        cq_fake_quant_args a = {
            .dtype = CQ_F32, .rows = 1, .cols = 32, .x = x, .y = y, .fq = {.amax = &amax}};
        cr_assert_eq(WAYS_CALL(&s, fake_quant, a, WAYS_AT(x, sizeof(x)), WAYS_AT(y, sizeof(y)),
                               WAYS_AT(fq.amax, 4)),
                     CQ_OK, "%s", cq_error());
        cr_expect(y[3] != y[3] && y[20] == 1.0f, "%s: %g, %g", ways_name(at), (double)y[3],
                  (double)y[20]);
    }
}
