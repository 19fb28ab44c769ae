/* cases_device.c - the operations at the shapes of Nemotron 3 Nano and Qwen3-4B in training, 8192
 * tokens in documents of 4096, for a device.
 *
 * Operations per call are those of the definition (causal attention counts half the square); bytes
 * are every input read and every result written once, in F32.
 */
#include "kernels/bench/bench.h"

enum {
    T = 8192,
    DOCS = 2,
    NANO = 2688,
    QWEN = 2560,
    QWEN_MLP = 9728,
    INNER = 4096,        /* Nano's mamba heads x head_dim */
    CONV = INNER + 2048, /* and B, C of 8 groups x 128 states */
    EXPERTS = 128,
    TOP = 6,
    EXPERT = 1856,
    QWEN_VOCAB = 151936,
    NANO_VOCAB = 131072,
    ROWS = 512,
    CHUNK = 1024
};

static cq_fq quantized(bench *b) { return (cq_fq){.amax = bench_float(b, 1.0f), .n_groups = 1}; }

static void product(bench *b, const char *label, int64_t m, int64_t n, int64_t k, bool ta,
                    bool tb) {
    MEASURE(b, matmul, label, 2.0 * (double)m * (double)n * (double)k, 4 * (m * k + k * n + m * n),
            .ta = ta, .tb = tb, .m = m, .n = n, .k = k, .a = bench_floats(b, m * k),
            .lda = ta ? m : k, .b = bench_floats(b, k * n), .ldb = tb ? k : n,
            .c = bench_floats(b, m * n), .ldc = n, .alpha = 1.0,
            .b16 = b->s.compute == CQ_COMPUTE_BF16 ? bench_bf16(b, k * n) : NULL);
}
static void products(bench *b) {
    product(b, "Qwen gate/up forward", T, 2 * QWEN_MLP, QWEN, false, true);
    product(b, "Qwen down forward", T, QWEN, QWEN_MLP, false, true);
    product(b, "Qwen gate/up dx", T, QWEN, 2 * QWEN_MLP, false, false);
    product(b, "Qwen gate/up dw", 2 * QWEN_MLP, QWEN, T, true, false);
    product(b, "Qwen qkv forward", T, 6144, QWEN, false, true);
    product(b, "Qwen head chunk", CHUNK, QWEN_VOCAB, QWEN, false, true);
    product(b, "Nano in_proj forward", T, 10304, NANO, false, true);
}
static void grouped(bench *b) {
    static const char *const name[] = {"Nano up forward", "Nano up dx", "Nano up dw"};
    int64_t rows = (int64_t)T * TOP;
    for (int mode = 0; mode < 3; mode++)
        MEASURE(b, matmul_grouped, name[mode], 2.0 * (double)rows * EXPERT * NANO,
                4 * (rows * (EXPERT + NANO) + (int64_t)EXPERTS * EXPERT * NANO),
                .mode = (cq_grouped)mode, .groups = EXPERTS, .n = EXPERT, .k = NANO,
                .offsets = bench_bounds(b, EXPERTS, rows), .x = bench_floats(b, rows * NANO),
                .w = bench_floats(b, (int64_t)EXPERTS * EXPERT * NANO),
                .y = bench_floats(b, rows * EXPERT),
                .w16 = b->s.compute == CQ_COMPUTE_BF16 && mode != CQ_GROUPED_WEIGHT
                           ? bench_bf16(b, (int64_t)EXPERTS * EXPERT * NANO)
                           : NULL);
}

