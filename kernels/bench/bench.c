/* bench.c - ckaqad_bench: times every operation of kernels.def beside the copy bandwidth and the
 * matrix rate of the same run.
 *
 *     ckaqad_bench [--kernels=cpu] [--threads=0] [--seconds=0.3] [--compute=f32|bf16] [name ...]
 *
 * Names choose operations; a name matches the beginning of an operation's. The two ceilings are
 * measured before and after and the better value counts: a busy neighbour lowers them, nothing
 * raises them.
 */
#include "kernels/bench/bench.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/error.h"
#include "core/base/rng.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void require(bool ok, const char *what) {
    if (ok)
        return;
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}
static void check(int status) { require(status == CQ_OK, status ? cq_error() : ""); }

/* ---- buffers ---- */
enum { PATTERN = (1 << 24) + 7 };

void *bench_zeros(bench *b, int64_t n) {
    void *p = NULL;
    require(b->n_buffers < BENCH_MOST_BUFFERS, "too many buffers");
    if (b->s.table->memory)
        check(b->s.table->memory->take(&p, n, false));
    else {
        p = aligned_alloc(64, ((size_t)n + 127) / 64 * 64);
        require(p != NULL, "no memory for a buffer");
        memset(p, 0, (size_t)n);
    }
    b->bytes[b->n_buffers] = n;
    return b->buffer[b->n_buffers++] = p;
}
void bench_free(bench *b) {
    while (b->n_buffers > 0) {
        void *p = b->buffer[--b->n_buffers];
        if (b->s.table->memory)
            b->s.table->memory->give(p, b->bytes[b->n_buffers], false);
        else
            free(p);
    }
}
static void *host(int64_t bytes) {
    void *p = malloc((size_t)bytes + 1);
    require(p != NULL, "no memory on the host");
    return p;
}
/* A buffer with these bytes; `made` is freed. */
static void *filled(bench *b, void *made, int64_t bytes) {
    void *p = bench_zeros(b, bytes);
    if (b->s.table->memory)
        check(b->s.table->memory->copy(&b->s, p, made, bytes));
    else
        memcpy(p, made, (size_t)bytes);
    free(made);
    return p;
}
static float *random_floats(bench *b, int64_t n) {
    float *x = host(n * (int64_t)sizeof(*x));
    uint64_t state = ++b->drawn;
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    return x;
}
float *bench_floats(bench *b, int64_t n) {
    if (!b->pattern)
        return filled(b, random_floats(b, n), n * (int64_t)sizeof(float));
    float *x = bench_zeros(b, n * (int64_t)sizeof(*x));
    int64_t shift = (int64_t)(++b->drawn % 1000) * 16;
    for (int64_t at = 0; at < n; at += PATTERN - shift) {
        int64_t piece = n - at < PATTERN - shift ? n - at : PATTERN - shift;
        check(b->s.table->memory->copy(&b->s, x + at, b->pattern + shift,
                                       piece * (int64_t)sizeof(*x)));
    }
    return x;
}
void *bench_bf16(bench *b, int64_t n) {
    float *x = bench_floats(b, n);
    void *y = bench_zeros(b, 2 * n);
    check(CQ_RUN(&b->s, round_bf16, .dtype = CQ_F32, .n = n, .x = x, .y = y));
    return y;
}
float *bench_float(bench *b, float value) {
    float *x = host(sizeof(*x));
    *x = value;
    return filled(b, x, sizeof(*x));
}
int32_t *bench_ints(bench *b, int64_t n, int64_t below) {
    int32_t *x = host(n * (int64_t)sizeof(*x));
    b->drawn++;
    for (int64_t i = 0; i < n; i++)
        x[i] = (int32_t)cq_random_below(1, b->drawn, (uint64_t)i, below);
    return filled(b, x, n * (int64_t)sizeof(*x));
}
int32_t *bench_permutation(bench *b, int64_t n) {
    int32_t *x = host(n * (int64_t)sizeof(*x));
    int64_t *order = host(n * (int64_t)sizeof(*order));
    cq_random_permutation(order, n, 1, ++b->drawn);
    for (int64_t i = 0; i < n; i++)
        x[i] = (int32_t)order[i];
    free(order);
    return filled(b, x, n * (int64_t)sizeof(*x));
}
int64_t *bench_bounds(bench *b, int64_t parts, int64_t total) {
    int64_t *x = host((parts + 1) * (int64_t)sizeof(*x));
    for (int64_t i = 0; i <= parts; i++)
        x[i] = total * i / parts;
    return filled(b, x, (parts + 1) * (int64_t)sizeof(*x));
}

