/// added.c - two tries over the contents of the added tokens.
///
/// A match that single_word rejects is passed over as a whole, so nothing inside it is found either
/// (as in the Hugging Face library, whose results are the measure here).
#include "core/text/added.h"

#include "core/base/error.h"
#include "core/text/utf8.h"

#include <string.h>

/// First child and next sibling; node 0 is the root.
typedef struct node {
    int32_t child, next, token; ///< 0, 0, -1 where there is none
    uint8_t byte;
} node;

void cq_added_free(cq_added *a) {
    cq_buffer_free(&a->tokens);
    cq_buffer_free(&a->content);
    cq_buffer_free(&a->nodes[0]);
    cq_buffer_free(&a->nodes[1]);
}

int64_t cq_added_count(const cq_added *a) {
    return a->tokens.bytes / (int64_t)sizeof(cq_added_token);
}

const cq_added_token *cq_added_at(const cq_added *a, int64_t i) {
    return (const cq_added_token *)a->tokens.data + i;
}

const cq_added_token *cq_added_by_id(const cq_added *a, int64_t id) {
    for (int64_t i = 0; i < cq_added_count(a); i++)
        if (cq_added_at(a, i)->id == id)
            return cq_added_at(a, i);
    return NULL;
}

const cq_added_token *cq_added_by_content(const cq_added *a, const char *content, int64_t n) {
    for (int64_t i = 0; i < cq_added_count(a); i++) {
        const cq_added_token *t = cq_added_at(a, i);
        if (t->bytes == n && memcmp((char *)a->content.data + t->content, content, (size_t)n) == 0)
            return t;
    }
    return NULL;
}

static int32_t child_of(const node *nodes, int32_t at, uint8_t byte) {
    int32_t c = nodes[at].child;
    while (c > 0 && nodes[c].byte != byte)
        c = nodes[c].next;
    return c;
}

static void trie_put(cq_buffer *trie, const char *key, int64_t n, int32_t token) {
    int32_t at = 0;
    if (trie->bytes == 0)
        cq_buffer_add(trie, &(node){.token = -1}, sizeof(node));
    for (int64_t i = 0; i < n && !trie->failed; i++) {
        uint8_t byte = (uint8_t)key[i];
        int32_t c = child_of(trie->data, at, byte);
        if (c == 0) {
            c = (int32_t)(trie->bytes / (int64_t)sizeof(node));
            node fresh = {.next = ((node *)trie->data)[at].child, .token = -1, .byte = byte};
            cq_buffer_add(trie, &fresh, sizeof fresh);
            if (!trie->failed)
                ((node *)trie->data)[at].child = c;
        }
        at = c;
    }
    if (!trie->failed)
        ((node *)trie->data)[at].token = token;
}

int cq_added_put(cq_added *a, cq_added_token token, const char *content, int64_t n,
                 const char *search, int64_t n_search) {
    int32_t index = (int32_t)cq_added_count(a);
    token.content = a->content.bytes;
    token.bytes = n;
    cq_buffer_add(&a->content, content, n);
    cq_buffer_add(&a->tokens, &token, sizeof token);
    trie_put(&a->nodes[token.normalized], search, n_search, index);
    if (a->content.failed || a->tokens.failed || a->nodes[token.normalized].failed)
        return cq_fail(CQ_ENOMEM, "added tokens: no memory for %d of them", index + 1);
    return CQ_OK;
}

/// Code point that ends at text[at - 1]; -1 at the start.
static int32_t before(const char *text, int64_t at, int64_t *begin) {
    *begin = at;
    if (at == 0)
        return -1;
    do
        --*begin;
    while (*begin > 0 && ((uint8_t)text[*begin] & 0xC0) == 0x80);
    int32_t cp;
    cq_utf8_next(&cp, text + *begin, at - *begin);
    return cp;
}

static bool stands_alone(const char *text, int64_t n, int64_t begin, int64_t end) {
    int64_t unused;
    int32_t right = -1, left = before(text, begin, &unused);
    if (end < n)
        cq_utf8_next(&right, text + end, n - end);
    return (left < 0 || !cq_word_char(left)) && (right < 0 || !cq_word_char(right));
}

static void widen(cq_added_match *m, const cq_added_token *t, const char *text, int64_t n,
                  int64_t from) {
    int64_t begin = m->begin;
    while (t->lstrip && m->begin > from && cq_white_space(before(text, m->begin, &begin)))
        m->begin = begin;
    while (t->rstrip && m->end < n) {
        int32_t cp;
        int64_t k = cq_utf8_next(&cp, text + m->end, n - m->end);
        if (!cq_white_space(cp))
            break;
        m->end += k;
    }
}

bool cq_added_next(cq_added_match *out, const cq_added *a, int which, const char *text, int64_t n,
                   int64_t from) {
    const node *nodes = a->nodes[which].data;
    if (!nodes)
        return false;
    bool starts[256] = {false};
    for (int32_t c = nodes[0].child; c > 0; c = nodes[c].next)
        starts[nodes[c].byte] = true;
    for (int64_t i = from; i < n; i++) {
        if (!starts[(uint8_t)text[i]])
            continue;
        int32_t token = -1;
        int64_t end = i;
        int32_t at = 0;
        for (int64_t j = i; j < n && (at = child_of(nodes, at, (uint8_t)text[j])) > 0; j++)
            if (nodes[at].token >= 0) {
                token = nodes[at].token;
                end = j + 1;
            }
        if (token < 0)
            continue;
        const cq_added_token *t = cq_added_at(a, token);
        if (t->single_word && !stands_alone(text, n, i, end)) {
            i = end - 1;
            continue;
        }
        *out = (cq_added_match){i, end, t->id};
        widen(out, t, text, n, from);
        return true;
    }
    return false;
}
