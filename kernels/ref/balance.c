/* balance.c - the weight of the layerwise term from the losses, and a report of both. In double
   whatever the tensors are: there is one instance. */
#include "kernels/ref/ref.h"

int cq_ref_balance(cq_stream *s, const cq_balance_args *a) {
    double sum = 0, weight = 0;
    (void)s;
    for (int64_t i = 0; i < a->n; i++) {
        double cka = 1 - a->stats[4 * a->order[i] + 3];
        sum += 1 - cka;
    }
    if (a->ratio) {
        double kl = *a->sum / a->valid, gap = a->n > 0 ? sum / (double)a->n : 0;
        weight = (kl > 0 ? kl : 0) / (gap > 1e-8 ? gap : 1e-8);
        weight = weight < a->most ? weight : a->most;
    }
    a->report[0] = *a->sum;
    a->report[1] = (double)*a->right;
    a->report[2] = weight;
    for (int64_t i = 0; i < a->n; i++) {
        a->report[3 + i] = a->stats[4 * i + 3];
        if (a->ratio)
            a->weights[i] = weight / (double)a->n * a->share;
    }
    return CQ_OK;
}
