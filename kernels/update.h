/// update.h - what the host backends share of AdamW over narrow weights and moments: a block of at
/// most 256 values, widened to F32 and stored again (kernels/formats.h).
///
/// `at` is a multiple of 256. Loops without branches, so that a compiler makes vector code of them.
#pragma once
#include "core/base/error.h"
#include "kernels/formats.h"
#include "kernels/kernels.h"
#include <math.h>

/// The numbers of a step: those given, or of the arguments.
static inline cq_adamw_now cq_update_now(const cq_adamw_args *a) {
    if (a->now)
        return *a->now;
    return (cq_adamw_now){.lr = (float)a->lr,
                          .grad_scale = (float)a->grad_scale,
                          .c1 = (float)(1.0 - pow(a->beta1, (double)a->step)),
                          .c2 = (float)(1.0 - pow(a->beta2, (double)a->step)),
                          .key = a->key};
}

/// CQ_OK, or CQ_EUSAGE for arguments that no backend takes.
static inline int cq_update_check(const cq_adamw_args *a) {
    if (!a->now && a->step < 1)
        return cq_fail(CQ_EUSAGE, "adamw: step %lld, wanted 1 or more", (long long)a->step);
    if (a->master == CQ_MASTER_F32 && a->moments == CQ_MOMENTS_F32)
        return CQ_OK;
    if (a->dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "adamw: dtype is %s, wanted F32 for narrow weights or moments",
                       cq_dtype_name(a->dtype));
    if (a->first % CQ_MOMENT_BLOCK)
        return cq_fail(CQ_EUSAGE, "adamw: first element is %lld, wanted a multiple of 256",
                       (long long)a->first);
    if (a->wq && a->fq.offsets && a->fq.n_groups > 1)
        return cq_fail(CQ_EUSAGE, "adamw: %lld groups, wanted one for narrow weights or moments",
                       (long long)a->fq.n_groups);
    return CQ_OK;
}

static inline void cq_update_read(const cq_adamw_args *a, int64_t at, int64_t n, float *restrict w,
                                  float *restrict m, float *restrict v) {
    const uint16_t *high = (const uint16_t *)a->w + at, *low = (const uint16_t *)a->low + at;
    const uint16_t *m16 = (const uint16_t *)a->m + at, *v16 = (const uint16_t *)a->v + at;
    const uint8_t *m8 = (const uint8_t *)a->m + at, *v8 = (const uint8_t *)a->v + at;
    if (a->master == CQ_MASTER_F32)
        memcpy(w, (const float *)a->w + at, (size_t)n * sizeof(float));
    else if (a->master == CQ_MASTER_BF16)
        for (int64_t i = 0; i < n; i++)
            w[i] = cq_bf16_value(high[i]);
    else
        for (int64_t i = 0; i < n; i++)
            w[i] = cq_split_join(high[i], low[i]);
    if (a->moments == CQ_MOMENTS_F32) {
        memcpy(m, (const float *)a->m + at, (size_t)n * sizeof(float));
        memcpy(v, (const float *)a->v + at, (size_t)n * sizeof(float));
    } else if (a->moments == CQ_MOMENTS_BF16) {
        for (int64_t i = 0; i < n; i++)
            m[i] = cq_bf16_value(m16[i]), v[i] = cq_bf16_value(v16[i]);
    } else {
        float sm = a->m_scale[at / CQ_MOMENT_BLOCK], sv = a->v_scale[at / CQ_MOMENT_BLOCK];
        for (int64_t i = 0; i < n; i++)
            m[i] = cq_moment_m_decode(m8[i], sm), v[i] = cq_moment_v_decode(v8[i], sv);
    }
}

static inline void cq_update_write_8(const cq_adamw_args *a, int64_t at, int64_t n,
                                     const float *restrict m, const float *restrict v,
                                     const uint32_t *restrict dither) {
    uint8_t *restrict m8 = (uint8_t *)a->m + at, *restrict v8 = (uint8_t *)a->v + at;
    float root[CQ_MOMENT_BLOCK];
    uint32_t top_m = 0, top_v = 0;
    for (int64_t i = 0; i < n; i++) {
        root[i] = sqrtf(v[i]);
        uint32_t um = cq_float_bits(m[i]) & 0x7fffffffu, uv = cq_float_bits(root[i]) & 0x7fffffffu;
        top_m = um > top_m ? um : top_m;
        top_v = uv > top_v ? uv : top_v;
    }
    float sm = cq_moment_scale(top_m, CQ_MOMENT_M), sv = cq_moment_scale(top_v, CQ_MOMENT_V);
    a->m_scale[at / CQ_MOMENT_BLOCK] = sm;
    a->v_scale[at / CQ_MOMENT_BLOCK] = sv;
    for (int64_t i = 0; i < n; i++) {
        m8[i] = cq_moment_m_encode(m[i], sm, dither[i] & 0xffffu);
        v8[i] = cq_moment_v_encode(root[i], sv, cq_dither_v(dither[i]));
    }
}

/// Stores the new values; w becomes what was stored.
static inline void cq_update_write(const cq_adamw_args *a, int64_t at, int64_t n, float *restrict w,
                                   const float *restrict m, const float *restrict v) {
    uint16_t *restrict high = (uint16_t *)a->w + at, *restrict low = (uint16_t *)a->low + at;
    uint16_t *restrict m16 = (uint16_t *)a->m + at, *restrict v16 = (uint16_t *)a->v + at;
    uint32_t dither[CQ_MOMENT_BLOCK];
    uint64_t key = a->now ? a->now->key : a->key;
    for (int64_t i = 0; i < n; i++)
        dither[i] = cq_dither(key, a->first + at + i);
    if (a->master == CQ_MASTER_F32)
        memcpy((float *)a->w + at, w, (size_t)n * sizeof(float));
    else if (a->master == CQ_MASTER_BF16)
        for (int64_t i = 0; i < n; i++) {
            high[i] = cq_bf16_dithered(w[i], dither[i] >> 16);
            w[i] = cq_bf16_value(high[i]);
        }
    else
        for (int64_t i = 0; i < n; i++)
            high[i] = cq_split_high(w[i]), low[i] = cq_split_low(w[i]);
    if (a->moments == CQ_MOMENTS_F32) {
        memcpy((float *)a->m + at, m, (size_t)n * sizeof(float));
        memcpy((float *)a->v + at, v, (size_t)n * sizeof(float));
    } else if (a->moments == CQ_MOMENTS_BF16) {
        for (int64_t i = 0; i < n; i++) {
            m16[i] = cq_bf16_dithered(m[i], dither[i] & 0xffffu);
            v16[i] = cq_bf16_dithered(v[i], cq_dither_v(dither[i]));
        }
    } else
        cq_update_write_8(a, at, n, m, v, dither);
}
