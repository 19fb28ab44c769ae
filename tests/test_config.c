/* test_config.c - config.json: published models by their parameter counts, aliases, and every
 * refusal. */
#include "core/ckaqad.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

/* Loads a config.json of this text from a new folder. */
static int load(cq_config *c, const char *text) {
    char dir[] = "/tmp/ckaqad-config-XXXXXX", path[64];
    cr_assert_not_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    OK(cq_file_write(path, text, (int64_t)strlen(text)));
    int status = cq_config_load(c, dir);
    char message[1024];
    snprintf(message, sizeof message, "%s", cq_error());
    OK(cq_folder_remove(dir));
    return status ? cq_fail(status, "%s", message) : CQ_OK;
}

static const char nano[] =
    "{\"model_type\": \"nemotron_h\", \"num_hidden_layers\": 52, \"hybrid_override_pattern\": "
    "\"MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME\", \"hidden_size\": 2688, "
    "\"num_attention_heads\": 32, \"num_key_value_heads\": 2, \"head_dim\": 128, \"rope_theta\": "
    "10000, "
    "\"attention_bias\": false, \"sliding_window\": null, \"mamba_num_heads\": 64, "
    "\"mamba_head_dim\": 64, "
    "\"ssm_state_size\": 128, \"n_groups\": 8, \"expand\": 2, \"conv_kernel\": 4, "
    "\"use_conv_bias\": true, "
    "\"chunk_size\": 128, \"mamba_hidden_act\": \"silu\", \"mamba_proj_bias\": false, "
    "\"use_bias\": false, "
    "\"n_routed_experts\": 128, \"num_experts_per_tok\": 6, \"n_shared_experts\": 1, "
    "\"moe_intermediate_size\": 1856, \"moe_shared_expert_intermediate_size\": 3712, "
    "\"intermediate_size\": 1856, \"mlp_hidden_act\": \"relu2\", \"mlp_bias\": false, "
    "\"norm_topk_prob\": true, \"routed_scaling_factor\": 2.5, \"n_group\": 1, \"topk_group\": 1, "
    "\"layer_norm_epsilon\": 1e-05, \"vocab_size\": 131072, \"tie_word_embeddings\": false, "
    "\"bos_token_id\": 1, \"eos_token_id\": [2, 11], \"pad_token_id\": 0, "
    "\"max_position_embeddings\": 262144, \"initializer_range\": 0.02}";

static const char qwen[] =
    "{\"model_type\": \"qwen3\", \"num_hidden_layers\": %d, \"hidden_size\": %d, "
    "\"intermediate_size\": "
    "%d, \"num_attention_heads\": %d, \"num_key_value_heads\": 8, \"head_dim\": 128, "
    "\"vocab_size\": 151936, "
    "\"tie_word_embeddings\": %s, \"rms_norm_eps\": 1e-06, \"rope_theta\": 1000000, "
    "\"rope_scaling\": null, "
    "\"hidden_act\": \"silu\", \"max_position_embeddings\": 40960, \"use_sliding_window\": false, "
    "\"sliding_window\": 4096, \"attention_bias\": false, \"bos_token_id\": 151643, "
    "\"eos_token_id\": 151645}";

/* `text` with the value of `key` replaced, or with the key added in front. */
static const char *with(const char *text, const char *key, const char *value) {
    static char buffer[2][8192];
    static int turn;
    char *out = buffer[turn = !turn], quoted[128];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *at = strstr(text, quoted);
    if (!at) {
        snprintf(out, sizeof buffer[0], "{%s%s, %s", quoted, value, text + 1);
        return out;
    }
    at += strlen(quoted);
    const char *end = at;
    for (int depth = 0; depth || (*end != ',' && *end != '}'); end++)
        depth += (*end == '[') - (*end == ']');
    snprintf(out, sizeof buffer[0], "%.*s%s%s", (int)(at - text), text, value, end);
    return out;
}

static const char *without(const char *text, const char *key) {
    char other[128];
    static char out[8192];
    snprintf(other, sizeof other, "\"%s\": ", key);
    const char *at = strstr(text, other);
    cr_assert_not_null(at, "%s", key);
    snprintf(out, sizeof out, "%.*s\"was_%s", (int)(at - text), text, at + 1);
    return out;
}

