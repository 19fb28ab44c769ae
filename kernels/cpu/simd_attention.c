/* simd_attention.c - causal grouped-query attention inside documents, forward and backward.
 *
 *     S = scale Q K'    P = exp(S - lse)    O = P V
 *     dV = P' dO    dS = P (dO V' - rowsum(dO O))    dQ = scale dS K    dK = scale dS' Q
 *
 * Tiles of QUERIES x KEYS, never a whole score matrix: the running maximum and sum of a row are
 * carried from one block of keys to the next (arXiv 2205.14135; backward order of arXiv
 * 2307.08691). Documents of up to KEYS tokens need one block. A unit of work owns what it writes:
 * forward a document, a kv head, some of its query heads and a block of queries; backward a
 * document and a kv head, so dK and dV are summed in a fixed order. The cached form keeps K
 * transposed, so a query reads it as it lies, and gives a row the bits of the forward.
 */
#include <float.h>
#include <math.h>

#include "kernels/cpu/sequence.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/vec.h"

enum { STRIP = 2 * TILE_ROWS }; /* rows that share one end of their keys */

/// One document as one kv head sees it; rows are counted from the document's start.
typedef struct view {
    int64_t length, dim, kv;
    const float *k, *v;
    int64_t ldk, ldv;
} view;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/// to = rows q0 .. q0 + nq of x times bt [dim, LD], for keys k0 .. k0 + nk. What lies beyond a
/// strip of rows' diagonal is not written.
static void score_tile(float *to, int64_t dim, const float *x, int64_t ldx, const float *bt,
                       int64_t q0, int64_t nq, int64_t k0, int64_t nk) {
    for (int64_t i = 0; i < nq; i += STRIP) {
        int64_t rows = min64(STRIP, nq - i), seen = min64(nk, q0 + i + rows - k0);
        tile_product(&(tile_args){rows, tile_pad(seen), dim, x + (q0 + i) * ldx, ldx, 1, bt, LD,
                                  to + i * LD, LD},
                     false);
    }
}

/// y rows q0 .. q0 + nq (+)= P rows times the rows of b that they see.
static void mix_tile(float *y, int64_t ldy, int64_t dim, const float *p, const float *b,
                     int64_t ldb, int64_t q0, int64_t nq, int64_t k0, int64_t nk, bool add) {
    for (int64_t i = 0; i < nq; i += STRIP) {
        int64_t rows = min64(STRIP, nq - i), seen = min64(nk, q0 + i + rows - k0);
        tile_product(&(tile_args){rows, dim, seen, p + i * LD, LD, 1, b + k0 * ldb, ldb,
                                  y + (q0 + i) * ldy, ldy},
                     add);
    }
}

/// y rows k0 .. k0 + nk += P' times the rows q0 .. q0 + nq of b.
static void mix_transposed(float *y, int64_t ldy, int64_t dim, const float *p, const float *b,
                           int64_t ldb, int64_t q0, int64_t nq, int64_t k0, int64_t nk) {
    for (int64_t j = 0; j < nk && k0 + j < q0 + nq; j += STRIP) {
        int64_t first = k0 + j > q0 ? k0 + j - q0 : 0;
        tile_product(&(tile_args){min64(STRIP, nk - j), dim, nq - first, p + first * LD + j, 1, LD,
                                  b + (q0 + first) * ldb, ldb, y + (k0 + j) * ldy, ldy},
                     true);
    }
}

/// Zeros after the diagonal, as far as any product of strips reads.
static void clear_tail(float *row, int64_t seen) { memset(row + seen, 0, SLACK * sizeof(float)); }

/// Turns a row of raw scores into exp(scale s - max), keeping the row's running maximum and sum;
/// returns the factor that what was accumulated under the old maximum must be multiplied with.
/// Whole vectors: what lies beyond the n scores counts nothing and is cleared later.
static float softmax_row(float *s, int64_t n, float scale, float *max, float *sum) {
    float lanes[16] = {0};
    int64_t end = tile_pad(n);
    for (int64_t j = n; j < end; j++)
        s[j] = -FLT_MAX;
    float top = vec_max(s, end, -FLT_MAX);
    float before = *max, now = top * scale > before ? top * scale : before;
    for (int64_t j = 0; j < end; j += 16)
        for (int64_t i = j; i < j + 16; i++) {
            s[i] = vec_exp(s[i] * scale - now);
            lanes[i - j] += s[i];
        }
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    float factor = before == -FLT_MAX ? 0.0f : vec_exp(before - now);
    *max = now;
    *sum = *sum * factor + lanes[0];
    return factor;
}

