/// distill.c - both forwards of a micro-batch, the losses, and the student's backward.
///
/// The teacher runs first and leaves its final hidden state and one Gram (or, for row losses, n
/// rows) per tapped block (layers.c). The head's gradients are made in the forward, chunk by chunk,
/// at weight 1; the backward scales them.
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/tensor/graph.h"
#include "core/train/distill_impl.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a Gram over ranks can be made of. */
static int check_ranks(const cq_distill_options *o) {
    bool gram = o->layer_loss != CQ_LAYER_COSINE && o->layer_loss != CQ_LAYER_MSE;
    return gram && !o->cached_k
               ? CQ_OK
               : cq_fail(CQ_EUSAGE,
                         "distill: a Gram over ranks of %s, wanted layer cka or gram and "
                         "a teacher that runs along",
                         gram ? "cached ones" : "a row loss");
}

/* What a cache can stand in for. */
static int check_cached(const cq_distill_options *o, const cq_config *s) {
    if (o->layer_loss == CQ_LAYER_COSINE || o->layer_loss == CQ_LAYER_MSE)
        return cq_fail(CQ_EUSAGE,
                       "distill: %s needs the teacher's hidden states, a cache holds "
                       "their Grams only: wanted layer cka, gram or none",
                       o->layer_loss == CQ_LAYER_COSINE ? "cosine" : "mse");
    bool whole = o->form == CQ_KL_FULL || o->top_k >= s->vocab;
    if (o->logit_loss == CQ_LOGIT_KL && (whole ? s->vocab : o->top_k) > o->cached_k)
        return cq_fail(CQ_EUSAGE,
                       "distill: %s wants %ld logits a token, the cache holds the %ld largest: "
                       "wanted top_k at most that, and no full KL",
                       whole ? "the full KL" : "top_k", (long)(whole ? s->vocab : o->top_k),
                       (long)o->cached_k);
    return CQ_OK;
}

static int check_pair(const cq_model *teacher, const cq_model *student,
                      const cq_distill_options *o) {
    const cq_config *s = cq_model_config(student), *t = teacher ? cq_model_config(teacher) : NULL;
    if (cq_comm_size(o->comm) > 1)
        CQ_TRY(check_ranks(o));
    if (o->cached_k)
        return check_cached(o, s);
    if (!t)
        return o->logit_loss == CQ_LOGIT_KL || o->layer_loss != CQ_LAYER_NONE
                   ? cq_fail(CQ_EUSAGE, "distill: no teacher, wanted one for KL and layer losses")
                   : CQ_OK;
    if (t->vocab != s->vocab || t->n_blocks != s->n_blocks)
        return cq_fail(CQ_ESHAPE,
                       "distill: teacher has vocabulary %ld and %ld blocks, student %ld and %ld",
                       (long)t->vocab, (long)t->n_blocks, (long)s->vocab, (long)s->n_blocks);
    if (t->hidden != s->hidden &&
        (o->layer_loss == CQ_LAYER_COSINE || o->layer_loss == CQ_LAYER_MSE))
        return cq_fail(CQ_ESHAPE,
                       "distill: hidden sizes are %ld and %ld, wanted equal ones for a row loss",
                       (long)t->hidden, (long)s->hidden);
    return CQ_OK;
}

