/// attention_bf16_backward.cu - the backward with its products on tensor cores, as
/// attention_bf16.cu.
///
/// Four warps of 16 rows each; in the backward for k and v rows are keys: S' = K Q', dP' = V dO',
/// dV += P' dO, dK += dS' Q. The backward for q computes P and dS again.
///
/// Qwen3-4B, 8192 tokens in documents of 4096: with the second computation 0.96 TFLOP. Rounding
/// moves 0.6 GB; of BF16 only <dout, out> is left, 0.13 GB.
#include "kernels/cuda/attention_tiles.cuh"

namespace {

/// dout in BF16, dense, and in scratch lse / log 2 and <dout, out> as [heads,
/// padded], zero from the last token on.
struct slopes {
    const half_t *dout;
    float *lse2, *delta;
    int64_t padded;
};

/// A warp: dout of one token and head, rounded into `to` where it is not BF16; delta from the
/// rounded values, as dP is.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS)
    round_slopes(const T *dout, const T *out, const float *lse, half_t *to, slopes b,
                 int64_t tokens, int64_t heads, bool aligned) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t row = (int64_t)blockIdx.x * (THREADS / CQ_WARP) + threadIdx.x / CQ_WARP;
    int64_t t = row / heads, at = (row - t * heads) * b.padded + t;
    if (t >= b.padded)
        return;
    float sum = 0.0f;
    if (t < tokens && lane * 4 < D) {
        int64_t i = row * D + lane * 4;
        uint2 r = round4(cq_load4(dout + i, aligned));
        float4 g = make_float4(__uint_as_float(r.x << 16), __uint_as_float(r.x & 0xffff0000u),
                               __uint_as_float(r.y << 16), __uint_as_float(r.y & 0xffff0000u));
        if (sizeof(T) == sizeof(float))
            *reinterpret_cast<uint2 *>(to + i) = r;
        sum = cq_dot4(g, cq_load4(out + i, aligned));
    }
    sum = cq_warp_sum(sum);
    if (lane == 0) {
        b.delta[at] = sum;
        b.lse2[at] = t < tokens ? lse[row] * LOG2_E : 0.0f;
    }
}

/// dk and dv of `parts` parts of the heads of a group, added in order. A block: one token.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_parts(const float *pk, const float *pv, int parts, int64_t part, int64_t width, T *dk,
              T *dv, int64_t lddk, int64_t lddv) {
    const float *from = (blockIdx.y ? pv : pk) + (int64_t)blockIdx.x * width;
    T *to = blockIdx.y ? dv + (int64_t)blockIdx.x * lddv : dk + (int64_t)blockIdx.x * lddk;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float sum = from[c];
        for (int p = 1; p < parts; p++)
            sum += from[p * part + c];
        cq_put(to + c, sum);
    }
}

/// Where dk or dv goes: the gradients themselves, or the partial sums of blockIdx.z.
template <typename T> struct sink {
    T *k, *v;
    int64_t ldk, ldv, part;
    bool pairs;
};

