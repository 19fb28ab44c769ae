/// expert_ranks.c - experts dealt out over ranks against a model that has them all: losses, hidden
/// states, gradients, calibrated maxima and updated weights, bit for bit; run under mpirun by
/// ctest.
#include "tests/harness.h"

/* The loss that a step wants least of: layer weights differ from block to block. */
static void pass(harness *h, int micro, int64_t valid, cq_distill_result *r) {
    int64_t blocks = cq_model_config(h->student)->n_blocks;
    double *w = calloc((size_t)blocks, sizeof *w);
    for (int64_t l = 0; l < blocks; l++)
        w[l] = 0.1 * (double)(l + 1);
    OK(cq_distill_forward(h->distill, &h->stream, h->batch[micro], 1, micro, valid, r));
    OK(cq_distill_backward(h->distill, &h->stream, h->batch[micro], 0.9, w));
    free(w);
}

static bool same(cq_tensor a, cq_tensor b) {
    return cq_tensor_bytes(a) == cq_tensor_bytes(b) &&
           !memcmp(a.data, b.data, (size_t)cq_tensor_bytes(a));
}

static bool is_expert(const cq_param *p) { return strstr(p->name, ".experts.") != NULL; }

/* Each rank's own micro-batch, the last ranks' none, against the same on a model of its own; then
 * the experts' gradients against those of all micro-batches in order. */
static void check_step(harness *whole, harness *dealt, int rank, const char *what) {
    cq_distill_result a = {0}, b = {0};
    int64_t valid = whole->batch[0]->valid + whole->batch[1]->valid, wrong = 0, experts = 0;
    int64_t n = cq_model_n_params(whole->student);
    cq_tensor *sum = calloc((size_t)n, sizeof *sum);
    OK(cq_model_zero_grad(dealt->student));
    if (rank < 2)
        pass(dealt, rank, valid, &b);
    else
        OK(cq_distill_serve(dealt->distill, &dealt->stream));
    for (int micro = 0; micro < 2; micro++) {
        OK(cq_model_zero_grad(whole->student));
        pass(whole, micro, valid, &a);
        if (micro == rank) {
            cr_expect(a.logit_loss == b.logit_loss, "%s: KL %.17g, wanted %.17g", what,
                      b.logit_loss, a.logit_loss);
            for (int64_t l = 0; l < cq_model_config(whole->student)->n_blocks; l++)
                cr_expect(a.layer_loss[l] == b.layer_loss[l], "%s: block %ld", what, (long)l);
            cq_tensor x = *cq_model_final(whole->student), y = *cq_model_final(dealt->student);
            int64_t rows = whole->batch[micro]->tokens;
            cr_expect(same(cq_tensor_rows(x, 0, rows), cq_tensor_rows(y, 0, rows)),
                      "%s: final hidden state", what);
        }
        for (int64_t i = 0; i < n; i++) {
            cq_param *p = cq_model_param(whole->student, i), *q = cq_model_param(dealt->student, i);
            int64_t elems = cq_tensor_elems(p->value);
            if (!p->grad.data)
                continue;
            if (!is_expert(p)) {
                wrong += micro == rank && !same(p->grad, q->grad);
                continue;
            }
            if (!sum[i].data)
                sum[i] = (cq_tensor){calloc((size_t)elems, 8), p->shape, p->grad.dtype};
            for (int64_t k = 0; k < elems; k++)
                if (p->grad.dtype == CQ_F64)
                    ((double *)sum[i].data)[k] += ((double *)p->grad.data)[k];
                else
                    ((float *)sum[i].data)[k] += ((float *)p->grad.data)[k];
        }
    }
    cr_expect(wrong == 0, "%s: %ld gradients differ", what, (long)wrong);
    for (int64_t i = 0; i < n; i++) {
        cq_param *q = cq_model_param(dealt->student, i);
        if (!sum[i].data)
            continue;
        cr_expect((q->grad.data != NULL) == (q->holder == rank), "%s: %s", what, q->name);
        if (q->holder == rank)
            cr_expect(same(sum[i], q->grad), "%s: gradient of %s", what, q->name);
        experts += q->holder == rank;
        free(sum[i].data);
    }
    cr_expect(experts > 0, "%s: no expert's gradient was compared", what);
    free(sum);
}

