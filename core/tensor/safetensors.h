/// safetensors.h - strict reader and writer of safetensors files and sharded folders (nvfp4.md
/// section 7).
#pragma once
#include "core/base/file.h"
#include "core/tensor/tensor.h"

typedef struct cq_entry {
    char *name;
    cq_tensor tensor; ///< data points into the mapped file (or an aligned copy)
    int32_t shard;    ///< index of the file
} cq_entry;

/// A safetensors file, or a folder's model.safetensors, or else the shards of its
/// model.safetensors.index.json.
typedef struct cq_safetensors cq_safetensors;

/// Opens a `.safetensors` file or a folder. Every rule of the format is checked before any tensor
/// is handed out; CQ_EDATA names file, what was found and what was wanted.
CQ_API int cq_safetensors_open(cq_safetensors **out, const char *path);
CQ_API void cq_safetensors_close(cq_safetensors *st);
CQ_API int64_t cq_safetensors_count(const cq_safetensors *st);
/// Entries in name order.
CQ_API const cq_entry *cq_safetensors_at(const cq_safetensors *st, int64_t i);
/// NULL when there is no such tensor.
CQ_API const cq_entry *cq_safetensors_find(const cq_safetensors *st, const char *name);
/// Path of the file an entry lies in, for messages.
CQ_API const char *cq_safetensors_path(const cq_safetensors *st, const cq_entry *e);
/// A `__metadata__` value of the first file, or NULL.
CQ_API const char *cq_safetensors_metadata(const cq_safetensors *st, const char *key);
/// Lets go of the resident pages of one tensor after it has been copied.
CQ_API void cq_safetensors_drop(const cq_safetensors *st, const cq_entry *e);

/// The same, and out of the system's cache: for who reads files that do not fit memory once.
CQ_API void cq_safetensors_forget(const cq_safetensors *st, const cq_entry *e);

/// Collects tensors and writes them: one file `path`, or with shard_bytes > 0 the folder layout
/// `model-0000i-of-0000n.safetensors` plus index (one `model.safetensors` when all fits one shard).
typedef struct cq_st_writer cq_st_writer;
CQ_API int cq_st_writer_open(cq_st_writer **out);
CQ_API void cq_st_writer_close(cq_st_writer *w);
/// Adds a tensor; data is read at write time and must live until then. Duplicate names are
/// CQ_EUSAGE.
CQ_API int cq_st_writer_add(cq_st_writer *w, const char *name, cq_tensor t);
CQ_API int cq_st_writer_metadata(cq_st_writer *w, const char *key, const char *value);
/// Writes one file atomically.
CQ_API int cq_st_writer_file(cq_st_writer *w, const char *path);
/// Writes model.safetensors, or shards of at most shard_bytes and the index, into an existing
/// folder; a tensor larger than shard_bytes gets a shard of its own. The other layout's file, if
/// there is one, is removed.
CQ_API int cq_st_writer_folder(cq_st_writer *w, const char *folder, int64_t shard_bytes);

/// Announces a tensor whose data comes later, through a cq_st_folder.
CQ_API int cq_st_writer_announce(cq_st_writer *w, const char *name, cq_dtype dtype, cq_shape shape);

/// A folder that is filled in pieces, in any order, by several threads: the bytes are those of
/// cq_st_writer_folder. Files have their full length from the start; what was not written is a
/// hole.
typedef struct cq_st_folder cq_st_folder;
/// Makes the files of the announced tensors in an existing folder, or opens those that an earlier
/// process made there: pieces that are in them stay. `w` must outlive it and takes no more tensors.
CQ_API int cq_st_folder_open(cq_st_folder **out, cq_st_writer *w, const char *folder,
                             int64_t shard_bytes);
/// Closes the files. Accepts NULL.
CQ_API void cq_st_folder_close(cq_st_folder *f);
CQ_API int32_t cq_st_folder_shards(const cq_st_folder *f);
/// A tensor by name, for `put`; CQ_EUSAGE when it was not announced.
CQ_API int cq_st_folder_find(const cq_st_folder *f, const char *name, int64_t *tensor);
/// Writes bytes [at, at + bytes) of a tensor's data. Pages of zeros stay holes, so a piece that is
/// written again must be the same. CQ_EIO names the file.
CQ_API int cq_st_folder_put(const cq_st_folder *f, int64_t tensor, int64_t at, const void *data,
                            int64_t bytes);
/// What was put is on disk when it returns.
CQ_API int cq_st_folder_sync(const cq_st_folder *f);
/// Syncs and writes the index, if the layout has one.
CQ_API int cq_st_folder_finish(const cq_st_folder *f);
