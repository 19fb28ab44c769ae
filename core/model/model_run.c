/// model_run.c - buffers of a forward and backward, and the passes themselves, block by block.
///
/// Recomputation runs a layer's forward again from its kept input right before its backward; the
/// same bits come out.
#include "core/base/error.h"
#include "core/base/process.h"
#include "core/model/model_impl.h"
#include "core/tensor/device.h"
#include <stdio.h>

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Per thread: the norms' partial sums, and what attention and SSD ask for. */
static int64_t scratch_bytes(const cq_config *c, int64_t longest) {
    int64_t bytes = 1 << 20;
    bytes = max64(bytes, 4 * max64(c->hidden, max64(c->intermediate, 3 * c->heads * c->head_dim)));
    if (cq_config_count(c, '*') + cq_config_count(c, 'Q') > 0)
        bytes = max64(bytes, cq_attention_scratch_bytes(longest, c->head_dim));
    if (cq_config_count(c, 'M') > 0)
        bytes =
            max64(bytes, cq_ssd_scratch_bytes(longest, c->chunk, c->mamba_heads, c->mamba_head_dim,
                                              c->mamba_groups, c->mamba_state));
    return (bytes + 63) / 64 * 64;
}

/* Both operands of the largest product in BF16: forward and input gradient read rows and weights,
 * the weight gradient two sets of rows. The head runs over chunks of tokens; a longer one, and what
 * does not fit otherwise, is rounded in pieces. */
static int64_t operand_bytes(int64_t rows, int64_t n, int64_t k, int64_t weights) {
    return 2 * max64(rows * (n + k), rows * max64(n, k) + weights);
}

enum { HEAD_ROWS = 1024 };

static int64_t bf16_bytes(const cq_model *m, int64_t tokens) {
    const cq_config *c = &m->config;
    int64_t bytes = operand_bytes(tokens < HEAD_ROWS ? tokens : HEAD_ROWS, c->vocab, c->hidden,
                                  c->vocab * c->hidden);
    for (int64_t i = 0; i < m->n_linears; i++) {
        const cq_linear *w = m->linear[i];
        int64_t rows = w->groups > 1 ? tokens * c->top_k : tokens;
        bytes = max64(bytes, operand_bytes(rows, w->n, w->k, w->n * w->k));
    }
    return bytes;
}

/* Columns of the widest input of a quantized linear that is no expert's. */
static int64_t widest_input(const cq_model *m) {
    int64_t k = 16;
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->act_quant && m->linear[i]->groups == 1)
            k = max64(k, m->linear[i]->k);
    return k;
}

/* Where activations are BF16 already, and weights have copies: the residual stream's gradient, the
 * head's rows and their gradients, a router's matrix or gradients, and a matrix in a calibration.
 * Products by expert round on their way. */
static int64_t bf16_bytes_between(const cq_model *m, int64_t tokens) {
    const cq_config *c = &m->config;
    int64_t rows = tokens < HEAD_ROWS ? tokens : HEAD_ROWS, wide = max64(c->hidden, c->experts);
    int64_t values = max64(rows * (c->vocab + c->hidden), tokens * wide + c->experts * c->hidden);
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->groups == 1 && m->linear[i]->quantized)
            values = max64(values, m->linear[i]->n * m->linear[i]->k);
    return 2 * (values + 16 * (tokens + c->hidden + c->experts)); /* rows end on 16 bytes */
}

/* What the operations of a device take beside the plan (cq_cuda_scratch): slopes and partial sums
 * of attention, states of the scan between chunks of 64, partial sums of a convolution and of
 * norms. Operands that are not where tensor cores want them are small change beside these. */
static int64_t device_scratch(const cq_model *m, int64_t tokens) {
    const cq_config *c = &m->config;
    bool back = m->env.mode != CQ_MODE_INFER, rounds = m->compute == CQ_COMPUTE_BF16;
    bool narrow = m->env.act == CQ_BF16;
    int64_t bytes = 4096 * (int64_t)c->hidden;
    if (cq_config_count(c, '*') + cq_config_count(c, 'Q') > 0) {
        int64_t q = tokens * c->heads * c->head_dim, kv = tokens * c->kv_heads * c->head_dim;
        int64_t group = c->heads / c->kv_heads, blocks = (tokens + 63) / 64 * c->kv_heads;
        int64_t parts = blocks < 1024 ? (1023 + blocks) / blocks : 1;
        int64_t of_keys =
            8 * kv * (parts < group ? parts : group); /* where a block has some heads */
        int64_t need = rounds && !narrow ? 4 * kv + (back ? 4 * q : 0) : 0;
        bytes = max64(bytes, need + (back ? 8 * (tokens + 64) * c->heads : 0) +
                                 (back && rounds && parts > 1 ? of_keys : 0));
    }
    if (cq_config_count(c, 'M') > 0) {
        int64_t chunks = tokens / 64, heads = c->mamba_heads, times = back ? 2 : 1;
        int64_t states = chunks * heads * c->mamba_state * c->mamba_head_dim;
        int64_t channels = heads * c->mamba_head_dim + 2 * c->mamba_groups * c->mamba_state;
        int64_t pairs = tokens * c->mamba_groups * 64;
        bytes = max64(bytes, 4 * times * (states + pairs) + 12 * heads * tokens +
                                 2 * chunks * (36 + 28 * heads));
        bytes = max64(bytes, back ? 4 * chunks * channels * (c->conv_width + 1) : 0);
    }
    return bytes;
}

