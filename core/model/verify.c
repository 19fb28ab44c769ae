/// verify.c - is an exported folder what servers expect? The files beside the weights, and the
/// findings.
///
/// Rules are those of users.md 8.2: 1-6, 8 and 14 look at tensors (verify_tensors.c); here are the
/// exclude list (7), the two descriptions of the quantization (9), tokenizer files (10) and the
/// index (11). Policy: everything wrong is reported, not only the first fault; a line that names no
/// fault is a statistic.
#include "core/base/error.h"
#include "core/base/hash.h"
#include "core/model/verify_impl.h"
#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

void cq_verify_add(cq_verify *v, bool failed, int rule, const char *format, ...) {
    char text[1024];
    va_list args;
    int at = snprintf(text, sizeof text, "rule %d: ", rule);
    va_start(args, format);
    vsnprintf(text + at, sizeof text - (size_t)at, format, args);
    va_end(args);
    if (v->n == v->cap) {
        int64_t cap = v->cap ? 2 * v->cap : 64;
        finding *list = realloc(v->list, (size_t)cap * sizeof *list);
        if (!list) {
            v->out_of_memory = true;
            return;
        }
        v->list = list;
        v->cap = cap;
    }
    char *copy = strdup(text);
    if (copy)
        v->list[v->n++] = (finding){copy, failed};
    else
        v->out_of_memory = true;
}

static bool matches(const char *entry, const char *module) {
    return !strcmp(entry, module) || cq_glob_match(entry, module);
}

bool cq_verify_excluded(const cq_verify *v, const char *module) {
    size_t i;
    const json_t *entry;
    json_array_foreach(v->excluded, i, entry) {
        if (json_is_string(entry) && matches(json_string_value(entry), module))
            return true;
    }
    return false;
}

/* Name of the parameter's module: the name without its last part. */
static bool names_module(cq_verify *v, const char *entry) {
    char module[160];
    for (int64_t i = 0; i < cq_model_n_params(v->expected); i++) {
        const char *name = cq_model_param(v->expected, i)->name, *dot = strrchr(name, '.');
        snprintf(module, sizeof module, "%.*s", dot ? (int)(dot - name) : 0, name);
        if (matches(entry, module))
            return true;
    }
    return false;
}

/* Rule 7: the list exists and every entry means something; verify_tensors.c holds it against the
 * tensors. */
static void check_exclude_list(cq_verify *v) {
    size_t i;
    const json_t *entry;
    char text[80];
    if (!json_is_array(v->excluded) || !json_array_size(v->excluded)) {
        cq_verify_add(v, true, 7, "exclude_modules: is %s, wanted a non-empty list of modules",
                      cq_json_text(text, sizeof text, v->excluded));
        return;
    }
    json_array_foreach(v->excluded, i, entry) {
        const char *name = json_string_value(entry);
        if (!name)
            cq_verify_add(v, true, 7, "exclude_modules: entry %zu is %s, wanted a module name", i,
                          cq_json_text(text, sizeof text, entry));
        else if (strcmp(name, "lm_head") && !names_module(v, name))
            cq_verify_add(v, true, 7, "exclude_modules: %s is no module of config.json", name);
    }
    cq_verify_add(v, false, 7, "exclude_modules has %zu entries", json_array_size(v->excluded));
}

static bool holds(const json_t *list, const char *name) {
    size_t i;
    const json_t *entry;
    json_array_foreach(list, i, entry) {
        const char *text = json_string_value(entry);
        if (text && !strcmp(text, name))
            return true;
    }
    return false;
}

static void check_listed(cq_verify *v, const json_t *list, const char *where, const json_t *other,
                         const char *missing_in) {
    size_t i;
    const json_t *entry;
    json_array_foreach(list, i, entry) {
        const char *name = json_string_value(entry);
        if (name && !holds(other, name))
            cq_verify_add(v, true, 9, "%s: in %s but not in %s, wanted the same list", name, where,
                          missing_in);
    }
}

static void check_value(cq_verify *v, const char *what, const json_t *found, const char *wanted) {
    char text[80];
    if (!json_is_string(found) || strcmp(json_string_value(found), wanted))
        cq_verify_add(v, true, 9, "%s: is %s, wanted \"%s\"", what,
                      cq_json_text(text, sizeof text, found), wanted);
}

