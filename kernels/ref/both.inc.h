/* both.inc.h - includes CQ_REF_BODY for the two dtypes of ref: F32 and F64 buffers, sums in double.
 */
#define acc double

#define real float
#define CQ_FN(op) op##_f32
#include CQ_REF_BODY
#undef real
#undef CQ_FN

#define real double
#define CQ_FN(op) op##_f64
#include CQ_REF_BODY
#undef real
#undef CQ_FN

#undef acc
#undef CQ_REF_BODY
