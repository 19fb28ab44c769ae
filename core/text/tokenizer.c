/// tokenizer.c - text to ids and back.
///
/// Order of things, as in the Hugging Face library: broken UTF-8 becomes U+FFFD; added tokens that
/// ask for the raw text are cut out; what lies between is normalized; the other added tokens are
/// cut out; the rest is cut into words, and every word is merged on its own. Special tokens of a
/// post-processor are never added.
#include "core/text/tokenizer.h"

#include "core/base/error.h"
#include "core/text/normalize.h"
#include "core/text/tokenizer_parts.h"
#include "core/text/utf8.h"

#include <stdlib.h>
#include <string.h>

/// One call of encode: where its ids go, and how positions in the text at hand lead back to the
/// caller's.
typedef struct encoder {
    const cq_tokenizer *t;
    cq_split_scratch *split;
    cq_bpe_scratch bpe;
    cq_buffer ids, begins;
    const cq_mapped *cleaned, *normalized; ///< `normalized` is NULL outside a normalized stretch
    int64_t segment;                       ///< where the stretch starts in the cleaned text
    int64_t piece; ///< where the text handed to cq_split_run starts in the stretch
    bool offsets;
} encoder;

int cq_tokenizer_open(cq_tokenizer **out, const char *dir) {
    *out = NULL;
    cq_tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return cq_fail(CQ_ENOMEM, "tokenizer: no memory");
    int status = cq_tokenizer_read(t, dir);
    if (status != CQ_OK) {
        cq_tokenizer_close(t);
        return status;
    }
    *out = t;
    return CQ_OK;
}

void cq_tokenizer_close(cq_tokenizer *t) {
    if (!t)
        return;
    cq_vocab_free(&t->vocab);
    cq_added_free(&t->added);
    cq_split_free(t->split);
    free(t);
}

/// `at`: byte of the stretch at hand where the token begins.
static void emit(encoder *e, int32_t id, int64_t at) {
    cq_buffer_add(&e->ids, &id, sizeof id);
    if (!e->offsets)
        return;
    int64_t in_segment = e->normalized ? cq_mapped_from(e->normalized, at) : at;
    int64_t begin = cq_mapped_from(e->cleaned, e->segment + in_segment);
    cq_buffer_add(&e->begins, &begin, sizeof begin);
}

static int encode_word(void *context, const char *text, int64_t begin, int64_t end) {
    encoder *e = context;
    const cq_vocab *v = &e->t->vocab;
    int64_t n = end - begin;
    if (e->t->ignore_merges) {
        int32_t id = cq_vocab_find(v, text + begin, n);
        if (id >= 0) {
            emit(e, id, e->piece + begin);
            return CQ_OK;
        }
    }
    CQ_TRY(cq_bpe(&e->bpe, v, text + begin, n));
    for (int32_t i = 0; i >= 0; i = e->bpe.symbols[i].next)
        emit(e, e->bpe.symbols[i].id, e->piece + begin + i);
    return CQ_OK;
}

/// A stretch of normalized text: its added tokens, and words between them.
static int encode_normalized(encoder *e, const char *text, int64_t n) {
    int64_t at = 0;
    cq_added_match m;
    while (at < n) {
        bool found = cq_added_next(&m, &e->t->added, 1, text, n, at);
        e->piece = at;
        CQ_TRY(cq_split_run(e->t->split, e->split, text + at, (found ? m.begin : n) - at,
                            encode_word, e));
        if (!found)
            break;
        emit(e, m.id, m.begin);
        at = m.end;
    }
    return CQ_OK;
}

static int encode_stretch(encoder *e, int64_t begin, int64_t end) {
    if (begin == end)
        return CQ_OK;
    const char *text = e->cleaned->text + begin;
    e->segment = begin;
    if (!e->t->nfc)
        return encode_normalized(e, text, end - begin);
    cq_mapped normalized;
    CQ_TRY(cq_mapped_nfc(&normalized, text, end - begin));
    e->normalized = &normalized;
    int status = encode_normalized(e, normalized.text, normalized.bytes);
    e->normalized = NULL;
    cq_mapped_free(&normalized);
    return status;
}