int cq_distill_open(cq_distill **out, cq_model *teacher, cq_model *student,
                    const cq_distill_options *o) {
    *out = NULL;
    CQ_TRY(check_pair(teacher, student, o));
    if (o->chunk < 1 || (o->layer_loss != CQ_LAYER_NONE && o->rows < 4))
        return cq_fail(CQ_EUSAGE, "distill: chunk is %ld and rows %ld, wanted at least 1 and 4",
                       (long)o->chunk, (long)o->rows);
    cq_distill *d = calloc(1, sizeof *d);
    if (!d)
        return cq_fail(CQ_ENOMEM, "distill: no memory");
    d->teacher = o->cached_k ? NULL : teacher;
    d->student = student;
    d->o = *o;
    d->dtype = cq_model_dtype(student);
    d->n_blocks = cq_model_config(student)->n_blocks;
    d->dim = cq_model_config(student)->hidden;
    d->teacher_dim = d->teacher ? cq_model_config(teacher)->hidden : 0;
    d->vocab = cq_model_config(student)->vocab;
    size_t n = (size_t)d->n_blocks;
    d->taps = calloc(n, sizeof *d->taps);
    d->tap_of = calloc(n, sizeof *d->tap_of);
    d->summed = calloc(n, sizeof *d->summed);
    d->loss = calloc(n, sizeof *d->loss);
    d->weight = calloc(n, sizeof *d->weight);
    d->o.slots = o->slots > 1 ? o->slots : 1;
    d->kept = calloc((size_t)d->o.slots, sizeof *d->kept);
    bool many = cq_comm_size(o->comm) > 1 && o->layer_loss != CQ_LAYER_NONE;
    if (many)
        d->of_rank = calloc((size_t)cq_comm_size(o->comm), sizeof *d->of_rank);
    if (many)
        d->piece = calloc((size_t)cq_comm_size(o->comm), sizeof *d->piece);
    if (!d->taps || !d->tap_of || !d->summed || !d->loss || !d->weight || !d->kept ||
        (many && (!d->of_rank || !d->piece))) {
        cq_distill_close(d);
        return cq_fail(CQ_ENOMEM, "distill: no memory");
    }
    if (o->layer_loss != CQ_LAYER_NONE && o->taps)
        memcpy(d->taps, o->taps, n * sizeof *d->taps);
    for (int64_t l = 0; l < d->n_blocks; l++)
        d->tap_of[l] = d->taps[l] ? (int32_t)d->n_taps++ : -1;
    for (int64_t i = 0; i < d->n_taps; i++)
        d->summed[i] = o->order ? d->tap_of[o->order[i]] : (int32_t)i;
    d->o.order = NULL;
    d->o.taps = d->taps;
    *out = d;
    return CQ_OK;
}

void cq_distill_close(cq_distill *d) {
    if (!d)
        return;
    free(d->taps);
    free(d->tap_of);
    free(d->summed);
    free(d->sampled);
    free(d->loss);
    free(d->weight);
    free(d->kept);
    free(d->of_rank);
    free(d->piece);
    free(d->from);
    cq_cached_room_close(&d->room);
    cq_cached_close(&d->file);
    free(d);
}

int cq_distill_plan(cq_distill *d, cq_plan *p, int64_t tokens) {
    if (d->o.chunk > tokens)
        d->o.chunk = tokens;
    if (d->o.cached_k)
        CQ_TRY(cq_cached_plan(&d->room, p, tokens, d->o.chunk, d->o.cached_k, d->dtype));
    if (d->o.logit_loss == CQ_LOGIT_KL && !d->o.cached_k)
        CQ_TRY(cq_plan_add(p, &d->zt, CQ_FOR_LOGITS, "teacher logits", d->dtype,
                           CQ_SHAPE2(d->o.chunk, d->vocab)));
    if (d->o.logit_loss != CQ_LOGIT_NONE)
        CQ_TRY(cq_plan_add(p, &d->zs, CQ_FOR_LOGITS, "student logits", d->dtype,
                           CQ_SHAPE2(d->o.chunk, d->vocab)));
    if (d->o.logit_loss == CQ_LOGIT_POLICY)
        CQ_TRY(cq_plan_add(p, &d->weights, CQ_FOR_LOGITS, "weights of the labels", CQ_F32,
                           CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &d->sums, CQ_FOR_LOGITS, "logit loss", CQ_F64, CQ_SHAPE1(1)));
    CQ_TRY(cq_plan_add(p, &d->counts, CQ_FOR_LOGITS, "right answers", CQ_I64, CQ_SHAPE1(1)));
    CQ_TRY(cq_plan_add(p, &d->report, CQ_FOR_RESULTS, "losses", CQ_F64,
                       CQ_SHAPE2(d->o.slots, 3 + d->n_taps)));
    CQ_TRY(cq_plan_add(p, &d->square, CQ_FOR_RESULTS, "squared norm", CQ_F64, CQ_SHAPE1(1)));
    CQ_TRY(cq_plan_add(p, &d->dxf, CQ_FOR_LOGITS, "final hidden gradient", d->dtype,
                       CQ_SHAPE2(tokens, d->dim)));
    if (d->o.many && cq_model_head(d->student)->trainable)
        CQ_TRY(cq_plan_add(p, &d->dhead, CQ_FOR_LOGITS, "head gradient of one micro-batch",
                           d->dtype, CQ_SHAPE2(d->vocab, d->dim)));
    return d->o.layer_loss == CQ_LAYER_NONE ? CQ_OK : cq_layers_plan(d, p, tokens);
}

