/* checked.c - a table around another one that looks at every result for NaN and Inf.
 *
 * For finding the first operation that goes wrong (option --check): each floating result is copied
 * to the host, so this is slow. The message names the operation, the buffer and the row; the model
 * puts block and step before it.
 */
#include "core/base/error.h"
#include "kernels/kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const cq_kernels *base;
static cq_kernels table;

static double value(cq_dtype dtype, const void *x, int64_t i) {
    float wide;
    if (dtype == CQ_BF16) {
        cq_convert(&wide, CQ_F32, (const char *)x + i * cq_dtype_bytes(CQ_BF16), CQ_BF16, 1);
        return (double)wide;
    }
    return dtype == CQ_F64 ? ((const double *)x)[i] : (double)((const float *)x)[i];
}

/* rows of cols elements, ld apart. */
static int look(cq_stream *s, const char *op, const char *name, cq_dtype dtype, const void *x,
                int64_t rows, int64_t cols, int64_t ld) {
    if (!x || rows < 1 || cols < 1)
        return CQ_OK;
    int64_t n = (rows - 1) * ld + cols;
    size_t bytes = (size_t)(n * cq_dtype_bytes(dtype));
    void *copy = base->memory ? malloc(bytes) : NULL;
    if (base->memory && !copy)
        return cq_fail(CQ_ENOMEM, "%s: no memory to check %s", op, name);
    int status = copy ? base->memory->copy(s, copy, x, (int64_t)bytes) : CQ_OK;
    const void *at = copy ? copy : x;
    for (int64_t i = 0; i < rows && status == CQ_OK; i++)
        for (int64_t j = 0; j < cols && status == CQ_OK; j++)
            if (!isfinite(value(dtype, at, i * ld + j)))
                status = cq_fail(CQ_ENUMERIC, "%s: %s holds %g in row %ld, column %ld", op, name,
                                 value(dtype, at, i * ld + j), (long)i, (long)j);
    free(copy);
    return status;
}

#define OF(type, field, rows, cols, ld)                                                            \
    if (status == CQ_OK)                                                                           \
    status = look(s, op_, #field, (type), a->field, (rows), (cols), (ld))
#define OUT(field, rows, cols, ld) OF(a->dtype, field, rows, cols, ld)
#define DENSE(field, rows, cols) OUT(field, rows, cols, cols)
/* The same of an activation. */
#define ACT(field, rows, cols, ld) OF(a->act == CQ_BF16 ? CQ_BF16 : a->dtype, field, rows, cols, ld)
#define ACTS(field, rows, cols) ACT(field, rows, cols, cols)
#define CHECKED(op, ...)                                                                           \
    static int checked_##op(cq_stream *s, const cq_##op##_args *a) {                               \
        const char *op_ = #op;                                                                     \
        int status = base->op(s, a);                                                               \
        (void)op_;                                                                                 \
        __VA_ARGS__;                                                                               \
        return status;                                                                             \
    }

CHECKED(matmul, OF(a->c_bf16 ? CQ_BF16 : a->dtype, c, a->m, a->n, a->ldc))
CHECKED(matmul_grouped, {
    if (a->mode == CQ_GROUPED_WEIGHT)
        DENSE(w, a->groups * a->n, a->k);
}) /* the number of rows is known to the device only */
CHECKED(matmul_nvfp4, OF(a->c_bf16 ? CQ_BF16 : a->dtype, c, a->m, a->n, a->ldc))
CHECKED(rmsnorm_forward, ACTS(y, a->rows, a->dim); ACTS(yq, a->rows, a->dim))
CHECKED(rmsnorm_backward, DENSE(dx, a->rows, a->dim); DENSE(dw, 1, a->dim))
CHECKED(gatednorm_forward, ACTS(out, a->rows, a->dim); ACTS(outq, a->rows, a->dim))
CHECKED(gatednorm_backward, ACTS(dy, a->rows, a->dim); ACT(dz, a->rows, a->dim, a->lddz);
        DENSE(dw, 1, a->dim))
CHECKED(headnorm_forward, ACT(y, a->rows, a->heads * a->head_dim, a->ldy))
CHECKED(headnorm_backward, ACT(dx, a->rows, a->heads * a->head_dim, a->lddx);
        DENSE(dw, 1, a->head_dim))
CHECKED(attention_forward, ACTS(out, a->tokens, a->heads * a->head_dim);
        ACTS(outq, a->tokens, a->heads * a->head_dim); DENSE(lse, a->tokens, a->heads))
