/* matmul_onednn.c - matrix products through oneDNN 2.x.
 *
 * FP32 goes through dnnl_sgemm, which takes row-major matrices with any strides and both
 * transpositions, picks the processor's best kernel and costs about a microsecond per call; the
 * matmul primitive runs the same kernel and was 0 to 12 % slower on every shape of the bench. BF16
 * needs the primitive; oneDNN keeps generated code in a cache of its own, so it is made anew for
 * each call.
 *
 * One case is repaired here: with AVX2 alone, oneDNN 2.6 reads a transposed A in place when C is
 * narrow, and rows a multiple of 2 KiB apart then fall into the same few lines of the first-level
 * cache: 1024 x 192 x 2048, the weight gradient of a 192 -> 1024 linear, ran at 38 GF/s instead of
 * 78. Such an A is copied in panels with padded rows.
 */
#include "core/base/error.h"
#include "kernels/cpu/matmul.h"

#ifdef CQ_ONEDNN
#include <dnnl.h>
#include <omp.h>
#include <string.h>
#if DNNL_VERSION_MAJOR != 2
#error "oneDNN 2.x is wanted: the matmul descriptor of 3.x is another interface"
#endif

bool cq_cpu_has_fast_bf16(void) {
    return dnnl_get_effective_cpu_isa() == dnnl_cpu_isa_avx512_core_amx;
}

static int failed_call(const char *what, const cq_matmul_args *a, dnnl_status_t status) {
    return cq_fail(CQ_EUSAGE, "matmul: oneDNN's %s failed with status %d for %lld x %lld x %lld",
                   what, (int)status, (long long)a->m, (long long)a->n, (long long)a->k);
}

static int sgemm(const cq_matmul_args *a) {
    dnnl_status_t status =
        dnnl_sgemm(a->ta ? 'T' : 'N', a->tb ? 'T' : 'N', a->m, a->n, a->k, (float)a->alpha, a->a,
                   a->lda, a->b, a->ldb, (float)a->beta, a->c, a->ldc);
    return status == dnnl_success ? CQ_OK : failed_call("sgemm", a, status);
}

enum { PANEL_ROWS = 256, PANEL_COLS = 96, PANEL_LD = PANEL_COLS + 16, NARROW = 384 };

static bool strides_collide(const cq_stream *s, const cq_matmul_args *a) {
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa();
    return a->ta && a->lda % 512 == 0 && a->n < NARROW && a->k >= 64 &&
           (isa == dnnl_cpu_isa_avx2 || isa == dnnl_cpu_isa_avx2_vnni) && s->scratch &&
           s->scratch_bytes >= PANEL_ROWS * PANEL_LD * (int64_t)sizeof(float);
}
/// Rows i0 .. i0 + m of C on this thread; A is copied into `panel`, PANEL_ROWS of its rows at a
/// time.
static int panel_product(const cq_matmul_args *a, int64_t i0, int64_t m, float *panel) {
    for (int64_t k0 = 0; k0 < a->k; k0 += PANEL_ROWS) {
        cq_matmul_args part = *a;
        part.m = m, part.k = a->k - k0 < PANEL_ROWS ? a->k - k0 : PANEL_ROWS;
        const float *from = (const float *)a->a + k0 * a->lda + i0;
        for (int64_t k = 0; k < part.k; k++)
            memcpy(panel + k * PANEL_LD, from + k * a->lda, (size_t)m * sizeof(float));
        part.a = panel, part.lda = PANEL_LD;
        part.b = (const float *)a->b + (a->tb ? k0 : k0 * a->ldb);
        part.c = (float *)a->c + i0 * a->ldc;
        part.beta = k0 > 0 ? 1.0 : a->beta;
        CQ_TRY(sgemm(&part));
    }
    return CQ_OK;
}
static int sgemm_in_panels(const cq_stream *s, const cq_matmul_args *a, int team) {
    int64_t units = (a->m + PANEL_COLS - 1) / PANEL_COLS;
    units = (units + team - 1) / team * team;
    int64_t m = ((a->m + units - 1) / units + 7) / 8 * 8;
    int failed = CQ_OK;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t i0 = 0; i0 < a->m; i0 += m) {
        char *panel = (char *)s->scratch + omp_get_thread_num() * s->scratch_bytes;
        int status = panel_product(a, i0, a->m - i0 < m ? a->m - i0 : m, (float *)(void *)panel);
        if (status != CQ_OK)
#pragma omp atomic write
            failed = status;
    }
    /* the message stayed with the thread that failed */
    return failed == CQ_OK ? CQ_OK : failed_call("sgemm", a, dnnl_runtime_error);
}

/// Sets the thread count that oneDNN goes by, also in a team of one; returns the one before.
static int swap_threads(int team) {
    int before = omp_get_max_threads();
    if (before != team)
        omp_set_num_threads(team);
    return before;
}

