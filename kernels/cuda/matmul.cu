/// matmul.cu - dense products through cuBLASLt.
///
///     C[m, n] = alpha op(A) op(B) + beta C        row-major
///
/// cuBLASLt counts columns first, so it is asked for C' = op(B)' op(A)': B is its first operand,
/// and a row-major matrix with distance ld is its transpose with leading dimension ld. FP32
/// products are FP32 throughout: an algorithm that rounds its inputs (TF32, BF16) is not taken.
/// With CQ_COMPUTE_BF16 operands in F32 are rounded into the stream's bf16_scratch, in pieces of k
/// if that is small (of n where C is BF16: it is rounded once), and accumulated in FP32. One that
/// is BF16 already is read where it is, or, with rows that are not on 16 bytes, copied there.
///
/// The same bits again: of the ways to split k only the one that stores partial sums and adds them
/// in order is allowed, and the algorithm of a shape is chosen once and kept. CKAQAD_CUDA_TUNE=1
/// times the candidates instead of taking the first, and keeps the winners in
/// $XDG_CACHE_HOME/ckaqad or ~/.cache/ckaqad; it waits for the device and is not for use while a
/// graph is captured.
///
/// Qwen3-4B, 8192 tokens, gate and up: 8192 x 19456 x 2560, 816 GFLOP: 1.03 ms at 790 TF/s in BF16,
/// 13.6 ms at 60 TF/s in FP32. Rounding A moves 0.13 GB, 0.03 ms at 4.3 TB/s; B, where there is no
/// b16, 0.30 GB, 0.07 ms.
#include "kernels/cuda/cq_cuda.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/lt.cuh"
#include "kernels/cuda/operands.cuh"
extern "C" {
#include "core/base/file.h"
}
#include <cublasLt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

enum {
    WORKSPACE = 32 << 20,
    CANDIDATES = 8,
    REPEATS = 5,
    TOGETHER = 8,          ///< products of a batch in one launch, and what its algorithm is for
    FIRST_SIZE = 256,      ///< of the table; a power of two
    MOST_ENTRIES = 1 << 16 ///< then it starts anew
};

/// What an algorithm is chosen for. No padding: compared and hashed as bytes.
struct lt_key {
    int64_t m, n, k, lda, ldb, ldc;
    int32_t form;  ///< FORM_* bits
    int32_t align; ///< log2 of the alignment of a, b and c in bytes, up to 8, four bits each
};
enum { FORM_TA = 1, FORM_TB = 2, FORM_BF16 = 4, FORM_BETA = 8, FORM_C_BF16 = 16, FORM_BATCH = 32 };
static_assert(sizeof(lt_key) == 56, "no padding");

struct lt_entry {
    lt_key key;
    cublasLtMatmulAlgo_t algo;
    bool used;
    bool checked; ///< false: read from a file, not yet held against this device
    bool tuned;
};

struct lt_table {
    lt_entry *entry;
    int64_t size, used;
    bool tune;
    char path[512]; ///< of the tuned algorithms; empty: nowhere to keep them
};

/// One product as cuBLASLt wants it; `first` is B and `second` is A.
struct lt_call {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t first, second, c;
};

int failed(const cq_matmul_args *a, const char *what, cublasStatus_t status) {
    return cq_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? CQ_ENOMEM : CQ_EIO,
                   "cuda: matmul: [%lld, %lld] x [%lld, %lld]: %s: %s", (long long)a->m,
                   (long long)a->k, (long long)a->k, (long long)a->n, what,
                   cublasLtGetStatusName(status));
}

/* Passes a failing cuBLASLt status up as an error that names the product. */
#define LT_TRY(a, what, call)                                                                      \
    do {                                                                                           \
        cublasStatus_t status_ = (call);                                                           \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                      \
            return failed((a), (what), status_);                                                   \
    } while (0)

