/* geometry.c - the reference losses on hidden states: geometry.inc.h for both dtypes. */
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/geometry.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(gram)
CQ_REF_OP(cka)
CQ_REF_OP(cka_backward)
CQ_REF_OP(rowloss)
CQ_REF_OP(rowloss_backward)
