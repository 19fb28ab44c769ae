/// linear.c - stacked linear layers on fake-quantized operands.
///
///     y = FQ(x) FQ(W)'        dx = dy FQ(W)        dW = dy' FQ(x)        (straight-through)
///
/// The caller quantizes x, because its producer can do so in the same pass.
#include "core/base/error.h"
#include "core/block/block.h"

bool cq_linear_only_16(const cq_linear *w) { return w->fq.dtype == CQ_BF16; }

/* What a product multiplies with: values in the model's dtype, in BF16, or both. */
typedef struct operand {
    const void *wide, *half;
} operand;

/* Whether all parts of a stack have the tensor scale of the first; others come from elsewhere. */
static bool one_scale(const cq_linear *w) {
    for (int64_t i = 1; i < w->n_parts; i++)
        if (w->part[i]->amax != w->part[0]->amax)
            return false;
    return true;
}

/* Rows of a packed stack, in `groups` parts of as many rows each, opened to where they belong. */
static int open_rows(const cq_layer *l, const cq_linear *w, cq_stream *s, int64_t part, int64_t row,
                     int64_t rows, int64_t groups, const int64_t *offsets) {
    const cq_param *p = w->part[part];
    char *y = (char *)l->env->opened.data + row * w->k * (w->half ? 2 : 4);
    return CQ_RUN(s, unpack, .dtype = w->half ? CQ_BF16 : CQ_F32, .rows = rows, .cols = w->k,
                  .codes = (const uint8_t *)w->codes.data + row * w->k / 2,
                  .scales = (const uint8_t *)w->scales.data + row * w->k / 16,
                  .amax = (const float *)w->amax_w.data + part, .n_groups = groups,
                  .top = cq_param_top(p), .y = y, .offsets = offsets);
}

/* Opens a packed stack into the scratch that all stacks share: in BF16 where products read that; of
 * experts those that have rows. */
static int open_packed(const cq_layer *l, const cq_linear *w, cq_stream *s, const int64_t *offsets,
                       operand *out) {
    void *y = l->env->opened.data;
    int64_t row = 0;
    *out = w->half ? (operand){.half = y} : (operand){.wide = y};
    if (w->groups > 1 || one_scale(w))
        return open_rows(l, w, s, w->first, 0, w->held * w->n, w->groups > 1 ? w->held : 1,
                         offsets);
    for (int64_t i = 0; i < w->n_parts; row += w->part[i++]->shape.dim[0])
        CQ_TRY(open_rows(l, w, s, i, row, w->part[i]->shape.dim[0], 1, NULL));
    return CQ_OK;
}

/* The unquantized weights, which a calibration multiplies with. */
static int masters(const cq_layer *l, const cq_linear *w, cq_stream *s, operand *out) {
    if (w->value.dtype == l->env->dtype) {
        *out = (operand){.wide = w->value.data};
        return CQ_OK;
    }
    if (!w->codes.data && !cq_linear_only_16(w)) { /* cq_model_widen wrote them there */
        *out = (operand){.wide = w->fq.data};
        return CQ_OK;
    }
    bool as_is = w->half && !w->low.data;
    *out = as_is ? (operand){.half = w->value.data} : (operand){.wide = l->env->opened.data};
    return as_is ? CQ_OK
                 : CQ_RUN(s, widen, .dtype = CQ_F32, .n = cq_tensor_elems(w->value),
                          .x = w->value.data, .low = w->low.data, .y = l->env->opened.data);
}

