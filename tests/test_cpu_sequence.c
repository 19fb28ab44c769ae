/* test_cpu_sequence.c - attention, convolution and SSD of the cpu backend against ref in F64, over
   documents of odd lengths, document boundaries on and off the edges of blocks and chunks, and
   strided rows; with WAYS_CUDA the same of a device. */
#include "kernels/cpu/vec.h"
#include "tests/three_ways.h"

enum { MOST_DOCS = 16 };
static uint64_t seeds(cq_dtype act) { return act == CQ_F32 ? WAYS_SEEDS(3, 3) : WAYS_SEEDS(2, 3); }

typedef struct packing {
    int64_t n_docs, starts[MOST_DOCS + 1];
} packing;

static packing pack(const int64_t *lengths, int64_t n) {
    packing p = {.n_docs = n};
    for (int64_t i = 0; i < n; i++)
        p.starts[i + 1] = p.starts[i] + lengths[i];
    return p;
}
#define PACK(...)                                                                                  \
    pack((int64_t[]){__VA_ARGS__}, (int64_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))

typedef struct heads_case {
    int64_t heads, kv_heads, dim;
    double size; ///< of q: how sharp the softmax is
    packing p;
} heads_case;

static cq_attention_backward_args attention_args(const heads_case *c) {
    return (cq_attention_backward_args){.tokens = c->p.starts[c->p.n_docs],
                                        .n_docs = c->p.n_docs,
                                        .starts = c->p.starts,
                                        .heads = c->heads,
                                        .kv_heads = c->kv_heads,
                                        .head_dim = c->dim,
                                        .scale = 1.0 / sqrt((double)c->dim),
                                        .ldq = c->heads * c->dim + 5,
                                        .ldk = c->kv_heads * c->dim + 3,
                                        .ldv = c->kv_heads * c->dim,
                                        .lddq = c->heads * c->dim + 1,
                                        .lddk = c->kv_heads * c->dim + 2,
                                        .lddv = c->kv_heads * c->dim + 7};
}

static void run_attention(ways *w, const heads_case *c, uint64_t seed) {
    cq_attention_backward_args b = attention_args(c);
    w->scratch_bytes = cq_attention_scratch_bytes(0, c->dim);
    int64_t width = c->heads * c->dim, kv = c->kv_heads * c->dim;
    cq_attention_forward_args f = {.dtype = CQ_F32,
                                   .tokens = b.tokens,
                                   .n_docs = b.n_docs,
                                   .starts = b.starts,
                                   .heads = b.heads,
                                   .kv_heads = b.kv_heads,
                                   .head_dim = b.head_dim,
                                   .scale = b.scale,
                                   .ldq = b.ldq,
                                   .ldk = b.ldk,
                                   .ldv = b.ldv};
    snprintf(w->what, sizeof(w->what), "attention %lld/%lld x %lld, %lld tokens, act %d, seed %llu",
             (long long)c->heads, (long long)c->kv_heads, (long long)c->dim, (long long)b.tokens,
             w->act, (unsigned long long)seed);
    WAYS_IN(w, attention_forward, q, b.tokens, width, b.ldq, c->size);
    WAYS_IN(w, attention_forward, k, b.tokens, kv, b.ldk, 1.0);
    WAYS_IN(w, attention_forward, v, b.tokens, kv, b.ldv, 1.0);
    WAYS_OUT(w, attention_forward, out, b.tokens, width, width, 2);
    WAYS_OUT(w, attention_forward, lse, b.tokens, c->heads, c->heads, 2);
    WAYS_RAW(w, attention_forward, starts, (c->p.n_docs + 1) * 8);
    f.act = ways_act(w, "q k v out");
    WAYS_RUN(w, attention_forward, f);

    w->drawn = 0; /* the same q, k and v */
    f.q = WAYS_IN(w, attention_backward, q, b.tokens, width, b.ldq, c->size);
    f.k = WAYS_IN(w, attention_backward, k, b.tokens, kv, b.ldk, 1.0);
    f.v = WAYS_IN(w, attention_backward, v, b.tokens, kv, b.ldv, 1.0);
    f.out = WAYS_IN(w, attention_backward, out, b.tokens, width, width, 1.0);
    f.lse = WAYS_IN(w, attention_backward, lse, b.tokens, c->heads, c->heads, 1.0);
    ways_act(w, "q k v");
    cr_assert_eq(cq_ref_attention_forward(NULL, &f), CQ_OK, "%s", cq_error());
    WAYS_IN(w, attention_backward, dout, b.tokens, width, width, 1.0);
    WAYS_OUT(w, attention_backward, dq, b.tokens, width, b.lddq, 3);
    WAYS_OUT(w, attention_backward, dk, b.tokens, kv, b.lddk, 3);
    WAYS_OUT(w, attention_backward, dv, b.tokens, kv, b.lddv, 3);
    WAYS_RAW(w, attention_backward, starts, (c->p.n_docs + 1) * 8);
    b.act = ways_act(w, "q k v out dout dq dk dv");
    WAYS_RUN(w, attention_backward, b);
}

