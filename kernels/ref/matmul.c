/* matmul.c - matrix products in F32 and F64; the text is in matmul.inc.h. */
#include "kernels/nvfp4.h"
#include "kernels/ref/ref.h"

#define CQ_REF_BODY "kernels/ref/matmul.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(matmul)
CQ_REF_OP(matmul_grouped)
CQ_REF_OP(matmul_nvfp4)
