/* fake_rows.c - fake quantization of rows for the reference operations, through the codec of
   kernels/nvfp4.h.

   The codec is FP32 whatever the buffers hold, so F32 and F64 runs quantize the same values. */
#include "kernels/nvfp4.h"
#include "kernels/ref/ref.h"

static void load_block(float v[16], cq_dtype dtype, const void *x, int64_t at) {
    for (int i = 0; i < 16; i++)
        v[i] = dtype == CQ_F32 ? ((const float *)x)[at + i] : (float)((const double *)x)[at + i];
}

static void store_block(cq_dtype dtype, void *y, int64_t at, const float v[16]) {
    for (int i = 0; i < 16; i++) {
        if (dtype == CQ_F32)
            ((float *)y)[at + i] = v[i];
        else
            ((double *)y)[at + i] = (double)v[i];
    }
}

int cq_ref_fake_rows(const cq_fq *fq, cq_dtype dtype, int64_t rows, int64_t cols, const void *x,
                     void *y, const float *block_amax, float top) {
    if (!fq->amax) {
        if (y != x)
            memcpy(y, x,
                   (size_t)(rows * cols) * (dtype == CQ_F32 ? sizeof(float) : sizeof(double)));
        return CQ_OK;
    }
    if (cols % 16)
        return cq_fail(CQ_ESHAPE, "fake quantization: rows of %lld, wanted a multiple of 16",
                       (long long)cols);
    int64_t n_groups = fq->offsets ? fq->n_groups : 1, saturated = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        int64_t first = fq->offsets ? fq->offsets[g] : 0,
                end = fq->offsets ? fq->offsets[g + 1] : rows;
        for (int64_t block = first * (cols / 16); block < end * (cols / 16); block++) {
            float v[16], q[16];
            load_block(v, dtype, x, block * 16);
            saturated +=
                cq_nvfp4_block_fake(q, v, fq->amax[g], block_amax ? block_amax[block] : -1.0f, top);
            store_block(dtype, y, block * 16, q);
        }
    }
    if (fq->saturated)
        *fq->saturated += saturated;
    return CQ_OK;
}
