/* test_nvfp4.c - the NVFP4 codec against the definition of its formats, ModelOpt's bytes and
   values, and the operations that quantize rows with it.

   Expected codes come from a search over the exact values of a format in double, not from the
   decision table or bit tricks of kernels/nvfp4.h. Vectors: ModelOpt a2fbac7b, section 2.1 of the
   format notes; golden files: ModelOpt 0.47. */
#include "core/quant/scales.h"
#include "kernels/nvfp4.h"
#include "tests/ref_check.h"

static float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static uint32_t to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

/* Code of the value nearest to v among n ascending values; of two equally near ones the even code.
   Beyond the last value it is the last. */
static int nearest(double v, const double *values, int n) {
    int best = 0;
    for (int c = 1; c < n; c++) {
        double old = fabs(v - values[best]), new = fabs(v - values[c]);
        if (new < old || (new == old &&c % 2 == 0))
            best = c;
    }
    return best;
}

static const double e2m1_values[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};

static void expect_e2m1(float v) {
    int want = fabsf(v) >= 6 ? 7 : nearest(fabs((double)v), e2m1_values, 8);
    want |= v < 0 ? 8 : 0;
    cr_assert_eq(cq_e2m1_encode(v), want, "e2m1 of %a: %d, wanted %d", (double)v, cq_e2m1_encode(v),
                 want);
}

Test(nvfp4, e2m1_rounds_to_nearest_with_ties_to_even) {
    for (int c = 0; c < 16; c++) {
        float v = cq_e2m1_decode((uint8_t)c);
        cr_expect_eq(v, (float)((c & 8 ? -1 : 1) * e2m1_values[c & 7]), "code %d", c);
        if (c != 8)
            cr_expect_eq(cq_e2m1_encode(v), c);
    }
    for (int c = 0; c < 7; c++)
        for (int sign = -1; sign < 2; sign += 2) {
            float tie = (float)(sign * (e2m1_values[c] + e2m1_values[c + 1]) / 2);
            int even = c + c % 2;
            cr_expect_eq(cq_e2m1_encode(tie) & 7, even, "tie %g", (double)tie);
            expect_e2m1(tie);
            expect_e2m1(nextafterf(tie, 0));
            expect_e2m1(nextafterf(tie, 100));
        }
    for (uint64_t u = 0; u < 1ull << 32; u += 1009) {
        float v = from_bits((uint32_t)u);
        if (!isnan(v))
            expect_e2m1(v);
    }
}

Test(nvfp4, e2m1_sign_comes_from_less_than_zero) {
    cr_expect_eq(cq_e2m1_encode(-0.0f), 0);
    cr_expect_eq(cq_e2m1_encode(from_bits(0x80000001)), 8);
    cr_expect_eq(cq_e2m1_encode(NAN), 7);
    cr_expect_eq(cq_e2m1_encode(-NAN), 7);
    cr_expect_eq(cq_e2m1_encode(INFINITY), 7);
    cr_expect_eq(cq_e2m1_encode(-INFINITY), 15);
}

/* E4M3FN by its definition: bias 7, subnormals in steps of 2^-9. */
static double e4m3_value(int c) {
    int e = c >> 3, m = c & 7;
    return e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m, -9);
}

Test(nvfp4, e4m3_codes_round_trip_and_midpoints_go_to_even) {
    double values[127];
    for (int c = 0; c < 127; c++) {
        values[c] = e4m3_value(c);
        cr_expect_eq((double)cq_e4m3_decode((uint8_t)c), values[c], "code %d", c);
        cr_expect_eq((double)cq_e4m3_decode((uint8_t)(c | 0x80)), -values[c], "code %d", c | 0x80);
        cr_expect_eq(cq_e4m3_encode((float)values[c]), c, "code %d", c);
    }
    cr_expect(isnan(cq_e4m3_decode(0x7f)) && isnan(cq_e4m3_decode(0xff)));
    for (int c = 0; c < 126; c++) {
        float middle = (float)((values[c] + values[c + 1]) / 2);
        cr_expect_eq(cq_e4m3_encode(middle), c + c % 2, "middle above code %d", c);
        cr_expect_eq(cq_e4m3_encode(nextafterf(middle, 0)), c, "below the middle above %d", c);
        cr_expect_eq(cq_e4m3_encode(nextafterf(middle, 1e9f)), c + 1, "above the middle of %d", c);
    }
    for (uint32_t u = 0; u < 0x7f800000u; u += 20011) {
        float v = from_bits(u);
        cr_assert_eq(cq_e4m3_encode(v), nearest((double)v, values, 127), "e4m3 of %a", (double)v);
    }
}

