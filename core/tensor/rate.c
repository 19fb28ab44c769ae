/// rate.c - the matrix rate: the fastest of repeated products, so that a busy machine is not taken
/// for a slow one.
#include "core/tensor/rate.h"
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/tensor/plan.h"
#include <stdlib.h>
#include <time.h>

enum { SIDE = 512, DEVICE_SIDE = 8192, SCRATCH_BYTES = 1 << 22 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Three square matrices behind x; the first product makes a library ready and does not count. */
static int measure(cq_stream *s, float *x, int64_t side, double *rate) {
    double begun = now();
    *rate = 0;
    for (int i = 0; i < 50 && (i < 3 || now() - begun < 0.2); i++) {
        double start = now();
        CQ_TRY(CQ_RUN(s, matmul, .dtype = CQ_F32, .m = side, .n = side, .k = side, .a = x,
                      .lda = side, .b = x + side * side, .ldb = side, .c = x + 2 * side * side,
                      .ldc = side, .alpha = 1));
        CQ_TRY(cq_stream_wait(s));
        double speed = 2.0 * (double)(side * side * side) / (now() - start);
        *rate = speed > *rate && i > 0 ? speed : *rate;
    }
    return CQ_OK;
}

/* Random values: multiplying zeros or few different values is faster on some devices. */
static int fill(float *values, int64_t n, void *to) {
    uint64_t state = 1;
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        values[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    return cq_copy(to, values, n * (int64_t)sizeof *values);
}

int cq_matmul_rate(const cq_stream *s, double *rate) {
    cq_plan *p = NULL;
    cq_tensor x = {0}, work = {0}, operands = {0};
    bool device = s->table->memory != NULL;
    int64_t side = device ? DEVICE_SIDE : SIDE, n = 2 * side * side;
    float *values = malloc((size_t)n * sizeof *values);
    int status = values ? cq_plan_open(&p) : cq_fail(CQ_ENOMEM, "matrix rate: no memory");
    if (!status) {
        cq_plan_place(p, s);
        status = cq_plan_add(p, &x, CQ_FOR_SCRATCH, "matrices", CQ_F32, CQ_SHAPE3(3, side, side));
    }
    if (!status)
        status = cq_plan_add(p, &work, CQ_FOR_SCRATCH, "kernel scratch", CQ_U8,
                             CQ_SHAPE2(s->threads, SCRATCH_BYTES));
    if (!status)
        status = cq_plan_add(p, &operands, CQ_FOR_SCRATCH, "bf16 operands", CQ_BF16,
                             CQ_SHAPE1(device ? n : 0));
    if (!status)
        status = cq_plan_commit(p, 0);
    if (!status)
        status = fill(values, n, x.data);
    cq_stream own = *s;
    own.compute = device ? s->compute : CQ_COMPUTE_F32;
    own.scratch = work.data;
    own.scratch_bytes = SCRATCH_BYTES;
    own.bf16_scratch = operands.data;
    own.bf16_scratch_bytes = device ? 2 * n : 0;
    if (!status)
        status = measure(&own, x.data, side, rate);
    cq_plan_close(p);
    free(values);
    return status;
}
