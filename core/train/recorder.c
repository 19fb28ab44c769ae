/// recorder.c - a teacher's forward over one micro-batch, and the file of cache.h that it leaves.
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/train/cached.h"
#include "core/train/taps.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct cq_recorder {
    cq_model *teacher;
    cq_recorder_options o;
    cq_dtype dtype;
    int64_t n_blocks, dim, vocab, tokens, room; ///< room: elements for one block's triangles
    bool *taps;
    cq_tensor z, ids, log_p, log_tail, log_label, xs, centred, gram, rows, at_there;
    cq_tensor stored, grams; ///< on the host, as they go into the file
    void *owned[2];          ///< their memory where the plan lies on a device
    int32_t *sampled, *at;   ///< [2 * tokens], [tokens]
    int32_t *groups, *tapped, *exponents;
};

int cq_recorder_open(cq_recorder **out, cq_model *teacher, const cq_recorder_options *o) {
    const cq_config *c = cq_model_config(teacher);
    *out = NULL;
    if (o->top_k < 1 || o->top_k > c->vocab || o->chunk < 1 || o->rows < 4 || o->held_out_rows < 4)
        return cq_fail(
            CQ_EUSAGE,
            "cache: top_k is %ld, chunk %ld, rows %ld, wanted 1 to %ld, at least 1 and 4",
            (long)o->top_k, (long)o->chunk, (long)o->rows, (long)c->vocab);
    if (o->storage != CQ_F16 && o->storage != cq_model_dtype(teacher))
        return cq_fail(CQ_EUSAGE, "cache: storage is %s, wanted F16 or %s",
                       cq_dtype_name(o->storage), cq_dtype_name(cq_model_dtype(teacher)));
    cq_recorder *r = calloc(1, sizeof *r);
    if (!r || !(r->taps = calloc((size_t)c->n_blocks, sizeof *r->taps))) {
        free(r);
        return cq_fail(CQ_ENOMEM, "cache: no memory");
    }
    if (o->taps)
        memcpy(r->taps, o->taps, (size_t)c->n_blocks * sizeof *r->taps);
    r->teacher = teacher;
    r->o = *o;
    r->dtype = cq_model_dtype(teacher);
    r->n_blocks = c->n_blocks;
    r->dim = c->hidden;
    r->vocab = c->vocab;
    *out = r;
    return CQ_OK;
}

void cq_recorder_close(cq_recorder *r) {
    if (!r)
        return;
    free(r->taps);
    free(r->owned[0]);
    free(r->owned[1]);
    free(r->sampled);
    free(r->at);
    free(r->groups);
    free(r->tapped);
    free(r->exponents);
    free(r);
}

static int64_t triangle(int64_t n) { return n < 4 ? 0 : n * (n + 1) / 2; }

static int allocate(cq_recorder *r, int64_t tokens) {
    int64_t groups = cq_tap_groups(tokens, r->o.held_out_rows) + 1;
    free(r->sampled);
    free(r->at);
    free(r->groups);
    free(r->tapped);
    free(r->exponents);
    r->sampled = calloc((size_t)tokens, 2 * sizeof *r->sampled);
    r->at = calloc((size_t)tokens, sizeof *r->at);
    r->groups = calloc((size_t)groups, sizeof *r->groups);
    r->tapped = calloc((size_t)r->n_blocks, sizeof *r->tapped);
    r->exponents = calloc((size_t)(r->n_blocks * groups), sizeof *r->exponents);
    if (!r->sampled || !r->at || !r->groups || !r->tapped || !r->exponents)
        return cq_fail(CQ_ENOMEM, "cache: no memory for its rows");
    return CQ_OK;
}

/* A buffer that the host reads: in the plan where that is the host's, else beside it. */
static int plan_host(cq_recorder *r, cq_plan *p, cq_tensor *t, int i, cq_purpose purpose,
                     const char *name, cq_shape shape) {
    if (!cq_plan_on_device(p))
        return cq_plan_add(p, t, purpose, name, r->o.storage, shape);
    *t = (cq_tensor){.shape = shape, .dtype = r->o.storage};
    free(r->owned[i]);
    t->data = r->owned[i] = calloc(1, (size_t)cq_tensor_bytes(*t) + 1);
    return t->data ? CQ_OK : cq_fail(CQ_ENOMEM, "cache: no memory for its %s", name);
}

