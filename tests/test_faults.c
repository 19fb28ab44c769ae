/// test_faults.c - saving under every failure of the system, and under a kill at any instant.
///
/// This program defines write, fsync, rename and so on itself, in front of the C library's: the
/// n-th call fails, for n = 1, 2, ... until a run meets no failure. After each failure the old
/// content is there whole, the message names the file, and no temporary file is left; without one
/// the new content is.
#define _GNU_SOURCE
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/tensor/safetensors.h"
#include "tests/scratch.h"
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

TestSuite(faults, .init = scratch_open, .fini = scratch_close);
TestSuite(kills, .init = scratch_open, .fini = scratch_close, .timeout = 120);

static int armed;                 ///< calls are counted
static int countdown;             ///< the call that fails
static int fault;                 ///< its errno; 0: a short write instead
static int persistent;            ///< every later call fails too
static int met;                   ///< failures so far
static int no_exchange, no_entry; ///< renameat2 is unknown; a folder named .part cannot be renamed

static char trace[64]; ///< the calls of an armed run: o open, w write, s fsync, r rename, x
                       ///< exchange, c close

/// Notes the call; true when it is the one that fails.
static int fails(char call) {
    size_t at = strlen(trace);
    if (!armed)
        return 0;
    if (at + 1 < sizeof trace)
        trace[at] = call;
    countdown--;
    if (countdown > 0 || (countdown < 0 && !persistent))
        return 0;
    met++;
    errno = fault;
    return 1;
}

static void *next(const char *name) {
    void *f = dlsym(RTLD_NEXT, name);
    if (!f)
        abort();
    return f;
}

ssize_t write(int fd, const void *data, size_t n) {
    ssize_t (*real)(int, const void *, size_t) =
        (ssize_t(*)(int, const void *, size_t))next("write");
    if (!fails('w'))
        return real(fd, data, n);
    return fault || n < 2 ? -1 : real(fd, data, n / 2);
}

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))next("fsync");
    return fault && fails('s') ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))next("rename");
    size_t n = strlen(from);
    if (no_entry && n > 5 && !strcmp(from + n - 5, ".part")) {
        errno = EACCES;
        return -1;
    }
    return fault && fault != EINTR && fails('r') ? -1 : real(from, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    int (*real)(int, const char *, int, const char *, unsigned) =
        (int (*)(int, const char *, int, const char *, unsigned))next("renameat2");
    if (no_exchange) {
        errno = ENOSYS;
        return -1;
    }
    return fault && fault != EINTR && fails('x') ? -1 : real(a, from, b, to, flags);
}

int close(int fd) {
    int (*real)(int) = (int (*)(int))next("close");
    int result = real(fd); /* the descriptor is gone even when close reports an error */
    return fault && fault != EINTR && fails('c') ? -1 : result;
}

int open(const char *path, int flags, ...) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))next("open");
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return fault && fault != EINTR && fails('o') ? -1 : real(path, flags, mode);
}

/* ---- what is saved ---- */

enum { N = 300000 };

/// Two tensors whose bytes are `fill`: one through the writer's buffer, one past it.
static int save_file(const char *path, char fill) {
    static char small[1000], large[N];
    memset(small, fill, sizeof small);
    memset(large, fill, sizeof large);
    cq_st_writer *w;
    CQ_TRY(cq_st_writer_open(&w));
    int status = cq_st_writer_add(w, "a", (cq_tensor){small, CQ_SHAPE1(1000), CQ_U8});
    if (!status)
        status = cq_st_writer_add(w, "b", (cq_tensor){large, CQ_SHAPE1(N), CQ_U8});
    if (!status)
        status = cq_st_writer_file(w, path);
    cq_st_writer_close(w);
    return status;
}

