/// route.cu - sigmoid routing, its gradient, and the sort of (token, slot) pairs by expert.
///
/// Nemotron 3 Nano, 8192 tokens, 128 experts, top 6: the logits are 4 MB, the pairs 49152: each
/// kernel takes microseconds, and the host needs to know nothing of the result.
#include "kernels/cuda/cq_cuda.h"

namespace {

enum { WARPS = 4, THREADS = WARPS * CQ_WARP, CHUNK = 256, MOST_EXPERTS = 4096 };

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

/// Whether (v, i) goes before (w, j): the larger value, the lower index of equal or unordered ones;
/// an index below 0 is none.
__device__ __forceinline__ bool goes_first(float v, int i, float w, int j) {
    if (i < 0 || j < 0)
        return i >= 0;
    return v > w || (!(w > v) && i < j);
}
/// The best of n values that are not taken, the same in every lane; it is taken.
__device__ __forceinline__ int take_best(const float *value, unsigned char *taken, int n) {
    int lane = (int)(threadIdx.x % CQ_WARP), best = -1;
    float most = 0.0f;
    for (int i = lane; i < n; i += CQ_WARP)
        if (!taken[i] && goes_first(value[i], i, most, best)) {
            best = i;
            most = value[i];
        }
    for (int d = 16; d > 0; d >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, most, d);
        int index = __shfl_xor_sync(0xffffffffu, best, d);
        if (goes_first(other, index, most, best)) {
            best = index;
            most = other;
        }
    }
    best = __shfl_sync(0xffffffffu, best, 0); /* NaNs have no order */
    __syncwarp();                             /* every lane has read taken */
    if (lane == 0 && best >= 0)
        taken[best] = 1;
    __syncwarp();
    return best;
}

/// A warp for each token; its shared memory: s, choice [experts], score [groups], flags.
__global__ void __launch_bounds__(THREADS) route(cq_route_forward_args a, int64_t floats) {
    CQ_DYN_SMEM(float, all);
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int64_t t = (int64_t)blockIdx.x * WARPS + warp;
    if (t >= a.tokens) /* the whole warp */
        return;
    int experts = (int)a.experts, groups = (int)a.n_group, size = experts / groups;
    float *s = all + warp * floats, *choice = s + experts, *score = choice + experts;
    unsigned char *taken = (unsigned char *)(score + groups), *won = taken + experts;
    const float *logits = (const float *)a.logits + t * experts;
    for (int e = lane; e < experts; e += CQ_WARP) {
        s[e] = sigmoid(logits[e]);
        choice[e] = s[e] + a.bias[e];
        taken[e] = 0;
    }
    for (int g = lane; g < groups; g += CQ_WARP)
        won[g] = 0;
    __syncwarp();
    if (groups > 1) {
        for (int g = lane; g < groups; g += CQ_WARP) {
            float best = choice[g * size], second = 0.0f;
            for (int e = g * size + 1; e < (g + 1) * size; e++) {
                float v = choice[e];
                bool opens = e == g * size + 1;
                if (v > best) {
                    second = best;
                    best = v;
                } else if (opens || v > second)
                    second = v;
            }
            score[g] = best + second;
        }
        __syncwarp();
        for (int i = 0; i < (int)a.topk_group; i++)
            take_best(score, won, groups);
        for (int e = lane; e < experts; e += CQ_WARP)
            taken[e] = !won[e / size];
        __syncwarp();
    }
    float sum = 0.0f;
    for (int j = 0; j < (int)a.top_k; j++) {
        int best = take_best(choice, taken, experts);
        best = best < 0 ? 0 : best;
        sum += s[best];
        if (lane == 0)
            a.sel[t * a.top_k + j] = best;
    }
    __syncwarp();
    float factor = a.normalize ? (float)a.scaling / (sum + 1e-20f) : (float)a.scaling;
    for (int j = lane; j < (int)a.top_k; j += CQ_WARP)
        ((float *)a.weight)[t * a.top_k + j] = factor * s[a.sel[t * a.top_k + j]];
}

