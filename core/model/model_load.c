/// model_load.c - weights into planned memory: from a checkpoint, from a teacher, or random.
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/model/model_impl.h"
#include "core/quant/scales.h"
#include "core/tensor/device.h"
#include "kernels/formats.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

int cq_model_check_finite(const cq_model *m, const cq_param *p, cq_tensor t) {
    int64_t n = cq_tensor_elems(t);
    for (int64_t i = 0; i < n; i++) {
        double v = t.dtype == CQ_F64   ? ((const double *)t.data)[i]
                   : t.dtype == CQ_F32 ? (double)((const float *)t.data)[i]
                                       : (double)cq_bf16_value(((const uint16_t *)t.data)[i]);
        if (!isfinite(v))
            return cq_fail(CQ_ENUMERIC, "%s: %s holds %s at element %ld, wanted finite weights",
                           m->dir, p->name, isnan(v) ? "NaN" : "Inf", (long)i);
    }
    return CQ_OK;
}

/* The maximum whose division by 2688 gives `scale` again, so that activations quantize as the
 * exporter's did. */
static float amax_of_scale(float scale) {
    float amax = scale * 2688.0f, low = amax, high = amax;
    for (int i = 0; i < 4; i++) {
        if (low / 2688.0f == scale)
            return low;
        if (high / 2688.0f == scale)
            return high;
        low = nextafterf(low, 0.0f);
        high = nextafterf(high, INFINITY);
    }
    return amax;
}

static int load_input_scale(cq_model *m, cq_param *p) {
    char name[160];
    float scale;
    cq_module_name(name, p->name, ".input_scale");
    const cq_entry *x = cq_model_entry(m, name);
    if (!x)
        return CQ_OK;
    memcpy(&scale, x->tensor.data, sizeof scale);
    if (!(scale > 0) || !isfinite(scale))
        return cq_fail(CQ_EDATA, "%s: %s is %g, wanted a positive number",
                       cq_safetensors_path(m->files, x), x->name, (double)scale);
    *p->amax_x = amax_of_scale(scale);
    return CQ_OK;
}

/* The block scales of a packed weight, and the one of its tensor. */
static const cq_entry *scales_of(float *scale_2, const cq_model *m, const cq_param *p) {
    char name[160];
    cq_module_name(name, p->name, ".weight_scale_2");
    memcpy(scale_2, cq_model_entry(m, name)->tensor.data, sizeof *scale_2);
    cq_module_name(name, p->name, ".weight_scale");
    return cq_model_entry(m, name);
}

static int load_nvfp4(cq_model *m, cq_param *p, cq_tensor to, const cq_entry *e) {
    int64_t n = p->shape.dim[0], k = p->shape.dim[1];
    float scale_2, *y = to.data;
    const cq_entry *s = scales_of(&scale_2, m, p);
    CQ_TRY(load_input_scale(m, p));
    if (m->env.dtype == CQ_F64 && !(y = malloc((size_t)(n * k) * sizeof *y)))
        return cq_fail(CQ_ENOMEM, "model: no memory to unpack %s", p->name);
    int status = cq_nvfp4_unpack(y, e->tensor.data, s->tensor.data, scale_2, n, k);
    if (m->env.dtype == CQ_F64) {
        if (!status)
            status = cq_convert(to.data, CQ_F64, y, CQ_F32, n * k);
        free(y);
    }
    cq_safetensors_drop(m->files, s);
    return status;
}

/* Codes and scales as they are in the file, which is refused for what would be no finite weight. */
static int load_codes(cq_model *m, cq_param *p, const cq_entry *e) {
    float scale_2;
    const cq_entry *s = scales_of(&scale_2, m, p);
    const uint8_t *scale = s->tensor.data;
    if (!(scale_2 >= 0) || !isfinite(scale_2))
        return cq_fail(CQ_EDATA, "%s: %s_2 is %g, wanted a finite number of 0 or more",
                       cq_safetensors_path(m->files, s), s->name, (double)scale_2);
    for (int64_t i = 0; i < cq_tensor_elems(s->tensor); i++)
        if ((scale[i] & 0x7f) == 0x7f)
            return cq_fail(CQ_ENUMERIC, "%s: %s holds NaN at element %ld, wanted finite scales",
                           cq_safetensors_path(m->files, s), s->name, (long)i);
    p->amax = amax_of_scale(scale_2);
    CQ_TRY(load_input_scale(m, p));
    int status = cq_copy(p->codes.data, e->tensor.data, cq_tensor_bytes(p->codes));
    if (!status)
        status = cq_copy(p->scales.data, s->tensor.data, cq_tensor_bytes(p->scales));
    cq_safetensors_drop(m->files, e);
    cq_safetensors_drop(m->files, s);
    return status;
}

/* Host memory that a value is made in: its own, or a piece that goes to the device afterwards. */
static int stage(cq_tensor *to, void **owned, const cq_param *p) {
    int64_t bytes = cq_tensor_bytes(p->value);
    *to = p->value;
    *owned = NULL;
    if (!cq_on_device(p->value.data))
        return CQ_OK;
    if (!(*owned = malloc((size_t)(bytes > 0 ? bytes : 1))))
        return cq_fail(CQ_ENOMEM, "model: no memory for %s on its way to the device", p->name);
    to->data = *owned;
    return CQ_OK;
}

/* The same, wide enough to compute in. */
static int stage_f32(cq_tensor *to, void **owned, const cq_param *p) {
    if (p->value.dtype != CQ_BF16)
        return stage(to, owned, p);
    *to = (cq_tensor){NULL, p->shape, CQ_F32};
    *owned = to->data = malloc((size_t)cq_tensor_bytes(*to) + 1);
    return *owned ? CQ_OK : cq_fail(CQ_ENOMEM, "model: no memory for the F32 form of %s", p->name);
}