int cq_distill_set_weights(cq_distill *d, const float *weights, int64_t n) {
    if (d->o.logit_loss != CQ_LOGIT_POLICY || n < 1 || n > cq_tensor_elems(d->weights))
        return cq_fail(CQ_EUSAGE,
                       "distill: %ld weights given, wanted at most the planned tokens and a policy "
                       "loss",
                       (long)n);
    d->n_weights = n;
    return cq_copy(d->weights.data, weights, n * (int64_t)sizeof *weights);
}

/* Puts the step, and whose pass it was, before a message about numbers. */
static int in_step(const cq_distill *d, int status, const char *who) {
    char where[64];
    snprintf(where, sizeof where, "step %ld, %s", (long)d->step, who);
    return status == CQ_ENUMERIC ? cq_fail_in(status, where) : status;
}

static int forward(cq_distill *d, cq_stream *s, const cq_batch *b, bool teacher) {
    cq_model *m = teacher ? d->teacher : d->student;
    d->in_slab = 0;
    CQ_TRY(cq_model_embed(m, s));
    for (int64_t l = 0; l < d->n_blocks; l++) {
        CQ_TRY(cq_model_block_forward(m, s, b, l));
        if (cq_layers_has(d, l))
            CQ_TRY(cq_layers_tap(d, s, l, teacher));
    }
    return cq_model_norm_forward(m, s, b);
}