Test(nvfp4, e4m3_saturates_and_keeps_nan) {
    const float large[] = {448, 449, 464, 465, 480, 1e30f, INFINITY};
    for (int i = 0; i < 7; i++)
        cr_expect_eq(cq_e4m3_encode(large[i]), 0x7e, "%g", (double)large[i]);
    cr_expect_eq(cq_e4m3_encode(NAN), 0x7f);
    cr_expect_eq(cq_e4m3_encode(0x1p-10f), 0);
    cr_expect_eq(cq_e4m3_encode(0x1.8p-10f), 1);
    cr_expect_eq(cq_e4m3_encode(1), 0x38);
    cr_expect_eq(cq_e4m3_encode(0.125f), 0x20);
    cr_expect_eq(cq_e4m3_encode(0x1p-6f), 0x08);
}

typedef struct vector {
    const char *name;
    uint16_t x[16]; /* BF16 */
    uint32_t block_amax;
    int s8, saturated;
    uint32_t den;
    uint8_t bytes[8];
} vector;

static const vector vectors[] = {
    {"ramp",
     {0x3b3d, 0xbbbd, 0x3c0e, 0xbc3d, 0x3c6d, 0xbc8e, 0x3ca6, 0xbcbd, 0x3cd5, 0xbced, 0x3d02,
      0xbd0e, 0x3d1a, 0xbd26, 0x3d32, 0xbd3d},
     0x3d3d0000,
     0x6a,
     0,
     0x3bf3cf3d,
     {0xa1, 0xb2, 0xc4, 0xd5, 0xe5, 0xe6, 0xf7, 0xf7}},
    {"zeros",
     {0x8000, 0, 0, 0x8000, 0, 0, 0x8000, 0, 0, 0x8000, 0, 0, 0x8000, 0, 0, 0x8000},
     0,
     0x38,
     0,
     0x38c30c31,
     {0}},
    {"tiny", {0x3586, 0xb586}, 0x35860000, 0x01, 0, 0x34430c31, {0xf7}},
    {"above the frozen maximum",
     {0x3d00, 0x3d80, 0x3dc0, 0x3e00, 0x3e20, 0x3e40, 0x3e60, 0x3e80, 0x3e90, 0x3ea0, 0x3eb0,
      0x3ec0, 0x3ed0, 0x3ee0, 0x3ef0, 0x3f00},
     0x3f000000,
     0x7e,
     1,
     0x3d2aaaab,
     {0x32, 0x54, 0x66, 0x77, 0x77, 0x77, 0x77, 0x77}},
};

Test(nvfp4, published_vectors_hold_to_the_bit) {
    float ws2 = cq_nvfp4_tensor_scale(0.25f, 448);
    cr_expect_eq(to_bits(ws2), 0x38c30c31);
    for (size_t i = 0; i < sizeof(vectors) / sizeof(*vectors); i++) {
        const vector *v = &vectors[i];
        float x[16], y[16], z[16];
        uint8_t bytes[8];
        for (int j = 0; j < 16; j++)
            x[j] = from_bits((uint32_t)v->x[j] << 16);
        int saturated = -1;
        float b = cq_nvfp4_block_amax(x);
        uint8_t s8 = cq_nvfp4_scale_dynamic(b, ws2, &saturated);
        cq_nvfp4_block_encode(bytes, x, s8, ws2);
        cr_expect_eq(to_bits(b), v->block_amax, "%s", v->name);
        cr_expect_eq(s8, v->s8, "%s: scale %#x", v->name, s8);
        cr_expect_eq(saturated, v->saturated, "%s", v->name);
        cr_expect_eq(to_bits(cq_e4m3_decode(s8) * ws2), v->den, "%s", v->name);
        cr_expect_arr_eq(bytes, v->bytes, 8, "%s", v->name);
        cq_nvfp4_block_decode(y, bytes, s8, ws2);
        cr_expect_eq(cq_nvfp4_block_fake(z, x, 0.25f, -1, 448), v->saturated, "%s", v->name);
        cr_expect_arr_eq(y, z, sizeof(y), "%s: fake quantization is not decode(encode)", v->name);
    }
}

