/// batch.h - how far apart the matrices of several products of one shape lie, in elements.
#pragma once
#include <stdint.h>

typedef struct cq_cuda_batch {
    int64_t count, a, b, c;
} cq_cuda_batch;