/// A block: 64 keys of one kv head and the queries of `each` heads of its group; a warp: 16 keys.
/// q, k and v are BF16 in rows on 16 bytes, here and below.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kv(cq_heads a, slopes b, sink<T> to, int64_t each) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t k0 = (int64_t)blockIdx.x * SIDE, kh = blockIdx.y;
    int64_t ldo = a.heads * D, h0 = kh * (a.heads / a.kv_heads) + blockIdx.z * each;
    int m = rows_from(k0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *k = room, *v = k + TILE, *qs = v + TILE;        /* two of q, then two of dout */
    float *rows = reinterpret_cast<float *>(qs + 4 * TILE); /* two of lse / log 2, delta */
    int64_t end = end_of(a, k0 + m - 1), q0 = k0, h = h0;
    fetch<D, SIDE>(k, (const half_t *)a.k + k0 * a.ldk + kh * D, a.ldk, m);
    fetch<D, SIDE>(v, (const half_t *)a.v + k0 * a.ldv + kh * D, a.ldv, m);
    auto fetch_queries = [&](int64_t head, int64_t at, int half) {
        int n = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(qs + half * TILE, (const half_t *)a.q + at * a.ldq + head * D, a.ldq, n);
        fetch<D, SIDE>(qs + (2 + half) * TILE, b.dout + at * ldo + head * D, ldo, n);
        if (threadIdx.x < SIDE / 2) {
            const float *line = (threadIdx.x < SIDE / 4 ? b.lse2 : b.delta) + head * b.padded + at;
            cq_cp_async16(rows + half * 2 * SIDE + threadIdx.x * 4,
                          line + threadIdx.x % (SIDE / 4) * 4);
        }
        cq_cp_commit();
    };
    int64_t ends[2]; /* of the documents of this lane's rows */
#pragma unroll
    for (int r = 0; r < 2; r++)
        ends[r] = end_of(a, k0 + row + g + 8 * r);
    int64_t first = __shfl_sync(0xffffffffu, ends[0], 0);
    int64_t last = __shfl_sync(0xffffffffu, ends[1], 31);
    float sum_k[1][D / 8][4], sum_v[1][D / 8][4], scale = a.scale * LOG2_E;
    clear(sum_k);
    clear(sum_v);
    fetch_queries(h, q0, 0);
    for (int half = 0; h < h0 + each; half ^= 1) {
        int64_t now = q0;
        cq_cp_wait<0>();
        __syncthreads();
        q0 += SIDE;
        if (q0 >= end)
            q0 = k0, h++;
        if (h < h0 + each)
            fetch_queries(h, q0, half ^ 1);
        if (now >= last)
            continue;
        const half_t *q = qs + half * TILE, *o = qs + (2 + half) * TILE;
        const float *lse2 = rows + half * 2 * SIDE + t2, *delta = lse2 + SIDE;
        float p[1][8][4], ds[1][8][4];
        scores<D>(p, k, q, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[0][t][i] = cq_exp2(p[0][t][i] * scale - lse2[8 * t + (i & 1)]);
        if (now < k0 + row + 15 || now + SIDE > first)
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sight in = {(int)(k0 - now) + row + g + 8 * (i >> 1),
                                rows_from(now, ends[i >> 1], SIDE)};
                    if (!sees(in, 8 * t + t2 + (i & 1)))
                        p[0][t][i] = 0.0f;
                }
        scores<D>(ds, v, o, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[0][t][i] = p[0][t][i] * (ds[0][t][i] - delta[8 * t + (i & 1)]);
        times_tile<D>(sum_v, p, o);
        times_tile<D>(sum_k, ds, q);
    }
    float by_k[2] = {a.scale, a.scale}, by_v[2] = {1.0f, 1.0f};
    int64_t part = blockIdx.z * to.part;
    store<D>(to.k + part + k0 * to.ldk + kh * D, to.ldk, sum_k[0], row, m, by_k, to.pairs);
    store<D>(to.v + part + k0 * to.ldv + kh * D, to.ldv, sum_v[0], row, m, by_v, to.pairs);
}

/// A block: 64 queries of one head; a warp: 16.
template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_q(cq_heads a, slopes b, T *dq, int64_t lddq, bool pairs) {
    CQ_DYN_SMEM(half_t, room);
    constexpr int TILE = SIDE * (D + 8);
    int64_t q0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y;
    int64_t kh = h / (a.heads / a.kv_heads), ldo = a.heads * D;
    int n = rows_from(q0, a.tokens, SIDE), row = (int)(threadIdx.x / CQ_WARP) * 16;
    int lane = (int)(threadIdx.x % CQ_WARP), g = lane >> 2, t2 = 2 * (lane & 3);
    half_t *q = room, *o = q + TILE, *ks = o + TILE; /* two of k, then two of v */
    int64_t k0 = begin_of(a, q0), end = q0 + n;
    fetch<D, SIDE>(q, (const half_t *)a.q + q0 * a.ldq + h * D, a.ldq, n);
    fetch<D, SIDE>(o, b.dout + q0 * ldo + h * D, ldo, n);
    auto fetch_keys = [&](int64_t at, int half) {
        int rows = rows_from(at, a.tokens, SIDE);
        fetch<D, SIDE>(ks + half * TILE, (const half_t *)a.k + at * a.ldk + kh * D, a.ldk, rows);
        fetch<D, SIDE>(ks + (2 + half) * TILE, (const half_t *)a.v + at * a.ldv + kh * D, a.ldv,
                       rows);
        cq_cp_commit();
    };
    int begins[2]; /* of the documents of this lane's rows, from q0 */
    float lse2[2], delta[2], sum[1][D / 8][4], scale = a.scale * LOG2_E;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int64_t at = h * b.padded + q0 + row + g + 8 * r;
        begins[r] = (int)(begin_of(a, q0 + row + g + 8 * r) - q0);
        lse2[r] = b.lse2[at];
        delta[r] = b.delta[at];
    }
    int first = __shfl_sync(0xffffffffu, begins[0], 0);
    int last = __shfl_sync(0xffffffffu, begins[1], 31);
    clear(sum);
    fetch_keys(k0, 0);
    for (int half = 0; k0 < end; k0 += SIDE, half ^= 1) {
        int at = (int)(k0 - q0); /* of the first key, from q0 */
        cq_cp_wait<0>();
        __syncthreads();
        if (k0 + SIDE < end)
            fetch_keys(k0 + SIDE, half ^ 1);
        if (at >= row + 16 || at + SIDE <= first)
            continue;
        const half_t *k = ks + half * TILE, *v = ks + (2 + half) * TILE;
        float p[1][8][4], ds[1][8][4];
        scores<D>(p, q, k, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[0][t][i] = cq_exp2(p[0][t][i] * scale - lse2[i >> 1]);
        if (at + SIDE - 1 > row || at < last)
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sight in = {begins[i >> 1] - at, row + g + 8 * (i >> 1) - at + 1};
                    if (!sees(in, 8 * t + t2 + (i & 1)))
                        p[0][t][i] = 0.0f;
                }
        scores<D>(ds, o, v, row);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[0][t][i] = p[0][t][i] * (ds[0][t][i] - delta[i >> 1]);
        times_tile<D>(sum, ds, k);
    }
    float by[2] = {a.scale, a.scale};
    store<D>(dq + q0 * lddq + h * D, lddq, sum[0], row, n, by, pairs);
}

