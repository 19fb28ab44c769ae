/// safetensors.c - strict reader of safetensors files and sharded folders.
///
/// Layout: u64 little-endian header length, JSON header, data. Nothing is allocated from a number
/// in the file before that number is checked against the file's size; tensors must cover the data
/// without hole or overlap. Data is used where it lies in the map, except a tensor that lies at an
/// odd address for its dtype: that one is copied, so that callers may read every tensor through a
/// plain pointer.
#include "core/tensor/safetensors.h"
#include "core/base/error.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { HEADER_MAX = 100000000, NEST_MAX = 3, RANK_MAX = 4 };

typedef struct shard {
    char *path;
    cq_map map;
    json_t *metadata;
} shard;

struct cq_safetensors {
    shard *shards;
    int32_t n_shards;
    cq_entry *entries;
    int64_t n_entries, cap_entries;
};

/// Where an entry's data begins in its file, or -1 for a copy.
static int64_t begin_of(const cq_safetensors *st, const cq_entry *e) {
    const cq_map *m = &st->shards[e->shard].map;
    uintptr_t at = (uintptr_t)e->tensor.data, from = (uintptr_t)m->data;
    return at >= from && at - from <= (uintptr_t)m->bytes ? (int64_t)(at - from) : -1;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const cq_entry *)a)->name, ((const cq_entry *)b)->name);
}

/* What jansson would take and the format does not: other values than strings, objects, arrays and
 * digits, and levels beyond the third. Checked before parsing, because a small text of brackets
 * grows fiftyfold as a tree. */
static int check_text(const char *path, const char *text, int64_t n) {
    int depth = 0;
    bool quoted = false;
    for (int64_t i = 0; i < n; i++) {
        char c = text[i];
        if (quoted) {
            if (c == '\\')
                i++;
            else if (c == '"')
                quoted = false;
        } else if (c == '"')
            quoted = true;
        else if (c == '{' || c == '[') {
            if (++depth > NEST_MAX)
                return cq_fail(CQ_EDATA, "%s: the header nests deeper than %d levels", path,
                               NEST_MAX);
        } else if (c == '}' || c == ']')
            depth--;
        else if (!c || !strchr(":,0123456789 \t\r\n", c))
            return cq_fail(CQ_EDATA,
                           "%s: '%c' (0x%02x) at byte %ld of the header, wanted strings, objects, "
                           "lists and non-negative integers",
                           path, c ? c : ' ', (unsigned char)c, (long)i);
    }
    return CQ_OK;
}

static int json_fail(const char *path, const char *what, const json_error_t *error) {
    if (json_error_code(error) == json_error_out_of_memory)
        return cq_fail(CQ_ENOMEM, "%s: no memory to parse %s", path, what);
    return cq_fail(CQ_EDATA, "%s: %s is not valid JSON: line %d: %s", path, what, error->line,
                   error->text);
}

static int parse_header(json_t **out, int64_t *data_at, const shard *s) {
    uint64_t n = 0;
    json_error_t error;
    if (s->map.bytes < 8)
        return cq_fail(CQ_EDATA, "%s: %ld bytes long, wanted at least the 8 of a header length",
                       s->path, (long)s->map.bytes);
    for (int i = 7; i >= 0; i--)
        n = n << 8 | s->map.data[i];
    if (n > HEADER_MAX)
        return cq_fail(CQ_EDATA, "%s: header length is %llu, wanted at most %d", s->path,
                       (unsigned long long)n, HEADER_MAX);
    if ((int64_t)n > s->map.bytes - 8)
        return cq_fail(CQ_EDATA,
                       "%s: header length is %llu, wanted at most the %ld bytes that follow",
                       s->path, (unsigned long long)n, (long)(s->map.bytes - 8));
    const char *text = (const char *)s->map.data + 8;
    if (n == 0 || text[0] != '{')
        return cq_fail(CQ_EDATA, "%s: the header %s, wanted { first", s->path,
                       n == 0 ? "is empty" : "does not begin with {");
    CQ_TRY(check_text(s->path, text, (int64_t)n));
    size_t end = n;
    while (end > 0 && text[end - 1] == ' ')
        end--;
    if (text[end - 1] != '}')
        return cq_fail(CQ_EDATA, "%s: the header ends in 0x%02x, wanted } and spaces", s->path,
                       (unsigned char)text[end - 1]);
    json_t *root = json_loadb(text, end, JSON_REJECT_DUPLICATES, &error);
    if (!root)
        return json_fail(s->path, "the header", &error);
    *out = root;
    *data_at = 8 + (int64_t)n;
    return CQ_OK;
}

static int read_int(const shard *s, const char *name, const char *what, const json_t *v,
                    int64_t *out) {
    if (!json_is_integer(v))
        return cq_fail(CQ_EDATA, "%s: %s of %.200s is not a non-negative integer", s->path, what,
                       name);
    *out = json_integer_value(v);
    return CQ_OK;
}

