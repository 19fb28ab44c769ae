/// tensor.h - a dense row-major array that somebody else owns.
#pragma once
#include "core/base/dtype.h"

typedef struct cq_shape {
    int64_t dim[4]; ///< outermost first; unused entries 0
    int32_t rank;
} cq_shape;

typedef struct cq_tensor {
    void *data;
    cq_shape shape;
    cq_dtype dtype;
} cq_tensor;

/// Number of elements (1 for rank 0).
CQ_API int64_t cq_shape_elems(cq_shape shape);
/// Checked bytes of a shape that came from outside. CQ_ESHAPE for a rank outside 0..4, a negative
/// dimension or a product beyond 2^63; the message names no tensor, so put one before it with
/// cq_fail_in.
CQ_API int cq_shape_bytes(int64_t *out, cq_shape shape, cq_dtype dtype);
CQ_API bool cq_shape_equal(cq_shape a, cq_shape b);
CQ_API int64_t cq_tensor_elems(cq_tensor t);
CQ_API int64_t cq_tensor_bytes(cq_tensor t);
/// Rows [begin, begin + n) of the outermost dimension.
CQ_API cq_tensor cq_tensor_rows(cq_tensor t, int64_t begin, int64_t n);
/// Writes "[2, 3]" into text[size] and returns it.
CQ_API char *cq_shape_text(char *text, size_t size, cq_shape shape);

#ifndef CQ_CDEF
#define CQ_SHAPE1(a) ((cq_shape){{(a), 0, 0, 0}, 1})
#define CQ_SHAPE2(a, b) ((cq_shape){{(a), (b), 0, 0}, 2})
#define CQ_SHAPE3(a, b, c) ((cq_shape){{(a), (b), (c), 0}, 3})
#define CQ_SHAPE4(a, b, c, d) ((cq_shape){{(a), (b), (c), (d)}, 4})
#endif