static void check_maxima(harness *whole, harness *dealt, const char *what) {
    for (int64_t i = 0; i < cq_model_n_params(whole->student); i++) {
        cq_param *p = cq_model_param(whole->student, i), *q = cq_model_param(dealt->student, i);
        cr_expect(!p->quantized || (p->amax == q->amax && *p->amax_x == *q->amax_x), "%s: %s", what,
                  p->name);
    }
}

/* A step of the optimizer moves this rank's experts, and leaves all else the same on all ranks. */
static void check_update(harness *dealt, cq_comm *c, const char *what) {
    int64_t n = cq_model_n_params(dealt->student), moved = 0, experts = 0;
    char(*before)[65] = calloc((size_t)n, sizeof *before), hex[65];
    double norm;
    cq_sha256 s;
    for (int after = 0; after < 2; after++) {
        cq_sha256 rest;
        cq_sha256_init(&rest);
        for (int64_t i = 0; i < n; i++) {
            cq_param *p = cq_model_param(dealt->student, i);
            cr_expect((p->value.data != NULL) == (!is_expert(p) || p->holder == cq_comm_rank(c)),
                      "%s: %s", what, p->name);
            cq_sha256_init(&s);
            harness_add(is_expert(p) ? &s : &rest, p->value);
            harness_add(&s, p->low);
            cq_sha256_hex(&s, hex);
            if (after && is_expert(p) && p->value.data) {
                moved += strcmp(before[i], hex) != 0;
                experts++;
            }
            memcpy(before[i], hex, sizeof hex);
        }
        cq_sha256_hex(&rest, hex);
        OK(cq_comm_agree(c, what, hex));
        if (after)
            break;
        OK(cq_adamw_add(dealt->adam, &dealt->stream, 2));
        OK(cq_adamw_step(dealt->adam, &dealt->stream, 1e-2, 1, &norm));
        OK(cq_adamw_masters(dealt->adam));
    }
    cr_expect(moved > 0, "%s: none of %ld experts was updated", what, (long)experts);
    free(before);
}

static void check(cq_comm *c, const char *preset, cq_dtype dtype, const char *kernels, cq_mode mode,
                  cq_master master) {
    char what[96];
    harness whole, dealt;
    snprintf(what, sizeof what, "%s, %s kernels, %s", preset, kernels,
             mode == CQ_MODE_SAVE ? "saved" : "recomputed");
    harness_options o = {.dir = "nemotron_h_tiny",
                         .dtype = dtype,
                         .kernels = kernels,
                         .mode = mode,
                         .quant = {.preset = preset},
                         .master = master,
                         .distill = {.layer_loss = CQ_LAYER_CKA_UNBIASED, .many = true, .seed = 3}};
    harness_open(&whole, &o);
    o.experts = c;
    harness_open(&dealt, &o);
    check_maxima(&whole, &dealt, what);
    if (master == CQ_MASTER_F32) {
        harness_disturb(&whole, 0.05);
        harness_disturb(&dealt, 0.05);
    }
    check_step(&whole, &dealt, cq_comm_rank(c), what);
    check_update(&dealt, c, what);
    harness_close(&dealt);
    harness_close(&whole);
}

Test(experts, dealt_out_over_ranks_give_the_bits_of_one_model_that_has_them_all) {
    cq_launch launch;
    cq_comm *c;
    OK(cq_launch_find(&launch, "expert_ranks"));
    OK(cq_comm_open(&c, &launch, 60));
    cr_assert(cq_comm_size(c) > 1, "1 rank, wanted 2 or 3");
    check(c, "none", CQ_F64, "ref", CQ_MODE_SAVE, CQ_MASTER_F32);
    check(c, "none", CQ_F32, "cpu", CQ_MODE_SAVE, CQ_MASTER_F32);
    check(c, "all", CQ_F32, "cpu", CQ_MODE_SAVE, CQ_MASTER_F32);
    check(c, "all", CQ_F32, "cpu", CQ_MODE_RECOMPUTE, CQ_MASTER_SPLIT);
    cq_comm_close(c);
}