/// One block of queries of `n_heads` query heads from `head` on.
static void forward_unit(const cq_attention_forward_args *a, const view *d, int64_t start,
                         int64_t head, int64_t n_heads, int64_t q0, float *scratch) {
    int64_t dim = d->dim, ldo = a->heads * dim, nq = min64(QUERIES, d->length - q0);
    float *kt = scratch, *s = kt + dim * LD, *max = s + QUERIES * LD,
          *sum = max + UNIT_HEADS * QUERIES, scale = (float)a->scale;
    for (int64_t i = 0; i < n_heads * QUERIES; i++)
        max[i] = -FLT_MAX, sum[i] = 0.0f;
    for (int64_t k0 = 0; k0 < q0 + nq; k0 += KEYS) {
        int64_t nk = min64(KEYS, q0 + nq - k0);
        tile_transpose(kt, LD, d->k + k0 * d->ldk, d->ldk, nk, dim);
        for (int64_t h = 0; h < n_heads; h++) {
            const float *q = (const float *)a->q + start * a->ldq + (head + h) * dim;
            float *out = (float *)a->out + start * ldo + (head + h) * dim;
            score_tile(s, dim, q, a->ldq, kt, q0, nq, k0, nk);
            for (int64_t i = 0; i < nq; i++) {
                int64_t seen = min64(nk, q0 + i + 1 - k0);
                float factor = softmax_row(s + i * LD, seen, scale, max + h * QUERIES + i,
                                           sum + h * QUERIES + i);
                clear_tail(s + i * LD, seen);
                for (int64_t c = 0; c < dim && k0 > 0; c++)
                    out[(q0 + i) * ldo + c] *= factor;
            }
            mix_tile(out, ldo, dim, s, d->v, d->ldv, q0, nq, k0, nk, k0 > 0);
        }
    }
    for (int64_t h = 0; h < n_heads; h++)
        for (int64_t i = 0; i < nq; i++) {
            float total = sum[h * QUERIES + i];
            float *out = (float *)a->out + (start + q0 + i) * ldo + (head + h) * dim;
            for (int64_t c = 0; c < dim; c++)
                out[c] /= total;
            if (a->lse)
                ((float *)a->lse)[(start + q0 + i) * a->heads + head + h] =
                    max[h * QUERIES + i] + logf(total);
        }
}

/// What one query head of the document adds to dQ, dK and dV for keys k0 .. k0 + nk. kt, vt [dim,
/// KEYS].
static void backward_head(const cq_attention_backward_args *a, const view *d, int64_t start,
                          int64_t head, int64_t k0, int64_t nk, const float *kt, const float *vt,
                          float *p) {
    int64_t dim = d->dim, ldo = a->heads * dim;
    float *ds = p + QUERIES * LD, scale = (float)a->scale;
    const float *q = (const float *)a->q + start * a->ldq + head * dim;
    const float *out = (const float *)a->out + start * ldo + head * dim;
    const float *dout = (const float *)a->dout + start * ldo + head * dim;
    const float *lse = (const float *)a->lse + start * a->heads + head;
    float *dq = (float *)a->dq + start * a->lddq + head * dim;
    float *dk = (float *)a->dk + start * a->lddk + d->kv * dim;
    float *dv = (float *)a->dv + start * a->lddv + d->kv * dim;
    for (int64_t q0 = k0; q0 < d->length; q0 += QUERIES) {
        int64_t nq = min64(QUERIES, d->length - q0), n = min64(nk, q0 + nq - k0);
        score_tile(p, dim, q, a->ldq, kt, q0, nq, k0, n);
        score_tile(ds, dim, dout, ldo, vt, q0, nq, k0, n);
        for (int64_t i = 0; i < nq; i++) {
            const float *o = out + (q0 + i) * ldo, *g = dout + (q0 + i) * ldo;
            int64_t seen = min64(n, q0 + i + 1 - k0);
            float *pi = p + i * LD, *di = ds + i * LD, row = lse[(q0 + i) * a->heads];
            float delta = tile_dot(o, g, dim);
            for (int64_t j = 0; j < tile_pad(seen); j++) {
                pi[j] = vec_exp(pi[j] * scale - row);
                di[j] = pi[j] * (di[j] - delta) * scale;
            }
            if (q0 + i == 0) /* one key: the softmax is constant, and exactly so */
                di[0] = 0.0f;
            clear_tail(pi, seen);
            clear_tail(di, seen);
        }
        mix_transposed(dv, a->lddv, dim, p, dout, ldo, q0, nq, k0, n);
        mix_transposed(dk, a->lddk, dim, ds, q, a->ldq, q0, nq, k0, n);
        mix_tile(dq, a->lddq, dim, ds, d->k, d->ldk, q0, nq, k0, n, k0 > 0);
    }
}

