/// distill.h - one micro-batch of distillation: both forwards, KL at the head, a layerwise loss at
/// tapped blocks.
///
///     L = w_kl KL(teacher || student) + sum over tapped l of w_l (layer loss l)
///
/// The teacher leaves only its final hidden state and one Gram per tapped block. Logits exist for
/// `chunk` tokens at a time.
#pragma once
#include "core/comm/comm.h"
#include "core/model/model.h"

typedef enum cq_layer_loss {
    CQ_LAYER_NONE,
    CQ_LAYER_CKA,          ///< biased
    CQ_LAYER_CKA_UNBIASED, ///< U-centred
    CQ_LAYER_COSINE,
    CQ_LAYER_MSE,
    CQ_LAYER_GRAM ///< Gram-Frobenius
} cq_layer_loss;

typedef enum cq_logit_loss {
    CQ_LOGIT_KL,
    CQ_LOGIT_CE,     ///< cross-entropy with the labels; the teacher may be NULL
    CQ_LOGIT_POLICY, ///< the same, each label weighted (cq_distill_set_weights): the gradient of
                     ///< - sum weight log q[label], a policy gradient when weights are advantages
    CQ_LOGIT_NONE
} cq_logit_loss;

typedef struct cq_distill_options {
    cq_logit_loss logit_loss;
    cq_kl_form form;
    int64_t top_k;
    int64_t chunk; ///< tokens per logits chunk
    cq_layer_loss layer_loss;
    int64_t rows; ///< sampled tokens per Gram; fewer valid ones are all used, below 4 the term is
                  ///< skipped
    const bool *taps;     ///< [n_blocks]
    const int32_t *order; ///< the tapped blocks as `ratio` adds up their losses; NULL: ascending
    uint64_t seed;        ///< of the sampled rows
    bool many; ///< more than one micro-batch per step: the head's gradient gets a buffer of its own
    int64_t cached_k; ///< above 0: the teacher is NULL, its part comes from files with this many
                      ///< entries a token (cache.h); cq_distill_from before each forward
    int64_t slots;    ///< micro-batches whose results are kept at the same time; 0 counts as 1
    int64_t together; ///< blocks whose Grams one call makes; 0: one on the host, on a device as
                      ///< many as are worth their memory. Bits do not depend on it
    cq_comm *comm;    ///< one Gram over the sampled rows of all its ranks, each of which has a
                      ///< micro-batch at the same time; NULL: over this micro-batch's
} cq_distill_options;

typedef struct cq_distill cq_distill;

CQ_API int cq_distill_open(cq_distill **out, cq_model *teacher, cq_model *student,
                           const cq_distill_options *o);
CQ_API void cq_distill_close(cq_distill *d);
/// Declares logits, Grams and rows; after the models' own plan calls, with the same `tokens`.
CQ_API int cq_distill_plan(cq_distill *d, cq_plan *p, int64_t tokens);

typedef struct cq_distill_result {
    double logit_loss; ///< mean over the micro-batch's valid tokens
    double accuracy;   ///< CE: fraction of labels that are the top-1; KL: top-1 agreement
    int64_t valid;
    int64_t rows; ///< rows in each Gram
    const double
        *layer_loss; ///< [n_blocks] 1 - cka or the alternative; NaN where untapped or skipped
    double weight;   ///< of the layer losses' mean, by cq_distill_backward_ratio
} cq_distill_result;

/// Both forwards. `valid_total` is the number of valid tokens of the whole step (all
/// micro-batches): gradients are normalized by it. `micro` is the global index of the micro-batch
/// in the step. CQ_ENUMERIC names the block whose output or loss is not finite.
CQ_API int cq_distill_forward(cq_distill *d, cq_stream *s, const cq_batch *b, int64_t step,
                              int64_t micro, int64_t valid_total, cq_distill_result *out);
/// The same without waiting for a device: results go to place `slot`, below o.slots, where
/// cq_distill_read finds them until the place is taken again. Losses are not looked at:
/// cq_distill_forward of the same micro-batch, before the weights change, says where one goes
/// wrong.
CQ_API int cq_distill_start(cq_distill *d, cq_stream *s, const cq_batch *b, int64_t step,
                            int64_t micro, int64_t valid_total, int64_t slot);
