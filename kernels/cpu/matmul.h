/// matmul.h - the parts of a matrix product that do not depend on the instruction set.
#pragma once
#include "kernels/kernels.h"

/// True where BF16 products are faster than FP32 ones: AMX tiles. (AVX512_BF16 without AMX does
/// half of what FP32 FMA does.)
bool cq_cpu_has_fast_bf16(void);
/// C = alpha op(A) op(B) + beta C in FP32 through oneDNN, on `team` threads; on this thread
/// inside a parallel region. May use the stream's scratch.
int cq_cpu_sgemm(const cq_stream *s, const cq_matmul_args *a, int team);
/// The same with BF16 operands (uint16_t) and an FP32 result, on a machine with fast BF16.
int cq_cpu_bf16gemm(const cq_matmul_args *a, int team);
