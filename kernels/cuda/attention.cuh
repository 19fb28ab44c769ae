/// attention.cuh - what the FP32 and the BF16 attention share.
#pragma once
#include "kernels/cuda/docs.cuh"
#include "kernels/cuda/fake.cuh"

struct cq_heads {
    int64_t tokens, n_docs;
    const int64_t *starts;
    int64_t heads, kv_heads, dim;
    float scale;
    const void *q, *k, *v; ///< float, or __nv_bfloat16
    int64_t ldq, ldk, ldv;
};
template <typename Args> static inline cq_heads cq_heads_of(const Args *a) {
    cq_heads h = {};
    h.tokens = a->tokens, h.n_docs = a->n_docs, h.starts = a->starts;
    h.heads = a->heads, h.kv_heads = a->kv_heads, h.dim = a->head_dim, h.scale = (float)a->scale;
    h.q = a->q, h.k = a->k, h.v = a->v;
    h.ldq = a->ldq, h.ldk = a->ldk, h.ldv = a->ldv;
    return h;
}

/// What the forward writes. A block of 16 values lies in one head where `outq` is set.
template <typename T> struct cq_attended {
    T *out, *outq;
    cq_fq fq;
    float *lse;
};
/// Whether a forward quantizes as it writes; else that is done afterwards.
static inline bool cq_attention_fuses(const cq_attention_forward_args *a) {
    return a->outq && a->fq.amax && !a->fq.offsets && a->head_dim % 16 == 0;
}
template <typename T>
static inline cq_attended<T> cq_attended_of(const cq_attention_forward_args *a) {
    cq_attended<T> to = {};
    to.out = (T *)a->out, to.lse = (float *)a->lse;
    if (cq_attention_fuses(a))
        to.outq = (T *)a->outq, to.fq = a->fq;
    return to;
}

/// begin[i]: where the document of token q0 + i begins, for i < n; the threads of a block together.
__device__ __forceinline__ void cq_find_begins(int32_t *begin, const cq_heads &a, int64_t q0,
                                               int n) {
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        begin[i] = (int32_t)a.starts[cq_document_of(a.starts, a.n_docs, q0 + i)];
}

/// Whether attention_bf16.cu does this.
static inline bool cq_attention_has_bf16(const cq_heads &a) {
    return (a.dim == 64 || a.dim == 128) && a.scale > 0.0f;
}
int cq_attention_bf16_forward(cq_stream *s, const cq_attention_forward_args *a);
int cq_attention_bf16_backward(cq_stream *s, const cq_attention_backward_args *a);
