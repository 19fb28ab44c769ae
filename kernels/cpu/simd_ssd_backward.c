/* simd_ssd_backward.c - gradients of the Mamba-2 scan, chunk by chunk from the last to the first.
 *
 * Symbols are ssd.h's; X[t, s] = dy_t . x_s, R_s = dS_out B_s, W[t, s] = L[t, s] (C_t . B_s) dt_s
 * X[t, s]:
 *
 *     dx_s  = D dy_s + dt_s (sum_t L[t, s] (C_t . B_s) dy_t + gamma_s R_s)
 *     dB_s  = sum_t L[t, s] dt_s X[t, s] C_t + gamma_s dt_s dS_out' x_s        (both summed over
 * the group's heads) dC_t  = sum_s L[t, s] dt_s X[t, s] B_s + e_t S_in' dy_t dS_in = exp(cs_end)
 * dS_out + sum_t e_t dy_t C_t' dl_t  = sum_{u >= t, s < t} W[u, s] + sum_{u >= t} U_u + sum_{s < t}
 * V_s + exp(cs_end) <dS_out, S_in> ddt_t = sum_u L[u, t] (C_u . B_t) X[u, t] + gamma_t x_t . R_t +
 * A dl_t
 *
 * with U_t = e_t dy_t . S_in C_t and V_s = gamma_s dt_s x_s . R_s. The rectangles of W are summed
 * directly, row by row from the last; row sums less column sums would be the same in exact
 * arithmetic and lose everything here. The states at the chunks' starts are computed again and kept
 * for one document and group.
 */
#include "kernels/cpu/simd.h"
#include "kernels/cpu/ssd.h"

/// Where the gradients go; rows are tokens.
typedef struct ssd_output {
    const float *dy;
    float *dx, *db, *dc, *ddt;
    int64_t lddx, lddb, lddc, ldd_dt;
} ssd_output;

/// Buffers of one unit. ld is the row length of [chunk, chunk] tiles.
typedef struct work {
    int64_t ld;
    float *states, *ds;            ///< S at every chunk's start but the first; gradient of S
    float *bt, *cb, *dcb;          ///< B' and C B' of the chunk; gradient of C B' over heads
    float *pairs, *xt;             ///< X, then L C B'; x'
    float *r, *rows, *dc, *turned; ///< R; weighted rows; a head's part of dC; a state transposed
    float *ddt, *column, *dl, *u, *v;
    ssd_decay w;
} work;

static work work_take(float *p, const ssd_input *in, int64_t length) {
    int64_t n = ssd_min(in->chunk, length), ld = ssd_row(n), chunks = (length + n - 1) / n;
    int64_t size = in->heads / in->groups * in->state * in->dim;
    int64_t wide = in->state > in->dim ? in->state : in->dim;
    return (work){.ld = ld,
                  .states = ssd_take(&p, chunks * size),
                  .ds = ssd_take(&p, size),
                  .bt = ssd_take(&p, in->state * ld),
                  .cb = ssd_take(&p, n * ld),
                  .dcb = ssd_take(&p, n * ld),
                  .pairs = ssd_take(&p, n * ld),
                  .xt = ssd_take(&p, in->dim * ld),
                  .r = ssd_take(&p, n * in->dim),
                  .rows = ssd_take(&p, n * wide),
                  .dc = ssd_take(&p, n * in->state),
                  .turned = ssd_take(&p, in->dim * tile_pad(in->state)),
                  .ddt = ssd_take(&p, ld),
                  .column = ssd_take(&p, ld),
                  .dl = ssd_take(&p, ld),
                  .u = ssd_take(&p, ld),
                  .v = ssd_take(&p, ld),
                  .w = ssd_decay_take(&p, n)};
}

/// to rows (+)= the lower triangle p [n, ld] transposed times b [n, cols].
static void add_transposed(float *to, int64_t ldt, const float *p, int64_t ld, const float *b,
                           int64_t ldb, int64_t n, int64_t cols, bool add) {
    for (int64_t s = 0; s < n; s += SSD_STRIP)
        tile_product(&(tile_args){ssd_min(SSD_STRIP, n - s), cols, n - s, p + s * ld + s, 1, ld,
                                  b + s * ldb, ldb, to + s * ldt, ldt},
                     add);
}

