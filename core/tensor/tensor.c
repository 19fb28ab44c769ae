/// tensor.c - shapes and views. A shape that came from outside goes through cq_shape_bytes first:
/// it is the one place where products are checked, and everything after it may multiply freely.
#include "core/tensor/tensor.h"
#include "core/base/error.h"
#include <assert.h>
#include <stdio.h>

int64_t cq_shape_elems(cq_shape shape) {
    int64_t n = 1;
    for (int i = 0; i < shape.rank; i++)
        n *= shape.dim[i];
    return n;
}

int cq_shape_bytes(int64_t *out, cq_shape shape, cq_dtype dtype) {
    if (shape.rank < 0 || shape.rank > 4)
        return cq_fail(CQ_ESHAPE, "rank is %d, wanted 0 to 4", (int)shape.rank);
    int64_t n = cq_dtype_bytes(dtype);
    bool empty = false, over = false;
    for (int i = 0; i < shape.rank; i++) {
        if (shape.dim[i] < 0)
            return cq_fail(CQ_ESHAPE, "dimension %d is %ld, wanted 0 or more", i,
                           (long)shape.dim[i]);
        if (shape.dim[i] == 0)
            empty = true;
        else /* [2^40, 2^40, 0] overflows too: whoever multiplies from the left would */
            over |= __builtin_mul_overflow(n, shape.dim[i], &n);
    }
    if (over) {
        char text[96];
        return cq_fail(CQ_ESHAPE, "shape %s of %s is larger than 2^63 bytes",
                       cq_shape_text(text, sizeof text, shape), cq_dtype_name(dtype));
    }
    *out = empty ? 0 : n;
    return CQ_OK;
}

bool cq_shape_equal(cq_shape a, cq_shape b) {
    if (a.rank != b.rank)
        return false;
    for (int i = 0; i < a.rank; i++)
        if (a.dim[i] != b.dim[i])
            return false;
    return true;
}

int64_t cq_tensor_elems(cq_tensor t) { return cq_shape_elems(t.shape); }

int64_t cq_tensor_bytes(cq_tensor t) { return cq_tensor_elems(t) * cq_dtype_bytes(t.dtype); }

cq_tensor cq_tensor_rows(cq_tensor t, int64_t begin, int64_t n) {
    assert(t.shape.rank > 0 && begin >= 0 && n >= 0 && begin + n <= t.shape.dim[0]);
    int64_t row = cq_dtype_bytes(t.dtype);
    for (int i = 1; i < t.shape.rank; i++)
        row *= t.shape.dim[i];
    if (t.data)
        t.data = (char *)t.data + begin * row;
    t.shape.dim[0] = n;
    return t;
}

char *cq_shape_text(char *text, size_t size, cq_shape shape) {
    size_t at = 0;
    for (int i = 0; i < shape.rank && i < 4 && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%ld", i ? ", " : "[", (long)shape.dim[i]);
    if (at < size)
        snprintf(text + at, size - at, "%s", shape.rank > 0 ? "]" : "[]");
    return text;
}
