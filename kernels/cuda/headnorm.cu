/// headnorm.cu - RMSNorm of each head and rotary embedding, forward and backward; formulas are
/// kernels/ref/norms.inc.h's. Either may be absent.
///
///     y[i] = v[i] cos - v[i + n/2] sin    y[i + n/2] = v[i + n/2] cos + v[i] sin
///
/// Bound by memory: 8192 tokens of Qwen3-4B, 32 heads x 128 of q: forward 8 bytes per element, 268
/// MB, 67 us at 4 TB/s; backward 12, 403 MB, 100 us; half of that where x, y and their gradients
/// are BF16. Angles are in double (a position of a million times a float frequency would have no
/// digits left after the whole turns are taken away): 64 sines and cosines per row serve all its
/// heads, about 24 M double operations, 2 us.
#include "kernels/cuda/float4.cuh"
#include "kernels/cuda/parts.cuh"

enum { THREADS = 256, SMS = 132, MOST_DIM = 256, MOST_ROWS = 16, MOST_PARTS = 1024 };

/// The integer nearest to a double below 2^51: adding 1.5 * 2^52 rounds.
static __device__ __forceinline__ double nearest(double x) {
    return (x + 6755399441055744.0) - 6755399441055744.0;
}
/// Sine and cosine of an angle below 2^31: quarter turns are taken away in double, the rest, at
/// most pi/4, goes into the Taylor series (error below 2^-28).
static __device__ __forceinline__ void sine_cosine(double angle, float *sine, float *cosine) {
    double k = nearest(angle * 0.63661977236758134308);
    double r = (angle - k * 1.5707963267341256) - k * 6.0771005065061922e-11, z = r * r;
    double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880))));
    double c =
        1.0 +
        z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))));
    int quarter = (int)((long long)k & 3);
    double turned_s = (quarter & 1) ? c : s, turned_c = (quarter & 1) ? s : c;
    *sine = (float)(quarter >= 2 ? -turned_s : turned_s);
    *cosine = (float)(quarter == 1 || quarter == 2 ? -turned_c : turned_c);
}

/// What both directions share, by value: rows of heads, `lanes` of a warp for each head.
struct head_shape {
    int64_t rows;
    int heads, dim, batch; ///< rows that a block has the angles of at once
    const int32_t *positions;
    float eps;
    double frequency[MOST_DIM / 2];
};

/// Sum over LANES neighbouring lanes, the same in all of them.
template <int LANES> static __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
/// A quarter of a head's low half and the one that it pairs with.
struct pair4 {
    float4 low, high;
};
template <typename T>
static __device__ __forceinline__ pair4 load_pair(const T *p, int half, bool live) {
    pair4 v;
    v.low = cq_load4_if(live, p);
    v.high = cq_load4_if(live, p + half);
    return v;
}
static __device__ __forceinline__ pair4 turn_pair(pair4 v, float4 c, float4 s, float sign) {
    pair4 t;
    s = cq_scale4(s, sign);
    t.low = cq_plus4(cq_times4(v.low, c), cq_scale4(cq_times4(v.high, s), -1.0f));
    t.high = cq_plus4(cq_times4(v.high, c), cq_times4(v.low, s));
    return t;
}

/// The angles of rows base .. base + batch into shared memory, cosines before sines.
static __device__ __forceinline__ void turn_table(const head_shape &h, int64_t base, float *table) {
    int half = h.dim / 2, n = h.batch * half;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        int64_t r = base + i / half;
        float s, c;
        sine_cosine((double)h.positions[r < h.rows ? r : h.rows - 1] * h.frequency[i % half], &s,
                    &c);
        table[i] = c;
        table[n + i] = s;
    }
}
/// Head number t of the rows from `base` on.
struct head_place {
    bool live;
    int row; ///< from base
    int64_t r, h;
};
static __device__ __forceinline__ head_place place_of(const head_shape &h, int64_t base, int t) {
    head_place p;
    p.row = t / h.heads;
    p.r = base + p.row;
    p.h = t - p.row * h.heads;
    p.live = p.row < h.batch && p.r < h.rows;
    return p;
}

