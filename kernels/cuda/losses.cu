/// losses.cu - the losses on logits: KL in all its forms, and cross-entropy. Formulas are
/// kernels/ref/logits.inc.h's.
///
/// One block per row. Full KL and cross-entropy go over the row twice: maxima that rise as they are
/// met, sums of exponentials relative to them, and sum p (t - s), from which
///     KL = sum p (t - s) / sum p - (log-sum t - log-sum s)
/// where the same rounded p stand above and below; then the gradient, from the row's end, the part
/// that the second-level cache may still have. Top-k forms first look for S, the k largest teacher
/// logits, by a radix search over keys that order as kernels/ref/ranked.h does: the bits of the
/// float, then the lower id. The search ends with the keys of one bin, few enough to be ranked in
/// shared memory; the second pass sums on both sides of that bin, each side with a maximum of its
/// own for the student, so a tail that is tiny beside the head keeps its digits.
///
/// Sums of four or eight exponentials are FP32, all else is double. Values of rows go to scratch; a
/// second kernel sums them in an order that only their number decides.
///
/// Qwen3-4B, 8192 rows of 151936: 5.0 GB each of teacher and student logits. Full KL with gradient
/// reads both twice and writes one, 25 GB, 5.2 ms at 4.8 TB/s; a top-k form reads the teacher once
/// more, 30 GB, 6.2 ms; cross-entropy 15 GB, 3.1 ms. Four exponentials an entry, about 60
/// instructions: 2.6 ms of the FP32 pipes. All are bound by memory.
#include "kernels/cuda/cq_cuda.h"
#include "kernels/cuda/ranked.cuh"
#include "kernels/cuda/row_sums.cuh"
#include <float.h>

namespace {

enum {
    MOST_THREADS = 1024,
    DIGIT = 14, ///< bits of a key that one search pass resolves
    BINS = 1 << DIGIT,
    LIST = 2048 ///< keys that are ranked in shared memory
};

/// W consecutive logits.
template <int W> struct __align__(4 * W) pack { float v[W]; };
/// Entries -inf, which add nothing to any sum, behind the end.
template <int W>
__device__ __forceinline__ pack<W> load(const float *__restrict__ row, int i, int n) {
    pack<W> p;
    if (i < n)
        return reinterpret_cast<const pack<W> *>(row)[i];
#pragma unroll
    for (int e = 0; e < W; e++)
        p.v[e] = -INFINITY;
    return p;
}
template <int W> __device__ __forceinline__ void store(float *row, int i, const pack<W> &p) {
    reinterpret_cast<pack<W> *>(row)[i] = p;
}
template <int W> __device__ __forceinline__ void clear_row(float *row, int n) {
    pack<W> zero;
#pragma unroll
    for (int e = 0; e < W; e++)
        zero.v[e] = 0.0f;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        store<W>(row, i, zero);
}

/// The largest entry met, the first place of it, and a sum of exp(entry - top). It starts at
/// -FLT_MAX, not at -inf, so that an entry of -inf gives 0. A NaN never is the largest but stays in
/// the sum.
struct running {
    float top;
    int at;
    double sum;
};
__device__ __forceinline__ running no_entries() { return running{-FLT_MAX, 0, 0.0}; }

/// Raises the top to that of p, whose first entry has id `first`; `with` is a sum that hangs on the
/// same top.
template <int W>
__device__ __forceinline__ void raise(running *r, const pack<W> &p, int first, double *with) {
    float top = p.v[0];
#pragma unroll
    for (int e = 1; e < W; e++)
        top = fmaxf(top, p.v[e]);
    if (top > r->top) {
        double factor = exp((double)r->top - (double)top);
        r->sum *= factor;
        if (with)
            *with *= factor;
        r->top = top;
#pragma unroll
        for (int e = W - 1; e >= 0; e--)
            if (p.v[e] == top)
                r->at = first + e;
    }
}

/// Top and place of all the block's threads to every thread, the lowest place of equals; sums are
/// rescaled to the new top, `with` as well, but not yet added up. `tops`, `places` [32] are shared.
__device__ __forceinline__ void agree_on_top(running *r, double *with, float *tops, int *places) {
    int lane = (int)(threadIdx.x % CQ_WARP), warp = (int)(threadIdx.x / CQ_WARP);
    int warps = (int)(blockDim.x / CQ_WARP);
    float top = r->top;
    int at = r->at;
    for (int round = 0; round < 2; round++) {
        for (int d = 16; d > 0; d >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, top, d);
            int place = __shfl_xor_sync(0xffffffffu, at, d);
            if (other > top || (other == top && place < at)) {
                top = other;
                at = place;
            }
        }
        if (round == 0) {
            if (lane == 0) {
                tops[warp] = top;
                places[warp] = at;
            }
            __syncthreads();
            top = tops[lane < warps ? lane : 0];
            at = places[lane < warps ? lane : 0];
        }
    }
    __syncthreads();
    double factor = exp((double)r->top - (double)top);
    r->sum *= factor;
    if (with)
        *with *= factor;
    r->top = top;
    r->at = at;
}

