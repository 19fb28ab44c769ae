/* update.c - the reference AdamW and vector operations: update.inc.h for both dtypes. */
#include "kernels/update.h"
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/update.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(adamw)
CQ_REF_OP(sumsq)
CQ_REF_OP(axpy)
CQ_REF_OP(round_bf16)
CQ_REF_OP(widen)
