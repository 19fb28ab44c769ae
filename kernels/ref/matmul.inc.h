/* matmul.inc.h - matrix products, dense and grouped by expert: sums over k ascending, one rounding
   at the store.

   Every element is the plain inner product; strides express the transposed forms. */

static int CQ_FN(matmul)(const cq_matmul_args *a) {
    const real *A = a->a, *B = a->b;
    real *C = a->c;
    int64_t a_row = a->ta ? 1 : a->lda, a_k = a->ta ? a->lda : 1;
    int64_t b_col = a->tb ? a->ldb : 1, b_k = a->tb ? 1 : a->ldb;
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            acc sum = 0;
            for (int64_t k = 0; k < a->k; k++)
                sum += (acc)A[i * a_row + k * a_k] * (acc)B[k * b_k + j * b_col];
            real *c = &C[i * a->ldc + j];
            acc old = a->beta == 0 ? 0 : (acc)a->beta * (acc)*c; /* beta 0 does not read C */
            *c = (real)((acc)a->alpha * sum + old);
        }
    return CQ_OK;
}

static int CQ_FN(matmul_grouped)(const cq_matmul_grouped_args *a) {
    real *X = a->x, *W = a->w, *Y = a->y;
    int64_t n = a->n, k = a->k;
    for (int64_t e = 0; e < a->groups; e++) {
        int64_t first = a->offsets[e], rows = a->offsets[e + 1] - first;
        cq_matmul_args m = {.dtype = a->dtype, .alpha = 1};
        real *x = X + first * k, *w = W + e * n * k, *y = Y + first * n;
        if (rows == 0)
            continue;
        if (a->mode == CQ_GROUPED_FORWARD) {
            m.tb = true, m.m = rows, m.n = n, m.k = k;
            m.a = x, m.lda = k, m.b = w, m.ldb = k, m.c = y, m.ldc = n;
        } else if (a->mode == CQ_GROUPED_INPUT) {
            m.m = rows, m.n = k, m.k = n;
            m.a = y, m.lda = n, m.b = w, m.ldb = k, m.c = x, m.ldc = k;
        } else {
            m.ta = true, m.m = n, m.n = k, m.k = rows, m.beta = 1;
            m.a = y, m.lda = n, m.b = x, m.ldb = k, m.c = w, m.ldc = k;
        }
        CQ_TRY(CQ_FN(matmul)(&m));
    }
    return CQ_OK;
}

static int CQ_FN(matmul_nvfp4)(const cq_matmul_nvfp4_args *a) {
    real *c = a->c;
    int64_t blocks = a->k / 16;
    float a_scale = cq_nvfp4_tensor_scale(*a->a_amax, 448.0f);
    float b_scale = cq_nvfp4_tensor_scale(*a->b_amax, a->b_top);
    if (a->k % 32)
        return cq_fail(CQ_ESHAPE, "matmul_nvfp4: k is %lld, wanted a multiple of 32",
                       (long long)a->k);
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            acc sum = 0;
            for (int64_t b = 0; b < blocks; b++) {
                float x[16], y[16];
                int64_t at = i * blocks + b, bt = j * blocks + b;
                cq_nvfp4_block_decode(x, a->a_codes + 8 * at, a->a_scales[at], a_scale);
                cq_nvfp4_block_decode(y, a->b_codes + 8 * bt, a->b_scales[bt], b_scale);
                for (int64_t k = 0; k < 16; k++)
                    sum += (acc)x[k] * (acc)y[k];
            }
            real *to = c + i * a->ldc + j;
            *to = (real)(a->beta == 0 ? sum : sum + (acc)a->beta * (acc)*to);
        }
    return CQ_OK;
}
