/// export.c - checkpoint folders out: NVFP4 in the ModelOpt layout (nvfp4.md 5.1), or the master
/// weights.
///
///     <module>.weight U8 [N, K / 2]     .weight_scale E4M3 [N, K / 16]     .weight_scale_2 = amax
///     / (6 top) .input_scale = amax_x / 2688, absent when activations stay as they are; both F32
///     scalars
///
/// Policy: what is packed is the F32 master weight through the one codec, so the bytes decode to
/// the bits that training multiplied with. Everything else is rounded to the dtype it had in its
/// checkpoint. A folder appears whole or not at all, and nothing that is not an earlier export is
/// ever replaced.
#include "core/base/error.h"
#include "core/model/export_impl.h"
#include "core/model/json.h"
#include "core/model/model_impl.h"
#include "core/tensor/device.h"
#include <dirent.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Tensors on their way to the writer, which reads them only when it writes: all copies live until
 * then. */
typedef struct packer {
    cq_model *m;
    cq_st_writer *writer;
    void **owned;
    int64_t n_owned;
} packer;

static void *own(packer *k, int64_t bytes) {
    void *p = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (p)
        k->owned[k->n_owned++] = p;
    else
        cq_fail(CQ_ENOMEM, "export: no memory for %ld bytes", (long)bytes);
    return p;
}

static bool quantizes_input(const cq_model *m, const cq_param *p) {
    for (int64_t i = 0; i < m->n_linears; i++)
        for (int64_t j = 0; j < m->linear[i]->n_parts; j++)
            if (m->linear[i]->part[j] == p)
                return m->linear[i]->act_quant;
    return false;
}

static int add_suffixed(packer *k, const cq_param *p, const char *suffix, cq_tensor t) {
    char name[160];
    cq_module_name(name, p->name, suffix);
    return cq_st_writer_add(k->writer, name, t);
}

/* The F32 form of a value on the host: itself, or a copy that the caller frees (*copy). */
static int as_f32(const float **out, float **copy, cq_tensor t) {
    void *owned;
    CQ_TRY(cq_tensor_on_host(&t, &owned, t));
    *copy = owned;
    *out = t.data;
    if (t.dtype == CQ_F32)
        return CQ_OK;
    int64_t n = cq_tensor_elems(t);
    *copy = malloc((size_t)n * sizeof **copy);
    int status = *copy ? cq_convert(*copy, CQ_F32, t.data, t.dtype, n)
                       : cq_fail(CQ_ENOMEM, "export: no memory for %ld values", (long)n);
    free(owned);
    *out = *copy;
    return status;
}

static bool has_weight(const cq_param *p, const float *x) {
    for (int64_t i = 0; i < cq_shape_elems(p->shape); i++)
        if (x[i] != 0)
            return true;
    return false;
}

int cq_export_input_scale(float *scale, const cq_param *p) {
    *scale = *p->amax_x / 2688.0f;
    return isfinite(*scale) && *scale >= FLT_MIN
               ? CQ_OK
               : cq_fail(CQ_ENUMERIC, "%s: input maximum is %g, wanted a calibrated model", p->name,
                         (double)*p->amax_x);
}

/* A master weight that rank 0 writes, from where it is; as cq_param_master. */
static int find_master(cq_tensor *out, void **owned, const cq_model *m, const cq_param *p) {
    if (p->holder <= 0)
        return cq_param_master(out, owned, p);
    cq_tensor mine = {NULL, p->shape, m->env.dtype};
    void *copy = NULL;
    if (p->value.data)
        CQ_TRY(cq_param_master(&mine, &copy, p));
    int status = cq_model_fetch(out, owned, m, p, mine);
    free(copy);
    return status;
}

/* The same of static block maxima; no data where there are none. */
static int find_block_amax(cq_tensor *out, void **owned, const cq_model *m, const cq_param *p) {
    if (p->holder <= 0 || m->scales == CQ_SCALE_MAX)
        return cq_tensor_on_host(out, owned, p->block_amax);
    cq_tensor mine = {NULL, CQ_SHAPE2(p->shape.dim[0], p->shape.dim[1] / 16), CQ_F32};
    void *copy = NULL;
    if (p->block_amax.data)
        CQ_TRY(cq_tensor_on_host(&mine, &copy, p->block_amax));
    int status = cq_model_fetch(out, owned, m, p, mine);
    free(copy);
    return status;
}

