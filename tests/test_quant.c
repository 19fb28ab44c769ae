/* test_quant.c - NVFP4 of whole matrices: bytes of another program, searched scales, and refusals.
 */
#include "core/ckaqad.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

typedef struct matrix {
    const cq_entry *bytes, *scale, *scale_2, *dequantized, *block_amax;
    float *x, amax;
    int64_t rows, cols;
} matrix;

static const cq_entry *part(const cq_safetensors *st, const char *name, const char *what) {
    char key[512];
    snprintf(key, sizeof key, "%s.%s", name, what);
    return cq_safetensors_find(st, key);
}

static matrix read_case(const cq_safetensors *st, const char *name) {
    const cq_entry *x = part(st, name, "x"), *amax = part(st, name, "amax");
    matrix c = {.bytes = part(st, name, "bytes"),
                .scale = part(st, name, "scale"),
                .scale_2 = part(st, name, "scale_2"),
                .dequantized = part(st, name, "dequantized"),
                .block_amax = part(st, name, "block_amax")};
    cr_assert(x && amax && c.bytes && c.scale && c.scale_2 && c.dequantized, "case %s", name);
    c.rows = x->tensor.shape.dim[0];
    c.cols = x->tensor.shape.dim[1];
    c.x = malloc((size_t)(c.rows * c.cols) * sizeof *c.x);
    OK(cq_convert(c.x, CQ_F32, x->tensor.data, x->tensor.dtype, c.rows * c.cols));
    memcpy(&c.amax, amax->tensor.data, sizeof c.amax);
    return c;
}

/* Copies, because the mapped file promises no alignment. */
static float *floats(const cq_entry *e) {
    float *y = malloc((size_t)cq_tensor_bytes(e->tensor));
    memcpy(y, e->tensor.data, (size_t)cq_tensor_bytes(e->tensor));
    return y;
}

/* Bits; but the dequantizer behind the static file reads code 8, minus zero, as plus zero. */
static bool same(float a, float b, bool zero_has_no_sign) {
    return !memcmp(&a, &b, sizeof a) || (zero_has_no_sign && a == 0 && b == 0);
}

static void check_case(const char *name, const matrix *c, const float *block_amax, float top) {
    int64_t n = c->rows * c->cols;
    uint8_t *bytes = malloc((size_t)n / 2), *scales = malloc((size_t)n / 16);
    float *y = malloc((size_t)n * sizeof *y), scale_2;
    OK(cq_nvfp4_pack(bytes, scales, &scale_2, c->x, c->rows, c->cols, c->amax, block_amax, top));
    cr_expect_eq(memcmp(bytes, c->bytes->tensor.data, (size_t)n / 2), 0, "%s: bytes", name);
    cr_expect_eq(memcmp(scales, c->scale->tensor.data, (size_t)n / 16), 0, "%s: scales", name);
    cr_expect_eq(memcmp(&scale_2, c->scale_2->tensor.data, 4), 0, "%s: tensor scale %.9g", name,
                 (double)scale_2);
    OK(cq_nvfp4_unpack(y, bytes, scales, scale_2, c->rows, c->cols));
    float *wanted = floats(c->dequantized);
    int64_t differing = 0;
    for (int64_t i = 0; i < n; i++)
        differing += !same(y[i], wanted[i], block_amax != NULL);
    cr_expect_eq(differing, 0, "%s: %ld values differ", name, (long)differing);
    free(wanted);
    free(bytes);
    free(scales);
    free(y);
}

/* Calls for every `<case>.x` of a golden file; returns how many. */
static int each_case(const char *file, void (*check)(const char *name, const matrix *c)) {
    cq_safetensors *st;
    char path[512];
    int n = 0;
    snprintf(path, sizeof path, "%s/golden/%s", CQ_TESTS, file);
    OK(cq_safetensors_open(&st, path));
    for (int64_t i = 0; i < cq_safetensors_count(st); i++) {
        char name[160];
        snprintf(name, sizeof name, "%s", cq_safetensors_at(st, i)->name);
        char *dot = strrchr(name, '.');
        if (strcmp(dot, ".x"))
            continue;
        *dot = 0;
        matrix c = read_case(st, name);
        check(name, &c);
        free(c.x);
        n++;
    }
    cq_safetensors_close(st);
    return n;
}

