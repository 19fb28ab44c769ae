/* attention.c - attention in F32 and F64; the text is in attention.inc.h. */
#include "kernels/ref/ref.h"

#define CQ_REF_BODY "kernels/ref/attention.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(attention_forward)
CQ_REF_OP(attention_backward)
CQ_REF_OP(attention_cached)
