/// rules.c - which linear modules become NVFP4: presets, globs, and the reason for each one left
/// out.
///
/// Order of decision: kinds that never are, widths that cannot be, `exclude`, `include`, the
/// preset. Policy: a decision depends on the module's name and the block letters alone, so it can
/// be made before a byte of the checkpoint is read, and again by whoever reads the export.
#include "core/quant/rules.h"
#include "core/base/error.h"
#include <stdlib.h>
#include <string.h>

static const char *const presets[] = {"nemotron_nano", "qwen3", "all", "experts",
                                      "mlp",           "none",  NULL};

static bool match_one(const char *glob, size_t n, const char *name) {
    size_t i = 0;
    const char *star_name = NULL;
    size_t star = 0;
    while (*name) {
        if (i < n && glob[i] == '*') {
            star = ++i;
            star_name = name;
        } else if (i < n && (glob[i] == '?' || glob[i] == *name)) {
            i++;
            name++;
        } else if (star_name) { /* let the last star swallow one more */
            i = star;
            name = ++star_name;
        } else
            return false;
    }
    while (i < n && glob[i] == '*')
        i++;
    return i == n;
}

bool cq_glob_match(const char *globs, const char *name) {
    while (globs && *globs) {
        globs += strspn(globs, ", ");
        size_t n = strcspn(globs, ",");
        size_t used = n;
        while (n && globs[n - 1] == ' ')
            n--;
        if (n && match_one(globs, n, name))
            return true;
        globs += used;
    }
    return false;
}

static size_t distance(const char *a, const char *b) {
    size_t row[64], n = strlen(b);
    if (n >= sizeof row / sizeof *row)
        n = sizeof row / sizeof *row - 1;
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t change = diagonal + (a[i] != b[j]);
            size_t step = (row[j] < row[j + 1] ? row[j] : row[j + 1]) + 1;
            diagonal = row[j + 1];
            row[j + 1] = change < step ? change : step;
        }
    }
    return row[n];
}

int cq_quant_check(const cq_quant_options *o) {
    const char *near = presets[0];
    if (!o->preset)
        return cq_fail(CQ_EUSAGE,
                       "quantization: no preset, wanted one of nemotron_nano, qwen3, all, "
                       "experts, mlp, none");
    for (int i = 0; presets[i]; i++) {
        if (!strcmp(o->preset, presets[i]))
            return CQ_OK;
        if (distance(o->preset, presets[i]) < distance(o->preset, near))
            near = presets[i];
    }
    return cq_fail(
        CQ_EUSAGE,
        "quantization: preset \"%s\" is unknown, wanted nemotron_nano, qwen3, all, experts, "
        "mlp or none; nearest is %s",
        o->preset, near);
}

static bool ends(const char *name, const char *tail) {
    size_t n = strlen(name), t = strlen(tail);
    return n >= t && !strcmp(name + n - t, tail);
}

/* Block number of `...layers.<n>...`, or -1. */
static long block_of(const char *name, size_t n_blocks) {
    const char *at = strstr(name, "layers.");
    if (!at)
        return -1;
    char *end;
    long block = strtol(at + strlen("layers."), &end, 10);
    return *end == '.' && block >= 0 && (size_t)block < n_blocks ? block : -1;
}

/* True when the next attention block is reached before another Mamba block. */
static bool feeds_attention(const char *pattern, long block) {
    for (const char *p = pattern + block + 1; *p && *p != 'M'; p++)
        if (*p == '*')
            return true;
    return false;
}

static bool is_attention(const char *name) {
    return ends(name, ".q_proj") || ends(name, ".k_proj") || ends(name, ".v_proj") ||
           ends(name, ".o_proj");
}

static bool is_expert(const char *name) {
    return strstr(name, ".experts.") || strstr(name, ".shared_experts.");
}

/* What no preset and no pattern can quantize. */
static const char *never(const char *name) {
    if (ends(name, "lm_head"))
        return "head";
    if (strstr(name, "embed"))
        return "embedding";
    if (ends(name, "norm") || ends(name, "norm_f") || ends(name, "layernorm"))
        return "norm";
    if (ends(name, "conv1d"))
        return "convolution";
    if (ends(name, ".gate"))
        return "router";
    return ends(name, "_proj") ? NULL : "not a projection";
}

static const char *by_preset(const char *preset, const char *pattern, const char *name) {
    long block = block_of(name, strlen(pattern));
    char letter = block < 0 ? 0 : pattern[block];
    if (!strcmp(preset, "all") || !strcmp(preset, "qwen3"))
        return NULL;
    if (!strcmp(preset, "none"))
        return "preset none";
    if (!strcmp(preset, "nemotron_nano")) {
        if (letter == '*' && is_attention(name))
            return "attention block";
        if (letter == 'M' && feeds_attention(pattern, block))
            return "Mamba block before an attention block";
        return NULL;
    }
    if (is_expert(name))
        return NULL;
    if (!strcmp(preset, "experts"))
        return "not an expert";
    return strstr(name, ".mlp.") || letter == '-' ? NULL : "not an MLP";
}

const char *cq_quant_reason(const cq_quant_options *o, const char *pattern, const char *name,
                            int64_t k) {
    const char *why = never(name);
    if (why)
        return why;
    if (k <= 0 || k % 16)
        return "input width not a multiple of 16";
    if (cq_glob_match(o->exclude, name))
        return "excluded by pattern";
    if (cq_glob_match(o->include, name))
        return NULL;
    return by_preset(o->preset ? o->preset : "none", pattern, name);
}
