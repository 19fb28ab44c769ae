/// cka.cu - losses on hidden states: Gram matrices, CKA and Gram-Frobenius between two of them.
/// Formulas are kernels/ref/geometry.inc.h's.
///
/// Products are matmul's: in FP32, or with each operand as two BF16 parts on tensor cores where the
/// stream computes in BF16. (Rounded to BF16 once, two Grams that differ by a thousandth could not
/// be told apart.) The sums here are double. A sum over a whole matrix is
/// made of parts, one for each block, and the parts are added in an order that only their number
/// decides, by whoever needs the total. n is small, so one call does several layers, the second
/// index of a grid, and kernels are few: gram 4 with the product (2 when biased), cka 2,
/// cka_backward 3; parts add one to gram and two to cka_backward. A layer's bits are those it has
/// alone: the number of parts and the algorithm of a product (cq_cuda_matmul_batch) do not depend
/// on how many there are.
///
/// Qwen3-4B, n 512 of 2560: x is 5.2 MB, a Gram 1 MB. gram: 1.3 GFLOP, 22 us at 60 TF/s in FP32; in
/// parts 4.0 GFLOP, 5 us at 790 TF/s, and 26 MB; centring moves 16 MB, U-centring 3 MB. cka reads 4
/// MB, cka_backward 3 MB and 1.3 GFLOP. Alone, a layer is in the second-level cache and bound by
/// its launches, 2 to 3 us each. Eight of them: gram 360 MB, 85 us at 4.3 TB/s, beside 41 us of
/// products in parts (whose 16 tiles of 128 x 128 a layer fill the 132 processors); cka 34 MB, 8
/// us; cka_backward 50 MB and its products.
#include "kernels/cuda/cq_mma.h"
#include "kernels/cuda/wide.cuh"

namespace {

enum {
    THREADS = 256,
    COLUMN_LANES = 8, ///< threads side by side in a row of columns that is centred
    ROW_LANES = 64,   ///< threads one below the other
    MOST_PARTS = 128
};

/// to = x - column means. A block takes COLUMN_LANES * W columns; `groups` packs are a row. Here
/// and below the second index of the grid is the layer.
template <int W>
__global__ void __launch_bounds__(COLUMN_LANES *ROW_LANES)
    centre(const float *__restrict__ x, float *__restrict__ to, int64_t n, int64_t groups) {
    CQ_SHARED(double, sums, [ROW_LANES][COLUMN_LANES * W + 1]);
    int lane = (int)(threadIdx.x % COLUMN_LANES), row = (int)(threadIdx.x / COLUMN_LANES);
    int64_t group = (int64_t)blockIdx.x * COLUMN_LANES + lane;
    bool there = group < groups;
    double mean[W] = {};
    x += blockIdx.y * n * groups * W;
    to += blockIdx.y * n * groups * W;
    if (there)
        for (int64_t i = row; i < n; i += ROW_LANES) {
            pack<W> p = load<W>(x, i * groups + group);
#pragma unroll
            for (int e = 0; e < W; e++)
                mean[e] += (double)p.v[e];
        }
#pragma unroll
    for (int e = 0; e < W; e++)
        sums[row][lane * W + e] = mean[e];
    for (int half = ROW_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (row < half)
#pragma unroll
            for (int e = 0; e < W; e++)
                sums[row][lane * W + e] += sums[row + half][lane * W + e];
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < W; e++)
        mean[e] = sums[0][lane * W + e] / (double)n;
    if (there)
        for (int64_t i = row; i < n; i += ROW_LANES) {
            pack<W> p = load<W>(x, i * groups + group);
#pragma unroll
            for (int e = 0; e < W; e++)
                p.v[e] = (float)((double)p.v[e] - mean[e]);
            store<W>(to, i * groups + group, p);
        }
}

/// sum[i] = row i of g without the diagonal; a warp for each row.
__global__ void __launch_bounds__(THREADS)
    row_sums(const float *__restrict__ g, double *__restrict__ sum, int64_t n) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t i = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + (int64_t)(threadIdx.x / CQ_WARP);
    double total = 0.0;
    g += blockIdx.y * n * n;
    if (i < n)
        for (int64_t j = lane; j < n; j += CQ_WARP)
            total += j == i ? 0.0 : (double)g[i * n + j];
    total = cq_warp_sum(total);
    if (i < n && lane == 0)
        sum[blockIdx.y * n + i] = total;
}
/// g_ij - (r_i + r_j) / (n-2) + t / ((n-1)(n-2)), diagonal 0, in place. A warp for each row.
__global__ void __launch_bounds__(THREADS)
    u_centre(float *__restrict__ g, const double *__restrict__ r, int64_t n) {
    CQ_SHARED(double, room, [32]);
    double total = 0.0, by = 1.0 / (double)(n - 2);
    g += blockIdx.y * n * n;
    r += blockIdx.y * n;
    for (int64_t j = (int64_t)threadIdx.x; j < n; j += THREADS)
        total += r[j];
    total = cq_block_sum(total, room);
    int64_t i = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + (int64_t)(threadIdx.x / CQ_WARP);
    if (i >= n)
        return;
    double shift = total / (double)(n - 1) * by - r[i] * by;
    for (int64_t j = (int64_t)(threadIdx.x % CQ_WARP); j < n; j += CQ_WARP)
        g[i * n + j] = j == i ? 0.0f : (float)((double)g[i * n + j] + (shift - r[j] * by));
}