static int encode_all(encoder *e) {
    int64_t at = 0, n = e->cleaned->bytes;
    cq_added_match m;
    CQ_TRY(cq_split_begin(&e->split, e->t->split));
    while (at < n) {
        bool found = cq_added_next(&m, &e->t->added, 0, e->cleaned->text, n, at);
        CQ_TRY(encode_stretch(e, at, found ? m.begin : n));
        if (!found)
            break;
        e->segment = 0;
        emit(e, m.id, m.begin);
        at = m.end;
    }
    return CQ_OK;
}

int cq_tokenizer_encode_offsets(const cq_tokenizer *t, const char *text, int64_t bytes,
                                int32_t **ids, int64_t **begins, int64_t *n) {
    if (bytes < 0 || bytes >= INT32_MAX / 2)
        return cq_fail(CQ_EDATA, "text: %lld bytes, wanted below 1 GiB in one document",
                       (long long)bytes);
    cq_mapped cleaned;
    CQ_TRY(cq_mapped_clean(&cleaned, text, bytes));
    encoder e = {.t = t, .cleaned = &cleaned, .offsets = begins != NULL};
    int status = encode_all(&e);
    cq_split_end(e.split);
    cq_bpe_free(&e.bpe);
    cq_mapped_free(&cleaned);
    void *out_ids = NULL, *out_begins = NULL;
    int64_t out_bytes = 0;
    if (status == CQ_OK)
        status = cq_buffer_take(&e.ids, &out_ids, &out_bytes);
    if (status == CQ_OK && begins)
        status = cq_buffer_take(&e.begins, &out_begins, NULL);
    cq_buffer_free(&e.ids);
    cq_buffer_free(&e.begins);
    if (status != CQ_OK) {
        free(out_ids);
        return status;
    }
    *ids = out_ids;
    *n = out_bytes / (int64_t)sizeof(int32_t);
    if (begins)
        *begins = out_begins;
    return CQ_OK;
}

int cq_tokenizer_encode(const cq_tokenizer *t, const char *text, int64_t bytes, int32_t **ids,
                        int64_t *n) {
    return cq_tokenizer_encode_offsets(t, text, bytes, ids, NULL, n);
}

int cq_tokenizer_decode(const cq_tokenizer *t, const int32_t *ids, int64_t n, char **text,
                        int64_t *bytes) {
    cq_buffer raw = {0}, clean = {0};
    for (int64_t i = 0; i < n; i++) {
        const cq_piece *p = ids[i] >= 0 && ids[i] < t->vocab.size ? &t->vocab.pieces[ids[i]] : NULL;
        if (!p || p->n_content < 0)
            cq_utf8_add(&raw, 0xFFFD); // embeddings are padded beyond the vocabulary, so a model
                                       // can produce such an id
        else
            cq_buffer_add(&raw, (char *)t->vocab.bytes.data + p->bytes, p->n_bytes);
    }
    cq_utf8_add_lossy(&clean, raw.data ? raw.data : "", raw.bytes);
    clean.failed = clean.failed || raw.failed;
    cq_buffer_free(&raw);
    void *out = NULL;
    CQ_TRY(cq_buffer_take(&clean, &out, bytes));
    *text = out;
    return CQ_OK;
}

int32_t cq_tokenizer_id(const cq_tokenizer *t, const char *content) {
    int64_t n = (int64_t)strlen(content);
    const cq_added_token *added = cq_added_by_content(&t->added, content, n);
    return added ? added->id : n > 0 ? cq_vocab_find_content(&t->vocab, content, n) : -1;
}

int64_t cq_tokenizer_size(const cq_tokenizer *t) { return t->vocab.size; }

const char *cq_tokenizer_hash(const cq_tokenizer *t) { return t->hash; }
