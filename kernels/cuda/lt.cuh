/// lt.cuh - what every product through cuBLASLt asks of an algorithm.
#pragma once
#include <cublasLt.h>
#include <stdint.h>

/// log2 of the largest power of two, up to 256, that p is a multiple of.
inline int32_t cq_lt_alignment_log2(uintptr_t p) {
    int32_t n = 0;
    while (n < 8 && (p >> n & 1) == 0)
        n++;
    return n;
}

/// Whether an algorithm adds up in a fixed order: of the ways to split k only the one that stores
/// partial sums and adds them in order.
inline bool cq_lt_ordered(const cublasLtMatmulAlgo_t *algo) {
    uint32_t scheme = 0;
    size_t written = 0;
    return cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                                &scheme, sizeof scheme,
                                                &written) == CUBLAS_STATUS_SUCCESS &&
           (scheme & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == 0;
}
