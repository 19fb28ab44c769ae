/* test_eval.c - the held-out comparison and the statistics of quantized weights, against sums in
 * double written from the definitions. */
#include "tests/harness.h"

enum { TOKENS = 224, MAP_ROWS = 128 };

typedef struct pair {
    cq_model *teacher, *student;
    cq_eval *eval;
    cq_plan *plan;
    cq_stream stream;
    cq_batch *batch[2];
    int64_t blocks, hidden, vocab;
} pair;

static void pair_open(pair *p, const char *name, const char *kernels, cq_dtype dtype) {
    char dir[512];
    memset(p, 0, sizeof *p);
    snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, name);
    int threads = cq_threads_set(1);
    p->stream = (cq_stream){.table = cq_kernels_find(kernels), .threads = threads};
    OK(cq_model_open(&p->teacher, dir, dtype));
    OK(cq_model_quantize(&p->student, p->teacher, &(cq_quant_options){.preset = "all"}));
    p->blocks = cq_model_config(p->teacher)->n_blocks;
    p->hidden = cq_model_config(p->teacher)->hidden;
    p->vocab = cq_model_config(p->teacher)->vocab;
    p->batch[0] = harness_batch((int64_t[]){150, 1, 40}, 3, p->vocab, 5);
    p->batch[1] = harness_batch((int64_t[]){7, 30}, 2, p->vocab, 6);
    OK(cq_eval_open(&p->eval, p->teacher, p->student));
    OK(cq_plan_open(&p->plan));
    OK(cq_model_plan_params(p->teacher, p->plan, false));
    OK(cq_model_plan_params(p->student, p->plan, false));
    OK(cq_model_plan_work(p->teacher, p->plan, TOKENS, TOKENS, CQ_MODE_INFER, threads));
    OK(cq_model_plan_work(p->student, p->plan, TOKENS, TOKENS, CQ_MODE_INFER, threads));
    OK(cq_eval_plan(p->eval, p->plan, TOKENS, 64));
    OK(cq_plan_commit(p->plan, 0));
    OK(cq_model_load(p->teacher));
    OK(cq_model_load(p->student));
    int64_t unreached;
    OK(cq_model_calibrate_begin(p->student));
    OK(cq_model_forward(p->student, &p->stream, p->batch[0]));
    OK(cq_model_calibrate_end(p->student, &p->stream, &unreached));
}

static void pair_close(pair *p) {
    cq_eval_close(p->eval);
    cq_model_close(p->student);
    cq_model_close(p->teacher);
    cq_plan_close(p->plan);
    cq_batch_free(p->batch[0]);
    cq_batch_free(p->batch[1]);
}

static void compare(pair *p, bool map, cq_eval_result *r) {
    cq_eval_want_map(p->eval, map);
    cq_eval_reset(p->eval);
    for (int i = 0; i < 2; i++)
        OK(cq_eval_add(p->eval, &p->stream, p->batch[i]));
    OK(cq_eval_result_get(p->eval, r));
}

/* HSIC_1 of two sets of rows [n, dim], from eq. 3 of Nguyen et al. 2021, without centring anything:
 * tr KL + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1, all over n (n - 3), diagonals zero. */
static double hsic(const double *x, const double *y, int64_t n, int64_t dim) {
    double trace = 0, both = 0, all_k = 0, all_l = 0;
    for (int64_t i = 0; i < n; i++) {
        double row_k = 0, row_l = 0;
        for (int64_t j = 0; j < n; j++) {
            double k = 0, l = 0;
            for (int64_t c = 0; c < dim && i != j; c++) {
                k += x[i * dim + c] * x[j * dim + c];
                l += y[i * dim + c] * y[j * dim + c];
            }
            trace += k * l;
            row_k += k;
            row_l += l;
        }
        both += row_k * row_l;
        all_k += row_k;
        all_l += row_l;
    }
    double m = (double)n;
    return (trace + all_k * all_l / ((m - 1) * (m - 2)) - 2 * both / (m - 2)) / (m * (m - 3));
}

/* Rows of every block's output of one model on one batch: [blocks, n, hidden]. */
static double *rows_of(pair *p, cq_model *m, const cq_batch *b, int64_t n) {
    double *out = malloc((size_t)(p->blocks * n * p->hidden) * sizeof *out);
    int64_t candidates[TOKENS], found = 0;
    for (int64_t i = 0; i < b->tokens; i++)
        if (b->labels[i] >= 0 && b->positions[i] > 0)
            candidates[found++] = i;
    OK(cq_model_embed_forward(m, &p->stream, b));
    for (int64_t l = 0; l < p->blocks; l++) {
        OK(cq_model_block_forward(m, &p->stream, b, l));
        const double *h = cq_model_hidden(m, l)->data;
        for (int64_t i = 0; i < n; i++)
            memcpy(out + (l * n + i) * p->hidden, h + candidates[i * found / n] * p->hidden,
                   (size_t)p->hidden * sizeof *out);
    }
    return out;
}

