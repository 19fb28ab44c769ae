/// vocab.h - the tables of a byte-level BPE: pieces by id, ids by bytes, merges by pair.
#pragma once
#include "core/base/types.h"
#include "core/text/buffer.h"

/// One id: its content as the file spells it and the bytes it stands for; n_content = -1 where the
/// id is unused.
typedef struct cq_piece {
    int64_t content, bytes; ///< offsets into the vocabulary's two buffers
    int32_t n_content, n_bytes;
} cq_piece;

typedef struct cq_merge {
    uint64_t pair; ///< left << 32 | right; UINT64_MAX: empty slot
    int32_t rank, id;
} cq_merge;

typedef struct cq_vocab {
    cq_piece *pieces; ///< [size]
    int64_t size, room;
    cq_buffer content, bytes;
    int32_t *slots; ///< [n_slots] open addressing by bytes; -1: empty
    int64_t n_slots;
    cq_merge *merges; ///< [n_merges] open addressing by pair
    int64_t n_merges;
    int32_t byte_id[256];
} cq_vocab;

void cq_vocab_free(cq_vocab *v);
/// Sizes the two hash tables for that many entries.
int cq_vocab_init(cq_vocab *v, int64_t n_pieces, int64_t n_merges);
/// Enters `content` under `id`. `model`: it is a piece that merges can produce, not only an added
/// token.
int cq_vocab_put(cq_vocab *v, int64_t id, const char *content, int64_t n, bool model);
/// Id of the model's piece with these bytes, -1 when there is none.
int32_t cq_vocab_find(const cq_vocab *v, const char *bytes, int64_t n);
/// Id by content as the file spells it, -1 when there is none.
int32_t cq_vocab_find_content(const cq_vocab *v, const char *content, int64_t n);
int cq_vocab_put_merge(cq_vocab *v, int32_t left, int32_t right, int32_t rank, int32_t id);
/// The merge of a pair or NULL.
const cq_merge *cq_vocab_merge(const cq_vocab *v, int32_t left, int32_t right);
/// Fills byte_id; CQ_EDATA names the first byte value that no piece stands for.
int cq_vocab_bytes(cq_vocab *v);

typedef struct cq_symbol {
    int32_t id, prev, next, bytes; ///< bytes = 0: merged into its left neighbour
} cq_symbol;
typedef struct cq_candidate {
    int32_t rank, at, id;
} cq_candidate;
/// Working memory of cq_bpe, reused from word to word.
typedef struct cq_bpe_scratch {
    cq_symbol *symbols;
    cq_candidate *heap;
    int64_t room, n_heap;
} cq_bpe_scratch;
void cq_bpe_free(cq_bpe_scratch *s);
/// Merges the n bytes of one word, lowest rank first, leftmost first among equals, in O(n log n).
/// Leaves a list in s->symbols that starts at index 0 and ends with next = -1.
int cq_bpe(cq_bpe_scratch *s, const cq_vocab *v, const char *word, int64_t n);
