/// cached.cu - KL against a cached teacher, and what it is cached by. Formulas are
/// kernels/ref/logits.inc.h's.
///
/// One block per row. top_logits finds the k-th largest key by a radix search, eight bits a pass,
/// and ranks the k kept ones against each other; it runs once for a cache. For KL the student's
/// logits of S are taken out of the row into scratch and leave -inf behind, so that what stays is
/// the tail; two passes over the row find its top and its sum, a third writes its gradient, and the
/// entries of S go back one by one. Sums are double, exponentials FP32.
///
/// Qwen3-4B, 8192 rows of 151936, k = 1024: the row is read three times and written once, 20 GB or
/// 4.2 ms at 4.8 TB/s where the second-level cache keeps none of it; the entries of S are 0.2 GB.
/// Not measured on a GPU yet.
#include "kernels/cuda/cq_cuda.h"
#include "kernels/cuda/ranked.cuh"
#include "kernels/cuda/row_sums.cuh"
#include <float.h>
#include <limits.h>

namespace {

struct cached_job {
    const int32_t *ids, *at, *labels;
    const void *log_p;
    const float *log_tail, *log_label;
    float *student, *kept; ///< kept: [rows, top]
    row_result *result;
    double scale;
    int vocab, top, k;
    cq_kl_form form;
    bool half, gradient;
};

/// F16 to float: the exponent is moved by a product, which is exact and serves subnormals too.
__device__ __forceinline__ float entry(const cached_job &j, int64_t i) {
    if (!j.half)
        return static_cast<const float *>(j.log_p)[i];
    uint32_t u = static_cast<const uint16_t *>(j.log_p)[i];
    return __uint_as_float((u & 0x8000u) << 16 | (u & 0x7fffu) << 13) *
           5192296858534827628530496329220096.0f;
}

/// The largest entry and the lowest id that has it. NaN never is the largest.
struct best {
    float top;
    int id;
};
__device__ __forceinline__ void take(best *b, float x, int id) {
    if (x > b->top || (x == b->top && id < b->id))
        *b = best{x, id};
}
/// Of all the block's threads to every thread. `tops`, `places` [32] are shared.
__device__ __forceinline__ void agree(best *b, float *tops, int *places) {
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int warps = (int)(blockDim.x / CQ_WARP);
    for (int round = 0; round < 2; round++) {
        for (int d = 16; d > 0; d >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, b->top, d);
            int id = __shfl_xor_sync(0xffffffffu, b->id, d);
            take(b, other, id);
        }
        if (round == 0) {
            if (lane == 0) {
                tops[warp] = b->top;
                places[warp] = b->id;
            }
            __syncthreads();
            *b = best{tops[lane < warps ? lane : 0], places[lane < warps ? lane : 0]};
        }
    }
    __syncthreads();
}

/// Sums of a row: the teacher's of exp(l - first) in S and of the other entries, the student's of
/// exp(s - top) on both sides, and in S of the teacher's times the difference of the exponents.
struct sums {
    double kept, others, in, out, difference;
};
/// Gradient factors: in S by_q exp(s - top) - by_p exp(l - first), outside by_out exp(s - top).
struct factors {
    float by_q, by_p, by_out;
};

__device__ __forceinline__ double value_of(const cached_job &j, double tail, const sums &m,
                                           float in_top, float out_top, double *ls, factors *f) {
    double li = (double)in_top + log(m.in), lo = (double)out_top + log(m.out);
    double most = li > lo ? li : lo;
    *ls = most + log(exp(li - most) + exp(lo - most));
    if (j.form == CQ_KL_RENORMALIZED || j.top == j.vocab) {
        *f = factors{(float)(j.scale / m.in), (float)(j.scale / m.kept), 0.0f};
        return m.difference / m.kept + log(m.in / m.kept) + 0.0 * *ls;
    }
    bool bucket = j.form == CQ_KL_TAIL_BUCKET;
    double unit = -expm1(tail) / (m.kept + m.others), rest = exp(tail) + m.others * unit;
    double mass = bucket ? 1.0 : unit * m.kept;
    double q = exp((double)in_top - *ls) * mass, o = exp((double)out_top - *ls) * mass;
    double value = unit * (m.difference + m.kept * (log(unit) - ((double)in_top - *ls)));
    if (bucket && rest > 0.0) {
        value += rest * (log(rest) - (lo - *ls));
        o -= rest / m.out;
    }
    *f = factors{(float)(j.scale * q), (float)(j.scale * unit), (float)(j.scale * o)};
    return value;
}