/* Loss of one chunk of tokens; leaves the gradient of the final hidden state and the head. */
static int head_chunk(cq_distill *d, cq_stream *s, const cq_batch *b, int64_t at) {
    const int32_t *labels = cq_model_batch(d->student)->labels + at;
    int64_t n = b->tokens - at < d->o.chunk ? b->tokens - at : d->o.chunk;
    int64_t size = cq_dtype_bytes(d->dtype);
    double scale = 1.0 / (double)d->valid_total;
    const cq_tensor *xf = cq_model_final(d->student);
    cq_param *head = cq_model_head(d->student);
    CQ_TRY(cq_model_head_forward(d->student, s, xf, at, n, d->zs.data));
    if (d->o.logit_loss == CQ_LOGIT_KL && d->o.cached_k) {
        cq_kl_cached_args a = {.dtype = d->dtype,
                               .rows = n,
                               .vocab = d->vocab,
                               .form = d->o.form,
                               .top_k = d->o.top_k,
                               .student = d->zs.data,
                               .labels = labels,
                               .scale = scale,
                               .gradient = true,
                               .sum = d->sums.data,
                               .agree = d->counts.data};
        CQ_TRY(cq_cached_chunk(&a, &d->room, &d->file, b, at, n));
        CQ_TRY(s->table->kl_cached(s, &a));
    } else if (d->o.logit_loss == CQ_LOGIT_KL) {
        CQ_TRY(cq_model_head_forward(d->teacher, s, cq_model_final(d->teacher), at, n, d->zt.data));
        CQ_TRY(CQ_RUN(s, kl, .dtype = d->dtype, .rows = n, .vocab = d->vocab, .form = d->o.form,
                      .top_k = d->o.top_k, .teacher = d->zt.data, .student = d->zs.data,
                      .labels = labels, .scale = scale, .gradient = true, .sum = d->sums.data,
                      .agree = d->counts.data));
    } else
        CQ_TRY(CQ_RUN(s, cross_entropy, .dtype = d->dtype, .rows = n, .vocab = d->vocab,
                      .logits = d->zs.data, .labels = labels,
                      .weights = d->weights.data ? (const float *)d->weights.data + at : NULL,
                      .scale = scale, .gradient = true, .sum = d->sums.data,
                      .correct = d->counts.data));
    CQ_TRY(CQ_RUN(s, matmul, .dtype = d->dtype, .m = n, .n = d->dim, .k = d->vocab, .a = d->zs.data,
                  .lda = d->vocab, .b = cq_param_wide(head), .ldb = d->dim,
                  .c = (char *)d->dxf.data + at * d->dim * size, .ldc = d->dim, .alpha = 1,
                  .b16 = head->fq16.data));
    void *grad = d->o.many ? d->dhead.data : head->grad.data;
    if (!grad)
        return CQ_OK;
    return CQ_RUN(s, matmul, .dtype = d->dtype, .ta = true, .m = d->vocab, .n = d->dim, .k = n,
                  .a = d->zs.data, .lda = d->vocab, .b = (char *)xf->data + at * d->dim * size,
                  .ldb = d->dim, .c = grad, .ldc = d->dim, .alpha = 1, .beta = at > 0);
}

static bool all_finite(const cq_tensor *whole, int64_t n) {
    cq_tensor t;
    void *owned;
    bool finite = true;
    if (cq_tensor_on_host(&t, &owned, *whole))
        return true;
    for (int64_t i = 0; i < n && finite; i++)
        finite = isfinite(t.dtype == CQ_F64 ? ((const double *)t.data)[i]
                                            : (double)((const float *)t.data)[i]);
    free(owned);
    return finite;
}

/* Names the first place where a number went wrong. */
static int not_finite(cq_distill *d, const cq_batch *b, int64_t step, const char *what,
                      double value) {
    if (d->teacher && !all_finite(cq_model_final(d->teacher), b->tokens * d->teacher_dim))
        return cq_fail(CQ_ENUMERIC, "step %ld: %s is %g; the teacher's output is not finite",
                       (long)step, what, value);
    for (int64_t l = 0; l < d->n_blocks; l++)
        if (!all_finite(cq_model_hidden(d->student, l), b->tokens * d->dim))
            return cq_fail(CQ_ENUMERIC,
                           "step %ld: %s is %g; the first output that is not finite is block %ld's",
                           (long)step, what, value, (long)l);
    return cq_fail(CQ_ENUMERIC,
                   "step %ld: %s is %g; every block's output is finite, the head's%s is not",
                   (long)step, what, value, d->o.cached_k ? " or the cached teacher's" : "");
}

static int check_losses(cq_distill *d, const cq_batch *b, int64_t step, double logit_loss) {
    if (!isfinite(logit_loss))
        return not_finite(d, b, step, d->o.logit_loss == CQ_LOGIT_KL ? "KL" : "cross-entropy",
                          logit_loss);
    for (int64_t l = 0; l < d->n_blocks; l++)
        if (cq_layers_has(d, l) && !isfinite(d->loss[l]))
            return not_finite(d, b, step, "a layer loss", d->loss[l]);
    return CQ_OK;
}

int cq_distill_from(cq_distill *d, const char *path) {
    char *copy = strdup(path);
    if (!copy)
        return cq_fail(CQ_ENOMEM, "distill: no memory");
    free(d->from);
    d->from = copy;
    return CQ_OK;
}

