/// ptq.c - quantizing a checkpoint block by block: what calibration and export do with a whole
/// model, in the memory of one block.
///
///     unit 0           embedding; its rows of the documents become the residual stream, a file
///     unit 1 ... L     block u - 1: weights in, maxima, codes out; its input maxima while all
///                      documents pass it, from one file of the residual stream into the other
///     unit L + 1       final norm and head
///
/// Of a mixture of experts two matrices are in memory at a time: tokens are routed first, then each
/// expert takes its rows. Tokens pass it in windows; only the first writes codes.
#include "core/model/ptq.h"
#include "core/base/error.h"
#include "core/base/process.h"
#include "core/model/export_impl.h"
#include "core/model/ptq_impl.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static bool quantizes_inputs(const cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->act_quant)
            return true;
    return false;
}

static const cq_linear *linear_of(const cq_model *m, const cq_param *p) {
    for (int64_t i = 0; i < m->n_linears; i++) /* blocks ascend in both lists */
        for (int64_t k = 0; m->linear[i]->part[0]->block == p->block && k < m->linear[i]->n_parts;
             k++)
            if (m->linear[i]->part[k] == p)
                return m->linear[i];
    return NULL;
}

static int announce(cq_ptq *q, const cq_param *p, const char *suffix, cq_dtype dtype,
                    cq_shape shape) {
    char name[160];
    snprintf(name, sizeof name, "%s", p->name);
    if (suffix)
        cq_module_name(name, p->name, suffix);
    CQ_TRY(cq_st_writer_announce(q->writer, name, dtype, shape));
    q->facts.tensors++;
    q->facts.bytes += cq_tensor_bytes((cq_tensor){NULL, shape, dtype});
    return CQ_OK;
}

static int announce_quantized(cq_ptq *q, const cq_param *p) {
    int64_t n = p->shape.dim[0], k = p->shape.dim[1];
    cq_shape one = {{0}, 0};
    CQ_TRY(announce(q, p, ".weight", CQ_U8, CQ_SHAPE2(n, k / 2)));
    CQ_TRY(announce(q, p, ".weight_scale", CQ_F8_E4M3, CQ_SHAPE2(n, k / 16)));
    CQ_TRY(announce(q, p, ".weight_scale_2", CQ_F32, one));
    return linear_of(q->m, p)->act_quant ? announce(q, p, ".input_scale", CQ_F32, one) : CQ_OK;
}

static int lay_out(cq_ptq *q) {
    const cq_model *m = q->m;
    CQ_TRY(cq_st_writer_open(&q->writer));
    CQ_TRY(cq_st_writer_metadata(q->writer, "format", "pt"));
    CQ_TRY(cq_st_writer_metadata(q->writer, "producer", "ckaqad"));
    for (int64_t i = 0; i < m->n_params; i++) {
        const cq_param *p = m->param[i];
        const cq_entry *e = cq_model_entry(m->teacher, p->name);
        q->facts.source_bytes += cq_tensor_bytes(e->tensor);
        CQ_TRY(p->quantized ? announce_quantized(q, p) : announce(q, p, NULL, p->disk, p->shape));
    }
    return CQ_OK;
}

static int check_student(const cq_model *m, const cq_ptq_options *o) {
    if (!m->teacher || !m->teacher->files)
        return cq_fail(CQ_EUSAGE, "ptq: %s is no student of a checkpoint with weights", m->dir);
    if (m->env.dtype != CQ_F32)
        return cq_fail(CQ_EUSAGE, "ptq: the model computes in %s, wanted F32",
                       cq_dtype_name(m->env.dtype));
    if (quantizes_inputs(m) && o->n_batches < 1)
        return cq_fail(CQ_EUSAGE,
                       "ptq: no documents to calibrate on, wanted some, or weights only (then "
                       "inputs stay as they are)");
    return CQ_OK;
}

