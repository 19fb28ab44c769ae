/* simd_conv.c - causal depthwise convolution with silu, restarting at every document, forward and
 * backward.
 *
 *     p[t, c] = b[c] + sum_k w[c, k] x[t - width + 1 + k, c]        y = p sigmoid(p)
 *     dp = dy sigmoid(p) (1 + p (1 - sigmoid(p)))    dx[t] = sum_k w[k] dp[t + width - 1 - k] dw[k]
 * = sum_t dp[t] x[t - width + 1 + k]
 *
 * Vectors run over channels, in blocks that stay in the first-level cache. The backward gives a
 * block of channels with all tokens to one thread, so dw and db need no partial sums of threads; it
 * walks tokens backwards and keeps the width last rows of dp. Kernels wider than MOST_TAPS are left
 * to ref.
 */
#include "core/base/error.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

enum { MOST_TAPS = 16, BLOCK = 32, TOKENS = 64, FLUSH = 256 };

/// The taps of a block of n channels, by tap.
typedef struct taps {
    int64_t n, width;
    float w[MOST_TAPS][BLOCK], b[BLOCK];
} taps;

static void taps_read(taps *k, const float *w, const float *b, int64_t width, int64_t first,
                      int64_t channels) {
    k->n = channels - first < BLOCK ? channels - first : BLOCK;
    k->width = width;
    for (int64_t c = 0; c < k->n; c++) {
        k->b[c] = b ? b[first + c] : 0.0f;
        for (int64_t i = 0; i < width; i++)
            k->w[i][c] = w[(first + c) * width + i];
    }
}

/// p = pre-activation of the token whose row is x; `before` tokens of its document precede it.
static inline void preactivation(float *restrict p, const taps *k, const float *x, int64_t ldx,
                                 int64_t before) {
    int64_t width = k->width, n = k->n;
    if (width == 4 && before >= 3) {
        const float *x0 = x - 3 * ldx, *x1 = x - 2 * ldx, *x2 = x - ldx;
        for (int64_t c = 0; c < n; c++)
            p[c] = k->b[c] + k->w[0][c] * x0[c] + k->w[1][c] * x1[c] + k->w[2][c] * x2[c] +
                   k->w[3][c] * x[c];
        return;
    }
    for (int64_t c = 0; c < n; c++)
        p[c] = k->b[c];
    for (int64_t i = before >= width - 1 ? 0 : width - 1 - before; i < width; i++) {
        const float *from = x + (i - width + 1) * ldx;
        for (int64_t c = 0; c < n; c++)
            p[c] += k->w[i][c] * from[c];
    }
}

int CQ_OP(conv_forward)(cq_stream *s, const cq_conv_forward_args *a) {
    CQ_F32_OR_REF(conv_forward);
    if (a->width > MOST_TAPS)
        return cq_ref_conv_forward(s, a);
    int64_t blocks = (a->channels + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(s->threads)
    for (int64_t d = 0; d < a->n_docs; d++) {
        int64_t start = a->starts[d], end = a->starts[d + 1];
        int64_t parts = (end - start + TOKENS - 1) / TOKENS;
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < parts * blocks; unit++) {
            taps k;
            float p[BLOCK];
            int64_t first = unit % blocks * BLOCK, t = start + unit / blocks * TOKENS;
            taps_read(&k, a->w, a->b, a->width, first, a->channels);
            for (int64_t stop = t + TOKENS < end ? t + TOKENS : end; t < stop; t++) {
                float *restrict y = (float *)a->y + t * a->channels + first;
                preactivation(p, &k, (const float *)a->x + t * a->ldx + first, a->ldx, t - start);
                for (int64_t c = 0; c < k.n; c++)
                    y[c] = vec_silu(p[c]);
            }
        }
    }
    return CQ_OK;
}

/// Running sums of one block: in float over FLUSH tokens, then in double.
typedef struct sums {
    float dw[MOST_TAPS][BLOCK], db[BLOCK];
    double dw_total[MOST_TAPS][BLOCK], db_total[BLOCK];
} sums;

static void sums_flush(sums *g, const taps *k) {
    for (int64_t c = 0; c < k->n; c++) {
        g->db_total[c] += (double)g->db[c];
        g->db[c] = 0.0f;
        for (int64_t i = 0; i < k->width; i++) {
            g->dw_total[i][c] += (double)g->dw[i][c];
            g->dw[i][c] = 0.0f;
        }
    }
}

