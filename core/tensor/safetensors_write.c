/// safetensors_write.c - writing safetensors files and sharded folders.
///
/// Tensors are ordered by alignment (largest element first) and then by name, as the reference
/// writer does; the header is padded with spaces to a multiple of 8. Files appear whole or not at
/// all.
#include "core/base/error.h"
#include "core/tensor/safetensors.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct item {
    char *name;
    cq_tensor tensor;
    int32_t shard;
} item;

struct cq_st_writer {
    item *items;
    int64_t n, cap;
    json_t *metadata;
};

int cq_st_writer_open(cq_st_writer **out) {
    cq_st_writer *w = calloc(1, sizeof *w);
    *out = w;
    if (!w || !(w->metadata = json_object())) {
        free(w);
        *out = NULL;
        return cq_fail(CQ_ENOMEM, "safetensors: no memory to write");
    }
    return CQ_OK;
}

void cq_st_writer_close(cq_st_writer *w) {
    if (!w)
        return;
    for (int64_t i = 0; i < w->n; i++)
        free(w->items[i].name);
    free(w->items);
    json_decref(w->metadata);
    free(w);
}

int cq_st_writer_add(cq_st_writer *w, const char *name, cq_tensor t) {
    if (!strcmp(name, "__metadata__"))
        return cq_fail(CQ_EUSAGE,
                       "safetensors: a tensor is named __metadata__, wanted another name");
    if (w->n == w->cap) {
        int64_t cap = w->cap ? 2 * w->cap : 64;
        item *more = realloc(w->items, (size_t)cap * sizeof *more);
        if (!more)
            return cq_fail(CQ_ENOMEM, "safetensors: no memory for %s", name);
        w->items = more;
        w->cap = cap;
    }
    char *copy = strdup(name);
    if (!copy)
        return cq_fail(CQ_ENOMEM, "safetensors: no memory for %s", name);
    w->items[w->n++] = (item){copy, t, 0};
    return CQ_OK;
}

int cq_st_writer_metadata(cq_st_writer *w, const char *key, const char *value) {
    return json_object_set_new(w->metadata, key, json_string(value))
               ? cq_fail(CQ_EUSAGE, "safetensors: metadata %s is not UTF-8 text", key)
               : CQ_OK;
}

/* The reference writer's order of dtypes. */
static int rank_of(cq_dtype dtype) {
    static const int rank[CQ_N_DTYPES] = {
        [CQ_U8] = 0,  [CQ_F8_E4M3] = 1, [CQ_F16] = 2, [CQ_BF16] = 3,
        [CQ_I32] = 4, [CQ_F32] = 5,     [CQ_F64] = 6, [CQ_I64] = 7};
    return rank[dtype];
}

static int by_rank(const void *a, const void *b) {
    const item *x = a, *y = b;
    int p = rank_of(x->tensor.dtype), q = rank_of(y->tensor.dtype);
    return p != q ? q - p : strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const item *)a)->name, ((const item *)b)->name);
}

static int check_names(cq_st_writer *w) {
    if (w->n)
        qsort(w->items, (size_t)w->n, sizeof *w->items, by_name);
    for (int64_t i = 1; i < w->n; i++)
        if (!strcmp(w->items[i].name, w->items[i - 1].name))
            return cq_fail(CQ_EUSAGE, "safetensors: %s is written twice", w->items[i].name);
    return CQ_OK;
}

