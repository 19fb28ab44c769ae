/// losses.h - the arguments of the losses of kernels.def: on logits, and between block outputs.
///
/// The conventions are those of kernels/kernels.h, which includes this file.
#pragma once
#include "core/base/dtype.h"

/// Forward KL(teacher || student) of a chunk of rows, and d/d(student logits) written over the
/// student logits. Rows with labels < 0 count nothing and get a zero gradient row. Top-k forms are
/// method.md 3.2: A renormalized, B truncated, C tail bucket; top_k >= vocab is the full KL in
/// every form.
typedef enum cq_kl_form {
    CQ_KL_FULL,
    CQ_KL_RENORMALIZED,
    CQ_KL_TRUNCATED,
    CQ_KL_TAIL_BUCKET
} cq_kl_form;
typedef struct cq_kl_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    cq_kl_form form;
    int64_t top_k;
    const void *teacher; ///< [rows, vocab]
    void *student; ///< in: logits; out: scale * gradient of the row's KL when `gradient`, else
                   ///< unchanged
    const int32_t *labels; ///< [rows]
    double scale;          ///< usually 1 / valid tokens
    bool gradient;
    double *sum;                       ///< += sum of KL over valid rows, nats
    double *nll_teacher, *nll_student; ///< += negative log-likelihood of the labels; may be NULL
    int64_t *agree; ///< += valid rows whose top-1 tokens agree (ties to the lowest id); may be NULL
    int64_t *valid; ///< += valid rows; may be NULL
} cq_kl_args;
/// What a cache keeps of a teacher's row: its k largest log-probabilities, the larger first (the
/// lower id first of equals), and the log of the mass of all others (-inf where k = vocab).
typedef struct cq_top_logits_args {
    cq_dtype dtype;
    int64_t rows, vocab, k; ///< 1 <= k <= vocab
    const void *logits;     ///< [rows, vocab]
    const int32_t *labels;  ///< [rows] rows with labels < 0 are left out
    const int32_t *at;      ///< [rows] row of ids, log_p, log_tail and log_label that each fills
    int32_t *ids;           ///< [.., k]
    void *log_p;            ///< [.., k]
    void *log_tail;         ///< [..]
    void *log_label;        ///< [..] of the label; may be NULL
} cq_top_logits_args;
/// `kl` against a teacher of which top_logits is all there is. The k log-probabilities count
/// relative to each other and their mass is 1 - tail, so rounded ones are a distribution too. S is
/// the first top_k of them; the others count as tail. top_k >= vocab, or CQ_KL_FULL, needs k =
/// vocab.
typedef struct cq_kl_cached_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    cq_kl_form form;
    int64_t top_k, k;
    const int32_t *ids;               ///< [.., k] distinct, below vocab
    const void *log_p;                ///< [.., k]
    bool half;                        ///< log_p is F16
    const void *log_tail, *log_label; ///< [..]; log_label may be NULL
    const int32_t *at; ///< [rows] the row of each row with a label in the four before
    void *student;     ///< from here on as in `kl`; nll_teacher += -log_label
    const int32_t *labels;
    double scale;
    bool gradient;
    double *sum, *nll_teacher, *nll_student;
    int64_t *agree, *valid;
} cq_kl_cached_args;
/// Cross-entropy of rows with labels >= 0; logits become scale * gradient when `gradient`. A row
/// counts weights[r] times in sum and gradient, once in `correct` and `valid`; weights below 0 make
/// its label less likely.
typedef struct cq_cross_entropy_args {
    cq_dtype dtype;
    int64_t rows, vocab;
    void *logits;
    const int32_t *labels;
    const float *weights; ///< [rows]; NULL: all 1
    double scale;
    bool gradient;
    double *sum;
    int64_t *correct, *valid; ///< += ; may be NULL
} cq_cross_entropy_args;