int cq_recorder_plan(cq_recorder *r, cq_plan *p, int64_t tokens) {
    int64_t k = r->o.top_k, most = 0, all = 0;
    if (r->o.chunk > tokens)
        r->o.chunk = tokens;
    if (r->o.rows > tokens)
        r->o.rows = tokens;
    r->tokens = tokens;
    CQ_TRY(allocate(r, tokens));
    for (int64_t g = 0; g < cq_tap_groups(tokens, r->o.held_out_rows); g++) {
        int64_t n = cq_tap_group_begin(tokens, r->o.held_out_rows, g + 1) -
                    cq_tap_group_begin(tokens, r->o.held_out_rows, g);
        all += triangle(n);
        most = n > most ? n : most;
    }
    most = r->o.rows > most ? r->o.rows : most;
    r->room = triangle(r->o.rows) > all ? triangle(r->o.rows) : all;
    CQ_TRY(cq_plan_add(p, &r->z, CQ_FOR_LOGITS, "teacher logits", r->dtype,
                       CQ_SHAPE2(r->o.chunk, r->vocab)));
    CQ_TRY(cq_plan_add(p, &r->ids, CQ_FOR_LOGITS, "largest logits", CQ_I32, CQ_SHAPE2(tokens, k)));
    CQ_TRY(cq_plan_add(p, &r->log_p, CQ_FOR_LOGITS, "their log-probabilities", r->dtype,
                       CQ_SHAPE2(tokens, k)));
    if (r->o.storage != r->dtype)
        CQ_TRY(plan_host(r, p, &r->stored, 0, CQ_FOR_LOGITS, "the same as stored",
                         CQ_SHAPE2(tokens, k)));
    CQ_TRY(
        cq_plan_add(p, &r->at_there, CQ_FOR_LOGITS, "rows of the file", CQ_I32, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &r->log_tail, CQ_FOR_LOGITS, "tails", r->dtype, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &r->log_label, CQ_FOR_LOGITS, "labels", r->dtype, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &r->rows, CQ_FOR_CKA, "sampled rows", CQ_I32, CQ_SHAPE1(tokens)));
    CQ_TRY(cq_plan_add(p, &r->xs, CQ_FOR_CKA, "rows", r->dtype, CQ_SHAPE2(most, r->dim)));
    CQ_TRY(
        cq_plan_add(p, &r->centred, CQ_FOR_CKA, "centred rows", r->dtype, CQ_SHAPE2(most, r->dim)));
    CQ_TRY(cq_plan_add(p, &r->gram, CQ_FOR_CKA, "Gram", r->dtype, CQ_SHAPE2(most, most)));
    return plan_host(r, p, &r->grams, 1, CQ_FOR_CKA, "triangles", CQ_SHAPE2(r->n_blocks, r->room));
}

static double element(const cq_tensor *t, int64_t i) {
    return t->dtype == CQ_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

/* The lower triangle of the Gram at hand, as stored. Half precision gets a power of two that puts
 * its largest value below 2^14: the smallest normal number is then 2^-28 of it. */
static int pack(const cq_recorder *r, const cq_tensor *gram, int64_t n, char *to,
                int32_t *exponent) {
    double top = 0;
    int64_t at = 0, size = cq_dtype_bytes(r->o.storage);
    for (int64_t i = 0; i < n * n; i++) {
        double x = fabs(element(gram, i));
        if (!(x <= top))
            top = x;
    }
    if (!isfinite(top))
        return cq_fail(CQ_ENUMERIC, "cache: the teacher's Gram holds %g", top);
    *exponent = r->o.storage == CQ_F16 && top > 0 ? 13 - ilogb(top) : 0;
    double scale = ldexp(1, *exponent);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++, at++) {
            double x = scale * element(gram, i * n + j);
            CQ_TRY(cq_convert(to + at * size, r->o.storage, &x, CQ_F64, 1));
        }
    return CQ_OK;
}

