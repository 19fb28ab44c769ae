/// ssd.cu - the Mamba-2 scan in chunks, forward and backward.
///
/// Inside a chunk of at most Q tokens of one document, with L the running sum of A dt and
/// u = dt x:
///     y_t = sum over s <= t of (C_t . B_s) exp(L_t - L_s) u_s + exp(L_t) S_in C_t + D x_t
///     S_out = exp(L_end) S_in + sum over s of exp(L_end - L_s) u_s B_s'
/// The states between chunks are passed on one after the other, all heads and elements side by
/// side. The backward runs the same way with G, the gradient of S_out, from the last chunk to the
/// first; dB and dC of a head lie in scratch until the heads of a group are added in order.
/// Exponents are sums of A dt <= 0 from the later to the earlier token, so nothing overflows.
///
/// Nemotron 3 Nano, 8192 tokens, 64 heads x 64, state 128, chunks of 64: 31 GFLOP forward, 1.5 ms
/// at 20 TF/s in FP32; states 0.27 GB. Backward about 85 GFLOP and 1.1 GB of scratch.
#include "kernels/cuda/docs.cuh"
#include "kernels/cuda/parts.cuh"
#include "kernels/cuda/tiles.cuh"

namespace {

constexpr int THREADS = 256, LARGEST_Q = 64;

/// The chunks of a batch, made on the device: at most tokens / q + n_docs of them.
struct chunk_list {
    int64_t *begin, *end; ///< tokens of each
    int32_t *first;       ///< begins a document
    int32_t *count;       ///< how many there are
    int64_t most;
    int q;
};

struct scan_shape {
    int64_t tokens, heads, dim, groups, state;
    const float *x, *B, *C, *dt_raw;
    int64_t ldx, ldB, ldC, ld_dt;
    const float *dt_bias, *a_log, *d;
    chunk_list chunks;
};

/// Device scratch: chunk list, decays [most, heads], states [most, heads, dim, state].
int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

__global__ void __launch_bounds__(32)
    list_chunks(const int64_t *starts, int64_t n_docs, chunk_list c) {
    if (threadIdx.x != 0)
        return;
    int64_t n = 0;
    for (int64_t k = 0; k < n_docs; k++)
        for (int64_t at = starts[k]; at < starts[k + 1]; at += c.q) {
            c.begin[n] = at;
            c.end[n] = at + c.q < starts[k + 1] ? at + c.q : starts[k + 1];
            c.first[n] = at == starts[k];
            n++;
        }
    *c.count = (int32_t)n;
}

/// exp(x) without the error of rounding x, which grows with |x|.
__device__ __forceinline__ float exp_of(double x) {
    float f = (float)x;
    return expf(f) * (1.0f + (float)(x - (double)f));
}
__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

/// dt, L (running sums of A dt, in double: differences of large ones are wanted) of the chunk's
/// tokens into shared memory; all threads.
__device__ __forceinline__ void steps_of(const scan_shape &a, int64_t from, int n, int64_t h,
                                         double *sum, float *dt) {
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        dt[i] = softplus(a.dt_raw[(from + i) * a.ld_dt + h] + a.dt_bias[h]);
    __syncthreads();
    double rate = -exp((double)a.a_log[h]);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        double total = 0.0; /* the same order in every thread */
        for (int k = 0; k <= i; k++)
            total += rate * (double)dt[k];
        sum[i] = total;
    }
    __syncthreads();
}

