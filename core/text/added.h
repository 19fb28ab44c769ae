/// added.h - added tokens: found in the text before it is cut into words.
#pragma once
#include "core/base/types.h"
#include "core/text/buffer.h"

typedef struct cq_added_token {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
    int64_t content; ///< offset into cq_added.content
    int64_t bytes;
} cq_added_token;

typedef struct cq_added {
    cq_buffer tokens;   ///< cq_added_token []
    cq_buffer content;  ///< their contents one after the other
    cq_buffer nodes[2]; ///< tries of those found before [0] and after [1] normalization
} cq_added;

void cq_added_free(cq_added *a);
int64_t cq_added_count(const cq_added *a);
const cq_added_token *cq_added_at(const cq_added *a, int64_t i);
/// The added token with this id, or with this content; NULL when there is none.
const cq_added_token *cq_added_by_id(const cq_added *a, int64_t id);
const cq_added_token *cq_added_by_content(const cq_added *a, const char *content, int64_t n);
/// Enters a token; `search` is the content as it is looked for (normalized where the token asks for
/// it).
int cq_added_put(cq_added *a, cq_added_token token, const char *content, int64_t n,
                 const char *search, int64_t n_search);

typedef struct cq_added_match {
    int64_t begin, end;
    int32_t id;
} cq_added_match;
/// The first match at or after `from` in trie `which`: the longest token at the earliest position,
/// widened over white space by lstrip and rstrip (not before `from`). False when there is none.
bool cq_added_next(cq_added_match *out, const cq_added *a, int which, const char *text, int64_t n,
                   int64_t from);
