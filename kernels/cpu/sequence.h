/// sequence.h - block sizes and scratch of the operations along a sequence (attention, SSD), the
/// same for every instruction set, so that the plan can ask for bytes before one is chosen.
#pragma once
#include <omp.h>

#include "core/base/error.h"
#include "kernels/cpu/tile.h"
#include "kernels/kernels.h"

/// Rows of score and decay tiles are this much longer than their block, so that clearing what lies
/// beyond the diagonal is one fixed-size store. At least twice the rows of a strip.
enum { SLACK = 32 };
/// Attention works on tiles of QUERIES x KEYS scores; a unit of the forward has up to UNIT_HEADS
/// query heads.
enum { QUERIES = 64, KEYS = 256, LD = KEYS + SLACK, UNIT_HEADS = 8 };
/// SSD sums ddt_bias, da_log and dd per document; SSD_WAVE documents are worked on before they are
/// added in order.
enum { SSD_WAVE = 32, SSD_SUMS = 3 };

/// Transposed K and V blocks, two score tiles, the running maximum and sum of every row.
static inline int64_t attention_scratch_floats(int64_t head_dim) {
    return 2 * head_dim * LD + 2 * QUERIES * LD + 2 * UNIT_HEADS * QUERIES;
}

/// Floats of the SSD backward's buffers of one chunk, or the forward's, which are a part of them;
/// 16 more per buffer cover its rounding up.
static inline int64_t ssd_scratch_floats(int64_t longest, int64_t chunk, int64_t heads,
                                         int64_t head_dim, int64_t groups, int64_t state) {
    int64_t n = chunk < longest ? chunk : longest, chunks = n > 0 ? (longest + n - 1) / n : 0;
    int64_t wide = head_dim > state ? head_dim : state;
    int64_t sums = 2 * (SSD_WAVE + 1) * SSD_SUMS * heads;
    int64_t states = (chunks + 1) * (heads / groups) * state * head_dim;
    int64_t ld = tile_pad(n) + SLACK, pairs = 3 * n * ld, columns = (state + head_dim) * ld;
    int64_t rows = 3 * n * wide, square = head_dim * tile_pad(state);
    return sums + states + pairs + columns + rows + square + 12 * ld + 32 * 16;
}
/// Length of the longest document.
static inline int64_t sequence_longest(const int64_t *starts, int64_t n_docs) {
    int64_t longest = 0;
    for (int64_t i = 0; i < n_docs; i++)
        longest = starts[i + 1] - starts[i] > longest ? starts[i + 1] - starts[i] : longest;
    return longest;
}

/// This thread's part of the stream's scratch.
static inline void *scratch_of_thread(const cq_stream *s) {
    return (char *)s->scratch + omp_get_thread_num() * s->scratch_bytes;
}
/// CQ_ENOMEM when a thread has less than `need` bytes.
static inline int scratch_check(const cq_stream *s, const char *name, int64_t need) {
    if (s->scratch && s->scratch_bytes >= need)
        return CQ_OK;
    return cq_fail(CQ_ENOMEM, "%s: scratch of %lld bytes per thread, %lld wanted", name,
                   (long long)(s->scratch ? s->scratch_bytes : 0), (long long)need);
}
