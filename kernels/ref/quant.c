/* quant.c - the reference fake quantization, packing and calibration maxima: quant.inc.h for both
 * dtypes. */
#include "kernels/nvfp4.h"
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/quant.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(fake_quant)
CQ_REF_OP(pack)
CQ_REF_OP(unpack)
CQ_REF_OP(amax)
