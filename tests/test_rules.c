/* test_rules.c - which modules are quantized: the published list of Nemotron 3 Nano, presets,
 * globs. */
#include "core/ckaqad.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static const char nano[] = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME";

static const char *reason(const char *preset, const char *pattern, const char *name) {
    return cq_quant_reason(&(cq_quant_options){.preset = preset}, pattern, name, 2688);
}

static bool quantized(const char *preset, const char *pattern, int block, const char *part) {
    char name[160];
    snprintf(name, sizeof name, "backbone.layers.%d.mixer.%s", block, part);
    return !reason(preset, pattern, name);
}

static int count(const char *preset, const char *pattern, int block) {
    static const char *const parts[] = {"in_proj",
                                        "out_proj",
                                        "q_proj",
                                        "k_proj",
                                        "v_proj",
                                        "o_proj",
                                        "shared_experts.up_proj",
                                        "shared_experts.down_proj",
                                        "up_proj",
                                        "down_proj"};
    static const char kind[] = "MM****EE--";
    int n = 0;
    for (int i = 0; i < 10; i++)
        n += kind[i] == pattern[block] && quantized(preset, pattern, block, parts[i]);
    for (int e = 0; e < 128 && pattern[block] == 'E'; e++) {
        char part[64];
        snprintf(part, sizeof part, "experts.%d.up_proj", e);
        n += quantized(preset, pattern, block, part);
        snprintf(part, sizeof part, "experts.%d.down_proj", e);
        n += quantized(preset, pattern, block, part);
    }
    return n;
}

Test(rules, nemotron_nano_quantizes_the_published_5968_matrices) {
    /* nvfp4.md 6.1: the Mamba block before each attention block, and the attention blocks, stay in
     * BF16 */
    static const int high[] = {4, 5, 11, 12, 18, 19, 25, 26, 32, 33, 41, 42};
    int total = 0, next = 0;
    for (int i = 0; i < 52; i++) {
        int n = count("nemotron_nano", nano, i);
        bool listed = next < 12 && high[next] == i;
        next += listed;
        cr_expect_eq(n == 0, listed, "block %d (%c): %d quantized matrices", i, nano[i], n);
        total += n;
    }
    cr_expect_eq(total, 5968);
}

Test(rules, nemotron_nano_says_why) {
    cr_expect_str_eq(reason("nemotron_nano", nano, "backbone.layers.5.mixer.k_proj"),
                     "attention block");
    cr_expect_str_eq(reason("nemotron_nano", nano, "backbone.layers.41.mixer.in_proj"),
                     "Mamba block before an attention block");
    cr_expect_null(reason("nemotron_nano", nano, "backbone.layers.39.mixer.in_proj"));
}

Test(rules, the_nearest_mamba_block_counts_whatever_stands_between) {
    const char *pattern = "MME-*MM";
    static const bool kept[] = {true, false, true, true, false, true, true};
    for (int i = 0; i < 7; i++)
        if (pattern[i] == 'M')
            cr_expect_eq(quantized("nemotron_nano", pattern, i, "out_proj"), kept[i], "block %d",
                         i);
    cr_expect(quantized("nemotron_nano", "*M", 1, "in_proj"), "nothing follows it");
    /* two attention blocks in a row share one Mamba block */
    cr_expect(!quantized("nemotron_nano", "MM**", 1, "in_proj"));
    cr_expect(quantized("nemotron_nano", "MM**", 0, "in_proj"));
}

