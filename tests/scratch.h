/// scratch.h - a folder of its own for each test, gone after it: TestSuite(x, .init = scratch_open,
/// .fini = scratch_close).
#pragma once
#include "core/base/error.h"
#include "core/base/file.h"
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char scratch[64];

static inline void scratch_open(void) {
    const char *root = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%.40s/ckaqad-XXXXXX", root && *root ? root : "/tmp");
    cr_assert(mkdtemp(scratch), "%s", scratch);
}

static inline void scratch_close(void) { cq_folder_remove(scratch); }

/// folder/name; valid until the sixteenth call after it.
static inline char *below(const char *folder, const char *name) {
    static char ring[16][512];
    static int next;
    char *path = ring[next++ % 16];
    cr_assert_eq(cq_path_join(path, sizeof ring[0], folder, name), CQ_OK);
    return path;
}

/// How many files and folders lie in a folder.
static inline int n_names(const char *folder) {
    int n = 0;
    DIR *d = opendir(folder);
    cr_assert(d, "%s", folder);
    for (struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static inline void expect_text(const char *path, const char *want) {
    char *text;
    int64_t bytes;
    cr_assert_eq(cq_file_read(&text, &bytes, path), CQ_OK, "%s", cq_error());
    cr_assert(bytes == (int64_t)strlen(want) && memcmp(text, want, strlen(want)) == 0, "%s is %s",
              path, text);
    free(text);
}
