/// tokenizer_file.c - tokenizer.json and tokenizer_config.json into the tables of a tokenizer.
///
/// What the file says decides: normalizer, pre_tokenizer, decoder, ignore_merges and the added
/// tokens' flags are read, and a part that would change token ids and is not supported is refused
/// by name. Truncation, padding and the post-processor's special tokens are left out on purpose:
/// documents are encoded as they are.
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/hash.h"
#include "core/text/normalize.h"
#include "core/text/tokenizer_parts.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STEPS = 16 };

/// What GPT-2 cuts by; a ByteLevel pre-tokenizer with use_regex means it.
static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static const char *text_of(const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static bool flag_of(const json_t *object, const char *key, bool otherwise) {
    const json_t *value = json_object_get(object, key);
    return json_is_boolean(value) ? json_is_true(value) : otherwise;
}

static bool absent(const json_t *value) {
    return !value || json_is_null(value) ||
           (json_is_string(value) && json_string_length(value) == 0);
}

/// The parts of a Sequence under `key`, or the single part itself, as a new array; NULL when it is
/// absent.
static json_t *parts_of(const json_t *part, const char *key) {
    if (absent(part))
        return NULL;
    if (strcmp(text_of(part, "type"), "Sequence") == 0)
        return json_incref(json_object_get(part, key));
    json_t *one = json_array();
    json_array_append(one, (json_t *)part);
    return one;
}

static int read_normalizer(cq_tokenizer *t, const json_t *root) {
    json_t *parts = parts_of(json_object_get(root, "normalizer"), "normalizers");
    int status = CQ_OK;
    for (size_t i = 0; i < json_array_size(parts) && status == CQ_OK; i++) {
        const char *type = text_of(json_array_get(parts, i), "type");
        t->nfc = true;
        if (strcmp(type, "NFC") != 0)
            status = cq_fail(CQ_EDATA, "normalizer: found \"%s\", wanted NFC or none", type);
    }
    json_decref(parts);
    return status;
}

static int read_split(cq_tokenizer *t, const json_t *part) {
    const json_t *pattern = json_object_get(part, "pattern");
    const json_t *regex = json_object_get(pattern, "Regex"),
                 *literal = json_object_get(pattern, "String");
    const json_t *text = regex ? regex : literal;
    const char *behavior = text_of(part, "behavior");
    if (!json_is_string(text))
        return cq_fail(CQ_EDATA, "pre_tokenizer Split: no pattern, wanted Regex or String");
    bool removed = strcmp(behavior, "Removed") == 0;
    if (!removed && strcmp(behavior, "Isolated") != 0)
        return cq_fail(CQ_EDATA,
                       "pre_tokenizer Split: behavior is \"%s\", wanted Isolated or Removed",
                       behavior);
    return cq_split_add(&t->split, json_string_value(text), (int64_t)json_string_length(text),
                        regex == NULL, removed ? CQ_SPLIT_REMOVED : CQ_SPLIT_ISOLATED,
                        flag_of(part, "invert", false));
}

static int read_pre_tokenizer_part(cq_tokenizer *t, const json_t *part, bool *byte_level) {
    const char *type = text_of(part, "type");
    if (*byte_level)
        return cq_fail(CQ_EDATA,
                       "pre_tokenizer: found \"%s\" after ByteLevel, wanted ByteLevel last", type);
    if (strcmp(type, "Split") == 0)
        return read_split(t, part);
    if (strcmp(type, "Digits") == 0) {
        const char *pattern = flag_of(part, "individual_digits", false) ? "\\p{N}" : "\\p{N}+";
        return cq_split_add(&t->split, pattern, (int64_t)strlen(pattern), false, CQ_SPLIT_ISOLATED,
                            false);
    }
    if (strcmp(type, "ByteLevel") != 0)
        return cq_fail(CQ_EDATA, "pre_tokenizer: found \"%s\", wanted Split, Digits or ByteLevel",
                       type);
    *byte_level = true;
    if (flag_of(part, "add_prefix_space", true))
        return cq_fail(CQ_EDATA, "pre_tokenizer ByteLevel: add_prefix_space is true, wanted false");
    if (!flag_of(part, "use_regex", true))
        return CQ_OK;
    return cq_split_add(&t->split, gpt2_pattern, (int64_t)strlen(gpt2_pattern), false,
                        CQ_SPLIT_ISOLATED, false);
}

static int read_pre_tokenizer(cq_tokenizer *t, const json_t *root) {
    json_t *parts = parts_of(json_object_get(root, "pre_tokenizer"), "pretokenizers");
    bool byte_level = false;
    int status = CQ_OK;
    if (json_array_size(parts) > MAX_STEPS)
        status = cq_fail(CQ_EDATA, "pre_tokenizer: %zu steps, wanted at most %d",
                         json_array_size(parts), MAX_STEPS);
    for (size_t i = 0; i < json_array_size(parts) && status == CQ_OK; i++)
        status = read_pre_tokenizer_part(t, json_array_get(parts, i), &byte_level);
    json_decref(parts);
    if (status == CQ_OK && !byte_level)
        return cq_fail(CQ_EDATA, "pre_tokenizer: no ByteLevel, wanted a byte-level tokenizer");
    return status;
}

static int read_decoder(const json_t *root) {
    json_t *parts = parts_of(json_object_get(root, "decoder"), "decoders");
    int status = CQ_OK;
    if (json_array_size(parts) == 0)
        status = cq_fail(CQ_EDATA, "decoder: none, wanted ByteLevel");
    for (size_t i = 0; i < json_array_size(parts) && status == CQ_OK; i++) {
        const char *type = text_of(json_array_get(parts, i), "type");
        if (strcmp(type, "ByteLevel") != 0)
            status = cq_fail(CQ_EDATA, "decoder: found \"%s\", wanted ByteLevel", type);
    }
    json_decref(parts);
    return status;
}

/// A post-processor only adds special tokens, which are not asked for; its type is checked all the
/// same.
static int read_post_processor(const json_t *root) {
    static const char *const known[] = {"ByteLevel", "TemplateProcessing", "BertProcessing",
                                        "RobertaProcessing"};
    json_t *parts = parts_of(json_object_get(root, "post_processor"), "processors");
    int status = CQ_OK;
    for (size_t i = 0; i < json_array_size(parts) && status == CQ_OK; i++) {
        const char *type = text_of(json_array_get(parts, i), "type");
        bool found = false;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++)
            found = found || strcmp(type, known[k]) == 0;
        if (!found)
            status = cq_fail(CQ_EDATA,
                             "post_processor: found \"%s\", wanted ByteLevel or a template", type);
    }
    json_decref(parts);
    return status;
}

