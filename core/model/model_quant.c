/// model_quant.c - the 4-bit student: calibration, shared scales, and the fake-quantized weights.
///
/// Maxima are frozen after calibration. Weights that servers fuse (q/k/v, gate/up) share them from
/// the start, because an exporter would otherwise take their maximum and change the bits that were
/// trained.
#include "core/base/error.h"
#include "core/model/model_impl.h"
#include "core/tensor/device.h"
#include "core/tensor/graph.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

int cq_model_quantize(cq_model **student, cq_model *teacher, const cq_quant_options *o) {
    *student = NULL;
    CQ_TRY(cq_quant_check(o));
    if (teacher->nvfp4)
        return cq_fail(CQ_EUSAGE, "model: %s is quantized already, wanted a BF16 checkpoint",
                       teacher->dir);
    cq_model *m = calloc(1, sizeof *m);
    if (!m || !(m->dir = strdup(teacher->dir))) {
        free(m);
        return cq_fail(CQ_ENOMEM, "model: no memory for a student");
    }
    m->config = teacher->config;
    m->env.dtype = teacher->env.dtype;
    m->teacher = teacher;
    m->weights_only = o->weights_only;
    m->scales = o->scales;
    m->copies = o->copies;
    m->compute = teacher->compute;
    m->fp4 = teacher->fp4;
    int status = cq_model_build(m, o);
    if (status) {
        cq_model_close(m);
        return status;
    }
    for (int64_t i = 0; i < m->n_params; i++) {
        m->param[i]->disk = teacher->param[i]->disk;
        m->param[i]->top = m->scales == CQ_SCALE_FOUR_OVER_SIX ? 256.0f : 448.0f;
    }
    *student = m;
    return CQ_OK;
}

int cq_param_master(cq_tensor *out, void **owned, const cq_param *p) {
    cq_tensor low = {0};
    void *halves = NULL, *narrow = NULL;
    *owned = NULL;
    if (p->holder >= 0 && !p->value.data)
        return cq_fail(CQ_EUSAGE, "%s: is on rank %d, wanted an expert of this rank", p->name,
                       p->holder);
    if (p->value.dtype != CQ_BF16)
        return cq_tensor_on_host(out, owned, p->value);
    int64_t n = cq_tensor_elems(p->value);
    *owned = NULL;
    CQ_TRY(cq_tensor_on_host(out, &narrow, p->value));
    int status = p->low.data ? cq_tensor_on_host(&low, &halves, p->low) : CQ_OK;
    if (!status && !(*owned = malloc((size_t)n * sizeof(float))))
        status = cq_fail(CQ_ENOMEM, "model: no memory for the F32 form of %s", p->name);
    cq_widen_args a = {.dtype = CQ_F32, .n = n, .x = out->data, .low = low.data, .y = *owned};
    if (!status)
        status = cq_ref_widen(NULL, &a);
    free(narrow);
    free(halves);
    *out = (cq_tensor){*owned, p->shape, CQ_F32};
    return status;
}

int cq_model_master_now(cq_model *m, cq_stream *s, const cq_param *p, const void **out) {
    if (p->value.dtype != CQ_BF16) {
        *out = p->value.data;
        return CQ_OK;
    }
    void *wide = p->fq.data && p->fq.dtype != CQ_BF16 ? p->fq.data : m->env.opened.data;
    *out = wide;
    return CQ_RUN(s, widen, .dtype = m->env.dtype, .n = cq_tensor_elems(p->value),
                  .x = p->value.data, .low = p->low.data, .y = wide);
}

int cq_model_widen(cq_model *m, cq_stream *s) {
    const void *now;
    for (int64_t i = 0; i < m->n_params && !m->widened; i++)
        if (m->param[i]->value.dtype == CQ_BF16 && m->param[i]->fq.dtype != CQ_BF16 &&
            m->param[i]->fq.data)
            CQ_TRY(cq_model_master_now(m, s, m->param[i], &now));
    m->widened = true;
    return CQ_OK;
}

int cq_model_calibrate_begin(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->quantized)
            CQ_TRY(cq_zero(m->linear[i]->amax.data, cq_tensor_bytes(m->linear[i]->amax)));
    m->env.calibrating = true;
    m->widened = false;
    return CQ_OK;
}

int64_t cq_model_fill_unreached(cq_linear *w) {
    float largest = 0;
    int64_t n = 0;
    for (int64_t e = 0; e < w->groups; e++)
        largest = w->amax_x[e] > largest ? w->amax_x[e] : largest;
    for (int64_t e = 0; e < w->groups; e++)
        if (!(w->amax_x[e] > 0)) {
            w->amax_x[e] = largest > 0 ? largest : 1.0f;
            n++;
        }
    return n;
}

static int weight_amax(cq_model *m, cq_stream *s) {
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        if (!p->quantized || !p->value.data)
            continue;
        const void *x;
        CQ_TRY(cq_model_master_now(m, s, p, &x));
        CQ_TRY(cq_zero(p->amax_at.data, sizeof p->amax));
        CQ_TRY(CQ_RUN(s, amax, .dtype = m->env.dtype, .rows = p->shape.dim[0],
                      .cols = p->shape.dim[1], .x = x, .n_groups = 1, .amax = p->amax_at.data));
        CQ_TRY(cq_copy(&p->amax, p->amax_at.data, sizeof p->amax));
        if (!isfinite(p->amax))
            return cq_fail(CQ_ENUMERIC, "calibration: %s holds a value that is not finite",
                           p->name);
    }
    return CQ_OK;
}

