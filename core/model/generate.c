/// generate.c - which sequences take part in a pass, and what comes out of it.
///
/// A sequence has `n` known tokens, of which `done` have left their keys and states in its slot. A
/// pass takes from each the next piece of what is pending: one token of a sequence that is being
/// written, up to `piece` of a prompt, cut at multiples of `piece` from its start, so that the
/// arithmetic does not depend on what shares the pass. Where a piece reaches the end, the logits of
/// its last row choose the next token. Samples of one prompt share its pieces: when they are done,
/// the slot is copied.
#include "core/model/generate.h"
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/model/model_impl.h"
#include "core/model/sample.h"
#include "core/tensor/device.h"
#include "core/tensor/graph.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct sequence {
    int32_t *ids;   ///< [n_prompt + max_tokens] prompt, then what was added
    float *logprob; ///< [max_tokens]
    int64_t n_prompt, n_given;
    int64_t n, done;
    int64_t first;   ///< number of the first sample of this prompt
    int64_t samples; ///< of this prompt
    int64_t slot;    ///< -1: waits, or has ended
    bool ended, stopped;
} sequence;

struct cq_generator {
    cq_model *model;
    int64_t slots, room, piece, tokens;
    cq_past past;
    cq_tensor last, rows, logits; ///< [slots, hidden], [slots] I32, [slots, vocab]
    cq_generate_options o;
    int32_t *stop;
    sequence *all;
    int64_t n_all, cap_all, n_ended;
    int64_t waiting;    ///< the first sequence that may wait
    int64_t *in_slot;   ///< [slots] its sequence, -1: free
    cq_batch batch;     ///< of the pass, [tokens]
    int32_t *doc_slot;  ///< [slots] of the pass: slot, past, row of logits
    int32_t *doc_past;  ///< [slots]
    int32_t *doc_last;  ///< [slots] rows whose logits are wanted
    int64_t *row_of;    ///< [slots] sequence of each row of logits
    int64_t *row_place; ///< [slots]
    int64_t n_rows;
    double *wide; ///< [vocab] one row of logits
    cq_candidate *room_for;
    int64_t passes, processed;
    bool begun, broken;
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

int cq_generator_open(cq_generator **out, cq_model *m, int64_t slots, int64_t room) {
    *out = NULL;
    if (slots < 1 || room < 2)
        return cq_fail(CQ_EUSAGE, "generate: %ld slots of %ld tokens, wanted at least 1 of 2",
                       (long)slots, (long)room);
    int64_t most = m->config.max_positions;
    if (most > 0 && room > most)
        return cq_fail(CQ_EUSAGE, "generate: sequences of %ld tokens, %s has %ld positions",
                       (long)room, m->dir, (long)most);
    cq_generator *g = calloc(1, sizeof *g);
    if (!g)
        return cq_fail(CQ_ENOMEM, "generate: no memory");
    g->model = m;
    g->slots = slots;
    g->room = room;
    g->past = (cq_past){.slots = slots, .room = (room + 15) / 16 * 16};
    *out = g;
    return CQ_OK;
}

static void forget(cq_generator *g) {
    for (int64_t i = 0; i < g->n_all; i++) {
        free(g->all[i].ids);
        free(g->all[i].logprob);
    }
    g->n_all = g->n_ended = g->waiting = g->n_rows = g->passes = g->processed = 0;
    for (int64_t i = 0; i < g->slots && g->in_slot; i++)
        g->in_slot[i] = -1;
}

static void free_host(cq_generator *g) {
    void *owned[] = {g->in_slot,      g->batch.ids, g->batch.labels, g->batch.positions,
                     g->batch.starts, g->doc_slot,  g->doc_past,     g->doc_last,
                     g->row_of,       g->row_place, g->wide,         g->room_for};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

void cq_generator_close(cq_generator *g) {
    if (!g)
        return;
    forget(g);
    free_host(g);
    free(g->all);
    free(g->stop);
    free(g);
}

static int take_host(cq_generator *g) {
    size_t slots = (size_t)g->slots, tokens = (size_t)g->tokens;
    free_host(g);
    g->in_slot = calloc(slots, sizeof *g->in_slot);
    g->batch.ids = calloc(tokens, sizeof *g->batch.ids);
    g->batch.labels = calloc(tokens, sizeof *g->batch.labels);
    g->batch.positions = calloc(tokens, sizeof *g->batch.positions);
    g->batch.starts = calloc(slots + 1, sizeof *g->batch.starts);
    g->doc_slot = calloc(slots, sizeof *g->doc_slot);
    g->doc_past = calloc(slots, sizeof *g->doc_past);
    g->doc_last = calloc(slots, sizeof *g->doc_last);
    g->row_of = calloc(slots, sizeof *g->row_of);
    g->row_place = calloc(slots, sizeof *g->row_place);
    g->wide = calloc((size_t)g->model->config.vocab, sizeof *g->wide);
    g->room_for = calloc((size_t)g->model->config.vocab, sizeof *g->room_for);
    if (g->in_slot && g->batch.ids && g->batch.labels && g->batch.positions && g->batch.starts &&
        g->doc_slot && g->doc_past && g->doc_last && g->row_of && g->row_place && g->wide &&
        g->room_for)
        return CQ_OK;
    return cq_fail(CQ_ENOMEM, "generate: no memory for %ld slots", (long)g->slots);
}

int cq_generator_plan(cq_generator *g, cq_plan *p) {
    cq_model *m = g->model;
    cq_purpose purpose = CQ_FOR_GENERATION;
    int64_t chunk = cq_config_count(&m->config, 'M') > 0 ? m->config.chunk : 1;
    g->tokens = m->env.tokens;
    g->piece = min64(m->env.longest, (g->tokens + 1) / 2); /* whatever the number of slots */
    if (g->piece > chunk)
        g->piece -= g->piece % chunk;
    if (g->slots > g->tokens - g->piece + 1)
        return cq_fail(CQ_EUSAGE,
                       "generate: %ld slots, wanted at most %ld for passes of %ld tokens",
                       (long)g->slots, (long)(g->tokens - g->piece + 1), (long)g->tokens);
    for (int64_t i = 0; i < m->n_layers; i++)
        CQ_TRY(cq_layer_plan_past(&m->layer[i], p, g->slots, g->past.room));
    CQ_TRY(cq_plan_add(p, &g->past.slot, purpose, "slots", CQ_I32, CQ_SHAPE1(g->slots)));
    CQ_TRY(cq_plan_add(p, &g->past.past, purpose, "pasts", CQ_I32, CQ_SHAPE1(g->slots)));
    CQ_TRY(cq_plan_add(p, &g->rows, purpose, "last rows", CQ_I32, CQ_SHAPE1(g->slots)));
    CQ_TRY(cq_plan_add(p, &g->last, purpose, "last hidden", m->env.dtype,
                       CQ_SHAPE2(g->slots, m->config.hidden)));
    CQ_TRY(cq_plan_add(p, &g->logits, purpose, "logits", m->env.dtype,
                       CQ_SHAPE2(g->slots, m->config.vocab)));
    return take_host(g);
}

int cq_generator_begin(cq_generator *g, const cq_generate_options *o) {
    if (o->max_tokens < 1 || o->max_tokens >= g->room)
        return cq_fail(CQ_EUSAGE, "generate: max_tokens is %ld, wanted 1 to %ld",
                       (long)o->max_tokens, (long)g->room - 1);
    if (!(o->temperature >= 0 && o->temperature <= 1e6))
        return cq_fail(CQ_EUSAGE, "generate: temperature is %g, wanted 0 to 1e6", o->temperature);
    if (!(o->top_p > 0 && o->top_p <= 1))
        return cq_fail(CQ_EUSAGE, "generate: top_p is %g, wanted above 0 and at most 1", o->top_p);
    for (int64_t i = 0; i < o->n_stop; i++)
        if (o->stop[i] < 0 || o->stop[i] >= g->model->config.vocab)
            return cq_fail(CQ_EUSAGE, "generate: stop token %d, wanted an id below %ld", o->stop[i],
                           (long)g->model->config.vocab);
    if (!g->logits.data || !g->model->h[0].data)
        return cq_fail(CQ_EUSAGE, "generate: %s is used before its plan is committed",
                       g->model->dir);
    if (g->model->env.calibrating)
        return cq_fail(CQ_EUSAGE, "generate: %s is being calibrated", g->model->dir);
    int32_t *stop = malloc((size_t)(o->n_stop + 1) * sizeof *stop);
    if (!stop)
        return cq_fail(CQ_ENOMEM, "generate: no memory");
    if (o->n_stop)
        memcpy(stop, o->stop, (size_t)o->n_stop * sizeof *stop);
    forget(g);
    free(g->stop);
    g->stop = stop;
    g->o = *o;
    g->begun = true;
    g->broken = false;
    return CQ_OK;
}

static int check_ids(const cq_generator *g, const char *what, const int32_t *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= g->model->config.vocab)
            return cq_fail(CQ_EDATA, "generate: %s %ld holds token %d, wanted ids below %ld", what,
                           (long)g->n_all, ids[i], (long)g->model->config.vocab);
    return CQ_OK;
}

static int reserve(cq_generator *g, int64_t more) {
    if (g->n_all + more <= g->cap_all)
        return CQ_OK;
    int64_t cap = g->n_all + more + g->cap_all;
    sequence *all = realloc(g->all, (size_t)cap * sizeof *all);
    if (!all)
        return cq_fail(CQ_ENOMEM, "generate: no memory for %ld sequences", (long)cap);
    g->all = all;
    g->cap_all = cap;
    return CQ_OK;
}

int cq_generator_add(cq_generator *g, const int32_t *prompt, int64_t n, const int32_t *given,
                     int64_t n_given, int64_t samples) {
    int64_t first = g->n_all, most = g->o.max_tokens;
    if (!g->begun)
        return cq_fail(CQ_EUSAGE, "generate: a prompt before begin");
    if (n < 1 || samples < 1 || n_given < 0 || n_given > most)
        return cq_fail(CQ_EUSAGE,
                       "generate: sequence %ld has a prompt of %ld tokens, %ld samples and %ld "
                       "given tokens, wanted at least 1, 1 and at most %ld",
                       (long)first, (long)n, (long)samples, (long)n_given, (long)most);
    if (n > g->room - most)
        return cq_fail(CQ_EUSAGE,
                       "generate: sequence %ld has a prompt of %ld tokens and max_tokens is %ld, "
                       "wanted at most %ld together",
                       (long)first, (long)n, (long)most, (long)g->room);
    CQ_TRY(check_ids(g, "the prompt of sequence", prompt, n));
    CQ_TRY(check_ids(g, "the answer of sequence", given, n_given));
    CQ_TRY(reserve(g, samples));
    for (int64_t i = 0; i < samples; i++) {
        sequence *q = &g->all[g->n_all];
        *q = (sequence){.n_prompt = n,
                        .n_given = n_given,
                        .n = n,
                        .first = first,
                        .samples = samples,
                        .slot = -1,
                        .ids = malloc((size_t)(n + most) * sizeof *q->ids),
                        .logprob = malloc((size_t)most * sizeof *q->logprob)};
        g->n_all++; /* forget frees what there is */
        if (!q->ids || !q->logprob) {
            g->broken = true;
            return cq_fail(CQ_ENOMEM, "generate: no memory for sequence %ld", (long)g->n_all - 1);
        }
        memcpy(q->ids, prompt, (size_t)n * sizeof *prompt);
        if (n_given)
            memcpy(q->ids + n, given, (size_t)n_given * sizeof *given);
    }
    return CQ_OK;
}

/* Tokens of the next piece. */
static int64_t next_piece(const cq_generator *g, const sequence *q) {
    return min64(q->n - q->done, g->piece - q->done % g->piece);
}

static void add_document(cq_generator *g, const sequence *q) {
    cq_batch *b = &g->batch;
    int64_t n = next_piece(g, q), d = b->n_docs++;
    for (int64_t i = 0; i < n; i++) {
        b->ids[b->tokens + i] = q->ids[q->done + i];
        b->labels[b->tokens + i] = -100;
        b->positions[b->tokens + i] = (int32_t)(q->done + i);
    }
    g->doc_slot[d] = (int32_t)q->slot;
    g->doc_past[d] = (int32_t)q->done;
    b->tokens += n;
    b->starts[d + 1] = b->tokens;
}

/* Whether a sequence gets its prompt's states from the first sample, which is at it. */
static bool follows(const cq_generator *g, const sequence *q) {
    const sequence *first = &g->all[q->first];
    return first != q && first->slot >= 0 && first->done < first->n_prompt;
}

/* Free slots that nobody's later samples wait for. */
static int64_t spare_slots(const cq_generator *g) {
    int64_t n = 0;
    for (int64_t i = 0; i < g->slots; i++) {
        const sequence *q = g->in_slot[i] < 0 ? NULL : &g->all[g->in_slot[i]];
        if (!q)
            n++;
        else if (q == &g->all[q->first] && q->done < q->n_prompt)
            n -= q->samples - 1;
    }
    return n;
}

static int64_t free_slot(const cq_generator *g) {
    for (int64_t i = 0; i < g->slots; i++)
        if (g->in_slot[i] < 0)
            return i;
    return -1;
}

static void admit(cq_generator *g, int64_t number, int64_t slot) {
    g->in_slot[slot] = number;
    g->all[number].slot = slot;
}

/* Lets waiting sequences in while slots and the pass have room. */
static void admit_more(cq_generator *g) {
    int64_t spare = spare_slots(g);
    for (int64_t i = g->waiting; i < g->n_all && spare > 0; i++) {
        sequence *q = &g->all[i];
        if (q->slot >= 0 || q->ended || follows(g, q)) {
            g->waiting += i == g->waiting && (q->slot >= 0 || q->ended);
            continue;
        }
        if (g->batch.tokens + next_piece(g, q) > g->tokens)
            return;
        admit(g, i, free_slot(g));
        add_document(g, q);
        spare -= i == q->first ? q->samples : 1;
    }
}

/* The documents of the next pass: tokens of those being written, then pieces of prompts. */
static void compose(cq_generator *g) {
    g->batch.tokens = g->batch.n_docs = g->batch.starts[0] = 0;
    for (int writing = 1; writing >= 0; writing--)
        for (int64_t i = 0; i < g->slots; i++) {
            const sequence *q = g->in_slot[i] < 0 ? NULL : &g->all[g->in_slot[i]];
            if (q && (q->n - q->done == 1) == writing &&
                g->batch.tokens + next_piece(g, q) <= g->tokens)
                add_document(g, q);
        }
    admit_more(g);
}

static int forward_pass(cq_stream *s, void *argument) {
    cq_generator *g = argument;
    cq_model *m = g->model;
    CQ_TRY(cq_model_embed(m, s));
    for (int64_t l = 0; l < m->config.n_blocks; l++)
        CQ_TRY(cq_model_block_forward(m, s, &g->batch, l));
    CQ_TRY(cq_model_norm_forward(m, s, &g->batch));
    if (!g->n_rows)
        return CQ_OK;
    CQ_TRY(CQ_RUN(s, gather_rows, .dtype = m->env.dtype, .rows = g->n_rows, .dim = m->config.hidden,
                  .x = m->xf.data, .index = g->rows.data, .y = g->last.data));
    return cq_model_head_forward(m, s, &g->last, 0, g->n_rows, g->logits.data);
}

/* A pass. Those that write tokens of as many sequences ask for the same operations. */
static int forward(cq_generator *g, cq_stream *s) {
    cq_model *m = g->model;
    cq_batch *b = &g->batch;
    CQ_TRY(cq_copy(g->past.slot.data, g->doc_slot, b->n_docs * (int64_t)sizeof *g->doc_slot));
    CQ_TRY(cq_copy(g->past.past.data, g->doc_past, b->n_docs * (int64_t)sizeof *g->doc_past));
    CQ_TRY(cq_model_take_batch(m, b));
    g->n_rows = 0;
    for (int64_t d = 0; d < b->n_docs; d++) {
        int64_t number = g->in_slot[g->doc_slot[d]];
        sequence *q = &g->all[number];
        q->done += b->starts[d + 1] - b->starts[d];
        if (q->done < q->n)
            continue;
        g->row_of[g->n_rows] = number;
        g->row_place[g->n_rows] = q->n;
        g->doc_last[g->n_rows++] = (int32_t)(b->starts[d + 1] - 1);
    }
    g->passes++;
    g->processed += b->tokens;
    CQ_TRY(cq_copy(g->rows.data, g->doc_last, g->n_rows * (int64_t)sizeof *g->doc_last));
    cq_graph_key key = {g, {b->tokens, b->n_docs, g->n_rows}};
    return cq_model_recordable(m) ? cq_graphs_run(s, &key, forward_pass, g) : forward_pass(s, g);
}

static void end(cq_generator *g, sequence *q, bool stopped) {
    q->ended = true;
    q->stopped = stopped;
    g->in_slot[q->slot] = -1;
    q->slot = -1;
    g->n_ended++;
}

static int fail_at(int status, int64_t number, int64_t place) {
    char where[80];
    snprintf(where, sizeof where, "generate: sequence %ld, after %ld tokens", (long)number,
             (long)place);
    return cq_fail_in(status, where);
}

/* The next token of a sequence, from g->wide. */
static int choose(cq_generator *g, int64_t number) {
    sequence *q = &g->all[number];
    int64_t at = q->n - q->n_prompt, vocab = g->model->config.vocab;
    const cq_generate_options *o = &g->o;
    int32_t drawn, *id = &q->ids[q->n];
    int status = cq_sample(&drawn, g->wide, vocab, o->temperature, o->top_p,
                           cq_random_uniform(o->seed, (uint64_t)number, (uint64_t)at), g->room_for);
    if (status)
        return fail_at(status, number, q->n);
    bool given = at < q->n_given, stops = false;
    if (!given)
        *id = drawn;
    for (int64_t i = 0; i < o->n_stop && !given; i++)
        stops = stops || *id == g->stop[i];
    q->logprob[at] = (float)cq_sample_logprob(g->wide, vocab, *id);
    q->n++;
    if (stops || at + 1 == o->max_tokens)
        end(g, q, stops);
    return CQ_OK;
}

/* The later samples of a prompt whose states are complete, as far as there are slots. */
static int start_samples(cq_generator *g, int64_t number) {
    int64_t from = g->all[number].slot, samples = g->all[number].samples, slot;
    for (int64_t i = number + 1; i < number + samples && (slot = free_slot(g)) >= 0; i++) {
        sequence *q = &g->all[i];
        for (int64_t l = 0; l < g->model->n_layers; l++)
            CQ_TRY(cq_layer_copy_past(&g->model->layer[l], slot, from));
        admit(g, i, slot);
        q->done = q->n_prompt;
        CQ_TRY(choose(g, i));
    }
    return CQ_OK;
}

static int choose_all(cq_generator *g) {
    cq_tensor host;
    void *owned;
    int64_t vocab = g->model->config.vocab;
    int status = cq_tensor_on_host(&host, &owned, g->logits);
    for (int64_t r = 0; r < g->n_rows && !status; r++) {
        int64_t number = g->row_of[r];
        const sequence *q = &g->all[number];
        for (int64_t i = 0; i < vocab; i++)
            g->wide[i] = host.dtype == CQ_F64 ? ((const double *)host.data)[r * vocab + i]
                                              : (double)((const float *)host.data)[r * vocab + i];
        if (number == q->first && q->n == q->n_prompt)
            status = start_samples(g, number); /* before the first one can end */
        if (!status)
            status = choose(g, number);
    }
    free(owned);
    return status;
}

int cq_generator_step(cq_generator *g, cq_stream *s, int64_t *left) {
    *left = g->n_all - g->n_ended;
    if (!g->begun || g->broken)
        return cq_fail(CQ_EUSAGE, "generate: a step %s, wanted begin first",
                       g->broken ? "after one that failed" : "before begin");
    if (!*left)
        return CQ_OK;
    bool again = g->model->env.again;
    compose(g);
    g->model->env.past = &g->past;
    g->model->env.again = true; /* saturated blocks are for training to count */
    s->by_row = true;
    int status = forward(g, s);
    s->by_row = false;
    g->model->env.again = again;
    g->model->env.past = NULL;
    if (!status)
        status = choose_all(g);
    g->broken = status != CQ_OK;
    *left = g->n_all - g->n_ended;
    return status;
}

int cq_generator_run(cq_generator *g, cq_stream *s) {
    int64_t left = 1;
    while (left)
        CQ_TRY(cq_generator_step(g, s, &left));
    return CQ_OK;
}

int64_t cq_generator_count(const cq_generator *g) { return g->n_all; }

int cq_generator_result(const cq_generator *g, int64_t number, cq_generated *out) {
    if (number < 0 || number >= g->n_all)
        return cq_fail(CQ_EUSAGE, "generate: sequence %ld, wanted 0 to %ld", (long)number,
                       (long)g->n_all - 1);
    const sequence *q = &g->all[number];
    *out = (cq_generated){.ids = q->ids + q->n_prompt,
                          .logprob = q->logprob,
                          .n = q->n - q->n_prompt,
                          .ended = q->ended,
                          .stopped = q->stopped};
    return CQ_OK;
}

void cq_generator_rows(const cq_generator *g, cq_generate_rows *out) {
    *out = (cq_generate_rows){
        .n = g->n_rows, .sequence = g->row_of, .place = g->row_place, .logits = &g->logits};
}

void cq_generator_work(const cq_generator *g, int64_t *passes, int64_t *tokens) {
    *passes = g->passes;
    *tokens = g->processed;
}
