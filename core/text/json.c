/// json.c - Python's json.dumps and str for parsed JSON.
///
/// Separators are ", " and ": ", non-ASCII stays as it is, floats print with the fewest digits that
/// read back to the same double, and str of a list or an object is Python's repr ({'a': [True,
/// None]}).
#include "core/text/json.h"

#include "core/text/utf8.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/// Marks a string that holds the digits of an integer. It starts with a zero byte, so ordinary text
/// does not carry it.
static const char mark[] = "\0int:";
enum { N_MARK = sizeof mark - 1, SAFE_DIGITS = 18 };

static bool is_integer_text(const json_t *v) {
    return json_is_string(v) && json_string_length(v) > N_MARK &&
           memcmp(json_string_value(v), mark, N_MARK) == 0;
}

bool cq_json_is_string(const json_t *v) { return json_is_string(v) && !is_integer_text(v); }

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// End of the number that begins at i; *wide when it is an integer of more digits than 64 bits
/// surely hold.
static int64_t number_end(const char *s, int64_t n, int64_t i, bool *wide) {
    int64_t first = s[i] == '-' ? i + 1 : i, end = first;
    while (end < n && is_digit(s[end]))
        end++;
    bool fraction = end < n && (s[end] == '.' || s[end] == 'e' || s[end] == 'E');
    *wide = !fraction && end - first > SAFE_DIGITS && s[first] != '0';
    while (end < n && (is_digit(s[end]) || strchr("+-.eE", s[end])) && s[end])
        end++;
    return end;
}

/// Copies JSON text with every wide integer turned into a marked string.
static void quote_integers(cq_buffer *out, const char *s, int64_t n) {
    bool in_string = false;
    for (int64_t i = 0; i < n;) {
        bool wide = false;
        int64_t end = i + 1;
        if (in_string && s[i] == '\\' && i + 1 < n)
            end = i + 2;
        else if (s[i] == '"')
            in_string = !in_string;
        else if (!in_string && (is_digit(s[i]) || s[i] == '-'))
            end = number_end(s, n, i, &wide);
        if (wide)
            cq_buffer_add_text(out, "\"\\u0000int:");
        cq_buffer_add(out, s + i, end - i);
        if (wide)
            cq_buffer_add_text(out, "\"");
        i = end;
    }
}

static bool has_long_digits(const char *s, int64_t n) {
    int64_t run = 0;
    for (int64_t i = 0; i < n; i++) {
        run = is_digit(s[i]) ? run + 1 : 0;
        if (run > SAFE_DIGITS)
            return true;
    }
    return false;
}

json_t *cq_json_parse(const char *text, int64_t bytes, json_error_t *error) {
    const size_t flags = JSON_ALLOW_NUL | JSON_DECODE_ANY;
    if (!has_long_digits(text, bytes))
        return json_loadb(text, (size_t)bytes, flags, error);
    cq_buffer quoted = {0};
    quote_integers(&quoted, text, bytes);
    json_t *root = NULL;
    if (quoted.failed)
        snprintf(error->text, sizeof error->text, "no memory");
    else
        root = json_loadb(quoted.data, (size_t)quoted.bytes, flags, error);
    cq_buffer_free(&quoted);
    return root;
}

bool cq_json_truth(const json_t *v) {
    switch (v ? json_typeof(v) : JSON_NULL) {
    case JSON_OBJECT:
        return json_object_size(v) > 0;
    case JSON_ARRAY:
        return json_array_size(v) > 0;
    case JSON_STRING:
        return json_string_length(v) > 0;
    case JSON_INTEGER:
        return json_integer_value(v) != 0;
    case JSON_REAL:
        return json_real_value(v) != 0;
    case JSON_TRUE:
        return true;
    default:
        return false;
    }
}

