/// distill_impl.h - what distill.c (a micro-batch) and layers.c (its layerwise term) share, for the
/// two only.
///
/// Tapped blocks are numbered 0, 1, ... in their order; Grams lie one after the other in that
/// order, without gaps, however many rows they have. A slab holds the rows of up to `together`
/// blocks: one call makes their Grams, and in the backward their gradients.
#pragma once
#include "core/train/cached.h"
#include "core/train/distill.h"

struct cq_distill {
    cq_model *teacher, *student;
    cq_distill_options o;
    cq_dtype dtype;
    int64_t n_blocks, dim, teacher_dim, vocab;
    cq_tensor zt, zs, dxf, dhead, weights;
    cq_tensor sums, counts;   ///< loss [1], right answers [1], where kernels run
    cq_tensor report, square; ///< results: [slots, 3 + n_taps] of `balance`; [1] a squared norm
    int64_t slot;             ///< of the micro-batch at hand
    struct {
        int64_t valid, rows;
    } * kept;     ///< [slots]
    double *loss; ///< [n_blocks] read last
    int64_t valid, valid_total, step;
    int64_t n_weights; ///< given for the next forward
    cq_cached file;    ///< of the micro-batch at hand, when a cache stands in for the teacher
    char *from;
    cq_cached_room room;

    /* layers.c */
    bool *taps;               ///< [n_blocks]
    int32_t *tap_of;          ///< [n_blocks] number of a tapped block
    int32_t *summed;          ///< [n_taps] taps in the order in which their losses are added up
    int64_t n_taps, together; ///< together: blocks in a slab
    int64_t in_slab;          ///< whose rows lie there and whose Grams are not made yet
    cq_tensor rows, xs, centred, dxs; ///< the last three are slabs
    cq_tensor work;                   ///< Grams of a slab, to be destroyed
    cq_tensor of_teacher, of_student; ///< [n_taps] Grams or rows
    cq_tensor order;                  ///< results: [n_taps] taps as their losses are added up
    cq_tensor stats;                  ///< [n_taps, 4], where kernels run
    cq_tensor pull;                   ///< [n_taps] weights of the layer losses, where kernels run
    int32_t *sampled; ///< [tokens] on the host; the first n_rows are those in `rows`
    int64_t n_rows, given, n_gram,
        first;        ///< n_gram: rows in a Gram; first: where this rank's begin
    int64_t *of_rank; ///< [ranks] rows of each, where a Gram is over all; else NULL
    cq_piece *piece;  ///< [ranks] those rows
    double *weight;   ///< [n_blocks] of the layer losses, summed over ranks; then by number of tap
};

/// Declares rows, Grams and slabs.
int cq_layers_plan(cq_distill *d, cq_plan *p, int64_t tokens);
/// Chooses the rows of a micro-batch.
int cq_layers_sample(cq_distill *d, const cq_batch *b, int64_t step, int64_t micro);
/// Whether block l has a layer loss in this micro-batch.
bool cq_layers_has(const cq_distill *d, int64_t l);
/// After a block's forward: takes its rows, and makes the Grams of a full slab; the student's are
/// compared with the teacher's at once.
int cq_layers_tap(cq_distill *d, cq_stream *s, int64_t l, bool teacher);
/// A cached Gram's place.
void *cq_layers_of_teacher(const cq_distill *d, int64_t l);
/// The weights of the layer losses [n_blocks], of which every rank that shares a Gram gives its
/// own; NULL: none. With this micro-batch's share of the step.
int cq_layers_weigh(cq_distill *d, const double *w_layer);
/// Reports the losses of the micro-batch at hand; with `ratio` also weighs the layer losses.
int cq_layers_report(cq_distill *d, cq_stream *s, bool ratio, double most);
/// Before block l's backward, last to first: *dx [n_rows, dim] becomes the gradient of its sampled
/// rows, NULL where its weight is zero.
int cq_layers_gradient(cq_distill *d, cq_stream *s, int64_t l, void **dx);