/* The same of the Gram that was made last, wherever it lies. */
static int pack_last(const cq_recorder *r, int64_t n, char *to, int32_t *exponent) {
    cq_tensor t;
    void *owned;
    CQ_TRY(cq_tensor_on_host(&t, &owned, (cq_tensor){r->gram.data, CQ_SHAPE2(n, n), r->dtype}));
    int status = pack(r, &t, n, to, exponent);
    free(owned);
    return status;
}

static int tap(cq_recorder *r, cq_stream *s, int64_t block, int64_t index, int64_t n_groups,
               int64_t triangles) {
    int64_t size = cq_dtype_bytes(r->o.storage), begin = 0, at = index * triangles;
    for (int64_t g = 0; g < n_groups; g++) {
        int64_t n = r->groups[g];
        if (n >= 4) {
            CQ_TRY(cq_tap_gram(s, r->dtype, cq_model_hidden(r->teacher, block)->data, r->dim,
                               (const int32_t *)r->rows.data + begin, n, false, r->xs.data,
                               r->centred.data, r->gram.data));
            CQ_TRY(pack_last(r, n, (char *)r->grams.data + at * size,
                             &r->exponents[index * n_groups + g]));
        }
        begin += n;
        at += triangle(n);
    }
    return CQ_OK;
}

static int head(cq_recorder *r, cq_stream *s, const cq_batch *b) {
    CQ_TRY(cq_copy(r->at_there.data, r->at, b->tokens * (int64_t)sizeof *r->at));
    for (int64_t t = 0; t < b->tokens; t += r->o.chunk) {
        int64_t n = b->tokens - t < r->o.chunk ? b->tokens - t : r->o.chunk;
        CQ_TRY(cq_model_head_forward(r->teacher, s, cq_model_final(r->teacher), t, n, r->z.data));
        CQ_TRY(CQ_RUN(
            s, top_logits, .dtype = r->dtype, .rows = n, .vocab = r->vocab, .k = r->o.top_k,
            .logits = r->z.data, .labels = cq_model_batch(r->teacher)->labels + t,
            .at = (const int32_t *)r->at_there.data + t, .ids = r->ids.data, .log_p = r->log_p.data,
            .log_tail = r->log_tail.data, .log_label = r->log_label.data));
    }
    return cq_stream_wait(s);
}

static int check_finite(const cq_tensor *log_label) {
    for (int64_t i = 0; i < cq_tensor_elems(*log_label); i++)
        if (!isfinite(element(log_label, i)))
            return cq_fail(CQ_ENUMERIC, "cache: the teacher's log-probability of a label is %g",
                           element(log_label, i));
    return CQ_OK;
}

typedef struct part {
    const char *name;
    void *data;
    cq_dtype dtype;
    cq_shape shape;
} part;

static int save(const cq_batch *b, const part *parts, int n, const char *path, int64_t *bytes) {
    cq_st_writer *w = NULL;
    char hash[65];
    int status = cq_st_writer_open(&w);
    *bytes = 0;
    cq_cached_hash(hash, b);
    if (!status)
        status = cq_st_writer_metadata(w, "format", "ckaqad teacher cache 1");
    if (!status)
        status = cq_st_writer_metadata(w, "batch", hash);
    for (int i = 0; i < n && !status; i++) {
        cq_tensor t = {parts[i].data, parts[i].shape, parts[i].dtype};
        *bytes += cq_tensor_bytes(t);
        status = cq_st_writer_add(w, parts[i].name, t);
    }
    if (!status)
        status = cq_st_writer_file(w, path);
    cq_st_writer_close(w);
    return status;
}

