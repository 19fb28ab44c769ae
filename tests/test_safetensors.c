/// test_safetensors.c - round trips, shards, and every malformed file the format's rules name.
///
/// A negative case gives header text and data length; the message must name the file and hold the
/// given words, so that a case refused for another reason than its own fails.
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/tensor/safetensors.h"
#include "tests/scratch.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

TestSuite(safetensors, .init = scratch_open, .fini = scratch_close);
TestSuite(safetensors_bad, .init = scratch_open, .fini = scratch_close);
TestSuite(safetensors_index, .init = scratch_open, .fini = scratch_close);

static cq_safetensors *open_good(const char *path) {
    cq_safetensors *st = NULL;
    cr_assert_eq(cq_safetensors_open(&st, path), CQ_OK, "%s", cq_error());
    return st;
}

/* ---- writing and reading back ---- */

typedef struct sample {
    const char *name;
    cq_dtype dtype;
    cq_shape shape;
} sample;

static const sample samples[] = {
    {"z.odd", CQ_U8, {{3, 1, 1, 1}, 4}}, {"b.half", CQ_F16, {{5}, 1}},
    {"a.bf16", CQ_BF16, {{2, 3}, 2}},    {"scalar", CQ_F32, {{0}, 0}},
    {"empty", CQ_F64, {{0, 7}, 2}},      {"codes", CQ_F8_E4M3, {{2, 2, 3}, 3}},
    {"ids", CQ_I32, {{4}, 1}},           {"long", CQ_I64, {{2}, 1}},
    {"double", CQ_F64, {{3}, 1}},        {"été \"quoted\" \\", CQ_F32, {{1}, 1}},
};
enum { N_SAMPLES = sizeof samples / sizeof samples[0], SAMPLE_BYTES = 24 };

/// Byte k of sample i.
static unsigned char byte_of(int i, int k) { return (unsigned char)(17 * i + k + 1); }

static cq_st_writer *sample_writer(unsigned char data[N_SAMPLES][SAMPLE_BYTES]) {
    cq_st_writer *w;
    cr_assert_eq(cq_st_writer_open(&w), CQ_OK);
    for (int i = 0; i < N_SAMPLES; i++) {
        for (int k = 0; k < SAMPLE_BYTES; k++)
            data[i][k] = byte_of(i, k);
        cq_tensor t = {data[i], samples[i].shape, samples[i].dtype};
        cr_assert_leq(cq_tensor_bytes(t), SAMPLE_BYTES);
        cr_assert_eq(cq_st_writer_add(w, samples[i].name, t), CQ_OK, "%s", cq_error());
    }
    return w;
}

static void expect_samples(const cq_safetensors *st) {
    cr_assert_eq(cq_safetensors_count(st), N_SAMPLES);
    for (int i = 0; i < N_SAMPLES; i++) {
        const cq_entry *e = cq_safetensors_find(st, samples[i].name);
        cr_assert(e, "%s", samples[i].name);
        cr_assert_eq(e->tensor.dtype, samples[i].dtype);
        cr_assert(cq_shape_equal(e->tensor.shape, samples[i].shape));
        const unsigned char *at = e->tensor.data;
        for (int k = 0; k < cq_tensor_bytes(e->tensor); k++)
            cr_assert_eq(at[k], byte_of(i, k), "%s byte %d", e->name, k);
        if (cq_tensor_bytes(e->tensor))
            cr_assert_eq((uintptr_t)at % (uintptr_t)cq_dtype_bytes(e->tensor.dtype), 0);
        cq_safetensors_drop(st, e);
    }
    for (int64_t i = 1; i < N_SAMPLES; i++)
        cr_assert(strcmp(cq_safetensors_at(st, i - 1)->name, cq_safetensors_at(st, i)->name) < 0);
    cr_assert_null(cq_safetensors_find(st, "none"));
}

Test(safetensors, a_file_comes_back_as_it_went) {
    unsigned char data[N_SAMPLES][SAMPLE_BYTES];
    char *path = below(scratch, "x.safetensors");
    cq_st_writer *w = sample_writer(data);
    cr_assert_eq(cq_st_writer_metadata(w, "format", "pt"), CQ_OK);
    cr_assert_eq(cq_st_writer_file(w, path), CQ_OK, "%s", cq_error());
    cq_st_writer_close(w);
    cr_assert_eq(n_names(scratch), 1);
    cq_safetensors *st = open_good(path);
    expect_samples(st);
    cr_assert_str_eq(cq_safetensors_metadata(st, "format"), "pt");
    cr_assert_null(cq_safetensors_metadata(st, "other"));
    cr_assert_str_eq(cq_safetensors_path(st, cq_safetensors_at(st, 0)), path);
    cq_safetensors_close(st);
    cq_safetensors_close(NULL);
}

