/* test_ptq.c - a checkpoint quantized block by block: the bytes of calibrating and exporting the
 * whole model, from any point at which it was stopped, and nothing of work that is not its own. */
#define _GNU_SOURCE
#include "tests/harness.h"
#include "tests/scratch.h"
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static int room = -1; ///< calls of pwrite until the disk is full; below 0: never

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    ssize_t (*real)(int, const void *, size_t, off_t) =
        (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    if (room >= 0 && room-- == 0) {
        room = 0;
        errno = ENOSPC;
        return -1;
    }
    return real(fd, data, n, at);
}

/* No test pulls a plug, and waiting for the disk would be most of the time. */
int fsync(int fd) { return fd < 0 ? -1 : 0; }

TestSuite(ptq, .init = scratch_open, .fini = scratch_close, .timeout = 120);

static const char *const models[] = {"nemotron_h_tiny", "qwen3_tiny"};
static const cq_quant_options options[] = {
    {.preset = "all"},
    {.preset = "nemotron_nano"},
    {.preset = "qwen3", .exclude = "*.k_proj,*.experts.*"},
    {.preset = "mlp", .scales = CQ_SCALE_MSE},
    {.preset = "all", .scales = CQ_SCALE_FOUR_OVER_SIX},
    {.preset = "all", .weights_only = true},
};

/// A student on its own, with the harness' documents.
typedef struct work {
    cq_model *teacher, *student;
    cq_plan *plan;
    cq_stream stream;
    cq_batch *batch[2];
    cq_ptq *ptq;
} work;

typedef struct how {
    const char *model;
    cq_quant_options quant;
    int64_t shard_bytes, moe_tokens;
    int threads;
} how;

static void open_work(work *w, const how *h, const char *dir) {
    char source[512];
    memset(w, 0, sizeof *w);
    snprintf(source, sizeof source, "%s%s", h->model[0] == '/' ? "" : CQ_TESTS "/golden/",
             h->model);
    int threads = cq_threads_set(h->threads ? h->threads : 1);
    w->stream = (cq_stream){.table = cq_kernels_find("ref"), .threads = threads};
    OK(cq_model_open(&w->teacher, source, CQ_F32));
    OK(cq_model_quantize(&w->student, w->teacher, &h->quant));
    int64_t vocab = cq_model_config(w->teacher)->vocab;
    w->batch[0] = harness_batch((int64_t[]){19, 1, 23}, 3, vocab, 5);
    w->batch[1] = harness_batch((int64_t[]){7, 30}, 2, vocab, 6);
    cq_ptq_options o = {.dir = dir,
                        .shard_bytes = h->shard_bytes,
                        .batches = (const cq_batch *const *)w->batch,
                        .n_batches = h->quant.weights_only ? 0 : 2,
                        .moe_tokens = h->moe_tokens};
    OK(cq_ptq_open(&w->ptq, w->student, &o));
    OK(cq_plan_open(&w->plan));
    OK(cq_ptq_plan(w->ptq, w->plan, threads));
    OK(cq_plan_commit(w->plan, 0));
}

static void close_work(work *w) {
    cq_ptq_close(w->ptq);
    cq_model_close(w->student);
    cq_model_close(w->teacher);
    cq_plan_close(w->plan);
    cq_batch_free(w->batch[0]);
    cq_batch_free(w->batch[1]);
}

static cq_ptq_facts facts_of(const work *w) {
    cq_ptq_facts f;
    cq_ptq_facts_get(w->ptq, &f);
    return f;
}

static void run_all(work *w) {
    while (facts_of(w).done < facts_of(w).units)
        OK(cq_ptq_unit(w->ptq, &w->stream));
    OK(cq_ptq_finish(w->ptq));
}

/* What the whole model in memory gives. */
static void export_whole(const how *h, const char *dir) {
    harness a;
    harness_options o = {.dir = h->model,
                         .dtype = CQ_F32,
                         .kernels = "ref",
                         .mode = CQ_MODE_SAVE,
                         .quant = h->quant};
    harness_open(&a, &o);
    OK(cq_export_nvfp4(a.student, dir, h->shard_bytes));
    harness_close(&a);
}

