/* test_ref_sequence.c - ref against closed forms and finite differences: attention, convolution,
   SSD.

   Rows hold several documents, one of a single token; strides are wider than the rows, and the
   padding takes part in the gradient checks with gradient zero. */
#include "tests/finite.h"
#include "tests/plain_kernels.h"

enum { SEED = 31415, T = 12, DOCS = 4 };
static const int64_t STARTS[DOCS + 1] = {0, 5, 6, 9, 12};

#define NEAR(got, want, tol)                                                                       \
    cr_expect(fabs((double)(got) - (double)(want)) <= (tol), "%s is %.17g, wanted %.17g", #got,    \
              (double)(got), (double)(want))
#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())
#define RUN(op)                                                                                    \
    static int run_##op(const void *a) { return cq_ref_##op(NULL, a); }

RUN(attention_forward)
RUN(conv_forward)
RUN(ssd_forward)

/* attention: query, key, value and their sizes for T tokens */
enum {
    HEADS = 6,
    KV = 2,
    D = 5,
    LDQ = HEADS * D + 3,
    LDK = KV * D + 1,
    LDV = KV * D + 2,
    WIDE = HEADS * D
};

static cq_attention_forward_args attention_of(double *q, double *k, double *v, double *out,
                                              double *lse) {
    return (cq_attention_forward_args){.dtype = CQ_F64,
                                       .tokens = T,
                                       .n_docs = DOCS,
                                       .starts = STARTS,
                                       .heads = HEADS,
                                       .kv_heads = KV,
                                       .head_dim = D,
                                       .scale = 0.7,
                                       .q = q,
                                       .k = k,
                                       .v = v,
                                       .ldq = LDQ,
                                       .ldk = LDK,
                                       .ldv = LDV,
                                       .out = out,
                                       .lse = lse};
}

Test(ref_attention, equal_keys_average_the_values_of_the_document_so_far) {
    double *q = finite_normal(T * LDQ, SEED, 1, 1, 0), *k = finite_zeros(T * LDK);
    double *v = finite_normal(T * LDV, SEED, 2, 1, 0), out[T * WIDE], lse[T * HEADS],
           alone[T * WIDE];
    cq_attention_forward_args a = attention_of(q, k, v, out, lse);
    OK(cq_ref_attention_forward(NULL, &a));
    for (int64_t d = 0; d < DOCS; d++)
        for (int64_t t = STARTS[d]; t < STARTS[d + 1]; t++)
            for (int64_t h = 0; h < HEADS; h++) {
                double count = (double)(t - STARTS[d] + 1);
                NEAR(lse[t * HEADS + h], log(count), 1e-14);
                for (int64_t i = 0; i < D; i++) {
                    double sum = 0;
                    for (int64_t s = STARTS[d]; s <= t; s++)
                        sum += v[s * LDV + h / 3 * D + i];
                    NEAR(out[t * WIDE + h * D + i], sum / count, 1e-14);
                }
            }
    a.out = alone, a.lse = NULL;
    OK(cq_ref_attention_forward(NULL, &a));
    cr_expect(!memcmp(out, alone, sizeof out), "out depends on whether lse is kept");
    free(q), free(k), free(v);
}

Test(ref_attention, large_scores_neither_overflow_nor_lose_the_winner) {
    const int64_t starts[2] = {0, 2};
    double q[2] = {0, 1000}, k[2] = {1, -1}, v[2] = {3, 4}, out[2], lse[2];
    cq_attention_forward_args a = {.dtype = CQ_F64,
                                   .tokens = 2,
                                   .n_docs = 1,
                                   .starts = starts,
                                   .heads = 1,
                                   .kv_heads = 1,
                                   .head_dim = 1,
                                   .scale = 1,
                                   .q = q,
                                   .k = k,
                                   .v = v,
                                   .ldq = 1,
                                   .ldk = 1,
                                   .ldv = 1,
                                   .out = out,
                                   .lse = lse};
    OK(cq_ref_attention_forward(NULL, &a));
    NEAR(out[1], 3, 0);
    NEAR(lse[1], 1000, 0);
    q[1] = -1000;
    OK(cq_ref_attention_forward(NULL, &a));
    NEAR(out[1], 4, 0);
}

