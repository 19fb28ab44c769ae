/// attention.c - grouped-query attention, with q/k norm and rotary embedding where the family has
/// them.
///
///     h += o_proj(softmax(q k' / sqrt(head_dim)) v)        Nemotron-H: no RoPE, no q/k norm;
///     Qwen3: both
///
/// q, k and v lie side by side in one row: [heads | kv_heads | kv_heads] x head_dim.
#include "core/base/error.h"
#include "core/block/block.h"
#include <math.h>

static bool transforms(const cq_layer *l) { return l->q_norm || l->env->config->rope_theta > 0; }

int cq_attention_plan(cq_layer *l, cq_plan *p) {
    const cq_config *c = l->env->config;
    cq_dtype t = cq_layer_act(l->env);
    int64_t rows = l->env->tokens, width = cq_layer_proj_width(l), q = c->heads * c->head_dim;
    CQ_TRY(cq_layer_keep(l, p, &l->proj, "qkv", t, rows, width));
    if (transforms(l))
        CQ_TRY(
            cq_layer_keep(l, p, &l->rotated, "qk rotated", t, rows, q + c->kv_heads * c->head_dim));
    CQ_TRY(cq_layer_keep(l, p, &l->mid, "attention", t, rows, q));
    if (l->out->act_quant)
        CQ_TRY(cq_layer_keep(l, p, &l->midq, "attention fq", t, rows, q));
    CQ_TRY(cq_layer_keep(l, p, &l->lse, "lse", l->env->dtype, rows, c->heads));
    CQ_TRY(cq_layer_scratch(l, p, &l->dmid, "dattention", t, rows, q));
    return cq_layer_scratch(l, p, &l->dproj, "dqkv", t, rows, width);
}

/* Where q, k and v are read from. */
typedef struct heads {
    const char *q, *k, *v;
    int64_t ld, ldv;
} heads;

static heads heads_of(const cq_layer *l) {
    const cq_config *c = l->env->config;
    int64_t size = cq_dtype_bytes(cq_layer_act(l->env)), width = cq_layer_proj_width(l);
    int64_t q = c->heads * c->head_dim * size, kv = c->kv_heads * c->head_dim * size;
    const char *proj = l->proj.data, *qk = transforms(l) ? l->rotated.data : l->proj.data;
    int64_t ld = transforms(l) ? (c->heads + c->kv_heads) * c->head_dim : width;
    return (heads){qk, qk + q, proj + q + kv, ld, width};
}

static cq_headnorm_forward_args headnorm_args(const cq_layer *l, const cq_batch *b, bool k) {
    const cq_config *c = l->env->config;
    int64_t size = cq_dtype_bytes(cq_layer_act(l->env)), at = k ? c->heads * c->head_dim * size : 0;
    const cq_param *w = k ? l->k_norm : l->q_norm;
    return (cq_headnorm_forward_args){.dtype = l->env->dtype,
                                      .rows = b->tokens,
                                      .heads = k ? c->kv_heads : c->heads,
                                      .head_dim = c->head_dim,
                                      .x = (char *)l->proj.data + at,
                                      .ldx = cq_layer_proj_width(l),
                                      .w = w ? w->value.data : NULL,
                                      .eps = c->norm_eps,
                                      .positions = c->rope_theta > 0 ? b->positions : NULL,
                                      .theta = c->rope_theta,
                                      .y = (char *)l->rotated.data + at,
                                      .ldy = (c->heads + c->kv_heads) * c->head_dim,
                                      .act = l->env->act};
}

/* mid = softmax(q k') v, over what the slots hold as well where documents go on from a past; midq
 * is its fake quantization for an output projection that takes that. */
