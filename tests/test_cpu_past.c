/* test_cpu_past.c - what generation computes with: documents that go on from slots against ref in
   F64 (with WAYS_CUDA on a device), and against the forward of the whole document; products whose
   rows do not see each other. */
#include "tests/three_ways.h"

enum { SEEDS = WAYS_SEEDS(1, 3), MOST_DOCS = 8 };

/* Documents of a pass and what went before them. */
typedef struct pass {
    int64_t n_docs, starts[MOST_DOCS + 1], slots, room;
    int32_t slot[MOST_DOCS], past[MOST_DOCS];
} pass;

static const pass passes[] = {
    {5, {0, 1, 2, 3, 4, 5}, 6, 320, {3, 0, 5, 1, 2}, {0, 1, 2, 300, 63}}, /* decoding */
    {3, {0, 70, 71, 140}, 4, 416, {2, 0, 3}, {0, 15, 300}},               /* pieces of prompts */
    {2, {0, 3, 5}, 2, 16, {1, 0}, {2, 0}},
    {1, {0, 1}, 1, 16, {0}, {15}},
};
enum { N_PASSES = sizeof passes / sizeof *passes };

#define PASS(p)                                                                                    \
    .tokens = (p)->starts[(p)->n_docs], .n_docs = (p)->n_docs, .starts = (p)->starts,              \
    .slot = (p)->slot, .past = (p)->past
#define PASS_RAW(w, op, p)                                                                         \
    WAYS_RAW(w, op, starts, ((p)->n_docs + 1) * 8);                                                \
    WAYS_RAW(w, op, slot, (p)->n_docs * 4);                                                        \
    WAYS_RAW(w, op, past, (p)->n_docs * 4)

/* A device once more with what goes in and out in BF16; the slots stay F32. */
#ifdef WAYS_CUDA
enum { N_ACTS = 2 };
#else
enum { N_ACTS = 1 };
#endif
#define EVERY_WAY(body)                                                                            \
    for (int at_ = -1; ways_next(&at_);)                                                           \
        for (int act_ = 0; act_ < N_ACTS; act_++) {                                                \
            ways w = {.at = at_, .act = act_ ? CQ_BF16 : CQ_F32};                                  \
            for (uint64_t seed = 1; seed < 1 + SEEDS; seed++) {                                    \
                w.seed = seed, w.drawn = 0;                                                        \
                body                                                                               \
            }                                                                                      \
            ways_judge(&w);                                                                        \
        }

static void run_attention(ways *w, const pass *p, int64_t heads, int64_t kv, int64_t dim) {
    cq_attention_cached_args a = {
        PASS(p),      .heads = heads,         .kv_heads = kv,      .head_dim = dim, .room = p->room,
        .scale = 0.3, .ldq = heads * dim + 3, .ldk = kv * dim + 1, .ldv = kv * dim};
    w->scratch_bytes = cq_attention_scratch_bytes(0, dim);
    snprintf(w->what, sizeof w->what, "%s cached attention %lld/%lld x %lld, act %d, seed %llu",
             ways_name(w->at), (long long)heads, (long long)kv, (long long)dim, w->act,
             (unsigned long long)w->seed);
    WAYS_IN(w, attention_cached, q, a.tokens, heads * dim, a.ldq, 1.0);
    WAYS_IN(w, attention_cached, k, a.tokens, kv * dim, a.ldk, 1.0);
    WAYS_IN(w, attention_cached, v, a.tokens, kv * dim, a.ldv, 1.0);
    WAYS_OUT(w, attention_cached, k_cache, p->slots * kv * dim, p->room, p->room, 1);
    WAYS_OUT(w, attention_cached, v_cache, p->slots * kv * p->room, dim, dim, 1);
    WAYS_OUT(w, attention_cached, out, a.tokens, heads * dim, heads * dim, 2);
    PASS_RAW(w, attention_cached, p);
    a.act = ways_act(w, "q k v out");
    WAYS_RUN(w, attention_cached, a);
}
Test(cpu_past, attention_over_slots_agrees_with_ref) {
    for (int i = 0; i < N_PASSES; i++) {
        EVERY_WAY(run_attention(&w, &passes[i], 6, 2, 16);)
        EVERY_WAY(run_attention(&w, &passes[i], 3, 3, 7);)
    }
    EVERY_WAY(run_attention(&w, &passes[0], 70, 1, 8);) /* more heads than a block of rows */
}

