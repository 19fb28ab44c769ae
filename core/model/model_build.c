/// model_build.c - the parameters and layers of a model under their published names
/// (models.md 2.9, 3.2).
///
/// Weights that read the same input are stacked into one matrix, unless the rules quantize only
/// some of them.
#include "core/base/error.h"
#include "core/model/model_impl.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The builder keeps its first failure, so that the tables below read without checks. */
typedef struct builder {
    cq_model *m;
    const cq_quant_options *o;
    int status;
    int32_t block;
    int64_t fuse;
    char prefix[64];
} builder;

static void *grow(builder *b, void *list, int64_t *cap, int64_t n) {
    if (n < *cap)
        return list;
    int64_t want = *cap ? 2 * *cap : 64;
    void *bigger = realloc(list, (size_t)want * sizeof(void *));
    if (!bigger) {
        b->status = cq_fail(CQ_ENOMEM, "model: no memory for its parameter list");
        return list;
    }
    *cap = want;
    return bigger;
}

static cq_param *add(builder *b, cq_shape shape, const char *format, ...) {
    cq_model *m = b->m;
    m->param = grow(b, m->param, &m->cap_params, m->n_params);
    cq_param *p = b->status ? NULL : calloc(1, sizeof *p);
    if (!p) {
        if (!b->status)
            b->status = cq_fail(CQ_ENOMEM, "model: no memory for its parameter list");
        return NULL;
    }
    *p = (cq_param){.shape = shape,
                    .disk = CQ_BF16,
                    .block = b->block,
                    .trainable = true,
                    .holder = -1,
                    .top = 448,
                    .lr_scale = 1};
    int at = snprintf(p->name, sizeof p->name, "%s", b->prefix);
    va_list args;
    va_start(args, format);
    vsnprintf(p->name + at, sizeof p->name - (size_t)at, format, args);
    va_end(args);
    if (b->o && cq_glob_match(b->o->freeze, p->name))
        p->trainable = false;
    m->param[m->n_params++] = p;
    return p;
}

void cq_module_name(char out[160], const char *weight, const char *suffix) {
    size_t n = strlen(weight);
    const char *tail = ".weight";
    if (n > strlen(tail) && !strcmp(weight + n - strlen(tail), tail))
        n -= strlen(tail);
    snprintf(out, 160, "%.*s%s", (int)n, weight, suffix);
}

/* Marks a matrix as linear and decides whether it is quantized. */
static cq_param *matrix(builder *b, cq_param *p) {
    if (!p)
        return NULL;
    char module[160], scale[160];
    p->linear = true;
    cq_module_name(module, p->name, "");
    cq_module_name(scale, p->name, ".weight_scale");
    if (b->m->nvfp4)
        p->reason =
            cq_safetensors_find(b->m->files, scale) ? NULL : "not quantized in its checkpoint";
    else
        p->reason = b->o ? cq_quant_reason(b->o, b->m->config.pattern, module, p->shape.dim[1])
                         : "not a quantized model";
    p->quantized = !p->reason;
    return p;
}

static bool has_input_scale(const builder *b, const cq_param *p) {
    if (!b->m->nvfp4)
        return !b->m->weights_only;
    char name[160];
    cq_module_name(name, p->name, ".input_scale");
    return cq_safetensors_find(b->m->files, name) != NULL;
}

/* One stack of n parameters of `groups` groups; all alike in quantization. */
static cq_linear *stack(builder *b, int64_t groups, int64_t n, cq_param **part) {
    cq_model *m = b->m;
    m->linear = grow(b, m->linear, &m->cap_linears, m->n_linears);
    if (b->status)
        return NULL;
    cq_linear *w = calloc(1, sizeof *w);
    if (w) {
        w->part = calloc((size_t)n, sizeof(cq_param *));
        w->amax_x = calloc((size_t)groups, sizeof(float));
    }
    if (!w || !w->part || !w->amax_x) {
        b->status = cq_fail(CQ_ENOMEM, "model: no memory for its layers");
        if (w) {
            free(w->part);
            free(w->amax_x);
        }
        free(w);
        return NULL;
    }
    w->groups = w->held = groups;
    w->n_parts = n;
    w->k = part[0]->shape.dim[1];
    w->quantized = part[0]->quantized;
    for (int64_t i = 0; i < n; i++) {
        w->part[i] = part[i];
        w->n += part[i]->shape.dim[0];
        if (part[i]->quantized)
            part[i]->amax_x = &w->amax_x[groups > 1 ? i : 0];
    }
    w->n /= groups;
    w->act_quant = w->quantized && has_input_scale(b, part[0]);
    m->linear[m->n_linears++] = w;
    return w;
}