/* The teacher's part of this micro-batch, from its file; once for each cq_distill_from. */
static int read_teacher(cq_distill *d, const cq_batch *b) {
    if (!d->from)
        return cq_fail(CQ_EUSAGE, "distill: no file for this micro-batch, wanted cq_distill_from");
    cq_cached_close(&d->file);
    int status = cq_cached_open(&d->file, d->from, b, d->dtype, d->vocab);
    free(d->from);
    d->from = NULL;
    CQ_TRY(status);
    if (d->file.k != d->o.cached_k)
        return cq_fail(CQ_EDATA, "%s: holds %ld entries a token, wanted %ld", d->file.path,
                       (long)d->file.k, (long)d->o.cached_k);
    if (d->o.layer_loss == CQ_LAYER_NONE)
        return CQ_OK;
    CQ_TRY(cq_cached_check_rows(&d->file, d->sampled, d->n_rows));
    if (d->file.n_groups != 1 || d->file.groups[0] != d->n_rows)
        return cq_fail(CQ_EDATA, "%s: its rows are in %ld groups, wanted one Gram of all",
                       d->file.path, (long)d->file.n_groups);
    for (int64_t l = 0; l < d->n_blocks; l++)
        if (cq_layers_has(d, l))
            CQ_TRY(cq_cached_gram(&d->file, l, 0, d->o.layer_loss == CQ_LAYER_CKA_UNBIASED,
                                  d->dtype, cq_layers_of_teacher(d, l)));
    return CQ_OK;
}

/* What the two passes of a micro-batch work with. */
typedef struct work {
    cq_distill *d;
    const cq_batch *b;
    double w_kl;
} work;

static int forward_pass(cq_stream *s, void *argument) {
    const work *w = argument;
    cq_distill *d = w->d;
    if (d->teacher)
        CQ_TRY(in_step(d, forward(d, s, w->b, true), "teacher"));
    CQ_TRY(in_step(d, forward(d, s, w->b, false), "student"));
    if (d->o.logit_loss == CQ_LOGIT_NONE)
        return cq_zero(d->dxf.data, w->b->tokens * d->dim * cq_dtype_bytes(d->dtype));
    for (int64_t at = 0; at < w->b->tokens; at += d->o.chunk)
        CQ_TRY(head_chunk(d, s, w->b, at));
    return CQ_OK;
}

enum { FORWARD, BACKWARD, TAPS_IN_KEY = 64 };

/* Runs a pass, or plays what it asked for when its numbers were the same. */
static int run(cq_distill *d, cq_stream *s, int which, cq_pass pass, work *w) {
    cq_graph_key key = {d, {which, w->b->tokens, w->b->n_docs, d->n_rows}};
    bool records = !d->of_rank && !d->o.cached_k && d->n_taps <= TAPS_IN_KEY &&
                   cq_model_recordable(d->student) &&
                   (!d->teacher || cq_model_recordable(d->teacher));
    if (which == FORWARD)
        key.n[4] = d->valid_total;
    else {
        memcpy(&key.n[4], &w->w_kl, sizeof w->w_kl);
        for (int64_t i = 0; i < d->n_taps && records; i++)
            if (d->weight[i] != 0)
                key.n[5] = (int64_t)((uint64_t)key.n[5] | (uint64_t)1 << i);
    }
    return records ? cq_graphs_run(s, &key, pass, w) : pass(s, w);
}