Test(nvfp4, zero_block_keeps_scale_one) {
    int saturated = -1;
    cr_expect_eq(cq_nvfp4_scale_dynamic(0, 1e-4f, &saturated), 0x38);
    cr_expect_eq(saturated, 0);
    cr_expect_eq(cq_nvfp4_scale_static(0, 6, 448), 0x7e);
    cr_expect_eq(cq_nvfp4_scale_static(0, 0.01f, 448), 0x7e);
    cr_expect_eq(cq_nvfp4_scale_static(0, 6 * 448, 448), 0x38);
}

Test(nvfp4, zero_tensor_gives_zeros_not_nan) {
    float x[16] = {1, -2, 0, NAN}, y[16];
    cr_expect_eq(cq_nvfp4_block_fake(y, x, 0, -1, 448), 0);
    for (int i = 0; i < 16; i++)
        cr_expect_eq(to_bits(y[i]), 0);
}

Test(nvfp4, static_largest_block_takes_top) {
    cr_expect_eq(cq_nvfp4_scale_static(0.37f, 0.37f, 448), 0x7e);
    cr_expect_eq(cq_e4m3_decode(cq_nvfp4_scale_static(0.37f, 0.37f, 256)), 256);
    cr_expect_eq(cq_e4m3_decode(cq_nvfp4_scale_static(1.5f * 0.37f, 0.37f, 256)), 384);
    cr_expect_eq(cq_nvfp4_scale_static(9, 1, 448), 0x7e);
    cr_expect_eq(cq_nvfp4_scale_static(1e-9f, 1, 448), 0x01);
}

/* ModelOpt's own unpacking, which wrote the static file, reads code 8 as +0 where ours reads -0. */
static void expect_values(const float *got, const float *want, int64_t n, bool by_number,
                          const char *name) {
    if (!by_number)
        cr_expect_arr_eq(got, want, (size_t)n * 4, "%s", name);
    for (int64_t i = 0; i < n; i++)
        cr_assert(got[i] == want[i], "%s: %a at %lld, wanted %a", name, (double)got[i],
                  (long long)i, (double)want[i]);
}

/* E4M3 scale of a quotient already in range, by search; volatile floats make each step round. */
static int scale_code(float p) {
    double values[127];
    for (int c = 0; c < 127; c++)
        values[c] = e4m3_value(c);
    return nearest(fmin(fmax((double)p, 0x1p-9), 448), values, 127);
}

/* BF16 maxima meet the middles of E4M3 often, so the order of the roundings shows in the scale. */
Test(nvfp4, scales_round_after_each_operation_in_the_published_order) {
    int other_static = 0, other_dynamic = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        float b = from_bits((uint32_t)(0x3c00 + cq_random_below(5, 0, i, 0x180)) << 16);
        float g = from_bits((uint32_t)(0x3d80 + cq_random_below(5, 1, i, 0x100)) << 16);
        volatile float sixth = b / 6, product = sixth * 448, smax = g / 6, p = product / smax;
        volatile float ratio = 448 / smax, q = sixth * ratio;
        volatile float ws2 = g / 2688, d = 6 * ws2, r = b / d, t = sixth / ws2;
        int saturated, want = scale_code(p);
        cr_assert_eq(cq_nvfp4_scale_static(b, g, 448), want, "static, b %a g %a", (double)b,
                     (double)g);
        other_static += scale_code(q) != want;
        want = scale_code(r);
        cr_assert_eq(cq_nvfp4_scale_dynamic(b, cq_nvfp4_tensor_scale(g, 448), &saturated), want,
                     "dynamic, b %a g %a", (double)b, (double)g);
        other_dynamic += scale_code(t) != want;
    }
    cr_expect_gt(other_static, 0, "another order gives the same scales: the test shows nothing");
    cr_expect_gt(other_dynamic, 0, "another order gives the same scales: the test shows nothing");
}

