/// rate.c - the matrix rate: the fastest of repeated products, so that a busy machine is not taken
/// for a slow one.
#include "core/tensor/rate.h"
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/tensor/plan.h"
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
    *rate = 0;
    for (int i = 0; i < 50 && now() - begun < 0.2; i++) {
        double start = now();
        CQ_TRY(CQ_RUN(s, matmul, .dtype = CQ_F32, .m = SIDE, .n = SIDE, .k = SIDE, .a = x,
                      .lda = SIDE, .b = x + SIDE * SIDE, .ldb = SIDE, .c = x + 2 * SIDE * SIDE,
                      .ldc = SIDE, .alpha = 1));
        CQ_TRY(cq_stream_wait(s));
        double speed = 2.0 * SIDE * SIDE * SIDE / (now() - start);
        *rate = speed > *rate ? speed : *rate;
    }
    return CQ_OK;
}

int cq_matmul_rate(const cq_stream *s, double *rate) {
    cq_plan *p = NULL;
    cq_tensor x = {0}, work = {0};
    float *values = malloc((size_t)2 * SIDE * SIDE * sizeof *values);
    int status = values ? cq_plan_open(&p) : cq_fail(CQ_ENOMEM, "matrix rate: no memory");
    if (!status) {
        cq_plan_place(p, s);
        status = cq_plan_add(p, &x, CQ_FOR_SCRATCH, "matrices", CQ_F32, CQ_SHAPE3(3, SIDE, SIDE));
    }
    if (!status)
        status = cq_plan_add(p, &work, CQ_FOR_SCRATCH, "kernel scratch", CQ_U8,
                             CQ_SHAPE2(s->threads, SCRATCH_BYTES));
    if (!status)
        status = cq_plan_commit(p, 0);
    for (int i = 0; i < 2 * SIDE * SIDE && !status; i++)
        values[i] = (float)(i % 7) - 3;
    if (!status)
        status = cq_copy(x.data, values, (int64_t)2 * SIDE * SIDE * (int64_t)sizeof *values);
    cq_stream own = *s;
    own.compute = CQ_COMPUTE_F32;
    own.scratch = work.data;
    own.scratch_bytes = SCRATCH_BYTES;
    if (!status)
        status = measure(&own, x.data, rate);
    cq_plan_close(p);
    free(values);
    return status;
}
