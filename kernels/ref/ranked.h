/// ranked.h - the one order of top-k over logits: the larger value first, the lower id first of
/// equals.
///
/// A double holds either dtype exactly, so F32 and F64 rank alike. A NaN equals everything.
#pragma once
#include "core/base/types.h"

typedef struct cq_ref_ranked {
    double value;
    int64_t id;
} cq_ref_ranked;

/// For qsort over cq_ref_ranked.
static inline int cq_ref_by_rank(const void *a, const void *b) {
    const cq_ref_ranked *x = a, *y = b;
    if (x->value != y->value && x->value == x->value && y->value == y->value)
        return x->value > y->value ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}
