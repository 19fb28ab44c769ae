/// ssd.h - what the SSD forward and backward share: one document and group, cut into chunks.
///
///     dt = softplus(dt_raw + dt_bias)    cs_t = sum_{u <= t} A dt_u from the chunk's start
///     L[t, s] = exp(cs_t - cs_s)    e_t = exp(cs_t)    gamma_s = exp(cs_end - cs_s)
///     S_out = exp(cs_end) S_in + sum_s gamma_s dt_s B_s x_s'        (state kept as [state,
///     head_dim])
///
/// Chunks restart at every document's start, so nothing is ever masked by document. cs is summed in
/// double and kept as the sum of two floats: the difference of two large cs keeps its digits, so a
/// decay is as exact as in the sequential recurrence. Mamba-2: arXiv 2405.21060, section 6.
#pragma once
#include <math.h>

#include "kernels/cpu/sequence.h"
#include "kernels/cpu/vec.h"

/// Rows that share one end of their causal range.
enum { SSD_STRIP = 2 * TILE_ROWS };

/// The inputs, from the arguments of the forward or the backward.
typedef struct ssd_input {
    int64_t heads, dim, groups, state, chunk, ldx, ldb, ldc, ld_dt;
    const float *x, *b, *c, *dt_raw, *dt_bias, *a_log, *d;
} ssd_input;
#define SSD_INPUT(a)                                                                               \
    {                                                                                              \
        .heads = (a)->heads, .dim = (a)->head_dim, .groups = (a)->groups, .state = (a)->state,     \
        .chunk = (a)->chunk, .ldx = (a)->ldx, .ldb = (a)->ldB, .ldc = (a)->ldC,                    \
        .ld_dt = (a)->ld_dt, .x = (a)->x, .b = (a)->B, .c = (a)->C, .dt_raw = (a)->dt_raw,         \
        .dt_bias = (a)->dt_bias, .a_log = (a)->a_log, .d = (a)->d                                  \
    }

/// Decays of one head in one chunk; arrays of tile_pad(chunk), the padding repeats finite values.
typedef struct ssd_decay {
    double a;                               ///< A = -exp(a_log)
    float *z, *dt, *high, *low, *e, *gamma; ///< z = dt_raw + dt_bias; cs = high + low
    float end;                              ///< exp(cs_end)
} ssd_decay;

static inline int64_t ssd_min(int64_t a, int64_t b) { return a < b ? a : b; }

/// Row length of the [n, n] tiles of a chunk of n tokens.
static inline int64_t ssd_row(int64_t n) { return tile_pad(n) + SLACK; }

/// Takes n floats from the scratch at *p.
static inline float *ssd_take(float **p, int64_t n) {
    float *taken = *p;
    *p += tile_pad(n);
    return taken;
}
static inline ssd_decay ssd_decay_take(float **p, int64_t chunk) {
    int64_t n = tile_pad(chunk);
    return (ssd_decay){.z = ssd_take(p, n),
                       .dt = ssd_take(p, n),
                       .high = ssd_take(p, n),
                       .low = ssd_take(p, n),
                       .e = ssd_take(p, n),
                       .gamma = ssd_take(p, n)};
}

/// Fills *w for `head` and the n tokens from t0 on.
__attribute__((unused)) static void ssd_decays(ssd_decay *w, const ssd_input *in, int64_t head,
                                               int64_t t0, int64_t n) {
    int64_t padded = tile_pad(n);
    const float *raw = in->dt_raw + t0 * in->ld_dt + head;
    for (int64_t t = 0; t < n; t++)
        w->z[t] = raw[t * in->ld_dt] + in->dt_bias[head];
    for (int64_t t = n; t < padded; t++)
        w->z[t] = 0.0f;
    for (int64_t t = 0; t < padded; t++)
        w->dt[t] = vec_softplus(w->z[t]);
    double cs = 0.0;
    w->a = -exp((double)in->a_log[head]);
    for (int64_t t = 0; t < padded; t++) {
        if (t < n)
            cs += w->a * (double)w->dt[t];
        else
            w->dt[t] = 0.0f;
        w->high[t] = (float)cs;
        w->low[t] = (float)(cs - (double)w->high[t]);
    }
    float high = w->high[n - 1], low = w->low[n - 1];
    for (int64_t t = 0; t < padded; t++) {
        float gone = w->high[t], left = (high - w->high[t]) + (low - w->low[t]);
        w->e[t] = vec_exp(gone < 0.0f ? gone : 0.0f);
        w->gamma[t] = vec_exp(left < 0.0f ? left : 0.0f);
    }
    w->end = w->e[n - 1];
}

/// cb [n, ld] = C B' for one group, on and below the diagonal's strips; bt is a buffer
/// [state, same].
__attribute__((unused)) static void ssd_products(float *cb, float *bt, int64_t ld,
                                                 const ssd_input *in, int64_t group, int64_t t0,
                                                 int64_t n) {
    const float *b = in->b + t0 * in->ldb + group * in->state;
    const float *c = in->c + t0 * in->ldc + group * in->state;
    tile_transpose(bt, ld, b, in->ldb, n, in->state);
    for (int64_t i = 0; i < n; i += SSD_STRIP) {
        int64_t rows = ssd_min(SSD_STRIP, n - i);
        tile_product(&(tile_args){rows, tile_pad(i + rows), in->state, c + i * in->ldc, in->ldc, 1,
                                  bt, ld, cb + i * ld, ld},
                     false);
    }
}

/// state = end * state + sum_s gamma_s dt_s B_s x_s'; `fresh`: what was in state counts as zero. w
/// is a buffer [chunk, state].
__attribute__((unused)) static void ssd_state(float *to, const float *from, float *weighted,
                                              const ssd_input *in, const ssd_decay *w, int64_t head,
                                              int64_t t0, int64_t n) {
    int64_t ns = in->state, group = head / (in->heads / in->groups);
    const float *b = in->b + t0 * in->ldb + group * ns;
    for (int64_t t = 0; t < n; t++) {
        float f = w->gamma[t] * w->dt[t];
        for (int64_t i = 0; i < ns; i++)
            weighted[t * ns + i] = f * b[t * in->ldb + i];
    }
    for (int64_t i = 0; from && i < ns * in->dim; i++)
        to[i] = w->end * from[i];
    tile_product(&(tile_args){ns, in->dim, n, weighted, 1, ns,
                              in->x + t0 * in->ldx + head * in->dim, in->ldx, to, in->dim},
                 from != NULL);
}