static int unstage(cq_param *p, cq_tensor made, void *owned, int status) {
    if (owned && !status)
        status = cq_copy(p->value.data, made.data, cq_tensor_bytes(made));
    free(owned);
    return status;
}

/* A narrow master weight from the teacher's. */
static int load_narrow(cq_param *p, const cq_param *from) {
    int64_t n = cq_tensor_elems(p->value);
    cq_tensor x;
    void *owned;
    uint16_t *half = malloc((size_t)n * sizeof *half);
    if (!half)
        return cq_fail(CQ_ENOMEM, "model: no memory for %s on its way", p->name);
    int status = cq_param_master(&x, &owned, from);
    const float *w = x.data;
    if (!status && !p->low.data)
        status = cq_tensor_fill(p->value, w, CQ_F32);
    if (!status && p->low.data) {
        for (int64_t i = 0; i < n; i++)
            half[i] = cq_split_high(w[i]);
        status = cq_copy(p->value.data, half, cq_tensor_bytes(p->value));
        for (int64_t i = 0; i < n; i++)
            half[i] = cq_split_low(w[i]);
        status = status ? status : cq_copy(p->low.data, half, cq_tensor_bytes(p->low));
    }
    free(owned);
    free(half);
    return status;
}

/* A master weight from the teacher's where the model's kernels run. */
static int load_copy(cq_param *p, const cq_param *from) {
    if (from->value.data == p->value.data)
        return CQ_OK;
    if (p->value.dtype == CQ_BF16)
        return load_narrow(p, from);
    if (from->value.dtype == p->value.dtype)
        return cq_copy(p->value.data, from->value.data, cq_tensor_bytes(p->value));
    cq_tensor x;
    void *owned;
    CQ_TRY(cq_param_master(&x, &owned, from));
    int status = cq_tensor_fill(p->value, x.data, x.dtype);
    free(owned);
    return status;
}

static int load_param(cq_model *m, cq_param *p) {
    cq_model *source = m->alone ? m->teacher : m;
    if (m->teacher && !m->alone) {
        const cq_param *from = cq_model_find(m->teacher, p->name);
        p->disk = from->disk;
        return load_copy(p, from);
    }
    if (m->nvfp4 && p->codes.data)
        return load_codes(m, p, cq_model_entry(m, p->name));
    if (!p->value.data) /* another rank's expert; its input is quantized here */
        return m->nvfp4 && p->quantized ? load_input_scale(m, p) : CQ_OK;
    const cq_entry *e = cq_model_entry(source, p->name);
    cq_tensor to;
    void *owned;
    CQ_TRY(stage(&to, &owned, p));
    int status = m->nvfp4 && p->quantized ? load_nvfp4(m, p, to, e)
                                          : cq_convert(to.data, to.dtype, e->tensor.data,
                                                       e->tensor.dtype, cq_tensor_elems(to));
    cq_safetensors_drop(source->files, e);
    if (!status)
        status = cq_model_check_finite(m, p, to);
    return unstage(p, to, owned, status);
}

int cq_model_load(cq_model *m) {
    if (!m->files && !m->teacher)
        return cq_fail(CQ_EUSAGE, "model: %s was created without weights, wanted init", m->dir);
    CQ_TRY(cq_model_bind(m));
    for (int64_t i = 0; i < m->n_params; i++)
        CQ_TRY(load_param(m, m->param[i]));
    return cq_model_send_amax(m);
}

static void put(cq_tensor t, int64_t i, double v) {
    if (t.dtype == CQ_F64)
        ((double *)t.data)[i] = v;
    else
        ((float *)t.data)[i] = (float)v;
}

/* Mamba-2's own initial values (models.md 2.10). */
static double mamba_value(const char *kind, int64_t i, uint64_t seed, uint64_t stream) {
    if (!strcmp(kind, "A_log"))
        return log((double)(i + 1));
    if (!strcmp(kind, "dt_bias")) {
        double dt = exp(log(1e-3) + cq_random_uniform(seed, stream, (uint64_t)i) * log(100.0));
        if (dt < 1e-4)
            dt = 1e-4;
        return dt + log(-expm1(-dt));
    }
    return 1.0; /* D and every norm */
}

int cq_model_init(cq_model *m, uint64_t seed) {
    double std = m->config.initializer_range > 0 ? m->config.initializer_range : 0.02;
    CQ_TRY(cq_model_bind(m));
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        int64_t n = cq_tensor_elems(p->value);
        const char *kind = strrchr(p->name, '.') + 1;
        bool bias = !strcmp(kind, "bias") || p->buffer;
        uint64_t stream = (uint64_t)i;
        double scale = std;
        if (strstr(p->name,
                   "conv1d.weight")) /* fan-in of the short window, as torch's Conv1d has it */
            scale = 1 / sqrt(3.0 * (double)m->config.conv_width);
        cq_tensor to;
        void *owned;
        if (m->teacher)
            return cq_fail(CQ_EUSAGE, "model: %s is a student, wanted load", m->dir);
        if (!p->value.data)
            continue;
        CQ_TRY(stage_f32(&to, &owned, p));
#pragma omp parallel for schedule(static) if (n > 1 << 16)
        for (int64_t k = 0; k < n; k++)
            put(to, k,
                bias                ? 0
                : p->shape.rank > 1 ? scale * cq_random_normal(seed, stream, (uint64_t)k)
                                    : mamba_value(kind, k, seed, stream));
        int status = owned ? cq_tensor_fill(p->value, to.data, to.dtype) : CQ_OK;
        free(owned);
        CQ_TRY(status);
    }
    return CQ_OK;
}
