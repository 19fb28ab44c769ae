/// activations.cu - SwiGLU and squared ReLU, with their gradients; formulas are
/// kernels/ref/activations.inc.h's.
///
/// All are bound by memory. 8192 tokens of Qwen3-4B (9728 wide, 80 M elements of h): swiglu_forward
/// 12 bytes per element of h and result, 956 MB, 240 us at 4 TB/s; swiglu_backward 20 bytes, 400
/// us. Nano's experts (49152 rows of 1856, 91 M elements): relu2_forward 8 bytes, 180 us;
/// relu2_backward 12 bytes, 275 us. Fake quantization rides along (fake.cuh); a sigmoid costs about
/// 25 instructions.
#include "kernels/cuda/fake.cuh"

static __device__ __forceinline__ float swiglu(float gate, float up) {
    return gate * cq_sigmoid(gate) * up;
}
template <typename T> struct swiglu_source {
    const T *gu;
    int64_t dim;
    cq_divider quarters; ///< of a row of h
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        const T *at = gu + 4 * quarter + cq_divide(quarter, quarters) * dim;
        float4 gate = cq_load4(at, aligned), up = cq_load4(at + dim, aligned);
        return make_float4(swiglu(gate.x, up.x), swiglu(gate.y, up.y), swiglu(gate.z, up.z),
                           swiglu(gate.w, up.w));
    }
};
/// Rows that are no whole quarters.
template <typename T>
static __global__ void __launch_bounds__(256)
    swiglu_singly(int64_t n, int64_t dim, const T *gu, T *h, T *hq) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    const T *at = gu + i + i / dim * dim;
    float v = swiglu(cq_value(at[0]), cq_value(at[dim]));
    if (h)
        cq_put(h + i, v);
    if (hq)
        cq_put(hq + i, v);
}

template <typename T> static int swiglu_forward(cq_stream *s, const cq_swiglu_forward_args *a) {
    if (a->hq)
        CQ_TRY(cq_fake_columns(a->fq, a->dim));
    int64_t n = a->rows * a->dim;
    const T *gu = (const T *)a->gu;
    if (n == 0 || (!a->h && !a->hq))
        return CQ_OK;
    if (a->dim % 4) {
        CQ_LAUNCH(swiglu_singly<T>, cq_blocks(n, 256), 256, 0, s, n, a->dim, gu, (T *)a->h,
                  (T *)a->hq);
        CQ_CUDA_END("swiglu_forward");
    }
    swiglu_source<T> source = {gu, a->dim, cq_divider_make(a->dim / 4), cq_aligned4<T>(gu)};
    cq_fake_launch<false>(s, source, cq_fake_job_make<T>(a->rows, a->dim, a->h, a->hq, a->fq));
    CQ_CUDA_END("swiglu_forward");
}
extern "C" int cq_cuda_swiglu_forward(cq_stream *s, const cq_swiglu_forward_args *a) {
    CQ_CUDA_ACT("swiglu_forward", a);
    return a->act == CQ_BF16 ? swiglu_forward<__nv_bfloat16>(s, a) : swiglu_forward<float>(s, a);
}

static __device__ __forceinline__ void swiglu_slopes(float gate, float up, float dh, float *dgate,
                                                     float *dup) {
    float s = cq_sigmoid(gate);
    *dgate = dh * up * s * (1.0f + gate * (1.0f - s));
    *dup = dh * gate * s;
}
template <typename T>
static __global__ void __launch_bounds__(256)
    swiglu_backward_quarters(int64_t n, int64_t dim, cq_divider quarters, const T *gu, const T *dh,
                             T *dgu) {
    int64_t quarter = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (quarter >= n)
        return;
    int64_t at = 4 * quarter + cq_divide(quarter, quarters) * dim;
    float4 gate = cq_load4(gu + at, true), up = cq_load4(gu + at + dim, true);
    float4 d = cq_load4(dh + 4 * quarter, true), dgate, dup;
    swiglu_slopes(gate.x, up.x, d.x, &dgate.x, &dup.x);
    swiglu_slopes(gate.y, up.y, d.y, &dgate.y, &dup.y);
    swiglu_slopes(gate.z, up.z, d.z, &dgate.z, &dup.z);
    swiglu_slopes(gate.w, up.w, d.w, &dgate.w, &dup.w);
    cq_store4(dgu + at, dgate, true);
    cq_store4(dgu + at + dim, dup, true);
}
template <typename T>
static __global__ void __launch_bounds__(256)
    swiglu_backward_singly(int64_t n, int64_t dim, const T *gu, const T *dh, T *dgu) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    int64_t at = i + i / dim * dim;
    float dgate, dup;
    swiglu_slopes(cq_value(gu[at]), cq_value(gu[at + dim]), cq_value(dh[i]), &dgate, &dup);
    cq_put(dgu + at, dgate);
    cq_put(dgu + at + dim, dup);
}

