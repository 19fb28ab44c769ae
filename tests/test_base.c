/// test_base.c - errors, dtype conversions, random numbers, SHA-256, files and folders.
#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/hash.h"
#include "core/base/rng.h"
#include "tests/scratch.h"
#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static uint32_t bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

TestSuite(hash, .init = scratch_open, .fini = scratch_close);
TestSuite(file, .init = scratch_open, .fini = scratch_close);
TestSuite(folder, .init = scratch_open, .fini = scratch_close);

/* ---- errors ---- */

Test(error, a_failure_returns_its_status_and_keeps_its_message) {
    cr_assert_eq(cq_fail(CQ_EDATA, "x: rank is %d, wanted %d", 3, 2), CQ_EDATA);
    cr_assert_str_eq(cq_error(), "x: rank is 3, wanted 2");
    cr_assert_eq(cq_fail_in(CQ_EDATA, "a.json"), CQ_EDATA);
    cr_assert_str_eq(cq_error(), "a.json: x: rank is 3, wanted 2");
    cq_fail(CQ_EIO, "again: %s", cq_error());
    cr_assert_str_eq(cq_error(), "again: a.json: x: rank is 3, wanted 2");
}

Test(error, control_bytes_cannot_leave_the_line) {
    cq_fail(CQ_EDATA, "name is %s", "a\nb\x1b[2J\x7f é");
    cr_assert_str_eq(cq_error(), "name is a?b?[2J? é");
}

Test(error, a_long_message_ends_in_dots_on_a_whole_character) {
    char text[4096];
    for (int shift = 0; shift < 2; shift++) {
        memset(text, 'a', sizeof text);
        for (int i = shift; i + 1 < (int)sizeof text - 1; i += 2)
            memcpy(text + i, "é", 2);
        text[sizeof text - 2] = 0;
        cq_fail(CQ_EDATA, "%s", text);
        size_t n = strlen(cq_error());
        cr_assert(n > 1000 && n < 1024);
        cr_assert_str_eq(cq_error() + n - 3, "...");
        cr_assert_eq((unsigned char)cq_error()[n - 4], 0xa9, "cut inside a character");
    }
}

Test(error, exit_codes_follow_the_table) {
    int want[] = {0, 1, 2, 3, 4, 5, 6, 7, 2};
    for (int s = 0; s <= 8; s++)
        cr_assert_eq(cq_exit_code(-s), want[s]);
    cr_assert_eq(cq_exit_code(-99), 1);
    cr_assert_eq(cq_exit_code(5), 1);
}

/* ---- dtypes ---- */

Test(dtype, names_and_sizes_are_those_of_safetensors) {
    const char *names[] = {"F32", "F64", "BF16", "F16", "F8_E4M3", "U8", "I32", "I64"};
    int64_t size[] = {4, 8, 2, 2, 1, 1, 4, 8};
    for (int i = 0; i < CQ_N_DTYPES; i++) {
        cq_dtype found;
        cr_assert_eq(cq_dtype_bytes((cq_dtype)i), size[i]);
        cr_assert_str_eq(cq_dtype_name((cq_dtype)i), names[i]);
        cr_assert(cq_dtype_find(&found, names[i]) && found == (cq_dtype)i);
    }
    cq_dtype found;
    cr_assert_not(cq_dtype_find(&found, "BOOL"));
    cr_assert_not(cq_dtype_find(&found, "f32"));
}

/// What a code means, by the definition of its format: (-1)^s 2^(e - bias) (1 + m / 2^man).
static double value_of(uint32_t code, int exponent, int mantissa, bool has_infinity) {
    int bias = (1 << (exponent - 1)) - 1, top = (1 << exponent) - 1;
    int e = (int)(code >> mantissa) & top, m = (int)code & ((1 << mantissa) - 1);
    double sign = code >> (exponent + mantissa) & 1 ? -1.0 : 1.0;
    if (has_infinity && e == top)
        return m ? (double)NAN : sign * (double)INFINITY;
    if (!has_infinity && e == top && m == (1 << mantissa) - 1)
        return (double)NAN;
    return sign * (e ? ldexp(1.0 + ldexp(m, -mantissa), e - bias) : ldexp(m, 1 - bias - mantissa));
}