static int read_merge(cq_tokenizer *t, const json_t *merge, size_t rank, cq_buffer *joined) {
    const char *left = NULL, *right = NULL;
    size_t n_left = 0, n_right = 0;
    if (json_is_string(merge)) {
        const char *text = json_string_value(merge), *gap = strchr(text, ' ');
        if (gap) {
            left = text;
            n_left = (size_t)(gap - text);
            right = gap + 1;
            n_right = json_string_length(merge) - n_left - 1;
        }
    } else if (json_array_size(merge) == 2) {
        const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
        left = json_string_value(a);
        right = json_string_value(b);
        n_left = json_string_length(a);
        n_right = json_string_length(b);
    }
    if (!left || !right)
        return cq_fail(CQ_EDATA, "merge %zu: wanted \"a b\" or [\"a\", \"b\"]", rank);
    joined->bytes = 0;
    cq_buffer_add(joined, left, (int64_t)n_left);
    cq_buffer_add(joined, right, (int64_t)n_right);
    if (joined->failed)
        return cq_fail(CQ_ENOMEM, "merges: no memory");
    int32_t a = cq_vocab_find_content(&t->vocab, left, (int64_t)n_left);
    int32_t b = cq_vocab_find_content(&t->vocab, right, (int64_t)n_right);
    int32_t both = cq_vocab_find_content(&t->vocab, joined->data, joined->bytes);
    if (a < 0 || b < 0 || both < 0)
        return cq_fail(
            CQ_EDATA,
            "merge %zu: \"%s\" + \"%s\" is not in the vocabulary, wanted its parts and result",
            rank, left, right);
    cq_vocab_put_merge(&t->vocab, a, b, (int32_t)rank, both);
    return CQ_OK;
}

