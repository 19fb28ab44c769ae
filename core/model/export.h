/// export.h - checkpoint folders out: NVFP4 in the ModelOpt layout (nvfp4.md 5.1), or BF16 master
/// weights; and verify.
#pragma once
#include "core/model/model.h"

/// Writes an NVFP4 folder: safetensors, config.json with quantization_config, hf_quant_config.json,
/// and every other file of the source folder that is not a weight copied byte for byte (tokenizer,
/// generation config, chat template). kv_cache_quant_algo is null; exclude_modules comes from the
/// parameters' reasons. The folder appears whole or not at all.
/// With experts dealt out over ranks rank 0 writes, while the others call cq_export_lend.
CQ_API int cq_export_nvfp4(cq_model *m, const char *dir, int64_t shard_bytes);
/// Writes the master weights in their checkpoint dtypes, same folder rules.
CQ_API int cq_export_weights(cq_model *m, const char *dir, int64_t shard_bytes);
/// Sends rank 0, which exports to NVFP4 or as it is, the master weights of this rank's experts.
CQ_API int cq_export_lend(cq_model *m, bool nvfp4);
/// Dequantizes the exported folder and compares with the model's fake-quantized weights: *differing
/// elements, by bits. Only quantized matrices count: the others are rounded to their checkpoint
/// dtype on the way out; of experts that are dealt out, those held here.
CQ_API int cq_export_compare(cq_model *m, const char *dir, int64_t *differing);

/// Findings of verify, one line each.
typedef struct cq_verify cq_verify;
/// Checks rules 1-11 and 14 of users.md 8.2 on an exported folder; with `against` (the teacher's
/// folder) also rule 10. Returns CQ_OK when the folder could be read; the findings say whether it
/// is right.
CQ_API int cq_verify_open(cq_verify **out, const char *dir, const char *against);
CQ_API void cq_verify_close(cq_verify *v);
CQ_API int64_t cq_verify_count(const cq_verify *v);
/// One line: "rule 4: <tensor>: what was found, what was wanted". *failed is false for statistics.
CQ_API const char *cq_verify_line(const cq_verify *v, int64_t i, bool *failed);
/// Number of failed findings.
CQ_API int64_t cq_verify_failed(const cq_verify *v);
