/// normalize.h - text before it is cut into words: broken UTF-8 replaced, composed to NFC, with the
/// way back kept.
#pragma once
#include "core/base/types.h"

typedef struct cq_mapped {
    const char *text;
    int64_t bytes;
    char *owned;   ///< what `text` points to when it differs from the input, else NULL
    int64_t *from; ///< [bytes + 1] input byte of every output byte; NULL: the same position
} cq_mapped;

/// U+FFFD for every broken sequence. Borrows `text` when nothing changes.
int cq_mapped_clean(cq_mapped *out, const char *text, int64_t bytes);
/// Canonical composition (NFC) of valid UTF-8. Borrows `text` when nothing changes. In a stretch of
/// non-ASCII characters that changes, every output byte from the first difference on maps to that
/// difference.
int cq_mapped_nfc(cq_mapped *out, const char *text, int64_t bytes);
/// Input byte of output byte `at` (0 to bytes).
int64_t cq_mapped_from(const cq_mapped *m, int64_t at);
void cq_mapped_free(cq_mapped *m);
