/* library.c - what a GPU leaves to cuBLAS runs in ref: matrix products, their operands rounded to
   BF16 first where the stream asks for it. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/batch.h"
#include "kernels/ref/ref.h"
#include "tests/cuda_on_cpu/memory.h"

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

static float *widened_copy(const uint16_t *x, int64_t n) {
    float *y = malloc((size_t)(n + 1) * sizeof(*y));
    for (int64_t i = 0; y && i < n; i++) {
        uint32_t u = (uint32_t)x[i] << 16;
        memcpy(&y[i], &u, sizeof(u));
    }
    return y;
}
/* Values of an operand, [a, b] or across; of its last row only its own. */
static int64_t values(bool across, int64_t a, int64_t b, int64_t ld) {
    return across ? (b - 1) * ld + a : (a - 1) * ld + b;
}
static int product(cq_stream *s, const cq_matmul_args *a) {
    if (s->compute != CQ_COMPUTE_BF16 || a->dtype != CQ_F32)
        return cq_ref_matmul(s, a);
    cq_matmul_args b = *a;
    float *x = rounded_copy(a->a, a->ta ? a->k : a->m, a->ta ? a->m : a->k, a->lda);
    float *y = a->b ? rounded_copy(a->b, a->tb ? a->n : a->k, a->tb ? a->k : a->n, a->ldb)
                    : widened_copy(a->b16, values(a->tb, a->k, a->n, a->ldb));
    b.a = x;
    b.b = y;
    int status = x && y ? cq_ref_matmul(s, &b) : cq_fail(CQ_ENOMEM, "matmul: no memory");
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
        return cq_ref_matmul_grouped(s, a);
    int64_t rows = a->offsets[a->groups], status = CQ_ENOMEM;
    float *x = rounded_copy(a->x, rows, a->k, a->k), *y = rounded_copy(a->y, rows, a->n, a->n);
    float *w = rounded_copy(a->w, a->groups * a->n, a->k, a->k);
    if (x && y && w) {
        b.x = a->mode == CQ_GROUPED_INPUT ? a->x : x;
        b.y = a->mode == CQ_GROUPED_FORWARD ? a->y : y;
        b.w = a->mode == CQ_GROUPED_WEIGHT ? a->w : w;
        status = cq_ref_matmul_grouped(s, &b);
    } else
        cq_fail(CQ_ENOMEM, "matmul_grouped: no memory");
    free(x);
    free(y);
    free(w);
    return (int)status;
}
/* matmul_grouped of a kernel file takes its place where there is one. */
__attribute__((weak)) int cq_cuda_matmul_grouped(cq_stream *s, const cq_matmul_grouped_args *a) {
    if (a->dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "cuda: matmul_grouped: dtype is %s, wanted F32",
                       cq_dtype_name(a->dtype));
    cq_emu_memory_unlock();
    int status = grouped(s, a);
    cq_emu_memory_lock();
    return status;
}