__device__ __forceinline__ int64_t flags_of(bool agrees) { return VALID | (agrees ? AGREES : 0); }

/// Negative log-likelihood; a NaN for a label that is no token.
__device__ __forceinline__ double likelihood(double log_sum, const float *row, int label,
                                             int vocab) {
    return label < vocab ? log_sum - (double)row[label] : (double)NAN;
}

/// Full KL and cross-entropy of a row, which has no teacher: sums of one pack.
template <int W>
__device__ __forceinline__ void take(running *student, const pack<W> &s, int first) {
    float sum = 0.0f;
    raise<W>(student, s, first, nullptr);
#pragma unroll
    for (int e = 0; e < W; e++)
        sum += expf(s.v[e] - student->top);
    student->sum += (double)sum;
}
template <int W>
__device__ __forceinline__ void take(running *teacher, running *student, double *difference,
                                     const pack<W> &t, const pack<W> &s, int first) {
    float sum = 0.0f, dot = 0.0f;
    raise<W>(teacher, t, first, difference);
#pragma unroll
    for (int e = 0; e < W; e++) {
        float p = expf(t.v[e] - teacher->top);
        sum += p;
        dot += p > 0.0f ? p * (t.v[e] - s.v[e]) : 0.0f;
    }
    teacher->sum += (double)sum;
    *difference += (double)dot;
    take<W>(student, s, first);
}

template <int W>
__device__ __forceinline__ pack<W> gradient_of(const pack<W> &t, const pack<W> &s, float teacher,
                                               float student, float p, float q) {
    pack<W> g;
#pragma unroll
    for (int e = 0; e < W; e++)
        g.v[e] = expf(s.v[e] - student) * q - expf(t.v[e] - teacher) * p;
    return g;
}

/// What the kernels of KL are given; `n` packs are a row.
struct kl_job {
    const float *teacher;
    float *student;
    const int32_t *labels;
    row_result *result;
    double scale;
    int vocab, n, k;
    cq_kl_form form;
    bool gradient;
};

