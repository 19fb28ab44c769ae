/// cache.h - an offline teacher: what it computes for a micro-batch, written to a file once, so
/// that many trainings need neither its weights nor its time.
///
/// A file holds, for the V labelled tokens of one micro-batch, in order, and the tapped blocks:
///
///     ids I32, log_p F16 or the model's dtype [V, k]    top_logits of kernels.h
///     log_tail, log_label [V]                           in the model's dtype
///     rows I32 [n], groups I32 [g], taps I32 [t]        sampled rows, rows in each Gram, blocks
///     grams as log_p [t, sum n_g (n_g + 1) / 2]         lower triangles of the biased centred
///     Grams exponents I32 [t, g]                              grams hold 2^exponent times their
///     values
///
/// and in its metadata the SHA-256 of the micro-batch's ids, labels and boundaries. The biased Gram
/// serves the unbiased form too: U-centring takes out what centring did. Bytes of a token: k (4 +
/// b)
/// + 8 and of Grams t n (n + 1) b / 2 over the micro-batch's tokens, b = 2 (F16) or 4 (F32).
#pragma once
#include "core/model/model.h"

typedef struct cq_recorder_options {
    int64_t top_k;         ///< entries of the teacher's distribution; at most the vocabulary
    int64_t chunk;         ///< tokens per logits chunk
    cq_dtype storage;      ///< CQ_F16, or the model's own dtype
    int64_t rows;          ///< sampled tokens per Gram, as in cq_distill_options
    const bool *taps;      ///< [n_blocks]
    uint64_t seed;         ///< of the sampled rows
    int64_t held_out_rows; ///< rows in a Gram of held-out documents, at most; cq_eval has 512
} cq_recorder_options;

typedef struct cq_recorder cq_recorder;
CQ_API int cq_recorder_open(cq_recorder **out, cq_model *teacher, const cq_recorder_options *o);
CQ_API void cq_recorder_close(cq_recorder *r);
/// Declares logits, entries and Grams for micro-batches of up to `tokens` tokens.
CQ_API int cq_recorder_plan(cq_recorder *r, cq_plan *p, int64_t tokens);
/// One forward of the teacher, and a file that appears whole or not at all. With `held_out` its
/// Grams are those of cq_eval: all blocks, all rows, in groups; step and micro are not looked at.
/// *bytes: size of the tensors. CQ_ENUMERIC when an output is not finite.
CQ_API int cq_recorder_write(cq_recorder *r, cq_stream *s, const cq_batch *b, int64_t step,
                             int64_t micro, bool held_out, const char *path, int64_t *bytes);
