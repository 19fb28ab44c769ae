/// document.c - the kinds of JSONL lines, and how assistant spans of text become targets among
/// tokens.
///
/// A token is a target when it begins inside a span; a token that began before the span (a newline
/// merged with the one before it) is not, because the model is never asked to produce it alone. A
/// line with several kinds of keys is read as the first of input_ids, messages, text, prompt.
#include "core/text/document.h"

#include "core/base/error.h"
#include "core/text/render.h"

#include <stdlib.h>
#include <string.h>

void cq_document_free(cq_document *d) {
    cq_buffer_free(&d->ids);
    cq_buffer_free(&d->mask);
}

static int add_token(cq_document *d, int64_t id, bool target, const cq_corpus_options *o) {
    int64_t position = d->mask.bytes;
    if (id < 0 || id >= o->vocab)
        return cq_fail(CQ_EDATA, "token id %lld at position %lld, wanted below %lld", (long long)id,
                       (long long)position, (long long)o->vocab);
    if (position == o->max_tokens) {
        d->cut = true;
        return CQ_OK;
    }
    int32_t narrow = (int32_t)id;
    uint8_t bit = target;
    cq_buffer_add(&d->ids, &narrow, sizeof narrow);
    cq_buffer_add(&d->mask, &bit, sizeof bit);
    return CQ_OK;
}

/// Tokens of a text; `spans` NULL: every token is a target.
static int add_text(cq_document *d, const cq_tokenizer *tok, cq_slice text, const cq_span *spans,
                    int64_t n_spans, const cq_corpus_options *o) {
    int32_t *ids = NULL;
    int64_t *begins = NULL, n = 0, span = 0;
    if (!tok)
        return cq_fail(CQ_EDATA,
                       "text needs a tokenizer, wanted input_ids or a folder with tokenizer.json");
    CQ_TRY(cq_tokenizer_encode_offsets(tok, text.s, text.n, &ids, spans ? &begins : NULL, &n));
    int status = CQ_OK;
    for (int64_t i = 0; i < n && status == CQ_OK; i++) {
        while (spans && span < n_spans && begins[i] >= spans[span].end)
            span++;
        status =
            add_token(d, ids[i], !spans || (span < n_spans && begins[i] >= spans[span].begin), o);
    }
    free(ids);
    free(begins);
    return status;
}

/// add_text with the mask that the options ask for.
static int add_masked(cq_document *d, const cq_tokenizer *tok, cq_slice text, const cq_span *spans,
                      int64_t n_spans, const cq_corpus_options *o) {
    if (o->mask == CQ_MASK_ALL)
        return add_text(d, tok, text, NULL, 0, o);
    if (n_spans == 0)
        return cq_fail(CQ_EDATA,
                       "no assistant turn, wanted one because only assistant tokens are targets");
    return add_text(d, tok, text, spans, n_spans, o);
}

static int read_ids(cq_document *d, const json_t *line, const cq_corpus_options *o) {
    const json_t *ids = json_object_get(line, "input_ids"),
                 *labels = json_object_get(line, "labels");
    size_t n = json_array_size(ids);
    if (!json_is_array(ids))
        return cq_fail(CQ_EDATA, "input_ids: no list, wanted a list of integers");
    if (labels && (!json_is_array(labels) || json_array_size(labels) != n))
        return cq_fail(CQ_EDATA, "labels: %zu of them, wanted as many as input_ids (%zu)",
                       json_array_size(labels), n);
    if (!labels && o->mask == CQ_MASK_ASSISTANT)
        return cq_fail(
            CQ_EDATA,
            "input_ids without labels, wanted labels because only assistant tokens are targets");
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(ids, i), *label = json_array_get(labels, i);
        if (!json_is_integer(id) || (labels && !json_is_integer(label)))
            return cq_fail(CQ_EDATA, "input_ids or labels: no integer at position %zu", i);
        json_int_t token = json_integer_value(id),
                   target = labels ? json_integer_value(label) : token;
        if (target != token && target != -100)
            return cq_fail(CQ_EDATA,
                           "labels: %lld at position %zu, wanted %lld (the token) or -100",
                           (long long)target, i, (long long)token);
        CQ_TRY(add_token(d, token, target != -100, o));
    }
    return CQ_OK;
}

/// The assistant turns of text that is in ChatML form already.
static void find_spans(cq_buffer *spans, cq_slice text) {
    static const char open[] = "<|im_start|>assistant\n", close[] = "<|im_end|>";
    for (int64_t at = 0;;) {
        int64_t found = cq_slice_find((cq_slice){text.s + at, text.n - at}, open);
        if (found < 0)
            return;
        int64_t begin = at + found + (int64_t)strlen(open);
        cq_slice rest = {text.s + begin, text.n - begin};
        int64_t end = cq_slice_find(rest, close);
        at = end < 0 ? text.n : begin + end + (int64_t)strlen(close);
        cq_span span = {begin + cq_prompt_bytes(rest), at};
        cq_buffer_add(spans, &span, sizeof span);
    }
}

