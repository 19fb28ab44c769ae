/* route.c - the reference router: route.inc.h for both dtypes, and the sort of (token, slot) pairs
   by expert, which has no floating-point values.

   The sort is a counting sort, so pairs of one expert stay in token order. */
#include "kernels/ref/ref.h"
#define CQ_REF_BODY "kernels/ref/route.inc.h"
#include "kernels/ref/both.inc.h"

CQ_REF_OP(route_forward)
CQ_REF_OP(route_backward)

int cq_ref_route_sort(cq_stream *s, const cq_route_sort_args *a) {
    (void)s;
    int64_t n = a->tokens * a->top_k;
    int64_t *offsets = a->offsets;
    memset(offsets, 0, (size_t)(a->experts + 1) * sizeof(*offsets));
    for (int64_t i = 0; i < n; i++) {
        if (a->sel[i] < 0 || a->sel[i] >= a->experts)
            return cq_fail(CQ_EDATA, "route sort: expert %d, wanted 0 .. %lld", a->sel[i],
                           (long long)a->experts - 1);
        offsets[a->sel[i] + 1]++;
    }
    for (int64_t e = 0; e < a->experts; e++)
        offsets[e + 1] += offsets[e];
    /* offsets[e] runs through e's rows and stops where e + 1 began; the shift puts the starts back
     */
    for (int64_t i = 0; i < n; i++) {
        int64_t row = offsets[a->sel[i]]++;
        a->token[row] = (int32_t)(i / a->top_k);
        a->position[i] = (int32_t)row;
    }
    memmove(offsets + 1, offsets, (size_t)a->experts * sizeof(*offsets));
    offsets[0] = 0;
    return CQ_OK;
}
