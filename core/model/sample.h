/// sample.h - one token from a row of logits.
#pragma once
#include "core/base/types.h"

/// A token and its weight, exp((logit - largest) / temperature).
typedef struct cq_candidate {
    double weight;
    int32_t id;
} cq_candidate;

/// Draws from softmax(logits / temperature) cut to the likeliest tokens that together hold top_p;
/// `uniform` in [0, 1) is the draw. Temperature 0: the largest, ties to the lowest id. room [vocab]
/// is scratch. CQ_ENUMERIC where a logit is NaN or infinite.
int cq_sample(int32_t *id, const double *logits, int64_t vocab, double temperature, double top_p,
              double uniform, cq_candidate *room);
/// log softmax(logits)[id].
double cq_sample_logprob(const double *logits, int64_t vocab, int32_t id);
