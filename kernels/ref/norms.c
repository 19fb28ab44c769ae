/* norms.c - the RMS norms in F32 and F64; the text is in norms.inc.h. */
#include "kernels/ref/ref.h"

#define CQ_REF_BODY "kernels/ref/norms.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(rmsnorm_forward)
CQ_REF_OP(rmsnorm_backward)
CQ_REF_OP(gatednorm_forward)
CQ_REF_OP(gatednorm_backward)
CQ_REF_OP(headnorm_forward)
CQ_REF_OP(headnorm_backward)