Test(ref_attention, gradients_agree_with_differences_over_documents_and_grouped_heads) {
    double *q = finite_normal(T * LDQ, SEED, 3, 1, 0), *k = finite_normal(T * LDK, SEED, 4, 1, 0);
    double *v = finite_normal(T * LDV, SEED, 5, 1, 0), *g = finite_normal(T * WIDE, SEED, 6, 1, 0);
    double out[T * WIDE], lse[T * HEADS];
    double *dq = finite_zeros(T * LDQ), *dk = finite_zeros(T * LDK), *dv = finite_zeros(T * LDV);
    cq_attention_forward_args f = attention_of(q, k, v, out, lse);
    cq_attention_backward_args b = {.dtype = CQ_F64,
                                    .tokens = T,
                                    .n_docs = DOCS,
                                    .starts = STARTS,
                                    .heads = HEADS,
                                    .kv_heads = KV,
                                    .head_dim = D,
                                    .scale = 0.7,
                                    .q = q,
                                    .k = k,
                                    .v = v,
                                    .ldq = LDQ,
                                    .ldk = LDK,
                                    .ldv = LDV,
                                    .out = out,
                                    .lse = lse,
                                    .dout = g,
                                    .dq = dq,
                                    .dk = dk,
                                    .dv = dv,
                                    .lddq = LDQ,
                                    .lddk = LDK,
                                    .lddv = LDV};
    OK(cq_ref_attention_forward(NULL, &f));
    OK(cq_ref_attention_backward(NULL, &b));
    OK(cq_ref_attention_backward(NULL, &b));
    finite_check("attention seed 31415",
                 &(finite_forward){run_attention_forward, &f, out, g, T * WIDE},
                 (finite_input[]){
                     {"q", q, dq, T * LDQ, 1}, {"k", k, dk, T * LDK, 1}, {"v", v, dv, T * LDV, 1}},
                 3);
    free(q), free(k), free(v), free(g), free(dq), free(dk), free(dv);
}

enum { CHANNELS = 3, WIDTH = 4, LDX = 5 };

Test(ref_conv, one_tap_is_silu_of_a_shift_that_stops_at_documents) {
    double *x = finite_normal(T * LDX, SEED, 7, 1, 0), y[T * CHANNELS], b[CHANNELS] = {0.5, -1, 2};
    for (int tap = 0; tap < WIDTH; tap++) {
        double w[CHANNELS * WIDTH] = {0};
        for (int c = 0; c < CHANNELS; c++)
            w[c * WIDTH + tap] = c + 1;
        for (int bias = 0; bias < 2; bias++) {
            OK(cq_ref_conv_forward(NULL, &(cq_conv_forward_args){.dtype = CQ_F64,
                                                                 .tokens = T,
                                                                 .n_docs = DOCS,
                                                                 .starts = STARTS,
                                                                 .channels = CHANNELS,
                                                                 .width = WIDTH,
                                                                 .x = x,
                                                                 .ldx = LDX,
                                                                 .w = w,
                                                                 .b = bias ? b : NULL,
                                                                 .y = y}));
            for (int64_t d = 0; d < DOCS; d++)
                for (int64_t t = STARTS[d]; t < STARTS[d + 1]; t++)
                    for (int c = 0; c < CHANNELS; c++) {
                        int64_t from = t - (WIDTH - 1 - tap);
                        double p =
                            (from >= STARTS[d] ? (c + 1) * x[from * LDX + c] : 0) + bias * b[c];
                        NEAR(y[t * CHANNELS + c], p / (1 + exp(-p)), 1e-14);
                    }
        }
    }
    free(x);
}

