/// rows.cu - moving rows: gathering with fake quantization, the experts' combination and its
/// gradients, embeddings.
///
/// Nemotron 3 Nano, 8192 tokens, top 6 of 128, 2688 wide: gathering reads 88 MB once (from L2
/// again) and writes 528 MB: 0.14 ms at 4.3 TB/s; combining reads 528 MB, its gradient reads and
/// writes 1.1 GB. All are bound by memory.
///
/// An id outside the table gives a row of NaN, and its gradient goes nowhere: the device cannot
/// report an error, but the loss shows it.
#include "kernels/cuda/fake.cuh"

namespace {

constexpr int THREADS = 256, TILE = 256, MOST_SLICES = 16, SLICE_TILES = 4;
constexpr int ROW_THREADS = 128, AHEAD = 8, STEPS = 4;

/// Source of cq_fake_flat: rows by index, which is below `limit`.
template <typename T> struct gathered {
    const T *x;
    const int32_t *index;
    int64_t limit;
    cq_divider quarters; ///< of a row
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        int64_t row = cq_divide(quarter, quarters), col = quarter - row * quarters.by;
        int64_t from = index[row];
        if (from < 0 || from >= limit)
            return make_float4(nanf(""), nanf(""), nanf(""), nanf(""));
        return cq_load4(x + (from * quarters.by + col) * 4, aligned);
    }
};
/// Rows that are no multiple of 4 long; they cannot be quantized.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    gather_plain(const T *x, const int32_t *index, int64_t limit, T *y, T *yq, int64_t n,
                 cq_divider dim) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    int64_t row = cq_divide(i, dim), from = index[row];
    float v = from >= 0 && from < limit ? cq_value(x[from * dim.by + i - row * dim.by]) : nanf("");
    if (y)
        cq_put(y + i, v);
    if (yq)
        cq_put(yq + i, v);
}

/// V neighbouring elements of a row: 1, or 4 where all is aligned.
template <int V> struct piece;
template <> struct piece<1> {
    float v;
    template <typename T> __device__ __forceinline__ void load(const T *p) { v = cq_value(*p); }
    template <typename T> __device__ __forceinline__ void store(T *p) const { cq_put(p, v); }
    __device__ __forceinline__ void zero() { v = 0.0f; }
    __device__ __forceinline__ void add(const piece &o, float w) { v += w * o.v; }
    __device__ __forceinline__ void scale(float w) { v *= w; }
    __device__ __forceinline__ float dot(const piece &o) const { return v * o.v; }
};
template <> struct piece<4> {
    float4 v;
    template <typename T> __device__ __forceinline__ void load(const T *p) {
        v = cq_load4(p, true);
    }
    template <typename T> __device__ __forceinline__ void store(T *p) const {
        cq_store4(p, v, true);
    }
    __device__ __forceinline__ void zero() { v = cq_zero4(); }
    __device__ __forceinline__ void add(const piece &o, float w) {
        v.x += w * o.v.x;
        v.y += w * o.v.y;
        v.z += w * o.v.z;
        v.w += w * o.v.w;
    }
    __device__ __forceinline__ void scale(float w) { v = cq_scale4(v, w); }
    __device__ __forceinline__ float dot(const piece &o) const { return cq_dot4(v, o.v); }
};

/// out[t] += sum over j of weight[t, j] y[position[t, j]], j ascending; weight NULL: 1. `dim` and
/// `n` count pieces; AHEAD rows are on their way at once.
template <int V, typename T>
__global__ void __launch_bounds__(THREADS)
    combine(float *out, const T *y, const float *weight, const int32_t *position, int64_t n,
            int64_t top_k, cq_divider dim) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    int64_t t = cq_divide(i, dim), c = i - t * dim.by;
    piece<V> sum;
    sum.load(out + i * V);
    for (int64_t j = 0; j < top_k; j += AHEAD) {
        piece<V> p[AHEAD];
        float w[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (j + k < top_k) {
                int64_t pair = t * top_k + j + k;
                p[k].load(y + ((int64_t)position[pair] * dim.by + c) * V);
                w[k] = weight ? weight[pair] : 1.0f;
            }
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (j + k < top_k)
                sum.add(p[k], w[k]);
    }
    sum.store(out + i * V);
}

