/* rows.c - the reference row movements: rows.inc.h for both dtypes. */
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/rows.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(gather_rows)
CQ_REF_OP(scatter_rows)
CQ_REF_OP(combine_forward)
CQ_REF_OP(combine_backward)
CQ_REF_OP(ungather_rows)
CQ_REF_OP(embed_forward)
CQ_REF_OP(embed_backward)
