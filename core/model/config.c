/// config.c - config.json of a nemotron_h or qwen3 model, into dimensions that fit together.
///
/// Keys, aliases and layer lists are those of models.md 1.2: an alias overrides, the list of layers
/// wins over the string. Policy: a key that changes the arithmetic is read or refused, never
/// guessed; a default is used only where the published configuration classes document one and
/// checkpoints rely on it.
#include "core/model/config.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/model/json.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_BLOCKS = 511, MAX_WIDTH = 1 << 20, MAX_VOCAB = 1 << 24 };

/* The reader keeps its first failure, so that the tables below read without checks. */
typedef struct reader {
    json_t *root;
    const char *dir;
    int status;
} reader;

static void refuse(reader *r, const char *key, const json_t *found, const char *wanted) {
    char text[80];
    if (!r->status)
        r->status = cq_fail(CQ_EDATA, "%s/config.json: %s is %s, wanted %s", r->dir, key,
                            cq_json_text(text, sizeof text, found), wanted);
}

/* The value under the alias if there is one, else under the key; null counts as absent. */
static const json_t *get(const reader *r, const char **key, const char *alias) {
    const json_t *v = alias ? json_object_get(r->root, alias) : NULL;
    if (v && !json_is_null(v)) {
        *key = alias;
        return v;
    }
    v = json_object_get(r->root, *key);
    return v && !json_is_null(v) ? v : NULL;
}

static int64_t integer(reader *r, const char *key, const char *alias, int64_t least, int64_t most) {
    char wanted[64];
    const json_t *v = get(r, &key, alias);
    if (json_is_integer(v) && json_integer_value(v) >= least && json_integer_value(v) <= most)
        return json_integer_value(v);
    snprintf(wanted, sizeof wanted, "an integer from %ld to %ld", (long)least, (long)most);
    refuse(r, key, v, wanted);
    return least;
}

static int64_t integer_or(reader *r, const char *key, int64_t otherwise, int64_t least,
                          int64_t most) {
    const char *name = key;
    return get(r, &name, NULL) ? integer(r, key, NULL, least, most) : otherwise;
}

static double real(reader *r, const char *key, const char *alias) {
    const json_t *v = get(r, &key, alias);
    if (json_is_number(v) && json_number_value(v) > 0 && isfinite(json_number_value(v)))
        return json_number_value(v);
    refuse(r, key, v, "a positive number");
    return 1;
}

static bool boolean_or(reader *r, const char *key, const char *alias, bool otherwise) {
    const json_t *v = get(r, &key, alias);
    if (v && !json_is_boolean(v))
        refuse(r, key, v, "true or false");
    return json_is_boolean(v) ? json_is_true(v) : otherwise;
}

static void must_be_false(reader *r, const char *key) {
    const json_t *v = json_object_get(r->root, key);
    if (v && !json_is_null(v) && !json_is_false(v))
        refuse(r, key, v, "false (not supported)");
}

static void must_be_null(reader *r, const char *key) {
    const json_t *v = json_object_get(r->root, key);
    if (v && !json_is_null(v))
        refuse(r, key, v, "null (not supported)");
}

static void must_be_zero(reader *r, const char *key) {
    const json_t *v = json_object_get(r->root, key);
    if (v && !json_is_null(v) && !(json_is_integer(v) && json_integer_value(v) == 0))
        refuse(r, key, v, "0 or null (not supported)");
}

static void must_be_text(reader *r, const char *key, const char *text) {
    char wanted[64];
    const json_t *v = json_object_get(r->root, key);
    snprintf(wanted, sizeof wanted, "\"%s\" (others are not supported)", text);
    if (v && !json_is_null(v) && !(json_is_string(v) && !strcmp(json_string_value(v), text)))
        refuse(r, key, v, wanted);
}

/* Every layer of transformers' layer_types must attend to everything. */
static void check_layer_types(reader *r, int64_t n) {
    const json_t *list = json_object_get(r->root, "layer_types");
    if (!list || json_is_null(list))
        return;
    if (!json_is_array(list) || (int64_t)json_array_size(list) != n)
        refuse(r, "layer_types", list, "one entry per hidden layer");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *kind = json_string_value(json_array_get(list, i));
        if (!kind || strcmp(kind, "full_attention"))
            refuse(r, "layer_types entry", json_array_get(list, i),
                   "\"full_attention\" (others are not supported)");
    }
}