static void norms(bench *b, bool backward) {
    int64_t n = (int64_t)T * QWEN, inner = (int64_t)T * INNER;
    if (!backward) {
        MEASURE(b, rmsnorm_forward, "Qwen, quantized", 0, 8 * n, .rows = T, .dim = QWEN,
                .x = bench_floats(b, n), .w = bench_floats(b, QWEN), .eps = 1e-6,
                .yq = bench_floats(b, n), .rstd = bench_floats(b, T), .fq = quantized(b));
        MEASURE(b, gatednorm_forward, "Nano, quantized", 0, 12 * inner, .rows = T, .dim = INNER,
                .groups = 8, .y = bench_floats(b, inner), .z = bench_floats(b, inner), .ldz = INNER,
                .w = bench_floats(b, INNER), .eps = 1e-5, .outq = bench_floats(b, inner),
                .fq = quantized(b), .rstd = bench_floats(b, 8 * T));
        MEASURE(b, headnorm_forward, "Qwen q", 0, 8 * inner, .rows = T, .heads = 32,
                .head_dim = 128, .x = bench_floats(b, inner), .ldx = INNER,
                .w = bench_floats(b, 128), .eps = 1e-6, .positions = bench_permutation(b, T),
                .theta = 1e6, .y = bench_floats(b, inner), .ldy = INNER);
        return;
    }
    MEASURE(b, rmsnorm_backward, "Qwen", 0, 16 * n, .rows = T, .dim = QWEN, .x = bench_floats(b, n),
            .w = bench_floats(b, QWEN), .rstd = bench_floats(b, T), .dy = bench_floats(b, n),
            .dx = bench_floats(b, n), .dw = bench_floats(b, QWEN), .accumulate = true);
    MEASURE(b, gatednorm_backward, "Nano", 0, 20 * inner, .rows = T, .dim = INNER, .groups = 8,
            .y = bench_floats(b, inner), .z = bench_floats(b, inner), .ldz = INNER,
            .w = bench_floats(b, INNER), .rstd = bench_floats(b, 8 * T),
            .dout = bench_floats(b, inner), .dy = bench_floats(b, inner),
            .dz = bench_floats(b, inner), .lddz = INNER, .dw = bench_floats(b, INNER));
    MEASURE(b, headnorm_backward, "Qwen q", 0, 12 * inner, .rows = T, .heads = 32, .head_dim = 128,
            .x = bench_floats(b, inner), .ldx = INNER, .w = bench_floats(b, 128), .eps = 1e-6,
            .positions = bench_permutation(b, T), .theta = 1e6, .dy = bench_floats(b, inner),
            .lddy = INNER, .dx = bench_floats(b, inner), .lddx = INNER, .dw = bench_floats(b, 128));
}

static void attention(bench *b, bool backward) {
    int64_t q = (int64_t)T * 4096, kv = (int64_t)T * 1024, longest = T / DOCS;
    double flops = 2.0 * (double)T * (double)longest * 4096; /* q k' and p v, half of each */
    if (!backward) {
        MEASURE(b, attention_forward, "Qwen, 4096 in a document", flops, 8 * (q + kv), .tokens = T,
                .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = 32, .kv_heads = 8,
                .head_dim = 128, .scale = 0.088, .q = bench_floats(b, q), .k = bench_floats(b, kv),
                .v = bench_floats(b, kv), .ldq = 4096, .ldk = 1024, .ldv = 1024,
                .out = bench_floats(b, q), .lse = bench_floats(b, 32 * T));
        MEASURE(b, attention_forward, "Qwen, quantized too", flops, 8 * (q + kv) + 4 * q,
                .tokens = T, .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = 32,
                .kv_heads = 8, .head_dim = 128, .scale = 0.088, .q = bench_floats(b, q),
                .k = bench_floats(b, kv), .v = bench_floats(b, kv), .ldq = 4096, .ldk = 1024,
                .ldv = 1024, .out = bench_floats(b, q), .lse = bench_floats(b, 32 * T),
                .outq = bench_floats(b, q), .fq = quantized(b));
        return;
    }
    MEASURE(b, attention_backward, "Qwen, 4096 in a document", 2.5 * flops, 16 * (q + kv),
            .tokens = T, .n_docs = DOCS, .starts = bench_bounds(b, DOCS, T), .heads = 32,
            .kv_heads = 8, .head_dim = 128, .scale = 0.088, .q = bench_floats(b, q),
            .k = bench_floats(b, kv), .v = bench_floats(b, kv), .ldq = 4096, .ldk = 1024,
            .ldv = 1024, .out = bench_floats(b, q), .lse = bench_floats(b, 32 * T),
            .dout = bench_floats(b, q), .dq = bench_floats(b, q), .dk = bench_floats(b, kv),
            .dv = bench_floats(b, kv), .lddq = 4096, .lddk = 1024, .lddv = 1024);
}

static void conv(bench *b, bool backward) {
    int64_t n = (int64_t)T * CONV;
    if (!backward) {
        MEASURE(b, conv_forward, "Nano", 0, 8 * n, .tokens = T, .n_docs = DOCS,
                .starts = bench_bounds(b, DOCS, T), .channels = CONV, .width = 4,
                .x = bench_floats(b, n), .ldx = CONV, .w = bench_floats(b, 4 * CONV),
                .b = bench_floats(b, CONV), .y = bench_floats(b, n));
        return;
    }
    MEASURE(b, conv_backward, "Nano", 0, 12 * n, .tokens = T, .n_docs = DOCS,
            .starts = bench_bounds(b, DOCS, T), .channels = CONV, .width = 4,
            .x = bench_floats(b, n), .ldx = CONV, .w = bench_floats(b, 4 * CONV),
            .b = bench_floats(b, CONV), .dy = bench_floats(b, n), .dx = bench_floats(b, n),
            .lddx = CONV, .dw = bench_floats(b, 4 * CONV), .db = bench_floats(b, CONV));
}

