/// cached.c - a file that a teacher left, checked and unpacked.
///
/// The file is mapped, and what kernels read is read where it lies. Nothing in it is trusted:
/// shapes fit each other and the micro-batch, ids are below the vocabulary, before anything is
/// handed out.
#include "core/train/cached.h"
#include "core/base/error.h"
#include "core/base/hash.h"
#include "core/tensor/device.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

void cq_cached_hash(char hex[65], const cq_batch *b) {
    cq_sha256 h;
    cq_sha256_init(&h);
    cq_sha256_add(&h, b->ids, (size_t)b->tokens * sizeof *b->ids);
    cq_sha256_add(&h, b->labels, (size_t)b->tokens * sizeof *b->labels);
    cq_sha256_add(&h, b->starts, (size_t)(b->n_docs + 1) * sizeof *b->starts);
    cq_sha256_hex(&h, hex);
}

void cq_cached_at(int32_t *at, const cq_batch *b) {
    int32_t n = 0;
    for (int64_t i = 0; i < b->tokens; i++)
        at[i] = b->labels[i] >= 0 ? n++ : -1;
}

int cq_cached_plan(cq_cached_room *room, cq_plan *p, int64_t tokens, int64_t chunk, int64_t k,
                   cq_dtype dtype) {
    free(room->host_at);
    if (!(room->host_at = calloc((size_t)tokens, sizeof *room->host_at)))
        return cq_fail(CQ_ENOMEM, "cache: no memory for its rows");
    if (!cq_plan_on_device(p))
        return CQ_OK;
    CQ_TRY(cq_plan_add(p, &room->ids, CQ_FOR_LOGITS, "cached ids", CQ_I32, CQ_SHAPE2(chunk, k)));
    CQ_TRY(cq_plan_add(p, &room->log_p, CQ_FOR_LOGITS, "cached log-probabilities", dtype,
                       CQ_SHAPE2(chunk, k)));
    CQ_TRY(cq_plan_add(p, &room->log_tail, CQ_FOR_LOGITS, "tails", dtype, CQ_SHAPE1(chunk)));
    CQ_TRY(cq_plan_add(p, &room->log_label, CQ_FOR_LOGITS, "labels", dtype, CQ_SHAPE1(chunk)));
    return cq_plan_add(p, &room->at, CQ_FOR_LOGITS, "cached rows", CQ_I32, CQ_SHAPE1(chunk));
}

void cq_cached_room_close(cq_cached_room *room) { free(room->host_at); }

/* Rows [first, first + n) of an array in the file: there, or copied to the device. */
static int chunk_of(const void **out, const cq_tensor *room, const void *from, int64_t first,
                    int64_t n, int64_t row_bytes) {
    const char *at = (const char *)from + first * row_bytes;
    *out = room->data ? room->data : (const void *)at;
    return room->data ? cq_copy(room->data, at, n * row_bytes) : CQ_OK;
}

int cq_cached_chunk(cq_kl_cached_args *a, const cq_cached_room *room, const cq_cached *c,
                    const cq_batch *b, int64_t begin, int64_t n) {
    int32_t *at = room->host_at + begin;
    int64_t first = 0, valid = 0, size = cq_dtype_bytes(a->dtype);
    for (int64_t i = 0; i < begin; i++)
        first += b->labels[i] >= 0;
    for (int64_t i = 0; i < n; i++)
        at[i] = b->labels[begin + i] >= 0 ? (int32_t)valid++ : 0;
    const void *ids, *rows;
    CQ_TRY(chunk_of(&ids, &room->ids, c->ids, first, valid, 4 * c->k));
    CQ_TRY(chunk_of(&a->log_p, &room->log_p, c->log_p, first, valid, c->k * (c->half ? 2 : size)));
    CQ_TRY(chunk_of(&a->log_tail, &room->log_tail, c->log_tail, first, valid, size));
    CQ_TRY(chunk_of(&a->log_label, &room->log_label, c->log_label, first, valid, size));
    CQ_TRY(chunk_of(&rows, &room->at, at, 0, n, 4));
    a->ids = ids;
    a->at = rows;
    a->k = c->k;
    a->half = c->half;
    return CQ_OK;
}

void cq_cached_close(cq_cached *c) {
    cq_safetensors_close(c->st);
    *c = (cq_cached){0};
}