/// Into how many parts the heads of a group are cut, for blocks enough to fill a device evenly.
int64_t parts_of(const cq_heads &a) {
    int64_t group = a.heads / a.kv_heads, blocks = cq_blocks(a.tokens, SIDE) * a.kv_heads;
    int64_t parts = 1;
    while (parts < group && (blocks * parts < 1024 || group % parts != 0))
        parts++;
    return parts;
}

struct room_backward {
    cq_heads a;
    matrices list;
    slopes b;
    half_t *dout; ///< where it is rounded to; NULL for one that is BF16
    float *pk, *pv;
};
template <typename T>
room_backward cut(pieces *all, const cq_attention_backward_args *o, int64_t parts) {
    room_backward r = {};
    r.a = cq_heads_of(o);
    int64_t rows = r.a.tokens * r.a.heads, kv = r.a.tokens * r.a.kv_heads * r.a.dim;
    r.b.padded = (r.a.tokens + SIDE - 1) / SIDE * SIDE;
    place_queries<T>(&r.a, all, &r.list);
    const void *dout = o->dout;
    int64_t ld = r.a.heads * r.a.dim;
    if (sizeof(T) == sizeof(half_t))
        place<T>(&dout, &ld, r.a.tokens, ld, all, &r.list);
    else
        dout = r.dout = (half_t *)piece(all, rows * r.a.dim * 2);
    r.b.dout = (const half_t *)dout;
    place_keys<T>(&r.a, all, &r.list);
    r.b.lse2 = (float *)piece(all, r.b.padded * r.a.heads * 4);
    r.b.delta = (float *)piece(all, r.b.padded * r.a.heads * 4);
    r.pk = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
    r.pv = (float *)piece(all, parts > 1 ? parts * kv * 4 : 0);
    return r;
}

