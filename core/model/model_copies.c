/// model_copies.c - the fake-quantized copies of a student's weights, in the form they are kept in.
///
/// Whatever the form, a product multiplies with the same bits: codes and block scales are all that
/// an FP32 copy holds, and BF16 products round an FP32 copy to what a BF16 one holds.
#include "core/base/error.h"
#include "core/model/model_impl.h"
#include "core/tensor/device.h"
#include <stdlib.h>

int cq_model_plan_copy(cq_model *m, cq_plan *p, cq_linear *w) {
    const char *name = w->part[0]->name;
    int64_t rows = w->held * w->n;
    cq_purpose purpose = CQ_FOR_FAKEQUANT;
    if (m->copies != CQ_COPIES_F32 && m->env.dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "plan: copies of weights in %s, wanted F32 in a model of %s",
                       m->copies == CQ_COPIES_BF16 ? "BF16" : "NVFP4", cq_dtype_name(m->env.dtype));
    if (m->copies == CQ_COPIES_PACKED) {
        CQ_TRY(cq_plan_add(p, &w->codes, purpose, name, CQ_U8, CQ_SHAPE2(rows, w->k / 2)));
        return cq_plan_add(p, &w->scales, purpose, name, CQ_U8, CQ_SHAPE2(rows, w->k / 16));
    }
    bool half = m->copies == CQ_COPIES_BF16 && w->half;
    return cq_plan_add(p, &w->fq, purpose, name, half ? CQ_BF16 : m->env.dtype,
                       CQ_SHAPE2(rows, w->k));
}

const void *cq_param_wide(const cq_param *p) { return p->fq.dtype == CQ_BF16 ? NULL : p->fq.data; }

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t cq_model_opened_bytes(const cq_model *m) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < m->n_linears && m->copies != CQ_COPIES_F32; i++) {
        const cq_linear *w = m->linear[i];
        int64_t n = w->held * w->n * w->k;
        if (!w->quantized)
            continue;
        if (m->copies == CQ_COPIES_PACKED)
            bytes = max64(bytes, n * (w->half ? 2 : 4));
        /* a master that a calibration cannot multiply with as it is; of a shared stack the teacher
         * may have that */
        bool split = m->master == CQ_MASTER_SPLIT;
        if (!w->half || split)
            bytes = max64(bytes, n * 4);
        for (int64_t k = 0; k < w->n_parts; k++)
            bytes = max64(bytes, 4 * cq_shape_elems(w->part[k]->shape));
    }
    return bytes;
}

int cq_model_write_copy(cq_model *m, cq_stream *s, cq_param *p) {
    const void *x;
    int64_t rows = p->shape.dim[0], cols = p->shape.dim[1];
    cq_fq fq = {.amax = p->amax_at.data, .n_groups = 1, .saturated = m->env.saturated.data};
    float top = cq_param_top(p);
    bool half = p->fq.dtype == CQ_BF16;
    void *y = half ? m->env.opened.data : p->fq.data;
    CQ_TRY(cq_model_master_now(m, s, p, &x));
    if (p->codes.data)
        return CQ_RUN(s, pack, .dtype = m->env.dtype, .rows = rows, .cols = cols, .x = x, .fq = fq,
                      .block_amax = p->block_amax.data, .top = top, .codes = p->codes.data,
                      .scales = p->scales.data);
    CQ_TRY(CQ_RUN(s, fake_quant, .dtype = m->env.dtype, .rows = rows, .cols = cols, .x = x, .y = y,
                  .fq = fq, .block_amax = p->block_amax.data, .top = top));
    return half ? CQ_RUN(s, round_bf16, .dtype = m->env.dtype, .n = rows * cols, .x = y,
                         .y = p->fq.data)
                : CQ_OK;
}

static int decoded(float *y, const cq_param *p) {
    cq_tensor codes, scales = {0};
    void *owned[2] = {NULL};
    float scale_2;
    int64_t rows = p->shape.dim[0], cols = p->shape.dim[1];
    int status = cq_nvfp4_scale_2(&scale_2, p->amax, cq_param_top(p));
    if (!status)
        status = cq_tensor_on_host(&codes, &owned[0], p->codes);
    if (!status)
        status = cq_tensor_on_host(&scales, &owned[1], p->scales);
    if (!status)
        status = cq_nvfp4_unpack(y, codes.data, scales.data, scale_2, rows, cols);
    free(owned[0]);
    free(owned[1]);
    return status ? cq_fail_in(status, p->name) : CQ_OK;
}

int cq_param_copy(cq_tensor *out, void **owned, const cq_param *p) {
    *owned = NULL;
    if (p->holder >= 0 && !p->value.data)
        return cq_fail(CQ_EUSAGE, "%s: is on rank %d, wanted an expert of this rank", p->name,
                       p->holder);
    bool half = p->fq.dtype == CQ_BF16;
    if (!p->codes.data && !half)
        return cq_tensor_on_host(out, owned, p->fq);
    cq_tensor narrow;
    void *from = NULL;
    int64_t n = cq_shape_elems(p->shape);
    *out = (cq_tensor){NULL, p->shape, CQ_F32};
    if (!(*owned = out->data = malloc((size_t)n * sizeof(float) + 1)))
        return cq_fail(CQ_ENOMEM, "model: no memory for the F32 form of %s", p->name);
    int status = half ? cq_tensor_on_host(&narrow, &from, p->fq) : decoded(out->data, p);
    if (half && !status)
        status = cq_convert(out->data, CQ_F32, narrow.data, CQ_BF16, n);
    free(from);
    if (status) {
        free(*owned);
        *owned = out->data = NULL;
    }
    return status;
}