static void check_group_size(cq_verify *v, const char *what, const json_t *found) {
    char text[80];
    if (!json_is_integer(found) || json_integer_value(found) != 16)
        cq_verify_add(v, true, 9, "%s: is %s, wanted 16", what,
                      cq_json_text(text, sizeof text, found));
}

static void check_four_bit(cq_verify *v, const char *what, const json_t *group) {
    char name[128], text[80];
    const json_t *bits = json_object_get(group, "num_bits");
    snprintf(name, sizeof name, "config_groups %s group_size", what);
    check_group_size(v, name, json_object_get(group, "group_size"));
    snprintf(name, sizeof name, "config_groups %s type", what);
    check_value(v, name, json_object_get(group, "type"), "float");
    if (!json_is_integer(bits) || json_integer_value(bits) != 4)
        cq_verify_add(v, true, 9, "config_groups %s num_bits: is %s, wanted 4", what,
                      cq_json_text(text, sizeof text, bits));
}

/* The groups of quantization_config say the same as the algorithm's name. */
static void check_groups(cq_verify *v, const json_t *config) {
    const json_t *group = json_object_get(json_object_get(config, "config_groups"), "group_0");
    const json_t *inputs = json_object_get(group, "input_activations");
    check_four_bit(v, "weights", json_object_get(group, "weights"));
    if (!v->weights_only)
        check_four_bit(v, "input_activations", inputs);
    else if (inputs && !json_is_null(inputs))
        cq_verify_add(
            v, true, 9,
            "config_groups input_activations: present, wanted none: activations stay as they "
            "are in W4A16_NVFP4");
}

static void check_kv_cache(cq_verify *v, const json_t *hf, const json_t *scheme) {
    bool none = !hf || json_is_null(hf), no_scheme = !scheme || json_is_null(scheme);
    if (none != no_scheme)
        cq_verify_add(v, true, 9,
                      "kv_cache_quant_algo: hf_quant_config.json has %s, config.json %s "
                      "kv_cache_scheme, wanted the same",
                      none ? "none" : "one", no_scheme ? "has no" : "has a");
}

/* Rule 9: hf_quant_config.json and quantization_config say the same. */
static void check_descriptions(cq_verify *v) {
    const json_t *config = json_object_get(v->config, "quantization_config");
    const json_t *hf = json_object_get(v->quant, "quantization");
    const char *algo = v->weights_only ? "W4A16_NVFP4" : "NVFP4";
    int64_t before = cq_verify_failed(v);
    if (!json_is_object(hf))
        cq_verify_add(v, true, 9, "hf_quant_config.json: no quantization object, wanted one");
    if (!json_is_object(config))
        cq_verify_add(v, true, 9, "config.json: no quantization_config, wanted one");
    if (json_is_object(hf)) {
        check_value(v, "hf_quant_config.json quant_algo", json_object_get(hf, "quant_algo"), algo);
        check_group_size(v, "hf_quant_config.json group_size", json_object_get(hf, "group_size"));
        if (!json_object_get(hf, "kv_cache_quant_algo"))
            cq_verify_add(v, true, 9,
                          "hf_quant_config.json kv_cache_quant_algo: missing, wanted it (null is "
                          "none)");
    }
    if (json_is_object(config)) {
        check_value(v, "quantization_config quant_algo", json_object_get(config, "quant_algo"),
                    algo);
        check_value(v, "quantization_config quant_method", json_object_get(config, "quant_method"),
                    "modelopt");
        check_groups(v, config);
    }
    if (!json_is_object(hf) || !json_is_object(config))
        return;
    const json_t *excluded = json_object_get(hf, "exclude_modules");
    const json_t *ignored = json_object_get(config, "ignore");
    check_listed(v, excluded, "exclude_modules", ignored, "ignore");
    check_listed(v, ignored, "ignore", excluded, "exclude_modules");
    check_kv_cache(v, json_object_get(hf, "kv_cache_quant_algo"),
                   json_object_get(config, "kv_cache_scheme"));
    if (cq_verify_failed(v) == before)
        cq_verify_add(v, false, 9, "hf_quant_config.json and config.json agree: %s", algo);
}

