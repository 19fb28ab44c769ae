/// safetensors_write.c - writing safetensors files and sharded folders.
///
/// Tensors are ordered by alignment (largest element first) and then by name, as the reference
/// writer does; the header is padded with spaces to a multiple of 8. Files appear whole or not at
/// all.
#include "core/base/error.h"
#include "core/tensor/safetensors_impl.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HEADER_MAX = 100000000 };

int cq_st_writer_open(cq_st_writer **out) {
    cq_st_writer *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!w || !(w->metadata = json_object()) || !(w->names = json_object())) {
        cq_st_writer_close(w);
        return cq_fail(CQ_ENOMEM, "safetensors: no memory to write");
    }
    *out = w;
    return CQ_OK;
}

void cq_st_writer_close(cq_st_writer *w) {
    if (!w)
        return;
    for (int64_t i = 0; i < w->n; i++)
        free(w->items[i].name);
    free(w->items);
    json_decref(w->metadata);
    json_decref(w->names);
    free(w);
}

/* Everything that could make the file unreadable is refused here, where the caller knows the
 * tensor. */
static int check_tensor(const cq_st_writer *w, const char *name, cq_tensor t) {
    int64_t bytes;
    if (!strcmp(name, "__metadata__"))
        return cq_fail(CQ_EUSAGE,
                       "safetensors: a tensor is named __metadata__, wanted another name");
    if (json_object_get(w->names, name))
        return cq_fail(CQ_EUSAGE, "safetensors: %.200s is added twice", name);
    if (cq_dtype_bytes(t.dtype) == 0)
        return cq_fail(CQ_EUSAGE, "safetensors: %.200s has dtype %d", name, (int)t.dtype);
    int status = cq_shape_bytes(&bytes, t.shape, t.dtype);
    return status ? cq_fail_in(status, name) : CQ_OK;
}

int cq_st_writer_announce(cq_st_writer *w, const char *name, cq_dtype dtype, cq_shape shape) {
    cq_tensor t = {NULL, shape, dtype};
    CQ_TRY(check_tensor(w, name, t));
    if (w->n == w->cap) {
        int64_t cap = w->cap ? 2 * w->cap : 64;
        cq_st_item *more = realloc(w->items, (size_t)cap * sizeof *more);
        if (!more)
            return cq_fail(CQ_ENOMEM, "safetensors: no memory for %.200s", name);
        w->items = more;
        w->cap = cap;
    }
    char *copy = strdup(name);
    if (!copy || json_object_set_new(w->names, name, json_null())) {
        free(copy);
        return copy ? cq_fail(CQ_EUSAGE, "safetensors: name %.200s is not UTF-8 text", name)
                    : cq_fail(CQ_ENOMEM, "safetensors: no memory for %.200s", name);
    }
    w->items[w->n++] = (cq_st_item){copy, t, 0, 0};
    return CQ_OK;
}

int cq_st_writer_add(cq_st_writer *w, const char *name, cq_tensor t) {
    CQ_TRY(check_tensor(w, name, t));
    if (cq_tensor_bytes(t) > 0 && !t.data)
        return cq_fail(CQ_EUSAGE, "safetensors: %.200s has no data", name);
    CQ_TRY(cq_st_writer_announce(w, name, t.dtype, t.shape));
    w->items[w->n - 1].tensor = t;
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
    const cq_st_item *x = a, *y = b;
    int p = rank_of(x->tensor.dtype), q = rank_of(y->tensor.dtype);
    return p != q ? q - p : strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const cq_st_item *)a)->name, ((const cq_st_item *)b)->name);
}

static json_t *describe(const cq_st_item *it, int64_t begin) {
    int failed = 0;
    json_t *shape = json_array();
    for (int i = 0; i < it->tensor.shape.rank; i++)
        failed |= json_array_append_new(shape, json_integer(it->tensor.shape.dim[i]));
    if (failed) {
        json_decref(shape);
        return NULL;
    }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", cq_dtype_name(it->tensor.dtype), "shape",
                     shape, "data_offsets", (json_int_t)begin,
                     (json_int_t)(begin + cq_tensor_bytes(it->tensor)));
}

/* JSON of one shard; items are in by_rank order. NULL: no memory. */
static char *header_text(const cq_st_writer *w, int32_t shard) {
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
    return text;
}

/* The same, padded to a multiple of 8, so that the data that follows is aligned. */
int cq_st_header(const cq_st_writer *w, int32_t shard, char **out, int64_t *n) {
    char *text = header_text(w, shard);
    size_t length = text ? strlen(text) : 0, padded = (length + 7) / 8 * 8;
    char *bigger = text ? realloc(text, padded + 1) : NULL;
    if (!bigger || padded > HEADER_MAX) {
        free(bigger ? bigger : text);
        return bigger ? cq_fail(CQ_EUSAGE,
                                "safetensors: the header is %zu bytes long, wanted at most %d",
                                padded, HEADER_MAX)
                      : cq_fail(CQ_ENOMEM, "safetensors: no memory for the header");
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
    CQ_TRY(cq_st_header(w, shard, &header, &n));
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
    if (w->n)
        qsort(w->items, (size_t)w->n, sizeof *w->items, by_name);
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

int32_t cq_st_layout(cq_st_writer *w, int64_t shard_bytes) {
    int32_t shards = assign_shards(w, shard_bytes);
    if (w->n)
        qsort(w->items, (size_t)w->n, sizeof *w->items, by_rank);
    return shards;
}

int cq_st_shard_path(char *out, size_t size, const char *folder, int32_t shard, int32_t shards) {
    char file[64];
    snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", (int)shard + 1, (int)shards);
    return cq_path_join(out, size, folder, shards == 1 ? "model.safetensors" : file);
}

int cq_st_index(const cq_st_writer *w, const char *folder, int32_t shards) {
    char path[4096], file[64];
    int64_t total = 0;
    json_t *map = json_object();
    int failed = !map;
    for (int64_t i = 0; i < w->n; i++) {
        snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", (int)w->items[i].shard + 1,
                 (int)shards);
        failed |= json_object_set_new(map, w->items[i].name, json_string(file));
        total += cq_tensor_bytes(w->items[i].tensor);
    }
    json_t *root =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    char *text = root && !failed ? json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
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
    char path[4096], stale[4096];
    int32_t shards = cq_st_layout(w, shard_bytes);
    for (int32_t i = 0; i < shards; i++) {
        CQ_TRY(cq_st_shard_path(path, sizeof path, folder, i, shards));
        CQ_TRY(write_shard(w, i, path));
    }
    if (shards > 1)
        CQ_TRY(cq_st_index(w, folder, shards));
    /* the other layout, left by an earlier write, would be read in its place or beside it */
    CQ_TRY(cq_path_join(stale, sizeof stale, folder,
                        shards > 1 ? "model.safetensors" : "model.safetensors.index.json"));
    if (unlink(stale) && errno != ENOENT)
        return cq_fail(CQ_EIO, "%s: %s", stale, strerror(errno));
    return CQ_OK;
}
