/// file.c - files that are read whole and written whole.
///
/// Writing: temporary file beside the target, write, fsync, rename, fsync of the folder. A rename
/// may reach the disk before the data does, hence that order. Whatever fails, the temporary file is
/// removed and the old file stays.
#define _GNU_SOURCE 1
#include "core/base/file.h"
#include "core/base/error.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int system_error(const char *path, const char *what) {
    return cq_fail(CQ_EIO, "%s: %s: %s", path, what, strerror(errno));
}

int cq_map_open(cq_map *out, const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC), status = CQ_OK;
    *out = (cq_map){0};
    if (fd < 0)
        return system_error(path, "cannot be opened");
    if (fstat(fd, &st))
        status = system_error(path, "cannot be examined");
    else if (!S_ISREG(st.st_mode))
        status = cq_fail(CQ_EIO, "%s: is not a regular file", path);
    else if (st.st_size > 0) {
        void *m = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (m == MAP_FAILED)
            status = system_error(path, "cannot be mapped");
        else
            *out = (cq_map){m, st.st_size, m};
    }
    close(fd);
    return status;
}

void cq_map_close(cq_map *map) {
    if (map->base)
        munmap(map->base, (size_t)map->bytes);
    *map = (cq_map){0};
}

void cq_map_drop(const cq_map *map, int64_t begin, int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE), first = (begin + page - 1) / page * page,
            last = (begin + bytes) / page * page;
    if (map->base && last > first)
        madvise((char *)map->base + first, (size_t)(last - first), MADV_DONTNEED);
}

int cq_file_read(char **out, int64_t *bytes, const char *path) {
    FILE *f = fopen(path, "rb");
    size_t n = 0, cap = 1 << 16;
    char *text = f ? malloc(cap) : NULL;
    *out = NULL;
    if (!f)
        return system_error(path, "cannot be opened");
    while (text) {
        n += fread(text + n, 1, cap - 1 - n, f);
        if (n < cap - 1)
            break;
        char *more = realloc(text, cap *= 2);
        if (!more)
            free(text);
        text = more;
    }
    bool failed = ferror(f);
    int code = errno;
    fclose(f);
    if (!text)
        return cq_fail(CQ_ENOMEM, "%s: no memory to read it", path);
    if (failed) {
        free(text);
        errno = code;
        return system_error(path, "cannot be read");
    }
    text[n] = 0;
    *out = text;
    *bytes = (int64_t)n;
    return CQ_OK;
}

struct cq_writer {
    int fd;
    char *path, *part;
};

/* fsync of the folder that holds `path`. */
static int sync_folder(const char *path) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = 0;
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return system_error(folder, "cannot be opened");
    int failed = fsync(fd) && errno != EINVAL; /* some file systems cannot sync a folder */
    close(fd);
    return failed ? system_error(folder, "cannot be synced") : CQ_OK;
}

int cq_writer_open(cq_writer **out, const char *path) {
    cq_writer *w = calloc(1, sizeof *w);
    *out = NULL;
    if (w) {
        w->fd = -1;
        w->path = strdup(path);
        if (asprintf(&w->part, "%s.tmp.%ld", path, (long)getpid()) < 0)
            w->part = NULL;
    }
    if (!w || !w->path || !w->part) {
        cq_writer_abort(w);
        return cq_fail(CQ_ENOMEM, "%s: no memory to write it", path);
    }
    w->fd = open(w->part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) {
        int status = system_error(path, "cannot be written");
        cq_writer_abort(w);
        return status;
    }
    *out = w;
    return CQ_OK;
}

int cq_writer_write(cq_writer *w, const void *data, int64_t bytes) {
    const char *p = data;
    while (bytes > 0) {
        size_t chunk = bytes > (1 << 30) ? 1 << 30 : (size_t)bytes;
        ssize_t n = write(w->fd, p, chunk);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return system_error(w->path, "cannot be written");
        p += n;
        bytes -= n;
    }
    return CQ_OK;
}

int cq_writer_commit(cq_writer *w) {
    int status = fsync(w->fd) ? system_error(w->path, "cannot be synced") : CQ_OK;
    int closed = close(w->fd);
    w->fd = -1;
    if (!status && closed)
        status = system_error(w->path, "cannot be closed");
    if (!status && rename(w->part, w->path))
        status = system_error(w->path, "cannot be put in place");
    if (!status)
        status = sync_folder(w->path);
    cq_writer_abort(w);
    return status;
}

void cq_writer_abort(cq_writer *w) {
    if (!w)
        return;
    if (w->fd >= 0)
        close(w->fd);
    if (w->part)
        unlink(w->part);
    free(w->path);
    free(w->part);
    free(w);
}

int cq_file_write(const char *path, const void *data, int64_t bytes) {
    cq_writer *w = NULL;
    CQ_TRY(cq_writer_open(&w, path));
    int status = cq_writer_write(w, data, bytes);
    if (status) {
        cq_writer_abort(w);
        return status;
    }
    return cq_writer_commit(w);
}

int cq_file_copy(const char *to, const char *from) {
    cq_map map;
    CQ_TRY(cq_map_open(&map, from));
    int status = cq_file_write(to, map.data, map.bytes);
    cq_map_close(&map);
    return status;
}

bool cq_file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

int cq_folder_make(const char *path) {
    char part[PATH_MAX];
    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part)
        return cq_fail(CQ_EUSAGE, "%s: the path is longer than %d bytes", path, PATH_MAX);
    for (char *p = part + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char c = *p;
        *p = 0;
        if (mkdir(part, 0777) && errno != EEXIST)
            return system_error(part, "cannot be made");
        *p = c;
        if (!c)
            break;
    }
    struct stat st;
    if (stat(path, &st) || !S_ISDIR(st.st_mode))
        return cq_fail(CQ_EIO, "%s: is a file, wanted a folder", path);
    return CQ_OK;
}

int cq_folder_remove(const char *path) {
    DIR *d = opendir(path);
    int status = CQ_OK;
    if (!d)
        return errno == ENOENT ? CQ_OK : system_error(path, "cannot be opened");
    for (struct dirent *e; !status && (e = readdir(d));) {
        char child[PATH_MAX];
        struct stat st;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        status = cq_path_join(child, sizeof child, path, e->d_name);
        if (!status && lstat(child, &st))
            status = system_error(child, "cannot be examined");
        else if (!status && S_ISDIR(st.st_mode))
            status = cq_folder_remove(child);
        else if (!status && unlink(child))
            status = system_error(child, "cannot be removed");
    }
    closedir(d);
    if (!status && rmdir(path))
        status = system_error(path, "cannot be removed");
    return status;
}

int cq_folder_replace(const char *to, const char *from) {
    char old[PATH_MAX];
    bool had = cq_file_exists(to);
    if (snprintf(old, sizeof old, "%s.old.%ld", to, (long)getpid()) >= (int)sizeof old)
        return cq_fail(CQ_EUSAGE, "%s: the path is too long", to);
    if (had && rename(to, old))
        return system_error(to, "cannot be moved aside");
    if (rename(from, to)) {
        int status = system_error(to, "cannot be put in place");
        if (had)
            rename(old, to); /* the best that can be done; the first failure is the one to report */
        return status;
    }
    CQ_TRY(sync_folder(to));
    return had ? cq_folder_remove(old) : CQ_OK;
}