/// Python's repr of a float: scientific from 1e16 up and below 1e-4.
static void add_float(cq_buffer *b, double x) {
    char text[40], digits[24];
    int precision = 0;
    do
        snprintf(text, sizeof text, "%.*e", precision, x);
    while (strtod(text, NULL) != x && ++precision < 17);
    int n = 0, i = text[0] == '-';
    for (; text[i] != 'e'; i++) // whatever the locale's decimal point is, only digits are kept
        if (is_digit(text[i]))
            digits[n++] = text[i];
    int exponent = atoi(text + i + 1);
    while (n > 1 && digits[n - 1] == '0')
        n--;
    if (signbit(x))
        cq_buffer_add_text(b, "-");
    if (exponent < -4 || exponent >= 16) {
        cq_buffer_add(b, digits, 1);
        if (n > 1)
            cq_buffer_format(b, ".%.*s", n - 1, digits + 1);
        cq_buffer_format(b, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
    } else if (exponent < 0) {
        cq_buffer_format(b, "0.%.*s%.*s", -exponent - 1, "000", n, digits);
    } else {
        for (int k = 0; k <= exponent; k++)
            cq_buffer_add(b, k < n ? &digits[k] : "0", 1);
        cq_buffer_add_text(b, ".");
        cq_buffer_add(b, n > exponent + 1 ? digits + exponent + 1 : "0",
                      n > exponent + 1 ? n - exponent - 1 : 1);
    }
}

static void add_json_string(cq_buffer *b, const char *s, size_t n) {
    static const char plain[] = "\"\\\n\r\t\f\b", letter[] = "\"\\nrtfb";
    cq_buffer_add_text(b, "\"");
    for (size_t i = 0; i < n; i++) {
        const char *special = s[i] ? strchr(plain, s[i]) : NULL;
        if (special)
            cq_buffer_format(b, "\\%c", letter[special - plain]);
        else if ((uint8_t)s[i] < 0x20)
            cq_buffer_format(b, "\\u%04x", (unsigned)s[i]);
        else
            cq_buffer_add(b, s + i, 1);
    }
    cq_buffer_add_text(b, "\"");
}

/// Python's repr of a str: single quotes unless only they occur inside.
static void add_python_string(cq_buffer *b, const char *s, size_t n) {
    char quote = memchr(s, '\'', n) && !memchr(s, '"', n) ? '"' : '\'';
    cq_buffer_add(b, &quote, 1);
    for (size_t i = 0; i < n;) {
        int32_t cp;
        int64_t k = cq_utf8_next(&cp, s + i, (int64_t)(n - i));
        if (cp == quote || cp == '\\')
            cq_buffer_format(b, "\\%c", (char)cp);
        else if (cp == '\n' || cp == '\r' || cp == '\t')
            cq_buffer_add_text(b, cp == '\n' ? "\\n" : cp == '\r' ? "\\r" : "\\t");
        else if (cq_python_printable(cp))
            cq_buffer_add(b, s + i, k);
        else
            cq_buffer_format(b,
                             cp < 0x100     ? "\\x%02x"
                             : cp < 0x10000 ? "\\u%04x"
                                            : "\\U%08x",
                             (unsigned)cp);
        i += (size_t)k;
    }
    cq_buffer_add(b, &quote, 1);
}

static void add_value(cq_buffer *b, const json_t *v, bool python);

static void add_object(cq_buffer *b, const json_t *v, bool python) {
    const char *key, *gap = "{";
    json_t *value;
    json_object_foreach((json_t *)v, key, value) {
        cq_buffer_add_text(b, gap);
        gap = ", ";
        if (python)
            add_python_string(b, key, strlen(key));
        else
            add_json_string(b, key, strlen(key));
        cq_buffer_add_text(b, ": ");
        add_value(b, value, python);
    }
    cq_buffer_add_text(b, *gap == '{' ? "{}" : "}");
}

static void add_array(cq_buffer *b, const json_t *v, bool python) {
    cq_buffer_add_text(b, "[");
    for (size_t i = 0; i < json_array_size(v); i++) {
        if (i > 0)
            cq_buffer_add_text(b, ", ");
        add_value(b, json_array_get(v, i), python);
    }
    cq_buffer_add_text(b, "]");
}

static void add_value(cq_buffer *b, const json_t *v, bool python) {
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        add_object(b, v, python);
        break;
    case JSON_ARRAY:
        add_array(b, v, python);
        break;
    case JSON_STRING:
        if (is_integer_text(v))
            cq_buffer_add_text(b, json_string_value(v) + N_MARK);
        else if (python)
            add_python_string(b, json_string_value(v), json_string_length(v));
        else
            add_json_string(b, json_string_value(v), json_string_length(v));
        break;
    case JSON_INTEGER:
        cq_buffer_format(b, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
        break;
    case JSON_REAL:
        add_float(b, json_real_value(v));
        break;
    case JSON_TRUE:
        cq_buffer_add_text(b, python ? "True" : "true");
        break;
    case JSON_FALSE:
        cq_buffer_add_text(b, python ? "False" : "false");
        break;
    case JSON_NULL:
        cq_buffer_add_text(b, python ? "None" : "null");
        break;
    }
}

void cq_json_dump(cq_buffer *b, const json_t *v) { add_value(b, v, false); }

void cq_json_str(cq_buffer *b, const json_t *v) {
    if (!v)
        return;
    if (cq_json_is_string(v))
        cq_buffer_add(b, json_string_value(v), (int64_t)json_string_length(v));
    else
        add_value(b, v, true);
}