template <int W> __global__ void __launch_bounds__(MOST_THREADS, 1) kl_full(kl_job j) {
    CQ_SHARED(float, tops, [32]);
    CQ_SHARED(int, places, [32]);
    CQ_SHARED(double, room, [32]);
    int64_t r = (int64_t)blockIdx.x;
    int label = j.labels[r], step = (int)blockDim.x, tid = (int)threadIdx.x;
    const float *__restrict__ t = j.teacher + r * j.vocab;
    float *z = j.student + r * j.vocab;
    if (label < 0) {
        if (j.gradient)
            clear_row<W>(z, j.n);
        if (tid == 0)
            j.result[r] = row_result{0.0, 0.0, 0.0, 0};
        return;
    }
    running teacher = no_entries(), student = no_entries();
    double difference = 0.0;
    for (int i = tid; i < j.n; i += 2 * step) {
        pack<W> t0 = load<W>(t, i, j.n), t1 = load<W>(t, i + step, j.n);
        pack<W> s0 = load<W>(z, i, j.n), s1 = load<W>(z, i + step, j.n);
        take<W>(&teacher, &student, &difference, t0, s0, i * W);
        take<W>(&teacher, &student, &difference, t1, s1, (i + step) * W);
    }
    agree_on_top(&teacher, &difference, tops, places);
    agree_on_top(&student, nullptr, tops, places);
    teacher.sum = cq_block_sum(teacher.sum, room);
    student.sum = cq_block_sum(student.sum, room);
    difference = cq_block_sum(difference, room);
    if (tid == 0) {
        double lt = (double)teacher.top + log(teacher.sum);
        double ls = (double)student.top + log(student.sum);
        double nt = likelihood(lt, t, label, j.vocab), ns = likelihood(ls, z, label, j.vocab);
        double value = difference / teacher.sum - (lt - ls);
        j.result[r] = row_result{label < j.vocab ? value : (double)NAN, nt, ns,
                                 flags_of(teacher.at == student.at)};
    }
    if (!j.gradient)
        return;
    __syncthreads(); /* the label's logit was read */
    float p = (float)(j.scale / teacher.sum), q = (float)(j.scale / student.sum);
    for (int i = (j.n - 1) / step * step + tid; i >= 0; i -= 2 * step) {
        pack<W> t0 = load<W>(t, i, j.n), s0 = load<W>(z, i, j.n), t1 = t0, s1 = s0;
        bool two = i >= step;
        if (two) {
            t1 = load<W>(t, i - step, j.n);
            s1 = load<W>(z, i - step, j.n);
        }
        if (i < j.n)
            store<W>(z, i, gradient_of<W>(t0, s0, teacher.top, student.top, p, q));
        if (two)
            store<W>(z, i - step, gradient_of<W>(t1, s1, teacher.top, student.top, p, q));
    }
}

/// The keys low .. high hold the k-th largest: it is the `need`-th largest of their `count`.
struct key_range {
    uint64_t low, high;
    int need, count;
};

/// Which bin of the histogram, counted from the top, holds the need-th largest; the thread that
/// finds it makes *range of it. `sums` [32] is shared.
__device__ __forceinline__ void find_bin(const uint32_t *bins, int shift, key_range *range,
                                         int *sums) {
    int tid = (int)threadIdx.x, lane = tid % CQ_WARP, warp = tid / CQ_WARP;
    int warps = (int)blockDim.x / CQ_WARP, mine = BINS / (int)blockDim.x;
    int first = BINS - 1 - tid * mine, own = 0, need = range->need;
    uint64_t low = range->low;
    for (int i = 0; i < mine; i++)
        own += (int)bins[first - i];
    int upto = own;
    for (int d = 1; d < CQ_WARP; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, upto, (unsigned)d);
        upto += lane >= d ? other : 0;
    }
    if (lane == CQ_WARP - 1)
        sums[warp] = upto;
    __syncthreads();
    int before = lane < warps ? sums[lane] : 0;
    for (int d = 1; d < CQ_WARP; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, before, (unsigned)d);
        before += lane >= d ? other : 0;
    }
    before = __shfl_sync(0xffffffffu, before, warp > 0 ? warp - 1 : 0);
    int above = upto - own + (warp > 0 ? before : 0);
    if (above < need && need <= above + own) {
        int b = first;
        while (above + (int)bins[b] < need)
            above += (int)bins[b--];
        range->low = low | (uint64_t)b << shift;
        range->high = range->low | (((uint64_t)1 << shift) - 1);
        range->need = need - above;
        range->count = (int)bins[b];
    }
    __syncthreads();
}