Test(eval, map_of_teacher_and_student_blocks_equals_the_definition) {
    static const char *const names[] = {"nemotron_h_tiny", "qwen3_tiny"};
    for (int m = 0; m < 2; m++) {
        pair p;
        cq_eval_result r;
        pair_open(&p, names[m], "ref", CQ_F64);
        compare(&p, true, &r);
        cr_assert_not_null(r.map);
        double *rows[2][2];
        int64_t n[2];
        for (int b = 0; b < 2; b++) {
            int64_t found = 0;
            for (int64_t i = 0; i < p.batch[b]->tokens; i++)
                found += p.batch[b]->labels[i] >= 0 && p.batch[b]->positions[i] > 0;
            n[b] = found < MAP_ROWS ? found : MAP_ROWS;
            rows[b][0] = rows_of(&p, p.teacher, p.batch[b], n[b]);
            rows[b][1] = rows_of(&p, p.student, p.batch[b], n[b]);
        }
        cr_expect_eq(n[0], MAP_ROWS, "a batch whose rows are sampled");
        cr_expect_lt(n[1], MAP_ROWS, "a batch whose rows are all taken");
        for (int64_t t = 0; t < p.blocks; t++)
            for (int64_t l = 0; l < p.blocks; l++) {
                double sum[3] = {0};
                for (int b = 0; b < 2; b++) {
                    const double *y = rows[b][0] + t * n[b] * p.hidden;
                    const double *x = rows[b][1] + l * n[b] * p.hidden;
                    sum[0] += hsic(x, y, n[b], p.hidden);
                    sum[1] += hsic(x, x, n[b], p.hidden);
                    sum[2] += hsic(y, y, n[b], p.hidden);
                }
                double want = sum[0] / sqrt(sum[1] * sum[2]), got = r.map[t * p.blocks + l];
                cr_expect(fabs(want - got) < 1e-9,
                          "%s teacher block %ld, student block %ld: "
                          "%.12f, wanted %.12f",
                          names[m], (long)t, (long)l, got, want);
            }
        for (int b = 0; b < 2; b++)
            for (int side = 0; side < 2; side++)
                free(rows[b][side]);
        pair_close(&p);
    }
}

Test(eval, without_a_map_the_rest_keeps_its_bits) {
    pair p;
    cq_eval_result with, without;
    pair_open(&p, "qwen3_tiny", "cpu", CQ_F32);
    compare(&p, true, &with);
    double cka[64];
    memcpy(cka, with.cka, (size_t)p.blocks * sizeof *cka);
    compare(&p, false, &without);
    cr_expect_null(without.map);
    cr_expect_eq(with.kl, without.kl);
    cr_expect_arr_eq(cka, without.cka, (size_t)p.blocks * sizeof *cka);
    pair_close(&p);
}

/* n^2 HSIC_0 of two sets of rows: <K, L> of their centred Grams. */
static double biased(const double *x, const double *y, int64_t n, int64_t dim) {
    double sum = 0;
    for (int64_t c = 0; c < dim; c++)
        for (int64_t d = 0; d < dim; d++) {
            double xy = 0, mx = 0, my = 0;
            for (int64_t i = 0; i < n; i++) {
                xy += x[i * dim + c] * y[i * dim + d];
                mx += x[i * dim + c];
                my += y[i * dim + d];
            }
            sum += pow(xy - mx * my / (double)n, 2);
        }
    return sum;
}

/* Rows with every dimension divided by its standard deviation in y. */
static double *standard(const double *x, const double *y, int64_t n, int64_t dim) {
    double *out = malloc((size_t)(n * dim) * sizeof *out);
    for (int64_t c = 0; c < dim; c++) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < n; i++)
            mean += y[i * dim + c] / (double)n;
        for (int64_t i = 0; i < n; i++)
            variance += pow(y[i * dim + c] - mean, 2) / (double)n;
        for (int64_t i = 0; i < n; i++)
            out[i * dim + c] = x[i * dim + c] / sqrt(variance);
    }
    return out;
}

typedef double product(const double *x, const double *y, int64_t n, int64_t dim);