Test(rules, some_kinds_are_never_quantized) {
    static const char *const cases[][2] = {
        {"lm_head", "head"},
        {"backbone.embeddings", "embedding"},
        {"model.embed_tokens", "embedding"},
        {"backbone.norm_f", "norm"},
        {"backbone.layers.0.norm", "norm"},
        {"backbone.layers.0.mixer.norm", "norm"},
        {"model.layers.0.self_attn.q_norm", "norm"},
        {"model.layers.0.post_attention_layernorm", "norm"},
        {"backbone.layers.0.mixer.conv1d", "convolution"},
        {"backbone.layers.1.mixer.gate", "router"},
    };
    cq_quant_options o = {.preset = "all", .include = "*"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_expect_str_eq(cq_quant_reason(&o, nano, cases[i][0], 2688), cases[i][1], "%s",
                         cases[i][0]);
    cr_expect_str_eq(cq_quant_reason(&o, nano, "backbone.layers.0.mixer.in_proj", 2680),
                     "input width not a multiple of 16");
}

Test(rules, presets_choose_by_kind) {
    const char *pattern = "ME*-";
    static const struct {
        const char *preset, *name;
        bool quantized;
    } cases[] = {
        {"all", "backbone.layers.0.mixer.in_proj", true},
        {"all", "backbone.layers.2.mixer.q_proj", true},
        {"experts", "backbone.layers.1.mixer.experts.7.up_proj", true},
        {"experts", "backbone.layers.1.mixer.shared_experts.down_proj", true},
        {"experts", "backbone.layers.3.mixer.up_proj", false},
        {"experts", "backbone.layers.0.mixer.in_proj", false},
        {"mlp", "backbone.layers.1.mixer.experts.7.up_proj", true},
        {"mlp", "backbone.layers.3.mixer.down_proj", true},
        {"mlp", "backbone.layers.0.mixer.out_proj", false},
        {"mlp", "backbone.layers.2.mixer.o_proj", false},
        {"nemotron_nano", "backbone.layers.3.mixer.up_proj", true},
        {"none", "backbone.layers.1.mixer.experts.7.up_proj", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_expect_eq(!reason(cases[i].preset, pattern, cases[i].name), cases[i].quantized, "%s %s",
                     cases[i].preset, cases[i].name);
    cr_expect_null(reason("qwen3", "QQ", "model.layers.1.self_attn.k_proj"));
    cr_expect_null(reason("mlp", "QQ", "model.layers.1.mlp.gate_proj"));
    cr_expect_not_null(reason("mlp", "QQ", "model.layers.1.self_attn.k_proj"));
}

Test(rules, exclude_wins_over_include_and_include_over_the_preset) {
    cq_quant_options o = {
        .preset = "experts", .include = "*.q_proj, *.k_proj", .exclude = "*.0.*,*k_proj"};
    cr_expect_null(cq_quant_reason(&o, "**E", "backbone.layers.1.mixer.q_proj", 64));
    cr_expect_str_eq(cq_quant_reason(&o, "**E", "backbone.layers.1.mixer.k_proj", 64),
                     "excluded by pattern");
    cr_expect_str_eq(cq_quant_reason(&o, "**E", "backbone.layers.2.mixer.experts.0.up_proj", 64),
                     "excluded by pattern");
    cr_expect_str_eq(cq_quant_reason(&o, "**E", "backbone.layers.1.mixer.o_proj", 64),
                     "not an expert");
}

Test(rules, globs_match_stars_and_question_marks) {
    cr_expect(cq_glob_match("*", "anything"));
    cr_expect(cq_glob_match("a*c", "abbc"));
    cr_expect(cq_glob_match("a*b*c", "a.b.b.c"));
    cr_expect(cq_glob_match("layers.?.x", "layers.3.x"));
    cr_expect(cq_glob_match("no, yes ", "yes"));
    cr_expect(!cq_glob_match("layers.?.x", "layers.13.x"));
    cr_expect(!cq_glob_match("a*c", "abbcd"));
    cr_expect(!cq_glob_match("abc", "ab"));
    cr_expect(!cq_glob_match("ab", "abc"));
    cr_expect(!cq_glob_match("", "a"));
    cr_expect(!cq_glob_match(",,", ""));
    cr_expect(!cq_glob_match(NULL, "a"));
}

Test(rules, an_unknown_preset_is_answered_with_the_nearest) {
    cr_expect_eq(cq_quant_check(&(cq_quant_options){.preset = "nemotron_nano"}), CQ_OK);
    cr_expect_eq(cq_quant_check(&(cq_quant_options){.preset = "expert"}), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "nearest is experts"), "message is: %s", cq_error());
    cr_expect_eq(cq_quant_check(&(cq_quant_options){.preset = "nemotron-nano"}), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "nearest is nemotron_nano"), "message is: %s", cq_error());
    cr_expect_eq(cq_quant_check(&(cq_quant_options){.preset = NULL}), CQ_EUSAGE);
}
