/// render.c - Python's string methods on slices, and assistant spans.
///
/// A span is what the model has to produce: the turn after its role line up to and including
/// <|im_end|>, less the opening that a generation prompt puts there ("<think>\n", or
/// "<think></think>" with thinking disabled).
#define _GNU_SOURCE // memmem
#include "core/text/render.h"

#include "core/text/utf8.h"

#include <string.h>

cq_slice cq_slice_of(const json_t *string) {
    return (cq_slice){json_string_value(string), (int64_t)json_string_length(string)};
}

cq_slice cq_slice_text(const char *text) { return (cq_slice){text, (int64_t)strlen(text)}; }

bool cq_slice_starts(cq_slice a, const char *prefix) {
    int64_t k = (int64_t)strlen(prefix);
    return a.n >= k && memcmp(a.s, prefix, (size_t)k) == 0;
}

bool cq_slice_ends(cq_slice a, const char *suffix) {
    int64_t k = (int64_t)strlen(suffix);
    return a.n >= k && memcmp(a.s + a.n - k, suffix, (size_t)k) == 0;
}

int64_t cq_slice_find(cq_slice a, const char *needle) {
    const char *found = a.n > 0 ? memmem(a.s, (size_t)a.n, needle, strlen(needle)) : NULL;
    return found ? found - a.s : -1;
}

int64_t cq_slice_find_last(cq_slice a, const char *needle) {
    int64_t k = (int64_t)strlen(needle);
    for (int64_t i = a.n - k; i >= 0; i--)
        if (memcmp(a.s + i, needle, (size_t)k) == 0)
            return i;
    return -1;
}

cq_slice cq_slice_after_last(cq_slice a, const char *needle) {
    int64_t at = cq_slice_find_last(a, needle);
    int64_t skip = at < 0 ? 0 : at + (int64_t)strlen(needle);
    return (cq_slice){a.s + skip, a.n - skip};
}

cq_slice cq_slice_before_first(cq_slice a, const char *needle) {
    int64_t at = cq_slice_find(a, needle);
    return (cq_slice){a.s, at < 0 ? a.n : at};
}

cq_slice cq_slice_strip(cq_slice a) {
    int32_t cp;
    while (a.n > 0) {
        int64_t k = cq_utf8_next(&cp, a.s, a.n);
        if (!cq_python_space(cp))
            break;
        a = (cq_slice){a.s + k, a.n - k};
    }
    while (a.n > 0) {
        int64_t at = a.n - 1;
        while (at > 0 && ((uint8_t)a.s[at] & 0xC0) == 0x80)
            at--;
        cq_utf8_next(&cp, a.s + at, a.n - at);
        if (!cq_python_space(cp))
            break;
        a.n = at;
    }
    return a;
}

cq_slice cq_slice_lstrip_newlines(cq_slice a) {
    while (a.n > 0 && a.s[0] == '\n')
        a = (cq_slice){a.s + 1, a.n - 1};
    return a;
}

cq_slice cq_slice_rstrip_newlines(cq_slice a) {
    while (a.n > 0 && a.s[a.n - 1] == '\n')
        a.n--;
    return a;
}

void cq_render_add(cq_render *r, cq_slice a) { cq_buffer_add(&r->text, a.s, a.n); }

void cq_render_text(cq_render *r, const char *text) { cq_buffer_add_text(&r->text, text); }

int64_t cq_prompt_bytes(cq_slice turn) {
    static const char *const openings[] = {"<think>\n", "<think></think>"};
    for (int i = 0; i < 2; i++)
        if (cq_slice_starts(turn, openings[i]))
            return (int64_t)strlen(openings[i]);
    return 0;
}

void cq_render_span(cq_render *r, int64_t begin) {
    if (r->text.failed)
        return;
    cq_slice turn = {(char *)r->text.data + begin, r->text.bytes - begin};
    cq_span span = {begin + cq_prompt_bytes(turn), r->text.bytes};
    cq_buffer_add(&r->spans, &span, sizeof span);
}

bool cq_role_is(const json_t *message, const char *role) {
    const char *text = json_string_value(json_object_get(message, "role"));
    return text && strcmp(text, role) == 0;
}

const json_t *cq_render_option(const json_t *root, const char *key) {
    const json_t *inner = json_object_get(json_object_get(root, "chat_template_kwargs"), key);
    return inner ? inner : json_object_get(root, key);
}
