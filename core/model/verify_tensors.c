/// verify_tensors.c - the tensors of an exported folder against what config.json asks for: rules
/// 1-8 and 14.
///
/// A linear that the exclude list does not match must be there as four tensors (nvfp4.md 5.1),
/// every other parameter as one. Rule 6 has no amax to compare with, so it asks that the maximum
/// that weight_scale_2 implies (2688 times it) is near the largest decoded weight, and is one that
/// a weight can have: a missing factor is off by 6 and more, the inverse that other formats store
/// by millions.
#include "core/base/error.h"
#include "core/model/model_impl.h"
#include "core/model/verify_impl.h"
#include "kernels/nvfp4.h"
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_SCALES = 3, LARGEST_WEIGHT = 65504 };
static const char *const scale_suffix[N_SCALES] = {".weight_scale", ".weight_scale_2",
                                                   ".input_scale"};

/* One linear as found. */
typedef struct matrix {
    const cq_param *param;
    const cq_entry *weight, *scale[N_SCALES];
    bool quantized;
    float scale_2, input_scale; ///< 0 when absent or wrong
    float largest;              ///< largest decoded |weight|
} matrix;

typedef struct tally {
    int64_t tensors, matrices, plain, zero_blocks, saturated, blocks, groups, experts, unreached;
} tally;

static const cq_entry *find(const cq_verify *v, const cq_param *p, const char *suffix) {
    char name[160];
    cq_module_name(name, p->name, suffix);
    return cq_safetensors_find(v->files, name);
}

/* Rule 1 for one tensor; false when its data must not be looked at. */
static bool check_form(cq_verify *v, const cq_entry *e, cq_dtype dtype, cq_shape shape) {
    char found[96], wanted[96];
    bool right = e->tensor.dtype == dtype && cq_shape_equal(e->tensor.shape, shape);
    if (!right)
        cq_verify_add(v, true, 1, "%s: is %s %s, wanted %s %s", e->name,
                      cq_dtype_name(e->tensor.dtype),
                      cq_shape_text(found, sizeof found, e->tensor.shape), cq_dtype_name(dtype),
                      cq_shape_text(wanted, sizeof wanted, shape));
    return right;
}

/* Rule 1 for a parameter in high precision: a float dtype, the shape, finite values. */
static int check_plain(cq_verify *v, const cq_param *p, const cq_entry *e) {
    cq_dtype t = e->tensor.dtype;
    bool is_float = t == CQ_BF16 || t == CQ_F32 || t == CQ_F16;
    if (!check_form(v, e, is_float ? t : p->disk, p->shape))
        return CQ_OK;
    int64_t n = cq_tensor_elems(e->tensor);
    enum { CHUNK = 4096 };
    float x[CHUNK];
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t k = n - at < CHUNK ? n - at : CHUNK;
        const char *from = (const char *)e->tensor.data + at * cq_dtype_bytes(t);
        CQ_TRY(cq_convert(x, CQ_F32, from, t, k));
        for (int64_t i = 0; i < k; i++)
            if (!isfinite(x[i])) {
                cq_verify_add(v, true, 1, "%s: element %ld is %g, wanted finite numbers", e->name,
                              (long)(at + i), (double)x[i]);
                return CQ_OK;
            }
    }
    cq_safetensors_drop(v->files, e);
    return CQ_OK;
}

/* Rule 2 for a scalar: one F32, finite and positive. */
static float check_scalar(cq_verify *v, const cq_entry *e) {
    float value;
    if (!check_form(v, e, CQ_F32, (cq_shape){{0}, 0}))
        return 0;
    memcpy(&value, e->tensor.data, sizeof value);
    if (isfinite(value) && value >= FLT_MIN)
        return value;
    cq_verify_add(v, true, 2, "%s: is %g, wanted a finite positive number", e->name, (double)value);
    return 0;
}

/* What is wrong with the blocks of one matrix: how many, and where first. */
typedef struct faults {
    int64_t n[3], first[3]; ///< zero scale of a non-zero block, NaN scale, negative scale
} faults;

static void count_fault(faults *f, int kind, int64_t block) {
    if (!f->n[kind]++)
        f->first[kind] = block;
}

static int largest_code(const uint8_t *bytes) {
    int most = 0;
    for (int j = 0; j < 8; j++) {
        int low = bytes[j] & 7, high = (bytes[j] >> 4) & 7;
        most = low > most ? low : most;
        most = high > most ? high : most;
    }
    return most;
}

