/// rowloss.cu - the row-wise rivals of CKA on hidden states: cosine and relative MSE. Formulas are
/// kernels/ref/geometry.inc.h's; sums are double and made of parts, one for each row.
///
/// Qwen3-4B, n 512 of 2560: x is 5.2 MB; rowloss reads 10 MB in 2 launches, rowloss_backward moves
/// 16 MB in 1 (cosine) or 2. All lies in the second-level cache.
#include "kernels/cuda/wide.cuh"

namespace {

enum { THREADS = 256 };

/// <x, y>, <x, x> and <y, y> of a row to every thread of its block; `groups` packs are a row.
struct products {
    double xy, xx, yy;
};
template <int W>
__device__ __forceinline__ products row_products(const float *x, const float *y, int64_t groups,
                                                 double *room) {
    products p = {0.0, 0.0, 0.0};
    for (int64_t i = (int64_t)threadIdx.x; i < groups; i += THREADS) {
        pack<W> a = load<W>(x, i), b = load<W>(y, i);
#pragma unroll
        for (int e = 0; e < W; e++) {
            double u = (double)a.v[e], v = (double)b.v[e];
            p.xy += u * v;
            p.xx += u * u;
            p.yy += v * v;
        }
    }
    p.xy = cq_block_sum(p.xy, room);
    p.xx = cq_block_sum(p.xx, room);
    p.yy = cq_block_sum(p.yy, room);
    return p;
}

/// part[2 i], part[2 i + 1]: of row i |x/|x| - y/|y||^2 / 2 and nothing (cosine), or |x - y|^2 and
/// |y|^2 (mse). A block for each row.
template <int W>
__global__ void __launch_bounds__(THREADS)
    row_distances(const float *__restrict__ x, const float *__restrict__ y, int64_t groups,
                  bool cosine, double *part) {
    CQ_SHARED(double, room, [32]);
    int64_t row = (int64_t)blockIdx.x;
    double of_x = 1.0, of_y = 1.0, sum = 0.0, squares = 0.0;
    bool known = true;
    x += row * groups * W;
    y += row * groups * W;
    if (cosine) {
        products p = row_products<W>(x, y, groups, room);
        known = is_norm(p.xx) && is_norm(p.yy);
        of_x = known ? 1.0 / sqrt(p.xx) : 0.0;
        of_y = known ? 1.0 / sqrt(p.yy) : 0.0;
    }
    for (int64_t i = (int64_t)threadIdx.x; known && i < groups; i += THREADS) {
        pack<W> a = load<W>(x, i), b = load<W>(y, i);
#pragma unroll
        for (int e = 0; e < W; e++) {
            double u = (double)a.v[e], v = (double)b.v[e];
            double d = __dsub_rn(__dmul_rn(u, of_x), __dmul_rn(v, of_y));
            sum += d * d;
            squares += v * v;
        }
    }
    sum = cq_block_sum(sum, room);
    squares = cq_block_sum(squares, room);
    if (threadIdx.x != 0)
        return;
    part[2 * row] = cosine ? sum / 2.0 : sum;
    part[2 * row + 1] = squares;
}

/// The mean of the rows, or the ratio of two sums over them.
__global__ void __launch_bounds__(THREADS)
    sum_distances(const double *__restrict__ part, int64_t n, bool cosine, double *out) {
    CQ_SHARED(double, room, [32]);
    double sum = 0.0, squares = 0.0;
    for (int64_t i = (int64_t)threadIdx.x; i < n; i += THREADS) {
        sum += part[2 * i];
        squares += part[2 * i + 1];
    }
    sum = cq_block_sum(sum, room);
    squares = cq_block_sum(squares, room);
    if (threadIdx.x != 0)
        return;
    if (cosine)
        *out = n > 0 ? sum / (double)n : 0.0;
    else
        *out = is_norm(squares) ? sum / squares : 0.0;
}

/// part[i] = |y_i|^2
template <int W>
__global__ void __launch_bounds__(THREADS)
    row_squares(const float *__restrict__ y, int64_t groups, double *part) {
    CQ_SHARED(double, room, [32]);
    double sum = 0.0;
    y += (int64_t)blockIdx.x * groups * W;
    for (int64_t i = (int64_t)threadIdx.x; i < groups; i += THREADS) {
        pack<W> p = load<W>(y, i);
#pragma unroll
        for (int e = 0; e < W; e++)
            sum += (double)p.v[e] * (double)p.v[e];
    }
    sum = cq_block_sum(sum, room);
    if (threadIdx.x == 0)
        part[blockIdx.x] = sum;
}

/// One row of dx = of_x x - of_y y; `part` holds |y_i|^2 of all rows (mse) or is NULL (cosine).
template <int W>
__global__ void __launch_bounds__(THREADS)
    row_gradients(const float *__restrict__ x, const float *__restrict__ y, float *__restrict__ dx,
                  int64_t n, int64_t groups, double weight, const double *__restrict__ weights,
                  const double *__restrict__ part) {
    CQ_SHARED(double, room, [32]);
    int64_t at = (int64_t)blockIdx.x * groups * W;
    double of_x = 0.0, of_y = 0.0;
    weight = weights ? *weights : weight;
    if (part) {
        double squares = 0.0;
        for (int64_t i = (int64_t)threadIdx.x; i < n; i += THREADS)
            squares += part[i];
        squares = cq_block_sum(squares, room);
        of_x = of_y = is_norm(squares) ? 2.0 * weight / squares : 0.0;
    } else {
        products p = row_products<W>(x + at, y + at, groups, room);
        if (is_norm(p.xx) && is_norm(p.yy)) {
            double unit = weight / ((double)n * sqrt(p.xx)), yn = sqrt(p.yy);
            of_x = unit * p.xy / p.xx / yn;
            of_y = unit / yn;
        }
    }
    for (int64_t i = (int64_t)threadIdx.x; i < groups; i += THREADS) {
        pack<W> a = load<W>(x + at, i), b = load<W>(y + at, i);
#pragma unroll
        for (int e = 0; e < W; e++) {
            double u = (double)a.v[e], v = (double)b.v[e];
            /* mse: the difference first, which near agreement is exact */
            double d = part ? of_x * (u - v) : of_x * u - of_y * v;
            a.v[e] = of_y == 0.0 ? 0.0f : (float)d;
        }
        store<W>(dx + at, i, a);
    }
}

int check_rows(const char *op, int64_t n) {
    if (n > INT32_MAX)
        return cq_fail(CQ_ESHAPE, "cuda: %s: %lld rows", op, (long long)n);
    return CQ_OK;
}

} // namespace

