/// model.c - opening, checking, planning and loading a model.
///
/// Opening reads config and headers only. Every tensor is checked against the config before any
/// byte is allocated; a missing, extra or misshapen one is named.
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/model/model_impl.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Older and newer names of the same tensors (models.md 2.9). */
const cq_entry *cq_model_entry(const cq_model *m, const char *name) {
    char other[192];
    const cq_entry *e = cq_safetensors_find(m->files, name);
    if (e || strncmp(name, "backbone.", 9))
        return e;
    snprintf(other, sizeof other, "model.%s", name + 9);
    if ((e = cq_safetensors_find(m->files, other)))
        return e;
    return strcmp(name, "backbone.embeddings.weight")
               ? NULL
               : cq_safetensors_find(m->files, "backbone.embedding.weight");
}

static int check_shape(const cq_model *m, const cq_entry *e, const cq_shape *want,
                       const char *what) {
    char found[96], wanted[96];
    if (cq_shape_equal(e->tensor.shape, *want))
        return CQ_OK;
    return cq_fail(CQ_EDATA, "%s: %s has shape %s, wanted %s %s", cq_safetensors_path(m->files, e),
                   e->name, cq_shape_text(found, sizeof found, e->tensor.shape),
                   cq_shape_text(wanted, sizeof wanted, *want), what);
}

static int check_dtype(const cq_model *m, const cq_entry *e, cq_dtype want) {
    if (e->tensor.dtype == want)
        return CQ_OK;
    return cq_fail(CQ_EDATA, "%s: %s is %s, wanted %s", cq_safetensors_path(m->files, e), e->name,
                   cq_dtype_name(e->tensor.dtype), cq_dtype_name(want));
}

static const cq_entry *suffixed(const cq_model *m, const cq_param *p, const char *suffix) {
    char name[160];
    cq_module_name(name, p->name, suffix);
    return cq_model_entry(m, name);
}

/* The four tensors of one NVFP4 matrix. */
static int check_nvfp4(cq_model *m, cq_param *p, const cq_entry *e, int64_t *used) {
    int64_t n = p->shape.dim[0], k = p->shape.dim[1];
    cq_shape packed = CQ_SHAPE2(n, k / 2), scales = CQ_SHAPE2(n, k / 16);
    CQ_TRY(check_dtype(m, e, CQ_U8));
    CQ_TRY(check_shape(m, e, &packed, "(two codes a byte)"));
    const cq_entry *s = suffixed(m, p, ".weight_scale"), *g = suffixed(m, p, ".weight_scale_2");
    const cq_entry *x = suffixed(m, p, ".input_scale");
    if (!g)
        return cq_fail(CQ_EDATA, "%s: %s has no weight_scale_2 beside it",
                       cq_safetensors_path(m->files, e), p->name);
    CQ_TRY(check_dtype(m, s, CQ_F8_E4M3));
    CQ_TRY(check_shape(m, s, &scales, "(one scale for 16 columns)"));
    CQ_TRY(check_dtype(m, g, CQ_F32));
    if (x)
        CQ_TRY(check_dtype(m, x, CQ_F32));
    if (cq_tensor_elems(g->tensor) != 1 || (x && cq_tensor_elems(x->tensor) != 1))
        return cq_fail(CQ_EDATA,
                       "%s: the tensor scales of %s have more than one element, wanted one",
                       cq_safetensors_path(m->files, e), p->name);
    *used += x ? 3 : 2;
    return CQ_OK;
}

static int check_param(cq_model *m, cq_param *p, int64_t *used) {
    const cq_entry *e = cq_model_entry(m, p->name);
    if (!e)
        return cq_fail(CQ_EDATA, "%s: tensor %s is missing, the config wants it", m->dir, p->name);
    ++*used;
    if (m->nvfp4 && p->quantized)
        return check_nvfp4(m, p, e, used);
    cq_dtype t = e->tensor.dtype;
    if (t != CQ_BF16 && t != CQ_F32 && t != CQ_F16)
        return cq_fail(CQ_EDATA, "%s: %s is %s, wanted BF16, F32 or F16",
                       cq_safetensors_path(m->files, e), e->name, cq_dtype_name(t));
    p->disk = t;
    return check_shape(m, e, &p->shape, "from config.json");
}