/// The results in a place; after cq_stream_wait. layer_loss holds until the next read.
CQ_API int cq_distill_read(cq_distill *d, int64_t slot, cq_distill_result *out);
/// Rows in each Gram of the micro-batch at hand, known before its results.
CQ_API int64_t cq_distill_rows(const cq_distill *d);
/// CQ_LOGIT_POLICY: the weight of every token's label in the next forward, whose micro-batch must
/// have `n` tokens; those of labels below 0 count nothing.
CQ_API int cq_distill_set_weights(cq_distill *d, const float *weights, int64_t n);
/// The file of the next forward's micro-batch. CQ_EDATA of that forward names it when it is of
/// another micro-batch, sample or selection of blocks.
CQ_API int cq_distill_from(cq_distill *d, const char *path);
/// Takes these rows for the next forward instead of sampling (golden files).
CQ_API int cq_distill_set_rows(cq_distill *d, const int32_t *rows, int64_t n);
/// Adds the gradient of (valid / valid_total) (w_kl KL + sum_l w_layer[l] loss_l) to the student's
/// parameters. w_layer [n_blocks], may be NULL. With a Gram over ranks, which all call it, the
/// ranks' weights of a block add up, each with its share of the valid tokens.
CQ_API int cq_distill_backward(cq_distill *d, cq_stream *s, const cq_batch *b, double w_kl,
                               const double *w_layer);
/// The same by the rule `ratio`, worked out where the losses are, without waiting: the logit loss
/// counts once, the mean of the layer losses min(max(logit loss, 0) / max(that mean, 1e-8), most)
/// times, for cq_distill_read to tell. Not for a Gram over ranks.
CQ_API int cq_distill_backward_ratio(cq_distill *d, cq_stream *s, const cq_batch *b, double most);
/// The part of a rank without a micro-batch in the others' forward and backward, where experts are
/// dealt out over ranks; nothing to do elsewhere.
CQ_API int cq_distill_serve(cq_distill *d, cq_stream *s);
/// For gradnorm: |dKL/dh| and |dlayer loss/dh| at tapped block outputs over the whole micro-batch,
/// at weight 1, by an extra backward without parameter gradients. Both [n_blocks], 0 where
/// untapped.
CQ_API int cq_distill_norms(cq_distill *d, cq_stream *s, const cq_batch *b, double *kl,
                            double *layer);

/// Held-out comparison, accumulated over batches: KL, negative log-likelihood, top-1 agreement, and
/// minibatch-unbiased CKA of every block over all valid rows in Grams of at most 512 rows (Nguyen
/// et al. 2021, arXiv 2010.15327 eq. 3). Also KL by position in the document, in octaves of the
/// context: octave k holds the tokens at positions 2^k - 1 to 2^(k + 1) - 2.
typedef struct cq_eval cq_eval;
CQ_API int cq_eval_open(cq_eval **out, cq_model *teacher, cq_model *student);
/// The same against files of held-out micro-batches (cache.h) with k entries a token and Grams of
/// at most group_rows rows: KL is that of the k largest and one bucket, a lower bound (the KL
/// itself where k is the vocabulary); the map is not made.
CQ_API int cq_eval_open_cached(cq_eval **out, cq_model *student, int64_t k, int64_t group_rows);
/// The file of the next cq_eval_add.
CQ_API int cq_eval_from(cq_eval *e, const char *path);
CQ_API void cq_eval_close(cq_eval *e);
CQ_API int cq_eval_plan(cq_eval *e, cq_plan *p, int64_t tokens, int64_t chunk);
CQ_API void cq_eval_reset(cq_eval *e);
/// Whether the batches that follow also make the map of all teacher blocks against all student
/// blocks (default: no), over 128 evenly spaced rows of each batch. Its Grams are always planned.
CQ_API void cq_eval_want_map(cq_eval *e, bool on);
/// Whether the batches that follow also compare each block in four ways (default: no), on the host;
/// never against a cache.
CQ_API void cq_eval_want_geometry(cq_eval *e, bool on);
CQ_API int cq_eval_add(cq_eval *e, cq_stream *s, const cq_batch *b);
typedef struct cq_eval_result {
    double kl, top1; ///< nats per token; fraction
    double perplexity_teacher, perplexity_student;
    int64_t tokens;
    double cka_mean, cka_min;
    int64_t cka_min_block;
    const double *cka; ///< [n_blocks]
    int64_t n_octaves;
    const double *octave_kl;      ///< [n_octaves] sums in nats
    const int64_t *octave_tokens; ///< [n_octaves]
    const double *map; ///< [n_blocks of the teacher, n_blocks of the student] unbiased CKA; NULL
                       ///< when it was not wanted
    const double *geometry; ///< [n_blocks, 4] CKA over the rows of `cka`: raw unbiased and biased,
                            ///< then every dimension divided by its standard deviation over the
                            ///< teacher's rows of a group, unbiased and biased (NaN where the
                            ///< widths differ); NULL when it was not wanted
} cq_eval_result;
CQ_API int cq_eval_result_get(cq_eval *e, cq_eval_result *out);
