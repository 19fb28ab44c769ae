/// memory.c - what this process has used at most, and what it may still take.
///
///     available = min(MemAvailable, limit - usage + page cache of every control group above this
///     process)
///
/// The page cache counts as free: the kernel gives it back before a group runs out. Both control
/// group versions are read, from the process's own group up to the root; a file that is not there
/// sets no limit.
#include "core/tensor/plan.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { PATH_BYTES = 4096 };

/// The number after `key` at the start of a line of a small file of /proc or /sys; -1 when there is
/// none.
static int64_t number_in(const char *path, const char *key) {
    FILE *f = fopen(path, "re");
    if (!f)
        return -1;
    char line[PATH_BYTES];
    int64_t value = -1;
    size_t n = strlen(key);
    while (value < 0 && fgets(line, sizeof line, f)) {
        char *end, *at = line + n;
        if (strncmp(line, key, n) != 0)
            continue;
        long long v = strtoll(at, &end, 10);
        if (end != at && v >= 0)
            value = v;
    }
    fclose(f);
    return value;
}

typedef struct group_files {
    const char *root, *limit, *usage, *cache;
} group_files;

static const group_files version1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                     "memory.usage_in_bytes", "total_cache "};
static const group_files version2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "file "};

static int64_t number_of(const char *folder, const char *file, const char *key) {
    char path[PATH_BYTES];
    int n = snprintf(path, sizeof path, "%s/%s", folder, file);
    return n < 0 || (size_t)n >= sizeof path ? -1 : number_in(path, key);
}

/// What one group leaves; "max" and a missing file are no limit.
static int64_t group_left(const group_files *g, const char *folder) {
    int64_t limit = number_of(folder, g->limit, ""), usage = number_of(folder, g->usage, "");
    if (limit < 0 || usage < 0)
        return INT64_MAX;
    int64_t cache = number_of(folder, "memory.stat", g->cache);
    int64_t used = usage - (cache > 0 && cache < usage ? cache : 0);
    return limit > used ? limit - used : 0;
}

/// The smallest rest from group `name` (begins with '/') up to the root.
static int64_t groups_left(const group_files *g, const char *name) {
    char folder[PATH_BYTES];
    int n = snprintf(folder, sizeof folder, "%s%s", g->root, name);
    if (n < 0 || (size_t)n >= sizeof folder)
        return INT64_MAX;
    int64_t left = INT64_MAX;
    size_t root = strlen(g->root);
    while (strlen(folder) > root) {
        int64_t here = group_left(g, folder);
        left = here < left ? here : left;
        *strrchr(folder, '/') = 0;
    }
    int64_t top = group_left(g, g->root); /* inside a container the own group is mounted here */
    return top < left ? top : left;
}

static int64_t control_group_left(void) {
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f)
        return INT64_MAX;
    char line[PATH_BYTES];
    int64_t left = INT64_MAX;
    while (fgets(line, sizeof line, f)) { /* "0::/name", or "4:memory:/name" in version 1 */
        line[strcspn(line, "\n")] = 0;
        char *kind = strchr(line, ':'), *name = kind ? strchr(kind + 1, ':') : NULL;
        if (!name || name[1] != '/')
            continue;
        *name++ = 0;
        const group_files *g = kind[1] == 0                      ? &version2
                               : strcmp(kind + 1, "memory") == 0 ? &version1
                                                                 : NULL;
        int64_t here = g ? groups_left(g, name) : INT64_MAX;
        left = here < left ? here : left;
    }
    fclose(f);
    return left;
}

int64_t cq_memory_available(void) {
    int64_t kib = number_in("/proc/meminfo", "MemAvailable:");
    int64_t bytes =
        kib >= 0 ? kib * 1024 : (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
    int64_t left = control_group_left();
    return left < bytes ? left : bytes;
}

int64_t cq_memory_peak(void) {
    int64_t kib = number_in("/proc/self/status", "VmHWM:");
    if (kib >= 0)
        return kib * 1024;
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (int64_t)usage.ru_maxrss * 1024 : 0;
}
