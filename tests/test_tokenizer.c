/// test_tokenizer.c - ids and text of the Hugging Face tokenizers library, and what must be
/// refused.
///
/// golden/*.tokens.json hold 438 strings per pipeline with their ids; every one has to be equal in
/// both directions.
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/hash.h"
#include "core/base/rng.h"
#include "core/text/tokenizer.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

static const char *const models[] = {"nemotron_h_gsm8k", "qwen3_gsm8k"};

static cq_tokenizer *open_model(const char *model) {
    char dir[512];
    snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, model);
    cq_tokenizer *t = NULL;
    OK(cq_tokenizer_open(&t, dir));
    return t;
}

static json_t *load_json(const char *path) {
    json_error_t error;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error);
    cr_assert_not_null(root, "%s:%d: %s", path, error.line, error.text);
    return root;
}

static bool same_ids(const int32_t *ids, int64_t n, const json_t *wanted) {
    if ((size_t)n != json_array_size(wanted))
        return false;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] != json_integer_value(json_array_get(wanted, (size_t)i)))
            return false;
    return true;
}

static void check_golden(const char *model) {
    char path[512];
    snprintf(path, sizeof path, "%s/golden/%s.tokens.json", CQ_TESTS, model);
    json_t *cases = load_json(path);
    cq_tokenizer *t = open_model(model);
    cr_assert_eq(json_array_size(cases), 438);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i), *text = json_object_get(c, "text");
        const json_t *decoded = json_object_get(c, "decoded");
        int32_t *ids;
        int64_t n, bytes;
        char *back;
        OK(cq_tokenizer_encode(t, json_string_value(text), (int64_t)json_string_length(text), &ids,
                               &n));
        cr_expect(same_ids(ids, n, json_object_get(c, "ids")), "%s: ids of case %zu differ", model,
                  i);
        OK(cq_tokenizer_decode(t, ids, n, &back, &bytes));
        cr_expect(bytes == (int64_t)json_string_length(decoded) &&
                      memcmp(back, json_string_value(decoded), (size_t)bytes) == 0,
                  "%s: text of case %zu differs", model, i);
        free(ids);
        free(back);
    }
    cq_tokenizer_close(t);
    json_decref(cases);
}

Test(tokenizer, nemotron_ids_and_text_equal_all_golden_cases) { check_golden(models[0]); }

Test(tokenizer, qwen3_ids_and_text_equal_all_golden_cases) { check_golden(models[1]); }

Test(tokenizer, knows_its_size_its_tokens_and_its_file) {
    cq_tokenizer *t = open_model("qwen3_gsm8k");
    cr_expect_eq(cq_tokenizer_size(t), 1024);
    cr_expect_eq(cq_tokenizer_id(t, "<|im_end|>"), 1019);
    cr_expect_eq(cq_tokenizer_id(t, "!"), 0);
    cr_expect_gt(cq_tokenizer_id(t, "\xC4\xA0the"), 0);
    cr_expect_eq(cq_tokenizer_id(t, "<|no_such_token|>"), -1);
    cr_expect_eq(cq_tokenizer_id(t, ""), -1);
    char hex[65];
    OK(cq_sha256_file(CQ_TESTS "/golden/qwen3_gsm8k/tokenizer.json", hex));
    cr_expect_str_eq(cq_tokenizer_hash(t), hex);
    cq_tokenizer_close(t);
}

/// A valid UTF-8 string of n seeded characters that NFC leaves alone.
static char *random_text(uint64_t seed, int n, int64_t *bytes) {
    char *s = malloc((size_t)n * 12 + 1), *at = s;
    for (int i = 0; i < n; i++) {
        static const char *const odd[] = {
            "<|im_end|>",   "<think>",  "\r\n", "  ",    "\t",       "\xF0\x9F\x98\x80",
            "\xE4\xB8\xAD", "\xD0\x96", "'s",   "<|im_", "\xC3\xA9", "\x7F"};
        uint64_t r = cq_random_bits(seed, 1, (uint64_t)i);
        if (r % 3 == 0) {
            const char *piece = odd[(r >> 8) % (sizeof odd / sizeof *odd)];
            at = stpcpy(at, piece);
        } else {
            *at++ = (char)(' ' + (r >> 8) % 95);
        }
    }
    *at = 0;
    *bytes = at - s;
    return s;
}