static void check_conv(int64_t width, bool bias) {
    double *x = finite_normal(T * LDX, SEED, 8, 1, 0),
           *w = finite_normal(CHANNELS * width, SEED, 9, 1, 0);
    double *b = finite_normal(CHANNELS, SEED, 10, 1, 0),
           *g = finite_normal(T * CHANNELS, SEED, 11, 1, 0);
    double y[T * CHANNELS], *dx = finite_zeros(T * LDX), *dw = finite_zeros(CHANNELS * width),
                            *db = finite_zeros(CHANNELS);
    cq_conv_forward_args f = {.dtype = CQ_F64,
                              .tokens = T,
                              .n_docs = DOCS,
                              .starts = STARTS,
                              .channels = CHANNELS,
                              .width = width,
                              .x = x,
                              .ldx = LDX,
                              .w = w,
                              .b = bias ? b : NULL,
                              .y = y};
    cq_conv_backward_args back = {.dtype = CQ_F64,
                                  .tokens = T,
                                  .n_docs = DOCS,
                                  .starts = STARTS,
                                  .channels = CHANNELS,
                                  .width = width,
                                  .x = x,
                                  .ldx = LDX,
                                  .w = w,
                                  .b = f.b,
                                  .dy = g,
                                  .dx = dx,
                                  .lddx = LDX,
                                  .dw = dw,
                                  .db = bias ? db : NULL};
    OK(cq_ref_conv_backward(NULL, &back));
    OK(cq_ref_conv_backward(NULL, &back));
    finite_check(bias ? "conv with bias, seed 31415" : "conv without bias, seed 31415",
                 &(finite_forward){run_conv_forward, &f, y, g, T * CHANNELS},
                 (finite_input[]){{"x", x, dx, T * LDX, 1},
                                  {"w", w, dw, CHANNELS * width, 2},
                                  {"b", b, db, CHANNELS, 2}},
                 bias ? 3 : 2);
    back.dw = NULL, back.db = NULL;
    OK(cq_ref_conv_backward(NULL, &back));
    free(x), free(w), free(b), free(g), free(dx), free(dw), free(db);
}

Test(ref_conv, gradients_agree_with_differences_even_when_the_window_is_wider_than_a_document) {
    check_conv(4, true);
    check_conv(4, false);
    check_conv(7, true);
    check_conv(1, true);
}

/* SSD: four heads of 3 channels in two groups of 5 states */
enum {
    H = 4,
    P = 3,
    G = 2,
    N = 5,
    SX = H * P + 2,
    SB = G * N + 1,
    SC = G * N + 3,
    SDT = H + 1,
    SY = H * P
};
typedef struct ssd_case {
    double *x, *B, *C, *dt_raw, *dt_bias, *a_log, *d, y[T * SY];
} ssd_case;

/* dt from under 1e-4 to over 20 and A from -1/3 to about -30: decays from nearly 1 to exp(-600).
   Every argument of softplus stays clear of its switch at 20, where differences would straddle two
   formulas. */
static ssd_case ssd_open(void) {
    static const double raw[] = {-9.5, -6, -2, 0.3, 3, 22.5, -4, 1.2, -1};
    static const double a_log[H] = {-1.1, 0.4, 3.4, 1.5};
    ssd_case c = {.x = finite_normal(T * SX, SEED, 12, 1, 0),
                  .B = finite_normal(T * SB, SEED, 13, 1, 0)};
    c.C = finite_normal(T * SC, SEED, 14, 1, 0);
    c.dt_raw = finite_normal(T * SDT, SEED, 15, 0.05, 0);
    for (int i = 0; i < T * SDT; i++)
        c.dt_raw[i] += raw[(i * 5 + i / 9) % 9];
    c.dt_bias = finite_normal(H, SEED, 16, 0.1, 0);
    c.a_log = finite_normal(H, SEED, 17, 0, 0);
    memcpy(c.a_log, a_log, sizeof a_log);
    c.d = finite_normal(H, SEED, 18, 1, 0);
    return c;
}
static void ssd_free(ssd_case *c) {
    free(c->x), free(c->B), free(c->C), free(c->dt_raw), free(c->dt_bias), free(c->a_log),
        free(c->d);
}
static cq_ssd_forward_args ssd_args(ssd_case *c) {
    return (cq_ssd_forward_args){.dtype = CQ_F64,
                                 .tokens = T,
                                 .n_docs = DOCS,
                                 .starts = STARTS,
                                 .heads = H,
                                 .head_dim = P,
                                 .groups = G,
                                 .state = N,
                                 .chunk = 2,
                                 .x = c->x,
                                 .B = c->B,
                                 .C = c->C,
                                 .dt_raw = c->dt_raw,
                                 .ldx = SX,
                                 .ldB = SB,
                                 .ldC = SC,
                                 .ld_dt = SDT,
                                 .dt_bias = c->dt_bias,
                                 .a_log = c->a_log,
                                 .d = c->d,
                                 .y = c->y};
}
static double ssd_dt(const ssd_case *c, int64_t t, int64_t h) {
    double raw = c->dt_raw[t * SDT + h] + c->dt_bias[h];
    return raw > 20 ? raw : log1p(exp(raw));
}

