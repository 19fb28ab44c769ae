/// model_experts.c - a model whose experts are dealt out over ranks: who holds which, what only the
/// holders know, and the part of a rank that has no micro-batch.
#include "core/base/error.h"
#include "core/base/process.h"
#include "core/model/model_impl.h"
#include <stdlib.h>

int cq_model_share_experts(cq_model *m, cq_comm *comm) {
    int64_t experts = m->config.experts;
    int ranks = cq_comm_size(comm);
    if (cq_config_count(&m->config, 'E') < 1)
        return cq_fail(
            CQ_EUSAGE,
            "experts: %s has no mixture of experts, wanted one to deal out over %d ranks", m->dir,
            ranks);
    if (experts % ranks)
        return cq_fail(CQ_EUSAGE,
                       "experts: %s has %ld in a block, wanted a multiple of the %d ranks", m->dir,
                       (long)experts, ranks);
    if (ranks == 1 || m->env.experts)
        return CQ_OK;
    CQ_TRY(cq_expert_ranks_open(&m->env.experts, comm, experts));
    for (int64_t i = 0; i < m->n_layers; i++) {
        cq_linear *both[] = {m->layer[i].in[0], m->layer[i].out};
        for (int k = 0; k < 2 && m->layer[i].kind == 'E'; k++) {
            both[k]->first = m->env.experts->first;
            both[k]->held = m->env.experts->held;
            for (int64_t e = 0; e < experts; e++)
                both[k]->part[e]->holder = (int)(e / both[k]->held);
        }
    }
    return CQ_OK;
}

/* all[e], one number of each expert, becomes that of the expert's holder. */
static int gather(const cq_model *m, float *all) {
    cq_expert_ranks *x = m->env.experts;
    for (int r = 0; r < x->ranks; r++)
        x->in[r] = x->held * (int64_t)sizeof *all;
    cq_comm_about(x->comm, "maxima of experts");
    return cq_comm_gather(x->comm, all, all + x->first, x->in);
}

int cq_model_gather_inputs(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears && m->env.experts; i++)
        if (m->linear[i]->quantized && m->linear[i]->held < m->linear[i]->groups)
            CQ_TRY(gather(m, m->linear[i]->amax_x));
    return CQ_OK;
}

int cq_model_gather_weights(cq_model *m) {
    if (!m->env.experts)
        return CQ_OK;
    float *all = calloc((size_t)m->env.experts->experts, sizeof *all);
    int status = all ? CQ_OK : cq_fail(CQ_ENOMEM, "experts: no memory for their maxima");
    for (int64_t i = 0; i < m->n_linears && !status; i++) {
        cq_linear *w = m->linear[i];
        if (!w->quantized || w->held == w->groups)
            continue;
        for (int64_t e = 0; e < w->groups; e++)
            all[e] = w->part[e]->amax;
        status = gather(m, all);
        for (int64_t e = 0; e < w->groups && !status; e++)
            w->part[e]->amax = all[e];
    }
    free(all);
    return status;
}

int cq_model_fetch(cq_tensor *out, void **owned, const cq_model *m, const cq_param *p,
                   cq_tensor mine) {
    cq_expert_ranks *x = m->env.experts;
    int64_t bytes = cq_shape_elems(mine.shape) * cq_dtype_bytes(mine.dtype);
    int rank = cq_comm_rank(x->comm);
    *out = (cq_tensor){NULL, mine.shape, mine.dtype};
    *owned = NULL;
    if (rank == 0 && !(*owned = out->data = malloc((size_t)bytes + 1)))
        return cq_fail(CQ_ENOMEM, "experts: no memory for %s", p->name);
    for (int r = 0; r < x->ranks; r++) {
        x->in[r] = rank == 0 && r == p->holder ? bytes : 0;
        x->out[r] = r == 0 && rank == p->holder ? bytes : 0;
    }
    char nothing;
    cq_comm_about(x->comm, "weights of experts");
    int status = cq_comm_exchange(x->comm, out->data ? out->data : &nothing, x->in,
                                  mine.data ? mine.data : &nothing, x->out);
    if (status) {
        free(*owned);
        *owned = out->data = NULL;
    }
    return status;
}

int cq_model_serve_forward(cq_model *m, cq_stream *s) {
    cq_model_bind_stream(m, s);
    for (int64_t i = 0; i < m->n_layers && m->env.experts; i++) {
        CQ_TRY(cq_stop_check());
        if (m->layer[i].kind != 'E')
            continue;
        int64_t block = m->layer[i].block;
        int status = m->streamed ? cq_model_block_in(m, s, block) : CQ_OK;
        if (!status)
            status = cq_moe_ranks_serve(&m->layer[i], s);
        int after = m->streamed ? cq_model_block_out(m, s, block) : CQ_OK;
        CQ_TRY(status ? status : after);
    }
    return CQ_OK;
}

int cq_model_serve_backward(cq_model *m, cq_stream *s) {
    cq_model_bind_stream(m, s);
    for (int64_t i = m->n_layers - 1; i >= 0 && m->env.experts; i--) {
        CQ_TRY(cq_stop_check());
        if (m->layer[i].kind != 'E')
            continue;
        m->env.again = m->env.mode == CQ_MODE_RECOMPUTE;
        int status = m->env.again ? cq_moe_ranks_serve(&m->layer[i], s) : CQ_OK;
        m->env.again = false;
        CQ_TRY(status);
        CQ_TRY(cq_moe_ranks_backward(&m->layer[i], s));
    }
    return CQ_OK;
}
