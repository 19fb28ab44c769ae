/// fake.cuh - NVFP4 fake quantization inside a kernel, bit for bit that of kernels/nvfp4.h.
///
/// Four layouts of a block of 16 values:
///   cq_fake16        one thread holds it
///   cq_fake_lanes16  sixteen neighbouring lanes hold a value each
///   cq_fake_quads    four neighbouring lanes hold four values each (a float4 per lane, coalesced),
///                    N such blocks at once: lane j of the four works out the scale of block j
///   cq_fake_flat     a whole kernel over dense rows: reads a source, writes a plain and a
///   quantized
///                    copy; fake quantization, the activations and row gathering are its instances
///
/// Usage in a kernel that has one row at a time, a float4 v[k] of columns 4 (i + k blockDim.x):
///     cq_fake_group g = cq_fake_group_of(fq, cq_group_of_row(fq.offsets, fq.n_groups, row), top);
///     int saturated = cq_fake_quads<3, false>(v, g, -1.0f);   // all lanes of the warp together
///     cq_fake_count(fq.saturated, saturated);                 // at the end, all lanes together
/// Lanes or blocks beyond the row's end take part with zeros.
///
/// An element costs about 17 instructions: the exact quotient from a reciprocal that the block
/// shares (Markstein), the nearest E2M1 value from one addition of a power of two.
#pragma once
#include "kernels/cuda/float4.cuh"

/// The larger one; NaN if either is NaN.
__device__ __forceinline__ float cq_max_nan(float a, float b) {
#ifndef CQ_CUDA_ON_CPU
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
#else
    return a != a || a > b ? a : b;
#endif
}