/* ---- times ---- */
bench_times *bench_clock(bench *b) {
    bench_times *t = calloc(1, sizeof(*t));
    require(t != NULL, "no memory for times");
    t->calls = 1;
    if (b->s.table->memory)
        check(b->s.table->memory->wait(&b->s));
    return t;
}
bool bench_begin(bench *b, bench_times *t) {
    if (t->n == BENCH_MOST_RUNS || (t->n >= 7 && t->total > b->seconds))
        return false;
    t->begun = now();
    return true;
}
/* On a device so many calls are made between two waits that a wait costs nothing. */
void bench_end(bench *b, bench_times *t, int status) {
    if (status == CQ_OK && b->s.table->memory)
        status = b->s.table->memory->wait(&b->s);
    double took = now() - t->begun;
    check(status);
    t->at[t->n++] = took / t->calls;
    t->total += took;
    if (b->s.table->memory && t->n == 2 && !t->sized) { /* the first made the libraries ready */
        double each = t->at[1];
        t->calls = each > 0.01 ? 1 : (int)(0.01 / each) + 1;
        t->sized = true;
        t->n = 1;
    }
}
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double sorted(const bench_times *t, double share) {
    double copy[BENCH_MOST_RUNS];
    int n = t->n - 1; /* the first run touches the pages and warms the caches */
    memcpy(copy, t->at + 1, (size_t)n * sizeof(*copy));
    qsort(copy, (size_t)n, sizeof(*copy), ascending);
    return copy[(int)(share * (n - 1))];
}
double bench_median(const bench_times *t) { return sorted(t, 0.5); }

void bench_report(bench *b, const char *op, const char *label, const bench_times *t, double flops,
                  double bytes) {
    double median = bench_median(t), best = sorted(t, 0.0);
    if (b->csv)
        fprintf(b->csv, "%s,%s,%.3f,%.3f,%.0f,%.0f,%.1f,%.1f\n", op, label, median * 1e6,
                best * 1e6, bytes, flops, bytes / median * 1e-9, flops / median * 1e-9);
    printf("| %-19s | %-22s | %10.1f | %10.1f | %6.1f | %5.0f %% |", op, label, median * 1e6,
           best * 1e6, bytes / median * 1e-9, 100.0 * bytes / median / b->copy);
    if (flops > 0.0)
        printf(" %6.1f | %5.0f %% |\n", flops / median * 1e-9, 100.0 * flops / median / b->rate);
    else
        printf(" %6s | %7s |\n", "", "");
    fflush(stdout);
}

/* ---- ceilings ---- */
/// memcpy of 64 MiB, each thread its part, or of 2 GiB on a device; read and written bytes count.
static double copy_bandwidth(bench *b) {
    const cq_memory *device = b->s.table->memory;
    int64_t n = (int64_t)64 << (device ? 25 : 20), team = b->s.threads;
    char *from = bench_zeros(b, n), *to = bench_zeros(b, n);
    bench_times *t = bench_clock(b);
    while (bench_begin(b, t)) {
        int status = CQ_OK;
        for (int i = 0; i < t->calls && device && status == CQ_OK; i++)
            status = device->copy(&b->s, to, from, n);
#pragma omp parallel for schedule(static) num_threads((int)team)
        for (int64_t i = 0; i < (device ? 0 : team); i++)
            memcpy(to + n * i / team, from + n * i / team,
                   (size_t)(n * (i + 1) / team - n * i / team));
        bench_end(b, t, status);
    }
    double best = sorted(t, 0.1);
    free(t);
    bench_free(b);
    return 2.0 * (double)n / best;
}
/// FP32 product of 1024 x 1024 x 1024; on a device 8192 x 8192 x 8192 in the precision asked for.
static double matrix_rate(bench *b) {
    int64_t n = b->s.table->memory ? 8192 : 1024;
    cq_compute compute = b->s.compute;
    cq_matmul_args a = {.dtype = CQ_F32,
                        .tb = true,
                        .m = n,
                        .n = n,
                        .k = n,
                        .a = bench_floats(b, n * n),
                        .lda = n,
                        .b = bench_floats(b, n * n),
                        .ldb = n,
                        .c = bench_floats(b, n * n),
                        .ldc = n,
                        .alpha = 1.0};
    bench_times *t = bench_clock(b);
    if (!b->s.table->memory)
        b->s.compute = CQ_COMPUTE_F32;
    while (bench_begin(b, t)) {
        int status = CQ_OK;
        for (int i = 0; i < t->calls && status == CQ_OK; i++)
            status = b->s.table->matmul(&b->s, &a);
        bench_end(b, t, status);
    }
    b->s.compute = compute;
    double best = sorted(t, 0.1);
    free(t);
    bench_free(b);
    return 2.0 * (double)(n * n * n) / best;
}

/* ---- the program ---- */
typedef struct entry {
    const char *name;
    void (*run)(bench *);
} entry;
static const entry entries[] = {
#define CQ_KERNEL(op) {#op, bench_##op},
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
enum { N_ENTRIES = (int)(sizeof(entries) / sizeof(*entries)) };

/// The value of option `name` in argument `arg`, or NULL.
static const char *option(const char *arg, const char *name) {
    size_t n = strlen(name);
    return strncmp(arg, name, n) == 0 && arg[n] == '=' ? arg + n + 1 : NULL;
}
static bool chosen(const char *op, int argc, char **argv) {
    bool any = false;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-')
            continue;
        if (strncmp(op, argv[i], strlen(argv[i])) == 0)
            return true;
        any = true;
    }
    return !any;
}
static void ceilings(bench *b, const char *when) {
    double copy = copy_bandwidth(b), rate = matrix_rate(b);
    int n = b->s.table->memory ? 8192 : 1024;
    bool bf16 = b->s.table->memory && b->s.compute == CQ_COMPUTE_BF16;
    printf("%s: copy %.1f GB/s, %s product of %d x %d x %d %.1f GF/s\n", when, copy * 1e-9,
           bf16 ? "F32 tensors' BF16" : "FP32", n, n, n, rate * 1e-9);
    b->copy = copy > b->copy ? copy : b->copy;
    b->rate = rate > b->rate ? rate : b->rate;
}
/// The processor's name, from the system.
static void processor(char *name, size_t size) {
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256];
    snprintf(name, size, "unknown processor");
    while (f && fgets(line, sizeof(line), f)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon)
            continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(name, size, "%s", colon + 2);
        break;
    }
    if (f)
        fclose(f);
}

