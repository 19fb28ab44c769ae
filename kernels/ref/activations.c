/* activations.c - SwiGLU and squared ReLU in F32 and F64; the text is in activations.inc.h. */
#include "kernels/ref/ref.h"

#define CQ_REF_BODY "kernels/ref/activations.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(swiglu_forward)
CQ_REF_OP(swiglu_backward)
CQ_REF_OP(relu2_forward)
CQ_REF_OP(relu2_backward)