static int plan_shared(cq_model *m, cq_plan *p, int64_t longest) {
    cq_dtype t = m->env.dtype;
    int64_t rows = m->env.tokens, dim = m->config.hidden;
    bool infer = m->env.mode == CQ_MODE_INFER;
    cq_purpose keep =
        CQ_FOR_ACTIVATIONS; /* never scratch: an evaluation runs two models in lock-step */
    for (int64_t i = 0; i <= (infer ? 0 : m->n_layers); i++)
        CQ_TRY(cq_plan_add(p, &m->h[i], keep, "residual stream", t, CQ_SHAPE2(rows, dim)));
    CQ_TRY(cq_plan_add(p, &m->xf, keep, "final hidden", t, CQ_SHAPE2(rows, dim)));
    CQ_TRY(cq_plan_add(p, &m->rstd_f, keep, "final rstd", t, CQ_SHAPE1(rows)));
    if (!infer)
        CQ_TRY(cq_plan_add(p, &m->dh, keep, "residual gradient", t, CQ_SHAPE2(rows, dim)));
    if (cq_plan_on_device(p)) {
        cq_plan_reserve(p, device_scratch(m, rows));
        CQ_TRY(cq_plan_add(p, &m->ids, keep, "token ids", CQ_I32, CQ_SHAPE1(rows)));
        CQ_TRY(cq_plan_add(p, &m->labels, keep, "labels", CQ_I32, CQ_SHAPE1(rows)));
        CQ_TRY(cq_plan_add(p, &m->positions, keep, "positions", CQ_I32, CQ_SHAPE1(rows)));
        CQ_TRY(cq_plan_add(p, &m->starts, keep, "document starts", CQ_I64, CQ_SHAPE1(rows + 1)));
    } else
        CQ_TRY(cq_plan_add(p, &m->kernel_scratch, CQ_FOR_SCRATCH, "kernel scratch", CQ_U8,
                           CQ_SHAPE2(m->threads, scratch_bytes(&m->config, longest))));
    if (cq_model_opened_bytes(m) > 0)
        CQ_TRY(cq_plan_add(p, &m->env.opened, CQ_FOR_SCRATCH, "opened weights", CQ_U8,
                           CQ_SHAPE1(cq_model_opened_bytes(m))));
    if (m->fp4 && m->copies == CQ_COPIES_PACKED)
        CQ_TRY(cq_plan_add(p, &m->env.x_codes, CQ_FOR_SCRATCH, "codes of inputs", CQ_U8,
                           CQ_SHAPE1(rows * widest_input(m) / 16 * 9)));
    if (m->compute == CQ_COMPUTE_BF16)
        CQ_TRY(cq_plan_add(
            p, &m->bf16_scratch, CQ_FOR_SCRATCH, "bf16 operands", CQ_U8,
            CQ_SHAPE1(m->env.act == CQ_BF16 ? bf16_bytes_between(m, rows) : bf16_bytes(m, rows))));
    return CQ_OK;
}

int cq_model_plan_apart(cq_model *m, cq_plan *p, int64_t tokens, int64_t moe_tokens,
                        int64_t longest, cq_mode mode, int threads) {
    if (tokens < 1 || longest < 1 || longest > tokens || threads < 1)
        return cq_fail(CQ_EUSAGE,
                       "plan: %ld tokens, longest document %ld, %d threads do not fit together",
                       (long)tokens, (long)longest, threads);
    bool rounds = m->compute == CQ_COMPUTE_BF16 && cq_plan_on_device(p) && m->env.dtype == CQ_F32;
    if (m->env.act == CQ_BF16 && !rounds)
        return cq_fail(CQ_EUSAGE, "plan: activations in BF16 want a device with BF16 products");
    m->env.mode = mode;
    m->env.tokens = max64(tokens, moe_tokens);
    m->env.longest = longest;
    m->threads = threads;
    CQ_TRY(plan_shared(m, p, longest));
    int64_t mark = cq_plan_mark(p, CQ_FOR_SCRATCH);
    for (int64_t i = 0; i < m->n_layers; i++) {
        m->env.tokens = m->layer[i].kind == 'E' ? moe_tokens : tokens;
        CQ_TRY(cq_layer_plan(&m->layer[i], p));
        if (i + 1 < m->n_layers)
            cq_plan_rewind(p, CQ_FOR_SCRATCH, mark);
    }
    m->env.tokens = max64(tokens, moe_tokens);
    return CQ_OK;
}

