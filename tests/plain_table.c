/* plain_table.c - the table of the plain FP32 loops, made from the list of operations. */
#include "tests/plain_kernels.h"

const cq_kernels cq_plain_kernels = {
    .name = "plain",
#define CQ_KERNEL(op) .op = cq_plain_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
