/// batch.c - a micro-batch from ids that are already packed.
#include "core/text/batch.h"

#include "core/base/error.h"
#include "core/text/corpus.h"

#include <stdlib.h>
#include <string.h>

static int check_starts(const int64_t *starts, int64_t n_docs, int64_t tokens) {
    if (tokens < 1 || n_docs < 1 || starts[0] != 0)
        return cq_fail(
            CQ_EUSAGE,
            "batch: %lld tokens in %lld documents, wanted at least one, the first from 0",
            (long long)tokens, (long long)n_docs);
    for (int64_t i = 0; i < n_docs; i++) {
        int64_t end = i + 1 < n_docs ? starts[i + 1] : tokens;
        if (starts[i] >= end)
            return cq_fail(CQ_EUSAGE,
                           "batch: document %lld is [%lld, %lld), wanted at least one token",
                           (long long)i, (long long)starts[i], (long long)end);
    }
    return CQ_OK;
}

static void fill(cq_batch *b, const int32_t *ids, const int32_t *labels, const int64_t *starts) {
    memcpy(b->ids, ids, (size_t)b->tokens * sizeof *ids);
    memcpy(b->starts, starts, (size_t)b->n_docs * sizeof *starts);
    b->starts[b->n_docs] = b->tokens;
    for (int64_t d = 0; d < b->n_docs; d++) {
        b->doc[d] = d;
        for (int64_t i = starts[d]; i < b->starts[d + 1]; i++) {
            bool last = i + 1 == b->starts[d + 1];
            b->positions[i] = (int32_t)(i - starts[d]);
            b->labels[i] = labels ? labels[i] : last ? -100 : ids[i + 1];
            b->valid += b->labels[i] >= 0;
        }
    }
}

int cq_batch_make(cq_batch **out, const int32_t *ids, const int32_t *labels, int64_t tokens,
                  const int64_t *starts, int64_t n_docs) {
    *out = NULL;
    CQ_TRY(check_starts(starts, n_docs, tokens));
    cq_batch *b = calloc(1, sizeof *b);
    if (!b)
        return cq_fail(CQ_ENOMEM, "batch: no memory");
    *b = (cq_batch){.tokens = tokens,
                    .n_docs = n_docs,
                    .ids = malloc((size_t)tokens * sizeof *b->ids),
                    .labels = malloc((size_t)tokens * sizeof *b->labels),
                    .positions = malloc((size_t)tokens * sizeof *b->positions),
                    .starts = malloc((size_t)(n_docs + 1) * sizeof *b->starts),
                    .doc = malloc((size_t)n_docs * sizeof *b->doc)};
    if (!b->ids || !b->labels || !b->positions || !b->starts || !b->doc) {
        cq_batch_free(b);
        return cq_fail(CQ_ENOMEM, "batch: no memory for %lld tokens", (long long)tokens);
    }
    fill(b, ids, labels, starts);
    *out = b;
    return CQ_OK;
}

void cq_batch_free(cq_batch *b) {
    if (!b)
        return;
    free(b->ids);
    free(b->labels);
    free(b->positions);
    free(b->starts);
    free(b->doc);
    free(b);
}