/// One document and one kv head: keys in blocks, its query heads in order.
static void backward_unit(const cq_attention_backward_args *a, const view *d, int64_t start,
                          float *scratch) {
    int64_t dim = d->dim, group = a->heads / a->kv_heads;
    float *kt = scratch, *vt = kt + dim * LD, *p = vt + dim * LD;
    for (int64_t t = start; t < start + d->length; t++) {
        memset((float *)a->dk + t * a->lddk + d->kv * dim, 0, (size_t)dim * sizeof(float));
        memset((float *)a->dv + t * a->lddv + d->kv * dim, 0, (size_t)dim * sizeof(float));
    }
    for (int64_t k0 = 0; k0 < d->length; k0 += KEYS) {
        int64_t nk = min64(KEYS, d->length - k0);
        tile_transpose(kt, LD, d->k + k0 * d->ldk, d->ldk, nk, dim);
        tile_transpose(vt, LD, d->v + k0 * d->ldv, d->ldv, nk, dim);
        for (int64_t h = 0; h < group; h++)
            backward_head(a, d, start, d->kv * group + h, k0, nk, kt, vt, p);
    }
}

int CQ_OP(fake_quant)(cq_stream *s, const cq_fake_quant_args *a);

int CQ_OP(attention_forward)(cq_stream *s, const cq_attention_forward_args *a) {
    CQ_F32_OR_REF(attention_forward);
    CQ_TRY(scratch_check(s, "attention_forward", cq_attention_scratch_bytes(0, a->head_dim)));
    int64_t group = a->heads / a->kv_heads, parts = (group + UNIT_HEADS - 1) / UNIT_HEADS;
#pragma omp parallel num_threads(s->threads)
    for (int64_t doc = 0; doc < a->n_docs; doc++) {
        int64_t start = a->starts[doc], length = a->starts[doc + 1] - start;
        int64_t blocks = (length + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic) nowait
        for (int64_t unit = 0; unit < blocks * a->kv_heads * parts; unit++) {
            int64_t kv = unit / parts % a->kv_heads, first = unit % parts * UNIT_HEADS;
            int64_t block = blocks - 1 - unit / parts / a->kv_heads; /* the longest first */
            view d = {.length = length,
                      .dim = a->head_dim,
                      .kv = kv,
                      .k = (const float *)a->k + start * a->ldk + kv * a->head_dim,
                      .v = (const float *)a->v + start * a->ldv + kv * a->head_dim,
                      .ldk = a->ldk,
                      .ldv = a->ldv};
            forward_unit(a, &d, start, kv * group + first, min64(UNIT_HEADS, group - first),
                         block * QUERIES, scratch_of_thread(s));
        }
    }
    if (!a->outq)
        return CQ_OK;
    /* whole rows: a head's few blocks at a time would each wait for their own latencies */
    return CQ_OP(fake_quant)(s, &(cq_fake_quant_args){.dtype = a->dtype,
                                                      .rows = a->tokens,
                                                      .cols = a->heads * a->head_dim,
                                                      .x = a->out,
                                                      .y = a->outq,
                                                      .fq = a->fq,
                                                      .top = 448.0f});
}

int CQ_OP(attention_backward)(cq_stream *s, const cq_attention_backward_args *a) {
    CQ_F32_OR_REF(attention_backward);
    CQ_TRY(scratch_check(s, "attention_backward", cq_attention_scratch_bytes(0, a->head_dim)));
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t unit = 0; unit < a->n_docs * a->kv_heads; unit++) {
        int64_t doc = unit / a->kv_heads, kv = unit % a->kv_heads, start = a->starts[doc];
        view d = {.length = a->starts[doc + 1] - start,
                  .dim = a->head_dim,
                  .kv = kv,
                  .k = (const float *)a->k + start * a->ldk + kv * a->head_dim,
                  .v = (const float *)a->v + start * a->ldv + kv * a->head_dim,
                  .ldk = a->ldk,
                  .ldv = a->ldv};
        backward_unit(a, &d, start, scratch_of_thread(s));
    }
    return CQ_OK;
}

/// Up to QUERIES rows of one kv head that look at the keys of a slot: queries of one head, where
/// each sees one key more than the one before (grow 1), or the heads of one query (grow 0).
typedef struct cached_rows {
    int64_t n, seen, grow; ///< rows, keys that the first one sees
    const float *q;
    int64_t ldq;
    float *out;
    int64_t ldo;
} cached_rows;

/// Keys k0 .. k0 + nk that row i sees.
static int64_t cached_seen(const cached_rows *r, int64_t i, int64_t k0, int64_t nk) {
    int64_t seen = r->seen + i * r->grow - k0;
    return seen < 0 ? 0 : min64(seen, nk);
}