/// A block takes `batch` rows at a time; a warp 32 / LANES heads at once and two of each lane.
template <typename T, int LANES>
static __global__ void __launch_bounds__(THREADS)
    headnorm_forward_heads(head_shape h, const T *x, int64_t ldx, const float *w, T *y,
                           int64_t ldy) {
    CQ_DYN_SMEM(float, table);
    enum { TEAMS = THREADS / LANES, HERE = CQ_WARP / LANES };
    int half = h.dim / 2, lane = (int)(threadIdx.x % LANES), turns = h.batch * half;
    int team0 = (int)(threadIdx.x / CQ_WARP) * HERE, mine = (int)(threadIdx.x % CQ_WARP) / LANES;
    bool inside = 4 * lane < half;
    pair4 weight = load_pair(w ? w + 4 * lane : w, half, w && inside);
    for (int64_t base = (int64_t)blockIdx.x * h.batch; base < h.rows;
         base += (int64_t)gridDim.x * h.batch) {
        __syncthreads();
        if (h.positions)
            turn_table(h, base, table);
        __syncthreads();
        for (int t = team0; t < h.batch * h.heads; t += 2 * TEAMS) {
            head_place p[2];
            pair4 v[2];
            float sum[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                p[k] = place_of(h, base, t + k * TEAMS + mine);
                p[k].live = p[k].live && inside;
                v[k] = load_pair(x + p[k].r * ldx + p[k].h * h.dim + 4 * lane, half, p[k].live);
                sum[k] = cq_dot4(v[k].low, v[k].low) + cq_dot4(v[k].high, v[k].high);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (w) {
                    float by = cq_rstd(lanes_sum<LANES>(sum[k]), h.dim, h.eps);
                    v[k].low = cq_times4(weight.low, cq_scale4(v[k].low, by));
                    v[k].high = cq_times4(weight.high, cq_scale4(v[k].high, by));
                }
                if (!p[k].live)
                    continue;
                if (h.positions) {
                    const float *at = table + p[k].row * half + 4 * lane;
                    v[k] = turn_pair(v[k], cq_load4(at, true), cq_load4(at + turns, true), 1.0f);
                }
                T *to = y + p[k].r * ldy + p[k].h * h.dim + 4 * lane;
                cq_store4(to, v[k].low, true);
                cq_store4(to + half, v[k].high, true);
            }
        }
    }
}

/// The same for the gradient; the block's sum of dn xhat goes to part[blockIdx.x]. dx may be dy.
template <typename T, int LANES>
static __global__ void __launch_bounds__(THREADS)
    headnorm_backward_heads(head_shape h, const T *x, int64_t ldx, const float *w, const T *dy,
                            int64_t lddy, T *dx, int64_t lddx, float *part) {
    CQ_DYN_SMEM(float, table);
    CQ_SHARED(float4, sums, [2][THREADS]);
    enum { TEAMS = THREADS / LANES, HERE = CQ_WARP / LANES };
    int half = h.dim / 2, lane = (int)(threadIdx.x % LANES), turns = h.batch * half;
    int team0 = (int)(threadIdx.x / CQ_WARP) * HERE, mine = (int)(threadIdx.x % CQ_WARP) / LANES;
    bool inside = 4 * lane < half;
    pair4 weight = load_pair(w ? w + 4 * lane : w, half, w && inside),
          dw = {cq_zero4(), cq_zero4()};
    for (int64_t base = (int64_t)blockIdx.x * h.batch; base < h.rows;
         base += (int64_t)gridDim.x * h.batch) {
        __syncthreads();
        if (h.positions)
            turn_table(h, base, table);
        __syncthreads();
        for (int t = team0; t < h.batch * h.heads; t += 2 * TEAMS) {
            head_place p[2];
            pair4 v[2], d[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                p[k] = place_of(h, base, t + k * TEAMS + mine);
                p[k].live = p[k].live && inside;
                v[k] =
                    load_pair(x + p[k].r * ldx + p[k].h * h.dim + 4 * lane, half, w && p[k].live);
                d[k] = load_pair(dy + p[k].r * lddy + p[k].h * h.dim + 4 * lane, half, p[k].live);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (h.positions && p[k].live) {
                    const float *at = table + p[k].row * half + 4 * lane;
                    d[k] = turn_pair(d[k], cq_load4(at, true), cq_load4(at + turns, true), -1.0f);
                }
                if (w) {
                    pair4 g = {cq_times4(weight.low, d[k].low), cq_times4(weight.high, d[k].high)};
                    float squares = cq_dot4(v[k].low, v[k].low) + cq_dot4(v[k].high, v[k].high);
                    float along = cq_dot4(g.low, v[k].low) + cq_dot4(g.high, v[k].high);
                    float by = cq_rstd(lanes_sum<LANES>(squares), h.dim, h.eps);
                    float m = lanes_sum<LANES>(along) * by / (float)h.dim;
                    v[k].low = cq_scale4(v[k].low, by);
                    v[k].high = cq_scale4(v[k].high, by);
                    dw.low = cq_plus4(dw.low, cq_times4(d[k].low, v[k].low));
                    dw.high = cq_plus4(dw.high, cq_times4(d[k].high, v[k].high));
                    d[k].low = cq_norm_slope4(g.low, v[k].low, m, by);
                    d[k].high = cq_norm_slope4(g.high, v[k].high, m, by);
                }
                if (!p[k].live)
                    continue;
                T *to = dx + p[k].r * lddx + p[k].h * h.dim + 4 * lane;
                cq_store4(to, d[k].low, true);
                cq_store4(to + half, d[k].high, true);
            }
        }
    }
    if (!part) /* the whole grid */
        return;
    sums[0][threadIdx.x] = dw.low;
    sums[1][threadIdx.x] = dw.high;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < h.dim; i += THREADS) {
        int side = i < half ? 0 : 1, column = i - side * half;
        const float *first = (const float *)sums[side] + column;
        float sum = 0.0f;
        for (int k = 0; k < TEAMS; k++)
            sum += first[k * 4 * LANES];
        part[blockIdx.x * (int64_t)h.dim + i] = sum;
    }
}
// ---- any head_dim and any alignment -------------------------------------------------------------

