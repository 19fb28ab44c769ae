/// eval.c - how far a student is from its teacher on held-out documents.
///
///     KL, negative log-likelihood, top-1 over labelled tokens;   CKA_l = sum HSIC_1(K, L) /
///     sqrt(sum HSIC_1(K, K) sum HSIC_1(L, L))
///
/// Both models run in lock-step, block by block, so that one pair of Grams is alive. The sums over
/// groups of at most 512 rows estimate the CKA of all rows without a bias from the group size
/// (Nguyen et al. 2021, arXiv 2010.15327 eq. 3). The map of all teacher blocks against all student
/// blocks needs every Gram of a batch at once, so it looks at 128 evenly spaced rows only. KL is
/// summed apart for octaves of the position, one masked call of the kernel each.
#include "core/base/error.h"
#include "core/tensor/device.h"
#include "core/train/cached.h"
#include "core/train/geometry.h"
#include "core/train/taps.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP_ROWS = 512, MAP_ROWS = 128, N_OCTAVES = 32 };

struct cq_eval {
    cq_model *teacher, *student;
    cq_dtype dtype;
    int64_t n_blocks, vocab, chunk;
    cq_tensor zt, zs, rows, xs, centred, k, l;
    int32_t *candidates, *labels; ///< [tokens] on the host; [chunk] labels of some positions
    double (*hsic)[3];            ///< [n_blocks] sums of <K, L>, <K, K>, <L, L>
    double *cka;
    int64_t groups;     ///< of at most GROUP_ROWS rows in a batch
    cq_tensor products; ///< results: [n_blocks, groups, 4] of the batch at hand
    cq_tensor kl_sums, nll, valid_counts, agree; ///< results: [N_OCTAVES], [2], [N_OCTAVES], [1]
    cq_tensor masked, map_grams; ///< [chunk]; [2 * n_blocks, MAP_ROWS, MAP_ROWS], teacher first
    bool want_map, want_geometry;
    cq_geometry *geometry; ///< [n_blocks]
    double *ways;          ///< [n_blocks, CQ_N_WAYS]
    int64_t group_rows;    ///< rows in a Gram, at most
    int64_t cached_k;      ///< above 0: a cache in the teacher's place
    cq_cached file;
    char *from;
    cq_cached_room room;
    double *cross, *self, *map; ///< sums [n_blocks, n_blocks] and [2 * n_blocks]; the map itself
};

static int open_eval(cq_eval **out, cq_model *teacher, cq_model *student, int64_t cached_k,
                     int64_t group_rows) {
    const cq_config *s = cq_model_config(student);
    cq_eval *e = calloc(1, sizeof *e);
    if (e) {
        e->hsic = calloc((size_t)s->n_blocks, sizeof *e->hsic);
        e->cka = calloc((size_t)s->n_blocks, sizeof *e->cka);
        e->cross = calloc((size_t)(s->n_blocks * s->n_blocks), sizeof *e->cross);
        e->map = calloc((size_t)(s->n_blocks * s->n_blocks), sizeof *e->map);
        e->self = calloc((size_t)s->n_blocks, 2 * sizeof *e->self);
        e->geometry = calloc((size_t)s->n_blocks, sizeof *e->geometry);
        e->ways = calloc((size_t)s->n_blocks, CQ_N_WAYS * sizeof *e->ways);
    }
    if (!e || !e->hsic || !e->cka || !e->cross || !e->map || !e->self || !e->geometry || !e->ways) {
        cq_eval_close(e);
        return cq_fail(CQ_ENOMEM, "compare: no memory");
    }
    e->teacher = teacher;
    e->student = student;
    e->cached_k = cached_k;
    e->group_rows = group_rows;
    e->dtype = cq_model_dtype(student);
    e->n_blocks = s->n_blocks;
    e->vocab = s->vocab;
    *out = e;
    return CQ_OK;
}

int cq_eval_open(cq_eval **out, cq_model *teacher, cq_model *student) {
    const cq_config *t = cq_model_config(teacher), *s = cq_model_config(student);
    *out = NULL;
    if (t->vocab != s->vocab || t->n_blocks != s->n_blocks)
        return cq_fail(CQ_ESHAPE,
                       "compare: %s has vocabulary %ld and %ld blocks, %s has %ld and %ld",
                       cq_model_dir(teacher), (long)t->vocab, (long)t->n_blocks,
                       cq_model_dir(student), (long)s->vocab, (long)s->n_blocks);
    return open_eval(out, teacher, student, 0, GROUP_ROWS);
}