void cq_model_unite(cq_model *m, int32_t block) {
    for (int64_t i = 0; i < m->n_params; i++)
        for (int64_t k = 0; k < m->n_params && m->param[i]->fuse; k++) {
            cq_param *p = m->param[i], *q = m->param[k];
            if (q->fuse != p->fuse || (block >= 0 && p->block != block))
                continue;
            p->amax = q->amax > p->amax ? q->amax : p->amax;
            if (p->amax_x && q->amax_x && *q->amax_x > *p->amax_x)
                *p->amax_x = *q->amax_x;
        }
}

static int search_param(cq_param *p, cq_scale_method scales) {
    int64_t n = cq_tensor_elems(p->value), blocks = cq_tensor_bytes(p->block_amax);
    cq_tensor x;
    void *owned;
    float *copy = malloc((size_t)n * sizeof *copy), *found = malloc((size_t)blocks);
    int status = copy && found ? cq_param_master(&x, &owned, p)
                               : cq_fail(CQ_ENOMEM, "calibration: no memory to search %s", p->name);
    if (!status) {
        status = cq_convert(copy, CQ_F32, x.data, x.dtype, n);
        free(owned);
    }
    if (!status)
        status = cq_nvfp4_search(found, copy, p->shape.dim[0], p->shape.dim[1], p->amax, scales);
    if (!status)
        status = cq_copy(p->block_amax.data, found, blocks);
    free(copy);
    free(found);
    return status;
}

static int search(cq_model *m) {
    for (int64_t i = 0; i < m->n_params && m->scales != CQ_SCALE_MAX; i++)
        if (m->param[i]->quantized && m->param[i]->value.data)
            CQ_TRY(search_param(m->param[i], m->scales));
    return CQ_OK;
}

int cq_model_send_amax(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->quantized)
            CQ_TRY(cq_copy(m->linear[i]->amax.data, m->linear[i]->amax_x,
                           cq_tensor_bytes(m->linear[i]->amax)));
    for (int64_t i = 0; i < m->n_params; i++)
        if (m->param[i]->quantized && m->param[i]->amax_at.data)
            CQ_TRY(cq_copy(m->param[i]->amax_at.data, &m->param[i]->amax, sizeof(float)));
    return CQ_OK;
}

int cq_model_requantize(cq_model *m, cq_stream *s) {
    cq_graphs_forget(s); /* some arguments follow from the maxima and from which scales are used */
    CQ_TRY(cq_model_send_amax(m));
    for (int64_t i = 0; i < m->n_params && !m->nvfp4; i++) {
        if (m->param[i]->quantized && m->param[i]->value.data) /* else its holder's */
            CQ_TRY(cq_model_write_copy(m, s, m->param[i]));
    }
    return cq_model_round_weights(m, s, false);
}

int cq_model_searched_scales(cq_model *m, cq_stream *s, bool on) {
    if (m->scales == CQ_SCALE_MAX)
        return CQ_OK;
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        cq_tensor *from = on ? &p->aside : &p->block_amax, *to = on ? &p->block_amax : &p->aside;
        if (from->data) {
            *to = *from;
            *from = (cq_tensor){0};
        }
    }
    return cq_model_requantize(m, s);
}

static int round_tensor(cq_stream *s, cq_tensor from, cq_tensor to) {
    return CQ_RUN(s, round_bf16, .dtype = from.dtype, .n = cq_tensor_elems(from), .x = from.data,
                  .y = to.data);
}

int cq_model_round_weights(cq_model *m, cq_stream *s, bool trained_only) {
    for (int64_t i = 0; i < m->n_linears; i++) {
        const cq_linear *w = m->linear[i];
        if (w->fq16.data && !cq_linear_only_16(w) && (w->grad.data || !trained_only))
            CQ_TRY(round_tensor(s, w->fq, w->fq16));
    }
    const cq_param *head = m->head;
    return head->fq16.data && head->fq16.data != head->fq.data && (head->grad.data || !trained_only)
               ? round_tensor(s, head->fq, head->fq16)
               : CQ_OK;
}

int cq_model_calibrate_end(cq_model *m, cq_stream *s, int64_t *unreached) {
    m->env.calibrating = false;
    *unreached = 0;
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->quantized)
            CQ_TRY(cq_copy(m->linear[i]->amax_x, m->linear[i]->amax.data,
                           cq_tensor_bytes(m->linear[i]->amax)));
    CQ_TRY(cq_model_gather_inputs(m));
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->act_quant)
            *unreached += cq_model_fill_unreached(m->linear[i]);
    CQ_TRY(weight_amax(m, s));
    CQ_TRY(cq_model_gather_weights(m));
    cq_model_unite(m, -1);
    CQ_TRY(search(m));
    CQ_TRY(cq_model_requantize(m, s));
    return m->env.saturated.data ? cq_zero(m->env.saturated.data, sizeof(int64_t)) : CQ_OK;
}

int64_t cq_model_saturated(cq_model *m) {
    int64_t n = 0, *at = m->env.saturated.data;
    if (!at || cq_copy(&n, at, sizeof n) || cq_zero(at, sizeof n))
        return 0;
    return n;
}
