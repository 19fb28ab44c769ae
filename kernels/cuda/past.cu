/// past.cu - documents that go on from a past are the processor's alone: a device says so.
///
/// What generation needs on a device: attention of few queries against keys in slots, and the
/// convolution and the scan from a state that is kept (kernels.h).
#include "kernels/cuda/cq_cuda.h"

#define CQ_CUDA_LACKS(op)                                                                          \
    extern "C" int cq_cuda_##op(cq_stream *s, const cq_##op##_args *a) {                           \
        (void)s;                                                                                   \
        (void)a;                                                                                   \
        return cq_fail(CQ_EUSAGE,                                                                  \
                       "cuda: " #op " is not among its operations, wanted --device=cpu to "        \
                       "generate");                                                                \
    }

CQ_CUDA_LACKS(attention_cached)
CQ_CUDA_LACKS(conv_cached)
CQ_CUDA_LACKS(ssd_cached)
