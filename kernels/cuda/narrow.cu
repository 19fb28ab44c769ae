/// narrow.cu - AdamW over weights and moments in fewer bits (kernels/formats.h), and widening.
///
/// Qwen3-4B, the 3.6e9 linear parameters, BF16 weights and 8-bit moments: w, m, v read and written,
/// g read, wq written: 16 bytes each instead of 32, 58 GB, 14 ms at 4.3 TB/s. Bound by memory: two
/// hashes and two codes are about 90 integer operations a value, and the SM has 118 instructions
/// for each at that rate.
#include "kernels/cuda/adam.cuh"
#include "kernels/cuda/fake.cuh"
#include "kernels/formats.h"

namespace {

enum { THREADS = 256, STEPS = 4, EACH = 4, SPAN = CQ_WARP * EACH };

struct narrow_job {
    cq_adam_numbers numbers;
    void *w, *m, *v;
    uint16_t *low;
    float *m_scale, *v_scale, *wq;
    const float *g, *block_amax;
    cq_fq fq;
    float top;
    int64_t n, first;
    uint64_t key;
    bool aligned; ///< four values of each buffer lie on a boundary of their size
};

/// Four values from element `at`; those from n on are 0.
__device__ __forceinline__ void load_floats(float x[EACH], const float *p, int64_t at, int64_t n,
                                            bool aligned) {
    if (aligned && at + EACH <= n) {
        float4 v = *(const float4 *)(p + at);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        return;
    }
    for (int i = 0; i < EACH; i++)
        x[i] = at + i < n ? p[at + i] : 0.0f;
}
__device__ __forceinline__ void store_floats(float *p, const float x[EACH], int64_t at, int64_t n,
                                             bool aligned) {
    if (aligned && at + EACH <= n)
        *(float4 *)(p + at) = make_float4(x[0], x[1], x[2], x[3]);
    else
        for (int i = 0; i < EACH; i++)
            if (at + i < n)
                p[at + i] = x[i];
}
/// Four integers of type T as the parts of one U.
template <typename T, typename U>
__device__ __forceinline__ U load_bits(const void *p, int64_t at, int64_t n, bool aligned) {
    const T *x = (const T *)p;
    if (aligned && at + EACH <= n)
        return *(const U *)(x + at);
    U all = 0;
    for (int i = 0; i < EACH; i++)
        all |= at + i < n ? (U)x[at + i] << (8 * (int)sizeof(T) * i) : 0;
    return all;
}
template <typename T, typename U>
__device__ __forceinline__ void store_bits(void *p, U all, int64_t at, int64_t n, bool aligned) {
    T *x = (T *)p;
    if (aligned && at + EACH <= n)
        *(U *)(x + at) = all;
    else
        for (int i = 0; i < EACH; i++)
            if (at + i < n)
                x[at + i] = (T)(all >> (8 * (int)sizeof(T) * i));
}

__device__ __forceinline__ uint16_t part(uint64_t all, int i) { return (uint16_t)(all >> 16 * i); }
__device__ __forceinline__ uint8_t byte_of(uint32_t all, int i) { return (uint8_t)(all >> 8 * i); }

template <int MASTER>
__device__ __forceinline__ void read_master(float w[EACH], const narrow_job &j, int64_t at) {
    if (MASTER == CQ_MASTER_F32) {
        load_floats(w, (const float *)j.w, at, j.n, j.aligned);
        return;
    }
    uint64_t high = load_bits<uint16_t, uint64_t>(j.w, at, j.n, j.aligned), low = 0;
    if (MASTER == CQ_MASTER_SPLIT)
        low = load_bits<uint16_t, uint64_t>(j.low, at, j.n, j.aligned);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        w[i] = MASTER == CQ_MASTER_SPLIT ? cq_split_join(part(high, i), part(low, i))
                                         : cq_bf16_value(part(high, i));
}
/// Stores w, which becomes what was stored.
template <int MASTER>
__device__ __forceinline__ void write_master(float w[EACH], const narrow_job &j, int64_t at,
                                             const uint32_t dither[EACH]) {
    if (MASTER == CQ_MASTER_F32) {
        store_floats((float *)j.w, w, at, j.n, j.aligned);
        return;
    }
    uint64_t high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        uint16_t h = MASTER == CQ_MASTER_SPLIT ? cq_split_high(w[i])
                                               : cq_bf16_dithered(w[i], dither[i] >> 16);
        high |= (uint64_t)h << 16 * i;
        low |= (uint64_t)cq_split_low(w[i]) << 16 * i;
        if (MASTER == CQ_MASTER_BF16)
            w[i] = cq_bf16_value(h);
    }
    store_bits<uint16_t, uint64_t>(j.w, high, at, j.n, j.aligned);
    if (MASTER == CQ_MASTER_SPLIT)
        store_bits<uint16_t, uint64_t>(j.low, low, at, j.n, j.aligned);
}

