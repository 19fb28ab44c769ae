/// utf8.h - reading UTF-8 that may be broken, and the character classes that text formats name.
#pragma once
#include "core/base/types.h"
#include "core/text/buffer.h"

/// Reads one code point at s (n > 0 bytes left) and returns how many bytes it took; *cp = -1 for a
/// broken sequence, whose length is the maximal subpart (Unicode 15, section 3.9), so one U+FFFD
/// replaces it.
int64_t cq_utf8_next(int32_t *cp, const char *s, int64_t n);
/// Bytes before the first broken sequence; n when all is valid.
int64_t cq_utf8_valid(const char *s, int64_t n);
void cq_utf8_add(cq_buffer *b, int32_t cp);
/// Appends s with U+FFFD in place of every broken sequence.
void cq_utf8_add_lossy(cq_buffer *b, const char *s, int64_t n);
/// Python's str.isspace for one code point: what str.strip removes.
bool cq_python_space(int32_t cp);
/// The Unicode property White_Space.
bool cq_white_space(int32_t cp);
/// Word characters: letters, marks, decimal digits, letter numbers, connectors, joiners (UTS 18).
bool cq_word_char(int32_t cp);
/// Python's str.isprintable for one code point.
bool cq_python_printable(int32_t cp);