Test(config, nano_has_its_published_dimensions_and_parameters) {
    cq_config c;
    OK(load(&c, nano));
    cr_expect_eq(c.n_blocks, 52);
    cr_expect_eq(cq_config_count(&c, 'M'), 23);
    cr_expect_eq(cq_config_count(&c, 'E'), 23);
    cr_expect_eq(cq_config_count(&c, '*'), 6);
    cr_expect_eq(cq_config_count(&c, '-'), 0);
    cr_expect_eq(cq_config_params(&c), 31577937344);
    cr_expect_eq(c.rope_theta, 0, "attention has no rotary embedding whatever the file says");
    cr_expect(c.bos == 1 && c.eos == 2 && c.pad == 0 && !c.tied && c.conv_bias && c.norm_topk);
    cr_expect(c.heads == 32 && c.kv_heads == 2 && c.mamba_groups == 8 && c.mamba_state == 128 &&
              c.conv_width == 4 && c.chunk == 128 && c.top_k == 6 && c.experts == 128 &&
              c.shared_intermediate == 3712 && c.routed_scaling == 2.5 && c.norm_eps == 1e-5);
}

Test(config, dense_hybrids_have_their_published_parameters) {
    static const struct {
        const char *pattern, *layers, *hidden, *ffn, *kv, *heads, *mamba_heads, *head_dim;
        int64_t params;
    } cases[] = {
        {"\"M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-\"", "42", "3136", "12544", "8", "40", "96",
         "80", 3973556832},
        {"\"M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-\"", "56", "4480", "15680", "8",
         "40", "128", "80", 8888227328},
        {"\"M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-\"", "52", "4096", "21504", "8",
         "32", "128", "64", 8100852736},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cq_config c;
        const char *t = with(nano, "hybrid_override_pattern", cases[i].pattern);
        t = with(with(t, "num_hidden_layers", cases[i].layers), "hidden_size", cases[i].hidden);
        t = with(with(t, "intermediate_size", cases[i].ffn), "num_key_value_heads", cases[i].kv);
        t = with(with(t, "num_attention_heads", cases[i].heads), "mamba_num_heads",
                 cases[i].mamba_heads);
        OK(load(&c, with(t, "mamba_head_dim", cases[i].head_dim)));
        cr_expect_eq(cq_config_params(&c), cases[i].params, "%s: %ld, wanted %ld", cases[i].pattern,
                     (long)cq_config_params(&c), (long)cases[i].params);
        cr_expect_eq(c.experts, 0, "keys of experts in a dense hybrid are not read");
    }
}

static const char *qwen_text(int layers, int hidden, int ffn, int heads, const char *tied) {
    static char text[2048];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(text, sizeof text, qwen, layers, hidden, ffn, heads, tied);
#pragma GCC diagnostic pop
    return text;
}

Test(config, qwen3_sizes_have_their_published_parameters) {
    static const struct {
        int hidden, ffn, layers, heads;
        const char *tied;
        int64_t params;
    } cases[] = {
        {1024, 3072, 28, 16, "true", 596049920},     {2048, 6144, 28, 16, "true", 1720574976},
        {2560, 9728, 36, 32, "true", 4022468096},    {4096, 12288, 36, 32, "false", 8190735360},
        {5120, 17408, 40, 40, "false", 14768307200}, {5120, 25600, 64, 64, "false", 32762123264},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cq_config c;
        OK(load(&c, qwen_text(cases[i].layers, cases[i].hidden, cases[i].ffn, cases[i].heads,
                              cases[i].tied)));
        cr_expect_eq(cq_config_params(&c), cases[i].params, "hidden %d: %ld, wanted %ld",
                     cases[i].hidden, (long)cq_config_params(&c), (long)cases[i].params);
        cr_expect(c.family == CQ_QWEN3 && c.rope_theta == 1e6 && c.pad == -1);
        cr_expect_eq(cq_config_count(&c, 'Q'), cases[i].layers);
    }
}

