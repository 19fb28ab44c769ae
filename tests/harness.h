/// harness.h - a small model pair with plan, streams and batches for tests, all in one struct.
#pragma once
#include "core/ckaqad.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

typedef struct harness {
    cq_model *teacher, *student;
    cq_distill *distill;
    cq_adamw *adam;
    cq_plan *plan;
    cq_stream stream;
    cq_batch *batch[2];
    int64_t tokens;
} harness;

typedef struct harness_options {
    const char *dir; ///< below tests/golden
    cq_dtype dtype;
    const char *kernels;
    cq_mode mode;
    cq_quant_options quant; ///< preset NULL: none
    cq_distill_options distill;
    bool no_load; ///< the caller fills the weights
    int threads;
    cq_moments moments;
    cq_master master;
    cq_comm *experts; ///< experts are dealt out over its ranks; NULL: all here
} harness_options;

/// Documents of the given lengths with seeded ids.
static inline cq_batch *harness_batch(const int64_t *lengths, int64_t n_docs, int64_t vocab,
                                      uint64_t seed) {
    int64_t starts[64], tokens = 0;
    for (int64_t i = 0; i < n_docs; i++) {
        starts[i] = tokens;
        tokens += lengths[i];
    }
    starts[n_docs] = tokens;
    int32_t *ids = malloc((size_t)tokens * 4), *labels = malloc((size_t)tokens * 4);
    for (int64_t i = 0; i < tokens; i++)
        ids[i] = (int32_t)cq_random_below(seed, 7, (uint64_t)i, vocab);
    for (int64_t d = 0; d < n_docs; d++)
        for (int64_t i = starts[d]; i < starts[d + 1]; i++)
            labels[i] = i + 1 < starts[d + 1] ? ids[i + 1] : -100;
    cq_batch *b = NULL;
    OK(cq_batch_make(&b, ids, labels, tokens, starts, n_docs));
    free(ids);
    free(labels);
    return b;
}

static inline void harness_open(harness *h, const harness_options *o) {
    char dir[512];
    cq_quant_options q = o->quant;
    cq_distill_options d = o->distill;
    memset(h, 0, sizeof *h);
    if (!q.preset)
        q.preset = "none";
    snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, o->dir);
    int threads = cq_threads_set(o->threads ? o->threads : 1);
    h->stream = (cq_stream){.table = cq_kernels_find(o->kernels), .threads = threads};
    cr_assert_not_null(h->stream.table);
    OK(cq_model_open(&h->teacher, dir, o->dtype));
    OK(cq_model_quantize(&h->student, h->teacher, &q));
    if (o->experts) {
        OK(cq_model_share_experts(h->teacher, o->experts));
        OK(cq_model_share_experts(h->student, o->experts));
    }
    int64_t vocab = cq_model_config(h->teacher)->vocab;
    h->batch[0] = harness_batch((int64_t[]){19, 1, 23}, 3, vocab, 5);
    h->batch[1] = harness_batch((int64_t[]){7, 30}, 2, vocab, 6);
    h->tokens = 43;
    bool *taps = calloc((size_t)cq_model_config(h->teacher)->n_blocks, sizeof *taps);
    for (int64_t l = 0; l < cq_model_config(h->teacher)->n_blocks; l++)
        taps[l] = true;
    if (!d.chunk)
        d.chunk = 16;
    if (!d.rows)
        d.rows = 24;
    d.taps = taps;
    OK(cq_distill_open(&h->distill, h->teacher, h->student, &d));
    free(taps);
    cq_adamw_options adam = {.beta1 = 0.9,
                             .beta2 = 0.95,
                             .eps = 1e-8,
                             .clip = 1,
                             .moments = o->moments,
                             .master = o->master,
                             .seed = 4,
                             .comm = o->experts};
    OK(cq_adamw_open(&h->adam, h->student, &adam));
    OK(cq_plan_open(&h->plan));
    OK(cq_model_plan_params(h->teacher, h->plan, false));
    OK(cq_model_plan_params(h->student, h->plan, true));
    int64_t mark = cq_plan_mark(h->plan, CQ_FOR_SCRATCH);
    OK(cq_model_plan_work(h->teacher, h->plan, h->tokens, h->tokens, CQ_MODE_INFER, threads));
    cq_plan_rewind(h->plan, CQ_FOR_SCRATCH, mark);
    OK(cq_model_plan_work(h->student, h->plan, h->tokens, h->tokens, o->mode, threads));
    OK(cq_distill_plan(h->distill, h->plan, h->tokens));
    OK(cq_adamw_plan(h->adam, h->plan));
    OK(cq_plan_commit(h->plan, 0));
    if (o->no_load)
        return;
    OK(cq_model_load(h->teacher));
    OK(cq_model_load(h->student));
    int64_t unreached;
    OK(cq_model_calibrate_begin(h->student));
    OK(cq_model_forward(h->student, &h->stream, h->batch[0]));
    OK(cq_model_forward(h->student, &h->stream, h->batch[1]));
    OK(cq_model_calibrate_end(h->student, &h->stream, &unreached));
}

