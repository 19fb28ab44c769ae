/// test_chat.c - the renderers against the text that Jinja2 makes of the templates, and assistant
/// spans.
///
/// golden/*.chat.json and golden/chat_more.json (edges: floats, wide integers, repr, white space,
/// tools) must all be equal.
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/text/chat.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

static json_t *load_json(const char *path) {
    // wide integers must reach the renderer as they stand, so cases are cut out of the text and
    // never re-printed
    json_error_t error;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error);
    cr_assert_not_null(root, "%s:%d: %s", path, error.line, error.text);
    return root;
}

static void check_golden(const char *model, cq_template t) {
    char path[512];
    snprintf(path, sizeof path, "%s/golden/%s.chat.json", CQ_TESTS, model);
    json_t *cases = load_json(path);
    cr_assert_geq(json_array_size(cases), 20);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        char *json = json_dumps(c, 0), *text;
        int64_t bytes;
        OK(cq_template_render(t, json, &text, &bytes, NULL, NULL));
        cr_expect_str_eq(text, json_string_value(json_object_get(c, "text")), "%s: case %zu", model,
                         i);
        cr_expect_eq(bytes, (int64_t)strlen(text));
        free(json);
        free(text);
    }
    json_decref(cases);
}

Test(chat, nano3_equals_jinja_in_all_golden_cases) {
    check_golden("nemotron_h_gsm8k", CQ_TEMPLATE_NANO3);
}

Test(chat, qwen3_thinking_equals_jinja_in_all_golden_cases) {
    check_golden("qwen3_gsm8k", CQ_TEMPLATE_QWEN3_THINKING);
}