static void check_attention(cq_dtype act, const heads_case *c, uint64_t seed) {
    ways w = {.act = act};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + seeds(act); w.seed++, w.drawn = 0)
            run_attention(&w, c, w.seed);
}

Test(cpu_sequence, attention_agrees_with_ref_on_short_and_uneven_documents) {
    check_attention(CQ_F32, &(heads_case){4, 2, 32, 1.0, PACK(1, 63, 64, 65, 1, 150, 12)}, 1);
    check_attention(CQ_F32, &(heads_case){8, 2, 32, 3.0, PACK(130, 1, 77)}, 2);
    check_attention(CQ_F32, &(heads_case){3, 1, 20, 1.0, PACK(1)}, 3);
    check_attention(CQ_F32, &(heads_case){6, 2, 16, 0.3, PACK(5, 13, 90)}, 4);
    check_attention(CQ_F32, &(heads_case){1, 1, 7, 1.0, PACK(35, 36, 37)}, 5);
}
Test(cpu_sequence, attention_carries_its_maximum_over_blocks_of_keys) {
    check_attention(
        CQ_F32, &(heads_case){2, 1, 32, 4.0, PACK(WAYS_PICK(260, 700), 3, WAYS_PICK(97, 257))}, 6);
    check_attention(CQ_F32, &(heads_case){10, 1, 24, 2.0, PACK(300)}, 7);
}
#ifdef WAYS_CUDA
Test(cpu_sequence, attention_of_values_in_bf16) {
    check_attention(CQ_BF16, &(heads_case){4, 2, 32, 1.0, PACK(1, 63, 40, 12)}, 101);
    check_attention(CQ_BF16, &(heads_case){1, 1, 7, 3.0, PACK(35, 36, 1)}, 102);
    check_attention(CQ_BF16, &(heads_case){3, 1, 20, 1.0, PACK(1, 70)}, 103);
}
#endif

/* What attention quantizes is what fake_quant makes of what it stored, to the bit. */
static void check_quantized(cq_compute compute, cq_dtype act, int64_t heads, int64_t dim,
                            int64_t tokens) {
    int64_t starts[] = {0, tokens / 3, tokens}, width = heads * dim, n = tokens * width;
    int64_t size = cq_dtype_bytes(act), bytes = n * size, counted[2];
    float amax = 0.5f, *x = malloc((size_t)n * sizeof *x);
    char *qkv[3], *out = malloc((size_t)bytes),
                  *made[2] = {malloc((size_t)bytes), malloc((size_t)bytes)};
    for (int k = 0; k < 3; k++) {
        qkv[k] = malloc((size_t)bytes);
        for (int64_t i = 0; i < n; i++)
            x[i] = (float)cq_random_normal(77, (uint64_t)k, (uint64_t)i);
        cr_assert_eq(cq_convert(qkv[k], act, x, CQ_F32, n), CQ_OK);
    }
    for (int at = -1; ways_next(&at);) {
        ways w = {
            .at = at, .compute = compute, .scratch_bytes = cq_attention_scratch_bytes(0, dim)};
        cq_stream s = ways_stream(&w, CPU_WAY);
        memset(counted, 0, sizeof counted);
        cq_attention_forward_args a = {.dtype = CQ_F32,
                                       .tokens = tokens,
                                       .n_docs = 2,
                                       .starts = starts,
                                       .heads = heads,
                                       .kv_heads = heads,
                                       .head_dim = dim,
                                       .scale = 0.2,
                                       .q = qkv[0],
                                       .k = qkv[1],
                                       .v = qkv[2],
                                       .ldq = width,
                                       .ldk = width,
                                       .ldv = width,
                                       .out = out,
                                       .outq = made[0],
                                       .fq = {&amax, NULL, 1, &counted[0]},
                                       .act = act};
        cr_assert_eq(WAYS_CALL(&s, attention_forward, a, WAYS_AT(starts, sizeof starts),
                               WAYS_AT(q, bytes), WAYS_AT(k, bytes), WAYS_AT(v, bytes),
                               WAYS_AT(out, bytes), WAYS_AT(outq, bytes), WAYS_AT(fq.amax, 4),
                               WAYS_AT(fq.saturated, 8)),
                     CQ_OK, "%s", cq_error());
        cq_fake_quant_args f = {.dtype = CQ_F32,
                                .rows = tokens,
                                .cols = width,
                                .x = out,
                                .y = made[1],
                                .fq = {&amax, NULL, 1, &counted[1]},
                                .top = 448.0f,
                                .act = act};
        cr_assert_eq(WAYS_CALL(&s, fake_quant, f, WAYS_AT(x, bytes), WAYS_AT(y, bytes),
                               WAYS_AT(fq.amax, 4), WAYS_AT(fq.saturated, 8)),
                     CQ_OK, "%s", cq_error());
        cr_expect(memcmp(made[0], made[1], (size_t)bytes) == 0,
                  "%s, %lld heads of %lld, act %d: other values", ways_name(at), (long long)heads,
                  (long long)dim, act);
        cr_expect(counted[0] == counted[1] && counted[0] > 0,
                  "%s: %lld saturated, wanted %lld, not 0", ways_name(at), (long long)counted[0],
                  (long long)counted[1]);
        ways_stream_free(&s);
    }
    for (int k = 0; k < 3; k++)
        free(qkv[k]);
    free(x), free(out), free(made[0]), free(made[1]);
}
Test(cpu_sequence, attention_quantizes_what_it_stores) {
    check_quantized(CQ_COMPUTE_F32, CQ_F32, 3, 32, 67);
    check_quantized(CQ_COMPUTE_F32, CQ_F32, 4, 20, 41); /* a block of two heads */
#ifdef WAYS_CUDA
    check_quantized(CQ_COMPUTE_F32, CQ_F32, 1, 128, 35);
    check_quantized(CQ_COMPUTE_F32, CQ_BF16, 2, 48, 37);
    check_quantized(CQ_COMPUTE_BF16, CQ_F32, 1, 64, 130);
    check_quantized(CQ_COMPUTE_BF16, CQ_BF16, 2, 64, 37);
    check_quantized(CQ_COMPUTE_BF16, CQ_BF16, 1, 128, 45);
#endif
}