static int fill_in(cq_ptq *q, const cq_ptq_options *o) {
    cq_model *m = q->m;
    size_t n = strlen(o->dir);
    while (n > 1 && o->dir[n - 1] == '/')
        n--;
    if (!n || n > 3700)
        return cq_fail(CQ_EUSAGE, "ptq: path of %ld bytes, wanted 1 to 3700", (long)n);
    q->dir = strndup(o->dir, n);
    q->partial = malloc(n + 16);
    q->own = calloc((size_t)m->n_params + 1, sizeof *q->own);
    q->batches = calloc((size_t)max64(1, o->n_batches), sizeof *q->batches);
    if (!q->dir || !q->partial || !q->own || !q->batches)
        return cq_fail(CQ_ENOMEM, "ptq: no memory to open %s", o->dir);
    snprintf(q->partial, n + 16, "%s.partial", q->dir);
    q->calibrates = quantizes_inputs(m);
    for (int64_t i = 0; i < o->n_batches && q->calibrates; i++) {
        q->batches[i] = o->batches[i];
        q->facts.tokens += o->batches[i]->tokens;
    }
    q->facts.units = m->config.n_blocks + 2;
    CQ_TRY(cq_model_alone(m));
    CQ_TRY(cq_export_check(m, q->dir, true));
    CQ_TRY(lay_out(q));
    q->forgets = q->facts.source_bytes > cq_memory_available() / 2;
    return CQ_OK;
}

int cq_ptq_open(cq_ptq **out, cq_model *student, const cq_ptq_options *o) {
    *out = NULL;
    CQ_TRY(cq_export_quantized(student));
    CQ_TRY(check_student(student, o));
    cq_ptq *q = calloc(1, sizeof *q);
    if (!q)
        return cq_fail(CQ_ENOMEM, "ptq: no memory to open %s", o->dir);
    q->m = student;
    q->o = *o;
    q->journal = q->activation[0] = q->activation[1] = q->activation[2] = -1;
    int status = fill_in(q, o);
    if (status) {
        cq_ptq_close(q);
        return status;
    }
    *out = q;
    return CQ_OK;
}

static void close_files(cq_ptq *q) {
    int *fd[] = {&q->journal, &q->activation[0], &q->activation[1], &q->activation[2]};
    for (int i = 0; i < 4; i++) {
        if (*fd[i] >= 0)
            close(*fd[i]);
        *fd[i] = -1;
    }
    cq_st_folder_close(q->out);
    q->out = NULL;
}

void cq_ptq_close(cq_ptq *q) {
    if (!q)
        return;
    cq_ptq_save_wait(q);
    close_files(q);
    cq_st_writer_close(q->writer);
    free(q->batches);
    free(q->own);
    free(q->partial);
    free(q->dir);
    free(q);
}

void cq_ptq_facts_get(const cq_ptq *q, cq_ptq_facts *facts) { *facts = q->facts; }

/* Tokens whose rows in all experts of a layer take half a GiB. */
static int64_t choose_window(const cq_ptq *q) {
    const cq_config *c = &q->m->config;
    int64_t row = 4 * c->top_k * 2 * (c->hidden + c->moe_intermediate) +
                  4 * (3 * c->hidden + 2 * c->shared_intermediate);
    int64_t n = q->o.moe_tokens > 0 ? q->o.moe_tokens : max64(64, ((int64_t)1 << 29) / row);
    return min64(n, q->facts.tokens);
}

static int plan_stack(cq_plan *plan, cq_linear *w) {
    int64_t rows = w->groups > 1 ? w->n : w->groups * w->n; /* of experts: one */
    if (w->quantized)
        CQ_TRY(cq_plan_add(plan, &w->amax, CQ_FOR_FAKEQUANT, w->part[0]->name, CQ_F32,
                           CQ_SHAPE1(w->groups)));
    return cq_plan_add(plan, &w->value, CQ_FOR_TEACHER, w->part[0]->name, CQ_F32,
                       CQ_SHAPE2(rows, w->k));
}