/* A tied checkpoint may carry the head once more; then it must be the same bytes. */
static int check_tied_head(const cq_model *m, int64_t *used) {
    const cq_entry *h = cq_safetensors_find(m->files, "lm_head.weight");
    if (!m->config.tied || !h)
        return CQ_OK;
    const cq_entry *e = cq_model_entry(m, m->embed->name);
    ++*used;
    if (h->tensor.dtype == e->tensor.dtype &&
        cq_tensor_bytes(h->tensor) == cq_tensor_bytes(e->tensor) &&
        !memcmp(h->tensor.data, e->tensor.data, (size_t)cq_tensor_bytes(e->tensor)))
        return CQ_OK;
    return cq_fail(CQ_EDATA, "%s: lm_head.weight differs from %s, wanted equal ones (tied)",
                   cq_safetensors_path(m->files, h), m->embed->name);
}

static bool is_kv_scale(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot && (!strcmp(dot, ".k_scale") || !strcmp(dot, ".v_scale"));
}

static bool known_name(const cq_model *m, const char *name) {
    char buffer[192];
    const char *suffixes[] = {"", ".weight_scale", ".weight_scale_2", ".input_scale"};
    for (int64_t i = 0; i < m->n_params; i++)
        for (int k = 0; k < (m->param[i]->quantized && m->nvfp4 ? 4 : 1); k++) {
            const cq_entry *e;
            if (k)
                cq_module_name(buffer, m->param[i]->name, suffixes[k]);
            e = cq_model_entry(m, k ? buffer : m->param[i]->name);
            if (e && !strcmp(e->name, name))
                return true;
        }
    return m->config.tied && !strcmp(name, "lm_head.weight");
}

static int check_files(cq_model *m) {
    int64_t used = 0;
    for (int64_t i = 0; i < m->n_params; i++)
        CQ_TRY(check_param(m, m->param[i], &used));
    CQ_TRY(check_tied_head(m, &used));
    int64_t n = cq_safetensors_count(m->files);
    for (int64_t i = 0; i < n; i++)
        used += is_kv_scale(cq_safetensors_at(m->files, i)->name);
    for (int64_t i = 0; i < n && used != n; i++) {
        const cq_entry *e = cq_safetensors_at(m->files, i);
        if (!is_kv_scale(e->name) && !known_name(m, e->name))
            return cq_fail(CQ_EDATA, "%s: tensor %s is not one that the config wants",
                           cq_safetensors_path(m->files, e), e->name);
    }
    return CQ_OK;
}

static bool has_nvfp4(const cq_safetensors *files) {
    for (int64_t i = 0; i < cq_safetensors_count(files); i++) {
        const char *name = cq_safetensors_at(files, i)->name, *dot = strrchr(name, '.');
        if (dot && !strcmp(dot, ".weight_scale_2"))
            return true;
    }
    return false;
}

static int new_model(cq_model **out, const char *dir, cq_dtype dtype) {
    if (dtype != CQ_F32 && dtype != CQ_F64)
        return cq_fail(CQ_EUSAGE, "model: compute dtype is %s, wanted F32 or F64",
                       cq_dtype_name(dtype));
    cq_model *m = calloc(1, sizeof *m);
    if (!m || !(m->dir = strdup(dir))) {
        free(m);
        return cq_fail(CQ_ENOMEM, "model: no memory to open %s", dir);
    }
    m->env.dtype = dtype;
    *out = m;
    return CQ_OK;
}

int cq_model_open(cq_model **out, const char *dir, cq_dtype dtype) {
    cq_model *m = NULL;
    *out = NULL;
    CQ_TRY(new_model(&m, dir, dtype));
    int status = cq_config_load(&m->config, dir);
    if (!status)
        status = cq_safetensors_open(&m->files, dir);
    if (!status) {
        m->nvfp4 = has_nvfp4(m->files);
        status = cq_model_build(m, NULL);
    }
    if (!status)
        status = check_files(m);
    if (status) {
        cq_model_close(m);
        return status;
    }
    *out = m;
    return CQ_OK;
}

int cq_model_create(cq_model **out, const char *dir, cq_dtype dtype) {
    cq_model *m = NULL;
    *out = NULL;
    CQ_TRY(new_model(&m, dir, dtype));
    int status = cq_config_load(&m->config, dir);
    if (!status)
        status = cq_model_build(m, NULL);
    if (status) {
        cq_model_close(m);
        return status;
    }
    *out = m;
    return CQ_OK;
}

void cq_model_close(cq_model *m) {
    if (!m)
        return;
    for (int64_t i = 0; i < m->n_linears; i++) {
        free(m->linear[i]->part);
        free(m->linear[i]->amax_x);
        free(m->linear[i]);
    }
    for (int64_t i = 0; i < m->n_params; i++)
        free(m->param[i]);
    cq_safetensors_close(m->files);
    cq_expert_ranks_close(m->env.experts);
    free(m->linear);
    free(m->param);
    free(m->layer);
    free(m->first_layer);
    free(m->h);
    free(m->dir);
    free(m);
}