/* One tensor; dimensions of -1 are taken as they are and written back. */
static int take(const cq_cached *c, const char *name, cq_dtype dtype, int rank, int64_t *rows,
                int64_t *cols, const void *out) {
    const cq_entry *e = cq_safetensors_find(c->st, name);
    char found[96];
    if (!e)
        return cq_fail(CQ_EDATA, "%s: tensor %s is missing", c->path, name);
    const cq_tensor *t = &e->tensor;
    cq_shape wanted = rank == 2 ? CQ_SHAPE2(*rows, *cols) : CQ_SHAPE1(*rows);
    for (int i = 0; i < rank && t->shape.rank == rank; i++)
        if (wanted.dim[i] < 0)
            wanted.dim[i] = t->shape.dim[i];
    if (t->dtype != dtype || !cq_shape_equal(t->shape, wanted)) {
        char text[96];
        return cq_fail(CQ_EDATA, "%s: %s is %s %s, wanted %s %s", c->path, name,
                       cq_dtype_name(t->dtype), cq_shape_text(found, sizeof found, t->shape),
                       cq_dtype_name(dtype), cq_shape_text(text, sizeof text, wanted));
    }
    *rows = wanted.dim[0];
    if (rank == 2)
        *cols = wanted.dim[1];
    memcpy((void *)(uintptr_t)out, &t->data, sizeof t->data);
    return CQ_OK;
}

static int check_hash(const cq_cached *c, const cq_batch *b) {
    const char *found = cq_safetensors_metadata(c->st, "batch");
    char wanted[65];
    cq_cached_hash(wanted, b);
    if (!found || strcmp(found, wanted))
        return cq_fail(CQ_EDATA,
                       "%s: is of the micro-batch %.12s, wanted %.12s, which the run makes of its "
                       "documents",
                       c->path, found ? found : "(none)", wanted);
    return CQ_OK;
}

static int check_ids(const cq_cached *c, int64_t n, int64_t vocab) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++)
        most = (uint32_t)c->ids[i] > most ? (uint32_t)c->ids[i] : most;
    return n == 0 || most < (uint64_t)vocab
               ? CQ_OK
               : cq_fail(CQ_EDATA, "%s: holds token %d, wanted ids below %ld", c->path,
                         (int)(int32_t)most, (long)vocab);
}

static int read_tensors(cq_cached *c, const cq_batch *b, cq_dtype dtype, int64_t vocab) {
    const cq_entry *log_p = cq_safetensors_find(c->st, "log_p");
    int64_t valid = b->valid, sum = 0;
    c->half = log_p && log_p->tensor.dtype == CQ_F16;
    cq_dtype storage = c->half ? CQ_F16 : dtype;
    c->k = c->n_rows = c->n_groups = c->n_taps = -1;
    CQ_TRY(take(c, "ids", CQ_I32, 2, &valid, &c->k, &c->ids));
    if (c->k < 1 || c->k > vocab)
        return cq_fail(CQ_EDATA, "%s: holds %ld entries a token, wanted 1 to %ld", c->path,
                       (long)c->k, (long)vocab);
    CQ_TRY(check_ids(c, valid * c->k, vocab));
    CQ_TRY(take(c, "log_p", storage, 2, &valid, &c->k, &c->log_p));
    CQ_TRY(take(c, "log_tail", dtype, 1, &valid, NULL, &c->log_tail));
    CQ_TRY(take(c, "log_label", dtype, 1, &valid, NULL, &c->log_label));
    CQ_TRY(take(c, "rows", CQ_I32, 1, &c->n_rows, NULL, &c->rows));
    CQ_TRY(take(c, "groups", CQ_I32, 1, &c->n_groups, NULL, &c->groups));
    CQ_TRY(take(c, "taps", CQ_I32, 1, &c->n_taps, NULL, &c->taps));
    for (int64_t g = 0; g < c->n_groups; g++) {
        int64_t n = c->groups[g];
        if (n < 0 || n > c->n_rows - sum)
            return cq_fail(CQ_EDATA, "%s: its groups hold more than its %ld rows", c->path,
                           (long)c->n_rows);
        sum += n;
        c->triangles += n < 4 ? 0 : n * (n + 1) / 2;
    }
    CQ_TRY(take(c, "exponents", CQ_I32, 2, &c->n_taps, &c->n_groups, &c->exponents));
    return take(c, "grams", storage, 2, &c->n_taps, &c->triangles, &c->grams);
}