int cq_export_lend(cq_model *m, bool nvfp4) {
    for (int64_t i = 0; i < m->n_params; i++) {
        const cq_param *p = m->param[i];
        bool maxima = nvfp4 && p->quantized && m->scales != CQ_SCALE_MAX;
        cq_tensor none;
        void *owned;
        if (p->holder <= 0)
            continue;
        CQ_TRY(find_master(&none, &owned, m, p));
        if (maxima)
            CQ_TRY(find_block_amax(&none, &owned, m, p));
    }
    return CQ_OK;
}

static int pack(packer *k, cq_param *p, const float *x) {
    int64_t n = p->shape.dim[0], cols = p->shape.dim[1];
    uint8_t *bytes = own(k, n * cols / 2), *scales = own(k, n * cols / 16);
    float *scalar = own(k, 2 * (int64_t)sizeof(float));
    cq_shape one = {{0}, 0};
    if (!bytes || !scales || !scalar)
        return CQ_ENOMEM;
    if (!(p->amax > 0) && has_weight(p, x))
        return cq_fail(CQ_ENUMERIC, "%s: weight maximum is %g, wanted a calibrated model", p->name,
                       (double)p->amax);
    cq_tensor block_amax;
    void *owned;
    CQ_TRY(find_block_amax(&block_amax, &owned, k->m, p));
    int status =
        cq_nvfp4_pack(bytes, scales, &scalar[0], x, n, cols, p->amax, block_amax.data, p->top);
    free(owned);
    if (status)
        return cq_fail_in(status, p->name);
    CQ_TRY(cq_st_writer_add(k->writer, p->name, (cq_tensor){bytes, CQ_SHAPE2(n, cols / 2), CQ_U8}));
    CQ_TRY(add_suffixed(k, p, ".weight_scale",
                        (cq_tensor){scales, CQ_SHAPE2(n, cols / 16), CQ_F8_E4M3}));
    CQ_TRY(add_suffixed(k, p, ".weight_scale_2", (cq_tensor){&scalar[0], one, CQ_F32}));
    if (!quantizes_input(k->m, p))
        return CQ_OK;
    CQ_TRY(cq_export_input_scale(&scalar[1], p));
    return add_suffixed(k, p, ".input_scale", (cq_tensor){&scalar[1], one, CQ_F32});
}

static int add_quantized(packer *k, cq_param *p) {
    const float *x;
    float *copy;
    cq_tensor value;
    void *owned;
    CQ_TRY(find_master(&value, &owned, k->m, p));
    int status = as_f32(&x, &copy, value);
    if (!status)
        status = pack(k, p, x);
    free(copy);
    free(owned);
    return status;
}

static int add_plain(packer *k, cq_param *p) {
    int64_t n = cq_tensor_elems(p->value);
    cq_tensor value;
    void *owned;
    CQ_TRY(find_master(&value, &owned, k->m, p));
    if (owned)
        k->owned[k->n_owned++] = owned;
    for (int64_t i = 0; i < n; i++) {
        double v = value.dtype == CQ_F64 ? ((const double *)value.data)[i]
                                         : (double)((const float *)value.data)[i];
        if (!isfinite(v))
            return cq_fail(CQ_ENUMERIC, "%s: element %ld is %g, wanted a finite number", p->name,
                           (long)i, v);
    }
    if (p->disk == value.dtype)
        return cq_st_writer_add(k->writer, p->name, (cq_tensor){value.data, p->shape, p->disk});
    void *copy = own(k, n * cq_dtype_bytes(p->disk));
    if (!copy)
        return CQ_ENOMEM;
    CQ_TRY(cq_convert(copy, p->disk, value.data, value.dtype, n));
    return cq_st_writer_add(k->writer, p->name, (cq_tensor){copy, p->shape, p->disk});
}

static int add_all(packer *k, bool nvfp4) {
    for (int64_t i = 0; i < cq_model_n_params(k->m); i++) {
        cq_param *p = cq_model_param(k->m, i);
        if (!p->value.data && p->holder < 0)
            return cq_fail(CQ_EUSAGE, "export: %s has no values yet, wanted a loaded model",
                           p->name);
        CQ_TRY(nvfp4 && p->quantized ? add_quantized(k, p) : add_plain(k, p));
    }
    return CQ_OK;
}

static int write_weights(cq_model *m, const char *folder, int64_t shard_bytes, bool nvfp4) {
    packer k = {.m = m, .owned = calloc((size_t)cq_model_n_params(m) * 3 + 1, sizeof(void *))};
    if (!k.owned)
        return cq_fail(CQ_ENOMEM, "export: no memory for its tensor list");
    int status = cq_st_writer_open(&k.writer);
    if (!status) /* transformers loads a file only when its metadata names the framework */
        status = cq_st_writer_metadata(k.writer, "format", "pt");
    if (!status)
        status = cq_st_writer_metadata(k.writer, "producer", "ckaqad");
    if (!status)
        status = add_all(&k, nvfp4);
    if (!status)
        status = cq_st_writer_folder(k.writer, folder, shard_bytes);
    cq_st_writer_close(k.writer);
    for (int64_t i = 0; i < k.n_owned; i++)
        free(k.owned[i]);
    free(k.owned);
    return status;
}