const cq_config *cq_model_config(const cq_model *m) { return &m->config; }
const char *cq_model_dir(const cq_model *m) { return m->dir; }
int64_t cq_model_n_params(const cq_model *m) { return m->n_params; }
cq_param *cq_model_param(cq_model *m, int64_t i) {
    return i >= 0 && i < m->n_params ? m->param[i] : NULL;
}
cq_param *cq_model_find(cq_model *m, const char *name) {
    for (int64_t i = 0; i < m->n_params; i++)
        if (!strcmp(m->param[i]->name, name))
            return m->param[i];
    return NULL;
}
bool cq_model_is_nvfp4(const cq_model *m) { return m->nvfp4; }
int64_t *cq_model_saturation(cq_model *m) { return m->env.saturated.data; }
void cq_model_input_only(cq_model *m, bool on) { m->env.input_only = on; }
cq_dtype cq_model_dtype(const cq_model *m) { return m->env.dtype; }
cq_param *cq_model_head(cq_model *m) { return m->head; }
void cq_model_set_master(cq_model *m, cq_master master) { m->master = master; }
void cq_model_set_offload(cq_model *m, cq_offload offload) { m->offload = offload; }
cq_purpose cq_model_moments_purpose(const cq_model *m, const cq_plan *p) {
    bool host = (m->offload & CQ_OFFLOAD_OPTIMIZER) && cq_plan_on_device(p);
    return host ? CQ_FOR_HOST_OPTIMIZER : CQ_FOR_MOMENTS;
}
void cq_model_set_copies(cq_model *m, cq_copies copies) { m->copies = copies; }
void cq_model_set_fp4(cq_model *m, bool on) { m->fp4 = on; }
void cq_model_set_compute(cq_model *m, cq_compute compute) { m->compute = compute; }
void cq_model_set_activations(cq_model *m, cq_dtype act) { m->env.act = act; }

int64_t cq_model_lr_scale(cq_model *m, const char *globs, double factor) {
    int64_t n = 0;
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        if (p->buffer || !cq_glob_match(globs, p->name))
            continue;
        p->lr_scale = factor;
        p->trainable = factor > 0;
        n++;
    }
    return n ? n : cq_fail(CQ_EUSAGE, "learning rates: no parameter matches %s", globs);
}

/* Frozen parameters lie in the teacher's memory, where it has some. */
static bool shares(const cq_model *m) { return m->teacher && !m->alone; }

int cq_model_alone(cq_model *m) {
    if (m->teacher && !m->teacher->files)
        return cq_fail(CQ_EUSAGE,
                       "model: %s was created without weights, wanted a checkpoint to load from",
                       m->dir);
    m->alone = true;
    return CQ_OK;
}

/* Blocks of a streamed teacher lie on the host: a student multiplies with its own memory there. */
static bool shares_block(const cq_model *m, int32_t block) {
    return shares(m) && !(m->teacher->streamed && block >= 0);
}

/* A stack whose parts are all frozen lives in the teacher's memory; of a streamed one that is
 * enough where copies are what is multiplied with. */
static bool stack_shared(const cq_model *m, const cq_linear *w) {
    bool trainable = false;
    for (int64_t i = 0; i < w->n_parts; i++)
        trainable = trainable || w->part[i]->trainable;
    return !trainable && (w->quantized ? shares(m) : shares_block(m, w->part[0]->block));
}

/* The same of a parameter that is in no stack. */
static bool param_shared(const cq_model *m, const cq_param *q) {
    return !q->trainable && shares_block(m, q->block);
}

static bool stack_trained(const cq_model *m, const cq_linear *w) {
    bool trainable = false;
    for (int64_t i = 0; i < w->n_parts; i++)
        trainable = trainable || w->part[i]->trainable;
    return m->trained && trainable;
}

/* Only a trained linear that multiplies with a copy may have narrow master weights. */
static bool stack_narrow(const cq_model *m, const cq_linear *w) {
    return m->master != CQ_MASTER_F32 && w->quantized && m->teacher && stack_trained(m, w);
}

/* Whether products read BF16 copies of the weights. */
static bool wants_16(const cq_model *m, const cq_plan *p) {
    return m->compute == CQ_COMPUTE_BF16 && cq_plan_on_device(p);
}

/* A model that only runs forward keeps linears of a BF16 checkpoint as such where products read
 * BF16: nothing else reads them. Products on a device want rows on 16 bytes for that. */