static int attend(cq_layer *l, cq_stream *s, const cq_batch *b) {
    const cq_config *c = l->env->config;
    const cq_past *past = l->env->past;
    heads r = heads_of(l);
    double scale = 1 / sqrt((double)c->head_dim);
    cq_fq fq = cq_linear_fq(l, l->out, NULL);
    void *midq = cq_linear_acts(l, l->out) ? l->midq.data : NULL;
    if (past) {
        CQ_TRY(CQ_RUN(s, attention_cached, .dtype = l->env->dtype, .tokens = b->tokens,
                      .n_docs = b->n_docs, .starts = b->starts, .slot = past->slot.data,
                      .past = past->past.data, .heads = c->heads, .kv_heads = c->kv_heads,
                      .head_dim = c->head_dim, .room = past->room, .scale = scale, .q = r.q,
                      .k = r.k, .v = r.v, .ldq = r.ld, .ldk = r.ld, .ldv = r.ldv,
                      .k_cache = l->keys.data, .v_cache = l->values.data, .out = l->mid.data,
                      .act = l->env->act));
        return midq ? CQ_RUN(s, fake_quant, .dtype = l->env->dtype, .rows = b->tokens,
                             .cols = c->heads * c->head_dim, .x = l->mid.data, .y = midq, .fq = fq,
                             .act = l->env->act)
                    : CQ_OK;
    }
    return CQ_RUN(s, attention_forward, .dtype = l->env->dtype, .tokens = b->tokens,
                  .n_docs = b->n_docs, .starts = b->starts, .heads = c->heads,
                  .kv_heads = c->kv_heads, .head_dim = c->head_dim, .scale = scale, .q = r.q,
                  .k = r.k, .v = r.v, .ldq = r.ld, .ldk = r.ld, .ldv = r.ldv, .out = l->mid.data,
                  .lse = l->lse.data, .outq = midq, .fq = fq, .act = l->env->act);
}

int cq_attention_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h) {
    int64_t rows = b->tokens, width = cq_layer_proj_width(l);
    int64_t size = cq_dtype_bytes(cq_layer_act(l->env)), at = 0;
    for (int i = 0; i < l->n_in; i++) {
        const void *x = l->in[i]->act_quant ? l->xq.data : l->x.data;
        CQ_TRY(cq_linear_forward(l, l->in[i], s, x, rows, (char *)l->proj.data + at * size, width));
        at += l->in[i]->n;
    }
    for (int k = 0; transforms(l) && k < 2; k++) {
        cq_headnorm_forward_args a = headnorm_args(l, b, k);
        CQ_TRY(s->table->headnorm_forward(s, &a));
    }
    CQ_TRY(attend(l, s, b));
    const void *mid = cq_linear_acts(l, l->out) ? l->midq.data : l->mid.data;
    return cq_linear_add(l, l->out, s, mid, rows, h);
}

static int headnorm_back(cq_layer *l, cq_stream *s, const cq_batch *b) {
    const cq_config *c = l->env->config;
    for (int k = 0; k < 2; k++) {
        cq_headnorm_forward_args f = headnorm_args(l, b, k);
        char *d = (char *)l->dproj.data +
                  (k ? c->heads * c->head_dim * cq_dtype_bytes(cq_layer_act(l->env)) : 0);
        CQ_TRY(CQ_RUN(s, headnorm_backward, .dtype = f.dtype, .rows = f.rows, .heads = f.heads,
                      .head_dim = f.head_dim, .x = f.x, .ldx = f.ldx, .w = f.w, .eps = f.eps,
                      .positions = f.positions, .theta = f.theta, .dy = d, .lddy = f.ldx, .dx = d,
                      .lddx = f.ldx, .dw = cq_param_grad(l, k ? l->k_norm : l->q_norm),
                      .act = f.act));
    }
    return CQ_OK;
}

int cq_attention_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    int64_t rows = b->tokens, width = cq_layer_proj_width(l);
    int64_t size = cq_dtype_bytes(cq_layer_act(e));
    const void *mid = l->out->act_quant ? l->midq.data : l->mid.data;
    CQ_TRY(cq_linear_add_backward(l, l->out, s, mid, dh, rows, l->dmid.data));
    heads r = heads_of(l);
    char *dq = l->dproj.data, *dk = dq + c->heads * c->head_dim * size;
    CQ_TRY(CQ_RUN(s, attention_backward, .dtype = e->dtype, .tokens = rows, .n_docs = b->n_docs,
                  .starts = b->starts, .heads = c->heads, .kv_heads = c->kv_heads,
                  .head_dim = c->head_dim, .scale = 1 / sqrt((double)c->head_dim), .q = r.q,
                  .k = r.k, .v = r.v, .ldq = r.ld, .ldk = r.ld, .ldv = r.ldv, .out = l->mid.data,
                  .lse = l->lse.data, .dout = l->dmid.data, .dq = dq, .dk = dk,
                  .dv = dk + c->kv_heads * c->head_dim * size, .lddq = width, .lddk = width,
                  .lddv = width, .act = e->act));
    if (transforms(l))
        CQ_TRY(headnorm_back(l, s, b));
    int64_t at = 0;
    for (int i = 0; i < l->n_in; i++) {
        const void *x = l->in[i]->act_quant ? l->xq.data : l->x.data;
        CQ_TRY(cq_linear_backward(l, l->in[i], s, x, (char *)l->dproj.data + at * size, width, rows,
                                  l->dx.data, i > 0));
        at += l->in[i]->n;
    }
    return CQ_OK;
}