/* Rules 4 and 5, and the largest decoded weight. */
static void check_blocks(cq_verify *v, matrix *x, tally *t) {
    static const char *const what[] = {"0 in a block that is not all zero, wanted a positive scale",
                                       "NaN, wanted a finite scale",
                                       "negative, wanted a positive scale"};
    const uint8_t *bytes = x->weight->tensor.data, *scales = x->scale[0]->tensor.data;
    int64_t n = cq_tensor_elems(x->scale[0]->tensor), cols = x->param->shape.dim[1] / 16;
    faults f = {0};
    for (int64_t i = 0; i < n; i++) {
        int code = largest_code(bytes + 8 * i);
        t->zero_blocks += !code;
        t->saturated += scales[i] == 0x7e;
        if ((scales[i] & 0x7f) == 0x7f)
            count_fault(&f, 1, i);
        else if (scales[i] & 0x80)
            count_fault(&f, 2, i);
        else if (!scales[i] && code)
            count_fault(&f, 0, i);
        else {
            float y = cq_e2m1_decode((uint8_t)code) * (cq_e4m3_decode(scales[i]) * x->scale_2);
            x->largest = y > x->largest ? y : x->largest;
        }
    }
    t->blocks += n;
    for (int k = 0; k < 3; k++)
        if (f.n[k])
            cq_verify_add(v, true, k == 1 ? 5 : 4, "%s: scale [%ld, %ld] is %s (%ld such blocks)",
                          x->scale[0]->name, (long)(f.first[k] / cols), (long)(f.first[k] % cols),
                          what[k], (long)f.n[k]);
}

static void check_quantized(cq_verify *v, matrix *x, tally *t) {
    const cq_param *p = x->param;
    int64_t rows = p->shape.dim[0], cols = p->shape.dim[1];
    char name[160];
    for (int k = 0; k < N_SCALES; k++) {
        bool unwanted = v->weights_only && k == 2;
        cq_module_name(name, p->name, scale_suffix[k]);
        if (!x->scale[k] && !unwanted)
            cq_verify_add(v, true, 2, "%s: missing, wanted it beside a quantized weight", name);
        if (x->scale[k] && unwanted)
            cq_verify_add(v, true, 1, "%s: present, wanted none in W4A16_NVFP4", name);
    }
    bool packed = check_form(v, x->weight, CQ_U8, CQ_SHAPE2(rows, cols / 2));
    if (x->scale[1])
        x->scale_2 = check_scalar(v, x->scale[1]);
    if (x->scale[2] && !v->weights_only)
        x->input_scale = check_scalar(v, x->scale[2]);
    if (x->scale[0] && check_form(v, x->scale[0], CQ_F8_E4M3, CQ_SHAPE2(rows, cols / 16)) && packed)
        check_blocks(v, x, t);
    t->matrices++;
    cq_safetensors_drop(v->files, x->weight);
    if (x->scale[0])
        cq_safetensors_drop(v->files, x->scale[0]);
}

/* Rule 7: scales beside a weight that is not to be quantized. */
static void check_no_scales(cq_verify *v, const cq_param *p, const char *why) {
    for (int k = 0; k < N_SCALES; k++) {
        const cq_entry *e = find(v, p, scale_suffix[k]);
        if (e)
            cq_verify_add(v, true, 7, "%s: present, wanted none: %s", e->name, why);
    }
}

static int check_param(cq_verify *v, const cq_param *p, matrix *x, tally *t) {
    char module[160];
    bool scaled = false;
    cq_module_name(module, p->name, "");
    *x = (matrix){.param = p, .weight = cq_safetensors_find(v->files, p->name)};
    for (int k = 0; k < N_SCALES; k++)
        scaled = (x->scale[k] = find(v, p, scale_suffix[k])) || scaled;
    if (!x->weight) {
        cq_verify_add(v, true, 1, "%s: missing, config.json wants it", p->name);
        return CQ_OK;
    }
    bool packed = x->weight->tensor.dtype == CQ_U8, excluded = cq_verify_excluded(v, module);
    if (p->linear && !excluded && (scaled || packed)) {
        x->quantized = true;
        check_quantized(v, x, t);
        return CQ_OK;
    }
    if (p->linear && !excluded)
        cq_verify_add(v, true, 7, "%s: is %s, wanted NVFP4: its module is not in exclude_modules",
                      p->name, cq_dtype_name(x->weight->tensor.dtype));
    check_no_scales(v, p,
                    excluded ? "the module is in exclude_modules"
                             : "no module of this kind is quantized");
    t->plain++;
    return check_plain(v, p, x->weight);
}

static matrix *find_matrix(matrix *list, int64_t n, const char *name) {
    for (int64_t i = 0; i < n; i++)
        if (!strcmp(list[i].param->name, name))
            return &list[i];
    return NULL;
}

