/// quant_stats.c - signal-to-quantization-noise of weights, and the E4M3 scales of their blocks.
///
/// Only reads: sums are in double, scales come from the codec that wrote the fake-quantized
/// weights.
#include "core/model/quant_stats.h"
#include "core/base/error.h"
#include "core/model/model.h"
#include "core/tensor/device.h"
#include "kernels/nvfp4.h"
#include <math.h>
#include <stdlib.h>

enum { BLOCK = 16 };

static double element(const cq_tensor *t, int64_t i) {
    return t->dtype == CQ_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

/* The E4M3 code of block i; a zero tensor keeps scale one in all its blocks, as its export does. */
static uint8_t scale_code(const cq_param *p, const float *block_amax, int64_t i,
                          const float x[BLOCK]) {
    int saturated;
    if (!(p->amax > 0))
        return 0x38;
    if (block_amax)
        return cq_nvfp4_scale_static(block_amax[i], p->amax, p->top);
    return cq_nvfp4_scale_dynamic(cq_nvfp4_block_amax(x), cq_nvfp4_tensor_scale(p->amax, 448),
                                  &saturated);
}

/* t: value, fake-quantized copy, static block maxima. */
static void add(cq_quant_stats *out, const cq_param *p, const cq_tensor t[3]) {
    int64_t n = cq_tensor_elems(p->value) / BLOCK;
    for (int64_t i = 0; i < n; i++) {
        float x[BLOCK];
        double signal = 0, noise = 0;
        for (int64_t k = 0; k < BLOCK; k++) {
            double w = element(&t[0], BLOCK * i + k), e = element(&t[1], BLOCK * i + k) - w;
            x[k] = (float)w;
            signal += w * w;
            noise += e * e;
        }
        out->signal += signal;
        out->noise += noise;
        uint8_t code = scale_code(p, t[2].data, i, x);
        if (code < 127)
            out->scales[code]++;
    }
}

int cq_quant_stats_add(cq_quant_stats *out, const cq_param *p) {
    if (!p->quantized || (p->fq.data == p->value.data && !p->codes.data))
        return cq_fail(CQ_EUSAGE, "quantization error: %s %s", p->name,
                       p->quantized ? "was read from an NVFP4 folder, wanted a student of a BF16 "
                                      "model, which keeps master weights"
                                    : "is not quantized, wanted a quantized weight");
    if (!p->value.data)
        return cq_fail(CQ_EUSAGE,
                       "quantization error: %s is quantized on rank %d alone, wanted "
                       "experts that are not dealt out",
                       p->name, p->holder);
    cq_tensor t[3] = {{0}};
    void *owned[3] = {NULL};
    int status = cq_param_master(&t[0], &owned[0], p);
    if (!status)
        status = cq_param_copy(&t[1], &owned[1], p);
    if (!status)
        status = cq_tensor_on_host(&t[2], &owned[2], p->block_amax);
    if (!status)
        add(out, p, t);
    for (int i = 0; i < 3; i++)
        free(owned[i]);
    return status;
}

double cq_quant_scale_log2(int64_t code) { return log2((double)cq_e4m3_decode((uint8_t)code)); }