/// A head of a warp, v = NULL where the norm is absent.
template <typename T>
static __device__ __forceinline__ float head_rstd(const T *x, int64_t n, float eps) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x % CQ_WARP; i < n; i += CQ_WARP)
        sum += cq_value(x[i]) * cq_value(x[i]);
    return cq_rstd(cq_warp_sum(sum), (int)n, eps);
}
static __device__ __forceinline__ void any_turn(int32_t position, double theta, int64_t i,
                                                int64_t n, float *s, float *c) {
    sine_cosine((double)position * pow(theta, -2.0 * (double)i / (double)n), s, c);
}
template <typename T>
static __global__ void __launch_bounds__(THREADS) headnorm_forward_any(cq_headnorm_forward_args a) {
    int64_t task = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + threadIdx.x / CQ_WARP;
    int64_t n = a.head_dim, r = task / a.heads, head = task % a.heads, lane = threadIdx.x % CQ_WARP;
    if (r >= a.rows) /* the whole warp */
        return;
    const T *x = (const T *)a.x + r * a.ldx + head * n;
    const float *w = (const float *)a.w;
    T *y = (T *)a.y + r * a.ldy + head * n;
    float by = w ? head_rstd(x, n, (float)a.eps) : 1.0f;
    int64_t half = a.positions ? n / 2 : 0;
    for (int64_t i = lane; i < half; i += CQ_WARP) {
        float s, c, low = cq_value(x[i]), high = cq_value(x[i + half]);
        any_turn(a.positions[r], a.theta, i, n, &s, &c);
        if (w) {
            low = w[i] * (low * by);
            high = w[i + half] * (high * by);
        }
        cq_put(y + i, low * c - high * s);
        cq_put(y + i + half, high * c + low * s);
    }
    for (int64_t i = lane; half == 0 && i < n; i += CQ_WARP)
        cq_put(y + i, w ? w[i] * (cq_value(x[i]) * by) : cq_value(x[i]));
}
/// dn of element i of a head of row r.
template <typename T>
static __device__ __forceinline__ float any_dn(const cq_headnorm_backward_args &a, const T *dy,
                                               int64_t r, int64_t i) {
    int64_t half = a.head_dim / 2, j = i < half ? i : i - half;
    if (!a.positions)
        return cq_value(dy[i]);
    float s, c;
    any_turn(a.positions[r], a.theta, j, a.head_dim, &s, &c);
    return i < half ? cq_value(dy[j]) * c + cq_value(dy[j + half]) * s
                    : cq_value(dy[j + half]) * c - cq_value(dy[j]) * s;
}
/// Scales of all heads, a warp per head.
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    headnorm_scales_any(cq_headnorm_backward_args a, float *rstd) {
    int64_t task = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + threadIdx.x / CQ_WARP;
    int64_t r = task / a.heads, head = task % a.heads;
    if (r >= a.rows) /* the whole warp */
        return;
    float by = head_rstd((const T *)a.x + r * a.ldx + head * a.head_dim, a.head_dim, (float)a.eps);
    if (threadIdx.x % CQ_WARP == 0)
        rstd[task] = by;
}
/// Sums of dn xhat over the heads of `share` rows, a thread per column.
template <typename T>
static __global__ void __launch_bounds__(128)
    headnorm_weight_any(cq_headnorm_backward_args a, const float *rstd, int64_t share,
                        float *part) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = a.head_dim;
    int64_t first = blockIdx.y * share;
    if (i >= n)
        return;
    float sum = 0.0f;
    for (int64_t r = first; r < first + share && r < a.rows; r++)
        for (int64_t h = 0; h < a.heads; h++)
            sum += any_dn(a, (const T *)a.dy + r * a.lddy + h * n, r, i) *
                   (cq_value(((const T *)a.x)[r * a.ldx + h * n + i]) * rstd[r * a.heads + h]);
    part[blockIdx.y * n + i] = sum;
}
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    headnorm_backward_any(cq_headnorm_backward_args a, const float *rstd) {
    int64_t task = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + threadIdx.x / CQ_WARP;
    int64_t n = a.head_dim, r = task / a.heads, head = task % a.heads, lane = threadIdx.x % CQ_WARP;
    if (r >= a.rows) /* the whole warp */
        return;
    const T *x = (const T *)a.x + r * a.ldx + head * n;
    const T *dy = (const T *)a.dy + r * a.lddy + head * n;
    const float *w = (const float *)a.w;
    T *dx = (T *)a.dx + r * a.lddx + head * n;
    float by = 1.0f, m = 0.0f;
    int64_t half = a.positions ? n / 2 : 0, pairs = half ? half : n;
    if (w) {
        float sum = 0.0f;
        by = rstd[task];
        for (int64_t i = lane; i < n; i += CQ_WARP)
            sum += w[i] * any_dn(a, dy, r, i) * (cq_value(x[i]) * by);
        m = cq_warp_sum(sum) / (float)n;
        __syncwarp(); /* dx may be dy: what all lanes have read may change now */
    }
    for (int64_t i = lane; i < pairs; i += CQ_WARP) { /* both of a pair are read first */
        float low = any_dn(a, dy, r, i), high = half ? any_dn(a, dy, r, i + half) : 0.0f;
        cq_put(dx + i, w ? by * (w[i] * low - cq_value(x[i]) * by * m) : low);
        if (half)
            cq_put(dx + i + half,
                   w ? by * (w[i + half] * high - cq_value(x[i + half]) * by * m) : high);
    }
}