static int weights(const cq_layer *l, const cq_linear *w, cq_stream *s, const int64_t *offsets,
                   operand *out) {
    if (l->env->calibrating && w->quantized)
        return masters(l, w, s, out);
    if (w->codes.data)
        return open_packed(l, w, s, offsets, out);
    *out = (operand){cq_linear_only_16(w) ? NULL : w->fq.data, w->fq16.data};
    return CQ_OK;
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

/* Whether a product of this linear's forward is one of codes. */
static bool codes_alone(const cq_layer *l, const cq_linear *w, const cq_stream *s, const void *y,
                        int64_t ldy) {
    bool aligned = w->k % 32 == 0 && w->n % 8 == 0 && ldy % 8 == 0 && ((uintptr_t)y & 15) == 0;
    return s->fp4 && w->codes.data && w->groups == 1 && cq_linear_acts(l, w) && aligned &&
           one_scale(w);
}

/* y = x W', or y += x W', of codes. Those of x are made again of the quantized x, which gives them
 * back but where a block's scale is subnormal, its values below 2^-15 of the largest that x may
 * have: such a block may change by a quarter of its maximum (the backward reads the quantized x
 * itself). */
static int multiply_codes(const cq_layer *l, const cq_linear *w, cq_stream *s, const void *x,
                          int64_t rows, void *y, int64_t ldy, bool add) {
    uint8_t *codes = l->env->x_codes.data, *scales = codes + rows * w->k / 2;
    const cq_param *p = w->part[0];
    CQ_TRY(CQ_RUN(s, pack, .dtype = l->env->dtype, .rows = rows, .cols = w->k, .x = x,
                  .fq = {.amax = w->amax.data, .n_groups = 1}, .top = 448.0f, .codes = codes,
                  .scales = scales, .act = l->env->act));
    return CQ_RUN(s, matmul_nvfp4, .dtype = l->env->dtype, .m = rows, .n = w->n, .k = w->k,
                  .a_codes = codes, .a_scales = scales, .a_amax = w->amax.data,
                  .b_codes = w->codes.data, .b_scales = w->scales.data, .b_amax = w->amax_w.data,
                  .b_top = cq_param_top(p), .c = y, .ldc = ldy, .beta = add,
                  .c_bf16 = narrow(l) && !add);
}

static int forward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, int64_t rows, void *y,
                   int64_t ldy, bool add) {
    operand b;
    CQ_TRY(cq_linear_observe(l, w, s, x, rows, NULL));
    if (codes_alone(l, w, s, y, ldy))
        return multiply_codes(l, w, s, x, rows, y, ldy, add);
    CQ_TRY(weights(l, w, s, NULL, &b));
    return CQ_RUN(s, matmul, .dtype = l->env->dtype, .tb = true, .m = rows, .n = w->n, .k = w->k,
                  .a = x, .lda = w->k, .b = b.wide, .ldb = w->k, .c = y, .ldc = ldy, .alpha = 1,
                  .beta = add, .b16 = b.half, .a_bf16 = narrow(l), .c_bf16 = narrow(l) && !add);
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
    operand b;
    CQ_TRY(weights(l, w, s, NULL, &b));
    CQ_TRY(CQ_RUN(s, matmul, .dtype = l->env->dtype, .m = rows, .n = w->k, .k = w->n, .a = dy,
                  .lda = lddy, .b = b.wide, .ldb = w->k, .c = dx, .ldc = w->k, .alpha = 1,
                  .beta = beta, .b16 = b.half, .a_bf16 = narrow(l)));
    return weight_gradient(l, w, s, x, dy, lddy, rows, narrow(l));
}

int cq_linear_add_backward(cq_layer *l, cq_linear *w, cq_stream *s, const void *x, const void *dh,
                           int64_t rows, void *dx) {
    operand b;
    CQ_TRY(weights(l, w, s, NULL, &b));
    CQ_TRY(CQ_RUN(s, matmul, .dtype = l->env->dtype, .m = rows, .n = w->k, .k = w->n, .a = dh,
                  .lda = w->n, .b = b.wide, .ldb = w->k, .c = dx, .ldc = w->k, .alpha = 1,
                  .b16 = b.half, .c_bf16 = narrow(l)));
    return weight_gradient(l, w, s, x, dh, w->n, rows, false);
}

int cq_experts_forward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                       int64_t rows, const void *x, void *y) {
    operand b;
    CQ_TRY(cq_linear_observe(l, w, s, x, rows, offsets));
    CQ_TRY(weights(l, w, s, offsets, &b));
    return CQ_RUN(s, matmul_grouped, .dtype = l->env->dtype, .mode = CQ_GROUPED_FORWARD,
                  .groups = w->groups, .n = w->n, .k = w->k, .offsets = offsets, .x = (void *)x,
                  .w = (void *)b.wide, .y = y, .w16 = b.half, .x_bf16 = narrow(l),
                  .y_bf16 = narrow(l));
}

int cq_experts_backward(cq_layer *l, cq_linear *w, cq_stream *s, const int64_t *offsets,
                        const void *x, const void *dy, void *dx) {
    operand b;
    CQ_TRY(weights(l, w, s, offsets, &b));
    CQ_TRY(CQ_RUN(s, matmul_grouped, .dtype = l->env->dtype, .mode = CQ_GROUPED_INPUT,
                  .groups = w->groups, .n = w->n, .k = w->k, .offsets = offsets, .x = dx,
                  .w = (void *)b.wide, .y = (void *)dy, .w16 = b.half, .x_bf16 = narrow(l),
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
