/// quant_stats.c - signal-to-quantization-noise of weights, and the E4M3 scales of their blocks.
///
/// Only reads: sums are in double, scales come from the codec that wrote the fake-quantized
/// weights.
#include "core/model/quant_stats.h"
#include "core/base/error.h"
#include "kernels/nvfp4.h"
#include <math.h>

enum { BLOCK = 16 };

static double element(const cq_tensor *t, int64_t i) {
    return t->dtype == CQ_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

/* The E4M3 code of block i; a zero tensor keeps scale one in all its blocks, as its export does. */
static uint8_t scale_code(const cq_param *p, int64_t i, const float x[BLOCK]) {
    int saturated;
    if (!(p->amax > 0))
        return 0x38;
    if (p->block_amax.data)
        return cq_nvfp4_scale_static(((const float *)p->block_amax.data)[i], p->amax, p->top);
    return cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(x), cq_nvfp4_tensor_scale(p->amax, 448),
                                  &saturated);
}

int cq_quant_stats_add(cq_quant_stats *out, const cq_param *p) {
    if (!p->quantized || p->fq.data == p->value.data)
        return cq_fail(CQ_EUSAGE, "quantization error: %s %s", p->name,
                       p->quantized ? "was read from an NVFP4 folder, wanted a student of a BF16 "
                                      "model, which keeps master weights"
                                    : "is not quantized, wanted a quantized weight");
    int64_t n = cq_tensor_elems(p->value) / BLOCK;
    for (int64_t i = 0; i < n; i++) {
        float x[BLOCK];
        double signal = 0, noise = 0;
        for (int64_t k = 0; k < BLOCK; k++) {
            double w = element(&p->value, BLOCK * i + k), e = element(&p->fq, BLOCK * i + k) - w;
            x[k] = (float)w;
            signal += w * w;
            noise += e * e;
        }
        out->signal += signal;
        out->noise += noise;
        uint8_t code = scale_code(p, i, x);
        if (code < 127)
            out->scales[code]++;
    }
    return CQ_OK;
}

double cq_quant_scale_log2(int64_t code) { return log2((double)cq_e4m3_decode((uint8_t)code)); }