/// Group of a row: the last one that begins at or before it (groups may be empty). With `per_row`
/// `at` counts elements, or quarters of four, instead of rows: `per_row` of them make a row.
__device__ __forceinline__ int64_t cq_group_of_row(const int64_t *offsets, int64_t n_groups,
                                                   int64_t at, int64_t per_row = 1) {
    int64_t low = 0, high = offsets ? n_groups : 1;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (offsets[middle] * per_row <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}
/// The same for a warp whose lanes all ask for one place: 32 entries at a time.
__device__ __forceinline__ int64_t cq_warp_group_of_row(const int64_t *offsets, int64_t n_groups,
                                                        int64_t at, int64_t per_row = 1) {
    int lane = (int)(threadIdx.x % CQ_WARP), before = 0;
    if (!offsets || n_groups > 2048)
        return cq_group_of_row(offsets, n_groups, at, per_row);
    for (int64_t g = 1; g < n_groups; g += CQ_WARP) {
        bool begun = g + lane < n_groups && offsets[g + lane] * per_row <= at;
        before += __popc(__ballot_sync(0xffffffffu, begun));
    }
    return before;
}
/// The group of a place at or after one in group g.
__device__ __forceinline__ int64_t cq_group_onwards(const int64_t *offsets, int64_t n_groups,
                                                    int64_t g, int64_t at, int64_t per_row = 1) {
    while (g + 1 < n_groups && offsets[g + 1] * per_row <= at)
        g++;
    return g;
}

/// What the blocks of one group share.
struct cq_fake_group {
    float amax;
    float ws2, by;           ///< dynamic form: tensor scale, 6 ws2
    float top, ws2_top, max; ///< static form: top, its tensor scale, amax / 6
};
__device__ __forceinline__ cq_fake_group cq_fake_group_from(float amax, float top) {
    cq_fake_group g;
    g.amax = amax;
    g.ws2 = cq_nvfp4_tensor_scale(amax, 448.0f);
    g.by = 6.0f * g.ws2;
    g.top = top;
    g.ws2_top = cq_nvfp4_tensor_scale(amax, top);
    g.max = amax / 6.0f;
    return g;
}
/// Group number g of fq, whose maxima must be there (fq.amax != NULL).
__device__ __forceinline__ cq_fake_group cq_fake_group_of(const cq_fq &fq, int64_t g, float top) {
    return cq_fake_group_from(fq.amax[g], top);
}

/// How the values of one block are rounded: den is the block scale times the tensor scale.
struct cq_fake_scale {
    float den;
    float inverse; ///< 1 / den; 0: only a true division is exact; -1: the group is all zeros
    float tiny;    ///< largest |x| for which x / den is zero
};
enum { CQ_FAKE_DIVIDE = 0, CQ_FAKE_ZERO = -1 };

/// p in [2^-9, 448] rounded to E4M3; a NaN stays one.
__device__ __forceinline__ float cq_fake_e4m3(float p) {
    unsigned e = __float_as_uint(p) & 0x7f800000u, lowest = 121u << 23;
    float m = __uint_as_float((e > lowest ? e : lowest) + (20u << 23));
    return (p + m) - m;
}

/// Scale of a block whose largest magnitude is `largest`. FIXED: the static form for chosen >= 0,
/// else the dynamic one. *saturated becomes 1 when the clamp at 448 acted.
template <bool FIXED>
__device__ __forceinline__ cq_fake_scale cq_fake_scale_of(const cq_fake_group &g, float largest,
                                                          float chosen, int *saturated) {
    bool fixed = FIXED && chosen >= 0.0f;
    float p = fixed ? chosen / 6.0f : largest / g.by;
    p = p == 0.0f ? 1.0f : p;
    if (fixed)
        p = (p * g.top) / g.max;
    bool live = g.amax > 0.0f;
    *saturated = live && !fixed && p > 448.0f;
    p = p < 0.001953125f ? 0.001953125f : p > 448.0f ? 448.0f : p;
    cq_fake_scale s;
    s.den = cq_fake_e4m3(p) * (fixed ? g.ws2_top : g.ws2);
    /* the quotient by the reciprocal is exact where nothing in it over- or underflows */
    bool exact = s.den >= 0x1p-70f && s.den <= 0x1p60f && largest <= s.den * 0x1p60f;
    s.inverse = !live ? (float)CQ_FAKE_ZERO : exact ? 1.0f / s.den : (float)CQ_FAKE_DIVIDE;
    float tiny = (s.den * 0x1p-100f) * 0x1p-50f; /* den / 2^150, rounded down */
    if (tiny * 0x1p100f > s.den * 0x1p-50f)
        tiny = __uint_as_float(__float_as_uint(tiny) - 1u);
    s.tiny = tiny;
    return s;
}

/// |q| rounded to E2M1 with the sign bit of `sign`, times den. Between 2^k and 2^(k+1), k = 0, 1,
/// 2, the values of E2M1 are 2^(k-1) apart, like floats that 2^(22+k) was added to; below 1 as for
/// k = 0.
__device__ __forceinline__ float cq_fake_round(float q, float sign, float den) {
    float a = fminf(fabsf(q), 6.0f);
    float e = __uint_as_float(__float_as_uint(fmaxf(a, 1.0f)) & 0x7f800000u);
    float r = fmaf(e, -0x1p22f, fmaf(e, 0x1p22f, a));
    return __uint_as_float(__float_as_uint(r) | (__float_as_uint(sign) & 0x80000000u)) * den;
}
/// x / den correctly rounded, then rounded to E2M1. x + tiny is negative exactly where the quotient
/// is below zero and not zero.
__device__ __forceinline__ float cq_fake_value(float x, const cq_fake_scale &s) {
    float q = x * s.inverse;
    q = fmaf(fmaf(-s.den, q, x), s.inverse, q);
    q = fmaf(fmaf(-s.den, q, x), s.inverse, q);
    return cq_fake_round(q, x + s.tiny, s.den);
}
__device__ __forceinline__ float cq_fake_divided(float x, const cq_fake_scale &s) {
    float q = x / s.den;
    return s.inverse == (float)CQ_FAKE_ZERO ? 0.0f
                                            : cq_fake_round(q, q < 0.0f ? -1.0f : 1.0f, s.den);
}
__device__ __forceinline__ float4 cq_fake_value4(float4 v, const cq_fake_scale &s) {
    if (s.inverse > 0.0f)
        return make_float4(cq_fake_value(v.x, s), cq_fake_value(v.y, s), cq_fake_value(v.z, s),
                           cq_fake_value(v.w, s));
    return make_float4(cq_fake_divided(v.x, s), cq_fake_divided(v.y, s), cq_fake_divided(v.z, s),
                       cq_fake_divided(v.w, s));
}
__device__ __forceinline__ float cq_max_abs4(float4 v) {
    return cq_max_nan(cq_max_nan(fabsf(v.x), fabsf(v.y)), cq_max_nan(fabsf(v.z), fabsf(v.w)));
}

/// Fake quantization of a block that one thread holds, in place; `chosen` is its block maximum, or
/// -1 (FIXED false: always the dynamic form). Returns 1 when its scale saturated.
template <bool FIXED>
__device__ __forceinline__ int cq_fake16(float v[16], const cq_fake_group &g, float chosen) {
    float largest = fabsf(v[0]);
    for (int i = 1; i < 16; i++)
        largest = cq_max_nan(largest, fabsf(v[i]));
    int saturated;
    cq_fake_scale s = cq_fake_scale_of<FIXED>(g, largest, chosen, &saturated);
    for (int i = 0; i < 16; i += 4) {
        float4 q = cq_fake_value4(make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]), s);
        v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
    }
    return saturated;
}

