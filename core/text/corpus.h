/// corpus.h - documents of JSONL files as token ids with a loss mask, a seeded held-out split, and
/// packing.
#pragma once
#include "core/text/batch.h"
#include "core/text/chat.h"
#include "core/text/tokenizer.h"

typedef enum cq_mask { CQ_MASK_ALL, CQ_MASK_ASSISTANT } cq_mask;

typedef struct cq_corpus_options {
    cq_template chat;   ///< for `messages` and `prompt`/`completion` lines
    cq_mask mask;       ///< targets: every token, or only those of assistant spans (chat.h)
    int64_t vocab;      ///< ids must be below; an id outside is CQ_EDATA
    int64_t max_tokens; ///< longer documents are cut and counted
} cq_corpus_options;

typedef struct cq_corpus cq_corpus;

/// Reads comma-separated JSONL files. A line holds the first of these that it has:
///   `input_ids` (+ `labels`, aligned with them: the id itself, or -100 = no target);
///   `messages` (+ `tools`, template options): rendered by the chat template;
///   `text`: taken as it is; with CQ_MASK_ASSISTANT its ChatML turns <|im_start|>assistant\n ...
///     <|im_end|> are the spans;
///   `prompt` + `completion`: strings (a user and an assistant turn; put together as they are when
///     there is no template) or two lists of messages; only the completion's turns are spans.
/// With CQ_MASK_ASSISTANT a line without any span (or without labels) is an error. Blank lines are
/// passed over. `tok` may be NULL when all lines hold input_ids. CQ_EDATA names file and line
/// ("FILE:12: ...") for broken JSON, an empty document, a missing key; a file that is not there or
/// has no documents is CQ_EDATA too.
CQ_API int cq_corpus_open(cq_corpus **out, const char *paths, const cq_tokenizer *tok,
                          const cq_corpus_options *o);
CQ_API void cq_corpus_close(cq_corpus *c);
CQ_API int64_t cq_corpus_count(const cq_corpus *c);
CQ_API int64_t cq_corpus_tokens(const cq_corpus *c);
CQ_API int64_t cq_corpus_truncated(const cq_corpus *c);
/// SHA-256 over all boundaries, ids and masks.
CQ_API const char *cq_corpus_hash(const cq_corpus *c);
/// Ids and target mask (mask[i] = 1: token i is a target when predicted from i - 1) of one
/// document.
CQ_API int cq_corpus_doc(const cq_corpus *c, int64_t i, const int32_t **ids, const uint8_t **mask,
                         int64_t *n);
/// Splits: *held gets a seeded `fraction` of the documents (at least 1, at most half), c keeps the
/// others. CQ_EDATA below 2 documents.
CQ_API int cq_corpus_hold_out(cq_corpus *c, double fraction, uint64_t seed, cq_corpus **held);

typedef struct cq_loader_options {
    int64_t seq;   ///< longest document, and tokens per packed sequence
    int64_t batch; ///< packed sequences per optimizer step
    int64_t micro; ///< packed sequences per micro-batch; divides batch
    uint64_t seed;
    bool shuffle; ///< a new seeded order every epoch; false: file order
    bool once;    ///< end after one epoch
} cq_loader_options;

/// Fills micro-batches of at most micro * seq tokens with whole documents in order, so none is lost
/// or repeated within an epoch; a micro-batch may hold the end of one epoch and the start of the
/// next. A step has batch / micro micro-batches (fewer at the end of a `once` epoch).
typedef struct cq_loader cq_loader;
CQ_API int cq_loader_open(cq_loader **out, const cq_corpus *c, const cq_loader_options *o);
CQ_API void cq_loader_close(cq_loader *l);
/// The next step: *n micro-batches in *out (valid until the next call); *n = 0 at the end of a
/// `once` epoch.
CQ_API int cq_loader_next(cq_loader *l, const cq_batch **out, int64_t *n);
/// Position = number of documents handed out since the beginning; `seek` continues from there with
/// the same bits.
CQ_API int64_t cq_loader_position(const cq_loader *l);
CQ_API int cq_loader_seek(cq_loader *l, int64_t position);
/// A micro-batch of given documents' ids (malloc'd, free with cq_batch_free): for golden files and
/// tests.
CQ_API int cq_batch_make(cq_batch **out, const int32_t *ids, const int32_t *labels, int64_t tokens,
                         const int64_t *starts, int64_t n_docs);
CQ_API void cq_batch_free(cq_batch *b);
