/// bpe.c - byte pair encoding of one word with a priority queue.
///
/// The pair of lowest rank is merged first, the leftmost among equals. A queue entry goes stale
/// when one of its symbols was merged meanwhile; it is recognised when popped, because its pair
/// then no longer gives the id it promised.
#include "core/base/error.h"
#include "core/text/vocab.h"

#include <stdlib.h>

void cq_bpe_free(cq_bpe_scratch *s) {
    free(s->symbols);
    free(s->heap);
    *s = (cq_bpe_scratch){0};
}

static int make_room(cq_bpe_scratch *s, int64_t n) {
    if (n <= s->room)
        return CQ_OK;
    int64_t room = n + n / 2 + 64;
    cq_symbol *symbols = realloc(s->symbols, (size_t)room * sizeof *symbols);
    if (!symbols)
        return cq_fail(CQ_ENOMEM, "tokenizer: no memory for a word of %lld bytes", (long long)n);
    s->symbols = symbols;
    // every merge removes one symbol and queues at most two pairs, so 3n entries are enough
    cq_candidate *heap = realloc(s->heap, (size_t)(3 * room) * sizeof *heap);
    if (!heap)
        return cq_fail(CQ_ENOMEM, "tokenizer: no memory for a word of %lld bytes", (long long)n);
    s->heap = heap;
    s->room = room;
    return CQ_OK;
}

static bool before(cq_candidate a, cq_candidate b) {
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void push(cq_bpe_scratch *s, cq_candidate c) {
    int64_t i = s->n_heap++;
    while (i > 0 && before(c, s->heap[(i - 1) / 2])) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = c;
}

static cq_candidate pop(cq_bpe_scratch *s) {
    cq_candidate top = s->heap[0], last = s->heap[--s->n_heap];
    int64_t i = 0;
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= s->n_heap)
            break;
        if (child + 1 < s->n_heap && before(s->heap[child + 1], s->heap[child]))
            child++;
        if (!before(s->heap[child], last))
            break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = last;
    return top;
}

/// Queues the pair of symbol `at` and its right neighbour if it is a merge.
static void consider(cq_bpe_scratch *s, const cq_vocab *v, int32_t at) {
    if (at < 0 || s->symbols[at].next < 0)
        return;
    const cq_merge *m = cq_vocab_merge(v, s->symbols[at].id, s->symbols[s->symbols[at].next].id);
    if (m)
        push(s, (cq_candidate){m->rank, at, m->id});
}

int cq_bpe(cq_bpe_scratch *s, const cq_vocab *v, const char *word, int64_t n) {
    CQ_TRY(make_room(s, n));
    for (int64_t i = 0; i < n; i++)
        s->symbols[i] = (cq_symbol){v->byte_id[(uint8_t)word[i]], (int32_t)i - 1,
                                    i + 1 < n ? (int32_t)i + 1 : -1, 1};
    s->n_heap = 0;
    for (int64_t i = 0; i + 1 < n; i++)
        consider(s, v, (int32_t)i);
    while (s->n_heap > 0) {
        cq_candidate c = pop(s);
        cq_symbol *left = &s->symbols[c.at];
        if (left->bytes == 0 || left->next < 0)
            continue;
        cq_symbol *right = &s->symbols[left->next];
        const cq_merge *m = cq_vocab_merge(v, left->id, right->id);
        if (!m || m->id != c.id)
            continue;
        left->id = c.id;
        left->bytes += right->bytes;
        right->bytes = 0;
        left->next = right->next;
        if (right->next >= 0)
            s->symbols[right->next].prev = c.at;
        consider(s, v, left->prev);
        consider(s, v, c.at);
    }
    return CQ_OK;
}
