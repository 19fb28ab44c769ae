/// render.h - what the two chat renderers share: text under construction with its assistant spans,
/// and string methods.
#pragma once
#include "core/text/buffer.h"
#include "core/text/chat.h"
#include "core/text/json.h"

/// A stretch of somebody else's text.
typedef struct cq_slice {
    const char *s;
    int64_t n;
} cq_slice;

typedef struct cq_render {
    cq_buffer text;
    cq_buffer spans; ///< cq_span []
} cq_render;

int cq_nano3_render(cq_render *r, const json_t *root);
int cq_qwen3_thinking_render(cq_render *r, const json_t *root);

/// As cq_template_render, for a conversation that is parsed already.
int cq_template_render_json(cq_template t, const json_t *root, char **text, int64_t *bytes,
                            cq_span **spans, int64_t *n_spans);

cq_slice cq_slice_of(const json_t *string);
cq_slice cq_slice_text(const char *text);
bool cq_slice_starts(cq_slice a, const char *prefix);
bool cq_slice_ends(cq_slice a, const char *suffix);
/// Offset of the first or last occurrence, -1 when there is none.
int64_t cq_slice_find(cq_slice a, const char *needle);
int64_t cq_slice_find_last(cq_slice a, const char *needle);
/// a.split(needle)[-1] and a.split(needle)[0] in Python; a itself when the needle does not occur.
cq_slice cq_slice_after_last(cq_slice a, const char *needle);
cq_slice cq_slice_before_first(cq_slice a, const char *needle);
/// str.strip(), and newlines only at the left or right end.
cq_slice cq_slice_strip(cq_slice a);
cq_slice cq_slice_lstrip_newlines(cq_slice a);
cq_slice cq_slice_rstrip_newlines(cq_slice a);

void cq_render_add(cq_render *r, cq_slice a);
void cq_render_text(cq_render *r, const char *text);
/// Notes the assistant span [begin, end of text so far), less a think opening that the generation
/// prompt gives.
void cq_render_span(cq_render *r, int64_t begin);
/// Bytes at the start of an assistant turn that a generation prompt provides: "<think>\n" or
/// "<think></think>".
int64_t cq_prompt_bytes(cq_slice turn);
/// Whether a message has this role.
bool cq_role_is(const json_t *message, const char *role);
/// An option of the template: in chat_template_kwargs, else at the top; NULL when it is in neither.
const json_t *cq_render_option(const json_t *root, const char *key);