Test(safetensors, a_folder_is_one_file_or_shards_and_the_other_layout_goes) {
    unsigned char data[N_SAMPLES][SAMPLE_BYTES];
    cq_st_writer *w = sample_writer(data);
    char *index = below(scratch, "model.safetensors.index.json"),
         *single = below(scratch, "model.safetensors");
    int64_t limits[] = {40, 0, 1, 1 << 20, 25};
    /* 101 bytes, filled in name order; an empty tensor adds no shard */
    int shards[] = {3, 1, 9, 1, 6};
    for (int i = 0; i < 5; i++) {
        cr_assert_eq(cq_st_writer_folder(w, scratch, limits[i]), CQ_OK, "%s", cq_error());
        cr_assert_eq(cq_file_exists(index), shards[i] > 1);
        cr_assert_eq(cq_file_exists(single), shards[i] == 1);
        char last[64];
        snprintf(last, sizeof last, "model-%05d-of-%05d.safetensors", shards[i], shards[i]);
        cr_assert_eq(cq_file_exists(below(scratch, last)), shards[i] > 1, "wanted %d shards",
                     shards[i]);
        cq_safetensors *st = open_good(scratch);
        expect_samples(st);
        cq_safetensors_close(st);
    }
    cq_st_writer_close(w);
}

Test(safetensors, a_file_without_tensors_is_valid) {
    cq_st_writer *w;
    char *path = below(scratch, "none.safetensors");
    cr_assert_eq(cq_st_writer_open(&w), CQ_OK);
    cr_assert_eq(cq_st_writer_file(w, path), CQ_OK);
    cq_st_writer_close(w);
    cq_safetensors *st = open_good(path);
    cr_assert_eq(cq_safetensors_count(st), 0);
    cr_assert_null(cq_safetensors_at(st, 0));
    cq_safetensors_close(st);
}

Test(safetensors, the_writer_refuses_what_no_reader_would_take) {
    cq_st_writer *w;
    float x[4] = {0};
    cq_tensor t = {x, CQ_SHAPE1(4), CQ_F32};
    cr_assert_eq(cq_st_writer_open(&w), CQ_OK);
    cr_assert_eq(cq_st_writer_add(w, "a", t), CQ_OK);
    cr_assert_eq(cq_st_writer_add(w, "a", t), CQ_EUSAGE);
    cr_assert(strstr(cq_error(), "twice"), "%s", cq_error());
    cr_assert_eq(cq_st_writer_add(w, "__metadata__", t), CQ_EUSAGE);
    cr_assert_eq(cq_st_writer_add(w, "\xff", t), CQ_EUSAGE);
    cr_assert_eq(cq_st_writer_metadata(w, "k", "\xc0\x80"), CQ_EUSAGE);
    cr_assert_eq(cq_st_writer_add(w, "b", (cq_tensor){NULL, CQ_SHAPE1(4), CQ_F32}), CQ_EUSAGE);
    cr_assert_eq(cq_st_writer_add(w, "b", (cq_tensor){x, CQ_SHAPE1(4), (cq_dtype)9}), CQ_EUSAGE);
    cr_assert_eq(cq_st_writer_add(w, "b", (cq_tensor){x, CQ_SHAPE1(-4), CQ_F32}), CQ_ESHAPE);
    cr_assert_eq(cq_st_writer_file(w, below(scratch, "no/x.safetensors")), CQ_EIO);
    cr_assert_eq(cq_st_writer_folder(w, below(scratch, "no"), 0), CQ_EIO);
    cr_assert_eq(cq_st_writer_file(w, below(scratch, "x.safetensors")), CQ_OK);
    cq_st_writer_close(w);
    cq_safetensors *st = open_good(below(scratch, "x.safetensors"));
    cr_assert_eq(cq_safetensors_count(st), 1);
    cq_safetensors_close(st);
}

