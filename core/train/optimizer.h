/// optimizer.h - AdamW over a model's trainable parameters, writing the fake-quantized weights in
/// the same pass.
#pragma once
#include "core/comm/comm.h"
#include "core/model/model.h"

typedef struct cq_adamw_options {
    double beta1, beta2, eps, weight_decay;
    double clip;        ///< global-norm clipping; 0: none
    cq_moments moments; ///< how matrices of 4096 values and more keep m and v; all else F32
    cq_master master;   ///< how trained quantized linears keep their weights; all else F32
    uint64_t seed;      ///< of the stochastic rounding of both
    cq_comm *comm;      ///< ranks that share the step, each the moments of its own parameters
    bool ordered;       ///< add up micro-batches one by one (core/train/shares.h); many ranks do
} cq_adamw_options;

typedef struct cq_adamw cq_adamw;
/// Sets the model's master form, so it comes before plan_params. Moments and weights in fewer bits
/// (kernels/formats.h) want an F32 model.
CQ_API int cq_adamw_open(cq_adamw **out, cq_model *m, const cq_adamw_options *o);
CQ_API void cq_adamw_close(cq_adamw *a);
/// Declares both moments, and sums where micro-batches are added up one by one.
CQ_API int cq_adamw_plan(cq_adamw *a, cq_plan *p);
/// After each round of micro-batches, one on each of the first `ranks` ranks: adds their gradients
/// to the step's. All ranks call it. Nothing to do where the backward itself adds them up.
CQ_API int cq_adamw_add(cq_adamw *a, cq_stream *s, int ranks);
/// Brings the master weights of all quantized parameters to this rank, for export, but for experts
/// that are dealt out; all ranks call it.
CQ_API int cq_adamw_masters(cq_adamw *a);
/// Whether this rank updates parameter i, and keeps its moments.
CQ_API bool cq_adamw_owns(const cq_adamw *a, int64_t param);
CQ_API cq_comm *cq_adamw_comm(const cq_adamw *a);
/// Says that the masters are the same on all ranks (a checkpoint was read).
CQ_API void cq_adamw_fresh(cq_adamw *a);
/// The first half of cq_adamw_step, which does it itself where nobody did: sums the squares of the
/// gradients and waits, so that all results of the step can be read before a weight changes.
CQ_API int cq_adamw_measure(cq_adamw *a, cq_stream *s);
/// One step at `lr`, step counted from 1; *norm is the global gradient norm before clipping.
/// CQ_ENUMERIC names the parameter whose gradient is not finite, and nothing is changed then.
/// Weight decay skips tensors of rank 1. The gradients are zero afterwards.
CQ_API int cq_adamw_step(cq_adamw *a, cq_stream *s, double lr, int64_t step, double *norm);
/// Moment 0 (first) or 1 (second) of parameter i; no data where it is not trained, or not here.
CQ_API const cq_tensor *cq_adamw_moment(const cq_adamw *a, int64_t param, int which);
/// The scales of its blocks of 256 where it has 8 bits, else no data.
CQ_API const cq_tensor *cq_adamw_scale(const cq_adamw *a, int64_t param, int which);