int cq_cached_open(cq_cached *c, const char *path, const cq_batch *b, cq_dtype dtype,
                   int64_t vocab) {
    *c = (cq_cached){0};
    if (strlen(path) >= sizeof c->path)
        return cq_fail(CQ_EUSAGE, "%.80s...: the path is too long", path);
    strcpy(c->path, path);
    CQ_TRY(cq_safetensors_open(&c->st, path));
    int status = check_hash(c, b);
    if (!status)
        status = read_tensors(c, b, dtype, vocab);
    if (status)
        cq_cached_close(c);
    return status;
}

int cq_cached_check_rows(const cq_cached *c, const int32_t *rows, int64_t n) {
    if (c->n_rows != n)
        return cq_fail(CQ_EDATA, "%s: holds %ld sampled rows, the run wants %ld", c->path,
                       (long)c->n_rows, (long)n);
    if (n && memcmp(c->rows, rows, (size_t)n * sizeof *rows))
        return cq_fail(CQ_EDATA, "%s: its %ld rows were sampled with another seed", c->path,
                       (long)n);
    return CQ_OK;
}

/* Sets element (i, j) and its mirror image. */
static void put(void *gram, cq_dtype dtype, int64_t n, int64_t i, int64_t j, double x) {
    if (dtype == CQ_F64)
        ((double *)gram)[i * n + j] = ((double *)gram)[j * n + i] = x;
    else
        ((float *)gram)[i * n + j] = ((float *)gram)[j * n + i] = (float)x;
}

/* K_ij - (r_i + r_j) / (n - 2) + t / ((n - 1)(n - 2)) off the diagonal, r and t without it. */
static void u_centre(double *tri, double *r, int64_t n) {
    double total = 0, m = (double)(n - 2);
    for (int64_t i = 0; i < n; i++)
        r[i] = 0;
    for (int64_t i = 0, at = 0; i < n; i++, at += i)
        for (int64_t j = 0; j < i; j++) {
            r[i] += tri[at + j];
            r[j] += tri[at + j];
        }
    for (int64_t i = 0; i < n; i++)
        total += r[i];
    for (int64_t i = 0, at = 0; i < n; i++, at += i) {
        for (int64_t j = 0; j < i; j++)
            tri[at + j] += total / ((double)(n - 1) * m) - (r[i] + r[j]) / m;
        tri[at + i] = 0;
    }
}

int cq_cached_gram(const cq_cached *c, int64_t block, int64_t g, bool unbiased, cq_dtype dtype,
                   void *gram) {
    int64_t tap = 0, skip = 0, n = c->groups[g], size = n * (n + 1) / 2;
    while (tap < c->n_taps && c->taps[tap] != block)
        tap++;
    if (tap == c->n_taps)
        return cq_fail(CQ_EDATA, "%s: has no Gram of block %ld, the run wants one", c->path,
                       (long)block);
    for (int64_t i = 0; i < g; i++)
        skip += c->groups[i] < 4 ? 0 : (int64_t)c->groups[i] * (c->groups[i] + 1) / 2;
    double *tri = malloc((size_t)(size + n) * sizeof *tri);
    if (!tri)
        return cq_fail(CQ_ENOMEM, "%s: no memory for a Gram of %ld rows", c->path, (long)n);
    cq_dtype storage = c->half ? CQ_F16 : dtype;
    const char *from =
        (const char *)c->grams + (tap * c->triangles + skip) * cq_dtype_bytes(storage);
    int status = cq_convert(tri, CQ_F64, from, storage, size);
    double scale = ldexp(1, -c->exponents[tap * c->n_groups + g]);
    for (int64_t i = 0; i < size; i++)
        tri[i] *= scale;
    if (unbiased)
        u_centre(tri, tri + size, n);
    void *staged = cq_on_device(gram) ? malloc((size_t)(n * n * cq_dtype_bytes(dtype))) : gram;
    if (!staged)
        status = cq_fail(CQ_ENOMEM, "%s: no memory for a Gram of %ld rows", c->path, (long)n);
    for (int64_t i = 0, at = 0; i < n && staged; i++, at += i)
        for (int64_t j = 0; j <= i; j++)
            put(staged, dtype, n, i, j, tri[at + j]);
    free(tri);
    if (staged && staged != gram) {
        if (!status)
            status = cq_copy(gram, staged, n * n * cq_dtype_bytes(dtype));
        free(staged);
    }
    return status;
}