typedef struct narrow {
    cq_dtype dtype;
    int exponent, mantissa;
    bool has_infinity;
    uint32_t largest; ///< code of the largest finite value
} narrow;

static const narrow narrows[] = {
    {CQ_BF16, 8, 7, true, 0x7f7f}, {CQ_F16, 5, 10, true, 0x7bff}, {CQ_F8_E4M3, 4, 3, false, 0x7e}};

static uint32_t code_of(const narrow *f, cq_dtype from, double x) {
    uint16_t code = 0;
    float x32 = (float)x;
    cr_assert_eq(cq_convert(&code, f->dtype, from == CQ_F32 ? (void *)&x32 : (void *)&x, from, 1),
                 0);
    return code;
}

Test(dtype, every_code_widens_exactly_and_comes_back) {
    for (int k = 0; k < 3; k++) {
        const narrow *f = &narrows[k];
        uint32_t n = 1u << (1 + f->exponent + f->mantissa);
        for (uint32_t code = 0; code < n; code++) {
            uint16_t in = (uint16_t)code;
            float x32;
            double x64, want = value_of(code, f->exponent, f->mantissa, f->has_infinity);
            cr_assert_eq(cq_convert(&x32, CQ_F32, &in, f->dtype, 1), 0);
            cr_assert_eq(cq_convert(&x64, CQ_F64, &in, f->dtype, 1), 0);
            if (isnan(want)) {
                cr_assert(isnan(x32) && isnan(x64), "%s %x", cq_dtype_name(f->dtype), code);
                uint32_t back = code_of(f, CQ_F32, (double)x32);
                cr_assert(isnan(value_of(back, f->exponent, f->mantissa, f->has_infinity)));
                continue;
            }
            cr_assert(x64 == want && (double)x32 == want && signbit(x64) == signbit(want),
                      "%s %x is %g, wanted %g", cq_dtype_name(f->dtype), code, x64, want);
            cr_assert_eq(code_of(f, CQ_F32, want), code);
            cr_assert_eq(code_of(f, CQ_F64, want), code);
        }
    }
}

Test(dtype, between_two_neighbours_the_nearer_wins_and_ties_go_to_even) {
    for (int k = 0; k < 3; k++) {
        const narrow *f = &narrows[k];
        uint32_t sign = 1u << (f->exponent + f->mantissa);
        for (uint32_t code = 0; code < f->largest; code++) {
            double a = value_of(code, f->exponent, f->mantissa, f->has_infinity);
            double b = value_of(code + 1, f->exponent, f->mantissa, f->has_infinity);
            double mid = (a + b) / 2;
            uint32_t even = code & 1 ? code + 1 : code;
            for (int negative = 0; negative < 2; negative++) {
                double s = negative ? -1 : 1;
                uint32_t bit = negative ? sign : 0;
                /* mid is an F32 in all three formats; its F32 neighbours are not ties */
                cr_assert_eq(code_of(f, CQ_F32, s * mid), even | bit, "%s tie above %x",
                             cq_dtype_name(f->dtype), code);
                cr_assert_eq(code_of(f, CQ_F32, s * (double)nextafterf((float)mid, 0)), code | bit);
                cr_assert_eq(code_of(f, CQ_F32, s * (double)nextafterf((float)mid, INFINITY)),
                             (code + 1) | bit);
                /* neighbours in F64 round to the tie in F32: two roundings would get them wrong */
                cr_assert_eq(code_of(f, CQ_F64, s * mid), even | bit);
                cr_assert_eq(code_of(f, CQ_F64, s * nextafter(mid, 0)), code | bit);
                cr_assert_eq(code_of(f, CQ_F64, s * nextafter(mid, INFINITY)), (code + 1) | bit);
            }
        }
    }
}

