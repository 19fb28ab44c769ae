/* test_formats.c - narrow forms of weights and moments (kernels/formats.h): what they hold exactly,
   how far off they are, that rounding is unbiased, and AdamW over them in ref against AdamW in F32.
 */
#include "kernels/update.h"
#include "tests/ref_check.h"

enum { N = 3 * 256 + 57, STEPS = 4 };

static float bits(uint32_t u) { return cq_bits_float(u); }
static bool same(float x, float y) { return cq_float_bits(x) == cq_float_bits(y); }

Test(formats, split_holds_every_float_exactly) {
    for (uint64_t i = 0; i < 1u << 20; i++) {
        uint32_t low = (uint32_t)i * 4093u,
                 u = i < 1u << 17 ? (uint32_t)i * 0x8000u + low % 5 : low;
        cr_assert(same(cq_split_join(cq_split_high(bits(u)), cq_split_low(bits(u))), bits(u)),
                  "%08x", u);
    }
    const uint32_t ends[] = {0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff7fffffu, 0x3f808000u};
    for (int i = 0; i < 5; i++)
        cr_expect(same(cq_split_join(cq_split_high(bits(ends[i])), cq_split_low(bits(ends[i]))),
                       bits(ends[i])));
    cr_expect_eq(cq_split_high(bits(0x3f807fffu)), 0x3f80, "the high half is the nearest BF16");
    cr_expect_eq(cq_split_high(bits(0x3f808001u)), 0x3f81);
}

Test(formats, bf16_goes_to_a_neighbour_and_keeps_what_it_can) {
    for (uint32_t r = 0; r < 0x10000u; r += 0x1111u) {
        cr_expect_eq(cq_bf16_dithered(1.0f, r), 0x3f80, "a BF16 stays");
        cr_expect_eq(cq_bf16_dithered(-0.0f, r), 0x8000);
        cr_expect_eq(cq_bf16_dithered(INFINITY, r), 0x7f80);
        cr_expect(isnan(cq_bf16_value(cq_bf16_dithered(bits(0x7f800001u), r))));
        uint16_t h = cq_bf16_dithered(bits(0x3f804000u), r); /* a quarter of the way */
        cr_expect_eq(h, r >= 0xc000u ? 0x3f81 : 0x3f80, "%x", r);
    }
}

static void check_codes(int mantissa) {
    uint32_t top = (16u << mantissa) - 1;
    float before = -1;
    for (uint32_t c = 0; c <= top; c++) {
        float x = cq_mini_decode(c, mantissa);
        cr_expect(x > before, "codes are in the order of their values");
        before = x;
        for (uint32_t r = 0; r <= 0xffffu; r += 0xffffu)
            cr_expect_eq(cq_mini_encode(x, mantissa, r), c, "a value of the code stays: %u", c);
        float next = cq_mini_decode(c + 1, mantissa), middle = x + (next - x) * 0.25f;
        if (c < top) {
            cr_expect_eq(cq_mini_encode(middle, mantissa, 0xbfffu), c, "%u", c);
            cr_expect_eq(cq_mini_encode(middle, mantissa, 0xc000u), c + 1, "%u", c);
        }
    }
    cr_expect_eq(before, 2.0f - ldexpf(1.0f, -mantissa));
    cr_expect_eq(cq_mini_encode(3.0f, mantissa, 0), top);
    cr_expect_eq(cq_mini_encode(INFINITY, mantissa, 0xffffu), top);
    cr_expect_eq(cq_mini_decode(1, mantissa), ldexpf(1.0f, -14 - mantissa));
}
Test(formats, eight_bit_codes) {
    check_codes(CQ_MOMENT_M);
    check_codes(CQ_MOMENT_V);
}

