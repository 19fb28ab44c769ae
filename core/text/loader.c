/// loader.c - documents in a seeded order, packed whole into micro-batches.
///
/// The order is one endless list: epoch after epoch, each a permutation of its own (or file order).
/// A micro-batch takes documents from the front of the list until the next one does not fit, so the
/// whole state is one number, the position in the list. An epoch may end inside a micro-batch; with
/// `once` the list is one epoch long.
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/text/corpus.h"

#include <stdlib.h>
#include <string.h>

struct cq_loader {
    const cq_corpus *corpus;
    cq_loader_options options;
    int64_t count, position;
    int64_t *order;    ///< [count] permutation of `epoch`
    int64_t epoch;     ///< -1: none yet
    cq_batch *batches; ///< [n_batches] each with room for `room` tokens and documents
    int64_t n_batches, room;
};

static int check(const cq_corpus *c, const cq_loader_options *o) {
    if (o->seq < 1 || o->batch < 1 || o->micro < 1 || o->batch % o->micro != 0)
        return cq_fail(
            CQ_EUSAGE,
            "data: seq %lld, batch %lld, micro %lld, wanted positive and micro dividing batch",
            (long long)o->seq, (long long)o->batch, (long long)o->micro);
    if (o->seq > INT32_MAX / o->micro)
        return cq_fail(CQ_EUSAGE, "data: micro * seq is %lld * %lld, wanted below 2^31",
                       (long long)o->micro, (long long)o->seq);
    for (int64_t i = 0; i < cq_corpus_count(c); i++) {
        const int32_t *ids;
        const uint8_t *mask;
        int64_t n;
        CQ_TRY(cq_corpus_doc(c, i, &ids, &mask, &n));
        if (n > o->seq)
            return cq_fail(CQ_EDATA, "document %lld: %lld tokens, wanted at most seq = %lld",
                           (long long)i, (long long)n, (long long)o->seq);
    }
    return cq_corpus_count(c) > 0 ? CQ_OK
                                  : cq_fail(CQ_EDATA, "data: no documents, wanted at least one");
}

static int allocate(cq_loader *l) {
    size_t room = (size_t)l->room;
    l->order = malloc((size_t)l->count * sizeof *l->order);
    l->batches = calloc((size_t)l->n_batches, sizeof *l->batches);
    if (!l->order || !l->batches)
        return cq_fail(CQ_ENOMEM, "data: no memory for %lld documents", (long long)l->count);
    for (int64_t i = 0; i < l->n_batches; i++) {
        cq_batch *b = &l->batches[i];
        b->ids = malloc(room * sizeof *b->ids);
        b->labels = malloc(room * sizeof *b->labels);
        b->positions = malloc(room * sizeof *b->positions);
        b->starts = malloc((room + 1) * sizeof *b->starts);
        b->doc = malloc(room * sizeof *b->doc);
        if (!b->ids || !b->labels || !b->positions || !b->starts || !b->doc)
            return cq_fail(CQ_ENOMEM, "data: no memory for micro-batches of %lld tokens",
                           (long long)l->room);
    }
    return CQ_OK;
}

int cq_loader_open(cq_loader **out, const cq_corpus *c, const cq_loader_options *o) {
    *out = NULL;
    CQ_TRY(check(c, o));
    cq_loader *l = calloc(1, sizeof *l);
    if (!l)
        return cq_fail(CQ_ENOMEM, "data: no memory");
    *l = (cq_loader){.corpus = c,
                     .options = *o,
                     .count = cq_corpus_count(c),
                     .epoch = -1,
                     .n_batches = o->batch / o->micro,
                     .room = o->micro * o->seq};
    int status = allocate(l);
    if (status != CQ_OK) {
        cq_loader_close(l);
        return status;
    }
    *out = l;
    return CQ_OK;
}

void cq_loader_close(cq_loader *l) {
    if (!l)
        return;
    for (int64_t i = 0; l->batches && i < l->n_batches; i++) {
        cq_batch *b = &l->batches[i];
        free(b->ids);
        free(b->labels);
        free(b->positions);
        free(b->starts);
        free(b->doc);
    }
    free(l->batches);
    free(l->order);
    free(l);
}

static int64_t document_at(cq_loader *l, int64_t position) {
    int64_t epoch = position / l->count;
    if (!l->options.shuffle)
        return position % l->count;
    if (epoch != l->epoch) {
        cq_random_permutation(l->order, l->count, l->options.seed, (uint64_t)epoch);
        l->epoch = epoch;
    }
    return l->order[position % l->count];
}

static void append(cq_batch *b, int64_t doc, const int32_t *ids, const uint8_t *mask, int64_t n) {
    int64_t at = b->tokens;
    memcpy(b->ids + at, ids, (size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++) {
        bool target = i + 1 < n && mask[i + 1];
        b->labels[at + i] = target ? ids[i + 1] : -100;
        b->positions[at + i] = (int32_t)i;
        b->valid += target;
    }
    b->doc[b->n_docs++] = doc;
    b->tokens += n;
    b->starts[b->n_docs] = b->tokens;
}

static int fill(cq_loader *l, cq_batch *b) {
    b->tokens = b->n_docs = b->valid = 0;
    b->starts[0] = 0;
    while (!l->options.once || l->position < l->count) {
        const int32_t *ids;
        const uint8_t *mask;
        int64_t n, doc = document_at(l, l->position);
        CQ_TRY(cq_corpus_doc(l->corpus, doc, &ids, &mask, &n));
        if (b->tokens + n > l->room)
            break;
        append(b, doc, ids, mask, n);
        l->position++;
    }
    return CQ_OK;
}

int cq_loader_next(cq_loader *l, const cq_batch **out, int64_t *n) {
    *out = l->batches;
    *n = 0;
    if (l->count != cq_corpus_count(l->corpus))
        return cq_fail(CQ_EUSAGE, "data: documents were held out after the loader was opened");
    for (int64_t i = 0; i < l->n_batches; i++) {
        CQ_TRY(fill(l, &l->batches[i]));
        if (l->batches[i].n_docs == 0)
            break;
        ++*n;
    }
    return CQ_OK;
}

int64_t cq_loader_position(const cq_loader *l) { return l->position; }

int cq_loader_seek(cq_loader *l, int64_t position) {
    if (position < 0 || (l->options.once && position > l->count))
        return cq_fail(
            CQ_EUSAGE,
            "data: position %lld, wanted 0 or more (at most %lld documents in a single epoch)",
            (long long)position, (long long)l->count);
    l->position = position;
    return CQ_OK;
}
