/// shares.h - a model's parameters dealt out over ranks: who updates which, and how gradients get
/// there and new weights back.
///
/// Micro-batch m of a step belongs to rank m mod R. After each round of R micro-batches the owner
/// of a parameter adds the ranks' gradients in rank order, so the sum runs over micro-batches 0, 1,
/// 2, ... whatever R is, and its bits do not depend on R. An expert that is dealt out
/// (cq_model_share_experts) belongs to its holder, whose backward has added its gradients up
/// already, and its new weights go nowhere. Internal to core/train.
#pragma once
#include "core/comm/comm.h"
#include "core/model/model.h"

typedef struct cq_shares {
    cq_comm *comm;
    cq_model *model;
    int64_t n;
    int *owner;       ///< [n] rank that updates it, and keeps its moments
    cq_tensor *sum;   ///< [n] gradient of the step so far, on the owner; no data elsewhere
    cq_piece *piece;  ///< [n]
    cq_tensor *coded; ///< [n] NVFP4 bytes and block scales on their way
    bool stale;       ///< masters of quantized parameters are current on their owners only
} cq_shares;

/// Whole parameters go to the rank that has least, the largest first.
int cq_shares_open(cq_shares *x, cq_model *m, cq_comm *comm);
void cq_shares_close(cq_shares *x);
bool cq_shares_own(const cq_shares *x, int64_t i);
/// Declares the sums.
int cq_shares_plan(cq_shares *x, cq_plan *p);
/// Adds a round: the gradients of the first `ranks` ranks, which are zero afterwards.
int cq_shares_add(cq_shares *x, cq_stream *s, int ranks);
int cq_shares_zero(cq_shares *x);
/// Sends the owners' new weights to all: quantized ones as NVFP4 codes and scales.
int cq_shares_spread(cq_shares *x, cq_stream *s);
/// Brings the masters of quantized parameters to all ranks, but for experts that are dealt out;
/// nothing to do when they are there.
int cq_shares_masters(cq_shares *x);
