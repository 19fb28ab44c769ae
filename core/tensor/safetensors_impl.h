/// safetensors_impl.h - the inside of a writer, for core/tensor/safetensors_*.c only.
#pragma once
#include "core/tensor/safetensors.h"
#include <jansson.h>

typedef struct cq_st_item {
    char *name;
    cq_tensor tensor;
    int32_t shard;
    int64_t at; ///< where its data begins in its file; set for a cq_st_folder
} cq_st_item;

struct cq_st_writer {
    cq_st_item *items;
    int64_t n, cap;
    json_t *metadata;
    json_t *names; ///< the set of names so far; in a cq_st_folder the index of each
};

/// Gives each item its shard and puts the items into the order of the files; returns how many
/// shards.
int32_t cq_st_layout(cq_st_writer *w, int64_t shard_bytes);
/// The header of one shard, padded to n bytes, a multiple of 8, so that the data that follows is
/// aligned. The caller frees *out.
int cq_st_header(const cq_st_writer *w, int32_t shard, char **out, int64_t *n);
/// out = the path of a shard.
int cq_st_shard_path(char *out, size_t size, const char *folder, int32_t shard, int32_t shards);
/// Writes model.safetensors.index.json.
int cq_st_index(const cq_st_writer *w, const char *folder, int32_t shards);
