/* cases_sequence.c - attention, convolution, the Mamba-2 scan, routing, rows and losses, at the
 * sizes of the two small gsm8k models in training: 8 sequences of 256 tokens, hidden size 192,
 * vocabulary 1024.
 */
#include "kernels/bench/bench.h"

enum {
    T = 2048,
    DOCS = 8,
    D = 192,
    HEADS = 6,
    KV = 2,
    HD = 32,
    QKV = (HEADS + 2 * KV) * HD,
    M_HEADS = 12,
    M_HD = 32,
    GROUPS = 2,
    STATE = 32,
    INNER = M_HEADS * M_HD,
    CHANNELS = INNER + 2 * GROUPS * STATE,
    EXPERTS = 8,
    TOP = 2,
    VOCAB = 1024,
    N = 128
};

void bench_attention_forward(bench *b) {
    float *qkv = bench_floats(b, T * QKV);
    /* two products over half a square of tokens in each document */
    double flops = 2.0 * 2 * HEADS * HD * (double)T * (T / DOCS) / 2;
    MEASURE(b, attention_forward, "8x256, 6/2 heads of 32", flops, 4.0 * T * (QKV + D), .tokens = T,
            .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = HEADS, .kv_heads = KV,
            .head_dim = HD, .scale = 0.177, .q = qkv, .k = qkv + HEADS * HD,
            .v = qkv + (HEADS + KV) * HD, .ldq = QKV, .ldk = QKV, .ldv = QKV,
            .out = bench_floats(b, T * D), .lse = bench_floats(b, T * HEADS));
}
void bench_attention_backward(bench *b) {
    float *qkv = bench_floats(b, T * QKV), *dqkv = bench_floats(b, T * QKV);
    float *lse = bench_floats(b, T * HEADS);
    for (int64_t i = 0; i < T * HEADS; i++)
        lse[i] += 5.0f; /* probabilities stay below 1 */
    double flops = 5.0 * 2 * HEADS * HD * (double)T * (T / DOCS) / 2;
    MEASURE(b, attention_backward, "8x256, 6/2 heads of 32", flops, 4.0 * T * (2 * QKV + 2 * D),
            .tokens = T, .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = HEADS,
            .kv_heads = KV, .head_dim = HD, .scale = 0.177, .q = qkv, .k = qkv + HEADS * HD,
            .v = qkv + (HEADS + KV) * HD, .ldq = QKV, .ldk = QKV, .ldv = QKV,
            .out = bench_floats(b, T * D), .lse = lse, .dout = bench_floats(b, T * D), .dq = dqkv,
            .dk = dqkv + HEADS * HD, .dv = dqkv + (HEADS + KV) * HD, .lddq = QKV, .lddk = QKV,
            .lddv = QKV);
}
/* Decoding: one new token for each of 64 sequences of 256. */
enum { LIVE = 64, PAST = 255, ROOM = 256 };
static int32_t *slots(bench *b) { return bench_permutation(b, LIVE); }
static int32_t *pasts(bench *b) {
    int32_t *past = bench_ints(b, LIVE, 1);
    for (int64_t i = 0; i < LIVE; i++)
        past[i] = PAST;
    return past;
}
void bench_attention_cached(bench *b) {
    float *qkv = bench_floats(b, LIVE * QKV);
    MEASURE(b, attention_cached, "64 tokens after 255", 4.0 * HEADS * HD * LIVE * ROOM,
            8.0 * LIVE * ROOM * KV * HD, .tokens = LIVE, .n_docs = LIVE,
            .starts = bench_bounds(b, LIVE, LIVE), .slot = slots(b), .past = pasts(b),
            .heads = HEADS, .kv_heads = KV, .head_dim = HD, .room = ROOM, .scale = 0.177, .q = qkv,
            .k = qkv + HEADS * HD, .v = qkv + (HEADS + KV) * HD, .ldq = QKV, .ldk = QKV, .ldv = QKV,
            .k_cache = bench_floats(b, LIVE * KV * HD * ROOM),
            .v_cache = bench_floats(b, LIVE * KV * HD * ROOM), .out = bench_floats(b, LIVE * D));
}
void bench_conv_cached(bench *b) {
    MEASURE(b, conv_cached, "64 tokens x 512, width 4", 0, 4.0 * 8 * LIVE * CHANNELS,
            .tokens = LIVE, .n_docs = LIVE, .starts = bench_bounds(b, LIVE, LIVE), .slot = slots(b),
            .past = pasts(b), .channels = CHANNELS, .width = 4,
            .x = bench_floats(b, LIVE * CHANNELS), .ldx = CHANNELS,
            .w = bench_floats(b, 4 * CHANNELS), .b = bench_floats(b, CHANNELS),
            .state = bench_floats(b, 3 * LIVE * CHANNELS), .y = bench_floats(b, LIVE * CHANNELS));
}
void bench_ssd_cached(bench *b) {
    float *x = bench_floats(b, LIVE * CHANNELS);
    MEASURE(b, ssd_cached, "64 tokens, 12 heads of 32", 0, 8.0 * LIVE * INNER * STATE,
            .tokens = LIVE, .n_docs = LIVE, .starts = bench_bounds(b, LIVE, LIVE), .slot = slots(b),
            .past = pasts(b), .heads = M_HEADS, .head_dim = M_HD, .groups = GROUPS, .state = STATE,
            .chunk = 64, .x = x, .B = x + INNER, .C = x + INNER + GROUPS * STATE,
            .dt_raw = bench_floats(b, LIVE * M_HEADS), .ldx = CHANNELS, .ldB = CHANNELS,
            .ldC = CHANNELS, .ld_dt = M_HEADS, .dt_bias = bench_floats(b, M_HEADS),
            .a_log = bench_floats(b, M_HEADS), .d = bench_floats(b, M_HEADS),
            .S = bench_floats(b, LIVE * INNER * STATE), .y = bench_floats(b, LIVE * INNER));
}
void bench_conv_forward(bench *b) {
    MEASURE(b, conv_forward, "8x256x512, width 4", 0, 8.0 * T * CHANNELS, .tokens = T,
            .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .channels = CHANNELS, .width = 4,
            .x = bench_floats(b, T * CHANNELS), .ldx = CHANNELS, .w = bench_floats(b, 4 * CHANNELS),
            .b = bench_floats(b, CHANNELS), .y = bench_floats(b, T * CHANNELS));
}
void bench_conv_backward(bench *b) {
    MEASURE(b, conv_backward, "8x256x512, width 4", 0, 12.0 * T * CHANNELS, .tokens = T,
            .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .channels = CHANNELS, .width = 4,
            .x = bench_floats(b, T * CHANNELS), .ldx = CHANNELS, .w = bench_floats(b, 4 * CHANNELS),
            .b = bench_floats(b, CHANNELS), .dy = bench_floats(b, T * CHANNELS),
            .dx = bench_floats(b, T * CHANNELS), .lddx = CHANNELS,
            .dw = bench_floats(b, 4 * CHANNELS), .db = bench_floats(b, CHANNELS));
}
/* The chunked form's products, chunk c: C B' and its use (c / 2 each), the state in and out. */
static double ssd_flops(double chunk) {
    return 2.0 * T * (GROUPS * STATE * chunk / 2 + M_HEADS * M_HD * (chunk / 2 + 2.0 * STATE));
}
void bench_ssd_forward(bench *b) {
    float *x = bench_floats(b, T * CHANNELS);
    MEASURE(b, ssd_forward, "8x256, 12 heads of 32", ssd_flops(64.0), 4.0 * T * (CHANNELS + INNER),
            .tokens = T, .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = M_HEADS,
            .head_dim = M_HD, .groups = GROUPS, .state = STATE, .chunk = 64, .x = x, .B = x + INNER,
            .C = x + INNER + GROUPS * STATE, .dt_raw = bench_floats(b, T * M_HEADS),
            .ldx = CHANNELS, .ldB = CHANNELS, .ldC = CHANNELS, .ld_dt = M_HEADS,
            .dt_bias = bench_floats(b, M_HEADS), .a_log = bench_floats(b, M_HEADS),
            .d = bench_floats(b, M_HEADS), .y = bench_floats(b, T * INNER));
}
void bench_ssd_backward(bench *b) {
    float *x = bench_floats(b, T * CHANNELS), *dx = bench_floats(b, T * CHANNELS);
    MEASURE(b, ssd_backward, "8x256, 12 heads of 32", 3.0 * ssd_flops(64.0),
            4.0 * T * (2 * CHANNELS + INNER), .tokens = T, .n_docs = DOCS,
            .starts = bench_bounds(b, DOCS, T), .heads = M_HEADS, .head_dim = M_HD,
            .groups = GROUPS, .state = STATE, .chunk = 64, .x = x, .B = x + INNER,
            .C = x + INNER + GROUPS * STATE, .dt_raw = bench_floats(b, T * M_HEADS),
            .ldx = CHANNELS, .ldB = CHANNELS, .ldC = CHANNELS, .ld_dt = M_HEADS,
            .dt_bias = bench_floats(b, M_HEADS), .a_log = bench_floats(b, M_HEADS),
            .d = bench_floats(b, M_HEADS), .dy = bench_floats(b, T * INNER), .dx = dx,
            .dB = dx + INNER, .dC = dx + INNER + GROUPS * STATE,
            .ddt_raw = bench_floats(b, T * M_HEADS), .lddx = CHANNELS, .lddB = CHANNELS,
            .lddC = CHANNELS, .ldd_dt = M_HEADS, .ddt_bias = bench_floats(b, M_HEADS),
            .da_log = bench_floats(b, M_HEADS), .dd = bench_floats(b, M_HEADS));
}