static void run_conv(ways *w, const pass *p, int64_t channels, int64_t width, bool bias) {
    cq_conv_cached_args a = {PASS(p), .channels = channels, .width = width, .ldx = channels + 5};
    snprintf(w->what, sizeof w->what, "%s cached convolution of width %lld, act %d, seed %llu",
             ways_name(w->at), (long long)width, w->act, (unsigned long long)w->seed);
    WAYS_IN(w, conv_cached, x, a.tokens, channels, a.ldx, 1.0);
    WAYS_IN(w, conv_cached, w, channels, width, width, 0.7);
    if (bias)
        WAYS_IN(w, conv_cached, b, 1, channels, channels, 0.5);
    WAYS_OUT(w, conv_cached, state, p->slots * (width - 1), channels, channels, 1);
    WAYS_OUT(w, conv_cached, y, a.tokens, channels, channels, 2);
    PASS_RAW(w, conv_cached, p);
    a.act = ways_act(w, "x y");
    WAYS_RUN(w, conv_cached, a);
}
Test(cpu_past, convolution_from_a_state_agrees_with_ref) {
    for (int i = 0; i < N_PASSES; i++) {
        EVERY_WAY(run_conv(&w, &passes[i], 70, 4, true);)
        EVERY_WAY(run_conv(&w, &passes[i], 33, 2, false);)
    }
    EVERY_WAY(run_conv(&w, &passes[0], 20, 1, true);)
    EVERY_WAY(run_conv(&w, &passes[1], 20, 18, true);)
}

static void run_ssd(ways *w, const pass *p, int64_t chunk, double dt_size) {
    enum { HEADS = 6, DIM = 12, GROUPS = 2, STATE = 9 };
    cq_ssd_cached_args a = {PASS(p),
                            .heads = HEADS,
                            .head_dim = DIM,
                            .groups = GROUPS,
                            .state = STATE,
                            .chunk = chunk,
                            .ldx = HEADS * DIM + 4,
                            .ldB = GROUPS * STATE + 1,
                            .ldC = GROUPS * STATE,
                            .ld_dt = HEADS + 3};
    w->scratch_bytes = cq_ssd_scratch_bytes(chunk, chunk, HEADS, DIM, GROUPS, STATE);
    snprintf(w->what, sizeof w->what, "%s cached ssd, chunk %lld, %lld tokens, act %d, seed %llu",
             ways_name(w->at), (long long)chunk, (long long)a.tokens, w->act,
             (unsigned long long)w->seed);
    WAYS_IN(w, ssd_cached, x, a.tokens, HEADS * DIM, a.ldx, 1.0);
    WAYS_IN(w, ssd_cached, B, a.tokens, GROUPS * STATE, a.ldB, 1.0);
    WAYS_IN(w, ssd_cached, C, a.tokens, GROUPS * STATE, a.ldC, 1.0);
    ways_add(w, "dt_raw", offsetof(cq_ssd_cached_args, dt_raw), a.tokens, HEADS, a.ld_dt, dt_size,
             -2.0, 0);
    WAYS_IN(w, ssd_cached, dt_bias, 1, HEADS, HEADS, 0.5);
    WAYS_IN(w, ssd_cached, a_log, 1, HEADS, HEADS, 1.0);
    WAYS_IN(w, ssd_cached, d, 1, HEADS, HEADS, 1.0);
    WAYS_OUT(w, ssd_cached, S, p->slots * HEADS * STATE, DIM, DIM, 2);
    WAYS_OUT(w, ssd_cached, y, a.tokens, HEADS * DIM, HEADS * DIM, 2);
    PASS_RAW(w, ssd_cached, p);
    a.act = ways_act(w, "x B C dt_raw y");
    WAYS_RUN(w, ssd_cached, a);
}
Test(cpu_past, scan_from_a_state_agrees_with_the_recurrence) {
    for (int i = 0; i < N_PASSES; i++) {
        EVERY_WAY(run_ssd(&w, &passes[i], 16, 1.0);)
        EVERY_WAY(run_ssd(&w, &passes[i], 64, 9.0);)
    }
}