/// chat_more.json has one key or value per line; a case runs from the line `"case": {` to the line
/// before `"text":`.
Test(chat, both_equal_jinja_at_the_edges) {
    char *all, path[512];
    int64_t bytes;
    snprintf(path, sizeof path, "%s/golden/chat_more.json", CQ_TESTS);
    OK(cq_file_read(&all, &bytes, path));
    int n = 0;
    for (char *at = all; (at = strstr(at, "\n\"case\": {")); n++) {
        char *json = at + strlen("\n\"case\": "), *end = strstr(json, "\n},\n\"text\": ");
        cr_assert_not_null(end);
        cq_template t = strncmp(at - strlen("\"nano3\","), "\"nano3\",", 8) == 0
                            ? CQ_TEMPLATE_NANO3
                            : CQ_TEMPLATE_QWEN3_THINKING;
        char *wanted_at = end + strlen("\n},\n\"text\": "), *wanted_end = strstr(wanted_at, "\n}");
        json_t *wanted = json_loadb(wanted_at, (size_t)(wanted_end - wanted_at),
                                    JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        cr_assert_not_null(wanted);
        end[2] = 0;
        char *text;
        int64_t got;
        OK(cq_template_render(t, json, &text, &got, NULL, NULL));
        cr_expect((size_t)got == json_string_length(wanted) &&
                      memcmp(text, json_string_value(wanted), (size_t)got) == 0,
                  "case %d:\n%s\nwanted:\n%s", n, text, json_string_value(wanted));
        free(text);
        json_decref(wanted);
        at = wanted_end;
    }
    cr_expect_eq(n, 120);
    free(all);
}

/// Renders, and checks that the spans cut out of the text are `wanted`, joined with '|'.
static void expect_spans(cq_template t, const char *json, const char *wanted) {
    char *text, joined[4096] = "";
    cq_span *spans;
    int64_t bytes, n;
    OK(cq_template_render(t, json, &text, &bytes, &spans, &n));
    for (int64_t i = 0; i < n; i++) {
        cr_assert(spans[i].begin <= spans[i].end && spans[i].end <= bytes);
        snprintf(joined + strlen(joined), sizeof joined - strlen(joined), "%s%.*s", i ? "|" : "",
                 (int)(spans[i].end - spans[i].begin), text + spans[i].begin);
    }
    cr_expect_str_eq(joined, wanted, "%s", json);
    free(text);
    free(spans);
}

static const char two_turns[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", "
    "\"content\": \"b\", "
    "\"reasoning_content\": \"why\"}, {\"role\": \"user\", \"content\": \"c\"}, {\"role\": "
    "\"assistant\", \"content\": "
    "\"d\", \"reasoning_content\": \"how\"}], \"add_generation_prompt\": true}";
static const char tools_turn[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
                                 "{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": "
                                 "[{\"name\": \"f\", \"arguments\": {\"x\": 1}}]}, {\"role\": "
                                 "\"tool\", \"content\": \"1\"}, {\"role\": \"assistant\", "
                                 "\"content\": \"one\"}]}";

Test(chat, spans_hold_what_the_model_has_to_write) {
    expect_spans(CQ_TEMPLATE_NANO3, two_turns, "\nb<|im_end|>|how\n</think>\nd<|im_end|>");
    expect_spans(CQ_TEMPLATE_QWEN3_THINKING, two_turns, "b<|im_end|>|how\n</think>\n\nd<|im_end|>");
    expect_spans(CQ_TEMPLATE_NANO3, tools_turn,
                 "\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</"
                 "tool_call>\n<|im_end|>|"
                 "one<|im_end|>");
    expect_spans(CQ_TEMPLATE_QWEN3_THINKING, tools_turn,
                 "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": "
                 "1}}\n</tool_call><|im_end|>|\n</think>\n\n"
                 "one<|im_end|>");
    expect_spans(
        CQ_TEMPLATE_NANO3,
        "{\"messages\": [{\"role\": \"user\", \"content\": \"<|im_start|>assistant\\nx\"}]}", "");
}

/// The generation prompt followed by a span is how the turn reads in the text: training and use see
/// the same context.
Test(chat, a_span_continues_the_generation_prompt) {
    static const char *const question = "{\"messages\": [{\"role\": \"user\", \"content\": "
                                        "\"a\"}], \"add_generation_prompt\": true}";
    static const char *const answer = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
                                      "{\"role\": \"assistant\", \"content\": \"b\", "
                                      "\"reasoning_content\": \"why\"}]}";
    for (int t = CQ_TEMPLATE_NANO3; t <= CQ_TEMPLATE_QWEN3_THINKING; t++) {
        char *prompt, *whole;
        int64_t n_prompt, n_whole, n_spans;
        cq_span *spans;
        OK(cq_template_render((cq_template)t, question, &prompt, &n_prompt, NULL, NULL));
        OK(cq_template_render((cq_template)t, answer, &whole, &n_whole, &spans, &n_spans));
        cr_expect_eq(n_spans, 1);
        cr_expect_eq(spans[0].begin, n_prompt, "template %d", t);
        cr_expect(strncmp(prompt, whole, (size_t)n_prompt) == 0, "template %d", t);
        free(prompt);
        free(whole);
        free(spans);
    }
}

Test(chat, malformed_conversations_are_refused_with_the_place) {
    static const struct {
        const char *json, *named;
    } cases[] = {
        {"{", "JSON"},
        {"[]", "messages"},
        {"{\"messages\": {}}", "messages"},
        {"{\"messages\": []}", "empty"},
        {"{\"messages\": [5]}", "message 0"},
        {"{\"messages\": [{\"content\": \"x\"}]}", "role"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"tools\": 5}", "tools"},
        {"{\"messages\": [{\"role\": \"system\", \"content\": [1]}]}", "message 0"},
        {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\", \"tool_calls\": {\"a\": "
         "1}}]}",
         "tool_calls"},
        {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\", \"tool_calls\": [3]}]}",
         "tool call 0"}};
    for (int t = CQ_TEMPLATE_NANO3; t <= CQ_TEMPLATE_QWEN3_THINKING; t++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            char *text;
            int64_t bytes;
            cr_expect_eq(
                cq_template_render((cq_template)t, cases[i].json, &text, &bytes, NULL, NULL),
                CQ_EDATA, "%s", cases[i].json);
            cr_expect(strstr(cq_error(), cases[i].named), "%s: \"%s\"", cases[i].json, cq_error());
        }
    char *text;
    int64_t bytes;
    cr_expect_eq(cq_template_render(CQ_TEMPLATE_NONE, two_turns, &text, &bytes, NULL, NULL),
                 CQ_EDATA);
    cr_expect(strstr(cq_error(), "--template"), "%s", cq_error());
    cr_expect_eq(
        cq_template_render(
            CQ_TEMPLATE_NANO3,
            "{\"messages\": [{\"role\": \"assistant\", \"tool_calls\": [{\"arguments\": \"x\"}]}]}",
            &text, &bytes, NULL, NULL),
        CQ_EDATA);
    cr_expect(strstr(cq_error(), "arguments"), "%s", cq_error());
}

static void write_text(const char *dir, const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    OK(cq_file_write(path, text, (int64_t)strlen(text)));
}

Test(chat, templates_are_known_by_their_hash) {
    cq_template t;
    bool warned;
    OK(cq_template_find(&t, &warned, CQ_TESTS "/golden/nemotron_h_gsm8k", NULL));
    cr_expect(t == CQ_TEMPLATE_NANO3 && !warned);
    OK(cq_template_find(&t, &warned, CQ_TESTS "/golden/qwen3_gsm8k", NULL));
    cr_expect(t == CQ_TEMPLATE_QWEN3_THINKING && !warned);
    OK(cq_template_find(&t, &warned, CQ_TESTS "/golden/qwen3_gsm8k", "qwen3-thinking"));
    cr_expect(t == CQ_TEMPLATE_QWEN3_THINKING && !warned,
              "forcing what is found anyway needs no warning");
    OK(cq_template_find(&t, &warned, CQ_TESTS "/golden/qwen3_gsm8k", "nano3"));
    cr_expect(t == CQ_TEMPLATE_NANO3 && warned);
    cr_expect_eq(cq_template_find(&t, &warned, CQ_TESTS "/golden/qwen3_gsm8k", "llama"), CQ_EUSAGE);
}

Test(chat, an_unknown_template_is_an_error_unless_one_is_forced) {
    char dir[] = "/tmp/cq_chat_XXXXXX";
    cr_assert_not_null(mkdtemp(dir));
    cq_template t;
    bool warned;
    OK(cq_template_find(&t, &warned, dir, NULL));
    cr_expect(t == CQ_TEMPLATE_NONE && !warned, "a folder without template has none");
    write_text(dir, "tokenizer_config.json",
               "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"x\"}, {\"name\": "
               "\"default\", \"template\": \"y\"}]}");
    cr_expect_eq(cq_template_find(&t, &warned, dir, NULL), CQ_EDATA);
    cr_expect(strstr(cq_error(), "--template=nano3|qwen3-thinking"), "%s", cq_error());
    OK(cq_template_find(&t, &warned, dir, "nano3"));
    cr_expect(t == CQ_TEMPLATE_NANO3 && warned);
    write_text(dir, "chat_template.jinja", "{{ other }}");
    cr_expect_eq(cq_template_find(&t, &warned, dir, NULL), CQ_EDATA);
    write_text(dir, "tokenizer_config.json", "{");
    cr_expect_eq(cq_template_find(&t, &warned, dir, NULL), CQ_EDATA);
    cq_folder_remove(dir);
}
