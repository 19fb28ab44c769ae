/// batch.h - one micro-batch: documents packed into a single row of tokens.
#pragma once
#include "core/base/types.h"

/// Labels are next-token targets: -100 at each document's last token and where the loss mask is
/// off. Every document restarts attention, positions, convolution and state at its start.
typedef struct cq_batch {
    int64_t tokens, n_docs;
    int32_t *ids;       ///< [tokens]
    int32_t *labels;    ///< [tokens]
    int32_t *positions; ///< [tokens] 0 at each document's start
    int64_t *starts;    ///< [n_docs + 1]; the last entry is tokens
    int64_t *doc;       ///< [n_docs] index of each document in its corpus
    int64_t valid;      ///< labels >= 0
} cq_batch;