/// states[chunk, head] = sum over s of weight_s v_s B_s'. Forward: v = dt x, weight exp(L_end -
/// L_s). BACK: v = dy, C in place of B, weight exp(L_t). decay[chunk, head] = exp(L_end).
template <bool BACK>
__global__ void __launch_bounds__(THREADS)
    chunk_states(scan_shape a, const float *dy, float *states, float *decay) {
    CQ_DYN_SMEM(float, room);
    int64_t chunk = blockIdx.x, h = blockIdx.y, g = h / (a.heads / a.groups);
    if (chunk >= *a.chunks.count) /* the whole block */
        return;
    int64_t from = a.chunks.begin[chunk];
    int n = (int)(a.chunks.end[chunk] - from), dim = (int)a.dim, state = (int)a.state,
        q = a.chunks.q;
    double *sum = reinterpret_cast<double *>(room);
    float *dt = room + 2 * q;
    cq_tile v = {dt + q, dim + 1}, b = {v.p + q * (dim + 1), state + 1};
    steps_of(a, from, n, h, sum, dt);
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        dt[i] = BACK ? exp_of(sum[i]) : dt[i] * exp_of(sum[n - 1] - sum[i]);
    __syncthreads();
    cq_load_rows(v, (BACK ? dy + from * a.heads * a.dim : a.x + from * a.ldx) + h * a.dim,
                 BACK ? a.heads * a.dim : a.ldx, n, dim, dt);
    cq_load_rows(b, (BACK ? a.C + from * a.ldC : a.B + from * a.ldB) + g * a.state,
                 BACK ? a.ldC : a.ldB, n, state, NULL);
    __syncthreads();
    float *out = states + (chunk * a.heads + h) * a.dim * a.state;
    cq_product(
        dim, state, n, [&](int i, int k) { return v.at(k, i); },
        [&](int j, int k) { return b.at(k, j); },
        [&](int i, int j, float r) { out[i * state + j] = r; });
    if (!BACK && threadIdx.x == 0)
        decay[chunk * a.heads + h] = exp_of(sum[n - 1]);
}

/// In place: what each chunk adds to the state becomes the state it begins with (or, BACK, the
/// gradient of the state it ends with).
template <bool BACK>
__global__ void __launch_bounds__(THREADS)
    pass_states(scan_shape a, float *states, const float *decay) {
    int64_t size = a.dim * a.state, h = blockIdx.y;
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int32_t count = *a.chunks.count;
    if (i >= size)
        return;
    float carried = 0.0f;
    for (int32_t k = 0; k < count; k++) {
        int64_t chunk = BACK ? count - 1 - k : k;
        bool fresh = BACK ? chunk + 1 == count || a.chunks.first[chunk + 1] : a.chunks.first[chunk];
        float *at = states + (chunk * a.heads + h) * size + i, own = *at;
        carried = fresh ? 0.0f : carried;
        *at = carried;
        carried = decay[chunk * a.heads + h] * carried + own;
    }
}

__global__ void __launch_bounds__(THREADS)
    chunk_outputs(scan_shape a, const float *states, float *y) {
    CQ_DYN_SMEM(float, room);
    int64_t chunk = blockIdx.x, h = blockIdx.y, g = h / (a.heads / a.groups);
    if (chunk >= *a.chunks.count) /* the whole block */
        return;
    int64_t from = a.chunks.begin[chunk];
    int n = (int)(a.chunks.end[chunk] - from), dim = (int)a.dim, state = (int)a.state,
        q = a.chunks.q;
    double *sum = reinterpret_cast<double *>(room);
    float *dt = room + 2 * q;
    int rows = q > dim ? q : dim; /* b holds the state afterwards */
    cq_tile x = {dt + q, dim + 1}, b = {x.p + q * (dim + 1), state + 1};
    cq_tile c = {b.p + rows * (state + 1), state + 1}, m = {c.p + q * (state + 1), q + 1};
    steps_of(a, from, n, h, sum, dt);
    cq_load_rows(x, a.x + from * a.ldx + h * a.dim, a.ldx, n, dim, NULL);
    cq_load_rows(b, a.B + from * a.ldB + g * a.state, a.ldB, n, state, NULL);
    cq_load_rows(c, a.C + from * a.ldC + g * a.state, a.ldC, n, state, NULL);
    __syncthreads();
    cq_product(
        n, n, state, [&](int i, int k) { return c.at(i, k); },
        [&](int j, int k) { return b.at(j, k); },
        [&](int i, int j, float r) {
            m.at(i, j) = j <= i ? r * exp_of(sum[i] - sum[j]) * dt[j] : 0.0f;
        });
    __syncthreads();
    cq_load_rows(b, states + (chunk * a.heads + h) * a.dim * a.state, state, dim, state, NULL);
    float skip = a.d[h];
    float *out = y + from * a.heads * a.dim + h * a.dim;
    cq_product(
        n, dim, n, [&](int i, int k) { return m.at(i, k); },
        [&](int j, int k) { return x.at(k, j); },
        [&](int i, int j, float r) {
            out[(int64_t)i * a.heads * a.dim + j] = r + skip * x.at(i, j);
        });
    __syncthreads(); /* the threads that add are others */
    cq_product(
        n, dim, state, [&](int i, int k) { return c.at(i, k); },
        [&](int j, int k) { return b.at(j, k); },
        [&](int i, int j, float r) {
            out[(int64_t)i * a.heads * a.dim + j] += exp_of(sum[i]) * r;
        });
}

