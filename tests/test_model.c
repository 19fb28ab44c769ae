/* test_model.c - whole models: gradients against finite differences, and bits that must not depend
 * on how a step is run. */
#include "tests/harness.h"
#include <unistd.h>

static const char *const models[] = {"nemotron_h_tiny", "qwen3_tiny"};

static harness_options pair(const char *dir) {
    return (harness_options){.dir = dir,
                             .dtype = CQ_F32,
                             .kernels = "cpu",
                             .mode = CQ_MODE_SAVE,
                             .quant = {.preset = "all"},
                             .distill = {.layer_loss = CQ_LAYER_CKA_UNBIASED, .seed = 3}};
}

static double *at(cq_param *p, int64_t i) { return (double *)p->value.data + i; }

/* kl + 0.7 mean(layer loss), the loss of the golden files. `weights` are for a policy loss only. */
static double total_loss(harness *h, const float *weights, cq_distill_result *r) {
    int64_t blocks = cq_model_config(h->student)->n_blocks;
    double sum = 0;
    if (weights)
        OK(cq_distill_set_weights(h->distill, weights, h->batch[0]->tokens));
    OK(cq_distill_forward(h->distill, &h->stream, h->batch[0], 1, 0, h->batch[0]->valid, r));
    for (int64_t l = 0; l < blocks; l++)
        sum += isnan(r->layer_loss[l]) ? 0 : r->layer_loss[l];
    return r->logit_loss + 0.7 * sum / (double)blocks;
}

/* Richardson-extrapolated central difference of one element. */
static double slope(harness *h, const float *weights, cq_param *p, int64_t i) {
    cq_distill_result r;
    double x = *at(p, i), e = 1e-4 * (fabs(x) > 0.01 ? fabs(x) : 0.01), d[2];
    for (int k = 0; k < 2; k++, e /= 2) {
        *at(p, i) = x + e;
        double up = total_loss(h, weights, &r);
        *at(p, i) = x - e;
        d[k] = (up - total_loss(h, weights, &r)) / (2 * e);
    }
    *at(p, i) = x;
    return (4 * d[1] - d[0]) / 3;
}

/* Parameters looked at: all, or under a sanitizer, which is after other mistakes, one in 24. */
#ifdef __SANITIZE_ADDRESS__
enum { PARAM_STRIDE = 24 };
#else
enum { PARAM_STRIDE = 1 };
#endif

static void check_gradients(const char *dir, cq_layer_loss layer_loss, cq_logit_loss logit_loss) {
    harness h;
    harness_options o = pair(dir);
    o.dtype = CQ_F64;
    o.kernels = "ref";
    o.quant.preset = "none";
    o.distill.layer_loss = layer_loss;
    o.distill.logit_loss = logit_loss;
    harness_open(&h, &o);
    harness_disturb(&h, 0.05);
    int64_t blocks = cq_model_config(h.student)->n_blocks;
    double *w = malloc((size_t)blocks * sizeof *w);
    for (int64_t l = 0; l < blocks; l++)
        w[l] = 0.7 / (double)blocks;
    cq_distill_result r;
    OK(cq_model_zero_grad(h.student));
    float some[64], *weights = logit_loss == CQ_LOGIT_POLICY ? some : NULL;
    for (int i = 0; i < 64; i++)
        some[i] = (float)cq_random_normal(12, 0, (uint64_t)i);
    total_loss(&h, weights, &r);
    OK(cq_distill_backward(h.distill, &h.stream, h.batch[0], 1, w));
    for (int64_t i = 0; i < cq_model_n_params(h.student); i += PARAM_STRIDE) {
        cq_param *p = cq_model_param(h.student, i);
        if (!p->grad.data)
            continue;
        int64_t n = cq_tensor_elems(p->value), k = cq_random_below(11, (uint64_t)i, 0, n);
        double norm = 0, want = slope(&h, weights, p, k), got = ((double *)p->grad.data)[k];
        for (int64_t j = 0; j < n; j++)
            norm += pow(((double *)p->grad.data)[j], 2);
        double bound = 2e-5 * fabs(want) + 1e-5 * sqrt(norm / (double)n) + 1e-9;
        cr_expect(fabs(want - got) <= bound, "%s %s[%ld]: gradient %.10g, differences %.10g", dir,
                  p->name, (long)k, got, want);
    }
    free(w);
    harness_close(&h);
}