static void expect_same(const char *a, const char *b, const char *what) {
    char *names, *others, path[1024], *x, *y;
    int64_t n, m;
    OK(cq_folder_list(&names, a));
    OK(cq_folder_list(&others, b));
    cr_expect_str_eq(names, others, "%s", what);
    for (char *at = names, *end; (end = strchr(at, '\n')); at = end + 1) {
        *end = 0;
        OK(cq_path_join(path, sizeof path, a, at));
        OK(cq_file_read(&x, &n, path));
        OK(cq_path_join(path, sizeof path, b, at));
        OK(cq_file_read(&y, &m, path));
        cr_expect(n == m && !memcmp(x, y, (size_t)n), "%s: %s differs", what, at);
        free(x);
        free(y);
    }
    free(names);
    free(others);
}

static void check_same(const how *h, const char *what) {
    work w;
    char *whole = below(scratch, "whole"), *dir = below(scratch, "streamed");
    export_whole(h, whole);
    open_work(&w, h, dir);
    OK(cq_ptq_begin(w.ptq));
    run_all(&w);
    expect_same(whole, dir, what);
    close_work(&w);
    OK(cq_folder_remove(whole));
    OK(cq_folder_remove(dir));
}

Test(ptq, gives_the_bytes_of_the_whole_model_in_memory) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        for (int k = 0; k < 2; k++) {
            char what[96];
            how h = {.model = models[k],
                     .quant = options[i],
                     .shard_bytes = i % 2 ? 30000 : 0,
                     .moe_tokens = i % 3 ? 11 : 0,
                     .threads = 1 + (int)i % 2};
            snprintf(what, sizeof what, "%s, options %zu", models[k], i);
            check_same(&h, what);
        }
}

static const how mixed = {.model = "nemotron_h_tiny",
                          .quant = {.preset = "all"},
                          .shard_bytes = 40000,
                          .moe_tokens = 30,
                          .threads = 1};

/* The export of `mixed`, made once for a test. */
static const char *wanted(void) {
    char *whole = below(scratch, "whole");
    if (!cq_file_exists(whole))
        export_whole(&mixed, whole);
    return whole;
}

Test(ptq, goes_on_from_every_unit) {
    work w;
    char *dir = below(scratch, "streamed");
    int64_t units = 1;
    for (int64_t k = 0; k <= units; k++) {
        open_work(&w, &mixed, dir);
        OK(cq_ptq_begin(w.ptq));
        units = facts_of(&w).units;
        for (int64_t i = 0; i < k; i++)
            OK(cq_ptq_unit(w.ptq, &w.stream));
        close_work(&w); /* stopped here */
        cr_expect_not(cq_file_exists(dir), "half a folder under its name");
        open_work(&w, &mixed, dir);
        OK(cq_ptq_begin(w.ptq));
        cr_expect_eq(facts_of(&w).continued, k);
        run_all(&w);
        close_work(&w);
        expect_same(wanted(), dir, "stopped and continued");
        cr_expect_eq(n_names(scratch), 2, "something beside the two folders is left");
        OK(cq_folder_remove(dir));
    }
}

Test(ptq, goes_on_after_a_full_disk) {
    work w;
    char *dir = below(scratch, "streamed");
    const char *want = wanted();
    for (int n = 0, full = 1; full; n += 1 + n / 2) {
        open_work(&w, &mixed, dir);
        room = n;
        int status = cq_ptq_begin(w.ptq);
        while (!status && facts_of(&w).done < facts_of(&w).units)
            status = cq_ptq_unit(w.ptq, &w.stream);
        full = room == 0;
        room = -1;
        cr_expect_eq(status, full ? CQ_EIO : CQ_OK);
        if (full)
            cr_expect(strstr(cq_error(), "streamed.partial/") && strstr(cq_error(), "No space"),
                      "%s", cq_error());
        cr_expect_not(cq_file_exists(dir));
        close_work(&w);
        open_work(&w, &mixed, dir);
        OK(cq_ptq_begin(w.ptq));
        run_all(&w);
        close_work(&w);
        expect_same(want, dir, "full and continued");
        OK(cq_folder_remove(dir));
    }
}