Test(formats, rounding_is_unbiased_and_a_function_of_key_and_element) {
    enum { DRAWS = 40000 };
    const float x = 0.7312f, scale = 0.5f;
    double mean[3] = {0}, part = 0;
    for (int64_t i = 0; i < DRAWS; i++) {
        uint32_t d = cq_dither(cq_random_bits(1, 2, 3), i);
        mean[0] += cq_bf16_value(cq_bf16_dithered(x, d >> 16));
        mean[1] += cq_moment_m_decode(cq_moment_m_encode(-x, scale, d & 0xffffu), scale);
        mean[2] += sqrt(cq_moment_v_decode(cq_moment_v_encode(x, scale, cq_dither_v(d)), scale));
        part += ((d >> 16) & 0x8000u) != 0 && (d & 0x8000u) != 0;
    }
    /* six standard errors of steps of 2^-8 x, 2^-3 x and 2^-4 x */
    check_near(mean[0] / DRAWS, x, 6 * 0.5 * 0.00390625 / 200, "BF16");
    check_near(mean[1] / DRAWS, -x, 6 * 0.5 * 0.125 / 200, "8-bit m");
    check_near(mean[2] / DRAWS, x, 6 * 0.5 * 0.0625 / 200, "8-bit root of v");
    check_near(part / DRAWS, 0.25, 6 * 0.44 / 200, "the two halves are independent");
    cr_expect_eq(cq_dither(7, 5), cq_dither(7, 5));
    int64_t equal = 0;
    for (int64_t i = 0; i < DRAWS; i++)
        equal += cq_dither(7, i) == cq_dither(8, i) || cq_dither(7, i) == cq_dither(7, i + 1);
    cr_expect_lt(equal, 3, "keys and neighbours give other numbers: %ld equal", (long)equal);
    cr_expect_neq(cq_dither(7, 1), cq_dither(7, 1 + ((int64_t)1 << 32)));
}

/* Buffers of one AdamW in some form. */
typedef struct state {
    float w[N], m[N], v[N], g[N], wq[N + 7], m_scale[4], v_scale[4];
    uint16_t w16[N], low[N], m16[N], v16[N];
    uint8_t m8[N], v8[N];
} state;

static void start(state *s, double spread) {
    memset(s, 0, sizeof *s);
    for (int i = 0; i < N; i++) {
        s->w[i] = cq_bf16_value(cq_bf16_dithered((float)cq_random_normal(3, 1, (uint64_t)i), 0));
        s->g[i] = (float)(cq_random_normal(3, 2, (uint64_t)i) *
                          exp(spread * cq_random_normal(3, 3, (uint64_t)i)));
        s->w16[i] = cq_split_high(s->w[i]);
        s->low[i] = cq_split_low(s->w[i]);
    }
}
static cq_adamw_args arguments(state *s, cq_master master, cq_moments moments, int64_t step) {
    return (cq_adamw_args){
        .dtype = CQ_F32,
        .rows = 1,
        .cols = N,
        .w = master ? (void *)s->w16 : s->w,
        .m = moments == CQ_MOMENTS_8BIT ? (void *)s->m8
             : moments                  ? (void *)s->m16
                                        : s->m,
        .v = moments == CQ_MOMENTS_8BIT ? (void *)s->v8
             : moments                  ? (void *)s->v16
                                        : s->v,
        .low = s->low,
        .g = s->g,
        .m_scale = s->m_scale,
        .v_scale = s->v_scale,
        .lr = 1e-2,
        .beta1 = 0.9,
        .beta2 = 0.95,
        .eps = 1e-8,
        .grad_scale = 1,
        .step = step,
        .key = cq_random_bits(9, 0, (uint64_t)step),
        .master = master,
        .moments = moments,
        .wq = s->wq,
    };
}
static void step_ref(state *s, cq_master master, cq_moments moments, int64_t step) {
    cq_adamw_args a = arguments(s, master, moments, step);
    OK(cq_ref_kernels.adamw(NULL, &a));
}

Test(formats, a_split_master_is_f32_bit_for_bit) {
    static state wide, split;
    start(&wide, 1);
    start(&split, 1);
    for (int64_t t = 1; t <= STEPS; t++) {
        step_ref(&wide, CQ_MASTER_F32, CQ_MOMENTS_F32, t);
        step_ref(&split, CQ_MASTER_SPLIT, CQ_MOMENTS_F32, t);
        for (int i = 0; i < N; i++) {
            cr_assert(same(cq_split_join(split.w16[i], split.low[i]), wide.w[i]), "step %d",
                      (int)t);
            cr_assert(same(split.wq[i], wide.w[i]));
        }
        cr_expect_arr_eq(split.m, wide.m, sizeof wide.m);
    }
    float y[N];
    cq_widen_args a = {.dtype = CQ_F32, .n = N, .x = split.w16, .low = split.low, .y = y};
    OK(cq_ref_kernels.widen(NULL, &a));
    cr_expect_arr_eq(y, wide.w, sizeof y);
}

