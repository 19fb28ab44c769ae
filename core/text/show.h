/// show.h - a document printed so that a person sees what is trained on.
#pragma once
#include "core/text/corpus.h"

/// The document's text with its targets in colour, or between [[ and ]] when `color` is false;
/// control characters are printed as \xNN, line ends are kept. Without tokenizer (NULL) the ids.
/// *text is malloc'd.
CQ_API int cq_corpus_show(const cq_corpus *c, const cq_tokenizer *t, int64_t doc, bool color,
                          char **text);