/* Chunks of 128: per head and token C B' and its product with x over half a chunk, the states in
 * and out of it. */
static void ssd(bench *b, bool backward) {
    int64_t x = (int64_t)T * INNER, bc = (int64_t)T * 1024;
    double flops = (double)T * 64 * (128.0 * 128 + 128.0 * 64 + 4.0 * 64 * 128);
    if (!backward) {
        MEASURE(b, ssd_forward, "Nano", flops, 8 * x + 8 * bc, .tokens = T, .n_docs = DOCS,
                .starts = bench_bounds(b, DOCS, T), .heads = 64, .head_dim = 64, .groups = 8,
                .state = 128, .chunk = 128, .x = bench_floats(b, x), .B = bench_floats(b, bc),
                .C = bench_floats(b, bc), .dt_raw = bench_floats(b, 64 * T), .ldx = INNER,
                .ldB = 1024, .ldC = 1024, .ld_dt = 64, .dt_bias = bench_floats(b, 64),
                .a_log = bench_floats(b, 64), .d = bench_floats(b, 64), .y = bench_floats(b, x));
        return;
    }
    MEASURE(b, ssd_backward, "Nano", 2.5 * flops, 16 * x + 16 * bc, .tokens = T, .n_docs = DOCS,
            .starts = bench_bounds(b, DOCS, T), .heads = 64, .head_dim = 64, .groups = 8,
            .state = 128, .chunk = 128, .x = bench_floats(b, x), .B = bench_floats(b, bc),
            .C = bench_floats(b, bc), .dt_raw = bench_floats(b, 64 * T), .ldx = INNER, .ldB = 1024,
            .ldC = 1024, .ld_dt = 64, .dt_bias = bench_floats(b, 64), .a_log = bench_floats(b, 64),
            .d = bench_floats(b, 64), .dy = bench_floats(b, x), .dx = bench_floats(b, x),
            .dB = bench_floats(b, bc), .dC = bench_floats(b, bc),
            .ddt_raw = bench_floats(b, 64 * T), .lddx = INNER, .lddB = 1024, .lddC = 1024,
            .ldd_dt = 64, .ddt_bias = bench_floats(b, 64), .da_log = bench_floats(b, 64),
            .dd = bench_floats(b, 64));
}

static void activations(bench *b, bool backward) {
    int64_t n = (int64_t)T * QWEN_MLP, e = (int64_t)T * TOP * EXPERT;
    if (!backward) {
        MEASURE(b, swiglu_forward, "Qwen, quantized", 0, 12 * n, .rows = T, .dim = QWEN_MLP,
                .gu = bench_floats(b, 2 * n), .hq = bench_floats(b, n), .fq = quantized(b));
        MEASURE(b, relu2_forward, "Nano experts, quantized", 0, 8 * e, .rows = (int64_t)T * TOP,
                .dim = EXPERT, .x = bench_floats(b, e), .hq = bench_floats(b, e),
                .fq = quantized(b));
        return;
    }
    MEASURE(b, swiglu_backward, "Qwen", 0, 20 * n, .rows = T, .dim = QWEN_MLP,
            .gu = bench_floats(b, 2 * n), .dh = bench_floats(b, n), .dgu = bench_floats(b, 2 * n));
    MEASURE(b, relu2_backward, "Nano experts", 0, 12 * e, .rows = (int64_t)T * TOP, .dim = EXPERT,
            .x = bench_floats(b, e), .dh = bench_floats(b, e), .dx = bench_floats(b, e));
}

