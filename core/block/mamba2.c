/// mamba2.c - the Mamba-2 mixer (arXiv 2405.21060) as Nemotron-H uses it.
///
///     [z | x B C | dt] = in_proj(u)    xBC = silu(conv(xBC))    y = SSD(x, B, C, dt)    h +=
///     out_proj(norm(y silu(z)))
///
/// Convolution and state restart at every document. dt has no floor: time_step_limit is (0, inf).
#include "core/base/error.h"
#include "core/block/block.h"

/* Widths in elements, from the config alone. */
typedef struct widths {
    int64_t inner, bc, conv, all;
} widths;

static widths widths_of(const cq_config *c) {
    widths w;
    w.inner = c->mamba_heads * c->mamba_head_dim;
    w.bc = c->mamba_groups * c->mamba_state;
    w.conv = w.inner + 2 * w.bc;
    w.all = w.inner + w.conv + c->mamba_heads;
    return w;
}

int cq_mamba_plan(cq_layer *l, cq_plan *p) {
    const cq_config *c = l->env->config;
    cq_dtype t = cq_layer_act(l->env);
    int64_t rows = l->env->tokens;
    widths w = widths_of(c);
    CQ_TRY(cq_layer_keep(l, p, &l->proj, "zxbcdt", t, rows, w.all));
    CQ_TRY(cq_layer_keep(l, p, &l->conv, "conv", t, rows, w.conv));
    CQ_TRY(cq_layer_keep(l, p, &l->scan, "scan", t, rows, w.inner));
    CQ_TRY(cq_layer_keep(l, p, &l->mid, "gated", t, rows, w.inner));
    CQ_TRY(cq_layer_keep(l, p, &l->rstd2, "gated rstd", l->env->dtype, rows, c->mamba_groups));
    CQ_TRY(cq_layer_scratch(l, p, &l->dmid, "dscan", t, rows, w.inner));
    CQ_TRY(cq_layer_scratch(l, p, &l->dconv, "dconv", t, rows, w.conv));
    return cq_layer_scratch(l, p, &l->dproj, "dzxbcdt", t, rows, w.all);
}

/* y = SSD(silu(conv(xBC))), documents from their start. */
static int scan(cq_layer *l, cq_stream *s, const cq_batch *b) {
    const cq_config *c = l->env->config;
    cq_dtype t = l->env->dtype;
    widths w = widths_of(c);
    int64_t size = cq_dtype_bytes(cq_layer_act(l->env));
    const char *proj = l->proj.data, *conv = l->conv.data;
    CQ_TRY(CQ_RUN(s, conv_forward, .dtype = t, .tokens = b->tokens, .n_docs = b->n_docs,
                  .starts = b->starts, .channels = w.conv, .width = c->conv_width,
                  .x = proj + w.inner * size, .ldx = w.all, .w = l->conv_w->value.data,
                  .b = l->conv_b ? l->conv_b->value.data : NULL, .y = l->conv.data,
                  .act = l->env->act));
    return CQ_RUN(s, ssd_forward, .dtype = t, .tokens = b->tokens, .n_docs = b->n_docs,
                  .starts = b->starts, .heads = c->mamba_heads, .head_dim = c->mamba_head_dim,
                  .groups = c->mamba_groups, .state = c->mamba_state, .chunk = c->chunk, .x = conv,
                  .B = conv + w.inner * size, .C = conv + (w.inner + w.bc) * size,
                  .dt_raw = proj + (w.inner + w.conv) * size, .ldx = w.conv, .ldB = w.conv,
                  .ldC = w.conv, .ld_dt = w.all, .dt_bias = l->dt_bias->value.data,
                  .a_log = l->a_log->value.data, .d = l->d->value.data, .y = l->scan.data,
                  .act = l->env->act);
}

/* The same for documents that go on from their slots' states. */
static int scan_on(cq_layer *l, cq_stream *s, const cq_batch *b) {
    const cq_config *c = l->env->config;
    const cq_past *past = l->env->past;
    cq_dtype t = l->env->dtype;
    widths w = widths_of(c);
    int64_t size = cq_dtype_bytes(cq_layer_act(l->env));
    const char *proj = l->proj.data, *conv = l->conv.data;
    CQ_TRY(CQ_RUN(s, conv_cached, .dtype = t, .tokens = b->tokens, .n_docs = b->n_docs,
                  .starts = b->starts, .slot = past->slot.data, .past = past->past.data,
                  .channels = w.conv, .width = c->conv_width, .x = proj + w.inner * size,
                  .ldx = w.all, .w = l->conv_w->value.data,
                  .b = l->conv_b ? l->conv_b->value.data : NULL, .state = l->conv_state.data,
                  .y = l->conv.data, .act = l->env->act));
    return CQ_RUN(s, ssd_cached, .dtype = t, .tokens = b->tokens, .n_docs = b->n_docs,
                  .starts = b->starts, .slot = past->slot.data, .past = past->past.data,
                  .heads = c->mamba_heads, .head_dim = c->mamba_head_dim, .groups = c->mamba_groups,
                  .state = c->mamba_state, .chunk = c->chunk, .x = conv, .B = conv + w.inner * size,
                  .C = conv + (w.inner + w.bc) * size, .dt_raw = proj + (w.inner + w.conv) * size,
                  .ldx = w.conv, .ldB = w.conv, .ldC = w.conv, .ld_dt = w.all,
                  .dt_bias = l->dt_bias->value.data, .a_log = l->a_log->value.data,
                  .d = l->d->value.data, .S = l->states.data, .y = l->scan.data,
                  .act = l->env->act);
}