Test(cpu_sequence, attention_does_not_see_later_tokens_or_other_documents) {
    heads_case c = {2, 1, 16, 1.0, PACK(70, 50)};
    ways w = {.seed = 8, .scratch_bytes = cq_attention_scratch_bytes(0, 16)};
    cq_stream s = ways_stream(&w, ALONE_WAY);
    float q[120 * 32], kv[120 * 16], out[2][120 * 32];
    for (int i = 0; i < 120 * 32; i++)
        q[i] = (float)cq_random_normal(8, 1, (uint64_t)i);
    for (int i = 0; i < 120 * 16; i++)
        kv[i] = (float)cq_random_normal(8, 2, (uint64_t)i);
    for (int i = 0; i < 2; i++) {
        cq_attention_forward_args a = {.dtype = CQ_F32,
                                       .tokens = 120,
                                       .n_docs = 2,
                                       .starts = c.p.starts,
                                       .heads = 2,
                                       .kv_heads = 1,
                                       .head_dim = 16,
                                       .scale = 0.25,
                                       .q = q,
                                       .k = kv,
                                       .v = kv,
                                       .ldq = 32,
                                       .ldk = 16,
                                       .ldv = 16,
                                       .out = out[i]};
        cr_assert_eq(WAYS_CALL(&s, attention_forward, a, WAYS_AT(starts, 3 * 8),
                               WAYS_AT(q, sizeof(q)), WAYS_AT(k, sizeof(kv)),
                               WAYS_AT(v, sizeof(kv)), WAYS_AT(out, sizeof(out[i]))),
                     CQ_OK, "%s", cq_error());
        for (int t = 33; t < 120; t++)
            for (int j = 0; j < 16; j++)
                kv[t * 16 + j] = t < 70 ? 1e30f : kv[t * 16 + j];
    }
    cr_expect(memcmp(out[0], out[1], 33 * 32 * sizeof(float)) == 0, "a later key changed a row");
    cr_expect(memcmp(out[0] + 70 * 32, out[1] + 70 * 32, 50 * 32 * sizeof(float)) == 0,
              "the first document changed the second");
    cr_expect(memcmp(out[0] + 33 * 32, out[1] + 33 * 32, 37 * 32 * sizeof(float)) != 0,
              "the change was not seen at all");
    ways_stream_free(&s);
}

typedef struct conv_case {
    int64_t channels, width;
    bool bias;
    int64_t more; ///< columns between the rows of x; twice that between those of dx
    packing p;
} conv_case;