// ---- launches -----------------------------------------------------------------------------------

static int check_dim(int64_t n, const int32_t *positions) {
    if (positions && n % 2)
        return cq_fail(CQ_ESHAPE, "headnorm: head_dim is %lld, wanted an even number",
                       (long long)n);
    return CQ_OK;
}
/// Lanes for one head: 4 of the low half each; 0 where the head does not fit.
static int head_lanes(int64_t n, int64_t heads) {
    if (n % 8 || n > MOST_DIM || heads > 1 << 20)
        return 0;
    return n <= 32 ? 4 : n <= 64 ? 8 : n <= 128 ? 16 : 32;
}
static head_shape shape_of(int64_t rows, int64_t heads, int64_t n, const int32_t *positions,
                           double theta, double eps) {
    head_shape h = {};
    h.rows = rows;
    h.heads = (int)heads;
    h.dim = (int)n;
    h.batch = heads >= 8 ? 4 : (int)(32 / heads);
    h.batch = h.batch > MOST_ROWS ? MOST_ROWS : h.batch;
    h.positions = positions;
    h.eps = (float)eps;
    for (int64_t i = 0; positions && i < n / 2; i++)
        h.frequency[i] = pow(theta, -2.0 * (double)i / (double)n);
    return h;
}
/// A block for each batch, up to 16 per multiprocessor: hardware evens out the rest.
static unsigned head_blocks(const head_shape &h) {
    int64_t most = SMS * 16, blocks = (h.rows + h.batch - 1) / h.batch;
    return (unsigned)(blocks < most ? blocks : most);
}
static unsigned table_bytes(const head_shape &h) {
    return h.positions ? (unsigned)((size_t)h.batch * (size_t)h.dim * sizeof(float)) : 16;
}

template <typename T> static int forward_of(cq_stream *s, const cq_headnorm_forward_args *a) {
    int lanes = head_lanes(a->head_dim, a->heads);
    if (!lanes || a->ldx % 4 || a->ldy % 4 || !cq_aligned4<T>(a->x) || !cq_aligned16(a->w) ||
        !cq_aligned4<T>(a->y)) {
        CQ_LAUNCH(headnorm_forward_any<T>, cq_blocks(a->rows * a->heads, THREADS / CQ_WARP),
                  THREADS, 0, s, *a);
        CQ_CUDA_END("headnorm_forward");
    }
    head_shape h = shape_of(a->rows, a->heads, a->head_dim, a->positions, a->theta, a->eps);
    const T *x = (const T *)a->x;
    const float *w = (const float *)a->w;
    T *y = (T *)a->y;
    unsigned blocks = head_blocks(h), bytes = table_bytes(h);
#define FORWARD(LANES)                                                                             \
    CQ_LAUNCH((headnorm_forward_heads<T, LANES>), blocks, THREADS, bytes, s, h, x, a->ldx, w, y,   \
              a->ldy)
    if (lanes == 4)
        FORWARD(4);
    else if (lanes == 8)
        FORWARD(8);
    else if (lanes == 16)
        FORWARD(16);
    else
        FORWARD(32);
#undef FORWARD
    CQ_CUDA_END("headnorm_forward");
}