/* One golden case: packing, unpacking, and fake quantization in F32 and F64, every bit. */
static void check_case(const cq_safetensors *file, const char *name, bool fixed, float top) {
    cq_tensor t = check_tensor(file, name, "x");
    int64_t rows = t.shape.dim[0], cols = t.shape.dim[1], n = rows * cols, saturated[2] = {0, 0};
    float *x = check_as(t, CQ_F32), *y = check_as(t, CQ_F32), scale_2 = 0;
    double *wide = check_as(t, CQ_F64);
    uint8_t *bytes = calloc((size_t)n / 2, 1), *scales = calloc((size_t)n / 16, 1);
    const float *want = check_tensor(file, name, "dequantized").data;
    const float *amax = check_tensor(file, name, "amax").data;
    const float *block_amax = fixed ? check_tensor(file, name, "block_amax").data : NULL;

    OK(cq_nvfp4_pack(bytes, scales, &scale_2, x, rows, cols, *amax, block_amax, top));
    cr_expect_arr_eq(bytes, check_tensor(file, name, "bytes").data, (size_t)n / 2, "%s", name);
    cr_expect_arr_eq(scales, check_tensor(file, name, "scale").data, (size_t)n / 16, "%s", name);
    cr_expect_arr_eq(&scale_2, check_tensor(file, name, "scale_2").data, 4, "%s", name);
    OK(cq_nvfp4_unpack(y, bytes, scales, scale_2, rows, cols));
    expect_values(y, want, n, fixed, name);

    cq_fake_quant_args a = {.dtype = CQ_F32,
                            .rows = rows,
                            .cols = cols,
                            .x = x,
                            .y = x,
                            .fq = {.amax = amax, .saturated = &saturated[0]},
                            .block_amax = block_amax,
                            .top = top};
    OK(cq_ref_kernels.fake_quant(NULL, &a));
    expect_values(x, want, n, fixed, name);
    a.dtype = CQ_F64;
    a.x = a.y = wide;
    a.fq.saturated = &saturated[1];
    OK(cq_ref_kernels.fake_quant(NULL, &a));
    for (int64_t i = 0; i < n; i++)
        cr_assert_eq(wide[i], (double)want[i], "%s: F64 at %lld", name, (long long)i);
    cr_expect_eq(saturated[0], saturated[1]);
    cr_expect_eq(saturated[0] > 0, !strcmp(name, "frozen_amax_too_small"), "%s: %lld saturated",
                 name, (long long)saturated[0]);
    free(x);
    free(y);
    free(wide);
    free(bytes);
    free(scales);
}

/* Runs check_case on every `<case>.x` of the file; returns how many there were. */
static int check_file(const char *file_name, bool fixed) {
    cq_safetensors *file = check_golden(file_name);
    int n = 0;
    for (int64_t i = 0; i < cq_safetensors_count(file); i++) {
        char name[128];
        snprintf(name, sizeof(name), "%s", cq_safetensors_at(file, i)->name);
        size_t length = strlen(name);
        if (length < 2 || strcmp(name + length - 2, ".x"))
            continue;
        name[length - 2] = 0;
        check_case(file, name, fixed, strstr(name, "four_over_six") ? 256 : 448);
        n++;
    }
    cq_safetensors_close(file);
    return n;
}

Test(nvfp4, dynamic_form_equals_modelopt_bit_for_bit) {
    cr_expect_eq(check_file("nvfp4", false), 7);
}

