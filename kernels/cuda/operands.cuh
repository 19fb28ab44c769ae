/// operands.cuh - matrices of a product on their way to BF16: rounded from F32, or copied to rows
/// on 16 bytes, where they cannot be read as they lie.
#pragma once
#include "kernels/cuda/float4.cuh"

namespace {

enum { THREADS = 256 };

/// An operand on its way to BF16: rows of cols values, ld apart, to rows of to_ld, a multiple of 8;
/// what is between them becomes zero.
template <typename T> struct rounding {
    const T *x;
    __nv_bfloat16 *to;
    int64_t rows, cols, ld, to_ld;
};

template <typename T>
rounding<T> rounding_of(const T *x, int64_t rows, int64_t cols, int64_t ld, __nv_bfloat16 *to) {
    rounding<T> r = {x, to, rows, cols, ld, (cols + 7) / 8 * 8};
    if (ld == cols && cols % 8 == 0) { /* dense: one long row */
        r.rows = 1;
        r.cols = r.ld = r.to_ld = rows * cols;
    }
    return r;
}
template <typename T> int64_t rounding_blocks(const rounding<T> &r) {
    return cq_blocks(r.rows * (r.to_ld / 8), THREADS);
}

__device__ __forceinline__ unsigned pair(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned *>(&two);
}
/// Values 8 i to 8 i + 7 of the result.
template <typename T> __device__ __forceinline__ void round_eight(const rounding<T> &r, int64_t i) {
    int64_t chunks = r.to_ld / 8;
    if (i >= r.rows * chunks)
        return;
    int64_t row = r.rows == 1 ? 0 : i / chunks, col = (i - row * chunks) * 8;
    const T *x = r.x + row * r.ld + col;
    int64_t left = r.cols - col;
    float v[8];
    if (left >= 8 && ((uintptr_t)x & 15) == 0) {
        float4 lo = cq_load4(x, true);
        float4 hi = cq_load4(x + 4, true);
        v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
        v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = j < left ? cq_value(x[j]) : 0.0f;
    }
    uint4 packed;
    packed.x = pair(v[0], v[1]);
    packed.y = pair(v[2], v[3]);
    packed.z = pair(v[4], v[5]);
    packed.w = pair(v[6], v[7]);
    *reinterpret_cast<uint4 *>(r.to + row * r.to_ld + col) = packed;
}

/// The blocks of the first operand and then those of the second.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    round_operands(rounding<T> a, rounding<T> b, unsigned of_a) {
    if (blockIdx.x < of_a)
        round_eight(a, (int64_t)blockIdx.x * THREADS + threadIdx.x);
    else
        round_eight(b, (int64_t)(blockIdx.x - of_a) * THREADS + threadIdx.x);
}

int64_t up8(int64_t n) { return (n + 7) / 8 * 8; }

/// An operand of a product: where it is read in BF16, or what has to be rounded or copied first.
struct operand {
    const void *x;
    int64_t ld;
    bool bf16;   ///< x is
    bool direct; ///< and is read where it lies
    bool turned; ///< stored [k, side], else [side, k]
    int64_t side;
};
/// On 16 bytes, as every row then is.
bool on_chunks(const void *x, int64_t ld) { return ((uintptr_t)x & 15) == 0 && ld % 8 == 0; }

operand operand_a(const cq_matmul_args *a) {
    operand o = {a->a, a->lda, a->a_bf16, false, a->ta, a->m};
    o.direct = o.bf16 && on_chunks(o.x, o.ld);
    return o;
}
operand operand_b(const cq_matmul_args *a) {
    operand o = {a->b, a->ldb, a->b_bf16, false, !a->tb, a->n};
    if (!a->b_bf16 && a->b16 && on_chunks(a->b16, a->ldb)) {
        o.x = a->b16;
        o.bf16 = true;
    }
    o.direct = o.bf16 && on_chunks(o.x, o.ld);
    return o;
}
/// Values that a piece of k of it takes in scratch.
int64_t values_of(const operand &o, int64_t k) {
    return o.direct ? 0 : o.turned ? k * up8(o.side) : o.side * up8(k);
}
const void *from_k(const operand &o, int64_t k0) {
    int64_t at = o.turned ? k0 * o.ld : k0;
    return (const char *)o.x + at * (o.bf16 ? 2 : 4);
}
template <typename T>
rounding<T> piece_of(const operand &o, int64_t k0, int64_t k, __nv_bfloat16 *to) {
    const T *from = (const T *)from_k(o, k0);
    return o.turned ? rounding_of<T>(from, k, o.side, o.ld, to)
                    : rounding_of<T>(from, o.side, k, o.ld, to);
}

/// Brings pieces of k of one operand or of two of the same type to `to` and behind it.
template <typename T>
int bring(cq_stream *s, const operand *first, const operand *second, int64_t k0, int64_t k,
          __nv_bfloat16 *to, __nv_bfloat16 *to_second) {
    rounding<T> left = piece_of<T>(*first, k0, k, to), right = left;
    int64_t blocks_a = rounding_blocks(left), blocks = blocks_a;
    if (second) {
        right = piece_of<T>(*second, k0, k, to_second);
        blocks += rounding_blocks(right);
    }
    CQ_LAUNCH(round_operands<T>, (unsigned)blocks, THREADS, 0, s, left, right, (unsigned)blocks_a);
    return cq_cuda_status("matmul, rounding its operands");
}
int bring_one(cq_stream *s, const operand *o, int64_t k0, int64_t k, __nv_bfloat16 *to) {
    return o->bf16 ? bring<__nv_bfloat16>(s, o, NULL, k0, k, to, NULL)
                   : bring<float>(s, o, NULL, k0, k, to, NULL);
}

} // namespace
