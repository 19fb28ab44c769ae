/// rowsum.h - weight gradients: sums over rows of vectors, in an order that no thread count
/// changes.
///
///     dw[i] += sum over chunks c of ( sum over the rows r of chunk c of term[r, i] )
///
/// The rows are cut into at most 64 chunks, whose number depends on the shape and the scratch per
/// thread alone. Every chunk sums into its own vector; the vectors are added in ascending order.
/// The vectors lie at the start of the stream's scratch; the last `dim` floats of each thread's
/// part stay free for the operation (rowsum_spare).
#pragma once
#include "core/base/error.h"
#include "kernels/kernels.h"
#include <omp.h>
#include <string.h>

enum { ROWSUM_MOST = 64, ROWSUM_LEAST_ROWS = 16 };

typedef struct rowsum {
    float *parts; ///< [chunks, dim]; NULL when nobody asked for the sum
    int64_t rows, dim, chunks, chunk_rows;
} rowsum;

/// CQ_ENOMEM when two vectors of `dim` do not fit a thread's scratch.
static inline int rowsum_init(rowsum *p, const cq_stream *s, const char *name, int64_t rows,
                              int64_t dim, bool wanted) {
    int64_t vector = dim * (int64_t)sizeof(float), most = s->scratch_bytes / vector - 1;
    if (!s->scratch || most < 1)
        return cq_fail(CQ_ENOMEM, "%s: scratch of %lld bytes per thread, %lld wanted", name,
                       (long long)(s->scratch ? s->scratch_bytes : 0), (long long)(2 * vector));
    most = most < ROWSUM_MOST ? most : ROWSUM_MOST;
    int64_t size = (rows + most - 1) / most;
    size = size < ROWSUM_LEAST_ROWS ? ROWSUM_LEAST_ROWS : size;
    *p = (rowsum){wanted ? s->scratch : NULL, rows, dim, (rows + size - 1) / size, size};
    return CQ_OK;
}
/// The zeroed vector of chunk c, or NULL.
static inline float *rowsum_begin(const rowsum *p, int64_t c) {
    if (!p->parts)
        return NULL;
    return memset(p->parts + c * p->dim, 0, (size_t)p->dim * sizeof(float));
}
/// One past the last row of chunk c.
static inline int64_t rowsum_end(const rowsum *p, int64_t c) {
    int64_t end = (c + 1) * p->chunk_rows;
    return end < p->rows ? end : p->rows;
}
/// `dim` floats of this thread that no vector covers.
static inline float *rowsum_spare(const cq_stream *s, const rowsum *p) {
    char *end = (char *)s->scratch + (omp_get_thread_num() + 1) * s->scratch_bytes;
    return (float *)(void *)end - p->dim;
}
/// dw += the sum of all vectors.
static inline void rowsum_add(const rowsum *p, float *dw) {
    if (!p->parts || p->chunks == 0)
        return;
    float *total = p->parts;
    for (int64_t c = 1; c < p->chunks; c++)
#pragma omp simd
        for (int64_t i = 0; i < p->dim; i++)
            total[i] += p->parts[c * p->dim + i];
#pragma omp simd
    for (int64_t i = 0; i < p->dim; i++)
        dw[i] += total[i];
}