/// to[i] = sum over j of left(i, j) right(i, j), i < n: a warp each.
__device__ __forceinline__ void row_dots(float *to, const cq_tile &left, const cq_tile &right,
                                         int n, int cols) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    for (int i = (int)(threadIdx.x / CQ_WARP); i < n; i += THREADS / CQ_WARP) {
        float sum = 0.0f;
        for (int j = lane; j < cols; j += CQ_WARP)
            sum += left.at(i, j) * right.at(i, j);
        sum = cq_warp_sum(sum);
        if (lane == 0)
            to[i] = sum;
    }
}

struct scan_gradients {
    const float *dy;
    float *dx, *ddt_raw;
    int64_t lddx, ldd_dt;
    float *dB, *dC;      ///< [tokens, heads, state] of each head
    float *scalars;      ///< [most, 3, heads]: parts of ddt_bias, da_log, dd
    const float *in, *g; ///< states that chunks begin with; gradients of those they end with
};

/// One chunk of one head. w = exp(L_t - L_s), cb = C_t . B_s, yu = dy_t . x_s:
///   du_s = sum over t >= s of cb w dy_t + exp(L_end - L_s) G B_s
///   dC_t = sum over s <= t of w dt_s yu B_s + exp(L_t) S_in' dy_t
///   dB_s = sum over t >= s of w dt_s yu C_t + dt_s exp(L_end - L_s) G' x_s
///   d(A dt)_k from cb w dt_s yu over s < k <= t, the terms with S_in for t >= k, with G for s < k,
///   and exp(L_end) <G, S_in>
__global__ void __launch_bounds__(THREADS) chunk_gradients(scan_shape a, scan_gradients o) {
    CQ_DYN_SMEM(float, room);
    CQ_SHARED(float, sums, [CQ_WARP]);
    CQ_SHARED(double, wide_sums, [CQ_WARP]);
    int64_t chunk = blockIdx.x, h = blockIdx.y, g = h / (a.heads / a.groups);
    if (chunk >= *a.chunks.count) /* the whole block */
        return;
    int64_t from = a.chunks.begin[chunk], inner = a.heads * a.dim, wide = a.heads * a.state;
    int n = (int)(a.chunks.end[chunk] - from), dim = (int)a.dim, state = (int)a.state,
        q = a.chunks.q;
    double *sum = reinterpret_cast<double *>(room);
    float *dt = room + 2 * q, *da = dt + q, *ddt = da + q, *into_at = ddt + q,
          *out_at = into_at + q;
    cq_tile x = {out_at + q, dim + 1}, dy = {x.p + q * (dim + 1), dim + 1};
    cq_tile b = {dy.p + q * (dim + 1), state + 1}, c = {b.p + q * (state + 1), state + 1};
    cq_tile cb = {c.p + q * (state + 1), q + 1}, yu = {cb.p + q * (q + 1), q + 1};
    cq_tile pass = {yu.p + q * (q + 1), state + 1};      /* S_in, then G */
    cq_tile w = {pass.p + dim * (state + 1), state + 1}; /* the terms of dC and dB with them */
    const float *in = o.in + (chunk * a.heads + h) * a.dim * a.state;
    const float *grad = o.g + (chunk * a.heads + h) * a.dim * a.state;
    steps_of(a, from, n, h, sum, dt);
    cq_load_rows(x, a.x + from * a.ldx + h * a.dim, a.ldx, n, dim, NULL);
    cq_load_rows(dy, o.dy + from * inner + h * a.dim, inner, n, dim, NULL);
    cq_load_rows(b, a.B + from * a.ldB + g * a.state, a.ldB, n, state, NULL);
    cq_load_rows(c, a.C + from * a.ldC + g * a.state, a.ldC, n, state, NULL);
    __syncthreads();
    double last = sum[n - 1];
    cq_product(
        n, n, state, [&](int i, int k) { return c.at(i, k); },
        [&](int j, int k) { return b.at(j, k); },
        [&](int i, int j, float r) { cb.at(i, j) = j <= i ? r * exp_of(sum[i] - sum[j]) : 0.0f; });
    cq_product(
        n, n, dim, [&](int i, int k) { return dy.at(i, k); },
        [&](int j, int k) { return x.at(j, k); }, [&](int i, int j, float r) { yu.at(i, j) = r; });
    __syncthreads();
    /* the decay of step k is in all pairs s < k <= t: running sums of a row over s, kept above the
       diagonal of yu, then of a column over t; nothing cancels */
    for (int t = (int)threadIdx.x; t < n; t += THREADS) {
        float before = 0.0f;
        for (int s = 0; s < t; s++) {
            before += cb.at(t, s) * dt[s] * yu.at(t, s);
            yu.at(s, t) = before;
        }
    }
    __syncthreads();
    for (int k = (int)threadIdx.x; k < n; k += THREADS) {
        float across = 0.0f;
        for (int t = k; t < n && k > 0; t++)
            across += yu.at(k - 1, t);
        da[k] = across;
    }
    __syncthreads(); /* then yu becomes w dt_s yu */
    for (int i = (int)threadIdx.x; i < n * n; i += THREADS) {
        int t = i / n, s = i - t * n;
        yu.at(t, s) = s <= t ? yu.at(t, s) * exp_of(sum[t] - sum[s]) * dt[s] : 0.0f;
    }
    __syncthreads();
    float *dc = o.dC + (from * a.heads + h) * a.state, *db = o.dB + (from * a.heads + h) * a.state;
    cq_product(
        n, state, n, [&](int i, int k) { return yu.at(i, k); },
        [&](int j, int k) { return b.at(k, j); },
        [&](int i, int j, float r) { dc[i * wide + j] = r; });
    cq_product(
        n, state, n, [&](int i, int k) { return yu.at(k, i); },
        [&](int j, int k) { return c.at(k, j); },
        [&](int i, int j, float r) { db[i * wide + j] = r; });
    float *dx = o.dx + from * o.lddx + h * a.dim;
    cq_product(/* du without its state term, kept in dx */
               n, dim, n, [&](int i, int k) { return cb.at(k, i); },
               [&](int j, int k) { return dy.at(k, j); },
               [&](int i, int j, float r) { dx[i * o.lddx + j] = r; });
    cq_load_rows(pass, in, state, dim, state, NULL);
    __syncthreads(); /* the threads that add to dx are others */
    cq_product(
        n, state, dim, [&](int i, int k) { return dy.at(i, k); },
        [&](int j, int k) { return pass.at(k, j); },
        [&](int i, int j, float r) {
            w.at(i, j) = exp_of(sum[i]) * r;
            dc[i * wide + j] += w.at(i, j);
        });
    float skip = 0.0f, pairs = 0.0f;
    for (int i = (int)threadIdx.x; i < dim * state; i += THREADS)
        pairs += grad[i] * pass.at(i / state, i % state);
    pairs = cq_block_sum(pairs, sums) * exp_of(last);
    __syncthreads();
    row_dots(into_at, c, w, n, state);
    cq_load_rows(pass, grad, state, dim, state, NULL);
    __syncthreads();
    cq_product(
        n, state, dim, [&](int i, int k) { return x.at(i, k); },
        [&](int j, int k) { return pass.at(k, j); },
        [&](int i, int j, float r) {
            w.at(i, j) = dt[i] * exp_of(last - sum[i]) * r;
            db[i * wide + j] += w.at(i, j);
        });
    cq_product(
        n, dim, state, [&](int i, int k) { return b.at(i, k); },
        [&](int j, int k) { return pass.at(j, k); },
        [&](int i, int j, float r) { dx[i * o.lddx + j] += exp_of(last - sum[i]) * r; });
    __syncthreads();
    row_dots(out_at, b, w, n, state);
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    for (int t = warp; t < n; t += THREADS / CQ_WARP) {
        float along = 0.0f, through = 0.0f;
        for (int p = lane; p < dim; p += CQ_WARP) {
            along += dx[t * o.lddx + p] * x.at(t, p);
            through += dy.at(t, p) * x.at(t, p);
        }
        along = cq_warp_sum(along);
        through = cq_warp_sum(through);
        if (lane == 0) {
            ddt[t] = along;
            skip += through;
        }
    }
    skip = cq_block_sum(skip, sums);
    for (int i = (int)threadIdx.x; i < n * dim; i += THREADS) {
        int t = i / dim, p = i - t * dim;
        float *at = dx + t * o.lddx + p;
        *at = *at * dt[t] + a.d[h] * dy.at(t, p);
    }
    float bias = 0.0f;
    double rate = -exp((double)a.a_log[h]), slope = 0.0;
    for (int t = (int)threadIdx.x; t < n; t += THREADS) {
        double whole =
            (double)da[t] + (double)pairs; /* pairs of tokens, and what passes the whole chunk */
        for (int k = n - 1; k >= t; k--)
            whole += (double)into_at[k];
        for (int k = 0; k < t; k++)
            whole += (double)out_at[k];
        float raw = a.dt_raw[(from + t) * a.ld_dt + h] + a.dt_bias[h];
        float d = (float)((double)ddt[t] + rate * whole) / (1.0f + expf(-raw));
        o.ddt_raw[(from + t) * o.ldd_dt + h] = d;
        bias += d;
        slope += whole * (double)dt[t];
    }
    bias = cq_block_sum(bias, sums);
    slope = cq_block_sum(slope, wide_sums);
    if (threadIdx.x == 0) {
        float *part = o.scalars + chunk * 3 * a.heads + h;
        part[0] = bias;
        part[a.heads] = (float)(slope * rate);
        part[2 * a.heads] = skip;
    }
}

