/// nano3.c - the chat template of Nemotron 3 Nano (the publisher's data-preparation file), written
/// out by hand.
///
/// ChatML with a system block always and tools as XML. Assistant turns before the last user message
/// lose their reasoning but keep an empty think block; positions count without the leading system
/// message. The sentences of the tools block are the template's, byte for byte. Undefined values
/// print as nothing, like in Jinja.
#include "core/base/error.h"
#include "core/text/render.h"

#include <string.h>

static const char tools_head[] =
    "# Tools\n\nYou have access to the following functions:\n\n<tools>";
static const char tools_tail[] =
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO "
    "suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</"
    "parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can "
    "span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block "
    "must be nested within "
    "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the "
    "function call, but NOT "
    "after\n- If there is no function call available, answer the question like normal with your "
    "current knowledge and do "
    "not tell the user about function calls\n</IMPORTANT>";

/// JSON for lists and objects, Python's str for the rest.
static void add_value(cq_render *r, const json_t *v) {
    if (json_is_object(v) || json_is_array(v))
        cq_json_dump(&r->text, v);
    else
        cq_json_str(&r->text, v);
}

static void add_trimmed(cq_render *r, const json_t *v) {
    cq_buffer text = {0};
    cq_json_str(&text, v);
    r->text.failed = r->text.failed || text.failed;
    cq_render_add(r, cq_slice_strip((cq_slice){text.data ? text.data : "", text.bytes}));
    cq_buffer_free(&text);
}

/// The keys of an object that the caller has not handled, as <key>value</key> lines.
static void add_extra_keys(cq_render *r, const json_t *object, const char *const *handled) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        bool skip = false;
        for (int i = 0; handled[i]; i++)
            skip = skip || strcmp(handled[i], key) == 0;
        if (skip)
            continue;
        cq_buffer_format(&r->text, "\n<%s>", key);
        add_value(r, value);
        cq_buffer_format(&r->text, "</%s>", key);
    }
}

static void add_parameter(cq_render *r, const char *name, const json_t *fields) {
    static const char *const handled[] = {"name", "type", "description", "enum", NULL};
    const json_t *type = json_object_get(fields, "type"),
                 *description = json_object_get(fields, "description");
    const json_t *choices = json_object_get(fields, "enum");
    cq_buffer_format(&r->text, "\n<parameter>\n<name>%s</name>", name);
    if (type) {
        cq_render_text(r, "\n<type>");
        cq_json_str(&r->text, type);
        cq_render_text(r, "</type>");
    }
    if (description) {
        cq_render_text(r, "\n<description>");
        add_trimmed(r, description);
        cq_render_text(r, "</description>");
    }
    if (choices) {
        cq_render_text(r, "\n<enum>");
        cq_json_dump(&r->text, choices);
        cq_render_text(r, "</enum>");
    }
    add_extra_keys(r, fields, handled);
    cq_render_text(r, "\n</parameter>");
}

static void add_tool(cq_render *r, const json_t *tool) {
    static const char *const of_parameters[] = {"type", "properties", "required", NULL};
    static const char *const of_tool[] = {"type", "name", "description", "parameters", NULL};
    const json_t *parameters = json_object_get(tool, "parameters");
    const json_t *required = json_object_get(parameters, "required");
    const char *name;
    json_t *fields;
    cq_render_text(r, "\n<function>\n<name>");
    cq_json_str(&r->text, json_object_get(tool, "name"));
    cq_render_text(r, "</name>");
    if (json_object_get(tool, "description")) {
        cq_render_text(r, "\n<description>");
        add_trimmed(r, json_object_get(tool, "description"));
        cq_render_text(r, "</description>");
    }
    cq_render_text(r, "\n<parameters>");
    json_object_foreach(json_object_get(parameters, "properties"), name, fields)
        add_parameter(r, name, fields);
    add_extra_keys(r, parameters, of_parameters);
    if (required) {
        cq_render_text(r, "\n<required>");
        cq_json_dump(&r->text, required);
        cq_render_text(r, "</required>");
    }
    cq_render_text(r, "\n</parameters>");
    add_extra_keys(r, tool, of_tool);
    cq_render_text(r, "\n</function>");
}

