/// checkpoint.h - a training state on disk: master weights, moments, scales, and the driver's own
/// state as JSON text.
#pragma once
#include "core/train/optimizer.h"

/// Writes folder `dir` (state.safetensors, state.json) atomically, replacing an older one. Ranks
/// that share `adam` call it together and write a file each into the one folder, which all must
/// reach.
CQ_API int cq_checkpoint_save(const char *dir, cq_model *student, cq_adamw *adam, const char *json);
/// Restores what any number of ranks saved; every tensor must be there with its shape, extra ones
/// are an error. *json is malloc'd.
CQ_API int cq_checkpoint_load(const char *dir, cq_model *student, cq_adamw *adam, cq_stream *s,
                              char **json);