int describe(lt_call *call, const cq_matmul_args *a, bool bf16) {
    cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
    cudaDataType_t type_c = a->c_bf16 ? CUDA_R_16BF : CUDA_R_32F;
    int32_t op_first = a->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    int32_t op_second = a->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    LT_TRY(a, "describing the product",
           cublasLtMatmulDescInit(&call->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_TRY(a, "describing the product",
           cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSA, &op_first,
                                          sizeof op_first));
    LT_TRY(a, "describing the product",
           cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSB, &op_second,
                                          sizeof op_second));
    LT_TRY(a, "describing B",
           cublasLtMatrixLayoutInit(&call->first, type, (uint64_t)(a->tb ? a->k : a->n),
                                    (uint64_t)(a->tb ? a->n : a->k), a->ldb));
    LT_TRY(a, "describing A",
           cublasLtMatrixLayoutInit(&call->second, type, (uint64_t)(a->ta ? a->m : a->k),
                                    (uint64_t)(a->ta ? a->k : a->m), a->lda));
    LT_TRY(a, "describing C",
           cublasLtMatrixLayoutInit(&call->c, type_c, (uint64_t)a->n, (uint64_t)a->m, a->ldc));
    return CQ_OK;
}

/// Makes a described product one of `count`, their matrices as far apart as `b` says.
int repeat(lt_call *call, const cq_matmul_args *a, const cq_cuda_batch *b, int64_t count) {
    int32_t n = (int32_t)count;
    cublasLtMatrixLayout_t layout[] = {&call->first, &call->second, &call->c};
    int64_t apart[] = {b->b, b->a, b->c};
    for (int i = 0; i < 3; i++) {
        LT_TRY(a, "describing a batch",
               cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &n,
                                                sizeof n));
        LT_TRY(a, "describing a batch",
               cublasLtMatrixLayoutSetAttribute(layout[i],
                                                CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                &apart[i], sizeof apart[i]));
    }
    return CQ_OK;
}

lt_key key_of(const cq_matmul_args *a, bool bf16) {
    lt_key key = {a->m, a->n, a->k, a->lda, a->ldb, a->ldc, 0, 0};
    key.form = (a->ta ? FORM_TA : 0) | (a->tb ? FORM_TB : 0) | (bf16 ? FORM_BF16 : 0) |
               (a->beta != 0.0 ? FORM_BETA : 0) | (a->c_bf16 ? FORM_C_BF16 : 0);
    key.align = cq_lt_alignment_log2((uintptr_t)a->a) | cq_lt_alignment_log2((uintptr_t)a->b) << 4 |
                cq_lt_alignment_log2((uintptr_t)a->c) << 8;
    return key;
}

/// The same for a batch: no more alignment than every one of its matrices has, wherever it begins.
lt_key key_of_batch(const cq_matmul_args *a, const cq_cuda_batch *b, bool bf16) {
    lt_key key = key_of(a, bf16);
    uintptr_t size = bf16 ? 2 : 4;
    key.form |= FORM_BATCH;
    key.align = cq_lt_alignment_log2((uintptr_t)a->a | (uintptr_t)b->a * size | 16) |
                cq_lt_alignment_log2((uintptr_t)a->b | (uintptr_t)b->b * size | 16) << 4 |
                cq_lt_alignment_log2((uintptr_t)a->c | (uintptr_t)b->c * sizeof(float) | 16) << 8;
    return key;
}

/// The entry of a key, or the free one where it belongs.
lt_entry *look_up(lt_entry *entry, int64_t size, const lt_key *key) {
    const unsigned char *bytes = (const unsigned char *)key;
    uint64_t h = 14695981039346656037ull; /* FNV-1a */
    for (size_t i = 0; i < sizeof *key; i++)
        h = (h ^ bytes[i]) * 1099511628211ull;
    for (uint64_t i = h ^ h >> 32;; i++) {
        lt_entry *e = &entry[i & (uint64_t)(size - 1)];
        if (!e->used || memcmp(&e->key, key, sizeof *key) == 0)
            return e;
    }
}

/// The entry of a key, made when there is none; NULL without memory.
lt_entry *entry_of(lt_table *t, const lt_key *key) {
    lt_entry *e = look_up(t->entry, t->size, key);
    if (e->used)
        return e;
    if (t->used >= MOST_ENTRIES) {
        memset(t->entry, 0, (size_t)t->size * sizeof *t->entry);
        t->used = 0;
    } else if (2 * t->used >= t->size) {
        lt_entry *wider = (lt_entry *)calloc((size_t)t->size * 2, sizeof *wider);
        if (!wider)
            return NULL;
        for (int64_t i = 0; i < t->size; i++)
            if (t->entry[i].used)
                *look_up(wider, 2 * t->size, &t->entry[i].key) = t->entry[i];
        free(t->entry);
        t->entry = wider;
        t->size *= 2;
    }
    return look_up(t->entry, t->size, key);
}