Test(model, gradient_of_kl_and_unbiased_cka_equals_differences_nemotron) {
    check_gradients(models[0], CQ_LAYER_CKA_UNBIASED, CQ_LOGIT_KL);
}
Test(model, gradient_of_kl_and_biased_cka_equals_differences_qwen3) {
    check_gradients(models[1], CQ_LAYER_CKA, CQ_LOGIT_KL);
}
Test(model, gradient_of_cross_entropy_and_cosine_equals_differences_qwen3) {
    check_gradients(models[1], CQ_LAYER_COSINE, CQ_LOGIT_CE);
}
Test(model, gradient_of_weighted_labels_equals_differences_nemotron) {
    check_gradients(models[0], CQ_LAYER_NONE, CQ_LOGIT_POLICY);
}
Test(model, weights_of_labels_are_for_one_forward_of_a_policy_loss) {
    harness h;
    harness_options o = pair(models[1]);
    cq_distill_result a, b;
    float weights[43];
    for (int i = 0; i < 43; i++)
        weights[i] = 1;
    o.distill.layer_loss = CQ_LAYER_NONE;
    o.distill.logit_loss = CQ_LOGIT_CE;
    harness_open(&h, &o);
    cr_expect_eq(cq_distill_set_weights(h.distill, weights, 43), CQ_EUSAGE, "no policy loss");
    total_loss(&h, NULL, &a);
    harness_close(&h);
    o.distill.logit_loss = CQ_LOGIT_POLICY;
    harness_open(&h, &o);
    cr_expect_eq(cq_distill_set_weights(h.distill, weights, 44), CQ_EUSAGE, "more than planned");
    total_loss(&h, weights, &b);
    cr_expect_eq(a.logit_loss, b.logit_loss, "weights of 1 are cross-entropy");
    cr_expect_eq(cq_distill_forward(h.distill, &h.stream, h.batch[0], 2, 0, h.batch[0]->valid, &b),
                 CQ_EUSAGE, "the weights are used up");
    harness_close(&h);
}
Test(model, gradient_of_gram_loss_alone_equals_differences_nemotron) {
    check_gradients(models[0], CQ_LAYER_GRAM, CQ_LOGIT_NONE);
}
Test(model, gradient_of_relative_mse_equals_differences_qwen3) {
    check_gradients(models[1], CQ_LAYER_MSE, CQ_LOGIT_KL);
}

static void run_steps(const harness_options *o, int steps, char hex[65]) {
    harness h;
    harness_open(&h, o);
    for (int i = 1; i <= steps; i++)
        harness_step(&h, i, o->distill.many ? 2 : 1, 1, 0.5);
    harness_hash(&h, hex);
    harness_close(&h);
}

Test(model, same_seed_gives_the_same_bits_and_another_seed_others) {
    for (int m = 0; m < 2; m++) {
        char a[65], b[65], c[65];
        harness_options o = pair(models[m]);
        o.threads = 2;
        o.distill.many = true;
        run_steps(&o, 3, a);
        run_steps(&o, 3, b);
        o.distill.seed = 4;
        run_steps(&o, 3, c);
        cr_expect_str_eq(a, b, "%s", models[m]);
        cr_expect_str_neq(a, c, "%s: the sampled rows do not matter", models[m]);
    }
}

Test(model, recomputing_activations_gives_the_bits_of_keeping_them) {
    for (int m = 0; m < 2; m++) {
        char a[65], b[65];
        harness_options o = pair(models[m]);
        run_steps(&o, 3, a);
        o.mode = CQ_MODE_RECOMPUTE;
        run_steps(&o, 3, b);
        cr_expect_str_eq(a, b, "%s", models[m]);
    }
}

