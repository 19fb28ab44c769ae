/// simd.h - names for code that is compiled once per instruction set (CQ_ISA is generic, avx2 or
/// avx512).
///
/// A simd_*.c file defines `int CQ_OP(rmsnorm_forward)(cq_stream *s, const cq_rmsnorm_forward_args
/// *a)`; dispatch.c collects the three sets into tables from kernels.def and picks one at run time.
#pragma once
#include "kernels/kernels.h"

#define CQ_CAT3_(a, b, c) a##b##_##c
#define CQ_CAT3(a, b, c) CQ_CAT3_(a, b, c)
#define CQ_OP(op) CQ_CAT3(cq_cpu_, op, CQ_ISA)
/// First line of an operation: anything but FP32 is the specification's business.
#define CQ_F32_OR_REF(op)                                                                          \
    if (a->dtype != CQ_F32)                                                                        \
    return cq_ref_##op(s, a)

/// Threads for work of `elements` that takes one core about `ns` nanoseconds for each: all, or one
/// when the work is less than twice what it costs to wake a sleeping thread and to wait for it (100
/// microseconds in a virtual machine).
static inline int cq_team(const cq_stream *s, int64_t elements, double ns) {
    return (double)elements * ns < 150e3 ? 1 : s->threads;
}