static void must_divide(reader *r, const char *what, int64_t n, const char *by, int64_t d) {
    if (!r->status && n % d)
        r->status = cq_fail(CQ_EDATA, "%s/config.json: %s is %ld, wanted a multiple of %s, %ld",
                            r->dir, what, (long)n, by, (long)d);
}

static void must_fit(reader *r, const char *what, int64_t n, int64_t most) {
    if (!r->status && n > most)
        r->status = cq_fail(CQ_EDATA, "%s/config.json: %s is %ld, wanted at most %ld", r->dir, what,
                            (long)n, (long)most);
}

static int32_t token(reader *r, const char *key, int64_t vocab) {
    char wanted[64];
    const json_t *v = get(r, &key, NULL);
    if (json_array_size(v)) /* several end tokens: the first one is the model's own */
        v = json_array_get(v, 0);
    if (!v)
        return -1;
    if (json_is_integer(v) && json_integer_value(v) >= 0 && json_integer_value(v) < vocab)
        return (int32_t)json_integer_value(v);
    snprintf(wanted, sizeof wanted, "a token id below vocab_size, %ld", (long)vocab);
    refuse(r, key, v, wanted);
    return -1;
}

static char letter_of(const char *name) {
    static const struct {
        const char *name;
        char letter;
    } kinds[] = {{"mamba", 'M'},     {"linear_attention", 'M'}, {"moe", 'E'},
                 {"attention", '*'}, {"full_attention", '*'},   {"mlp", '-'}};
    for (size_t i = 0; name && i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(name, kinds[i].name))
            return kinds[i].letter;
    return 0;
}

static void read_layer_list(reader *r, cq_config *c, const json_t *list) {
    size_t n = json_array_size(list);
    if (!json_is_array(list) || n < 1 || n > MAX_BLOCKS) {
        refuse(r, "layers_block_type", list, "a list of 1 to 511 block names");
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *entry = json_array_get(list, i);
        c->pattern[i] = letter_of(json_string_value(entry));
        if (!c->pattern[i])
            refuse(r, "layers_block_type entry", entry,
                   "mamba, linear_attention, moe, attention, full_attention or mlp");
    }
    c->n_blocks = (int64_t)n;
}

static void read_layers(reader *r, cq_config *c) {
    const char *key = "layers_block_type", *string_key = "hybrid_override_pattern";
    const json_t *list = get(r, &key, NULL), *string = get(r, &string_key, NULL);
    if (list) {
        read_layer_list(r, c, list);
        return;
    }
    const char *text = json_string_value(string);
    size_t n = text ? strlen(text) : 0;
    if (n < 1 || n > MAX_BLOCKS || strspn(text, "ME*-") != n) {
        refuse(r, string_key, string, "1 to 511 of the letters M, E, *, - (or layers_block_type)");
        return;
    }
    memcpy(c->pattern, text, n);
    c->n_blocks = (int64_t)n;
    int64_t layers = integer_or(r, "num_hidden_layers", c->n_blocks, 1, 1 << 20);
    if (!r->status && layers != c->n_blocks)
        r->status = cq_fail(CQ_EDATA,
                            "%s/config.json: num_hidden_layers is %ld, wanted %ld, the length of "
                            "hybrid_override_pattern",
                            r->dir, (long)layers, (long)c->n_blocks);
}

static void read_common(reader *r, cq_config *c) {
    c->hidden = integer(r, "hidden_size", NULL, 1, MAX_WIDTH);
    c->vocab = integer(r, "vocab_size", NULL, 1, MAX_VOCAB);
    c->tied = boolean_or(r, "tie_word_embeddings", NULL, false);
    c->max_positions = integer(r, "max_position_embeddings", NULL, 1, INT32_MAX);
    const char *key = "initializer_range";
    c->initializer_range = get(r, &key, NULL) ? real(r, key, NULL) : 0.02;
    c->bos = token(r, "bos_token_id", c->vocab);
    c->eos = token(r, "eos_token_id", c->vocab);
    c->pad = token(r, "pad_token_id", c->vocab);
    must_be_false(r, "attention_bias");
    must_be_null(r, "rope_scaling");
}

static void read_attention(reader *r, cq_config *c) {
    const char *kv = "num_key_value_heads";
    c->heads = integer(r, "num_attention_heads", NULL, 1, 1 << 14);
    bool null = json_is_null(json_object_get(r->root, kv));
    c->kv_heads = null ? c->heads : integer(r, kv, NULL, 1, 1 << 14);
    const char *key = "head_dim", *older = "attention_head_dim";
    if (!get(r, &key, NULL) && get(r, &older, NULL)) /* the first Nemotron-H files */
        key = older;
    c->head_dim = integer(r, key, NULL, 1, 1 << 14);
    must_divide(r, "num_attention_heads", c->heads, kv, c->kv_heads);
    must_fit(r, "num_attention_heads x head_dim", c->heads * c->head_dim, MAX_WIDTH);
}