/// One document's part of a block: dp of token t lies in row t % width of `ring`, zero past the
/// end.
static void backward_document(const cq_conv_backward_args *a, const taps *k, sums *g, int64_t first,
                              int64_t start, int64_t end) {
    float ring[MOST_TAPS][BLOCK] = {{0}}, p[BLOCK];
    int64_t width = k->width, n = k->n;
    for (int64_t t = end - 1; t >= start; t--) {
        const float *x = (const float *)a->x + t * a->ldx + first;
        const float *dy = (const float *)a->dy + t * a->channels + first;
        float *restrict dx = (float *)a->dx + t * a->lddx + first;
        float *restrict dp = ring[t % width];
        int64_t skip = t - start >= width - 1 ? 0 : width - 1 - (t - start);
        preactivation(p, k, x, a->ldx, t - start);
        for (int64_t c = 0; c < n; c++) {
            dp[c] = dy[c] * vec_silu_slope(p[c], vec_sigmoid(p[c]));
            g->db[c] += dp[c];
        }
        for (int64_t i = skip; i < width; i++) {
            const float *from = x + (i - width + 1) * a->ldx;
            float *restrict dw = g->dw[i];
            for (int64_t c = 0; c < n; c++)
                dw[c] += dp[c] * from[c];
        }
        for (int64_t c = 0; c < n; c++)
            dx[c] = k->w[width - 1][c] * dp[c];
        for (int64_t i = 1; i < width; i++) {
            const float *w = k->w[width - 1 - i], *later = ring[(t + i) % width];
            for (int64_t c = 0; c < n; c++)
                dx[c] += w[c] * later[c];
        }
        if ((t - start) % FLUSH == 0)
            sums_flush(g, k);
    }
}

int CQ_OP(conv_backward)(cq_stream *s, const cq_conv_backward_args *a) {
    CQ_F32_OR_REF(conv_backward);
    if (a->width > MOST_TAPS)
        return cq_ref_conv_backward(s, a);
    float *dw = a->dw, *db = a->db;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t first = 0; first < a->channels; first += BLOCK) {
        taps k;
        sums g = {.db = {0}};
        taps_read(&k, a->w, a->b, a->width, first, a->channels);
        for (int64_t d = 0; d < a->n_docs; d++)
            backward_document(a, &k, &g, first, a->starts[d], a->starts[d + 1]);
        for (int64_t c = 0; c < k.n; c++) {
            if (db)
                db[first + c] += (float)g.db_total[c];
            for (int64_t i = 0; dw && i < k.width; i++)
                dw[(first + c) * k.width + i] += (float)g.dw_total[i][c];
        }
    }
    return CQ_OK;
}

/// The row of the input `back` tokens before token t of document d, NULL before its very start.
static const float *cached_input(const cq_conv_cached_args *a, int64_t d, int64_t t, int64_t back,
                                 const float *state) {
    int64_t from = t - a->starts[d] - back;
    if (from >= 0)
        return (const float *)a->x + (t - back) * a->ldx;
    return a->past[d] + from >= 0 ? state + (a->width - 1 + from) * a->channels : NULL;
}

/// A block of channels of document d; sums in the order of preactivation.
static void cached_block(const cq_conv_cached_args *a, int64_t d, int64_t first) {
    taps k;
    int64_t end = a->starts[d + 1], kept = a->width - 1;
    float *state = (float *)a->state + a->slot[d] * kept * a->channels, p[BLOCK];
    taps_read(&k, a->w, a->b, a->width, first, a->channels);
    for (int64_t t = a->starts[d]; t < end; t++) {
        float *restrict y = (float *)a->y + t * a->channels + first;
        for (int64_t c = 0; c < k.n; c++)
            p[c] = k.b[c];
        for (int64_t i = 0; i < a->width; i++) {
            const float *from = cached_input(a, d, t, kept - i, state);
            for (int64_t c = 0; from && c < k.n; c++)
                p[c] += k.w[i][c] * from[first + c];
        }
        for (int64_t c = 0; c < k.n; c++)
            y[c] = vec_silu(p[c]);
    }
    for (int64_t r = 0; r < kept; r++) { /* row r is read from further on, so in place */
        const float *from = cached_input(a, d, end - 1, kept - 1 - r, state);
        for (int64_t c = first; c < first + k.n; c++)
            state[r * a->channels + c] = from ? from[c] : 0.0f;
    }
}

int CQ_OP(conv_cached)(cq_stream *s, const cq_conv_cached_args *a) {
    CQ_F32_OR_REF(conv_cached);
    if (a->width > MOST_TAPS)
        return cq_ref_conv_cached(s, a);
    int64_t blocks = (a->channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(cq_team(s, a->tokens * a->channels, 3))
    for (int64_t unit = 0; unit < a->n_docs * blocks; unit++)
        cached_block(a, unit / blocks, unit % blocks * BLOCK);
    return CQ_OK;
}
