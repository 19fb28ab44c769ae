/* simd_ssd.c - the Mamba-2 scan in chunks, forward.
 *
 *     y_t = sum_{s <= t} L[t, s] (C_t . B_s) dt_s x_s + e_t S_in' C_t + D x_t
 *
 * Symbols are ssd.h's. C B' is computed once for the heads of a group. A unit of work is a document
 * and a group; it writes nothing that another unit writes.
 */
#include "kernels/cpu/simd.h"
#include "kernels/cpu/ssd.h"

/// m[t, s] = cb[t, s] L[t, s] dt_s on and below the diagonal, zeros after it.
static void weigh(float *m, const float *cb, int64_t ld, const ssd_decay *w, int64_t n) {
    const float *restrict highs = w->high, *restrict lows = w->low, *restrict dt = w->dt;
    for (int64_t t = 0; t < n; t++) {
        float high = highs[t], low = lows[t], *restrict to = m + t * ld;
        const float *restrict from = cb + t * ld;
        int end = (int)tile_pad(t + 1);
#pragma omp simd
        for (int s = 0; s < end; s++) {
            float d = (high - highs[s]) + (low - lows[s]);
            to[s] = from[s] * vec_exp(d < 0.0f ? d : 0.0f) * dt[s];
        }
        memset(to + t + 1, 0, SLACK * sizeof(float));
    }
}

/// One head of one chunk: y of its n tokens from t0 on, given S_in (NULL: zero).
static void head_chunk(const ssd_input *in, float *y, const float *m, int64_t ld, float *weighted,
                       const float *state, const ssd_decay *w, int64_t head, int64_t t0,
                       int64_t n) {
    int64_t dim = in->dim, ns = in->state, ldy = in->heads * dim;
    const float *x = in->x + t0 * in->ldx + head * dim;
    const float *c = in->c + t0 * in->ldc + head / (in->heads / in->groups) * ns;
    float skip = in->d[head];
    y += t0 * ldy + head * dim;
    for (int64_t i = 0; i < n; i += SSD_STRIP) {
        int64_t rows = ssd_min(SSD_STRIP, n - i);
        tile_product(
            &(tile_args){rows, dim, i + rows, m + i * ld, ld, 1, x, in->ldx, y + i * ldy, ldy},
            false);
    }
    if (state) {
        for (int64_t t = 0; t < n; t++)
            for (int64_t i = 0; i < ns; i++)
                weighted[t * ns + i] = w->e[t] * c[t * in->ldc + i];
        tile_product(&(tile_args){n, dim, ns, weighted, ns, 1, state, dim, y, ldy}, true);
    }
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < dim; i++)
            y[t * ldy + i] += skip * x[t * in->ldx + i];
}

/// One group of one document of `length` tokens from `start` on. carried: the group's states
/// [heads of the group, state, head_dim], NULL: they are zero before and nobody's after; `past`:
/// they hold what went before.
static void forward_unit(const ssd_input *in, float *y, int64_t group, int64_t start,
                         int64_t length, float *carried, bool past, float *scratch) {
    int64_t chunk = ssd_min(in->chunk, length), ld = ssd_row(chunk), ns = in->state;
    int64_t per_group = in->heads / in->groups, size = ns * in->dim;
    float *states = carried ? carried : ssd_take(&scratch, per_group * size);
    float *bt = ssd_take(&scratch, ns * ld);
    float *cb = ssd_take(&scratch, chunk * ld), *m = ssd_take(&scratch, chunk * ld);
    float *weighted = ssd_take(&scratch, chunk * ns);
    ssd_decay w = ssd_decay_take(&scratch, chunk);
    for (int64_t t0 = 0; t0 < length; t0 += chunk) {
        int64_t n = ssd_min(chunk, length - t0), t = start + t0;
        ssd_products(cb, bt, ld, in, group, t, n);
        for (int64_t h = 0; h < per_group; h++) {
            int64_t head = group * per_group + h;
            float *state = states + h * size, *before = t0 || past ? state : NULL;
            ssd_decays(&w, in, head, t, n);
            weigh(m, cb, ld, &w, n);
            head_chunk(in, y, m, ld, weighted, before, &w, head, t, n);
            if (carried || t0 + n < length)
                ssd_state(state, before, weighted, in, &w, head, t, n);
        }
    }
}