/// dB or dC of a group: its heads in order.
__global__ void __launch_bounds__(THREADS)
    add_heads(const float *of_heads, float *out, int64_t ld, int64_t tokens, int64_t heads,
              int64_t groups, int64_t state) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, per = heads / groups;
    if (i >= tokens * groups * state)
        return;
    int64_t t = i / (groups * state), g = i / state % groups, k = i % state;
    const float *from = of_heads + (t * heads + g * per) * state + k;
    float sum = 0.0f;
    for (int64_t h = 0; h < per; h++)
        sum += from[h * state];
    out[t * ld + g * state + k] = sum;
}
/// Adds the chunks' parts of the three gradients by head.
__global__ void __launch_bounds__(THREADS)
    add_scalars(chunk_list c, const float *scalars, int64_t heads, float *dbias, float *da_log,
                float *dd) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= 3 * heads)
        return;
    float *to = (i < heads ? dbias : i < 2 * heads ? da_log : dd) + i % heads;
    double sum = 0.0;
    for (int32_t k = 0; k < *c.count; k++)
        sum += (double)scalars[k * 3 * heads + i];
    *to += (float)sum;
}

/// Cuts scratch; a chunk is as long as shared memory allows.
struct scratch {
    char *p;
    int64_t used;
    void *take(int64_t bytes) {
        void *r = p ? p + used : NULL;
        used += up(bytes);
        return r;
    }
};

