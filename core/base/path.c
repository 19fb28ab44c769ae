/// path.c - joining paths without silent truncation.
#include "core/base/error.h"
#include "core/base/file.h"
#include <stdio.h>

int cq_path_join(char *out, size_t size, const char *a, const char *b) {
    int n = snprintf(out, size, "%s/%s", a, b);
    return n >= 0 && (size_t)n < size
               ? CQ_OK
               : cq_fail(CQ_EUSAGE, "path: %s/%s is longer than %zu bytes", a, b, size);
}
