/// criterion.h - the part of Criterion that test_cpu_*.c use, for where the library cannot run
/// (under ThreadSanitizer) or is not there. Each test runs in a process of its own; arguments are
/// words of which one must occur in a test's name.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct small_test {
    const char *name;
    void (*run)(void);
    struct small_test *next;
} small_test;
static small_test *small_tests, **small_last = &small_tests;
static int small_failures;

#define Test(suite, what)                                                                          \
    static void suite##_##what(void);                                                              \
    static small_test suite##_##what##_test = {#suite "::" #what, suite##_##what, NULL};           \
    __attribute__((constructor)) static void suite##_##what##_add(void) {                          \
        *small_last = &suite##_##what##_test;                                                      \
        small_last = &suite##_##what##_test.next;                                                  \
    }                                                                                              \
    static void suite##_##what(void)

static inline void small_say(const char *file, int line, const char *text, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static inline void small_say(const char *file, int line, const char *text, const char *format,
                             ...) {
    va_list list;
    va_start(list, format);
    printf("%s:%d: %s:", file, line, text);
    vprintf(format, list);
    va_end(list);
    printf("\n");
    small_failures++;
}
/// The message is optional: a space comes before the first argument that there is.
#define SMALL_CHECK(condition, text, fatal, ...)                                                   \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            small_say(__FILE__, __LINE__, text, " " __VA_ARGS__);                                  \
            if (fatal)                                                                             \
                exit(1);                                                                           \
        }                                                                                          \
    } while (0)
#define cr_skip_test(...) return
#define cr_assert(x, ...) SMALL_CHECK(x, #x, 1, __VA_ARGS__)
#define cr_expect(x, ...) SMALL_CHECK(x, #x, 0, __VA_ARGS__)
#define cr_assert_eq(a, b, ...) SMALL_CHECK((a) == (b), #a " == " #b, 1, __VA_ARGS__)
#define cr_expect_eq(a, b, ...) SMALL_CHECK((a) == (b), #a " == " #b, 0, __VA_ARGS__)
#define cr_assert_not_null(a, ...) SMALL_CHECK((a) != NULL, #a " is NULL", 1, __VA_ARGS__)
#define cr_expect_arr_eq(a, b, n, ...)                                                             \
    SMALL_CHECK(memcmp(a, b, n) == 0, #a " == " #b, 0, __VA_ARGS__)
#define cr_expect_float_eq(a, b, by, ...)                                                          \
    SMALL_CHECK(fabs((double)(a) - (double)(b)) <= (by), #a " == " #b, 0, __VA_ARGS__)

int main(int argc, char **argv) {
    int failed = 0, ran = 0;
    for (small_test *t = small_tests; t; t = t->next) {
        int wanted = argc < 2, status = 0;
        for (int i = 1; i < argc; i++)
            wanted |= strstr(t->name, argv[i]) != NULL;
        if (!wanted)
            continue;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            t->run();
            exit(small_failures > 0);
        }
        if (child < 0 || waitpid(child, &status, 0) != child)
            status = 1;
        printf("%s %s\n", status ? "FAILED" : "ok    ", t->name);
        failed += status != 0;
        ran++;
    }
    printf("%d tests, %d failed\n", ran, failed);
    return failed != 0;
}