static bool stack_only_16(const cq_model *m, const cq_plan *p, const cq_linear *w) {
    bool only = wants_16(m, p) && !m->teacher && !m->trained && !m->nvfp4;
    for (int64_t i = 0; i < w->n_parts; i++)
        only = only && w->part[i]->disk == CQ_BF16;
    return only && w->k % 8 == 0 && w->n % 8 == 0;
}

/* The same of a head with a matrix of its own. */
static bool head_only_16(const cq_model *m, const cq_plan *p) {
    const cq_shape *shape = &m->head->shape;
    return wants_16(m, p) && !m->teacher && !m->trained && !m->nvfp4 && m->head != m->embed &&
           m->head->disk == CQ_BF16 && shape->dim[0] % 8 == 0 && shape->dim[1] % 8 == 0;
}

static bool part_here(const cq_linear *w, int64_t i) {
    return w->held == w->groups || (i >= w->first && i < w->first + w->held);
}

static int plan_linear(cq_model *m, cq_plan *p, cq_linear *w, cq_purpose weights) {
    cq_dtype t = m->env.dtype;
    cq_shape shape = CQ_SHAPE2(w->held * w->n, w->k);
    const char *name = w->part[0]->name;
    bool narrow = stack_narrow(m, w), only_16 = stack_only_16(m, p, w);
    bool apart =
        stack_trained(m, w) && w->quantized && m->teacher; /* only the optimizer reads it */
    cq_purpose master = apart && cq_model_moments_purpose(m, p) == CQ_FOR_HOST_OPTIMIZER
                            ? CQ_FOR_HOST_OPTIMIZER
                            : weights;
    bool codes_only = w->quantized && m->nvfp4 && m->copies == CQ_COPIES_PACKED;
    w->value = w->fq = w->fq16 = w->low = w->grad = (cq_tensor){0}; /* of an earlier plan */
    w->codes = w->scales = w->amax_w = (cq_tensor){0};
    if (!stack_shared(m, w) && !codes_only)
        CQ_TRY(cq_plan_add(p, &w->value, master, name, narrow || only_16 ? CQ_BF16 : t, shape));
    if (narrow && m->master == CQ_MASTER_SPLIT)
        CQ_TRY(cq_plan_add(p, &w->low, master, name, CQ_U8, CQ_SHAPE2(w->held * w->n, 2 * w->k)));
    w->half = wants_16(m, p) && w->k % 8 == 0 && w->n % 8 == 0;
    if (w->quantized && (!m->nvfp4 || codes_only))
        CQ_TRY(cq_model_plan_copy(m, p, w));
    for (int64_t i = 0; i < w->n_parts && w->quantized && m->scales != CQ_SCALE_MAX; i++)
        if (part_here(w, i))
            CQ_TRY(cq_plan_add(p, &w->part[i]->block_amax, CQ_FOR_FAKEQUANT, name, CQ_F32,
                               CQ_SHAPE2(w->part[i]->shape.dim[0], w->k / 16)));
    bool copy_too = w->quantized && (w->codes.shape.rank || cq_linear_only_16(w));
    if (wants_16(m, p) && !only_16 && !copy_too && (!stack_shared(m, w) || w->quantized))
        CQ_TRY(cq_plan_add(p, &w->fq16, weights, name, CQ_BF16, shape));
    if (w->quantized && (!m->nvfp4 || codes_only))
        CQ_TRY(cq_plan_add(p, &w->amax_w, CQ_FOR_FAKEQUANT, name, CQ_F32, CQ_SHAPE1(w->n_parts)));
    if (w->quantized)
        CQ_TRY(cq_plan_add(p, &w->amax, CQ_FOR_FAKEQUANT, name, CQ_F32, CQ_SHAPE1(w->groups)));
    return stack_trained(m, w) ? cq_plan_add(p, &w->grad, CQ_FOR_GRADIENT, name, t, shape) : CQ_OK;
}

bool cq_param_stacked(const cq_model *m, const cq_param *p) { return p->linear && p != m->head; }

static int plan_param(cq_model *m, cq_plan *p, cq_param *q, cq_purpose weights) {
    bool half = q == m->head && head_only_16(m, p);
    q->fq16 = q->grad = (cq_tensor){0}; /* of an earlier plan */
    cq_dtype t = half ? CQ_BF16 : q->buffer ? CQ_F32 : m->env.dtype;
    if (!param_shared(m, q))
        CQ_TRY(cq_plan_add(p, &q->value, weights, q->name, t, q->shape));
    if (q == m->head && !half && wants_16(m, p) && !param_shared(m, q))
        CQ_TRY(cq_plan_add(p, &q->fq16, weights, q->name, CQ_BF16, q->shape));
    return m->trained && q->trainable
               ? cq_plan_add(p, &q->grad, CQ_FOR_GRADIENT, q->name, m->env.dtype, q->shape)
               : CQ_OK;
}

