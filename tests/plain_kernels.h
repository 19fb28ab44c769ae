/// plain_kernels.h - the plain FP32 loops: the bodies of kernels/ref compiled with float sums, for
/// tests only.
///
/// A fast backend is right when its error against the F64 result of ref is at most twice
/// (gradients: three times) that of these loops plus one ulp. F32 only. cq_plain_kernels is their
/// table, so a stream can run it.
#pragma once
#include "kernels/ref/ref.h"

#define CQ_KERNEL(op) int cq_plain_##op(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL

extern const cq_kernels cq_plain_kernels;

/// The public function of one plain operation; its body was compiled with CQ_FN(op) = op##_plain.
#define CQ_PLAIN_OP(op)                                                                            \
    int cq_plain_##op(cq_stream *s, const cq_##op##_args *a) {                                     \
        (void)s;                                                                                   \
        if (a->dtype != CQ_F32)                                                                    \
            return cq_fail(CQ_EUSAGE, #op ": dtype is %d, the plain loops know F32",               \
                           (int)a->dtype);                                                         \
        return op##_plain(a);                                                                      \
    }
