/// corpus.c - all documents of some JSONL files: one array of ids, one of mask bytes, and where
/// documents start.
///
/// Files are read line by line, so a file larger than memory costs only its ids (5 bytes a token).
/// Blank lines are passed over; they count as lines in messages.
#include "core/text/corpus.h"

#include "core/base/error.h"
#include "core/base/hash.h"
#include "core/base/rng.h"
#include "core/text/document.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct cq_corpus {
    cq_buffer ids, mask; ///< int32_t [tokens], uint8_t [tokens]
    cq_buffer starts;    ///< int64_t [count + 1]
    cq_buffer cut;       ///< uint8_t [count] 1: was longer than max_tokens
    char hash[65];
};

enum { STREAM_HOLD_OUT = 0x486F6C64 }; // keeps these draws apart from others of the same seed

static int out_of_memory(void) { return cq_fail(CQ_ENOMEM, "data: no memory for the documents"); }

static bool failed(const cq_corpus *c) {
    return c->ids.failed || c->mask.failed || c->starts.failed || c->cut.failed;
}

static int add_document(cq_corpus *c, const int32_t *ids, const uint8_t *mask, int64_t n,
                        uint8_t cut) {
    cq_buffer_add(&c->ids, ids, n * (int64_t)sizeof *ids);
    cq_buffer_add(&c->mask, mask, n);
    cq_buffer_add(&c->starts, &c->mask.bytes, sizeof c->mask.bytes);
    cq_buffer_add(&c->cut, &cut, 1);
    return failed(c) ? out_of_memory() : CQ_OK;
}

static int new_corpus(cq_corpus **out) {
    *out = calloc(1, sizeof **out);
    if (!*out)
        return out_of_memory();
    int64_t zero = 0;
    cq_buffer_add(&(*out)->starts, &zero, sizeof zero);
    return failed(*out) ? out_of_memory() : CQ_OK;
}

/// The hash covers lengths too, so moving a boundary changes it.
static void hash_corpus(cq_corpus *c) {
    cq_sha256 s;
    cq_sha256_init(&s);
    cq_sha256_add(&s, c->starts.data, (size_t)c->starts.bytes);
    if (c->mask.bytes > 0) {
        cq_sha256_add(&s, c->ids.data, (size_t)c->ids.bytes);
        cq_sha256_add(&s, c->mask.data, (size_t)c->mask.bytes);
    }
    cq_sha256_hex(&s, c->hash);
}

static bool is_blank(const char *line, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!isspace((unsigned char)line[i]))
            return false;
    return true;
}

static int read_lines(cq_corpus *c, FILE *file, const char *path, const cq_tokenizer *tok,
                      const cq_corpus_options *o) {
    cq_document d = {0};
    char *line = NULL;
    size_t room = 0;
    int status = CQ_OK;
    ssize_t n;
    int64_t number = 0;
    while (status == CQ_OK && (errno = 0, n = getline(&line, &room, file)) >= 0) {
        number++;
        bool mark = number == 1 && n >= 3 && memcmp(line, "\xEF\xBB\xBF", 3) == 0;
        const char *text = mark ? line + 3 : line;
        int64_t bytes = mark ? n - 3 : n;
        if (is_blank(text, bytes))
            continue;
        status = cq_document_read(&d, text, bytes, tok, o);
        if (status == CQ_OK)
            status = add_document(c, d.ids.data, d.mask.data, d.mask.bytes, d.cut);
        if (status != CQ_OK) {
            char where[4200];
            snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
            status = cq_fail_in(status, where);
        }
    }
    if (status == CQ_OK && errno)
        status = cq_fail(CQ_EIO, "%s: %s", path, strerror(errno));
    free(line);
    cq_document_free(&d);
    return status;
}

static int read_file(cq_corpus *c, const char *path, const cq_tokenizer *tok,
                     const cq_corpus_options *o) {
    FILE *file = fopen(path, "rb");
    if (!file)
        return cq_fail(CQ_EDATA, "%s: cannot be read: %s", path, strerror(errno));
    int64_t before = cq_corpus_count(c);
    int status = read_lines(c, file, path, tok, o);
    fclose(file);
    if (status == CQ_OK && cq_corpus_count(c) == before)
        return cq_fail(CQ_EDATA, "%s: no documents, wanted at least one line", path);
    return status;
}

