/// eval.c - how far a student is from its teacher on held-out documents.
///
///     KL, negative log-likelihood, top-1 over labelled tokens;   CKA_l = sum HSIC_1(K, L) /
///     sqrt(sum HSIC_1(K, K) sum HSIC_1(L, L))
///
/// Both models run in lock-step, block by block, so that one pair of Grams is alive. The sums over
/// groups of at most 512 rows estimate the CKA of all rows without a bias from the group size
/// (Nguyen et al. 2021, arXiv 2010.15327 eq. 3).
#include "core/base/error.h"
#include "core/train/taps.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP_ROWS = 512 };

struct cq_eval {
    cq_model *teacher, *student;
    cq_dtype dtype;
    int64_t n_blocks, vocab, chunk;
    cq_tensor zt, zs, candidates, xs, centred, k, l;
    double (*hsic)[3]; ///< [n_blocks] sums of <K, L>, <K, K>, <L, L>
    double *cka;
    double kl, nll_teacher, nll_student;
    int64_t agree, valid;
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
    }
    if (!e || !e->hsic || !e->cka) {
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
    free(e);
}

int cq_eval_plan(cq_eval *e, cq_plan *p, int64_t tokens, int64_t chunk) {
    int64_t n = tokens < GROUP_ROWS ? tokens : GROUP_ROWS;
    int64_t dim = cq_model_config(e->teacher)->hidden, other = cq_model_config(e->student)->hidden;
    if (other > dim)
        dim = other;
    e->chunk = chunk < tokens ? chunk : tokens;
    CQ_TRY(cq_plan_add(p, &e->zt, CQ_FOR_LOGITS, "teacher logits", e->dtype,
                       CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->zs, CQ_FOR_LOGITS, "student logits", e->dtype,
                       CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->candidates, CQ_FOR_CKA, "held-out rows", CQ_I32, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &e->xs, CQ_FOR_CKA, "rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->centred, CQ_FOR_CKA, "centred rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->k, CQ_FOR_CKA, "student's Gram", e->dtype, CQ_SHAPE2(n, n)));
    return cq_plan_add(p, &e->l, CQ_FOR_CKA, "teacher's Gram", e->dtype, CQ_SHAPE2(n, n));
}

void cq_eval_reset(cq_eval *e) {
    memset(e->hsic, 0, (size_t)e->n_blocks * sizeof *e->hsic);
    e->kl = e->nll_teacher = e->nll_student = 0;
    e->agree = e->valid = 0;
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

static int add_head(cq_eval *e, cq_stream *s, const cq_batch *b) {
    for (int64_t at = 0; at < b->tokens; at += e->chunk) {
        int64_t n = b->tokens - at < e->chunk ? b->tokens - at : e->chunk;
        CQ_TRY(cq_model_head_forward(e->teacher, s, cq_model_final(e->teacher), at, n, e->zt.data));
        CQ_TRY(cq_model_head_forward(e->student, s, cq_model_final(e->student), at, n, e->zs.data));
        CQ_TRY(CQ_RUN(s, kl, .dtype = e->dtype, .rows = n, .vocab = e->vocab, .form = CQ_KL_FULL,
                      .teacher = e->zt.data, .student = e->zs.data, .labels = b->labels + at,
                      .scale = 1, .sum = &e->kl, .nll_teacher = &e->nll_teacher,
                      .nll_student = &e->nll_student, .agree = &e->agree, .valid = &e->valid));
    }
    return CQ_OK;
}

int cq_eval_add(cq_eval *e, cq_stream *s, const cq_batch *b) {
    int64_t found = cq_tap_candidates(e->candidates.data, b);
    CQ_TRY(cq_model_embed_forward(e->teacher, s, b));
    CQ_TRY(cq_model_embed_forward(e->student, s, b));
    for (int64_t l = 0; l < e->n_blocks; l++) {
        CQ_TRY(cq_model_block_forward(e->teacher, s, b, l));
        CQ_TRY(cq_model_block_forward(e->student, s, b, l));
        CQ_TRY(add_cka(e, s, l, found));
    }
    CQ_TRY(cq_model_norm_forward(e->teacher, s, b));
    CQ_TRY(cq_model_norm_forward(e->student, s, b));
    return add_head(e, s, b);
}

int cq_eval_result_get(cq_eval *e, cq_eval_result *out) {
    double n = (double)e->valid;
    if (e->valid < 1)
        return cq_fail(CQ_EDATA, "compare: no held-out token is a target, wanted at least one");
    *out = (cq_eval_result){.kl = e->kl / n,
                            .top1 = (double)e->agree / n,
                            .tokens = e->valid,
                            .cka = e->cka,
                            .perplexity_teacher = exp(e->nll_teacher / n),
                            .perplexity_student = exp(e->nll_student / n),
                            .cka_min = INFINITY};
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