/// kt [dim, room] and v [room, dim] of the slot; scratch as forward_unit's.
static void cached_attend(const cached_rows *r, int64_t dim, int64_t room, float scale,
                          const float *kt, const float *v, float *scratch) {
    float *s = scratch, *max = s + QUERIES * LD, *sum = max + QUERIES;
    int64_t total = r->seen + (r->n - 1) * r->grow;
    for (int64_t i = 0; i < r->n; i++)
        max[i] = -FLT_MAX, sum[i] = 0.0f;
    for (int64_t k0 = 0; k0 < total; k0 += KEYS) {
        int64_t nk = min64(KEYS, total - k0);
        for (int64_t i = 0; i < r->n; i += STRIP) {
            int64_t rows = min64(STRIP, r->n - i), seen = cached_seen(r, i + rows - 1, k0, nk);
            tile_product(&(tile_args){rows, tile_pad(seen), dim, r->q + i * r->ldq, r->ldq, 1,
                                      kt + k0, room, s + i * LD, LD},
                         false);
        }
        for (int64_t i = 0; i < r->n; i++) {
            int64_t seen = cached_seen(r, i, k0, nk);
            float factor = seen ? softmax_row(s + i * LD, seen, scale, max + i, sum + i) : 1.0f;
            clear_tail(s + i * LD, seen);
            for (int64_t c = 0; c < dim && k0 > 0; c++)
                r->out[i * r->ldo + c] *= factor;
        }
        for (int64_t i = 0; i < r->n; i += STRIP) {
            int64_t rows = min64(STRIP, r->n - i), seen = cached_seen(r, i + rows - 1, k0, nk);
            tile_product(&(tile_args){rows, dim, seen, s + i * LD, LD, 1, v + k0 * dim, dim,
                                      r->out + i * r->ldo, r->ldo},
                         k0 > 0);
        }
    }
    for (int64_t i = 0; i < r->n; i++)
        for (int64_t c = 0; c < dim; c++)
            r->out[i * r->ldo + c] /= sum[i];
}

/// One document and one kv head: its keys and values into the slot, then its queries.
static void cached_unit(const cq_attention_cached_args *a, int64_t doc, int64_t kv,
                        float *scratch) {
    int64_t start = a->starts[doc], n = a->starts[doc + 1] - start, past = a->past[doc];
    int64_t dim = a->head_dim, room = a->room, group = a->heads / a->kv_heads;
    int64_t at = (a->slot[doc] * a->kv_heads + kv) * dim * room;
    float *kt = (float *)a->k_cache + at, *v = (float *)a->v_cache + at;
    for (int64_t t = 0; t < n; t++) {
        const float *k = (const float *)a->k + (start + t) * a->ldk + kv * dim;
        for (int64_t c = 0; c < dim; c++)
            kt[c * room + past + t] = k[c];
        memcpy(v + (past + t) * dim, (const float *)a->v + (start + t) * a->ldv + kv * dim,
               (size_t)dim * sizeof(float));
    }
    for (int64_t h = 0; h < (n > 1 ? group : 1); h++) {
        int64_t head = kv * group + h, ldo = a->heads * dim;
        const float *q = (const float *)a->q + start * a->ldq + head * dim;
        float *out = (float *)a->out + start * ldo + head * dim;
        for (int64_t i = 0; i < (n > 1 ? n : group); i += QUERIES) {
            cached_rows r = {min64(QUERIES, n - i), past + i + 1, 1, q + i * a->ldq, a->ldq,
                             out + i * ldo,         ldo};
            if (n == 1)
                r = (cached_rows){
                    min64(QUERIES, group - i), past + 1, 0, q + i * dim, dim, out + i * dim, dim};
            cached_attend(&r, dim, room, (float)a->scale, kt, v, scratch);
        }
    }
}

int CQ_OP(attention_cached)(cq_stream *s, const cq_attention_cached_args *a) {
    CQ_F32_OR_REF(attention_cached);
    CQ_TRY(scratch_check(s, "attention_cached", cq_attention_scratch_bytes(0, a->head_dim)));
    int64_t pairs = 0;
    for (int64_t d = 0; d < a->n_docs; d++)
        pairs += (a->starts[d + 1] - a->starts[d]) * (a->past[d] + a->starts[d + 1] - a->starts[d]);
#pragma omp parallel for schedule(dynamic)                                                         \
    num_threads(cq_team(s, pairs * a->heads * a->head_dim, 0.1))
    for (int64_t unit = 0; unit < a->n_docs * a->kv_heads; unit++)
        cached_unit(a, unit / a->kv_heads, unit % a->kv_heads, scratch_of_thread(s));
    return CQ_OK;
}