/// A warp for each token; sums run over j ascending in every lane.
__global__ void __launch_bounds__(THREADS) route_back(cq_route_backward_args a) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / CQ_WARP;
    if (t >= a.tokens) /* the whole warp */
        return;
    const float *logits = (const float *)a.logits + t * a.experts;
    const float *dweight = (const float *)a.dweight + t * a.top_k;
    const int32_t *sel = a.sel + t * a.top_k;
    float *dlogits = (float *)a.dlogits + t * a.experts;
    float z = 1e-20f, dot = 0.0f;
    for (int64_t j = 0; j < a.top_k; j++) {
        float s = sigmoid(logits[sel[j]]);
        z += s;
        dot += dweight[j] * s;
    }
    float factor = a.normalize ? (float)a.scaling / z : (float)a.scaling;
    float mean = a.normalize ? dot / z : 0.0f;
    for (int64_t e = lane; e < a.experts; e += CQ_WARP)
        dlogits[e] = 0.0f;
    __syncwarp();
    for (int64_t j = lane; j < a.top_k; j += CQ_WARP) {
        float s = sigmoid(logits[sel[j]]);
        dlogits[sel[j]] = factor * (dweight[j] - mean) * s * (1.0f - s);
    }
}

/// counts[e][chunk]: pairs of expert e in each piece of CHUNK pairs.
__global__ void __launch_bounds__(CHUNK)
    count_pairs(const int32_t *sel, int64_t pairs, int experts, int64_t chunks, int32_t *counts) {
    CQ_DYN_SMEM(int32_t, room);
    int64_t i = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
    for (int e = (int)threadIdx.x; e < experts; e += CHUNK)
        room[e] = 0;
    __syncthreads();
    if (i < pairs)
        atomicAdd(&room[sel[i]], 1);
    __syncthreads();
    for (int e = (int)threadIdx.x; e < experts; e += CHUNK)
        counts[e * chunks + blockIdx.x] = room[e];
}
/// counts[e][chunk] becomes the pairs of e in earlier chunks, total[e] all of them; a warp each.
__global__ void __launch_bounds__(THREADS)
    add_counts(int32_t *counts, int experts, int64_t chunks, int32_t *total) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t e = (int64_t)blockIdx.x * WARPS + threadIdx.x / CQ_WARP;
    if (e >= experts) /* the whole warp */
        return;
    int32_t before = 0;
    for (int64_t c = 0; c < chunks; c += CQ_WARP) {
        int32_t n = c + lane < chunks ? counts[e * chunks + c + lane] : 0, sum = n;
        for (int d = 1; d < CQ_WARP; d *= 2) {
            int32_t lower = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? lower : 0;
        }
        if (c + lane < chunks)
            counts[e * chunks + c + lane] = before + sum - n;
        before += __shfl_sync(0xffffffffu, sum, CQ_WARP - 1);
    }
    if (lane == 0)
        total[e] = before;
}
/// begin[e], of experts + 1: rows of the experts before e. `room` [CQ_WARP] is shared memory, too.
__device__ __forceinline__ void begin_experts(const int32_t *total, int experts, int32_t *begin,
                                              int32_t *room) {
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int each = (experts + CHUNK - 1) / CHUNK, first = (int)threadIdx.x * each;
    int end = first + each < experts ? first + each : experts;
    int32_t mine = 0;
    for (int e = first; e < end; e++)
        mine += total[e];
    int32_t sum = mine;
    for (int d = 1; d < CQ_WARP; d *= 2) {
        int32_t lower = __shfl_up_sync(0xffffffffu, sum, d);
        sum += lane >= d ? lower : 0;
    }
    if (lane == CQ_WARP - 1)
        room[warp] = sum;
    __syncthreads();
    int32_t at = sum - mine;
    for (int w = 0; w < warp; w++)
        at += room[w];
    for (int e = first; e < end; e++) {
        begin[e] = at;
        at += total[e];
    }
    if (threadIdx.x == CHUNK - 1)
        begin[experts] = at;
    __syncthreads();
}
/// A pair's row: where its expert begins, the pairs of earlier chunks, and those before it here.
__global__ void __launch_bounds__(CHUNK)
    place_pairs(cq_route_sort_args a, int64_t chunks, const int32_t *counts, const int32_t *total) {
    CQ_DYN_SMEM(int32_t, begin);
    CQ_SHARED(int32_t, mine, [CHUNK]);
    CQ_SHARED(int32_t, room, [CQ_WARP]);
    int experts = (int)a.experts;
    int64_t pairs = a.tokens * a.top_k, i = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
    int32_t own = i < pairs ? a.sel[i] : -1, row = 0;
    mine[threadIdx.x] = own;
    begin_experts(total, experts, begin, room);
    if (blockIdx.x == 0)
        for (int e = (int)threadIdx.x; e <= experts; e += CHUNK)
            a.offsets[e] = begin[e];
    if (i >= pairs)
        return;
    for (unsigned k = 0; k < threadIdx.x; k++)
        row += mine[k] == own;
    row += begin[own] + counts[own * chunks + blockIdx.x];
    a.token[row] = (int32_t)(i / a.top_k);
    a.position[i] = row;
}

} // namespace

