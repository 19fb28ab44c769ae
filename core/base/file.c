/// file.c - reading whole files, writing so that a reader sees all of a file or nothing of it, and
/// folders.
///
/// A write is: bytes into `path.tmp.<pid>`, fsync, rename, fsync of the folder. A rename may reach
/// the disk before the data it names, hence the first fsync; it is lost with the folder's own
/// block, hence the second. Every failure names the final path and the reason, and takes the
/// temporary file with it. A folder is replaced by exchanging two names in one step where the file
/// system can, so a process killed at any instant leaves the old or the new one under the name.
#define _GNU_SOURCE
#include "core/base/file.h"
#include "core/base/error.h"
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 18 };

struct cq_writer {
    int fd;
    int failed; ///< errno of the first failed write: a commit after it must not succeed
    size_t filled;
    char *path, *temporary;
    char buffer[BUFFER_BYTES];
};

static int io_fail(const char *path, int reason) {
    return cq_fail(CQ_EIO, "%s: %s", path, strerror(reason));
}

/// Opens for reading without waiting for a pipe's other end; only regular files pass.
static int open_read(int *fd, struct stat *info, const char *path) {
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0)
        return io_fail(path, errno);
    int reason = fstat(*fd, info) < 0 ? errno : S_ISDIR(info->st_mode) ? EISDIR : 0;
    if (reason || !S_ISREG(info->st_mode)) {
        close(*fd);
        return reason ? io_fail(path, reason)
                      : cq_fail(CQ_EIO, "%s: is a device or pipe, wanted a file", path);
    }
    return CQ_OK;
}