void bench_route_forward(bench *b) {
    MEASURE(b, route_forward, "2048, 2 of 8", 0, 4.0 * T * (EXPERTS + 2 * TOP), .tokens = T,
            .experts = EXPERTS, .top_k = TOP, .n_group = 1, .topk_group = 1, .normalize = true,
            .scaling = 2.5, .logits = bench_floats(b, T * EXPERTS),
            .bias = bench_floats(b, EXPERTS), .sel = bench_ints(b, T * TOP, EXPERTS),
            .weight = bench_floats(b, T * TOP));
}
void bench_route_backward(bench *b) {
    MEASURE(b, route_backward, "2048, 2 of 8", 0, 4.0 * T * (2 * EXPERTS + 2 * TOP), .tokens = T,
            .experts = EXPERTS, .top_k = TOP, .normalize = true, .scaling = 2.5,
            .logits = bench_floats(b, T * EXPERTS), .sel = bench_ints(b, T * TOP, EXPERTS),
            .dweight = bench_floats(b, T * TOP), .dlogits = bench_floats(b, T * EXPERTS));
}
void bench_route_sort(bench *b) {
    MEASURE_ANY(b, route_sort, "2048, 2 of 8", 0, 12.0 * T * TOP, .tokens = T, .experts = EXPERTS,
                .top_k = TOP, .sel = bench_ints(b, T * TOP, EXPERTS),
                .offsets = bench_bounds(b, EXPERTS, T * TOP), .token = bench_ints(b, T * TOP, T),
                .position = bench_ints(b, T * TOP, T));
}
void bench_gather_rows(bench *b) {
    MEASURE(b, gather_rows, "4096x192 quantized", 0, 8.0 * TOP * T * D, .rows = TOP * T, .dim = D,
            .x = bench_floats(b, T * D), .index = bench_ints(b, TOP * T, T),
            .yq = bench_floats(b, TOP * T * D), .fq = {.amax = bench_float(b, 1.0f)});
}
void bench_combine_forward(bench *b) {
    MEASURE(b, combine_forward, "2048x2x192", 0, 4.0 * T * D * (TOP + 2), .tokens = T, .top_k = TOP,
            .dim = D, .y = bench_floats(b, T * TOP * D), .weight = bench_floats(b, T * TOP),
            .position = bench_permutation(b, T * TOP), .out = bench_floats(b, T * D));
}
void bench_combine_backward(bench *b) {
    MEASURE(b, combine_backward, "2048x2x192", 0, 4.0 * T * D * (2 * TOP + 1), .tokens = T,
            .top_k = TOP, .dim = D, .y = bench_floats(b, T * TOP * D),
            .weight = bench_floats(b, T * TOP), .dout = bench_floats(b, T * D),
            .position = bench_permutation(b, T * TOP), .dy = bench_floats(b, T * TOP * D),
            .dweight = bench_floats(b, T * TOP));
}
void bench_ungather_rows(bench *b) {
    MEASURE(b, ungather_rows, "2048x2x192", 0, 4.0 * T * D * (TOP + 2), .tokens = T, .top_k = TOP,
            .dim = D, .dy = bench_floats(b, T * TOP * D), .position = bench_permutation(b, T * TOP),
            .dx = bench_floats(b, T * D));
}
void bench_embed_forward(bench *b) {
    MEASURE(b, embed_forward, "2048x192 of 1024", 0, 8.0 * T * D, .tokens = T, .dim = D,
            .vocab = VOCAB, .ids = bench_ints(b, T, VOCAB), .table = bench_floats(b, VOCAB * D),
            .h = bench_floats(b, T * D));
}
void bench_embed_backward(bench *b) {
    MEASURE(b, embed_backward, "2048x192 of 1024", 0, 12.0 * T * D, .tokens = T, .dim = D,
            .vocab = VOCAB, .ids = bench_ints(b, T, VOCAB), .dh = bench_floats(b, T * D),
            .dtable = bench_floats(b, VOCAB * D));
}