int cq_mamba_forward(cq_layer *l, cq_stream *s, const cq_batch *b, void *h) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    widths w = widths_of(c);
    int64_t rows = b->tokens;
    const void *x = l->in[0]->act_quant ? l->xq.data : l->x.data;
    CQ_TRY(cq_linear_forward(l, l->in[0], s, x, rows, l->proj.data, w.all));
    CQ_TRY(e->past ? scan_on(l, s, b) : scan(l, s, b));
    bool quant = cq_linear_acts(l, l->out);
    CQ_TRY(CQ_RUN(s, gatednorm_forward, .dtype = e->dtype, .rows = rows, .dim = w.inner,
                  .groups = c->mamba_groups, .y = l->scan.data, .z = l->proj.data, .ldz = w.all,
                  .w = l->gated_norm->value.data, .eps = c->norm_eps,
                  .out = quant ? NULL : l->mid.data, .outq = quant ? l->mid.data : NULL,
                  .fq = cq_linear_fq(l, l->out, NULL), .rstd = l->rstd2.data, .act = e->act));
    return cq_linear_add(l, l->out, s, l->mid.data, rows, h);
}

int cq_mamba_backward(cq_layer *l, cq_stream *s, const cq_batch *b, const void *dh) {
    const cq_layer_env *e = l->env;
    const cq_config *c = e->config;
    widths w = widths_of(c);
    int64_t rows = b->tokens, size = cq_dtype_bytes(cq_layer_act(e));
    const char *proj = l->proj.data, *conv = l->conv.data;
    char *dproj = l->dproj.data, *dconv = l->dconv.data;
    /* dconv is free until the scan's backward, so it holds the gated norm's output gradient first
     */
    CQ_TRY(cq_linear_add_backward(l, l->out, s, l->mid.data, dh, rows, l->dconv.data));
    CQ_TRY(CQ_RUN(s, gatednorm_backward, .dtype = e->dtype, .rows = rows, .dim = w.inner,
                  .groups = c->mamba_groups, .y = l->scan.data, .z = proj, .ldz = w.all,
                  .w = l->gated_norm->value.data, .rstd = l->rstd2.data, .dout = l->dconv.data,
                  .dy = l->dmid.data, .dz = dproj, .lddz = w.all,
                  .dw = cq_param_grad(l, l->gated_norm), .act = e->act));
    CQ_TRY(CQ_RUN(s, ssd_backward, .dtype = e->dtype, .tokens = rows, .n_docs = b->n_docs,
                  .starts = b->starts, .heads = c->mamba_heads, .head_dim = c->mamba_head_dim,
                  .groups = c->mamba_groups, .state = c->mamba_state, .chunk = c->chunk, .x = conv,
                  .B = conv + w.inner * size, .C = conv + (w.inner + w.bc) * size,
                  .dt_raw = proj + (w.inner + w.conv) * size, .ldx = w.conv, .ldB = w.conv,
                  .ldC = w.conv, .ld_dt = w.all, .dt_bias = l->dt_bias->value.data,
                  .a_log = l->a_log->value.data, .d = l->d->value.data, .dy = l->dmid.data,
                  .dx = dconv, .dB = dconv + w.inner * size, .dC = dconv + (w.inner + w.bc) * size,
                  .ddt_raw = dproj + (w.inner + w.conv) * size, .lddx = w.conv, .lddB = w.conv,
                  .lddC = w.conv, .ldd_dt = w.all, .ddt_bias = cq_param_grad(l, l->dt_bias),
                  .da_log = cq_param_grad(l, l->a_log), .dd = cq_param_grad(l, l->d),
                  .act = e->act));
    CQ_TRY(CQ_RUN(s, conv_backward, .dtype = e->dtype, .tokens = rows, .n_docs = b->n_docs,
                  .starts = b->starts, .channels = w.conv, .width = c->conv_width,
                  .x = proj + w.inner * size, .ldx = w.all, .w = l->conv_w->value.data,
                  .b = l->conv_b ? l->conv_b->value.data : NULL, .dy = l->dconv.data,
                  .dx = dproj + w.inner * size, .lddx = w.all, .dw = cq_param_grad(l, l->conv_w),
                  .db = cq_param_grad(l, l->conv_b), .act = e->act));
    const void *x = l->in[0]->act_quant ? l->xq.data : l->x.data;
    return cq_linear_backward(l, l->in[0], s, x, dproj, w.all, rows, l->dx.data, 0);
}
