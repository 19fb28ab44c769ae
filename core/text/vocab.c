/// vocab.c - hash tables of pieces and merges, and the GPT-2 map between bytes and printable
/// characters.
///
/// The file spells a piece with one character per byte: printable Latin-1 bytes stand for
/// themselves, the other 68 become U+0100 and up in order of value. A piece is kept as bytes; the
/// spelling only serves lookups by content.
#include "core/text/vocab.h"

#include "core/base/error.h"
#include "core/text/utf8.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ID = 1 << 22 }; // no vocabulary comes near; an id above it would only make a huge table

static bool stands_for_itself(int c) {
    return (c >= '!' && c <= '~') || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF);
}

/// The byte that a character of a piece's spelling stands for, -1 when it is none of the 256.
static int byte_of(int32_t cp) {
    if (cp >= 0 && cp <= 0xFF)
        return stands_for_itself(cp) ? cp : -1;
    // the n-th byte that does not stand for itself is U+0100 + n: 0..32, 127..160, 173
    int32_t n = cp - 0x100;
    if (n < 0 || n > 67)
        return -1;
    return n <= 32 ? n : n <= 66 ? 127 + n - 33 : 173;
}

/// Appends the bytes of a spelling; false (nothing appended) when a character is not of the map.
static bool add_bytes(cq_buffer *out, const char *content, int64_t n) {
    int64_t start = out->bytes;
    for (int64_t i = 0; i < n;) {
        int32_t cp;
        i += cq_utf8_next(&cp, content + i, n - i);
        int byte = byte_of(cp);
        if (byte < 0) {
            out->bytes = start;
            return false;
        }
        char c = (char)byte;
        cq_buffer_add(out, &c, 1);
    }
    return true;
}

static uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93u;
    return x ^ x >> 32;
}

static uint64_t hash_bytes(const char *s, int64_t n) {
    uint64_t h = 0xCBF29CE484222325u; // FNV-1a
    for (int64_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)s[i]) * 0x100000001B3u;
    return mix(h);
}

static int64_t table_size(int64_t n) {
    int64_t size = 16;
    while (size < 2 * n)
        size *= 2;
    return size;
}

void cq_vocab_free(cq_vocab *v) {
    free(v->pieces);
    free(v->slots);
    free(v->merges);
    cq_buffer_free(&v->content);
    cq_buffer_free(&v->bytes);
    *v = (cq_vocab){0};
}

int cq_vocab_init(cq_vocab *v, int64_t n_pieces, int64_t n_merges) {
    *v = (cq_vocab){.n_slots = table_size(n_pieces), .n_merges = table_size(n_merges)};
    v->slots = malloc((size_t)v->n_slots * sizeof *v->slots);
    v->merges = malloc((size_t)v->n_merges * sizeof *v->merges);
    if (!v->slots || !v->merges)
        return cq_fail(CQ_ENOMEM, "vocabulary: no memory for %lld pieces", (long long)n_pieces);
    memset(v->slots, 0xFF, (size_t)v->n_slots * sizeof *v->slots);
    memset(v->merges, 0xFF, (size_t)v->n_merges * sizeof *v->merges);
    return CQ_OK;
}

static int make_room(cq_vocab *v, int64_t id) {
    if (id < v->size)
        return CQ_OK;
    if (id >= v->room) {
        int64_t room = id + id / 2 + 1024;
        cq_piece *pieces = realloc(v->pieces, (size_t)room * sizeof *pieces);
        if (!pieces)
            return cq_fail(CQ_ENOMEM, "vocabulary: no memory for id %lld", (long long)id);
        v->pieces = pieces;
        v->room = room;
    }
    for (int64_t i = v->size; i <= id; i++)
        v->pieces[i] = (cq_piece){.n_content = -1};
    v->size = id + 1;
    return CQ_OK;
}

/// The slot where these bytes are or belong.
static int64_t slot_of(const cq_vocab *v, const char *bytes, int64_t n) {
    uint64_t mask = (uint64_t)v->n_slots - 1, at = hash_bytes(bytes, n) & mask;
    for (;; at = (at + 1) & mask) {
        int32_t id = v->slots[at];
        if (id < 0)
            return (int64_t)at;
        const cq_piece *p = &v->pieces[id];
        if (p->n_bytes == n && memcmp((char *)v->bytes.data + p->bytes, bytes, (size_t)n) == 0)
            return (int64_t)at;
    }
}

