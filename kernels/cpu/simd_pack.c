/* simd_pack.c - NVFP4 codes of matrices, and matrices from codes; the codec is kernels/nvfp4.h.
 *
 * Unpacking is what every product with packed weights waits for: the 16 values that a block can
 * hold are worked out once, then looked up.
 */
#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/simd.h"
#include "kernels/nvfp4.h"

static int pack_row(const cq_pack_args *a, int64_t row, float amax) {
    float ws2 = cq_nvfp4_tensor_scale(amax, a->block_amax ? a->top : 448.0f);
    int64_t blocks = a->cols / FQ_BLOCK, first = row * blocks;
    int count = 0;
    for (int64_t b = first; b < first + blocks; b++) {
        const float *x = (const float *)a->x + FQ_BLOCK * b;
        int saturated = 0;
        a->scales[b] = a->block_amax
                           ? cq_nvfp4_scale_static(a->block_amax[b], amax, a->top)
                           : cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(x), ws2, &saturated);
        cq_nvfp4_block_encode(a->codes + 8 * b, x, a->scales[b], ws2);
        count += saturated;
    }
    return count;
}

int CQ_OP(pack)(cq_stream *s, const cq_pack_args *a) {
    CQ_F32_OR_REF(pack);
    CQ_TRY(fq_check("pack", &a->fq, a->cols));
    float amax = *a->fq.amax;
    int64_t saturated = 0;
    if (!(amax > 0))
        return cq_ref_pack(s, a);
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->cols, 4)) reduction(+ : saturated)
    for (int64_t row = 0; row < a->rows; row++)
        saturated += pack_row(a, row, amax);
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

int CQ_OP(unpack)(cq_stream *s, const cq_unpack_args *a) {
    CQ_F32_OR_REF(unpack);
    if (a->cols % FQ_BLOCK || a->n_groups < 1 || a->rows % a->n_groups)
        return cq_ref_unpack(s, a); /* which words the error */
    int64_t blocks = a->cols / FQ_BLOCK, per_group = a->rows / a->n_groups;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->rows * a->cols, 0.8))
    for (int64_t row = 0; row < a->rows; row++) {
        int64_t g = row / per_group;
        if (a->offsets && a->offsets[g] == a->offsets[g + 1])
            continue;
        float ws2 = cq_nvfp4_tensor_scale(a->amax[g], a->top);
        for (int64_t b = row * blocks; b < (row + 1) * blocks; b++) {
            static const float code[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
            float den = cq_e4m3_decode(a->scales[b]) * ws2, value[16];
            float *y = (float *)a->y + FQ_BLOCK * b;
            for (int i = 0; i < 16; i++)
                value[i] = code[i] * den;
            for (int i = 0; i < 8; i++) {
                uint8_t pair = a->codes[8 * b + i];
                y[2 * i] = value[pair & 15];
                y[2 * i + 1] = value[pair >> 4];
            }
        }
    }
    return CQ_OK;
}

/* of devices: on the processor products are those of opened weights */
int CQ_OP(matmul_nvfp4)(cq_stream *s, const cq_matmul_nvfp4_args *a) {
    return cq_ref_matmul_nvfp4(s, a);
}
