/// eval.c - how far a student is from its teacher on held-out documents.
///
///     KL, negative log-likelihood, top-1 over labelled tokens;   CKA_l = sum HSIC_1(K, L) /
///     sqrt(sum HSIC_1(K, K) sum HSIC_1(L, L))
///
/// Both models run in lock-step, block by block, so that one pair of Grams is alive. The sums over
/// groups of at most 512 rows estimate the CKA of all rows without a bias from the group size
/// (Nguyen et al. 2021, arXiv 2010.15327 eq. 3). The map of all teacher blocks against all student
/// blocks needs every Gram of a batch at once, so it looks at 128 evenly spaced rows only. KL is
/// summed apart for octaves of the position, one masked call of the kernel each.
#include "core/base/error.h"
#include "core/train/taps.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP_ROWS = 512, MAP_ROWS = 128, N_OCTAVES = 32 };

struct cq_eval {
    cq_model *teacher, *student;
    cq_dtype dtype;
    int64_t n_blocks, vocab, chunk;
    cq_tensor zt, zs, candidates, xs, centred, k, l;
    double (*hsic)[3]; ///< [n_blocks] sums of <K, L>, <K, K>, <L, L>
    double *cka;
    double nll_teacher, nll_student;
    int64_t agree;
    double kl[N_OCTAVES];
    int64_t valid[N_OCTAVES];
    cq_tensor masked, map_grams; ///< [chunk]; [2 * n_blocks, MAP_ROWS, MAP_ROWS], teacher first
    bool want_map;
    double *cross, *self, *map; ///< sums [n_blocks, n_blocks] and [2 * n_blocks]; the map itself
};

int cq_eval_open(cq_eval **out, cq_model *teacher, cq_model *student) {
    const cq_config *t = cq_model_config(teacher), *s = cq_model_config(student);
    *out = NULL;
    if (t->vocab != s->vocab || t->n_blocks != s->n_blocks)
        return cq_fail(CQ_ESHAPE,
                       "compare: %s has vocabulary %ld and %ld blocks, %s has %ld and %ld",
                       cq_model_dir(teacher), (long)t->vocab, (long)t->n_blocks,
                       cq_model_dir(student), (long)s->vocab, (long)s->n_blocks);
    cq_eval *e = calloc(1, sizeof *e);
    if (e) {
        e->hsic = calloc((size_t)s->n_blocks, sizeof *e->hsic);
        e->cka = calloc((size_t)s->n_blocks, sizeof *e->cka);
        e->cross = calloc((size_t)(s->n_blocks * s->n_blocks), sizeof *e->cross);
        e->map = calloc((size_t)(s->n_blocks * s->n_blocks), sizeof *e->map);
        e->self = calloc((size_t)s->n_blocks, 2 * sizeof *e->self);
    }
    if (!e || !e->hsic || !e->cka || !e->cross || !e->map || !e->self) {
        cq_eval_close(e);
        return cq_fail(CQ_ENOMEM, "compare: no memory");
    }
    e->teacher = teacher;
    e->student = student;
    e->dtype = cq_model_dtype(student);
    e->n_blocks = s->n_blocks;
    e->vocab = s->vocab;
    *out = e;
    return CQ_OK;
}

void cq_eval_close(cq_eval *e) {
    if (!e)
        return;
    free(e->hsic);
    free(e->cka);
    free(e->cross);
    free(e->map);
    free(e->self);
    free(e);
}

void cq_eval_want_map(cq_eval *e, bool on) { e->want_map = on; }

int cq_eval_plan(cq_eval *e, cq_plan *p, int64_t tokens, int64_t chunk) {
    int64_t n = tokens < GROUP_ROWS ? tokens : GROUP_ROWS;
    int64_t few = tokens < MAP_ROWS ? tokens : MAP_ROWS;
    int64_t dim = cq_model_config(e->teacher)->hidden, other = cq_model_config(e->student)->hidden;
    if (other > dim)
        dim = other;
    e->chunk = chunk < tokens ? chunk : tokens;
    CQ_TRY(cq_plan_add(p, &e->zt, CQ_FOR_LOGITS, "teacher logits", e->dtype,
                       CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->zs, CQ_FOR_LOGITS, "student logits", e->dtype,
                       CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->masked, CQ_FOR_LOGITS, "labels of some positions", CQ_I32,
                       CQ_SHAPE1(e->chunk)));
    CQ_TRY(cq_plan_add(p, &e->candidates, CQ_FOR_CKA, "held-out rows", CQ_I32, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &e->map_grams, CQ_FOR_CKA, "Grams of all blocks", e->dtype,
                       CQ_SHAPE3(2 * e->n_blocks, few, few)));
    CQ_TRY(cq_plan_add(p, &e->xs, CQ_FOR_CKA, "rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->centred, CQ_FOR_CKA, "centred rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->k, CQ_FOR_CKA, "student's Gram", e->dtype, CQ_SHAPE2(n, n)));
    return cq_plan_add(p, &e->l, CQ_FOR_CKA, "teacher's Gram", e->dtype, CQ_SHAPE2(n, n));
}

