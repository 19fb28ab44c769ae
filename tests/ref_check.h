/// ref_check.h - what the tests of reference operations share beside finite.h: calls, closeness,
/// golden files.
///
/// Seeds are literals in the tests; a failure names the entry.
#pragma once
#include "core/base/rng.h"
#include "core/tensor/safetensors.h"
#include "kernels/ref/ref.h"
#include "tests/finite.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())
/// Runs one reference operation in F64 and expects success.
#define REF(op, ...) OK(cq_ref_kernels.op(NULL, &(cq_##op##_args){.dtype = CQ_F64, __VA_ARGS__}))
/// The status of one reference operation whose arguments are given in full.
#define REF_STATUS(op, ...) cq_ref_kernels.op(NULL, &(cq_##op##_args){__VA_ARGS__})

static inline double *check_copy(const double *x, int64_t n) {
    double *y = finite_zeros(n);
    memcpy(y, x, (size_t)n * sizeof(*y));
    return y;
}

static inline double check_dot(const double *x, const double *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/// |x - y| <= tolerance * largest |y|, entry by entry.
static inline void check_close(const double *x, const double *y, int64_t n, double tolerance,
                               const char *what) {
    double top = 0, worst = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        top = fmax(top, fabs(y[i]));
        if (!(fabs(x[i] - y[i]) <= worst)) {
            worst = fabs(x[i] - y[i]);
            at = i;
        }
    }
    cr_expect(worst <= tolerance * top, "%s: %g at %lld of %lld, wanted %g", what, x[at],
              (long long)at, (long long)n, y[at]);
}

static inline void check_near(double x, double y, double tolerance, const char *what) {
    cr_expect(fabs(x - y) <= tolerance, "%s: %.17g, wanted %.17g within %g", what, x, y, tolerance);
}

static inline cq_safetensors *check_golden(const char *name) {
    char path[1024];
    cq_safetensors *file = NULL;
    snprintf(path, sizeof(path), "%s/golden/%s.golden.safetensors", CQ_TESTS, name);
    OK(cq_safetensors_open(&file, path));
    return file;
}

static inline cq_tensor check_tensor(const cq_safetensors *file, const char *group,
                                     const char *key) {
    char name[256];
    snprintf(name, sizeof(name), "%s%s%s", group, *group ? "." : "", key);
    const cq_entry *e = cq_safetensors_find(file, name);
    cr_assert_not_null(e, "golden file: no tensor %s", name);
    return e->tensor;
}

/// A copy of a tensor of floats as another dtype; the caller frees it.
static inline void *check_as(cq_tensor t, cq_dtype dtype) {
    int64_t n = cq_tensor_elems(t);
    void *x = calloc((size_t)n, (size_t)cq_dtype_bytes(dtype));
    cr_assert_not_null(x);
    OK(cq_convert(x, dtype, t.data, t.dtype, n));
    return x;
}