static int plan_block(const cq_model *m, cq_plan *plan, int32_t block) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->part[0]->block == block)
            CQ_TRY(plan_stack(plan, m->linear[i]));
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        if (p->block == block && !p->linear)
            CQ_TRY(cq_plan_add(plan, &p->value, CQ_FOR_TEACHER, p->name, CQ_F32, p->shape));
    }
    return CQ_OK;
}

static int plan_calibration(cq_ptq *q, cq_plan *plan, int threads) {
    cq_model *m = q->m;
    int64_t tokens = 1, longest = 1;
    for (int64_t i = 0; i < q->o.n_batches; i++) {
        const cq_batch *b = q->batches[i];
        tokens = max64(tokens, b->tokens);
        for (int64_t d = 0; d < b->n_docs; d++)
            longest = max64(longest, b->starts[d + 1] - b->starts[d]);
    }
    q->moe_tokens = choose_window(q);
    CQ_TRY(cq_model_plan_apart(m, plan, tokens, q->moe_tokens, longest, CQ_MODE_INFER, threads));
    int64_t at = cq_plan_mark(plan, CQ_FOR_TEACHER);
    for (int32_t l = 0; l < m->config.n_blocks; l++) {
        cq_plan_rewind(plan, CQ_FOR_TEACHER, at);
        CQ_TRY(plan_block(m, plan, l));
    }
    return CQ_OK;
}

int cq_ptq_plan(cq_ptq *q, cq_plan *plan, int threads) {
    if (cq_plan_on_device(plan))
        return cq_fail(CQ_EUSAGE, "ptq: the plan lies on a device, wanted the host's memory");
    q->threads = threads;
    if (q->calibrates)
        CQ_TRY(plan_calibration(q, plan, threads));
    return cq_plan_add(plan, &q->workers, CQ_FOR_SCRATCH, "windows", CQ_U8,
                       CQ_SHAPE2(threads, cq_ptq_worker_bytes()));
}

/* Points parameters into the windows; all experts of a stack into the same one. */
static void bind(cq_model *m) {
    for (int64_t i = 0; i < m->n_linears; i++) {
        cq_linear *w = m->linear[i];
        int64_t row = 0;
        for (int64_t k = 0; k < w->n_parts && w->value.data; k++) {
            cq_param *p = w->part[k];
            p->value = cq_tensor_rows(w->value, w->groups > 1 ? 0 : row, p->shape.dim[0]);
            row += p->shape.dim[0];
        }
        w->fq = w->value;
    }
}

int cq_ptq_begin(cq_ptq *q) {
    if (!q->workers.data)
        return cq_fail(CQ_EUSAGE, "ptq: begun before its plan was committed");
    bind(q->m);
    CQ_TRY(cq_ptq_journal_open(q));
    CQ_TRY(cq_st_folder_open(&q->out, q->writer, q->partial, q->o.shard_bytes));
    q->facts.shards = cq_st_folder_shards(q->out);
    return CQ_OK;
}

static bool is_expert(const cq_layer *l, const cq_param *p) {
    for (int k = 0; k < 2 && l->kind == 'E'; k++)
        for (int64_t e = 0; e < (k ? l->out : l->in[0])->n_parts; e++)
            if ((k ? l->out : l->in[0])->part[e] == p)
                return true;
    return false;
}

/* Every parameter of a block, or of none (-1), but those of experts when they are apart: into its
 * window when there is one, and out. */
static int pass_params(cq_ptq *q, int32_t block, bool experts_apart) {
    cq_model *m = q->m;
    const cq_layer *l = block < 0 ? NULL : &m->layer[m->first_layer[block]];
    for (int step = 0; step < 2; step++) {
        for (int64_t i = 0; i < m->n_params; i++) {
            cq_param *p = m->param[i];
            if (p->block != block || (block < 0 && p == m->embed) ||
                (experts_apart && is_expert(l, p)))
                continue;
            if (!p->quantized && !step)
                CQ_TRY(cq_ptq_copy(q, i, p->value.data));
            else if (p->quantized)
                CQ_TRY(step ? cq_ptq_pack(q, i) : cq_ptq_read(q, i, p->value.data));
        }
        if (!step && block >= 0)
            cq_model_unite(m, block);
    }
    return CQ_OK;
}