/// The files were written by the reference writer, so equal bytes mean the same order, header and
/// padding.
static void expect_same_bytes(const char *file) {
    char *path = below(CQ_TESTS "/golden", file), *copy = below(scratch, "copy.safetensors");
    cq_safetensors *st = open_good(path);
    cq_st_writer *w;
    cr_assert_eq(cq_st_writer_open(&w), CQ_OK);
    cr_assert_eq(cq_st_writer_metadata(w, "format", cq_safetensors_metadata(st, "format")), CQ_OK);
    for (int64_t i = 0; i < cq_safetensors_count(st); i++) {
        const cq_entry *e = cq_safetensors_at(st, i);
        cr_assert_eq(cq_st_writer_add(w, e->name, e->tensor), CQ_OK);
    }
    cr_assert_eq(cq_st_writer_file(w, copy), CQ_OK);
    cq_st_writer_close(w);
    cq_safetensors_close(st);
    cq_map a, b;
    cr_assert_eq(cq_map_open(&a, path), CQ_OK);
    cr_assert_eq(cq_map_open(&b, copy), CQ_OK);
    cr_assert_eq(a.bytes, b.bytes, "%s", file);
    cr_assert_eq(memcmp(a.data, b.data, (size_t)a.bytes), 0, "%s", file);
    cq_map_close(&a);
    cq_map_close(&b);
}

Test(safetensors, a_file_of_the_reference_writer_is_written_again_byte_for_byte) {
    expect_same_bytes("qwen3_tiny/model-00001-of-00002.safetensors");
    expect_same_bytes("qwen3_tiny/model-00002-of-00002.safetensors");
    expect_same_bytes("nemotron_h_tiny/model.safetensors");
}

Test(safetensors, golden_folders_open) {
    cq_safetensors *st = open_good(CQ_TESTS "/golden/qwen3_tiny");
    cr_assert_eq(cq_safetensors_count(st), 35);
    const cq_entry *e = cq_safetensors_find(st, "model.embed_tokens.weight"),
                   *f = cq_safetensors_find(st, "model.layers.0.mlp.gate_proj.weight");
    cr_assert(e && e->tensor.dtype == CQ_BF16 && e->tensor.shape.dim[1] == 80);
    cr_assert(strstr(cq_safetensors_path(st, e), "model-00001-of-00002.safetensors"));
    cr_assert(f && strstr(cq_safetensors_path(st, f), "model-00002-of-00002.safetensors"));
    cq_safetensors_close(st);
    st = open_good(CQ_TESTS "/golden/nemotron_h_tiny");
    cr_assert(cq_safetensors_count(st) > 50);
    cq_safetensors_close(st);
}

/* ---- malformed files ---- */

static void put(FILE *f, const void *data, size_t n) { cr_assert_eq(fwrite(data, 1, n, f), n); }

/// A file of this length field, header and data bytes; its path is `bad`.
static char *make_file(uint64_t length, const char *header, size_t header_bytes,
                       size_t data_bytes) {
    char *path = below(scratch, "bad.safetensors");
    FILE *f = fopen(path, "wb");
    cr_assert(f);
    put(f, &length, 8);
    put(f, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++)
        fputc((int)(i & 0xff), f);
    fclose(f);
    return path;
}

static void expect_refused(const char *path, const char *words) {
    cq_safetensors *st = (void *)1;
    int status = cq_safetensors_open(&st, path);
    cr_assert_eq(status, CQ_EDATA, "status %d, wanted a refusal with: %s", status, words);
    cr_assert_null(st);
    cr_assert(strstr(cq_error(), words), "\"%s\", wanted: %s", cq_error(), words);
    cr_assert(strstr(cq_error(), scratch), "no file in: %s", cq_error());
}

static void bad(const char *header, size_t data_bytes, const char *words) {
    size_t n = strlen(header);
    expect_refused(make_file(n, header, n, data_bytes), words);
}

#define A(dtype, shape, offsets)                                                                   \
    "\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define B(dtype, shape, offsets)                                                                   \
    "\"b\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static const char good[] = "{" A("F32", "[2]", "[0,8]") "," B("U8", "[3]", "[8,11]") "}   ";

Test(safetensors_bad, the_good_one_that_the_bad_ones_are_made_of_opens) {
    cq_safetensors *st = open_good(make_file(strlen(good), good, strlen(good), 11));
    cr_assert_eq(cq_safetensors_count(st), 2);
    cq_safetensors_close(st);
}

