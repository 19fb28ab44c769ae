/// rate.h - how fast this machine multiplies matrices.
#pragma once
#include "kernels/kernels.h"

/// *rate = operations per second of an F32 product of 512 x 512 matrices on this stream, on a
/// device of 16384 x 16384 ones in the stream's precision: the fastest of a few, about a fifth of a
/// second of work. Needs no plan. CQ_ENOMEM.
CQ_API int cq_matmul_rate(const cq_stream *s, double *rate);
