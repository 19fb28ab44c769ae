/* quant.inc.h - fake quantization and calibration maxima, over `real` and `acc` (see ref.h).

   y = decode(encode(x)) of kernels/nvfp4.h per block of 16; amax[g] = max(amax[g], max |x| in g's
   rows). A NaN does not enter a maximum: whoever calibrates looks for non-finite values first. */

static int CQ_FN(fake_quant)(const cq_fake_quant_args *a) {
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->cols, a->x, a->y, a->block_amax, a->top);
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
