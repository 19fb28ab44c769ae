/// update.cu - AdamW with the fake-quantized copy in the same pass, sums of squares, axpy.
///
/// Qwen3-4B, 4.0e9 parameters: AdamW reads w, m, v, g and writes w, m, v, wq: 32 bytes each, 129
/// GB, 30 ms at 4.3 TB/s; the sum of squares reads 16 GB, 3.7 ms. All are bound by memory.
#include "kernels/cuda/adam.cuh"
#include "kernels/cuda/fake.cuh"

namespace {

constexpr int THREADS = 256, SUM_BLOCKS = 528, SUM_STEPS = 4;

/// Source of cq_fake_flat: updates four weights and gives them.
struct adam_source {
    cq_adam_numbers n;
    float *w, *m, *v;
    const float *g;
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        int64_t at = 4 * quarter;
        cq_adam_numbers k = cq_adam_read(n);
        float4 x = cq_load4(w + at, aligned), mm = cq_load4(m + at, aligned);
        float4 vv = cq_load4(v + at, aligned), gg = cq_load4(g + at, aligned);
        x.x = cq_adam_value(k, x.x, mm.x, vv.x, gg.x);
        x.y = cq_adam_value(k, x.y, mm.y, vv.y, gg.y);
        x.z = cq_adam_value(k, x.z, mm.z, vv.z, gg.z);
        x.w = cq_adam_value(k, x.w, mm.w, vv.w, gg.w);
        cq_store4(w + at, x, aligned);
        cq_store4(m + at, mm, aligned);
        cq_store4(v + at, vv, aligned);
        return x;
    }
};

/// The last values of a length that is no multiple of 4.
__global__ void __launch_bounds__(THREADS)
    adam_rest(cq_adam_numbers n, float *w, float *m, float *v, const float *g, float *wq,
              int64_t from, int64_t to) {
    int64_t i = from + (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= to)
        return;
    float mm = m[i], vv = v[i], x = cq_adam_value(cq_adam_read(n), w[i], mm, vv, g[i]);
    w[i] = x;
    m[i] = mm;
    v[i] = vv;
    if (wq)
        wq[i] = x;
}

/// A thread adds SUM_STEPS times four values and goes on one grid of threads further; the sum of a
/// block goes to part[blockIdx]. Whether x is aligned changes no bit.
__global__ void __launch_bounds__(THREADS, 4)
    square_parts(const float *x, int64_t n, bool aligned, double *part) {
    CQ_SHARED(double, room, [CQ_WARP]);
    double sum[4] = {};
    int64_t first = ((int64_t)blockIdx.x * SUM_STEPS * THREADS + threadIdx.x) * 4;
    for (; first < n; first += (int64_t)gridDim.x * SUM_STEPS * THREADS * 4) {
        float4 v[SUM_STEPS];
#pragma unroll
        for (int k = 0; k < SUM_STEPS; k++) {
            int64_t at = first + k * THREADS * 4;
            v[k] = cq_zero4();
            if (at + 4 <= n)
                v[k] = cq_load4(x + at, aligned);
            else if (at < n)
                v[k] = make_float4(x[at], at + 1 < n ? x[at + 1] : 0.0f,
                                   at + 2 < n ? x[at + 2] : 0.0f, 0.0f);
        }
#pragma unroll
        for (int k = 0; k < SUM_STEPS; k++) {
            sum[0] += (double)v[k].x * (double)v[k].x;
            sum[1] += (double)v[k].y * (double)v[k].y;
            sum[2] += (double)v[k].z * (double)v[k].z;
            sum[3] += (double)v[k].w * (double)v[k].w;
        }
    }
    double total = cq_block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), room);
    if (threadIdx.x == 0)
        part[blockIdx.x] = total;
}
__global__ void __launch_bounds__(THREADS) add_squares(const double *part, int n, double *out) {
    CQ_SHARED(double, room, [CQ_WARP]);
    double sum = 0.0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        sum += part[i];
    sum = cq_block_sum(sum, room);
    if (threadIdx.x == 0)
        *out += sum;
}

