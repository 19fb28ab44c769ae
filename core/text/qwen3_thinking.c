/// qwen3_thinking.c - the chat template of Qwen3-4B-Thinking-2507, written out by hand.
///
/// ChatML. Reasoning is kept only in assistant turns after the last question; the final turn always
/// gets a think block, an empty one if there was no reasoning. The sentences of the tools block are
/// the template's, byte for byte.
#include "core/base/error.h"
#include "core/text/render.h"

#include <string.h>

static const char tools_head[] =
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>";
static const char tools_tail[] =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n";

static int add_system(cq_render *r, const json_t *root, const json_t *first) {
    const json_t *tools = json_object_get(root, "tools"),
                 *content = json_object_get(first, "content");
    bool system = cq_role_is(first, "system"), with_tools = cq_json_truth(tools);
    if (!system && !with_tools)
        return CQ_OK;
    if (system && !cq_json_is_string(content))
        return cq_fail(CQ_EDATA, "message 0: the system message has no content, wanted a string");
    cq_render_text(r, "<|im_start|>system\n");
    if (system)
        cq_render_add(r, cq_slice_of(content));
    if (!with_tools) {
        cq_render_text(r, "<|im_end|>\n");
        return CQ_OK;
    }
    cq_render_text(r, system ? "\n\n" : "");
    cq_render_text(r, tools_head);
    for (size_t i = 0; i < json_array_size(tools); i++) {
        cq_render_text(r, "\n");
        cq_json_dump(&r->text, json_array_get(tools, i));
    }
    cq_render_text(r, tools_tail);
    return CQ_OK;
}

/// Index of the last user message that is a question and not a wrapped tool response.
static int64_t last_query(const json_t *messages) {
    int64_t n = (int64_t)json_array_size(messages);
    for (int64_t i = n - 1; i >= 0; i--) {
        const json_t *m = json_array_get(messages, (size_t)i),
                     *content = json_object_get(m, "content");
        if (!cq_role_is(m, "user") || !cq_json_is_string(content))
            continue;
        cq_slice text = cq_slice_of(content);
        if (!cq_slice_starts(text, "<tool_response>") || !cq_slice_ends(text, "</tool_response>"))
            return i;
    }
    return n - 1;
}

static int add_tool_calls(cq_render *r, const json_t *message, size_t index, bool after_content) {
    const json_t *calls = json_object_get(message, "tool_calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i),
                     *function = json_object_get(call, "function");
        if (cq_json_truth(function))
            call = function;
        const json_t *arguments = json_object_get(call, "arguments");
        if (!arguments)
            return cq_fail(CQ_EDATA, "message %zu: tool call %zu has no arguments", index, i);
        cq_render_text(r, i > 0 || after_content ? "\n<tool_call>\n{\"name\": \""
                                                 : "<tool_call>\n{\"name\": \"");
        cq_json_str(&r->text, json_object_get(call, "name"));
        cq_render_text(r, "\", \"arguments\": ");
        if (cq_json_is_string(arguments))
            cq_render_add(r, cq_slice_of(arguments));
        else
            cq_json_dump(&r->text, arguments);
        cq_render_text(r, "}\n</tool_call>");
    }
    return CQ_OK;
}

static int add_assistant(cq_render *r, const json_t *message, size_t index, bool last,
                         bool after_query) {
    const json_t *given = json_object_get(message, "reasoning_content"),
                 *body = json_object_get(message, "content");
    cq_slice content = cq_json_is_string(body) ? cq_slice_of(body) : cq_slice_text("");
    cq_slice reasoning = cq_slice_text("");
    if (cq_json_is_string(given)) {
        reasoning = cq_slice_of(given);
    } else if (cq_slice_find(content, "</think>") >= 0) {
        reasoning = cq_slice_rstrip_newlines(cq_slice_before_first(content, "</think>"));
        reasoning = cq_slice_lstrip_newlines(cq_slice_after_last(reasoning, "<think>"));
        content = cq_slice_lstrip_newlines(cq_slice_after_last(content, "</think>"));
    }
    cq_render_text(r, "<|im_start|>assistant\n");
    int64_t begin = r->text.bytes;
    if (after_query && (last || reasoning.n > 0)) {
        cq_render_text(r, "<think>\n");
        cq_render_add(r, cq_slice_lstrip_newlines(cq_slice_rstrip_newlines(reasoning)));
        cq_render_text(r, "\n</think>\n\n");
        cq_render_add(r, cq_slice_lstrip_newlines(content));
    } else {
        cq_render_add(r, content);
    }
    CQ_TRY(add_tool_calls(r, message, index, content.n > 0));
    cq_render_text(r, "<|im_end|>");
    cq_render_span(r, begin);
    cq_render_text(r, "\n");
    return CQ_OK;
}

static void add_frame(cq_render *r, const json_t *message, cq_slice content) {
    cq_render_text(r, "<|im_start|>");
    cq_json_str(&r->text, json_object_get(message, "role"));
    cq_render_text(r, "\n");
    cq_render_add(r, content);
    cq_render_text(r, "<|im_end|>\n");
}

int cq_qwen3_thinking_render(cq_render *r, const json_t *root) {
    const json_t *messages = json_object_get(root, "messages");
    int64_t query = last_query(messages), n = (int64_t)json_array_size(messages);
    CQ_TRY(add_system(r, root, json_array_get(messages, 0)));
    for (int64_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(messages, (size_t)i),
                     *body = json_object_get(m, "content");
        cq_slice content = cq_json_is_string(body) ? cq_slice_of(body) : cq_slice_text("");
        bool system = cq_role_is(m, "system") && i > 0;
        if (cq_role_is(m, "user") || system) {
            add_frame(r, m, content);
        } else if (cq_role_is(m, "assistant")) {
            CQ_TRY(add_assistant(r, m, (size_t)i, i == n - 1, i > query));
        } else if (cq_role_is(m, "tool")) {
            bool opens = i == 0 || !cq_role_is(json_array_get(messages, (size_t)i - 1), "tool");
            bool closes =
                i == n - 1 || !cq_role_is(json_array_get(messages, (size_t)i + 1), "tool");
            cq_render_text(r,
                           opens ? "<|im_start|>user\n<tool_response>\n" : "\n<tool_response>\n");
            cq_render_add(r, content);
            cq_render_text(r, closes ? "\n</tool_response><|im_end|>\n" : "\n</tool_response>");
        }
    }
    if (cq_json_truth(json_object_get(root, "add_generation_prompt")))
        cq_render_text(r, "<|im_start|>assistant\n<think>\n");
    return CQ_OK;
}