void cq_eval_reset(cq_eval *e) {
    memset(e->hsic, 0, (size_t)e->n_blocks * sizeof *e->hsic);
    memset(e->kl, 0, sizeof e->kl);
    memset(e->valid, 0, sizeof e->valid);
    e->nll_teacher = e->nll_student = 0;
    e->agree = 0;
    memset(e->cross, 0, (size_t)(e->n_blocks * e->n_blocks) * sizeof *e->cross);
    memset(e->self, 0, (size_t)e->n_blocks * 2 * sizeof *e->self);
}

static int add_cka(cq_eval *e, cq_stream *s, int64_t block, int64_t found) {
    const cq_tensor *x = cq_model_hidden(e->student, block),
                    *y = cq_model_hidden(e->teacher, block);
    int64_t groups = (found + GROUP_ROWS - 1) / GROUP_ROWS;
    for (int64_t g = 0; g < groups; g++) {
        int64_t begin = found * g / groups, n = found * (g + 1) / groups - begin;
        const int32_t *rows = (const int32_t *)e->candidates.data + begin;
        double out[4], pairs = (double)n * (double)(n - 3);
        if (n < 4)
            continue;
        CQ_TRY(cq_tap_gram(s, e->dtype, x->data, cq_model_config(e->student)->hidden, rows, n, true,
                           e->xs.data, e->centred.data, e->k.data));
        CQ_TRY(cq_tap_gram(s, e->dtype, y->data, cq_model_config(e->teacher)->hidden, rows, n, true,
                           e->xs.data, e->centred.data, e->l.data));
        CQ_TRY(
            CQ_RUN(s, cka, .dtype = e->dtype, .n = n, .k = e->k.data, .l = e->l.data, .out = out));
        for (int i = 0; i < 3; i++)
            e->hsic[block][i] += out[i] / pairs;
    }
    return CQ_OK;
}

static void *map_gram(const cq_eval *e, int64_t i, int64_t n) {
    return (char *)e->map_grams.data + i * n * n * cq_dtype_bytes(e->dtype);
}

/* Keeps the two Grams of a block over `n` evenly spaced rows. */
static int keep_grams(cq_eval *e, cq_stream *s, int64_t block, int64_t found, int64_t n) {
    const int32_t *candidates = e->candidates.data;
    int32_t rows[MAP_ROWS];
    for (int64_t i = 0; i < n; i++)
        rows[i] = candidates[found * i / n];
    for (int side = 0; side < 2; side++) {
        cq_model *m = side ? e->student : e->teacher;
        CQ_TRY(cq_tap_gram(s, e->dtype, cq_model_hidden(m, block)->data, cq_model_config(m)->hidden,
                           rows, n, true, e->xs.data, e->centred.data,
                           map_gram(e, side * e->n_blocks + block, n)));
    }
    return CQ_OK;
}

/* <K, L> of two symmetric matrices with zero diagonals: twice the upper triangle, four sums to let
 * the processor overlap them. */
#define INNER(NAME, T)                                                                             \
    static double NAME(const T *k, const T *l, int64_t n) {                                        \
        double sum[4] = {0};                                                                       \
        for (int64_t i = 0; i < n; i++)                                                            \
            for (int64_t j = i + 1; j < n; j++)                                                    \
                sum[j & 3] += (double)k[i * n + j] * (double)l[i * n + j];                         \
        return 2 * (sum[0] + sum[1] + sum[2] + sum[3]);                                            \
    }
INNER(inner_f32, float)
INNER(inner_f64, double)

static double inner(const cq_eval *e, int64_t a, int64_t b, int64_t n) {
    const void *k = map_gram(e, a, n), *l = map_gram(e, b, n);
    return (e->dtype == CQ_F64 ? inner_f64(k, l, n) : inner_f32(k, l, n)) /
           ((double)n * (double)(n - 3));
}

static void add_map(cq_eval *e, int64_t n) {
    for (int64_t i = 0; i < 2 * e->n_blocks; i++)
        e->self[i] += inner(e, i, i, n);
    for (int64_t t = 0; t < e->n_blocks; t++)
        for (int64_t l = 0; l < e->n_blocks; l++)
            e->cross[t * e->n_blocks + l] += inner(e, t, e->n_blocks + l, n);
}

/* Context of 1, 2-3, 4-7 ... tokens: octave k holds positions from 2^k - 1 to 2^(k + 1) - 2. */
static int octave(int64_t position) {
    int k = 0;
    for (int64_t context = position + 1; context > 1; context >>= 1)
        k++;
    return k;
}

