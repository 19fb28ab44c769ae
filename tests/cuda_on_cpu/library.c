/* library.c - what a GPU leaves to cuBLAS runs in ref: matrix products, their operands rounded to
   BF16 first where the stream asks for it. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/batch.h"
#include "kernels/ref/ref.h"
#include "tests/cuda_on_cpu/plain.h"

/* The operands as BF16 would hold them. */
static float rounded(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    if ((u & 0x7fffffffu) <= 0x7f800000u)
        u += 0x7fffu + (u >> 16 & 1u);
    u &= 0xffff0000u;
    memcpy(&x, &u, sizeof(x));
    return x;
}
static float *rounded_copy(const float *x, int64_t rows, int64_t cols, int64_t ld) {
    float *y = malloc((size_t)(rows * ld + 1) * sizeof(*y));
    for (int64_t r = 0; y && r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            y[r * ld + c] = rounded(x[r * ld + c]);
    return y;
}

static float widened(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}
static float *widened_copy(const uint16_t *x, int64_t n) {
    float *y = malloc((size_t)(n + 1) * sizeof(*y));
    for (int64_t i = 0; y && i < n; i++)
        y[i] = widened(x[i]);
    return y;
}
/* Values of an operand, [a, b] or across; of its last row only its own. */
static int64_t values(bool across, int64_t a, int64_t b, int64_t ld) {
    return across ? (b - 1) * ld + a : (a - 1) * ld + b;
}
/* An operand [rows, cols] as BF16 holds it, which it may be already. */
static float *operand(const void *x, bool bf16, int64_t rows, int64_t cols, int64_t ld) {
    int64_t n = rows > 0 ? values(false, rows, cols, ld) : 0;
    return bf16 ? widened_copy(x, n) : rounded_copy(x, rows, cols, ld);
}
static void store_16(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = rounded(from[i]);
        uint32_t u;
        memcpy(&u, &x, sizeof(u));
        to[i] = (uint16_t)(u >> 16);
    }
}
/* C in BF16 is written once, from the FP32 one. */
static int product_into_16(cq_stream *s, const cq_matmul_args *a) {
    uint16_t *c = a->c;
    cq_matmul_args b = *a;
    float *wide = widened_copy(c, values(false, a->m, a->n, a->ldc));
    b.c = wide;
    int status = wide ? cq_ref_matmul(s, &b) : cq_fail(CQ_ENOMEM, "matmul: no memory");
    for (int64_t i = 0; i < a->m && !status; i++)
        store_16(c + i * a->ldc, wide + i * a->ldc, a->n);
    free(wide);
    return status;
}
static int product(cq_stream *s, const cq_matmul_args *a) {
    if (s->compute != CQ_COMPUTE_BF16 && (a->a_bf16 || a->b_bf16 || a->c_bf16))
        return cq_fail(CQ_EUSAGE, "cuda: matmul: matrices in BF16, wanted BF16 products for them");
    if (s->compute != CQ_COMPUTE_BF16 || a->dtype != CQ_F32)
        return cq_ref_matmul(s, a);
    if (a->m == 0 || a->n == 0)
        return CQ_OK;
    cq_matmul_args b = *a;
    bool only_16 = !a->b; /* b16 alone */
    float *x = operand(a->a, a->a_bf16, a->ta ? a->k : a->m, a->ta ? a->m : a->k, a->lda);
    float *y = operand(only_16 ? a->b16 : a->b, a->b_bf16 || only_16, a->tb ? a->n : a->k,
                       a->tb ? a->k : a->n, a->ldb);
    b.a = x;
    b.b = y;
    int status = CQ_OK;
    if (!x || !y)
        status = cq_fail(CQ_ENOMEM, "matmul: no memory");
    else
        status = a->c_bf16 ? product_into_16(s, &b) : cq_ref_matmul(s, &b);
    free(x);
    free(y);
    return status;
}
int cq_cuda_matmul(cq_stream *s, const cq_matmul_args *a) {
    if (a->dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "cuda: matmul: dtype is %s, wanted F32", cq_dtype_name(a->dtype));
    cq_emu_memory_unlock();
    int status = product(s, a);
    cq_emu_memory_lock();
    return status;
}

