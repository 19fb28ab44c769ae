/// moe.c - sigmoid-routed mixture of experts with one shared expert (models.md 2.5).
///
///     h += sum_j w_j down_e(relu(up_e(x))^2)  +  shared_down(relu(shared_up(x))^2)
///
/// Tokens are sorted by expert once; the router reads the unquantized x, each expert its own
/// quantization of it.
#include "core/base/error.h"
#include "core/block/block.h"

static int plan_experts(cq_layer *l, cq_plan *p, int64_t pairs) {
    const cq_config *c = l->env->config;
    cq_dtype t = cq_layer_act(l->env);
    CQ_TRY(cq_layer_keep(l, p, &l->xg, "expert x", t, pairs, c->hidden));
    CQ_TRY(cq_layer_keep(l, p, &l->up, "expert up", t, pairs, c->moe_intermediate));
    CQ_TRY(cq_layer_keep(l, p, &l->hidden, "expert act", t, pairs, c->moe_intermediate));
    CQ_TRY(cq_layer_keep(l, p, &l->down, "expert down", t, pairs, c->hidden));
    return cq_layer_scratch(l, p, &l->dhidden, "dexpert act", t, pairs, c->moe_intermediate);
}

int cq_moe_plan(cq_layer *l, cq_plan *p) {
    const cq_config *c = l->env->config;
    cq_dtype t = l->env->dtype, act = cq_layer_act(l->env);
    int64_t rows = l->env->tokens, pairs = rows * c->top_k;
    CQ_TRY(cq_layer_keep(l, p, &l->logits, "router logits", t, rows, c->experts));
    CQ_TRY(cq_layer_keep(l, p, &l->sel, "selected", CQ_I32, rows, c->top_k));
    CQ_TRY(cq_layer_keep(l, p, &l->weight, "router weights", t, rows, c->top_k));
    CQ_TRY(cq_layer_keep(l, p, &l->offsets, "expert offsets", CQ_I64, c->experts + 1, 1));
    CQ_TRY(cq_layer_keep(l, p, &l->token, "sorted tokens", CQ_I32, pairs, 1));
    CQ_TRY(cq_layer_keep(l, p, &l->position, "sorted positions", CQ_I32, rows, c->top_k));
    CQ_TRY(l->env->experts ? cq_moe_ranks_plan(l, p) : plan_experts(l, p, pairs));
    if (l->shared_up) {
        CQ_TRY(cq_layer_keep(l, p, &l->proj, "shared up", act, rows, l->shared_up->n));
        CQ_TRY(cq_layer_keep(l, p, &l->mid, "shared act", act, rows, l->shared_up->n));
        CQ_TRY(cq_layer_scratch(l, p, &l->dmid, "dshared", act, rows, l->shared_up->n));
    }
    CQ_TRY(cq_layer_scratch(l, p, &l->dlogits, "drouter", t, rows, c->experts));
    CQ_TRY(cq_layer_scratch(l, p, &l->dweight, "drouter weights", t, rows, c->top_k));
    return cq_layer_scratch(l, p, &l->dsorted, "dexpert x", act, pairs, c->hidden);
}

static int route(cq_layer *l, cq_stream *s, int64_t rows) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    CQ_TRY(CQ_RUN(s, matmul, .dtype = e->dtype, .tb = true, .m = rows, .n = c->experts,
                  .k = c->hidden, .a = l->x.data, .lda = c->hidden, .b = l->gate->value.data,
                  .ldb = c->hidden, .c = l->logits.data, .ldc = c->experts, .alpha = 1,
                  .a_bf16 = e->act == CQ_BF16));
    CQ_TRY(CQ_RUN(s, route_forward, .dtype = e->dtype, .tokens = rows, .experts = c->experts,
                  .top_k = c->top_k, .n_group = c->n_group, .topk_group = c->topk_group,
                  .normalize = c->norm_topk, .scaling = c->routed_scaling, .logits = l->logits.data,
                  .bias = l->bias->value.data, .sel = l->sel.data, .weight = l->weight.data));
    return CQ_RUN(s, route_sort, .tokens = rows, .experts = c->experts, .top_k = c->top_k,
                  .sel = l->sel.data, .offsets = l->offsets.data, .token = l->token.data,
                  .position = l->position.data);
}