extern "C" int cq_cuda_headnorm_forward(cq_stream *s, const cq_headnorm_forward_args *a) {
    CQ_CUDA_ACT("headnorm_forward", a);
    CQ_TRY(check_dim(a->head_dim, a->positions));
    if (a->rows * a->heads * a->head_dim == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? forward_of<__nv_bfloat16>(s, a) : forward_of<float>(s, a);
}

template <typename T> static int backward_any(cq_stream *s, const cq_headnorm_backward_args *a) {
    int64_t tasks = a->rows * a->heads, n = a->head_dim;
    int64_t share = (a->rows + MOST_PARTS - 1) / MOST_PARTS;
    int64_t parts = (a->rows + share - 1) / share, kept = (tasks + 63) / 64 * 64;
    unsigned blocks = cq_blocks(tasks, THREADS / CQ_WARP);
    float *rstd = NULL;
    if (a->w) {
        rstd =
            (float *)cq_cuda_scratch(s, (kept + (a->dw ? parts * n : 0)) * (int64_t)sizeof(float));
        if (!rstd)
            return CQ_ENOMEM;
        CQ_LAUNCH(headnorm_scales_any<T>, blocks, THREADS, 0, s, *a, rstd);
    }
    if (a->w && a->dw) { /* before dx is written over dy */
        float *part = rstd + kept;
        CQ_LAUNCH(headnorm_weight_any<T>, dim3(cq_blocks(n, 128), (unsigned)parts), 128, 0, s, *a,
                  rstd, share, part);
        cq_add_parts_to(s, n, parts, part, (float *)a->dw);
    }
    CQ_LAUNCH(headnorm_backward_any<T>, blocks, THREADS, 0, s, *a, rstd);
    CQ_CUDA_END("headnorm_backward");
}

template <typename T> static int backward_of(cq_stream *s, const cq_headnorm_backward_args *a) {
    int lanes = head_lanes(a->head_dim, a->heads);
    if (!lanes || a->ldx % 4 || a->lddy % 4 || a->lddx % 4 || !cq_aligned4<T>(a->x) ||
        !cq_aligned16(a->w) || !cq_aligned4<T>(a->dy) || !cq_aligned4<T>(a->dx))
        return backward_any<T>(s, a);
    head_shape h = shape_of(a->rows, a->heads, a->head_dim, a->positions, a->theta, a->eps);
    const T *x = (const T *)a->x, *dy = (const T *)a->dy;
    const float *w = (const float *)a->w;
    T *dx = (T *)a->dx;
    float *part = NULL;
    unsigned blocks = head_blocks(h), bytes = table_bytes(h);
    if (w && a->dw) {
        part = (float *)cq_cuda_scratch(s, blocks * a->head_dim * (int64_t)sizeof(float));
        if (!part)
            return CQ_ENOMEM;
    }
#define BACKWARD(LANES)                                                                            \
    CQ_LAUNCH((headnorm_backward_heads<T, LANES>), blocks, THREADS, bytes, s, h, x, a->ldx, w, dy, \
              a->lddy, dx, a->lddx, part)
    if (lanes == 4)
        BACKWARD(4);
    else if (lanes == 8)
        BACKWARD(8);
    else if (lanes == 16)
        BACKWARD(16);
    else
        BACKWARD(32);
#undef BACKWARD
    if (part)
        cq_add_parts_to(s, a->head_dim, (int64_t)blocks, part, (float *)a->dw);
    CQ_CUDA_END("headnorm_backward");
}

extern "C" int cq_cuda_headnorm_backward(cq_stream *s, const cq_headnorm_backward_args *a) {
    CQ_CUDA_ACT("headnorm_backward", a);
    CQ_TRY(check_dim(a->head_dim, a->positions));
    if (a->rows * a->heads * a->head_dim == 0)
        return CQ_OK;
    return a->act == CQ_BF16 ? backward_of<__nv_bfloat16>(s, a) : backward_of<float>(s, a);
}