static int read_shape(const shard *s, const char *name, const json_t *list, cq_shape *out) {
    if (!json_is_array(list))
        return cq_fail(CQ_EDATA, "%s: shape of %.200s is not a list", s->path, name);
    if (json_array_size(list) > RANK_MAX)
        return cq_fail(CQ_EDATA, "%s: %.200s has rank %zu, wanted at most %d", s->path, name,
                       json_array_size(list), RANK_MAX);
    *out = (cq_shape){.rank = (int32_t)json_array_size(list)};
    for (int i = 0; i < out->rank; i++)
        CQ_TRY(read_int(s, name, "shape", json_array_get(list, (size_t)i), &out->dim[i]));
    return CQ_OK;
}

static int shape_bytes(const shard *s, const char *name, cq_dtype dtype, cq_shape shape,
                       int64_t *out) {
    char prefix[512];
    if (cq_shape_bytes(out, shape, dtype) == CQ_OK)
        return CQ_OK;
    snprintf(prefix, sizeof prefix, "%.250s: %.200s", s->path, name);
    return cq_fail_in(CQ_EDATA, prefix);
}

static int read_entry(cq_safetensors *st, int32_t at, int64_t data_at, const char *name,
                      const json_t *v) {
    const shard *s = &st->shards[at];
    cq_entry *e = &st->entries[st->n_entries];
    const char *dtype = json_string_value(json_object_get(v, "dtype"));
    const json_t *offsets = json_object_get(v, "data_offsets");
    int64_t begin = 0, end = 0, bytes = 0, data = s->map.bytes - data_at;
    if (!json_is_object(v) || json_object_size(v) != 3 || !dtype || !json_is_array(offsets) ||
        json_array_size(offsets) != 2)
        return cq_fail(CQ_EDATA, "%s: %.200s has not exactly dtype, shape and two data_offsets",
                       s->path, name);
    *e = (cq_entry){.shard = at};
    if (!cq_dtype_find(&e->tensor.dtype, dtype))
        return cq_fail(CQ_EDATA, "%s: %.200s has unknown dtype %.40s", s->path, name, dtype);
    CQ_TRY(read_shape(s, name, json_object_get(v, "shape"), &e->tensor.shape));
    CQ_TRY(shape_bytes(s, name, e->tensor.dtype, e->tensor.shape, &bytes));
    CQ_TRY(read_int(s, name, "data_offsets", json_array_get(offsets, 0), &begin));
    CQ_TRY(read_int(s, name, "data_offsets", json_array_get(offsets, 1), &end));
    if (end < begin || end > data)
        return cq_fail(
            CQ_EDATA,
            "%s: %.200s lies at bytes %ld to %ld, wanted a range within the %ld of the file's data",
            s->path, name, (long)begin, (long)end, (long)data);
    if (end - begin != bytes)
        return cq_fail(CQ_EDATA, "%s: %.200s has %ld bytes, wanted %ld for its shape and dtype",
                       s->path, name, (long)(end - begin), (long)bytes);
    e->tensor.data = (void *)(s->map.data + data_at + begin);
    e->name = strdup(name);
    if (!e->name)
        return cq_fail(CQ_ENOMEM, "%s: no memory for its names", s->path);
    st->n_entries++;
    return CQ_OK;
}

static int by_place(const void *a, const void *b) {
    const cq_tensor *x = &((const cq_entry *)a)->tensor, *y = &((const cq_entry *)b)->tensor;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    int64_t p = cq_tensor_bytes(*x), q = cq_tensor_bytes(*y);
    return p < q ? -1 : p > q;
}

/* No hole, no overlap, nothing after the last tensor. */
static int check_cover(cq_safetensors *st, int32_t at, int64_t first, int64_t data_at) {
    const shard *s = &st->shards[at];
    int64_t next = data_at;
    if (st->n_entries > first)
        qsort(st->entries + first, (size_t)(st->n_entries - first), sizeof *st->entries, by_place);
    for (int64_t i = first; i < st->n_entries; i++) {
        int64_t begin = begin_of(st, &st->entries[i]);
        if (begin != next)
            return cq_fail(
                CQ_EDATA,
                "%s: %.200s begins at byte %ld of the data, wanted %ld (no hole, no overlap)",
                s->path, st->entries[i].name, (long)(begin - data_at), (long)(next - data_at));
        next += cq_tensor_bytes(st->entries[i].tensor);
    }
    if (next != s->map.bytes)
        return cq_fail(CQ_EDATA, "%s: %ld bytes long, wanted %ld for its tensors", s->path,
                       (long)s->map.bytes, (long)next);
    return CQ_OK;
}

