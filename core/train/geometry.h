/// geometry.h - linear CKA of two sets of rows in four ways, for core/train/*.c only.
///
///     raw, or every dimension of both divided by its standard deviation over the teacher's rows;
///     unbiased (HSIC_1, Song et al. 2012, eq. 5) or biased (the centred Grams' inner product)
///
/// A few large dimensions of a residual stream may carry all of raw CKA; standardized, each counts
/// alike. The sums over features take n dim^2 operations on one thread: for small models.
#pragma once
#include "core/tensor/tensor.h"

enum { CQ_RAW_UNBIASED, CQ_RAW_BIASED, CQ_STANDARD_UNBIASED, CQ_STANDARD_BIASED, CQ_N_WAYS };

/// <K, L>, <K, K>, <L, L> of every way, summed over groups of rows.
typedef struct cq_geometry {
    double sum[CQ_N_WAYS][3];
} cq_geometry;

/// Adds a group: the student's rows x [n, dx] and the teacher's y [n, dy], host memory, F32 or F64,
/// n at least 4. Where dx and dy differ nothing is added to the standardized ways. CQ_ENOMEM.
int cq_geometry_add(cq_geometry *g, cq_tensor x, cq_tensor y);
/// CKA of a way; NaN where nothing was added or a side does not vary.
double cq_geometry_cka(const cq_geometry *g, int way);