void put(lt_table *t, lt_entry *e, const lt_key *key, const cublasLtMatmulAlgo_t *algo,
         bool checked, bool tuned) {
    t->used += e->used ? 0 : 1;
    e->key = *key;
    e->algo = *algo;
    e->used = true;
    e->checked = checked;
    e->tuned = tuned;
}

/// Sums in a fixed order; FP32 inputs used as they are.
bool acceptable(const cublasLtMatmulAlgo_t *algo, bool bf16) {
    const uint64_t rounding =
        CUBLASLT_NUMERICAL_IMPL_FLAGS_HMMA | CUBLASLT_NUMERICAL_IMPL_FLAGS_INPUT_TF32 |
        CUBLASLT_NUMERICAL_IMPL_FLAGS_INPUT_16BF | CUBLASLT_NUMERICAL_IMPL_FLAGS_INPUT_16F;
    uint64_t flags = 0;
    size_t written = 0;
    if (!cq_lt_ordered(algo))
        return false;
    return bf16 ||
           (cublasLtMatmulAlgoCapGetAttribute(algo, CUBLASLT_ALGO_CAP_NUMERICAL_IMPL_FLAGS, &flags,
                                              sizeof flags, &written) == CUBLAS_STATUS_SUCCESS &&
            (flags & rounding) == 0);
}

/// Acceptable algorithms, the one believed to be fastest first; at least one, or an error.
int candidates(cublasLtMatmulAlgo_t *algo, int *n, const cq_cuda_device *d, lt_call *call,
               const cq_matmul_args *a, const lt_key *key) {
    uint64_t workspace = d->workspace_bytes;
    uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint32_t align_a = 1u << (key->align & 15), align_b = 1u << (key->align >> 4 & 15);
    uint32_t align_c = 1u << (key->align >> 8 & 15);
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } wish[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme, sizeof scheme},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_b, sizeof align_b},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_a, sizeof align_a},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c},
    };
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    int returned = 0;
    LT_TRY(a, "describing a choice", cublasLtMatmulPreferenceInit(&preference));
    for (size_t i = 0; i < sizeof wish / sizeof *wish; i++)
        LT_TRY(a, "describing a choice",
               cublasLtMatmulPreferenceSetAttribute(&preference, wish[i].attribute, wish[i].value,
                                                    wish[i].bytes));
    LT_TRY(a, "choosing an algorithm",
           cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)d->lt, &call->product, &call->first,
                                          &call->second, &call->c, &call->c, &preference,
                                          CANDIDATES, found, &returned));
    *n = 0;
    for (int i = 0; i < returned; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS &&
            found[i].workspaceSize <= d->workspace_bytes &&
            acceptable(&found[i].algo, (key->form & FORM_BF16) != 0))
            algo[(*n)++] = found[i].algo;
    return *n > 0
               ? CQ_OK
               : failed(a, "no algorithm with ordered sums and unrounded inputs among those found",
                        CUBLAS_STATUS_NOT_SUPPORTED);
}

