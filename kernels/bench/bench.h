/// bench.h - how an operation is timed: what a case is given and what it reports.
///
/// A case makes its buffers, and MEASURE calls the operation until the time per case is used up and
/// prints one line: median and best time, bytes and operations per second at the median, and their
/// shares of the copy bandwidth and of the matrix rate that the same run measured. `bytes` are
/// those that have to move once (every input read, every result written); `flops` counts two for a
/// multiply-add of a product and is 0 where it means nothing.
#pragma once
#include "core/base/error.h"
#include "kernels/kernels.h"
#include <stdio.h>

enum { BENCH_MOST_BUFFERS = 32, BENCH_MOST_RUNS = 4096 };

typedef struct bench {
    cq_stream s;
    double seconds;    ///< per case
    double copy, rate; ///< ceilings: bytes and FP32 operations per second
    void *buffer[BENCH_MOST_BUFFERS];
    int n_buffers;
    int64_t bytes[BENCH_MOST_BUFFERS]; ///< of each buffer
    uint64_t drawn;
    const float *pattern; ///< on a device: PATTERN random values that bench_floats repeats
    FILE *csv;            ///< NULL: none
} bench;
typedef struct bench_times {
    double at[BENCH_MOST_RUNS], begun, total;
    bool sized;   ///< `calls` has been chosen
    int n, calls; ///< calls between two looks at the clock: 1, or more on a device
} bench_times;

/// Values in [-1, 1); freed after the case, as are the other buffers.
float *bench_floats(bench *b, int64_t n);
/// Values in [0, below).
int32_t *bench_ints(bench *b, int64_t n, int64_t below);
/// 0, 1, 2, ... n - 1, shuffled.
int32_t *bench_permutation(bench *b, int64_t n);
/// parts + 1 bounds from 0 to total, evenly spaced.
int64_t *bench_bounds(bench *b, int64_t parts, int64_t total);
/// n random values in BF16, where the kernels have that operation.
void *bench_bf16(bench *b, int64_t n);
/// One value.
float *bench_float(bench *b, float value);
/// n zeroed bytes.
void *bench_zeros(bench *b, int64_t n);
void bench_free(bench *b);

bench_times *bench_clock(bench *b);
/// True while another run is wanted.
bool bench_begin(bench *b, bench_times *t);
/// Ends a run; a failed one ends the program's case with its message.
void bench_end(bench *b, bench_times *t, int status);
void bench_report(bench *b, const char *op, const char *label, const bench_times *t, double flops,
                  double bytes);
double bench_median(const bench_times *t);

#define MEASURE_ANY(b, op, label, flops, bytes, ...)                                               \
    do {                                                                                           \
        cq_##op##_args args_ = {__VA_ARGS__};                                                      \
        bench_times *times_ = bench_clock(b);                                                      \
        while (bench_begin((b), times_)) {                                                         \
            int status_ = CQ_OK;                                                                   \
            for (int call_ = 0; call_ < times_->calls && status_ == CQ_OK; call_++)                \
                status_ = (b)->s.table->op(&(b)->s, &args_);                                       \
            bench_end((b), times_, status_);                                                       \
        }                                                                                          \
        bench_report((b), #op, (label), times_, (double)(flops), (double)(bytes));                 \
        bench_free(b);                                                                             \
    } while (0)
#define MEASURE(b, op, label, flops, bytes, ...)                                                   \
    MEASURE_ANY(b, op, label, flops, bytes, .dtype = CQ_F32, __VA_ARGS__)

/// One function per operation of kernels.def, in cases_*.c: the list is the coverage check.
#define CQ_KERNEL(op) void bench_##op(bench *b);
#include "kernels/kernels.def"
#undef CQ_KERNEL
/// The same operations at the shapes of Nemotron 3 Nano and Qwen3-4B, for a device; `wanted` says
/// which.
void bench_true_size(bench *b, bool (*wanted)(const char *op, void *context), void *context);