int cq_cuda_matmul_bf16(cq_stream *s, const cq_matmul_args *a) {
    cq_matmul_args b = *a;
    cq_emu_memory_unlock();
    float *x = widened_copy(a->a, values(a->ta, a->m, a->k, a->lda));
    float *y = widened_copy(a->b, values(a->tb, a->k, a->n, a->ldb));
    b.a = x;
    b.b = y;
    int status = x && y ? cq_ref_matmul(s, &b) : cq_fail(CQ_ENOMEM, "matmul: no memory");
    cq_emu_memory_lock();
    free(x);
    free(y);
    return status;
}

/* Block scales back from the order in which FP4 tensor cores read them; NaN where padding is not
 * zero. */
static uint8_t *untiled(const uint8_t *tiled, int64_t rows, int64_t cols) {
    int64_t col_tiles = (cols + 3) / 4, all = (rows + 127) / 128 * 128;
    uint8_t *out = malloc((size_t)(rows * cols + 1));
    for (int64_t r = 0; out && r < all; r++)
        for (int64_t c = 0; c < 4 * col_tiles; c++) {
            uint8_t v = tiled[(r / 128 * col_tiles + c / 4) * 512 + 16 * (r % 32) +
                              4 * (r % 128 / 32) + c % 4];
            if (r < rows && c < cols)
                out[r * cols + c] = v;
            else if (v)
                out[0] = 0x7f;
        }
    return out;
}
static int64_t tiled_bytes(int64_t rows, int64_t cols) {
    return (rows + 127) / 128 * ((cols + 3) / 4) * 512;
}
int cq_cuda_tile_scales(cq_stream *s, int64_t rows, int64_t cols, const uint8_t *scales, void *out)
    __attribute__((weak));
int cq_cuda_nvfp4_factors(cq_stream *s, const cq_matmul_nvfp4_args *a, float *out)
    __attribute__((weak));
void *cq_cuda_scratch(cq_stream *s, int64_t bytes);
static int nvfp4_product(cq_stream *s, const cq_matmul_nvfp4_args *a) {
    int64_t cols = a->k / 16, a_bytes = tiled_bytes(a->m, cols), b_bytes = tiled_bytes(a->n, cols);
    char *room = cq_cuda_scratch(s, a_bytes + b_bytes + 8);
    CQ_TRY(room ? CQ_OK : CQ_ENOMEM);
    float *factors = (float *)(void *)(room + a_bytes + b_bytes);
    CQ_TRY(cq_cuda_tile_scales(s, a->m, cols, a->a_scales, room));
    CQ_TRY(cq_cuda_tile_scales(s, a->n, cols, a->b_scales, room + a_bytes));
    CQ_TRY(cq_cuda_nvfp4_factors(s, a, factors));
    cq_emu_memory_unlock();
    cq_matmul_nvfp4_args b = *a;
    float one = 2688.0f; /* a maximum whose tensor scale is 1 */
    uint8_t *x = untiled((uint8_t *)room, a->m, cols);
    uint8_t *y = untiled((uint8_t *)room + a_bytes, a->n, cols);
    float *c = calloc((size_t)(a->m * a->n + 1), sizeof(*c));
    b.a_scales = x, b.b_scales = y, b.a_amax = b.b_amax = &one, b.b_top = 448.0f;
    b.c = c, b.ldc = a->n, b.beta = 0;
    int status =
        x && y && c ? cq_ref_matmul_nvfp4(s, &b) : cq_fail(CQ_ENOMEM, "matmul_nvfp4: no memory");
    cq_dtype type = a->c_bf16 ? CQ_BF16 : CQ_F32;
    for (int64_t i = 0; i < a->m && !status; i++)
        for (int64_t j = 0; j < a->n && !status; j++) {
            char *to = (char *)a->c + (i * a->ldc + j) * cq_dtype_bytes(type);
            float before = 0, v = factors[0] * c[i * a->n + j];
            if (a->beta != 0)
                cq_convert(&before, CQ_F32, to, type, 1);
            v += factors[1] * before;
            status = cq_convert(to, type, &v, CQ_F32, 1);
        }
    cq_emu_memory_lock();
    free(x);
    free(y);
    free(c);
    return status;
}
int cq_cuda_matmul_nvfp4(cq_stream *s, const cq_matmul_nvfp4_args *a) {
    if (a->dtype != CQ_F32 || a->k % 32)
        return cq_ref_matmul_nvfp4(s, a); /* which words the error */
    if (!cq_cuda_tile_scales)
        return cq_fail(CQ_EUSAGE, "cuda: operation matmul_nvfp4 is not in this build");
    return nvfp4_product(s, a);
}