/// Whether an algorithm out of a file runs here.
bool runs_here(const cublasLtMatmulAlgo_t *algo, const cq_cuda_device *d, lt_call *call,
               bool bf16) {
    cublasLtMatmulHeuristicResult_t result;
    return acceptable(algo, bf16) &&
           cublasLtMatmulAlgoCheck((cublasLtHandle_t)d->lt, &call->product, &call->first,
                                   &call->second, &call->c, &call->c, algo,
                                   &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= d->workspace_bytes;
}

cublasStatus_t multiply(const cq_cuda_device *d, lt_call *call, const cq_matmul_args *a, void *c,
                        const cublasLtMatmulAlgo_t *algo) {
    float alpha = (float)a->alpha, beta = (float)a->beta;
    return cublasLtMatmul((cublasLtHandle_t)d->lt, &call->product, &alpha, a->b, &call->first, a->a,
                          &call->second, &beta, c, &call->c, c, &call->c, algo, d->workspace,
                          d->workspace_bytes, d->queue);
}

/// Milliseconds of REPEATS products into `c`; negative when it does not run.
float time_of(const cq_cuda_device *d, lt_call *call, const cq_matmul_args *a, void *c,
              const cublasLtMatmulAlgo_t *algo, cudaEvent_t begin, cudaEvent_t end) {
    float ms = -1.0f;
    bool ran = multiply(d, call, a, c, algo) == CUBLAS_STATUS_SUCCESS &&
               cudaEventRecord(begin, d->queue) == cudaSuccess;
    for (int i = 0; i < REPEATS && ran; i++)
        ran = multiply(d, call, a, c, algo) == CUBLAS_STATUS_SUCCESS;
    if (!ran || cudaEventRecord(end, d->queue) != cudaSuccess ||
        cudaEventSynchronize(end) != cudaSuccess ||
        cudaEventElapsedTime(&ms, begin, end) != cudaSuccess)
        return -1.0f;
    return ms;
}

/// Puts the fastest of n algorithms first. C is left alone: the products go elsewhere. False when
/// nothing could be timed: no memory, or a graph is being captured.
bool fastest_first(cublasLtMatmulAlgo_t *algo, int n, const cq_cuda_device *d, lt_call *call,
                   const cq_matmul_args *a) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaEvent_t begin = NULL, end = NULL;
    void *c = NULL;
    size_t bytes = (size_t)(a->m * a->ldc) * sizeof(float);
    if (cudaStreamIsCapturing(d->queue, &capture) != cudaSuccess ||
        capture != cudaStreamCaptureStatusNone)
        return false;
    bool ready = cudaMalloc(&c, bytes) == cudaSuccess &&
                 cudaMemsetAsync(c, 0, bytes, d->queue) == cudaSuccess &&
                 cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess;
    int best = -1;
    float best_ms = 0.0f;
    for (int i = 0; i < n && ready; i++) {
        float ms = time_of(d, call, a, c, &algo[i], begin, end);
        if (ms >= 0.0f && (best < 0 || ms < best_ms)) {
            best = i;
            best_ms = ms;
        }
    }
    if (best > 0) {
        cublasLtMatmulAlgo_t first = algo[0];
        algo[0] = algo[best];
        algo[best] = first;
    }
    if (begin)
        cudaEventDestroy(begin);
    if (end)
        cudaEventDestroy(end);
    cudaFree(c);
    cudaGetLastError(); /* what did not run here is no error of the next operation */
    return best >= 0;
}

/// $XDG_CACHE_HOME or ~/.cache, then ckaqad/cublaslt-<device>-<version>.txt; empty without either.
void name_file(char *path, size_t size, int index) {
    char device[128] = "";
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    cudaDeviceProp p;
    path[0] = 0;
    if (cudaGetDeviceProperties(&p, index) != cudaSuccess)
        return;
    for (size_t i = 0; i + 1 < sizeof device && p.name[i]; i++) {
        char ch = p.name[i];
        bool plain =
            (ch >= '0' && ch <= '9') || (ch >= 'A' && ch <= 'Z') || (ch >= 'a' && ch <= 'z');
        device[i] = plain ? ch : '-';
    }
    int n = 0;
    if (cache && cache[0] == '/')
        n = snprintf(path, size, "%s/ckaqad/cublaslt-%s-%zu.txt", cache, device,
                     cublasLtGetVersion());
    else if (home && home[0] == '/')
        n = snprintf(path, size, "%s/.cache/ckaqad/cublaslt-%s-%zu.txt", home, device,
                     cublasLtGetVersion());
    if (n < 0 || (size_t)n >= size)
        path[0] = 0;
}