static double cka_of(product *f, const double *x, const double *y, int64_t n, int64_t dim) {
    return f(x, y, n, dim) / sqrt(f(x, x, n, dim) * f(y, y, n, dim));
}

Test(eval, cka_in_four_ways_equals_the_definition) {
    pair p;
    cq_eval_result r;
    int64_t n = 0;
    pair_open(&p, "nemotron_h_tiny", "ref", CQ_F64);
    cq_eval_want_geometry(p.eval, true);
    cq_eval_reset(p.eval);
    OK(cq_eval_add(p.eval, &p.stream, p.batch[1]));
    OK(cq_eval_result_get(p.eval, &r));
    cr_assert_not_null(r.geometry);
    for (int64_t i = 0; i < p.batch[1]->tokens; i++)
        n += p.batch[1]->labels[i] >= 0 && p.batch[1]->positions[i] > 0;
    double *ys = rows_of(&p, p.teacher, p.batch[1], n), *xs = rows_of(&p, p.student, p.batch[1], n);
    for (int64_t l = 0; l < p.blocks; l++) {
        const double *x = xs + l * n * p.hidden, *y = ys + l * n * p.hidden;
        double *sx = standard(x, y, n, p.hidden), *sy = standard(y, y, n, p.hidden);
        double want[] = {cka_of(hsic, x, y, n, p.hidden), cka_of(biased, x, y, n, p.hidden),
                         cka_of(hsic, sx, sy, n, p.hidden), cka_of(biased, sx, sy, n, p.hidden)};
        for (int way = 0; way < 4; way++)
            cr_expect_float_eq(r.geometry[4 * l + way], want[way], 1e-9, "block %ld, way %d",
                               (long)l, way);
        cr_expect_float_eq(r.cka[l], want[0], 1e-9, "block %ld", (long)l);
        cr_expect(fabs(want[1] - want[3]) > 1e-9, "block %ld: standardizing changes nothing",
                  (long)l);
        free(sx);
        free(sy);
    }
    free(xs);
    free(ys);
    cq_eval_want_geometry(p.eval, false);
    compare(&p, false, &r);
    cr_expect_null(r.geometry);
    pair_close(&p);
}

/* Sum of p (log p - log q) over the vocabulary. */
static double kl_of(const double *t, const double *s, int64_t n) {
    double zt = 0, zs = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        zt += exp(t[i]);
        zs += exp(s[i]);
    }
    for (int64_t i = 0; i < n; i++)
        sum += exp(t[i]) / zt * (t[i] - log(zt) - s[i] + log(zs));
    return sum;
}

static double *logits_of(pair *p, cq_model *m, const cq_batch *b) {
    double *out = malloc((size_t)(b->tokens * p->vocab) * sizeof *out);
    OK(cq_model_forward(m, &p->stream, b));
    OK(cq_model_head_forward(m, &p->stream, cq_model_final(m), 0, b->tokens, out));
    return out;
}

Test(eval, kl_by_position_equals_the_definition_and_sums_to_kl) {
    pair p;
    cq_eval_result r;
    double want[32] = {0}, all = 0;
    int64_t tokens[32] = {0};
    pair_open(&p, "nemotron_h_tiny", "ref", CQ_F64);
    compare(&p, false, &r);
    for (int b = 0; b < 2; b++) {
        double *t = logits_of(&p, p.teacher, p.batch[b]), *s = logits_of(&p, p.student, p.batch[b]);
        for (int64_t i = 0; i < p.batch[b]->tokens; i++) {
            int k = (int)floor(log2(p.batch[b]->positions[i] + 1));
            if (p.batch[b]->labels[i] < 0)
                continue;
            want[k] += kl_of(t + i * p.vocab, s + i * p.vocab, p.vocab);
            tokens[k]++;
        }
        free(t);
        free(s);
    }
    cr_expect_eq(r.n_octaves, 8, "%ld octaves, wanted 8: the longest document has 150 tokens",
                 (long)r.n_octaves);
    for (int64_t k = 0; k < r.n_octaves; k++) {
        cr_expect_eq(r.octave_tokens[k], tokens[k], "octave %ld", (long)k);
        cr_expect(fabs(r.octave_kl[k] - want[k]) < 1e-9 * (1 + want[k]),
                  "octave %ld: %.12g, wanted %.12g", (long)k, r.octave_kl[k], want[k]);
        all += want[k];
    }
    cr_expect_float_eq(r.kl, all / (double)r.tokens, 1e-10);
    pair_close(&p);
}