/// One block for each (token, slot); `dim` counts pieces.
template <int V, typename T>
__global__ void __launch_bounds__(THREADS)
    combine_back(const T *y, const float *weight, const float *dout, const int32_t *position, T *dy,
                 float *dweight, int64_t top_k, int64_t dim) {
    CQ_SHARED(float, room, [CQ_WARP]);
    int64_t pair = blockIdx.x, row = (int64_t)position[pair] * dim, t = pair / top_k * dim;
    float w = weight[pair], dot = 0.0f;
    for (int64_t base = threadIdx.x; base < dim; base += STEPS * THREADS) {
        piece<V> d[STEPS], p[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t c = base + k * THREADS;
            d[k].zero();
            p[k].zero();
            if (c < dim) {
                d[k].load(dout + (t + c) * V);
                p[k].load(y + (row + c) * V);
            }
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int64_t c = base + k * THREADS;
            dot += d[k].dot(p[k]);
            d[k].scale(w);
            if (c < dim)
                d[k].store(dy + (row + c) * V);
        }
    }
    dot = cq_block_sum(dot, room);
    if (threadIdx.x == 0)
        dweight[pair] = dot;
}

/// `dim` and `n` count pieces.
template <int V>
__global__ void __launch_bounds__(THREADS)
    scatter(const float *y, const int32_t *index, float *x, int64_t n, cq_divider dim) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    int64_t row = cq_divide(i, dim);
    float *to = x + ((int64_t)index[row] * dim.by + i - row * dim.by) * V;
    piece<V> sum, add;
    sum.load(to);
    add.load(y + i * V);
    sum.add(add, 1.0f);
    sum.store(to);
}