template <int MOMENTS>
__device__ __forceinline__ void read_moments(float m[EACH], float v[EACH], const narrow_job &j,
                                             int64_t at) {
    if (MOMENTS == CQ_MOMENTS_F32) {
        load_floats(m, (const float *)j.m, at, j.n, j.aligned);
        load_floats(v, (const float *)j.v, at, j.n, j.aligned);
    } else if (MOMENTS == CQ_MOMENTS_BF16) {
        uint64_t mm = load_bits<uint16_t, uint64_t>(j.m, at, j.n, j.aligned);
        uint64_t vv = load_bits<uint16_t, uint64_t>(j.v, at, j.n, j.aligned);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            m[i] = cq_bf16_value(part(mm, i)), v[i] = cq_bf16_value(part(vv, i));
    } else {
        uint32_t mm = load_bits<uint8_t, uint32_t>(j.m, at, j.n, j.aligned);
        uint32_t vv = load_bits<uint8_t, uint32_t>(j.v, at, j.n, j.aligned);
        bool any = at < j.n;
        float sm = any ? j.m_scale[at / CQ_MOMENT_BLOCK] : 0.0f;
        float sv = any ? j.v_scale[at / CQ_MOMENT_BLOCK] : 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            m[i] = cq_moment_m_decode(byte_of(mm, i), sm),
            v[i] = cq_moment_v_decode(byte_of(vv, i), sv);
    }
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
    for (int d = 16; d > 0; d >>= 1) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, x, d);
        x = x > other ? x : other;
    }
    return x;
}
/// The scale of the block that a warp holds in two steps of x.
__device__ __forceinline__ float scale_of(const float (&x)[STEPS][EACH], int step, int bits) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 2 * EACH; i++) {
        uint32_t u = cq_float_bits(x[step + i / EACH][i % EACH]) & 0x7fffffffu;
        top = top > u ? top : u;
    }
    return cq_moment_scale(warp_max(top), bits);
}

/// Stores the moments of a warp's four steps, two blocks of 256. Whole warps.
template <int MOMENTS>
__device__ __forceinline__ void write_moments(float (&m)[STEPS][EACH], float (&v)[STEPS][EACH],
                                              const narrow_job &j, int64_t at,
                                              const uint32_t (&dither)[STEPS][EACH]) {
    if (MOMENTS == CQ_MOMENTS_8BIT) {
        __syncwarp(); /* lane 0 writes the scales that all lanes have read */
#pragma unroll
        for (int k = 0; k < STEPS; k++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                v[k][i] = sqrtf(v[k][i]);
    }
#pragma unroll
    for (int b = 0; b < STEPS; b += 2) {
        float sm = 0.0f, sv = 0.0f;
        if (MOMENTS == CQ_MOMENTS_8BIT) {
            sm = scale_of(m, b, CQ_MOMENT_M);
            sv = scale_of(v, b, CQ_MOMENT_V);
            int64_t first = at + b * SPAN; /* of this lane; the block's is lane 0's */
            if (threadIdx.x % CQ_WARP == 0 && first < j.n) {
                j.m_scale[first / CQ_MOMENT_BLOCK] = sm;
                j.v_scale[first / CQ_MOMENT_BLOCK] = sv;
            }
        }
#pragma unroll
        for (int k = b; k < b + 2; k++) {
            int64_t from = at + k * SPAN;
            if (MOMENTS == CQ_MOMENTS_F32) {
                store_floats((float *)j.m, m[k], from, j.n, j.aligned);
                store_floats((float *)j.v, v[k], from, j.n, j.aligned);
                continue;
            }
            uint64_t mm = 0, vv = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                uint32_t rm = dither[k][i] & 0xffffu, rv = cq_dither_v(dither[k][i]);
                if (MOMENTS == CQ_MOMENTS_BF16) {
                    mm |= (uint64_t)cq_bf16_dithered(m[k][i], rm) << 16 * i;
                    vv |= (uint64_t)cq_bf16_dithered(v[k][i], rv) << 16 * i;
                } else {
                    mm |= (uint64_t)cq_moment_m_encode(m[k][i], sm, rm) << 8 * i;
                    vv |= (uint64_t)cq_moment_v_encode(v[k][i], sv, rv) << 8 * i;
                }
            }
            if (MOMENTS == CQ_MOMENTS_BF16) {
                store_bits<uint16_t, uint64_t>(j.m, mm, from, j.n, j.aligned);
                store_bits<uint16_t, uint64_t>(j.v, vv, from, j.n, j.aligned);
            } else {
                store_bits<uint8_t, uint32_t>(j.m, (uint32_t)mm, from, j.n, j.aligned);
                store_bits<uint8_t, uint32_t>(j.v, (uint32_t)vv, from, j.n, j.aligned);
            }
        }
    }
}

