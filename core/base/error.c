/// error.c - the thread-local message behind every failing status.
///
/// A message may quote names out of hostile files, so control bytes become '?': it stays one line
/// and cannot drive a terminal. What does not fit ends in "..." instead of being cut without a
/// sign.
#include "core/base/error.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024 };

static _Thread_local char message[MESSAGE_BYTES];

/// Makes text[size] printable; `length` is what it would have been without truncation.
static void clean(char *text, size_t size, int length) {
    if (length < 0)
        snprintf(text, size, "message could not be formatted");
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    if (length < 0 || (size_t)length < size)
        return;
    size_t end = size - 4;
    while (end > 0 && ((unsigned char)text[end] & 0xc0) == 0x80) /* not inside a UTF-8 sequence */
        end--;
    memcpy(text + end, "...", 4);
}

int cq_fail(int status, const char *format, ...) {
    char text[MESSAGE_BYTES]; /* an argument may be cq_error() itself */
    va_list args;
    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    clean(text, sizeof text, length);
    memcpy(message, text, sizeof text);
    return status;
}

int cq_fail_in(int status, const char *prefix) {
    return cq_fail(status, "%s: %s", prefix, message);
}

const char *cq_error(void) { return message; }

int cq_exit_code(int status) {
    if (status == CQ_ESHAPE)
        return -CQ_EUSAGE;
    return status <= 0 && status >= CQ_EPEER ? -status : 1;
}