/// read() until n bytes or the end; -1 with errno set.
static ssize_t read_full(int fd, char *to, size_t n) {
    size_t done = 0;
    while (done < n) {
        ssize_t got = read(fd, to + done, n - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

int cq_map_open(cq_map *out, const char *path) {
    *out = (cq_map){.data = (const uint8_t *)""};
    int fd;
    struct stat info;
    CQ_TRY(open_read(&fd, &info, path));
    if (info.st_size == 0) { /* mmap refuses an empty range */
        close(fd);
        return CQ_OK;
    }
    void *base = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int reason = errno;
    close(fd);
    if (base == MAP_FAILED)
        return io_fail(path, reason);
    *out = (cq_map){.data = base, .bytes = info.st_size, .base = base};
    return CQ_OK;
}

void cq_map_close(cq_map *map) {
    if (map->base)
        munmap(map->base, (size_t)map->bytes);
    *map = (cq_map){0};
}

void cq_map_drop(const cq_map *map, int64_t begin, int64_t bytes) {
    if (!map->base || begin < 0 || bytes <= 0 || begin > map->bytes || bytes > map->bytes - begin)
        return;
    int64_t page = sysconf(_SC_PAGESIZE); /* only pages that lie wholly inside: neighbours stay */
    int64_t from = (begin + page - 1) / page * page, to = (begin + bytes) / page * page;
    if (to > from)
        madvise((char *)map->base + from, (size_t)(to - from), MADV_DONTNEED);
}

void cq_file_forget(const char *path, int64_t begin, int64_t bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return;
    posix_fadvise(fd, begin, bytes, POSIX_FADV_DONTNEED);
    close(fd);
}

int cq_file_read(char **out, int64_t *bytes, const char *path) {
    int fd;
    struct stat info;
    *out = NULL;
    *bytes = 0;
    CQ_TRY(open_read(&fd, &info, path));
    /* files of /proc say size 0 and a file may grow while it is read: ask until the end */
    size_t capacity = (size_t)info.st_size + 1 < 4096 ? 4096 : (size_t)info.st_size + 1, done = 0;
    char *text = NULL;
    int status = CQ_OK;
    for (;;) {
        char *bigger = realloc(text, capacity + 1);
        if (!bigger) {
            status = cq_fail(CQ_ENOMEM, "%s: %zu bytes do not fit memory", path, capacity);
            break;
        }
        text = bigger;
        ssize_t got = read_full(fd, text + done, capacity - done);
        if (got < 0) {
            status = io_fail(path, errno);
            break;
        }
        done += (size_t)got;
        if (done < capacity)
            break;
        capacity *= 2;
    }
    close(fd);
    if (status) {
        free(text);
        return status;
    }
    text[done] = 0;
    *out = text;
    *bytes = (int64_t)done;
    return CQ_OK;
}

/// fsync; a file system that cannot sync such a file (EINVAL) is no failure.
static int sync_fd(int fd, const char *path) {
    int result;
    do
        result = fsync(fd);
    while (result < 0 && errno == EINTR);
    return result == 0 || errno == EINVAL ? CQ_OK : io_fail(path, errno);
}

/// fsync of the folder that holds `path`, so that a rename in it survives a power cut.
static int sync_parent(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    while (n > 0 && path[n - 1] != '/')
        n--;
    char *parent = n ? strndup(path, n) : strdup(".");
    if (!parent)
        return cq_fail(CQ_ENOMEM, "%s: out of memory", path);
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int status = fd < 0 ? io_fail(parent, errno) : sync_fd(fd, parent);
    if (fd >= 0)
        close(fd);
    free(parent);
    return status;
}

bool cq_file_exists(const char *path) { return access(path, F_OK) == 0; }

/// Frees w; with `remove` the temporary file goes too.
static void writer_free(cq_writer *w, bool remove) {
    if (w->fd >= 0)
        close(w->fd);
    if (remove)
        unlink(w->temporary);
    free(w->path);
    free(w->temporary);
    free(w);
}

int cq_writer_open(cq_writer **out, const char *path) {
    *out = NULL;
    cq_writer *w = malloc(sizeof *w);
    if (!w)
        return cq_fail(CQ_ENOMEM, "%s: out of memory", path);
    *w = (cq_writer){.fd = -1, .path = strdup(path)};
    if (!w->path || asprintf(&w->temporary, "%s.tmp.%ld", path, (long)getpid()) < 0) {
        w->temporary = NULL;
        writer_free(w, false);
        return cq_fail(CQ_ENOMEM, "%s: out of memory", path);
    }
    /* a leftover of the same name is of a dead process: its number is ours now */
    w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (w->fd < 0) {
        int reason = errno;
        writer_free(w, false);
        return io_fail(path, reason);
    }
    *out = w;
    return CQ_OK;
}

static int write_full(cq_writer *w, const char *from, size_t n) {
    while (n > 0 && !w->failed) {
        ssize_t put = write(w->fd, from, n);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            w->failed = put < 0 ? errno : EIO;
            break;
        }
        from += put;
        n -= (size_t)put;
    }
    return w->failed ? io_fail(w->path, w->failed) : CQ_OK;
}

static int flush(cq_writer *w) {
    size_t n = w->filled;
    w->filled = 0;
    return write_full(w, w->buffer, n);
}

int cq_writer_write(cq_writer *w, const void *data, int64_t bytes) {
    if (bytes < 0)
        return cq_fail(CQ_EUSAGE, "%s: %ld bytes to write", w->path, (long)bytes);
    size_t n = (size_t)bytes;
    if (n == 0)
        return w->failed ? io_fail(w->path, w->failed) : CQ_OK;
    if (n > BUFFER_BYTES - w->filled)
        CQ_TRY(flush(w));
    if (n >= BUFFER_BYTES)
        return write_full(w, data, n);
    memcpy(w->buffer + w->filled, data, n);
    w->filled += n;
    return w->failed ? io_fail(w->path, w->failed) : CQ_OK;
}

int cq_writer_commit(cq_writer *w) {
    int status = flush(w);
    if (!status)
        status = sync_fd(w->fd, w->path);
    int closed = close(w->fd); /* a network disk may refuse the bytes only here */
    w->fd = -1;
    if (!status && closed < 0)
        status = io_fail(w->path, errno);
    bool renamed = false;
    if (!status) {
        renamed = rename(w->temporary, w->path) == 0;
        status = renamed ? sync_parent(w->path) : io_fail(w->path, errno);
    }
    writer_free(w, !renamed);
    return status;
}

void cq_writer_abort(cq_writer *w) {
    if (w)
        writer_free(w, true);
}

int cq_file_write(const char *path, const void *data, int64_t bytes) {
    cq_writer *w;
    CQ_TRY(cq_writer_open(&w, path));
    int status = cq_writer_write(w, data, bytes);
    if (!status)
        return cq_writer_commit(w);
    cq_writer_abort(w);
    return status;
}

int cq_file_copy(const char *to, const char *from) {
    int fd;
    struct stat info;
    cq_writer *w = NULL;
    CQ_TRY(open_read(&fd, &info, from));
    char *chunk = malloc(BUFFER_BYTES);
    int status = chunk ? cq_writer_open(&w, to) : cq_fail(CQ_ENOMEM, "%s: out of memory", to);
    while (!status) {
        ssize_t got = read_full(fd, chunk, BUFFER_BYTES);
        if (got < 0)
            status = io_fail(from, errno);
        if (got <= 0)
            break;
        status = cq_writer_write(w, chunk, got);
    }
    close(fd);
    free(chunk);
    if (!status)
        return cq_writer_commit(w);
    cq_writer_abort(w);
    return status;
}

/// One mkdir that accepts a folder already there.
static int make_one(const char *path) {
    struct stat info;
    if (mkdir(path, 0777) == 0)
        return CQ_OK;
    int reason = errno;
    if (stat(path, &info) == 0)
        return S_ISDIR(info.st_mode) ? CQ_OK
                                     : cq_fail(CQ_EIO, "%s: is a file, wanted a folder", path);
    return io_fail(path, reason);
}

int cq_folder_make(const char *path) {
    char *part = strdup(path);
    if (!part)
        return cq_fail(CQ_ENOMEM, "%s: out of memory", path);
    int status = CQ_OK;
    for (char *slash = part + 1; !status && part[0] && (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        status = make_one(part);
        *slash = '/';
    }
    free(part);
    return status ? status : make_one(path);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info;
    (void)kind;
    (void)where;
    if (remove(path) == 0 || errno == ENOENT)
        return 0;
    io_fail(path, errno);
    return 1; /* not -1, which is how nftw reports a failure of its own */
}

int cq_folder_remove(const char *path) {
    struct stat info;
    if (lstat(path, &info) < 0)
        return errno == ENOENT ? CQ_OK : io_fail(path, errno);
    if (!S_ISDIR(info.st_mode))
        return cq_fail(CQ_EIO, "%s: is a file or link, wanted a folder to remove", path);
    /* depth first, links not followed, other file systems left alone */
    int result = nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    return result < 0 ? io_fail(path, errno) : result > 0 ? CQ_EIO : CQ_OK;
}

/// Without an exchange: the old folder steps aside, and back when the new one cannot take its
/// place.
static int replace_aside(const char *to, const char *from) {
    char *old = NULL;
    if (asprintf(&old, "%s.old.%ld", to, (long)getpid()) < 0)
        return cq_fail(CQ_ENOMEM, "%s: out of memory", to);
    int status = cq_folder_remove(old);
    if (!status && rename(to, old) < 0)
        status = io_fail(to, errno);
    else if (!status && rename(from, to) < 0) {
        status = io_fail(to, errno);
        rename(old, to);
    }
    if (!status)
        status = sync_parent(to);
    if (!status)
        status = cq_folder_remove(old);
    free(old);
    return status;
}

int cq_folder_replace(const char *to, const char *from) {
    struct stat info;
    if (stat(from, &info) < 0)
        return io_fail(from, errno);
    if (!S_ISDIR(info.st_mode))
        return cq_fail(CQ_EIO, "%s: is a file, wanted a folder", from);
    if (lstat(to, &info) < 0 && errno == ENOENT)
        return rename(from, to) == 0 ? sync_parent(to) : io_fail(to, errno);
    if (!S_ISDIR(info.st_mode))
        return cq_fail(CQ_EIO, "%s: is a file or link, wanted a folder to replace", to);
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) == 0) {
        CQ_TRY(sync_parent(to));
        return cq_folder_remove(from);
    }
    if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP)
        return io_fail(to, errno);
    return replace_aside(to, from);
}