/* amax 2688 makes the tensor scale 1, so that a block scale is a sixth of its block's maximum. */
static double hand_value[64] = {[0] = 2688, [1] = -448, [17] = 6, [18] = 1.1, [50] = -0.001};
static double hand_fq[64] = {[0] = 2688, [1] = -672, [17] = 6, [18] = 1, [50] = 0};

Test(quant_stats, a_matrix_by_hand) {
    cq_quant_stats s = {0};
    cq_tensor value = {hand_value, CQ_SHAPE2(2, 32), CQ_F64};
    cq_tensor fq = {hand_fq, CQ_SHAPE2(2, 32), CQ_F64};
    cq_param p = {.name = "w", .quantized = true, .value = value, .fq = fq, .amax = 2688};
    OK(cq_quant_stats_add(&s, &p));
    cr_expect_float_eq(s.signal, 2688. * 2688 + 448. * 448 + 36 + 1.21 + 1e-6, 1e-6);
    cr_expect_float_eq(s.noise, 224. * 224 + 0.01 + 1e-6, 1e-9);
    cr_expect_eq(s.scales[0x7e], 1, "2688 / 6 = 448");
    cr_expect_eq(s.scales[0x38], 2, "6 / 6 = 1, and one for the block of zeros");
    cr_expect_eq(s.scales[0x01], 1, "0.001 / 6 is raised to 2^-9");
    cr_expect_float_eq(cq_quant_scale_log2(0x7e), log2(448), 1e-12);
    cr_expect_float_eq(cq_quant_scale_log2(0x01), -9, 1e-12);
    float block_amax[4] = {1344, 6, 2688, 2688};
    p.block_amax = (cq_tensor){block_amax, CQ_SHAPE2(2, 2), CQ_F32};
    p.top = 448;
    OK(cq_quant_stats_add(&s, &p));
    cr_expect_eq(s.scales[0x76], 1, "a static maximum of 1344 makes 224");
    cr_expect_eq(s.scales[0x7e], 3);
    p.amax = 0;
    OK(cq_quant_stats_add(&s, &p));
    cr_expect_eq(s.scales[0x38], 7,
                 "two, one of the static maximum 6, and a whole tensor of zeros");
    p.fq.data = p.value.data;
    cr_expect_eq(cq_quant_stats_add(&s, &p), CQ_EUSAGE);
    p.quantized = false;
    cr_expect_eq(cq_quant_stats_add(&s, &p), CQ_EUSAGE);
}

/* Every block scale that is counted is the one the export writes. */
Test(quant_stats, counts_the_scales_that_are_exported) {
    static const cq_scale_method methods[] = {CQ_SCALE_MAX, CQ_SCALE_MSE, CQ_SCALE_FOUR_OVER_SIX};
    enum { ROWS = 8, COLS = 64, N = ROWS * COLS };
    for (int m = 0; m < 3; m++) {
        float x[N], block_amax[N / 16], y[N], scale_2, amax = 0;
        uint8_t bytes[N / 2], scales[N / 16];
        int64_t want[127] = {0};
        for (int i = 0; i < N; i++) {
            x[i] = (float)cq_random_normal(4, 1, (uint64_t)i) * (i < N / 2 ? 1.0f : 0.05f);
            amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        }
        float top = methods[m] == CQ_SCALE_FOUR_OVER_SIX ? 256 : 448;
        if (m)
            OK(cq_nvfp4_search(block_amax, x, ROWS, COLS, amax, methods[m]));
        OK(cq_nvfp4_pack(bytes, scales, &scale_2, x, ROWS, COLS, amax, m ? block_amax : NULL, top));
        OK(cq_nvfp4_unpack(y, bytes, scales, scale_2, ROWS, COLS));
        for (int i = 0; i < N / 16; i++)
            want[scales[i]]++;
        cq_quant_stats s = {0};
        cq_param p = {.name = "w",
                      .quantized = true,
                      .amax = amax,
                      .top = top,
                      .value = {x, CQ_SHAPE2(ROWS, COLS), CQ_F32},
                      .fq = {y, CQ_SHAPE2(ROWS, COLS), CQ_F32}};
        if (m)
            p.block_amax = (cq_tensor){block_amax, CQ_SHAPE2(ROWS, COLS / 16), CQ_F32};
        OK(cq_quant_stats_add(&s, &p));
        cr_expect_arr_eq(s.scales, want, sizeof want, "method %d", m);
        double db = 10 * log10(s.signal / s.noise);
        cr_expect(db > 17 && db < 25, "method %d: %.2f dB, wanted what 4 bits give", m, db);
    }
}