/// What lies in scratch between the two kernels of cka, for each layer.
struct cka_parts {
    double product[MOST_PARTS][3]; ///< <K, L>, <K, K>, <L, L>
    double loss[MOST_PARTS];
    unsigned done; ///< blocks of the second kernel that left their part
};

/// The sum of `count` <= MOST_PARTS values `stride` apart to every lane of a warp.
__device__ __forceinline__ double sum_of_parts(const double *part, int stride, int count) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    double sum = 0.0;
    for (int p = lane; p < count; p += CQ_WARP)
        sum += __ldcg(part + p * stride);
    return cq_warp_sum(sum);
}

/// Each block's part of the three inner products of k and l, `groups` packs.
template <int W>
__global__ void __launch_bounds__(THREADS)
    inner_products(const float *__restrict__ k, const float *__restrict__ l, int64_t groups,
                   cka_parts *to) {
    CQ_SHARED(double, room, [32]);
    double kl = 0.0, kk = 0.0, ll = 0.0;
    k += blockIdx.y * groups * W;
    l += blockIdx.y * groups * W;
    to += blockIdx.y;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < groups;
         i += (int64_t)gridDim.x * THREADS) {
        pack<W> a = load<W>(k, i), b = load<W>(l, i);
#pragma unroll
        for (int e = 0; e < W; e++) {
            double x = (double)a.v[e], y = (double)b.v[e];
            kl += x * y;
            kk += x * x;
            ll += y * y;
        }
    }
    kl = cq_block_sum(kl, room);
    kk = cq_block_sum(kk, room);
    ll = cq_block_sum(ll, room);
    if (threadIdx.x != 0)
        return;
    to->product[blockIdx.x][0] = kl;
    to->product[blockIdx.x][1] = kk;
    to->product[blockIdx.x][2] = ll;
    if (blockIdx.x == 0)
        to->done = 0;
}

/// |of_k K - of_l L|^2: each block's part, and from the last block to be done the loss. The grid is
/// that of inner_products.
template <int W>
__global__ void __launch_bounds__(THREADS)
    gram_distance(const float *__restrict__ k, const float *__restrict__ l, int64_t groups,
                  bool is_cka, cka_parts *parts, double *out) {
    CQ_SHARED(double, room, [32]);
    CQ_SHARED(double, share, [3]);
    CQ_SHARED(int, is_last, [1]);
    int warp = (int)(threadIdx.x / CQ_WARP), count = (int)gridDim.x;
    k += blockIdx.y * groups * W;
    l += blockIdx.y * groups * W;
    parts += blockIdx.y;
    out += 4 * blockIdx.y;
    if (warp < 3) {
        double total = sum_of_parts(&parts->product[0][warp], 3, count);
        if (threadIdx.x % CQ_WARP == 0)
            share[warp] = total;
    }
    __syncthreads();
    double kl = share[0], kk = share[1], ll = share[2], of_k = 1.0, of_l = 1.0, sum = 0.0;
    bool known = is_cka ? is_norm(kk) && is_norm(ll) : is_norm(ll) && isfinite(kk);
    if (is_cka) {
        of_k = known ? 1.0 / sqrt(kk) : 0.0;
        of_l = known ? 1.0 / sqrt(ll) : 0.0;
    }
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; known && i < groups;
         i += (int64_t)gridDim.x * THREADS) {
        pack<W> a = load<W>(k, i), b = load<W>(l, i);
#pragma unroll
        for (int e = 0; e < W; e++) {
            double d = __dsub_rn(__dmul_rn((double)a.v[e], of_k), __dmul_rn((double)b.v[e], of_l));
            sum += d * d;
        }
    }
    sum = cq_block_sum(sum, room);
    if (threadIdx.x == 0) {
        parts->loss[blockIdx.x] = sum;
        __threadfence();
        *is_last = atomicAdd(&parts->done, 1u) == (unsigned)count - 1;
    }
    __syncthreads();
    if (!*is_last || warp != 0)
        return;
    __threadfence();
    double loss = sum_of_parts(parts->loss, 1, count);
    if (threadIdx.x != 0)
        return;
    out[0] = kl;
    out[1] = kk;
    out[2] = ll;
    out[3] = known ? loss / (is_cka ? 2.0 : ll) : 0.0;
}