/// Gram matrix of n rows, centred: biased K = Xc Xc' with Xc = X - column means; unbiased:
/// U-centred X X' (zero diagonal). n >= 2 (biased) or 4 (unbiased). method.md 4.1.
/// Here and in the two that follow, `batch` is how many one call makes, 0 counts as 1; each has the
/// bits it has alone.
typedef struct cq_gram_args {
    cq_dtype dtype;
    int64_t batch, n, dim;
    const void *x; ///< [batch, n, dim] dense; not changed
    bool unbiased;
    void *scratch; ///< [batch, n, dim] for the centred rows
    void *gram;    ///< [batch, n, n]
} cq_gram_args;
/// Two losses of a student Gram k and a teacher Gram l [n, n], both centred the same way.
///   CQ_GRAM_CKA        loss = 1 - <K, L> / (|K| |L|), evaluated as |K/|K| - L/|L||^2 / 2 (no
///   cancellation);
///                      0 when a norm is 0 or not finite
///   CQ_GRAM_FROBENIUS  loss = |K - L|^2 / |L|^2
/// out[0] = <K, L>, out[1] = <K, K>, out[2] = <L, L>, out[3] = loss, all in double.
typedef enum cq_gram_loss { CQ_GRAM_CKA, CQ_GRAM_FROBENIUS } cq_gram_loss;
typedef struct cq_cka_args {
    cq_dtype dtype;
    cq_gram_loss loss;
    int64_t batch, n;
    const void *k, *l; ///< [batch, n, n]
    double *out;       ///< [batch, 4]
} cq_cka_args;
/// dx = weight * dloss/dX; for CKA -weight * (2/b) (L/c - cka K/b) X with b = |K|, c = |L|
/// (method.md 4.2), for Frobenius weight * 4 (K - L) X / |L|^2. k is destroyed. Zero where the loss
/// is defined as 0. x need not be centred.
typedef struct cq_cka_backward_args {
    cq_dtype dtype;
    cq_gram_loss loss;
    int64_t batch, n, dim;
    void *k;       ///< [batch, n, n]
    const void *l; ///< [batch, n, n]
    const void *x; ///< [batch, n, dim]
    double weight;
    const double *weights; ///< [batch], each in the place of `weight`; may be NULL
    const double *stats;   ///< [batch, 4] the values of cq_cka_args
    void *dx;              ///< [batch, n, dim]
} cq_cka_backward_args;
/// Rivals of CKA on the same rows: cosine: mean over rows of 1 - cos(x, y); mse: |X - Y|^2 / |Y|^2.
typedef enum cq_rowloss_form { CQ_ROWLOSS_COSINE, CQ_ROWLOSS_MSE } cq_rowloss_form;
typedef struct cq_rowloss_args {
    cq_dtype dtype;
    cq_rowloss_form form;
    int64_t n, dim;
    const void *x, *y; ///< student, teacher
    double *out;       ///< [1]
} cq_rowloss_args;
/// dx = weight * d(loss)/dX.
typedef struct cq_rowloss_backward_args {
    cq_dtype dtype;
    cq_rowloss_form form;
    int64_t n, dim;
    const void *x, *y;
    double weight;
    const double *weights; ///< [1] in the place of `weight`; may be NULL
    void *dx;
} cq_rowloss_backward_args;
/// The losses of a micro-batch where the host finds them later, and with `ratio` the weights of its
/// n layer losses, worked out where they are, in double as cq.balance.ratio does:
///     kl = sum / valid     gap = mean of 1 - cka, 0 for n = 0     cka = 1 - loss
///     weight = min(max(kl, 0) / max(gap, 1e-8), most)             each loss: weight / n * share
typedef struct cq_balance_args {
    int64_t n;
    const double *sum;    ///< of the logit loss
    const int64_t *right; ///< right answers
    const double *stats;  ///< [n, 4] of cka or rowloss, the loss last
    const int32_t *order; ///< [n] in which the losses are added up
    bool ratio;
    double valid, share, most;
    double *weights; ///< [n] of the layer losses; written by `ratio`
    double *report;  ///< [3 + n] sum, right answers, weight (0 without `ratio`), the losses
} cq_balance_args;
/// x[index[i]] += y[i]; indices are distinct.
typedef struct cq_scatter_rows_args {
    cq_dtype dtype;
    int64_t rows, dim;
    const void *y;
    const int32_t *index;
    void *x;
} cq_scatter_rows_args;
