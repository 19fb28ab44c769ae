/// ssd.cuh - what the forward and the backward of the scan share (ssd.cu has the formulas).
#pragma once
#include "kernels/cuda/ssd_tiles.cuh"

/// Chunk k of document d has number starts[d] / 64 + d + k; its boundary, the state after it, has
/// number starts[d] / 64 + k: both are unique, whatever the lengths. Numbers that no chunk has stay
/// in the list with n = 0.
struct cq_chunk {
    int64_t t0, after; ///< first token; number of the boundary after it
    int32_t n;         ///< tokens
    int32_t index;     ///< in its document
    int32_t last;      ///< of its document
    int32_t owner;     ///< no other document's chunk has this `after`
};

/// Everything the kernels read and write; T is what activations are stored as. vec_*: rows can be
/// read four values at a time.
template <typename T> struct cq_scan {
    int64_t tokens, n_docs, heads, dim, groups, state, share, boundaries;
    const int64_t *starts;
    const T *x, *b, *c, *dt_raw, *dy;
    const float *dt_bias, *a_log, *d;
    int64_t ldx, ldb, ldc, ld_dt;
    T *y, *dx, *db, *dc, *ddt;
    int64_t lddx, lddb, lddc, ldd_dt;
    bool vec_x, vec_b, vec_c, vec_y, vec_s, vec_dx, vec_db, vec_dc;
    /* scratch */
    cq_chunk *chunks;
    float *dt, *high, *low; ///< [heads, tokens]; cs = high + low
    float *keep;   ///< [boundaries, heads]: what the state before is multiplied with; < 0: not used
    float *cb;     ///< [tokens, groups, 64]: C_t . B_s for s in t's chunk
    float *dcb;    ///< the same of its gradient
    float *states; ///< [boundaries, heads, state, dim]
    float *grads;  ///< the same: gradient of the states
    double *sums;  ///< [chunks, heads, 3]: parts of ddt_bias, da_log, dd
};
/// Fills chunks, dt, cs, keep, cb and states (ssd.cu).
template <typename T> void cq_make_states(cq_stream *s, const cq_scan<T> &a);

namespace {

__device__ __forceinline__ float decay_of(float high, float low) {
    float d = high + low;
    return expf(d < 0.0f ? d : 0.0f);
}

/// Decays of one head in one chunk, in shared memory. Behind the last token dt is 0 and cs stays.
struct chunk_decays {
    float dt[CHUNK], high[CHUNK], low[CHUNK];
};
template <typename T>
__device__ __forceinline__ void load_decays(chunk_decays *w, const cq_scan<T> &a, const cq_chunk &c,
                                            int64_t h) {
    int t = (int)threadIdx.x;
    if (t < CHUNK) {
        int64_t at = h * a.tokens + c.t0 + (t < c.n ? t : c.n - 1);
        w->dt[t] = t < c.n ? a.dt[at] : 0.0f;
        w->high[t] = a.high[at];
        w->low[t] = a.low[at];
    }
}
/// gamma_t dt_t, or e_t, for thread t of the chunk.
template <typename T>
__device__ __forceinline__ float weight_of(const cq_scan<T> &a, const cq_chunk &c, int64_t h, int t,
                                           bool in) {
    if (t >= c.n)
        return 0.0f;
    int64_t at = h * a.tokens + c.t0 + t, end = h * a.tokens + c.t0 + c.n - 1;
    if (in)
        return decay_of(a.high[at], 0.0f);
    return decay_of(a.high[end] - a.high[at], a.low[end] - a.low[at]) * a.dt[at];
}

// ---- operands of one chunk ----------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ rows<T> b_rows(const cq_scan<T> &a, const cq_chunk &c, int64_t g,
                                          int64_t n0) {
    return {a.b + c.t0 * a.ldb + g * a.state + n0, a.ldb, c.n, (int)(a.state - n0), a.vec_b};
}
template <typename T>
__device__ __forceinline__ rows<T> c_rows(const cq_scan<T> &a, const cq_chunk &c, int64_t g,
                                          int64_t n0) {
    return {a.c + c.t0 * a.ldc + g * a.state + n0, a.ldc, c.n, (int)(a.state - n0), a.vec_c};
}
template <typename T>
__device__ __forceinline__ rows<T> x_rows(const cq_scan<T> &a, const cq_chunk &c, int64_t h,
                                          int64_t p0) {
    return {a.x + c.t0 * a.ldx + h * a.dim + p0, a.ldx, c.n, (int)(a.dim - p0), a.vec_x};
}
template <typename T>
__device__ __forceinline__ rows<T> dy_rows(const cq_scan<T> &a, const cq_chunk &c, int64_t h,
                                           int64_t p0) {
    int64_t ld = a.heads * a.dim;
    return {a.dy + c.t0 * ld + h * a.dim + p0, ld, c.n, (int)(a.dim - p0), a.vec_y};
}
/// State number `boundary` of a head, from row n0 and column p0 on.
template <typename T>
__device__ __forceinline__ rows<float> state_rows(const cq_scan<T> &a, const float *states,
                                                  int64_t boundary, int64_t h, int64_t n0,
                                                  int64_t p0) {
    return {states + ((boundary * a.heads + h) * a.state + n0) * a.dim + p0, a.dim,
            (int)(a.state - n0), (int)(a.dim - p0), a.vec_s};
}
/// C B' or its gradient in a chunk and group.
template <typename T>
__device__ __forceinline__ rows<float> pair_rows(const cq_scan<T> &a, const float *pairs,
                                                 const cq_chunk &c, int64_t g) {
    return {pairs + (c.t0 * a.groups + g) * CHUNK, a.groups * CHUNK, c.n, CHUNK, true};
}

