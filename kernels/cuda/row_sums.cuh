/// row_sums.cuh - what a row of logits adds to the results of a loss, and the kernel that adds them
/// up in an order that only their number decides.
#pragma once
#include "kernels/cuda/cq_cuda.h"

namespace {

enum {
    SUM_THREADS = 256,
    AGREES = 1, ///< flags of a row
    VALID = 2
};

/// What one row adds to the results.
struct row_result {
    double value, nll_teacher, nll_student;
    int64_t flags;
};

/// Where the sums of all rows go; any of them may be NULL.
struct totals {
    double *value, *nll_teacher, *nll_student;
    int64_t *agree, *valid;
};

__global__ void __launch_bounds__(SUM_THREADS)
    sum_rows(const row_result *result, int64_t rows, totals to) {
    CQ_SHARED(double, room, [32]);
    double value = 0.0, nll_teacher = 0.0, nll_student = 0.0, agree = 0.0, valid = 0.0;
    for (int64_t r = (int64_t)threadIdx.x; r < rows; r += SUM_THREADS) {
        row_result one = result[r];
        value += one.value;
        nll_teacher += one.nll_teacher;
        nll_student += one.nll_student;
        agree += one.flags & AGREES ? 1.0 : 0.0;
        valid += one.flags & VALID ? 1.0 : 0.0;
    }
    value = cq_block_sum(value, room);
    nll_teacher = cq_block_sum(nll_teacher, room);
    nll_student = cq_block_sum(nll_student, room);
    agree = cq_block_sum(agree, room);
    valid = cq_block_sum(valid, room);
    if (threadIdx.x != 0)
        return;
    *to.value += value;
    if (to.nll_teacher)
        *to.nll_teacher += nll_teacher;
    if (to.nll_student)
        *to.nll_student += nll_student;
    if (to.agree)
        *to.agree += (int64_t)agree;
    if (to.valid)
        *to.valid += (int64_t)valid;
}

} // namespace
