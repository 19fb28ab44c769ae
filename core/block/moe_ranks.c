/// moe_ranks.c - experts dealt out over ranks: rows go to who holds their expert, results come
/// back.
///
///     forward    x to the holders, y back        backward    dy to the holders, dx back
///
/// Rank r holds experts [r E / R, (r + 1) E / R), so rows sorted by expert are sorted by rank, and
/// what goes to a rank is one range of them. A holder computes each rank's rows by themselves, as
/// that rank would, and makes their weight gradient in a buffer of its own before it adds it, in
/// rank order: the bits are those of one rank that adds up micro-batches one by one.
#include "core/base/error.h"
#include "core/block/block.h"
#include "core/tensor/device.h"
#include <stdlib.h>
#include <string.h>

/* Rows that one rank sends here: where they lie among all, how many, and each expert's among them.
 */
typedef struct section {
    int64_t first, rows;
    const int64_t *offsets; ///< [held + 1] where the kernels run
} section;

int cq_expert_ranks_open(cq_expert_ranks **out, cq_comm *comm, int64_t experts) {
    size_t ranks = (size_t)cq_comm_size(comm), held = (size_t)experts / ranks;
    cq_expert_ranks *x = *out = calloc(1, sizeof *x);
    if (!x)
        return cq_fail(CQ_ENOMEM, "experts: no memory to deal them out");
    *x = (cq_expert_ranks){.comm = comm,
                           .ranks = (int)ranks,
                           .experts = experts,
                           .held = (int64_t)held,
                           .first = (int64_t)held * cq_comm_rank(comm)};
    x->offsets = calloc((size_t)experts + 1, sizeof *x->offsets);
    x->counts = calloc((size_t)experts, sizeof *x->counts);
    x->theirs = calloc(ranks * (held + 1), sizeof *x->theirs);
    x->in = calloc(ranks, sizeof *x->in);
    x->out = calloc(ranks, sizeof *x->out);
    if (x->offsets && x->counts && x->theirs && x->in && x->out)
        return CQ_OK;
    cq_expert_ranks_close(x);
    *out = NULL;
    return cq_fail(CQ_ENOMEM, "experts: no memory to deal them out");
}

void cq_expert_ranks_close(cq_expert_ranks *x) {
    if (!x)
        return;
    free(x->offsets);
    free(x->counts);
    free(x->theirs);
    free(x->in);
    free(x->out);
    free(x);
}

static bool trained(const cq_linear *w) { return w->grad.shape.rank > 0; }

int cq_moe_ranks_plan(cq_layer *l, cq_plan *p) {
    const cq_expert_ranks *x = l->env->experts;
    const cq_config *c = l->env->config;
    cq_dtype t = cq_layer_act(l->env);
    int64_t own = l->env->tokens * c->top_k, all = own * x->ranks, f = c->moe_intermediate;
    CQ_TRY(cq_layer_keep(l, p, &l->theirs, "ranks' expert offsets", CQ_I64, x->ranks, x->held + 1));
    CQ_TRY(cq_layer_keep(l, p, &l->x_in, "ranks' expert x", t, all, c->hidden));
    CQ_TRY(cq_layer_keep(l, p, &l->up, "ranks' expert up", t, all, f));
    CQ_TRY(cq_layer_keep(l, p, &l->hidden, "ranks' expert act", t, all, f));
    CQ_TRY(cq_layer_keep(l, p, &l->down, "expert down", t, own, c->hidden));
    CQ_TRY(cq_plan_add(p, &l->xg, CQ_FOR_SCRATCH, "expert x", t, CQ_SHAPE2(own, c->hidden)));
    CQ_TRY(
        cq_plan_add(p, &l->rows_in, CQ_FOR_SCRATCH, "ranks' rows", t, CQ_SHAPE2(all, c->hidden)));
    CQ_TRY(cq_layer_scratch(l, p, &l->dhidden, "ranks' dexpert act", t, all, f));
    if (trained(l->in[0]) || trained(l->out))
        CQ_TRY(cq_layer_scratch(l, p, &l->dstack, "experts' gradient of one micro-batch",
                                l->env->dtype, x->held * f, c->hidden));
    return CQ_OK;
}

