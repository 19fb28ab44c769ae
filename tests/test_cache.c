/* test_cache.c - an offline teacher: losses and gradients from its files equal those of the teacher
 * running along, to the precision they are stored in; files of anything else are refused. */
#define _GNU_SOURCE /* memmem */
#include "tests/harness.h"
#include "tests/scratch.h"
#include <unistd.h>

enum { TOKENS = 224, ROWS = 24, K = 40 };

TestSuite(cache, .init = scratch_open, .fini = scratch_close);

typedef struct pair {
    cq_model *teacher, *student;
    cq_distill *online, *cached;
    cq_eval *eval, *eval_cached;
    cq_recorder *recorder;
    cq_plan *plan;
    cq_stream stream;
    cq_batch *batch[2];
    int64_t blocks, vocab;
    bool taps[64];
} pair;

typedef struct setup {
    const char *dir;
    bool exact; ///< F64 and the specification; else F32 and cpu
    bool half;
    int64_t k, top;
    cq_kl_form form;
    cq_layer_loss layer;
} setup;

static void pair_open(pair *p, const setup *o) {
    char dir[512];
    memset(p, 0, sizeof *p);
    snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, o->dir);
    int threads = cq_threads_set(1);
    cq_dtype dtype = o->exact ? CQ_F64 : CQ_F32;
    p->stream = (cq_stream){.table = cq_kernels_find(o->exact ? "ref" : "cpu"), .threads = threads};
    OK(cq_model_open(&p->teacher, dir, dtype));
    OK(cq_model_quantize(&p->student, p->teacher, &(cq_quant_options){.preset = "all"}));
    p->blocks = cq_model_config(p->teacher)->n_blocks;
    p->vocab = cq_model_config(p->teacher)->vocab;
    p->batch[0] = harness_batch((int64_t[]){19, 1, 23}, 3, p->vocab, 5);
    p->batch[1] = harness_batch((int64_t[]){7, 30}, 2, p->vocab, 6);
    for (int64_t l = 0; l < p->blocks; l++)
        p->taps[l] = l != 1;
    cq_distill_options d = {.form = o->form,
                            .top_k = o->top,
                            .chunk = 16,
                            .layer_loss = o->layer,
                            .rows = ROWS,
                            .taps = p->taps,
                            .seed = 3};
    OK(cq_distill_open(&p->online, p->teacher, p->student, &d));
    d.cached_k = o->k;
    OK(cq_distill_open(&p->cached, NULL, p->student, &d));
    OK(cq_eval_open(&p->eval, p->teacher, p->student));
    OK(cq_eval_open_cached(&p->eval_cached, p->student, o->k, 512));
    OK(cq_recorder_open(&p->recorder, p->teacher,
                        &(cq_recorder_options){.top_k = o->k,
                                               .chunk = 16,
                                               .storage = o->half ? CQ_F16 : dtype,
                                               .rows = ROWS,
                                               .taps = p->taps,
                                               .seed = 3,
                                               .held_out_rows = 512}));
    OK(cq_plan_open(&p->plan));
    OK(cq_model_plan_params(p->teacher, p->plan, false));
    OK(cq_model_plan_params(p->student, p->plan, true));
    OK(cq_model_plan_work(p->teacher, p->plan, TOKENS, TOKENS, CQ_MODE_INFER, threads));
    OK(cq_model_plan_work(p->student, p->plan, TOKENS, TOKENS, CQ_MODE_SAVE, threads));
    OK(cq_distill_plan(p->online, p->plan, TOKENS));
    OK(cq_distill_plan(p->cached, p->plan, TOKENS));
    OK(cq_eval_plan(p->eval, p->plan, TOKENS, 16));
    OK(cq_eval_plan(p->eval_cached, p->plan, TOKENS, 16));
    OK(cq_recorder_plan(p->recorder, p->plan, TOKENS));
    OK(cq_plan_commit(p->plan, 0));
    OK(cq_model_load(p->teacher));
    OK(cq_model_load(p->student));
    int64_t unreached;
    OK(cq_model_calibrate_begin(p->student));
    OK(cq_model_forward(p->student, &p->stream, p->batch[0]));
    OK(cq_model_calibrate_end(p->student, &p->stream, &unreached));
}

static void pair_close(pair *p) {
    cq_recorder_close(p->recorder);
    cq_distill_close(p->online);
    cq_distill_close(p->cached);
    cq_eval_close(p->eval);
    cq_eval_close(p->eval_cached);
    cq_model_close(p->student);
    cq_model_close(p->teacher);
    cq_plan_close(p->plan);
    cq_batch_free(p->batch[0]);
    cq_batch_free(p->batch[1]);
}