int cq_moe_act(cq_layer *l, cq_stream *s, const cq_linear *reader, const int64_t *offsets,
               int64_t rows, const void *src, void *dst) {
    bool quant = cq_linear_acts(l, reader);
    return CQ_RUN(s, relu2_forward, .dtype = l->env->dtype, .rows = rows, .dim = reader->k,
                  .x = src, .h = quant ? NULL : dst, .hq = quant ? dst : NULL,
                  .fq = cq_linear_fq(l, reader, offsets), .act = l->env->act);
}

int cq_moe_begin(cq_layer *l, cq_stream *s, int64_t rows) {
    const cq_layer_env *e = l->env;
    int64_t pairs = rows * e->config->top_k;
    CQ_TRY(route(l, s, rows));
    bool quant = cq_linear_acts(l, l->in[0]);
    return CQ_RUN(s, gather_rows, .dtype = e->dtype, .rows = pairs, .dim = e->config->hidden,
                  .x = l->x.data, .index = l->token.data, .y = quant ? NULL : l->xg.data,
                  .yq = quant ? l->xg.data : NULL, .fq = cq_linear_fq(l, l->in[0], l->offsets.data),
                  .act = e->act);
}

/* Rows of one expert through one of its matrices, unquantized. */
static int expert_product(cq_layer *l, cq_stream *s, cq_linear *w, int64_t expert, int64_t rows,
                          const void *x, const void *weight, void *y) {
    cq_dtype t = l->env->dtype;
    if (w->quantized)
        CQ_TRY(CQ_RUN(s, amax, .dtype = t, .rows = rows, .cols = w->k, .x = x, .n_groups = 1,
                      .amax = (float *)w->amax.data + expert));
    return CQ_RUN(s, matmul, .dtype = t, .tb = true, .m = rows, .n = w->n, .k = w->k, .a = x,
                  .lda = w->k, .b = weight, .ldb = w->k, .c = y, .ldc = w->n, .alpha = 1);
}

int cq_moe_expert(cq_layer *l, cq_stream *s, int64_t expert, const void *up, const void *down) {
    cq_linear *in = l->in[0], *out = l->out;
    cq_dtype t = l->env->dtype;
    const int64_t *offsets = l->offsets.data;
    int64_t first = offsets[expert], rows = offsets[expert + 1] - first;
    int64_t wide = first * in->k * cq_dtype_bytes(t), mid = first * out->k * cq_dtype_bytes(t);
    if (rows == 0)
        return CQ_OK;
    CQ_TRY(expert_product(l, s, in, expert, rows, (char *)l->xg.data + wide, up,
                          (char *)l->up.data + mid));
    CQ_TRY(CQ_RUN(s, relu2_forward, .dtype = t, .rows = rows, .dim = out->k,
                  .x = (char *)l->up.data + mid, .h = (char *)l->hidden.data + mid));
    return expert_product(l, s, out, expert, rows, (char *)l->hidden.data + mid, down,
                          (char *)l->down.data + wide);
}

int cq_moe_end(cq_layer *l, cq_stream *s, int64_t rows, void *h) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    CQ_TRY(CQ_RUN(s, combine_forward, .dtype = e->dtype, .tokens = rows, .top_k = c->top_k,
                  .dim = c->hidden, .y = l->down.data, .weight = l->weight.data,
                  .position = l->position.data, .out = h, .act = e->act));
    if (!l->shared_up)
        return CQ_OK;
    const void *x = cq_linear_acts(l, l->shared_up) ? l->xq.data : l->x.data;
    CQ_TRY(cq_linear_forward(l, l->shared_up, s, x, rows, l->proj.data, l->shared_up->n));
    CQ_TRY(cq_moe_act(l, s, l->shared_down, NULL, rows, l->proj.data, l->mid.data));
    return cq_linear_add(l, l->shared_down, s, l->mid.data, rows, h);
}

/* Sorted rows xg through the experts into `down`. */
static int experts_forward(cq_layer *l, cq_stream *s, int64_t pairs) {
    cq_linear *up = l->in[0], *down = l->out;
    const int64_t *offsets = l->offsets.data;
    CQ_TRY(cq_experts_forward(l, up, s, offsets, pairs, l->xg.data, l->up.data));
    CQ_TRY(cq_moe_act(l, s, down, offsets, pairs, l->up.data, l->hidden.data));
    return cq_experts_forward(l, down, s, offsets, pairs, l->hidden.data, l->down.data);
}