#ifndef WAYS_CUDA
/* Whole documents by attention_forward, and in pieces into slots. */
Test(cpu_past, attention_of_pieces_gives_the_bits_of_the_whole) {
    enum { T = 300, HEADS = 4, KV = 2, DIM = 20, ROOM = 304, Q = HEADS * DIM, W = KV * DIM };
    static float q[T * Q], k[T * W], v[T * W], whole[T * Q], pieces[T * Q], keys[W * ROOM],
        values[ROOM * W];
    static const int64_t cuts[] = {0, 100, 101, 102, 230, T};
    for (int64_t i = 0; i < T * Q; i++)
        q[i] = (float)cq_random_normal(3, 1, (uint64_t)i);
    for (int64_t i = 0; i < T * W; i++) {
        k[i] = (float)cq_random_normal(3, 2, (uint64_t)i);
        v[i] = (float)cq_random_normal(3, 3, (uint64_t)i);
    }
    for (int at = -1; ways_next(&at);) {
        ways w = {.scratch_bytes = cq_attention_scratch_bytes(0, DIM)};
        cq_stream s = ways_stream(&w, CPU_WAY);
        int64_t starts[2] = {0, T};
        cr_assert_eq(CQ_RUN(&s, attention_forward, .dtype = CQ_F32, .tokens = T, .n_docs = 1,
                            .starts = starts, .heads = HEADS, .kv_heads = KV, .head_dim = DIM,
                            .scale = 0.2, .q = q, .k = k, .v = v, .ldq = Q, .ldk = W, .ldv = W,
                            .out = whole),
                     CQ_OK, "%s", cq_error());
        for (int i = 0; i + 1 < (int)(sizeof cuts / sizeof *cuts); i++) {
            int64_t from = cuts[i], n[2] = {0, cuts[i + 1] - from};
            int32_t slot = 0, past = (int32_t)from;
            cr_assert_eq(CQ_RUN(&s, attention_cached, .dtype = CQ_F32, .tokens = n[1], .n_docs = 1,
                                .starts = n, .slot = &slot, .past = &past, .heads = HEADS,
                                .kv_heads = KV, .head_dim = DIM, .room = ROOM, .scale = 0.2,
                                .q = q + from * Q, .k = k + from * W, .v = v + from * W, .ldq = Q,
                                .ldk = W, .ldv = W, .k_cache = keys, .v_cache = values,
                                .out = pieces + from * Q),
                         CQ_OK, "%s", cq_error());
        }
        cr_expect(memcmp(whole, pieces, sizeof whole) == 0, "%s", cq_cpu_isa());
        ways_stream_free(&s);
    }
}

/* Rows alone, among others and in another place: the same bits; near those of the other order. */
Test(cpu_past, products_by_row_give_a_row_the_same_bits_in_any_batch) {
    enum { M = 131, N = 230, K = 300, LD = N + 2 };
    static float a[M * K], b[N * K], all[M * LD], one[LD], other[M * LD];
    for (int64_t i = 0; i < M * K; i++)
        a[i] = (float)cq_random_normal(4, 1, (uint64_t)i);
    for (int64_t i = 0; i < N * K; i++)
        b[i] = (float)cq_random_normal(4, 2, (uint64_t)i);
    for (int at = -1; ways_next(&at);)
        for (int threads = 1; threads <= 2; threads++) {
            cq_stream s = {.table = cq_kernels_find("cpu"), .threads = threads, .by_row = true};
            cq_matmul_args x = {.dtype = CQ_F32,
                                .tb = true,
                                .m = M,
                                .n = N,
                                .k = K,
                                .a = a,
                                .lda = K,
                                .b = b,
                                .ldb = K,
                                .c = all,
                                .ldc = LD,
                                .alpha = 2,
                                .beta = 0};
            for (int64_t i = 0; i < M * LD; i++)
                all[i] = other[i] = 7;
            cr_assert_eq(s.table->matmul(&s, &x), CQ_OK, "%s", cq_error());
            for (int64_t m = 1; m < M; m += 43) {
                x.m = m, x.a = a + (M - m) * K, x.c = one;
                for (int64_t i = M - m; i < M && m == 1; i++) {
                    cr_assert_eq(s.table->matmul(&s, &x), CQ_OK, "%s", cq_error());
                    cr_expect(memcmp(one, all + i * LD, N * sizeof *one) == 0, "%s, row alone",
                              cq_cpu_isa());
                }
                x.c = other;
                cr_assert_eq(s.table->matmul(&s, &x), CQ_OK, "%s", cq_error());
                for (int64_t i = 0; i < m; i++)
                    cr_expect(memcmp(other + i * LD, all + (M - m + i) * LD, N * sizeof *other) ==
                                  0,
                              "%s, row %ld of %ld", cq_cpu_isa(), (long)i, (long)m);
            }
            s.by_row = false, x.m = M, x.a = a, x.c = other;
            cr_assert_eq(s.table->matmul(&s, &x), CQ_OK, "%s", cq_error());
            for (int64_t i = 0; i < M * LD; i++)
                cr_expect(fabsf(other[i] - all[i]) < 1e-3f, "element %ld: %g and %g", (long)i,
                          (double)all[i], (double)other[i]);
            cr_expect(all[N] == 7 && all[LD - 1] == 7, "written between the rows");
        }
}
#endif