static bool host_scratch(bench *b) {
    b->s.scratch_bytes = 64 << 20;
    b->s.bf16_scratch_bytes = 256 << 20;
    b->s.scratch = aligned_alloc(64, (size_t)(b->s.scratch_bytes * b->s.threads));
    b->s.bf16_scratch = aligned_alloc(64, (size_t)b->s.bf16_scratch_bytes);
    return b->s.scratch && b->s.bf16_scratch;
}
static void open_device(bench *b, char *name, size_t size) {
    const cq_memory *device = b->s.table->memory;
    check(device->open(&b->s, 0));
    check(device->describe(name, (int64_t)size));
    void *scratch = NULL, *pattern = NULL;
    b->s.bf16_scratch_bytes = (int64_t)6 << 30;
    check(device->take(&scratch, b->s.bf16_scratch_bytes, false));
    b->s.bf16_scratch = scratch;
    float *made = random_floats(b, PATTERN);
    check(device->take(&pattern, PATTERN * (int64_t)sizeof(*made), false));
    check(device->copy(&b->s, pattern, made, PATTERN * (int64_t)sizeof(*made)));
    b->pattern = pattern;
    free(made);
}

typedef struct arguments {
    int argc;
    char **argv;
} arguments;
static bool is_wanted(const char *op, void *context) {
    const arguments *a = context;
    return chosen(op, a->argc, a->argv);
}

int main(int argc, char **argv) {
    const char *kernels = "cpu", *csv = NULL, *value;
    int threads = 0;
    bench b = {.seconds = 0.3};
    for (int i = 1; i < argc; i++) {
        if ((value = option(argv[i], "--kernels")))
            kernels = value;
        else if ((value = option(argv[i], "--threads")))
            threads = atoi(value);
        else if ((value = option(argv[i], "--seconds")))
            b.seconds = atof(value);
        else if ((value = option(argv[i], "--compute")))
            b.s.compute = strcmp(value, "bf16") == 0 ? CQ_COMPUTE_BF16 : CQ_COMPUTE_F32;
        else if ((value = option(argv[i], "--csv")))
            csv = value;
        else if (argv[i][0] == '-') {
            fprintf(stderr, "ckaqad_bench [--kernels=cpu|ref|cuda] [--threads=N] [--seconds=S] "
                            "[--compute=f32|bf16] [--csv=FILE] [operation ...]\n");
            return 2;
        }
    }
    b.s.table = cq_kernels_find(kernels);
    if (!b.s.table) {
        fprintf(stderr, "bench: no kernels named %s, wanted cpu or ref\n", kernels);
        return 2;
    }
    b.s.threads = cq_threads_set(threads);
    char name[128], date[32];
    time_t today = time(NULL);
    processor(name, sizeof(name));
    if (csv)
        require((b.csv = fopen(csv, "w")) != NULL, "the CSV file cannot be written");
    if (b.csv)
        fprintf(b.csv, "operation,case,median_us,best_us,bytes,flops,GB_per_s,GF_per_s\n");
    const cq_memory *device = b.s.table->memory;
    if (device)
        open_device(&b, name, sizeof(name));
    else
        require(host_scratch(&b), "no memory for scratch");
    strftime(date, sizeof(date), "%Y-%m-%d", gmtime(&today));
    printf("%s, %s, %s kernels (%s), %d threads\n", date, name, kernels,
           strcmp(kernels, "cpu") == 0 ? cq_cpu_isa()
           : device                    ? "device"
                                       : "scalar",
           b.s.threads);
    ceilings(&b, "before");
    printf(
        "\n| operation           | case                   |  median us |    best us |   GB/s | of "
        "copy |  GF/s | of matmul |\n|---|---|---|---|---|---|---|---|\n");
    arguments list = {argc, argv};
    if (device)
        bench_true_size(&b, is_wanted, &list);
    for (int i = 0; i < N_ENTRIES && !device; i++)
        if (chosen(entries[i].name, argc, argv))
            entries[i].run(&b);
    printf("\n");
    ceilings(&b, "after");
    if (b.csv)
        fprintf(b.csv, "ceilings,%s,,,,,%.1f,%.1f\n", name, b.copy * 1e-9, b.rate * 1e-9);
    if (b.csv)
        fclose(b.csv);
    return 0;
}