Test(model, recomputing_plans_fewer_bytes) {
    harness a, b;
    harness_options o = pair(models[0]);
    harness_open(&a, &o);
    o.mode = CQ_MODE_RECOMPUTE;
    harness_open(&b, &o);
    cr_expect_lt(cq_plan_bytes(b.plan, CQ_N_PURPOSES), cq_plan_bytes(a.plan, CQ_N_PURPOSES));
    harness_close(&a);
    harness_close(&b);
}

Test(model, weight_of_zero_leaves_the_head_untouched) {
    harness h;
    harness_options o = pair(models[0]);
    harness_open(&h, &o);
    harness_disturb(&h, 0.05);
    cq_distill_result r;
    OK(cq_model_zero_grad(h.student));
    OK(cq_distill_forward(h.distill, &h.stream, h.batch[0], 1, 0, h.batch[0]->valid, &r));
    OK(cq_distill_backward(h.distill, &h.stream, h.batch[0], 0, NULL));
    for (int64_t i = 0; i < cq_model_n_params(h.student); i++) {
        cq_param *p = cq_model_param(h.student, i);
        for (int64_t k = 0; p->grad.data && k < cq_tensor_elems(p->grad); k++)
            cr_assert_eq(((float *)p->grad.data)[k], 0.0f, "%s", p->name);
    }
    harness_close(&h);
}

/* Gradient of two micro-batches equals the sum of what each gives alone at the same normalization.
 */
Test(model, micro_batches_add_up_also_with_a_free_weight) {
    harness h;
    harness_options o = pair(models[1]);
    o.distill.many = true;
    harness_open(&h, &o);
    harness_disturb(&h, 0.05);
    cq_param *head = cq_model_head(h.student);
    int64_t n = cq_tensor_elems(head->grad), valid = h.batch[0]->valid + h.batch[1]->valid;
    float *sum = calloc((size_t)n, sizeof *sum);
    cq_distill_result r;
    for (int i = 0; i < 2; i++) {
        OK(cq_model_zero_grad(h.student));
        OK(cq_distill_forward(h.distill, &h.stream, h.batch[i], 1, i, valid, &r));
        OK(cq_distill_backward(h.distill, &h.stream, h.batch[i], i ? 0.25 : 3, NULL));
        for (int64_t k = 0; k < n; k++)
            sum[k] += ((float *)head->grad.data)[k];
    }
    OK(cq_model_zero_grad(h.student));
    for (int i = 0; i < 2; i++) {
        OK(cq_distill_forward(h.distill, &h.stream, h.batch[i], 1, i, valid, &r));
        OK(cq_distill_backward(h.distill, &h.stream, h.batch[i], i ? 0.25 : 3, NULL));
    }
    for (int64_t k = 0; k < n; k++)
        cr_assert_float_eq(((float *)head->grad.data)[k], sum[k],
                           1e-6 + 1e-5 * fabs((double)sum[k]));
    free(sum);
    harness_close(&h);
}

Test(model, measuring_gradient_norms_changes_nothing) {
    char a[65], b[65];
    for (int measure = 0; measure < 2; measure++) {
        harness h;
        harness_options o = pair(models[0]);
        harness_open(&h, &o);
        harness_disturb(&h, 0.05);
        cq_distill_result r;
        double norm, kl[64], layer[64], w[64];
        int64_t blocks = cq_model_config(h.student)->n_blocks;
        OK(cq_model_zero_grad(h.student));
        OK(cq_distill_forward(h.distill, &h.stream, h.batch[0], 1, 0, h.batch[0]->valid, &r));
        if (measure) {
            OK(cq_distill_norms(h.distill, &h.stream, h.batch[0], kl, layer));
            for (int64_t l = 0; l < blocks; l++)
                cr_expect(kl[l] > 0 && layer[l] > 0, "block %ld: norms %g and %g", (long)l, kl[l],
                          layer[l]);
        }
        for (int64_t l = 0; l < blocks; l++)
            w[l] = 0.1;
        OK(cq_distill_backward(h.distill, &h.stream, h.batch[0], 1, w));
        OK(cq_adamw_step(h.adam, &h.stream, 1e-3, 1, &norm));
        harness_hash(&h, measure ? b : a);
        harness_close(&h);
    }
    cr_expect_str_eq(a, b);
}