/// What tokens are sorted by: the id, or `vocab` for one outside the table.
__device__ __forceinline__ int32_t key_of(int32_t id, int32_t vocab) {
    return id >= 0 && id < vocab ? id : vocab;
}
/// part[slice][t]: tokens of the slice that come before t in the order of (key, token). 8192 tokens
/// are 67 million comparisons, some 10 us on the whole device.
__global__ void __launch_bounds__(TILE)
    rank_parts(const int32_t *ids, int64_t tokens, int32_t vocab, int64_t slice, int32_t *part) {
    CQ_SHARED(int32_t, tile, [TILE]);
    int64_t first = (int64_t)blockIdx.x * TILE, t = first + threadIdx.x;
    int64_t from = (int64_t)blockIdx.y * slice, to = from + slice < tokens ? from + slice : tokens;
    int32_t own = t < tokens ? key_of(ids[t], vocab) : 0, before = 0;
    for (int64_t base = from; base < to; base += TILE) {
        int64_t at = base + threadIdx.x;
        __syncthreads();
        tile[threadIdx.x] = at < to ? key_of(ids[at], vocab) : INT32_MAX;
        __syncthreads();
        if (base == first)
            for (int k = 0; k < TILE; k++)
                before += tile[k] < own || (tile[k] == own && k < (int)threadIdx.x);
        else {
            int32_t bound = base < first ? own + 1 : own; /* equal keys: the earlier token first */
            for (int k = 0; k < TILE; k++)
                before += tile[k] < bound;
        }
    }
    if (t < tokens)
        part[blockIdx.y * tokens + t] = before;
}
/// Keys and tokens in that order.
__global__ void __launch_bounds__(TILE)
    place_tokens(const int32_t *ids, int64_t tokens, int32_t vocab, int slices, const int32_t *part,
                 int32_t *key, int32_t *token) {
    int64_t t = (int64_t)blockIdx.x * TILE + threadIdx.x;
    if (t >= tokens)
        return;
    int32_t row = 0;
    for (int i = 0; i < slices; i++)
        row += part[i * tokens + t];
    key[row] = key_of(ids[t], vocab);
    token[row] = (int32_t)t;
}
/// dtable[key] += the gradients of a run of equal keys; one row of blocks for each sorted token,
/// where a run begins. `dim` counts pieces; AHEAD gradients are on their way at once.
template <int V>
__global__ void __launch_bounds__(ROW_THREADS)
    embed_back(const int32_t *key, const int32_t *token, int64_t tokens, int32_t vocab,
               const float *dh, float *dtable, int64_t dim) {
    int64_t r = blockIdx.x, c = (int64_t)blockIdx.y * ROW_THREADS + threadIdx.x;
    int32_t own = key[r];
    if (own >= vocab || (r > 0 && key[r - 1] == own) || c >= dim)
        return;
    float *to = dtable + ((int64_t)own * dim + c) * V;
    piece<V> sum;
    sum.load(to);
    for (bool more = true; more; r += AHEAD) {
        piece<V> p[AHEAD];
        bool there[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            there[k] = r + k < tokens && key[r + k] == own;
            if (there[k])
                p[k].load(dh + ((int64_t)token[r + k] * dim + c) * V);
            else
                p[k].zero();
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (there[k])
                sum.add(p[k], 1.0f);
        more = there[AHEAD - 1];
    }
    sum.store(to);
}

template <typename T>
int gather(cq_stream *s, const void *x, const int32_t *index, int64_t limit, int64_t rows,
           int64_t dim, void *y, void *yq, const cq_fq &fq) {
    if (yq)
        CQ_TRY(cq_fake_columns(fq, dim));
    if (rows < 1 || dim < 1)
        return CQ_OK;
    if (dim % 4 == 0) {
        gathered<T> source = {(const T *)x, index, limit, cq_divider_make(dim / 4),
                              cq_aligned4<T>(x)};
        cq_fake_launch<false>(s, source, cq_fake_job_make<T>(rows, dim, y, yq, fq));
        return CQ_OK;
    }
    CQ_LAUNCH(gather_plain<T>, cq_blocks(rows * dim, THREADS), THREADS, 0, s, (const T *)x, index,
              limit, (T *)y, (T *)yq, rows * dim, cq_divider_make(dim));
    return CQ_OK;
}

template <int V, typename T>
void add_pieces(cq_stream *s, float *out, const T *y, const float *weight, const int32_t *position,
                int64_t tokens, int64_t top_k, int64_t dim) {
    int64_t n = tokens * (dim / V);
    if (n > 0)
        CQ_LAUNCH((combine<V, T>), cq_blocks(n, THREADS), THREADS, 0, s, out, y, weight, position,
                  n, top_k, cq_divider_make(dim / V));
}

/// Whether rows of dim can be moved four elements at a time: of F32 at a, of T at b.
template <typename T = float> bool by_four(int64_t dim, const void *a, const void *b) {
    return dim % 4 == 0 && cq_aligned16(a) && cq_aligned4<T>(b);
}

template <typename T>
void add_pairs(cq_stream *s, void *out, const void *y, const void *weight, const int32_t *position,
               int64_t tokens, int64_t top_k, int64_t dim) {
    (by_four<T>(dim, out, y) ? add_pieces<4, T> : add_pieces<1, T>)(s, (float *)out, (const T *)y,
                                                                    (const float *)weight, position,
                                                                    tokens, top_k, dim);
}

template <typename T> void split_pairs(cq_stream *s, const cq_combine_backward_args *a) {
    int64_t pairs = a->tokens * a->top_k;
    const T *y = (const T *)a->y;
    const float *weight = (const float *)a->weight, *dout = (const float *)a->dout;
    T *dy = (T *)a->dy;
    float *dweight = (float *)a->dweight;
    if (by_four<T>(a->dim, a->dout, a->y) && cq_aligned4<T>(a->dy))
        CQ_LAUNCH((combine_back<4, T>), (unsigned)pairs, THREADS, 0, s, y, weight, dout,
                  a->position, dy, dweight, a->top_k, a->dim / 4);
    else
        CQ_LAUNCH((combine_back<1, T>), (unsigned)pairs, THREADS, 0, s, y, weight, dout,
                  a->position, dy, dweight, a->top_k, a->dim);
}

} // namespace

extern "C" int cq_cuda_gather_rows(cq_stream *s, const cq_gather_rows_args *a) {
    CQ_CUDA_ACT("gather_rows", a);
    CQ_TRY((a->act == CQ_BF16 ? gather<__nv_bfloat16> : gather<float>)(s, a->x, a->index, INT64_MAX,
                                                                       a->rows, a->dim, a->y, a->yq,
                                                                       a->fq));
    CQ_CUDA_END("gather_rows");
}

extern "C" int cq_cuda_combine_forward(cq_stream *s, const cq_combine_forward_args *a) {
    CQ_CUDA_ACT("combine_forward", a);
    (a->act == CQ_BF16 ? add_pairs<__nv_bfloat16> : add_pairs<float>)(s, a->out, a->y, a->weight,
                                                                      a->position, a->tokens,
                                                                      a->top_k, a->dim);
    CQ_CUDA_END("combine_forward");
}