/// Looks for the k largest teacher logits and, in its first pass, for the largest. `bins` [BINS]
/// and *range are shared memory.
template <int W>
__device__ __forceinline__ void find_kept(const float *__restrict__ t, const kl_job &j,
                                          running *teacher, uint32_t *bins, key_range *range,
                                          int *sums) {
    int step = (int)blockDim.x, tid = (int)threadIdx.x, shift = 64;
    if (tid == 0)
        *range = key_range{0, ~(uint64_t)0, j.k, j.vocab};
    do {
        bool top = shift == 64;
        shift = shift > DIGIT ? shift - DIGIT : 0;
        for (int b = tid; b < BINS; b += step)
            bins[b] = 0;
        __syncthreads();
        uint64_t low = range->low, high = range->high;
        for (int i = tid; i < j.n; i += 2 * step) {
            pack<W> part[2] = {load<W>(t, i, j.n), load<W>(t, i + step, j.n)};
#pragma unroll
            for (int u = 0; u < 2; u++) {
                int at = i + u * step;
                if (at >= j.n)
                    continue;
                if (top)
                    raise<W>(teacher, part[u], at * W, nullptr);
#pragma unroll
                for (int e = 0; e < W; e++) {
                    uint64_t key = key_of(part[u].v[e], at * W + e);
                    if (key >= low && key <= high)
                        atomicAdd(&bins[(key >> shift) % BINS], 1u);
                }
            }
        }
        __syncthreads();
        find_bin(bins, shift, range, sums);
    } while (range->count > LIST);
}

/// Sums of a row of a top-k form on one side of S: the student's have tops of their own, the
/// teacher's are relative to its largest logit.
struct side {
    running student;
    double teacher;
};

/// Adds one pack to the two sides. Keys above `high` are in S, those below `low` outside it, those
/// between are left out.
template <int W>
__device__ __forceinline__ void take_split(side *in, side *out, double *difference, float top,
                                           const pack<W> &t, const pack<W> &s, const uint64_t *keys,
                                           uint64_t low, uint64_t high, int first) {
    pack<W> inner, outer;
#pragma unroll
    for (int e = 0; e < W; e++) {
        inner.v[e] = keys[e] > high ? s.v[e] : -INFINITY;
        outer.v[e] = keys[e] < low ? s.v[e] : -INFINITY;
    }
    raise<W>(&in->student, inner, first, nullptr);
    raise<W>(&out->student, outer, first, nullptr);
    float teacher_in = 0.0f, teacher_out = 0.0f, student_in = 0.0f, student_out = 0.0f, dot = 0.0f;
#pragma unroll
    for (int e = 0; e < W; e++) {
        bool is_in = keys[e] > high, is_out = keys[e] < low;
        float p = expf(t.v[e] - top);
        float q = expf(s.v[e] - (is_in ? in->student.top : out->student.top));
        teacher_in += is_in ? p : 0.0f;
        student_in += is_in ? q : 0.0f;
        teacher_out += is_out ? p : 0.0f;
        student_out += is_out ? q : 0.0f;
        dot += is_in && p > 0.0f ? p * (t.v[e] - s.v[e]) : 0.0f;
    }
    in->teacher += (double)teacher_in;
    in->student.sum += (double)student_in;
    out->teacher += (double)teacher_out;
    out->student.sum += (double)student_out;
    *difference += (double)dot;
}

__device__ __forceinline__ double log_of_both(const running &a, const running &b) {
    double la = (double)a.top + log(a.sum), lb = (double)b.top + log(b.sum);
    double top = la > lb ? la : lb;
    return top + log(exp(la - top) + exp(lb - top));
}

/// Gradient factors: in S by_q exp(s - top of S) - by_p exp(t - top), outside by_out exp(s - top
/// outside).
struct split_factors {
    float by_q, by_p, by_out;
};

