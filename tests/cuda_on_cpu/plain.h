/// plain.h - operations on activations in BF16 without the kernels (plain.c).
#pragma once
#include "tests/cuda_on_cpu/memory.h"

/// What a plain form gives where the kernel should run.
enum { CQ_EMU_NOT_PLAIN = 1 };
/// Whether plain forms are wanted: CKAQAD_CUDA_PLAIN=1.
bool cq_emu_plain(void);
/// Not every operation has one.
#define CQ_KERNEL(op)                                                                              \
    __attribute__((weak)) int cq_emu_plain_##op(cq_stream *s, const cq_##op##_args *a);
#include "kernels/kernels.def"
#undef CQ_KERNEL