int cq_model_plan_work(cq_model *m, cq_plan *p, int64_t tokens, int64_t longest, cq_mode mode,
                       int threads) {
    return cq_model_plan_apart(m, p, tokens, tokens, longest, mode, threads);
}

void cq_model_bind_stream(cq_model *m, cq_stream *s) {
    s->scratch = m->kernel_scratch.data;
    s->scratch_bytes = m->kernel_scratch.shape.dim[1];
    s->bf16_scratch = m->bf16_scratch.data;
    s->bf16_scratch_bytes = m->bf16_scratch.data ? m->bf16_scratch.shape.dim[0] : 0;
    s->compute = m->compute;
    s->fp4 = m->fp4 && m->env.x_codes.data;
}

static int check_batch(const cq_model *m, const cq_batch *b) {
    if (b->tokens < 1 || b->tokens > m->env.tokens)
        return cq_fail(CQ_ESHAPE, "batch: %ld tokens, wanted 1 to the planned %ld", (long)b->tokens,
                       (long)m->env.tokens);
    for (int64_t i = 0; i < b->tokens; i++)
        if (b->ids[i] < 0 || b->ids[i] >= m->config.vocab)
            return cq_fail(CQ_EDATA, "batch: token id %d at position %ld, wanted below %ld",
                           b->ids[i], (long)i, (long)m->config.vocab);
    return CQ_OK;
}

/* Brings a batch to where the kernels run. */
int cq_model_send_batch(cq_model *m, const cq_batch *b) {
    m->now = *b;
    if (!m->ids.data)
        return CQ_OK;
    m->now.ids = m->ids.data;
    m->now.labels = m->labels.data;
    m->now.positions = m->positions.data;
    m->now.starts = m->starts.data;
    int64_t bytes = b->tokens * (int64_t)sizeof *b->ids;
    CQ_TRY(cq_copy(m->now.ids, b->ids, bytes));
    CQ_TRY(cq_copy(m->now.labels, b->labels, bytes));
    CQ_TRY(cq_copy(m->now.positions, b->positions, bytes));
    return cq_copy(m->now.starts, b->starts, (b->n_docs + 1) * (int64_t)sizeof *b->starts);
}

const cq_batch *cq_model_batch(const cq_model *m) { return &m->now; }

int cq_model_take_batch(cq_model *m, const cq_batch *b) {
    CQ_TRY(check_batch(m, b));
    return cq_model_send_batch(m, b);
}

bool cq_model_recordable(const cq_model *m) {
    return !m->streamed && !m->env.experts && !m->env.calibrating;
}

int cq_model_embed(cq_model *m, cq_stream *s) {
    cq_model_bind_stream(m, s);
    if (m->env.calibrating)
        CQ_TRY(cq_model_widen(m, s));
    return CQ_RUN(s, embed_forward, .dtype = m->env.dtype, .tokens = m->now.tokens,
                  .dim = m->config.hidden, .vocab = m->config.vocab, .ids = m->now.ids,
                  .table = m->embed->value.data, .h = m->h[0].data);
}

int cq_model_embed_forward(cq_model *m, cq_stream *s, const cq_batch *b) {
    CQ_TRY(cq_model_take_batch(m, b));
    return cq_model_embed(m, s);
}

/* Input and output buffer of a layer. */
static void *layer_in(const cq_model *m, int64_t i) {
    return m->env.mode == CQ_MODE_INFER ? m->h[0].data : m->h[i].data;
}

/* Puts the block before a message about numbers. */
static int in_block(int status, int64_t block, const char *pass) {
    char where[64];
    snprintf(where, sizeof where, "block %ld, %s", (long)block, pass);
    return status == CQ_ENUMERIC ? cq_fail_in(status, where) : status;
}

int cq_model_block_forward(cq_model *m, cq_stream *s, const cq_batch *b, int64_t block) {
    (void)b;
    CQ_TRY(cq_stop_check());
    cq_model_bind_stream(m, s);
    int status = m->streamed ? cq_model_block_in(m, s, block) : CQ_OK;
    for (int64_t i = m->first_layer[block]; i < m->first_layer[block + 1] && !status; i++)
        status = cq_layer_forward(&m->layer[i], s, &m->now, layer_in(m, i), layer_in(m, i + 1));
    int after = m->streamed ? cq_model_block_out(m, s, block) : CQ_OK;
    return in_block(status ? status : after, block, "forward");
}