template <typename T> static int swiglu_backward(cq_stream *s, const cq_swiglu_backward_args *a) {
    int64_t n = a->rows * a->dim;
    const T *gu = (const T *)a->gu, *dh = (const T *)a->dh;
    T *dgu = (T *)a->dgu;
    if (n == 0)
        return CQ_OK;
    if (a->dim % 4 == 0 && cq_aligned4<T>(gu) && cq_aligned4<T>(dh) && cq_aligned4<T>(dgu))
        CQ_LAUNCH(swiglu_backward_quarters<T>, cq_blocks(n / 4, 256), 256, 0, s, n / 4, a->dim,
                  cq_divider_make(a->dim / 4), gu, dh, dgu);
    else
        CQ_LAUNCH(swiglu_backward_singly<T>, cq_blocks(n, 256), 256, 0, s, n, a->dim, gu, dh, dgu);
    CQ_CUDA_END("swiglu_backward");
}
extern "C" int cq_cuda_swiglu_backward(cq_stream *s, const cq_swiglu_backward_args *a) {
    CQ_CUDA_ACT("swiglu_backward", a);
    return a->act == CQ_BF16 ? swiglu_backward<__nv_bfloat16>(s, a) : swiglu_backward<float>(s, a);
}

static __device__ __forceinline__ float relu2(float x) {
    float v = x > 0.0f ? x : 0.0f;
    return v * v;
}
template <typename T> struct relu2_source {
    const T *x;
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        float4 v = cq_load4(x + 4 * quarter, aligned);
        return make_float4(relu2(v.x), relu2(v.y), relu2(v.z), relu2(v.w));
    }
};
template <typename T>
static __global__ void __launch_bounds__(256) relu2_singly(int64_t n, const T *x, T *h, T *hq) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    float v = relu2(cq_value(x[i]));
    if (h)
        cq_put(h + i, v);
    if (hq)
        cq_put(hq + i, v);
}

template <typename T> static int relu2_forward(cq_stream *s, const cq_relu2_forward_args *a) {
    if (a->hq)
        CQ_TRY(cq_fake_columns(a->fq, a->dim));
    int64_t n = a->rows * a->dim;
    const T *x = (const T *)a->x;
    if (n == 0 || (!a->h && !a->hq))
        return CQ_OK;
    if (a->dim % 4)
        CQ_LAUNCH(relu2_singly<T>, cq_blocks(n, 256), 256, 0, s, n, x, (T *)a->h, (T *)a->hq);
    else
        cq_fake_launch<false>(s, relu2_source<T>{x, cq_aligned4<T>(x)},
                              cq_fake_job_make<T>(a->rows, a->dim, a->h, a->hq, a->fq));
    CQ_CUDA_END("relu2_forward");
}
extern "C" int cq_cuda_relu2_forward(cq_stream *s, const cq_relu2_forward_args *a) {
    CQ_CUDA_ACT("relu2_forward", a);
    return a->act == CQ_BF16 ? relu2_forward<__nv_bfloat16>(s, a) : relu2_forward<float>(s, a);
}

static __device__ __forceinline__ float relu2_slope(float x, float dh) {
    return x > 0.0f ? 2.0f * x * dh : 0.0f;
}
/// Two quarters per thread; dx may be dh.
template <typename T>
static __global__ void __launch_bounds__(256)
    relu2_backward_quarters(int64_t n, const T *x, const T *dh, T *dx) {
    int64_t first = (int64_t)blockIdx.x * 512 + threadIdx.x;
    float4 v[2], d[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t at = first + k * 256;
        if (at < n) {
            v[k] = cq_load4(x + 4 * at, true);
            d[k] = cq_load4(dh + 4 * at, true);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t at = first + k * 256;
        if (at < n)
            cq_store4(dx + 4 * at,
                      make_float4(relu2_slope(v[k].x, d[k].x), relu2_slope(v[k].y, d[k].y),
                                  relu2_slope(v[k].z, d[k].z), relu2_slope(v[k].w, d[k].w)),
                      true);
    }
}
template <typename T>
static __global__ void __launch_bounds__(256)
    relu2_backward_singly(int64_t n, const T *x, const T *dh, T *dx) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        cq_put(dx + i, relu2_slope(cq_value(x[i]), cq_value(dh[i])));
}

template <typename T> static int relu2_backward(cq_stream *s, const cq_relu2_backward_args *a) {
    int64_t n = a->rows * a->dim;
    const T *x = (const T *)a->x, *dh = (const T *)a->dh;
    T *dx = (T *)a->dx;
    if (n == 0)
        return CQ_OK;
    if (n % 4 == 0 && cq_aligned4<T>(x) && cq_aligned4<T>(dh) && cq_aligned4<T>(dx))
        CQ_LAUNCH(relu2_backward_quarters<T>, cq_blocks(n / 4, 512), 256, 0, s, n / 4, x, dh, dx);
    else
        CQ_LAUNCH(relu2_backward_singly<T>, cq_blocks(n, 256), 256, 0, s, n, x, dh, dx);
    CQ_CUDA_END("relu2_backward");
}
extern "C" int cq_cuda_relu2_backward(cq_stream *s, const cq_relu2_backward_args *a) {
    CQ_CUDA_ACT("relu2_backward", a);
    return a->act == CQ_BF16 ? relu2_backward<__nv_bfloat16>(s, a) : relu2_backward<float>(s, a);
}