/// wq of a warp's values, quantized as in cq_fake_flat (one group). Whole warps.
template <bool FIXED>
__device__ __forceinline__ void write_quantized(const float (&w)[STEPS][EACH], const narrow_job &j,
                                                int64_t base, int lane) {
    float4 v[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        v[k] = make_float4(w[k][0], w[k][1], w[k][2], w[k][3]);
    if (j.fq.amax) {
        int64_t own = base + (lane & 3) * SPAN + (lane & ~3) * EACH;
        float chosen = FIXED ? j.block_amax[(own < j.n ? own : j.n - 1) / 16] : -1.0f;
        cq_fake_group g = cq_fake_group_of(j.fq, 0, j.top);
        int saturated = cq_fake_quads<STEPS, FIXED>(v, g, chosen);
        cq_fake_count(j.fq.saturated, saturated);
    }
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        float x[EACH] = {v[k].x, v[k].y, v[k].z, v[k].w};
        store_floats(j.wq, x, base + k * SPAN + lane * EACH, j.n, j.aligned);
    }
}

/// A warp has 512 values in a row, a lane four of them in each of four steps of 128.
template <int MASTER, int MOMENTS, bool FIXED>
__global__ void __launch_bounds__(THREADS) adam_narrow(narrow_job j) {
    int lane = (int)(threadIdx.x % CQ_WARP);
    int64_t warp = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / CQ_WARP;
    int64_t base = warp * SPAN * STEPS, at = base + lane * EACH;
    if (base >= j.n) /* the whole warp */
        return;
    float w[STEPS][EACH], m[STEPS][EACH], v[STEPS][EACH];
    uint32_t dither[STEPS][EACH];
    cq_adam_numbers numbers = cq_adam_read(j.numbers);
    uint64_t key = numbers.now ? numbers.now->key : j.key;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int64_t from = at + k * SPAN;
        float g[EACH];
        read_master<MASTER>(w[k], j, from);
        read_moments<MOMENTS>(m[k], v[k], j, from);
        load_floats(g, j.g, from, j.n, j.aligned);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            w[k][i] = cq_adam_value(numbers, w[k][i], m[k][i], v[k][i], g[i]);
            dither[k][i] = cq_dither(key, j.first + from + i);
            if (from + i >= j.n)
                w[k][i] = m[k][i] = v[k][i] = 0.0f;
        }
        write_master<MASTER>(w[k], j, from, dither[k]);
    }
    write_moments<MOMENTS>(m, v, j, at, dither);
    if (j.wq)
        write_quantized<FIXED>(w, j, base, lane);
}

