/// safetensors_folder.c - a safetensors folder that is filled in pieces.
///
/// Names, dtypes and shapes say where every byte goes before the first one is known, so headers and
/// lengths are written first and tensors then land in whatever order they are made. Policy: a page
/// of zeros is not written. The file is a hole there, because nothing else was ever put there.
#include "core/base/error.h"
#include "core/tensor/safetensors_impl.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096 };

typedef struct file {
    int fd;
    char *path;
} file;

struct cq_st_folder {
    cq_st_writer *w;
    char *path;
    file *files;
    int32_t n_files;
};

static int io_fail(const char *path, int reason) {
    return cq_fail(CQ_EIO, "%s: %s", path, strerror(reason));
}

static int put_all(const file *f, const char *data, int64_t at, int64_t bytes) {
    while (bytes > 0) {
        ssize_t n = pwrite(f->fd, data, (size_t)bytes, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return io_fail(f->path, n < 0 ? errno : EIO);
        data += n;
        at += n;
        bytes -= n;
    }
    return CQ_OK;
}

static bool all_zero(const char *data, int64_t n) {
    return data[0] == 0 && (n == 1 || !memcmp(data, data + 1, (size_t)n - 1));
}

/* Data without its pages of zeros; pages are the file's. */
static int put_sparse(const file *f, const char *data, int64_t at, int64_t bytes) {
    int64_t begin = 0;
    for (int64_t i = 0, n; i < bytes; i += n) {
        n = PAGE - (at + i) % PAGE;
        n = n < bytes - i ? n : bytes - i;
        if (!all_zero(data + i, n))
            continue;
        CQ_TRY(put_all(f, data + begin, at + begin, i - begin));
        begin = i + n;
    }
    return put_all(f, data + begin, at + begin, bytes - begin);
}

/* Header and length of one shard. */
static int open_file(cq_st_folder *f, int32_t shard) {
    char path[4096], *header = NULL;
    int64_t n = 0, end;
    file *to = &f->files[shard];
    CQ_TRY(cq_st_shard_path(path, sizeof path, f->path, shard, f->n_files));
    if (!(to->path = strdup(path)))
        return cq_fail(CQ_ENOMEM, "%s: no memory to write it", path);
    to->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (to->fd < 0)
        return io_fail(path, errno);
    CQ_TRY(cq_st_header(f->w, shard, &header, &n));
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)n >> (8 * i));
    int status = put_all(to, (const char *)length, 0, 8);
    if (!status)
        status = put_all(to, header, 8, n);
    free(header);
    end = 8 + n;
    for (int64_t i = 0; i < f->w->n; i++)
        if (f->w->items[i].shard == shard) {
            f->w->items[i].at = end;
            end += cq_tensor_bytes(f->w->items[i].tensor);
        }
    if (!status && ftruncate(to->fd, end))
        status = io_fail(path, errno);
    return status;
}

static int open_files(cq_st_folder *f) {
    for (int64_t i = 0; i < f->w->n; i++)
        if (json_object_set_new(f->w->names, f->w->items[i].name, json_integer(i)))
            return cq_fail(CQ_ENOMEM, "%s: no memory for its tensor list", f->path);
    for (int32_t i = 0; i < f->n_files; i++)
        CQ_TRY(open_file(f, i));
    return CQ_OK;
}

int cq_st_folder_open(cq_st_folder **out, cq_st_writer *w, const char *folder,
                      int64_t shard_bytes) {
    int32_t shards = cq_st_layout(w, shard_bytes);
    cq_st_folder *f = calloc(1, sizeof *f);
    *out = NULL;
    if (f)
        *f = (cq_st_folder){
            .w = w, .path = strdup(folder), .files = calloc((size_t)shards, sizeof(file))};
    if (!f || !f->path || !f->files) {
        cq_st_folder_close(f);
        return cq_fail(CQ_ENOMEM, "%s: no memory to write it", folder);
    }
    f->n_files = shards;
    for (int32_t i = 0; i < shards; i++)
        f->files[i].fd = -1;
    int status = open_files(f);
    if (status) {
        cq_st_folder_close(f);
        return status;
    }
    *out = f;
    return CQ_OK;
}

void cq_st_folder_close(cq_st_folder *f) {
    if (!f)
        return;
    for (int32_t i = 0; i < f->n_files; i++) {
        if (f->files[i].fd >= 0)
            close(f->files[i].fd);
        free(f->files[i].path);
    }
    free(f->files);
    free(f->path);
    free(f);
}

int32_t cq_st_folder_shards(const cq_st_folder *f) { return f->n_files; }

int cq_st_folder_find(const cq_st_folder *f, const char *name, int64_t *tensor) {
    const json_t *at = json_object_get(f->w->names, name);
    if (!at)
        return cq_fail(CQ_EUSAGE, "%s: tensor %.200s was not announced", f->path, name);
    *tensor = json_integer_value(at);
    return CQ_OK;
}

int cq_st_folder_put(const cq_st_folder *f, int64_t tensor, int64_t at, const void *data,
                     int64_t bytes) {
    const cq_st_item *it = &f->w->items[tensor];
    if (at < 0 || bytes < 0 || at > cq_tensor_bytes(it->tensor) - bytes)
        return cq_fail(CQ_EUSAGE, "%s: bytes %ld to %ld of %.200s, wanted a range within its %ld",
                       f->path, (long)at, (long)(at + bytes), it->name,
                       (long)cq_tensor_bytes(it->tensor));
    return bytes ? put_sparse(&f->files[it->shard], data, it->at + at, bytes) : CQ_OK;
}

int cq_st_folder_sync(const cq_st_folder *f) {
    for (int32_t i = 0; i < f->n_files; i++) {
        int result;
        do
            result = fsync(f->files[i].fd);
        while (result < 0 && errno == EINTR);
        if (result < 0 && errno != EINVAL)
            return io_fail(f->files[i].path, errno);
    }
    return CQ_OK;
}

int cq_st_folder_finish(const cq_st_folder *f) {
    CQ_TRY(cq_st_folder_sync(f));
    return f->n_files > 1 ? cq_st_index(f->w, f->path, f->n_files) : CQ_OK;
}