Test(model, blocks_whose_grams_are_made_together_have_the_bits_of_one_at_a_time) {
    static const int64_t together[] = {1, 2, 3, 64};
    char hash[4][65];
    double layer[4];
    for (int i = 0; i < 4; i++) {
        harness h;
        harness_options o = pair(models[0]);
        o.distill.many = true;
        o.distill.together = together[i];
        harness_open(&h, &o);
        harness_disturb(&h, 0.05);
        double norms[2][64];
        cq_distill_result r;
        harness_step(&h, 1, 2, 1, 2);
        harness_step(&h, 2, 2, 0.5, 1);
        harness_hash(&h, hash[i]);
        OK(cq_distill_forward(h.distill, &h.stream, h.batch[1], 3, 0, h.batch[1]->valid, &r));
        OK(cq_distill_norms(h.distill, &h.stream, h.batch[1], norms[0], norms[1]));
        layer[i] = 0;
        for (int64_t l = 0; l < cq_model_config(h.student)->n_blocks; l++)
            layer[i] += norms[1][l] * (double)(l + 1) + r.layer_loss[l];
        cr_expect(layer[i] > 0);
        cr_expect_str_eq(hash[i], hash[0], "%ld together", (long)together[i]);
        cr_expect(layer[i] == layer[0], "%ld together", (long)together[i]);
        harness_close(&h);
    }
}

/* A step of two micro-batches by the rule `ratio`, from the host or where the losses are. */
static void step_by_ratio(harness *h, bool there, cq_distill_result r[2], double layer[2]) {
    int64_t blocks = cq_model_config(h->student)->n_blocks;
    int64_t valid = h->batch[0]->valid + h->batch[1]->valid;
    double w[64], norm;
    OK(cq_model_zero_grad(h->student));
    for (int i = 0; i < 2; i++) {
        if (there) {
            OK(cq_distill_start(h->distill, &h->stream, h->batch[i], 1, i, valid, 1 - i));
            OK(cq_distill_backward_ratio(h->distill, &h->stream, h->batch[i], 2.5));
            continue;
        }
        OK(cq_distill_forward(h->distill, &h->stream, h->batch[i], 1, i, valid, &r[i]));
        double gap = 0;
        for (int64_t l = 0; l < blocks; l++)
            gap += 1 - (1 - r[i].layer_loss[l]);
        r[i].weight = fmin(r[i].logit_loss / fmax(gap / (double)blocks, 1e-8), 2.5);
        layer[i] = r[i].layer_loss[blocks - 1];
        for (int64_t l = 0; l < blocks; l++)
            w[l] = r[i].weight / (double)blocks;
        OK(cq_distill_backward(h->distill, &h->stream, h->batch[i], 1, w));
    }
    OK(cq_adamw_measure(h->adam, &h->stream));
    for (int i = 0; i < 2 && there; i++) {
        OK(cq_distill_read(h->distill, 1 - i, &r[i]));
        layer[i] = r[i].layer_loss[blocks - 1];
    }
    OK(cq_adamw_step(h->adam, &h->stream, 1e-3, 1, &norm));
}