template <int MASTER, int MOMENTS> void launch(cq_stream *s, const narrow_job &j) {
    unsigned blocks = cq_blocks(j.n, (int64_t)THREADS * STEPS * EACH);
    if (j.block_amax)
        CQ_LAUNCH((adam_narrow<MASTER, MOMENTS, true>), blocks, THREADS, 0, s, j);
    else
        CQ_LAUNCH((adam_narrow<MASTER, MOMENTS, false>), blocks, THREADS, 0, s, j);
}
template <int MASTER> void launch_moments(cq_stream *s, const narrow_job &j, cq_moments moments) {
    if (moments == CQ_MOMENTS_F32)
        launch<MASTER, CQ_MOMENTS_F32>(s, j);
    else if (moments == CQ_MOMENTS_BF16)
        launch<MASTER, CQ_MOMENTS_BF16>(s, j);
    else
        launch<MASTER, CQ_MOMENTS_8BIT>(s, j);
}

bool on_boundary(const void *p, int64_t bytes) { return (uintptr_t)p % (uintptr_t)bytes == 0; }

/// 6 bytes a value, 8 with low halves: the 50 M of Qwen3-4B's gate and up in 70 or 93 us at 4.3
/// TB/s.
__global__ void __launch_bounds__(THREADS)
    widen_four(const uint16_t *x, const uint16_t *low, float *y, int64_t n, bool aligned) {
    int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    if (at >= n)
        return;
    uint64_t high = load_bits<uint16_t, uint64_t>(x, at, n, aligned);
    uint64_t rest = low ? load_bits<uint16_t, uint64_t>(low, at, n, aligned) : 0;
    float v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        v[i] = low ? cq_split_join(part(high, i), part(rest, i)) : cq_bf16_value(part(high, i));
    store_floats(y, v, at, n, aligned);
}

} // namespace

int cq_cuda_adamw_narrow(cq_stream *s, const cq_adamw_args *a) {
    if (a->first % CQ_MOMENT_BLOCK)
        return cq_fail(CQ_EUSAGE, "adamw: first element is %lld, wanted a multiple of 256",
                       (long long)a->first);
    if (a->wq && a->fq.offsets && a->fq.n_groups > 1)
        return cq_fail(CQ_EUSAGE, "adamw: %lld groups, wanted one for narrow weights or moments",
                       (long long)a->fq.n_groups);
    narrow_job j = {};
    j.numbers = cq_adam_numbers_of(a);
    j.w = a->w, j.m = a->m, j.v = a->v;
    j.low = (uint16_t *)a->low;
    j.m_scale = a->m_scale, j.v_scale = a->v_scale;
    j.wq = (float *)a->wq;
    j.g = (const float *)a->g;
    j.block_amax = a->block_amax;
    j.fq = a->fq;
    j.top = a->block_amax ? a->top : 448.0f;
    j.n = a->rows * a->cols;
    j.first = a->first;
    j.key = a->key;
    int64_t moment = a->moments == CQ_MOMENTS_F32 ? 16 : a->moments == CQ_MOMENTS_BF16 ? 8 : 4;
    j.aligned = on_boundary(a->w, a->master == CQ_MASTER_F32 ? 16 : 8) && on_boundary(a->low, 8) &&
                on_boundary(a->m, moment) && on_boundary(a->v, moment) && cq_aligned16(a->g) &&
                cq_aligned16(a->wq);
    if (j.n < 1)
        return CQ_OK;
    if (a->master == CQ_MASTER_F32)
        launch_moments<CQ_MASTER_F32>(s, j, a->moments);
    else if (a->master == CQ_MASTER_SPLIT)
        launch_moments<CQ_MASTER_SPLIT>(s, j, a->moments);
    else
        launch_moments<CQ_MASTER_BF16>(s, j, a->moments);
    CQ_CUDA_END("adamw");
}

extern "C" int cq_cuda_widen(cq_stream *s, const cq_widen_args *a) {
    CQ_CUDA_F32("widen", a);
    if (a->n < 1)
        return CQ_OK;
    CQ_LAUNCH(widen_four, cq_blocks(a->n, THREADS * EACH), THREADS, 0, s, (const uint16_t *)a->x,
              (const uint16_t *)a->low, (float *)a->y, a->n,
              on_boundary(a->x, 8) && on_boundary(a->low, 8) && cq_aligned16(a->y));
    CQ_CUDA_END("widen");
}