int cq_moe_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h) {
    CQ_TRY(cq_moe_begin(l, s, b->tokens));
    CQ_TRY(l->env->experts ? cq_moe_ranks_forward(l, s)
                           : experts_forward(l, s, b->tokens * l->env->config->top_k));
    return cq_moe_end(l, s, b->tokens, h);
}

static int shared_backward(cq_layer *l, cq_stream *s, int64_t rows, const void *dh) {
    int64_t f = l->shared_up->n;
    const void *x = l->shared_up->act_quant ? l->xq.data : l->x.data;
    CQ_TRY(cq_linear_add_backward(l, l->shared_down, s, l->mid.data, dh, rows, l->dmid.data));
    CQ_TRY(CQ_RUN(s, relu2_backward, .dtype = l->env->dtype, .rows = rows, .dim = f,
                  .x = l->proj.data, .dh = l->dmid.data, .dx = l->dmid.data, .act = l->env->act));
    return cq_linear_backward(l, l->shared_up, s, x, l->dmid.data, f, rows, l->dx.data, 1);
}

/* dx = dlogits gate, dgate += dlogits' x. */
static int router_backward(cq_layer *l, cq_stream *s, int64_t rows) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    CQ_TRY(CQ_RUN(s, route_backward, .dtype = e->dtype, .tokens = rows, .experts = c->experts,
                  .top_k = c->top_k, .normalize = c->norm_topk, .scaling = c->routed_scaling,
                  .logits = l->logits.data, .sel = l->sel.data, .dweight = l->dweight.data,
                  .dlogits = l->dlogits.data));
    CQ_TRY(CQ_RUN(s, matmul, .dtype = e->dtype, .m = rows, .n = c->hidden, .k = c->experts,
                  .a = l->dlogits.data, .lda = c->experts, .b = l->gate->value.data,
                  .ldb = c->hidden, .c = l->dx.data, .ldc = c->hidden, .alpha = 1));
    void *dgate = cq_param_grad(l, l->gate);
    if (!dgate)
        return CQ_OK;
    return CQ_RUN(s, matmul, .dtype = e->dtype, .ta = true, .m = c->experts, .n = c->hidden,
                  .k = rows, .a = l->dlogits.data, .lda = c->experts, .b = l->x.data,
                  .ldb = c->hidden, .c = dgate, .ldc = c->hidden, .alpha = 1, .beta = 1,
                  .b_bf16 = e->act == CQ_BF16);
}

/* dsorted, the gradient of `down`, becomes that of xg. */
static int experts_backward(cq_layer *l, cq_stream *s, int64_t pairs) {
    const int64_t *offsets = l->offsets.data;
    CQ_TRY(cq_experts_backward(l, l->out, s, offsets, l->hidden.data, l->dsorted.data,
                               l->dhidden.data));
    CQ_TRY(CQ_RUN(s, relu2_backward, .dtype = l->env->dtype, .rows = pairs, .dim = l->out->k,
                  .x = l->up.data, .dh = l->dhidden.data, .dx = l->dhidden.data,
                  .act = l->env->act));
    return cq_experts_backward(l, l->in[0], s, offsets, l->xg.data, l->dhidden.data,
                               l->dsorted.data);
}

int cq_moe_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    int64_t rows = b->tokens;
    CQ_TRY(CQ_RUN(s, combine_backward, .dtype = e->dtype, .tokens = rows, .top_k = c->top_k,
                  .dim = c->hidden, .y = l->down.data, .weight = l->weight.data, .dout = dh,
                  .position = l->position.data, .dy = l->dsorted.data, .dweight = l->dweight.data,
                  .act = e->act));
    CQ_TRY(e->experts ? cq_moe_ranks_backward(l, s) : experts_backward(l, s, rows * c->top_k));
    CQ_TRY(router_backward(l, s, rows));
    CQ_TRY(CQ_RUN(s, ungather_rows, .dtype = e->dtype, .tokens = rows, .top_k = c->top_k,
                  .dim = c->hidden, .dy = l->dsorted.data, .position = l->position.data,
                  .dx = l->dx.data, .act = e->act));
    return l->shared_up ? shared_backward(l, s, rows, dh) : CQ_OK;
}
