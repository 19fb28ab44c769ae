/// rules.h - which linear modules are quantized, by preset and name patterns, each with its reason.
#pragma once
#include "core/quant/scales.h"

/// How a student keeps the fake-quantized copies of its weights, those that products multiply with.
typedef enum cq_copies {
    CQ_COPIES_F32,   ///< 4 bytes a value, and 2 more where products on a device are BF16
    CQ_COPIES_BF16,  ///< 2 where products on a device are BF16, else as F32
    CQ_COPIES_PACKED ///< 4.5 bits: NVFP4 codes and block scales, opened before each product
} cq_copies;

typedef struct cq_quant_options {
    const char *preset;     ///< nemotron_nano, qwen3, all, experts, mlp, none
    const char *exclude;    ///< comma-separated globs of module names to leave out, or NULL
    const char *include;    ///< globs that are quantized whatever the preset says, or NULL
    bool weights_only;      ///< W4A16: activations stay as they are
    cq_scale_method scales; ///< max (dynamic), mse or four_over_six (static, weights only)
    cq_copies copies;
    const char *freeze; ///< globs of parameters that are not trained and share the teacher's
                        ///< storage, or NULL
} cq_quant_options;

/// Decides for the module `name` (for example backbone.layers.3.mixer.experts.0.up_proj) of a model
/// with block letters `pattern` (NULL-terminated, cq_config.pattern) and contraction width k.
/// Returns NULL when it is quantized, else the reason it is not (static text). Presets: all = every
/// *_proj; experts = mixer.experts.* and shared_experts.*; mlp = experts, mlp.* and up/down of `-`
/// blocks; nemotron_nano = every *_proj but q/k/v/o of `*` blocks and in/out_proj of the nearest
/// preceding `M` of each `*` (nvfp4.md 6.1); qwen3 = every *_proj. Never: lm_head, embeddings,
/// norms, conv1d, router gate; k not a multiple of 16.
CQ_API const char *cq_quant_reason(const cq_quant_options *o, const char *pattern, const char *name,
                                   int64_t k);
/// CQ_EUSAGE naming the nearest preset when the preset is unknown.
CQ_API int cq_quant_check(const cq_quant_options *o);
/// Glob with * and ?; `globs` is a comma-separated list; NULL matches nothing.
CQ_API bool cq_glob_match(const char *globs, const char *name);
