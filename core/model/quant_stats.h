/// quant_stats.h - what the 4-bit copy of a weight loses, and how its block scales are spread.
#pragma once
#include "core/model/model.h"

/// Sums over weights, so that a block or a model is the sum of its matrices:
/// SQNR = 10 log10(signal / noise) dB.
typedef struct cq_quant_stats {
    double signal, noise; ///< sums of w^2 and (fq - w)^2
    int64_t scales[127];  ///< blocks of 16 by the E4M3 code of their scale, 0x00 to 0x7e
} cq_quant_stats;

/// Adds a quantized parameter's weights to `out`, from its master and fake-quantized values.
/// CQ_EUSAGE when it is not quantized, or was opened from an NVFP4 folder and has no master weight.
CQ_API int cq_quant_stats_add(cq_quant_stats *out, const cq_param *p);
/// log2 of the scale with an E4M3 code, -9 to 8.81; -INFINITY for code 0.
CQ_API double cq_quant_scale_log2(int64_t code);