extern "C" int cq_cuda_combine_backward(cq_stream *s, const cq_combine_backward_args *a) {
    CQ_CUDA_ACT("combine_backward", a);
    if (a->tokens * a->top_k < 1)
        return CQ_OK;
    (a->act == CQ_BF16 ? split_pairs<__nv_bfloat16> : split_pairs<float>)(s, a);
    CQ_CUDA_END("combine_backward");
}

extern "C" int cq_cuda_ungather_rows(cq_stream *s, const cq_ungather_rows_args *a) {
    CQ_CUDA_ACT("ungather_rows", a);
    (a->act == CQ_BF16 ? add_pairs<__nv_bfloat16> : add_pairs<float>)(s, a->dx, a->dy, NULL,
                                                                      a->position, a->tokens,
                                                                      a->top_k, a->dim);
    CQ_CUDA_END("ungather_rows");
}

extern "C" int cq_cuda_scatter_rows(cq_stream *s, const cq_scatter_rows_args *a) {
    CQ_CUDA_F32("scatter_rows", a);
    int64_t n = a->rows * a->dim;
    if (n < 1)
        return CQ_OK;
    const float *y = (const float *)a->y;
    if (by_four(a->dim, a->x, a->y))
        CQ_LAUNCH((scatter<4>), cq_blocks(n / 4, THREADS), THREADS, 0, s, y, a->index,
                  (float *)a->x, n / 4, cq_divider_make(a->dim / 4));
    else
        CQ_LAUNCH((scatter<1>), cq_blocks(n, THREADS), THREADS, 0, s, y, a->index, (float *)a->x, n,
                  cq_divider_make(a->dim));
    CQ_CUDA_END("scatter_rows");
}

extern "C" int cq_cuda_embed_forward(cq_stream *s, const cq_embed_forward_args *a) {
    CQ_CUDA_F32("embed_forward", a);
    cq_fq none = {};
    CQ_TRY(gather<float>(s, a->table, a->ids, a->vocab, a->tokens, a->dim, a->h, NULL, none));
    CQ_CUDA_END("embed_forward");
}

extern "C" int cq_cuda_embed_backward(cq_stream *s, const cq_embed_backward_args *a) {
    CQ_CUDA_F32("embed_backward", a);
    if (a->vocab < 1 || a->vocab > INT32_MAX - 1)
        return cq_fail(CQ_ESHAPE, "embedding: a vocabulary of %lld", (long long)a->vocab);
    int64_t tokens = a->tokens, tiles = cq_blocks(tokens, TILE);
    if (tokens < 1 || a->dim < 1)
        return CQ_OK;
    int64_t slice = cq_blocks(tiles, MOST_SLICES);
    slice = (slice > SLICE_TILES ? slice : SLICE_TILES) * TILE;
    int slices = (int)cq_blocks(tokens, slice);
    int32_t vocab = (int32_t)a->vocab;
    int32_t *key = (int32_t *)cq_cuda_scratch(s, (2 + slices) * tokens * (int64_t)sizeof(int32_t));
    if (!key)
        return CQ_ENOMEM;
    int32_t *token = key + tokens, *part = token + tokens;
    CQ_LAUNCH(rank_parts, dim3((unsigned)tiles, (unsigned)slices), TILE, 0, s, a->ids, tokens,
              vocab, slice, part);
    CQ_LAUNCH(place_tokens, (unsigned)tiles, TILE, 0, s, a->ids, tokens, vocab, slices, part, key,
              token);
    const float *dh = (const float *)a->dh;
    float *dtable = (float *)a->dtable;
    if (by_four(a->dim, a->dh, a->dtable))
        CQ_LAUNCH((embed_back<4>), dim3((unsigned)tokens, cq_blocks(a->dim / 4, ROW_THREADS)),
                  ROW_THREADS, 0, s, key, token, tokens, vocab, dh, dtable, a->dim / 4);
    else
        CQ_LAUNCH((embed_back<1>), dim3((unsigned)tokens, cq_blocks(a->dim, ROW_THREADS)),
                  ROW_THREADS, 0, s, key, token, tokens, vocab, dh, dtable, a->dim);
    CQ_CUDA_END("embed_backward");
}