static char *record(pair *p, int batch, bool held_out) {
    int64_t bytes;
    char name[32];
    snprintf(name, sizeof name, "%d-%d.safetensors", batch, held_out);
    char *path = below(scratch, name);
    OK(cq_recorder_write(p->recorder, &p->stream, p->batch[batch], 4, batch, held_out, path,
                         &bytes));
    return path;
}

static double value(cq_tensor t, int64_t i) {
    return t.dtype == CQ_F64 ? ((const double *)t.data)[i] : (double)((const float *)t.data)[i];
}

/* One forward and backward; all gradients, one after another, in new memory. */
static double *gradients(pair *p, cq_distill *d, int batch, cq_distill_result *r, double *loss,
                         int64_t *n) {
    double w[64], *out = NULL;
    for (int64_t l = 0; l < p->blocks; l++)
        w[l] = 0.7;
    OK(cq_model_zero_grad(p->student));
    OK(cq_distill_forward(d, &p->stream, p->batch[batch], 4, batch, p->batch[batch]->valid, r));
    memcpy(loss, r->layer_loss, (size_t)p->blocks * sizeof *loss);
    OK(cq_distill_backward(d, &p->stream, p->batch[batch], 1, w));
    *n = 0;
    for (int64_t i = 0; i < cq_model_n_params(p->student); i++) {
        cq_tensor g = cq_model_param(p->student, i)->grad;
        int64_t size = g.data ? cq_tensor_elems(g) : 0;
        out = realloc(out, (size_t)(*n + size + 1) * sizeof *out);
        for (int64_t j = 0; j < size; j++)
            out[*n + j] = value(g, j);
        *n += size;
    }
    return out;
}

/* Largest differences of KL and layer losses, absolute, and of gradients, of their norm. */
typedef struct apart {
    double kl, layer, gradient;
} apart;

static apart compare(const setup *o) {
    pair p;
    apart most = {0};
    pair_open(&p, o);
    for (int batch = 0; batch < 2; batch++) {
        cq_distill_result a, b;
        double la[64], lb[64], norm = 0, off = 0;
        int64_t n, m;
        double *ga = gradients(&p, p.online, batch, &a, la, &n);
        OK(cq_distill_from(p.cached, record(&p, batch, false)));
        double *gb = gradients(&p, p.cached, batch, &b, lb, &m);
        cr_assert_eq(n, m);
        for (int64_t i = 0; i < n; i++) {
            norm += ga[i] * ga[i];
            off += (ga[i] - gb[i]) * (ga[i] - gb[i]);
        }
        cr_expect(norm > 0 && a.valid == b.valid && a.rows == b.rows && a.accuracy == b.accuracy);
        most.kl = fmax(most.kl, fabs(a.logit_loss - b.logit_loss));
        most.gradient = fmax(most.gradient, sqrt(off / norm));
        for (int64_t l = 0; l < p.blocks; l++) {
            cr_expect_eq(isnan(la[l]), isnan(lb[l]));
            if (!isnan(la[l]))
                most.layer = fmax(most.layer, fabs(la[l] - lb[l]));
        }
        free(ga);
        free(gb);
    }
    pair_close(&p);
    return most;
}

static const char *const models[] = {"nemotron_h_tiny", "qwen3_tiny"};

Test(cache, in_double_the_losses_and_gradients_are_those_of_the_teacher) {
    const cq_layer_loss layers[] = {CQ_LAYER_CKA_UNBIASED, CQ_LAYER_CKA, CQ_LAYER_GRAM,
                                    CQ_LAYER_CKA_UNBIASED};
    for (int i = 0; i < 4; i++) {
        setup o = {.dir = models[i % 2],
                   .exact = true,
                   .k = K,
                   .top = i == 1 ? 7 : K,
                   .form = i == 3 ? CQ_KL_TAIL_BUCKET : (cq_kl_form)(CQ_KL_RENORMALIZED + i),
                   .layer = layers[i]};
        apart d = compare(&o);
        cr_expect(d.kl < 1e-12 && d.layer < 1e-11 && d.gradient < 1e-9, "case %d: %g %g %g", i,
                  d.kl, d.layer, d.gradient);
    }
}

Test(cache, in_single_and_half_precision_they_differ_by_its_rounding) {
    for (int half = 0; half < 2; half++)
        for (int m = 0; m < 2; m++) {
            setup o = {.dir = models[m],
                       .half = half,
                       .k = K,
                       .top = K,
                       .form = CQ_KL_TAIL_BUCKET,
                       .layer = m ? CQ_LAYER_CKA : CQ_LAYER_CKA_UNBIASED};
            apart d = compare(&o);
            double bound = half ? 2e-5 : 1e-6;
            if (getenv("CQ_TEST_ERRORS"))
                printf("%s, half %d: KL %g, layers %g, gradient %g\n", models[m], half, d.kl,
                       d.layer, d.gradient);
            cr_expect(d.kl < bound && d.layer < bound && d.gradient < 100 * bound,
                      "%s, half %d: %g %g %g", models[m], half, d.kl, d.layer, d.gradient);
        }
}