int cq_cpu_sgemm(const cq_stream *s, const cq_matmul_args *a, int team) {
    if (omp_in_parallel())
        return sgemm(a);
    int before = swap_threads(team);
    int status = strides_collide(s, a) ? sgemm_in_panels(s, a, team) : sgemm(a);
    swap_threads(before);
    return status;
}

static dnnl_status_t describe(dnnl_memory_desc_t *to, int64_t rows, int64_t cols, bool transposed,
                              int64_t ld, dnnl_data_type_t type) {
    dnnl_dims_t dims = {rows, cols}, strides = {transposed ? 1 : ld, transposed ? ld : 1};
    return dnnl_memory_desc_init_by_strides(to, 2, dims, type, strides);
}

/// What one product through the primitive creates.
typedef struct product {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_attr_t attr;
    dnnl_post_ops_t ops;
    dnnl_primitive_desc_t desc;
    dnnl_primitive_t primitive;
    dnnl_memory_t memory[3];
} product;

#define STEP(call)                                                                                 \
    do {                                                                                           \
        dnnl_status_t step_ = (call);                                                              \
        if (step_ != dnnl_success)                                                                 \
            return step_;                                                                          \
    } while (0)

static dnnl_status_t product_run(product *p, const cq_matmul_args *a) {
    dnnl_memory_desc_t md[3];
    STEP(describe(&md[0], a->m, a->k, a->ta, a->lda, dnnl_bf16));
    STEP(describe(&md[1], a->k, a->n, a->tb, a->ldb, dnnl_bf16));
    STEP(describe(&md[2], a->m, a->n, false, a->ldc, dnnl_f32));
    dnnl_matmul_desc_t matmul;
    STEP(dnnl_matmul_desc_init(&matmul, &md[0], &md[1], NULL, &md[2]));
    STEP(dnnl_engine_create(&p->engine, dnnl_cpu, 0));
    STEP(dnnl_stream_create(&p->stream, p->engine, dnnl_stream_default_flags));
    STEP(dnnl_primitive_attr_create(&p->attr));
    float alpha = (float)a->alpha;
    if (a->alpha != 1.0)
        STEP(dnnl_primitive_attr_set_output_scales(p->attr, 1, 0, &alpha));
    if (a->beta != 0.0) {
        STEP(dnnl_post_ops_create(&p->ops));
        STEP(dnnl_post_ops_append_sum(p->ops, (float)a->beta));
        STEP(dnnl_primitive_attr_set_post_ops(p->attr, p->ops));
    }
    STEP(dnnl_primitive_desc_create(&p->desc, &matmul, p->attr, p->engine, NULL));
    STEP(dnnl_primitive_create(&p->primitive, p->desc));
    const void *data[3] = {a->a, a->b, a->c};
    for (int i = 0; i < 3; i++)
        STEP(dnnl_memory_create(&p->memory[i], &md[i], p->engine, (void *)(uintptr_t)data[i]));
    dnnl_exec_arg_t args[3] = {{DNNL_ARG_SRC, p->memory[0]},
                               {DNNL_ARG_WEIGHTS, p->memory[1]},
                               {DNNL_ARG_DST, p->memory[2]}};
    STEP(dnnl_primitive_execute(p->primitive, p->stream, 3, args));
    return dnnl_stream_wait(p->stream);
}

int cq_cpu_bf16gemm(const cq_matmul_args *a, int team) {
    product p = {0};
    int before = swap_threads(team);
    dnnl_status_t status = product_run(&p, a);
    swap_threads(before);
    for (int i = 0; i < 3; i++)
        if (p.memory[i])
            dnnl_memory_destroy(p.memory[i]);
    if (p.primitive)
        dnnl_primitive_destroy(p.primitive);
    if (p.desc)
        dnnl_primitive_desc_destroy(p.desc);
    if (p.ops)
        dnnl_post_ops_destroy(p.ops);
    if (p.attr)
        dnnl_primitive_attr_destroy(p.attr);
    if (p.stream)
        dnnl_stream_destroy(p.stream);
    if (p.engine)
        dnnl_engine_destroy(p.engine);
    return status == dnnl_success ? CQ_OK : failed_call("BF16 matmul", a, status);
}

#else

bool cq_cpu_has_fast_bf16(void) { return false; }
int cq_cpu_sgemm(const cq_stream *s, const cq_matmul_args *a, int team) {
    (void)s, (void)team;
    return cq_fail(CQ_EUSAGE, "matmul: built without oneDNN, %lld x %lld x %lld wanted of it",
                   (long long)a->m, (long long)a->n, (long long)a->k);
}
int cq_cpu_bf16gemm(const cq_matmul_args *a, int team) { return cq_cpu_sgemm(NULL, a, team); }

#endif
