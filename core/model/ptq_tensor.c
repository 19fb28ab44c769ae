/// ptq_tensor.c - tensors of a checkpoint through a bounded window into a folder, by all threads.
///
/// A matrix is read twice, for its maximum and for its codes: the second time it comes from the
/// page cache. Each thread takes the next part of up to 262,144 elements, so reading, arithmetic
/// and writing of different parts overlap; inside a part a tile stays in the first-level cache.
/// Pages of the source leave the resident set when its tensor is done.
#include "core/base/error.h"
#include "core/base/process.h"
#include "core/base/rng.h"
#include "core/model/ptq_impl.h"
#include "core/quant/scales.h"
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PART = 1 << 18, TILE = 1 << 12, BLOCK = 16, INFINITE = 0x7f800000 };

/// One thread's buffers.
typedef struct worker {
    float x[TILE], block_amax[TILE / BLOCK];
    uint8_t codes[PART / 2], scales[PART / BLOCK];
} worker;

/// What is done to every part of a matrix.
typedef struct matrix {
    const uint8_t *data;
    cq_dtype dtype;
    int64_t n;
    float amax, most, top; ///< shared maximum; 0 where the matrix is all zero; of static scales
    cq_scale_method scales;
} matrix;

/// The first failure of any thread; a message is the thread's own until it is carried over.
typedef struct outcome {
    int status;
    char message[512];
} outcome;

int64_t cq_ptq_worker_bytes(void) { return (int64_t)sizeof(worker); }

static worker *mine(const cq_ptq *q) { return (worker *)q->workers.data + omp_get_thread_num(); }

static void note(outcome *o, int status) {
    if (!status)
        return;
#pragma omp critical(cq_ptq_outcome)
    if (!o->status) {
        o->status = status;
        snprintf(o->message, sizeof o->message, "%s", cq_error());
    }
}

static int settle(const outcome *o) {
    return o->status ? cq_fail(o->status, "%s", o->message) : CQ_OK;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements that a thread takes at a time: at least four parts for each, in whole tiles. */
static int64_t part_of(const cq_ptq *q, int64_t n) {
    return least(PART, (n / (4 * q->threads) + TILE) / TILE * TILE);
}

/* Largest magnitude as bits, in whose order NaN comes last. */
static int32_t largest(const float *x, int64_t n) {
    int32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) {
        union {
            float f;
            int32_t u;
        } v = {.f = x[i]};
        int32_t a = v.u & 0x7fffffff;
        top = a > top ? a : top;
    }
    return top;
}

/* F32 form of elements [i, i + k). */
static void widen(float *x, const matrix *w, int64_t i, int64_t k) {
    if (cq_convert(x, CQ_F32, w->data + i * cq_dtype_bytes(w->dtype), w->dtype, k))
        memset(x, 0xff, (size_t)k * sizeof *x); /* no float dtype: a NaN, which is reported */
}

/* The largest magnitude of elements [at, at + n), which become F32 in `value` when there is one. */
static int32_t measure(worker *t, const matrix *w, int64_t at, int64_t n, float *value) {
    int32_t top = 0;
    for (int64_t i = at; i < at + n; i += TILE) {
        float *x = value ? value + i : t->x;
        int64_t k = least(TILE, at + n - i);
        widen(x, w, i, k);
        int32_t most = largest(x, k);
        top = most > top ? most : top;
    }
    return top;
}

static int find_bad(const cq_ptq *q, const cq_param *p, const matrix *w) {
    float *x = mine(q)->x;
    for (int64_t i = 0; i < w->n; i += TILE) {
        widen(x, w, i, least(TILE, w->n - i));
        for (int64_t k = 0; k < least(TILE, w->n - i); k++)
            if (!isfinite(x[k]))
                return cq_fail(CQ_ENUMERIC, "%s: %s holds %s at element %ld, wanted finite weights",
                               q->m->dir, p->name, isnan(x[k]) ? "NaN" : "Inf", (long)(i + k));
    }
    return CQ_OK;
}

static const cq_entry *source(const cq_ptq *q, const cq_param *p, matrix *w) {
    const cq_entry *e = cq_model_entry(q->m->teacher, p->name);
    *w =
        (matrix){.data = e->tensor.data, .dtype = e->tensor.dtype, .n = cq_tensor_elems(e->tensor)};
    return e;
}

static void let_go(const cq_ptq *q, const cq_entry *e) {
    if (q->forgets && !q->again)
        cq_safetensors_forget(q->m->teacher->files, e);
    else
        cq_safetensors_drop(q->m->teacher->files, e);
}

int cq_ptq_read(cq_ptq *q, int64_t i, float *value) {
    cq_param *p = q->m->param[i];
    matrix w;
    int32_t top = 0;
    CQ_TRY(cq_stop_check());
    source(q, p, &w);
    int64_t part = part_of(q, w.n);
#pragma omp parallel for schedule(dynamic) reduction(max : top) num_threads(q->threads)
    for (int64_t at = 0; at < w.n; at += part) {
        int32_t most = measure(mine(q), &w, at, least(part, w.n - at), value);
        top = most > top ? most : top;
    }
    if (top >= INFINITE)
        return find_bad(q, p, &w);
    memcpy(&q->own[i], &top, sizeof top);
    p->amax = q->own[i];
    return CQ_OK;
}