/// The byte that fills the file; fails the test when the file is not whole.
static char content_of(const char *path) {
    cq_safetensors *st = NULL;
    cr_assert_eq(cq_safetensors_open(&st, path), CQ_OK, "%s", cq_error());
    cr_assert_eq(cq_safetensors_count(st), 2);
    char fill = *(char *)cq_safetensors_find(st, "a")->tensor.data;
    for (int i = 0; i < 2; i++) {
        const cq_tensor *t = &cq_safetensors_at(st, i)->tensor;
        for (int64_t k = 0; k < cq_tensor_bytes(*t); k++)
            cr_assert_eq(((char *)t->data)[k], fill);
    }
    cq_safetensors_close(st);
    return fill;
}

/// A checkpoint: a folder made beside the old one, then put in its place.
static int save_folder(const char *to, char fill) {
    char part[512], file[512];
    snprintf(part, sizeof part, "%s.part", to);
    CQ_TRY(cq_folder_remove(part));
    CQ_TRY(cq_folder_make(part));
    CQ_TRY(cq_path_join(file, sizeof file, part, "model.safetensors"));
    CQ_TRY(save_file(file, fill));
    return cq_folder_replace(to, part);
}

typedef struct mode {
    const char *name;
    int error, persistent;
} mode;

static const mode modes[] = {{"no space", ENOSPC, 0}, {"no space from then on", ENOSPC, 1},
                             {"disk error", EIO, 0},  {"disk error from then on", EIO, 1},
                             {"quota", EDQUOT, 1},    {"interrupted", EINTR, 0},
                             {"short write", 0, 0}};

/// Runs `save` with the n-th call failing; returns how many failures it met.
static int run_with_fault(int (*save)(const char *, char), const char *path, char fill,
                          const mode *m, int n, int *status) {
    met = 0;
    memset(trace, 0, sizeof trace);
    countdown = n;
    fault = m->error;
    persistent = m->persistent;
    armed = 1;
    *status = save(path, fill);
    armed = 0;
    return met;
}

/// The data is on the disk before the name is, and the name before success is told.
Test(faults, the_order_is_write_sync_rename_sync_of_the_folder) {
    static const mode none = {"none", EIO, 0};
    int status;
    cr_assert_eq(save_file(below(scratch, "first"), 'A'), CQ_OK, "the JSON library reads its seed");
    run_with_fault(save_file, below(scratch, "x"), 'A', &none, 1000, &status);
    cr_assert_str_eq(trace, "owwscrosc");
    run_with_fault(save_folder, below(scratch, "y"), 'A', &none, 1000, &status);
    cr_assert_str_eq(trace, "owwscroscrosc", "the first of its name");
    run_with_fault(save_folder, below(scratch, "y"), 'B', &none, 1000, &status);
    cr_assert_str_eq(trace, "owwscroscxosc", "exchanged");
}

Test(faults, a_file_is_old_or_new_after_any_failure) {
    char *path = below(scratch, "model.safetensors");
    int points = 0;
    cr_assert_eq(save_file(path, 'A'), CQ_OK);
    char old = 'A';
    for (size_t k = 0; k < sizeof modes / sizeof *modes; k++) {
        int silent = 0;
        for (int n = 1;; n++) {
            char new = old == 'A' ? 'B' : 'A';
            int status, faults = run_with_fault(save_file, path, new, &modes[k], n, &status);
            char found = content_of(path);
            cr_assert_eq(n_names(scratch), 1, "%s at call %d leaves a file", modes[k].name, n);
            if (status == CQ_OK)
                cr_assert_eq(found, new, "%s at call %d: success without the new file",
                             modes[k].name, n);
            else
                cr_assert(strstr(cq_error(), scratch), "%s at call %d: %s", modes[k].name, n,
                          cq_error());
            /* a short or interrupted call is no failure; every other one is told. Only the call
             * that closes a folder read for its fsync has nothing to lose, and the sync of the
             * folder comes after the rename */
            if (modes[k].error == 0 || modes[k].error == EINTR)
                cr_assert_eq(status, CQ_OK, "%s at call %d: %s", modes[k].name, n, cq_error());
            silent += status == CQ_OK && faults > 0;
            old = found;
            points++;
            if (!faults)
                break;
            cr_assert(n < 100);
        }
        /* every failure is told but one: closing the folder, which was opened for its fsync only */
        if (modes[k].error && modes[k].error != EINTR)
            cr_assert_leq(silent, 1, "%s: %d failures not told", modes[k].name, silent);
    }
    cr_assert(points > 35, "%d points", points);
}

