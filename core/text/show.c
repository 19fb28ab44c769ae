/// show.c - documents with their loss mask, for `cq.data.show`.
///
/// A token is marked when it is a target. The first token of a document is never predicted, so it
/// is never marked. Documents come from outside: control characters are spelled out so that they
/// cannot drive the terminal.
#include "core/text/show.h"

#include "core/base/error.h"
#include "core/text/buffer.h"

#include <stdlib.h>

static void add_visible(cq_buffer *out, const char *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint8_t c = (uint8_t)s[i];
        // U+0080..U+009F are control characters too, in UTF-8 C2 80..9F
        bool wide = c == 0xC2 && i + 1 < n && (uint8_t)s[i + 1] < 0xA0;
        if (wide)
            cq_buffer_format(out, "\\x%02x", (uint8_t)s[++i]);
        else if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F)
            cq_buffer_format(out, "\\x%02x", c);
        else
            cq_buffer_add(out, s + i, 1);
    }
}

static int add_run(cq_buffer *out, const cq_tokenizer *t, const int32_t *ids, int64_t n) {
    if (!t) {
        for (int64_t i = 0; i < n; i++)
            cq_buffer_format(out, i ? " %d" : "%d", ids[i]);
        return CQ_OK;
    }
    char *text;
    int64_t bytes;
    CQ_TRY(cq_tokenizer_decode(t, ids, n, &text, &bytes));
    add_visible(out, text, bytes);
    free(text);
    return CQ_OK;
}

int cq_corpus_show(const cq_corpus *c, const cq_tokenizer *t, int64_t doc, bool color,
                   char **text) {
    const int32_t *ids;
    const uint8_t *mask;
    int64_t n;
    CQ_TRY(cq_corpus_doc(c, doc, &ids, &mask, &n));
    cq_buffer out = {0};
    int status = CQ_OK;
    for (int64_t i = 0; i < n && status == CQ_OK;) {
        bool target = i > 0 && mask[i];
        int64_t begin = i++;
        while (i < n && begin > 0 && (mask[i] != 0) == target)
            i++;
        while (i < n && begin == 0 && !mask[i])
            i++;
        if (target)
            cq_buffer_add_text(&out, color ? "\033[32m" : "[[");
        status = add_run(&out, t, ids + begin, i - begin);
        if (target)
            cq_buffer_add_text(&out, color ? "\033[0m" : "]]");
        if (!t && i < n)
            cq_buffer_add_text(&out, " ");
    }
    if (status != CQ_OK) {
        cq_buffer_free(&out);
        return status;
    }
    void *data = NULL;
    CQ_TRY(cq_buffer_take(&out, &data, NULL));
    *text = data;
    return CQ_OK;
}