Test(model, a_rule_worked_out_where_the_losses_are_gives_the_bits_of_one_on_the_host) {
    for (cq_layer_loss loss = CQ_LAYER_CKA; loss <= CQ_LAYER_GRAM; loss++) {
        char hash[2][65];
        double layer[2][2];
        cq_distill_result r[2][2];
        for (int there = 0; there < 2; there++) {
            harness h;
            harness_options o = pair(models[0]);
            o.distill.layer_loss = loss;
            o.distill.many = true;
            o.distill.slots = 2;
            o.distill.together = 1 + 2 * there;
            harness_open(&h, &o);
            harness_disturb(&h, 0.05);
            step_by_ratio(&h, there, r[there], layer[there]);
            harness_hash(&h, hash[there]);
            harness_close(&h);
        }
        cr_expect_str_eq(hash[0], hash[1], "loss %d", (int)loss);
        for (int i = 0; i < 2; i++) {
            cr_expect(r[0][i].weight == r[1][i].weight && r[0][i].weight > 0, "loss %d", (int)loss);
            cr_expect(r[0][i].logit_loss == r[1][i].logit_loss && layer[0][i] == layer[1][i]);
            cr_expect(r[0][i].accuracy == r[1][i].accuracy && r[0][i].rows == r[1][i].rows);
        }
        cr_expect(r[0][0].logit_loss != r[0][1].logit_loss, "two micro-batches, two results");
    }
}
Test(model, results_lie_in_a_slot_that_exists_and_was_filled) {
    harness h;
    harness_options o = pair(models[1]);
    o.distill.slots = 2;
    harness_open(&h, &o);
    cq_distill_result r;
    const cq_batch *b = h.batch[0];
    cr_expect_eq(cq_distill_read(h.distill, 0, &r), CQ_EUSAGE);
    cr_expect_eq(cq_distill_start(h.distill, &h.stream, b, 1, 0, b->valid, 2), CQ_EUSAGE);
    OK(cq_distill_start(h.distill, &h.stream, b, 1, 0, b->valid, 1));
    cr_expect_eq(cq_distill_rows(h.distill), 24);
    cr_expect_eq(cq_distill_read(h.distill, 0, &r), CQ_EUSAGE);
    cr_expect_eq(cq_distill_read(h.distill, 2, &r), CQ_EUSAGE);
    OK(cq_distill_read(h.distill, 1, &r));
    cr_expect(r.logit_loss > 0 && r.valid == b->valid);
    harness_close(&h);
}

Test(model, frozen_parameters_are_the_teachers_own_memory) {
    harness h;
    harness_options o = pair(models[0]);
    o.quant.freeze = "*experts*,*embeddings*";
    harness_open(&h, &o);
    cq_param *s = cq_model_find(h.student, "backbone.layers.1.mixer.experts.0.up_proj.weight");
    cq_param *t = cq_model_find(h.teacher, s->name);
    cr_expect_eq(s->value.data, t->value.data);
    cr_expect_neq(s->fq.data, t->value.data, "a quantized weight has a copy of its own");
    cr_expect_null(s->grad.data);
    cr_expect_eq(cq_model_find(h.student, "backbone.embeddings.weight")->value.data,
                 cq_model_find(h.teacher, "backbone.embeddings.weight")->value.data);
    char before[65], after[65];
    cq_sha256 hash;
    for (int i = 0; i < 2; i++) {
        cq_sha256_init(&hash);
        cq_sha256_add(&hash, t->value.data, (size_t)cq_tensor_bytes(t->value));
        cq_sha256_hex(&hash, i ? after : before);
        harness_step(&h, i + 1, 1, 1, 0.5);
    }
    cr_expect_str_eq(before, after);
    harness_close(&h);
}

Test(model, a_checkpoint_continues_bit_for_bit) {
    char a[65], b[65], dir[256], *json;
    harness h;
    harness_options o = pair(models[0]);
    o.quant.scales = CQ_SCALE_FOUR_OVER_SIX;
    snprintf(dir, sizeof dir, "/tmp/ckaqad-test-checkpoint-%ld", (long)getpid());
    harness_open(&h, &o);
    harness_step(&h, 1, 1, 1, 0.5);
    OK(cq_checkpoint_save(dir, h.student, h.adam, "{\"step\": 1}"));
    harness_step(&h, 2, 1, 1, 0.5);
    harness_hash(&h, a);
    harness_close(&h);
    harness_open(&h, &o);
    OK(cq_checkpoint_load(dir, h.student, h.adam, &h.stream, &json));
    cr_expect_str_eq(json, "{\"step\": 1}");
    free(json);
    harness_step(&h, 2, 1, 1, 0.5);
    harness_hash(&h, b);
    cr_expect_str_eq(a, b);
    harness_close(&h);
    o = pair(models[1]);
    harness_open(&h, &o);
    cr_expect_eq(cq_checkpoint_load(dir, h.student, h.adam, &h.stream, &json), CQ_EDATA,
                 "another model's state is refused");
    harness_close(&h);
    OK(cq_folder_remove(dir));
}

