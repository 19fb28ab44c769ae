/// rate.c - the matrix rate: the fastest of repeated products, so that a busy machine is not taken
/// for a slow one.
#include "core/tensor/rate.h"
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/tensor/plan.h"
#include <stdlib.h>
#include <time.h>

enum { SIDE = 512, DEVICE_SIDE = 16384, SCRATCH_BYTES = 1 << 22 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

typedef struct square {
    int64_t side;
    cq_tensor x, x16, y; ///< y = x x; x16: x in BF16, on a device
} square;

/* The first product makes a library ready and does not count. */
static int measure(cq_stream *s, const square *q, double *rate) {
    double begun = now();
    int64_t n = q->side;
    *rate = 0;
    for (int i = 0; i < 50 && (i < 3 || now() - begun < 0.2); i++) {
        double start = now();
        CQ_TRY(CQ_RUN(s, matmul, .dtype = CQ_F32, .m = n, .n = n, .k = n, .a = q->x.data, .lda = n,
                      .b = q->x.data, .ldb = n, .c = q->y.data, .ldc = n, .alpha = 1,
                      .b16 = q->x16.data));
        CQ_TRY(cq_stream_wait(s));
        double speed = 2.0 * (double)(n * n * n) / (now() - start);
        *rate = speed > *rate && i > 0 ? speed : *rate;
    }
    return CQ_OK;
}

/* Random values: zeros, or few different ones, multiply faster on some devices. */
static int fill(cq_stream *s, const square *q) {
    int64_t n = q->side * q->side;
    float *values = malloc((size_t)n * sizeof *values);
    uint64_t state = 1;
    if (!values)
        return cq_fail(CQ_ENOMEM, "matrix rate: no memory");
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        values[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    int status = cq_copy(q->x.data, values, n * (int64_t)sizeof *values);
    free(values);
    if (status || !q->x16.data)
        return status;
    return CQ_RUN(s, round_bf16, .dtype = CQ_F32, .n = n, .x = q->x.data, .y = q->x16.data);
}

static int run(cq_plan *p, cq_stream *s, double *rate) {
    bool device = s->table->memory != NULL;
    square q = {.side = device ? DEVICE_SIDE : SIDE};
    int64_t n = q.side * q.side;
    cq_tensor work, operand = {0};
    CQ_TRY(cq_plan_add(p, &q.x, CQ_FOR_SCRATCH, "a matrix", CQ_F32, CQ_SHAPE1(n)));
    CQ_TRY(cq_plan_add(p, &q.y, CQ_FOR_SCRATCH, "its square", CQ_F32, CQ_SHAPE1(n)));
    CQ_TRY(cq_plan_add(p, &work, CQ_FOR_SCRATCH, "kernel scratch", CQ_U8,
                       CQ_SHAPE2(s->threads, SCRATCH_BYTES)));
    if (device) {
        CQ_TRY(cq_plan_add(p, &q.x16, CQ_FOR_SCRATCH, "in BF16", CQ_BF16, CQ_SHAPE1(n)));
        CQ_TRY(cq_plan_add(p, &operand, CQ_FOR_SCRATCH, "operand", CQ_BF16, CQ_SHAPE1(n)));
    }
    CQ_TRY(cq_plan_commit(p, 0));
    s->compute = device ? s->compute : CQ_COMPUTE_F32;
    s->scratch = work.data;
    s->scratch_bytes = SCRATCH_BYTES;
    s->bf16_scratch = operand.data;
    s->bf16_scratch_bytes = device ? 2 * n : 0;
    CQ_TRY(fill(s, &q));
    return measure(s, &q, rate);
}

int cq_matmul_rate(const cq_stream *s, double *rate) {
    cq_plan *p;
    cq_stream own = *s;
    CQ_TRY(cq_plan_open(&p));
    cq_plan_place(p, s);
    int status = run(p, &own, rate);
    cq_plan_close(p);
    return status;
}
