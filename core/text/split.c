/// split.c - PCRE2 with Unicode properties in the place of the Oniguruma that wrote the patterns.
///
/// The two engines differ in what \s and \w hold, so these are spelled out by their Oniguruma
/// meaning (White_Space; Alphabetic, marks, decimal digits, connectors, six of Latin-1) before
/// compiling; a construct whose meaning differs otherwise is refused. Property tables differ too
/// (Unicode 14 here, 15 and later there) for characters that are new in between.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "core/text/split.h"

#include "core/base/error.h"
#include "core/text/buffer.h"
#include "core/text/utf8.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { MATCH_LIMIT = 100000000, HEAP_LIMIT_KIB = 1 << 20 };

typedef struct step {
    pcre2_code *code;
    bool removed, invert;
} step;

struct cq_split {
    int64_t n;
    step steps[];
};

struct cq_split_scratch {
    pcre2_match_context *limits;
    pcre2_jit_stack *stack;
    int64_t n;
    pcre2_match_data *data[];
};

static const char space[] = "\\t-\\r\\x{85}\\p{Z}",
                  word[] =
                      "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";

/// Copies one escape at p (after the backslash) and returns how many bytes it took; 0 when it is
/// not supported.
static int64_t copy_escape(cq_buffer *out, const char *p, int64_t n, bool in_class) {
    if (n == 0 || strchr("hHbBRXGKQE", *p) != NULL)
        return 0;
    const char *set = strchr("sS", *p) ? space : strchr("wW", *p) ? word : NULL;
    bool negated = *p == 'S' || *p == 'W';
    if (set && in_class && negated) {
        if (set == word)
            return 0;
        set = NULL; // PCRE2's own \S differs from White_Space by U+180E only
    }
    if (set && in_class)
        cq_buffer_add_text(out, set);
    else if (set)
        cq_buffer_format(out, negated ? "[^%s]" : "[%s]", set);
    else
        cq_buffer_format(out, "\\%c", *p);
    return 1;
}

/// Rewrites an Oniguruma pattern for PCRE2.
static int translate(cq_buffer *out, const char *p, int64_t n) {
    bool in_class = false;
    int64_t opened = 0;
    for (int64_t i = 0; i < n; i++) {
        bool refused = false;
        if (p[i] == '\\') {
            int64_t k = copy_escape(out, p + i + 1, n - i - 1, in_class);
            i += k;
            refused = k == 0;
        } else if (in_class) {
            bool first = i == opened + 1 || (i == opened + 2 && p[i - 1] == '^');
            refused = p[i] == '[' || (p[i] == '&' && i + 1 < n && p[i + 1] == '&');
            in_class = p[i] != ']' || first;
            cq_buffer_add(out, p + i, 1);
        } else {
            in_class = p[i] == '[';
            opened = i;
            cq_buffer_add(out, p + i, 1);
        }
        if (refused)
            return cq_fail(CQ_EDATA, "pattern: \"%.12s\" at byte %lld is not supported", p + i,
                           (long long)i);
    }
    return CQ_OK;
}

static int compile(pcre2_code **out, const char *pattern, int64_t n, bool literal) {
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!context)
        return cq_fail(CQ_ENOMEM, "pattern: no memory");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
    int error = 0;
    PCRE2_SIZE at = 0;
    *out = pcre2_compile((PCRE2_SPTR)pattern, (PCRE2_SIZE)n, options, &error, &at, context);
    pcre2_compile_context_free(context);
    if (!*out) {
        PCRE2_UCHAR reason[128];
        pcre2_get_error_message(error, reason, sizeof reason);
        return cq_fail(CQ_EDATA, "pattern: %s at byte %zu", (char *)reason, at);
    }
    pcre2_jit_compile(*out,
                      PCRE2_JIT_COMPLETE); // without JIT the interpreter gives the same answers
    return CQ_OK;
}

int cq_split_add(cq_split **s, const char *pattern, int64_t bytes, bool literal,
                 cq_split_behavior behavior, bool invert) {
    int64_t n = *s ? (*s)->n : 0;
    cq_split *grown = realloc(*s, sizeof *grown + (size_t)(n + 1) * sizeof(step));
    if (!grown)
        return cq_fail(CQ_ENOMEM, "pattern: no memory");
    grown->n = n;
    *s = grown;
    cq_buffer text = {0};
    int status = CQ_OK;
    if (literal)
        cq_buffer_add(&text, pattern, bytes);
    else
        status = translate(&text, pattern, bytes);
    pcre2_code *code = NULL;
    if (status == CQ_OK)
        status = text.failed ? cq_fail(CQ_ENOMEM, "pattern: no memory")
                             : compile(&code, text.data ? text.data : "", text.bytes, literal);
    cq_buffer_free(&text);
    if (status != CQ_OK)
        return status;
    grown->steps[grown->n++] = (step){code, behavior == CQ_SPLIT_REMOVED, invert};
    return CQ_OK;
}