/// The pairs (t, s <= t) of one row: x turns from X into L C B'; dcb and the sums over rows ddt and
/// column, that of W, grow. The tail of whole vectors adds zeros. Not inlined, so that the pointers
/// stay distinct for the compiler.
static __attribute__((noinline)) void
pair_row(float *restrict x, float *restrict dcb, float *restrict ddt, float *restrict column,
         const float *restrict cb, const float *restrict highs, const float *restrict lows,
         const float *restrict dt, int t) {
    float high = highs[t], low = lows[t];
    int end = (int)tile_pad(t + 1);
    memset(x + t + 1, 0, SLACK * sizeof(float));
    for (int s = 0; s < end; s++) {
        float d = (high - highs[s]) + (low - lows[s]);
        float l = vec_exp(d < 0.0f ? d : 0.0f), lx = l * x[s], h = lx * cb[s];
        x[s] = l * cb[s];
        dcb[s] += lx * dt[s];
        ddt[s] += h;
        column[s] += h * dt[s];
    }
    memset(x + t + 1, 0, SLACK * sizeof(float));
}

/// All pairs of one head, from the last row to the first: the rectangles of W end up in k->dl.
static void pair_sums(work *k, int64_t n) {
    memset(k->ddt, 0, (size_t)k->ld * sizeof(float));
    memset(k->column, 0, (size_t)k->ld * sizeof(float));
    for (int64_t t = n - 1; t >= 0; t--) {
        pair_row(k->pairs + t * k->ld, k->dcb + t * k->ld, k->ddt, k->column, k->cb + t * k->ld,
                 k->w.high, k->w.low, k->w.dt, (int)t);
        k->column[t] = 0.0f; /* no rectangle above row t has column t */
        k->dl[t] = tile_sum(k->column, tile_pad(t + 1));
    }
}

/// What flows through dS_out: k->r = R, k->v = gamma x . R, dB, and dx set to gamma R.
static void through_out(work *k, const ssd_input *in, const ssd_output *o, const float *ds,
                        int64_t head, int64_t t0, int64_t n) {
    int64_t dim = in->dim, ns = in->state, group = head / (in->heads / in->groups);
    const float *x = in->x + t0 * in->ldx + head * dim;
    const float *b = in->b + t0 * in->ldb + group * ns;
    float *dx = o->dx + t0 * o->lddx + head * dim;
    tile_product(&(tile_args){n, dim, ns, b, in->ldb, 1, ds, dim, k->r, dim}, false);
    for (int64_t s = 0; s < n; s++) {
        float gamma = k->w.gamma[s], weight = gamma * k->w.dt[s];
        const float *r = k->r + s * dim, *xs = x + s * in->ldx;
        k->v[s] = gamma * tile_dot(xs, r, dim);
        for (int64_t i = 0; i < dim; i++) {
            dx[s * o->lddx + i] = gamma * r[i];
            k->rows[s * dim + i] = weight * xs[i];
        }
    }
    tile_transpose(k->turned, tile_pad(ns), ds, dim, ns, dim);
    tile_product(&(tile_args){n, ns, dim, k->rows, dim, 1, k->turned, tile_pad(ns),
                              o->db + t0 * o->lddb + group * ns, o->lddb},
                 true);
}

/// What flows through S_in: k->u, dC, and dS_out turned into dS_in. `last`: dS_out is zero. Returns
/// the sum exp(cs_end) <dS_out, S_in>.
static float through_in(work *k, const ssd_input *in, const ssd_output *o, const float *state,
                        float *ds, bool last, int64_t head, int64_t t0, int64_t n) {
    int64_t dim = in->dim, ns = in->state, group = head / (in->heads / in->groups);
    const float *c = in->c + t0 * in->ldc + group * ns;
    const float *dy = o->dy + (t0 * in->heads + head) * dim;
    float *dc = o->dc + t0 * o->lddc + group * ns, inner = 0.0f;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < dim; i++)
            k->rows[t * dim + i] = k->w.e[t] * dy[t * in->heads * dim + i];
    tile_transpose(k->turned, tile_pad(ns), state, dim, ns, dim);
    tile_product(&(tile_args){n, ns, dim, k->rows, dim, 1, k->turned, tile_pad(ns), k->dc, ns},
                 false);
    for (int64_t t = 0; t < n; t++) {
        const float *part = k->dc + t * ns, *ct = c + t * in->ldc;
        k->u[t] = tile_dot(part, ct, ns);
        for (int64_t i = 0; i < ns; i++)
            dc[t * o->lddc + i] += part[i];
    }
    if (!last) {
        inner = tile_dot(ds, state, ns * dim);
        for (int64_t i = 0; i < ns * dim; i++)
            ds[i] *= k->w.end;
    }
    tile_product(&(tile_args){ns, dim, n, c, 1, in->ldc, k->rows, dim, ds, dim}, !last);
    return inner * k->w.end;
}