Test(safetensors_bad, truncation_at_every_byte) {
    size_t n = strlen(good), total = 8 + n + 11;
    char *path = make_file(n, good, n, 11);
    for (size_t keep = total; keep-- > 0;) {
        cr_assert_eq(truncate(path, (off_t)keep), 0);
        expect_refused(path, keep < 8           ? "wanted at least the 8"
                             : keep < 8 + n     ? "bytes that follow"
                             : keep < 8 + n + 8 ? "a lies at"
                                                : "b lies at");
    }
}

Test(safetensors_bad, header_length) {
    size_t n = strlen(good);
    expect_refused(make_file(0, good, n, 11), "is empty");
    expect_refused(make_file(1ull << 63, good, n, 11),
                   "header length is 9223372036854775808, wanted");
    expect_refused(make_file((1ull << 63) - 1, good, n, 11),
                   "header length is 9223372036854775807, wanted at most 100000000");
    expect_refused(make_file(~0ull, good, n, 11), "18446744073709551615");
    expect_refused(make_file(100000001, good, n, 11), "wanted at most 100000000");
    expect_refused(make_file(100000000, good, n, 11), "bytes that follow");
    expect_refused(make_file(n + 12, good, n, 11), "bytes that follow");
    expect_refused(make_file(n - 4, good, n, 11), "not valid JSON");
}

Test(safetensors_bad, what_stands_around_the_object) {
    bad(" {}", 0, "begin with {");
    bad("\n{}", 0, "begin with {");
    bad("\xef\xbb\xbf{}", 0, "begin with {");
    bad("[]", 0, "begin with {");
    bad("{}\n", 0, "ends in 0x0a");
    bad("{} {}", 0, "not valid JSON");
    bad("{}]", 0, "ends in 0x5d");
    bad("{", 0, "ends in 0x7b");
    bad("{ ", 0, "ends in 0x7b");
    bad("{\"a\"}", 0, "not valid JSON");
    expect_refused(make_file(3, "{}\0", 3, 0), "0x00");
    expect_refused(make_file(4, "{\0} ", 4, 0), "0x00");
}

Test(safetensors_bad, data_ranges) {
    bad("{" A("U8", "[4]", "[0,4]") "}", 5, "bytes long, wanted");
    bad("{" A("U8", "[4]", "[1,5]") "}", 5, "a begins at byte 1 of the data, wanted 0");
    bad("{" A("U8", "[4]", "[0,4]") "," B("U8", "[4]", "[5,9]") "}", 9, "b begins at byte 5");
    bad("{" A("U8", "[4]", "[0,4]") "," B("U8", "[4]", "[3,7]") "}", 7, "b begins at byte 3");
    bad("{" A("U8", "[4]", "[0,4]") "," B("U8", "[4]", "[0,4]") "}", 4, "begins at byte 0");
    bad("{" A("U8", "[0]", "[2,2]") "," B("U8", "[4]", "[0,4]") "}", 4, "a begins at byte 2");
    bad("{" A("U8", "[4]", "[4,0]") "}", 4, "a lies at bytes 4 to 0");
    bad("{" A("U8", "[4]", "[0,5]") "}", 4, "a lies at bytes 0 to 5");
    bad("{" A("U8", "[4]", "[0,9223372036854775807]") "}", 4, "a lies at");
    bad("{" A("U8", "[4]", "[9223372036854775807,9223372036854775807]") "}", 4, "a lies at");
    bad("{" A("U8", "[4]", "[0,18446744073709551616]") "}", 4, "not valid JSON");
    bad("{" A("F32", "[4]", "[0,15]") "}", 15, "a has 15 bytes, wanted 16");
    bad("{" A("F32", "[3]", "[0,16]") "}", 16, "a has 16 bytes, wanted 12");
    bad("{" A("F32", "[]", "[0,0]") "}", 0, "a has 0 bytes, wanted 4");
    bad("{}", 1, "bytes long, wanted");
}

