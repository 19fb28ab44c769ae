/// rate.c - the matrix rate: the fastest of repeated products, so that a busy machine is not taken
/// for a slow one.
#include "core/tensor/rate.h"
#include "core/base/error.h"
#include "core/tensor/tensor.h"
#include <stdlib.h>
#include <time.h>

enum { SIDE = 512, SCRATCH_BYTES = 1 << 22 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int measure(cq_stream *s, float *x, double *rate) {
    double begun = now();
    for (int64_t i = 0; i < 2 * SIDE * SIDE; i++)
        x[i] = (float)(i % 7) - 3;
    *rate = 0;
    for (int i = 0; i < 50 && now() - begun < 0.2; i++) {
        double start = now();
        CQ_TRY(CQ_RUN(s, matmul, .dtype = CQ_F32, .m = SIDE, .n = SIDE, .k = SIDE, .a = x,
                      .lda = SIDE, .b = x + SIDE * SIDE, .ldb = SIDE, .c = x + 2 * SIDE * SIDE,
                      .ldc = SIDE, .alpha = 1));
        double speed = 2.0 * SIDE * SIDE * SIDE / (now() - start);
        *rate = speed > *rate ? speed : *rate;
    }
    return CQ_OK;
}

int cq_matmul_rate(const cq_stream *s, double *rate) {
    size_t scratch = (size_t)SCRATCH_BYTES * (size_t)s->threads;
    float *x = malloc((size_t)3 * SIDE * SIDE * sizeof *x);
    void *work = aligned_alloc(64, scratch);
    cq_stream own = {.table = s->table,
                     .threads = s->threads,
                     .compute = CQ_COMPUTE_F32,
                     .scratch = work,
                     .scratch_bytes = SCRATCH_BYTES};
    int status = x && work ? measure(&own, x, rate)
                           : cq_fail(CQ_ENOMEM, "matrix rate: no memory for its matrices");
    free(work);
    free(x);
    return status;
}
