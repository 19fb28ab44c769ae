/// config.h - what a Hugging Face config.json says about a nemotron_h or qwen3 model.
#pragma once
#include "core/block/config.h"

/// Reads `dir/config.json` (models.md 1.2 lists keys and aliases). CQ_EDATA names the file, the
/// key, what was found and what was wanted; an unsupported model_type is named with the supported
/// ones.
CQ_API int cq_config_load(cq_config *out, const char *dir);
/// Total parameters, from the dimensions alone.
CQ_API int64_t cq_config_params(const cq_config *c);
/// How many blocks have this letter.
CQ_API int64_t cq_config_count(const cq_config *c, char kind);