/* Weights of one input: one stack when the rules treat them alike, else one each. Those quantized
 * share scales. */
static int inputs(builder *b, cq_linear **out, int n, cq_param **part) {
    bool alike = true;
    if (b->status)
        return 0;
    for (int i = 1; i < n; i++)
        alike = alike && part[i]->quantized == part[0]->quantized;
    b->fuse++;
    for (int i = 0; i < n; i++)
        if (n > 1 && part[i]->quantized)
            part[i]->fuse = b->fuse;
    if (alike) {
        out[0] = stack(b, 1, n, part);
        return 1;
    }
    for (int i = 0; i < n; i++)
        out[i] = stack(b, 1, 1, &part[i]);
    return n;
}

static cq_linear *single(builder *b, cq_param *p) { return b->status ? NULL : stack(b, 1, 1, &p); }

static cq_linear *experts(builder *b, const char *which, int64_t rows, int64_t cols) {
    int64_t n = b->m->config.experts;
    cq_param **part = calloc((size_t)n, sizeof(cq_param *));
    if (!part) {
        b->status = cq_fail(CQ_ENOMEM, "model: no memory for its experts");
        return NULL;
    }
    for (int64_t e = 0; e < n && !b->status; e++) {
        part[e] =
            matrix(b, add(b, CQ_SHAPE2(rows, cols), "mixer.experts.%ld.%s.weight", (long)e, which));
        if (part[e] && part[e]->quantized != part[0]->quantized)
            b->status = cq_fail(CQ_EUSAGE,
                                "quantization: %s of block %d is quantized for some experts only, "
                                "wanted all or none",
                                which, (int)b->block);
    }
    cq_linear *w = b->status ? NULL : stack(b, n, n, part);
    free(part);
    return w;
}

static void build_mamba(builder *b, cq_layer *l) {
    const cq_config *c = &b->m->config;
    int64_t inner = c->mamba_heads * c->mamba_head_dim;
    int64_t conv = inner + 2 * c->mamba_groups * c->mamba_state;
    l->in[0] = single(b, matrix(b, add(b, CQ_SHAPE2(inner + conv + c->mamba_heads, c->hidden),
                                       "mixer.in_proj.weight")));
    l->n_in = 1;
    l->conv_w = add(b, CQ_SHAPE3(conv, 1, c->conv_width), "mixer.conv1d.weight");
    if (c->conv_bias)
        l->conv_b = add(b, CQ_SHAPE1(conv), "mixer.conv1d.bias");
    l->a_log = add(b, CQ_SHAPE1(c->mamba_heads), "mixer.A_log");
    l->d = add(b, CQ_SHAPE1(c->mamba_heads), "mixer.D");
    l->dt_bias = add(b, CQ_SHAPE1(c->mamba_heads), "mixer.dt_bias");
    l->gated_norm = add(b, CQ_SHAPE1(inner), "mixer.norm.weight");
    l->out = single(b, matrix(b, add(b, CQ_SHAPE2(c->hidden, inner), "mixer.out_proj.weight")));
}

static void build_moe(builder *b, cq_layer *l) {
    const cq_config *c = &b->m->config;
    l->gate = add(b, CQ_SHAPE2(c->experts, c->hidden), "mixer.gate.weight");
    l->bias = add(b, CQ_SHAPE1(c->experts), "mixer.gate.e_score_correction_bias");
    if (l->bias) {
        l->bias->buffer = true;
        l->bias->trainable = false;
        l->bias->disk = CQ_F32;
    }
    l->in[0] = experts(b, "up_proj", c->moe_intermediate, c->hidden);
    l->n_in = 1;
    l->out = experts(b, "down_proj", c->hidden, c->moe_intermediate);
    if (c->shared_intermediate > 0) {
        l->shared_up = single(b, matrix(b, add(b, CQ_SHAPE2(c->shared_intermediate, c->hidden),
                                               "mixer.shared_experts.up_proj.weight")));
        l->shared_down = single(b, matrix(b, add(b, CQ_SHAPE2(c->hidden, c->shared_intermediate),
                                                 "mixer.shared_experts.down_proj.weight")));
    }
}

/* `mixer.` of nemotron_h or `self_attn.` of qwen3. */
static void build_attention(builder *b, cq_layer *l, const char *where) {
    const cq_config *c = &b->m->config;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    cq_param *part[3];
    part[0] = matrix(b, add(b, CQ_SHAPE2(q, c->hidden), "%sq_proj.weight", where));
    part[1] = matrix(b, add(b, CQ_SHAPE2(kv, c->hidden), "%sk_proj.weight", where));
    part[2] = matrix(b, add(b, CQ_SHAPE2(kv, c->hidden), "%sv_proj.weight", where));
    l->n_in = inputs(b, l->in, 3, part);
    l->out = single(b, matrix(b, add(b, CQ_SHAPE2(c->hidden, q), "%so_proj.weight", where)));
    if (c->family == CQ_QWEN3) {
        l->q_norm = add(b, CQ_SHAPE1(c->head_dim), "%sq_norm.weight", where);
        l->k_norm = add(b, CQ_SHAPE1(c->head_dim), "%sk_norm.weight", where);
    }
}