static void read_mamba(reader *r, cq_config *c) {
    c->mamba_heads = integer(r, "mamba_num_heads", NULL, 1, 1 << 14);
    c->mamba_head_dim = integer(r, "mamba_head_dim", NULL, 1, 1 << 14);
    c->mamba_groups = integer(r, "n_groups", "mamba_n_groups", 1, 1 << 14);
    c->mamba_state = integer(r, "ssm_state_size", NULL, 1, 1 << 14);
    c->conv_width = integer(r, "conv_kernel", "mamba_d_conv", 1, 64);
    c->chunk = integer(r, "chunk_size", "mamba_chunk_size", 1, 1 << 16);
    c->conv_bias = boolean_or(r, "use_conv_bias", "mamba_conv_bias", true);
    must_be_false(r, "use_bias");
    must_be_false(r, "mamba_proj_bias");
    must_be_text(r, "mamba_hidden_act", "silu");
    must_divide(r, "mamba_num_heads", c->mamba_heads, "n_groups", c->mamba_groups);
    must_fit(r, "mamba_num_heads x mamba_head_dim", c->mamba_heads * c->mamba_head_dim, MAX_WIDTH);
    must_fit(r, "n_groups x ssm_state_size", c->mamba_groups * c->mamba_state, MAX_WIDTH);
    /* the step size has no clamp: anything but [0, Infinity] would change every state */
    const char *key = "time_step_limit";
    const json_t *limit = get(r, &key, "mamba_dt_limit");
    const json_t *low = json_array_get(limit, 0), *high = json_array_get(limit, 1);
    const char *text = json_is_object(high) ? json_string_value(json_object_get(high, "__float__"))
                                            : json_string_value(high);
    if (limit &&
        !(json_is_number(low) && json_number_value(low) == 0 && text && !strcmp(text, "Infinity")))
        refuse(r, key, limit, "[0, Infinity] (others are not supported)");
}

static void read_moe(reader *r, cq_config *c) {
    c->experts = integer(r, "n_routed_experts", NULL, 1, 1 << 14);
    c->top_k = integer(r, "num_experts_per_tok", NULL, 1, c->experts);
    c->moe_intermediate = integer(r, "moe_intermediate_size", NULL, 1, MAX_WIDTH);
    if (integer_or(r, "n_shared_experts", 1, 0, 1))
        c->shared_intermediate =
            integer(r, "moe_shared_expert_intermediate_size", NULL, 1, MAX_WIDTH);
    c->norm_topk = boolean_or(r, "norm_topk_prob", NULL, true);
    c->routed_scaling = real(r, "routed_scaling_factor", NULL);
    c->n_group = integer_or(r, "n_group", 1, 1, c->experts);
    c->topk_group = integer_or(r, "topk_group", 1, 1, c->n_group);
    must_be_zero(r, "moe_latent_size");
    must_divide(r, "n_routed_experts", c->experts, "n_group", c->n_group);
    if (!r->status && c->n_group > 1 && c->experts / c->n_group < 2)
        r->status = cq_fail(CQ_EDATA,
                            "%s/config.json: n_group is %ld of %ld experts, wanted at least two "
                            "experts in a group",
                            r->dir, (long)c->n_group, (long)c->experts);
    int64_t eligible = c->experts / c->n_group * c->topk_group;
    must_fit(r, "num_experts_per_tok", c->top_k, eligible);
}

static void read_nemotron(reader *r, cq_config *c) {
    c->family = CQ_NEMOTRON_H;
    read_layers(r, c);
    read_common(r, c);
    /* the modeling code reads layer_norm_epsilon; files carry both */
    const char *key = "layer_norm_epsilon";
    if (!get(r, &key, NULL))
        key = "norm_eps";
    c->norm_eps = real(r, key, NULL);
    must_be_null(r, "sliding_window");
    must_be_false(r, "mlp_bias");
    must_be_text(r, "mlp_hidden_act", "relu2");
    must_be_zero(r, "num_nextn_predict_layers");
    if (strchr(c->pattern, 'M'))
        read_mamba(r, c);
    if (strchr(c->pattern, 'E'))
        read_moe(r, c);
    if (strchr(c->pattern, '*'))
        read_attention(r, c);
    if (strchr(c->pattern, '-'))
        c->intermediate = integer(r, "intermediate_size", NULL, 1, MAX_WIDTH);
}

