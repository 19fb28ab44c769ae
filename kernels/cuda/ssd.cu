/// ssd.cu - the Mamba-2 scan in chunks of 64 tokens, forward and backward.
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
/// states (0.33 ms); backward 65 GFLOP, 3 GB (1.6 ms, 0.7 ms); scratch 0.3 and 0.6 GB.
#include "kernels/cuda/ssd_tiles.cuh"

namespace {
/// Chunk k of document d has number starts[d] / 64 + d + k; its boundary, the state after it, has
/// number starts[d] / 64 + k: both are unique, whatever the lengths. Numbers that no chunk has stay
/// in the list with n = 0.
struct chunk_place {
    int64_t t0, after; ///< first token; number of the boundary after it
    int32_t n;         ///< tokens
    int32_t index;     ///< in its document
    int32_t last;      ///< of its document
    int32_t owner;     ///< no other document's chunk has this `after`
};

/// Everything the kernels read and write. vec_*: rows can be read four values at a time.
struct scan {
    int64_t tokens, n_docs, heads, dim, groups, state, share, boundaries;
    const int64_t *starts;
    const float *x, *b, *c, *dt_raw, *dt_bias, *a_log, *d, *dy;
    int64_t ldx, ldb, ldc, ld_dt;
    float *y, *dx, *db, *dc, *ddt;
    int64_t lddx, lddb, lddc, ldd_dt;
    bool vec_x, vec_b, vec_c, vec_y, vec_s, vec_dx, vec_db, vec_dc;
    /* scratch */
    chunk_place *chunks;
    float *dt, *high, *low; ///< [heads, tokens]; cs = high + low
    float *keep;   ///< [boundaries, heads]: what the state before is multiplied with; < 0: not used
    float *cb;     ///< [tokens, groups, 64]: C_t . B_s for s in t's chunk
    float *dcb;    ///< the same of its gradient
    float *states; ///< [boundaries, heads, state, dim]
    float *grads;  ///< the same: gradient of the states
    double *sums;  ///< [chunks, heads, 3]: parts of ddt_bias, da_log, dd
};

__device__ __forceinline__ float decay_of(float high, float low) {
    float d = high + low;
    return expf(d < 0.0f ? d : 0.0f);
}

// ---- chunks and decays --------------------------------------------------------------------------

__device__ __forceinline__ chunk_place find_chunk(const int64_t *starts, int64_t n_docs,
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
    chunk_place c;
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
__global__ void __launch_bounds__(DECAY_WARPS *CQ_WARP) decays(scan a) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t h = (int64_t)blockIdx.y * DECAY_WARPS + threadIdx.x / CQ_WARP;
    chunk_place c = find_chunk(a.starts, a.n_docs, blockIdx.x);
    if (h == 0 && lane == 0)
        a.chunks[blockIdx.x] = c;
    if (h >= a.heads) /* the whole warp */
        return;
    double rate = -exp((double)a.a_log[h]), step[2];
    float dt[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = 2 * lane + i;
        float z = t < c.n ? a.dt_raw[(c.t0 + t) * a.ld_dt + h] + a.dt_bias[h] : 0.0f;
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

/// Decays of one head in one chunk, in shared memory. Behind the last token dt is 0 and cs stays.
struct chunk_decays {
    float dt[CHUNK], high[CHUNK], low[CHUNK];
};
__device__ __forceinline__ void load_decays(chunk_decays *w, const scan &a, const chunk_place &c,
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
__device__ __forceinline__ float weight_of(const scan &a, const chunk_place &c, int64_t h, int t,
                                           bool in) {
    if (t >= c.n)
        return 0.0f;
    int64_t at = h * a.tokens + c.t0 + t, end = h * a.tokens + c.t0 + c.n - 1;
    if (in)
        return decay_of(a.high[at], 0.0f);
    return decay_of(a.high[end] - a.high[at], a.low[end] - a.low[at]) * a.dt[at];
}

// ---- operands of one chunk ----------------------------------------------------------------------

__device__ __forceinline__ rows b_rows(const scan &a, const chunk_place &c, int64_t g, int64_t n0) {
    return {a.b + c.t0 * a.ldb + g * a.state + n0, a.ldb, c.n, (int)(a.state - n0), a.vec_b};
}
__device__ __forceinline__ rows c_rows(const scan &a, const chunk_place &c, int64_t g, int64_t n0) {
    return {a.c + c.t0 * a.ldc + g * a.state + n0, a.ldc, c.n, (int)(a.state - n0), a.vec_c};
}
__device__ __forceinline__ rows x_rows(const scan &a, const chunk_place &c, int64_t h, int64_t p0) {
    return {a.x + c.t0 * a.ldx + h * a.dim + p0, a.ldx, c.n, (int)(a.dim - p0), a.vec_x};
}
__device__ __forceinline__ rows dy_rows(const scan &a, const chunk_place &c, int64_t h,
                                        int64_t p0) {
    int64_t ld = a.heads * a.dim;
    return {a.dy + c.t0 * ld + h * a.dim + p0, ld, c.n, (int)(a.dim - p0), a.vec_y};
}
/// State number `boundary` of a head, from row n0 and column p0 on.
__device__ __forceinline__ rows state_rows(const scan &a, const float *states, int64_t boundary,
                                           int64_t h, int64_t n0, int64_t p0) {
    return {states + ((boundary * a.heads + h) * a.state + n0) * a.dim + p0, a.dim,
            (int)(a.state - n0), (int)(a.dim - p0), a.vec_s};
}
/// C B' or its gradient in a chunk and group.
__device__ __forceinline__ rows pair_rows(const scan &a, const float *pairs, const chunk_place &c,
                                          int64_t g) {
    return {pairs + (c.t0 * a.groups + g) * CHUNK, a.groups * CHUNK, c.n, CHUNK, true};
}

/// L[t, s] (C_t . B_s) dt_s for s <= t.
struct decayed_pairs {
    rows cb;
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
template <typename E> __global__ void __launch_bounds__(THREADS) pair_products(scan a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    chunk_place c = a.chunks[blockIdx.x];
    if (c.n == 0) /* the whole block, here and below */
        return;
    int64_t g = blockIdx.y;
    float acc[PER_THREAD];
    clear(acc);
    E::template product<true, true>((float *)room, acc, c_rows(a, c, g, 0), b_rows(a, c, g, 0),
                                    (int)a.state);
    store_tile<E>(a.cb + (c.t0 * a.groups + g) * CHUNK, a.groups * CHUNK, acc, c.n, CHUNK, true);
}

/// A 64 x 64 part of sum_s gamma_s dt_s B_s x_s' for the state after a chunk; GRADIENT: of sum_t
/// e_t C_t dy_t' for the gradient of the state before it.
template <typename E, bool GRADIENT>
__global__ void __launch_bounds__(THREADS, 4) own_states(scan a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    CQ_SHARED(float, weight, [CHUNK]);
    chunk_place c = a.chunks[blockIdx.x];
    if (c.n == 0 || (GRADIENT ? c.index == 0 : c.last))
        return;
    int64_t h = blockIdx.y, g = h / a.share, across = (a.dim + CHUNK - 1) / CHUNK;
    int64_t n0 = blockIdx.z / across * CHUNK, p0 = blockIdx.z % across * CHUNK;
    if (threadIdx.x < CHUNK)
        weight[threadIdx.x] = weight_of(a, c, h, (int)threadIdx.x, GRADIENT);
    __syncthreads();
    float acc[PER_THREAD];
    clear(acc);
    weighted left = {GRADIENT ? c_rows(a, c, g, n0) : b_rows(a, c, g, n0), weight};
    E::template product<false, false>((float *)room, acc, left,
                                      GRADIENT ? dy_rows(a, c, h, p0) : x_rows(a, c, h, p0), c.n);
    rows to = state_rows(a, GRADIENT ? a.grads : a.states, c.after - GRADIENT, h, n0, p0);
    store_tile<E>(const_cast<float *>(to.p), to.ld, acc, to.n, to.cols, a.vec_s);
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float4 add(float4 a, float4 b) { return cq_plus4(a, b); }
__device__ __forceinline__ float scale(float a, float by) { return a * by; }
__device__ __forceinline__ float4 scale(float4 a, float by) { return cq_scale4(a, by); }

/// In place, a thread per four (else one) elements of a head's state: sums along a document's
/// boundaries, BACK from the last to the first, each sum multiplied with what the chunk keeps.
constexpr int AHEAD = 8, PASS_THREADS = 256;
template <typename V, bool BACK>
__global__ void __launch_bounds__(PASS_THREADS) pass_states(scan a) {
    int64_t size = a.state * a.dim * (int64_t)sizeof(float) / (int64_t)sizeof(V);
    int64_t i = (int64_t)blockIdx.x * PASS_THREADS + threadIdx.x, h = blockIdx.y;
    if (i >= size)
        return;
    V *at = (V *)(BACK ? a.grads : a.states) + h * size + i, carried = {};
    for (int64_t k0 = 0; k0 < a.boundaries; k0 += AHEAD) {
        V own[AHEAD];
        float keep[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t k = BACK ? a.boundaries - 1 - k0 - j : k0 + j;
            keep[j] = k0 + j < a.boundaries ? a.keep[k * a.heads + h] : -1.0f;
            if (keep[j] >= 0.0f)
                own[j] = at[k * a.heads * size];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t k = BACK ? a.boundaries - 1 - k0 - j : k0 + j;
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
            at[k * a.heads * size] = own[j];
        }
    }
}

/// y of a chunk and head, 64 of its columns.
template <typename E> __global__ void __launch_bounds__(THREADS, 4) chunk_outputs(scan a) {
    CQ_SHARED(float4, room, [E::ROOM / 4]);
    CQ_SHARED(chunk_decays, w, [1]);
    CQ_SHARED(float, e, [CHUNK]);
    chunk_place c = a.chunks[blockIdx.x];
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
        weighted left = {c_rows(a, c, g, 0), e};
        E::template product<true, false>(
            (float *)room, acc, left, state_rows(a, a.states, c.after - 1, h, 0, p0), (int)a.state);
    }
    rows x = x_rows(a, c, h, p0);
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
                        acc[E::index(q, u, j)] += skip * x.p[E::row(q) * x.ld + E::column(u) + j];
    store_tile<E>(a.y + c.t0 * a.heads * a.dim + h * a.dim + p0, a.heads * a.dim, acc, c.n, x.cols,
                  a.vec_y);
}

// ---- backward -----------------------------------------------------------------------------------

/// What one head of a chunk needs in shared memory besides `room`. u and v are U and V of the
/// formulas without their decays.
struct head_work {
    chunk_decays w;
    float e[CHUNK], gamma[CHUNK], ddt[CHUNK], dl[2][CHUNK], diagonal[CHUNK], u[CHUNK], v[CHUNK];
    float sums[CQ_WARP];
};

/// From X = dy x' of one head: m = L C B', dcb += L dt X, and H = L X C B' in `room`, its columns
/// shifted by the row so that rows and columns hit all banks. Then ddt and dl get the sums over
/// pairs: ddt_s = sum_{t >= s} H[t, s], dl_t = sum_{u >= t, s < t} H[u, s] dt_s, the rectangle in
/// two halves of columns. Nothing is a difference.
template <typename E>
__device__ __forceinline__ void pair_sums(float *room, float *m, head_work *k, const rows &cb,
                                          const float (&x)[PER_THREAD], float (&dcb)[PER_THREAD]) {
    int n = cb.n;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < E::ROWS; q++) {
        int t = E::row(q);
        float high = k->w.high[t], low = k->w.low[t];
#pragma unroll
        for (int u = 0; u < E::RUNS; u++) {
            float decayed[E::RUN];
#pragma unroll
            for (int j = 0; j < E::RUN; j++) {
                int s = E::column(u) + j, at = E::index(q, u, j);
                bool in = s <= t && t < n;
                float l = in ? decay_of(high - k->w.high[s], low - k->w.low[s]) : 0.0f;
                float pair = in ? cb.p[t * cb.ld + s] : 0.0f, lx = in ? l * x[at] : 0.0f;
                dcb[at] += lx * k->w.dt[s];
                decayed[j] = l * pair;
                room[t * CHUNK + ((s + t) & (CHUNK - 1))] = lx * pair;
                if (s == t)
                    k->diagonal[t] = t < n ? x[at] : 0.0f;
            }
            store_run<E::RUN>(m + t * CHUNK, decayed, E::column(u), CHUNK, true);
        }
    }
    __syncthreads();
    int i = (int)threadIdx.x % CHUNK, half = (int)threadIdx.x / CHUNK;
    float sum = 0.0f;
    for (int t = 32 * half + 31; t >= 32 * half; t--) {
        float *at = &room[t * CHUNK + ((i + t) & (CHUNK - 1))];
        sum += *at;
        *at = sum;
    }
    __syncthreads();
    const float *middle = room + 32 * CHUNK; /* sums of the lower 32 rows */
    sum = 0.0f;
    for (int s = 32 * half; s < 32 * half + 32 && s < i; s++) {
        float column = room[i * CHUNK + ((s + i) & (CHUNK - 1))];
        if (i < 32)
            column += middle[(s + 32) & (CHUNK - 1)];
        sum += column * k->w.dt[s];
    }
    k->dl[half][i] = sum;
    if (half == 0)
        k->ddt[i] = room[i * CHUNK + ((i + i) & (CHUNK - 1))] +
                    (i < 32 ? middle[(i + 32) & (CHUNK - 1)] : 0.0f);
}

/// ddt_raw of a chunk and head and its three sums, by the first warp; `inner` is <dS_out, S_in>.
__device__ __forceinline__ void time_steps(const scan &a, const chunk_place &c, head_work *k,
                                           int64_t h, float inner) {
    int lane = (int)threadIdx.x;
    float rate = -expf(a.a_log[h]), u[2], v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = 2 * lane + i;
        u[i] = k->e[t] * k->u[t];
        v[i] = k->gamma[t] * k->v[t];
    }
    float later = u[0] + u[1], vt[2] = {v[0] * k->w.dt[2 * lane], v[1] * k->w.dt[2 * lane + 1]};
    float earlier = vt[0] + vt[1];
    for (int d = 1; d < CQ_WARP; d *= 2) {
        float right = __shfl_down_sync(0xffffffffu, later, (unsigned)d);
        float left = __shfl_up_sync(0xffffffffu, earlier, (unsigned)d);
        if (lane + d < CQ_WARP)
            later += right;
        if (lane >= d)
            earlier += left;
    }
    /* sums from the next lane's tokens on, and up to the lane before */
    float right = __shfl_down_sync(0xffffffffu, later, 1u);
    float left = __shfl_up_sync(0xffffffffu, earlier, 1u);
    right = lane == CQ_WARP - 1 ? 0.0f : right;
    left = (lane == 0 ? 0.0f : left) + inner * k->e[c.n - 1];
    float us[2] = {right + u[1] + u[0], right + u[1]}, vs[2] = {left, left + vt[0]};
    double sums[3] = {0.0, 0.0, 0.0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = 2 * lane + i;
        if (t < c.n) {
            float dl = k->dl[0][t] + k->dl[1][t] + us[i] + vs[i];
            float z = a.dt_raw[(c.t0 + t) * a.ld_dt + h] + a.dt_bias[h];
            float ddt = k->ddt[t] + v[i] + rate * dl;
            ddt = z > 20.0f ? ddt : ddt / (1.0f + expf(-z));
            a.ddt[(c.t0 + t) * a.ldd_dt + h] = ddt;
            sums[0] += (double)ddt;
            sums[1] += (double)(rate * (k->w.dt[t] * dl));
            sums[2] += (double)k->diagonal[t];
        }
    }
#pragma unroll
    for (int i = 0; i < 3; i++) {
        double sum = cq_warp_sum(sums[i]);
        if (lane == 0)
            a.sums[((int64_t)blockIdx.x * a.heads + h) * 3 + i] = sum;
    }
}

/// One chunk and group, head after head: dx, ddt_raw, the sums, and the gradient of C B'.
template <typename E> __global__ void __launch_bounds__(THREADS, 4) chunk_gradients(scan a) {
    CQ_SHARED(float4, room4, [E::ROOM / 4]);
    CQ_SHARED(float4, m4, [CHUNK * CHUNK / 4]);
    CQ_SHARED(head_work, k, [1]);
    chunk_place c = a.chunks[blockIdx.x];
    int64_t g = blockIdx.y;
    if (c.n == 0) {
        for (int64_t i = threadIdx.x; i < 3 * a.share; i += THREADS)
            a.sums[((int64_t)blockIdx.x * a.heads + g * a.share) * 3 + i] = 0.0;
        return;
    }
    float *room = (float *)room4, *m = (float *)m4, dcb[PER_THREAD], acc[PER_THREAD];
    rows cb = pair_rows(a, a.cb, c, g);
    clear(dcb);
    for (int64_t h = g * a.share; h < (g + 1) * a.share; h++) {
        __syncthreads(); /* the head before is done */
        load_decays(&k->w, a, c, h);
        if (threadIdx.x < CHUNK) {
            int t = (int)threadIdx.x;
            int64_t at = h * a.tokens + c.t0 + t, end = h * a.tokens + c.t0 + c.n - 1;
            bool in = t < c.n;
            k->e[t] = in ? decay_of(a.high[at], 0.0f) : 0.0f;
            k->gamma[t] = in ? decay_of(a.high[end] - a.high[at], a.low[end] - a.low[at]) : 0.0f;
            k->u[t] = k->v[t] = 0.0f;
        }
        clear(acc);
        E::template product<true, true>(room, acc, dy_rows(a, c, h, 0), x_rows(a, c, h, 0),
                                        (int)a.dim);
        pair_sums<E>(room, m, k, cb, acc, dcb);
        float skip = a.d[h];
        for (int64_t p0 = 0; p0 < a.dim; p0 += CHUNK) {
            rows dy = dy_rows(a, c, h, p0);
            clear(acc);
            if (!c.last) {
                E::template product<true, false>(room, acc, b_rows(a, c, g, 0),
                                                 state_rows(a, a.grads, c.after, h, 0, p0),
                                                 (int)a.state);
                dot_rows<E>(room, k->v, acc, x_rows(a, c, h, p0));
#pragma unroll
                for (int q = 0; q < E::ROWS; q++)
#pragma unroll
                    for (int u = 0; u < E::RUNS; u++)
#pragma unroll
                        for (int j = 0; j < E::RUN; j++)
                            acc[E::index(q, u, j)] *= k->gamma[E::row(q)];
            }
            E::template product<false, false>(room, acc, tile{m}, dy, c.n);
#pragma unroll
            for (int q = 0; q < E::ROWS; q++)
                if (E::row(q) < c.n)
#pragma unroll
                    for (int u = 0; u < E::RUNS; u++)
#pragma unroll
                        for (int j = 0; j < E::RUN; j++)
                            if (E::column(u) + j < dy.cols) {
                                float *v = &acc[E::index(q, u, j)];
                                *v = *v * k->w.dt[E::row(q)] +
                                     skip * dy.p[E::row(q) * dy.ld + E::column(u) + j];
                            }
            store_tile<E>(a.dx + c.t0 * a.lddx + h * a.dim + p0, a.lddx, acc, c.n, dy.cols,
                          a.vec_dx);
            if (c.index > 0) {
                clear(acc);
                E::template product<true, false>(room, acc, c_rows(a, c, g, 0),
                                                 state_rows(a, a.states, c.after - 1, h, 0, p0),
                                                 (int)a.state);
                dot_rows<E>(room, k->u, acc, dy);
            }
        }
        float inner = 0.0f;
        if (c.index > 0 && !c.last) {
            const float *in = state_rows(a, a.states, c.after - 1, h, 0, 0).p;
            const float *out = state_rows(a, a.grads, c.after, h, 0, 0).p;
            int64_t size = a.state * a.dim;
            if (a.vec_s)
                for (int64_t i = threadIdx.x; i < size / 4; i += THREADS)
                    inner += cq_dot4(((const float4 *)in)[i], ((const float4 *)out)[i]);
            else
                for (int64_t i = threadIdx.x; i < size; i += THREADS)
                    inner += in[i] * out[i];
        }
        inner = cq_block_sum(inner, k->sums); /* also a barrier for what time_steps reads */
        if (threadIdx.x < CQ_WARP)
            time_steps(a, c, k, h, inner);
    }
    store_tile<E>(a.dcb + (c.t0 * a.groups + g) * CHUNK, a.groups * CHUNK, dcb, c.n, CHUNK, true);
}

/// 64 columns of dB (blockIdx.z even) or dC of a chunk and group: the pairs' part, then the heads'.
template <typename E> __global__ void __launch_bounds__(THREADS, 4) group_gradients(scan a) {
    CQ_SHARED(float4, room4, [E::ROOM / 4]);
    CQ_SHARED(float, weight, [CHUNK]);
    chunk_place c = a.chunks[blockIdx.x];
    if (c.n == 0)
        return;
    int64_t g = blockIdx.y, n0 = blockIdx.z / 2 * CHUNK;
    bool is_c = blockIdx.z % 2;
    float *room = (float *)room4, acc[PER_THREAD];
    rows pairs = pair_rows(a, a.dcb, c, g);
    clear(acc);
    if (is_c)
        E::template product<true, false>(room, acc, pairs, b_rows(a, c, g, n0), c.n);
    else
        E::template product<false, false>(room, acc, pairs, c_rows(a, c, g, n0), c.n);
    if (is_c ? c.index > 0 : !c.last)
        for (int64_t h = g * a.share; h < (g + 1) * a.share; h++) {
            /* the product before has read its weights */
            if (threadIdx.x < CHUNK)
                weight[threadIdx.x] = weight_of(a, c, h, (int)threadIdx.x, is_c);
            __syncthreads();
            weighted left = {is_c ? dy_rows(a, c, h, 0) : x_rows(a, c, h, 0), weight};
            E::template product<true, true>(
                room, acc, left, state_rows(a, is_c ? a.states : a.grads, c.after - is_c, h, n0, 0),
                (int)a.dim);
        }
    int64_t ld = is_c ? a.lddc : a.lddb;
    store_tile<E>((is_c ? a.dc : a.db) + c.t0 * ld + g * a.state + n0, ld, acc, c.n,
                  (int)(a.state - n0), is_c ? a.vec_dc : a.vec_db);
}

/// ddt_bias, da_log or dd of head blockIdx.x: the sums of all chunks.
__global__ void __launch_bounds__(THREADS)
    add_sums(scan a, int64_t chunks, float *ddt_bias, float *da_log, float *dd) {
    CQ_SHARED(double, room, [CQ_WARP]);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS)
        sum += a.sums[(i * a.heads + blockIdx.x) * 3 + blockIdx.y];
    sum = cq_block_sum(sum, room);
    if (threadIdx.x == 0)
        (blockIdx.y == 0 ? ddt_bias : blockIdx.y == 1 ? da_log : dd)[blockIdx.x] += (float)sum;
}

// ---- host ---------------------------------------------------------------------------------------

int64_t chunk_numbers(const scan &a) { return a.tokens / CHUNK + a.n_docs; }

template <typename Args> scan scan_of(const Args *a) {
    scan s = {};
    s.tokens = a->tokens, s.n_docs = a->n_docs, s.starts = a->starts;
    s.heads = a->heads, s.dim = a->head_dim, s.groups = a->groups, s.state = a->state;
    s.share = a->heads / a->groups;
    s.boundaries = a->tokens / CHUNK;
    s.x = (const float *)a->x, s.b = (const float *)a->B, s.c = (const float *)a->C;
    s.dt_raw = (const float *)a->dt_raw, s.dt_bias = (const float *)a->dt_bias;
    s.a_log = (const float *)a->a_log, s.d = (const float *)a->d;
    s.ldx = a->ldx, s.ldb = a->ldB, s.ldc = a->ldC, s.ld_dt = a->ld_dt;
    bool dim4 = a->head_dim % 4 == 0, state4 = a->state % 4 == 0;
    s.vec_x = dim4 && a->ldx % 4 == 0 && cq_aligned16(a->x);
    s.vec_b = state4 && a->ldB % 4 == 0 && cq_aligned16(a->B);
    s.vec_c = state4 && a->ldC % 4 == 0 && cq_aligned16(a->C);
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
void cut(scan *a, scratch *m, bool backward) {
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
int take_scratch(cq_stream *s, scan *a, bool backward) {
    scratch m = {NULL, 0};
    cut(a, &m, backward);
    m.p = (char *)cq_cuda_scratch(s, m.used);
    if (!m.p)
        return CQ_ENOMEM;
    cut(a, &m, backward);
    return CQ_OK;
}

template <bool BACK> void pass(cq_stream *s, const scan &a) {
    int64_t size = a.state * a.dim;
    if (a.boundaries == 0)
        return;
    if (a.vec_s)
        CQ_LAUNCH((pass_states<float4, BACK>),
                  dim3(cq_blocks(size / 4, PASS_THREADS), (unsigned)a.heads), PASS_THREADS, 0, s,
                  a);
    else
        CQ_LAUNCH((pass_states<float, BACK>),
                  dim3(cq_blocks(size, PASS_THREADS), (unsigned)a.heads), PASS_THREADS, 0, s, a);
}
/// C B', and the states at all boundaries.
template <typename E> void make_states(cq_stream *s, const scan &a) {
    unsigned numbers = (unsigned)chunk_numbers(a), heads = (unsigned)a.heads;
    unsigned tiles = cq_blocks(a.state, CHUNK) * cq_blocks(a.dim, CHUNK);
    CQ_LAUNCH(decays, dim3(numbers, cq_blocks(a.heads, DECAY_WARPS)), DECAY_WARPS * CQ_WARP, 0, s,
              a);
    CQ_LAUNCH(pair_products<E>, dim3(numbers, (unsigned)a.groups), THREADS, 0, s, a);
    if (a.boundaries > 0)
        CQ_LAUNCH((own_states<E, false>), dim3(numbers, heads, tiles), THREADS, 0, s, a);
    pass<false>(s, a);
}
template <typename E> void forward(cq_stream *s, const scan &a) {
    make_states<E>(s, a);
    dim3 grid((unsigned)chunk_numbers(a), (unsigned)a.heads, cq_blocks(a.dim, CHUNK));
    CQ_LAUNCH(chunk_outputs<E>, grid, THREADS, 0, s, a);
}
template <typename E> void backward(cq_stream *s, const scan &a) {
    unsigned numbers = (unsigned)chunk_numbers(a), groups = (unsigned)a.groups;
    unsigned tiles = cq_blocks(a.state, CHUNK) * cq_blocks(a.dim, CHUNK);
    make_states<E>(s, a);
    if (a.boundaries > 0)
        CQ_LAUNCH((own_states<E, true>), dim3(numbers, (unsigned)a.heads, tiles), THREADS, 0, s, a);
    pass<true>(s, a);
    CQ_LAUNCH(chunk_gradients<E>, dim3(numbers, groups), THREADS, 0, s, a);
    CQ_LAUNCH(group_gradients<E>, dim3(numbers, groups, 2 * cq_blocks(a.state, CHUNK)), THREADS, 0,
              s, a);
}

} // namespace

extern "C" int cq_cuda_ssd_forward(cq_stream *s, const cq_ssd_forward_args *a) {
    CQ_CUDA_F32("ssd_forward", a);
    if (a->tokens < 1)
        return CQ_OK;
    scan w = scan_of(a);
    w.y = (float *)a->y;
    w.vec_y = a->head_dim % 4 == 0 && cq_aligned16(a->y);
    CQ_TRY(take_scratch(s, &w, false));
    if (s->compute == CQ_COMPUTE_BF16)
        forward<engine_bf16>(s, w);
    else
        forward<engine_f32>(s, w);
    CQ_CUDA_END("ssd_forward");
}

extern "C" int cq_cuda_ssd_backward(cq_stream *s, const cq_ssd_backward_args *a) {
    CQ_CUDA_F32("ssd_backward", a);
    if (a->tokens < 1)
        return CQ_OK;
    scan w = scan_of(a);
    w.dy = (const float *)a->dy;
    w.dx = (float *)a->dx, w.db = (float *)a->dB, w.dc = (float *)a->dC;
    w.ddt = (float *)a->ddt_raw;
    w.lddx = a->lddx, w.lddb = a->lddB, w.lddc = a->lddC, w.ldd_dt = a->ldd_dt;
    w.vec_y = a->head_dim % 4 == 0 && cq_aligned16(a->dy);
    w.vec_dx = a->head_dim % 4 == 0 && a->lddx % 4 == 0 && cq_aligned16(a->dx);
    w.vec_db = a->state % 4 == 0 && a->lddB % 4 == 0 && cq_aligned16(a->dB);
    w.vec_dc = a->state % 4 == 0 && a->lddC % 4 == 0 && cq_aligned16(a->dC);
    CQ_TRY(take_scratch(s, &w, true));
    if (s->compute == CQ_COMPUTE_BF16)
        backward<engine_bf16>(s, w);
    else
        backward<engine_f32>(s, w);
    if (a->ddt_bias)
        CQ_LAUNCH(add_sums, dim3((unsigned)a->heads, 3), THREADS, 0, s, w, chunk_numbers(w),
                  (float *)a->ddt_bias, (float *)a->da_log, (float *)a->dd);
    CQ_CUDA_END("ssd_backward");
}
