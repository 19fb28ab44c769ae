/* mamba.c - the convolution and the SSD recurrence of Mamba-2 in F32 and F64; the text is in
 * mamba.inc.h. */
#include "kernels/ref/ref.h"

#define CQ_REF_BODY "kernels/ref/mamba.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(conv_forward)
CQ_REF_OP(conv_backward)
CQ_REF_OP(conv_cached)
CQ_REF_OP(ssd_forward)
CQ_REF_OP(ssd_backward)
CQ_REF_OP(ssd_cached)