Test(config, an_alias_overrides_its_key) {
    static const char *const alias[][2] = {{"mamba_n_groups", "4"},
                                           {"mamba_d_conv", "3"},
                                           {"mamba_chunk_size", "64"},
                                           {"mamba_conv_bias", "false"}};
    cq_config c;
    const char *t = nano;
    for (int i = 0; i < 4; i++)
        t = with(t, alias[i][0], alias[i][1]);
    OK(load(&c, t));
    cr_expect(c.mamba_groups == 4 && c.conv_width == 3 && c.chunk == 64 && !c.conv_bias);
}

Test(config, a_convolution_without_bias_has_fewer_parameters) {
    cq_config c;
    OK(load(&c, with(nano, "use_conv_bias", "false")));
    cr_expect_eq(cq_config_params(&c), 31577937344 - 23 * 6144);
}

Test(config, the_list_of_layers_wins_over_the_string_and_the_count) {
    cq_config c;
    OK(load(&c,
            with(nano, "layers_block_type",
                 "[\"mamba\", \"linear_attention\", \"moe\", \"attention\", \"full_attention\", "
                 "\"mlp\"]")));
    cr_expect_eq(c.n_blocks, 6);
    cr_expect_str_eq(c.pattern, "MME**-");
}

Test(config, null_and_documented_defaults_are_understood) {
    cq_config c;
    OK(load(&c, with(nano, "num_key_value_heads", "null")));
    cr_expect_eq(c.kv_heads, c.heads);
    OK(load(&c, without(nano, "tie_word_embeddings")));
    cr_expect(!c.tied);
    OK(load(&c, without(nano, "bos_token_id")));
    cr_expect_eq(c.bos, -1);
    OK(load(&c, without(with(nano, "norm_eps", "1e-6"), "layer_norm_epsilon")));
    cr_expect_eq(c.norm_eps, 1e-6);
    OK(load(&c, with(nano, "time_step_limit", "[0.0, Infinity]")));
    OK(load(&c, with(nano, "time_step_limit", "[0.0, {\"__float__\": \"Infinity\"}]")));
    OK(load(&c, with(nano, "quantization_config", "{\"quant_method\": \"modelopt\"}")));
    OK(load(&c, with(without(qwen_text(2, 64, 96, 16, "true"), "rope_theta"), "rope_parameters",
                     "{\"rope_type\": \"default\", \"rope_theta\": 5e6}")));
    cr_expect_eq(c.rope_theta, 5e6);
}

/* The message must name the file, the key, and what is wanted. */
static void refused(const char *text, const char *key, const char *part) {
    cq_config c;
    cr_expect_eq(load(&c, text), CQ_EDATA, "%s was accepted", key);
    cr_expect(strstr(cq_error(), "config.json: ") && strstr(cq_error(), key) &&
                  strstr(cq_error(), part) && strstr(cq_error(), "wanted"),
              "%s: message is: %s", key, cq_error());
}