/* SHA-256 of dir/name; false when there is no such file. */
static int hash_of(char hex[65], bool *present, const char *dir, const char *name) {
    char path[PATH_BYTES];
    CQ_TRY(cq_path_join(path, sizeof path, dir, name));
    *present = cq_file_exists(path);
    return *present ? cq_sha256_file(path, hex) : CQ_OK;
}

/* Rule 10: text goes in and comes out of both models the same way. */
static int check_tokenizer(cq_verify *v) {
    static const char *const names[] = {
        "tokenizer.json",    "tokenizer_config.json",   "tokenizer.model",   "vocab.json",
        "merges.txt",        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
        "chat_template.json"};
    int equal = 0;
    bool any = false;
    if (!v->against) {
        cq_verify_add(v, false, 10,
                      "tokenizer files not compared: no folder given to hold them against");
        return CQ_OK;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char ours[65], theirs[65];
        bool here, there;
        CQ_TRY(hash_of(ours, &here, v->dir, names[i]));
        CQ_TRY(hash_of(theirs, &there, v->against, names[i]));
        any = any || here || there;
        if (here != there)
            cq_verify_add(v, true, 10, "%s: %s, wanted it in both folders or in none", names[i],
                          here ? "only in the export" : "missing in the export");
        else if (here && strcmp(ours, theirs))
            cq_verify_add(v, true, 10, "%s: sha256 is %.12s..., wanted %.12s... as in %s", names[i],
                          ours, theirs, v->against);
        else
            equal += here;
    }
    if (any && !equal)
        cq_verify_add(v, true, 10, "tokenizer.json: no tokenizer file is equal in both folders");
    if (any)
        cq_verify_add(v, false, 10, "%d tokenizer files equal those of %s", equal, v->against);
    else
        cq_verify_add(v, false, 10, "no tokenizer files, as in %s", v->against);
    return CQ_OK;
}

/* A single file needs no index; else the index must name it. */
static bool is_part(json_t *map, const char *file) {
    const char *key;
    json_t *value;
    if (!map)
        return !strcmp(file, "model.safetensors");
    json_object_foreach(map, key, value) {
        if (json_is_string(value) && !strcmp(json_string_value(value), file))
            return true;
    }
    return false;
}

/* Data bytes of a safetensors file: all but the header and its length. */
static int data_bytes(int64_t *out, const char *dir, const char *file) {
    char path[PATH_BYTES];
    uint64_t header = 0;
    cq_map map;
    CQ_TRY(cq_path_join(path, sizeof path, dir, file));
    CQ_TRY(cq_map_open(&map, path));
    for (int i = 7; i >= 0 && map.bytes >= 8; i--)
        header = header << 8 | map.data[i];
    int64_t rest = map.bytes >= 8 ? map.bytes - 8 : 0;
    *out = header <= (uint64_t)rest ? rest - (int64_t)header : 0;
    cq_map_close(&map);
    return CQ_OK;
}

/* Sums the data of the model's files; a weight file that no index names would be uploaded and never
 * read. */
static int sum_files(cq_verify *v, json_t *map, int64_t *bytes) {
    int status = CQ_OK;
    DIR *d = opendir(v->dir);
    for (struct dirent *e = d ? readdir(d) : NULL; e && !status; e = readdir(d)) {
        const char *dot = strrchr(e->d_name, '.');
        int64_t n = 0;
        if (!dot || strcmp(dot, ".safetensors"))
            continue;
        if (is_part(map, e->d_name))
            status = data_bytes(&n, v->dir, e->d_name);
        else
            cq_verify_add(v, true, 11, "%s: weight file that is not part of the model", e->d_name);
        *bytes += n;
    }
    if (d)
        closedir(d);
    return status;
}

/* Rule 11: total_size of the index, from file sizes, because the reader refuses an index that is
 * wrong. */