extern "C" int cq_cuda_rowloss(cq_stream *s, const cq_rowloss_args *a) {
    CQ_CUDA_F32("rowloss", a);
    CQ_TRY(check_rows("rowloss", a->n));
    const auto *x = static_cast<const float *>(a->x), *y = static_cast<const float *>(a->y);
    bool wide = a->dim % 4 == 0 && aligned(x) && aligned(y), cosine = a->form == CQ_ROWLOSS_COSINE;
    int64_t groups = wide ? a->dim / 4 : a->dim;
    auto *part = static_cast<double *>(
        cq_cuda_scratch(s, (2 * a->n + 1) * static_cast<int64_t>(sizeof(double))));
    if (!part)
        return CQ_ENOMEM;
    unsigned grid = static_cast<unsigned>(a->n);
    if (grid > 0 && wide)
        CQ_LAUNCH(row_distances<4>, grid, THREADS, 0, s, x, y, groups, cosine, part);
    else if (grid > 0)
        CQ_LAUNCH(row_distances<1>, grid, THREADS, 0, s, x, y, groups, cosine, part);
    CQ_LAUNCH(sum_distances, 1, THREADS, 0, s, part, a->n, cosine, a->out);
    CQ_CUDA_END("rowloss");
}

extern "C" int cq_cuda_rowloss_backward(cq_stream *s, const cq_rowloss_backward_args *a) {
    CQ_CUDA_F32("rowloss_backward", a);
    CQ_TRY(check_rows("rowloss_backward", a->n));
    if (a->n < 1)
        return CQ_OK;
    const auto *x = static_cast<const float *>(a->x), *y = static_cast<const float *>(a->y);
    auto *dx = static_cast<float *>(a->dx);
    bool wide = a->dim % 4 == 0 && aligned(x) && aligned(y) && aligned(dx);
    int64_t groups = wide ? a->dim / 4 : a->dim;
    unsigned grid = static_cast<unsigned>(a->n);
    double *part = nullptr;
    if (a->form == CQ_ROWLOSS_MSE) {
        part =
            static_cast<double *>(cq_cuda_scratch(s, a->n * static_cast<int64_t>(sizeof(double))));
        if (!part)
            return CQ_ENOMEM;
        if (wide)
            CQ_LAUNCH(row_squares<4>, grid, THREADS, 0, s, y, groups, part);
        else
            CQ_LAUNCH(row_squares<1>, grid, THREADS, 0, s, y, groups, part);
    }
    if (wide)
        CQ_LAUNCH(row_gradients<4>, grid, THREADS, 0, s, x, y, dx, a->n, groups, a->weight,
                  a->weights, part);
    else
        CQ_LAUNCH(row_gradients<1>, grid, THREADS, 0, s, x, y, dx, a->n, groups, a->weight,
                  a->weights, part);
    CQ_CUDA_END("rowloss_backward");
}