Test(config, what_is_not_supported_is_refused_by_name) {
    static const char *const cases[][3] = {
        {"rope_scaling", "{\"rope_type\": \"yarn\"}", "is {...}, wanted null (not supported)"},
        {"sliding_window", "4096", "is 4096, wanted null"},
        {"attention_bias", "true", "wanted false"},
        {"mlp_bias", "true", "wanted false"},
        {"use_bias", "true", "wanted false"},
        {"mamba_proj_bias", "true", "wanted false"},
        {"mlp_hidden_act", "\"silu\"", "wanted \"relu2\""},
        {"mamba_hidden_act", "\"gelu\"", "wanted \"silu\""},
        {"moe_latent_size", "1024", "is 1024"},
        {"num_nextn_predict_layers", "1", "is 1"},
        {"n_shared_experts", "2", "is 2"},
        {"time_step_limit", "[0.001, 0.1]", "is [...]"},
        {"model_type", "\"llama\"", "is \"llama\", wanted nemotron_h or qwen3"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(with(nano, cases[i][0], cases[i][1]), cases[i][0], cases[i][2]);
    const char *q = qwen_text(2, 64, 96, 16, "true");
    refused(with(q, "use_sliding_window", "true"), "use_sliding_window", "wanted false");
    refused(with(q, "hidden_act", "\"gelu\""), "hidden_act", "wanted \"silu\"");
    refused(with(q, "head_dim", "127"), "head_dim", "multiple of two");
    refused(with(q, "layer_types", "[\"full_attention\", \"sliding_attention\"]"), "layer_types",
            "sliding_attention");
    refused(with(q, "partial_rotary_factor", "0.5"), "partial_rotary_factor", "wanted 1");
}

Test(config, dimensions_that_do_not_fit_together_are_refused) {
    static const char *const cases[][3] = {
        {"hidden_size", "0", "is 0"},
        {"hidden_size", "-8", "is -8"},
        {"hidden_size", "2688.5", "is 2688.5"},
        {"hidden_size", "\"2688\"", "is \"2688\""},
        {"hidden_size", "4611686018427387904", "wanted an integer from 1"},
        {"vocab_size", "null", "is missing"},
        {"num_key_value_heads", "3", "multiple of num_key_value_heads"},
        {"n_groups", "7", "multiple of n_groups"},
        {"num_experts_per_tok", "129", "is 129"},
        {"n_group", "3", "multiple of n_group"},
        {"n_group", "128", "two experts"},
        {"topk_group", "2", "is 2"},
        {"layer_norm_epsilon", "0", "is 0"},
        {"layer_norm_epsilon", "-1e-5", "is -1"},
        {"routed_scaling_factor", "\"x\"", "is \"x\""},
        {"tie_word_embeddings", "1", "is 1, wanted true or false"},
        {"eos_token_id", "131072", "is 131072, wanted a token id below"},
        {"eos_token_id", "[]", "token id"},
        {"num_hidden_layers", "51", "is 51, wanted 52"},
        {"hybrid_override_pattern", "\"MEX\"", "letters M, E, *, -"},
        {"hybrid_override_pattern", "\"\"", "letters M, E, *, -"},
        {"layers_block_type", "[\"mamba\", \"rnn\"]", "is \"rnn\""},
        {"layers_block_type", "[]", "1 to 511"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(with(nano, cases[i][0], cases[i][1]), cases[i][0], cases[i][2]);
    refused(with(with(nano, "mamba_num_heads", "16384"), "mamba_head_dim", "16384"),
            "mamba_num_heads x mamba_head_dim", "at most");
    refused(with(with(nano, "n_routed_experts", "16384"), "moe_intermediate_size", "1048576"),
            "parameters", "at most");
    refused(with(with(nano, "n_group", "64"), "num_experts_per_tok", "6"), "num_experts_per_tok",
            "at most 2");
}

Test(config, a_missing_key_is_named) {
    static const char *const keys[] = {"model_type",
                                       "hidden_size",
                                       "vocab_size",
                                       "num_attention_heads",
                                       "num_key_value_heads",
                                       "head_dim",
                                       "mamba_num_heads",
                                       "mamba_head_dim",
                                       "n_groups",
                                       "ssm_state_size",
                                       "conv_kernel",
                                       "chunk_size",
                                       "n_routed_experts",
                                       "num_experts_per_tok",
                                       "moe_intermediate_size",
                                       "layer_norm_epsilon",
                                       "routed_scaling_factor",
                                       "max_position_embeddings",
                                       "hybrid_override_pattern"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *key = strcmp(keys[i], "layer_norm_epsilon") ? keys[i] : "norm_eps";
        refused(without(nano, keys[i]), key, "is missing");
    }
    refused(without(qwen_text(2, 64, 96, 16, "true"), "rope_theta"), "rope_theta", "is missing");
    refused(without(qwen_text(2, 64, 96, 16, "true"), "rms_norm_eps"), "rms_norm_eps",
            "is missing");
}

Test(config, broken_json_is_refused_with_its_line) {
    cq_config c;
    static const char *const texts[] = {
        "",     "{",   "[]",       "{\"a\": 1,\n \"a\": 2}",
        "null", "{}x", "\xff\xfe", "{\"model_type\": \"qw\\u0000\"}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        cr_expect_eq(load(&c, texts[i]), CQ_EDATA, "%s was accepted", texts[i]);
        cr_expect(strstr(cq_error(), "config.json: "), "message is: %s", cq_error());
    }
    cr_expect_eq(load(&c, "{\"model_type\": \"qwen3\",\n\n oops}"), CQ_EDATA);
    cr_expect(strstr(cq_error(), "line 3"), "message is: %s", cq_error());
    cr_expect_eq(cq_config_load(&c, "/nonexistent"), CQ_EIO);
}