void cut_chunks(chunk_list *c, scratch *m) {
    c->begin = (int64_t *)m->take(c->most * 8);
    c->end = (int64_t *)m->take(c->most * 8);
    c->first = (int32_t *)m->take(c->most * 4);
    c->count = (int32_t *)m->take(4);
}

int64_t forward_floats(int64_t q, int64_t dim, int64_t state) {
    return 3 * q + q * (dim + 1) + (q + (q > dim ? q : dim)) * (state + 1) + q * (q + 1);
}
int64_t backward_floats(int64_t q, int64_t dim, int64_t state) {
    return 7 * q + 2 * q * (dim + 1) + (3 * q + dim) * (state + 1) + 2 * q * (q + 1);
}
/// The longest chunk, 64 or shorter, whose block fits; 0 when none does.
int longest_chunk(int64_t (*floats)(int64_t, int64_t, int64_t), int64_t dim, int64_t state) {
    int q = LARGEST_Q;
    while (q >= 8 && floats(q, dim, state) * (int64_t)sizeof(float) > 220 << 10)
        q /= 2;
    return q >= 8 ? q : 0;
}
int too_wide(const char *op, int64_t dim, int64_t state) {
    return cq_fail(CQ_ESHAPE,
                   "cuda: %s: head_dim %lld and state %lld need more shared memory than "
                   "there is",
                   op, (long long)dim, (long long)state);
}

