/// json.h - the JSON files beside a checkpoint: read strictly, and edited without disturbing their
/// text.
///
/// For core/model/*.c only. Python writes bare Infinity and NaN into JSON; they are read as the
/// strings "Infinity", "-Infinity" and "NaN".
#pragma once
#include "core/base/types.h"
#include <jansson.h>

/// Parses `path`, which must hold one object. CQ_EDATA names file, line and fault; duplicate keys
/// are one.
int cq_json_load(json_t **out, const char *path);
/// The text of `path` with the top-level `key` removed and, when `value` is not NULL, put at the
/// end as indented JSON. Everything else stays byte for byte. The caller frees *out.
int cq_json_edit(char **out, const char *path, const char *key, const json_t *value);
/// A value as short text for messages: {...} and [...] for containers; writes into text[size].
const char *cq_json_text(char *text, size_t size, const json_t *value);
