/// json.c - strict reading of the JSON files beside a checkpoint, and edits that keep their text.
///
/// Policy: config.json of an export is its source's text plus one key. Re-serializing it would
/// reorder or reformat numbers that other programs compare, so the edit works on characters.
#include "core/model/json.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* End of the string literal that starts at s (its opening quote). */
static const char *skip_string(const char *s) {
    for (s++; *s && *s != '"'; s++)
        if (*s == '\\' && s[1])
            s++;
    return *s ? s + 1 : s;
}

/* A copy with bare Infinity, -Infinity and NaN in quotes. */
static char *quote_numbers(const char *s, int64_t bytes) {
    static const char *const words[] = {"-Infinity", "Infinity", "NaN"};
    char *out = malloc((size_t)bytes * 2 + 1), *to = out;
    while (out && *s) {
        const char *end = *s == '"' ? skip_string(s) : s + 1;
        bool quoted = false;
        for (int i = 0; i < 3 && !quoted; i++)
            if (!strncmp(s, words[i], strlen(words[i]))) {
                end = s + strlen(words[i]);
                quoted = true;
            }
        if (quoted)
            *to++ = '"';
        memcpy(to, s, (size_t)(end - s));
        to += end - s;
        if (quoted)
            *to++ = '"';
        s = end;
    }
    if (out)
        *to = 0;
    return out;
}

static int parse(json_t **out, const char *path, const char *text, int64_t bytes) {
    json_error_t error;
    if ((int64_t)strlen(text) != bytes)
        return cq_fail(CQ_EDATA, "%s: holds a zero byte, wanted JSON text", path);
    char *quoted = quote_numbers(text, bytes);
    if (!quoted)
        return cq_fail(CQ_ENOMEM, "%s: no memory for %ld bytes of JSON", path, (long)bytes);
    *out = json_loads(quoted, JSON_REJECT_DUPLICATES, &error);
    free(quoted);
    if (!*out)
        return cq_fail(CQ_EDATA, "%s: line %d: %s, wanted valid JSON", path, error.line,
                       error.text);
    if (json_is_object(*out))
        return CQ_OK;
    json_decref(*out);
    *out = NULL;
    return cq_fail(CQ_EDATA, "%s: holds another JSON value, wanted an object", path);
}

int cq_json_load(json_t **out, const char *path) {
    char *text;
    int64_t bytes;
    *out = NULL;
    CQ_TRY(cq_file_read(&text, &bytes, path));
    int status = parse(out, path, text, bytes);
    free(text);
    return status;
}

/* Where the member `key` of the outermost object begins and ends (its value's end); false when
 * absent. The text is valid JSON. */
static bool find_member(const char *text, const char *key, const char **begin, const char **end) {
    size_t n = strlen(key);
    int depth = 0;
    const char *found = NULL;
    for (const char *s = text; *s;) {
        if (*s == '"') {
            const char *after = skip_string(s), *colon = after + strspn(after, " \t\r\n");
            if (!found && depth == 1 && *colon == ':' && (size_t)(after - s) == n + 2 &&
                !strncmp(s + 1, key, n))
                found = s;
            s = after;
            continue;
        }
        bool closes = *s == '}' || *s == ']';
        if (found && depth == 1 && (*s == ',' || closes)) {
            *begin = found;
            *end = s;
            return true;
        }
        depth += (*s == '{' || *s == '[') - closes;
        s++;
    }
    return false;
}

static void remove_member(char *text, const char *key) {
    const char *b, *e;
    if (!find_member(text, key, &b, &e))
        return;
    char *begin = text + (b - text), *end = text + (e - text);
    if (*end == ',') /* up to the next key */
        end += 1 + strspn(end + 1, " \t\r\n");
    else /* the last member: its comma goes, the space before the brace stays */
    {
        while (end > begin && isspace((unsigned char)end[-1]))
            end--;
        while (begin > text && (isspace((unsigned char)begin[-1]) || begin[-1] == ','))
            begin--;
    }
    memmove(begin, end, strlen(end) + 1);
}

/* `value` with every line but the first moved right by two, as a member of an indented object. */
static char *member_text(const json_t *value) {
    char *flat = json_dumps(value, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_ENCODE_ANY);
    char *out = flat ? malloc(strlen(flat) * 3 + 1) : NULL, *to = out;
    for (const char *s = flat; out && *s; s++) {
        *to++ = *s;
        if (*s == '\n') {
            *to++ = ' ';
            *to++ = ' ';
        }
    }
    if (out)
        *to = 0;
    free(flat);
    return out;
}

static char *append_member(const char *text, const char *key, const json_t *value) {
    char *member = member_text(value);
    const char *brace = strrchr(text, '}'), *last = brace;
    while (last > text && isspace((unsigned char)last[-1]))
        last--;
    size_t size = member ? strlen(text) + strlen(member) + strlen(key) + 16 : 0;
    char *out = member ? malloc(size) : NULL;
    if (out)
        snprintf(out, size, "%.*s%s\n  \"%s\": %s\n%s", (int)(last - text), text,
                 last > text && last[-1] == '{' ? "" : ",", key, member, brace);
    free(member);
    return out;
}

int cq_json_edit(char **out, const char *path, const char *key, const json_t *value) {
    json_t *checked;
    char *text;
    int64_t bytes;
    CQ_TRY(cq_json_load(&checked, path));
    json_decref(checked);
    CQ_TRY(cq_file_read(&text, &bytes, path));
    remove_member(text, key);
    *out = text;
    if (!value)
        return CQ_OK;
    *out = append_member(text, key, value);
    free(text);
    return *out ? CQ_OK : cq_fail(CQ_ENOMEM, "%s: no memory to add %s", path, key);
}

const char *cq_json_text(char *text, size_t size, const json_t *value) {
    if (!value)
        snprintf(text, size, "missing");
    else if (json_is_object(value))
        snprintf(text, size, "{...}");
    else if (json_is_array(value))
        snprintf(text, size, "[...]");
    else {
        char *dump = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(8));
        snprintf(text, size, "%s", dump ? dump : "?");
        free(dump);
    }
    return text;
}
