/// sample.c - greedy, temperature and top-p choice of one token, in double.
///
///     w_i = exp((z_i - max z) / T)        P(i) = w_i / sum w over the tokens that are kept
///
/// Top-p keeps tokens by falling weight, ties to the lower id, until they hold top_p of the sum;
/// the one that crosses it is kept (Holtzman et al. 2020, arXiv 1904.09751). Only tokens that can
/// be among them are sorted: those below (1 - top_p) / vocab of the sum hold less than 1 - top_p.
#include "core/model/sample.h"
#include "core/base/error.h"
#include <math.h>
#include <stdlib.h>

static int64_t largest(const double *z, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (z[i] > z[best])
            best = i;
    return best;
}

double cq_sample_logprob(const double *logits, int64_t vocab, int32_t id) {
    double top = logits[largest(logits, vocab)], sum = 0;
    for (int64_t i = 0; i < vocab; i++)
        sum += exp(logits[i] - top);
    return logits[id] - top - log(sum);
}

static int by_weight(const void *left, const void *right) {
    const cq_candidate *a = left, *b = right;
    if (a->weight != b->weight)
        return a->weight > b->weight ? -1 : 1;
    return a->id < b->id ? -1 : 1;
}

/* The first of n candidates at which the running sum passes `goal`. */
static int32_t walk(const cq_candidate *c, int64_t n, double goal) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += c[i].weight;
        if (sum > goal)
            return c[i].id;
    }
    while (n > 1 && c[n - 1].weight <= 0) /* rounding: the last one that can be drawn */
        n--;
    return c[n - 1].id;
}

int cq_sample(int32_t *id, const double *logits, int64_t vocab, double temperature, double top_p,
              double uniform, cq_candidate *room) {
    int64_t best = largest(logits, vocab), n = 0;
    double sum = 0, kept = 0;
    for (int64_t i = 0; i < vocab; i++)
        if (!isfinite(logits[i]))
            return cq_fail(CQ_ENUMERIC, "logit of token %ld is %g, wanted a number", (long)i,
                           logits[i]);
    *id = (int32_t)best;
    if (temperature == 0)
        return CQ_OK;
    for (int64_t i = 0; i < vocab; i++) {
        room[i] = (cq_candidate){exp((logits[i] - logits[best]) / temperature), (int32_t)i};
        sum += room[i].weight;
    }
    if (top_p >= 1) {
        *id = walk(room, vocab, uniform * sum);
        return CQ_OK;
    }
    for (int64_t i = 0; i < vocab; i++)
        if (i == best || room[i].weight >= (1 - top_p) * sum / (double)vocab)
            room[n++] = room[i];
    qsort(room, (size_t)n, sizeof *room, by_weight);
    int64_t few = 0;
    do
        kept += room[few++].weight;
    while (few < n && kept < top_p * sum);
    *id = walk(room, few, uniform * kept);
    return CQ_OK;
}