const cq_tensor *cq_model_hidden(const cq_model *m, int64_t block) {
    return m->env.mode == CQ_MODE_INFER ? &m->h[0] : &m->h[m->first_layer[block + 1]];
}

int cq_model_norm_forward(cq_model *m, cq_stream *s, const cq_batch *b) {
    return CQ_RUN(s, rmsnorm_forward, .dtype = m->env.dtype, .rows = b->tokens,
                  .dim = m->config.hidden, .x = layer_in(m, m->n_layers),
                  .w = m->norm_f->value.data, .eps = m->config.norm_eps, .y = m->xf.data,
                  .rstd = m->rstd_f.data);
}

const cq_tensor *cq_model_final(const cq_model *m) { return &m->xf; }

int cq_model_head_forward(cq_model *m, cq_stream *s, const cq_tensor *xf, int64_t begin, int64_t n,
                          void *logits) {
    int64_t dim = m->config.hidden, vocab = m->config.vocab;
    const char *x = (const char *)xf->data + begin * dim * cq_dtype_bytes(m->env.dtype);
    return CQ_RUN(s, matmul, .dtype = m->env.dtype, .tb = true, .m = n, .n = vocab, .k = dim,
                  .a = x, .lda = dim, .b = cq_param_wide(m->head), .ldb = dim, .c = logits,
                  .ldc = vocab, .alpha = 1, .b16 = m->head->fq16.data);
}

int cq_model_forward(cq_model *m, cq_stream *s, const cq_batch *b) {
    CQ_TRY(cq_model_embed_forward(m, s, b));
    for (int64_t l = 0; l < m->config.n_blocks; l++)
        CQ_TRY(cq_model_block_forward(m, s, b, l));
    return cq_model_norm_forward(m, s, b);
}

int cq_model_norm_backward(cq_model *m, cq_stream *s, const cq_batch *b, const void *dxf) {
    cq_model_bind_stream(m, s);
    return CQ_RUN(s, rmsnorm_backward, .dtype = m->env.dtype, .rows = b->tokens,
                  .dim = m->config.hidden, .x = layer_in(m, m->n_layers),
                  .w = m->norm_f->value.data, .rstd = m->rstd_f.data, .dy = dxf, .dx = m->dh.data,
                  .dw = m->env.input_only ? NULL : m->norm_f->grad.data);
}

int cq_model_block_backward(cq_model *m, cq_stream *s, const cq_batch *b, int64_t block) {
    (void)b;
    CQ_TRY(cq_stop_check());
    for (int64_t i = m->first_layer[block + 1] - 1; i >= m->first_layer[block]; i--) {
        m->env.again = m->env.mode == CQ_MODE_RECOMPUTE;
        int status = m->env.again ? cq_layer_forward(&m->layer[i], s, &m->now, layer_in(m, i),
                                                     layer_in(m, i + 1))
                                  : CQ_OK;
        m->env.again = false;
        CQ_TRY(in_block(status, block, "forward again"));
        CQ_TRY(in_block(cq_layer_backward(&m->layer[i], s, &m->now, layer_in(m, i), m->dh.data),
                        block, "backward"));
    }
    return CQ_OK;
}

int cq_model_embed_backward(cq_model *m, cq_stream *s, const cq_batch *b) {
    if (!m->embed->grad.data || m->env.input_only)
        return CQ_OK;
    return CQ_RUN(s, embed_backward, .dtype = m->env.dtype, .tokens = b->tokens,
                  .dim = m->config.hidden, .vocab = m->config.vocab, .ids = m->now.ids,
                  .dh = m->dh.data, .dtable = m->embed->grad.data);
}

cq_tensor *cq_model_dhidden(cq_model *m) { return &m->dh; }

static int zero(cq_tensor t) { return t.data ? cq_zero(t.data, cq_tensor_bytes(t)) : CQ_OK; }

int cq_model_zero_round(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->held == m->linear[i]->groups)
            CQ_TRY(zero(m->linear[i]->grad));
    for (int64_t i = 0; i < m->n_params; i++)
        if (!cq_param_stacked(m, m->param[i]))
            CQ_TRY(zero(m->param[i]->grad));
    return CQ_OK;
}

int cq_model_zero_grad(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->held < m->linear[i]->groups)
            CQ_TRY(zero(m->linear[i]->grad));
    return cq_model_zero_round(m);
}