/* The matrices that servers fuse with the one at `i`, itself first; 1 when it leads no group. */
static int fused_group(matrix **group, matrix *list, int64_t n, int64_t i) {
    static const char *const parts[2][3] = {{"q_proj.weight", "k_proj.weight", "v_proj.weight"},
                                            {"gate_proj.weight", "up_proj.weight", NULL}};
    const char *name = list[i].param->name, *last = strrchr(name, '.');
    while (last && last > name && last[-1] != '.')
        last--;
    int found = 1;
    group[0] = &list[i];
    for (int k = 0; k < 2; k++) {
        if (!last || strcmp(last, parts[k][0]))
            continue;
        for (int j = 1; j < 3 && parts[k][j]; j++) {
            char other[160];
            snprintf(other, sizeof other, "%.*s%s", (int)(last - name), name, parts[k][j]);
            /* parts of a group follow each other, so the search stays short */
            int64_t left = n - i < 16 ? n - i : 16;
            matrix *m = find_matrix(list + i, left, other);
            if (m)
                group[found++] = m;
        }
    }
    return found;
}

static void check_shared(cq_verify *v, const matrix *a, const matrix *b, int which) {
    char name[160];
    float x = which == 1 ? a->scale_2 : a->input_scale,
          y = which == 1 ? b->scale_2 : b->input_scale;
    cq_module_name(name, b->param->name, scale_suffix[which]);
    if (x > 0 && y > 0 && memcmp(&x, &y, sizeof x))
        cq_verify_add(v, true, 3, "%s: is %.9g, wanted %.9g as in %s, which servers fuse with it",
                      name, (double)y, (double)x, a->param->name);
}

/* Rules 3 and 6, which concern matrices that are read as one. */
static void check_group(cq_verify *v, matrix **group, int n, tally *t) {
    float largest = 0, implied = 0;
    t->groups += n > 1;
    for (int i = 0; i < n; i++) {
        if (!group[i]->weight || !group[0]->weight)
            continue; /* reported as missing */
        if (group[i]->quantized != group[0]->quantized)
            cq_verify_add(
                v, true, 3, "%s: is %squantized, wanted it as %s, which servers fuse with it",
                group[i]->param->name, group[i]->quantized ? "" : "not ", group[0]->param->name);
        else if (i) {
            check_shared(v, group[0], group[i], 1);
            check_shared(v, group[0], group[i], 2);
        }
        if (group[i]->quantized && group[i]->largest > largest)
            largest = group[i]->largest;
        if (group[i]->quantized && group[i]->scale_2 * 2688.0f > implied)
            implied = group[i]->scale_2 * 2688.0f;
    }
    if (implied > LARGEST_WEIGHT)
        cq_verify_add(
            v, true, 6,
            "%s: its weight_scale_2 implies a maximum of %.6g, wanted amax / 2688 (is it the "
            "inverse?)",
            group[0]->param->name, (double)implied);
    else if (largest > 0 && implied > 4 * largest)
        cq_verify_add(
            v, true, 6,
            "%s: its weight_scale_2 implies a maximum of %.6g but the largest weight is %.6g, "
            "wanted amax / 2688 (or amax / 1536)",
            group[0]->param->name, (double)implied, (double)largest);
}

static bool follows(const char *name, const char *tail) {
    size_t n = strlen(name), k = strlen(tail);
    return n >= k && !strcmp(name + n - k, tail);
}

static void check_groups(cq_verify *v, matrix *list, int64_t n, tally *t) {
    for (int64_t i = 0; i < n; i++) {
        const char *name = list[i].param->name;
        matrix *group[3];
        if (follows(name, ".k_proj.weight") || follows(name, ".v_proj.weight"))
            continue;
        char gate[160];
        bool up = follows(name, ".up_proj.weight");
        if (up) /* belongs to the gate's group where there is a gate */
            snprintf(gate, sizeof gate, "%.*sgate_proj.weight",
                     (int)(strlen(name) - strlen("up_proj.weight")), name);
        int64_t from = i < 4 ? 0 : i - 4;
        if (up && find_matrix(list + from, i - from, gate))
            continue;
        check_group(v, group, fused_group(group, list, n, i), t);
    }
}

static bool is_expert_of(const cq_param *p, int32_t block, const char *kind) {
    return p->block == block && strstr(p->name, ".experts.") && follows(p->name, kind);
}

/* Rule 14: experts that no calibration token reached carry the largest input scale of their layer.
 */
