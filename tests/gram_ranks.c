/// gram_ranks.c - a Gram over the rows of two ranks: its gradient, added up over them, against
/// finite differences of the loss that they share; run under mpirun by ctest.
#include "tests/harness.h"

/* The weight of the layer losses on a rank: the ranks' differ, and count by their shares. */
static double weight_on(int rank) { return 0.7 * (rank + 1); }

static double share(harness *h, int rank) {
    return (double)h->batch[rank]->valid / (double)(h->batch[0]->valid + h->batch[1]->valid);
}

/* Loss of both ranks' micro-batches, on each of them. */
static double total_loss(harness *h, cq_comm *c, cq_distill_result *r) {
    int rank = cq_comm_rank(c);
    int64_t blocks = cq_model_config(h->student)->n_blocks;
    double layers = 0, kl;
    OK(cq_distill_forward(h->distill, &h->stream, h->batch[rank], 1, rank,
                          h->batch[0]->valid + h->batch[1]->valid, r));
    for (int64_t l = 0; l < blocks; l++)
        layers += r->layer_loss[l] / (double)blocks;
    kl = share(h, rank) * r->logit_loss;
    OK(cq_comm_sum(c, &kl, 1));
    return kl + (share(h, 0) * weight_on(0) + share(h, 1) * weight_on(1)) * layers;
}

static double slope(harness *h, cq_comm *c, double *at) {
    cq_distill_result r;
    double x = *at, e = 1e-4 * (fabs(x) > 0.01 ? fabs(x) : 0.01), d[2];
    for (int k = 0; k < 2; k++, e /= 2) {
        *at = x + e;
        double up = total_loss(h, c, &r);
        *at = x - e;
        d[k] = (up - total_loss(h, c, &r)) / (2 * e);
    }
    *at = x;
    return (4 * d[1] - d[0]) / 3;
}

static void check_gradients(cq_comm *c, const char *dir, cq_layer_loss loss) {
    harness h;
    harness_options o = {.dir = dir, .dtype = CQ_F64, .kernels = "ref", .mode = CQ_MODE_SAVE};
    o.distill = (cq_distill_options){.layer_loss = loss, .seed = 3, .comm = c};
    harness_open(&h, &o);
    harness_disturb(&h, 0.05);
    cq_distill_result r;
    int64_t blocks = cq_model_config(h.student)->n_blocks;
    double *w = malloc((size_t)blocks * sizeof *w);
    for (int64_t l = 0; l < blocks; l++)
        w[l] = weight_on(cq_comm_rank(c)) / (double)blocks;
    OK(cq_model_zero_grad(h.student));
    total_loss(&h, c, &r);
    cr_expect(r.rows == 48, "%ld rows in the Gram of two micro-batches of 24", (long)r.rows);
    OK(cq_distill_backward(h.distill, &h.stream, h.batch[cq_comm_rank(c)], 1, w));
#ifdef __SANITIZE_ADDRESS__
    const int64_t stride = 28;
#else
    const int64_t stride = 7;
#endif
    for (int64_t i = 0; i < cq_model_n_params(h.student); i += stride) {
        cq_param *p = cq_model_param(h.student, i);
        if (!p->grad.data)
            continue;
        int64_t n = cq_tensor_elems(p->value), k = cq_random_below(11, (uint64_t)i, 0, n);
        double want = slope(&h, c, (double *)p->value.data + k), norm = 0;
        OK(cq_comm_sum(c, p->grad.data, n));
        for (int64_t j = 0; j < n; j++)
            norm += pow(((double *)p->grad.data)[j], 2);
        double got = ((double *)p->grad.data)[k];
        double bound = 2e-5 * fabs(want) + 1e-5 * sqrt(norm / (double)n) + 1e-9;
        cr_expect(fabs(want - got) <= bound, "%s %s[%ld]: gradient %.10g, differences %.10g", dir,
                  p->name, (long)k, got, want);
    }
    free(w);
    harness_close(&h);
}

Test(gram, over_two_ranks_has_the_gradient_of_their_shared_loss) {
    cq_launch launch;
    cq_comm *c;
    OK(cq_launch_find(&launch, "gram_ranks"));
    OK(cq_comm_open(&c, &launch, 60));
    cr_assert(cq_comm_size(c) == 2, "%d ranks, wanted 2", cq_comm_size(c));
    check_gradients(c, "nemotron_h_tiny", CQ_LAYER_CKA_UNBIASED);
    check_gradients(c, "qwen3_tiny", CQ_LAYER_GRAM);
    cq_comm_close(c);
}
