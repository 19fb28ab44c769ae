// cached.cu - a teacher that is kept in a file: not written for a device yet, so each is an error
// that names itself.
#include "kernels/cuda/cq_cuda.h"

extern "C" int cq_cuda_top_logits(cq_stream *s, const cq_top_logits_args *a) {
    (void)s, (void)a;
    return cq_fail(CQ_EUSAGE, "cuda: operation top_logits is not there, wanted --device=cpu");
}
extern "C" int cq_cuda_kl_cached(cq_stream *s, const cq_kl_cached_args *a) {
    (void)s, (void)a;
    return cq_fail(CQ_EUSAGE, "cuda: operation kl_cached is not there, wanted --device=cpu");
}