/// A line of the file: the key, then the algorithm as eight words. A file that reads otherwise is
/// read up to there.
void read_tuned(lt_table *t) {
    char *text = NULL;
    int64_t bytes = 0;
    if (!t->path[0] || !cq_file_exists(t->path) || cq_file_read(&text, &bytes, t->path) != CQ_OK)
        return;
    for (char *line = text; *line;) {
        lt_key key = {};
        cublasLtMatmulAlgo_t algo;
        int used = 0;
        int n = sscanf(line,
                       "%" SCNd64 " %" SCNd64 " %" SCNd64 " %" SCNd64 " %" SCNd64 " %" SCNd64
                       " %" SCNd32 " %" SCNd32 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64
                       " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 "%n",
                       &key.m, &key.n, &key.k, &key.lda, &key.ldb, &key.ldc, &key.form, &key.align,
                       &algo.data[0], &algo.data[1], &algo.data[2], &algo.data[3], &algo.data[4],
                       &algo.data[5], &algo.data[6], &algo.data[7], &used);
        lt_entry *e = n == 16 && line[used] == '\n' ? entry_of(t, &key) : NULL;
        if (!e)
            break;
        put(t, e, &key, &algo, false, true);
        line += used + 1;
    }
    free(text);
}

/// Writes all tuned algorithms. A cache that cannot be written is tuned again by the next run.
void write_tuned(const lt_table *t) {
    enum { LINE = 8 * 21 + 8 * 17 + 1 };
    char folder[sizeof t->path], *slash;
    char *text = (char *)malloc((size_t)t->used * LINE + 1);
    size_t at = 0;
    if (!text || !t->path[0]) {
        free(text);
        return;
    }
    for (int64_t i = 0; i < t->size; i++) {
        const lt_entry *e = &t->entry[i];
        const lt_key *k = &e->key;
        if (!e->used || !e->tuned)
            continue;
        at += (size_t)snprintf(text + at, LINE,
                               "%" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64
                               " %" PRId64 " %" PRId32 " %" PRId32,
                               k->m, k->n, k->k, k->lda, k->ldb, k->ldc, k->form, k->align);
        for (int w = 0; w < 8; w++)
            at += (size_t)snprintf(text + at, 18, " %" PRIx64, e->algo.data[w]);
        text[at++] = '\n';
    }
    snprintf(folder, sizeof folder, "%s", t->path);
    slash = strrchr(folder, '/');
    *slash = 0;
    if (cq_folder_make(folder) == CQ_OK)
        cq_file_write(t->path, text, (int64_t)at);
    free(text);
}

/// A batch is not timed: its first product need not have others behind it.
int choose(cublasLtMatmulAlgo_t *out, cq_cuda_device *d, lt_call *call, const cq_matmul_args *a,
           lt_key key) {
    lt_table *t = (lt_table *)d->algos;
    bool bf16 = key.form & FORM_BF16;
    lt_entry *e = entry_of(t, &key);
    if (!e)
        return cq_fail(CQ_ENOMEM, "cuda: matmul: no memory for one more algorithm");
    if (e->used && !e->checked)
        e->checked = runs_here(&e->algo, d, call, bf16);
    if (!e->used || !e->checked) {
        cublasLtMatmulAlgo_t algo[CANDIDATES];
        int n = 0;
        CQ_TRY(candidates(algo, &n, d, call, a, &key));
        bool tuned = t->tune && !(key.form & FORM_BATCH) && fastest_first(algo, n, d, call, a);
        put(t, e, &key, &algo[0], true, tuned);
        if (tuned)
            write_tuned(t);
    }
    *out = e->algo;
    return CQ_OK;
}

int product(cq_cuda_device *d, const cq_matmul_args *a, bool bf16) {
    lt_call call;
    cublasLtMatmulAlgo_t algo;
    CQ_TRY(describe(&call, a, bf16));
    CQ_TRY(choose(&algo, d, &call, a, key_of(a, bf16)));
    LT_TRY(a, bf16 ? "in BF16" : "in FP32", multiply(d, &call, a, a->c, &algo));
    CQ_CUDA_END("matmul");
}

/// C = beta C, for k = 0.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    scale_only(T *c, int64_t m, int64_t n, int64_t ldc, float beta) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= m * n)
        return;
    T *at = c + i / n * ldc + i % n;
    cq_put(at, beta == 0.0f ? 0.0f : beta * cq_value(*at));
}

