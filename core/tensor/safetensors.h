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