static int read_text(cq_document *d, const json_t *text, const cq_tokenizer *tok,
                     const cq_corpus_options *o) {
    if (!cq_json_is_string(text))
        return cq_fail(CQ_EDATA, "text: no string, wanted one");
    cq_buffer spans = {0};
    if (o->mask == CQ_MASK_ASSISTANT)
        find_spans(&spans, cq_slice_of(text));
    int status = spans.failed ? cq_fail(CQ_ENOMEM, "text: no memory")
                              : add_masked(d, tok, cq_slice_of(text), spans.data,
                                           spans.bytes / (int64_t)sizeof(cq_span), o);
    cq_buffer_free(&spans);
    return status;
}

/// Renders `line` with these messages (taken over) and tokenizes it; the first `skip` assistant
/// turns are no targets.
static int read_conversation(cq_document *d, const json_t *line, json_t *messages, int64_t skip,
                             const cq_tokenizer *tok, const cq_corpus_options *o) {
    json_t *root = json_copy((json_t *)line);
    json_object_set_new(root, "messages", messages);
    json_object_set_new(root, "add_generation_prompt", json_false());
    char *text = NULL;
    cq_span *spans = NULL;
    int64_t bytes = 0, n_spans = 0;
    int status = cq_template_render_json(o->chat, root, &text, &bytes, &spans, &n_spans);
    json_decref(root);
    if (status != CQ_OK)
        return status;
    skip = skip < n_spans ? skip : n_spans;
    status = add_masked(d, tok, (cq_slice){text, bytes}, spans + skip, n_spans - skip, o);
    free(text);
    free(spans);
    return status;
}

static json_t *message(const char *role, const json_t *content) {
    json_t *m = json_object();
    json_object_set_new(m, "role", json_string(role));
    json_object_set(m, "content", (json_t *)content);
    return m;
}

/// `prompt` and `completion`: strings, or lists of messages; without a chat template strings are
/// put together as they are.
static int read_prompt(cq_document *d, const json_t *line, const cq_tokenizer *tok,
                       const cq_corpus_options *o) {
    const json_t *prompt = json_object_get(line, "prompt"),
                 *completion = json_object_get(line, "completion");
    bool strings = cq_json_is_string(prompt) && cq_json_is_string(completion);
    if (!strings && !(json_is_array(prompt) && json_is_array(completion)))
        return cq_fail(CQ_EDATA,
                       "prompt and completion: wanted both, as strings or as lists of messages");
    if (strings && o->chat == CQ_TEMPLATE_NONE) {
        cq_buffer text = {0};
        cq_json_str(&text, prompt);
        cq_span span = {text.bytes, text.bytes + (int64_t)json_string_length(completion)};
        cq_json_str(&text, completion);
        int status = text.failed
                         ? cq_fail(CQ_ENOMEM, "prompt: no memory")
                         : add_masked(d, tok, (cq_slice){text.data ? text.data : "", text.bytes},
                                      &span, span.end > span.begin, o);
        cq_buffer_free(&text);
        return status;
    }
    json_t *messages = json_array();
    int64_t skip = 0;
    if (strings) {
        json_array_append_new(messages, message("user", prompt));
        json_array_append_new(messages, message("assistant", completion));
    } else {
        for (size_t i = 0; i < json_array_size(prompt); i++)
            skip += cq_role_is(json_array_get(prompt, i), "assistant");
        json_array_extend(messages, (json_t *)prompt);
        json_array_extend(messages, (json_t *)completion);
    }
    return read_conversation(d, line, messages, skip, tok, o);
}

static int read_line(cq_document *d, const json_t *line, const cq_tokenizer *tok,
                     const cq_corpus_options *o) {
    if (!json_is_object(line))
        return cq_fail(CQ_EDATA, "no JSON object, wanted one per line");
    json_t *messages = json_object_get(line, "messages");
    const json_t *text = json_object_get(line, "text");
    if (json_object_get(line, "input_ids"))
        return read_ids(d, line, o);
    if (messages)
        return read_conversation(d, line, json_incref(messages), 0, tok, o);
    if (text)
        return read_text(d, text, tok, o);
    if (json_object_get(line, "prompt") || json_object_get(line, "completion"))
        return read_prompt(d, line, tok, o);
    return cq_fail(CQ_EDATA,
                   "no known key, wanted text, messages, prompt and completion, or input_ids");
}

int cq_document_read(cq_document *d, const char *line, int64_t bytes, const cq_tokenizer *tok,
                     const cq_corpus_options *o) {
    d->ids.bytes = d->mask.bytes = 0;
    d->cut = false;
    json_error_t error;
    json_t *root = cq_json_parse(line, bytes, &error);
    if (!root)
        return cq_fail(CQ_EDATA, "broken JSON at column %d: %s", error.column, error.text);
    int status = read_line(d, root, tok, o);
    json_decref(root);
    if (status != CQ_OK)
        return status;
    if (d->ids.failed || d->mask.failed)
        return cq_fail(CQ_ENOMEM, "document: no memory");
    if (d->mask.bytes == 0)
        return cq_fail(CQ_EDATA, "an empty document, wanted at least one token");
    return CQ_OK;
}
