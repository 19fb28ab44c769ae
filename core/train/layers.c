/// layers.c - the layerwise term of a micro-batch: sampled rows, Grams, losses, gradients.
///
/// Rows are gathered right after a block's forward, into a slab; when it is full, one call makes
/// the Grams of its blocks. The gradients of a slab's blocks are made together before the backward
/// of the last of them: block outputs are kept, so their rows are gathered again. Blocks go one at
/// a time where a Gram is over ranks, where the loss is one of rows, and on the host. The bits are
/// the same either way.
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/train/distill_impl.h"
#include "core/train/taps.h"
#include <stdlib.h>
#include <string.h>

enum { MOST_TOGETHER = 8, SLAB_BYTES = 128 << 20 };

static bool is_row_loss(const cq_distill *d) {
    return d->o.layer_loss == CQ_LAYER_COSINE || d->o.layer_loss == CQ_LAYER_MSE;
}

static cq_rowloss_form row_form(const cq_distill *d) {
    return d->o.layer_loss == CQ_LAYER_COSINE ? CQ_ROWLOSS_COSINE : CQ_ROWLOSS_MSE;
}

static cq_gram_loss gram_loss(const cq_distill *d) {
    return d->o.layer_loss == CQ_LAYER_GRAM ? CQ_GRAM_FROBENIUS : CQ_GRAM_CKA;
}

/* Blocks of a slab. On a device a call costs more than the work of one block; the slabs, of rows,
 * centred rows and gradients, stay within SLAB_BYTES. */
static int64_t blocks_together(const cq_distill *d, const cq_plan *p, int64_t n, int64_t wide) {
    int64_t bytes = n * (2 * wide + d->dim) * cq_dtype_bytes(d->dtype);
    int64_t most = d->o.together;
    if (!most && cq_plan_on_device(p))
        most = SLAB_BYTES / bytes < MOST_TOGETHER ? SLAB_BYTES / bytes : MOST_TOGETHER;
    if (is_row_loss(d) || d->of_rank || most < 1)
        return 1;
    return most < d->n_taps ? most : d->n_taps;
}

int cq_layers_plan(cq_distill *d, cq_plan *p, int64_t tokens) {
    int64_t own = d->o.rows < tokens ? d->o.rows : tokens;
    int64_t n = own * (d->of_rank ? cq_comm_size(d->o.comm) : 1);
    int64_t cols = is_row_loss(d) ? d->dim : n;
    int64_t wide = d->teacher_dim > d->dim ? d->teacher_dim : d->dim;
    d->o.rows = own;
    free(d->sampled);
    if (!(d->sampled = calloc((size_t)tokens, 2 * sizeof *d->sampled)))
        return cq_fail(CQ_ENOMEM, "distill: no memory for its rows");
    int64_t g = d->together = blocks_together(d, p, n, wide);
    if (cq_plan_on_device(p)) /* rows in four BF16 parts */
        cq_plan_reserve(p, 8 * g * n * wide);
    CQ_TRY(cq_plan_add(p, &d->order, CQ_FOR_RESULTS, "order of the taps", CQ_I32,
                       CQ_SHAPE1(d->n_taps)));
    CQ_TRY(
        cq_plan_add(p, &d->stats, CQ_FOR_CKA, "inner products", CQ_F64, CQ_SHAPE2(d->n_taps, 4)));
    CQ_TRY(cq_plan_add(p, &d->pull, CQ_FOR_CKA, "weights", CQ_F64, CQ_SHAPE1(d->n_taps)));
    CQ_TRY(cq_plan_add(p, &d->rows, CQ_FOR_CKA, "sampled rows", CQ_I32, CQ_SHAPE1(own)));
    CQ_TRY(cq_plan_add(p, &d->xs, CQ_FOR_CKA, "rows", d->dtype, CQ_SHAPE3(g, n, wide)));
    CQ_TRY(
        cq_plan_add(p, &d->centred, CQ_FOR_CKA, "centred rows", d->dtype, CQ_SHAPE3(g, n, wide)));
    CQ_TRY(
        cq_plan_add(p, &d->dxs, CQ_FOR_CKA, "rows' gradient", d->dtype, CQ_SHAPE3(g, n, d->dim)));
    CQ_TRY(cq_plan_add(p, &d->work, CQ_FOR_CKA, "Gram copy", d->dtype, CQ_SHAPE3(g, n, cols)));
    CQ_TRY(cq_plan_add(p, &d->of_teacher, CQ_FOR_CKA, "teacher's Grams", d->dtype,
                       CQ_SHAPE3(d->n_taps, n, cols)));
    return is_row_loss(d) ? CQ_OK
                          : cq_plan_add(p, &d->of_student, CQ_FOR_CKA, "student's Grams", d->dtype,
                                        CQ_SHAPE3(d->n_taps, n, cols));
}

