/// buffer.h - bytes that grow: text under construction, lists of ids.
///
/// Running out of memory is remembered instead of returned at every append; `cq_buffer_take`
/// reports it once.
#pragma once
#include "core/base/types.h"

typedef struct cq_buffer {
    void *data;
    int64_t bytes, room;
    bool failed;
} cq_buffer;

void cq_buffer_add(cq_buffer *b, const void *data, int64_t bytes);
void cq_buffer_add_text(cq_buffer *b, const char *text);
/// printf into the buffer.
void cq_buffer_format(cq_buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
/// Hands the memory over with a zero byte after the last one (not counted in *bytes) and leaves an
/// empty buffer. CQ_ENOMEM when any append failed. `bytes` may be NULL.
int cq_buffer_take(cq_buffer *b, void **data, int64_t *bytes);
void cq_buffer_free(cq_buffer *b);
