/// file.h - whole files, folders, and writing so that a reader sees all of a file or nothing of it.
#pragma once
#include "core/base/types.h"

typedef struct cq_map {
    const uint8_t *data;
    int64_t bytes;
    void *base; ///< what munmap gets
} cq_map;

/// Maps a file read-only. CQ_EIO naming path and reason.
CQ_API int cq_map_open(cq_map *out, const char *path);
CQ_API void cq_map_close(cq_map *map);
/// Tells the kernel that these bytes of the map are not needed any more, so they leave the resident
/// set.
CQ_API void cq_map_drop(const cq_map *map, int64_t begin, int64_t bytes);

/// Tells the kernel that these bytes of a file need not stay in its cache either; a hint, which
/// never fails.
CQ_API void cq_file_forget(const char *path, int64_t begin, int64_t bytes);

/// Reads a whole file into malloc'd memory with a zero after the last byte. The caller frees *out.
CQ_API int cq_file_read(char **out, int64_t *bytes, const char *path);

typedef struct cq_writer cq_writer;
/// Opens `path.tmp.<pid>` for writing.
CQ_API int cq_writer_open(cq_writer **out, const char *path);
CQ_API int cq_writer_write(cq_writer *w, const void *data, int64_t bytes);
/// Flush, fsync, rename over `path`, fsync the folder. Frees w in every case; on failure the
/// temporary file is gone.
CQ_API int cq_writer_commit(cq_writer *w);
/// Gives up: removes the temporary file and frees w. Accepts NULL.
CQ_API void cq_writer_abort(cq_writer *w);
/// cq_writer in one call.
CQ_API int cq_file_write(const char *path, const void *data, int64_t bytes);
/// Copies a file byte for byte through cq_writer.
CQ_API int cq_file_copy(const char *to, const char *from);
CQ_API bool cq_file_exists(const char *path);
/// mkdir -p.
CQ_API int cq_folder_make(const char *path);
/// rm -rf of a folder that exists; only names below it. Accepts a missing folder.
CQ_API int cq_folder_remove(const char *path);
/// Renames a folder over another: the old one is removed after the new one is in place, the parent
/// is fsynced.
CQ_API int cq_folder_replace(const char *to, const char *from);
/// out = "a/b"; CQ_EUSAGE when it does not fit.
CQ_API int cq_path_join(char *out, size_t size, const char *a, const char *b);