Test(dtype, beyond_the_largest_value_there_is_infinity_or_saturation) {
    for (int from = CQ_F32; from <= CQ_F64; from++) {
        cq_dtype t = (cq_dtype)from;
        cr_assert_eq(code_of(&narrows[1], t, 65519.99), 0x7bff);
        cr_assert_eq(code_of(&narrows[1], t, 65520), 0x7c00);
        cr_assert_eq(code_of(&narrows[1], t, -1e30), 0xfc00);
        cr_assert_eq(code_of(&narrows[0], t, (double)3.4e38f), 0x7f80);
        cr_assert_eq(code_of(&narrows[2], t, 1e30), 0x7e);
        cr_assert_eq(code_of(&narrows[2], t, -(double)INFINITY), 0xfe);
        cr_assert_eq(code_of(&narrows[2], t, 449), 0x7e);
    }
    cr_assert_eq(code_of(&narrows[0], CQ_F64, 1e300), 0x7f80);
    cr_assert_eq(code_of(&narrows[0], CQ_F64, -1e-300), 0x8000);
    float x;
    double big = 1e300, tiny = 0x1.8p-150;
    cq_convert(&x, CQ_F32, &big, CQ_F64, 1);
    cr_assert(isinf(x));
    cq_convert(&x, CQ_F32, &tiny, CQ_F64, 1);
    cr_assert_eq(bits(x), 1u);
}

Test(dtype, a_nan_whose_payload_is_in_the_dropped_bits_stays_nan) {
    uint32_t payloads[] = {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7f808000u};
    for (int i = 0; i < 4; i++) {
        uint16_t bf16, f16;
        uint8_t e4m3;
        cq_convert(&bf16, CQ_BF16, &payloads[i], CQ_F32, 1);
        cq_convert(&f16, CQ_F16, &payloads[i], CQ_F32, 1);
        cq_convert(&e4m3, CQ_F8_E4M3, &payloads[i], CQ_F32, 1);
        cr_assert((bf16 & 0x7fff) > 0x7f80 && (f16 & 0x7fff) > 0x7c00 && (e4m3 & 0x7f) == 0x7f);
    }
}

Test(dtype, long_unaligned_buffers_convert_like_single_values) {
    enum { N = 1777 };
    char from[4 * N + 1], to[2 * N + 1];
    for (int i = 0; i < N; i++) {
        float x = (float)cq_random_normal(7, 1, (uint64_t)i);
        memcpy(from + 1 + 4 * i, &x, 4);
    }
    cr_assert_eq(cq_convert(to + 1, CQ_BF16, from + 1, CQ_F32, N), 0);
    for (int i = 0; i < N; i++) {
        float x = (float)cq_random_normal(7, 1, (uint64_t)i);
        uint16_t h;
        memcpy(&h, to + 1 + 2 * i, 2);
        cr_assert_eq(h, code_of(&narrows[0], CQ_F32, (double)x), "element %d", i);
    }
}

Test(dtype, integers_convert_to_themselves_only) {
    int32_t a[2] = {1, -2}, b[2] = {0};
    float x[2];
    cr_assert_eq(cq_convert(b, CQ_I32, a, CQ_I32, 2), CQ_OK);
    cr_assert_eq(b[1], -2);
    cr_assert_eq(cq_convert(x, CQ_F32, a, CQ_I32, 2), CQ_EUSAGE);
    cr_assert_eq(cq_convert(a, CQ_I32, x, CQ_F32, 2), CQ_EUSAGE);
    cr_assert_eq(cq_convert(x, CQ_F32, a, (cq_dtype)17, 2), CQ_EUSAGE);
    cr_assert_eq(cq_convert(NULL, CQ_F32, NULL, CQ_BF16, 0), CQ_OK);
}

/* ---- random numbers ---- */

/// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
Test(rng, philox_gives_the_known_answers) {
    cr_assert_eq(cq_random_bits(0, 0, 0), 0xe169c58d6627e8d5u);
    cr_assert_eq(cq_random_bits(~0ull, ~0ull, ~0ull), 0x41c83b0e408f276du);
    cr_assert_eq(cq_random_bits(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u),
                 0x94fdccebd16cfe09u);
}

Test(rng, uniform_and_normal_have_their_moments) {
    double sum = 0, square = 0, cube = 0, uniform = 0, n = 200000;
    for (int i = 0; i < (int)n; i++) {
        double x = cq_random_normal(3, 5, (uint64_t)i), u = cq_random_uniform(3, 6, (uint64_t)i);
        cr_assert(u >= 0 && u < 1);
        sum += x;
        square += x * x;
        cube += x * x * x;
        uniform += u;
    }
    /* five standard errors: 1, sqrt 2, sqrt 15, sqrt 1/12 over sqrt n */
    cr_assert_float_eq(sum / n, 0, 5 * 1.0 / sqrt(n));
    cr_assert_float_eq(square / n, 1, 5 * 1.4143 / sqrt(n));
    cr_assert_float_eq(cube / n, 0, 5 * 3.873 / sqrt(n));
    cr_assert_float_eq(uniform / n, 0.5, 5 * 0.2887 / sqrt(n));
}