static int read_paths(cq_corpus *c, const char *paths, const cq_tokenizer *tok,
                      const cq_corpus_options *o) {
    for (const char *at = paths;; at++) {
        char path[4096];
        size_t n = strcspn(at, ",");
        const char *begin = at, *end = at + n;
        while (begin < end && isspace((unsigned char)*begin))
            begin++;
        while (end > begin && isspace((unsigned char)end[-1]))
            end--;
        if (begin == end || end - begin >= (ptrdiff_t)sizeof path)
            return cq_fail(CQ_EUSAGE,
                           "data: \"%s\" has an empty or too long path, wanted FILE[,FILE...]",
                           paths);
        memcpy(path, begin, (size_t)(end - begin));
        path[end - begin] = 0;
        CQ_TRY(read_file(c, path, tok, o));
        at += n;
        if (!*at)
            return CQ_OK;
    }
}

int cq_corpus_open(cq_corpus **out, const char *paths, const cq_tokenizer *tok,
                   const cq_corpus_options *o) {
    *out = NULL;
    if (o->max_tokens < 1 || o->vocab < 1)
        return cq_fail(CQ_EUSAGE, "data: max_tokens is %lld and vocab %lld, wanted at least 1",
                       (long long)o->max_tokens, (long long)o->vocab);
    cq_corpus *c = NULL;
    int status = new_corpus(&c);
    if (status == CQ_OK)
        status = read_paths(c, paths, tok, o);
    if (status != CQ_OK) {
        cq_corpus_close(c);
        return status;
    }
    hash_corpus(c);
    *out = c;
    return CQ_OK;
}

void cq_corpus_close(cq_corpus *c) {
    if (!c)
        return;
    cq_buffer_free(&c->ids);
    cq_buffer_free(&c->mask);
    cq_buffer_free(&c->starts);
    cq_buffer_free(&c->cut);
    free(c);
}

int64_t cq_corpus_count(const cq_corpus *c) { return c->cut.bytes; }

int64_t cq_corpus_tokens(const cq_corpus *c) { return c->mask.bytes; }

int64_t cq_corpus_truncated(const cq_corpus *c) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->cut.bytes; i++)
        n += ((uint8_t *)c->cut.data)[i];
    return n;
}

const char *cq_corpus_hash(const cq_corpus *c) { return c->hash; }

int cq_corpus_doc(const cq_corpus *c, int64_t i, const int32_t **ids, const uint8_t **mask,
                  int64_t *n) {
    if (i < 0 || i >= cq_corpus_count(c))
        return cq_fail(CQ_EUSAGE, "document: index %lld, wanted 0 to %lld", (long long)i,
                       (long long)cq_corpus_count(c) - 1);
    const int64_t *starts = c->starts.data;
    *ids = (int32_t *)c->ids.data + starts[i];
    *mask = (uint8_t *)c->mask.data + starts[i];
    *n = starts[i + 1] - starts[i];
    return CQ_OK;
}

/// Shares the documents of `c` out: those listed in `held` (ascending) go to `a`, the others to
/// `b`.
static int divide(const cq_corpus *c, const int32_t *held, int64_t n_held, cq_corpus *a,
                  cq_corpus *b) {
    for (int64_t i = 0, k = 0; i < cq_corpus_count(c); i++) {
        const int32_t *ids;
        const uint8_t *mask;
        int64_t n;
        bool is_held = k < n_held && held[k] == i;
        CQ_TRY(cq_corpus_doc(c, i, &ids, &mask, &n));
        CQ_TRY(add_document(is_held ? a : b, ids, mask, n, ((uint8_t *)c->cut.data)[i]));
        k += is_held;
    }
    return CQ_OK;
}

int cq_corpus_hold_out(cq_corpus *c, double fraction, uint64_t seed, cq_corpus **held) {
    int64_t n = cq_corpus_count(c);
    *held = NULL;
    if (n < 2)
        return cq_fail(CQ_EDATA, "held-out documents: %lld document, wanted at least 2",
                       (long long)n);
    if (!(fraction >= 0 && fraction <= 1))
        return cq_fail(CQ_EUSAGE, "held-out fraction: %g, wanted 0 to 1", fraction);
    int64_t k = llround(fraction * (double)n);
    k = k < 1 ? 1 : k > n / 2 ? n / 2 : k;
    int32_t *chosen = malloc((size_t)k * sizeof *chosen);
    cq_corpus *a = NULL, *b = NULL;
    int status = chosen ? CQ_OK : out_of_memory();
    if (status == CQ_OK)
        status = new_corpus(&a);
    if (status == CQ_OK)
        status = new_corpus(&b);
    if (status == CQ_OK) {
        cq_random_sample(chosen, k, n, seed, STREAM_HOLD_OUT);
        status = divide(c, chosen, k, a, b);
    }
    free(chosen);
    if (status != CQ_OK) {
        cq_corpus_close(a);
        cq_corpus_close(b);
        return status;
    }
    cq_corpus old = *c;
    *c = *b;
    *b = old;
    cq_corpus_close(b);
    hash_corpus(c);
    hash_corpus(a);
    *held = a;
    return CQ_OK;
}