/// Four values a thread where all is aligned, else one of four.
__global__ void __launch_bounds__(THREADS)
    axpy_four(const float *x, float *y, float alpha, float beta, int64_t n, bool aligned) {
    int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (aligned && at + 4 <= n) {
        float4 v = cq_scale4(*(const float4 *)(x + at), alpha);
        if (beta != 0.0f)
            v = cq_plus4(v, cq_scale4(*(const float4 *)(y + at), beta));
        *(float4 *)(y + at) = v;
        return;
    }
    for (int64_t i = at; i < at + 4 && i < n; i++)
        y[i] = beta != 0.0f ? alpha * x[i] + beta * y[i] : alpha * x[i];
}

} // namespace

extern "C" int cq_cuda_adamw(cq_stream *s, const cq_adamw_args *a) {
    CQ_CUDA_F32("adamw", a);
    if (!a->now && a->step < 1)
        return cq_fail(CQ_EUSAGE, "adamw: step %lld, wanted 1 or more", (long long)a->step);
    if (a->wq)
        CQ_TRY(cq_fake_columns(a->fq, a->cols));
    if (a->master != CQ_MASTER_F32 || a->moments != CQ_MOMENTS_F32)
        return cq_cuda_adamw_narrow(s, a);
    int64_t n = a->rows * a->cols, whole = n / 4 * 4;
    adam_source source = {};
    source.n = cq_adam_numbers_of(a);
    source.w = (float *)a->w;
    source.m = (float *)a->m;
    source.v = (float *)a->v;
    source.g = (const float *)a->g;
    source.aligned =
        cq_aligned16(a->w) && cq_aligned16(a->m) && cq_aligned16(a->v) && cq_aligned16(a->g);
    cq_fake_job<float> job = cq_fake_job_make<float>(a->rows, a->cols, NULL, a->wq, a->fq);
    job.quarters = n / 4;
    job.block_amax = a->block_amax;
    job.top = a->top;
    if (a->block_amax)
        cq_fake_launch<true>(s, source, job);
    else
        cq_fake_launch<false>(s, source, job);
    if (whole < n)
        CQ_LAUNCH(adam_rest, 1, THREADS, 0, s, source.n, source.w, source.m, source.v, source.g,
                  (float *)a->wq, whole, n);
    CQ_CUDA_END("adamw");
}

extern "C" int cq_cuda_sumsq(cq_stream *s, const cq_sumsq_args *a) {
    CQ_CUDA_F32("sumsq", a);
    if (a->n < 1)
        return CQ_OK;
    unsigned blocks = cq_blocks(a->n, THREADS * SUM_STEPS * 4);
    blocks = blocks < (unsigned)SUM_BLOCKS ? blocks : (unsigned)SUM_BLOCKS;
    double *part = (double *)cq_cuda_scratch(s, (int64_t)blocks * (int64_t)sizeof(double));
    if (!part)
        return CQ_ENOMEM;
    CQ_LAUNCH(square_parts, blocks, THREADS, 0, s, (const float *)a->x, a->n, cq_aligned16(a->x),
              part);
    CQ_LAUNCH(add_squares, 1, THREADS, 0, s, part, (int)blocks, a->out);
    CQ_CUDA_END("sumsq");
}

extern "C" int cq_cuda_axpy(cq_stream *s, const cq_axpy_args *a) {
    CQ_CUDA_F32("axpy", a);
    if (a->n < 1)
        return CQ_OK;
    CQ_LAUNCH(axpy_four, cq_blocks(a->n, THREADS * 4), THREADS, 0, s, (const float *)a->x,
              (float *)a->y, (float)a->alpha, (float)a->beta, a->n,
              cq_aligned16(a->x) && cq_aligned16(a->y));
    CQ_CUDA_END("axpy");
}