int cq_distill_start(cq_distill *d, cq_stream *s, const cq_batch *b, int64_t step, int64_t micro,
                     int64_t valid_total, int64_t slot) {
    if (b->valid < 1 || valid_total < b->valid)
        return cq_fail(
            CQ_EDATA,
            "distill: %ld of %ld tokens of a micro-batch are targets, wanted at least one",
            (long)b->valid, (long)valid_total);
    if (d->o.logit_loss == CQ_LOGIT_POLICY && d->n_weights != b->tokens)
        return cq_fail(CQ_EUSAGE, "distill: weights of %ld labels, wanted those of %ld tokens",
                       (long)d->n_weights, (long)b->tokens);
    if (slot < 0 || slot >= d->o.slots)
        return cq_fail(CQ_EUSAGE, "distill: slot is %ld, wanted 0 to %ld", (long)slot,
                       (long)d->o.slots - 1);
    d->n_weights = 0;
    d->slot = slot;
    d->step = step;
    d->valid = b->valid;
    d->valid_total = valid_total;
    d->n_rows = d->n_gram = 0;
    if (d->o.layer_loss != CQ_LAYER_NONE)
        CQ_TRY(cq_layers_sample(d, b, step, micro));
    CQ_TRY(cq_zero(d->sums.data, cq_tensor_bytes(d->sums)));
    CQ_TRY(cq_zero(d->counts.data, cq_tensor_bytes(d->counts)));
    if (d->o.cached_k)
        CQ_TRY(read_teacher(d, b));
    if (d->teacher)
        CQ_TRY(in_step(d, cq_model_take_batch(d->teacher, b), "teacher"));
    CQ_TRY(in_step(d, cq_model_take_batch(d->student, b), "student"));
    CQ_TRY(run(d, s, FORWARD, forward_pass, &(work){d, b, 1}));
    d->kept[slot].valid = b->valid;
    d->kept[slot].rows = d->n_gram;
    return cq_layers_report(d, s, false, 0);
}

int cq_distill_read(cq_distill *d, int64_t slot, cq_distill_result *out) {
    if (slot < 0 || slot >= d->o.slots || !d->kept[slot].valid)
        return cq_fail(CQ_EUSAGE, "distill: nothing in slot %ld of %ld", (long)slot,
                       (long)d->o.slots);
    const double *report = (const double *)d->report.data + slot * (3 + d->n_taps);
    int64_t valid = d->kept[slot].valid, rows = d->kept[slot].rows;
    for (int64_t l = 0; l < d->n_blocks; l++)
        d->loss[l] = d->taps[l] && rows >= 4 ? report[3 + d->tap_of[l]] : NAN;
    *out = (cq_distill_result){.logit_loss = report[0] / (double)valid,
                               .accuracy = report[1] / (double)valid,
                               .valid = valid,
                               .rows = rows,
                               .layer_loss = d->loss,
                               .weight = report[2]};
    return CQ_OK;
}

int cq_distill_forward(cq_distill *d, cq_stream *s, const cq_batch *b, int64_t step, int64_t micro,
                       int64_t valid_total, cq_distill_result *out) {
    CQ_TRY(cq_distill_start(d, s, b, step, micro, valid_total, 0));
    CQ_TRY(cq_stream_wait(s));
    CQ_TRY(cq_distill_read(d, 0, out));
    return check_losses(d, b, step, out->logit_loss);
}

static int scale_head(cq_distill *d, cq_stream *s, double w) {
    int64_t n = d->vocab * d->dim;
    cq_tensor *grad = &cq_model_head(d->student)->grad;
    if (!grad->data || d->o.logit_loss == CQ_LOGIT_NONE)
        return CQ_OK;
    if (d->o.many)
        return CQ_RUN(s, axpy, .dtype = d->dtype, .n = n, .alpha = w, .beta = 1, .x = d->dhead.data,
                      .y = grad->data);
    return w == 1 ? CQ_OK
                  : CQ_RUN(s, axpy, .dtype = d->dtype, .n = n, .alpha = w, .x = grad->data,
                           .y = grad->data);
}