static int64_t index_of(const cq_model *m, const cq_param *p) {
    int64_t i = 0;
    while (m->param[i] != p)
        i++;
    return i;
}

/* Unit 0. */
static int embed(cq_ptq *q) {
    cq_model *m = q->m;
    const cq_entry *e = cq_model_entry(m->teacher, m->embed->name);
    int64_t dim = m->config.hidden, row = 0, wide = dim * cq_dtype_bytes(e->tensor.dtype);
    for (int64_t i = 0; i < q->o.n_batches && q->calibrates; i++) {
        const cq_batch *b = q->batches[i];
        float *h = m->h[0].data;
        for (int64_t t = 0; t < b->tokens; t++) {
            if (b->ids[t] < 0 || b->ids[t] >= m->config.vocab)
                return cq_fail(CQ_EDATA, "batch: token id %d at position %ld, wanted below %ld",
                               b->ids[t], (long)t, (long)m->config.vocab);
            CQ_TRY(cq_convert(h + t * dim, CQ_F32, (char *)e->tensor.data + b->ids[t] * wide,
                              e->tensor.dtype, dim));
        }
        CQ_TRY(cq_ptq_rows_write(q, 0, row, b->tokens, h));
        row += b->tokens;
    }
    return cq_ptq_copy(q, index_of(m, m->embed), NULL);
}

static int clear_maxima(cq_model *m, int32_t block) {
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->quantized && m->linear[i]->part[0]->block == block)
            memset(m->linear[i]->amax.data, 0, (size_t)cq_tensor_bytes(m->linear[i]->amax));
    return CQ_OK;
}

/* Input scales of a block whose documents have passed. */
static int write_inputs(cq_ptq *q, int32_t block) {
    cq_model *m = q->m;
    for (int64_t i = 0; i < m->n_linears; i++) {
        cq_linear *w = m->linear[i];
        if (w->part[0]->block != block || !w->quantized)
            continue;
        memcpy(w->amax_x, w->amax.data, (size_t)cq_tensor_bytes(w->amax));
        if (w->act_quant)
            q->facts.unreached += cq_model_fill_unreached(w);
    }
    cq_model_unite(m, block);
    for (int64_t i = 0; i < m->n_linears; i++) {
        const cq_linear *w = m->linear[i];
        for (int64_t k = 0; w->part[0]->block == block && w->act_quant && k < w->n_parts; k++) {
            float scale;
            CQ_TRY(cq_export_input_scale(&scale, w->part[k]));
            CQ_TRY(cq_ptq_scalar(q, w->part[k], ".input_scale", scale));
        }
    }
    return CQ_OK;
}

/* All documents through a block whose weights are in memory. */
static int pass_documents(cq_ptq *q, cq_stream *s, int32_t block) {
    cq_model *m = q->m;
    int from = block % 3, to = (block + 1) % 3;
    int64_t row = 0;
    for (int64_t i = 0; i < q->o.n_batches; i++) {
        const cq_batch *b = q->batches[i];
        CQ_TRY(cq_ptq_rows_read(q, from, row, b->tokens, m->h[0].data));
        CQ_TRY(cq_model_send_batch(m, b));
        CQ_TRY(cq_model_block_forward(m, s, b, block));
        CQ_TRY(cq_ptq_rows_write(q, to, row, b->tokens, m->h[0].data));
        row += b->tokens;
    }
    return CQ_OK;
}