static void read_rope(reader *r, cq_config *c) {
    const char *key = "rope_parameters";
    const json_t *nested = get(r, &key, NULL), *theta = json_object_get(nested, "rope_theta");
    const char *type = json_string_value(json_object_get(nested, "rope_type"));
    if (!nested) {
        c->rope_theta = real(r, "rope_theta", NULL);
        return;
    }
    if (!type || strcmp(type, "default") || !json_is_number(theta) ||
        !(json_number_value(theta) > 0))
        refuse(r, key, nested, "rope_type \"default\" and a positive rope_theta");
    c->rope_theta = json_number_value(theta);
}

static void read_qwen3(reader *r, cq_config *c) {
    c->family = CQ_QWEN3;
    c->n_blocks = integer(r, "num_hidden_layers", NULL, 1, MAX_BLOCKS);
    memset(c->pattern, 'Q', (size_t)c->n_blocks);
    read_common(r, c);
    c->norm_eps = real(r, "rms_norm_eps", NULL);
    c->intermediate = integer(r, "intermediate_size", NULL, 1, MAX_WIDTH);
    read_attention(r, c);
    read_rope(r, c);
    must_divide(r, "head_dim", c->head_dim, "two (rotary pairs)", 2);
    must_be_text(r, "hidden_act", "silu");
    const char *key = "partial_rotary_factor";
    if (get(r, &key, NULL) && real(r, key, NULL) != 1)
        refuse(r, key, get(r, &key, NULL), "1 (others are not supported)");
    must_be_false(r, "use_sliding_window"); /* without it sliding_window has no effect */
    check_layer_types(r, c->n_blocks);
}

/* Parameters of one block, in double so that hostile dimensions cannot wrap. */
static double block_params(const cq_config *c, char kind) {
    double d = (double)c->hidden;
    double q = (double)(c->heads * c->head_dim), kv = (double)(c->kv_heads * c->head_dim);
    double attention = 2 * d * q + 2 * d * kv;
    if (kind == 'Q')
        return 2 * d + attention + 2 * (double)c->head_dim + 3 * d * (double)c->intermediate;
    if (kind == '*')
        return d + attention;
    if (kind == '-')
        return d + 2 * d * (double)c->intermediate;
    if (kind == 'E') /* the correction bias is a buffer */
        return d + (double)c->experts * d + 2 * d * (double)c->shared_intermediate +
               (double)c->experts * 2 * d * (double)c->moe_intermediate;
    double heads = (double)c->mamba_heads, inner = heads * (double)c->mamba_head_dim;
    double conv = inner + 2 * (double)(c->mamba_groups * c->mamba_state);
    return d + d * (inner + conv + heads) +
           conv * ((double)c->conv_width + (c->conv_bias ? 1 : 0)) + 3 * heads + inner + d * inner;
}

static double total_params(const cq_config *c) {
    double n = (c->tied ? 1.0 : 2.0) * (double)c->vocab * (double)c->hidden + (double)c->hidden;
    for (int64_t i = 0; i < c->n_blocks; i++)
        n += block_params(c, c->pattern[i]);
    return n;
}

int cq_config_load(cq_config *out, const char *dir) {
    char path[4096];
    reader r = {.dir = dir};
    cq_config c = {0};
    CQ_TRY(cq_path_join(path, sizeof path, dir, "config.json"));
    CQ_TRY(cq_json_load(&r.root, path));
    const json_t *type = json_object_get(r.root, "model_type");
    const char *name = json_string_value(type);
    if (name && !strcmp(name, "nemotron_h"))
        read_nemotron(&r, &c);
    else if (name && !strcmp(name, "qwen3"))
        read_qwen3(&r, &c);
    else
        refuse(&r, "model_type", type, "nemotron_h or qwen3");
    /* beyond 2^50 parameters byte counts of a plan could wrap; doubles are exact up to there */
    if (!r.status && total_params(&c) > 0x1p50)
        r.status = cq_fail(CQ_EDATA,
                           "%s/config.json: dimensions give %.3g parameters, wanted at most %.3g",
                           dir, total_params(&c), 0x1p50);
    json_decref(r.root);
    if (!r.status)
        *out = c;
    return r.status;
}

int64_t cq_config_params(const cq_config *c) { return (int64_t)total_params(c); }

int64_t cq_config_count(const cq_config *c, char kind) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->n_blocks; i++)
        n += c->pattern[i] == kind;
    return n;
}
