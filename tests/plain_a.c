/* plain_a.c - plain FP32 loops: matrix products, activations, norms, attention, convolution, SSD.
 */
#include "kernels/nvfp4.h"
#include "tests/plain_kernels.h"

#define real float
#define acc float
#define CQ_FN(op) op##_plain
#include "kernels/ref/activations.inc.h"
#include "kernels/ref/attention.inc.h"
#include "kernels/ref/mamba.inc.h"
#include "kernels/ref/matmul.inc.h"
#include "kernels/ref/norms.inc.h"

CQ_PLAIN_OP(matmul)
CQ_PLAIN_OP(matmul_grouped)
CQ_PLAIN_OP(matmul_nvfp4)
CQ_PLAIN_OP(rmsnorm_forward)
CQ_PLAIN_OP(rmsnorm_backward)
CQ_PLAIN_OP(gatednorm_forward)
CQ_PLAIN_OP(gatednorm_backward)
CQ_PLAIN_OP(headnorm_forward)
CQ_PLAIN_OP(headnorm_backward)
CQ_PLAIN_OP(attention_forward)
CQ_PLAIN_OP(attention_backward)
CQ_PLAIN_OP(attention_cached)
CQ_PLAIN_OP(conv_forward)
CQ_PLAIN_OP(conv_backward)
CQ_PLAIN_OP(conv_cached)
CQ_PLAIN_OP(ssd_forward)
CQ_PLAIN_OP(ssd_backward)
CQ_PLAIN_OP(ssd_cached)
CQ_PLAIN_OP(swiglu_forward)
CQ_PLAIN_OP(swiglu_backward)
CQ_PLAIN_OP(relu2_forward)
CQ_PLAIN_OP(relu2_backward)
