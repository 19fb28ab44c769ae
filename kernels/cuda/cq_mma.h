/// cq_mma.h - tensor-core fragments and asynchronous copies, one function each: PTX for a GPU,
/// plain C++ for the emulation.
///
/// With g = lane / 4 and t = lane % 4, low half of a register first (h = 0, 1):
///     A (16 x 16) register r: row g + 8 (r & 1), column 2 t + h + 8 (r >> 1)
///     B (16 x 8)  register r: k = 2 t + h + 8 r, n = g
///     C, D (16 x 8) value i:  row g + 8 (i >> 1), column 2 t + (i & 1)
/// ldmatrix: lanes 8 j to 8 j + 7 give the addresses of the rows of matrix j, 16-byte aligned;
/// register j is row g, columns 2 t + h of matrix j, transposed: row 2 t + h, column g. (The
/// layouts of PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".)
#pragma once
#include "kernels/cuda/cq_cuda.h"

/// Two values rounded to BF16, `low` in the low half.
__device__ __forceinline__ unsigned cq_bf16_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned *>(&pair);
}

#ifndef CQ_CUDA_ON_CPU

/// 2 to the x within 2^-22, in one instruction; denormal results are zero.
__device__ __forceinline__ float cq_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/// d += a b.
__device__ __forceinline__ void cq_mma_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void cq_ldmatrix_x4(unsigned r[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ __forceinline__ void cq_ldmatrix_x4_trans(unsigned r[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
/// 16 bytes into shared memory, of which `bytes` are read and the rest become zero; both sides are
/// 16-byte aligned.
__device__ __forceinline__ void cq_cp_async16(void *shared, const void *global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cq_cp_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most PENDING of the newest groups are under way.
template <int PENDING> __device__ __forceinline__ void cq_cp_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#else

static inline float cq_exp2(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

struct cq_mma_lane {
    float *d;
    const unsigned *a, *b;
};
static inline float cq_mma_half(unsigned pair, int high) {
    return __uint_as_float(high ? pair & 0xffff0000u : pair << 16);
}
static inline void cq_mma_run(void *const *lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const cq_mma_lane *l = static_cast<const cq_mma_lane *>(lanes[lane]);
        int g = lane >> 2, t = lane & 3;
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < 4; r++)
                a[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = cq_mma_half(l->a[r], h);
            for (int r = 0; r < 2; r++)
                b[2 * t + h + 8 * r][g] = cq_mma_half(l->b[r], h);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const cq_mma_lane *l = static_cast<const cq_mma_lane *>(lanes[lane]);
        for (int i = 0; i < 4; i++) {
            float sum = 0.0f;
            for (int k = 0; k < 16; k++)
                sum += a[(lane >> 2) + 8 * (i >> 1)][k] * b[k][2 * (lane & 3) + (i & 1)];
            l->d[i] += sum;
        }
    }
}
static inline void cq_mma_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    cq_mma_lane own = {d, a, b};
    cq_warp_collective(cq_mma_run, &own, "mma");
}

struct cq_ldmatrix_lane {
    unsigned *r;
    const uint16_t *row;
    bool trans;
};
static inline void cq_ldmatrix_run(void *const *lanes) {
    const uint16_t *row[32];
    for (int lane = 0; lane < 32; lane++)
        row[lane] = static_cast<const cq_ldmatrix_lane *>(lanes[lane])->row;
    for (int lane = 0; lane < 32; lane++) {
        const cq_ldmatrix_lane *l = static_cast<const cq_ldmatrix_lane *>(lanes[lane]);
        int g = lane >> 2, t = lane & 3;
        for (int j = 0; j < 4; j++) {
            unsigned half[2];
            for (int h = 0; h < 2; h++)
                half[h] = l->trans ? row[8 * j + 2 * t + h][g] : row[8 * j + g][2 * t + h];
            l->r[j] = half[0] | half[1] << 16;
        }
    }
}
static inline void cq_ldmatrix_any(unsigned r[4], const __nv_bfloat16 *row, bool trans) {
    if (((uintptr_t)row & 15) != 0 || !cq_emu_in_shared(row, 16))
        cq_emu_fail("ldmatrix: a row is not 16 aligned bytes of shared memory");
    cq_ldmatrix_lane own = {r, reinterpret_cast<const uint16_t *>(row), trans};
    cq_warp_collective(cq_ldmatrix_run, &own, "ldmatrix");
}
static inline void cq_ldmatrix_x4(unsigned r[4], const __nv_bfloat16 *row) {
    cq_ldmatrix_any(r, row, false);
}
static inline void cq_ldmatrix_x4_trans(unsigned r[4], const __nv_bfloat16 *row) {
    cq_ldmatrix_any(r, row, true);
}
static inline void cq_cp_async16(void *shared, const void *global, int bytes = 16) {
    cq_emu_cp_async(shared, global, 16, bytes);
}
static inline void cq_cp_commit() { cq_emu_cp_commit(); }
template <int PENDING> static inline void cq_cp_wait() { cq_emu_cp_wait(PENDING); }

#endif