/// dx = (of_k K + of_l L) x; both are 0 where the loss is defined as 0.
struct pulls {
    double of_k, of_l;
};
__device__ __forceinline__ pulls pulls_of(const double *stats, double weight, bool is_cka) {
    double kk = stats[1], ll = stats[2];
    pulls p = {0.0, 0.0};
    if (is_cka && is_norm(kk) && is_norm(ll)) {
        double b = sqrt(kk), c = sqrt(ll), factor = -2.0 * weight / b;
        p.of_k = -factor * (stats[0] / (b * c)) / b;
        p.of_l = factor / c;
    }
    if (!is_cka && is_norm(ll) && isfinite(kk)) {
        p.of_k = 4.0 * weight / ll;
        p.of_l = -p.of_k;
    }
    return p;
}

template <int W>
__global__ void __launch_bounds__(THREADS)
    pull_matrix(float *__restrict__ k, const float *__restrict__ l, int64_t groups,
                const double *__restrict__ stats, double weight, const double *__restrict__ weights,
                bool is_cka) {
    CQ_SHARED(pulls, both, [1]);
    if (threadIdx.x == 0)
        *both = pulls_of(stats + 4 * blockIdx.y, weights ? weights[blockIdx.y] : weight, is_cka);
    k += blockIdx.y * groups * W;
    l += blockIdx.y * groups * W;
    __syncthreads();
    pulls f = *both;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < groups;
         i += (int64_t)gridDim.x * THREADS) {
        pack<W> a = load<W>(k, i), b = load<W>(l, i);
#pragma unroll
        for (int e = 0; e < W; e++)
            a.v[e] = (float)(f.of_k * (double)a.v[e] + f.of_l * (double)b.v[e]);
        store<W>(k, i, a);
    }
}

/// Zeroes dx where the loss is defined as 0: the product would be 0 times what may be a NaN.
__global__ void __launch_bounds__(THREADS)
    clear_if_unknown(float *dx, int64_t count, const double *__restrict__ stats, double weight,
                     const double *__restrict__ weights, bool is_cka) {
    CQ_SHARED(int, unknown, [1]);
    if (threadIdx.x == 0)
        *unknown =
            pulls_of(stats + 4 * blockIdx.y, weights ? weights[blockIdx.y] : weight, is_cka).of_l ==
            0.0;
    __syncthreads();
    if (!*unknown)
        return;
    dx += blockIdx.y * count;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * THREADS)
        dx[i] = 0.0f;
}

/// Blocks for a sum over `groups` packs.
unsigned parts_for(int64_t groups) {
    unsigned blocks = cq_blocks(groups, 2 * THREADS);
    return blocks < MOST_PARTS ? blocks : static_cast<unsigned>(MOST_PARTS);
}

/// Copies of matrices in BF16: bit i of `low` says whether copy i is what the others leave over, so
/// that a value is high + low but for 2^-17 of itself. Rows are `row` apart, copies `copy`, layers
/// of `of_layer` rows `layer`; x is dense, a thread takes four values.
struct parts_of {
    const float *x;
    __nv_bfloat16 *to;
    int64_t rows, cols, row, copy, of_layer, layer;
    int copies;
    unsigned low;
};
__global__ void __launch_bounds__(THREADS) split(parts_of p) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, wide = p.cols / 4;
    if (i >= p.rows * wide)
        return;
    pack<4> x = load<4>(p.x, i);
    float rest[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        rest[e] = x.v[e] - __bfloat162float(__float2bfloat16_rn(x.v[e]));
    uint2 high = {cq_bf16_pair(x.v[0], x.v[1]), cq_bf16_pair(x.v[2], x.v[3])};
    uint2 low = {cq_bf16_pair(rest[0], rest[1]), cq_bf16_pair(rest[2], rest[3])};
    int64_t row = i / wide;
    __nv_bfloat16 *to = p.to + row / p.of_layer * p.layer + row % p.of_layer * p.row + i % wide * 4;
    for (int c = 0; c < p.copies; c++)
        *reinterpret_cast<uint2 *>(to + c * p.copy) = p.low >> c & 1 ? low : high;
}
void launch_split(cq_stream *s, const parts_of &p) {
    CQ_LAUNCH(split, cq_blocks(p.rows * p.cols, 4 * THREADS), THREADS, 0, s, p);
}