Test(nvfp4, static_form_equals_modelopt_bit_for_bit) {
    cr_expect_eq(check_file("nvfp4_static", true), 4);
}

Test(nvfp4, groups_of_rows_use_their_own_maximum) {
    enum { ROWS = 7, COLS = 32 };
    const int64_t offsets[] = {0, 2, 2, 7};
    double *x = finite_normal(ROWS * COLS, 3, 0, 0.1, 0);
    for (int64_t i = 0; i < 2 * COLS; i++)
        x[i] *= 100;
    double y[ROWS * COLS], part[ROWS * COLS];
    float amax[3] = {0, 0.25f, 0};
    REF(amax, .rows = ROWS, .cols = COLS, .x = x, .offsets = offsets, .n_groups = 3, .amax = amax);
    for (int g = 0; g < 3; g++) {
        float most = g == 1 ? 0.25f : 0;
        for (int64_t i = offsets[g] * COLS; i < offsets[g + 1] * COLS; i++)
            most = fmaxf(most, (float)fabs(x[i]));
        cr_expect_eq(amax[g], most, "group %d", g);
    }
    cr_expect(amax[0] > 10 * amax[2]);
    REF(fake_quant, .rows = ROWS, .cols = COLS, .x = x, .y = y,
        .fq = {.amax = amax, .offsets = offsets, .n_groups = 3});
    REF(fake_quant, .rows = 2, .cols = COLS, .x = x, .y = part, .fq = {.amax = &amax[0]});
    REF(fake_quant, .rows = 5, .cols = COLS, .x = x + 2 * COLS, .y = part + 2 * COLS,
        .fq = {.amax = &amax[2]});
    cr_expect_arr_eq(y, part, sizeof(y));
    free(x);
}

Test(nvfp4, maximum_only_grows_and_counts_both_signs) {
    float x[16] = {1, -3, 2}, amax = 0.5f;
    cq_amax_args a = {.dtype = CQ_F32, .rows = 1, .cols = 16, .x = x, .amax = &amax};
    OK(cq_ref_kernels.amax(NULL, &a));
    cr_expect_eq(amax, 3.0f);
    x[1] = 0;
    OK(cq_ref_kernels.amax(NULL, &a));
    cr_expect_eq(amax, 3.0f);
}

/* The block maximum always becomes code 6, so the second pass meets the same scales. Values, not
   bits: a small negative becomes -0, and the sign of -0 is not taken from the second time on. */
Test(nvfp4, quantizing_a_quantized_tensor_changes_nothing) {
    enum { N = 64 * 16 };
    double *x = finite_normal(N, 4, 0, 0.02, 0), y[N], z[N];
    float amax = 0;
    REF(amax, .rows = 64, .cols = 16, .x = x, .amax = &amax);
    REF(fake_quant, .rows = 64, .cols = 16, .x = x, .y = y, .fq = {.amax = &amax});
    REF(fake_quant, .rows = 64, .cols = 16, .x = y, .y = z, .fq = {.amax = &amax});
    int64_t changed = 0;
    for (int i = 0; i < N; i++)
        changed += y[i] != x[i];
    for (int i = 0; i < N; i++)
        cr_expect_eq(z[i], y[i], "at %d", i);
    cr_expect_gt(changed, N * 9 / 10);
    for (int i = 0; i < N; i++) /* by number: -0 becomes +0 the second time */
        cr_expect(z[i] == y[i], "element %d: %a, wanted %a", i, z[i], y[i]);
    free(x);
}

Test(nvfp4, row_length_not_in_blocks_is_refused) {
    float x[24] = {0}, amax = 1;
    cr_expect_eq(REF_STATUS(fake_quant, .dtype = CQ_F32, .rows = 1, .cols = 24, .x = x, .y = x,
                            .fq = {.amax = &amax}),
                 CQ_ESHAPE);
    cr_expect_eq(REF_STATUS(amax, .dtype = CQ_BF16, .rows = 1, .cols = 24, .x = x, .amax = &amax),
                 CQ_EUSAGE);
}
