/* logits.c - the reference KL, cached KL and cross-entropy: logits.inc.h for both dtypes. */
#include "kernels/ref/ranked.h"
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/logits.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(kl)
CQ_REF_OP(top_logits)
CQ_REF_OP(kl_cached)
CQ_REF_OP(cross_entropy)