/// The product of a piece of k, what is not read where it lies brought to `room` first.
int rounded_piece(cq_stream *s, const cq_matmul_args *a, int64_t k0, int64_t k,
                  __nv_bfloat16 *room) {
    cq_matmul_args part = *a;
    operand x = operand_a(a), y = operand_b(a);
    __nv_bfloat16 *behind = room + values_of(x, k);
    part.k = k;
    part.beta = k0 > 0 ? 1.0 : a->beta;
    part.a = x.direct ? from_k(x, k0) : room;
    part.lda = x.direct ? a->lda : up8(a->ta ? a->m : k);
    part.b = y.direct ? from_k(y, k0) : behind;
    part.ldb = y.direct ? a->ldb : up8(a->tb ? k : a->n);
    if (!x.direct && !y.direct && !x.bf16 && !y.bf16) {
        CQ_TRY(bring<float>(s, &x, &y, k0, k, room, behind));
    } else {
        if (!x.direct)
            CQ_TRY(bring_one(s, &x, k0, k, room));
        if (!y.direct)
            CQ_TRY(bring_one(s, &y, k0, k, behind));
    }
    return product((cq_cuda_device *)s->device, &part, true);
}

/// Columns of C for which `bytes` hold what has to be brought, 0 when not even for one.
int64_t columns_in(const cq_matmul_args *a, int64_t bytes) {
    operand x = operand_a(a), y = operand_b(a);
    int64_t left = bytes / 2 - values_of(x, a->k);
    if (left < 0 || y.direct)
        return left < 0 ? 0 : a->n;
    int64_t n = left / (y.turned ? a->k : up8(a->k));
    return n >= 8 || y.turned ? n / 8 * 8 : n;
}

/// C in BF16 is written once: pieces of n.
int product_by_columns(cq_stream *s, const cq_matmul_args *a, int64_t bytes, __nv_bfloat16 *room) {
    int64_t width = columns_in(a, bytes);
    operand y = operand_b(a);
    if (width < 1)
        return cq_fail(CQ_ENOMEM, "cuda: matmul: %lld bytes for BF16 operands, more wanted",
                       (long long)bytes);
    for (int64_t n0 = 0; n0 < a->n; n0 += width) {
        cq_matmul_args part = *a;
        part.n = a->n - n0 < width ? a->n - n0 : width;
        part.b = (const char *)y.x + (a->tb ? n0 * a->ldb : n0) * (y.bf16 ? 2 : 4);
        part.b_bf16 = y.bf16;
        part.b16 = NULL;
        part.c = (__nv_bfloat16 *)a->c + n0;
        CQ_TRY(rounded_piece(s, &part, 0, a->k, room));
    }
    return CQ_OK;
}

int product_bf16(cq_stream *s, const cq_matmul_args *a) {
    operand x = operand_a(a), y = operand_b(a);
    int64_t few = a->k < 16 ? a->k : 16;
    int64_t all = 2 * (values_of(x, a->k) + values_of(y, a->k));
    int64_t least = 2 * (values_of(x, few) + values_of(y, few));
    int64_t bytes = s->bf16_scratch ? s->bf16_scratch_bytes : all;
    if (!y.x)
        return cq_fail(CQ_ESHAPE, "cuda: matmul: b16 alone with rows %lld apart, wanted 16 bytes",
                       (long long)a->ldb);
    if (all == 0)
        return rounded_piece(s, a, 0, a->k, NULL);
    void *room = s->bf16_scratch ? s->bf16_scratch : cq_cuda_scratch(s, bytes);
    if (!room)
        return CQ_ENOMEM;
    if (bytes < all && a->c_bf16)
        return product_by_columns(s, a, bytes, (__nv_bfloat16 *)room);
    if (bytes < least)
        return cq_fail(CQ_ENOMEM, "cuda: matmul: %lld bytes for BF16 operands, %lld wanted",
                       (long long)bytes, (long long)least);
    int64_t depth = bytes < all ? bytes / least * 16 : a->k;
    for (int64_t k0 = 0; k0 < a->k; k0 += depth)
        CQ_TRY(
            rounded_piece(s, a, k0, a->k - k0 < depth ? a->k - k0 : depth, (__nv_bfloat16 *)room));
    return CQ_OK;
}

} // namespace