/* How many rows the Gram has, and where this rank's are. */
static int place_rows(cq_distill *d) {
    d->n_gram = d->n_rows;
    d->first = 0;
    if (!d->of_rank)
        return CQ_OK;
    int64_t size = cq_comm_size(d->o.comm), *mine = &d->of_rank[cq_comm_rank(d->o.comm)];
    memset(d->of_rank, 0, (size_t)size * sizeof *d->of_rank);
    *mine = d->n_rows;
    cq_comm_about(d->o.comm, "sampled rows");
    CQ_TRY(cq_comm_sum_int(d->o.comm, d->of_rank, size));
    d->n_gram = 0;
    for (int64_t r = 0; r < size; r++) {
        if (&d->of_rank[r] == mine)
            d->first = d->n_gram;
        d->n_gram += d->of_rank[r];
    }
    return CQ_OK;
}

int cq_layers_sample(cq_distill *d, const cq_batch *b, int64_t step, int64_t micro) {
    int32_t *row = d->sampled;
    if (d->given) {
        d->n_rows = d->given;
        d->given = 0;
        return place_rows(d);
    }
    d->n_rows = cq_tap_sample(row, b, d->o.rows, d->o.seed, step, micro);
    CQ_TRY(cq_copy(d->rows.data, row, d->n_rows * (int64_t)sizeof *row));
    return place_rows(d);
}

int cq_distill_set_rows(cq_distill *d, const int32_t *rows, int64_t n) {
    if (d->o.layer_loss == CQ_LAYER_NONE || n < 4 || n > d->o.rows)
        return cq_fail(CQ_EUSAGE, "distill: %ld rows given, wanted 4 to %ld and a layer loss",
                       (long)n, (long)d->o.rows);
    d->given = n;
    return cq_copy(d->rows.data, rows, n * (int64_t)sizeof *rows);
}

int64_t cq_distill_rows(const cq_distill *d) { return d->n_gram; }

bool cq_layers_has(const cq_distill *d, int64_t l) { return d->taps[l] && d->n_gram >= 4; }

/* Matrix i of n_gram rows in a list of them. */
static void *nth(const cq_distill *d, const cq_tensor *list, int64_t i, int64_t cols) {
    return (char *)list->data + i * d->n_gram * cols * cq_dtype_bytes(d->dtype);
}

void *cq_layers_of_teacher(const cq_distill *d, int64_t l) {
    return nth(d, &d->of_teacher, d->tap_of[l], is_row_loss(d) ? d->dim : d->n_gram);
}

static double *stats_of(const cq_distill *d, int64_t tap) {
    return (double *)d->stats.data + 4 * tap;
}

/* The sampled rows of h [tokens, dim] into place i of the slab: this rank's, or those of all ranks
 * in their order. */
static int collect_rows(cq_distill *d, cq_stream *s, const void *h, int64_t dim, int64_t i) {
    int64_t row = dim * cq_dtype_bytes(d->dtype), at = 0;
    char *to = nth(d, &d->xs, i, dim);
    CQ_TRY(CQ_RUN(s, gather_rows, .dtype = d->dtype, .rows = d->n_rows, .dim = dim, .x = h,
                  .index = d->rows.data, .y = to + d->first * row));
    if (!d->of_rank)
        return CQ_OK;
    for (int r = 0; r < cq_comm_size(d->o.comm); at += d->of_rank[r++])
        d->piece[r] = (cq_piece){.owner = r,
                                 .mine = {to + at * row, CQ_SHAPE2(d->of_rank[r], dim), d->dtype}};
    cq_comm_about(d->o.comm, "sampled rows");
    return cq_comm_spread(d->o.comm, d->piece, cq_comm_size(d->o.comm));
}

static int row_loss(cq_distill *d, cq_stream *s, int64_t l, const cq_tensor *h, bool teacher) {
    void *rows = teacher ? cq_layers_of_teacher(d, l) : d->xs.data;
    CQ_TRY(CQ_RUN(s, gather_rows, .dtype = d->dtype, .rows = d->n_gram, .dim = d->dim, .x = h->data,
                  .index = d->rows.data, .y = rows));
    return teacher ? CQ_OK
                   : CQ_RUN(s, rowloss, .dtype = d->dtype, .form = row_form(d), .n = d->n_gram,
                            .dim = d->dim, .x = rows, .y = cq_layers_of_teacher(d, l),
                            .out = stats_of(d, d->tap_of[l]) + 3);
}