static void run_conv(ways *w, const conv_case *c, uint64_t seed) {
    int64_t tokens = c->p.starts[c->p.n_docs], channels = c->channels, width = c->width;
    int64_t ldx = channels + c->more, lddx = ldx + c->more;
    snprintf(w->what, sizeof(w->what),
             "conv %lld channels, width %lld, %lld tokens, act %d, seed %llu", (long long)channels,
             (long long)width, (long long)tokens, w->act, (unsigned long long)seed);
    cq_conv_forward_args f = {.tokens = tokens,
                              .n_docs = c->p.n_docs,
                              .starts = c->p.starts,
                              .channels = channels,
                              .width = width,
                              .ldx = ldx};
    WAYS_IN(w, conv_forward, x, tokens, channels, ldx, 1.0);
    WAYS_IN(w, conv_forward, w, channels, width, width, 0.7);
    if (c->bias)
        WAYS_IN(w, conv_forward, b, 1, channels, channels, 0.5);
    WAYS_OUT(w, conv_forward, y, tokens, channels, channels, 2);
    WAYS_RAW(w, conv_forward, starts, (c->p.n_docs + 1) * 8);
    f.act = ways_act(w, "x y");
    WAYS_RUN(w, conv_forward, f);

    cq_conv_backward_args b = {.tokens = tokens,
                               .n_docs = c->p.n_docs,
                               .starts = c->p.starts,
                               .channels = channels,
                               .width = width,
                               .ldx = ldx,
                               .lddx = lddx};
    WAYS_IN(w, conv_backward, x, tokens, channels, ldx, 1.0);
    WAYS_IN(w, conv_backward, w, channels, width, width, 0.7);
    WAYS_IN(w, conv_backward, dy, tokens, channels, channels, 1.0);
    WAYS_OUT(w, conv_backward, dx, tokens, channels, lddx, 3);
    if (c->bias) {
        WAYS_IN(w, conv_backward, b, 1, channels, channels, 0.5);
        WAYS_OUT(w, conv_backward, dw, channels, width, width, 3);
        WAYS_OUT(w, conv_backward, db, 1, channels, channels, 3);
    }
    WAYS_RAW(w, conv_backward, starts, (c->p.n_docs + 1) * 8);
    b.act = ways_act(w, "x dy dx");
    WAYS_RUN(w, conv_backward, b);
}

static void check_conv(cq_dtype act, const conv_case *c, uint64_t seed) {
    ways w = {.act = act};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + seeds(act); w.seed++, w.drawn = 0)
            run_conv(&w, c, w.seed);
}

Test(cpu_sequence, conv_agrees_with_ref_for_any_width) {
    check_conv(CQ_F32, &(conv_case){40, 4, true, 9, PACK(1, 2, 3, 4, 5, 64, 130, 1)}, 11);
    check_conv(CQ_F32, &(conv_case){384, 4, true, 9, PACK(300, 211)}, 12);
    check_conv(CQ_F32, &(conv_case){33, 4, false, 9, PACK(17)}, 13);
    check_conv(CQ_F32, &(conv_case){7, 1, true, 9, PACK(9, 1, 65)}, 14);
    check_conv(CQ_F32, &(conv_case){70, 3, true, 9, PACK(2, 1, 70)}, 15);
    check_conv(CQ_F32, &(conv_case){35, 16, true, 9, PACK(5, 40, 1)}, 16);
    check_conv(CQ_F32, &(conv_case){5, 21, true, 9, PACK(5, 40, 1)}, 17);
    check_conv(CQ_F32, &(conv_case){72, 4, true, 4, PACK(1, 2, 3, 4, 5, 64, 66, 1)}, 18);
    check_conv(CQ_F32, &(conv_case){20, 3, true, 8, PACK(66, 1, 7)}, 19);
}
#ifdef WAYS_CUDA
Test(cpu_sequence, conv_of_values_in_bf16) {
    check_conv(CQ_BF16, &(conv_case){72, 4, true, 4, PACK(1, 2, 3, 4, 5, 64, 66, 1)}, 111);
    check_conv(CQ_BF16, &(conv_case){20, 3, false, 8, PACK(66, 1, 7)}, 112);
    check_conv(CQ_BF16, &(conv_case){33, 4, true, 9, PACK(17, 1, 40)}, 113);
    check_conv(CQ_BF16, &(conv_case){5, 21, true, 9, PACK(5, 40, 1)}, 114);
}
#endif

typedef struct ssd_case {
    bool even; ///< B and C, too, have rows that can be read four values at a time
    int64_t heads, dim, groups, state, chunk;
    double dt_size, dt_shift; ///< of dt_raw
    packing p;
} ssd_case;

#define SSD_SHAPE(c)                                                                               \
    .tokens = (c)->p.starts[(c)->p.n_docs], .n_docs = (c)->p.n_docs, .starts = (c)->p.starts,      \
    .heads = (c)->heads, .head_dim = (c)->dim, .groups = (c)->groups, .state = (c)->state,         \
    .chunk = (c)->chunk, .ldx = (c)->heads * (c)->dim + 4,                                         \
    .ldB = (c)->groups * (c)->state + ((c)->even ? 8 : 1),                                         \
    .ldC = (c)->groups * (c)->state + ((c)->even ? 4 : 6), .ld_dt = (c)->heads + 3