Test(ptq, starts_over_when_the_work_is_another) {
    work w;
    how other = mixed;
    char *dir = below(scratch, "streamed"), *journal = below(scratch, "streamed.partial/journal");
    open_work(&w, &mixed, dir);
    OK(cq_ptq_begin(w.ptq));
    for (int i = 0; i < 3; i++)
        OK(cq_ptq_unit(w.ptq, &w.stream));
    close_work(&w);
    FILE *f = fopen(journal, "a"); /* a last line that was cut short */
    fputs("unit 3 ", f);
    fclose(f);
    open_work(&w, &mixed, dir);
    OK(cq_ptq_begin(w.ptq));
    cr_expect_eq(facts_of(&w).continued, 3);
    OK(cq_ptq_unit(w.ptq, &w.stream));
    close_work(&w);
    open_work(&w, &mixed, dir);
    OK(cq_ptq_begin(w.ptq));
    cr_expect_eq(facts_of(&w).continued, 4);
    close_work(&w);
    other.quant.preset = "mlp";
    open_work(&w, &other, dir);
    OK(cq_ptq_begin(w.ptq));
    cr_expect_eq(facts_of(&w).continued, 0);
    close_work(&w);
}

Test(ptq, touches_no_folder_that_it_did_not_make) {
    work w;
    char *dir = below(scratch, "streamed"), *partial = below(scratch, "streamed.partial");
    OK(cq_folder_make(partial));
    OK(cq_file_write(below(partial, "thesis.txt"), "x", 1));
    open_work(&w, &mixed, dir);
    cr_expect_eq(cq_ptq_begin(w.ptq), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "wanted that name free"), "%s", cq_error());
    expect_text(below(partial, "thesis.txt"), "x");
    close_work(&w);
}

Test(ptq, says_what_it_cannot_do) {
    cq_model *teacher, *student;
    cq_ptq *q;
    cq_ptq_options o = {.dir = below(scratch, "streamed")};
    OK(cq_model_open(&teacher, CQ_TESTS "/golden/qwen3_tiny", CQ_F32));
    cr_expect_eq(cq_ptq_open(&q, teacher, &o), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "no matrix"), "%s", cq_error());
    OK(cq_model_quantize(&student, teacher, &options[0]));
    cr_expect_eq(cq_ptq_open(&q, student, &o), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "no documents"), "%s", cq_error());
    cq_model_close(student);
    OK(cq_model_quantize(&student, teacher, &options[5]));
    OK(cq_file_write(o.dir, "x", 1));
    cr_expect_eq(cq_ptq_open(&q, student, &o), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "is a file"), "%s", cq_error());
    cq_model_close(student);
    cq_model_close(teacher);
}

/* A copy of a golden folder, one value of one tensor replaced. */
static void copy_with(const char *to, const char *tensor, uint16_t value) {
    cq_safetensors *st;
    cq_st_writer *w;
    const char *from = CQ_TESTS "/golden/nemotron_h_tiny";
    OK(cq_folder_make(to));
    OK(cq_file_copy(below(to, "config.json"), below(from, "config.json")));
    OK(cq_safetensors_open(&st, from));
    OK(cq_st_writer_open(&w));
    uint16_t *copy = NULL;
    for (int64_t i = 0; i < cq_safetensors_count(st); i++) {
        const cq_entry *e = cq_safetensors_at(st, i);
        cq_tensor t = e->tensor;
        if (!strcmp(e->name, tensor)) {
            copy = malloc((size_t)cq_tensor_bytes(t));
            memcpy(copy, t.data, (size_t)cq_tensor_bytes(t));
            copy[37] = value;
            t.data = copy;
        }
        OK(cq_st_writer_add(w, e->name, t));
    }
    cr_assert_not_null(copy, "%s", tensor);
    OK(cq_st_writer_folder(w, to, 0));
    cq_st_writer_close(w);
    cq_safetensors_close(st);
    free(copy);
}

Test(ptq, names_a_weight_that_is_not_finite) {
    static const char *const names[] = {"backbone.layers.1.mixer.experts.3.up_proj.weight",
                                        "backbone.norm_f.weight"};
    for (int i = 0; i < 2; i++) {
        work w;
        int status = CQ_OK;
        char *model = below(scratch, i ? "b" : "a");
        copy_with(model, names[i], i ? 0x7f80 : 0x7fc1);
        how h = mixed;
        h.model = model;
        open_work(&w, &h, below(scratch, "streamed"));
        OK(cq_ptq_begin(w.ptq));
        while (!status)
            status = cq_ptq_unit(w.ptq, &w.stream);
        cr_expect_eq(status, CQ_ENUMERIC);
        cr_expect(strstr(cq_error(), names[i]) && strstr(cq_error(), i ? "Inf" : "NaN") &&
                      strstr(cq_error(), "element 37,"),
                  "%s", cq_error());
        close_work(&w);
    }
}
