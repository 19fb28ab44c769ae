/// mlp.c - the dense feed-forward mixers.
///
///     `-`: h += down(relu(up(x))^2)        `S`: h += down(silu(gate(x)) up(x))
#include "core/base/error.h"
#include "core/block/block.h"

int cq_mlp_plan(cq_layer *l, cq_plan *p) {
    cq_dtype t = cq_layer_act(l->env);
    int64_t rows = l->env->tokens, width = cq_layer_proj_width(l), mid = l->out->k;
    CQ_TRY(cq_layer_keep(l, p, &l->proj, "up", t, rows, width));
    CQ_TRY(cq_layer_keep(l, p, &l->mid, "act", t, rows, mid));
    CQ_TRY(cq_layer_scratch(l, p, &l->dmid, "dact", t, rows, mid));
    return cq_layer_scratch(l, p, &l->dproj, "dup", t, rows, width);
}

int cq_mlp_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h) {
    const cq_layer_env *e = l->env;
    int64_t rows = b->tokens, width = cq_layer_proj_width(l), mid = l->out->k;
    int64_t size = cq_dtype_bytes(cq_layer_act(e)), at = 0;
    for (int i = 0; i < l->n_in; i++) {
        const void *x = l->in[i]->act_quant ? l->xq.data : l->x.data;
        CQ_TRY(cq_linear_forward(l, l->in[i], s, x, rows, (char *)l->proj.data + at * size, width));
        at += l->in[i]->n;
    }
    bool quant = cq_linear_acts(l, l->out);
    void *plain = quant ? NULL : l->mid.data, *fq = quant ? l->mid.data : NULL;
    cq_fq request = cq_linear_fq(l, l->out, NULL);
    if (l->kind == 'S')
        CQ_TRY(CQ_RUN(s, swiglu_forward, .dtype = e->dtype, .rows = rows, .dim = mid,
                      .gu = l->proj.data, .h = plain, .hq = fq, .fq = request, .act = e->act));
    else
        CQ_TRY(CQ_RUN(s, relu2_forward, .dtype = e->dtype, .rows = rows, .dim = mid,
                      .x = l->proj.data, .h = plain, .hq = fq, .fq = request, .act = e->act));
    return cq_linear_add(l, l->out, s, l->mid.data, rows, h);
}

int cq_mlp_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh) {
    const cq_layer_env *e = l->env;
    int64_t rows = b->tokens, width = cq_layer_proj_width(l), mid = l->out->k;
    int64_t size = cq_dtype_bytes(cq_layer_act(e)), at = 0;
    CQ_TRY(cq_linear_add_backward(l, l->out, s, l->mid.data, dh, rows, l->dmid.data));
    if (l->kind == 'S')
        CQ_TRY(CQ_RUN(s, swiglu_backward, .dtype = e->dtype, .rows = rows, .dim = mid,
                      .gu = l->proj.data, .dh = l->dmid.data, .dgu = l->dproj.data, .act = e->act));
    else
        CQ_TRY(CQ_RUN(s, relu2_backward, .dtype = e->dtype, .rows = rows, .dim = mid,
                      .x = l->proj.data, .dh = l->dmid.data, .dx = l->dproj.data, .act = e->act));
    for (int i = 0; i < l->n_in; i++) {
        const void *x = l->in[i]->act_quant ? l->xq.data : l->x.data;
        CQ_TRY(cq_linear_backward(l, l->in[i], s, x, (char *)l->dproj.data + at * size, width, rows,
                                  l->dx.data, i > 0));
        at += l->in[i]->n;
    }
    return CQ_OK;
}