int cq_eval_open_cached(cq_eval **out, cq_model *student, int64_t k, int64_t group_rows) {
    *out = NULL;
    if (k < 1 || k > cq_model_config(student)->vocab || group_rows < 4)
        return cq_fail(
            CQ_EUSAGE,
            "compare: a cache of %ld entries a token and %ld rows in a Gram, wanted 1 to "
            "%ld and at least 4",
            (long)k, (long)group_rows, (long)cq_model_config(student)->vocab);
    return open_eval(out, NULL, student, k, group_rows);
}

int cq_eval_from(cq_eval *e, const char *path) {
    char *copy = strdup(path);
    if (!copy)
        return cq_fail(CQ_ENOMEM, "compare: no memory");
    free(e->from);
    e->from = copy;
    return CQ_OK;
}

void cq_eval_close(cq_eval *e) {
    if (!e)
        return;
    free(e->hsic);
    free(e->cka);
    free(e->candidates);
    free(e->labels);
    free(e->cross);
    free(e->map);
    free(e->self);
    free(e->geometry);
    free(e->ways);
    free(e->from);
    cq_cached_room_close(&e->room);
    cq_cached_close(&e->file);
    free(e);
}

void cq_eval_want_map(cq_eval *e, bool on) { e->want_map = on && !e->cached_k; }

void cq_eval_want_geometry(cq_eval *e, bool on) { e->want_geometry = on && !e->cached_k; }