static void kl_case(bench *b, const char *label, cq_kl_form form, int64_t top_k) {
    MEASURE(b, kl, label, 0, 12.0 * T * VOCAB, .rows = T, .vocab = VOCAB, .form = form,
            .top_k = top_k, .teacher = bench_floats(b, T * VOCAB),
            .student = bench_floats(b, T * VOCAB), .labels = bench_ints(b, T, VOCAB),
            .scale = 1.0 / T, .gradient = true, .sum = bench_zeros(b, 8),
            .nll_teacher = bench_zeros(b, 8), .nll_student = bench_zeros(b, 8),
            .agree = bench_zeros(b, 8), .valid = bench_zeros(b, 8));
}
void bench_kl(bench *b) {
    kl_case(b, "2048x1024 full", CQ_KL_FULL, VOCAB);
    kl_case(b, "2048x1024 tail, top 64", CQ_KL_TAIL_BUCKET, 64);
}
void bench_top_logits(bench *b) {
    MEASURE(b, top_logits, "2048x1024, top 64", 0, 4.0 * T * (VOCAB + 2 * 64), .rows = T,
            .vocab = VOCAB, .k = 64, .logits = bench_floats(b, T * VOCAB),
            .labels = bench_ints(b, T, VOCAB), .at = bench_permutation(b, T),
            .ids = bench_zeros(b, 4 * T * 64), .log_p = bench_zeros(b, 4 * T * 64),
            .log_tail = bench_zeros(b, 4 * T));
}
void bench_kl_cached(bench *b) {
    int32_t *ids = bench_zeros(b, 4 * T * 64);
    for (int64_t i = 0; i < T * 64; i++)
        ids[i] = (int32_t)(16 * (i % 64));
    MEASURE(b, kl_cached, "2048x1024 tail, top 64", 0, 8.0 * T * VOCAB + 6.0 * T * 64, .rows = T,
            .vocab = VOCAB, .form = CQ_KL_TAIL_BUCKET, .top_k = 64, .k = 64, .ids = ids,
            .log_p = bench_zeros(b, 2 * T * 64), .half = true, .log_tail = bench_floats(b, T),
            .at = bench_permutation(b, T), .student = bench_floats(b, T * VOCAB),
            .labels = bench_ints(b, T, VOCAB), .scale = 1.0 / T, .gradient = true,
            .sum = bench_zeros(b, 8));
}
void bench_cross_entropy(bench *b) {
    MEASURE(b, cross_entropy, "2048x1024", 0, 8.0 * T * VOCAB, .rows = T, .vocab = VOCAB,
            .logits = bench_floats(b, T * VOCAB), .labels = bench_ints(b, T, VOCAB),
            .scale = 1.0 / T, .gradient = true, .sum = bench_zeros(b, 8),
            .correct = bench_zeros(b, 8), .valid = bench_zeros(b, 8));
}
void bench_gram(bench *b) {
    for (int unbiased = 0; unbiased < 2; unbiased++)
        MEASURE(b, gram, unbiased ? "128x192 unbiased" : "128x192", (double)N * N * D,
                4.0 * (N * D + N * N), .n = N, .dim = D, .x = bench_floats(b, N * D),
                .unbiased = unbiased, .scratch = bench_floats(b, N * D),
                .gram = bench_floats(b, N * N));
}
void bench_cka(bench *b) {
    MEASURE(b, cka, "128x128", 0, 8.0 * N * N, .loss = CQ_GRAM_CKA, .n = N,
            .k = bench_floats(b, N * N), .l = bench_floats(b, N * N), .out = bench_zeros(b, 32));
}
void bench_cka_backward(bench *b) {
    double *stats = bench_zeros(b, 32);
    stats[0] = 1.0, stats[1] = stats[2] = 4.0, stats[3] = 0.75;
    MEASURE(b, cka_backward, "128x192", 2.0 * N * N * D, 4.0 * (2 * N * N + 2 * N * D),
            .loss = CQ_GRAM_CKA, .n = N, .dim = D, .k = bench_floats(b, N * N),
            .l = bench_floats(b, N * N), .x = bench_floats(b, N * D), .weight = 1e-3,
            .stats = stats, .dx = bench_floats(b, N * D));
}
void bench_rowloss(bench *b) {
    MEASURE(b, rowloss, "128x192 cosine", 0, 8.0 * N * D, .form = CQ_ROWLOSS_COSINE, .n = N,
            .dim = D, .x = bench_floats(b, N * D), .y = bench_floats(b, N * D),
            .out = bench_zeros(b, 8));
}
void bench_rowloss_backward(bench *b) {
    MEASURE(b, rowloss_backward, "128x192 cosine", 0, 12.0 * N * D, .form = CQ_ROWLOSS_COSINE,
            .n = N, .dim = D, .x = bench_floats(b, N * D), .y = bench_floats(b, N * D),
            .weight = 1.0, .dx = bench_floats(b, N * D));
}
void bench_balance(bench *b) {
    enum { LAYERS = 52 };
    MEASURE_ANY(b, balance, "52 layers", 0, 8.0 * 6 * LAYERS, .n = LAYERS, .sum = bench_zeros(b, 8),
                .right = bench_zeros(b, 8), .stats = bench_zeros(b, 32 * LAYERS),
                .order = bench_permutation(b, LAYERS), .ratio = true, .valid = 4096, .share = 0.5,
                .most = 100, .weights = bench_zeros(b, 8 * LAYERS),
                .report = bench_zeros(b, 8 * (3 + LAYERS)));
}
void bench_scatter_rows(bench *b) {
    MEASURE(b, scatter_rows, "128x192", 0, 12.0 * N * D, .rows = N, .dim = D,
            .y = bench_floats(b, N * D), .index = bench_permutation(b, N),
            .x = bench_floats(b, N * D));
}