CHECKED(attention_backward, ACT(dq, a->tokens, a->heads * a->head_dim, a->lddq);
        ACT(dk, a->tokens, a->kv_heads * a->head_dim, a->lddk);
        ACT(dv, a->tokens, a->kv_heads * a->head_dim, a->lddv))
CHECKED(attention_cached, ACTS(out, a->tokens, a->heads * a->head_dim))
CHECKED(conv_forward, ACTS(y, a->tokens, a->channels))
CHECKED(conv_backward, ACT(dx, a->tokens, a->channels, a->lddx); DENSE(dw, a->channels, a->width);
        DENSE(db, 1, a->channels))
CHECKED(conv_cached, ACTS(y, a->tokens, a->channels))
CHECKED(ssd_forward, ACTS(y, a->tokens, a->heads * a->head_dim))
CHECKED(ssd_backward, ACT(dx, a->tokens, a->heads * a->head_dim, a->lddx);
        ACT(dB, a->tokens, a->groups * a->state, a->lddB);
        ACT(dC, a->tokens, a->groups * a->state, a->lddC);
        ACT(ddt_raw, a->tokens, a->heads, a->ldd_dt); DENSE(ddt_bias, 1, a->heads);
        DENSE(da_log, 1, a->heads); DENSE(dd, 1, a->heads))
CHECKED(ssd_cached, ACTS(y, a->tokens, a->heads * a->head_dim))
CHECKED(swiglu_forward, ACTS(h, a->rows, a->dim); ACTS(hq, a->rows, a->dim))
CHECKED(swiglu_backward, ACTS(dgu, a->rows, 2 * a->dim))
CHECKED(relu2_forward, ACTS(h, a->rows, a->dim); ACTS(hq, a->rows, a->dim))
CHECKED(relu2_backward, ACTS(dx, a->rows, a->dim))
CHECKED(fake_quant, ACTS(y, a->rows, a->cols))
CHECKED(pack, )
CHECKED(unpack, {
    if (!a->offsets) /* else what is left out holds anything */
        DENSE(y, a->rows, a->cols);
})
CHECKED(amax, {
    if (status == CQ_OK)
        status = look(s, op_, "amax", CQ_F32, a->amax, 1, a->n_groups, a->n_groups);
})
CHECKED(route_forward, DENSE(weight, a->tokens, a->top_k))
CHECKED(route_backward, DENSE(dlogits, a->tokens, a->experts))
CHECKED(route_sort, )
CHECKED(gather_rows, ACTS(y, a->rows, a->dim); ACTS(yq, a->rows, a->dim))
CHECKED(combine_forward, DENSE(out, a->tokens, a->dim))
CHECKED(combine_backward, ACTS(dy, a->tokens * a->top_k, a->dim);
        DENSE(dweight, a->tokens, a->top_k))
CHECKED(ungather_rows, DENSE(dx, a->tokens, a->dim))
CHECKED(embed_forward, DENSE(h, a->tokens, a->dim))
CHECKED(embed_backward, DENSE(dtable, a->vocab, a->dim))
CHECKED(kl, DENSE(student, a->rows, a->vocab))
CHECKED(top_logits, )
CHECKED(kl_cached, DENSE(student, a->rows, a->vocab))
CHECKED(cross_entropy, DENSE(logits, a->rows, a->vocab))
CHECKED(gram, DENSE(gram, (a->batch > 1 ? a->batch : 1) * a->n, a->n))
CHECKED(cka, )
CHECKED(cka_backward, DENSE(dx, (a->batch > 1 ? a->batch : 1) * a->n, a->dim))
CHECKED(rowloss, )
CHECKED(rowloss_backward, DENSE(dx, a->n, a->dim))
CHECKED(balance, )
CHECKED(scatter_rows, )
CHECKED(adamw, {
    int64_t blocks = (a->rows * a->cols + 255) / 256;
    if (a->master == CQ_MASTER_F32)
        DENSE(w, a->rows, a->cols);
    if (a->moments == CQ_MOMENTS_F32) {
        DENSE(m, a->rows, a->cols);
        DENSE(v, a->rows, a->cols);
    } else if (a->moments == CQ_MOMENTS_8BIT) {
        DENSE(m_scale, 1, blocks);
        DENSE(v_scale, 1, blocks);
    }
    DENSE(wq, a->rows, a->cols);
})
CHECKED(sumsq, )
CHECKED(axpy, DENSE(y, 1, a->n))
CHECKED(round_bf16, )
CHECKED(widen, DENSE(y, 1, a->n))

const cq_kernels *cq_kernels_checked(const cq_kernels *of) {
    base = of;
    table = (cq_kernels){
        .name = of->name,
        .memory = of->memory,
#define CQ_KERNEL(op) .op = checked_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
    };
    return &table;
}
