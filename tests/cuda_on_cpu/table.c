/* table.c - the table of the emulated device, named "cuda_on_cpu".

   An operation whose kernel file is not in the build is an error that names it. Before an operation
   runs, every pointer in its arguments must be NULL or lie on the device. Where plain.c has it and
   is asked for, that takes its place. */
#include <stdio.h>

#include "tests/cuda_on_cpu/plain.h"
#include "tests/cuda_on_cpu/pointers.h"

#define CQ_KERNEL(op) __attribute__((weak)) int cq_cuda_##op(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
extern const cq_kernels cq_cuda_on_cpu_kernels, cq_cuda_kernels;

static int check_pointer(const cq_stream *s, const char *op, const char *field, const void *p) {
    int64_t left;
    char text[96];
    if (!s->device || !p || cq_emu_memory_has(p, &left))
        return CQ_OK;
    if (!cq_emu_memory_explain(p, text, sizeof(text)))
        snprintf(text, sizeof(text), "the host's memory");
    return cq_fail(CQ_EUSAGE, "cuda: %s: %s points to %s, wanted device memory", op, field, text);
}

#define P(field) CQ_TRY(check_pointer(s, op, #field, a->field));
#define CQ_KERNEL(name)                                                                            \
    static int again_##name(cq_stream *s, const void *a);                                          \
    static int run_##name(cq_stream *s, const cq_##name##_args *a) {                               \
        static const char op[] = #name;                                                            \
        CQ_EMU_POINTERS_##name;                                                                    \
        if (cq_emu_recording())                                                                    \
            return cq_emu_keep(s, again_##name, a, sizeof *a);                                     \
        int plain =                                                                                \
            cq_emu_plain_##name && cq_emu_plain() ? cq_emu_plain_##name(s, a) : CQ_EMU_NOT_PLAIN;  \
        if (plain != CQ_EMU_NOT_PLAIN)                                                             \
            return plain;                                                                          \
        if (!cq_cuda_##name)                                                                       \
            return cq_fail(CQ_EUSAGE, "cuda: operation %s is not in this build", op);              \
        CQ_TRY(cq_cuda_##name(s, a));                                                              \
        return cq_emu_status(op);                                                                  \
    }                                                                                              \
    static int again_##name(cq_stream *s, const void *a) { return run_##name(s, a); }
#include "kernels/kernels.def"
#undef CQ_KERNEL

const cq_kernels cq_cuda_on_cpu_kernels = {
    .name = "cuda_on_cpu",
    .memory = &cq_emu_memory,
#define CQ_KERNEL(op) .op = run_##op,
#include "kernels/kernels.def"
#undef CQ_KERNEL
};

/* Where the library has the backend `cuda`, too, this takes its place, so that none of it is
 * linked. */
extern const cq_kernels cq_cuda_kernels __attribute__((alias("cq_cuda_on_cpu_kernels")));