static void count_unreached(const matrix *list, int64_t n, tally *t) {
    for (int64_t i = 0; i < n; i++) {
        const char *kind = strrchr(list[i].param->name, '.');
        if (!list[i].quantized || !strstr(list[i].param->name, ".experts.0."))
            continue;
        while (kind[-1] != '.')
            kind--;
        float largest = 0;
        int64_t at_largest = 0;
        for (int64_t k = 0; k < n; k++) {
            if (!is_expert_of(list[k].param, list[i].param->block, kind))
                continue;
            float x = list[k].input_scale;
            t->experts++;
            at_largest = x > largest ? 1 : at_largest + (x == largest);
            largest = x > largest ? x : largest;
        }
        t->unreached += at_largest > 1 ? at_largest - 1 : 0;
    }
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const cq_param *const *)a)->name, (*(const cq_param *const *)b)->name);
}

static const cq_param *lookup(const cq_param **sorted, int64_t n, const char *name) {
    cq_param key, *pointer = &key;
    if (snprintf(key.name, sizeof key.name, "%s", name) >= (int)sizeof key.name)
        return NULL;
    const cq_param **found = bsearch(&pointer, sorted, (size_t)n, sizeof *sorted, by_name);
    return found ? *found : NULL;
}

/* The parameter whose scale this tensor is, or NULL. */
static const cq_param *scaled_param(const cq_param **sorted, int64_t n, const char *name) {
    char weight[192];
    const char *dot = strrchr(name, '.');
    for (int k = 0; k < N_SCALES && dot; k++)
        if (!strcmp(dot, scale_suffix[k])) {
            snprintf(weight, sizeof weight, "%.*s.weight", (int)(dot - name), name);
            return lookup(sorted, n, weight);
        }
    return NULL;
}

/* Rules 1 and 8: nothing else is there. */
static int check_extra(cq_verify *v) {
    int64_t n = cq_model_n_params(v->expected);
    const cq_param **sorted = malloc((size_t)(n ? n : 1) * sizeof *sorted);
    if (!sorted)
        return cq_fail(CQ_ENOMEM, "verify: no memory for %ld names", (long)n);
    for (int64_t i = 0; i < n; i++)
        sorted[i] = cq_model_param(v->expected, i);
    qsort(sorted, (size_t)n, sizeof *sorted, by_name);
    bool tied = cq_model_config(v->expected)->tied;
    for (int64_t i = 0; i < cq_safetensors_count(v->files); i++) {
        const char *name = cq_safetensors_at(v->files, i)->name, *dot = strrchr(name, '.');
        bool kv = dot && (!strcmp(dot, ".k_scale") || !strcmp(dot, ".v_scale"));
        if (lookup(sorted, n, name) || scaled_param(sorted, n, name) || (kv && v->kv_cache))
            continue;
        if (tied && !strncmp(name, "lm_head.", strlen("lm_head.")))
            cq_verify_add(v, true, 8, "%s: stored although the head is tied to %s, wanted it once",
                          name, cq_model_head(v->expected)->name);
        else
            cq_verify_add(v, true, 1, "%s: extra tensor, config.json wants none of this name",
                          name);
    }
    free(sorted);
    return CQ_OK;
}

static void add_statistics(cq_verify *v, const tally *t) {
    cq_verify_add(v, false, 1, "%ld tensors: %ld NVFP4 matrices, %ld parameters in high precision",
                  (long)t->tensors, (long)t->matrices, (long)t->plain);
    cq_verify_add(v, false, 3, "%ld groups of matrices that servers fuse", (long)t->groups);
    cq_verify_add(v, false, 4, "%ld blocks, %ld all zero, %ld at the largest scale",
                  (long)t->blocks, (long)t->zero_blocks, (long)t->saturated);
    if (t->experts)
        cq_verify_add(
            v, false, 14,
            "%ld of %ld expert matrices repeat the largest input scale of their layer, as "
            "those do that no calibration token reached",
            (long)t->unreached, (long)t->experts);
}

int cq_verify_tensors(cq_verify *v) {
    int64_t n = cq_model_n_params(v->expected), n_linear = 0;
    tally t = {.tensors = cq_safetensors_count(v->files)};
    matrix *list = malloc((size_t)(n ? n : 1) * sizeof *list);
    if (!list)
        return cq_fail(CQ_ENOMEM, "verify: no memory for %ld parameters", (long)n);
    int status = CQ_OK;
    for (int64_t i = 0; i < n && !status; i++) {
        matrix x;
        status = check_param(v, cq_model_param(v->expected, i), &x, &t);
        if (x.param->linear)
            list[n_linear++] = x;
    }
    if (!status)
        status = check_extra(v);
    check_groups(v, list, n_linear, &t);
    if (!v->weights_only)
        count_unreached(list, n_linear, &t);
    if (!status && !t.matrices)
        cq_verify_add(v, true, 1, "%s: no NVFP4 matrix, wanted at least one", v->dir);
    add_statistics(v, &t);
    free(list);
    return status;
}