template <typename Args> scan_shape shape_of(const Args *a, int q) {
    scan_shape s = {};
    s.tokens = a->tokens, s.heads = a->heads, s.dim = a->head_dim;
    s.groups = a->groups, s.state = a->state;
    s.x = (const float *)a->x, s.B = (const float *)a->B, s.C = (const float *)a->C;
    s.dt_raw = (const float *)a->dt_raw;
    s.ldx = a->ldx, s.ldB = a->ldB, s.ldC = a->ldC, s.ld_dt = a->ld_dt;
    s.dt_bias = (const float *)a->dt_bias, s.a_log = (const float *)a->a_log;
    s.d = (const float *)a->d;
    s.chunks.q = q;
    s.chunks.most = a->tokens / q + a->n_docs + 1;
    return s;
}

/// Chunk list, decays, and the states that chunks begin with.
int make_states(cq_stream *s, const char *op, const int64_t *starts, int64_t n_docs,
                const scan_shape &shape, float *states, float *decay) {
    int64_t q = shape.chunks.q;
    size_t bytes = (size_t)(3 * q + q * (shape.dim + 1) + q * (shape.state + 1)) * sizeof(float);
    dim3 grid((unsigned)shape.chunks.most, (unsigned)shape.heads);
    dim3 pass(cq_blocks(shape.dim * shape.state, THREADS), (unsigned)shape.heads);
    CQ_TRY(cq_cuda_shared_bytes((const void *)chunk_states<false>, (int64_t)bytes, op));
    CQ_LAUNCH(list_chunks, 1, 32, 0, s, starts, n_docs, shape.chunks);
    CQ_LAUNCH(chunk_states<false>, grid, THREADS, bytes, s, shape, (const float *)NULL, states,
              decay);
    CQ_LAUNCH(pass_states<false>, pass, THREADS, 0, s, shape, states, (const float *)decay);
    return cq_cuda_status(op);
}

} // namespace

extern "C" int cq_cuda_ssd_forward(cq_stream *s, const cq_ssd_forward_args *a) {
    CQ_CUDA_F32("ssd_forward", a);
    int q = longest_chunk(forward_floats, a->head_dim, a->state);
    if (!q)
        return too_wide("ssd_forward", a->head_dim, a->state);
    if (a->tokens < 1)
        return CQ_OK;
    scan_shape shape = shape_of(a, q);
    int64_t size = shape.chunks.most * a->heads * a->head_dim * a->state * 4;
    scratch m = {NULL, 0};
    float *states = NULL, *decay = NULL;
    for (int pass = 0; pass < 2; pass++) { /* the first counts */
        m.used = 0;
        cut_chunks(&shape.chunks, &m);
        decay = (float *)m.take(shape.chunks.most * a->heads * 4);
        states = (float *)m.take(size);
        if (pass == 0 && !(m.p = (char *)cq_cuda_scratch(s, m.used)))
            return CQ_ENOMEM;
    }
    CQ_TRY(make_states(s, "ssd_forward", a->starts, a->n_docs, shape, states, decay));
    int64_t bytes = forward_floats(q, a->head_dim, a->state) * (int64_t)sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)chunk_outputs, bytes, "ssd_forward"));
    dim3 grid((unsigned)shape.chunks.most, (unsigned)a->heads);
    CQ_LAUNCH(chunk_outputs, grid, THREADS, (size_t)bytes, s, shape, (const float *)states,
              (float *)a->y);
    CQ_CUDA_END("ssd_forward");
}

