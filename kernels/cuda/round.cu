/// round.cu - rounding to BF16, eight values a thread.
///
/// Qwen3-4B, gate and up of a block: 50 M values, 0.30 GB: 70 us at 4.3 TB/s.
#include "kernels/cuda/cq_cuda.h"

namespace {

enum { THREADS = 256, EACH = 8 };

struct eight {
    __nv_bfloat162 v[4];
};

__global__ void __launch_bounds__(THREADS)
    round_bf16(const float *x, __nv_bfloat16 *y, int64_t n, bool aligned) {
    int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    if (aligned && at + EACH <= n) {
        float4 low = *reinterpret_cast<const float4 *>(x + at);
        float4 high = *reinterpret_cast<const float4 *>(x + at + 4);
        __align__(16) eight e;
        e.v[0] = __floats2bfloat162_rn(low.x, low.y);
        e.v[1] = __floats2bfloat162_rn(low.z, low.w);
        e.v[2] = __floats2bfloat162_rn(high.x, high.y);
        e.v[3] = __floats2bfloat162_rn(high.z, high.w);
        *reinterpret_cast<uint4 *>(y + at) = *reinterpret_cast<uint4 *>(&e);
        return;
    }
    for (int64_t i = at; i < at + EACH && i < n; i++)
        y[i] = __float2bfloat16(x[i]);
}

} // namespace

extern "C" int cq_cuda_round_bf16(cq_stream *s, const cq_round_bf16_args *a) {
    CQ_CUDA_F32("round_bf16", a);
    bool aligned = (((uintptr_t)a->x | (uintptr_t)a->y) & 15) == 0;
    CQ_LAUNCH(round_bf16, cq_blocks(a->n, THREADS * EACH), THREADS, 0, s,
              static_cast<const float *>(a->x), static_cast<__nv_bfloat16 *>(a->y), a->n, aligned);
    CQ_CUDA_END("round_bf16");
}
