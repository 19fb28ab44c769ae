/* simd_moe.c - routing to experts and moving rows: gather, scatter, combine, embedding. Formulas
 * are kernels/ref/route.inc.h's and rows.inc.h's.
 *
 * A sum over slots or tokens runs in ascending order and belongs to one thread: the embedding's
 * gradient gives a vocabulary row to the thread `id % threads`, so the order of additions does not
 * depend on the number of threads.
 */
#include <math.h>
#include <string.h>

#include "core/base/error.h"
#include "kernels/cpu/fakequant.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"
#include <omp.h>

enum { MOST_EXPERTS = 1024 };

static void copy_row(float *to, const float *from, int64_t n) {
    memcpy(to, from, (size_t)n * sizeof(float));
}

/// Index of the largest value not yet taken, the lowest one of equals, and takes it.
static int64_t take_best(const float *value, bool *taken, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || value[i] > value[best]))
            best = i;
    if (best >= 0)
        taken[best] = true;
    return best;
}

/// The sum of the two best choices of n experts: what a group is ranked by.
static float group_score(const float *choice, int64_t n) {
    float best = choice[0], second = n > 1 ? choice[1] : 0.0f;
    if (n > 1 && second > best) {
        best = choice[1];
        second = choice[0];
    }
    for (int64_t e = 2; e < n; e++) {
        second = choice[e] > best ? best : choice[e] > second ? choice[e] : second;
        best = choice[e] > best ? choice[e] : best;
    }
    return best + second;
}

static void route_token(const cq_route_forward_args *a, int64_t t) {
    float s[MOST_EXPERTS], choice[MOST_EXPERTS], score[MOST_EXPERTS];
    bool taken[MOST_EXPERTS] = {false}, won[MOST_EXPERTS] = {false};
    int64_t size = a->experts / a->n_group;
    const float *logits = (const float *)a->logits + t * a->experts;
    int32_t *sel = a->sel + t * a->top_k;
    float *weight = (float *)a->weight + t * a->top_k;
    for (int64_t e = 0; e < a->experts; e++) {
        s[e] = vec_sigmoid(logits[e]);
        choice[e] = s[e] + a->bias[e];
    }
    if (a->topk_group < a->n_group) {
        for (int64_t g = 0; g < a->n_group; g++)
            score[g] = group_score(choice + g * size, size);
        for (int64_t i = 0; i < a->topk_group; i++)
            take_best(score, won, a->n_group);
        for (int64_t e = 0; e < a->experts; e++)
            taken[e] = !won[e / size];
    }
    float sum = 0.0f;
    for (int64_t j = 0; j < a->top_k; j++) {
        sel[j] = (int32_t)take_best(choice, taken, a->experts);
        sum += s[sel[j]];
    }
    float factor = (float)a->scaling / (a->normalize ? sum + 1e-20f : 1.0f);
    for (int64_t j = 0; j < a->top_k; j++)
        weight[j] = factor * s[sel[j]];
}

int CQ_OP(route_forward)(cq_stream *s, const cq_route_forward_args *a) {
    if (a->dtype != CQ_F32 || a->experts > MOST_EXPERTS || a->n_group < 1 ||
        a->experts % a->n_group || a->topk_group < 1 || a->topk_group > a->n_group ||
        a->top_k < 1 || a->top_k > a->topk_group * (a->experts / a->n_group))
        return cq_ref_route_forward(s, a); /* which also words the errors */
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++)
        route_token(a, t);
    return CQ_OK;
}

int CQ_OP(route_backward)(cq_stream *s, const cq_route_backward_args *a) {
    CQ_F32_OR_REF(route_backward);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *logits = (const float *)a->logits + t * a->experts;
        const float *dweight = (const float *)a->dweight + t * a->top_k;
        const int32_t *sel = a->sel + t * a->top_k;
        float *dlogits = (float *)a->dlogits + t * a->experts, z = 1e-20f, dot = 0.0f;
        for (int64_t j = 0; j < a->top_k; j++) {
            float v = vec_sigmoid(logits[sel[j]]);
            z += v;
            dot += dweight[j] * v;
        }
        float factor = (float)a->scaling / (a->normalize ? z : 1.0f);
        float mean = a->normalize ? dot / z : 0.0f;
        memset(dlogits, 0, (size_t)a->experts * sizeof(float));
        for (int64_t j = 0; j < a->top_k; j++) {
            float v = vec_sigmoid(logits[sel[j]]);
            dlogits[sel[j]] = factor * (dweight[j] - mean) * v * (1.0f - v);
        }
    }
    return CQ_OK;
}

/// A counting sort touches each pair twice and nothing else: ref's is as fast as any.
int CQ_OP(route_sort)(cq_stream *s, const cq_route_sort_args *a) { return cq_ref_route_sort(s, a); }