static void check_dynamic(const char *name, const matrix *c) { check_case(name, c, NULL, 448); }

Test(quant, packs_the_bytes_that_modelopt_packs) {
    cr_assert_eq(each_case("nvfp4.golden.safetensors", check_dynamic), 7);
}

static bool is_four_over_six(const char *name) { return strstr(name, "four_over_six") != NULL; }

static void check_static(const char *name, const matrix *c) {
    float *b = floats(c->block_amax);
    check_case(name, c, b, is_four_over_six(name) ? 256 : 448);
    free(b);
}

Test(quant, packs_given_block_maxima_as_modelopt_does) {
    cr_assert_eq(each_case("nvfp4_static.golden.safetensors", check_static), 4);
}

static void check_search(const char *name, const matrix *c) {
    int64_t n = c->rows * c->cols / 16, differing = 0;
    float *found = malloc((size_t)n * sizeof *found), *wanted = floats(c->block_amax);
    OK(cq_nvfp4_search(found, c->x, c->rows, c->cols, c->amax,
                       is_four_over_six(name) ? CQ_SCALE_FOUR_OVER_SIX : CQ_SCALE_MSE));
    for (int64_t i = 0; i < n; i++)
        differing += memcmp(found + i, wanted + i, 4) != 0;
    /* at most 0.1 % of blocks, where two errors tie in the last bit */
    cr_expect_leq(differing, n / 1000, "%s: %ld of %ld block maxima differ", name, (long)differing,
                  (long)n);
    free(found);
    free(wanted);
}

Test(quant, searches_the_block_maxima_that_modelopt_chooses) {
    cr_assert_eq(each_case("nvfp4_static.golden.safetensors", check_search), 4);
}

static double squared_error(const float *x, const float *block_amax, float amax, float top,
                            int64_t rows, int64_t cols) {
    uint8_t bytes[512], scales[64];
    float y[1024], scale_2;
    double e = 0;
    OK(cq_nvfp4_pack(bytes, scales, &scale_2, x, rows, cols, amax, block_amax, top));
    OK(cq_nvfp4_unpack(y, bytes, scales, scale_2, rows, cols));
    for (int64_t i = 0; i < rows * cols; i++)
        e += (double)(y[i] - x[i]) * (double)(y[i] - x[i]);
    return e;
}

Test(quant, searched_scales_lower_the_error_of_random_matrices) {
    enum { ROWS = 16, COLS = 64, SEED = 11 };
    float x[ROWS * COLS], block[ROWS * COLS / 16], amax = 0;
    for (int64_t i = 0; i < ROWS * COLS; i++) {
        x[i] = (float)cq_random_normal(SEED, 1, (uint64_t)i);
        amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    }
    double plain = squared_error(x, NULL, amax, 448, ROWS, COLS);
    OK(cq_nvfp4_search(block, x, ROWS, COLS, amax, CQ_SCALE_MSE));
    double mse = squared_error(x, block, amax, 448, ROWS, COLS);
    OK(cq_nvfp4_search(block, x, ROWS, COLS, amax, CQ_SCALE_FOUR_OVER_SIX));
    double four = squared_error(x, block, amax, 256, ROWS, COLS);
    cr_expect_lt(mse, 0.95 * plain, "seed %d: %g against %g", SEED, mse, plain);
    cr_expect_lt(four, 0.95 * plain, "seed %d: %g against %g", SEED, four, plain);
}