static inline void harness_close(harness *h) {
    cq_distill_close(h->distill);
    cq_adamw_close(h->adam);
    cq_model_close(h->student);
    cq_model_close(h->teacher);
    cq_plan_close(h->plan);
    cq_batch_free(h->batch[0]);
    cq_batch_free(h->batch[1]);
}

/// Changes every student parameter a little, so that the losses are not at their minimum.
static inline void harness_disturb(harness *h, double amount) {
    for (int64_t i = 0; i < cq_model_n_params(h->student); i++) {
        cq_param *p = cq_model_param(h->student, i);
        for (int64_t k = 0; k < cq_tensor_elems(p->value) && p->trainable && p->value.data; k++) {
            double f = 1 + amount * cq_random_normal(99, (uint64_t)i, (uint64_t)k);
            if (p->value.dtype == CQ_F64)
                ((double *)p->value.data)[k] *= f;
            else
                ((float *)p->value.data)[k] *= (float)f;
        }
    }
    OK(cq_model_requantize(h->student, &h->stream));
}

/// One step of `micro` micro-batches with equal weights on every tapped block; returns KL of the
/// last.
static inline double harness_step(harness *h, int64_t step, int micro, double w_kl,
                                  double w_layer) {
    int64_t blocks = cq_model_config(h->student)->n_blocks, valid = 0;
    double *w = malloc((size_t)blocks * sizeof *w), norm;
    cq_distill_result r = {0};
    for (int64_t l = 0; l < blocks; l++)
        w[l] = w_layer / (double)blocks;
    for (int i = 0; i < micro; i++)
        valid += h->batch[i]->valid;
    OK(cq_model_zero_grad(h->student));
    for (int i = 0; i < micro; i++) {
        OK(cq_distill_forward(h->distill, &h->stream, h->batch[i], step, i, valid, &r));
        OK(cq_distill_backward(h->distill, &h->stream, h->batch[i], w_kl, w));
    }
    OK(cq_adamw_step(h->adam, &h->stream, 1e-3, step, &norm));
    free(w);
    return r.logit_loss;
}

static inline void harness_add(cq_sha256 *s, cq_tensor t) {
    if (t.data)
        cq_sha256_add(s, t.data, (size_t)cq_tensor_bytes(t));
}

/// SHA-256 over all master weights and moments.
static inline void harness_hash(harness *h, char hex[65]) {
    cq_sha256 s;
    cq_sha256_init(&s);
    for (int64_t i = 0; i < cq_model_n_params(h->student); i++) {
        cq_param *p = cq_model_param(h->student, i);
        harness_add(&s, p->value);
        harness_add(&s, p->low);
        harness_add(&s, p->fq);
        for (int k = 0; k < 2; k++) {
            harness_add(&s, *cq_adamw_moment(h->adam, i, k));
            harness_add(&s, *cq_adamw_scale(h->adam, i, k));
        }
    }
    cq_sha256_hex(&s, hex);
}