Test(tokenizer, valid_text_comes_back_as_it_was) {
    for (int m = 0; m < 2; m++) {
        cq_tokenizer *t = open_model(models[m]);
        for (uint64_t seed = 0; seed < 200; seed++) {
            int64_t bytes, n, back_bytes;
            char *text = random_text(seed, 1 + (int)seed, &bytes), *back;
            int32_t *ids;
            OK(cq_tokenizer_encode(t, text, bytes, &ids, &n));
            OK(cq_tokenizer_decode(t, ids, n, &back, &back_bytes));
            cr_expect(back_bytes == bytes && memcmp(back, text, (size_t)bytes) == 0,
                      "%s: seed %llu", models[m], (unsigned long long)seed);
            free(ids);
            free(back);
            free(text);
        }
        cq_tokenizer_close(t);
    }
}

Test(tokenizer, broken_bytes_become_replacement_characters) {
    // the right-hand sides are what Python's bytes.decode("utf-8", "replace") gives
    static const struct {
        const char *bytes, *text;
    } cases[] = {{"a\xFFz", "a\xEF\xBF\xBDz"},
                 {"\xE4\xB8", "\xEF\xBF\xBD"},
                 {"\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
                 {"\xC0\xAF", "\xEF\xBF\xBD\xEF\xBF\xBD"},
                 {"\xF0\x9F\x98x", "\xEF\xBF\xBDx"},
                 {"\xF4\x90\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}};
    cq_tokenizer *t = open_model("nemotron_h_gsm8k");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t *ids;
        int64_t n, bytes;
        char *back;
        OK(cq_tokenizer_encode(t, cases[i].bytes, (int64_t)strlen(cases[i].bytes), &ids, &n));
        OK(cq_tokenizer_decode(t, ids, n, &back, &bytes));
        cr_expect_str_eq(back, cases[i].text, "case %zu", i);
        free(ids);
        free(back);
    }
    cq_tokenizer_close(t);
}

Test(tokenizer, random_bytes_never_fail_and_offsets_stay_inside) {
    for (int m = 0; m < 2; m++) {
        cq_tokenizer *t = open_model(models[m]);
        for (uint64_t seed = 0; seed < 200; seed++) {
            char text[257];
            int64_t bytes = cq_random_below(seed, 2, 0, 257), n, *begins, last = 0;
            for (int64_t i = 0; i < bytes; i++)
                text[i] = (char)cq_random_bits(seed, 3, (uint64_t)i);
            int32_t *ids;
            OK(cq_tokenizer_encode_offsets(t, text, bytes, &ids, &begins, &n));
            for (int64_t i = 0; i < n; i++) {
                cr_expect(begins[i] >= last && begins[i] < bytes, "%s: seed %llu token %lld",
                          models[m], (unsigned long long)seed, (long long)i);
                last = begins[i];
            }
            free(ids);
            free(begins);
        }
        cq_tokenizer_close(t);
    }
}

/// Byte position where each token begins, for text that NFC changes: "e" and an accent compose to
/// one character.
Test(tokenizer, offsets_lead_back_through_normalization) {
    static const char text[] = "<think>\ncafe\xCC\x81 z<|im_end|>";
    cq_tokenizer *t = open_model("qwen3_gsm8k");
    int32_t *ids;
    int64_t *begins, n;
    OK(cq_tokenizer_encode_offsets(t, text, (int64_t)strlen(text), &ids, &begins, &n));
    cr_expect_eq(begins[0], 0);
    cr_expect_eq(begins[1], 7);
    for (int64_t i = 0; i < n; i++) {
        cr_expect(begins[i] <= 11 || begins[i] >= 14,
                  "token %lld begins inside the composed character", (long long)i);
        if (ids[i] == 1019)
            cr_expect_eq(begins[i], 16, "the closing token begins at %lld", (long long)begins[i]);
    }
    free(ids);
    free(begins);
    cq_tokenizer_close(t);
}

static double encode_seconds(const cq_tokenizer *t, const char *unit, int64_t bytes) {
    char *text = malloc((size_t)bytes);
    int64_t k = (int64_t)strlen(unit), n;
    for (int64_t i = 0; i < bytes; i++)
        text[i] = unit[i % k];
    int32_t *ids;
    struct timespec a, b;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    OK(cq_tokenizer_encode(t, text, bytes, &ids, &n));
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    free(ids);
    free(text);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

Test(tokenizer, a_megabyte_without_spaces_takes_seconds_not_hours) {
    // words, punctuation, white space, marks in descending and alternating combining classes
    static const char *const units[] = {
        "abcdefgh",         "AbCdE",       "ABCD", "!?!", " ", "\n \t", "123", "<|im_", "\xCC\x81",
        "\xCC\x81\xCC\xA3", "\xE4\xB8\xAD"};
    for (int m = 0; m < 2; m++) {
        cq_tokenizer *t = open_model(models[m]);
        for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
            double s = encode_seconds(t, units[i], 1 << 20);
            cr_expect_lt(s, 10, "%s: \"%s\" took %.1f s", models[m], units[i], s);
        }
        cq_tokenizer_close(t);
    }
}

Test(tokenizer, an_id_without_token_decodes_to_a_replacement_character) {
    cq_tokenizer *t = open_model("qwen3_gsm8k");
    int32_t ids[] = {0, 5000, -7, 1};
    char *text;
    int64_t bytes;
    OK(cq_tokenizer_decode(t, ids, 4, &text, &bytes));
    cr_expect_str_eq(text, "!\xEF\xBF\xBD\xEF\xBF\xBD\"");
    free(text);
    cq_tokenizer_close(t);
}

/// A folder below /tmp with these two files; `config` may be NULL.
static void make_folder(char *dir, const char *tokenizer, const char *config) {
    strcpy(dir, "/tmp/cq_tokenizer_XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
    char path[512];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    OK(cq_file_write(path, tokenizer, (int64_t)strlen(tokenizer)));
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    if (config)
        OK(cq_file_write(path, config, (int64_t)strlen(config)));
}

/// Opens golden qwen3 with one part of its JSON replaced; `key` is a path with dots.
static int open_changed(cq_tokenizer **t, const char *key, const char *value, const char *config) {
    json_t *root = load_json(CQ_TESTS "/golden/qwen3_gsm8k/tokenizer.json"), *at = root;
    char name[128], dir[64];
    snprintf(name, sizeof name, "%s", key);
    char *dot;
    char *part = name;
    while ((dot = strchr(part, '.'))) {
        *dot = 0;
        at = json_object_get(at, part);
        part = dot + 1;
    }
    if (*part)
        json_object_set_new(at, part, json_loads(value, JSON_DECODE_ANY, NULL));
    char *text = json_dumps(root, 0);
    make_folder(dir, text, config);
    int status = cq_tokenizer_open(t, dir);
    cq_folder_remove(dir);
    free(text);
    json_decref(root);
    return status;
}

Test(tokenizer, refuses_by_name_what_it_does_not_support) {
    static const struct {
        const char *key, *value, *named;
    } cases[] = {
        {"normalizer", "{\"type\": \"Lowercase\"}", "Lowercase"},
        {"pre_tokenizer", "{\"type\": \"Metaspace\"}", "Metaspace"},
        {"pre_tokenizer", "null", "ByteLevel"},
        {"pre_tokenizer", "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}",
         "add_prefix_space"},
        {"pre_tokenizer",
         "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"(a\"}, \"behavior\": \"Isolated\"}",
         "pattern"},
        {"pre_tokenizer",
         "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"[a[b]]\"}, \"behavior\": \"Isolated\"}",
         "[b]"},
        {"pre_tokenizer",
         "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, \"behavior\": \"MergedWithNext\"}",
         "MergedWithNext"},
        {"decoder", "{\"type\": \"WordPiece\"}", "WordPiece"},
        {"decoder", "null", "decoder"},
        {"post_processor", "{\"type\": \"Magic\"}", "Magic"},
        {"model.type", "\"Unigram\"", "Unigram"},
        {"model.dropout", "0.1", "dropout"},
        {"model.byte_fallback", "true", "byte_fallback"},
        {"model.end_of_word_suffix", "\"</w>\"", "end_of_word_suffix"},
        {"model.vocab", "{\"a\": 0}", "byte 0x00"},
        {"model.vocab", "[]", "vocab"},
        {"model.vocab.zzz", "-1", "zzz"},
        {"model.vocab.zzz", "99999999", "zzz"},
        {"model.vocab.zzz", "5", "token 5"},
        {"model.merges", "[\"q q\"]", "merge 0"},
        {"model.merges", "[5]", "merge 0"},
        {"added_tokens", "[{\"id\": 3, \"content\": \"<x>\"}]", "token 3"},
        {"added_tokens", "[{\"id\": 2000}]", "2000"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cq_tokenizer *t = NULL;
        int status = open_changed(&t, cases[i].key, cases[i].value, NULL);
        cr_expect_eq(status, CQ_EDATA, "%s = %s", cases[i].key, cases[i].value);
        cr_expect(status != CQ_OK && strstr(cq_error(), cases[i].named) &&
                      strstr(cq_error(), "tokenizer.json"),
                  "%s = %s: message \"%s\" does not name %s", cases[i].key, cases[i].value,
                  cq_error(), cases[i].named);
        cq_tokenizer_close(t);
    }
}

Test(tokenizer, added_tokens_of_the_two_files_must_agree) {
    cq_tokenizer *t = NULL;
    cr_expect_eq(
        open_changed(&t, "", "",
                     "{\"added_tokens_decoder\": {\"1017\": {\"content\": \"<|other|>\"}}}"),
        CQ_EDATA);
    cr_expect(strstr(cq_error(), "1017") && strstr(cq_error(), "tokenizer_config.json"), "%s",
              cq_error());
    cr_expect_eq(open_changed(&t, "", "",
                              "{\"added_tokens_decoder\": {\"1017\": {\"content\": "
                              "\"<|endoftext|>\", \"special\": true, "
                              "\"lstrip\": true}}}"),
                 CQ_EDATA);
    cr_expect(strstr(cq_error(), "flags"), "%s", cq_error());
    OK(open_changed(&t, "", "",
                    "{\"added_tokens_decoder\": {\"1030\": {\"content\": \"<|late|>\"}}}"));
    cr_expect_eq(cq_tokenizer_size(t), 1031);
    int32_t *ids;
    int64_t n;
    OK(cq_tokenizer_encode(t, "a<|late|>", 9, &ids, &n));
    cr_expect(n == 2 && ids[1] == 1030);
    free(ids);
    cq_tokenizer_close(t);
}

static void expect_ids(const cq_tokenizer *t, const char *text, int64_t n, const int32_t *wanted) {
    int32_t *ids;
    int64_t got;
    OK(cq_tokenizer_encode(t, text, (int64_t)strlen(text), &ids, &got));
    cr_expect_eq(got, n, "\"%s\": %lld tokens", text, (long long)got);
    for (int64_t i = 0; i < n && i < got; i++)
        cr_expect(wanted[i] < 0 || ids[i] == wanted[i], "\"%s\": token %lld is %d", text,
                  (long long)i, ids[i]);
    free(ids);
}

/// What the Hugging Face library does with these flags; -1 stands for any id.
Test(tokenizer, flags_of_added_tokens_are_honoured) {
    cq_tokenizer *t = NULL;
    OK(open_changed(&t, "added_tokens",
                    "[{\"id\": 2000, \"content\": \"<l>\", \"lstrip\": true}, {\"id\": 2001, "
                    "\"content\": \"<r>\", "
                    "\"rstrip\": true}, {\"id\": 2002, \"content\": \"abq\", \"single_word\": "
                    "true}, {\"id\": 2003, "
                    "\"content\": \"<lo\"}, {\"id\": 2004, \"content\": \"<long>\"}]",
                    NULL));
    expect_ids(t, "! <l>!", 3, (int32_t[]){0, 2000, 0});
    expect_ids(t, "!<r> \n\t!", 3, (int32_t[]){0, 2001, 0});
    expect_ids(t, "!abq!", 3, (int32_t[]){0, 2002, 0});
    expect_ids(t, "<long>", 1, (int32_t[]){2004});
    expect_ids(t, "<lon", 2, (int32_t[]){2003, -1});
    int32_t *ids;
    int64_t n;
    OK(cq_tokenizer_encode(t, "cabq", 4, &ids, &n));
    for (int64_t i = 0; i < n; i++)
        cr_expect_neq(ids[i], 2002, "a word at another's end");
    free(ids);
    OK(cq_tokenizer_encode(t, "abqc", 4, &ids, &n));
    cr_expect_neq(ids[0], 2002, "a word at another's start");
    free(ids);
    cq_tokenizer_close(t);
}

/// golden qwen3 with the pieces aa and zqzqz (which no merge makes) and this list of merges.
static cq_tokenizer *open_merges(const char *merges, bool ignore_merges) {
    json_t *root = load_json(CQ_TESTS "/golden/qwen3_gsm8k/tokenizer.json"),
           *model = json_object_get(root, "model");
    json_object_set_new(json_object_get(model, "vocab"), "aa", json_integer(1030));
    json_object_set_new(json_object_get(model, "vocab"), "zqzqz", json_integer(1031));
    json_object_set_new(model, "merges", json_loads(merges, 0, NULL));
    json_object_set_new(model, "ignore_merges", json_boolean(ignore_merges));
    char *text = json_dumps(root, 0), dir[64];
    make_folder(dir, text, NULL);
    cq_tokenizer *t = NULL;
    OK(cq_tokenizer_open(&t, dir));
    cq_folder_remove(dir);
    free(text);
    json_decref(root);
    return t;
}

Test(tokenizer, equal_ranks_merge_from_the_left_in_both_spellings_of_merges) {
    static const char *const spellings[] = {"[\"a a\"]", "[[\"a\", \"a\"]]"};
    for (int i = 0; i < 2; i++) {
        cq_tokenizer *t = open_merges(spellings[i], false);
        int32_t a = cq_tokenizer_id(t, "a");
        expect_ids(t, "aaa", 2, (int32_t[]){1030, a});
        expect_ids(t, "aaaaa", 3, (int32_t[]){1030, 1030, a});
        cq_tokenizer_close(t);
    }
}

Test(tokenizer, ignore_merges_takes_a_whole_word_at_once) {
    cq_tokenizer *t = open_merges("[]", true);
    expect_ids(t, "zqzqz", 1, (int32_t[]){1031});
    expect_ids(t, "zqzqzq", 6, (int32_t[]){-1, -1, -1, -1, -1, -1});
    cq_tokenizer_close(t);
    t = open_merges("[]", false);
    expect_ids(t, "zqzqz", 5, (int32_t[]){-1, -1, -1, -1, -1});
    cq_tokenizer_close(t);
}

/// Marks below (class 220) come before marks above (class 230), however long the run is.
Test(tokenizer, marks_are_put_in_canonical_order) {
    cq_tokenizer *t = open_model("qwen3_gsm8k");
    for (int pairs = 1; pairs <= 20; pairs += 19) {
        char mixed[128] = "q", sorted[128] = "q";
        for (int i = 0; i < pairs; i++)
            strcat(mixed, "\xCC\x81\xCC\xA3");
        for (int i = 0; i < 2 * pairs; i++)
            strcat(sorted, i < pairs ? "\xCC\xA3" : "\xCC\x81");
        int32_t *ids;
        int64_t n, bytes;
        char *text;
        OK(cq_tokenizer_encode(t, mixed, (int64_t)strlen(mixed), &ids, &n));
        OK(cq_tokenizer_decode(t, ids, n, &text, &bytes));
        cr_expect_str_eq(text, sorted, "%d pairs", pairs);
        free(ids);
        free(text);
    }
    cq_tokenizer_close(t);
}

Test(tokenizer, a_missing_or_broken_file_is_named) {
    cq_tokenizer *t = NULL;
    cr_expect_eq(cq_tokenizer_open(&t, "/no/such/folder"), CQ_EIO);
    cr_expect(strstr(cq_error(), "/no/such/folder/tokenizer.json"), "%s", cq_error());
    char dir[64];
    make_folder(dir, "{\"model\": \n{,", NULL);
    cr_expect_eq(cq_tokenizer_open(&t, dir), CQ_EDATA);
    cr_expect(strstr(cq_error(), "tokenizer.json:2"), "%s", cq_error());
    cq_folder_remove(dir);
    cr_expect_null(t);
}