/// Value of a row of a top-k form from its sums, and the factors of its gradient.
__device__ __forceinline__ double split_value(const kl_job &j, float top, const side &in,
                                              const side &out, double difference, double *lt,
                                              double *ls, split_factors *f) {
    double t = (double)top, log_in = (double)in.student.top + log(in.student.sum);
    *lt = t + log(in.teacher + out.teacher);
    *ls = log_of_both(in.student, out.student);
    if (j.form == CQ_KL_RENORMALIZED) {
        *f = split_factors{(float)(j.scale / in.student.sum), (float)(j.scale / in.teacher), 0.0f};
        double value = difference / in.teacher - (t + log(in.teacher) - log_in);
        return value + 0.0 * (*lt + *ls); /* a NaN outside S must show */
    }
    bool bucket = j.form == CQ_KL_TAIL_BUCKET;
    double p = exp(t - *lt), mass = p * in.teacher, rest = p * out.teacher;
    double q = exp((double)in.student.top - *ls), o = exp((double)out.student.top - *ls);
    double value = p * (difference - in.teacher * (*lt - *ls));
    if (!bucket) {
        q *= mass;
        o *= mass;
    } else if (rest > 0.0) {
        value += rest * ((t + log(out.teacher) - *lt) -
                         ((double)out.student.top + log(out.student.sum) - *ls));
        o -= rest / out.student.sum;
    }
    *f = split_factors{(float)(j.scale * q), (float)(j.scale * p), (float)(j.scale * o)};
    return value;
}

template <int W> __global__ void __launch_bounds__(MOST_THREADS, 1) kl_top_k(kl_job j) {
    CQ_DYN_SMEM(uint32_t, bins); /* [BINS], and later the list */
    CQ_SHARED(float, tops, [32]);
    CQ_SHARED(int, places, [32]);
    CQ_SHARED(double, room, [32]);
    CQ_SHARED(key_range, range, [1]);
    CQ_SHARED(split_factors, factors, [1]);
    CQ_SHARED(int, listed, [1]);
    uint64_t *list = reinterpret_cast<uint64_t *>(bins), *ranked = list + LIST;
    int64_t r = (int64_t)blockIdx.x;
    int label = j.labels[r], step = (int)blockDim.x, tid = (int)threadIdx.x;
    const float *__restrict__ t = j.teacher + r * j.vocab;
    float *z = j.student + r * j.vocab;
    if (label < 0) {
        if (j.gradient)
            clear_row<W>(z, j.n);
        if (tid == 0)
            j.result[r] = row_result{0.0, 0.0, 0.0, 0};
        return;
    }
    running teacher = no_entries();
    side in = {no_entries(), 0.0}, out = {no_entries(), 0.0};
    double difference = 0.0;
    if (tid == 0)
        *listed = 0;
    find_kept<W>(t, j, &teacher, bins, range, places);
    agree_on_top(&teacher, nullptr, tops, places);
    uint64_t low = range->low, high = range->high;
    int need = range->need, count = range->count;
    for (int i = (j.n - 1) / step * step + tid; i >= 0; i -= step) {
        if (i >= j.n)
            continue;
        pack<W> ti = load<W>(t, i, j.n), si = load<W>(z, i, j.n);
        uint64_t keys[W];
#pragma unroll
        for (int e = 0; e < W; e++) {
            keys[e] = key_of(ti.v[e], i * W + e);
            if (keys[e] >= low && keys[e] <= high)
                list[atomicAdd(listed, 1)] = keys[e];
        }
        take_split<W>(&in, &out, &difference, teacher.top, ti, si, keys, low, high, i * W);
    }
    __syncthreads();
    for (int i = tid; i < count; i += step) {
        uint64_t key = list[i];
        int rank = 0;
        for (int o = 0; o < count; o++)
            rank += list[o] > key;
        ranked[rank] = key;
    }
    __syncthreads();
    uint64_t last = ranked[need - 1]; /* the k-th largest */
    for (int i = tid; i < count; i += step) {
        uint64_t key = ranked[i];
        int id = (int)(0xffffffffu - (uint32_t)key);
        pack<1> ti = {{float_of_bits((uint32_t)(key >> 32))}}, si = {{z[id]}};
        take_split<1>(&in, &out, &difference, teacher.top, ti, si, &key, last, last - 1, id);
    }
    agree_on_top(&in.student, nullptr, tops, places);
    agree_on_top(&out.student, nullptr, tops, places);
    in.teacher = cq_block_sum(in.teacher, room);
    out.teacher = cq_block_sum(out.teacher, room);
    in.student.sum = cq_block_sum(in.student.sum, room);
    out.student.sum = cq_block_sum(out.student.sum, room);
    difference = cq_block_sum(difference, room);
    if (tid == 0) {
        double lt, ls;
        double value = split_value(j, teacher.top, in, out, difference, &lt, &ls, factors);
        bool first = in.student.top > out.student.top ||
                     (in.student.top == out.student.top && in.student.at < out.student.at);
        j.result[r] =
            row_result{label < j.vocab ? value : (double)NAN, likelihood(lt, t, label, j.vocab),
                       likelihood(ls, z, label, j.vocab),
                       flags_of(teacher.at == (first ? in : out).student.at)};
    }
    if (!j.gradient)
        return;
    __syncthreads();
    split_factors f = *factors;
    for (int i = tid; i < j.n; i += step) {
        pack<W> ti = load<W>(t, i, j.n), si = load<W>(z, i, j.n), g;
#pragma unroll
        for (int e = 0; e < W; e++) {
            bool is_in = key_of(ti.v[e], i * W + e) >= last;
            float q = expf(si.v[e] - (is_in ? in.student.top : out.student.top));
            float p = is_in ? expf(ti.v[e] - teacher.top) * f.by_p : 0.0f;
            g.v[e] = q * (is_in ? f.by_q : f.by_out) - p;
        }
        store<W>(z, i, g);
    }
}