/* What kernels left comes to the host, and everything into the file. */
static int finish(cq_recorder *r, const cq_batch *b, int64_t n_rows, int64_t n_groups,
                  int64_t n_taps, int64_t triangles, const char *path, int64_t *bytes) {
    const cq_tensor *from[] = {&r->ids, &r->log_p, &r->log_tail, &r->log_label};
    cq_tensor host[4];
    void *owned[4] = {0};
    int status = CQ_OK;
    int64_t k = r->o.top_k;
    for (int i = 0; i < 4 && !status; i++)
        status = cq_tensor_on_host(&host[i], &owned[i], cq_tensor_rows(*from[i], 0, b->valid));
    if (!status)
        status = check_finite(&host[3]);
    if (!status && r->stored.data)
        status = cq_convert(r->stored.data, r->o.storage, host[1].data, r->dtype, b->valid * k);
    if (!status) {
        const part parts[] = {
            {"ids", host[0].data, CQ_I32, CQ_SHAPE2(b->valid, k)},
            {"log_p", r->stored.data ? r->stored.data : host[1].data, r->o.storage,
             CQ_SHAPE2(b->valid, k)},
            {"log_tail", host[2].data, r->dtype, CQ_SHAPE1(b->valid)},
            {"log_label", host[3].data, r->dtype, CQ_SHAPE1(b->valid)},
            {"rows", r->sampled, CQ_I32, CQ_SHAPE1(n_rows)},
            {"groups", r->groups, CQ_I32, CQ_SHAPE1(n_groups)},
            {"taps", r->tapped, CQ_I32, CQ_SHAPE1(n_taps)},
            {"exponents", r->exponents, CQ_I32, CQ_SHAPE2(n_taps, n_groups)},
            {"grams", r->grams.data, r->o.storage, CQ_SHAPE2(n_taps, triangles)},
        };
        status = save(b, parts, (int)(sizeof parts / sizeof *parts), path, bytes);
    }
    for (int i = 0; i < 4; i++)
        free(owned[i]);
    return status;
}

/* Chooses rows and groups; returns the number of groups. */
static int64_t choose_rows(cq_recorder *r, const cq_batch *b, int64_t step, int64_t micro,
                           bool held_out, int64_t *n_rows) {
    if (!held_out) {
        *n_rows = cq_tap_sample(r->sampled, b, r->o.rows, r->o.seed, step, micro);
        r->groups[0] = (int32_t)*n_rows;
        return 1;
    }
    int64_t found = cq_tap_candidates(r->sampled, b),
            groups = cq_tap_groups(found, r->o.held_out_rows);
    for (int64_t g = 0; g < groups; g++)
        r->groups[g] = (int32_t)(cq_tap_group_begin(found, r->o.held_out_rows, g + 1) -
                                 cq_tap_group_begin(found, r->o.held_out_rows, g));
    *n_rows = found;
    return groups;
}

int cq_recorder_write(cq_recorder *r, cq_stream *s, const cq_batch *b, int64_t step, int64_t micro,
                      bool held_out, const char *path, int64_t *bytes) {
    if (b->tokens > r->tokens)
        return cq_fail(CQ_EUSAGE, "cache: a micro-batch has %ld tokens, the plan is for %ld",
                       (long)b->tokens, (long)r->tokens);
    int64_t n_rows, triangles = 0, n_taps = 0;
    int64_t n_groups = choose_rows(r, b, step, micro, held_out, &n_rows);
    for (int64_t g = 0; g < n_groups; g++)
        triangles += triangle(r->groups[g]);
    CQ_TRY(cq_copy(r->rows.data, r->sampled, n_rows * (int64_t)sizeof *r->sampled));
    cq_cached_at(r->at, b);
    CQ_TRY(cq_model_embed_forward(r->teacher, s, b));
    for (int64_t l = 0; l < r->n_blocks; l++) {
        CQ_TRY(cq_model_block_forward(r->teacher, s, b, l));
        if (held_out || r->taps[l]) {
            CQ_TRY(tap(r, s, l, n_taps, n_groups, triangles));
            r->tapped[n_taps++] = (int32_t)l;
        }
    }
    CQ_TRY(cq_model_norm_forward(r->teacher, s, b));
    CQ_TRY(head(r, s, b));
    return finish(r, b, n_rows, n_groups, n_taps, triangles, path, bytes);
}