/// dk and dv: as parts in FP32 that are added up, or straight to where they belong.
template <int D, typename T>
int backward_keys(cq_stream *s, const room_backward &r, const cq_attention_backward_args *o,
                  int64_t parts) {
    int64_t bytes = 6 * SIDE * (D + 8) * 2 + 4 * SIDE * 4, width = r.a.kv_heads * D;
    int64_t each = r.a.heads / r.a.kv_heads / parts;
    T *dk = (T *)o->dk, *dv = (T *)o->dv;
    dim3 keys(cq_blocks(r.a.tokens, SIDE), (unsigned)r.a.kv_heads, (unsigned)parts);
    if (parts == 1) {
        sink<T> to = {dk,      dv, o->lddk,
                      o->lddv, 0,  rows_on<T>(dk, o->lddk, 2) && rows_on<T>(dv, o->lddv, 2)};
        CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D, T>, bytes, "attention_backward"));
        CQ_LAUNCH((backward_kv<D, T>), keys, THREADS, (size_t)bytes, s, r.a, r.b, to, each);
        return CQ_OK;
    }
    sink<float> some = {r.pk, r.pv, width, width, r.a.tokens * width, true};
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_kv<D, float>, bytes, "attention_backward"));
    CQ_LAUNCH((backward_kv<D, float>), keys, THREADS, (size_t)bytes, s, r.a, r.b, some, each);
    CQ_LAUNCH(add_parts<T>, dim3((unsigned)r.a.tokens, 2), THREADS, 0, s, (const float *)r.pk,
              (const float *)r.pv, (int)parts, r.a.tokens * width, width, dk, dv, o->lddk, o->lddv);
    return CQ_OK;
}

template <int D, typename T> int backward_of(cq_stream *s, const cq_attention_backward_args *o) {
    int64_t bytes = 6 * SIDE * (D + 8) * 2, parts = parts_of(cq_heads_of(o));
    pieces all = {};
    cut<T>(&all, o, parts);
    if (!(all.from = (unsigned char *)cq_cuda_scratch(s, all.bytes)))
        return CQ_ENOMEM;
    all.bytes = 0;
    room_backward r = cut<T>(&all, o, parts);
    const T *dout = (const T *)o->dout, *out = (const T *)o->out;
    round_all<T>(s, r.list, r.a.tokens);
    CQ_LAUNCH((round_slopes<D, T>), cq_blocks(r.b.padded * r.a.heads, THREADS / CQ_WARP), THREADS,
              0, s, dout, out, (const float *)o->lse, r.dout, r.b, r.a.tokens, r.a.heads,
              rows_on<T>(dout, 4, 4) && rows_on<T>(out, 4, 4));
    CQ_TRY((backward_keys<D, T>(s, r, o, parts)));
    CQ_TRY(cq_cuda_shared_bytes((const void *)backward_q<D, T>, bytes, "attention_backward"));
    dim3 queries(cq_blocks(r.a.tokens, SIDE), (unsigned)r.a.heads);
    CQ_LAUNCH((backward_q<D, T>), queries, THREADS, (size_t)bytes, s, r.a, r.b, (T *)o->dq, o->lddq,
              rows_on<T>(o->dq, o->lddq, 2));
    CQ_CUDA_END("attention_backward");
}

} // namespace

int cq_attention_bf16_backward(cq_stream *s, const cq_attention_backward_args *a) {
    if (a->act == CQ_BF16)
        return a->head_dim == 64 ? backward_of<64, half_t>(s, a) : backward_of<128, half_t>(s, a);
    return a->head_dim == 64 ? backward_of<64, float>(s, a) : backward_of<128, float>(s, a);
}