int cq_eval_plan(cq_eval *e, cq_plan *p, int64_t tokens, int64_t chunk) {
    int64_t n = tokens < e->group_rows ? tokens : e->group_rows;
    int64_t few = tokens < MAP_ROWS ? tokens : MAP_ROWS;
    int64_t dim = cq_model_config(e->student)->hidden;
    if (e->teacher && cq_model_config(e->teacher)->hidden > dim)
        dim = cq_model_config(e->teacher)->hidden;
    e->chunk = chunk < tokens ? chunk : tokens;
    if (e->cached_k)
        CQ_TRY(cq_cached_plan(&e->room, p, tokens, e->chunk, e->cached_k, e->dtype));
    e->groups = cq_tap_groups(tokens, e->group_rows);
    free(e->candidates);
    free(e->labels);
    e->candidates = calloc((size_t)tokens, sizeof *e->candidates);
    e->labels = calloc((size_t)e->chunk, sizeof *e->labels);
    if (!e->candidates || !e->labels)
        return cq_fail(CQ_ENOMEM, "compare: no memory for its rows");
    CQ_TRY(cq_plan_add(p, &e->kl_sums, CQ_FOR_RESULTS, "KL", CQ_F64, CQ_SHAPE1(N_OCTAVES)));
    CQ_TRY(cq_plan_add(p, &e->nll, CQ_FOR_RESULTS, "log-likelihoods", CQ_F64, CQ_SHAPE1(2)));
    CQ_TRY(
        cq_plan_add(p, &e->valid_counts, CQ_FOR_RESULTS, "tokens", CQ_I64, CQ_SHAPE1(N_OCTAVES)));
    CQ_TRY(cq_plan_add(p, &e->agree, CQ_FOR_RESULTS, "right answers", CQ_I64, CQ_SHAPE1(1)));
    CQ_TRY(cq_plan_add(p, &e->products, CQ_FOR_RESULTS, "inner products", CQ_F64,
                       CQ_SHAPE3(e->n_blocks, e->groups, 4)));
    if (!e->cached_k)
        CQ_TRY(cq_plan_add(p, &e->zt, CQ_FOR_LOGITS, "teacher logits", e->dtype,
                           CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->zs, CQ_FOR_LOGITS, "student logits", e->dtype,
                       CQ_SHAPE2(e->chunk, e->vocab)));
    CQ_TRY(cq_plan_add(p, &e->masked, CQ_FOR_LOGITS, "labels of some positions", CQ_I32,
                       CQ_SHAPE1(e->chunk)));
    CQ_TRY(cq_plan_add(p, &e->rows, CQ_FOR_CKA, "held-out rows", CQ_I32,
                       CQ_SHAPE1(tokens + MAP_ROWS)));
    if (!e->cached_k)
        CQ_TRY(cq_plan_add(p, &e->map_grams, CQ_FOR_CKA, "Grams of all blocks", e->dtype,
                           CQ_SHAPE3(2 * e->n_blocks, few, few)));
    CQ_TRY(cq_plan_add(p, &e->xs, CQ_FOR_CKA, "rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->centred, CQ_FOR_CKA, "centred rows", e->dtype, CQ_SHAPE2(n, dim)));
    CQ_TRY(cq_plan_add(p, &e->k, CQ_FOR_CKA, "student's Gram", e->dtype, CQ_SHAPE2(n, n)));
    return cq_plan_add(p, &e->l, CQ_FOR_CKA, "teacher's Gram", e->dtype, CQ_SHAPE2(n, n));
}

void cq_eval_reset(cq_eval *e) {
    memset(e->hsic, 0, (size_t)e->n_blocks * sizeof *e->hsic);
    memset(e->geometry, 0, (size_t)e->n_blocks * sizeof *e->geometry);
    cq_tensor *sums[] = {&e->kl_sums, &e->nll, &e->valid_counts, &e->agree};
    for (int i = 0; i < 4; i++)
        memset(sums[i]->data, 0, (size_t)cq_tensor_bytes(*sums[i]));
    memset(e->cross, 0, (size_t)(e->n_blocks * e->n_blocks) * sizeof *e->cross);
    memset(e->self, 0, (size_t)e->n_blocks * 2 * sizeof *e->self);
}

static double *products_of(const cq_eval *e, int64_t block, int64_t g) {
    return (double *)e->products.data + 4 * (block * e->groups + g);
}

/* The teacher's Gram of one group of rows. */
static int gram_of_teacher(cq_eval *e, cq_stream *s, int64_t block, int64_t g, const int32_t *rows,
                           int64_t n) {
    if (e->cached_k)
        return cq_cached_gram(&e->file, block, g, true, e->dtype, e->l.data);
    return cq_tap_gram(s, e->dtype, cq_model_hidden(e->teacher, block)->data,
                       cq_model_config(e->teacher)->hidden, rows, n, true, e->xs.data,
                       e->centred.data, e->l.data);
}

/* A copy of some rows of a block's output on the host. */
static int keep_rows(cq_eval *e, cq_stream *s, cq_tensor *out, void **copy, const void *h,
                     cq_shape shape, const int32_t *rows) {
    cq_tensor gathered = {e->xs.data, shape, e->dtype};
    CQ_TRY(CQ_RUN(s, gather_rows, .dtype = e->dtype, .rows = shape.dim[0], .dim = shape.dim[1],
                  .x = h, .index = rows, .y = gathered.data));
    CQ_TRY(cq_stream_wait(s));
    *copy = malloc((size_t)cq_tensor_bytes(gathered));
    if (!*copy)
        return cq_fail(CQ_ENOMEM, "compare: no memory for %ld rows", (long)shape.dim[0]);
    *out = (cq_tensor){*copy, shape, e->dtype};
    return cq_copy(*copy, gathered.data, cq_tensor_bytes(gathered));
}

/* Both models' rows of a group in four ways. */
static int add_geometry(cq_eval *e, cq_stream *s, int64_t block, const int32_t *rows, int64_t n) {
    cq_model *models[] = {e->student, e->teacher};
    cq_tensor sides[2];
    void *copies[2] = {0};
    int status = CQ_OK;
    for (int i = 0; i < 2 && status == CQ_OK; i++) {
        int64_t dim = cq_model_config(models[i])->hidden;
        status = keep_rows(e, s, &sides[i], &copies[i], cq_model_hidden(models[i], block)->data,
                           CQ_SHAPE2(n, dim), rows);
    }
    if (status == CQ_OK)
        status = cq_geometry_add(&e->geometry[block], sides[0], sides[1]);
    free(copies[0]);
    free(copies[1]);
    return status;
}

static int add_cka(cq_eval *e, cq_stream *s, int64_t block, int64_t found) {
    const cq_tensor *x = cq_model_hidden(e->student, block);
    for (int64_t g = 0; g < cq_tap_groups(found, e->group_rows); g++) {
        int64_t begin = cq_tap_group_begin(found, e->group_rows, g),
                n = cq_tap_group_begin(found, e->group_rows, g + 1) - begin;
        const int32_t *rows = (const int32_t *)e->rows.data + begin;
        if (n < 4)
            continue;
        CQ_TRY(cq_tap_gram(s, e->dtype, x->data, cq_model_config(e->student)->hidden, rows, n, true,
                           e->xs.data, e->centred.data, e->k.data));
        CQ_TRY(gram_of_teacher(e, s, block, g, rows, n));
        CQ_TRY(CQ_RUN(s, cka, .dtype = e->dtype, .n = n, .k = e->k.data, .l = e->l.data,
                      .out = products_of(e, block, g)));
        if (e->want_geometry)
            CQ_TRY(add_geometry(e, s, block, rows, n));
    }
    return CQ_OK;
}

/* After a wait: the sums over the groups of a batch. */
static void add_products(cq_eval *e, int64_t found) {
    for (int64_t block = 0; block < e->n_blocks; block++)
        for (int64_t g = 0; g < cq_tap_groups(found, e->group_rows); g++) {
            int64_t n = cq_tap_group_begin(found, e->group_rows, g + 1) -
                        cq_tap_group_begin(found, e->group_rows, g);
            for (int i = 0; i < 3 && n >= 4; i++)
                e->hsic[block][i] += products_of(e, block, g)[i] / ((double)n * (double)(n - 3));
        }
}

static void *map_gram(const cq_eval *e, int64_t i, int64_t n) {
    return (char *)e->map_grams.data + i * n * n * cq_dtype_bytes(e->dtype);
}

/* Keeps the two Grams of a block over `n` evenly spaced rows. */
static int keep_grams(cq_eval *e, cq_stream *s, int64_t block, int64_t found, int64_t n) {
    const int32_t *rows = (const int32_t *)e->rows.data + found;
    for (int side = 0; side < 2; side++) {
        cq_model *m = side ? e->student : e->teacher;
        CQ_TRY(cq_tap_gram(s, e->dtype, cq_model_hidden(m, block)->data, cq_model_config(m)->hidden,
                           rows, n, true, e->xs.data, e->centred.data,
                           map_gram(e, side * e->n_blocks + block, n)));
    }
    return CQ_OK;
}

/* <K, L> of two symmetric matrices with zero diagonals: twice the upper triangle, four sums to let
 * the processor overlap them. */
#define INNER(NAME, T)                                                                             \
    static double NAME(const T *k, const T *l, int64_t n) {                                        \
        double sum[4] = {0};                                                                       \
        for (int64_t i = 0; i < n; i++)                                                            \
            for (int64_t j = i + 1; j < n; j++)                                                    \
                sum[j & 3] += (double)k[i * n + j] * (double)l[i * n + j];                         \
        return 2 * (sum[0] + sum[1] + sum[2] + sum[3]);                                            \
    }
INNER(inner_f32, float)
INNER(inner_f64, double)

static double inner(const cq_eval *e, const char *grams, int64_t a, int64_t b, int64_t n) {
    int64_t bytes = n * n * cq_dtype_bytes(e->dtype);
    const void *k = grams + a * bytes, *l = grams + b * bytes;
    return (e->dtype == CQ_F64 ? inner_f64(k, l, n) : inner_f32(k, l, n)) /
           ((double)n * (double)(n - 3));
}

static int add_map(cq_eval *e, int64_t n) {
    cq_tensor t;
    void *owned;
    CQ_TRY(cq_tensor_on_host(&t, &owned, e->map_grams));
    for (int64_t i = 0; i < 2 * e->n_blocks; i++)
        e->self[i] += inner(e, t.data, i, i, n);
    for (int64_t i = 0; i < e->n_blocks; i++)
        for (int64_t l = 0; l < e->n_blocks; l++)
            e->cross[i * e->n_blocks + l] += inner(e, t.data, i, e->n_blocks + l, n);
    free(owned);
    return CQ_OK;
}

/* Context of 1, 2-3, 4-7 ... tokens: octave k holds positions from 2^k - 1 to 2^(k + 1) - 2. */
static int octave(int64_t position) {
    int k = 0;
    for (int64_t context = position + 1; context > 1; context >>= 1)
        k++;
    return k;
}

static int add_cached(cq_eval *e, cq_stream *s, cq_kl_cached_args a, int octave) {
    double *nll = e->nll.data;
    a.form = CQ_KL_TAIL_BUCKET;
    a.top_k = a.k;
    a.student = e->zs.data;
    a.labels = e->masked.data;
    a.scale = 1;
    a.sum = (double *)e->kl_sums.data + octave;
    a.nll_teacher = nll;
    a.nll_student = nll + 1;
    a.agree = e->agree.data;
    a.valid = (int64_t *)e->valid_counts.data + octave;
    return s->table->kl_cached(s, &a);
}

/* The losses of one chunk, octave by octave. */
static int add_losses(cq_eval *e, cq_stream *s, const cq_batch *b, int64_t at, int64_t n) {
    int32_t *masked = e->labels;
    double *nll = e->nll.data;
    uint32_t found = 0;
    cq_kl_cached_args cached = {.dtype = e->dtype, .rows = n, .vocab = e->vocab};
    if (e->cached_k)
        CQ_TRY(cq_cached_chunk(&cached, &e->room, &e->file, b, at, n));
    for (int64_t i = at; i < at + n; i++)
        if (b->labels[i] >= 0)
            found |= 1u << octave(b->positions[i]);
    for (int k = 0; k < N_OCTAVES; k++) {
        if (!(found & 1u << k))
            continue;
        for (int64_t i = 0; i < n; i++)
            masked[i] = octave(b->positions[at + i]) == k ? b->labels[at + i] : -100;
        CQ_TRY(cq_copy(e->masked.data, masked, n * (int64_t)sizeof *masked));
        if (e->cached_k) {
            CQ_TRY(add_cached(e, s, cached, k));
            continue;
        }
        CQ_TRY(CQ_RUN(s, kl, .dtype = e->dtype, .rows = n, .vocab = e->vocab, .form = CQ_KL_FULL,
                      .teacher = e->zt.data, .student = e->zs.data, .labels = e->masked.data,
                      .scale = 1, .sum = (double *)e->kl_sums.data + k, .nll_teacher = nll,
                      .nll_student = nll + 1, .agree = e->agree.data,
                      .valid = (int64_t *)e->valid_counts.data + k));
    }
    return CQ_OK;
}

static int add_head(cq_eval *e, cq_stream *s, const cq_batch *b) {
    for (int64_t at = 0; at < b->tokens; at += e->chunk) {
        int64_t n = b->tokens - at < e->chunk ? b->tokens - at : e->chunk;
        if (e->teacher)
            CQ_TRY(cq_model_head_forward(e->teacher, s, cq_model_final(e->teacher), at, n,
                                         e->zt.data));
        CQ_TRY(cq_model_head_forward(e->student, s, cq_model_final(e->student), at, n, e->zs.data));
        CQ_TRY(add_losses(e, s, b, at, n));
    }
    return CQ_OK;
}

/* Opens the file of this micro-batch and checks that it compares all of its rows. */
static int read_teacher(cq_eval *e, const cq_batch *b, int64_t found) {
    if (!e->from)
        return cq_fail(CQ_EUSAGE, "compare: no file for this micro-batch, wanted cq_eval_from");
    cq_cached_close(&e->file);
    int status = cq_cached_open(&e->file, e->from, b, e->dtype, e->vocab);
    free(e->from);
    e->from = NULL;
    CQ_TRY(status);
    if (e->file.k != e->cached_k || e->file.n_groups != cq_tap_groups(found, e->group_rows))
        return cq_fail(CQ_EDATA,
                       "%s: holds %ld entries a token and %ld groups of rows, wanted %ld "
                       "and %ld",
                       e->file.path, (long)e->file.k, (long)e->file.n_groups, (long)e->cached_k,
                       (long)cq_tap_groups(found, e->group_rows));
    for (int64_t g = 0; g < e->file.n_groups; g++)
        if (e->file.groups[g] != cq_tap_group_begin(found, e->group_rows, g + 1) -
                                     cq_tap_group_begin(found, e->group_rows, g))
            return cq_fail(CQ_EDATA,
                           "%s: its group %ld has %d rows, wanted those of held-out "
                           "documents",
                           e->file.path, (long)g, (int)e->file.groups[g]);
    return cq_cached_check_rows(&e->file, e->candidates, found);
}

int cq_eval_add(cq_eval *e, cq_stream *s, const cq_batch *b) {
    int64_t found = cq_tap_candidates(e->candidates, b);
    int64_t few = found < MAP_ROWS ? found : MAP_ROWS;
    bool map = e->want_map && few >= 4;
    int32_t spaced[MAP_ROWS], *rows = e->rows.data;
    for (int64_t i = 0; i < few; i++)
        spaced[i] = e->candidates[found * i / few];
    CQ_TRY(cq_copy(rows, e->candidates, found * (int64_t)sizeof *rows));
    CQ_TRY(cq_copy(rows + found, spaced, few * (int64_t)sizeof *rows));
    if (e->cached_k)
        CQ_TRY(read_teacher(e, b, found));
    else
        CQ_TRY(cq_model_embed_forward(e->teacher, s, b));
    CQ_TRY(cq_model_embed_forward(e->student, s, b));
    for (int64_t l = 0; l < e->n_blocks; l++) {
        if (e->teacher)
            CQ_TRY(cq_model_block_forward(e->teacher, s, b, l));
        CQ_TRY(cq_model_block_forward(e->student, s, b, l));
        CQ_TRY(add_cka(e, s, l, found));
        if (map)
            CQ_TRY(keep_grams(e, s, l, found, few));
    }
    if (e->teacher)
        CQ_TRY(cq_model_norm_forward(e->teacher, s, b));
    CQ_TRY(cq_model_norm_forward(e->student, s, b));
    CQ_TRY(add_head(e, s, b));
    CQ_TRY(cq_stream_wait(s));
    add_products(e, found);
    return map ? add_map(e, few) : CQ_OK;
}

static void finish_map(cq_eval *e) {
    for (int64_t t = 0; t < e->n_blocks; t++)
        for (int64_t l = 0; l < e->n_blocks; l++) {
            double norm = sqrt(e->self[t]) * sqrt(e->self[e->n_blocks + l]);
            e->map[t * e->n_blocks + l] =
                norm > 0 ? e->cross[t * e->n_blocks + l] / norm : (double)NAN;
        }
}

int cq_eval_result_get(cq_eval *e, cq_eval_result *out) {
    const double *sums = e->kl_sums.data, *nll = e->nll.data;
    const int64_t *counts = e->valid_counts.data, *agree = e->agree.data;
    double kl = 0;
    int64_t valid = 0, octaves = 0;
    for (int64_t k = 0; k < N_OCTAVES; k++) {
        kl += sums[k];
        valid += counts[k];
        octaves = counts[k] ? k + 1 : octaves;
    }
    if (valid < 1)
        return cq_fail(CQ_EDATA, "compare: no held-out token is a target, wanted at least one");
    double n = (double)valid;
    finish_map(e);
    *out = (cq_eval_result){.kl = kl / n,
                            .top1 = (double)*agree / n,
                            .tokens = valid,
                            .cka = e->cka,
                            .perplexity_teacher = exp(nll[0] / n),
                            .perplexity_student = exp(nll[1] / n),
                            .cka_min = INFINITY,
                            .n_octaves = octaves,
                            .octave_kl = sums,
                            .octave_tokens = counts,
                            .map = e->want_map ? e->map : NULL,
                            .geometry = e->want_geometry ? e->ways : NULL};
    for (int64_t l = 0; l < e->n_blocks; l++) {
        double norm = sqrt(e->hsic[l][1]) * sqrt(e->hsic[l][2]);
        e->cka[l] = norm > 0 ? e->hsic[l][0] / norm : NAN;
        out->cka_mean += e->cka[l] / (double)e->n_blocks;
        for (int way = 0; way < CQ_N_WAYS; way++)
            e->ways[l * CQ_N_WAYS + way] = cq_geometry_cka(&e->geometry[l], way);
        if (e->cka[l] < out->cka_min) {
            out->cka_min = e->cka[l];
            out->cka_min_block = l;
        }
    }
    return isfinite(out->kl) ? CQ_OK : cq_fail(CQ_ENUMERIC, "compare: held-out KL is %g", out->kl);
}
