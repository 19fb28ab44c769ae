/// split.h - cutting text into words by regular expressions (the pre_tokenizer of tokenizer.json).
#pragma once
#include "core/base/types.h"

typedef struct cq_split cq_split;
/// How a step treats matches and the gaps between them: both become pieces, or the matches
/// (`invert`: the gaps) vanish.
typedef enum cq_split_behavior { CQ_SPLIT_ISOLATED, CQ_SPLIT_REMOVED } cq_split_behavior;

/// Appends a step to *s. `literal`: the pattern is plain text. CQ_EDATA says where the pattern is
/// not understood.
int cq_split_add(cq_split **s, const char *pattern, int64_t bytes, bool literal,
                 cq_split_behavior behavior, bool invert);
void cq_split_free(cq_split *s);

/// Per-thread working memory for all steps.
typedef struct cq_split_scratch cq_split_scratch;
int cq_split_begin(cq_split_scratch **out, const cq_split *s);
void cq_split_end(cq_split_scratch *w);
/// Calls `piece` for each non-empty piece of text[0, n) (valid UTF-8) in order; a status other than
/// 0 ends the walk.
int cq_split_run(const cq_split *s, cq_split_scratch *w, const char *text, int64_t n,
                 int (*piece)(void *context, const char *text, int64_t begin, int64_t end),
                 void *context);