static void quantizer(bench *b) {
    int64_t rows = 2 * QWEN_MLP, n = rows * QWEN;
    MEASURE(b, fake_quant, "Qwen gate/up weight", 0, 8 * n, .rows = rows, .cols = QWEN,
            .x = bench_floats(b, n), .y = bench_floats(b, n), .fq = quantized(b));
    MEASURE(b, pack, "Qwen gate/up weight", 0, 4.5625 * (double)n, .rows = rows, .cols = QWEN,
            .x = bench_floats(b, n), .fq = quantized(b), .codes = bench_zeros(b, n / 2),
            .scales = bench_zeros(b, n / 16));
    MEASURE_ANY(b, unpack, "Qwen gate/up weight, to BF16", 0, 2.5625 * (double)n, .dtype = CQ_BF16,
                .rows = rows, .cols = QWEN, .codes = bench_zeros(b, n / 2),
                .scales = bench_zeros(b, n / 16), .amax = bench_float(b, 1.0f), .n_groups = 1,
                .top = 448.0f, .y = bench_zeros(b, 2 * n));
    MEASURE(b, amax, "Qwen gate/up weight", 0, 4 * n, .rows = rows, .cols = QWEN,
            .x = bench_floats(b, n), .n_groups = 1, .amax = bench_float(b, 0));
    MEASURE(b, adamw, "Qwen gate/up weight, quantized", 0, 32 * n, .rows = rows, .cols = QWEN,
            .w = bench_floats(b, n), .m = bench_zeros(b, 4 * n), .v = bench_zeros(b, 4 * n),
            .g = bench_floats(b, n), .lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
            .grad_scale = 1.0, .step = 10, .wq = bench_floats(b, n), .fq = quantized(b));
    MEASURE(b, sumsq, "Qwen gate/up weight", 0, 4 * n, .n = n, .x = bench_floats(b, n),
            .out = bench_zeros(b, 8));
    MEASURE(b, round_bf16, "Qwen gate/up weight", 0, 6 * n, .n = n, .x = bench_floats(b, n),
            .y = bench_zeros(b, 2 * n));
    MEASURE(b, axpy, "Qwen gate/up weight", 0, 12 * n, .n = n, .alpha = 0.5, .beta = 1.0,
            .x = bench_floats(b, n), .y = bench_floats(b, n));
}

static void routing(bench *b) {
    int64_t pairs = (int64_t)T * TOP, n = (int64_t)T * NANO, wide = pairs * NANO;
    MEASURE(b, route_forward, "Nano", 0, 4 * T * (EXPERTS + 2 * TOP), .tokens = T,
            .experts = EXPERTS, .top_k = TOP, .n_group = 1, .topk_group = 1, .normalize = true,
            .scaling = 2.5, .logits = bench_floats(b, T * EXPERTS),
            .bias = bench_floats(b, EXPERTS), .sel = bench_zeros(b, 4 * pairs),
            .weight = bench_floats(b, pairs));
    MEASURE_ANY(b, route_sort, "Nano", 0, 12 * pairs, .tokens = T, .experts = EXPERTS, .top_k = TOP,
                .sel = bench_ints(b, pairs, EXPERTS), .offsets = bench_zeros(b, 8 * (EXPERTS + 1)),
                .token = bench_zeros(b, 4 * pairs), .position = bench_zeros(b, 4 * pairs));
    MEASURE(b, gather_rows, "Nano experts, quantized", 0, 4 * (n + wide), .rows = pairs,
            .dim = NANO, .x = bench_floats(b, n), .index = bench_ints(b, pairs, T),
            .yq = bench_floats(b, wide), .fq = quantized(b));
    MEASURE(b, combine_forward, "Nano", 0, 4 * (wide + 2 * n), .tokens = T, .top_k = TOP,
            .dim = NANO, .y = bench_floats(b, wide), .weight = bench_floats(b, pairs),
            .position = bench_permutation(b, pairs), .out = bench_floats(b, n));
    MEASURE(b, combine_backward, "Nano", 0, 4 * (2 * wide + n), .tokens = T, .top_k = TOP,
            .dim = NANO, .y = bench_floats(b, wide), .weight = bench_floats(b, pairs),
            .dout = bench_floats(b, n), .position = bench_permutation(b, pairs),
            .dy = bench_floats(b, wide), .dweight = bench_floats(b, pairs));
    MEASURE(b, ungather_rows, "Nano", 0, 4 * (wide + 2 * n), .tokens = T, .top_k = TOP, .dim = NANO,
            .dy = bench_floats(b, wide), .position = bench_permutation(b, pairs),
            .dx = bench_floats(b, n));
}

static void embedding(bench *b) {
    int64_t n = (int64_t)T * QWEN;
    MEASURE(b, embed_forward, "Qwen", 0, 8 * n, .tokens = T, .dim = QWEN, .vocab = QWEN_VOCAB,
            .ids = bench_ints(b, T, QWEN_VOCAB),
            .table = bench_floats(b, (int64_t)QWEN_VOCAB * QWEN), .h = bench_floats(b, n));
    MEASURE(b, embed_backward, "Qwen", 0, 12 * n, .tokens = T, .dim = QWEN, .vocab = QWEN_VOCAB,
            .ids = bench_ints(b, T, QWEN_VOCAB), .dh = bench_floats(b, n),
            .dtable = bench_floats(b, (int64_t)QWEN_VOCAB * QWEN));
}