/// Finishes k->dl with U, V and `through` and writes ddt_raw; sums are this head's (ddt_bias,
/// da_log, dd).
static void time_steps(work *k, const ssd_output *o, float through, double *sums, int64_t head,
                       int64_t t0, int64_t n) {
    float right = 0.0f, left = through, a = (float)k->w.a;
    for (int64_t t = n - 1; t >= 0; t--) {
        right += k->u[t];
        k->dl[t] += right;
    }
    for (int64_t t = 0; t < n; t++) {
        k->dl[t] += left;
        left += k->v[t] * k->w.dt[t];
        k->ddt[t] += k->v[t] + a * k->dl[t];
    }
    for (int64_t t = 0; t < tile_pad(n); t++)
        k->ddt[t] *= vec_sigmoid(k->w.z[t]);
    float *ddt = o->ddt + t0 * o->ldd_dt + head;
    for (int64_t t = 0; t < n; t++) {
        ddt[t * o->ldd_dt] = k->ddt[t];
        sums[0] += (double)k->ddt[t];
        sums[1] += k->w.a * (double)(k->w.dt[t] * k->dl[t]);
    }
}

/// One head of one chunk. state: S_in or NULL at the document's start.
static void head_chunk(work *k, const ssd_input *in, const ssd_output *o, const float *state,
                       float *ds, bool last, double *sums, int64_t head, int64_t t0, int64_t n) {
    int64_t dim = in->dim, ldy = in->heads * dim;
    const float *x = in->x + t0 * in->ldx + head * dim, *dy = o->dy + t0 * ldy + head * dim;
    float *dx = o->dx + t0 * o->lddx + head * dim, through = 0.0f, skip = in->d[head];
    ssd_decays(&k->w, in, head, t0, n);
    tile_transpose(k->xt, k->ld, x, in->ldx, n, dim);
    for (int64_t i = 0; i < n; i += SSD_STRIP) {
        int64_t rows = ssd_min(SSD_STRIP, n - i);
        tile_product(&(tile_args){rows, tile_pad(i + rows), dim, dy + i * ldy, ldy, 1, k->xt, k->ld,
                                  k->pairs + i * k->ld, k->ld},
                     false);
    }
    for (int64_t t = 0; t < n; t++)
        sums[2] += (double)k->pairs[t * k->ld + t];
    pair_sums(k, n);
    memset(k->u, 0, (size_t)k->ld * sizeof(float));
    memset(k->v, 0, (size_t)k->ld * sizeof(float));
    if (!last)
        through_out(k, in, o, ds, head, t0, n);
    if (state)
        through = through_in(k, in, o, state, ds, last, head, t0, n);
    add_transposed(dx, o->lddx, k->pairs, k->ld, dy, ldy, n, dim, !last);
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < dim; i++)
            dx[t * o->lddx + i] = k->w.dt[t] * dx[t * o->lddx + i] + skip * dy[t * ldy + i];
    time_steps(k, o, through, sums, head, t0, n);
}