/* Modules that servers must not build as 4-bit layers: the head, linears in high precision, and the
 * convolutions. Norms, embeddings and routers are no quantizable layers and are not listed
 * (nvfp4.md 6.1). */
static json_t *exclude_modules(cq_model *m) {
    char module[160];
    json_t *list = json_array();
    json_array_append_new(list, json_string("lm_head"));
    for (int64_t i = 0; i < cq_model_n_params(m); i++) {
        const cq_param *p = cq_model_param(m, i);
        cq_module_name(module, p->name, "");
        bool conv = strstr(p->name, ".conv1d.weight") != NULL;
        if (conv || (p->linear && !p->quantized && strcmp(module, "lm_head")))
            json_array_append_new(list, json_string(module));
    }
    return list;
}

static json_t *four_bit(void) {
    return json_pack("{s:b, s:i, s:s, s:i}", "dynamic", 0, "num_bits", 4, "type", "float",
                     "group_size", 16);
}

static bool any_input_quantized(const cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->act_quant)
            return true;
    return false;
}

/* hf_quant_config.json and the quantization_config of config.json; NULL without memory. */
static json_t *hf_quant_config(cq_model *m) {
    return json_pack("{s:{s:s, s:s}, s:{s:s, s:n, s:i, s:o}}", "producer", "name", "ckaqad",
                     "version", CQ_VERSION, "quantization", "quant_algo",
                     any_input_quantized(m) ? "NVFP4" : "W4A16_NVFP4", "kv_cache_quant_algo",
                     "group_size", 16, "exclude_modules", exclude_modules(m));
}

static json_t *quantization_config(cq_model *m) {
    bool inputs = any_input_quantized(m);
    json_t *group = json_object();
    if (inputs)
        json_object_set_new(group, "input_activations", four_bit());
    json_object_set_new(group, "weights", four_bit());
    json_object_set_new(group, "targets", json_pack("[s]", "Linear"));
    return json_pack("{s:{s:o}, s:o, s:s, s:{s:s, s:s}, s:s}", "config_groups", "group_0", group,
                     "ignore", exclude_modules(m), "quant_algo", inputs ? "NVFP4" : "W4A16_NVFP4",
                     "producer", "name", "ckaqad", "version", CQ_VERSION, "quant_method",
                     "modelopt");
}

static int write_hf_quant(cq_model *m, const char *path) {
    json_t *config = hf_quant_config(m);
    char *text = config ? json_dumps(config, JSON_INDENT(4) | JSON_PRESERVE_ORDER) : NULL;
    int status = text ? cq_file_write(path, text, (int64_t)strlen(text))
                      : cq_fail(CQ_ENOMEM, "%s: no memory to write it", path);
    free(text);
    json_decref(config);
    return status;
}

static int write_config(cq_model *m, const char *folder, bool nvfp4) {
    char from[4096], to[4096], *text = NULL;
    json_t *config = NULL;
    CQ_TRY(cq_path_join(from, sizeof from, cq_model_dir(m), "config.json"));
    CQ_TRY(cq_path_join(to, sizeof to, folder, "config.json"));
    if (nvfp4 && !(config = quantization_config(m)))
        return cq_fail(CQ_ENOMEM, "%s: no memory to write it", to);
    int status = cq_json_edit(&text, from, "quantization_config", config);
    json_decref(config);
    if (!status)
        status = cq_file_write(to, text, (int64_t)strlen(text));
    if (!status)
        free(text);
    if (status || !nvfp4)
        return status;
    CQ_TRY(cq_path_join(to, sizeof to, folder, "hf_quant_config.json"));
    return write_hf_quant(m, to);
}

static bool has_ending(const char *name, const char *ending) {
    size_t n = strlen(name), k = strlen(ending);
    return n >= k && !strcmp(name + n - k, ending);
}