/* What a form may be off after one step from the F32 state, and that zero and NaN are kept. */
Test(formats, narrow_moments_stay_within_a_step_of_their_code) {
    static state wide, bf16, eight;
    start(&wide, 2);
    start(&bf16, 2);
    start(&eight, 2);
    wide.g[300] = bf16.g[300] = eight.g[300] = 0;
    step_ref(&wide, CQ_MASTER_F32, CQ_MOMENTS_F32, 1);
    step_ref(&bf16, CQ_MASTER_BF16, CQ_MOMENTS_BF16, 1);
    step_ref(&eight, CQ_MASTER_F32, CQ_MOMENTS_8BIT, 1);
    for (int i = 0; i < N; i++) {
        double m = wide.m[i], v = wide.v[i], w = wide.w[i];
        check_near(cq_bf16_value(bf16.m16[i]), m, fabs(m) * 0x1p-7, "BF16 m");
        check_near(cq_bf16_value(bf16.v16[i]), v, v * 0x1p-7, "BF16 v");
        check_near(cq_bf16_value(bf16.w16[i]), w, fabs(w) * 0x1p-7, "BF16 weight");
        float sm = eight.m_scale[i / 256], sv = eight.v_scale[i / 256];
        check_near(cq_moment_m_decode(eight.m8[i], sm), m, fabs(m) * 0.125 + sm * 0x1p-17,
                   "8-bit m");
        check_near(sqrt(cq_moment_v_decode(eight.v8[i], sv)), sqrt(v),
                   sqrt(v) * 0.0626 + sv * 0x1p-18, "8-bit root of v");
        cr_expect(same(eight.w[i], wide.w[i]), "the step uses the moments before they are stored");
    }
    cr_expect_eq(cq_moment_m_decode(eight.m8[300], eight.m_scale[1]), 0);
    eight.g[5] = NAN;
    step_ref(&eight, CQ_MASTER_F32, CQ_MOMENTS_8BIT, 2);
    cr_expect(isnan(eight.m_scale[0]) && isfinite(eight.m_scale[1]), "a NaN reaches its block");
    start(&eight, 0);
    memset(eight.g, 0, sizeof eight.g);
    step_ref(&eight, CQ_MASTER_BF16, CQ_MOMENTS_8BIT, 1);
    cr_expect(eight.m_scale[0] == 0 && eight.v8[7] == 0, "a block of zeros");
    cr_expect_eq(cq_bf16_value(eight.w16[9]), eight.w[9], "no gradient, no change");
}

/* Over many steps of one gradient, weights rounded stochastically arrive where F32 does; to the
   nearest they would not leave their place. */
Test(formats, small_steps_are_not_lost) {
    static state wide, bf16;
    start(&wide, 0);
    start(&bf16, 0);
    float begin[N];
    memcpy(begin, wide.w, sizeof begin);
    double moved = 0, wanted = 0;
    for (int64_t t = 1; t <= 100; t++)
        for (int k = 0; k < 2; k++) {
            cq_adamw_args a = arguments(k ? &bf16 : &wide, k ? CQ_MASTER_BF16 : CQ_MASTER_F32,
                                        k ? CQ_MOMENTS_8BIT : CQ_MOMENTS_F32, t);
            a.lr = 1e-5; /* 1e-3 in all; half a BF16 step of a weight of 1 is 2e-3 to 4e-3 */
            OK(cq_ref_kernels.adamw(NULL, &a));
        }
    for (int i = 0; i < N; i++) {
        double sign = wide.g[i] > 0 ? -1 : 1;
        wanted += sign * ((double)wide.w[i] - (double)begin[i]);
        moved += sign * ((double)cq_bf16_value(bf16.w16[i]) - (double)begin[i]);
    }
    check_near(wanted / N, 1e-3, 1e-5, "F32");
    check_near(moved / N, 1e-3, 4e-4, "BF16");
}

Test(formats, what_no_backend_takes_is_refused) {
    static state s;
    start(&s, 1);
    cq_adamw_args a = arguments(&s, CQ_MASTER_BF16, CQ_MOMENTS_8BIT, 1);
    a.dtype = CQ_F64;
    cr_expect_eq(cq_ref_kernels.adamw(NULL, &a), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "F64"), "%s", cq_error());
    a.dtype = CQ_F32;
    a.first = 100;
    cr_expect_eq(cq_ref_kernels.adamw(NULL, &a), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "256"), "%s", cq_error());
}
