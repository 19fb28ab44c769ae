/// dtype.c - element types, and exact conversion between the float ones.
///
/// Every float type but F64 fits F32, so F32 is the road between them: widening is exact, narrowing
/// is one rounding to nearest even. F64 goes to a type narrower than F32 by way of an F32 rounded
/// to odd, which keeps a sticky last bit; F32 has at least two bits more than any of them, so the
/// second rounding gives what one would (Boldo and Melquiond 2008, doi 10.1109/TC.2007.70819). NaN
/// stays NaN. E4M3 has no infinity: what is beyond 448 saturates. Pointers need no alignment; this
/// is how tensors inside files are read.
#include "core/base/dtype.h"
#include "core/base/error.h"
#include "kernels/nvfp4.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

enum { CHUNK = 512 };

static const struct {
    const char *name;
    int64_t bytes;
    bool is_float;
} types[CQ_N_DTYPES] = {
    [CQ_F32] = {"F32", 4, true},         [CQ_F64] = {"F64", 8, true},
    [CQ_BF16] = {"BF16", 2, true},       [CQ_F16] = {"F16", 2, true},
    [CQ_F8_E4M3] = {"F8_E4M3", 1, true}, [CQ_U8] = {"U8", 1, false},
    [CQ_I32] = {"I32", 4, false},        [CQ_I64] = {"I64", 8, false},
};

static bool known(cq_dtype t) { return (unsigned)t < CQ_N_DTYPES; }

int64_t cq_dtype_bytes(cq_dtype dtype) { return known(dtype) ? types[dtype].bytes : 0; }

const char *cq_dtype_name(cq_dtype dtype) { return known(dtype) ? types[dtype].name : "?"; }

bool cq_dtype_find(cq_dtype *out, const char *name) {
    for (int i = 0; i < CQ_N_DTYPES; i++) {
        if (strcmp(types[i].name, name) == 0) {
            *out = (cq_dtype)i;
            return true;
        }
    }
    return false;
}

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static uint16_t bf16_of(float f) {
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u); /* quiet: the payload may lie in the low half */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static uint16_t f16_of(float f) {
    uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((u >> 13) & 0x1ffu));
    if (u >= 0x477ff000u) /* 65520: the midpoint above the largest, and its tie goes to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (u < 0x38800000u) /* below 2^-14: a multiple of 2^-24; adding 0.5 rounds to that grid */
        return (uint16_t)(sign | (bits_of(float_of(u) + 0.5f) - 0x3f000000u));
    u += 0xfffu + ((u >> 13) & 1u);
    return (uint16_t)(sign | ((u - (112u << 23)) >> 13));
}

static float f16_to(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31u)
        return float_of(sign | 0x7f800000u | (m << 13));
    if (e == 0u)
        return float_of(sign | bits_of((float)m * 0x1p-24f));
    return float_of(sign | ((e + 112u) << 23) | (m << 13));
}

static uint8_t e4m3_of(float f) {
    return (uint8_t)(cq_e4m3_encode(fabsf(f)) | ((bits_of(f) >> 24) & 0x80u));
}

/// The F32 beside d whose last bit is 1 unless d itself is an F32.
static float f32_odd(double d) {
    float f = (float)d;
    if ((double)f == d || d != d)
        return f;
    uint32_t u = bits_of(f);
    if (fabs((double)f) > fabs(d))
        u--; /* towards zero */
    return float_of(u | 1u);
}

/// Most of what is ever loaded.
static void load_bf16(float *to, const char *at, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, at + 2 * i, 2);
        to[i] = float_of((uint32_t)h << 16);
    }
}

static void load(float *to, const void *from, cq_dtype t, int64_t n, bool odd) {
    const char *at = from;
    if (t == CQ_BF16) {
        load_bf16(to, at, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        double d;
        switch (t) {
        case CQ_F64:
            memcpy(&d, at + 8 * i, 8);
            to[i] = odd ? f32_odd(d) : (float)d;
            break;
        case CQ_F16:
            memcpy(&h, at + 2 * i, 2);
            to[i] = f16_to(h);
            break;
        case CQ_F8_E4M3:
            to[i] = cq_e4m3_decode((uint8_t)at[i]);
            break;
        default:
            memcpy(to + i, at + 4 * i, 4);
        }
    }
}

static void store(void *to, cq_dtype t, const float *from, int64_t n) {
    char *at = to;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        double d;
        switch (t) {
        case CQ_F64:
            d = (double)from[i];
            memcpy(at + 8 * i, &d, 8);
            break;
        case CQ_BF16:
            h = bf16_of(from[i]);
            memcpy(at + 2 * i, &h, 2);
            break;
        case CQ_F16:
            h = f16_of(from[i]);
            memcpy(at + 2 * i, &h, 2);
            break;
        case CQ_F8_E4M3:
            at[i] = (char)e4m3_of(from[i]);
            break;
        default:
            memcpy(at + 4 * i, from + i, 4);
        }
    }
}

int cq_convert(void *to, cq_dtype to_dtype, const void *from, cq_dtype from_dtype, int64_t n) {
    if (!known(to_dtype) || !known(from_dtype) || n < 0)
        return cq_fail(CQ_EUSAGE, "convert: %ld elements of dtype %d to %d", (long)n,
                       (int)from_dtype, (int)to_dtype);
    if (n == 0)
        return CQ_OK;
    if (to_dtype == from_dtype) {
        memcpy(to, from, (size_t)(n * cq_dtype_bytes(to_dtype)));
        return CQ_OK;
    }
    if (!types[to_dtype].is_float || !types[from_dtype].is_float)
        return cq_fail(CQ_EUSAGE, "convert: %s to %s, wanted two float dtypes or twice the same",
                       cq_dtype_name(from_dtype), cq_dtype_name(to_dtype));
    if (to_dtype == CQ_F32 && (uintptr_t)to % sizeof(float) == 0) {
        load(to, from, from_dtype, n, false);
        return CQ_OK;
    }
    float chunk[CHUNK];
    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t part = n - i < CHUNK ? n - i : CHUNK;
        load(chunk, (const char *)from + i * cq_dtype_bytes(from_dtype), from_dtype, part,
             to_dtype != CQ_F32);
        store((char *)to + i * cq_dtype_bytes(to_dtype), to_dtype, chunk, part);
    }
    return CQ_OK;
}
