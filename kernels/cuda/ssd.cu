/// ssd.cu - the Mamba-2 scan in chunks of 64 tokens: the forward, and what the backward
/// (ssd_backward.cu) computes again of it.
///
/// Symbols are those of kernels/cpu/ssd.h; a chunk lies in one document. With cs the running sum of
/// A dt in the chunk, L[t, s] = exp(cs_t - cs_s), e_t = exp(cs_t), gamma_s = exp(cs_end - cs_s):
///     y_t = sum_{s <= t} L[t, s] (C_t . B_s) dt_s x_s + e_t S_in' C_t + D x_t
///     S_out = exp(cs_end) S_in + sum_s gamma_s dt_s B_s x_s'
/// cs is summed in double and kept as two floats, so differences of large sums keep their digits;
/// no exponent is positive. States between chunks lie in scratch as [state, head_dim] and are
/// passed on one after the other, all heads and elements side by side. The backward's formulas are
/// those of kernels/cpu/simd_ssd_backward.c.
///
/// Products are 64 x 64 tiles (ssd_tiles.cuh). Nemotron 3 Nano, 8192 tokens, 64 heads x 64, 8
/// groups, state 128: forward 23 GFLOP (0.6 ms at 40 TFLOP/s in FP32), 1.4 GB, of which 1.0 GB are
/// states (0.33 ms); backward 65 GFLOP, 3 GB (1.6 ms, 0.7 ms); scratch 0.3 and 0.6 GB. Activations
/// in BF16: 1.2 and 2.5 GB, and on tensor cores they need no second part (one or two products for
/// three).
#include "kernels/cuda/ssd.cuh"

namespace {

// ---- chunks and decays --------------------------------------------------------------------------

__device__ __forceinline__ cq_chunk find_chunk(const int64_t *starts, int64_t n_docs,
                                               int64_t number) {
    int64_t low = 0, high = n_docs;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] / CHUNK + middle <= number)
            low = middle;
        else
            high = middle;
    }
    int64_t begin = starts[low], end = starts[low + 1];
    int64_t index = number - begin / CHUNK - low, left = end - begin - index * CHUNK;
    cq_chunk c;
    c.t0 = begin + index * CHUNK;
    c.after = begin / CHUNK + index;
    c.n = left < 0 ? 0 : left < CHUNK ? (int32_t)left : CHUNK;
    c.index = (int32_t)index;
    c.last = left <= CHUNK;
    c.owner = c.after < end / CHUNK;
    return c;
}

constexpr int DECAY_WARPS = 8;
/// A warp per chunk and head: dt, cs and what passes through the chunk; two tokens a lane.
template <typename T> __global__ void __launch_bounds__(DECAY_WARPS *CQ_WARP) decays(cq_scan<T> a) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t h = (int64_t)blockIdx.y * DECAY_WARPS + threadIdx.x / CQ_WARP;
    cq_chunk c = find_chunk(a.starts, a.n_docs, blockIdx.x);
    if (h == 0 && lane == 0)
        a.chunks[blockIdx.x] = c;
    if (h >= a.heads) /* the whole warp */
        return;
    double rate = -exp((double)a.a_log[h]), step[2];
    float dt[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = 2 * lane + i;
        float z = t < c.n ? cq_value(a.dt_raw[(c.t0 + t) * a.ld_dt + h]) + a.dt_bias[h] : 0.0f;
        dt[i] = z > 20.0f ? z : log1pf(expf(z));
        step[i] = t < c.n ? rate * (double)dt[i] : 0.0;
    }
    double sum = step[0] + step[1];
    for (int d = 1; d < CQ_WARP; d *= 2) {
        double before = __shfl_up_sync(0xffffffffu, sum, (unsigned)d);
        if (lane >= d)
            sum += before;
    }
    double end = __shfl_sync(0xffffffffu, sum, CQ_WARP - 1);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = 2 * lane + i;
        double cs = i ? sum : sum - step[1];
        float high = (float)cs;
        if (t < c.n) {
            int64_t at = h * a.tokens + c.t0 + t;
            a.dt[at] = dt[i];
            a.high[at] = high;
            a.low[at] = (float)(cs - (double)high);
        }
    }
    if (lane == 0 && c.owner)
        a.keep[c.after * a.heads + h] = c.n == 0 || c.last ? -1.0f
                                        : c.index == 0     ? 0.0f
                                                           : expf((float)end);
}

/// L[t, s] (C_t . B_s) dt_s for s <= t.
struct decayed_pairs {
    static constexpr bool EXACT = false;
    rows<float> cb;
    const chunk_decays *w;
    __device__ __forceinline__ float4 at(int t, int s) const {
        if (t >= cb.n || s > t)
            return cq_zero4();
        float4 v = *(const float4 *)(cb.p + t * cb.ld + s);
        float high = w->high[t], low = w->low[t];
        v.x *= decay_of(high - w->high[s], low - w->low[s]) * w->dt[s];
        v.y *=
            s + 1 > t ? 0.0f : decay_of(high - w->high[s + 1], low - w->low[s + 1]) * w->dt[s + 1];
        v.z *=
            s + 2 > t ? 0.0f : decay_of(high - w->high[s + 2], low - w->low[s + 2]) * w->dt[s + 2];
        v.w *=
            s + 3 > t ? 0.0f : decay_of(high - w->high[s + 3], low - w->low[s + 3]) * w->dt[s + 3];
        return v;
    }
};

