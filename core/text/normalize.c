/// normalize.c - NFC by utf8proc's tables, one stretch between ASCII characters at a time.
///
/// ASCII characters are starters that never combine with what precedes them, so a stretch that
/// begins with one (and goes on with non-ASCII characters) normalizes on its own. utf8proc_map
/// would sort combining marks in quadratic time, so the canonical order is made here and utf8proc
/// only decomposes and composes.
#include "core/text/normalize.h"

#include "core/base/error.h"
#include "core/text/buffer.h"
#include "core/text/utf8.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static const utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_COMPOSE;

/// What both functions build: output and origins, both only from the first difference on.
typedef struct rewrite {
    cq_buffer out, from;
    bool changed;
} rewrite;

static void add_same(rewrite *r, const char *text, int64_t begin, int64_t end) {
    cq_buffer_add(&r->out, text + begin, end - begin);
    for (int64_t i = begin; r->changed && i < end; i++)
        cq_buffer_add(&r->from, &i, sizeof i);
}

static void add_other(rewrite *r, const void *data, int64_t bytes, int64_t origin) {
    for (int64_t i = 0; !r->changed && i < r->out.bytes; i++)
        cq_buffer_add(&r->from, &i, sizeof i);
    r->changed = true;
    cq_buffer_add(&r->out, data, bytes);
    for (int64_t i = 0; i < bytes; i++)
        cq_buffer_add(&r->from, &origin, sizeof origin);
}

static int finish(cq_mapped *out, rewrite *r, const char *text, int64_t bytes) {
    if (!r->changed && !r->out.failed) {
        cq_buffer_free(&r->out);
        *out = (cq_mapped){.text = text, .bytes = bytes};
        return CQ_OK;
    }
    *out = (cq_mapped){0};
    void *owned = NULL, *from = NULL;
    cq_buffer_add(&r->from, &bytes, sizeof bytes);
    int status = cq_buffer_take(&r->from, &from, NULL);
    if (status == CQ_OK)
        status = cq_buffer_take(&r->out, &owned, &out->bytes);
    if (status != CQ_OK) {
        free(from);
        cq_buffer_free(&r->out);
        return status;
    }
    out->text = out->owned = owned;
    out->from = from;
    return CQ_OK;
}

int cq_mapped_clean(cq_mapped *out, const char *text, int64_t bytes) {
    rewrite r = {0};
    int64_t at = cq_utf8_valid(text, bytes);
    if (at == bytes)
        return finish(out, &r, text, bytes);
    add_same(&r, text, 0, at);
    while (at < bytes) {
        int32_t cp;
        int64_t broken = cq_utf8_next(&cp, text + at, bytes - at);
        add_other(&r, "\xEF\xBF\xBD", 3, at);
        at += broken;
        int64_t good = cq_utf8_valid(text + at, bytes - at);
        add_same(&r, text, at, at + good);
        at += good;
    }
    return finish(out, &r, text, bytes);
}

static int class_of(int32_t cp) { return utf8proc_get_property(cp)->combining_class; }

/// Stable sort of one run of marks by combining class.
static bool sort_run(int32_t *run, int64_t n) {
    if (n <= 16) {
        for (int64_t i = 1; i < n; i++) {
            int32_t cp = run[i];
            int64_t j = i;
            for (; j > 0 && class_of(run[j - 1]) > class_of(cp); j--)
                run[j] = run[j - 1];
            run[j] = cp;
        }
        return true;
    }
    int64_t first[257] = {0};
    int32_t *copy = malloc((size_t)n * sizeof *copy);
    if (!copy)
        return false;
    memcpy(copy, run, (size_t)n * sizeof *copy);
    for (int64_t i = 0; i < n; i++)
        first[class_of(copy[i]) + 1]++;
    for (int c = 0; c < 256; c++)
        first[c + 1] += first[c];
    for (int64_t i = 0; i < n; i++)
        run[first[class_of(copy[i])]++] = copy[i];
    free(copy);
    return true;
}

static bool sort_marks(int32_t *cps, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int64_t begin = i;
        while (i < n && class_of(cps[i]) != 0)
            i++;
        if (!sort_run(cps + begin, i - begin))
            return false;
    }
    return true;
}

/// Composes one stretch into `out`; *simple when it holds nothing that NFC could change.
static void compose(cq_buffer *out, bool *simple, const char *s, int64_t n) {
    cq_buffer cps = {0};
    *simple = true;
    for (int64_t i = 0; i < n;) {
        int32_t cp, parts[32];
        int boundary = 0;
        i += cq_utf8_next(&cp, s + i, n - i);
        *simple = *simple && cp < 0x300; // below U+0300 every character is its own composed form
        utf8proc_ssize_t k = utf8proc_decompose_char(cp, parts, 32, options, &boundary);
        cq_buffer_add(&cps, parts, (k < 32 ? k : 32) * (int64_t)sizeof *parts);
    }
    int64_t count = cps.bytes / (int64_t)sizeof(int32_t);
    if (*simple || cps.failed || !sort_marks(cps.data, count)) {
        out->failed = out->failed || !*simple;
        cq_buffer_free(&cps);
        return;
    }
    count = utf8proc_normalize_utf32(cps.data, count, options);
    for (int64_t i = 0; i < count; i++)
        cq_utf8_add(out, ((int32_t *)cps.data)[i]);
    cq_buffer_free(&cps);
}

/// Whole characters that the composed stretch shares with the text at its start, in bytes.
static int64_t common_start(const char *text, int64_t n, const cq_buffer *composed) {
    const char *other = composed->data;
    int64_t i = 0;
    while (i < n && i < composed->bytes && text[i] == other[i])
        i++;
    if (i == n && i == composed->bytes)
        return i;
    while (i > 0 && ((i < n && ((uint8_t)text[i] & 0xC0) == 0x80) ||
                     (i < composed->bytes && ((uint8_t)other[i] & 0xC0) == 0x80)))
        i--;
    return i;
}

int cq_mapped_nfc(cq_mapped *out, const char *text, int64_t bytes) {
    rewrite r = {0};
    cq_buffer composed = {0};
    int64_t done = 0, at = 0;
    while (at < bytes) {
        if ((uint8_t)text[at] < 0x80) {
            at++;
            continue;
        }
        int64_t begin = at > done ? at - 1 : at;
        while (at < bytes && (uint8_t)text[at] >= 0x80)
            at++;
        bool simple;
        composed.bytes = 0;
        compose(&composed, &simple, text + begin, at - begin);
        int64_t same = simple ? at - begin : common_start(text + begin, at - begin, &composed);
        add_same(&r, text, done, begin + same);
        if (begin + same < at || (!simple && same < composed.bytes))
            add_other(&r, (char *)composed.data + same, composed.bytes - same, begin + same);
        done = at;
    }
    r.out.failed = r.out.failed || composed.failed;
    cq_buffer_free(&composed);
    if (r.changed)
        add_same(&r, text, done, bytes);
    return finish(out, &r, text, bytes);
}

int64_t cq_mapped_from(const cq_mapped *m, int64_t at) { return m->from ? m->from[at] : at; }

void cq_mapped_free(cq_mapped *m) {
    free(m->owned);
    free(m->from);
    *m = (cq_mapped){0};
}