/// One group of one document; sums [heads, SSD_SUMS] are the document's.
static void backward_unit(const ssd_input *in, const ssd_output *o, double *sums, int64_t group,
                          int64_t start, int64_t length, float *scratch) {
    work k = work_take(scratch, in, length);
    int64_t chunk = ssd_min(in->chunk, length), chunks = (length + chunk - 1) / chunk;
    int64_t per_group = in->heads / in->groups, size = in->state * in->dim;
    for (int64_t i = 0; i + 1 < chunks; i++)
        for (int64_t h = 0; h < per_group; h++) {
            float *to = k.states + ((i + 1) * per_group + h) * size;
            int64_t head = group * per_group + h;
            ssd_decays(&k.w, in, head, start + i * chunk, chunk);
            ssd_state(to, i ? to - per_group * size : NULL, k.rows, in, &k.w, head,
                      start + i * chunk, chunk);
        }
    for (int64_t i = chunks - 1; i >= 0; i--) {
        int64_t t0 = start + i * chunk, n = ssd_min(chunk, start + length - t0), ns = in->state;
        float *db = o->db + t0 * o->lddb + group * ns, *dc = o->dc + t0 * o->lddc + group * ns;
        ssd_products(k.cb, k.bt, k.ld, in, group, t0, n);
        memset(k.dcb, 0, (size_t)(n * k.ld) * sizeof(float));
        for (int64_t t = 0; t < n; t++) {
            memset(db + t * o->lddb, 0, (size_t)ns * sizeof(float));
            memset(dc + t * o->lddc, 0, (size_t)ns * sizeof(float));
        }
        for (int64_t h = 0; h < per_group; h++) {
            int64_t head = group * per_group + h;
            head_chunk(&k, in, o, i ? k.states + (i * per_group + h) * size : NULL, k.ds + h * size,
                       i == chunks - 1, sums + head * SSD_SUMS, head, t0, n);
        }
        add_transposed(db, o->lddb, k.dcb, k.ld, in->c + t0 * in->ldc + group * ns, in->ldc, n, ns,
                       true);
        for (int64_t t = 0; t < n; t += SSD_STRIP) {
            int64_t rows = ssd_min(SSD_STRIP, n - t);
            tile_product(&(tile_args){rows, ns, t + rows, k.dcb + t * k.ld, k.ld, 1,
                                      in->b + t0 * in->ldb + group * ns, in->ldb, dc + t * o->lddc,
                                      o->lddc},
                         true);
        }
    }
}

int CQ_OP(ssd_backward)(cq_stream *s, const cq_ssd_backward_args *a) {
    CQ_F32_OR_REF(ssd_backward);
    const ssd_input in = SSD_INPUT(a);
    const ssd_output out = {.dy = a->dy,
                            .dx = a->dx,
                            .db = a->dB,
                            .dc = a->dC,
                            .ddt = a->ddt_raw,
                            .lddx = a->lddx,
                            .lddb = a->lddB,
                            .lddc = a->lddC,
                            .ldd_dt = a->ldd_dt};
    int64_t longest = sequence_longest(a->starts, a->n_docs), n_sums = a->heads * SSD_SUMS;
    CQ_TRY(scratch_check(
        s, "ssd_backward",
        cq_ssd_scratch_bytes(longest, a->chunk, a->heads, a->head_dim, a->groups, a->state)));
    double *total = s->scratch,
           *parts = total + n_sums; /* the first thread's scratch starts with them */
    memset(total, 0, (size_t)n_sums * sizeof(double));
#pragma omp parallel num_threads(s->threads)
    {
        float *scratch = (float *)scratch_of_thread(s) + 2 * (SSD_WAVE + 1) * n_sums;
        for (int64_t first = 0; first < a->n_docs; first += SSD_WAVE) {
            int64_t docs = ssd_min(SSD_WAVE, a->n_docs - first);
#pragma omp single
            memset(parts, 0, (size_t)(docs * n_sums) * sizeof(double));
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < docs * a->groups; unit++) {
                int64_t doc = unit / a->groups, start = a->starts[first + doc];
                int64_t length = a->starts[first + doc + 1] - start;
                if (length > 0)
                    backward_unit(&in, &out, parts + doc * n_sums, unit % a->groups, start, length,
                                  scratch);
            }
#pragma omp single
            for (int64_t i = 0; i < docs * n_sums; i++)
                total[i % n_sums] += parts[i];
        }
    }
    for (int64_t h = 0; h < a->heads && a->ddt_bias; h++) {
        ((float *)a->ddt_bias)[h] += (float)total[h * SSD_SUMS];
        ((float *)a->da_log)[h] += (float)total[h * SSD_SUMS + 1];
        ((float *)a->dd)[h] += (float)total[h * SSD_SUMS + 2];
    }
    return CQ_OK;
}