static int check_index(cq_verify *v) {
    char path[PATH_BYTES], text[80];
    int64_t bytes = 0;
    json_t *index = NULL;
    CQ_TRY(cq_path_join(path, sizeof path, v->dir, "model.safetensors.index.json"));
    if (cq_file_exists(path))
        CQ_TRY(cq_json_load(&index, path));
    int status = sum_files(v, json_object_get(index, "weight_map"), &bytes);
    const json_t *total = json_object_get(json_object_get(index, "metadata"), "total_size");
    if (!status && !index)
        cq_verify_add(v, false, 11, "one file of %ld data bytes, no index", (long)bytes);
    else if (!status && json_is_integer(total) && json_integer_value(total) == bytes)
        cq_verify_add(v, false, 11, "total_size is %ld, the sum of all tensors", (long)bytes);
    else if (!status)
        cq_verify_add(
            v, true, 11,
            "model.safetensors.index.json: total_size is %s, wanted %ld, the sum of all tensors",
            cq_json_text(text, sizeof text, total), (long)bytes);
    json_decref(index);
    return status;
}

/* Reads both descriptions; hf_quant_config.json decides where they differ, as in most loaders. */
static int read_descriptions(cq_verify *v) {
    char path[PATH_BYTES];
    CQ_TRY(cq_path_join(path, sizeof path, v->dir, "config.json"));
    CQ_TRY(cq_json_load(&v->config, path));
    CQ_TRY(cq_path_join(path, sizeof path, v->dir, "hf_quant_config.json"));
    if (cq_file_exists(path))
        CQ_TRY(cq_json_load(&v->quant, path));
    const json_t *config = json_object_get(v->config, "quantization_config");
    const json_t *hf = json_object_get(v->quant, "quantization");
    const json_t *algo = json_object_get(hf ? hf : config, "quant_algo");
    if (!hf && !config)
        return cq_fail(
            CQ_EDATA,
            "%s: no hf_quant_config.json and no quantization_config, wanted an NVFP4 export",
            v->dir);
    v->excluded = hf ? json_object_get(hf, "exclude_modules") : json_object_get(config, "ignore");
    v->kv_cache = json_string_value(json_object_get(hf, "kv_cache_quant_algo"));
    v->weights_only = json_is_string(algo) && !strcmp(json_string_value(algo), "W4A16_NVFP4");
    return CQ_OK;
}

static int run(cq_verify *v) {
    CQ_TRY(read_descriptions(v));
    CQ_TRY(cq_model_create(&v->expected, v->dir, CQ_F32));
    int status = cq_safetensors_open(&v->files, v->dir);
    if (status == CQ_EDATA) /* files that break the format: a finding, and no tensor to look at */
        cq_verify_add(v, true, 1, "%s", cq_error());
    else
        CQ_TRY(status ? status : cq_verify_tensors(v));
    check_exclude_list(v);
    check_descriptions(v);
    CQ_TRY(check_tokenizer(v));
    CQ_TRY(check_index(v));
    return v->out_of_memory ? cq_fail(CQ_ENOMEM, "verify: no memory for its findings") : CQ_OK;
}

int cq_verify_open(cq_verify **out, const char *dir, const char *against) {
    *out = NULL;
    cq_verify *v = calloc(1, sizeof *v);
    if (!v)
        return cq_fail(CQ_ENOMEM, "verify: no memory to check %s", dir);
    v->dir = dir;
    v->against = against;
    int status = run(v);
    /* the findings are text: nothing of the folder stays open */
    cq_model_close(v->expected);
    cq_safetensors_close(v->files);
    json_decref(v->config);
    json_decref(v->quant);
    v->expected = NULL;
    v->files = NULL;
    v->config = v->quant = NULL;
    v->excluded = NULL;
    v->kv_cache = NULL;
    if (status) {
        cq_verify_close(v);
        return status;
    }
    *out = v;
    return CQ_OK;
}

void cq_verify_close(cq_verify *v) {
    if (!v)
        return;
    for (int64_t i = 0; i < v->n; i++)
        free(v->list[i].text);
    free(v->list);
    free(v);
}

int64_t cq_verify_count(const cq_verify *v) { return v->n; }

const char *cq_verify_line(const cq_verify *v, int64_t i, bool *failed) {
    if (i < 0 || i >= v->n)
        return NULL;
    if (failed)
        *failed = v->list[i].failed;
    return v->list[i].text;
}

int64_t cq_verify_failed(const cq_verify *v) {
    int64_t n = 0;
    for (int64_t i = 0; i < v->n; i++)
        n += v->list[i].failed;
    return n;
}