Test(quant, the_first_of_equal_candidates_wins) {
    float x[16] = {0}, block = -1, first = 3.0f * (0x1p-9f / 448.0f);
    OK(cq_nvfp4_search(&block, x, 1, 16, 3.0f, CQ_SCALE_MSE)); /* every scale has error 0 */
    cr_expect_eq(block, first, "%g, wanted %g", (double)block, (double)first);
    x[4] = -2;
    OK(cq_nvfp4_search(&block, x, 1, 16, 1536.0f, CQ_SCALE_FOUR_OVER_SIX));
    cr_expect_eq(block, 3.0f, "with a tensor scale of one only 4 x 0.5 is exact: %g",
                 (double)block);
    OK(cq_nvfp4_search(&block, x, 1, 16, 1024.0f, CQ_SCALE_FOUR_OVER_SIX));
    cr_expect_eq(block, 2.0f, "both candidates are exact, the first is kept: %g", (double)block);
}

static void check_zeros(float amax, const float *block_amax, float scale_2_wanted) {
    float x[32] = {0}, y[32], scale_2;
    uint8_t bytes[16], scales[2];
    x[3] = -0.0f;
    OK(cq_nvfp4_pack(bytes, scales, &scale_2, x, 2, 16, amax, block_amax, 448));
    for (int i = 0; i < 16; i++)
        cr_expect_eq(bytes[i], 0);
    cr_expect(scales[0] == 0x38 && scales[1] == 0x38);
    cr_expect_eq(scale_2, scale_2_wanted, "tensor scale %g", (double)scale_2);
    OK(cq_nvfp4_unpack(y, bytes, scales, scale_2, 2, 16));
    for (int i = 0; i < 32; i++)
        cr_expect(y[i] == 0 && !signbit(y[i]));
}

Test(quant, a_zero_matrix_keeps_scale_one_and_the_tensor_scale_of_its_group) {
    float block_amax[2] = {0, 0};
    check_zeros(0.25f, NULL, 0.25f / 2688.0f);
    check_zeros(0.25f, block_amax, 0.25f / 2688.0f);
    check_zeros(0, NULL, 1);
    check_zeros(0, block_amax, 1);
}

static void expect_refused(float value, float amax, int64_t cols, int status, const char *word) {
    float x[48], scale_2, block[3];
    uint8_t bytes[24], scales[3];
    for (int i = 0; i < 48; i++)
        x[i] = 0.5f;
    x[17] = value;
    int got = cq_nvfp4_pack(bytes, scales, &scale_2, x, 1, cols, amax, NULL, 448);
    cr_expect_eq(got, status, "pack of %g under %g: %d, wanted %d", (double)value, (double)amax,
                 got, status);
    cr_expect(strstr(cq_error(), word), "message is: %s", cq_error());
    got = cq_nvfp4_search(block, x, 1, cols, amax, CQ_SCALE_MSE);
    cr_expect_eq(got, status, "search of %g under %g: %d", (double)value, (double)amax, got);
}

Test(quant, refuses_what_it_cannot_encode_faithfully) {
    expect_refused(NAN, 0.5f, 48, CQ_ENUMERIC, "[0, 17] is");
    expect_refused(INFINITY, 0.5f, 48, CQ_ENUMERIC, "[0, 17] is inf");
    expect_refused(-INFINITY, 0.5f, 48, CQ_ENUMERIC, "[0, 17] is -inf");
    expect_refused(0.5f, NAN, 48, CQ_ENUMERIC, "maximum is");
    expect_refused(0.5f, INFINITY, 48, CQ_ENUMERIC, "maximum is");
    expect_refused(0.5f, -1, 48, CQ_ENUMERIC, "maximum is");
    expect_refused(0.5f, 1e-35f, 48, CQ_ENUMERIC, "subnormal");
    expect_refused(0.5f, 0.5f, 40, CQ_ESHAPE, "blocks of 16");
}

Test(quant, refuses_block_maxima_that_are_not_finite) {
    float x[16] = {1}, block = NAN, scale_2;
    uint8_t bytes[8], scale;
    cr_expect_eq(cq_nvfp4_pack(bytes, &scale, &scale_2, x, 1, 16, 1, &block, 448), CQ_ENUMERIC);
    cr_expect(strstr(cq_error(), "block maxima"), "message is: %s", cq_error());
}