/* The experts that are here, as a linear of their own. */
static cq_linear here(const cq_linear *w) {
    cq_linear v = *w;
    v.groups = w->held;
    if (v.amax.data)
        v.amax = cq_tensor_rows(w->amax, w->first, w->held);
    if (v.amax_w.data)
        v.amax_w = cq_tensor_rows(w->amax_w, w->first, w->held);
    v.part = w->part + w->first;
    v.n_parts = w->held;
    v.first = 0;
    return v;
}

/* Sets how many rows go to and come from each rank, from what `meet` left. */
static int find_rows(cq_layer *l) {
    cq_expert_ranks *x = l->env->experts;
    CQ_TRY(cq_copy(x->offsets, l->offsets.data, (x->experts + 1) * (int64_t)sizeof *x->offsets));
    CQ_TRY(cq_copy(x->theirs, l->theirs.data, cq_tensor_bytes(l->theirs)));
    for (int r = 0; r < x->ranks; r++) {
        x->out[r] = x->offsets[(r + 1) * x->held] - x->offsets[r * x->held];
        x->in[r] = x->theirs[r * (x->held + 1) + x->held];
    }
    return CQ_OK;
}

/* Tells every rank how many rows each of its experts gets from here. */
static int meet(cq_layer *l) {
    cq_expert_ranks *x = l->env->experts;
    int64_t bytes = x->held * (int64_t)sizeof *x->counts;
    CQ_TRY(cq_copy(x->offsets, l->offsets.data, (x->experts + 1) * (int64_t)sizeof *x->offsets));
    for (int64_t e = 0; e < x->experts; e++)
        x->counts[e] = x->offsets[e + 1] - x->offsets[e];
    for (int r = 0; r < x->ranks; r++)
        x->in[r] = x->out[r] = bytes;
    cq_comm_about(x->comm, "rows of each expert");
    CQ_TRY(cq_comm_exchange(x->comm, x->theirs, x->in, x->counts, x->out));
    for (int r = x->ranks - 1; r >= 0; r--) { /* counts become offsets, from the end: they grow */
        int64_t *to = x->theirs + r * (x->held + 1), *from = x->theirs + r * x->held;
        memmove(to + 1, from, (size_t)bytes);
        to[0] = 0;
        for (int64_t e = 0; e < x->held; e++)
            to[e + 1] += to[e];
    }
    CQ_TRY(cq_copy(l->theirs.data, x->theirs, cq_tensor_bytes(l->theirs)));
    return find_rows(l);
}

static int64_t total(const cq_expert_ranks *x, const int64_t *rows) {
    int64_t sum = 0;
    for (int r = 0; r < x->ranks; r++)
        sum += rows[r];
    return sum;
}

static void scale(const cq_expert_ranks *x, int64_t *rows, int64_t by, bool up) {
    for (int r = 0; r < x->ranks; r++)
        rows[r] = up ? rows[r] * by : rows[r] / by;
}

/* Rows [hidden] change ranks: in_rows[r] come from rank r, out_rows[r] go there. What lies on a
 * device goes through the host. */
static int move(cq_layer *l, void *in, int64_t *in_rows, const void *out, int64_t *out_rows,
                const char *about) {
    cq_expert_ranks *x = l->env->experts;
    int64_t row = l->env->config->hidden * cq_dtype_bytes(cq_layer_act(l->env));
    int64_t in_bytes = total(x, in_rows) * row, out_bytes = total(x, out_rows) * row;
    bool staged = cq_on_device(in);
    char *from = staged ? malloc((size_t)out_bytes + 1) : NULL;
    char *to = staged ? malloc((size_t)in_bytes + 1) : NULL;
    int status = !staged || (from && to)
                     ? CQ_OK
                     : cq_fail(CQ_ENOMEM, "experts: no memory for rows on their way");
    if (staged && !status)
        status = cq_copy(from, out, out_bytes);
    scale(x, in_rows, row, true);
    scale(x, out_rows, row, true);
    cq_comm_about(x->comm, about);
    if (!status)
        status =
            cq_comm_exchange(x->comm, staged ? to : in, in_rows, staged ? from : out, out_rows);
    scale(x, in_rows, row, false);
    scale(x, out_rows, row, false);
    if (staged && !status)
        status = cq_copy(in, to, in_bytes);
    free(from);
    free(to);
    return status;
}