Test(rng, below_reaches_every_value_equally) {
    int count[7] = {0};
    for (uint64_t i = 0; i < 70000; i++)
        count[cq_random_below(11, 0, i, 7)]++;
    for (int i = 0; i < 7; i++)
        cr_assert(abs(count[i] - 10000) < 5 * 93, "%d came %d times", i, count[i]);
    cr_assert_eq(cq_random_below(1, 2, 3, 1), 0);
    for (uint64_t i = 0; i < 100; i++) {
        int64_t v = cq_random_below(1, 2, i, INT64_MAX);
        cr_assert(v >= 0 && v < INT64_MAX);
    }
}

Test(rng, a_permutation_holds_every_number_once) {
    int64_t p[500], first[3] = {0};
    bool seen[500] = {false};
    cq_random_permutation(p, 500, 4, 9);
    for (int i = 0; i < 500; i++) {
        cr_assert(p[i] >= 0 && p[i] < 500 && !seen[p[i]]);
        seen[p[i]] = true;
    }
    for (uint64_t s = 0; s < 3000; s++) {
        cq_random_permutation(p, 3, s, 0);
        first[p[0]]++;
    }
    for (int i = 0; i < 3; i++)
        cr_assert(llabs(first[i] - 1000) < 5 * 26, "%d first %ld times", i, (long)first[i]);
}

Test(rng, a_sample_is_ascending_distinct_and_fair) {
    int32_t s[10];
    int count[25] = {0};
    for (uint64_t stream = 0; stream < 5000; stream++) {
        cq_random_sample(s, 10, 25, 8, stream);
        for (int i = 0; i < 10; i++) {
            cr_assert(s[i] >= 0 && s[i] < 25 && (i == 0 || s[i] > s[i - 1]));
            count[s[i]]++;
        }
    }
    for (int i = 0; i < 25; i++)
        cr_assert(abs(count[i] - 2000) < 5 * 35, "%d came %d times", i, count[i]);
    cq_random_sample(s, 10, 10, 1, 1);
    for (int i = 0; i < 10; i++)
        cr_assert_eq(s[i], i);
}

/* ---- SHA-256 ---- */

static void expect_hash(const char *text, size_t repeat, size_t step, const char *want) {
    cq_sha256 s;
    char hex[65];
    cq_sha256_init(&s);
    size_t n = strlen(text);
    for (size_t i = 0; i < repeat; i++)
        for (size_t j = 0; j < n; j += step)
            cq_sha256_add(&s, text + j, n - j < step ? n - j : step);
    cq_sha256_hex(&s, hex);
    cr_assert_str_eq(hex, want);
}