// ---- states -------------------------------------------------------------------------------------

/// A 64 x 64 part of sum_s gamma_s dt_s B_s x_s' for the state after a chunk; GRADIENT: of sum_t
/// e_t C_t dy_t' for the gradient of the state before it.
template <typename E, typename T, bool GRADIENT>
__global__ void __launch_bounds__(THREADS, 4) own_states(cq_scan<T> a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    CQ_SHARED(float, weight, [CHUNK]);
    cq_chunk c = a.chunks[blockIdx.x];
    if (c.n == 0 || (GRADIENT ? c.index == 0 : c.last))
        return;
    int64_t h = blockIdx.y, g = h / a.share, across = (a.dim + CHUNK - 1) / CHUNK;
    int64_t n0 = blockIdx.z / across * CHUNK, p0 = blockIdx.z % across * CHUNK;
    if (threadIdx.x < CHUNK)
        weight[threadIdx.x] = weight_of(a, c, h, (int)threadIdx.x, GRADIENT);
    __syncthreads();
    float acc[PER_THREAD];
    clear(acc);
    weighted<T> left = {GRADIENT ? c_rows(a, c, g, n0) : b_rows(a, c, g, n0), weight};
    E::template product<false, false>((float *)room, acc, left,
                                      GRADIENT ? dy_rows(a, c, h, p0) : x_rows(a, c, h, p0), c.n);
    rows<float> to = state_rows(a, GRADIENT ? a.grads : a.states, c.after - GRADIENT, h, n0, p0);
    store_tile<E>(const_cast<float *>(to.p), to.ld, acc, to.n, to.cols, a.vec_s);
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float4 add(float4 a, float4 b) { return cq_plus4(a, b); }
__device__ __forceinline__ float scale(float a, float by) { return a * by; }
__device__ __forceinline__ float4 scale(float4 a, float by) { return cq_scale4(a, by); }

/// In place, a thread per four (else one) elements of a head's state of `bytes`: sums along a
/// document's boundaries, BACK from the last to the first, each sum multiplied with what the chunk
/// keeps.
constexpr int AHEAD = 8, PASS_THREADS = 256;
template <typename V, bool BACK>
__global__ void __launch_bounds__(PASS_THREADS)
    pass_states(float *states, const float *kept, int64_t boundaries, int64_t heads,
                int64_t bytes) {
    int64_t size = bytes / (int64_t)sizeof(V);
    int64_t i = (int64_t)blockIdx.x * PASS_THREADS + threadIdx.x, h = blockIdx.y;
    if (i >= size)
        return;
    V *at = (V *)states + h * size + i, carried = {};
    for (int64_t k0 = 0; k0 < boundaries; k0 += AHEAD) {
        V own[AHEAD];
        float keep[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t k = BACK ? boundaries - 1 - k0 - j : k0 + j;
            keep[j] = k0 + j < boundaries ? kept[k * heads + h] : -1.0f;
            if (keep[j] >= 0.0f)
                own[j] = at[k * heads * size];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t k = BACK ? boundaries - 1 - k0 - j : k0 + j;
            if (keep[j] < 0.0f)
                continue;
            /* forward, the first boundary of a document keeps nothing; backward, nothing is
               carried from it to the document before */
            if (BACK) {
                own[j] = add(own[j], carried);
                carried = scale(own[j], keep[j]);
            } else {
                own[j] = add(own[j], scale(carried, keep[j]));
                carried = own[j];
            }
            at[k * heads * size] = own[j];
        }
    }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename T> int64_t chunk_numbers(const cq_scan<T> &a) {
    return a.tokens / CHUNK + a.n_docs;
}

template <typename T, typename Args> cq_scan<T> scan_of(const Args *a) {
    cq_scan<T> s = {};
    s.tokens = a->tokens, s.n_docs = a->n_docs, s.starts = a->starts;
    s.heads = a->heads, s.dim = a->head_dim, s.groups = a->groups, s.state = a->state;
    s.share = a->heads / a->groups;
    s.boundaries = a->tokens / CHUNK;
    s.x = (const T *)a->x, s.b = (const T *)a->B, s.c = (const T *)a->C;
    s.dt_raw = (const T *)a->dt_raw, s.dt_bias = (const float *)a->dt_bias;
    s.a_log = (const float *)a->a_log, s.d = (const float *)a->d;
    s.ldx = a->ldx, s.ldb = a->ldB, s.ldc = a->ldC, s.ld_dt = a->ld_dt;
    bool dim4 = a->head_dim % 4 == 0, state4 = a->state % 4 == 0;
    s.vec_x = dim4 && a->ldx % 4 == 0 && cq_aligned4<T>(a->x);
    s.vec_b = state4 && a->ldB % 4 == 0 && cq_aligned4<T>(a->B);
    s.vec_c = state4 && a->ldC % 4 == 0 && cq_aligned4<T>(a->C);
    s.vec_s = dim4;
    return s;
}

/// Cuts one piece of scratch; with p NULL it only counts.
struct scratch {
    char *p;
    int64_t used;
    template <typename T> void take(T **to, int64_t n) {
        *to = p ? (T *)(p + used) : NULL;
        used += (n * (int64_t)sizeof(T) + 255) / 256 * 256;
    }
};
template <typename T> void cut(cq_scan<T> *a, scratch *m, bool backward) {
    int64_t numbers = chunk_numbers(*a), by_head = a->heads * a->tokens;
    int64_t pairs = a->tokens * a->groups * CHUNK;
    int64_t states = a->boundaries * a->heads * a->state * a->dim;
    m->used = 0;
    m->take(&a->chunks, numbers);
    m->take(&a->dt, by_head);
    m->take(&a->high, by_head);
    m->take(&a->low, by_head);
    m->take(&a->keep, a->boundaries * a->heads);
    m->take(&a->cb, pairs);
    m->take(&a->states, states);
    if (backward) {
        m->take(&a->dcb, pairs);
        m->take(&a->grads, states);
        m->take(&a->sums, numbers * a->heads * 3);
    }
}
template <typename T> int take_scratch(cq_stream *s, cq_scan<T> *a, bool backward) {
    scratch m = {NULL, 0};
    cut(a, &m, backward);
    m.p = (char *)cq_cuda_scratch(s, m.used);
    if (!m.p)
        return CQ_ENOMEM;
    cut(a, &m, backward);
    return CQ_OK;
}

template <bool BACK, typename T> void pass(cq_stream *s, const cq_scan<T> &a) {
    int64_t size = a.state * a.dim, bytes = size * (int64_t)sizeof(float);
    float *states = BACK ? a.grads : a.states;
    if (a.boundaries == 0)
        return;
    if (a.vec_s)
        CQ_LAUNCH((pass_states<float4, BACK>),
                  dim3(cq_blocks(size / 4, PASS_THREADS), (unsigned)a.heads), PASS_THREADS, 0, s,
                  states, (const float *)a.keep, a.boundaries, a.heads, bytes);
    else
        CQ_LAUNCH((pass_states<float, BACK>),
                  dim3(cq_blocks(size, PASS_THREADS), (unsigned)a.heads), PASS_THREADS, 0, s,
                  states, (const float *)a.keep, a.boundaries, a.heads, bytes);
}

} // namespace