static int backward_pass(cq_stream *s, void *argument) {
    const work *w = argument;
    cq_distill *d = w->d;
    const cq_batch *b = w->b;
    void *dx;
    CQ_TRY(scale_head(d, s, w->w_kl));
    if (w->w_kl != 1)
        CQ_TRY(CQ_RUN(s, axpy, .dtype = d->dtype, .n = b->tokens * d->dim, .alpha = w->w_kl,
                      .x = d->dxf.data, .y = d->dxf.data));
    CQ_TRY(cq_model_norm_backward(d->student, s, b, d->dxf.data));
    for (int64_t l = d->n_blocks - 1; l >= 0; l--) {
        CQ_TRY(cq_layers_gradient(d, s, l, &dx));
        if (dx)
            CQ_TRY(CQ_RUN(s, scatter_rows, .dtype = d->dtype, .rows = d->n_rows, .dim = d->dim,
                          .y = dx, .index = d->rows.data, .x = cq_model_dhidden(d->student)->data));
        CQ_TRY(in_step(d, cq_model_block_backward(d->student, s, b, l), "student"));
    }
    return cq_model_embed_backward(d->student, s, b);
}

/* With the layer losses weighed. */
static int backward(cq_distill *d, cq_stream *s, const cq_batch *b, double w_kl) {
    return run(d, s, BACKWARD, backward_pass, &(work){d, b, w_kl});
}

int cq_distill_backward(cq_distill *d, cq_stream *s, const cq_batch *b, double w_kl,
                        const double *w_layer) {
    CQ_TRY(cq_layers_weigh(d, w_layer));
    return backward(d, s, b, w_kl);
}

int cq_distill_backward_ratio(cq_distill *d, cq_stream *s, const cq_batch *b, double most) {
    if (d->of_rank)
        return cq_fail(CQ_EUSAGE, "distill: ratio with a Gram over ranks, wanted weights");
    CQ_TRY(cq_layers_report(d, s, true, most));
    return backward(d, s, b, 1);
}

int cq_distill_serve(cq_distill *d, cq_stream *s) {
    if (d->teacher)
        CQ_TRY(cq_model_serve_forward(d->teacher, s));
    CQ_TRY(cq_model_serve_forward(d->student, s));
    return cq_model_serve_backward(d->student, s);
}

static int norm_of(cq_distill *d, cq_stream *s, const void *x, int64_t n, double *out) {
    double *sum = d->square.data;
    *sum = 0;
    CQ_TRY(CQ_RUN(s, sumsq, .dtype = d->dtype, .n = n, .x = x, .out = sum));
    CQ_TRY(cq_stream_wait(s));
    *out = sqrt(*sum);
    return CQ_OK;
}

static int measure(cq_distill *d, cq_stream *s, const cq_batch *b, double *kl, double *layer) {
    void *dx;
    if (d->of_rank)
        return cq_fail(CQ_EUSAGE, "distill: gradient norms with a Gram over ranks, wanted one of "
                                  "each micro-batch");
    for (int64_t l = 0; l < d->n_blocks; l++)
        layer[l] = 1;
    CQ_TRY(cq_layers_weigh(d, layer));
    CQ_TRY(cq_model_norm_backward(d->student, s, b, d->dxf.data));
    for (int64_t l = d->n_blocks - 1; l >= 0; l--) {
        kl[l] = layer[l] = 0;
        CQ_TRY(cq_layers_gradient(d, s, l, &dx));
        if (dx) {
            CQ_TRY(norm_of(d, s, cq_model_dhidden(d->student)->data, b->tokens * d->dim, &kl[l]));
            CQ_TRY(norm_of(d, s, dx, d->n_rows * d->dim, &layer[l]));
        }
        CQ_TRY(cq_model_block_backward(d->student, s, b, l));
    }
    return CQ_OK;
}

int cq_distill_norms(cq_distill *d, cq_stream *s, const cq_batch *b, double *kl, double *layer) {
    cq_model_input_only(d->student, true);
    int status = measure(d, s, b, kl, layer);
    cq_model_input_only(d->student, false);
    return status;
}
