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

/* ---- buffers ---- */
void *bench_zeros(bench *b, int64_t n) {
    void *p = aligned_alloc(64, ((size_t)n + 127) / 64 * 64);
    if (!p || b->n_buffers == BENCH_MOST_BUFFERS) {
        fprintf(stderr, "bench: no memory for %lld bytes in buffer %d\n", (long long)n,
                b->n_buffers);
        exit(1);
    }
    memset(p, 0, (size_t)n);
    return b->buffer[b->n_buffers++] = p;
}
void bench_free(bench *b) {
    while (b->n_buffers > 0)
        free(b->buffer[--b->n_buffers]);
}
float *bench_floats(bench *b, int64_t n) {
    float *x = bench_zeros(b, n * (int64_t)sizeof(*x));
    uint64_t state = ++b->drawn;
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    return x;
}
int32_t *bench_ints(bench *b, int64_t n, int64_t below) {
    int32_t *x = bench_zeros(b, n * (int64_t)sizeof(*x));
    b->drawn++;
    for (int64_t i = 0; i < n; i++)
        x[i] = (int32_t)cq_random_below(1, b->drawn, (uint64_t)i, below);
    return x;
}
int32_t *bench_permutation(bench *b, int64_t n) {
    int32_t *x = bench_zeros(b, n * (int64_t)sizeof(*x));
    int64_t *order = bench_zeros(b, n * (int64_t)sizeof(*order));
    cq_random_permutation(order, n, 1, ++b->drawn);
    for (int64_t i = 0; i < n; i++)
        x[i] = (int32_t)order[i];
    return x;
}
int64_t *bench_bounds(bench *b, int64_t parts, int64_t total) {
    int64_t *x = bench_zeros(b, (parts + 1) * (int64_t)sizeof(*x));
    for (int64_t i = 0; i <= parts; i++)
        x[i] = total * i / parts;
    return x;
}

/* ---- times ---- */
bool bench_begin(bench *b, bench_times *t) {
    if (t->n == BENCH_MOST_RUNS || (t->n >= 7 && t->total > b->seconds))
        return false;
    t->begun = now();
    return true;
}
void bench_end(bench_times *t, int status) {
    double took = now() - t->begun;
    if (status != CQ_OK) {
        fprintf(stderr, "bench: %s\n", cq_error());
        exit(1);
    }
    t->at[t->n++] = took;
    t->total += took;
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
    printf("| %-19s | %-22s | %10.1f | %10.1f | %6.1f | %5.0f %% |", op, label, median * 1e6,
           best * 1e6, bytes / median * 1e-9, 100.0 * bytes / median / b->copy);
    if (flops > 0.0)
        printf(" %6.1f | %5.0f %% |\n", flops / median * 1e-9, 100.0 * flops / median / b->rate);
    else
        printf(" %6s | %7s |\n", "", "");
    fflush(stdout);
}

/* ---- ceilings ---- */
/// memcpy of 64 MiB, each thread its part; read and written bytes count.
static double copy_bandwidth(bench *b) {
    int64_t n = 64 << 20, team = b->s.threads;
    char *from = bench_zeros(b, n), *to = bench_zeros(b, n);
    bench_times *t = bench_zeros(b, (int64_t)sizeof(*t));
    while (bench_begin(b, t)) {
#pragma omp parallel for schedule(static) num_threads((int)team)
        for (int64_t i = 0; i < team; i++)
            memcpy(to + n * i / team, from + n * i / team,
                   (size_t)(n * (i + 1) / team - n * i / team));
        bench_end(t, CQ_OK);
    }
    double best = sorted(t, 0.1);
    bench_free(b);
    return 2.0 * (double)n / best;
}
/// FP32 product of 1024 x 1024 x 1024.
static double matrix_rate(bench *b) {
    int64_t n = 1024;
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
    bench_times *t = bench_zeros(b, (int64_t)sizeof(*t));
    b->s.compute = CQ_COMPUTE_F32;
    while (bench_begin(b, t))
        bench_end(t, b->s.table->matmul(&b->s, &a));
    b->s.compute = compute;
    double best = sorted(t, 0.1);
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
    printf("%s: copy %.1f GB/s, FP32 product of 1024 x 1024 x 1024 %.1f GF/s\n", when, copy * 1e-9,
           rate * 1e-9);
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

int main(int argc, char **argv) {
    const char *kernels = "cpu", *value;
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
        else if (argv[i][0] == '-') {
            fprintf(stderr, "ckaqad_bench [--kernels=cpu|ref] [--threads=N] [--seconds=S] "
                            "[--compute=f32|bf16] [operation ...]\n");
            return 2;
        }
    }
    b.s.table = cq_kernels_find(kernels);
    if (!b.s.table) {
        fprintf(stderr, "bench: no kernels named %s, wanted cpu or ref\n", kernels);
        return 2;
    }
    b.s.threads = cq_threads_set(threads);
    b.s.scratch_bytes = 64 << 20;
    b.s.bf16_scratch_bytes = 256 << 20;
    b.s.scratch = aligned_alloc(64, (size_t)(b.s.scratch_bytes * b.s.threads));
    b.s.bf16_scratch = aligned_alloc(64, (size_t)b.s.bf16_scratch_bytes);
    if (!b.s.scratch || !b.s.bf16_scratch)
        return 1;
    char name[128], date[32];
    time_t today = time(NULL);
    processor(name, sizeof(name));
    strftime(date, sizeof(date), "%Y-%m-%d", gmtime(&today));
    printf("%s, %s, %s kernels (%s), %d threads\n", date, name, kernels,
           strcmp(kernels, "cpu") == 0 ? cq_cpu_isa() : "scalar", b.s.threads);
    ceilings(&b, "before");
    printf(
        "\n| operation           | case                   |  median us |    best us |   GB/s | of "
        "copy |  GF/s | of matmul |\n|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < N_ENTRIES; i++)
        if (chosen(entries[i].name, argc, argv))
            entries[i].run(&b);
    printf("\n");
    ceilings(&b, "after");
    free(b.s.scratch);
    free(b.s.bf16_scratch);
    return 0;
}
