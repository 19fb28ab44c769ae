/* example.c - one page against the installed library: a BF16 folder in, a calibrated NVFP4 folder
   out. cc example.c $(pkg-config --cflags --libs ckaqad) -o example && ./example MODEL DATA.jsonl
   OUT */
#include "core/ckaqad.h"
#include <stdio.h>

enum { TOKENS = 512, THREADS = 2 };

static int run(const char *dir, const char *data, const char *out) {
    cq_model *teacher, *student;
    cq_tokenizer *tokenizer;
    cq_corpus *corpus;
    cq_loader *loader;
    cq_plan *plan;
    const cq_batch *batch;
    int64_t n, unreached, differing;
    cq_stream stream = {.table = cq_kernels_find("cpu"), .threads = cq_threads_set(THREADS)};

    CQ_TRY(cq_model_open(&teacher, dir, CQ_F32));
    CQ_TRY(cq_model_quantize(&student, teacher, &(cq_quant_options){.preset = "all"}));
    CQ_TRY(cq_tokenizer_open(&tokenizer, dir));
    CQ_TRY(cq_corpus_open(
        &corpus, data, tokenizer,
        &(cq_corpus_options){.vocab = cq_model_config(teacher)->vocab, .max_tokens = TOKENS}));
    CQ_TRY(cq_loader_open(&loader, corpus,
                          &(cq_loader_options){.seq = TOKENS, .batch = 1, .micro = 1, .seed = 1}));

    CQ_TRY(cq_plan_open(&plan));
    CQ_TRY(cq_model_plan_params(teacher, plan, false));
    CQ_TRY(cq_model_plan_params(student, plan, false));
    CQ_TRY(cq_model_plan_work(student, plan, TOKENS, TOKENS, CQ_MODE_INFER, stream.threads));
    CQ_TRY(cq_plan_commit(plan, 0));
    CQ_TRY(cq_model_load(teacher));
    CQ_TRY(cq_model_load(student));

    CQ_TRY(cq_model_calibrate_begin(student));
    for (int i = 0; i < 4; i++) {
        CQ_TRY(cq_loader_next(loader, &batch, &n));
        CQ_TRY(cq_model_forward(student, &stream, batch));
    }
    CQ_TRY(cq_model_calibrate_end(student, &stream, &unreached));
    CQ_TRY(cq_export_nvfp4(student, out, 0));
    CQ_TRY(cq_export_compare(student, out, &differing));
    printf("%s: %ld experts without calibration tokens, %ld differing elements\n", out,
           (long)unreached, (long)differing);

    cq_loader_close(loader);
    cq_corpus_close(corpus);
    cq_tokenizer_close(tokenizer);
    cq_model_close(student);
    cq_model_close(teacher);
    cq_plan_close(plan);
    return differing ? CQ_EMISMATCH : CQ_OK;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: example MODEL DATA.jsonl OUT\n");
        return 2;
    }
    int status = run(argv[1], argv[2], argv[3]);
    if (status)
        fprintf(stderr, "example: %s\n", cq_error());
    return cq_exit_code(status);
}