/// `system` is NULL when the first message is a system message without content.
static int add_system(cq_render *r, const json_t *root, const cq_slice *system) {
    const json_t *tools = json_object_get(root, "tools");
    bool with_tools = json_array_size(tools) > 0;
    if (!system && !with_tools)
        return CQ_OK;
    cq_render_text(r, "<|im_start|>system\n");
    if (system)
        cq_render_add(r, *system);
    if (with_tools) {
        cq_render_text(r, system && system->n > 0 ? "\n\n" : "");
        cq_render_text(r, tools_head);
        for (size_t i = 0; i < json_array_size(tools); i++) {
            const json_t *tool = json_array_get(tools, i),
                         *function = json_object_get(tool, "function");
            if (!json_is_object(function ? function : tool))
                return cq_fail(CQ_EDATA, "tool %zu: no object, wanted a function", i);
            add_tool(r, function ? function : tool);
        }
        cq_render_text(r, tools_tail);
    }
    cq_render_text(r, "<|im_end|>\n");
    return CQ_OK;
}

/// The content of an assistant message with its reasoning put in front. False when it is no string.
static bool unify(cq_buffer *out, const json_t *message) {
    const json_t *reasoning = json_object_get(message, "reasoning_content"),
                 *body = json_object_get(message, "content");
    if (cq_json_is_string(reasoning) && cq_slice_strip(cq_slice_of(reasoning)).n > 0) {
        cq_buffer_add_text(out, "<think>\n");
        cq_json_str(out, reasoning);
        cq_buffer_add_text(out, "\n</think>\n");
        if (cq_json_truth(body))
            cq_json_str(out, body);
        return true;
    }
    if (!cq_json_truth(body)) {
        cq_buffer_add_text(out, "<think></think>");
        return true;
    }
    if (cq_json_is_string(body)) {
        cq_slice text = cq_slice_of(body);
        if (cq_slice_find(text, "<think>") < 0 && cq_slice_find(text, "</think>") < 0)
            cq_buffer_add_text(out, "<think></think>");
    }
    cq_json_str(out, body);
    return cq_json_is_string(body);
}

static int add_tool_calls(cq_render *r, const json_t *calls, size_t index) {
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i),
                     *function = json_object_get(call, "function");
        if (function)
            call = function;
        const json_t *arguments = json_object_get(call, "arguments");
        if (arguments && !json_is_object(arguments))
            return cq_fail(CQ_EDATA,
                           "message %zu: arguments of tool call %zu are no object, wanted one",
                           index, i);
        cq_render_text(r, "<tool_call>\n<function=");
        cq_json_str(&r->text, json_object_get(call, "name"));
        cq_render_text(r, ">\n");
        const char *name;
        json_t *value;
        json_object_foreach((json_t *)arguments, name, value) {
            cq_buffer_format(&r->text, "<parameter=%s>\n", name);
            add_value(r, value);
            cq_render_text(r, "\n</parameter>\n");
        }
        cq_render_text(r, "</function>\n</tool_call>\n");
    }
    return CQ_OK;
}

/// The text before the tool calls of a turn; an old turn (`truncated`) loses its reasoning.
static void add_before_calls(cq_render *r, cq_slice content, bool is_string, bool truncated) {
    if (!is_string || cq_slice_strip(content).n == 0) {
        cq_render_text(r, "<think></think>");
        return;
    }
    if (truncated) {
        if (cq_slice_find(content, "</think>") >= 0)
            content = cq_slice_after_last(content, "</think>");
        else
            content = cq_slice_before_first(content, "<think>");
        cq_render_text(r, "<think></think>");
    }
    cq_render_add(r, cq_slice_strip(content));
    cq_render_text(r, "\n");
}

static void add_plain(cq_render *r, cq_slice content, bool truncated) {
    if (!truncated || cq_slice_find(content, "<think>") < 0 ||
        cq_slice_find(content, "</think>") < 0) {
        cq_render_add(r, cq_slice_strip(content));
        return;
    }
    // the prefix shields what follows it from trimming on the left
    cq_slice rest = cq_slice_after_last(content, "</think>"), trimmed = cq_slice_strip(rest);
    cq_render_text(r, "<think></think>");
    if (trimmed.n > 0)
        cq_render_add(r, (cq_slice){rest.s, trimmed.s + trimmed.n - rest.s});
}

static int add_assistant(cq_render *r, const json_t *message, size_t index, bool truncated) {
    const json_t *calls = json_object_get(message, "tool_calls");
    cq_buffer unified = {0};
    bool is_string = unify(&unified, message);
    cq_slice content = {unified.data ? unified.data : "", unified.bytes};
    cq_render_text(r, "<|im_start|>assistant\n");
    int64_t begin = r->text.bytes;
    int status = CQ_OK;
    if (json_array_size(calls) > 0) {
        add_before_calls(r, content, is_string, truncated);
        status = add_tool_calls(r, calls, index);
    } else {
        add_plain(r, content, truncated);
    }
    r->text.failed = r->text.failed || unified.failed;
    cq_buffer_free(&unified);
    cq_render_text(r, "<|im_end|>");
    cq_render_span(r, begin);
    cq_render_text(r, "\n");
    return status;
}

