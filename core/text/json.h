/// json.h - JSON as Python reads and prints it: what chat templates are written against.
///
/// Integers beyond 64 bits, which jansson refuses, are kept as marked strings; the functions here
/// see through the mark.
#pragma once
#include "core/base/types.h"
#include "core/text/buffer.h"

#include <jansson.h>

/// Parses one value. On failure returns NULL and fills `error`. The caller json_decrefs the result.
json_t *cq_json_parse(const char *text, int64_t bytes, json_error_t *error);
/// A string, and not a marked integer.
bool cq_json_is_string(const json_t *value);
/// Python's truth value; NULL (undefined) is false.
bool cq_json_truth(const json_t *value);
/// json.dumps(value, ensure_ascii=False).
void cq_json_dump(cq_buffer *b, const json_t *value);
/// str(value); nothing for NULL (undefined).
void cq_json_str(cq_buffer *b, const json_t *value);
