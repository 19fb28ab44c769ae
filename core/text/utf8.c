/// utf8.c - one decoder for all text that comes from outside.
///
/// Surrogates, overlong forms and values above U+10FFFF are broken sequences.
#include "core/text/utf8.h"

#include <utf8proc.h>

int64_t cq_utf8_next(int32_t *cp, const char *text, int64_t n) {
    const uint8_t *s = (const uint8_t *)text;
    *cp = -1;
    if (s[0] < 0x80) {
        *cp = s[0];
        return 1;
    }
    int more = s[0] >= 0xC2 && s[0] <= 0xDF   ? 1
               : (s[0] & 0xF0) == 0xE0        ? 2
               : s[0] >= 0xF0 && s[0] <= 0xF4 ? 3
                                              : 0;
    if (more == 0)
        return 1;
    // the first continuation byte has a narrower range where overlong forms, surrogates or too
    // large values would start
    uint8_t low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    int32_t value = s[0] & (0x3F >> more);
    for (int i = 1; i <= more; i++) {
        if (i >= n || s[i] < low || s[i] > high)
            return i;
        value = value << 6 | (s[i] & 0x3F);
        low = 0x80;
        high = 0xBF;
    }
    *cp = value;
    return more + 1;
}

int64_t cq_utf8_valid(const char *s, int64_t n) {
    int64_t i = 0;
    while (i < n) {
        int32_t cp;
        int64_t k = cq_utf8_next(&cp, s + i, n - i);
        if (cp < 0)
            return i;
        i += k;
    }
    return n;
}

void cq_utf8_add(cq_buffer *b, int32_t cp) {
    utf8proc_uint8_t bytes[4];
    cq_buffer_add(b, bytes, utf8proc_encode_char(cp, bytes));
}

void cq_utf8_add_lossy(cq_buffer *b, const char *s, int64_t n) {
    int64_t i = 0;
    while (i < n) {
        int64_t good = cq_utf8_valid(s + i, n - i);
        cq_buffer_add(b, s + i, good);
        i += good;
        if (i == n)
            return;
        int32_t cp;
        i += cq_utf8_next(&cp, s + i, n - i);
        cq_utf8_add(b, 0xFFFD);
    }
}

bool cq_white_space(int32_t cp) {
    return (cp >= 9 && cp <= 13) || cp == 0x20 || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
           (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
           cp == 0x205F || cp == 0x3000;
}

bool cq_python_space(int32_t cp) { return cq_white_space(cp) || (cp >= 0x1C && cp <= 0x1F); }

/// Symbols that are Alphabetic all the same: circled and squared letters.
static bool is_enclosed_letter(int32_t cp) {
    return (cp >= 0x24B6 && cp <= 0x24E9) || (cp >= 0x1F130 && cp <= 0x1F149) ||
           (cp >= 0x1F150 && cp <= 0x1F169) || (cp >= 0x1F170 && cp <= 0x1F189);
}

bool cq_word_char(int32_t cp) {
    switch (utf8proc_category(cp)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return cp == 0x200C || cp == 0x200D || is_enclosed_letter(cp);
    }
}

bool cq_python_printable(int32_t cp) {
    if (cp == ' ')
        return true;
    switch (utf8proc_category(cp)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
        return false;
    default:
        return true;
    }
}
