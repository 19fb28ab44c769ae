/// config.h - the dimensions of a nemotron_h or qwen3 model, as its blocks see them.
#pragma once
#include "core/base/types.h"

typedef enum cq_family { CQ_NEMOTRON_H = 0, CQ_QWEN3 = 1 } cq_family;

/// Dimensions of one model; zero where a family has no such thing.
typedef struct cq_config {
    cq_family family;
    int64_t n_blocks;
    char pattern[512]; ///< one letter per block: M mamba, E moe, * attention, - mlp; Q: a qwen3
                       ///< block
    int64_t hidden, vocab;
    double norm_eps;
    bool tied; ///< the head is the embedding
    int64_t heads, kv_heads, head_dim;
    double rope_theta; ///< 0: no rotary embedding
    int64_t intermediate;
    int64_t mamba_heads, mamba_head_dim, mamba_groups, mamba_state, conv_width, chunk;
    bool conv_bias;
    int64_t experts, top_k, n_group, topk_group, moe_intermediate, shared_intermediate;
    bool norm_topk;
    double routed_scaling;
    double initializer_range;
    int64_t max_positions;
    int32_t bos, eos, pad; ///< -1 when absent
} cq_config;