Test(model, narrow_forms_continue_bit_for_bit_and_others_are_refused) {
    char a[65], b[65], dir[256], *json;
    harness h;
    snprintf(dir, sizeof dir, "/tmp/ckaqad-test-narrow-%ld", (long)getpid());
    for (int split = 0; split < 2; split++) {
        harness_options o = pair(models[split]);
        o.master = split ? CQ_MASTER_SPLIT : CQ_MASTER_BF16;
        o.moments = split ? CQ_MOMENTS_BF16 : CQ_MOMENTS_8BIT;
        harness_open(&h, &o);
        harness_step(&h, 1, 1, 1, 0.5);
        OK(cq_checkpoint_save(dir, h.student, h.adam, "{}"));
        harness_step(&h, 2, 1, 1, 0.5);
        harness_hash(&h, a);
        harness_close(&h);
        harness_open(&h, &o);
        OK(cq_checkpoint_load(dir, h.student, h.adam, &h.stream, &json));
        free(json);
        harness_step(&h, 2, 1, 1, 0.5);
        harness_hash(&h, b);
        cr_expect_str_eq(a, b);
        harness_close(&h);
        o.master = CQ_MASTER_F32;
        harness_open(&h, &o);
        cr_expect_eq(cq_checkpoint_load(dir, h.student, h.adam, &h.stream, &json), CQ_EDATA);
        cr_expect(strstr(cq_error(), "--master"), "%s", cq_error());
        harness_close(&h);
    }
    OK(cq_folder_remove(dir));
}

Test(model, a_split_master_trains_like_f32_and_narrow_ones_start_alike) {
    float *want = NULL;
    for (int form = CQ_MASTER_F32; form <= CQ_MASTER_BF16; form++) {
        harness h;
        harness_options o = pair(models[0]);
        o.master = (cq_master)form;
        harness_open(&h, &o);
        double kl = harness_step(&h, 1, 2, 1, 0.5), first = 0;
        cq_param *p = cq_model_find(h.student, "backbone.layers.2.mixer.out_proj.weight");
        int64_t n = cq_tensor_elems(p->value);
        if (form != CQ_MASTER_BF16) /* BF16 differs from here on */
            kl += harness_step(&h, 2, 2, 1, 0.5);
        cq_tensor x;
        void *owned;
        OK(cq_param_master(&x, &owned, p));
        cr_expect_eq(p->value.dtype, form ? CQ_BF16 : CQ_F32);
        if (!want) {
            want = malloc((size_t)n * 2 * sizeof *want + sizeof kl);
            memcpy(want, x.data, (size_t)n * sizeof *want);
            memcpy(want + n, p->fq.data, (size_t)n * sizeof *want);
            memcpy(want + 2 * n, &kl, sizeof kl);
        } else if (form == CQ_MASTER_SPLIT) {
            memcpy(&first, want + 2 * n, sizeof first);
            cr_expect_eq(kl, first);
            cr_expect_arr_eq(x.data, want, (size_t)n * sizeof *want);
            cr_expect_arr_eq(p->fq.data, want + n, (size_t)n * sizeof *want);
        }
        free(owned);
        harness_close(&h);
    }
    free(want);
}

Test(model, a_loss_that_is_not_finite_names_step_and_block) {
    harness h;
    harness_options o = pair(models[0]);
    harness_open(&h, &o);
    cq_param *p = cq_model_find(h.student, "backbone.layers.2.mixer.D");
    ((float *)p->value.data)[3] = NAN; /* must pass the quantizer of the output projection */
    cq_distill_result r;
    cr_expect_eq(cq_distill_forward(h.distill, &h.stream, h.batch[0], 17, 0, h.batch[0]->valid, &r),
                 CQ_ENUMERIC);
    cr_expect(strstr(cq_error(), "step 17") && strstr(cq_error(), "block 2"), "%s", cq_error());
    harness_close(&h);
}