/// Vectors of FIPS 180-4's example document.
Test(hash, sha256_gives_the_known_answers_in_pieces_of_any_size) {
    const char *two = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    expect_hash("", 1, 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    for (size_t step = 1; step < 60; step += 7) {
        expect_hash("abc", 1, step,
                    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        expect_hash(two, 1, step,
                    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    }
    expect_hash("aaaaaaaaaa", 100000, 10,
                "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

Test(hash, a_file_hashes_like_its_bytes) {
    char *path = below(scratch, "x"), hex[65];
    cr_assert_eq(cq_file_write(path, "abc", 3), CQ_OK);
    cr_assert_eq(cq_sha256_file(path, hex), CQ_OK);
    cr_assert_str_eq(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    unlink(path);
    cr_assert_eq(cq_sha256_file(path, hex), CQ_EIO);
    cr_assert(strstr(cq_error(), path) && strstr(cq_error(), "No such file"));
}

/* ---- files ---- */

Test(file, what_is_written_is_read_back_whole) {
    char *folder = scratch, *path = below(folder, "data"), *text;
    int64_t bytes, n = 3000001;
    char *data = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++)
        data[i] = (char)cq_random_bits(1, 1, (uint64_t)i);
    cq_writer *w;
    cr_assert_eq(cq_writer_open(&w, path), CQ_OK);
    /* small and large pieces in turn go through and past the buffer */
    for (int64_t at = 0, step = 1; at < n; step = step * 3 % 700001 + 1) {
        int64_t part = n - at < step ? n - at : step;
        cr_assert_eq(cq_writer_write(w, data + at, part), CQ_OK);
        at += part;
    }
    cr_assert_not(cq_file_exists(path), "visible before commit");
    cr_assert_eq(cq_writer_commit(w), CQ_OK);
    cr_assert_eq(cq_file_read(&text, &bytes, path), CQ_OK);
    cr_assert(bytes == n && memcmp(text, data, (size_t)n) == 0 && text[n] == 0);
    char *copy = below(folder, "copy");
    cq_map map;
    cr_assert_eq(cq_file_copy(copy, path), CQ_OK);
    cr_assert_eq(cq_map_open(&map, copy), CQ_OK);
    cr_assert(map.bytes == n && memcmp(map.data, data, (size_t)n) == 0);
    cq_map_drop(&map, 5, n - 9);
    cq_map_drop(&map, n - 1, 5);
    cq_map_drop(&map, -1, INT64_MAX);
    cr_assert_eq(memcmp(map.data, data, (size_t)n), 0, "dropped pages come back");
    cq_map_close(&map);
    cr_assert_eq(n_names(folder), 2);
    free(text);
    free(data);
}

Test(file, an_empty_file_maps_and_reads_as_nothing) {
    char *path = below(scratch, "empty"), *text;
    int64_t bytes = 7;
    cq_map map;
    cr_assert_eq(cq_file_write(path, NULL, 0), CQ_OK);
    cr_assert_eq(cq_map_open(&map, path), CQ_OK);
    cr_assert_eq(map.bytes, 0);
    cq_map_close(&map);
    cr_assert_eq(cq_file_read(&text, &bytes, path), CQ_OK);
    cr_assert(bytes == 0 && text[0] == 0);
    free(text);
}

Test(file, folders_and_pipes_are_refused_without_waiting) {
    char *folder = scratch, *pipe = below(folder, "pipe"), *text;
    int64_t bytes;
    cq_map map;
    cr_assert_eq(mkfifo(pipe, 0600), 0);
    cr_assert_eq(cq_map_open(&map, pipe), CQ_EIO);
    cr_assert_eq(cq_file_read(&text, &bytes, pipe), CQ_EIO);
    cr_assert_eq(cq_file_read(&text, &bytes, folder), CQ_EIO);
    cr_assert(strstr(cq_error(), folder) && strstr(cq_error(), "directory"), "%s", cq_error());
}

Test(file, a_missing_target_folder_leaves_nothing_behind) {
    char *folder = scratch, *path = below(folder, "no/such/file");
    cr_assert_eq(cq_file_write(path, "x", 1), CQ_EIO);
    cr_assert(strstr(cq_error(), path) && strstr(cq_error(), "No such file"), "%s", cq_error());
    cr_assert_eq(n_names(folder), 0);
}

Test(file, an_aborted_write_keeps_the_old_file) {
    char *folder = scratch, *path = below(folder, "f");
    cq_writer *w;
    cr_assert_eq(cq_file_write(path, "old", 3), CQ_OK);
    cr_assert_eq(cq_writer_open(&w, path), CQ_OK);
    cr_assert_eq(cq_writer_write(w, "new", 3), CQ_OK);
    cq_writer_abort(w);
    cq_writer_abort(NULL);
    expect_text(path, "old");
    cr_assert_eq(n_names(folder), 1);
}

Test(file, a_rename_that_fails_takes_the_temporary_file_with_it) {
    char *folder = scratch, *path = below(folder, "taken");
    cr_assert_eq(mkdir(path, 0700), 0);
    cr_assert_eq(cq_file_write(path, "x", 1), CQ_EIO);
    cr_assert(strstr(cq_error(), path), "%s", cq_error());
    cr_assert_eq(n_names(folder), 1);
}

/// A file-size limit is a disk that is full after `limit` bytes; both the buffered and the direct
/// road meet it.
static void fill_up(int64_t limit, int64_t bytes, int64_t piece) {
    char *folder = scratch, *path = below(folder, "big"), *data = calloc(1, (size_t)piece);
    cr_assert_eq(cq_file_write(path, "old", 3), CQ_OK);
    struct rlimit old, small;
    getrlimit(RLIMIT_FSIZE, &old);
    small = (struct rlimit){(rlim_t)limit, old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    cq_writer *w;
    int status = cq_writer_open(&w, path);
    cr_assert_eq(status, CQ_OK);
    for (int64_t at = 0; at < bytes; at += piece) /* a caller that looks at the commit only */
        status = cq_writer_write(w, data, piece);
    int committed = cq_writer_commit(w);
    setrlimit(RLIMIT_FSIZE, &old);
    cr_assert_eq(committed, CQ_EIO);
    cr_assert(strstr(cq_error(), path) && strstr(cq_error(), "File too large"), "%s", cq_error());
    free(data);
    expect_text(path, "old");
    unlink(path);
    cr_assert_eq(n_names(folder), 0);
}

Test(file, a_full_disk_names_path_and_reason_and_keeps_the_old_file) {
    fill_up(1000, 5000, 5000);        /* found by the flush of commit */
    fill_up(600000, 2000000, 1000);   /* found by a flush on the way */
    fill_up(600000, 2000000, 500000); /* found by a direct write, after a short one */
}

/* ---- folders ---- */

Test(folder, make_is_like_mkdir_p) {
    char *folder = scratch, *deep = below(folder, "a/b//c/"), *file = below(folder, "a/f");
    cr_assert_eq(cq_folder_make(deep), CQ_OK);
    cr_assert_eq(cq_folder_make(deep), CQ_OK);
    cr_assert_eq(cq_file_write(file, "x", 1), CQ_OK);
    cr_assert_eq(cq_folder_make(file), CQ_EIO);
    cr_assert_eq(cq_folder_make(below(file, "g")), CQ_EIO);
    cr_assert_eq(cq_folder_make(""), CQ_EIO);
    cr_assert_eq(n_names(below(folder, "a")), 2);
}

Test(folder, remove_does_not_follow_links_out) {
    char *folder = scratch, *in = below(folder, "in"), *out = below(folder, "out");
    cr_assert_eq(cq_folder_make(below(in, "x/y")), CQ_OK);
    cr_assert_eq(cq_folder_make(out), CQ_OK);
    cr_assert_eq(cq_file_write(below(out, "keep"), "1", 1), CQ_OK);
    cr_assert_eq(symlink(out, below(in, "x/link")), 0);
    cr_assert_eq(symlink(out, below(folder, "top")), 0);
    cr_assert_eq(cq_folder_remove(in), CQ_OK);
    cr_assert_eq(cq_folder_remove(in), CQ_OK, "a missing folder is removed already");
    cr_assert_eq(cq_folder_remove(below(folder, "top")), CQ_EIO, "a link is not a folder");
    cr_assert_eq(cq_folder_remove(below(out, "keep")), CQ_EIO);
    cr_assert(cq_file_exists(below(out, "keep")));
    cr_assert_eq(n_names(folder), 2);
}

static void expect_replaced(const char *folder, const char *to, const char *want) {
    expect_text(below(to, "f"), want);
    cr_assert_eq(n_names(folder), 1);
}

Test(folder, replace_leaves_the_new_folder_alone) {
    char *folder = scratch, *to = below(folder, "to"), *from = below(folder, "from");
    for (int i = 0; i < 3; i++) { /* the first time there is nothing to replace */
        char text[2] = {(char)('0' + i), 0};
        cr_assert_eq(cq_folder_make(from), CQ_OK);
        cr_assert_eq(cq_file_write(below(from, "f"), text, 1), CQ_OK);
        cr_assert_eq(cq_folder_replace(to, from), CQ_OK);
        expect_replaced(folder, to, text);
    }
    cr_assert_eq(cq_folder_replace(to, from), CQ_EIO, "there is no source");
    expect_replaced(folder, to, "2");
    cr_assert_eq(cq_folder_make(from), CQ_OK);
    cr_assert_eq(cq_folder_replace(below(to, "f"), from), CQ_EIO, "a file is not replaced");
}

Test(path, joining_never_cuts) {
    char out[8];
    cr_assert_eq(cq_path_join(out, sizeof out, "abc", "def"), CQ_OK);
    cr_assert_str_eq(out, "abc/def");
    cr_assert_eq(cq_path_join(out, sizeof out, "abc", "defg"), CQ_EUSAGE);
}