/// Cross-entropy of a row; `n` packs are a row.
struct entropy_job {
    float *logits;
    const int32_t *labels;
    const float *weights; ///< may be NULL
    row_result *result;
    double scale;
    int vocab, n;
    bool gradient;
};

template <int W> __global__ void __launch_bounds__(MOST_THREADS, 1) entropy(entropy_job j) {
    CQ_SHARED(float, tops, [32]);
    CQ_SHARED(int, places, [32]);
    CQ_SHARED(double, room, [32]);
    int64_t r = (int64_t)blockIdx.x;
    int label = j.labels[r], step = (int)blockDim.x, tid = (int)threadIdx.x;
    float *z = j.logits + r * j.vocab;
    if (label < 0) {
        if (j.gradient)
            clear_row<W>(z, j.n);
        if (tid == 0)
            j.result[r] = row_result{0.0, 0.0, 0.0, 0};
        return;
    }
    running all = no_entries();
    for (int i = tid; i < j.n; i += 2 * step) {
        pack<W> a = load<W>(z, i, j.n), b = load<W>(z, i + step, j.n);
        take<W>(&all, a, i * W);
        take<W>(&all, b, (i + step) * W);
    }
    agree_on_top(&all, nullptr, tops, places);
    all.sum = cq_block_sum(all.sum, room);
    double at_label = label < j.vocab ? (double)z[label] - (double)all.top : (double)NAN;
    double weight = j.weights ? (double)j.weights[r] : 1.0, scale = j.scale * weight;
    if (tid == 0)
        j.result[r] =
            row_result{weight * (log(all.sum) - at_label), 0.0, 0.0, flags_of(all.at == label)};
    if (!j.gradient)
        return;
    __syncthreads();
    float q = (float)(scale / all.sum);
    for (int i = (j.n - 1) / step * step + tid; i >= 0; i -= step) {
        if (i >= j.n)
            continue;
        pack<W> g = load<W>(z, i, j.n);
#pragma unroll
        for (int e = 0; e < W; e++) {
            g.v[e] = expf(g.v[e] - all.top) * q;
            if (i * W + e == label)
                g.v[e] = (float)(scale * (exp(at_label) / all.sum - 1.0));
        }
        store<W>(z, i, g);
    }
}

/// Threads of a block that has a row of n packs: a power of two, for the search of bins.
unsigned threads_for(int64_t n) {
    unsigned threads = 128;
    while (threads < MOST_THREADS && (int64_t)threads * 4 < n)
        threads *= 2;
    return threads;
}

bool aligned(const void *p) { return (uintptr_t)p % 16 == 0; }