/// Fake quantization of the block that the sixteen lanes of half a warp hold, in the dynamic form.
/// Whole warps call it. *saturated becomes 1 in all of them when the scale saturated.
__device__ __forceinline__ float cq_fake_lanes16(float x, const cq_fake_group &g, int *saturated) {
    float largest = fabsf(x);
    for (int d = 8; d > 0; d >>= 1)
        largest = cq_max_nan(largest, __shfl_xor_sync(0xffffffffu, largest, d));
    cq_fake_scale s = cq_fake_scale_of<false>(g, largest, -1.0f, saturated);
    return s.inverse > 0.0f ? cq_fake_value(x, s) : cq_fake_divided(x, s);
}

/// Fake quantization in place of N <= 4 blocks that the four lanes of a quad (lane / 4) hold: v[k]
/// is the lane's quarter of block k. `g` and `chosen` are those of block lane % 4 (any group where
/// that is not below N). Whole warps call it. Returns 1 in the lane that saw its block saturate.
template <int N, bool FIXED>
__device__ __forceinline__ int cq_fake_quads(float4 (&v)[N], const cq_fake_group &g, float chosen) {
    const unsigned all = 0xffffffffu;
    int quad = (int)(threadIdx.x & 3u), saturated;
    float b[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        b[k] = k < N ? cq_max_abs4(v[k < N ? k : 0]) : 0.0f;
    /* four maxima over four lanes, one left in each lane */
    bool high = (quad & 2) != 0, odd = (quad & 1) != 0;
    float keep0 = high ? b[2] : b[0], keep1 = high ? b[3] : b[1];
    keep0 = cq_max_nan(keep0, __shfl_xor_sync(all, high ? b[0] : b[2], 2));
    keep1 = cq_max_nan(keep1, __shfl_xor_sync(all, high ? b[1] : b[3], 2));
    float largest = cq_max_nan(odd ? keep1 : keep0, __shfl_xor_sync(all, odd ? keep0 : keep1, 1));
    cq_fake_scale mine = cq_fake_scale_of<FIXED>(g, largest, chosen, &saturated);
#pragma unroll
    for (int k = 0; k < N; k++) {
        cq_fake_scale s;
        s.den = __shfl_sync(all, mine.den, k, 4);
        s.inverse = __shfl_sync(all, mine.inverse, k, 4);
        s.tiny = __shfl_sync(all, mine.tiny, k, 4);
        v[k] = cq_fake_value4(v[k], s);
    }
    return quad < N ? saturated : 0;
}

/// Adds the saturated blocks that the lanes of a warp counted; `counter` may be NULL. Whole warps.
__device__ __forceinline__ void cq_fake_count(int64_t *counter, int saturated) {
    if (!counter || !__ballot_sync(0xffffffffu, saturated != 0))
        return;
    for (int d = 16; d > 0; d >>= 1)
        saturated += __shfl_xor_sync(0xffffffffu, saturated, d);
    if (threadIdx.x % CQ_WARP == 0)
        atomicAdd((unsigned long long *)counter, (unsigned long long)saturated);
}

/// Division by a constant that the host prepares, for dividends below 2^32; larger ones are
/// divided.
struct cq_divider {
    int64_t by;
    uint32_t multiplier, shift;
};
static inline cq_divider cq_divider_make(int64_t by) {
    cq_divider d = {by, 0, 0};
    if (by <= 1 || by >= (int64_t)1 << 31)
        return d;
    uint32_t bits = 0;
    while (((int64_t)1 << bits) < by)
        bits++;
    d.multiplier = (uint32_t)(((uint64_t)(((int64_t)1 << bits) - by) << 32) / (uint64_t)by + 1u);
    d.shift = bits - 1;
    return d;
}
__device__ __forceinline__ int64_t cq_divide(int64_t n, const cq_divider &d) {
    if (d.multiplier == 0 || (n >> 32) != 0)
        return d.by == 1 ? n : n / d.by;
    uint32_t low = (uint32_t)n, t = (uint32_t)(((uint64_t)d.multiplier * low) >> 32);
    return (int64_t)((t + ((low - t) >> 1)) >> d.shift);
}

/// Dense rows of a multiple of 4 columns, stored as T (float or BF16), written plain, quantized or
/// both.
template <typename T> struct cq_fake_job {
    T *plain, *quantized;    ///< either may be NULL
    cq_fq fq;                ///< fq.amax NULL: `quantized` is a copy; else a multiple of 16 columns
    const float *block_amax; ///< static form, or NULL
    float top;
    int64_t quarters; ///< rows * columns / 4
    int64_t columns;  ///< of a row, / 4
    bool aligned;     ///< four values of both results can be stored at once
};
enum { CQ_FAKE_THREADS = 256, CQ_FAKE_STEPS = 4 };

/// The kernel: source(quarter) gives elements 4 quarter .. 4 quarter + 3 as a float4. A warp works
/// on 128 quarters in a row, a lane on four of them, 32 apart. Bytes: what the source reads, and
/// sizeof(T) per element and result; at 4 TB/s and 8 bytes per element the SM has 59 instructions
/// for each.
template <bool FIXED, typename T, typename Source>
__global__ void __launch_bounds__(CQ_FAKE_THREADS) cq_fake_flat(Source source, cq_fake_job<T> job) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t warp = ((int64_t)blockIdx.x * CQ_FAKE_THREADS + threadIdx.x) / CQ_WARP;
    int64_t first = warp * CQ_WARP * CQ_FAKE_STEPS;
    if (first >= job.quarters) /* the whole warp */
        return;
    float4 v[CQ_FAKE_STEPS];
#pragma unroll
    for (int k = 0; k < CQ_FAKE_STEPS; k++) {
        int64_t at = first + k * CQ_WARP + lane;
        v[k] = at < job.quarters ? source(at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (job.plain) {
#pragma unroll
        for (int k = 0; k < CQ_FAKE_STEPS; k++) {
            int64_t at = first + k * CQ_WARP + lane;
            if (at < job.quarters)
                cq_store4(job.plain + 4 * at, v[k], job.aligned);
        }
    }
    if (!job.quantized)
        return;
    if (job.fq.amax) {
        /* the block whose scale this lane works out */
        int64_t own = first + (lane & 3) * CQ_WARP + (lane & ~3);
        own = own < job.quarters ? own : job.quarters - 1;
        int64_t group = 0;
        if (job.fq.offsets && job.fq.n_groups > 1) {
            group = cq_warp_group_of_row(job.fq.offsets, job.fq.n_groups, first, job.columns);
            group = cq_group_onwards(job.fq.offsets, job.fq.n_groups, group, own, job.columns);
        }
        cq_fake_group g = cq_fake_group_of(job.fq, group, job.top);
        float chosen = FIXED ? job.block_amax[own / 4] : -1.0f;
        int saturated = cq_fake_quads<CQ_FAKE_STEPS, FIXED>(v, g, chosen);
        cq_fake_count(job.fq.saturated, saturated);
    }
#pragma unroll
    for (int k = 0; k < CQ_FAKE_STEPS; k++) {
        int64_t at = first + k * CQ_WARP + lane;
        if (at < job.quarters)
            cq_store4(job.quantized + 4 * at, v[k], job.aligned);
    }
}

/// Fills a job for rows of `columns` (a multiple of 4) and launches it.
template <typename T>
static inline cq_fake_job<T> cq_fake_job_make(int64_t rows, int64_t columns, void *plain,
                                              void *quantized, const cq_fq &fq) {
    cq_fake_job<T> job = {};
    job.plain = (T *)plain;
    job.quantized = (T *)quantized;
    job.fq = fq;
    job.top = 448.0f;
    job.quarters = rows * (columns / 4);
    job.columns = columns / 4;
    job.aligned = cq_aligned4<T>(plain) && cq_aligned4<T>(quantized);
    return job;
}
template <bool FIXED, typename T, typename Source>
static inline void cq_fake_launch(cq_stream *s, const Source &source, const cq_fake_job<T> &job) {
    if (job.quarters <= 0)
        return;
    unsigned blocks = cq_blocks(job.quarters, (int64_t)CQ_FAKE_THREADS * CQ_FAKE_STEPS);
    CQ_LAUNCH((cq_fake_flat<FIXED, T, Source>), blocks, CQ_FAKE_THREADS, 0, s, source, job);
}

/// Source: dense values.
template <typename T> struct cq_fake_dense {
    const T *x;
    bool aligned;
    __device__ __forceinline__ float4 operator()(int64_t quarter) const {
        return cq_load4(x + 4 * quarter, aligned);
    }
};

/// CQ_OK, or the error that ref gives for rows that are no whole blocks.
static inline int cq_fake_columns(const cq_fq &fq, int64_t columns) {
    if (fq.amax && columns % 16)
        return cq_fail(CQ_ESHAPE, "fake quantization: rows of %lld, wanted a multiple of 16",
                       (long long)columns);
    return CQ_OK;
}