/* The losses of one chunk, octave by octave. */
static int add_losses(cq_eval *e, cq_stream *s, const cq_batch *b, int64_t at, int64_t n) {
    int32_t *masked = e->masked.data;
    uint32_t found = 0;
    for (int64_t i = at; i < at + n; i++)
        if (b->labels[i] >= 0)
            found |= 1u << octave(b->positions[i]);
    for (int k = 0; k < N_OCTAVES; k++) {
        if (!(found & 1u << k))
            continue;
        for (int64_t i = 0; i < n; i++)
            masked[i] = octave(b->positions[at + i]) == k ? b->labels[at + i] : -100;
        CQ_TRY(CQ_RUN(s, kl, .dtype = e->dtype, .rows = n, .vocab = e->vocab, .form = CQ_KL_FULL,
                      .teacher = e->zt.data, .student = e->zs.data, .labels = masked, .scale = 1,
                      .sum = &e->kl[k], .nll_teacher = &e->nll_teacher,
                      .nll_student = &e->nll_student, .agree = &e->agree, .valid = &e->valid[k]));
    }
    return CQ_OK;
}

static int add_head(cq_eval *e, cq_stream *s, const cq_batch *b) {
    for (int64_t at = 0; at < b->tokens; at += e->chunk) {
        int64_t n = b->tokens - at < e->chunk ? b->tokens - at : e->chunk;
        CQ_TRY(cq_model_head_forward(e->teacher, s, cq_model_final(e->teacher), at, n, e->zt.data));
        CQ_TRY(cq_model_head_forward(e->student, s, cq_model_final(e->student), at, n, e->zs.data));
        CQ_TRY(add_losses(e, s, b, at, n));
    }
    return CQ_OK;
}

int cq_eval_add(cq_eval *e, cq_stream *s, const cq_batch *b) {
    int64_t found = cq_tap_candidates(e->candidates.data, b);
    int64_t few = found < MAP_ROWS ? found : MAP_ROWS;
    bool map = e->want_map && few >= 4;
    CQ_TRY(cq_model_embed_forward(e->teacher, s, b));
    CQ_TRY(cq_model_embed_forward(e->student, s, b));
    for (int64_t l = 0; l < e->n_blocks; l++) {
        CQ_TRY(cq_model_block_forward(e->teacher, s, b, l));
        CQ_TRY(cq_model_block_forward(e->student, s, b, l));
        CQ_TRY(add_cka(e, s, l, found));
        if (map)
            CQ_TRY(keep_grams(e, s, l, found, few));
    }
    if (map)
        add_map(e, few);
    CQ_TRY(cq_model_norm_forward(e->teacher, s, b));
    CQ_TRY(cq_model_norm_forward(e->student, s, b));
    return add_head(e, s, b);
}

static void finish_map(cq_eval *e) {
    for (int64_t t = 0; t < e->n_blocks; t++)
        for (int64_t l = 0; l < e->n_blocks; l++) {
            double norm = sqrt(e->self[t]) * sqrt(e->self[e->n_blocks + l]);
            e->map[t * e->n_blocks + l] =
                norm > 0 ? e->cross[t * e->n_blocks + l] / norm : (double)NAN;
        }
}

int cq_eval_result_get(cq_eval *e, cq_eval_result *out) {
    double kl = 0;
    int64_t valid = 0, octaves = 0;
    for (int64_t k = 0; k < N_OCTAVES; k++) {
        kl += e->kl[k];
        valid += e->valid[k];
        octaves = e->valid[k] ? k + 1 : octaves;
    }
    if (valid < 1)
        return cq_fail(CQ_EDATA, "compare: no held-out token is a target, wanted at least one");
    double n = (double)valid;
    finish_map(e);
    *out = (cq_eval_result){.kl = kl / n,
                            .top1 = (double)e->agree / n,
                            .tokens = valid,
                            .cka = e->cka,
                            .perplexity_teacher = exp(e->nll_teacher / n),
                            .perplexity_student = exp(e->nll_student / n),
                            .cka_min = INFINITY,
                            .n_octaves = octaves,
                            .octave_kl = e->kl,
                            .octave_tokens = e->valid,
                            .map = e->want_map ? e->map : NULL};
    for (int64_t l = 0; l < e->n_blocks; l++) {
        double norm = sqrt(e->hsic[l][1]) * sqrt(e->hsic[l][2]);
        e->cka[l] = norm > 0 ? e->hsic[l][0] / norm : NAN;
        out->cka_mean += e->cka[l] / (double)e->n_blocks;
        if (e->cka[l] < out->cka_min) {
            out->cka_min = e->cka[l];
            out->cka_min_block = l;
        }
    }
    return isfinite(out->kl) ? CQ_OK : cq_fail(CQ_ENUMERIC, "compare: held-out KL is %g", out->kl);
}
