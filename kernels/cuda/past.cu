/// past.cu - attention, convolution and scan of documents that go on from a past, for generation.
/// Formulas are kernels/ref's.
///
/// Written for decoding, a token of each sequence: attention has a block for each query and head
/// that reads the slot's keys and values once (a warp's threads neighbouring keys, then
/// neighbouring values); the scan has a block for each document and head that reads and writes its
/// state once a token. Pieces of prompts run through the same kernels: a query again reads all it
/// sees, and the scan goes token by token. Query heads of one kv head do not share what they read.
/// Not measured on a GPU yet.
#include "kernels/cuda/docs.cuh"
#include "kernels/cuda/float4.cuh"

namespace {

constexpr int THREADS = 128, MOST_DIM = 512;

template <typename T>
__global__ void __launch_bounds__(THREADS) keep_rows(cq_attention_cached_args a) {
    int64_t t = (int64_t)blockIdx.x, kv = (int64_t)blockIdx.y, dim = a.head_dim;
    int64_t d = cq_document_of(a.starts, a.n_docs, t), at = a.past[d] + t - a.starts[d];
    int64_t slot = ((int64_t)a.slot[d] * a.kv_heads + kv) * dim * a.room;
    const T *k = static_cast<const T *>(a.k) + t * a.ldk + kv * dim;
    const T *v = static_cast<const T *>(a.v) + t * a.ldv + kv * dim;
    float *keys = static_cast<float *>(a.k_cache) + slot;
    float *values = static_cast<float *>(a.v_cache) + slot;
    for (int64_t i = threadIdx.x; i < dim; i += THREADS) {
        keys[i * a.room + at] = cq_value(k[i]);
        values[at * dim + i] = cq_value(v[i]);
    }
}

/// The largest over a block, to every thread. `room` [THREADS / CQ_WARP] is shared.
__device__ __forceinline__ float block_max(float v, float *room) {
    v = cq_warp_max(v);
    if (threadIdx.x % CQ_WARP == 0)
        room[threadIdx.x / CQ_WARP] = v;
    __syncthreads();
    v = room[0];
    for (int w = 1; w < THREADS / CQ_WARP; w++)
        v = fmaxf(v, room[w]);
    __syncthreads();
    return v;
}

/// One query of one head; THREADS keys at a time, the running maximum and sum carried on.
template <typename T>
__global__ void __launch_bounds__(THREADS) attend_slot(cq_attention_cached_args a) {
    CQ_SHARED(float, q, [MOST_DIM]);
    CQ_SHARED(float, weight, [THREADS]);
    CQ_SHARED(float, tops, [THREADS / CQ_WARP]);
    CQ_SHARED(float, room, [32]);
    int64_t t = (int64_t)blockIdx.x, h = (int64_t)blockIdx.y, dim = a.head_dim;
    int64_t d = cq_document_of(a.starts, a.n_docs, t), seen = a.past[d] + t - a.starts[d] + 1;
    int64_t kv = h / (a.heads / a.kv_heads);
    int64_t slot = ((int64_t)a.slot[d] * a.kv_heads + kv) * dim * a.room;
    const float *keys = static_cast<const float *>(a.k_cache) + slot;
    const float *values = static_cast<const float *>(a.v_cache) + slot;
    T *out = static_cast<T *>(a.out) + (t * a.heads + h) * dim;
    float top = -INFINITY, sum = 0.0f, mixed[MOST_DIM / THREADS] = {};
    int tid = (int)threadIdx.x;
    for (int64_t i = tid; i < dim; i += THREADS)
        q[i] = cq_value(static_cast<const T *>(a.q)[t * a.ldq + h * dim + i]) * (float)a.scale;
    __syncthreads();
    for (int64_t k0 = 0; k0 < seen; k0 += THREADS) {
        int n = (int)(seen - k0 < THREADS ? seen - k0 : THREADS);
        float score = -INFINITY;
        if (tid < n) {
            score = 0.0f;
            for (int64_t i = 0; i < dim; i++)
                score += q[i] * keys[i * a.room + k0 + tid];
        }
        float now = fmaxf(top, block_max(score, tops));
        float w = tid < n ? expf(score - now) : 0.0f, factor = expf(top - now);
        weight[tid] = w;
        top = now;
        sum = sum * factor + cq_block_sum(w, room); /* and every weight is there */
#pragma unroll
        for (int j = 0; j < MOST_DIM / THREADS; j++) {
            int64_t i = tid + j * THREADS;
            float value = mixed[j] * factor;
            for (int s = 0; s < n && i < dim; s++)
                value += weight[s] * values[(k0 + s) * dim + i];
            mixed[j] = value;
        }
        __syncthreads(); /* before the next weights */
    }
#pragma unroll
    for (int j = 0; j < MOST_DIM / THREADS; j++)
        if (tid + j * THREADS < dim)
            cq_put(out + tid + j * THREADS, mixed[j] / sum);
}

/// The input `back` tokens before token t of document d, zero before its very start.
template <typename T>
__device__ __forceinline__ float input(const cq_conv_cached_args &a, int64_t d, int64_t t,
                                       int64_t back, int64_t c, const float *state) {
    int64_t from = t - a.starts[d] - back;
    if (from >= 0)
        return cq_value(static_cast<const T *>(a.x)[(t - back) * a.ldx + c]);
    return a.past[d] + from >= 0 ? state[(a.width - 1 + from) * a.channels + c] : 0.0f;
}

/// A thread has a channel of a document.
template <typename T> __global__ void __launch_bounds__(THREADS) conv_on(cq_conv_cached_args a) {
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x, d = (int64_t)blockIdx.y;
    int64_t kept = a.width - 1, end = a.starts[d + 1];
    if (c >= a.channels || end == a.starts[d])
        return;
    const float *w = static_cast<const float *>(a.w) + c * a.width;
    float *state = static_cast<float *>(a.state) + (int64_t)a.slot[d] * kept * a.channels;
    float bias = a.b ? static_cast<const float *>(a.b)[c] : 0.0f;
    for (int64_t t = a.starts[d]; t < end; t++) {
        float sum = bias;
        for (int64_t k = 0; k <= kept; k++)
            sum += w[k] * input<T>(a, d, t, kept - k, c, state);
        cq_put(static_cast<T *>(a.y) + t * a.channels + c, sum / (1.0f + expf(-sum)));
    }
    for (int64_t r = 0; r < kept; r++) /* row r comes from further on, so in place */
        state[r * a.channels + c] = input<T>(a, d, end - 1, kept - 1 - r, c, state);
}

/// A head of a document: thread (slice, p) has the entries of column p with n = slice, slice +
/// slices ...
template <typename T> __global__ void scan_on(cq_ssd_cached_args a, int slices) {
    CQ_DYN_SMEM(float, part); /* [slices, head_dim] */
    int64_t d = (int64_t)blockIdx.x, h = (int64_t)blockIdx.y, P = a.head_dim, N = a.state;
    int64_t group = h / (a.heads / a.groups), p = threadIdx.x % P, slice = threadIdx.x / P;
    float *S = static_cast<float *>(a.S) + ((int64_t)a.slot[d] * a.heads + h) * N * P + p;
    float rate = (float)-exp((double)static_cast<const float *>(a.a_log)[h]);
    float skip = static_cast<const float *>(a.d)[h];
    bool past = a.past[d] > 0;
    for (int64_t t = a.starts[d]; t < a.starts[d + 1]; t++, past = true) {
        float x = cq_value(static_cast<const T *>(a.x)[t * a.ldx + h * P + p]);
        const T *b = static_cast<const T *>(a.B) + t * a.ldB + group * N;
        const T *c = static_cast<const T *>(a.C) + t * a.ldC + group * N;
        float raw = cq_value(static_cast<const T *>(a.dt_raw)[t * a.ld_dt + h]) +
                    static_cast<const float *>(a.dt_bias)[h];
        float dt = raw > 20.0f ? raw : log1pf(expf(raw)), decay = expf(rate * dt), sum = 0.0f;
        for (int64_t n = slice; n < N && slice < slices; n += slices) {
            float now = dt * cq_value(b[n]) * x + (past ? decay * S[n * P] : 0.0f);
            S[n * P] = now;
            sum += cq_value(c[n]) * now;
        }
        if (slice < slices) /* whole warps may hold more threads than there is work for */
            part[threadIdx.x] = sum;
        __syncthreads();
        if (slice == 0) {
            for (int k = 1; k < slices; k++)
                sum += part[k * P + p];
            cq_put(static_cast<T *>(a.y) + (t * a.heads + h) * P + p, sum + skip * x);
        }
        __syncthreads();
    }
}

template <typename T> int attention_of(cq_stream *s, const cq_attention_cached_args *a) {
    CQ_LAUNCH(keep_rows<T>, dim3((unsigned)a->tokens, (unsigned)a->kv_heads), THREADS, 0, s, *a);
    CQ_LAUNCH(attend_slot<T>, dim3((unsigned)a->tokens, (unsigned)a->heads), THREADS, 0, s, *a);
    CQ_CUDA_END("attention_cached");
}
template <typename T> int conv_of(cq_stream *s, const cq_conv_cached_args *a) {
    CQ_LAUNCH(conv_on<T>, dim3(cq_blocks(a->channels, THREADS), (unsigned)a->n_docs), THREADS, 0, s,
              *a);
    CQ_CUDA_END("conv_cached");
}
template <typename T> int scan_of(cq_stream *s, const cq_ssd_cached_args *a) {
    int64_t slices = a->head_dim < 256 ? 256 / a->head_dim : 1;
    int64_t threads = (slices * a->head_dim + CQ_WARP - 1) / CQ_WARP * CQ_WARP;
    CQ_LAUNCH(scan_on<T>, dim3((unsigned)a->n_docs, (unsigned)a->heads), (unsigned)threads,
              static_cast<size_t>(threads) * sizeof(float), s, *a, (int)slices);
    CQ_CUDA_END("ssd_cached");
}

} // namespace

