/// tokenizer.h - byte-level BPE from a Hugging Face tokenizer.json (models.md section 6).
#pragma once
#include "core/base/types.h"

typedef struct cq_tokenizer cq_tokenizer;

/// Reads `dir/tokenizer.json` and the added tokens of `dir/tokenizer_config.json` (which must
/// agree). CQ_EDATA names the file and the part that is not supported.
CQ_API int cq_tokenizer_open(cq_tokenizer **out, const char *dir);
CQ_API void cq_tokenizer_close(cq_tokenizer *t);
/// Encodes without adding special tokens of a post-processor; every broken UTF-8 sequence is read
/// as U+FFFD. *ids is malloc'd.
CQ_API int cq_tokenizer_encode(const cq_tokenizer *t, const char *text, int64_t bytes,
                               int32_t **ids, int64_t *n);
/// Encodes and tells where each token begins: byte positions in `text`, ascending; in a non-ASCII
/// stretch that NFC changes, its first difference. *begins is malloc'd, [n]; NULL when it is not
/// wanted.
CQ_API int cq_tokenizer_encode_offsets(const cq_tokenizer *t, const char *text, int64_t bytes,
                                       int32_t **ids, int64_t **begins, int64_t *n);
/// Decodes, special tokens included, invalid UTF-8 and ids without a token as U+FFFD. *text is
/// malloc'd, zero-terminated.
CQ_API int cq_tokenizer_decode(const cq_tokenizer *t, const int32_t *ids, int64_t n, char **text,
                               int64_t *bytes);
/// Id of an added or ordinary token by its exact content, -1 when there is none.
CQ_API int32_t cq_tokenizer_id(const cq_tokenizer *t, const char *content);
/// Largest id + 1.
CQ_API int64_t cq_tokenizer_size(const cq_tokenizer *t);
/// SHA-256 of tokenizer.json.
CQ_API const char *cq_tokenizer_hash(const cq_tokenizer *t);