/* y_t = sum over s <= t of exp(A (dt_{s+1} + .. + dt_t)) dt_s <C_t, B_s> x_s + D x_t */
static double ssd_unrolled(const ssd_case *c, int64_t begin, int64_t t, int64_t h, int64_t p) {
    double y = c->d[h] * c->x[t * SX + h * P + p], later = 0;
    for (int64_t s = t; s >= begin; s--) {
        double cb = 0;
        for (int64_t n = 0; n < N; n++)
            cb += c->C[t * SC + h / 2 * N + n] * c->B[s * SB + h / 2 * N + n];
        y += exp(-exp(c->a_log[h]) * later) * ssd_dt(c, s, h) * cb * c->x[s * SX + h * P + p];
        later += ssd_dt(c, s, h);
    }
    return y;
}

Test(ref_ssd, the_recurrence_is_the_unrolled_sum_for_steps_from_tiny_to_huge) {
    ssd_case c = ssd_open();
    cq_ssd_forward_args a = ssd_args(&c);
    double least = INFINITY, most = 0, steepest = 0;
    OK(cq_ref_ssd_forward(NULL, &a));
    for (int64_t d = 0; d < DOCS; d++)
        for (int64_t t = STARTS[d]; t < STARTS[d + 1]; t++)
            for (int64_t h = 0; h < H; h++) {
                least = fmin(least, ssd_dt(&c, t, h)), most = fmax(most, ssd_dt(&c, t, h));
                steepest = fmin(steepest, -exp(c.a_log[h]) * ssd_dt(&c, t, h));
                for (int64_t p = 0; p < P; p++) {
                    double want = ssd_unrolled(&c, STARTS[d], t, h, p);
                    NEAR(c.y[t * SY + h * P + p], want, 1e-13 * (1 + fabs(want)));
                }
            }
    cr_expect(least < 1e-4 && most > 20 && steepest < -200,
              "seed 31415: dt %g .. %g, least A dt %g", least, most, steepest);
    ssd_free(&c);
}

Test(ref_ssd, a_constant_input_follows_the_geometric_series) {
    const int64_t starts[2] = {0, 6};
    double one[6] = {1, 1, 1, 1, 1, 1}, raw[6] = {0}, zero = 0, d = 0.5, y[6], dt = log(2);
    cq_ssd_forward_args a = {.dtype = CQ_F64,
                             .tokens = 6,
                             .n_docs = 1,
                             .starts = starts,
                             .heads = 1,
                             .head_dim = 1,
                             .groups = 1,
                             .state = 1,
                             .chunk = 4,
                             .x = one,
                             .B = one,
                             .C = one,
                             .dt_raw = raw,
                             .ldx = 1,
                             .ldB = 1,
                             .ldC = 1,
                             .ld_dt = 1,
                             .dt_bias = &zero,
                             .a_log = &zero,
                             .d = &d,
                             .y = y};
    OK(cq_ref_ssd_forward(NULL, &a));
    for (int t = 0; t < 6; t++) /* A = -1, so a = exp(-log 2) = 1/2 */
        NEAR(y[t], dt * 2 * (1 - pow(0.5, t + 1)) + 0.5, 1e-15);
}

