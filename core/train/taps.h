/// taps.h - sampled rows of a block's output and the layer losses on them, for core/train/*.c only.
#pragma once
#include "core/train/distill.h"

/// Rows of one micro-batch that Grams are made of: labelled tokens, never a document's first
/// (attention sinks). Writes candidate positions to rows [tokens] and returns how many.
int64_t cq_tap_candidates(int32_t *rows, const cq_batch *b);
/// xs [n, dim] = h[rows], and its Gram.
int cq_tap_gram(cq_stream *s, cq_dtype dtype, const void *h, int64_t dim, const int32_t *rows,
                int64_t n, bool unbiased, void *xs, void *centred, void *gram);
/// The rows a micro-batch's Grams are made of: at most `most` of the candidates, a function of
/// seed, step and micro-batch alone. `rows` has room for 2 * tokens; returns how many it holds.
int64_t cq_tap_sample(int32_t *rows, const cq_batch *b, int64_t most, uint64_t seed, int64_t step,
                      int64_t micro);
/// Held-out rows are compared in groups of at most `most`: the number of groups of `found` rows,
/// and the first row of one.
int64_t cq_tap_groups(int64_t found, int64_t most);
int64_t cq_tap_group_begin(int64_t found, int64_t most, int64_t group);