int cq_layers_tap(cq_distill *d, cq_stream *s, int64_t l, bool teacher) {
    const cq_tensor *h = cq_model_hidden(teacher ? d->teacher : d->student, l);
    int64_t dim = teacher ? d->teacher_dim : d->dim, n = d->n_gram, last = d->tap_of[l];
    if (is_row_loss(d))
        return row_loss(d, s, l, h, teacher);
    CQ_TRY(collect_rows(d, s, h->data, dim, d->in_slab++));
    if (d->in_slab < d->together && last + 1 < d->n_taps)
        return CQ_OK;
    int64_t count = d->in_slab, first = last + 1 - count;
    void *gram = nth(d, teacher ? &d->of_teacher : &d->of_student, first, n);
    d->in_slab = 0;
    CQ_TRY(CQ_RUN(s, gram, .dtype = d->dtype, .batch = count, .n = n, .dim = dim, .x = d->xs.data,
                  .unbiased = d->o.layer_loss == CQ_LAYER_CKA_UNBIASED, .scratch = d->centred.data,
                  .gram = gram));
    return teacher ? CQ_OK
                   : CQ_RUN(s, cka, .dtype = d->dtype, .loss = gram_loss(d), .batch = count, .n = n,
                            .k = gram, .l = nth(d, &d->of_teacher, first, n),
                            .out = stats_of(d, first));
}

int cq_layers_weigh(cq_distill *d, const double *w_layer) {
    double share = (double)d->valid / (double)d->valid_total;
    for (int64_t l = 0; l < d->n_blocks; l++)
        d->weight[l] = w_layer && cq_layers_has(d, l) ? w_layer[l] * share : 0;
    if (d->of_rank) {
        cq_comm_about(d->o.comm, "weights of the layer losses");
        CQ_TRY(cq_comm_sum(d->o.comm, d->weight, d->n_blocks));
    }
    for (int64_t l = 0; l < d->n_blocks; l++)
        if (d->taps[l])
            d->weight[d->tap_of[l]] = d->weight[l];
    return d->o.layer_loss == CQ_LAYER_NONE
               ? CQ_OK
               : cq_copy(d->pull.data, d->weight, d->n_taps * (int64_t)sizeof *d->weight);
}

int cq_layers_report(cq_distill *d, cq_stream *s, bool ratio, double most) {
    int64_t n = d->n_gram >= 4 ? d->n_taps : 0;
    for (int64_t i = 0; i < n; i++) {
        ((int32_t *)d->order.data)[i] = d->summed[i]; /* what lies there already, but once */
        d->weight[i] = ratio;                         /* not known here, but not 0 */
    }
    return CQ_RUN(s, balance, .n = n, .sum = d->sums.data, .right = d->counts.data,
                  .stats = d->stats.data, .order = d->order.data, .ratio = ratio,
                  .valid = (double)d->valid, .share = (double)d->valid / (double)d->valid_total,
                  .most = most, .weights = d->pull.data,
                  .report = (double *)d->report.data + d->slot * (3 + d->n_taps));
}

/* The gradients of the slab that ends with tap `last`, block l, at weights of which one is not 0.
 */
static int slab_gradients(cq_distill *d, cq_stream *s, int64_t l, int64_t last) {
    int64_t n = d->n_gram, first = last / d->together * d->together, count = last + 1 - first;
    double *pull = (double *)d->pull.data + first;
    for (int64_t i = count - 1; i >= 0; l--)
        if (d->taps[l])
            CQ_TRY(collect_rows(d, s, cq_model_hidden(d->student, l)->data, d->dim, i--));
    if (is_row_loss(d))
        return CQ_RUN(s, rowloss_backward, .dtype = d->dtype, .form = row_form(d), .n = n,
                      .dim = d->dim, .x = d->xs.data, .y = nth(d, &d->of_teacher, first, d->dim),
                      .weights = pull, .dx = d->dxs.data);
    CQ_TRY(cq_copy(d->work.data, nth(d, &d->of_student, first, n),
                   count * n * n * cq_dtype_bytes(d->dtype)));
    return CQ_RUN(s, cka_backward, .dtype = d->dtype, .loss = gram_loss(d), .batch = count, .n = n,
                  .dim = d->dim, .k = d->work.data, .l = nth(d, &d->of_teacher, first, n),
                  .x = d->xs.data, .weights = pull, .stats = stats_of(d, first), .dx = d->dxs.data);
}

int cq_layers_gradient(cq_distill *d, cq_stream *s, int64_t l, void **dx) {
    *dx = NULL;
    if (!cq_layers_has(d, l))
        return CQ_OK;
    int64_t tap = d->tap_of[l], first = tap / d->together * d->together;
    bool any = false;
    if (tap + 1 == d->n_taps || (tap + 1) % d->together == 0) {
        for (int64_t i = first; i <= tap; i++)
            any |= d->weight[i] != 0;
        if (any)
            CQ_TRY(slab_gradients(d, s, l, tap));
    }
    if (d->weight[tap] != 0)
        *dx = (char *)nth(d, &d->dxs, tap - first, d->dim) +
              d->first * d->dim * cq_dtype_bytes(d->dtype);
    return CQ_OK;
}
