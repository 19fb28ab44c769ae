/// linear.c - stacked linear layers on fake-quantized operands.
///
///     y = FQ(x) FQ(W)'        dx = dy FQ(W)        dW = dy' FQ(x)        (straight-through)
///
/// The caller quantizes x, because its producer can do so in the same pass.
#include "core/base/error.h"
#include "core/block/block.h"

bool cq_linear_only_16(const cq_linear *w) { return w->fq.dtype == CQ_BF16; }

static const void *weight(const cq_linear *w) { return cq_linear_only_16(w) ? NULL : w->fq.data; }

static const void *weight_now(const cq_layer *l, const cq_linear *w) {
    return l->env->calibrating && w->value.dtype == l->env->dtype ? w->value.data : weight(w);
}

static const void *weight16_now(const cq_layer *l, const cq_linear *w) {
    return l->env->calibrating && !cq_linear_only_16(w) ? NULL : w->fq16.data;
}

bool cq_linear_acts(const cq_layer *l, const cq_linear *w) {
    return w->act_quant && !l->env->calibrating;
}

cq_fq cq_linear_fq(cq_layer *l, const cq_linear *w, const int64_t *offsets) {
    return (cq_fq){.amax = w->amax.data,
                   .offsets = w->groups > 1 ? offsets : NULL,
                   .n_groups = w->groups,
                   .saturated = l->env->again ? NULL : l->env->saturated.data};
}

int cq_linear_observe(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows,
                      const int64_t *offsets) {
    if (!l->env->calibrating || !w->quantized)
        return CQ_OK;
    return CQ_RUN(s, amax, .dtype = l->env->dtype, .rows = rows, .cols = w->k, .x = x,
                  .offsets = w->groups > 1 ? offsets : NULL, .n_groups = w->groups,
                  .amax = w->amax.data, .act = l->env->act);
}

static bool narrow(const cq_layer *l) { return l->env->act == CQ_BF16; }

static int forward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *y,
                   int64_t ldy, bool add) {
    CQ_TRY(cq_linear_observe(l, w, s, x, rows, NULL));
    return CQ_RUN(s, matmul, .dtype = l->env->dtype, .tb = true, .m = rows, .n = w->n, .k = w->k,
                  .a = x, .lda = w->k, .b = weight_now(l, w), .ldb = w->k, .c = y, .ldc = ldy,
                  .alpha = 1, .beta = add, .b16 = weight16_now(l, w), .a_bf16 = narrow(l),
                  .c_bf16 = narrow(l) && !add);
}

int cq_linear_forward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *y,
                      int64_t ldy) {
    return forward(l, w, s, x, rows, y, ldy, false);
}

int cq_linear_add(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *h) {
    return forward(l, w, s, x, rows, h, w->n, true);
}

/* grad += dy' x */
static int weight_gradient(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dy,
                           int64_t lddy, int64_t rows, bool dy_bf16) {
    if (!w->grad.data || l->env->input_only)
        return CQ_OK;
    return CQ_RUN(s, matmul, .dtype = l->env->dtype, .ta = true, .m = w->n, .n = w->k, .k = rows,
                  .a = dy, .lda = lddy, .b = x, .ldb = w->k, .c = w->grad.data, .ldc = w->k,
                  .alpha = 1, .beta = 1, .a_bf16 = dy_bf16, .b_bf16 = narrow(l));
}

int cq_linear_backward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dy,
                       int64_t lddy, int64_t rows, void *dx, double beta) {
    CQ_TRY(CQ_RUN(s, matmul, .dtype = l->env->dtype, .m = rows, .n = w->k, .k = w->n, .a = dy,
                  .lda = lddy, .b = weight(w), .ldb = w->k, .c = dx, .ldc = w->k, .alpha = 1,
                  .beta = beta, .b16 = w->fq16.data, .a_bf16 = narrow(l)));
    return weight_gradient(l, w, s, x, dy, lddy, rows, narrow(l));
}

int cq_linear_add_backward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dh,
                           int64_t rows, void *dx) {
    CQ_TRY(CQ_RUN(s, matmul, .dtype = l->env->dtype, .m = rows, .n = w->k, .k = w->n, .a = dh,
                  .lda = w->n, .b = weight(w), .ldb = w->k, .c = dx, .ldc = w->k, .alpha = 1,
                  .b16 = w->fq16.data, .c_bf16 = narrow(l)));
    return weight_gradient(l, w, s, x, dh, w->n, rows, false);
}

int cq_experts_forward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                       int64_t rows, const void *x, void *y) {
    CQ_TRY(cq_linear_observe(l, w, s, x, rows, offsets));
    return CQ_RUN(s, matmul_grouped, .dtype = l->env->dtype, .mode = CQ_GROUPED_FORWARD,
                  .groups = w->groups, .n = w->n, .k = w->k, .offsets = offsets, .x = (void *)x,
                  .w = (void *)weight_now(l, w), .y = y, .w16 = weight16_now(l, w),
                  .x_bf16 = narrow(l), .y_bf16 = narrow(l));
}

int cq_experts_backward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                        const void *x, const void *dy, void *dx) {
    CQ_TRY(CQ_RUN(s, matmul_grouped, .dtype = l->env->dtype, .mode = CQ_GROUPED_INPUT,
                  .groups = w->groups, .n = w->n, .k = w->k, .offsets = offsets, .x = dx,
                  .w = (void *)weight(w), .y = (void *)dy, .w16 = w->fq16.data, .x_bf16 = narrow(l),
                  .y_bf16 = narrow(l)));
    if (!w->grad.data || l->env->input_only)
        return CQ_OK;
    return CQ_RUN(s, matmul_grouped, .dtype = l->env->dtype, .mode = CQ_GROUPED_WEIGHT,
                  .groups = w->groups, .n = w->n, .k = w->k, .offsets = offsets, .x = (void *)x,
                  .w = w->grad.data, .y = (void *)dy, .x_bf16 = narrow(l), .y_bf16 = narrow(l));
}

void *cq_param_grad(const cq_layer *l, const cq_param *p) {
    return p && !l->env->input_only ? p->grad.data : NULL;
}
