/// param.h - one checkpoint tensor as a model holds it, and how activations are kept.
#pragma once
#include "core/tensor/tensor.h"

/// One checkpoint tensor. Linear weights may be quantized: then `fq` is its fake-quantized copy.
typedef struct cq_param {
    char name[128]; ///< checkpoint name, ends in .weight, .bias, .A_log ...
    cq_shape shape; ///< as in the checkpoint
    cq_dtype disk;  ///< dtype in the checkpoint it came from (BF16 or F32)
    int32_t block;  ///< -1: embedding, final norm, head
    bool linear;    ///< a matrix product uses it: eligible for quantization
    bool buffer;    ///< not a parameter for the optimizer (e_score_correction_bias)
    bool trainable;
    bool quantized;
    int holder;         ///< the rank that alone has this expert: no data elsewhere; -1: all have
    const char *reason; ///< why a linear is not quantized, else NULL
    cq_tensor value;    ///< master weight; BF16 where the optimizer keeps it in fewer bits
    cq_tensor low;      ///< [rows, 2 cols] bytes: low halves of a split master, else no data
    cq_tensor fq; ///< what forward multiplies with: the fake-quantized copy, or the same memory as
                  ///< value; BF16 where the copy is kept as such. Whatever its form: cq_param_copy
    cq_tensor codes,
        scales;        ///< packed fq [rows, cols / 2] and [rows, cols / 16]; then fq has no data
    cq_tensor grad;    ///< no data when not trainable
    cq_tensor fq16;    ///< fq in BF16 where products on a device are BF16, else no data
    float amax;        ///< frozen weight maximum, shared in fused groups
    cq_tensor amax_at; ///< [1] the same where the kernels run
    float *amax_x;     ///< frozen input maximum; points into the model; NULL when the linear is not
                       ///< quantized
    cq_tensor block_amax; ///< static scales [rows, cols / 16] F32, else no data
    cq_tensor aside;      ///< block_amax while the model goes without (cq_model_searched_scales)
    float top;            ///< 448, or 256 for four-over-six: of static scales (cq_param_top)
    int64_t fuse;    ///< parameters with the same non-zero number share scales (q/k/v, gate/up)
    double lr_scale; ///< learning-rate factor, 1 unless a pattern says otherwise
} cq_param;

/// The largest block scale of the form that the parameter has now: dynamic scales go up to 448.
static inline float cq_param_top(const cq_param *p) { return p->block_amax.data ? p->top : 448.0f; }

typedef enum cq_mode {
    CQ_MODE_INFER,     ///< forward only
    CQ_MODE_SAVE,      ///< everything backward needs is kept
    CQ_MODE_RECOMPUTE, ///< block inputs are kept, the rest is computed again
} cq_mode;