/* x or y of a grouped product as FP32 holds it. */
static float *rows_copy(const void *x, bool bf16, int64_t rows, int64_t cols) {
    return operand(x, bf16, rows, cols, cols);
}
int cq_cuda_matmul_batch(cq_stream *s, const cq_matmul_args *a, const cq_cuda_batch *b, bool bf16) {
    cq_stream f32 = *s;
    f32.compute = CQ_COMPUTE_F32;
    for (int64_t i = 0; i < b->count; i++) {
        cq_matmul_args one = *a;
        one.a = (const char *)a->a + i * b->a * (bf16 ? 2 : 4);
        one.b = (const char *)a->b + i * b->b * (bf16 ? 2 : 4);
        one.c = (float *)a->c + i * b->c;
        CQ_TRY(bf16 ? cq_cuda_matmul_bf16(s, &one) : cq_cuda_matmul(&f32, &one));
    }
    return CQ_OK;
}

static int grouped(cq_stream *s, const cq_matmul_grouped_args *a) {
    cq_matmul_grouped_args b = *a;
    if (s->compute != CQ_COMPUTE_BF16)
        return a->x_bf16 || a->y_bf16
                   ? cq_fail(CQ_EUSAGE, "cuda: matmul_grouped: rows in BF16 want BF16 products")
                   : cq_ref_matmul_grouped(s, a);
    int64_t rows = a->offsets[a->groups], status = CQ_ENOMEM;
    bool only_16 = !a->w; /* w16 alone */
    float *x = rows_copy(a->x, a->x_bf16, rows, a->k), *y = rows_copy(a->y, a->y_bf16, rows, a->n);
    float *w = operand(only_16 ? a->w16 : a->w, only_16, a->groups * a->n, a->k, a->k);
    if (x && y && w) {
        b.x = a->mode == CQ_GROUPED_INPUT && !a->x_bf16 ? a->x : x;
        b.y = a->mode == CQ_GROUPED_FORWARD && !a->y_bf16 ? a->y : y;
        b.w = a->mode == CQ_GROUPED_WEIGHT ? a->w : w;
        status = cq_ref_matmul_grouped(s, &b);
        if (a->mode == CQ_GROUPED_INPUT && a->x_bf16)
            store_16(a->x, x, rows * a->k);
        if (a->mode == CQ_GROUPED_FORWARD && a->y_bf16)
            store_16(a->y, y, rows * a->n);
    } else
        cq_fail(CQ_ENOMEM, "matmul_grouped: no memory");
    free(x);
    free(y);
    free(w);
    return (int)status;
}
static int grouped_on_device(cq_stream *s, const cq_matmul_grouped_args *a) {
    cq_emu_memory_unlock();
    int status = grouped(s, a);
    cq_emu_memory_lock();
    return status;
}
int cq_emu_plain_matmul_grouped(cq_stream *s, const cq_matmul_grouped_args *a) {
    return a->x_bf16 ? grouped_on_device(s, a) : CQ_EMU_NOT_PLAIN;
}
/* matmul_grouped of a kernel file takes its place where there is one. */
__attribute__((weak)) int cq_cuda_matmul_grouped(cq_stream *s, const cq_matmul_grouped_args *a) {
    if (a->dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "cuda: matmul_grouped: dtype is %s, wanted F32",
                       cq_dtype_name(a->dtype));
    return grouped_on_device(s, a);
}
