/// chat.c - which template a model folder has, and the way into its renderer.
///
/// A renderer stands for one exact template text, so the text's SHA-256 chooses it; any other text
/// is an error rather than a guess, because a wrong template damages a model silently.
#include "core/text/chat.h"

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/hash.h"
#include "core/text/render.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    cq_template id;
    const char *name, *sha256;
} known[] = {
    {CQ_TEMPLATE_NANO3, "nano3",
     "818865333e4960c7fb09d2d29b2a980b4127a1d6c732bb430f1e231a6efb2946"},
    {CQ_TEMPLATE_QWEN3_THINKING, "qwen3-thinking",
     "3802169b2a02b81e6adb7ab4f64f91ff02db753c8c3a64a01c35192d3a61d8d7"},
};
enum { N_KNOWN = sizeof known / sizeof *known };

/// The template text of tokenizer_config.json: a string, or the "default" one of a list of named
/// templates.
static const json_t *config_template(const json_t *config) {
    const json_t *t = json_object_get(config, "chat_template");
    for (size_t i = 0; i < json_array_size(t); i++) {
        const json_t *entry = json_array_get(t, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name && strcmp(name, "default") == 0)
            return json_object_get(entry, "template");
    }
    return json_is_string(t) ? t : NULL;
}

static void hash_text(const char *text, size_t n, char hex[65]) {
    cq_sha256 s;
    cq_sha256_init(&s);
    cq_sha256_add(&s, text, n);
    cq_sha256_hex(&s, hex);
}

/// SHA-256 of the folder's template, "" when it has none.
static int find_hash(const char *dir, char hex[65]) {
    char path[4096];
    hex[0] = 0;
    if (snprintf(path, sizeof path, "%s/tokenizer_config.json", dir) >= (int)sizeof path)
        return cq_fail(CQ_EUSAGE, "%s: path is too long", dir);
    char config_path[sizeof path];
    memcpy(config_path, path, sizeof path);
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    if (cq_file_exists(path))
        return cq_sha256_file(path, hex);
    if (!cq_file_exists(config_path))
        return CQ_OK;
    char *text;
    int64_t bytes;
    CQ_TRY(cq_file_read(&text, &bytes, config_path));
    json_error_t error;
    json_t *config = json_loadb(text, (size_t)bytes, JSON_ALLOW_NUL, &error);
    free(text);
    if (!config)
        return cq_fail(CQ_EDATA, "%s:%d: broken JSON: %s", config_path, error.line, error.text);
    const json_t *t = config_template(config);
    if (t)
        hash_text(json_string_value(t), json_string_length(t), hex);
    json_decref(config);
    return CQ_OK;
}

int cq_template_find(cq_template *out, bool *warned, const char *dir, const char *forced) {
    char hex[65];
    *out = CQ_TEMPLATE_NONE;
    *warned = false;
    CQ_TRY(find_hash(dir, hex));
    cq_template found = CQ_TEMPLATE_NONE;
    for (int i = 0; i < N_KNOWN; i++)
        if (strcmp(known[i].sha256, hex) == 0)
            found = known[i].id;
    for (int i = 0; forced && i < N_KNOWN; i++)
        if (strcmp(known[i].name, forced) == 0) {
            *out = known[i].id;
            *warned = hex[0] && found != known[i].id;
            return CQ_OK;
        }
    if (forced)
        return cq_fail(CQ_EUSAGE, "--template: found \"%s\", wanted nano3 or qwen3-thinking",
                       forced);
    if (hex[0] && found == CQ_TEMPLATE_NONE)
        return cq_fail(CQ_EDATA,
                       "%s: the chat template is unknown (SHA-256 %.16s...), wanted "
                       "--template=nano3|qwen3-thinking or "
                       "documents that are rendered already (\"text\")",
                       dir, hex);
    *out = found;
    return CQ_OK;
}

/// What both templates take for granted about a conversation.
static int check(const json_t *root) {
    const json_t *messages = json_object_get(root, "messages");
    if (!json_is_object(root) || !json_is_array(messages))
        return cq_fail(CQ_EDATA, "messages: none, wanted a list");
    if (json_array_size(messages) == 0)
        return cq_fail(CQ_EDATA, "messages: an empty list, wanted at least one");
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *m = json_array_get(messages, i);
        if (!json_is_object(m))
            return cq_fail(CQ_EDATA,
                           "message %zu: no object, wanted {\"role\": ..., \"content\": ...}", i);
        if (!cq_json_is_string(json_object_get(m, "role")))
            return cq_fail(CQ_EDATA, "message %zu: no role, wanted a string", i);
        const json_t *calls = json_object_get(m, "tool_calls");
        if (cq_json_truth(calls) && !json_is_array(calls))
            return cq_fail(CQ_EDATA, "message %zu: tool_calls is no list", i);
        for (size_t k = 0; k < json_array_size(calls); k++)
            if (!json_is_object(json_array_get(calls, k)))
                return cq_fail(CQ_EDATA, "message %zu: tool call %zu is no object", i, k);
    }
    const json_t *tools = json_object_get(root, "tools");
    if (cq_json_truth(tools) && !json_is_array(tools))
        return cq_fail(CQ_EDATA, "tools: no list");
    return CQ_OK;
}

int cq_template_render_json(cq_template t, const json_t *root, char **text, int64_t *bytes,
                            cq_span **spans, int64_t *n_spans) {
    cq_render r = {0};
    int status = check(root);
    if (status == CQ_OK && t == CQ_TEMPLATE_NANO3)
        status = cq_nano3_render(&r, root);
    else if (status == CQ_OK && t == CQ_TEMPLATE_QWEN3_THINKING)
        status = cq_qwen3_thinking_render(&r, root);
    else if (status == CQ_OK)
        status = cq_fail(
            CQ_EDATA,
            "messages: the model has no chat template, wanted --template=nano3|qwen3-thinking");
    void *out = NULL, *out_spans = NULL;
    int64_t n = 0;
    if (status == CQ_OK)
        status = cq_buffer_take(&r.spans, &out_spans, &n);
    if (status == CQ_OK)
        status = cq_buffer_take(&r.text, &out, bytes);
    cq_buffer_free(&r.text);
    cq_buffer_free(&r.spans);
    if (status != CQ_OK || !spans)
        free(out_spans);
    if (status != CQ_OK)
        return status;
    *text = out;
    if (spans) {
        *spans = out_spans;
        *n_spans = n / (int64_t)sizeof(cq_span);
    }
    return CQ_OK;
}

int cq_template_render(cq_template t, const char *json, char **text, int64_t *bytes,
                       cq_span **spans, int64_t *n_spans) {
    json_error_t error;
    json_t *root = cq_json_parse(json, (int64_t)strlen(json), &error);
    if (!root)
        return cq_fail(CQ_EDATA, "conversation: broken JSON at line %d: %s", error.line,
                       error.text);
    int status = cq_template_render_json(t, root, text, bytes, spans, n_spans);
    json_decref(root);
    return status;
}
