/* dispatch.c - the tables of the cpu backend, one per instruction set, and the choice among them.
 *
 * The best set that the processor has is taken. CKAQAD_ISA=generic, avx2 or avx512 in the
 * environment asks for another one, for tests and comparisons; one that the processor lacks, or an
 * unknown name, changes nothing, and cq_cpu_isa() tells what runs. A table is constant and nothing
 * is remembered between calls.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/ref/ref.h"

#define CQ_KERNEL(op) int cq_cpu_##op##_generic(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
static const cq_kernels table_generic = {
    .name = "cpu",
#define CQ_KERNEL(op) .op = cq_cpu_##op##_generic,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};

#ifdef CQ_HAS_avx2
#define CQ_KERNEL(op) int cq_cpu_##op##_avx2(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
static const cq_kernels table_avx2 = {
    .name = "cpu",
#define CQ_KERNEL(op) .op = cq_cpu_##op##_avx2,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
#endif
#ifdef CQ_HAS_avx512
#define CQ_KERNEL(op) int cq_cpu_##op##_avx512(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
static const cq_kernels table_avx512 = {
    .name = "cpu",
#define CQ_KERNEL(op) .op = cq_cpu_##op##_avx512,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};
#endif

typedef struct choice {
    const char *isa;
    const cq_kernels *table;
    bool runs;
} choice;

static choice choose(void) {
    choice sets[] = {
#ifdef CQ_HAS_avx512
        {"avx512", &table_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
#endif
#ifdef CQ_HAS_avx2
        {"avx2", &table_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"generic", &table_generic, true},
    };
    int n = (int)(sizeof(sets) / sizeof(*sets)), best = 0;
    const char *wanted = getenv("CKAQAD_ISA");
    for (int i = 0; wanted && i < n; i++)
        if (sets[i].runs && strcmp(wanted, sets[i].isa) == 0)
            return sets[i];
    while (!sets[best].runs)
        best++;
    return sets[best];
}

/* Test programs may have the kernels of `cuda` on the CPU, under both names (tests/cuda_on_cpu). */
#ifdef CQ_CUDA
extern const cq_kernels cq_cuda_kernels;
#else
extern const cq_kernels cq_cuda_kernels __attribute__((weak));
#endif
extern const cq_kernels cq_cuda_on_cpu_kernels __attribute__((weak));

const cq_kernels *cq_kernels_find(const char *name) {
    if (strcmp(name, "cpu") == 0)
        return choose().table;
    if (strcmp(name, "cuda") == 0)
        return &cq_cuda_kernels;
    if (strcmp(name, "cuda_on_cpu") == 0)
        return &cq_cuda_on_cpu_kernels;
    return strcmp(name, "ref") == 0 ? &cq_ref_kernels : NULL;
}

const char *cq_cpu_isa(void) { return choose().isa; }

#define CQ_KERNEL(op)                                                                              \
    int cq_cpu_##op(cq_stream *s, const cq_##op##_args *a) { return choose().table->op(s, a); }
#include "kernels/kernels.def"
#undef CQ_KERNEL
