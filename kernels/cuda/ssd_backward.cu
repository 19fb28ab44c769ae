/// ssd_backward.cu - the gradients of the Mamba-2 scan. Formulas are those of
/// kernels/cpu/simd_ssd_backward.c, symbols and a bound at a real shape ssd.cu's.
#include "kernels/cuda/ssd.cuh"

namespace {

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
__device__ __forceinline__ void pair_sums(float *room, float *m, head_work *k,
                                          const rows<float> &cb, const float (&x)[PER_THREAD],
                                          float (&dcb)[PER_THREAD]) {
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
template <typename T>
__device__ __forceinline__ void time_steps(const cq_scan<T> &a, const cq_chunk &c, head_work *k,
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
            float z = cq_value(a.dt_raw[(c.t0 + t) * a.ld_dt + h]) + a.dt_bias[h];
            float ddt = k->ddt[t] + v[i] + rate * dl;
            ddt = z > 20.0f ? ddt : ddt / (1.0f + expf(-z));
            cq_put(a.ddt + (c.t0 + t) * a.ldd_dt + h, ddt);
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
template <typename E, typename T>
__global__ void __launch_bounds__(THREADS, 4) chunk_gradients(cq_scan<T> a) {
    CQ_SHARED(float4, room4, [E::ROOM / 4]);
    CQ_SHARED(float4, m4, [CHUNK * CHUNK / 4]);
    CQ_SHARED(head_work, k, [1]);
    cq_chunk c = a.chunks[blockIdx.x];
    int64_t g = blockIdx.y;
    if (c.n == 0) {
        for (int64_t i = threadIdx.x; i < 3 * a.share; i += THREADS)
            a.sums[((int64_t)blockIdx.x * a.heads + g * a.share) * 3 + i] = 0.0;
        return;
    }
    float *room = (float *)room4, *m = (float *)m4, dcb[PER_THREAD], acc[PER_THREAD];
    rows<float> cb = pair_rows(a, a.cb, c, g);
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
            rows<T> dy = dy_rows(a, c, h, p0);
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
                                     skip * cq_value(dy.p[E::row(q) * dy.ld + E::column(u) + j]);
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
template <typename E, typename T>
__global__ void __launch_bounds__(THREADS, 4) group_gradients(cq_scan<T> a) {
    CQ_SHARED(float4, room4, [E::ROOM / 4]);
    CQ_SHARED(float, weight, [CHUNK]);
    cq_chunk c = a.chunks[blockIdx.x];
    if (c.n == 0)
        return;
    int64_t g = blockIdx.y, n0 = blockIdx.z / 2 * CHUNK;
    bool is_c = blockIdx.z % 2;
    float *room = (float *)room4, acc[PER_THREAD];
    rows<float> pairs = pair_rows(a, a.dcb, c, g);
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
            weighted<T> left = {is_c ? dy_rows(a, c, h, 0) : x_rows(a, c, h, 0), weight};
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
    add_sums(const double *sums, int64_t heads, int64_t chunks, float *ddt_bias, float *da_log,
             float *dd) {
    CQ_SHARED(double, room, [CQ_WARP]);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS)
        sum += sums[(i * heads + blockIdx.x) * 3 + blockIdx.y];
    sum = cq_block_sum(sum, room);
    if (threadIdx.x == 0)
        (blockIdx.y == 0 ? ddt_bias : blockIdx.y == 1 ? da_log : dd)[blockIdx.x] += (float)sum;
}

template <typename E, typename T> void gradients(cq_stream *s, const cq_scan<T> &a) {
    unsigned numbers = (unsigned)chunk_numbers(a), groups = (unsigned)a.groups;
    unsigned tiles = cq_blocks(a.state, CHUNK) * cq_blocks(a.dim, CHUNK);
    if (a.boundaries > 0)
        CQ_LAUNCH((own_states<E, T, true>), dim3(numbers, (unsigned)a.heads, tiles), THREADS, 0, s,
                  a);
    pass<true>(s, a);
    CQ_LAUNCH((chunk_gradients<E, T>), dim3(numbers, groups), THREADS, 0, s, a);
    CQ_LAUNCH((group_gradients<E, T>), dim3(numbers, groups, 2 * cq_blocks(a.state, CHUNK)),
              THREADS, 0, s, a);
}

template <typename T> int backward_of(cq_stream *s, const cq_ssd_backward_args *a) {
    cq_scan<T> w = scan_of<T>(a);
    w.dy = (const T *)a->dy;
    w.dx = (T *)a->dx, w.db = (T *)a->dB, w.dc = (T *)a->dC;
    w.ddt = (T *)a->ddt_raw;
    w.lddx = a->lddx, w.lddb = a->lddB, w.lddc = a->lddC, w.ldd_dt = a->ldd_dt;
    w.vec_y = a->head_dim % 4 == 0 && cq_aligned4<T>(a->dy);
    w.vec_dx = a->head_dim % 4 == 0 && a->lddx % 4 == 0 && cq_aligned4<T>(a->dx);
    w.vec_db = a->state % 4 == 0 && a->lddB % 4 == 0 && cq_aligned4<T>(a->dB);
    w.vec_dc = a->state % 4 == 0 && a->lddC % 4 == 0 && cq_aligned4<T>(a->dC);
    CQ_TRY(take_scratch(s, &w, true));
    cq_make_states(s, w);
    if (s->compute == CQ_COMPUTE_BF16)
        gradients<engine_bf16>(s, w);
    else
        gradients<engine_f32>(s, w);
    if (a->ddt_bias)
        CQ_LAUNCH(add_sums, dim3((unsigned)a->heads, 3), THREADS, 0, s, (const double *)w.sums,
                  w.heads, chunk_numbers(w), (float *)a->ddt_bias, (float *)a->da_log,
                  (float *)a->dd);
    CQ_CUDA_END("ssd_backward");
}

} // namespace

extern "C" int cq_cuda_ssd_backward(cq_stream *s, const cq_ssd_backward_args *a) {
    CQ_CUDA_ACT("ssd_backward", a);
    if (a->tokens < 1)
        return CQ_OK;
    return a->act == CQ_BF16 ? backward_of<__nv_bfloat16>(s, a) : backward_of<float>(s, a);
}
