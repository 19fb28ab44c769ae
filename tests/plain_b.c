/* plain_b.c - the plain FP32 loops of losses, routing, rows and optimizer: the bodies of
   kernels/ref compiled with float sums. */
#include "kernels/nvfp4.h"
#include "kernels/ref/ranked.h"
#include "kernels/update.h"
#include "tests/plain_kernels.h"

#define real float
#define acc float
#define CQ_FN(op) op##_plain
#include "kernels/ref/geometry.inc.h"
#include "kernels/ref/logits.inc.h"
#include "kernels/ref/quant.inc.h"
#include "kernels/ref/route.inc.h"
#include "kernels/ref/rows.inc.h"
#include "kernels/ref/update.inc.h"
#undef real
#undef acc
#undef CQ_FN

CQ_PLAIN_OP(fake_quant)
CQ_PLAIN_OP(pack)
CQ_PLAIN_OP(unpack)
CQ_PLAIN_OP(amax)
CQ_PLAIN_OP(route_forward)
CQ_PLAIN_OP(route_backward)
CQ_PLAIN_OP(gather_rows)
CQ_PLAIN_OP(scatter_rows)
CQ_PLAIN_OP(combine_forward)
CQ_PLAIN_OP(combine_backward)
CQ_PLAIN_OP(ungather_rows)
CQ_PLAIN_OP(embed_forward)
CQ_PLAIN_OP(embed_backward)
CQ_PLAIN_OP(kl)
CQ_PLAIN_OP(top_logits)
CQ_PLAIN_OP(kl_cached)
CQ_PLAIN_OP(cross_entropy)
CQ_PLAIN_OP(gram)
CQ_PLAIN_OP(cka)
CQ_PLAIN_OP(cka_backward)
CQ_PLAIN_OP(rowloss)
CQ_PLAIN_OP(rowloss_backward)
CQ_PLAIN_OP(adamw)
CQ_PLAIN_OP(sumsq)
CQ_PLAIN_OP(axpy)
CQ_PLAIN_OP(round_bf16)
CQ_PLAIN_OP(widen)

/* whole numbers only: there is no other precision to run it in */
int cq_plain_route_sort(cq_stream *s, const cq_route_sort_args *a) {
    return cq_ref_route_sort(s, a);
}
/* in double in every way */
int cq_plain_balance(cq_stream *s, const cq_balance_args *a) { return cq_ref_balance(s, a); }