Test(safetensors_bad, shapes) {
    bad("{" A("F32", "[4294967296,4294967296]", "[0,0]") "}", 0, "larger than 2^63");
    bad("{" A("F32", "[4611686018427387904]", "[0,0]") "}", 0, "larger than 2^63");
    bad("{" A("F32", "[4294967296,4294967296,0]", "[0,0]") "}", 0, "larger than 2^63");
    bad("{" A("F32", "[1,1,1,1,1]", "[0,4]") "}", 4, "a has rank 5, wanted at most 4");
    bad("{" A("F32", "[-1]", "[0,4]") "}", 4, "'-'");
    bad("{" A("F32", "[-0]", "[0,0]") "}", 0, "'-'");
    bad("{" A("F32", "[1.0]", "[0,4]") "}", 4, "'.'");
    bad("{" A("F32", "[1e0]", "[0,4]") "}", 4, "'e'");
    bad("{" A("F32", "[1E0]", "[0,4]") "}", 4, "'E'");
    bad("{" A("F32", "[01]", "[0,4]") "}", 4, "not valid JSON");
    bad("{" A("F32", "[\"1\"]", "[0,4]") "}", 4, "not a non-negative integer");
    bad("{" A("F32", "[true]", "[0,4]") "}", 4, "'t'");
    bad("{" A("F32", "1", "[0,4]") "}", 4, "not a list");
    bad("{" A("F32", "[[1]]", "[0,4]") "}", 4, "deeper");
    bad("{" A("F32", "[1]", "[-0,4]") "}", 4, "'-'");
    bad("{" A("F32", "[1]", "[0,4.0]") "}", 4, "'.'");
    bad("{" A("F32", "[1]", "[0]") "}", 4, "two data_offsets");
    bad("{" A("F32", "[1]", "[0,2,4]") "}", 4, "two data_offsets");
    bad("{" A("F32", "[1]", "[\"0\",4]") "}", 4, "not a non-negative integer");
}