/* The inputs have the same names in both argument structs. */
#define SSD_INPUTS(w, op, c, a)                                                                    \
    WAYS_IN(w, op, x, a.tokens, c->heads * c->dim, a.ldx, 1.0);                                    \
    WAYS_IN(w, op, B, a.tokens, c->groups * c->state, a.ldB, 1.0);                                 \
    WAYS_IN(w, op, C, a.tokens, c->groups * c->state, a.ldC, 1.0);                                 \
    ways_add(w, "dt_raw", offsetof(cq_##op##_args, dt_raw), a.tokens, c->heads, a.ld_dt,           \
             c->dt_size, c->dt_shift, 0);                                                          \
    WAYS_IN(w, op, dt_bias, 1, c->heads, c->heads, 0.5);                                           \
    WAYS_IN(w, op, a_log, 1, c->heads, c->heads, 1.0);                                             \
    WAYS_IN(w, op, d, 1, c->heads, c->heads, 1.0)

static void run_ssd(ways *w, const ssd_case *c, uint64_t seed) {
    int64_t longest = 0, width = c->heads * c->dim, shared = c->groups * c->state;
    for (int64_t i = 0; i < c->p.n_docs; i++)
        longest = c->p.starts[i + 1] - c->p.starts[i] > longest
                      ? c->p.starts[i + 1] - c->p.starts[i]
                      : longest;
    w->scratch_bytes =
        cq_ssd_scratch_bytes(longest, c->chunk, c->heads, c->dim, c->groups, c->state);
    cq_ssd_forward_args f = {SSD_SHAPE(c)};
    snprintf(w->what, sizeof(w->what),
             "ssd %lld x %lld, %lld x %lld, chunk %lld, %lld tokens, act %d, seed %llu",
             (long long)c->heads, (long long)c->dim, (long long)c->groups, (long long)c->state,
             (long long)c->chunk, (long long)f.tokens, w->act, (unsigned long long)seed);
    SSD_INPUTS(w, ssd_forward, c, f);
    WAYS_OUT(w, ssd_forward, y, f.tokens, width, width, 2);
    WAYS_RAW(w, ssd_forward, starts, (c->p.n_docs + 1) * 8);
    f.act = ways_act(w, "x B C dt_raw y");
    WAYS_RUN(w, ssd_forward, f);

    cq_ssd_backward_args b = {SSD_SHAPE(c), .lddx = width + (c->even ? 4 : 5),
                              .lddB = shared + (c->even ? 4 : 2),
                              .lddC = shared + (c->even ? 0 : 7), .ldd_dt = c->heads + 1};
    SSD_INPUTS(w, ssd_backward, c, b);
    WAYS_IN(w, ssd_backward, dy, b.tokens, width, width, 1.0);
    WAYS_OUT(w, ssd_backward, dx, b.tokens, width, b.lddx, 3);
    WAYS_OUT(w, ssd_backward, dB, b.tokens, shared, b.lddB, 3);
    WAYS_OUT(w, ssd_backward, dC, b.tokens, shared, b.lddC, 3);
    WAYS_OUT(w, ssd_backward, ddt_raw, b.tokens, c->heads, b.ldd_dt, 3);
    if (c->groups < 3) { /* the three may be left out together */
        WAYS_OUT(w, ssd_backward, ddt_bias, 1, c->heads, c->heads, 3);
        WAYS_OUT(w, ssd_backward, da_log, 1, c->heads, c->heads, 3);
        WAYS_OUT(w, ssd_backward, dd, 1, c->heads, c->heads, 3);
    }
    WAYS_RAW(w, ssd_backward, starts, (c->p.n_docs + 1) * 8);
    b.act = ways_act(w, "x B C dt_raw dy dx dB dC ddt_raw");
    WAYS_RUN(w, ssd_backward, b);
}

static void check_ssd(cq_dtype act, const ssd_case *c, uint64_t seed) {
    ways w = {.act = act};
    for (w.at = -1; ways_next(&w.at); ways_judge(&w))
        for (w.seed = seed; w.seed < seed + seeds(act); w.seed++, w.drawn = 0)
            run_ssd(&w, c, w.seed);
}

Test(cpu_sequence, ssd_agrees_with_the_recurrence_whatever_the_chunk) {
    check_ssd(CQ_F32,
              &(ssd_case){false, 8, 32, 2, 32, 64, 1.0, -2.0, PACK(150, 1, 64, 65, 128, 63)}, 21);
    check_ssd(CQ_F32, &(ssd_case){false, 6, 16, 2, 24, 16, 1.0, -3.0, PACK(16, 15, 17, 1, 1, 50)},
              22);
    check_ssd(CQ_F32, &(ssd_case){false, 3, 7, 3, 5, 10, 1.0, -1.0, PACK(31, 1, 12)}, 23);
    check_ssd(CQ_F32, &(ssd_case){false, 4, 16, 1, 16, 1, 1.0, -2.0, PACK(9, 1)}, 24);
    check_ssd(CQ_F32, &(ssd_case){false, 2, 64, 1, 128, 128, 1.0, -4.0, PACK(300)}, 25);
    check_ssd(CQ_F32, &(ssd_case){true, 4, 16, 2, 16, 1000, 1.0, -2.0, PACK(40, 1, 30)}, 27);
}
Test(cpu_sequence, ssd_holds_with_decays_that_underflow_and_steps_that_vanish) {
    check_ssd(CQ_F32, &(ssd_case){false, 4, 16, 2, 16, 32, 9.0, 3.0, PACK(100, 1, 37)}, 31);
    check_ssd(CQ_F32, &(ssd_case){false, 4, 16, 2, 16, 32, 0.5, -9.0, PACK(100, 64)}, 33);
    check_ssd(CQ_F32, &(ssd_case){false, 4, 16, 2, 16, 64, 3.0, 25.0, PACK(130)}, 35);
}

#ifdef WAYS_CUDA
Test(cpu_sequence, ssd_of_values_in_bf16) {
    check_ssd(CQ_BF16, &(ssd_case){true, 2, 32, 1, 32, 64, 1.0, -2.0, PACK(130, 1, 17)}, 121);
    check_ssd(CQ_BF16, &(ssd_case){false, 3, 7, 3, 5, 10, 9.0, 3.0, PACK(31, 1, 70)}, 122);
    check_ssd(CQ_BF16, &(ssd_case){true, 1, 68, 1, 72, 64, 1.0, -4.0, PACK(70)}, 123);
}
#endif

#ifdef WAYS_CUDA
/* |got - want| / |want| over n values. */
static double relative(const float *got, const float *want, int64_t n) {
    double off = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        off += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    return sqrt(off / size);
}
static void *on_device(const cq_memory *m, cq_stream *s, const void *from, int64_t bytes) {
    void *p = NULL;
    cr_assert_eq(m->take(&p, bytes, false), CQ_OK, "%s", cq_error());
    if (from)
        cr_assert_eq(m->copy(s, p, from, bytes), CQ_OK, "%s", cq_error());
    return p;
}
/* n values as they are stored, and back. */
static void *stored(const float *x, int64_t n, cq_dtype act) {
    void *p = malloc((size_t)(n * cq_dtype_bytes(act)));
    cr_assert_not_null(p);
    cq_convert(p, act, x, CQ_F32, n);
    return p;
}
typedef struct tensor_case {
    int64_t heads, kv_heads, dim, more; ///< more: elements between rows that are not dense
    cq_dtype act;
} tensor_case;
/* Probabilities and slopes are rounded to BF16 (2^-9) on their way into products, and what is
   stored as BF16 once more. */
static void run_tensor_attention(const tensor_case *c, int at) {
    enum { T = 150, DOCS = 3 };
    int64_t starts[DOCS + 1] = {0, 1, 70, T}, dense = c->heads * c->dim, ldq = dense + c->more;
    int64_t ldk = c->kv_heads * c->dim + c->more, ldv = ldk + c->more;
    int64_t size = cq_dtype_bytes(c->act);
    cq_stream s = {.table = cq_kernels_find(WAYS_TABLE), .compute = CQ_COMPUTE_BF16};
    const cq_memory *m = s.table->memory;
    cr_assert_eq(m->open(&s, 0), CQ_OK, "%s", cq_error());
    float *in[4], *want[5];
    void *got[5], *there[4];
    int64_t n_in[4] = {T * ldq, T * ldk, T * ldv, T * dense};
    int64_t n_out[5] = {T * dense, T * c->heads, T * ldq, T * ldk, T * ldv};
    for (int k = 0; k < 4; k++) {
        in[k] = malloc((size_t)n_in[k] * sizeof(float));
        for (int64_t i = 0; i < n_in[k]; i++)
            in[k][i] = vec_bf16((float)cq_random_normal(7, (uint64_t)k, (uint64_t)i));
        void *as = stored(in[k], n_in[k], c->act);
        there[k] = on_device(m, &s, as, n_in[k] * size);
        free(as);
    }
    int64_t *begins = on_device(m, &s, starts, sizeof(starts));
    for (int k = 0; k < 5; k++) {
        want[k] = calloc((size_t)n_out[k], sizeof(float));
        got[k] = on_device(m, &s, NULL, n_out[k] * (k == 1 ? 4 : size)); /* zeroed, as the other */
    }
    for (int way = 0; way < 2; way++) {
        const cq_kernels *t = way ? s.table : cq_kernels_find("ref");
        void *const *x = way ? there : (void **)in, *const *y = way ? got : (void **)want;
        cq_attention_forward_args f = {.tokens = T,
                                       .n_docs = DOCS,
                                       .starts = way ? begins : starts,
                                       .heads = c->heads,
                                       .kv_heads = c->kv_heads,
                                       .head_dim = c->dim,
                                       .scale = 1 / sqrt((double)c->dim),
                                       .q = x[0],
                                       .k = x[1],
                                       .v = x[2],
                                       .ldq = ldq,
                                       .ldk = ldk,
                                       .ldv = ldv,
                                       .out = y[0],
                                       .lse = y[1],
                                       .act = c->act};
        cr_assert_eq(t->attention_forward(&s, &f), CQ_OK, "%s", cq_error());
        cq_attention_backward_args b = {.tokens = T,
                                        .n_docs = DOCS,
                                        .starts = f.starts,
                                        .heads = c->heads,
                                        .kv_heads = c->kv_heads,
                                        .head_dim = c->dim,
                                        .scale = f.scale,
                                        .q = x[0],
                                        .k = x[1],
                                        .v = x[2],
                                        .ldq = ldq,
                                        .ldk = ldk,
                                        .ldv = ldv,
                                        .out = y[0],
                                        .lse = y[1],
                                        .dout = x[3],
                                        .dq = y[2],
                                        .dk = y[3],
                                        .dv = y[4],
                                        .lddq = ldq,
                                        .lddk = ldk,
                                        .lddv = ldv,
                                        .act = c->act};
        cr_assert_eq(t->attention_backward(&s, &b), CQ_OK, "%s", cq_error());
    }
    static const char *const name[] = {"out", "lse", "dq", "dk", "dv"};
    for (int k = 0; k < 5; k++) {
        cq_dtype act = k == 1 ? CQ_F32 : c->act;
        float *x = malloc((size_t)n_out[k] * sizeof(float));
        void *raw = malloc((size_t)n_out[k] * sizeof(float));
        cr_assert_eq(m->copy(&s, raw, got[k], n_out[k] * cq_dtype_bytes(act)), CQ_OK, "%s",
                     cq_error());
        cq_convert(x, CQ_F32, raw, act, n_out[k]);
        double off = relative(x, want[k], n_out[k]);
        if (getenv("CQ_TEST_ERRORS"))
            printf("head_dim %ld, act %d: %s is off by %g\n", (long)c->dim, c->act, name[k], off);
        cr_expect(off < (act == CQ_BF16 ? 4e-3 + 0x1p-9 : 4e-3),
                  "%s, head_dim %ld, act %d: %s is off by %g", ways_name(at), (long)c->dim, c->act,
                  name[k], off);
        m->give(got[k], n_out[k] * cq_dtype_bytes(act), false);
        free(x), free(raw), free(want[k]);
    }
    for (int k = 0; k < 4; k++)
        m->give(there[k], n_in[k] * size, false), free(in[k]);
    m->give(begins, sizeof(starts), false);
    m->close(&s);
}
static void check_tensor_attention(const tensor_case *c) {
    for (int at = -1; ways_next(&at);) {
        if (at == 1) /* and copies early */
            ways_shake(0, AGAIN_WAY);
        run_tensor_attention(c, at);
    }
}
Test(cpu_sequence, attention_on_tensor_cores_is_close_to_ref) {
    check_tensor_attention(&(tensor_case){4, 2, 64, 0, CQ_F32});
    check_tensor_attention(&(tensor_case){4, 2, 128, 0, CQ_F32});
}
Test(cpu_sequence, attention_on_tensor_cores_of_values_in_bf16) {
    check_tensor_attention(&(tensor_case){2, 2, 64, 8, CQ_BF16}); /* read where they are */
    check_tensor_attention(&(tensor_case){2, 1, 64, 4, CQ_BF16}); /* copied */
    check_tensor_attention(&(tensor_case){2, 1, 128, 3, CQ_BF16});
    check_tensor_attention(&(tensor_case){1, 1, 128, 0, CQ_BF16});
}

enum { SSD_IN = 8, SSD_ALL = 16 };
static void point_ssd(cq_ssd_forward_args *f, cq_ssd_backward_args *b, void *const p[SSD_ALL]) {
    f->x = b->x = p[0], f->B = b->B = p[1], f->C = b->C = p[2], f->dt_raw = b->dt_raw = p[3];
    f->dt_bias = b->dt_bias = p[4], f->a_log = b->a_log = p[5], f->d = b->d = p[6];
    b->dy = p[7], f->y = p[8], b->dx = p[9], b->dB = p[10], b->dC = p[11], b->ddt_raw = p[12];
    b->ddt_bias = p[13], b->da_log = p[14], b->dd = p[15];
}
/* Operands are two parts of eight bits each, or one where they are BF16. */
static void run_tensor_ssd(const ssd_case *c, cq_dtype act, int at) {
    static const char *const name[SSD_ALL] = {
        "x", "B",  "C",  "dt_raw", "dt_bias", "a_log",    "d",      "dy",
        "y", "dx", "dB", "dC",     "ddt_raw", "ddt_bias", "da_log", "dd"};
    int64_t width = c->heads * c->dim, shared = c->groups * c->state, h = c->heads;
    cq_ssd_forward_args f = {SSD_SHAPE(c), .act = act};
    cq_ssd_backward_args b = {SSD_SHAPE(c),   .lddx = width, .lddB = shared,
                              .lddC = shared, .ldd_dt = h,   .act = act};
    int64_t T = f.tokens;
    int64_t n[SSD_ALL] = {T * f.ldx, T * f.ldB, T * f.ldC,  T * f.ld_dt, h,     h, h, T * width,
                          T * width, T * width, T * shared, T * shared,  T * h, h, h, h};
    cq_stream s = {.table = cq_kernels_find(WAYS_TABLE), .compute = CQ_COMPUTE_BF16};
    const cq_memory *m = s.table->memory;
    cr_assert_eq(m->open(&s, 0), CQ_OK, "%s", cq_error());
    float *x[SSD_ALL];
    void *there[SSD_ALL];
    cq_dtype as[SSD_ALL];
    for (int k = 0; k < SSD_ALL; k++) {
        x[k] = calloc((size_t)n[k], sizeof(float));
        for (int64_t i = 0; k < SSD_IN && i < n[k]; i++)
            x[k][i] = vec_bf16(
                (float)(cq_random_normal(9, (uint64_t)k, (uint64_t)i) - (k == 3 ? 2.0 : 0.0)));
        as[k] = k < 4 || (k >= SSD_IN - 1 && k <= 12) ? act : CQ_F32;
        void *raw = stored(x[k], n[k], as[k]);
        there[k] = on_device(m, &s, raw, n[k] * cq_dtype_bytes(as[k]));
        free(raw);
    }
    point_ssd(&f, &b, (void **)x);
    cr_assert_eq(cq_ref_ssd_forward(NULL, &f), CQ_OK, "%s", cq_error());
    cr_assert_eq(cq_ref_ssd_backward(NULL, &b), CQ_OK, "%s", cq_error());
    point_ssd(&f, &b, there);
    int64_t *begins = on_device(m, &s, f.starts, (f.n_docs + 1) * 8);
    f.starts = b.starts = begins;
    cr_assert_eq(s.table->ssd_forward(&s, &f), CQ_OK, "%s", cq_error());
    cr_assert_eq(s.table->ssd_backward(&s, &b), CQ_OK, "%s", cq_error());
    for (int k = 0; k < SSD_ALL; k++) {
        float *got = malloc((size_t)n[k] * sizeof(float));
        void *raw = malloc((size_t)n[k] * sizeof(float));
        cr_assert_eq(m->copy(&s, raw, there[k], n[k] * cq_dtype_bytes(as[k])), CQ_OK, "%s",
                     cq_error());
        cq_convert(got, CQ_F32, raw, as[k], n[k]);
        double off = relative(got, x[k], n[k]);
        if (getenv("CQ_TEST_ERRORS") && k >= SSD_IN)
            printf("ssd, act %d: %s is off by %g\n", act, name[k], off);
        cr_expect(off < (as[k] == CQ_BF16 ? 2e-5 + 0x1p-9 : 2e-5),
                  "%s, %ld x %ld, act %d: %s is off by %g", ways_name(at), (long)c->dim,
                  (long)c->state, act, name[k], off);
        m->give(there[k], n[k] * cq_dtype_bytes(as[k]), false);
        free(got), free(raw), free(x[k]);
    }
    m->give(begins, (f.n_docs + 1) * 8, false);
    m->close(&s);
}
Test(cpu_sequence, ssd_on_tensor_cores_is_close_to_ref) {
    static const cq_dtype acts[] = {CQ_F32, CQ_BF16};
    for (int at = -1; ways_next(&at);)
        for (int i = 0; i < 2; i++) {
            run_tensor_ssd(&(ssd_case){true, 2, 32, 1, 68, 64, 1.0, -2.0, PACK(130, 1, 9)}, acts[i],
                           at);
            run_tensor_ssd(&(ssd_case){false, 2, 19, 2, 33, 64, 1.0, -2.0, PACK(70, 1)}, acts[i],
                           at);
        }
}
#endif

#ifndef WAYS_CUDA
Test(cpu_sequence, too_little_scratch_is_an_error_with_both_sizes) {
    int64_t starts[2] = {0, 4};
    float x[64] = {0}, y[64];
    cq_stream s = {.table = cq_kernels_find("cpu"), .threads = 1};
    int status = CQ_RUN(&s, attention_forward, .dtype = CQ_F32, .tokens = 4, .n_docs = 1,
                        .starts = starts, .heads = 1, .kv_heads = 1, .head_dim = 16, .scale = 1.0,
                        .q = x, .k = x, .v = x, .ldq = 16, .ldk = 16, .ldv = 16, .out = y);
    cr_expect_eq(status, CQ_ENOMEM);
    char wanted[32];
    snprintf(wanted, sizeof(wanted), "%lld", (long long)cq_attention_scratch_bytes(4, 16));
    cr_expect(strstr(cq_error(), wanted), "%s", cq_error());
}
#endif
