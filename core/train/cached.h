/// cached.h - reading a file of cache.h, for core/train/*.c only.
#pragma once
#include "core/train/cache.h"

typedef struct cq_cached {
    cq_safetensors *st;
    char path[4096];
    int64_t k, n_rows, n_groups, n_taps, triangles; ///< triangles: elements of one block's Grams
    bool half;                                      ///< log_p and grams are F16
    const int32_t *ids, *rows, *groups, *taps, *exponents;
    const void *log_p, *log_tail, *log_label, *grams;
} cq_cached;

/// Writes 64 hex digits over ids, labels and boundaries of a micro-batch.
void cq_cached_hash(char hex[65], const cq_batch *b);
/// Opens and checks a file against the micro-batch it must be of. CQ_EDATA names the file, what was
/// found and what was wanted.
int cq_cached_open(cq_cached *c, const char *path, const cq_batch *b, cq_dtype dtype,
                   int64_t vocab);
/// Accepts a zeroed one.
void cq_cached_close(cq_cached *c);
/// at[t] = the row of each labelled token.
void cq_cached_at(int32_t *at, const cq_batch *b);
/// Room on a device for what kl_cached reads of one chunk; nothing where the plan is the host's,
/// and the file is read where it lies.
typedef struct cq_cached_room {
    cq_tensor ids, log_p, log_tail, log_label, at;
    int32_t *host_at; ///< [tokens] rows of the file; owned
} cq_cached_room;
int cq_cached_plan(cq_cached_room *room, cq_plan *p, int64_t tokens, int64_t chunk, int64_t k,
                   cq_dtype dtype);
void cq_cached_room_close(cq_cached_room *room);
/// kl_cached's arguments that come from the file, for tokens [begin, begin + n) of the micro-batch
/// that host_at was filled for.
int cq_cached_chunk(cq_kl_cached_args *a, const cq_cached_room *room, const cq_cached *c,
                    const cq_batch *b, int64_t begin, int64_t n);
/// Fails unless the file's sample is these rows.
int cq_cached_check_rows(const cq_cached *c, const int32_t *rows, int64_t n);
/// The Gram of rows of group g at a block, [n_g, n_g] of `dtype` wherever it lies, centred as
/// cq_tap_gram does; CQ_EDATA when the file has none of this block.
int cq_cached_gram(const cq_cached *c, int64_t block, int64_t g, bool unbiased, cq_dtype dtype,
                   void *gram);