// ---- forward ------------------------------------------------------------------------------------

/// C B' of a chunk and group.
template <typename E, typename T>
__global__ void __launch_bounds__(THREADS) pair_products(cq_scan<T> a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    cq_chunk c = a.chunks[blockIdx.x];
    if (c.n == 0) /* the whole block, here and below */
        return;
    int64_t g = blockIdx.y;
    float acc[PER_THREAD];
    clear(acc);
    E::template product<true, true>((float *)room, acc, c_rows(a, c, g, 0), b_rows(a, c, g, 0),
                                    (int)a.state);
    store_tile<E>(a.cb + (c.t0 * a.groups + g) * CHUNK, a.groups * CHUNK, acc, c.n, CHUNK, true);
}

/// y of a chunk and head, 64 of its columns.
template <typename E, typename T>
__global__ void __launch_bounds__(THREADS, 4) chunk_outputs(cq_scan<T> a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    CQ_SHARED(chunk_decays, w, [1]);
    CQ_SHARED(float, e, [CHUNK]);
    cq_chunk c = a.chunks[blockIdx.x];
    if (c.n == 0)
        return;
    int64_t h = blockIdx.y, g = h / a.share, p0 = blockIdx.z * CHUNK;
    load_decays(w, a, c, h);
    if (threadIdx.x < CHUNK)
        e[threadIdx.x] = weight_of(a, c, h, (int)threadIdx.x, true);
    __syncthreads();
    float acc[PER_THREAD];
    clear(acc);
    if (c.index > 0) {
        weighted<T> left = {c_rows(a, c, g, 0), e};
        E::template product<true, false>(
            (float *)room, acc, left, state_rows(a, a.states, c.after - 1, h, 0, p0), (int)a.state);
    }
    rows<T> x = x_rows(a, c, h, p0);
    decayed_pairs left = {pair_rows(a, a.cb, c, g), w};
    E::template product<true, false>((float *)room, acc, left, x, c.n);
    float skip = a.d[h];
#pragma unroll
    for (int q = 0; q < E::ROWS; q++)
        if (E::row(q) < c.n)
#pragma unroll
            for (int u = 0; u < E::RUNS; u++)
#pragma unroll
                for (int j = 0; j < E::RUN; j++)
                    if (E::column(u) + j < x.cols)
                        acc[E::index(q, u, j)] +=
                            skip * cq_value(x.p[E::row(q) * x.ld + E::column(u) + j]);
    store_tile<E>(a.y + c.t0 * a.heads * a.dim + h * a.dim + p0, a.heads * a.dim, acc, c.n, x.cols,
                  a.vec_y);
}

// ---- host ---------------------------------------------------------------------------------------

/// C B', and the states at all boundaries.
template <typename E, typename T> void make_states(cq_stream *s, const cq_scan<T> &a) {
    unsigned numbers = (unsigned)chunk_numbers(a), heads = (unsigned)a.heads;
    unsigned tiles = cq_blocks(a.state, CHUNK) * cq_blocks(a.dim, CHUNK);
    CQ_LAUNCH(decays<T>, dim3(numbers, cq_blocks(a.heads, DECAY_WARPS)), DECAY_WARPS * CQ_WARP, 0,
              s, a);
    CQ_LAUNCH((pair_products<E, T>), dim3(numbers, (unsigned)a.groups), THREADS, 0, s, a);
    if (a.boundaries > 0)
        CQ_LAUNCH((own_states<E, T, false>), dim3(numbers, heads, tiles), THREADS, 0, s, a);
    pass<false>(s, a);
}
template <typename E, typename T> void outputs(cq_stream *s, const cq_scan<T> &a) {
    dim3 grid((unsigned)chunk_numbers(a), (unsigned)a.heads, cq_blocks(a.dim, CHUNK));
    CQ_LAUNCH((chunk_outputs<E, T>), grid, THREADS, 0, s, a);
}

template <typename T> int forward_of(cq_stream *s, const cq_ssd_forward_args *a) {
    cq_scan<T> w = scan_of<T>(a);
    w.y = (T *)a->y;
    w.vec_y = a->head_dim % 4 == 0 && cq_aligned4<T>(a->y);
    CQ_TRY(take_scratch(s, &w, false));
    cq_make_states(s, w);
    if (s->compute == CQ_COMPUTE_BF16)
        outputs<engine_bf16>(s, w);
    else
        outputs<engine_f32>(s, w);
    CQ_CUDA_END("ssd_forward");
}

} // namespace

template <typename T> void cq_make_states(cq_stream *s, const cq_scan<T> &a) {
    if (s->compute == CQ_COMPUTE_BF16)
        make_states<engine_bf16>(s, a);
    else
        make_states<engine_f32>(s, a);
}
template void cq_make_states<float>(cq_stream *, const cq_scan<float> &);
template void cq_make_states<__nv_bfloat16>(cq_stream *, const cq_scan<__nv_bfloat16> &);

extern "C" int cq_cuda_ssd_forward(cq_stream *s, const cq_ssd_forward_args *a) {
    CQ_CUDA_ACT("ssd_forward", a);
    if (a->tokens < 1)
        return CQ_OK;
    return a->act == CQ_BF16 ? forward_of<__nv_bfloat16>(s, a) : forward_of<float>(s, a);
}