/* Weights in any format, and the files that this export writes itself. */
static bool is_replaced(const char *name) {
    static const char *const endings[] = {".safetensors", ".index.json", ".bin",  ".pt",
                                          ".pth",         ".ckpt",       ".gguf", ".h5",
                                          ".onnx",        ".msgpack"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (has_ending(name, endings[i]))
            return true;
    return !strcmp(name, "config.json") || !strcmp(name, "hf_quant_config.json");
}

/* One entry of the source folder, if it is a plain file that belongs into the copy. */
static int copy_one(const char *folder, const char *source, const char *name) {
    char from[4096], to[4096];
    struct stat info;
    CQ_TRY(cq_path_join(from, sizeof from, source, name));
    CQ_TRY(cq_path_join(to, sizeof to, folder, name));
    if (is_replaced(name) || stat(from, &info) || !S_ISREG(info.st_mode))
        return CQ_OK;
    return cq_file_copy(to, from);
}

static int copy_others(const char *folder, const char *source) {
    int status = CQ_OK;
    DIR *d = opendir(source);
    if (!d)
        return cq_fail(CQ_EIO, "%s: %s", source, strerror(errno));
    for (struct dirent *e = readdir(d); e && !status; e = readdir(d))
        status = copy_one(folder, source, e->d_name);
    closedir(d);
    return status;
}

bool cq_export_is_ours(const char *dir, bool nvfp4) {
    char path[4096];
    bool ours = false;
    if (cq_path_join(path, sizeof path, dir, "hf_quant_config.json"))
        return false;
    if (nvfp4) {
        json_t *root;
        if (cq_json_load(&root, path))
            return false;
        const char *name =
            json_string_value(json_object_get(json_object_get(root, "producer"), "name"));
        ours = name && !strcmp(name, "ckaqad");
        json_decref(root);
        return ours;
    }
    cq_safetensors *st;
    if (cq_file_exists(path) || cq_safetensors_open(&st, dir))
        return false;
    const char *name = cq_safetensors_metadata(st, "producer");
    ours = name && !strcmp(name, "ckaqad");
    cq_safetensors_close(st);
    return ours;
}

static bool is_empty(const char *dir) {
    int n = 0;
    DIR *d = opendir(dir);
    while (d && readdir(d) && n < 3)
        n++;
    if (d)
        closedir(d);
    return d && n <= 2; /* . and .. */
}

/* The target may be new, empty, or an earlier export of the same kind; never the source. */
int cq_export_check(cq_model *m, const char *dir, bool nvfp4) {
    struct stat target, source;
    if (stat(dir, &target))
        return errno == ENOENT ? CQ_OK : cq_fail(CQ_EIO, "%s: %s", dir, strerror(errno));
    if (!S_ISDIR(target.st_mode))
        return cq_fail(CQ_EUSAGE, "%s: is a file, wanted a folder for the export", dir);
    if (!stat(cq_model_dir(m), &source) && source.st_dev == target.st_dev &&
        source.st_ino == target.st_ino)
        return cq_fail(CQ_EUSAGE,
                       "%s: is the model's own folder, wanted another one for the export", dir);
    if (is_empty(dir) || cq_export_is_ours(dir, nvfp4))
        return CQ_OK;
    return cq_fail(
        CQ_EUSAGE,
        "%s: holds files that are not an earlier export (%s), wanted a new or empty folder", dir,
        nvfp4 ? "no hf_quant_config.json by ckaqad" : "no weights by ckaqad");
}

int cq_export_files(cq_model *m, const char *folder, bool nvfp4) {
    CQ_TRY(copy_others(folder, cq_model_dir(m)));
    return write_config(m, folder, nvfp4);
}

static int fill(cq_model *m, const char *folder, int64_t shard_bytes, bool nvfp4) {
    CQ_TRY(cq_export_files(m, folder, nvfp4));
    return write_weights(m, folder, shard_bytes, nvfp4);
}

static int export_folder(cq_model *m, const char *dir, int64_t shard_bytes, bool nvfp4) {
    char to[3800], temporary[3840];
    size_t n = strlen(dir);
    while (n > 1 && dir[n - 1] == '/')
        n--;
    if (!n || n >= sizeof to)
        return cq_fail(CQ_EUSAGE, "export: path of %ld bytes, wanted 1 to 3799", (long)n);
    snprintf(to, sizeof to, "%.*s", (int)n, dir);
    snprintf(temporary, sizeof temporary, "%s.tmp.%ld", to, (long)getpid());
    CQ_TRY(cq_export_check(m, to, nvfp4));
    CQ_TRY(cq_folder_remove(temporary));
    CQ_TRY(cq_folder_make(temporary));
    int status = fill(m, temporary, shard_bytes, nvfp4);
    if (!status)
        status = cq_folder_replace(to, temporary);
    if (status) {
        char message[1024]; /* cleaning up must not hide why */
        snprintf(message, sizeof message, "%s", cq_error());
        cq_folder_remove(temporary);
        return cq_fail(status, "%s", message);
    }
    return CQ_OK;
}

int cq_export_quantized(cq_model *m) {
    int64_t n = 0;
    if (cq_model_is_nvfp4(m))
        return cq_fail(CQ_EUSAGE,
                       "export: %s holds NVFP4 weights already, wanted a calibrated student",
                       cq_model_dir(m));
    for (int64_t i = 0; i < cq_model_n_params(m); i++)
        n += cq_model_param(m, i)->quantized;
    return n ? CQ_OK
             : cq_fail(CQ_EUSAGE, "export: no matrix of %s is quantized, wanted at least one",
                       cq_model_dir(m));
}

int cq_export_nvfp4(cq_model *m, const char *dir, int64_t shard_bytes) {
    CQ_TRY(cq_export_quantized(m));
    return export_folder(m, dir, shard_bytes, true);
}

int cq_export_weights(cq_model *m, const char *dir, int64_t shard_bytes) {
    return export_folder(m, dir, shard_bytes, false);
}

/* Number of elements whose bits differ. */
static int64_t count_differing(const float *a, const float *b, int64_t n) {
    int64_t differing = 0;
    for (int64_t i = 0; i < n; i++)
        differing += memcmp(a + i, b + i, sizeof *a) != 0;
    return differing;
}

static int find_part(const cq_entry **out, const cq_safetensors *st, const char *dir,
                     const char *name, cq_dtype dtype, int64_t elems) {
    *out = cq_safetensors_find(st, name);
    if (!*out)
        return cq_fail(CQ_EDATA, "%s: tensor %s is missing, wanted the export of this model", dir,
                       name);
    if ((*out)->tensor.dtype != dtype || cq_tensor_elems((*out)->tensor) != elems)
        return cq_fail(CQ_EDATA, "%s: %s holds %ld elements of %s, wanted %ld of %s", dir, name,
                       (long)cq_tensor_elems((*out)->tensor), cq_dtype_name((*out)->tensor.dtype),
                       (long)elems, cq_dtype_name(dtype));
    return CQ_OK;
}

static int as_kept(float *y, int64_t n) {
    uint16_t *half = malloc((size_t)n * sizeof *half);
    int status = half ? cq_convert(half, CQ_BF16, y, CQ_F32, n)
                      : cq_fail(CQ_ENOMEM, "export: no memory to compare %ld values", (long)n);
    if (!status)
        status = cq_convert(y, CQ_F32, half, CQ_BF16, n);
    free(half);
    return status;
}

static int compare_param(int64_t *differing, const cq_param *p, const cq_safetensors *st,
                         const char *dir) {
    char name[160];
    const cq_entry *bytes, *scales, *scalar;
    const float *trained;
    float *copy = NULL, scale_2;
    cq_tensor kept = {0};
    void *owned = NULL;
    int64_t rows = p->shape.dim[0], cols = p->shape.dim[1], n = rows * cols;
    CQ_TRY(find_part(&bytes, st, dir, p->name, CQ_U8, n / 2));
    cq_module_name(name, p->name, ".weight_scale");
    CQ_TRY(find_part(&scales, st, dir, name, CQ_F8_E4M3, n / 16));
    cq_module_name(name, p->name, ".weight_scale_2");
    CQ_TRY(find_part(&scalar, st, dir, name, CQ_F32, 1));
    memcpy(&scale_2, scalar->tensor.data, sizeof scale_2);
    float *y = malloc((size_t)n * sizeof *y);
    if (!y)
        return cq_fail(CQ_ENOMEM, "export: no memory to compare %s", p->name);
    int status = cq_param_copy(&kept, &owned, p);
    if (!status)
        status = as_f32(&trained, &copy, kept);
    if (!status)
        status = cq_nvfp4_unpack(y, bytes->tensor.data, scales->tensor.data, scale_2, rows, cols);
    if (!status && p->fq.dtype == CQ_BF16) /* what is kept is rounded: so are the exported values */
        status = as_kept(y, n);
    if (!status)
        *differing += count_differing(y, trained, n);
    free(copy);
    free(owned);
    free(y);
    cq_safetensors_drop(st, bytes);
    return status;
}

int cq_export_compare(cq_model *m, const char *dir, int64_t *differing) {
    cq_safetensors *st;
    int status = CQ_OK;
    *differing = 0;
    CQ_TRY(cq_safetensors_open(&st, dir));
    for (int64_t i = 0; i < cq_model_n_params(m) && !status; i++) {
        const cq_param *p = cq_model_param(m, i);
        if (p->quantized && p->value.data)
            status = compare_param(differing, p, st, dir);
    }
    cq_safetensors_close(st);
    return status;
}
