/// rows.cu - moving rows: gathering with fake quantization, the experts' combination and its
/// gradients, embeddings.
///
/// Nemotron 3 Nano, 8192 tokens, top 6 of 128, 2688 wide: gathering reads 88 MB once (from L2
/// again) and writes 528 MB: 0.14 ms at 4.3 TB/s; combining reads 528 MB, its gradient reads and
/// writes 1.1 GB. All are bound by memory.
#include "kernels/cuda/fake.cuh"

namespace {

enum { THREADS = 256, TILE = 256 };

/// Source of cq_fake_flat: rows by index.
struct gathered {
    const float *x;
    const int32_t *index;
    cq_divider quarters; ///< of a row
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        int64_t row = cq_divide(quarter, quarters), col = quarter - row * quarters.by;
        return cq_load4(x + ((int64_t)index[row] * quarters.by + col) * 4, aligned);
    }
};
/// Rows that are no multiple of 4 long; they cannot be quantized.
__global__ void __launch_bounds__(THREADS)
    gather_plain(const float *x, const int32_t *index, float *y, float *yq, int64_t n,
                 int64_t dim) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    float v = x[(int64_t)index[i / dim] * dim + i % dim];
    if (y)
        y[i] = v;
    if (yq)
        yq[i] = v;
}

/// Elements of rows, V at a time: thread i has columns V i % dim of row V i / dim.
template <int V> struct piece { float v[V]; };
template <int V> __device__ __forceinline__ piece<V> load(const float *p) {
    piece<V> r;
    if (V == 4) {
        float4 q = *(const float4 *)p;
        r.v[0] = q.x, r.v[V > 1 ? 1 : 0] = q.y, r.v[V > 2 ? 2 : 0] = q.z, r.v[V > 3 ? 3 : 0] = q.w;
        if (V == 1)
            r.v[0] = q.x;
    } else
        r.v[0] = p[0];
    return r;
}
template <int V> __device__ __forceinline__ void store(float *p, const piece<V> &r) {
    if (V == 4)
        *(float4 *)p =
            make_float4(r.v[0], r.v[V > 1 ? 1 : 0], r.v[V > 2 ? 2 : 0], r.v[V > 3 ? 3 : 0]);
    else
        p[0] = r.v[0];
}

/// out[t] += sum over j of weight[t, j] y[position[t, j]], j ascending; weight NULL: 1.
template <int V>
__global__ void __launch_bounds__(THREADS)
    combine(float *out, const float *y, const float *weight, const int32_t *position,
            int64_t tokens, int64_t top_k, int64_t dim) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= tokens * dim)
        return;
    int64_t t = i / dim, c = i - t * dim;
    piece<V> sum = load<V>(out + i);
    for (int64_t j = 0; j < top_k; j++) {
        piece<V> p = load<V>(y + (int64_t)position[t * top_k + j] * dim + c);
        float w = weight ? weight[t * top_k + j] : 1.0f;
#pragma unroll
        for (int k = 0; k < V; k++)
            sum.v[k] += w * p.v[k];
    }
    store<V>(out + i, sum);
}

/// One block for each (token, slot).
__global__ void __launch_bounds__(THREADS)
    combine_back(const float *y, const float *weight, const float *dout, const int32_t *position,
                 float *dy, float *dweight, int64_t top_k, int64_t dim) {
    CQ_SHARED(float, room, [CQ_WARP]);
    int64_t pair = blockIdx.x, row = (int64_t)position[pair] * dim, t = pair / top_k * dim;
    float w = weight[pair], dot = 0.0f;
    for (int64_t c = threadIdx.x; c < dim; c += THREADS) {
        float d = dout[t + c];
        dot += d * y[row + c];
        dy[row + c] = w * d;
    }
    dot = cq_block_sum(dot, room);
    if (threadIdx.x == 0)
        dweight[pair] = dot;
}

__global__ void __launch_bounds__(THREADS)
    scatter(const float *y, const int32_t *index, float *x, int64_t n, int64_t dim) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    x[(int64_t)index[i / dim] * dim + i % dim] += y[i];
}

/// next[t]: the next token with the same id, or -1; first[t]: no token before has it. So the tokens
/// of an id are a list in rising order, whatever the order of the threads.
__global__ void __launch_bounds__(TILE)
    link_equal(const int32_t *ids, int64_t tokens, int32_t *next, int32_t *first) {
    CQ_SHARED(int32_t, tile, [TILE]);
    int64_t t = (int64_t)blockIdx.x * TILE + threadIdx.x;
    int32_t own = t < tokens ? ids[t] : -1, after = -1, leads = 1;
    for (int64_t base = 0; base < tokens; base += TILE) {
        int64_t at = base + threadIdx.x;
        __syncthreads();
        tile[threadIdx.x] = at < tokens ? ids[at] : -2;
        __syncthreads();
        for (int k = 0; k < TILE; k++) {
            bool same = tile[k] == own;
            leads = same && base + k < t ? 0 : leads;
            after = same && base + k > t && after < 0 ? (int32_t)(base + k) : after;
        }
    }
    if (t < tokens) {
        next[t] = after;
        first[t] = leads;
    }
}
/// dtable[ids[t]] += the gradients of the list that begins at t; one block for each token.
__global__ void __launch_bounds__(THREADS)
    embed_back(const int32_t *ids, const float *dh, const int32_t *next, const int32_t *first,
               float *dtable, int64_t dim) {
    int64_t t = blockIdx.x;
    if (!first[t]) /* the whole block */
        return;
    float *row = dtable + (int64_t)ids[t] * dim;
    for (int64_t c = threadIdx.x; c < dim; c += THREADS) {
        float sum = row[c];
        for (int64_t k = t; k >= 0; k = next[k])
            sum += dh[k * dim + c];
        row[c] = sum;
    }
}

