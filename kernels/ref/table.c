/* table.c - the table of the reference backend, made from the list of operations. */
#include "kernels/ref/ref.h"

const cq_kernels cq_ref_kernels = {
    .name = "ref",
#define CQ_KERNEL(op) .op = cq_ref_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