/* One matrix of an expert into its window; with `out` packed and written too. */
static int take_expert(cq_ptq *q, int64_t i, bool out) {
    const cq_param *p = q->m->param[i];
    if (!p->quantized)
        return cq_ptq_copy(q, i, p->value.data);
    if (!out)
        return cq_ptq_read_again(q, i, p->value.data);
    CQ_TRY(cq_ptq_read(q, i, p->value.data));
    return cq_ptq_pack(q, i);
}

static int pass_experts(cq_ptq *q, cq_stream *s, cq_layer *l, bool out) {
    int64_t up = index_of(q->m, l->in[0]->part[0]), down = index_of(q->m, l->out->part[0]);
    const int64_t *offsets = l->offsets.data;
    for (int64_t e = 0; e < l->in[0]->n_parts; e++) {
        if (!out && offsets[e] == offsets[e + 1])
            continue;
        CQ_TRY(take_expert(q, up + e, out));
        CQ_TRY(take_expert(q, down + e, out));
        CQ_TRY(cq_moe_expert(l, s, e, l->in[0]->value.data, l->out->value.data));
    }
    return CQ_OK;
}

/* A mixture of experts looks at each token alone, so its windows cut documents. */
static int pass_windows(cq_ptq *q, cq_stream *s, int32_t block) {
    cq_model *m = q->m;
    cq_layer *l = &m->layer[m->first_layer[block]];
    float *h = m->h[0].data;
    int from = block % 3, to = (block + 1) % 3;
    cq_model_bind_stream(m, s);
    for (int64_t row = 0; row < q->facts.tokens; row += q->moe_tokens) {
        int64_t n = min64(q->moe_tokens, q->facts.tokens - row);
        CQ_TRY(cq_ptq_rows_read(q, from, row, n, h));
        CQ_TRY(cq_layer_norm(l, s, n, h));
        CQ_TRY(cq_moe_begin(l, s, n));
        q->again = row + n < q->facts.tokens;
        CQ_TRY(pass_experts(q, s, l, row == 0));
        q->again = false;
        CQ_TRY(cq_moe_end(l, s, n, h));
        CQ_TRY(cq_ptq_rows_write(q, to, row, n, h));
    }
    return CQ_OK;
}

static int pass_block(cq_ptq *q, cq_stream *s, int32_t block) {
    cq_model *m = q->m;
    bool apart = q->calibrates && m->layer[m->first_layer[block]].kind == 'E';
    CQ_TRY(pass_params(q, block, apart));
    if (!q->calibrates)
        return CQ_OK;
    CQ_TRY(clear_maxima(m, block));
    m->env.calibrating = true;
    int status = apart ? pass_windows(q, s, block) : pass_documents(q, s, block);
    m->env.calibrating = false;
    CQ_TRY(status);
    return write_inputs(q, block);
}

int cq_ptq_unit(cq_ptq *q, cq_stream *s) {
    int64_t u = q->facts.done, unreached = q->facts.unreached;
    if (!q->out || u >= q->facts.units)
        return cq_fail(CQ_EUSAGE, "ptq: unit %ld of %ld, wanted one that is left", (long)u + 1,
                       (long)q->facts.units);
    int status = u == 0                    ? embed(q)
                 : u == q->facts.units - 1 ? pass_params(q, -1, false)
                                           : pass_block(q, s, (int32_t)u - 1);
    if (!status) {
        q->facts.done++;
        status = cq_ptq_save(q);
    }
    if (status) {
        q->facts.done = u;
        q->facts.unreached = unreached;
    }
    return status;
}

int cq_ptq_finish(cq_ptq *q) {
    if (!q->out || q->facts.done < q->facts.units)
        return cq_fail(CQ_EUSAGE, "ptq: %ld of %ld units are done, wanted all", (long)q->facts.done,
                       (long)q->facts.units);
    CQ_TRY(cq_ptq_save_wait(q));
    CQ_TRY(cq_st_folder_finish(q->out));
    close_files(q);
    CQ_TRY(cq_ptq_journal_remove(q));
    return cq_folder_replace(q->dir, q->partial);
}
