/// chat.h - the two chat templates, by hand-written renderers chosen by the SHA-256 of the
/// template's text.
#pragma once
#include "core/base/types.h"

typedef enum cq_template {
    CQ_TEMPLATE_NONE,
    CQ_TEMPLATE_NANO3,
    CQ_TEMPLATE_QWEN3_THINKING
} cq_template;

/// A stretch of rendered text that an assistant turn produced (loss mask), in bytes.
typedef struct cq_span {
    int64_t begin, end;
} cq_span;

/// Finds the template of a model folder: `chat_template.jinja`, else `chat_template` in
/// tokenizer_config.json. `forced` ("nano3", "qwen3-thinking" or NULL) overrides it; *warned then
/// says that the folder's template is another one. An unknown template without `forced` is CQ_EDATA
/// that names --template. A folder without template gives CQ_TEMPLATE_NONE.
CQ_API int cq_template_find(cq_template *out, bool *warned, const char *dir, const char *forced);
/// Renders a conversation given as a JSON object text: {"messages": [...], "tools": [...],
/// "add_generation_prompt": bool, and the template's own flags (enable_thinking,
/// truncate_history_thinking, reasoning_budget) either at the top or in "chat_template_kwargs"}.
/// *text is malloc'd; spans (may be NULL) are the assistant turns' own bytes, closing
/// <|im_end|> included, role line and what the generation prompt opens the turn with ("<think>\n",
/// or "<think></think>" with thinking disabled) excluded; malloc'd.
CQ_API int cq_template_render(cq_template t, const char *json, char **text, int64_t *bytes,
                              cq_span **spans, int64_t *n_spans);