__global__ void __launch_bounds__(1024, 1) kl_cached(cached_job j) {
    CQ_SHARED(float, tops, [32]);
    CQ_SHARED(int, places, [32]);
    CQ_SHARED(double, room, [32]);
    CQ_SHARED(factors, shared, [1]);
    int64_t r = (int64_t)blockIdx.x;
    int label = j.labels[r], step = (int)blockDim.x, tid = (int)threadIdx.x;
    float *z = j.student + r * j.vocab, *kept = j.kept + r * j.top;
    if (label < 0) {
        for (int i = tid; j.gradient && i < j.vocab; i += step)
            z[i] = 0.0f;
        if (tid == 0)
            j.result[r] = row_result{0.0, 0.0, 0.0, 0};
        return;
    }
    int64_t at = j.at[r];
    const int32_t *ids = j.ids + at * j.k;
    float first = entry(j, at * j.k);
    double at_label = label < j.vocab ? (double)z[label] : (double)NAN;
    sums m = {0.0, 0.0, 0.0, 0.0, 0.0};
    best in = {-FLT_MAX, INT_MAX}, out = in;
    for (int i = tid; i < j.k; i += step) {
        float p = expf(entry(j, at * j.k + i) - first);
        if (i >= j.top) {
            m.others += (double)p;
            continue;
        }
        m.kept += (double)p;
        kept[i] = z[ids[i]];
        take(&in, kept[i], ids[i]);
    }
    agree(&in, tops, places); /* every logit of S was read */
    for (int i = tid; i < j.top; i += step) {
        float l = entry(j, at * j.k + i) - first, s = kept[i] - in.top, p = expf(l);
        m.in += (double)expf(s);
        m.difference += p > 0.0f ? (double)(p * (l - s)) : 0.0;
        z[ids[i]] = -INFINITY;
    }
    __syncthreads();
    for (int i = tid; i < j.vocab; i += step)
        take(&out, z[i], i);
    agree(&out, tops, places);
    for (int i = tid; i < j.vocab; i += step)
        m.out += (double)expf(z[i] - out.top);
    m.kept = cq_block_sum(m.kept, room);
    m.others = cq_block_sum(m.others, room);
    m.in = cq_block_sum(m.in, room);
    m.out = cq_block_sum(m.out, room);
    m.difference = cq_block_sum(m.difference, room);
    if (tid == 0) {
        double ls, value = value_of(j, (double)j.log_tail[at], m, in.top, out.top, &ls, shared);
        bool inside = in.top > out.top || (in.top == out.top && in.id < out.id);
        bool agrees = (inside ? in.id : out.id) == ids[0];
        j.result[r] = row_result{label < j.vocab ? value : (double)NAN,
                                 j.log_label ? -(double)j.log_label[at] : 0.0, ls - at_label,
                                 VALID | (agrees ? AGREES : 0)};
    }
    __syncthreads();
    factors f = *shared;
    for (int i = tid; j.gradient && i < j.vocab; i += step)
        z[i] = expf(z[i] - out.top) * f.by_out;
    __syncthreads();
    for (int i = tid; i < j.top; i += step)
        z[ids[i]] = j.gradient ? expf(kept[i] - in.top) * f.by_q -
                                     expf(entry(j, at * j.k + i) - first) * f.by_p
                               : kept[i];
}

struct top_job {
    const float *logits;
    const int32_t *labels, *at;
    int32_t *ids;
    float *log_p, *log_tail, *log_label;
    uint64_t *keys; ///< [rows, k]
    int vocab, k;
};

/// The k-th largest key of a row, to every thread. `bins` [256], `found` and `need` are shared.
__device__ __forceinline__ uint64_t last_kept(const float *z, int vocab, int k, uint32_t *bins,
                                              uint64_t *found, int *need) {
    int step = (int)blockDim.x, tid = (int)threadIdx.x;
    if (tid == 0) {
        *found = 0;
        *need = k;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int b = tid; b < 256; b += step)
            bins[b] = 0;
        __syncthreads();
        uint64_t so_far = *found;
        for (int i = tid; i < vocab; i += step) {
            uint64_t key = key_of(z[i], i);
            if (shift == 56 || (key >> (shift + 8)) == (so_far >> (shift + 8)))
                atomicAdd(&bins[(key >> shift) & 255], 1u);
        }
        __syncthreads();
        if (tid == 0) {
            int b = 255;
            for (; b > 0 && (int)bins[b] < *need; b--)
                *need -= (int)bins[b];
            *found = so_far | (uint64_t)b << shift;
        }
        __syncthreads();
    }
    return *found;
}

