/// verify_impl.h - what the parts of verify share: the folder as it was read, and the findings so
/// far.
#pragma once
#include "core/model/export.h"
#include "core/model/json.h"

typedef struct finding {
    char *text;
    bool failed;
} finding;

struct cq_verify {
    const char *dir, *against; ///< valid while verify runs
    cq_model *expected;        ///< names and shapes that config.json asks for
    cq_safetensors *files;
    json_t *config, *quant; ///< config.json; hf_quant_config.json or NULL
    const json_t *excluded; ///< list of module names and globs
    const char *kv_cache;   ///< algorithm, or NULL
    bool weights_only;      ///< W4A16: no input scales
    finding *list;
    int64_t n, cap;
    bool out_of_memory;
};

/// Adds "rule N: ..." (printf format).
void cq_verify_add(cq_verify *v, bool failed, int rule, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/// Whether the exclude list names this module, exactly or by glob.
bool cq_verify_excluded(const cq_verify *v, const char *module);
/// Rules 1-8 and 14: every tensor of the folder. CQ_ENOMEM only.
int cq_verify_tensors(cq_verify *v);