static void build_nemotron_layer(builder *b, cq_layer *l, char kind) {
    const cq_config *c = &b->m->config;
    l->kind = kind;
    l->norm = add(b, CQ_SHAPE1(c->hidden), "norm.weight");
    if (kind == 'M')
        build_mamba(b, l);
    else if (kind == 'E')
        build_moe(b, l);
    else if (kind == '*')
        build_attention(b, l, "mixer.");
    else {
        l->in[0] = single(
            b, matrix(b, add(b, CQ_SHAPE2(c->intermediate, c->hidden), "mixer.up_proj.weight")));
        l->n_in = 1;
        l->out = single(
            b, matrix(b, add(b, CQ_SHAPE2(c->hidden, c->intermediate), "mixer.down_proj.weight")));
    }
}

static void build_qwen_block(builder *b, cq_layer *attention, cq_layer *mlp) {
    const cq_config *c = &b->m->config;
    attention->kind = '*';
    attention->norm = add(b, CQ_SHAPE1(c->hidden), "input_layernorm.weight");
    build_attention(b, attention, "self_attn.");
    mlp->kind = 'S';
    mlp->norm = add(b, CQ_SHAPE1(c->hidden), "post_attention_layernorm.weight");
    cq_param *part[2];
    part[0] = matrix(b, add(b, CQ_SHAPE2(c->intermediate, c->hidden), "mlp.gate_proj.weight"));
    part[1] = matrix(b, add(b, CQ_SHAPE2(c->intermediate, c->hidden), "mlp.up_proj.weight"));
    mlp->n_in = inputs(b, mlp->in, 2, part);
    mlp->out =
        single(b, matrix(b, add(b, CQ_SHAPE2(c->hidden, c->intermediate), "mlp.down_proj.weight")));
}

static int allocate_layers(cq_model *m) {
    const cq_config *c = &m->config;
    int per_block = c->family == CQ_QWEN3 ? 2 : 1;
    m->n_layers = c->n_blocks * per_block;
    m->layer = calloc((size_t)m->n_layers, sizeof *m->layer);
    m->first_layer = calloc((size_t)c->n_blocks + 1, sizeof *m->first_layer);
    m->h = calloc((size_t)m->n_layers + 1, sizeof *m->h);
    if (!m->layer || !m->first_layer || !m->h)
        return cq_fail(CQ_ENOMEM, "model: no memory for %ld layers", (long)m->n_layers);
    for (int64_t i = 0; i <= c->n_blocks; i++)
        m->first_layer[i] = i * per_block;
    for (int64_t i = 0; i < m->n_layers; i++) {
        m->layer[i].block = (int32_t)(i / per_block);
        m->layer[i].env = &m->env;
    }
    return CQ_OK;
}

int cq_model_build(cq_model *m, const cq_quant_options *o) {
    const cq_config *c = &m->config;
    builder b = {.m = m, .o = o, .block = -1};
    bool qwen = c->family == CQ_QWEN3;
    m->env.config = c;
    CQ_TRY(allocate_layers(m));
    m->embed = add(&b, CQ_SHAPE2(c->vocab, c->hidden),
                   qwen ? "model.embed_tokens.weight" : "backbone.embeddings.weight");
    for (int32_t i = 0; i < c->n_blocks && !b.status; i++) {
        b.block = i;
        snprintf(b.prefix, sizeof b.prefix, qwen ? "model.layers.%d." : "backbone.layers.%d.",
                 (int)i);
        cq_layer *l = &m->layer[m->first_layer[i]];
        if (qwen)
            build_qwen_block(&b, l, l + 1);
        else
            build_nemotron_layer(&b, l, c->pattern[i]);
    }
    b.block = -1;
    b.prefix[0] = 0;
    m->norm_f =
        add(&b, CQ_SHAPE1(c->hidden), qwen ? "model.norm.weight" : "backbone.norm_f.weight");
    m->head = c->tied ? m->embed : add(&b, CQ_SHAPE2(c->vocab, c->hidden), "lm_head.weight");
    if (m->head && !c->tied) {
        m->head->linear = true;
        m->head->reason = "head";
    }
    return b.status;
}
