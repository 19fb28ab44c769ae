/* profiled.c - a table around another one that adds up how long each operation takes.
 *
 * On a device every operation is waited for, so the sum is more than an undisturbed step takes; the
 * shares say where to look. The totals go to standard error when the process ends.
 */
#include "core/base/error.h"
#include "kernels/kernels.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
#define CQ_KERNEL(op) AT_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
    N_OPERATIONS
};
static const char *const names[] = {
#define CQ_KERNEL(op) #op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
static const cq_kernels *base;
static cq_kernels table;
static double seconds[N_OPERATIONS];
static int64_t calls[N_OPERATIONS];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ended(cq_stream *s, int op, double begun, int status) {
    if (status == CQ_OK && base->memory)
        status = base->memory->wait(s);
    seconds[op] += now() - begun;
    calls[op]++;
    return status;
}

#define CQ_KERNEL(op)                                                                              \
    static int profiled_##op(cq_stream *s, const cq_##op##_args *a) {                              \
        double begun = now();                                                                      \
        return ended(s, AT_##op, begun, base->op(s, a));                                           \
    }
#include "kernels/kernels.def"
#undef CQ_KERNEL

static void report(void) {
    double total = 0;
    bool told[N_OPERATIONS] = {false};
    for (int i = 0; i < N_OPERATIONS; i++)
        total += seconds[i];
    fprintf(stderr, "%-20s %9s %12s %7s %12s\n", "operation", "calls", "seconds", "share",
            "us a call");
    for (int n = 0; n < N_OPERATIONS; n++) {
        int most = -1;
        for (int i = 0; i < N_OPERATIONS; i++)
            if (!told[i] && calls[i] && (most < 0 || seconds[i] > seconds[most]))
                most = i;
        if (most < 0)
            break;
        told[most] = true;
        fprintf(stderr, "%-20s %9lld %12.4f %5.1f %% %12.1f\n", names[most], (long long)calls[most],
                seconds[most], 100 * seconds[most] / total,
                1e6 * seconds[most] / (double)calls[most]);
    }
}

const cq_kernels *cq_kernels_profiled(const cq_kernels *of) {
    if (!base)
        atexit(report);
    base = of;
    table = (cq_kernels){
        .name = of->name,
        .memory = of->memory,
#define CQ_KERNEL(op) .op = profiled_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
    };
    return &table;
}