static section section_of(const cq_layer *l, int rank) {
    const cq_expert_ranks *x = l->env->experts;
    section s = {0, x->in[rank], (int64_t *)l->theirs.data + rank * (x->held + 1)};
    for (int r = 0; r < rank; r++)
        s.first += x->in[r];
    return s;
}

static void *at(cq_tensor t, const section *c) {
    return (char *)t.data + c->first * t.shape.dim[1] * cq_dtype_bytes(t.dtype);
}

static int forward_section(cq_layer *l, cq_stream *s, const section *c) {
    cq_linear up = here(l->in[0]), down = here(l->out);
    CQ_TRY(cq_experts_forward(l, &up, s, c->offsets, c->rows, at(l->x_in, c), at(l->up, c)));
    CQ_TRY(cq_moe_act(l, s, &down, c->offsets, c->rows, at(l->up, c), at(l->hidden, c)));
    return cq_experts_forward(l, &down, s, c->offsets, c->rows, at(l->hidden, c),
                              at(l->rows_in, c));
}

int cq_moe_ranks_forward(cq_layer *l, cq_stream *s) {
    cq_expert_ranks *x = l->env->experts;
    CQ_TRY(meet(l));
    CQ_TRY(move(l, l->x_in.data, x->in, l->xg.data, x->out, "rows of experts"));
    for (int r = 0; r < x->ranks; r++) {
        section c = section_of(l, r);
        if (c.rows)
            CQ_TRY(forward_section(l, s, &c));
    }
    return move(l, l->down.data, x->out, l->rows_in.data, x->in, "results of experts");
}

/* dx, and grad += the gradient of this rank's rows. */
static int backward_linear(cq_layer *l, cq_linear *w, cq_stream *s, const section *c, cq_tensor x,
                           cq_tensor dy, cq_tensor dx) {
    cq_linear v = here(w);
    void *grad = v.grad.data;
    bool learns = grad && !l->env->input_only;
    if (learns) {
        v.grad.data = l->dstack.data;
        CQ_TRY(cq_zero(v.grad.data, cq_tensor_bytes(v.grad)));
    }
    CQ_TRY(cq_experts_backward(l, &v, s, c->offsets, at(x, c), at(dy, c), at(dx, c)));
    return learns ? CQ_RUN(s, axpy, .dtype = l->env->dtype, .n = cq_tensor_elems(v.grad),
                           .alpha = 1, .beta = 1, .x = v.grad.data, .y = grad)
                  : CQ_OK;
}

static int backward_section(cq_layer *l, cq_stream *s, const section *c) {
    CQ_TRY(backward_linear(l, l->out, s, c, l->hidden, l->rows_in, l->dhidden));
    CQ_TRY(CQ_RUN(s, relu2_backward, .dtype = l->env->dtype, .rows = c->rows, .dim = l->out->k,
                  .x = at(l->up, c), .dh = at(l->dhidden, c), .dx = at(l->dhidden, c),
                  .act = l->env->act));
    return backward_linear(l, l->in[0], s, c, l->x_in, l->dhidden, l->rows_in);
}

int cq_moe_ranks_backward(cq_layer *l, cq_stream *s) {
    cq_expert_ranks *x = l->env->experts;
    CQ_TRY(find_rows(l));
    CQ_TRY(
        move(l, l->rows_in.data, x->in, l->dsorted.data, x->out, "gradients of experts' results"));
    for (int r = 0; r < x->ranks; r++) {
        section c = section_of(l, r);
        if (c.rows)
            CQ_TRY(backward_section(l, s, &c));
    }
    return move(l, l->dsorted.data, x->out, l->rows_in.data, x->in, "gradients of experts' rows");
}

int cq_moe_ranks_serve(cq_layer *l, cq_stream *s) {
    CQ_TRY(cq_zero(l->offsets.data, cq_tensor_bytes(l->offsets)));
    return cq_moe_ranks_forward(l, s);
}