__nv_bfloat16 *room_for(cq_stream *s, int64_t values) {
    return static_cast<__nv_bfloat16 *>(
        cq_cuda_scratch(s, values * static_cast<int64_t>(sizeof(__nv_bfloat16))));
}

/// A product in parts wants rows and copies on 16 bytes.
bool in_parts(const cq_stream *s, int64_t n, int64_t dim, const void *x) {
    return s->compute == CQ_COMPUTE_BF16 && n % 8 == 0 && dim % 8 == 0 && aligned(x);
}

/// gram = x x'. A row of the parts is [high, low, high, high]: from its first value on it is the
/// left operand of high low' + low high' + high high', from its second part on the right one.
int gram_in_parts(cq_stream *s, cq_matmul_args m, cq_cuda_batch batch) {
    int64_t n = m.m, dim = m.k, rows = batch.count * n;
    __nv_bfloat16 *room = room_for(s, 4 * rows * dim);
    if (!room)
        return CQ_ENOMEM;
    launch_split(s,
                 {static_cast<const float *>(m.a), room, rows, dim, 4 * dim, dim, rows, 0, 4, 2u});
    m.k = 3 * dim;
    m.a = room;
    m.b = room + dim;
    m.lda = m.ldb = 4 * dim;
    batch.a = batch.b = 4 * n * dim;
    return cq_cuda_matmul_batch(s, &m, &batch, true);
}

/// dx = pull x = high low + low high + high high, with the parts of x one below the other.
int pull_in_parts(cq_stream *s, cq_matmul_args m, cq_cuda_batch batch) {
    int64_t n = m.m, dim = m.n, rows = batch.count * n;
    __nv_bfloat16 *room = room_for(s, 3 * rows * (n + dim)), *of_x = room + 3 * rows * n;
    if (!room)
        return CQ_ENOMEM;
    launch_split(s, {static_cast<const float *>(m.a), room, rows, n, 3 * n, n, rows, 0, 3, 2u});
    launch_split(
        s, {static_cast<const float *>(m.b), of_x, rows, dim, dim, n * dim, n, 3 * n * dim, 3, 1u});
    m.k = 3 * n;
    m.a = room;
    m.lda = 3 * n;
    m.b = of_x;
    batch.a = 3 * n * n;
    batch.b = 3 * n * dim;
    return cq_cuda_matmul_batch(s, &m, &batch, true);
}

int64_t layers(int64_t batch) { return batch > 1 ? batch : 1; }

} // namespace

extern "C" int cq_cuda_gram(cq_stream *s, const cq_gram_args *a) {
    CQ_CUDA_F32("gram", a);
    int64_t n = a->n, dim = a->dim, least = a->unbiased ? 4 : 2;
    if (n < least)
        return cq_fail(CQ_ESHAPE, "gram: %lld rows, wanted at least %lld", (long long)n,
                       (long long)least);
    const auto *x = static_cast<const float *>(a->x);
    auto *rows = static_cast<float *>(a->scratch), *gram = static_cast<float *>(a->gram);
    bool wide = dim % 4 == 0 && aligned(x) && aligned(rows);
    int64_t groups = wide ? dim / 4 : dim, batch = layers(a->batch);
    dim3 columns(cq_blocks(groups, COLUMN_LANES), (unsigned)batch);
    unsigned threads = COLUMN_LANES * ROW_LANES;
    if (wide)
        CQ_LAUNCH(centre<4>, columns, threads, 0, s, x, rows, n, groups);
    else
        CQ_LAUNCH(centre<1>, columns, threads, 0, s, x, rows, n, groups);
    cq_matmul_args m = {};
    m.dtype = CQ_F32;
    m.tb = true;
    m.m = m.n = n;
    m.k = dim;
    m.a = m.b = rows;
    m.lda = m.ldb = dim;
    m.c = gram;
    m.ldc = n;
    m.alpha = 1.0;
    cq_cuda_batch apart = {batch, n * dim, n * dim, n * n};
    CQ_TRY(in_parts(s, n, dim, rows) ? gram_in_parts(s, m, apart)
                                     : cq_cuda_matmul_batch(s, &m, &apart, false));
    if (a->unbiased) {
        auto *sums = static_cast<double *>(
            cq_cuda_scratch(s, batch * n * static_cast<int64_t>(sizeof(double))));
        if (!sums)
            return CQ_ENOMEM;
        dim3 grid(cq_blocks(n, THREADS / CQ_WARP), (unsigned)batch);
        CQ_LAUNCH(row_sums, grid, THREADS, 0, s, gram, sums, n);
        CQ_LAUNCH(u_centre, grid, THREADS, 0, s, gram, sums, n);
    }
    CQ_CUDA_END("gram");
}