Test(cache, held_out_measures_are_those_of_the_teacher_when_the_whole_vocabulary_is_kept) {
    for (int half = 0; half < 2; half++) {
        pair p;
        setup o = {.dir = models[0],
                   .half = half,
                   .top = 8,
                   .form = CQ_KL_TAIL_BUCKET,
                   .layer = CQ_LAYER_CKA};
        cq_eval_result r[2];
        double cka[2][64], bound = half ? 1e-5 : 1e-6;
        char dir[512];
        cq_model *m;
        snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, o.dir);
        OK(cq_model_open(&m, dir, CQ_F32));
        o.k = cq_model_config(m)->vocab;
        cq_model_close(m);
        pair_open(&p, &o);
        cq_batch_free(p.batch[0]);
        p.batch[0] = harness_batch((int64_t[]){150, 1, 40}, 3, p.vocab, 5);
        for (int way = 0; way < 2; way++) {
            cq_eval *e = way ? p.eval_cached : p.eval;
            cq_eval_want_map(e, true);
            cq_eval_reset(e);
            for (int i = 0; i < 2; i++) {
                if (way)
                    OK(cq_eval_from(e, record(&p, i, true)));
                OK(cq_eval_add(e, &p.stream, p.batch[i]));
            }
            OK(cq_eval_result_get(e, &r[way]));
            memcpy(cka[way], r[way].cka, (size_t)p.blocks * sizeof(double));
        }
        cr_expect(r[0].map && !r[1].map);
        cr_expect(r[0].tokens == r[1].tokens && r[0].top1 == r[1].top1 &&
                  r[0].n_octaves == r[1].n_octaves);
        cr_expect(fabs(r[0].kl - r[1].kl) < bound, "%g %g", r[0].kl, r[1].kl);
        cr_expect(fabs(log(r[0].perplexity_student / r[1].perplexity_student)) < 1e-6);
        cr_expect(fabs(log(r[0].perplexity_teacher / r[1].perplexity_teacher)) < 1e-6);
        for (int64_t l = 0; l < p.blocks; l++)
            cr_expect(fabs(cka[0][l] - cka[1][l]) < bound, "block %d: %g %g", (int)l, cka[0][l],
                      cka[1][l]);
        pair_close(&p);
    }
}

static void expect_refused(int status, const char *path, const char *what) {
    const char *name = strrchr(path, '/') + 1;
    cr_expect(status == CQ_EDATA && strstr(cq_error(), name) && strstr(cq_error(), what),
              "wanted an error of %s about %s, got %d: %s", name, what, status, cq_error());
}

static int forward(pair *p, int batch, int64_t step, const char *path) {
    cq_distill_result r;
    OK(cq_distill_from(p->cached, path));
    return cq_distill_forward(p->cached, &p->stream, p->batch[batch], step, batch,
                              p->batch[batch]->valid, &r);
}