__global__ void __launch_bounds__(1024, 1) top_logits(top_job j) {
    CQ_SHARED(float, tops, [32]);
    CQ_SHARED(int, places, [32]);
    CQ_SHARED(double, room, [32]);
    CQ_SHARED(uint32_t, bins, [256]);
    CQ_SHARED(uint64_t, found, [1]);
    CQ_SHARED(int, need, [1]);
    CQ_SHARED(int, listed, [1]);
    int64_t r = (int64_t)blockIdx.x;
    int label = j.labels[r], step = (int)blockDim.x, tid = (int)threadIdx.x;
    if (label < 0)
        return;
    int64_t at = j.at[r];
    const float *z = j.logits + r * j.vocab;
    uint64_t *keys = j.keys + r * j.k;
    if (tid == 0)
        *listed = 0;
    uint64_t last = last_kept(z, j.vocab, j.k, bins, found, need);
    best in = {-FLT_MAX, INT_MAX}, out = in;
    for (int i = tid; i < j.vocab; i += step) {
        uint64_t key = key_of(z[i], i);
        take(key >= last ? &in : &out, z[i], i);
        if (key >= last)
            keys[atomicAdd(listed, 1)] = key;
    }
    agree(&in, tops, places);
    agree(&out, tops, places);
    double in_sum = 0.0, out_sum = 0.0;
    for (int i = tid; i < j.vocab; i += step)
        if (key_of(z[i], i) >= last)
            in_sum += (double)expf(z[i] - in.top);
        else
            out_sum += (double)expf(z[i] - out.top);
    in_sum = cq_block_sum(in_sum, room);
    out_sum = cq_block_sum(out_sum, room);
    double li = (double)in.top + log(in_sum), lo = (double)out.top + log(out_sum);
    double all = li + log1p(exp(lo - li));
    for (int i = tid; i < j.k; i += step) {
        uint64_t key = keys[i];
        int rank = 0, id = (int)(0xffffffffu - (uint32_t)key);
        for (int o = 0; o < j.k; o++)
            rank += keys[o] > key;
        j.ids[at * j.k + rank] = id;
        j.log_p[at * j.k + rank] = (float)((double)z[id] - all);
    }
    if (tid == 0) {
        j.log_tail[at] = (float)(lo - all);
        if (j.log_label)
            j.log_label[at] = label < j.vocab ? (float)((double)z[label] - all) : NAN;
    }
}

unsigned threads_for(int64_t vocab) {
    unsigned block = 128;
    while (block < 1024 && block * 4 < vocab)
        block *= 2;
    return block;
}

} // namespace

extern "C" int cq_cuda_kl_cached(cq_stream *s, const cq_kl_cached_args *a) {
    CQ_CUDA_F32("kl_cached", a);
    int64_t top = a->form == CQ_KL_FULL || a->top_k > a->vocab ? a->vocab : a->top_k;
    if (top < 1 || top > a->k || a->k > a->vocab || a->vocab > INT32_MAX / 2 || a->rows > INT32_MAX)
        return cq_fail(CQ_EUSAGE, "kl_cached: top_k is %lld of %lld, wanted 1 to %lld",
                       (long long)top, (long long)a->vocab, (long long)a->k);
    if (a->rows < 1)
        return CQ_OK;
    int64_t results = a->rows * static_cast<int64_t>(sizeof(row_result));
    auto *result = static_cast<row_result *>(
        cq_cuda_scratch(s, results + a->rows * top * static_cast<int64_t>(sizeof(float))));
    if (!result)
        return CQ_ENOMEM;
    cached_job j = {a->ids,
                    a->at,
                    a->labels,
                    a->log_p,
                    static_cast<const float *>(a->log_tail),
                    static_cast<const float *>(a->log_label),
                    static_cast<float *>(a->student),
                    reinterpret_cast<float *>(reinterpret_cast<char *>(result) + results),
                    result,
                    a->scale,
                    static_cast<int>(a->vocab),
                    static_cast<int>(top),
                    static_cast<int>(a->k),
                    a->form,
                    a->half,
                    a->gradient};
    CQ_LAUNCH(kl_cached, static_cast<unsigned>(a->rows), threads_for(a->vocab), 0, s, j);
    totals to = {a->sum, a->nll_teacher, a->nll_student, a->agree, a->valid};
    CQ_LAUNCH(sum_rows, 1, SUM_THREADS, 0, s, result, a->rows, to);
    CQ_CUDA_END("kl_cached");
}

extern "C" int cq_cuda_top_logits(cq_stream *s, const cq_top_logits_args *a) {
    CQ_CUDA_F32("top_logits", a);
    if (a->k < 1 || a->k > a->vocab || a->vocab > INT32_MAX / 2 || a->rows > INT32_MAX)
        return cq_fail(CQ_EUSAGE, "top_logits: k is %lld, wanted 1 to %lld", (long long)a->k,
                       (long long)a->vocab);
    if (a->rows < 1)
        return CQ_OK;
    auto *keys = static_cast<uint64_t *>(
        cq_cuda_scratch(s, a->rows * a->k * static_cast<int64_t>(sizeof(uint64_t))));
    if (!keys)
        return CQ_ENOMEM;
    top_job j = {static_cast<const float *>(a->logits),
                 a->labels,
                 a->at,
                 a->ids,
                 static_cast<float *>(a->log_p),
                 static_cast<float *>(a->log_tail),
                 static_cast<float *>(a->log_label),
                 keys,
                 static_cast<int>(a->vocab),
                 static_cast<int>(a->k)};
    CQ_LAUNCH(top_logits, static_cast<unsigned>(a->rows), threads_for(a->vocab), 0, s, j);
    CQ_CUDA_END("top_logits");
}