int check(const char *op, int64_t rows, int64_t vocab) {
    if (rows > INT32_MAX || vocab > INT32_MAX / 2 || (rows > 0 && vocab < 1))
        return cq_fail(CQ_ESHAPE, "cuda: %s: %lld rows of %lld logits", op, (long long)rows,
                       (long long)vocab);
    return CQ_OK;
}

} // namespace

extern "C" int cq_cuda_kl(cq_stream *s, const cq_kl_args *a) {
    CQ_CUDA_F32("kl", a);
    bool whole = a->form == CQ_KL_FULL || a->top_k >= a->vocab;
    if (!whole && a->top_k < 1)
        return cq_fail(CQ_EUSAGE, "kl: top_k is %lld, wanted at least 1", (long long)a->top_k);
    CQ_TRY(check("kl", a->rows, a->vocab));
    if (a->rows < 1)
        return CQ_OK;
    bool wide = a->vocab % 4 == 0 && aligned(a->teacher) && aligned(a->student);
    auto *result = static_cast<row_result *>(
        cq_cuda_scratch(s, a->rows * static_cast<int64_t>(sizeof(row_result))));
    if (!result)
        return CQ_ENOMEM;
    kl_job j = {static_cast<const float *>(a->teacher),
                static_cast<float *>(a->student),
                a->labels,
                result,
                a->scale,
                static_cast<int>(a->vocab),
                static_cast<int>(wide ? a->vocab / 4 : a->vocab),
                static_cast<int>(whole ? 0 : a->top_k),
                a->form,
                a->gradient};
    unsigned grid = static_cast<unsigned>(a->rows), block = threads_for(j.n);
    int64_t bytes = BINS * static_cast<int64_t>(sizeof(uint32_t));
    if (whole && wide)
        CQ_LAUNCH((kl_full<4>), grid, block, 0, s, j);
    else if (whole)
        CQ_LAUNCH((kl_full<1>), grid, block, 0, s, j);
    else if (wide) {
        CQ_TRY(cq_cuda_shared_bytes(reinterpret_cast<const void *>(kl_top_k<4>), bytes, "kl"));
        CQ_LAUNCH((kl_top_k<4>), grid, block, bytes, s, j);
    } else {
        CQ_TRY(cq_cuda_shared_bytes(reinterpret_cast<const void *>(kl_top_k<1>), bytes, "kl"));
        CQ_LAUNCH((kl_top_k<1>), grid, block, bytes, s, j);
    }
    totals to = {a->sum, a->nll_teacher, a->nll_student, a->agree, a->valid};
    CQ_LAUNCH(sum_rows, 1, SUM_THREADS, 0, s, result, a->rows, to);
    CQ_CUDA_END("kl");
}

extern "C" int cq_cuda_cross_entropy(cq_stream *s, const cq_cross_entropy_args *a) {
    CQ_CUDA_F32("cross_entropy", a);
    CQ_TRY(check("cross_entropy", a->rows, a->vocab));
    if (a->rows < 1)
        return CQ_OK;
    bool wide = a->vocab % 4 == 0 && aligned(a->logits);
    auto *result = static_cast<row_result *>(
        cq_cuda_scratch(s, a->rows * static_cast<int64_t>(sizeof(row_result))));
    if (!result)
        return CQ_ENOMEM;
    entropy_job j = {static_cast<float *>(a->logits),
                     a->labels,
                     a->weights,
                     result,
                     a->scale,
                     static_cast<int>(a->vocab),
                     static_cast<int>(wide ? a->vocab / 4 : a->vocab),
                     a->gradient};
    unsigned grid = static_cast<unsigned>(a->rows), block = threads_for(j.n);
    if (wide)
        CQ_LAUNCH((entropy<4>), grid, block, 0, s, j);
    else
        CQ_LAUNCH((entropy<1>), grid, block, 0, s, j);
    totals to = {a->sum, nullptr, nullptr, a->correct, a->valid};
    CQ_LAUNCH(sum_rows, 1, SUM_THREADS, 0, s, result, a->rows, to);
    CQ_CUDA_END("cross_entropy");
}