extern "C" int cq_cuda_route_forward(cq_stream *s, const cq_route_forward_args *a) {
    CQ_CUDA_F32("route_forward", a);
    if (a->n_group < 1 || a->experts % a->n_group || a->topk_group < 1 ||
        a->topk_group > a->n_group || a->top_k < 1 ||
        a->top_k > a->topk_group * (a->experts / a->n_group) || a->experts > MOST_EXPERTS)
        return cq_fail(CQ_ESHAPE,
                       "route: top %lld of %lld experts in %lld of %lld groups, at most %d experts",
                       (long long)a->top_k, (long long)a->experts, (long long)a->topk_group,
                       (long long)a->n_group, (int)MOST_EXPERTS);
    if (a->tokens < 1)
        return CQ_OK;
    int64_t floats = 2 * a->experts + a->n_group + (a->experts + a->n_group + 3) / 4;
    int64_t bytes = WARPS * floats * (int64_t)sizeof(float);
    CQ_TRY(cq_cuda_shared_bytes((const void *)route, bytes, "route_forward"));
    CQ_LAUNCH(route, cq_blocks(a->tokens, WARPS), THREADS, (size_t)bytes, s, *a, floats);
    CQ_CUDA_END("route_forward");
}

extern "C" int cq_cuda_route_backward(cq_stream *s, const cq_route_backward_args *a) {
    CQ_CUDA_F32("route_backward", a);
    if (a->tokens > 0)
        CQ_LAUNCH(route_back, cq_blocks(a->tokens, WARPS), THREADS, 0, s, *a);
    CQ_CUDA_END("route_backward");
}

extern "C" int cq_cuda_route_sort(cq_stream *s, const cq_route_sort_args *a) {
    int64_t pairs = a->tokens * a->top_k, chunks = cq_blocks(pairs, CHUNK);
    if (a->experts < 1 || a->experts > MOST_EXPERTS)
        return cq_fail(CQ_ESHAPE, "route sort: %lld experts, wanted 1 to %d", (long long)a->experts,
                       (int)MOST_EXPERTS);
    int32_t *total =
        (int32_t *)cq_cuda_scratch(s, a->experts * (chunks + 1) * (int64_t)sizeof(int32_t));
    if (!total)
        return CQ_ENOMEM;
    int32_t *counts = total + a->experts;
    size_t room = (size_t)(a->experts + 1) * sizeof(int32_t);
    CQ_LAUNCH(count_pairs, (unsigned)chunks, CHUNK, room, s, a->sel, pairs, (int)a->experts, chunks,
              counts);
    CQ_LAUNCH(add_counts, cq_blocks(a->experts, WARPS), THREADS, 0, s, counts, (int)a->experts,
              chunks, total);
    CQ_LAUNCH(place_pairs, (unsigned)chunks, CHUNK, room, s, *a, chunks, counts, total);
    CQ_CUDA_END("route_sort");
}