int CQ_OP(ssd_forward)(cq_stream *s, const cq_ssd_forward_args *a) {
    CQ_F32_OR_REF(ssd_forward);
    const ssd_input in = SSD_INPUT(a);
    int64_t longest = sequence_longest(a->starts, a->n_docs);
    CQ_TRY(scratch_check(
        s, "ssd_forward",
        cq_ssd_scratch_bytes(longest, a->chunk, a->heads, a->head_dim, a->groups, a->state)));
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t unit = 0; unit < a->n_docs * a->groups; unit++) {
        int64_t start = a->starts[unit / a->groups], end = a->starts[unit / a->groups + 1];
        if (end > start)
            forward_unit(&in, a->y, unit % a->groups, start, end - start, NULL, false,
                         scratch_of_thread(s));
    }
    return CQ_OK;
}

/// One token of one head, the recurrence itself.
static void step_head(const ssd_input *in, float *restrict y, int64_t head, int64_t t,
                      float *restrict state, bool past) {
    int64_t dim = in->dim, ns = in->state, group = head / (in->heads / in->groups);
    const float *restrict x = in->x + t * in->ldx + head * dim;
    const float *b = in->b + t * in->ldb + group * ns, *c = in->c + t * in->ldc + group * ns;
    float dt = vec_softplus(in->dt_raw[t * in->ld_dt + head] + in->dt_bias[head]);
    float log_decay = (float)(-exp((double)in->a_log[head]) * (double)dt);
    float decay = past ? vec_exp(log_decay < 0.0f ? log_decay : 0.0f) : 0.0f;
    y += (t * in->heads + head) * dim;
    for (int64_t i = 0; i < dim; i++)
        y[i] = 0.0f;
    if (!past)
        memset(state, 0, (size_t)(ns * dim) * sizeof(float));
    for (int64_t j = 0; j < ns; j++) {
        float in_weight = dt * b[j], out_weight = c[j], *restrict row = state + j * dim;
        for (int64_t i = 0; i < dim; i++) {
            float now = vec_fma(in_weight, x[i], decay * row[i]);
            row[i] = now;
            y[i] = vec_fma(out_weight, now, y[i]);
        }
    }
    for (int64_t i = 0; i < dim; i++)
        y[i] = vec_fma(in->d[head], x[i], y[i]);
}

int CQ_OP(ssd_cached)(cq_stream *s, const cq_ssd_cached_args *a) {
    CQ_F32_OR_REF(ssd_cached);
    const ssd_input in = SSD_INPUT(a);
    int64_t longest = sequence_longest(a->starts, a->n_docs), per_group = a->heads / a->groups;
    CQ_TRY(scratch_check(s, "ssd_cached",
                         cq_ssd_scratch_bytes(ssd_min(longest, a->chunk), a->chunk, a->heads,
                                              a->head_dim, a->groups, a->state)));
    int64_t work = a->tokens * a->heads * a->head_dim * a->state;
#pragma omp parallel for schedule(dynamic) num_threads(cq_team(s, work, 0.2))
    for (int64_t unit = 0; unit < a->n_docs * a->groups; unit++) {
        int64_t d = unit / a->groups, g = unit % a->groups, start = a->starts[d];
        int64_t n = a->starts[d + 1] - start, size = a->state * a->head_dim;
        float *states = (float *)a->S + (a->slot[d] * a->heads + g * per_group) * size;
        for (int64_t h = 0; n == 1 && h < per_group; h++)
            step_head(&in, a->y, g * per_group + h, start, states + h * size, a->past[d] > 0);
        if (n > 1)
            forward_unit(&in, a->y, g, start, n, states, a->past[d] > 0, scratch_of_thread(s));
    }
    return CQ_OK;
}
