/// pack.cu - NVFP4 codes of matrices, and matrices from codes; the codec is kernels/nvfp4.h.
///
/// unpack: expert weights of a block of Nano, 128 x 1856 x 2688 = 638 M values: 0.36 GB of codes
/// and scales in, 1.28 GB of BF16 out: 0.41 ms at 4 TB/s; gate and up of a block of Qwen3-4B, 50 M
/// values: 32 us. About 5 instructions a value. pack: 4.56 bytes a value, once per optimizer step;
/// all 3.6 B quantized values of Qwen3-4B: 16.6 GB, 4.1 ms; about 20 instructions a value.
#include "kernels/cuda/fake.cuh"

namespace {

enum { THREADS = 256, EACH = 8 };

/// One thread takes one block of 16.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    pack(int64_t blocks, const T *x, cq_fq fq, const float *block_amax, float top, uint8_t *codes,
         uint8_t *scales, bool aligned) {
    int64_t b = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int saturated = 0;
    if (b < blocks) {
        float v[16], amax = *fq.amax, ws2 = cq_nvfp4_tensor_scale(amax, block_amax ? top : 448.0f);
        __align__(8) uint8_t bytes[8];
        for (int i = 0; i < 16; i += 4) {
            float4 q = cq_load4(x + 16 * b + i, aligned);
            v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
        }
        bool live = amax > 0.0f;
        uint8_t s8 = 0x38;
        if (live && block_amax)
            s8 = cq_nvfp4_scale_static(block_amax[b], amax, top);
        else if (live)
            s8 = cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(v), ws2, &saturated);
        cq_nvfp4_block_encode(bytes, v, s8, ws2);
        for (int i = 0; i < 8; i++)
            codes[8 * b + i] = live ? bytes[i] : 0;
        scales[b] = s8;
    }
    cq_fake_count(fq.saturated, saturated);
}

template <typename T> void launch_pack(cq_stream *s, const cq_pack_args *a) {
    int64_t blocks = a->rows * a->cols / 16;
    if (blocks > 0)
        CQ_LAUNCH((pack<T>), cq_blocks(blocks, THREADS), THREADS, 0, s, blocks, (const T *)a->x,
                  a->fq, a->block_amax, a->top, a->codes, a->scales, cq_aligned16(a->x));
}

/// A magnitude in the lowest two bits of the exponent and the highest of the fraction is that value
/// times 2^-126, subnormal or not.
__device__ __forceinline__ float decoded(uint32_t code, float den) {
    float v = __uint_as_float((code & 7u) << 22) * 0x1p126f;
    return __uint_as_float(__float_as_uint(v) | (code & 8u) << 28) * den;
}

/// Eight values a thread: two threads share a block of 16.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    unpack(int64_t eights, cq_divider per_group, const uint8_t *codes, const uint8_t *scales,
           const float *amax, const int64_t *offsets, float top, T *y, bool aligned) {
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= eights)
        return;
    int64_t g = cq_divide(at, per_group);
    if (offsets && offsets[g] == offsets[g + 1])
        return;
    uint32_t word = 0;
    if (aligned)
        word = *(const uint32_t *)(codes + 4 * at);
    else
        for (int i = 0; i < 4; i++)
            word |= (uint32_t)codes[4 * at + i] << (8 * i);
    float ws2 = cq_nvfp4_tensor_scale(amax[g], top);
    float den = cq_e4m3_decode(scales[at / 2]) * ws2, v[EACH];
    for (int i = 0; i < EACH; i++)
        v[i] = decoded(word >> (4 * i), den);
    cq_store4(y + EACH * at, make_float4(v[0], v[1], v[2], v[3]), aligned);
    cq_store4(y + EACH * at + 4, make_float4(v[4], v[5], v[6], v[7]), aligned);
}

template <typename T> void launch_unpack(cq_stream *s, const cq_unpack_args *a) {
    int64_t eights = a->rows * a->cols / EACH;
    bool aligned = (((uintptr_t)a->y | (uintptr_t)a->codes) & 15) == 0;
    if (eights > 0)
        CQ_LAUNCH((unpack<T>), cq_blocks(eights, THREADS), THREADS, 0, s, eights,
                  cq_divider_make(eights / a->n_groups), a->codes, a->scales, a->amax, a->offsets,
                  a->top, (T *)a->y, aligned);
}

} // namespace

extern "C" int cq_cuda_pack(cq_stream *s, const cq_pack_args *a) {
    CQ_CUDA_ACT("pack", a);
    CQ_TRY(cq_fake_columns(a->fq, a->cols));
    if (a->act == CQ_BF16)
        launch_pack<__nv_bfloat16>(s, a);
    else
        launch_pack<float>(s, a);
    CQ_CUDA_END("pack");
}

extern "C" int cq_cuda_unpack(cq_stream *s, const cq_unpack_args *a) {
    if (a->dtype != CQ_F32 && a->dtype != CQ_BF16)
        return cq_fail(CQ_EUSAGE, "cuda: unpack: dtype is %s, wanted F32 or BF16",
                       cq_dtype_name(a->dtype));
    if (a->cols % 16 || a->n_groups < 1 || a->rows % a->n_groups)
        return cq_fail(CQ_ESHAPE,
                       "unpack: %lld rows of %lld in %lld groups, wanted whole groups of rows of a "
                       "multiple of 16",
                       (long long)a->rows, (long long)a->cols, (long long)a->n_groups);
    if (a->dtype == CQ_BF16)
        launch_unpack<__nv_bfloat16>(s, a);
    else
        launch_unpack<float>(s, a);
    CQ_CUDA_END("unpack");
}