Test(faults, a_folder_is_old_or_new_after_any_failure) {
    char *to = below(scratch, "step"), *file = below(to, "model.safetensors");
    cr_assert_eq(save_folder(to, 'A'), CQ_OK);
    char old = 'A';
    for (size_t k = 0; k < sizeof modes / sizeof *modes; k++) {
        for (int n = 1;; n++) {
            char new = old == 'A' ? 'B' : 'A';
            int status, faults = run_with_fault(save_folder, to, new, &modes[k], n, &status);
            char found = content_of(file);
            if (status == CQ_OK)
                cr_assert_eq(found, new, "%s at call %d", modes[k].name, n);
            else
                cr_assert(strstr(cq_error(), scratch), "%s", cq_error());
            old = found;
            if (!faults)
                break;
            cr_assert(n < 100);
        }
    }
}

/// Without an exchange of names the old folder steps aside, and back when the new one cannot come
/// in.
Test(faults, a_folder_that_cannot_be_exchanged_is_moved_aside_and_back) {
    char *to = below(scratch, "step"), *file = below(to, "model.safetensors");
    cr_assert_eq(save_folder(to, 'A'), CQ_OK);
    no_exchange = 1;
    cr_assert_eq(save_folder(to, 'B'), CQ_OK, "%s", cq_error());
    cr_assert_eq(content_of(file), 'B');
    cr_assert_eq(n_names(scratch), 1, "the old folder stays beside the new one");
    no_entry = 1;
    cr_assert_eq(save_folder(to, 'C'), CQ_EIO);
    cr_assert(strstr(cq_error(), to) && strstr(cq_error(), "Permission denied"), "%s", cq_error());
    cr_assert_eq(content_of(file), 'B');
    no_entry = 0;
    cr_assert_eq(save_folder(to, 'D'), CQ_OK, "%s", cq_error());
    cr_assert_eq(content_of(file), 'D');
    cr_assert_eq(n_names(scratch), 1);
}

/// R1: the child saves again and again and is killed; what it had finished is there, whole.
static void kill_while(int (*save)(const char *, char), const char *path, const char *file,
                       int trials) {
    uint64_t seed = 20251125;
    for (int i = 0; i < trials; i++) {
        pid_t child = fork();
        cr_assert(child >= 0);
        if (child == 0) {
            for (int k = 0;; k++)
                if (save(path, (char)('A' + k % 26)))
                    _exit(1);
        }
        int64_t wait_ns = cq_random_below(seed, 1, (uint64_t)i, 8000000);
        nanosleep(&(struct timespec){0, (long)wait_ns}, NULL);
        kill(child, SIGKILL);
        int status;
        waitpid(child, &status, 0);
        cr_assert(WIFSIGNALED(status), "trial %d: the child could not save", i);
        content_of(file);
    }
}

Test(kills, a_killed_save_leaves_the_old_or_the_new_file) {
    char *path = below(scratch, "model.safetensors");
    cr_assert_eq(save_file(path, 'A'), CQ_OK);
    kill_while(save_file, path, path, 100);
}

Test(kills, a_killed_save_leaves_the_old_or_the_new_folder) {
    char *to = below(scratch, "step"), *file = below(to, "model.safetensors");
    cr_assert_eq(save_folder(to, 'A'), CQ_OK);
    kill_while(save_folder, to, file, 100);
    cr_assert_eq(save_folder(to, 'A'), CQ_OK, "what a kill left is no obstacle: %s", cq_error());
}