static int read_model(cq_tokenizer *t, const json_t *model) {
    const json_t *vocab = json_object_get(model, "vocab"),
                 *merges = json_object_get(model, "merges");
    const json_t *type = json_object_get(model, "type"),
                 *dropout = json_object_get(model, "dropout");
    if (type && strcmp(text_of(model, "type"), "BPE") != 0)
        return cq_fail(CQ_EDATA, "model: type is \"%s\", wanted BPE", text_of(model, "type"));
    if (!json_is_object(vocab) || !json_is_array(merges))
        return cq_fail(CQ_EDATA, "model: no vocab or no merges, wanted both");
    if (json_is_number(dropout) && json_number_value(dropout) != 0)
        return cq_fail(CQ_EDATA, "model: dropout is %g, wanted none", json_number_value(dropout));
    for (int i = 0; i < 2; i++) {
        const char *key = i ? "end_of_word_suffix" : "continuing_subword_prefix";
        if (!absent(json_object_get(model, key)))
            return cq_fail(CQ_EDATA, "model: %s is \"%s\", wanted none", key, text_of(model, key));
    }
    if (flag_of(model, "byte_fallback", false))
        return cq_fail(CQ_EDATA, "model: byte_fallback is true, wanted false");
    t->ignore_merges = flag_of(model, "ignore_merges", false);
    CQ_TRY(cq_vocab_init(&t->vocab, (int64_t)json_object_size(vocab),
                         (int64_t)json_array_size(merges)));
    const char *content;
    json_t *id;
    json_object_foreach((json_t *)vocab, content, id) {
        if (!json_is_integer(id))
            return cq_fail(CQ_EDATA, "vocab: id of \"%s\" is no integer", content);
        CQ_TRY(cq_vocab_put(&t->vocab, json_integer_value(id), content, (int64_t)strlen(content),
                            true));
    }
    CQ_TRY(cq_vocab_bytes(&t->vocab));
    cq_buffer joined = {0};
    int status = CQ_OK;
    for (size_t i = 0; i < json_array_size(merges) && status == CQ_OK; i++)
        status = read_merge(t, json_array_get(merges, i), i, &joined);
    cq_buffer_free(&joined);
    return status;
}

/// Checks an added token that is already there against a second description of it.
static int check_same(const cq_added *a, const cq_added_token *old, const cq_added_token *now,
                      const char *content, size_t n) {
    if ((size_t)old->bytes != n || memcmp((char *)a->content.data + old->content, content, n) != 0)
        return cq_fail(CQ_EDATA,
                       "added token %d: \"%s\" here, \"%.*s\" elsewhere, wanted one content",
                       now->id, content, (int)old->bytes, (char *)a->content.data + old->content);
    if (old->id != now->id)
        return cq_fail(CQ_EDATA, "added token \"%s\": ids %d and %d, wanted one", content, old->id,
                       now->id);
    if (old->single_word != now->single_word || old->lstrip != now->lstrip ||
        old->rstrip != now->rstrip || old->normalized != now->normalized ||
        old->special != now->special)
        return cq_fail(CQ_EDATA, "added token \"%s\": its flags differ between the two files",
                       content);
    return CQ_OK;
}