int CQ_OP(gather_rows)(cq_stream *s, const cq_gather_rows_args *a) {
    CQ_F32_OR_REF(gather_rows);
    if (a->yq)
        CQ_TRY(fq_check("gather_rows", &a->fq, a->dim));
    int64_t saturated = 0;
#pragma omp parallel for schedule(static) reduction(+ : saturated) num_threads(s->threads)
    for (int64_t i = 0; i < a->rows; i++) {
        const float *row = (const float *)a->x + (int64_t)a->index[i] * a->dim;
        if (a->y)
            copy_row((float *)a->y + i * a->dim, row, a->dim);
        if (a->yq)
            saturated +=
                fq_rows(&a->fq, i, 1, a->dim, (float *)a->yq + i * a->dim, row, NULL, 448.0f);
    }
    fq_count(&a->fq, saturated);
    return CQ_OK;
}

int CQ_OP(scatter_rows)(cq_stream *s, const cq_scatter_rows_args *a) {
    CQ_F32_OR_REF(scatter_rows);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t i = 0; i < a->rows; i++) {
        float *restrict x = (float *)a->x + (int64_t)a->index[i] * a->dim;
        const float *restrict y = (const float *)a->y + i * a->dim;
        for (int64_t c = 0; c < a->dim; c++)
            x[c] += y[c];
    }
    return CQ_OK;
}

int CQ_OP(combine_forward)(cq_stream *s, const cq_combine_forward_args *a) {
    CQ_F32_OR_REF(combine_forward);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++) {
        float *restrict out = (float *)a->out + t * a->dim;
        for (int64_t j = t * a->top_k; j < (t + 1) * a->top_k; j++) {
            const float *restrict y = (const float *)a->y + (int64_t)a->position[j] * a->dim;
            float weight = ((const float *)a->weight)[j];
            for (int64_t c = 0; c < a->dim; c++)
                out[c] += weight * y[c];
        }
    }
    return CQ_OK;
}

int CQ_OP(combine_backward)(cq_stream *s, const cq_combine_backward_args *a) {
    CQ_F32_OR_REF(combine_backward);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t i = 0; i < a->tokens * a->top_k; i++) {
        const float *restrict dout = (const float *)a->dout + i / a->top_k * a->dim;
        const float *restrict y = (const float *)a->y + (int64_t)a->position[i] * a->dim;
        float *restrict dy = (float *)a->dy + (int64_t)a->position[i] * a->dim;
        float weight = ((const float *)a->weight)[i];
        for (int64_t c = 0; c < a->dim; c++)
            dy[c] = weight * dout[c];
        ((float *)a->dweight)[i] = vec_dot(dout, y, a->dim);
    }
    return CQ_OK;
}

int CQ_OP(ungather_rows)(cq_stream *s, const cq_ungather_rows_args *a) {
    CQ_F32_OR_REF(ungather_rows);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++) {
        float *restrict dx = (float *)a->dx + t * a->dim;
        for (int64_t j = t * a->top_k; j < (t + 1) * a->top_k; j++) {
            const float *restrict dy = (const float *)a->dy + (int64_t)a->position[j] * a->dim;
            for (int64_t c = 0; c < a->dim; c++)
                dx[c] += dy[c];
        }
    }
    return CQ_OK;
}

static int check_ids(const int32_t *ids, int64_t n, int64_t vocab) {
    for (int64_t t = 0; t < n; t++)
        if (ids[t] < 0 || ids[t] >= vocab)
            return cq_fail(CQ_EDATA, "embedding: token id %d at %lld, wanted 0 .. %lld", ids[t],
                           (long long)t, (long long)vocab - 1);
    return CQ_OK;
}

int CQ_OP(embed_forward)(cq_stream *s, const cq_embed_forward_args *a) {
    CQ_F32_OR_REF(embed_forward);
    CQ_TRY(check_ids(a->ids, a->tokens, a->vocab));
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++)
        copy_row((float *)a->h + t * a->dim, (const float *)a->table + a->ids[t] * a->dim, a->dim);
    return CQ_OK;
}

int CQ_OP(embed_backward)(cq_stream *s, const cq_embed_backward_args *a) {
    CQ_F32_OR_REF(embed_backward);
    CQ_TRY(check_ids(a->ids, a->tokens, a->vocab));
#pragma omp parallel num_threads(s->threads)
    for (int64_t t = 0; t < a->tokens; t++) {
        if (a->ids[t] % omp_get_num_threads() != omp_get_thread_num())
            continue;
        float *restrict to = (float *)a->dtable + a->ids[t] * a->dim;
        const float *restrict dh = (const float *)a->dh + t * a->dim;
        for (int64_t c = 0; c < a->dim; c++)
            to[c] += dh[c];
    }
    return CQ_OK;
}