static void check_ssd(const char *what, double far) {
    ssd_case c = ssd_open();
    for (int i = 0; i < T * SDT; i++)
        c.dt_raw[i] += far;
    cq_ssd_forward_args f = ssd_args(&c);
    double *g = finite_normal(T * SY, SEED, 19, 1, 0);
    double *dx = finite_zeros(T * SX), *dB = finite_zeros(T * SB), *dC = finite_zeros(T * SC);
    double *ddt = finite_zeros(T * SDT), *dbias = finite_zeros(H), *da = finite_zeros(H),
           *dd = finite_zeros(H);
    cq_ssd_backward_args b = {.dtype = CQ_F64,
                              .tokens = T,
                              .n_docs = DOCS,
                              .starts = STARTS,
                              .heads = H,
                              .head_dim = P,
                              .groups = G,
                              .state = N,
                              .chunk = 2,
                              .x = c.x,
                              .B = c.B,
                              .C = c.C,
                              .dt_raw = c.dt_raw,
                              .ldx = SX,
                              .ldB = SB,
                              .ldC = SC,
                              .ld_dt = SDT,
                              .dt_bias = c.dt_bias,
                              .a_log = c.a_log,
                              .d = c.d,
                              .dy = g,
                              .dx = dx,
                              .dB = dB,
                              .dC = dC,
                              .ddt_raw = ddt,
                              .lddx = SX,
                              .lddB = SB,
                              .lddC = SC,
                              .ldd_dt = SDT,
                              .ddt_bias = dbias,
                              .da_log = da,
                              .dd = dd};
    OK(cq_ref_ssd_backward(NULL, &b));
    OK(cq_ref_ssd_backward(NULL, &b));
    finite_check(what, &(finite_forward){run_ssd_forward, &f, c.y, g, T * SY},
                 (finite_input[]){{"x", c.x, dx, T * SX, 1},
                                  {"B", c.B, dB, T * SB, 1},
                                  {"C", c.C, dC, T * SC, 1},
                                  {"dt_raw", c.dt_raw, ddt, T * SDT, 1},
                                  {"dt_bias", c.dt_bias, dbias, H, 2},
                                  {"a_log", c.a_log, da, H, 2},
                                  {"d", c.d, dd, H, 2}},
                 7);
    b.ddt_bias = b.da_log = b.dd = NULL;
    OK(cq_ref_ssd_backward(NULL, &b));
    ssd_free(&c);
    free(g), free(dx), free(dB), free(dC), free(ddt), free(dbias), free(da), free(dd);
}

Test(ref_ssd, gradients_agree_with_differences_for_steps_from_tiny_to_huge) {
    check_ssd("ssd seed 31415", 0);
    check_ssd("ssd with smaller steps, seed 31415", -3);
}

Test(ref_ssd, a_document_gives_the_same_bits_alone_and_packed) {
    ssd_case c = ssd_open();
    double alone[3 * SY];
    const int64_t starts[2] = {0, 3};
    cq_ssd_forward_args a = ssd_args(&c);
    OK(cq_ref_ssd_forward(NULL, &a));
    a.tokens = 3, a.n_docs = 1, a.starts = starts, a.y = alone;
    a.x = c.x + 6 * SX, a.B = c.B + 6 * SB, a.C = c.C + 6 * SC, a.dt_raw = c.dt_raw + 6 * SDT;
    OK(cq_ref_ssd_forward(NULL, &a));
    cr_expect(!memcmp(alone, c.y + 6 * SY, sizeof alone));
    ssd_free(&c);
}

/* the F32 instance and the plain loop on the same numbers as the F64 one */
Test(ref_ssd, fp32_is_the_double_result_rounded_once_and_the_plain_loop_is_near_it) {
    ssd_case c = ssd_open();
    finite_round(c.x, T * SX), finite_round(c.B, T * SB), finite_round(c.C, T * SC),
        finite_round(c.dt_raw, T * SDT);
    finite_round(c.dt_bias, H), finite_round(c.a_log, H), finite_round(c.d, H);
    cq_ssd_forward_args a = ssd_args(&c);
    OK(cq_ref_ssd_forward(NULL, &a));
    float *x = finite_narrow(c.x, T * SX), *B = finite_narrow(c.B, T * SB),
          *C = finite_narrow(c.C, T * SC);
    float *dt = finite_narrow(c.dt_raw, T * SDT), *bias = finite_narrow(c.dt_bias, H);
    float *a_log = finite_narrow(c.a_log, H), *d = finite_narrow(c.d, H), y[T * SY], plain[T * SY];
    a.dtype = CQ_F32, a.x = x, a.B = B, a.C = C, a.dt_raw = dt, a.dt_bias = bias, a.a_log = a_log,
    a.d = d, a.y = y;
    OK(cq_ref_ssd_forward(NULL, &a));
    a.y = plain;
    OK(cq_plain_ssd_forward(NULL, &a));
    for (int i = 0; i < T * SY; i++) {
        cr_expect(y[i] == (float)c.y[i], "y[%d] is %.9g, wanted %.9g", i, (double)y[i], c.y[i]);
        NEAR(plain[i], c.y[i], 1e-5 * (1 + fabs(c.y[i])));
    }
    cr_expect(memcmp(y, plain, sizeof y), "the plain loop sums in double");
    free(x), free(B), free(C), free(dt), free(bias), free(a_log), free(d);
    ssd_free(&c);
}
