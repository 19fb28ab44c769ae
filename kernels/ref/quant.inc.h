/* quant.inc.h - fake quantization and calibration maxima, over `real` and `acc` (see ref.h).

   y = decode(encode(x)) of kernels/nvfp4.h per block of 16, and its two halves, pack and unpack;
   amax[g] = max(amax[g], max |x| in g's rows). A NaN does not enter a maximum: whoever calibrates
   looks for non-finite values first. */

static int CQ_FN(fake_quant)(const cq_fake_quant_args *a) {
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->cols, a->x, a->y, a->block_amax, a->top);
}

static int CQ_FN(pack)(const cq_pack_args *a) {
    const real *x = a->x;
    float amax = *a->fq.amax, ws2 = cq_nvfp4_tensor_scale(amax, a->block_amax ? a->top : 448.0f);
    if (a->cols % 16)
        return cq_fail(CQ_ESHAPE, "pack: rows of %lld, wanted a multiple of 16",
                       (long long)a->cols);
    for (int64_t b = 0; b < a->rows * a->cols / 16; b++) {
        float block[16];
        int saturated = 0;
        for (int64_t i = 0; i < 16; i++)
            block[i] = (float)x[16 * b + i];
        uint8_t s8 = !(amax > 0) ? 0x38
                     : a->block_amax
                         ? cq_nvfp4_scale_static(a->block_amax[b], amax, a->top)
                         : cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(block), ws2, &saturated);
        a->scales[b] = s8;
        if (amax > 0)
            cq_nvfp4_block_encode(a->codes + 8 * b, block, s8, ws2);
        else
            memset(a->codes + 8 * b, 0, 8);
        if (saturated && a->fq.saturated)
            ++*a->fq.saturated;
    }
    return CQ_OK;
}

static int CQ_FN(unpack)(const cq_unpack_args *a) {
    real *y = a->y;
    if (a->cols % 16 || a->n_groups < 1 || a->rows % a->n_groups)
        return cq_fail(CQ_ESHAPE,
                       "unpack: %lld rows of %lld in %lld groups, wanted whole groups of "
                       "rows of a multiple of 16",
                       (long long)a->rows, (long long)a->cols, (long long)a->n_groups);
    int64_t per_group = a->rows / a->n_groups * (a->cols / 16);
    for (int64_t b = 0; b < a->rows * a->cols / 16; b++) {
        float block[16];
        if (a->offsets && a->offsets[b / per_group] == a->offsets[b / per_group + 1])
            continue;
        cq_nvfp4_block_decode(block, a->codes + 8 * b, a->scales[b],
                              cq_nvfp4_tensor_scale(a->amax[b / per_group], a->top));
        for (int64_t i = 0; i < 16; i++)
            y[16 * b + i] = (real)block[i];
    }
    return CQ_OK;
}

static int CQ_FN(amax)(const cq_amax_args *a) {
    const real *x = a->x;
    int64_t n_groups = a->offsets ? a->n_groups : 1;
    for (int64_t g = 0; g < n_groups; g++) {
        int64_t first = a->offsets ? a->offsets[g] : 0;
        int64_t end = a->offsets ? a->offsets[g + 1] : a->rows;
        for (int64_t i = first * a->cols; i < end * a->cols; i++) {
            float v = (float)fabs(x[i]);
            if (v > a->amax[g])
                a->amax[g] = v;
        }
    }
    return CQ_OK;
}