/* The parameters of a block lie together; -1: embedding, final norm and head. */
static int plan_block(cq_model *m, cq_plan *p, int32_t block, cq_purpose weights) {
    if (m->streamed && block >= 0)
        weights = CQ_FOR_HOST_TEACHER;
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->part[0]->block == block)
            CQ_TRY(plan_linear(m, p, m->linear[i], weights));
    for (int64_t i = 0; i < m->n_params; i++)
        if (m->param[i]->block == block && !cq_param_stacked(m, m->param[i]))
            CQ_TRY(plan_param(m, p, m->param[i], weights));
    return CQ_OK;
}

int cq_model_plan_params(cq_model *m, cq_plan *p, bool trained) {
    cq_purpose weights = m->teacher || trained ? CQ_FOR_STUDENT : CQ_FOR_TEACHER;
    if (trained && m->nvfp4)
        return cq_fail(CQ_EUSAGE, "model: %s holds NVFP4 weights, wanted BF16 ones to train",
                       m->dir);
    m->trained = trained;
    m->streamed =
        (m->offload & CQ_OFFLOAD_TEACHER) && cq_plan_on_device(p) && !m->teacher && !trained;
    bool quantized = false;
    for (int64_t i = 0; i < m->n_linears; i++)
        quantized = quantized || m->linear[i]->quantized;
    if (quantized)
        CQ_TRY(cq_plan_add(p, &m->env.saturated, CQ_FOR_FAKEQUANT, "saturated blocks", CQ_I64,
                           CQ_SHAPE1(1)));
    for (int32_t block = -1; block < m->config.n_blocks; block++)
        CQ_TRY(plan_block(m, p, block, weights));
    return m->streamed ? cq_model_plan_windows(m, p) : CQ_OK;
}

/* Rows of part i, which begins at `row` of the groups that are here; no data for another. */
static cq_tensor part_of(const cq_linear *w, cq_tensor here, int64_t i, int64_t row) {
    int64_t n = w->part[i]->shape.dim[0];
    return here.data && part_here(w, i)
               ? cq_tensor_rows(here, row, n)
               : (cq_tensor){NULL, CQ_SHAPE2(n, here.shape.dim[1]), here.dtype};
}

int cq_model_bind(cq_model *m) {
    m->in_window[0].block = m->in_window[1].block = -1;
    for (int64_t i = 0; i < m->n_linears; i++) {
        cq_linear *w = m->linear[i];
        cq_shape shape = CQ_SHAPE2(w->held * w->n, w->k);
        if (stack_shared(m, w)) {
            cq_tensor first = cq_model_find(m->teacher, w->part[w->first]->name)->value;
            w->value = (cq_tensor){first.data, shape, first.dtype};
        }
        if (!w->fq.data && !w->codes.data)
            w->fq = w->value;
        if (cq_linear_only_16(w))
            w->fq16 = w->fq;
        if (!w->fq16.data && !w->codes.data &&
            stack_shared(m, w)) /* no data in the teacher: none here */
            w->fq16 = (cq_tensor){cq_model_find(m->teacher, w->part[w->first]->name)->fq16.data,
                                  shape, CQ_BF16};
        int64_t row = -w->first * w->n;
        for (int64_t k = 0; k < w->n_parts; row += w->part[k++]->shape.dim[0]) {
            cq_param *p = w->part[k];
            p->value = part_of(w, w->value, k, row);
            p->fq = part_of(w, w->fq, k, row);
            p->codes = part_of(w, w->codes, k, row);
            p->scales = part_of(w, w->scales, k, row);
            if (w->amax_w.data)
                p->amax_at = cq_tensor_rows(w->amax_w, k, 1);
            p->low = part_of(w, w->low, k, row);
            p->fq16 = part_of(w, w->fq16, k, row);
            p->grad = p->trainable ? part_of(w, w->grad, k, row) : (cq_tensor){0};
        }
    }
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        if (cq_param_stacked(m, p))
            continue;
        if (param_shared(m, p)) {
            const cq_param *shared = cq_model_find(m->teacher, p->name);
            p->value = shared->value;
            p->fq16 = shared->fq16;
        }
        p->fq = p->value;
        if (p->fq.dtype == CQ_BF16)
            p->fq16 = p->fq;
    }
    if (m->n_params && !m->param[0]->value.data)
        return cq_fail(CQ_EUSAGE, "model: %s is used before its plan is committed", m->dir);
    return CQ_OK;
}