static int check_metadata(const shard *s) {
    const char *key;
    json_t *value;
    if (s->metadata && !json_is_object(s->metadata))
        return cq_fail(CQ_EDATA, "%s: __metadata__ is not a map of strings", s->path);
    json_object_foreach(s->metadata, key, value) {
        if (!json_is_string(value))
            return cq_fail(CQ_EDATA, "%s: __metadata__ entry %.200s is not a string", s->path, key);
    }
    return CQ_OK;
}

static int read_entries(cq_safetensors *st, int32_t at, json_t *root, int64_t data_at) {
    shard *s = &st->shards[at];
    const char *name;
    json_t *value;
    int64_t first = st->n_entries, need = first + (int64_t)json_object_size(root);
    if (need > st->cap_entries) {
        cq_entry *more = realloc(st->entries, (size_t)need * sizeof *more);
        if (!more)
            return cq_fail(CQ_ENOMEM, "%s: no memory for its tensor list", s->path);
        st->entries = more;
        st->cap_entries = need;
    }
    json_object_foreach(root, name, value) {
        if (!strcmp(name, "__metadata__")) {
            s->metadata = json_incref(value);
            continue;
        }
        CQ_TRY(read_entry(st, at, data_at, name, value));
    }
    CQ_TRY(check_metadata(s));
    return check_cover(st, at, first, data_at);
}

static int add_shard(cq_safetensors *st, const char *path) {
    shard *more = realloc(st->shards, (size_t)(st->n_shards + 1) * sizeof *more);
    json_t *root = NULL;
    int64_t data_at = 0;
    if (!more)
        return cq_fail(CQ_ENOMEM, "%s: no memory to open it", path);
    st->shards = more;
    shard *s = &st->shards[st->n_shards];
    *s = (shard){.path = strdup(path)};
    if (!s->path)
        return cq_fail(CQ_ENOMEM, "%s: no memory to open it", path);
    st->n_shards++;
    int status = cq_map_open(&s->map, path);
    if (status)
        return status == CQ_EIO ? cq_fail_in(CQ_EDATA, "checkpoint") : status;
    CQ_TRY(parse_header(&root, &data_at, s));
    status = read_entries(st, st->n_shards - 1, root, data_at);
    json_decref(root);
    return status;
}

/// Copies what lies at an odd address; the map stays the owner of all the rest.
static int align_entry(const cq_safetensors *st, cq_entry *e) {
    uintptr_t unit = (uintptr_t)cq_dtype_bytes(e->tensor.dtype);
    int64_t bytes = cq_tensor_bytes(e->tensor);
    if (bytes == 0 || (uintptr_t)e->tensor.data % unit == 0)
        return CQ_OK;
    void *copy = malloc((size_t)bytes);
    if (!copy)
        return cq_fail(CQ_ENOMEM, "%s: no memory for a copy of %.200s, which is not aligned",
                       cq_safetensors_path(st, e), e->name);
    memcpy(copy, e->tensor.data, (size_t)bytes);
    e->tensor.data = copy;
    return CQ_OK;
}

static int finish(cq_safetensors *st) {
    if (st->n_entries)
        qsort(st->entries, (size_t)st->n_entries, sizeof *st->entries, by_name);
    for (int64_t i = 1; i < st->n_entries; i++)
        if (!strcmp(st->entries[i].name, st->entries[i - 1].name))
            return cq_fail(CQ_EDATA, "%s: %.200s is in two shards",
                           cq_safetensors_path(st, &st->entries[i]), st->entries[i].name);
    for (int64_t i = 0; i < st->n_entries; i++)
        CQ_TRY(align_entry(st, &st->entries[i]));
    return CQ_OK;
}

/* The shards named by an index, each once, in order of their names. */
static int open_shards(cq_safetensors *st, const char *dir, const char *index, const json_t *map) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)map, name, value) {
        const char *file = json_string_value(value);
        char path[4096];
        bool known = false;
        if (!file || !*file || strchr(file, '/') || !strcmp(file, "..") || !strcmp(file, "."))
            return cq_fail(CQ_EDATA, "%s: the file of %.200s is not a plain file name", index,
                           name);
        CQ_TRY(cq_path_join(path, sizeof path, dir, file));
        for (int32_t i = 0; i < st->n_shards; i++)
            known = known || !strcmp(st->shards[i].path, path);
        if (!known)
            CQ_TRY(add_shard(st, path));
    }
    return CQ_OK;
}