static json_t *describe(const item *it, int64_t begin) {
    json_t *shape = json_array();
    for (int i = 0; i < it->tensor.shape.rank; i++)
        json_array_append_new(shape, json_integer(it->tensor.shape.dim[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", cq_dtype_name(it->tensor.dtype), "shape",
                     shape, "data_offsets", (json_int_t)begin,
                     (json_int_t)(begin + cq_tensor_bytes(it->tensor)));
}

/* Header text of one shard, padded; items are in by_rank order. */
static int make_header(const cq_st_writer *w, int32_t shard, char **out, int64_t *n) {
    int64_t at = 0;
    json_t *root = json_object();
    int failed = !root;
    if (!failed && json_object_size(w->metadata))
        failed = json_object_set(root, "__metadata__", w->metadata);
    for (int64_t i = 0; !failed && i < w->n; i++) {
        if (w->items[i].shard != shard)
            continue;
        failed = json_object_set_new(root, w->items[i].name, describe(&w->items[i], at));
        at += cq_tensor_bytes(w->items[i].tensor);
    }
    char *text = failed ? NULL : json_dumps(root, JSON_COMPACT);
    json_decref(root);
    size_t length = text ? strlen(text) : 0, padded = (length + 7) / 8 * 8;
    char *bigger = text ? realloc(text, padded + 1) : NULL;
    if (!bigger) {
        free(text);
        return cq_fail(CQ_EUSAGE,
                       "safetensors: a name is not UTF-8 text, or no memory for the header");
    }
    memset(bigger + length, ' ', padded - length);
    *out = bigger;
    *n = (int64_t)padded;
    return CQ_OK;
}

static int write_body(const cq_st_writer *w, int32_t shard, cq_writer *f, const char *header,
                      int64_t n) {
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)n >> (8 * i));
    CQ_TRY(cq_writer_write(f, length, 8));
    CQ_TRY(cq_writer_write(f, header, n));
    for (int64_t i = 0; i < w->n; i++)
        if (w->items[i].shard == shard)
            CQ_TRY(
                cq_writer_write(f, w->items[i].tensor.data, cq_tensor_bytes(w->items[i].tensor)));
    return CQ_OK;
}

static int write_shard(const cq_st_writer *w, int32_t shard, const char *path) {
    char *header = NULL;
    int64_t n = 0;
    cq_writer *f = NULL;
    CQ_TRY(make_header(w, shard, &header, &n));
    int status = cq_writer_open(&f, path);
    if (!status) {
        status = write_body(w, shard, f, header, n);
        if (status)
            cq_writer_abort(f);
        else
            status = cq_writer_commit(f);
    }
    free(header);
    return status;
}

int cq_st_writer_file(cq_st_writer *w, const char *path) {
    CQ_TRY(check_names(w));
    for (int64_t i = 0; i < w->n; i++)
        w->items[i].shard = 0;
    if (w->n)
        qsort(w->items, (size_t)w->n, sizeof *w->items, by_rank);
    return write_shard(w, 0, path);
}

/* Fills shards in name order; returns how many. */
static int32_t assign_shards(cq_st_writer *w, int64_t shard_bytes) {
    int64_t used = 0;
    int32_t shard = 0;
    for (int64_t i = 0; i < w->n; i++) {
        int64_t bytes = cq_tensor_bytes(w->items[i].tensor);
        if (shard_bytes > 0 && used > 0 && used + bytes > shard_bytes) {
            shard++;
            used = 0;
        }
        w->items[i].shard = shard;
        used += bytes;
    }
    return shard + 1;
}

static int write_index(const cq_st_writer *w, const char *folder, int32_t shards) {
    char path[4096], file[64];
    int64_t total = 0;
    json_t *map = json_object();
    for (int64_t i = 0; i < w->n; i++) {
        snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", (int)w->items[i].shard + 1,
                 (int)shards);
        json_object_set_new(map, w->items[i].name, json_string(file));
        total += cq_tensor_bytes(w->items[i].tensor);
    }
    json_t *root =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    char *text = root ? json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    json_decref(root);
    if (!text)
        return cq_fail(CQ_ENOMEM, "safetensors: no memory for the index");
    int status = cq_path_join(path, sizeof path, folder, "model.safetensors.index.json");
    if (!status)
        status = cq_file_write(path, text, (int64_t)strlen(text));
    free(text);
    return status;
}

int cq_st_writer_folder(cq_st_writer *w, const char *folder, int64_t shard_bytes) {
    char path[4096], file[64];
    CQ_TRY(check_names(w));
    int32_t shards = assign_shards(w, shard_bytes);
    if (w->n)
        qsort(w->items, (size_t)w->n, sizeof *w->items, by_rank);
    for (int32_t i = 0; i < shards; i++) {
        snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", (int)i + 1, (int)shards);
        CQ_TRY(cq_path_join(path, sizeof path, folder, shards == 1 ? "model.safetensors" : file));
        CQ_TRY(write_shard(w, i, path));
    }
    return shards == 1 ? CQ_OK : write_index(w, folder, shards);
}