extern "C" int cq_cuda_ssd_backward(cq_stream *s, const cq_ssd_backward_args *a) {
    CQ_CUDA_F32("ssd_backward", a);
    int q = longest_chunk(backward_floats, a->head_dim, a->state);
    if (!q)
        return too_wide("ssd_backward", a->head_dim, a->state);
    if (a->tokens < 1)
        return CQ_OK;
    scan_shape shape = shape_of(a, q);
    int64_t most = shape.chunks.most, size = most * a->heads * a->head_dim * a->state * 4;
    int64_t wide = a->tokens * a->heads * a->state;
    scratch m = {NULL, 0};
    float *states = NULL, *grads = NULL, *decay = NULL;
    scan_gradients o = {};
    for (int pass = 0; pass < 2; pass++) { /* the first counts */
        m.used = 0;
        cut_chunks(&shape.chunks, &m);
        decay = (float *)m.take(most * a->heads * 4);
        states = (float *)m.take(size);
        grads = (float *)m.take(size);
        o.dB = (float *)m.take(wide * 4);
        o.dC = (float *)m.take(wide * 4);
        o.scalars = (float *)m.take(most * 3 * a->heads * 4);
        if (pass == 0 && !(m.p = (char *)cq_cuda_scratch(s, m.used)))
            return CQ_ENOMEM;
    }
    CQ_TRY(make_states(s, "ssd_backward", a->starts, a->n_docs, shape, states, decay));
    o.dy = (const float *)a->dy, o.dx = (float *)a->dx, o.ddt_raw = (float *)a->ddt_raw;
    o.lddx = a->lddx, o.ldd_dt = a->ldd_dt, o.in = states, o.g = grads;
    dim3 grid((unsigned)most, (unsigned)a->heads);
    dim3 pass(cq_blocks(a->head_dim * a->state, THREADS), (unsigned)a->heads);
    size_t few = (size_t)(3 * q + q * (a->head_dim + 1) + q * (a->state + 1)) * sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)chunk_states<true>, (int64_t)few, "ssd_backward"));
    CQ_LAUNCH(chunk_states<true>, grid, THREADS, few, s, shape, o.dy, grads, decay);
    CQ_LAUNCH(pass_states<true>, pass, THREADS, 0, s, shape, grads, (const float *)decay);
    int64_t bytes = backward_floats(q, a->head_dim, a->state) * (int64_t)sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)chunk_gradients, bytes, "ssd_backward"));
    CQ_LAUNCH(chunk_gradients, grid, THREADS, (size_t)bytes, s, shape, o);
    int64_t n = a->tokens * a->groups * a->state;
    CQ_LAUNCH(add_heads, cq_blocks(n, THREADS), THREADS, 0, s, (const float *)o.dB, (float *)a->dB,
              a->lddB, a->tokens, a->heads, a->groups, a->state);
    CQ_LAUNCH(add_heads, cq_blocks(n, THREADS), THREADS, 0, s, (const float *)o.dC, (float *)a->dC,
              a->lddC, a->tokens, a->heads, a->groups, a->state);
    if (a->ddt_bias)
        CQ_LAUNCH(add_scalars, cq_blocks(3 * a->heads, THREADS), THREADS, 0, s, shape.chunks,
                  (const float *)o.scalars, a->heads, (float *)a->ddt_bias, (float *)a->da_log,
                  (float *)a->dd);
    CQ_CUDA_END("ssd_backward");
}