static int check_index(const cq_safetensors *st, const char *index, const json_t *root,
                       const json_t *map) {
    int64_t total = 0;
    const json_t *size = json_object_get(json_object_get(root, "metadata"), "total_size");
    for (int64_t i = 0; i < st->n_entries; i++) {
        const cq_entry *e = &st->entries[i];
        const char *file = json_string_value(json_object_get(map, e->name));
        const char *path = cq_safetensors_path(st, e), *slash = strrchr(path, '/');
        total += cq_tensor_bytes(e->tensor);
        if (!file || strcmp(file, slash ? slash + 1 : path))
            return cq_fail(CQ_EDATA, "%s: says %.200s is in %.200s, found it in %s", index, e->name,
                           file ? file : "no file", path);
    }
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)map, name, value) {
        if (!cq_safetensors_find(st, name))
            return cq_fail(CQ_EDATA, "%s: says %.200s is in %.200s, where it is not", index, name,
                           json_string_value(value));
    }
    /* some writers store the size as a real number */
    if (size && (!json_is_number(size) || json_number_value(size) != (double)total ||
                 (json_is_integer(size) && json_integer_value(size) != total)))
        return cq_fail(CQ_EDATA, "%s: total_size is %.17g, wanted %ld", index,
                       json_number_value(size), (long)total);
    return CQ_OK;
}

static int open_index(cq_safetensors *st, const char *dir, const char *index) {
    char *text = NULL;
    int64_t bytes;
    json_error_t error;
    CQ_TRY(cq_file_read(&text, &bytes, index));
    json_t *root = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root)
        return json_fail(index, "it", &error);
    const json_t *map = json_object_get(root, "weight_map");
    int status = json_is_object(map) && json_object_size(map)
                     ? open_shards(st, dir, index, map)
                     : cq_fail(CQ_EDATA, "%s: has no weight_map with entries", index);
    if (!status)
        status = finish(st);
    if (!status)
        status = check_index(st, index, root, map);
    json_decref(root);
    return status;
}

/* Both layouts in one folder: the single file wins, as in transformers. */
static int open_folder(cq_safetensors *st, const char *dir) {
    char single[4096], index[4096];
    CQ_TRY(cq_path_join(single, sizeof single, dir, "model.safetensors"));
    CQ_TRY(cq_path_join(index, sizeof index, dir, "model.safetensors.index.json"));
    if (cq_file_exists(single)) {
        CQ_TRY(add_shard(st, single));
        return finish(st);
    }
    if (!cq_file_exists(index))
        return cq_fail(CQ_EDATA,
                       "%s: holds neither model.safetensors nor model.safetensors.index.json", dir);
    return open_index(st, dir, index);
}

int cq_safetensors_open(cq_safetensors **out, const char *path) {
    struct stat info;
    cq_safetensors *st = calloc(1, sizeof *st);
    *out = NULL;
    if (!st)
        return cq_fail(CQ_ENOMEM, "%s: no memory to open it", path);
    int status;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        status = open_folder(st, path);
    else {
        status = add_shard(st, path);
        if (!status)
            status = finish(st);
    }
    if (status) {
        cq_safetensors_close(st);
        return status;
    }
    *out = st;
    return CQ_OK;
}

void cq_safetensors_close(cq_safetensors *st) {
    if (!st)
        return;
    for (int64_t i = 0; i < st->n_entries; i++) {
        if (begin_of(st, &st->entries[i]) < 0)
            free(st->entries[i].tensor.data);
        free(st->entries[i].name);
    }
    for (int32_t i = 0; i < st->n_shards; i++) {
        cq_map_close(&st->shards[i].map);
        json_decref(st->shards[i].metadata);
        free(st->shards[i].path);
    }
    free(st->entries);
    free(st->shards);
    free(st);
}

int64_t cq_safetensors_count(const cq_safetensors *st) { return st->n_entries; }
const cq_entry *cq_safetensors_at(const cq_safetensors *st, int64_t i) {
    return i >= 0 && i < st->n_entries ? &st->entries[i] : NULL;
}
const cq_entry *cq_safetensors_find(const cq_safetensors *st, const char *name) {
    cq_entry key = {.name = (char *)name};
    return st->n_entries ? bsearch(&key, st->entries, (size_t)st->n_entries, sizeof key, by_name)
                         : NULL;
}
const char *cq_safetensors_path(const cq_safetensors *st, const cq_entry *e) {
    return st->shards[e->shard].path;
}
const char *cq_safetensors_metadata(const cq_safetensors *st, const char *key) {
    return st->n_shards ? json_string_value(json_object_get(st->shards[0].metadata, key)) : NULL;
}
void cq_safetensors_drop(const cq_safetensors *st, const cq_entry *e) {
    int64_t begin = begin_of(st, e);
    if (begin >= 0)
        cq_map_drop(&st->shards[e->shard].map, begin, cq_tensor_bytes(e->tensor));
}

void cq_safetensors_forget(const cq_safetensors *st, const cq_entry *e) {
    int64_t begin = begin_of(st, e);
    cq_safetensors_drop(st, e);
    if (begin >= 0)
        cq_file_forget(cq_safetensors_path(st, e), begin, cq_tensor_bytes(e->tensor));
}