int cq_ptq_read_again(cq_ptq *q, int64_t i, float *value) {
    matrix w;
    CQ_TRY(cq_ptq_read(q, i, value));
    let_go(q, source(q, q->m->param[i], &w));
    return CQ_OK;
}

/* Codes and scales of elements [at, at + n). */
static void quantize(worker *t, const matrix *w, int64_t at, int64_t n) {
    bool fixed = w->scales != CQ_SCALE_MAX;
    for (int64_t i = 0; i < n; i += TILE) {
        int64_t k = least(TILE, n - i);
        widen(t->x, w, at + i, k);
        if (fixed)
            cq_nvfp4_search_part(t->block_amax, t->x, k, w->amax, w->scales);
        cq_nvfp4_pack_part(t->codes + i / 2, t->scales + i / BLOCK, t->x, k, w->most,
                           fixed ? t->block_amax : NULL, w->top);
    }
}

static int tensor_of(const cq_ptq *q, const cq_param *p, const char *suffix, int64_t *tensor) {
    char name[160];
    cq_module_name(name, p->name, suffix);
    return cq_st_folder_find(q->out, name, tensor);
}

int cq_ptq_scalar(cq_ptq *q, const cq_param *p, const char *suffix, float value) {
    int64_t tensor;
    CQ_TRY(tensor_of(q, p, suffix, &tensor));
    return cq_st_folder_put(q->out, tensor, 0, &value, sizeof value);
}

int cq_ptq_pack(cq_ptq *q, int64_t i) {
    cq_param *p = q->m->param[i];
    matrix w;
    int64_t codes, scales;
    float scale_2;
    outcome o = {0};
    const cq_entry *e = source(q, p, &w);
    w.amax = p->amax;
    w.most = q->own[i] > 0 ? p->amax : 0;
    w.top = p->top;
    w.scales = q->m->scales;
    int status = cq_nvfp4_scale_2(&scale_2, w.amax, w.scales == CQ_SCALE_MAX ? 448.0f : w.top);
    if (status)
        return cq_fail_in(status, p->name);
    CQ_TRY(tensor_of(q, p, ".weight", &codes));
    CQ_TRY(tensor_of(q, p, ".weight_scale", &scales));
    int64_t part = part_of(q, w.n);
#pragma omp parallel for schedule(dynamic) num_threads(q->threads)
    for (int64_t at = 0; at < w.n; at += part) {
        worker *t = mine(q);
        int64_t k = least(part, w.n - at);
        quantize(t, &w, at, k);
        note(&o, cq_st_folder_put(q->out, codes, at / 2, t->codes, k / 2));
        note(&o, cq_st_folder_put(q->out, scales, at / BLOCK, t->scales, k / BLOCK));
    }
    let_go(q, e);
    CQ_TRY(settle(&o));
    return cq_ptq_scalar(q, p, ".weight_scale_2", scale_2);
}

int cq_ptq_copy(cq_ptq *q, int64_t i, float *value) {
    const cq_param *p = q->m->param[i];
    matrix w;
    int64_t tensor;
    int32_t top = 0;
    outcome o = {0};
    CQ_TRY(cq_stop_check());
    const cq_entry *e = source(q, p, &w);
    int64_t wide = cq_dtype_bytes(w.dtype);
    CQ_TRY(cq_st_folder_find(q->out, p->name, &tensor));
    int64_t part = part_of(q, w.n);
#pragma omp parallel for schedule(dynamic) reduction(max : top) num_threads(q->threads)
    for (int64_t at = 0; at < w.n; at += part) {
        int64_t k = least(part, w.n - at);
        int32_t most = measure(mine(q), &w, at, k, value);
        top = most > top ? most : top;
        note(&o, cq_st_folder_put(q->out, tensor, at * wide, w.data + at * wide, k * wide));
    }
    if (top >= INFINITE)
        return find_bad(q, p, &w);
    let_go(q, e);
    return settle(&o);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int cq_ptq_rate(cq_ptq *q, double *rate) {
    enum { N = 1 << 24 };
    uint16_t *data = malloc(N * sizeof *data);
    if (!data)
        return cq_fail(CQ_ENOMEM, "ptq: no memory to measure the rate");
    for (int64_t i = 0; i < N; i++) /* +-0.008 to 0.03, as many of each */
        data[i] =
            (uint16_t)(0x3c00 + cq_random_below(1, 1, (uint64_t)i, 256) + (i & 1 ? 0x8000 : 0));
    matrix w = {.data = (const uint8_t *)data,
                .dtype = CQ_BF16,
                .n = N,
                .amax = 0.04f,
                .most = 0.04f,
                .top = 448,
                .scales = q->m->scales};
    double begun = seconds(), spent = 0;
    int64_t rounds = 0;
    for (; spent < 0.25; rounds++, spent = seconds() - begun) {
        int32_t top = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : top) num_threads(q->threads)
        for (int64_t at = 0; at < N; at += PART) {
            int32_t most = measure(mine(q), &w, at, PART, NULL);
            top = most > top ? most : top;
        }
#pragma omp parallel for schedule(dynamic) num_threads(q->threads)
        for (int64_t at = 0; at < N; at += PART)
            quantize(mine(q), &w, at, PART);
    }
    free(data);
    *rate = (double)(rounds * N * (int64_t)sizeof *data) / spent;
    return CQ_OK;
}
