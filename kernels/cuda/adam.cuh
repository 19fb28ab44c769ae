/// adam.cuh - AdamW of one value; update.cu runs it over F32, narrow.cu over fewer bits.
#pragma once
#include "kernels/cuda/cq_cuda.h"

/// What is the same for all values of a call; operation arguments in F32.
struct cq_adam_numbers {
    float b1, b2, rest1, rest2, c1, c2, lr, eps, decay, scale;
    const cq_adamw_now *now; ///< has c1, c2, lr and scale, or NULL
};
static inline cq_adam_numbers cq_adam_numbers_of(const cq_adamw_args *a) {
    return {(float)a->beta1,
            (float)a->beta2,
            (float)(1.0 - a->beta1),
            (float)(1.0 - a->beta2),
            (float)(1.0 - pow(a->beta1, (double)a->step)),
            (float)(1.0 - pow(a->beta2, (double)a->step)),
            (float)a->lr,
            (float)a->eps,
            (float)a->weight_decay,
            (float)a->grad_scale,
            a->now};
}
/// The numbers of this step.
__device__ __forceinline__ cq_adam_numbers cq_adam_read(cq_adam_numbers n) {
    if (n.now) {
        float4 v = __ldg(reinterpret_cast<const float4 *>(n.now));
        n.lr = v.x, n.scale = v.y, n.c1 = v.z, n.c2 = v.w;
    }
    return n;
}

/// The step uses the moments before they are stored, the decay the weight before it.
__device__ __forceinline__ float cq_adam_value(const cq_adam_numbers &n, float w, float &m,
                                               float &v, float g) {
    float grad = g * n.scale;
    m = n.b1 * m + n.rest1 * grad;
    v = n.b2 * v + n.rest2 * grad * grad;
    float step = m / n.c1 / (sqrtf(v / n.c2) + n.eps) + n.decay * w;
    return w - n.lr * step;
}

/// The same over narrow weights or moments.
int cq_cuda_adamw_narrow(cq_stream *s, const cq_adamw_args *a);