void cq_split_free(cq_split *s) {
    for (int64_t i = 0; s && i < s->n; i++)
        pcre2_code_free(s->steps[i].code);
    free(s);
}

int cq_split_begin(cq_split_scratch **out, const cq_split *s) {
    int64_t n = s ? s->n : 0;
    cq_split_scratch *w = calloc(1, sizeof *w + (size_t)n * sizeof(pcre2_match_data *));
    *out = w;
    if (!w)
        return cq_fail(CQ_ENOMEM, "pattern: no memory");
    w->n = n;
    w->limits = pcre2_match_context_create(NULL);
    w->stack = pcre2_jit_stack_create(32 << 10, 16 << 20, NULL);
    bool complete = w->limits != NULL && w->stack != NULL;
    for (int64_t i = 0; i < n; i++) {
        w->data[i] = pcre2_match_data_create_from_pattern(s->steps[i].code, NULL);
        complete = complete && w->data[i] != NULL;
    }
    if (!complete)
        return cq_fail(CQ_ENOMEM, "pattern: no memory");
    pcre2_set_match_limit(w->limits, MATCH_LIMIT);
    pcre2_set_heap_limit(w->limits, HEAP_LIMIT_KIB);
    pcre2_jit_stack_assign(w->limits, NULL, w->stack);
    return CQ_OK;
}

void cq_split_end(cq_split_scratch *w) {
    if (!w)
        return;
    for (int64_t i = 0; i < w->n; i++)
        pcre2_match_data_free(w->data[i]);
    pcre2_match_context_free(w->limits);
    pcre2_jit_stack_free(w->stack);
    free(w);
}

typedef struct walk {
    const cq_split *split;
    cq_split_scratch *scratch;
    const char *text;
    int (*piece)(void *, const char *, int64_t, int64_t);
    void *context;
} walk;

/// Next match of a step in text[begin, end) from `at` on; *found = false at the end.
static int next_match(const walk *w, int64_t i, int64_t begin, int64_t end, int64_t at, bool *found,
                      int64_t match[2]) {
    const step *s = &w->split->steps[i];
    pcre2_match_data *data = w->scratch->data[i];
    PCRE2_SPTR subject = (PCRE2_SPTR)w->text + begin;
    PCRE2_SIZE n = (PCRE2_SIZE)(end - begin), start = (PCRE2_SIZE)(at - begin);
    // the text was checked once; another check per match would make long texts quadratic
    int rc = pcre2_match(s->code, subject, n, start, PCRE2_NO_UTF_CHECK, data, w->scratch->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(s->code, subject, n, start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                         w->scratch->limits);
    *found = rc >= 0;
    if (rc == PCRE2_ERROR_NOMATCH)
        return CQ_OK;
    if (rc < 0) {
        PCRE2_UCHAR reason[128];
        pcre2_get_error_message(rc, reason, sizeof reason);
        return cq_fail(CQ_EDATA, "text: the pre_tokenizer's pattern gave up at byte %lld: %s",
                       (long long)at, (char *)reason);
    }
    const PCRE2_SIZE *range = pcre2_get_ovector_pointer(data);
    match[0] = begin + (int64_t)range[0];
    match[1] = begin + (int64_t)range[1];
    return CQ_OK;
}

static int run_step(const walk *w, int64_t i, int64_t begin, int64_t end);

static int pass_on(const walk *w, int64_t i, int64_t begin, int64_t end, bool is_match) {
    const step *s = &w->split->steps[i];
    if (begin >= end || (s->removed && is_match != s->invert))
        return CQ_OK;
    return run_step(w, i + 1, begin, end);
}

static int run_step(const walk *w, int64_t i, int64_t begin, int64_t end) {
    if (!w->split || i == w->split->n)
        return w->piece(w->context, w->text, begin, end);
    int64_t done = begin, at = begin;
    while (at < end) {
        bool found;
        int64_t match[2];
        CQ_TRY(next_match(w, i, begin, end, at, &found, match));
        if (!found || match[1] < match[0]) // \K in a lookahead could end before it begins
            break;
        CQ_TRY(pass_on(w, i, done, match[0], false));
        CQ_TRY(pass_on(w, i, match[0], match[1], true));
        done = at = match[1];
        if (match[0] == match[1] && at < end) {
            int32_t cp;
            at += cq_utf8_next(&cp, w->text + at, end - at);
        }
    }
    return pass_on(w, i, done, end, false);
}

int cq_split_run(const cq_split *s, cq_split_scratch *scratch, const char *text, int64_t n,
                 int (*piece)(void *, const char *, int64_t, int64_t), void *context) {
    walk w = {s, scratch, text, piece, context};
    return n > 0 ? run_step(&w, 0, 0, n) : CQ_OK;
}