/// Messages from `first` on; `last_user` counts from there.
typedef struct turns {
    const json_t *messages;
    size_t first, n;
    int64_t last_user;
    bool truncate;
    const json_t *budget; ///< reasoning_budget, NULL: none
} turns;

static const json_t *turn_at(const turns *t, size_t i) {
    return json_array_get(t->messages, t->first + i);
}

static void add_user(cq_render *r, const turns *t, size_t i) {
    const json_t *m = turn_at(t, i);
    cq_render_text(r, cq_role_is(m, "user") ? "<|im_start|>user\n" : "<|im_start|>system\n");
    cq_json_str(&r->text, json_object_get(m, "content"));
    if (cq_role_is(m, "user") && (int64_t)i == t->last_user && t->budget) {
        cq_render_text(r, "\n\n{thinking token budget: ");
        cq_json_str(&r->text, t->budget);
        cq_render_text(r, "}");
    }
    cq_render_text(r, "<|im_end|>\n");
}

static void add_tool_result(cq_render *r, const turns *t, size_t i) {
    if (i > 0 && !cq_role_is(turn_at(t, i - 1), "tool"))
        cq_render_text(r, "<|im_start|>user\n");
    cq_render_text(r, "<tool_response>\n");
    cq_json_str(&r->text, json_object_get(turn_at(t, i), "content"));
    cq_render_text(r, "\n</tool_response>\n");
    if (i + 1 == t->n || !cq_role_is(turn_at(t, i + 1), "tool"))
        cq_render_text(r, "<|im_end|>\n");
}

static int add_turn(cq_render *r, const turns *t, size_t i) {
    const json_t *m = turn_at(t, i), *content = json_object_get(m, "content");
    if (cq_role_is(m, "assistant"))
        return add_assistant(r, m, t->first + i, t->truncate && (int64_t)i < t->last_user);
    if (cq_role_is(m, "user") || cq_role_is(m, "system")) {
        add_user(r, t, i);
        return CQ_OK;
    }
    if (cq_role_is(m, "tool")) {
        add_tool_result(r, t, i);
        return CQ_OK;
    }
    if (!cq_json_is_string(content))
        return cq_fail(CQ_EDATA, "message %zu: no content, wanted a string", t->first + i);
    cq_render_text(r, "<|im_start|>");
    cq_json_str(&r->text, json_object_get(m, "role"));
    cq_render_text(r, "\n");
    cq_render_add(r, cq_slice_of(content));
    cq_render_text(r, "<|im_end|>\n");
    return CQ_OK;
}

int cq_nano3_render(cq_render *r, const json_t *root) {
    const json_t *messages = json_object_get(root, "messages"),
                 *first = json_array_get(messages, 0);
    const json_t *thinking = cq_render_option(root, "enable_thinking");
    const json_t *truncate = cq_render_option(root, "truncate_history_thinking");
    const json_t *budget = cq_render_option(root, "reasoning_budget");
    bool has_system = cq_role_is(first, "system");
    const json_t *content = has_system ? json_object_get(first, "content") : NULL;
    if (content && !cq_json_is_string(content))
        return cq_fail(CQ_EDATA,
                       "message 0: content of the system message is no string, wanted one");
    cq_slice system = content ? cq_slice_of(content) : cq_slice_text("");
    CQ_TRY(add_system(r, root, has_system && !content ? NULL : &system));
    turns t = {messages,
               has_system,
               json_array_size(messages) - has_system,
               -1,
               !truncate || cq_json_truth(truncate),
               json_is_null(budget) ? NULL : budget};
    for (size_t i = 0; i < t.n; i++)
        if (cq_role_is(turn_at(&t, i), "user"))
            t.last_user = (int64_t)i;
    for (size_t i = 0; i < t.n; i++)
        CQ_TRY(add_turn(r, &t, i));
    if (cq_json_truth(json_object_get(root, "add_generation_prompt")))
        cq_render_text(r, !thinking || cq_json_truth(thinking)
                              ? "<|im_start|>assistant\n<think>\n"
                              : "<|im_start|>assistant\n<think></think>");
    return CQ_OK;
}