int cq_vocab_put(cq_vocab *v, int64_t id, const char *content, int64_t n, bool model) {
    if (id < 0 || id >= MAX_ID)
        return cq_fail(CQ_EDATA, "token \"%s\": id is %lld, wanted 0 to %d", content, (long long)id,
                       MAX_ID - 1);
    if (n <= 0 || n > 65535)
        return cq_fail(CQ_EDATA, "token %lld: content has %lld bytes, wanted 1 to 65535",
                       (long long)id, (long long)n);
    CQ_TRY(make_room(v, id));
    cq_piece *p = &v->pieces[id];
    if (p->n_content >= 0)
        return cq_fail(CQ_EDATA, "token %lld: two contents, the second is \"%s\", wanted one",
                       (long long)id, content);
    int64_t at_content = v->content.bytes, at_bytes = v->bytes.bytes;
    cq_buffer_add(&v->content, content, n);
    bool mapped = add_bytes(&v->bytes, content, n);
    if (!mapped)
        cq_buffer_add(&v->bytes, content, n);
    if (v->content.failed || v->bytes.failed)
        return cq_fail(CQ_ENOMEM, "vocabulary: no memory for its text");
    *p = (cq_piece){at_content, at_bytes, (int32_t)n, (int32_t)(v->bytes.bytes - at_bytes)};
    if (!model || !mapped)
        return CQ_OK;
    int64_t slot = slot_of(v, (char *)v->bytes.data + p->bytes, p->n_bytes);
    if (v->slots[slot] >= 0)
        return cq_fail(CQ_EDATA, "token %lld: \"%s\" is also token %d, wanted one id",
                       (long long)id, content, v->slots[slot]);
    v->slots[slot] = (int32_t)id;
    return CQ_OK;
}

int32_t cq_vocab_find(const cq_vocab *v, const char *bytes, int64_t n) {
    return v->slots[slot_of(v, bytes, n)];
}

int32_t cq_vocab_find_content(const cq_vocab *v, const char *content, int64_t n) {
    cq_buffer bytes = {0};
    int32_t id = -1;
    if (add_bytes(&bytes, content, n) && !bytes.failed)
        id = cq_vocab_find(v, bytes.data, bytes.bytes);
    cq_buffer_free(&bytes);
    if (id >= 0)
        return id;
    for (int64_t i = 0; i < v->size; i++) {
        const cq_piece *p = &v->pieces[i];
        if (p->n_content == n &&
            memcmp((char *)v->content.data + p->content, content, (size_t)n) == 0)
            return (int32_t)i;
    }
    return -1;
}

static cq_merge *merge_slot(const cq_vocab *v, uint64_t pair) {
    uint64_t mask = (uint64_t)v->n_merges - 1, at = mix(pair * 0x9E3779B97F4A7C15u) & mask;
    while (v->merges[at].pair != UINT64_MAX && v->merges[at].pair != pair)
        at = (at + 1) & mask;
    return &v->merges[at];
}

static uint64_t pair_of(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

int cq_vocab_put_merge(cq_vocab *v, int32_t left, int32_t right, int32_t rank, int32_t id) {
    cq_merge *m = merge_slot(v, pair_of(left, right));
    *m = (cq_merge){pair_of(left, right), rank,
                    id}; // a repeated pair takes its last rank, as in the reference
    return CQ_OK;
}

const cq_merge *cq_vocab_merge(const cq_vocab *v, int32_t left, int32_t right) {
    const cq_merge *m = merge_slot(v, pair_of(left, right));
    return m->pair == UINT64_MAX ? NULL : m;
}

int cq_vocab_bytes(cq_vocab *v) {
    for (int i = 0; i < 256; i++) {
        char c = (char)i;
        v->byte_id[i] = cq_vocab_find(v, &c, 1);
        if (v->byte_id[i] < 0)
            return cq_fail(CQ_EDATA, "vocab: no piece stands for byte 0x%02X, wanted all 256", i);
    }
    return CQ_OK;
}
