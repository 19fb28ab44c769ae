/// ref.h - how the `ref` backend, the specification of every operation, is put together.
///
/// An operation is written once, in a file *.inc.h, as `static int CQ_FN(op)(const cq_op_args *a)`
/// over two types: `real`, what the buffers hold, and `acc`, what sums and intermediate values are
/// held in. It is compiled for (float, double) and (double, double), that is, ref always sums in
/// double and rounds once when it stores. The tests compile the same text a third time for (float,
/// float): the plain same-precision loop that a fast backend's error is measured against
/// (tests/plain_kernels.h).
///
/// A source file reads:
///     #include "kernels/ref/ref.h"
///     #define CQ_REF_BODY "kernels/ref/norms.inc.h"
///     #include "kernels/ref/both.inc.h"
///     CQ_REF_OP(rmsnorm_forward)
///
/// In a body, cast with (acc) when reading and (real) when storing, and write constants as integers
/// where possible: <tgmath.h> makes exp, sqrt, log1p ... those of the type of the argument.
#pragma once
#include "core/base/error.h"
#include "kernels/kernels.h"
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

/// The table of the backend `ref`: every operation, both dtypes.
extern const cq_kernels cq_ref_kernels;

/// The public function of one operation: chooses the instance by a->dtype.
#define CQ_REF_OP(op)                                                                              \
    int cq_ref_##op(cq_stream *s, const cq_##op##_args *a) {                                       \
        (void)s;                                                                                   \
        if (a->dtype == CQ_F32)                                                                    \
            return op##_f32(a);                                                                    \
        if (a->dtype == CQ_F64)                                                                    \
            return op##_f64(a);                                                                    \
        return cq_fail(CQ_EUSAGE, #op ": dtype is %d, wanted F32 or F64", (int)a->dtype);          \
    }

/// Fake quantization of x [rows, cols] into y, which may be x, by the groups of fq; without
/// fq->amax a copy. With block_amax [rows, cols / 16] the static form under `top`, else the dynamic
/// one (block_amax NULL). Both dtypes go through the one FP32 codec: a double is rounded to float
/// first and the result widened. Fails with CQ_ESHAPE when cols is not a multiple of 16.
int cq_ref_fake_rows(const cq_fq *fq, cq_dtype dtype, int64_t rows, int64_t cols, const void *x,
                     void *y, const float *block_amax, float top);

/// Functions of one acc value, in its own precision. softplus is the identity above 20, as in the
/// models.
#define CQ_SIGMOID(x) (1 / (1 + exp(-(x))))
#define CQ_SOFTPLUS(x) ((x) > 20 ? (x) : log1p(exp(x)))

/// Zeroed memory for n elements of `size` bytes; NULL when there is none (n = 0 gives a valid
/// pointer).
static inline void *cq_ref_zeros(int64_t n, size_t size) {
    return calloc(n > 0 ? (size_t)n : 1, size);
}
