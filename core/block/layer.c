/// layer.c - what every layer does around its mixer: norm in, residual out.
///
///     x = rmsnorm(h_in), xq = FQ(x)        dh_in = dh_out + rmsnorm'(dx)
///
/// The plain x is written only for who reads it: a router, an unquantized linear, calibration.
#include "core/base/error.h"
#include "core/block/block.h"
#include "core/tensor/device.h"

cq_dtype cq_layer_act(const cq_layer_env *e) { return e->act == CQ_BF16 ? CQ_BF16 : e->dtype; }

int64_t cq_layer_proj_width(const cq_layer *l) {
    int64_t width = 0;
    for (int i = 0; i < l->n_in; i++)
        width += l->in[i]->n;
    return width;
}

int cq_layer_keep(cq_layer *l, cq_plan *p, cq_tensor *slot, const char *name, cq_dtype dtype,
                  int64_t rows, int64_t cols) {
    cq_purpose purpose = l->env->mode == CQ_MODE_SAVE ? CQ_FOR_ACTIVATIONS : CQ_FOR_SCRATCH;
    return cq_plan_add(p, slot, purpose, name, dtype, CQ_SHAPE2(rows, cols));
}

int cq_layer_scratch(cq_layer *l, cq_plan *p, cq_tensor *slot, const char *name, cq_dtype dtype,
                     int64_t rows, int64_t cols) {
    if (l->env->mode == CQ_MODE_INFER)
        return CQ_OK;
    return cq_plan_add(p, slot, CQ_FOR_SCRATCH, name, dtype, CQ_SHAPE2(rows, cols));
}

int cq_layer_plan_past(cq_layer *l, cq_plan *p, int64_t slots, int64_t room) {
    const cq_config *c = l->env->config;
    cq_dtype t = l->env->dtype;
    cq_purpose purpose = CQ_FOR_GENERATION;
    int64_t inner = c->mamba_heads * c->mamba_head_dim;
    if (l->kind == '*') {
        CQ_TRY(cq_plan_add(p, &l->keys, purpose, "keys", t,
                           CQ_SHAPE4(slots, c->kv_heads, c->head_dim, room)));
        return cq_plan_add(p, &l->values, purpose, "values", t,
                           CQ_SHAPE4(slots, c->kv_heads, room, c->head_dim));
    }
    if (l->kind != 'M')
        return CQ_OK;
    CQ_TRY(cq_plan_add(
        p, &l->conv_state, purpose, "conv state", t,
        CQ_SHAPE3(slots, c->conv_width - 1, inner + 2 * c->mamba_groups * c->mamba_state)));
    return cq_plan_add(p, &l->states, purpose, "mamba state", t,
                       CQ_SHAPE4(slots, c->mamba_heads, c->mamba_state, c->mamba_head_dim));
}

int cq_layer_copy_past(cq_layer *l, int64_t to, int64_t from) {
    cq_tensor *kept[] = {&l->keys, &l->values, &l->conv_state, &l->states};
    for (int i = 0; i < 4; i++) {
        if (!kept[i]->data)
            continue;
        int64_t bytes = cq_tensor_bytes(*kept[i]) / kept[i]->shape.dim[0];
        char *at = kept[i]->data;
        CQ_TRY(cq_copy(at + to * bytes, at + from * bytes, bytes));
    }
    return CQ_OK;
}

/* Whether the plain norm output has a reader besides the quantizer. */
static bool needs_plain(const cq_layer *l) {
    if (l->kind == 'E')
        return true;
    for (int i = 0; i < l->n_in; i++)
        if (!l->in[i]->act_quant)
            return true;
    return false;
}

static bool needs_quantized(const cq_layer *l) {
    if (l->kind == 'E')
        return l->shared_up && l->shared_up->act_quant;
    for (int i = 0; i < l->n_in; i++)
        if (l->in[i]->act_quant)
            return true;
    return false;
}

int cq_layer_plan(cq_layer *l, cq_plan *p) {
    const cq_layer_env *e = l->env;
    int64_t rows = e->tokens, dim = e->config->hidden;
    CQ_TRY(cq_layer_keep(l, p, &l->rstd, "rstd", e->dtype, rows, 1));
    if (needs_plain(l))
        CQ_TRY(cq_layer_keep(l, p, &l->x, "x", cq_layer_act(e), rows, dim));
    if (needs_quantized(l))
        CQ_TRY(cq_layer_keep(l, p, &l->xq, "xq", cq_layer_act(e), rows, dim));
    CQ_TRY(cq_layer_scratch(l, p, &l->dx, "dx", e->dtype, rows, dim));
    switch (l->kind) {
    case '*':
        return cq_attention_plan(l, p);
    case 'M':
        return cq_mamba_plan(l, p);
    case 'E':
        return cq_moe_plan(l, p);
    default:
        return cq_mlp_plan(l, p);
    }
}

/* While calibrating nothing is quantized, so the plain output goes where xq would be. */
int cq_layer_norm(cq_layer *l, cq_stream *s, int64_t rows, const void *h_in) {
    const cq_layer_env *e = l->env;
    const cq_linear *reader = l->kind == 'E' ? l->shared_up : l->in[0];
    for (int i = 0; l->kind != 'E' && i < l->n_in; i++)
        if (l->in[i]->act_quant)
            reader = l->in[i];
    cq_rmsnorm_forward_args a = {.dtype = e->dtype,
                                 .rows = rows,
                                 .dim = e->config->hidden,
                                 .x = h_in,
                                 .w = l->norm->value.data,
                                 .eps = e->config->norm_eps,
                                 .y = l->x.data,
                                 .yq = l->xq.data,
                                 .rstd = l->rstd.data,
                                 .act = e->act};
    if (a.yq && !e->calibrating)
        a.fq = cq_linear_fq(l, reader, NULL);
    return s->table->rmsnorm_forward(s, &a);
}

int cq_layer_forward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *h_in, void *h_out) {
    CQ_TRY(cq_layer_norm(l, s, b->tokens, h_in));
    if (h_out != h_in)
        CQ_TRY(CQ_RUN(s, axpy, .dtype = l->env->dtype, .n = b->tokens * l->env->config->hidden,
                      .alpha = 1, .x = h_in, .y = h_out));
    switch (l->kind) {
    case '*':
        return cq_attention_forward(l, s, b, h_out);
    case 'M':
        return cq_mamba_forward(l, s, b, h_out);
    case 'E':
        return cq_moe_forward(l, s, b, h_out);
    default:
        return cq_mlp_forward(l, s, b, h_out);
    }
}

int cq_layer_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *h_in, void *dh) {
    switch (l->kind) {
    case '*':
        CQ_TRY(cq_attention_backward(l, s, b, dh));
        break;
    case 'M':
        CQ_TRY(cq_mamba_backward(l, s, b, dh));
        break;
    case 'E':
        CQ_TRY(cq_moe_backward(l, s, b, dh));
        break;
    default:
        CQ_TRY(cq_mlp_backward(l, s, b, dh));
    }
    return CQ_RUN(s, rmsnorm_backward, .dtype = l->env->dtype, .rows = b->tokens,
                  .dim = l->env->config->hidden, .x = h_in, .w = l->norm->value.data,
                  .rstd = l->rstd.data, .dy = l->dx.data, .dx = dh, .dw = cq_param_grad(l, l->norm),
                  .accumulate = true);
}
