/// quant.cu - fake quantization of dense rows, and the largest magnitude of each group of rows.
///
/// fake_quant at 8192 x 2688 (22 M elements): 176 MB, about 17 instructions per element; bound by
/// memory, 44 us at 4 TB/s. The expert weights of a block, 128 x 1856 x 2688: 5.1 GB, 1.3 ms.
/// amax of the same: half the bytes.
#include "kernels/cuda/fake.cuh"

/// y = x where rows are no whole quarters.
template <typename T>
static __global__ void __launch_bounds__(256) copy_singly(int64_t n, const T *x, T *y) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = x[i];
}

template <typename T> static int fake_quant(cq_stream *s, const cq_fake_quant_args *a) {
    int64_t n = a->rows * a->cols;
    const T *x = (const T *)a->x;
    if (a->cols % 4) {
        CQ_LAUNCH(copy_singly<T>, cq_blocks(n, 256), 256, 0, s, n, x, (T *)a->y);
        CQ_CUDA_END("fake_quant");
    }
    cq_fake_job<T> job = cq_fake_job_make<T>(a->rows, a->cols, NULL, a->y, a->fq);
    job.block_amax = a->block_amax;
    job.top = a->top;
    cq_fake_dense<T> source = {x, cq_aligned4<T>(x)};
    if (a->block_amax)
        cq_fake_launch<true>(s, source, job);
    else
        cq_fake_launch<false>(s, source, job);
    CQ_CUDA_END("fake_quant");
}

extern "C" int cq_cuda_fake_quant(cq_stream *s, const cq_fake_quant_args *a) {
    CQ_CUDA_ACT("fake_quant", a);
    CQ_TRY(cq_fake_columns(a->fq, a->cols));
    if (a->rows * a->cols == 0 || (!a->fq.amax && a->x == a->y))
        return CQ_OK;
    return a->act == CQ_BF16 ? fake_quant<__nv_bfloat16>(s, a) : fake_quant<float>(s, a);
}

/// Values of one load; singles where the rows or the pointer are not made of quarters.
template <int V> struct amax_load;
template <> struct amax_load<4> {
    template <typename T> __device__ static float largest(const T *x) {
        float4 v = cq_load4(x, true);
        return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    }
};
template <> struct amax_load<1> {
    template <typename T> __device__ static float largest(const T *x) {
        return fabsf(cq_value(*x));
    }
};
enum { AMAX_THREADS = 256, AMAX_AHEAD = 4, AMAX_STEPS = 16 };

/// Magnitudes order like their bits. A maximum that is already as large is left alone, so that few
/// warps meet at one address.
static __device__ __forceinline__ void amax_raise(float *amax, float v) {
    if (v > *amax)
        atomicMax((int *)amax, __float_as_int(v));
}

/// A warp takes 32 * AMAX_STEPS units of V values in a row. The maximum of integers does not depend
/// on the order of the warps; fmaxf leaves out a NaN.
template <int V, typename T>
static __global__ void __launch_bounds__(AMAX_THREADS)
    amax_units(int64_t units, int64_t per_row, const T *x, const int64_t *offsets, int64_t n_groups,
               float *amax) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t warp = ((int64_t)blockIdx.x * AMAX_THREADS + threadIdx.x) / CQ_WARP;
    int64_t first = warp * CQ_WARP * AMAX_STEPS;
    if (first >= units)
        return;
    n_groups = offsets ? n_groups : 1;
    int64_t g = cq_warp_group_of_row(offsets, n_groups, first, per_row);
    float best = 0.0f;
    for (int step = 0; step < AMAX_STEPS; step += AMAX_AHEAD) {
        float m[AMAX_AHEAD];
#pragma unroll
        for (int k = 0; k < AMAX_AHEAD; k++) {
            int64_t at = first + (step + k) * CQ_WARP + lane;
            m[k] = at < units ? amax_load<V>::largest(x + V * at) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < AMAX_AHEAD; k++) {
            int64_t at = first + (step + k) * CQ_WARP + lane;
            int64_t now = at < units ? cq_group_onwards(offsets, n_groups, g, at, per_row) : g;
            if (now != g) {
                amax_raise(amax + g, best);
                g = now;
                best = 0.0f;
            }
            best = fmaxf(best, m[k]);
        }
    }
    int64_t g0 = __shfl_sync(0xffffffffu, g, 0);
    if (__ballot_sync(0xffffffffu, g != g0)) {
        amax_raise(amax + g, best);
        return;
    }
    best = cq_warp_max(best);
    if (lane == 0)
        amax_raise(amax + g, best);
}

template <typename T> static int amax(cq_stream *s, const cq_amax_args *a) {
    const T *x = (const T *)a->x;
    int64_t n = a->rows * a->cols, per_block = (int64_t)AMAX_THREADS * AMAX_STEPS;
    if (a->cols % 4 == 0 && cq_aligned4<T>(x))
        CQ_LAUNCH((amax_units<4, T>), cq_blocks(n / 4, per_block), AMAX_THREADS, 0, s, n / 4,
                  a->cols / 4, x, a->offsets, a->n_groups, a->amax);
    else
        CQ_LAUNCH((amax_units<1, T>), cq_blocks(n, per_block), AMAX_THREADS, 0, s, n, a->cols, x,
                  a->offsets, a->n_groups, a->amax);
    CQ_CUDA_END("amax");
}

extern "C" int cq_cuda_amax(cq_stream *s, const cq_amax_args *a) {
    CQ_CUDA_ACT("amax", a);
    if (a->rows * a->cols == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? amax<__nv_bfloat16>(s, a) : amax<float>(s, a);
}
