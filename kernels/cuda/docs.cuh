/// docs.cuh - which document a token is in.
#pragma once
#include "kernels/cuda/cq_cuda.h"

/// The document of token t: the last one that begins at or before it (documents may be empty).
__device__ __forceinline__ int64_t cq_document_of(const int64_t *starts, int64_t n_docs,
                                                  int64_t t) {
    int64_t low = 0, high = n_docs;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return low;
}