static void kl_case(bench *b, const char *label, int64_t vocab, cq_kl_form form, int64_t top_k) {
    int64_t n = CHUNK * vocab;
    MEASURE(b, kl, label, 0, 12 * n, .rows = CHUNK, .vocab = vocab, .form = form, .top_k = top_k,
            .teacher = bench_floats(b, n), .student = bench_floats(b, n),
            .labels = bench_ints(b, CHUNK, vocab), .scale = 1.0 / CHUNK, .gradient = true,
            .sum = bench_zeros(b, 8), .agree = bench_zeros(b, 8));
}
static void losses(bench *b) {
    kl_case(b, "Qwen 1024 rows, full", QWEN_VOCAB, CQ_KL_FULL, QWEN_VOCAB);
    kl_case(b, "Qwen 1024 rows, top 1024", QWEN_VOCAB, CQ_KL_TAIL_BUCKET, 1024);
    kl_case(b, "Nano 1024 rows, full", NANO_VOCAB, CQ_KL_FULL, NANO_VOCAB);
    int64_t n = (int64_t)CHUNK * QWEN_VOCAB;
    MEASURE(b, cross_entropy, "Qwen 1024 rows", 0, 8 * n, .rows = CHUNK, .vocab = QWEN_VOCAB,
            .logits = bench_floats(b, n), .labels = bench_ints(b, CHUNK, QWEN_VOCAB),
            .scale = 1.0 / CHUNK, .gradient = true, .sum = bench_zeros(b, 8));
}

/// The layerwise term of one layer, and of eight in one call.
static void similarity(bench *b) {
    for (int64_t layers = 1; layers <= 8; layers += 7) {
        int64_t rows = layers * ROWS * QWEN, square = layers * ROWS * ROWS;
        double flops = 2.0 * ROWS * ROWS * QWEN * (double)layers;
        const char *shape = layers > 1 ? "8 x Qwen n = 512" : "Qwen n = 512";
        MEASURE(b, gram, layers > 1 ? "8 x Qwen n = 512, unbiased" : "Qwen n = 512, unbiased",
                flops, 4 * (2 * rows + square), .batch = layers, .n = ROWS, .dim = QWEN,
                .x = bench_floats(b, rows), .unbiased = true, .scratch = bench_floats(b, rows),
                .gram = bench_floats(b, square));
        MEASURE(b, cka, layers > 1 ? "8 x n = 512" : "n = 512", 0, 8 * square, .batch = layers,
                .n = ROWS, .k = bench_floats(b, square), .l = bench_floats(b, square),
                .out = bench_zeros(b, 32 * layers));
        MEASURE(b, cka_backward, shape, flops, 4 * (2 * rows + 3 * square), .batch = layers,
                .n = ROWS, .dim = QWEN, .k = bench_floats(b, square), .l = bench_floats(b, square),
                .x = bench_floats(b, rows), .weight = 0.1, .stats = bench_zeros(b, 32 * layers),
                .dx = bench_floats(b, rows));
    }
    MEASURE(b, scatter_rows, "Qwen n = 512", 0, 12 * ROWS * QWEN, .rows = ROWS, .dim = QWEN,
            .y = bench_floats(b, ROWS * QWEN), .index = bench_permutation(b, T),
            .x = bench_floats(b, (int64_t)T * QWEN));
}

void bench_true_size(bench *b, bool (*wanted)(const char *op, void *context), void *context) {
#define WANTED(op) wanted(op, context)
    if (WANTED("matmul"))
        products(b);
    if (WANTED("matmul_grouped"))
        grouped(b);
    for (int backward = 0; backward < 2; backward++) {
        if (WANTED("rmsnorm"))
            norms(b, backward);
        if (WANTED("attention"))
            attention(b, backward);
        if (WANTED("conv"))
            conv(b, backward);
        if (WANTED("ssd"))
            ssd(b, backward);
        if (WANTED("swiglu"))
            activations(b, backward);
    }
    if (WANTED("fake_quant"))
        quantizer(b);
    if (WANTED("route"))
        routing(b);
    if (WANTED("embed"))
        embedding(b);
    if (WANTED("kl"))
        losses(b);
    if (WANTED("cka"))
        similarity(b);
#undef WANTED
}