Test(cache, files_of_something_else_are_refused) {
    pair p;
    setup o = {.dir = models[1],
               .half = true,
               .k = K,
               .top = K,
               .form = CQ_KL_TAIL_BUCKET,
               .layer = CQ_LAYER_CKA};
    pair_open(&p, &o);
    char *path = record(&p, 0, false), *text;
    int64_t bytes;
    OK(forward(&p, 0, 4, path));
    cq_distill_result r;
    cr_expect_eq(cq_distill_forward(p.cached, &p.stream, p.batch[0], 4, 0, p.batch[0]->valid, &r),
                 CQ_EUSAGE, "a file is for one forward");
    expect_refused(forward(&p, 1, 4, path), path, "micro-batch");
    expect_refused(forward(&p, 0, 5, path), path, "another seed");
    OK(cq_eval_from(p.eval_cached, path));
    expect_refused(cq_eval_add(p.eval_cached, &p.stream, p.batch[0]), path, "rows");
    expect_refused(forward(&p, 0, 4, record(&p, 0, true)), "/0-1", "sampled rows");
    p.taps[1] = true;
    cq_distill *d;
    cq_distill_options more = {.form = CQ_KL_TAIL_BUCKET,
                               .top_k = K,
                               .chunk = 16,
                               .layer_loss = CQ_LAYER_CKA,
                               .rows = ROWS,
                               .taps = p.taps,
                               .seed = 3,
                               .cached_k = K};
    OK(cq_distill_open(&d, NULL, p.student, &more));
    cq_plan *plan;
    OK(cq_plan_open(&plan));
    OK(cq_distill_plan(d, plan, TOKENS));
    OK(cq_plan_commit(plan, 0));
    OK(cq_distill_from(d, path));
    expect_refused(cq_distill_forward(d, &p.stream, p.batch[0], 4, 0, p.batch[0]->valid, &r), path,
                   "block 1");
    cq_distill_close(d);
    cq_plan_close(plan);
    /* cut short, anywhere */
    OK(cq_file_read(&text, &bytes, path));
    for (int i = 0; i < 20; i++) {
        OK(cq_file_write(path, text, bytes * i / 20));
        expect_refused(forward(&p, 0, 4, path), path, "");
    }
    /* a token that the vocabulary lacks */
    cq_safetensors *st;
    OK(cq_file_write(path, text, bytes));
    OK(cq_safetensors_open(&st, path));
    cq_tensor ids = cq_safetensors_find(st, "ids")->tensor;
    int32_t bad = (int32_t)p.vocab;
    char *at = memmem(text, (size_t)bytes, ids.data, (size_t)cq_tensor_bytes(ids));
    cr_assert_not_null(at);
    cq_safetensors_close(st);
    memcpy(at + 400, &bad, sizeof bad);
    OK(cq_file_write(path, text, bytes));
    expect_refused(forward(&p, 0, 4, path), path, "wanted ids below");
    free(text);
    pair_close(&p);
}

Test(cache, what_it_cannot_stand_in_for_is_refused) {
    pair p;
    setup o = {
        .dir = models[1], .k = K, .top = K, .form = CQ_KL_TAIL_BUCKET, .layer = CQ_LAYER_CKA};
    pair_open(&p, &o);
    const struct {
        cq_kl_form form;
        int64_t top;
        cq_layer_loss layer;
        const char *what;
    } bad[] = {{CQ_KL_TAIL_BUCKET, K, CQ_LAYER_COSINE, "cosine"},
               {CQ_KL_TAIL_BUCKET, K, CQ_LAYER_MSE, "mse"},
               {CQ_KL_FULL, K, CQ_LAYER_NONE, "full KL"},
               {CQ_KL_TRUNCATED, K + 1, CQ_LAYER_NONE, "top_k"}};
    for (int i = 0; i < 4; i++) {
        cq_distill *d;
        cq_distill_options more = {.form = bad[i].form,
                                   .top_k = bad[i].top,
                                   .chunk = 16,
                                   .layer_loss = bad[i].layer,
                                   .rows = ROWS,
                                   .taps = p.taps,
                                   .cached_k = K};
        cr_expect_eq(cq_distill_open(&d, NULL, p.student, &more), CQ_EUSAGE);
        cr_expect(strstr(cq_error(), bad[i].what), "%s", cq_error());
    }
    pair_close(&p);
}

Test(cache, a_student_alone_loads_what_it_would_share) {
    for (int m = 0; m < 2; m++) {
        cq_model *teacher, *student, *alone;
        cq_plan *plan[2];
        char dir[512];
        snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, models[m]);
        cq_quant_options q = {.preset = "all", .freeze = "*norm*,*o_proj*,*mixer.gate*,*embed*"};
        OK(cq_model_open(&teacher, dir, CQ_F32));
        OK(cq_model_quantize(&student, teacher, &q));
        OK(cq_model_quantize(&alone, teacher, &q));
        OK(cq_model_alone(alone));
        for (int i = 0; i < 2; i++)
            OK(cq_plan_open(&plan[i]));
        OK(cq_model_plan_params(alone, plan[1], true));
        OK(cq_plan_commit(plan[1], 0));
        OK(cq_model_load(alone));
        OK(cq_model_plan_params(teacher, plan[0], false));
        OK(cq_model_plan_params(student, plan[0], true));
        OK(cq_plan_commit(plan[0], 0));
        OK(cq_model_load(teacher));
        OK(cq_model_load(student));
        for (int64_t i = 0; i < cq_model_n_params(student); i++) {
            cq_param *a = cq_model_param(student, i), *b = cq_model_param(alone, i);
            cr_expect(memcmp(a->value.data, b->value.data, (size_t)cq_tensor_bytes(a->value)) == 0,
                      "%s", a->name);
            cr_expect_eq(a->grad.data == NULL, b->grad.data == NULL, "%s", a->name);
        }
        cq_model_close(student);
        cq_model_close(alone);
        cq_model_close(teacher);
        cq_plan_close(plan[0]);
        cq_plan_close(plan[1]);
    }
}
