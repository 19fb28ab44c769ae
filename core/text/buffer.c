/// buffer.c - bytes that grow by half, with one sticky out-of-memory mark.
#include "core/text/buffer.h"

#include "core/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool reserve(cq_buffer *b, int64_t bytes) {
    if (b->failed)
        return false;
    if (b->room - b->bytes >= bytes)
        return true;
    int64_t room = b->room + b->room / 2 + bytes + 16;
    void *data = realloc(b->data, (size_t)room);
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->room = room;
    return true;
}

void cq_buffer_add(cq_buffer *b, const void *data, int64_t bytes) {
    if (bytes <= 0 || !reserve(b, bytes))
        return;
    memcpy((char *)b->data + b->bytes, data, (size_t)bytes);
    b->bytes += bytes;
}

void cq_buffer_add_text(cq_buffer *b, const char *text) {
    cq_buffer_add(b, text, (int64_t)strlen(text));
}

void cq_buffer_format(cq_buffer *b, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n >= (int)sizeof text) {
        if (!reserve(b, n + 1))
            return;
        va_start(args, format);
        vsnprintf((char *)b->data + b->bytes, (size_t)n + 1, format, args);
        va_end(args);
        b->bytes += n;
        return;
    }
    cq_buffer_add(b, text, n);
}

int cq_buffer_take(cq_buffer *b, void **data, int64_t *bytes) {
    int64_t n = b->bytes;
    if (!reserve(b, 1)) {
        cq_buffer_free(b);
        return cq_fail(CQ_ENOMEM, "text: no memory for %lld bytes", (long long)n);
    }
    ((char *)b->data)[n] = 0;
    *data = b->data;
    if (bytes)
        *bytes = n;
    *b = (cq_buffer){0};
    return CQ_OK;
}

void cq_buffer_free(cq_buffer *b) {
    free(b->data);
    *b = (cq_buffer){0};
}
