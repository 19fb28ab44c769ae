/* table.c - the table of the backend `cuda`, made from the list of operations. */
#include "kernels/kernels.h"

extern const cq_memory cq_cuda_memory;
extern const cq_kernels cq_cuda_kernels;
const cq_kernels cq_cuda_kernels = {
    .name = "cuda",
    .memory = &cq_cuda_memory,
#define CQ_KERNEL(op) .op = cq_cuda_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