Test(safetensors_bad, dtypes_and_fields) {
    const char *unknown[] = {"BOOL", "I8", "F4", "U64", "F8_E5M2", "f32", "F32 ", ""};
    for (int i = 0; i < 8; i++) {
        char header[128];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"%s\",\"shape\":[],\"data_offsets\":[0,4]}}", unknown[i]);
        bad(header, 4, "a has unknown dtype");
    }
    bad("{\"a\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,4]}}", 4, "not exactly dtype");
    bad("{\"a\":{\"shape\":[],\"data_offsets\":[0,4]}}", 4, "not exactly dtype");
    bad("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "not exactly dtype");
    bad("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 4, "not exactly dtype");
    bad("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4],\"x\":1}}", 4,
        "not exactly dtype");
    bad("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"offsets\":[0,4]}}", 4, "not exactly dtype");
    bad("{\"a\":[]}", 0, "not exactly dtype");
    bad("{\"a\":\"\"}", 0, "not exactly dtype");
    bad("{\"a\":null}", 0, "'n'");
}

Test(safetensors_bad, names_and_metadata) {
    bad("{" A("U8", "[1]", "[0,1]") "," A("U8", "[1]", "[1,2]") "}", 2, "duplicate");
    bad("{" A("U8", "[1]",
              "[0,1]") ",\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
        2, "duplicate");
    bad("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
        "duplicate");
    bad("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate");
    bad("{\"__metadata__\":{\"k\":1}}", 0, "__metadata__ entry k is not a string");
    bad("{\"__metadata__\":{\"k\":[]}}", 0, "__metadata__ entry k is not a string");
    bad("{\"__metadata__\":[]}", 0, "__metadata__ is not a map");
    bad("{\"__metadata__\":\"pt\"}", 0, "__metadata__ is not a map");
    bad("{\"__metadata__\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
        "__metadata__ entry shape is not a string");
    const char *names[] = {"\xff",      "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                           "\xe2\x82",  "\\ud800",  "\\udc00x",     "\\u0000",
                           "a\\u0000b", "\\x",      "\n",           "\x01"};
    for (int i = 0; i < 12; i++) {
        char header[128];
        snprintf(header, sizeof header,
                 "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", names[i]);
        bad(header, 1, "not valid JSON");
    }
}

Test(safetensors_bad, deep_and_wide_nesting) {
    size_t n = 3000000;
    char *text = malloc(n + 1);
    const char *units[] = {"[", "{\"a\":", "{\"a\":[", "[[],"};
    for (int u = 0; u < 4; u++) {
        size_t step = strlen(units[u]), at = 5;
        memcpy(text, "{\"a\":", 5);
        while (at + step < n) {
            memcpy(text + at, units[u], step);
            at += step;
        }
        text[at] = 0;
        bad(text, 0, "deeper than 3");
    }
    free(text);
}

Test(safetensors_bad, a_message_survives_hostile_names) {
    char header[4096], name[3000];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    snprintf(header, sizeof header,
             "{\"\\u001b[2J\\n%s\":{\"dtype\":\"Q\",\"shape\":[],\"data_offsets\":[0,0]}}", name);
    bad(header, 0, "unknown dtype Q");
    cr_assert_null(strchr(cq_error(), '\n'));
    cr_assert_null(strchr(cq_error(), '\x1b'));
}

Test(safetensors_bad, unaligned_tensors_are_copied) {
    const char *header =
        "{" A("U8", "[1]", "[0,1]") "," B("F64", "[1]", "[1,9]") "}"; /* 103 bytes */
    cq_safetensors *st = open_good(make_file(strlen(header), header, strlen(header), 9));
    const cq_entry *b = cq_safetensors_find(st, "b");
    cr_assert_eq((uintptr_t)b->tensor.data % 8, 0);
    for (int i = 0; i < 8; i++)
        cr_assert_eq(((unsigned char *)b->tensor.data)[i], i + 1);
    cq_safetensors_drop(st, b);
    cr_assert_eq(((unsigned char *)b->tensor.data)[7], 8);
    cq_safetensors_close(st);
}

Test(safetensors_bad, missing_files_and_folders) {
    expect_refused(below(scratch, "none.safetensors"), "No such file");
    expect_refused(scratch, "neither model.safetensors nor");
    cr_assert_eq(mkdir(below(scratch, "model.safetensors"), 0700), 0);
    expect_refused(scratch, "directory");
}

/// A few thousand damaged files: a byte or run replaced, a cut, a piece repeated. Whatever is
/// accepted must be readable from end to end; the sanitizers watch the rest.
Test(safetensors_bad, random_damage_never_crashes) {
    size_t n = strlen(good), total = 8 + n + 11;
    char file[512], damaged[1024], *path = below(scratch, "bad.safetensors");
    uint64_t seed = 20251125, length = n;
    int accepted = 0;
    memcpy(file, &length, 8);
    memcpy(file + 8, good, n);
    memset(file + 8 + n, 7, 11);
    static const char interesting[] = "{}[]\",:\\0919-.eE \x00\xff\x80u";
    for (uint64_t trial = 0; trial < 6000; trial++) {
        uint64_t c = trial * 64;
        memcpy(damaged, file, total);
        size_t bytes = total;
        for (int64_t k = cq_random_below(seed, 1, c++, 3); k >= 0; k--) {
            size_t at = (size_t)cq_random_below(seed, 1, c++, (int64_t)bytes);
            switch (cq_random_below(seed, 1, c++, 5)) {
            case 0:
                damaged[at] = (char)cq_random_bits(seed, 1, c++);
                break;
            case 1:
                damaged[at] = interesting[cq_random_below(seed, 1, c++, sizeof interesting)];
                break;
            case 2:
                bytes = at + 1;
                break;
            case 3: /* a digit changes: offsets and sizes */
                while (at < bytes && (damaged[at] < '0' || damaged[at] > '9'))
                    at++;
                if (at < bytes)
                    damaged[at] = (char)('0' + cq_random_below(seed, 1, c++, 10));
                break;
            default: /* a piece is repeated and the header grows with it */
                memmove(damaged + at + 16, damaged + at, bytes - at);
                bytes += 16;
                length = (uint64_t)((int64_t)n + cq_random_below(seed, 1, c++, 32));
                memcpy(damaged, &length, 8);
            }
        }
        cr_assert_eq(cq_file_exists(path) ? unlink(path) : 0, 0);
        FILE *f = fopen(path, "wb");
        cr_assert(f);
        put(f, damaged, bytes);
        fclose(f);
        cq_safetensors *st = NULL;
        int status = cq_safetensors_open(&st, path);
        cr_assert(status == CQ_OK || status == CQ_EDATA, "seed %lu trial %lu: %d %s",
                  (unsigned long)seed, (unsigned long)trial, status, cq_error());
        unsigned sum = 0;
        for (int64_t i = 0; status == CQ_OK && i < cq_safetensors_count(st); i++) {
            const cq_tensor *t = &cq_safetensors_at(st, i)->tensor;
            for (int64_t k = 0; k < cq_tensor_bytes(*t); k++)
                sum += ((unsigned char *)t->data)[k];
        }
        accepted += status == CQ_OK && sum < 1u << 31;
        cq_safetensors_close(st);
    }
    cr_assert(accepted > 60 && accepted < 4000, "%d accepted: the damage is not what it should be",
              accepted);
}

/* ---- the index of a sharded folder ---- */

static void write_shard(const char *file, const char *header, size_t data_bytes) {
    size_t n = strlen(header);
    cr_assert_eq(rename(make_file(n, header, n, data_bytes), below(scratch, file)), 0);
}

static void two_shards(void) {
    write_shard("one", "{" A("U8", "[4]", "[0,4]") "}", 4);
    write_shard("two", "{" B("F32", "[2]", "[0,8]") "}", 8);
}

static void with_index(const char *text, const char *words) {
    two_shards();
    cr_assert_eq(
        cq_file_write(below(scratch, "model.safetensors.index.json"), text, (int64_t)strlen(text)),
        CQ_OK);
    if (words) {
        expect_refused(scratch, words);
        return;
    }
    cq_safetensors *st = open_good(scratch);
    cr_assert_eq(cq_safetensors_count(st), 2);
    cq_safetensors_close(st);
}

#define MAP "\"weight_map\":{\"a\":\"one\",\"b\":\"two\"}"

Test(safetensors_index, accepted_forms) {
    with_index("{\"metadata\":{\"total_size\":12}," MAP "}", NULL);
    with_index("{\"metadata\":{\"total_size\":12.0,\"extra\":[true,null,-1.5]}," MAP "}", NULL);
    with_index("{\"metadata\":{}," MAP "}", NULL);
    with_index("{" MAP "}\n", NULL);
}

Test(safetensors_index, refused_forms) {
    with_index("{\"metadata\":{\"total_size\":13}," MAP "}", "total_size is 13, wanted 12");
    with_index("{\"metadata\":{\"total_size\":12.5}," MAP "}", "total_size is 12.5");
    with_index("{\"metadata\":{\"total_size\":\"12\"}," MAP "}", "total_size");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"one\"}}",
               "says b is in one, where it is not");
    with_index("{\"weight_map\":{\"a\":\"two\",\"b\":\"one\"}}", "says a is in two, found it in");
    with_index("{\"weight_map\":{\"x\":\"one\",\"b\":\"two\"}}", "says a is in no file");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"two\",\"c\":\"two\"}}", "says c is in two");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"three\"}}", "No such file");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"../two\"}}", "b is not a plain file name");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"/etc/passwd\"}}",
               "b is not a plain file name");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"..\"}}", "b is not a plain file name");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":\"\"}}", "b is not a plain file name");
    with_index("{\"weight_map\":{\"a\":\"one\",\"b\":2}}", "b is not a plain file name");
    with_index("{\"weight_map\":{\"a\":\"one\",\"a\":\"one\",\"b\":\"two\"}}", "duplicate");
    with_index("{\"weight_map\":{}}", "no weight_map");
    with_index("{\"weight_map\":[]}", "no weight_map");
    with_index("{\"metadata\":{\"total_size\":12}}", "no weight_map");
    with_index("[]", "no weight_map");
    with_index("{" MAP, "not valid JSON");
    with_index("", "not valid JSON");
    with_index("{" MAP "}}", "not valid JSON");
}

Test(safetensors_index, one_tensor_in_two_shards_is_refused) {
    two_shards();
    write_shard("two", "{" A("U8", "[4]", "[0,4]") "," B("U8", "[4]", "[4,8]") "}", 8);
    const char *text = "{" MAP "}";
    char *index = below(scratch, "model.safetensors.index.json");
    cr_assert_eq(cq_file_write(index, text, (int64_t)strlen(text)), CQ_OK);
    expect_refused(scratch, "a is in two shards");
}

Test(safetensors_index, a_broken_shard_is_named) {
    with_index("{" MAP "}", NULL);
    cr_assert_eq(truncate(below(scratch, "two"), 20), 0);
    expect_refused(scratch, "/two: header length");
}

Test(safetensors_index, the_single_file_wins_over_the_index) {
    with_index("{" MAP "}", NULL);
    write_shard("model.safetensors", "{" A("U8", "[4]", "[0,4]") "}", 4);
    cq_safetensors *st = open_good(scratch);
    cr_assert_eq(cq_safetensors_count(st), 1);
    cq_safetensors_close(st);
}
