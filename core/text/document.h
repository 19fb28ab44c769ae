/// document.h - one JSONL line as token ids with a loss mask.
#pragma once
#include "core/text/buffer.h"
#include "core/text/corpus.h"

typedef struct cq_document {
    cq_buffer ids;  ///< int32_t []
    cq_buffer mask; ///< uint8_t []
    bool cut;       ///< was longer than max_tokens
} cq_document;

/// Fills `d` (reused from line to line) from one line. The message says what is wrong, not where.
int cq_document_read(cq_document *d, const char *line, int64_t bytes, const cq_tokenizer *tok,
                     const cq_corpus_options *o);
void cq_document_free(cq_document *d);