int gather(cq_stream *s, const void *x, const int32_t *index, int64_t rows, int64_t dim, void *y,
           void *yq, const cq_fq &fq) {
    if (yq)
        CQ_TRY(cq_fake_columns(fq, dim));
    if (rows < 1)
        return CQ_OK;
    if (dim % 4 == 0) {
        gathered source = {(const float *)x, index, cq_divider_make(dim / 4), cq_aligned16(x)};
        cq_fake_launch<false>(s, source, cq_fake_job_make(rows, dim, y, yq, fq));
        return CQ_OK;
    }
    CQ_LAUNCH(gather_plain, cq_blocks(rows * dim, THREADS), THREADS, 0, s, (const float *)x, index,
              (float *)y, (float *)yq, rows * dim, dim);
    return CQ_OK;
}

void add_pairs(cq_stream *s, float *out, const float *y, const float *weight,
               const int32_t *position, int64_t tokens, int64_t top_k, int64_t dim) {
    if (tokens < 1)
        return;
    if (dim % 4 == 0 && cq_aligned16(out) && cq_aligned16(y))
        CQ_LAUNCH(combine<4>, cq_blocks(tokens * dim, THREADS * 4), THREADS, 0, s, out, y, weight,
                  position, tokens, top_k, dim);
    else
        CQ_LAUNCH(combine<1>, cq_blocks(tokens * dim, THREADS), THREADS, 0, s, out, y, weight,
                  position, tokens, top_k, dim);
}

} // namespace

extern "C" int cq_cuda_gather_rows(cq_stream *s, const cq_gather_rows_args *a) {
    CQ_CUDA_F32("gather_rows", a);
    CQ_TRY(gather(s, a->x, a->index, a->rows, a->dim, a->y, a->yq, a->fq));
    CQ_CUDA_END("gather_rows");
}

extern "C" int cq_cuda_combine_forward(cq_stream *s, const cq_combine_forward_args *a) {
    CQ_CUDA_F32("combine_forward", a);
    add_pairs(s, (float *)a->out, (const float *)a->y, (const float *)a->weight, a->position,
              a->tokens, a->top_k, a->dim);
    CQ_CUDA_END("combine_forward");
}

extern "C" int cq_cuda_combine_backward(cq_stream *s, const cq_combine_backward_args *a) {
    CQ_CUDA_F32("combine_backward", a);
    if (a->tokens * a->top_k > 0)
        CQ_LAUNCH(combine_back, (unsigned)(a->tokens * a->top_k), THREADS, 0, s,
                  (const float *)a->y, (const float *)a->weight, (const float *)a->dout,
                  a->position, (float *)a->dy, (float *)a->dweight, a->top_k, a->dim);
    CQ_CUDA_END("combine_backward");
}

extern "C" int cq_cuda_ungather_rows(cq_stream *s, const cq_ungather_rows_args *a) {
    CQ_CUDA_F32("ungather_rows", a);
    add_pairs(s, (float *)a->dx, (const float *)a->dy, NULL, a->position, a->tokens, a->top_k,
              a->dim);
    CQ_CUDA_END("ungather_rows");
}

extern "C" int cq_cuda_scatter_rows(cq_stream *s, const cq_scatter_rows_args *a) {
    CQ_CUDA_F32("scatter_rows", a);
    if (a->rows * a->dim > 0)
        CQ_LAUNCH(scatter, cq_blocks(a->rows * a->dim, THREADS), THREADS, 0, s, (const float *)a->y,
                  a->index, (float *)a->x, a->rows * a->dim, a->dim);
    CQ_CUDA_END("scatter_rows");
}

extern "C" int cq_cuda_embed_forward(cq_stream *s, const cq_embed_forward_args *a) {
    CQ_CUDA_F32("embed_forward", a);
    cq_fq none = {};
    CQ_TRY(gather(s, a->table, a->ids, a->tokens, a->dim, a->h, NULL, none));
    CQ_CUDA_END("embed_forward");
}

extern "C" int cq_cuda_embed_backward(cq_stream *s, const cq_embed_backward_args *a) {
    CQ_CUDA_F32("embed_backward", a);
    if (a->tokens < 1)
        return CQ_OK;
    int32_t *next = (int32_t *)cq_cuda_scratch(s, 2 * a->tokens * (int64_t)sizeof(int32_t));
    if (!next)
        return CQ_ENOMEM;
    int32_t *first = next + a->tokens;
    CQ_LAUNCH(link_equal, cq_blocks(a->tokens, TILE), TILE, 0, s, a->ids, a->tokens, next, first);
    CQ_LAUNCH(embed_back, (unsigned)a->tokens, THREADS, 0, s, a->ids, (const float *)a->dh, next,
              first, (float *)a->dtable, a->dim);
    CQ_CUDA_END("embed_backward");
}