extern "C" int cq_cuda_cka(cq_stream *s, const cq_cka_args *a) {
    CQ_CUDA_F32("cka", a);
    const auto *k = static_cast<const float *>(a->k), *l = static_cast<const float *>(a->l);
    bool wide = a->n % 2 == 0 && aligned(k) && aligned(l), is_cka = a->loss == CQ_GRAM_CKA;
    int64_t count = a->n * a->n, groups = wide ? count / 4 : count, batch = layers(a->batch);
    dim3 grid(parts_for(groups), (unsigned)batch);
    auto *parts = static_cast<cka_parts *>(
        cq_cuda_scratch(s, batch * static_cast<int64_t>(sizeof(cka_parts))));
    if (!parts)
        return CQ_ENOMEM;
    if (wide) {
        CQ_LAUNCH(inner_products<4>, grid, THREADS, 0, s, k, l, groups, parts);
        CQ_LAUNCH(gram_distance<4>, grid, THREADS, 0, s, k, l, groups, is_cka, parts, a->out);
    } else {
        CQ_LAUNCH(inner_products<1>, grid, THREADS, 0, s, k, l, groups, parts);
        CQ_LAUNCH(gram_distance<1>, grid, THREADS, 0, s, k, l, groups, is_cka, parts, a->out);
    }
    CQ_CUDA_END("cka");
}

extern "C" int cq_cuda_cka_backward(cq_stream *s, const cq_cka_backward_args *a) {
    CQ_CUDA_F32("cka_backward", a);
    int64_t n = a->n, dim = a->dim, count = n * n;
    if (n < 1 || dim < 1)
        return CQ_OK;
    auto *k = static_cast<float *>(a->k), *dx = static_cast<float *>(a->dx);
    const auto *l = static_cast<const float *>(a->l);
    bool wide = n % 2 == 0 && aligned(k) && aligned(l), is_cka = a->loss == CQ_GRAM_CKA;
    int64_t groups = wide ? count / 4 : count, batch = layers(a->batch);
    unsigned blocks = cq_blocks(groups, THREADS);
    dim3 grid(blocks < 1024 ? blocks : 1024, (unsigned)batch);
    if (wide)
        CQ_LAUNCH(pull_matrix<4>, grid, THREADS, 0, s, k, l, groups, a->stats, a->weight,
                  a->weights, is_cka);
    else
        CQ_LAUNCH(pull_matrix<1>, grid, THREADS, 0, s, k, l, groups, a->stats, a->weight,
                  a->weights, is_cka);
    cq_matmul_args m = {};
    m.dtype = CQ_F32;
    m.m = m.k = n;
    m.n = dim;
    m.a = k;
    m.lda = n;
    m.b = a->x;
    m.ldb = dim;
    m.c = dx;
    m.ldc = dim;
    m.alpha = 1.0;
    cq_cuda_batch apart = {batch, n * n, n * dim, n * dim};
    CQ_TRY(in_parts(s, n, dim, a->x) && aligned(k) ? pull_in_parts(s, m, apart)
                                                   : cq_cuda_matmul_batch(s, &m, &apart, false));
    blocks = cq_blocks(n * dim, 4 * THREADS);
    CQ_LAUNCH(clear_if_unknown, dim3(blocks < 132 ? blocks : 132, (unsigned)batch), THREADS, 0, s,
              dx, n * dim, a->stats, a->weight, a->weights, is_cka);
    CQ_CUDA_END("cka_backward");
}