extern "C" int cq_cuda_attention_cached(cq_stream *s, const cq_attention_cached_args *a) {
    CQ_CUDA_ACT("attention_cached", a);
    if (a->head_dim > MOST_DIM)
        return cq_fail(CQ_EUSAGE, "cuda: attention_cached: heads of %lld, wanted at most %d",
                       (long long)a->head_dim, MOST_DIM);
    if (a->tokens < 1)
        return CQ_OK;
    return a->act == CQ_BF16 ? attention_of<__nv_bfloat16>(s, a) : attention_of<float>(s, a);
}

extern "C" int cq_cuda_conv_cached(cq_stream *s, const cq_conv_cached_args *a) {
    CQ_CUDA_ACT("conv_cached", a);
    if (a->tokens < 1)
        return CQ_OK;
    return a->act == CQ_BF16 ? conv_of<__nv_bfloat16>(s, a) : conv_of<float>(s, a);
}

extern "C" int cq_cuda_ssd_cached(cq_stream *s, const cq_ssd_cached_args *a) {
    CQ_CUDA_ACT("ssd_cached", a);
    if (a->head_dim > 1024)
        return cq_fail(CQ_EUSAGE, "cuda: ssd_cached: heads of %lld, wanted at most 1024",
                       (long long)a->head_dim);
    if (a->tokens < 1)
        return CQ_OK;
    return a->act == CQ_BF16 ? scan_of<__nv_bfloat16>(s, a) : scan_of<float>(s, a);
}