static int read_added_token(cq_tokenizer *t, const json_t *entry, int64_t id) {
    const json_t *content = json_object_get(entry, "content");
    const char *text = json_string_value(content);
    size_t n = json_string_length(content);
    if (!text || id < 0 || id > INT32_MAX)
        return cq_fail(CQ_EDATA, "added token %lld: no id or no content, wanted both",
                       (long long)id);
    bool special = flag_of(entry, "special", false);
    cq_added_token token = {.id = (int32_t)id,
                            .special = special,
                            .single_word = flag_of(entry, "single_word", false),
                            .lstrip = flag_of(entry, "lstrip", false),
                            .rstrip = flag_of(entry, "rstrip", false),
                            .normalized = flag_of(entry, "normalized", !special)};
    const cq_added_token *old = cq_added_by_id(&t->added, id);
    if (!old)
        old = cq_added_by_content(&t->added, text, (int64_t)n);
    if (old)
        return check_same(&t->added, old, &token, text, n);
    int32_t piece = cq_vocab_find_content(&t->vocab, text, (int64_t)n);
    if (piece >= 0 && piece != id)
        return cq_fail(CQ_EDATA, "added token \"%s\": id is %lld, in the vocab %d, wanted one",
                       text, (long long)id, piece);
    if (piece < 0)
        CQ_TRY(cq_vocab_put(&t->vocab, id, text, (int64_t)n, false));
    cq_mapped search = {.text = text, .bytes = (int64_t)n};
    if (t->nfc && token.normalized)
        CQ_TRY(cq_mapped_nfc(&search, text, (int64_t)n));
    int status = cq_added_put(&t->added, token, text, (int64_t)n, search.text, search.bytes);
    cq_mapped_free(&search);
    return status;
}

static int read_added(cq_tokenizer *t, const json_t *root) {
    const json_t *list = json_object_get(root, "added_tokens");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *entry = json_array_get(list, i), *id = json_object_get(entry, "id");
        CQ_TRY(read_added_token(t, entry, json_is_integer(id) ? json_integer_value(id) : -1));
    }
    return CQ_OK;
}

static int read_added_decoder(cq_tokenizer *t, const json_t *config) {
    const char *key;
    json_t *entry;
    json_object_foreach(json_object_get(config, "added_tokens_decoder"), key, entry) {
        char *end;
        long long id = strtoll(key, &end, 10);
        if (*end || end == key)
            return cq_fail(CQ_EDATA, "added_tokens_decoder: key \"%s\" is no id", key);
        CQ_TRY(read_added_token(t, entry, id));
    }
    return CQ_OK;
}

static int read_tokenizer(cq_tokenizer *t, const json_t *root) {
    if (!json_is_object(root))
        return cq_fail(CQ_EDATA, "no JSON object, wanted a tokenizer");
    CQ_TRY(read_normalizer(t, root));
    CQ_TRY(read_pre_tokenizer(t, root));
    CQ_TRY(read_decoder(root));
    CQ_TRY(read_post_processor(root));
    CQ_TRY(read_model(t, json_object_get(root, "model")));
    return read_added(t, root);
}

/// Loads one JSON file, hands it to `read`, and puts the file's name before any message.
static int read_json(cq_tokenizer *t, const char *path,
                     int (*read)(cq_tokenizer *, const json_t *)) {
    char *text;
    int64_t bytes;
    CQ_TRY(cq_file_read(&text, &bytes, path));
    json_error_t error;
    json_t *root = json_loadb(text, (size_t)bytes, JSON_ALLOW_NUL, &error);
    free(text);
    if (!root)
        return cq_fail(CQ_EDATA, "%s:%d: broken JSON: %s", path, error.line, error.text);
    int status = read(t, root);
    json_decref(root);
    return status == CQ_OK ? CQ_OK : cq_fail_in(status, path);
}

int cq_tokenizer_read(cq_tokenizer *t, const char *dir) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/tokenizer.json", dir) >= (int)sizeof path)
        return cq_fail(CQ_EUSAGE, "%s: path is too long", dir);
    CQ_TRY(read_json(t, path, read_tokenizer));
    CQ_TRY(cq_sha256_file(path, t->hash));
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    return cq_file_exists(path) ? read_json(t, path, read_added_decoder) : CQ_OK;
}