extern "C" int cq_cuda_matmul_open(cq_cuda_device *d) {
    const char *tune = getenv("CKAQAD_CUDA_TUNE");
    cublasStatus_t status = cublasLtCreate((cublasLtHandle_t *)&d->lt);
    if (status != CUBLAS_STATUS_SUCCESS) {
        d->lt = NULL;
        return cq_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? CQ_ENOMEM : CQ_EIO,
                       "cuda: matmul: opening cuBLASLt: %s", cublasLtGetStatusName(status));
    }
    cudaError_t e = cudaMalloc(&d->workspace, WORKSPACE);
    lt_table *t = (lt_table *)calloc(1, sizeof *t);
    lt_entry *entry = (lt_entry *)calloc(FIRST_SIZE, sizeof *entry);
    if (e != cudaSuccess || !t || !entry) {
        if (e != cudaSuccess) {
            cudaGetLastError();
            d->workspace = NULL;
        }
        free(t);
        free(entry);
        cq_cuda_matmul_close(d);
        return cq_fail(CQ_ENOMEM, "cuda: matmul: %d bytes of workspace: %s", (int)WORKSPACE,
                       e != cudaSuccess ? cudaGetErrorString(e) : "no memory for its table");
    }
    d->workspace_bytes = WORKSPACE;
    t->entry = entry;
    t->size = FIRST_SIZE;
    t->tune = tune && tune[0] && strcmp(tune, "0") != 0;
    d->algos = t;
    if (t->tune) {
        name_file(t->path, sizeof t->path, d->index);
        read_tuned(t);
    }
    return CQ_OK;
}

extern "C" void cq_cuda_matmul_close(cq_cuda_device *d) {
    lt_table *t = (lt_table *)d->algos;
    if (t)
        free(t->entry);
    free(t);
    cudaFree(d->workspace);
    if (d->lt)
        cublasLtDestroy((cublasLtHandle_t)d->lt);
    d->algos = d->workspace = d->lt = NULL;
    d->workspace_bytes = 0;
}

extern "C" int cq_cuda_matmul(cq_stream *s, const cq_matmul_args *a) {
    CQ_CUDA_F32("matmul", a);
    if (a->m == 0 || a->n == 0)
        return CQ_OK;
    if (a->k == 0) {
        unsigned blocks = cq_blocks(a->m * a->n, THREADS);
        if (a->c_bf16)
            CQ_LAUNCH(scale_only<__nv_bfloat16>, blocks, THREADS, 0, s, (__nv_bfloat16 *)a->c, a->m,
                      a->n, a->ldc, (float)a->beta);
        else
            CQ_LAUNCH(scale_only<float>, blocks, THREADS, 0, s, (float *)a->c, a->m, a->n, a->ldc,
                      (float)a->beta);
        CQ_CUDA_END("matmul");
    }
    if (s->compute == CQ_COMPUTE_BF16)
        return product_bf16(s, a);
    if (a->a_bf16 || a->b_bf16 || a->c_bf16)
        return cq_fail(CQ_EUSAGE, "cuda: matmul: matrices in BF16, wanted BF16 products for them");
    return product((cq_cuda_device *)s->device, a, false);
}

extern "C" int cq_cuda_matmul_bf16(cq_stream *s, const cq_matmul_args *a) {
    return product((cq_cuda_device *)s->device, a, true);
}

/// The algorithm is that for TOGETHER of them, however many there are.
extern "C" int cq_cuda_matmul_batch(cq_stream *s, const cq_matmul_args *a, const cq_cuda_batch *b,
                                    bool bf16) {
    cq_cuda_device *d = (cq_cuda_device *)s->device;
    const int64_t size = bf16 ? 2 : 4;
    lt_call call;
    cublasLtMatmulAlgo_t algo;
    CQ_TRY(describe(&call, a, bf16));
    CQ_TRY(repeat(&call, a, b, TOGETHER));
    CQ_TRY(choose(&algo, d, &call, a, key_of_batch(a, b, bf16)));
    for (int64_t i = 0; i < b->count; i += TOGETHER) {
        cq_matmul_args some = *a;
        some.a = (const char *)a->a + i * b->a * size;
        some.b = (const char *)a->b + i * b->b * size;
        some.c = (float *)a->c + i * b->c;
        CQ_TRY(repeat(&call, a, b, b->count - i < TOGETHER ? b->count - i : TOGETHER));
        LT_TRY(a, bf16 ? "in BF16" : "in FP32", multiply(d, &call, &some, some.c, &algo));
    }
    CQ_CUDA_END("matmul");
}
