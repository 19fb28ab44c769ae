/* mamba.inc.h - what a Mamba-2 mixer has of its own: the causal depthwise convolution, and SSD.

   SSD is the plain recurrence, token after token; the chunked forms elsewhere must agree with it.
   Backward, with a_t = exp(A dt_t) and dS running from zero at a document's last token to its
   first:

       dS_t = dy_t C_t' + a_{t+1} dS_{t+1}    q_t = <dS_t, S_{t-1}>
       dx_t = D dy_t + dt_t dS_t B_t          dB_t = dt_t dS_t' x_t    dC_t = S_t' dy_t
       ddt_t = x_t' dS_t B_t + A a_t q_t      ddt_raw = ddt sigmoid(dt_raw + dt_bias)
       dA += dt_t a_t q_t, da_log = A dA      dD = sum dy_t x_t

   The states of one head in one document are all kept: a specification may use memory to stay
   readable. */

/* Pre-activation of token t in a document that begins at `begin`. */
static acc CQ_FN(conv_at)(const real *x, int64_t ldx, const real *w, const real *b, int64_t width,
                          int64_t begin, int64_t t, int64_t c) {
    acc sum = b ? (acc)b[c] : 0;
    for (int64_t k = 0; k < width; k++) {
        int64_t from = t - width + 1 + k;
        if (from >= begin)
            sum += (acc)w[c * width + k] * (acc)x[from * ldx + c];
    }
    return sum;
}

static int CQ_FN(conv_forward)(const cq_conv_forward_args *a) {
    real *y = a->y;
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++)
            for (int64_t c = 0; c < a->channels; c++) {
                acc p = CQ_FN(conv_at)(a->x, a->ldx, a->w, a->b, a->width, a->starts[d], t, c);
                y[t * a->channels + c] = (real)(p * CQ_SIGMOID(p));
            }
    return CQ_OK;
}

/* One channel: dp [tokens] is the gradient of the pre-activation. */
static void CQ_FN(conv_channel)(const cq_conv_backward_args *a, int64_t c, acc *dp) {
    const real *x = a->x, *w = a->w, *dy = a->dy;
    real *dx = a->dx, *dw = a->dw, *db = a->db;
    acc bias = 0;
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++) {
            acc p = CQ_FN(conv_at)(x, a->ldx, w, a->b, a->width, a->starts[d], t, c),
                s = CQ_SIGMOID(p);
            dp[t] = (acc)dy[t * a->channels + c] * s * (1 + p * (1 - s));
            bias += dp[t];
        }
    if (db)
        db[c] = (real)((acc)db[c] + bias);
    for (int64_t k = 0; dw && k < a->width; k++) {
        acc sum = 0;
        for (int64_t d = 0; d < a->n_docs; d++)
            for (int64_t t = a->starts[d] + a->width - 1 - k; t < a->starts[d + 1]; t++)
                sum += dp[t] * (acc)x[(t - a->width + 1 + k) * a->ldx + c];
        dw[c * a->width + k] = (real)((acc)dw[c * a->width + k] + sum);
    }
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++) {
            acc sum = 0;
            for (int64_t k = 0; k < a->width; k++)
                if (t + a->width - 1 - k < a->starts[d + 1])
                    sum += (acc)w[c * a->width + k] * dp[t + a->width - 1 - k];
            dx[t * a->lddx + c] = (real)sum;
        }
}

static int CQ_FN(conv_backward)(const cq_conv_backward_args *a) {
    acc *dp = cq_ref_zeros(a->tokens, sizeof(acc));
    if (!dp)
        return cq_fail(CQ_ENOMEM, "convolution: no memory for one channel of %lld tokens",
                       (long long)a->tokens);
    for (int64_t c = 0; c < a->channels; c++)
        CQ_FN(conv_channel)(a, c, dp);
    free(dp);
    return CQ_OK;
}

/* Channel c of document d of the cached form; `before` [width - 1] holds the inputs that went
 * before, zeros where there were none. */
static void CQ_FN(conv_continue)(const cq_conv_cached_args *a, int64_t d, int64_t c, acc *before) {
    const real *x = a->x, *w = (const real *)a->w + c * a->width, *b = a->b;
    int64_t kept = a->width - 1;
    real *state = (real *)a->state + a->slot[d] * kept * a->channels + c;
    for (int64_t k = 0; k < kept; k++)
        before[k] = a->past[d] + k >= kept ? (acc)state[k * a->channels] : 0;
    for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++) {
        acc now = (acc)x[t * a->ldx + c], sum = b ? (acc)b[c] : 0;
        for (int64_t k = 0; k < kept; k++)
            sum += (acc)w[k] * before[k];
        sum += (acc)w[kept] * now;
        ((real *)a->y)[t * a->channels + c] = (real)(sum * CQ_SIGMOID(sum));
        for (int64_t k = 0; k < kept; k++)
            before[k] = k + 1 < kept ? before[k + 1] : now;
    }
    for (int64_t k = 0; k < kept; k++)
        state[k * a->channels] = (real)before[k];
}

static int CQ_FN(conv_cached)(const cq_conv_cached_args *a) {
    acc *before = cq_ref_zeros(a->width, sizeof(acc));
    if (!before)
        return cq_fail(CQ_ENOMEM, "convolution: no memory for %lld inputs", (long long)a->width);
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t c = 0; c < a->channels; c++)
            CQ_FN(conv_continue)(a, d, c, before);
    free(before);
    return CQ_OK;
}

/* S <- decay S + dt x B' */
static void CQ_FN(ssd_state)(acc *S, const acc *before, acc decay, acc dt, const real *x,
                             const real *B, int64_t head_dim, int64_t state) {
    for (int64_t p = 0; p < head_dim; p++)
        for (int64_t n = 0; n < state; n++)
            S[p * state + n] = decay * before[p * state + n] + dt * (acc)x[p] * (acc)B[n];
}

static int CQ_FN(ssd_forward)(const cq_ssd_forward_args *a) {
    const real *X = a->x, *B = a->B, *C = a->C, *dt_raw = a->dt_raw;
    const real *dt_bias = a->dt_bias, *a_log = a->a_log, *skip = a->d;
    int64_t P = a->head_dim, N = a->state, share = a->heads / a->groups;
    acc *S = cq_ref_zeros(P * N, sizeof(acc));
    if (!S)
        return cq_fail(CQ_ENOMEM, "ssd: no memory for one state");
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t d = 0; d < a->n_docs; d++) {
            memset(S, 0, (size_t)(P * N) * sizeof(acc));
            for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++) {
                const real *x = X + t * a->ldx + h * P, *b = B + t * a->ldB + h / share * N;
                const real *c = C + t * a->ldC + h / share * N;
                real *y = (real *)a->y + (t * a->heads + h) * P;
                acc raw = (acc)dt_raw[t * a->ld_dt + h] + (acc)dt_bias[h], dt = CQ_SOFTPLUS(raw);
                CQ_FN(ssd_state)(S, S, exp(-exp((acc)a_log[h]) * dt), dt, x, b, P, N);
                for (int64_t p = 0; p < P; p++) {
                    acc sum = 0;
                    for (int64_t n = 0; n < N; n++)
                        sum += S[p * N + n] * (acc)c[n];
                    y[p] = (real)(sum + (acc)skip[h] * (acc)x[p]);
                }
            }
        }
    free(S);
    return CQ_OK;
}

/* Head h of document d of the cached form; S [head_dim, state]. */
static void CQ_FN(ssd_continue)(const cq_ssd_cached_args *a, int64_t d, int64_t h, acc *S) {
    int64_t P = a->head_dim, N = a->state, g = h / (a->heads / a->groups);
    real *kept = (real *)a->S + (a->slot[d] * a->heads + h) * N * P;
    for (int64_t p = 0; p < P; p++)
        for (int64_t n = 0; n < N; n++)
            S[p * N + n] = a->past[d] > 0 ? (acc)kept[n * P + p] : 0;
    for (int64_t t = a->starts[d]; t < a->starts[d + 1]; t++) {
        const real *x = (const real *)a->x + t * a->ldx + h * P;
        const real *b = (const real *)a->B + t * a->ldB + g * N;
        const real *c = (const real *)a->C + t * a->ldC + g * N;
        real *y = (real *)a->y + (t * a->heads + h) * P;
        acc raw = (acc)((const real *)a->dt_raw)[t * a->ld_dt + h], dt;
        raw += (acc)((const real *)a->dt_bias)[h];
        dt = CQ_SOFTPLUS(raw);
        CQ_FN(ssd_state)
        (S, S, exp(-exp((acc)((const real *)a->a_log)[h]) * dt), dt, x, b, P, N);
        for (int64_t p = 0; p < P; p++) {
            acc sum = 0;
            for (int64_t n = 0; n < N; n++)
                sum += S[p * N + n] * (acc)c[n];
            y[p] = (real)(sum + (acc)((const real *)a->d)[h] * (acc)x[p]);
        }
    }
    for (int64_t p = 0; p < P; p++)
        for (int64_t n = 0; n < N; n++)
            kept[n * P + p] = (real)S[p * N + n];
}

static int CQ_FN(ssd_cached)(const cq_ssd_cached_args *a) {
    acc *S = cq_ref_zeros(a->head_dim * a->state, sizeof(acc));
    if (!S)
        return cq_fail(CQ_ENOMEM, "ssd: no memory for one state");
    for (int64_t d = 0; d < a->n_docs; d++)
        for (int64_t h = 0; h < a->heads; h++)
            CQ_FN(ssd_continue)(a, d, h, S);
    free(S);
    return CQ_OK;
}

/* Working memory of the backward: sums over heads, the states S_{-1} .. S_{len-1} of a document,
 * and dS. */
typedef struct CQ_FN(ssd_work) {
    acc *dB, *dC;   /* [tokens, groups, state] */
    acc *states;    /* [1 + longest, head_dim, state]; the first is the zero state */
    acc *dS;        /* [head_dim, state] */
    acc dA, dD, dt; /* gradients of one head's A, D and dt_bias */
} CQ_FN(ssd_work);

/* One token of the backward. `before` is S_{t-1} with S_t behind it; dS comes in without this
   token's dy C' and leaves multiplied by this token's decay, for the token before. */
static void CQ_FN(ssd_token)(const cq_ssd_backward_args *a, CQ_FN(ssd_work) * w, int64_t h,
                             int64_t t, const acc *before) {
    int64_t P = a->head_dim, N = a->state, g = h / (a->heads / a->groups);
    const acc *S = before + P * N;
    const real *x = (const real *)a->x + t * a->ldx + h * P;
    const real *B = (const real *)a->B + t * a->ldB + g * N,
               *C = (const real *)a->C + t * a->ldC + g * N;
    const real *dy = (const real *)a->dy + (t * a->heads + h) * P;
    real *dx = (real *)a->dx + t * a->lddx + h * P;
    acc *dB = w->dB + (t * a->groups + g) * N, *dC = w->dC + (t * a->groups + g) * N, *dS = w->dS;
    acc skip = (acc)((const real *)a->d)[h], A = -exp((acc)((const real *)a->a_log)[h]);
    acc raw = (acc)((const real *)a->dt_raw)[t * a->ld_dt + h] + (acc)((const real *)a->dt_bias)[h];
    acc dt = CQ_SOFTPLUS(raw), decay = exp(A * dt), q = 0, xSB = 0;
    for (int64_t p = 0; p < P; p++) {
        acc SB = 0;
        for (int64_t n = 0; n < N; n++) {
            acc *ds = &dS[p * N + n];
            *ds += (acc)dy[p] * (acc)C[n];
            SB += *ds * (acc)B[n];
            q += *ds * before[p * N + n];
            dB[n] += dt * *ds * (acc)x[p];
            dC[n] += S[p * N + n] * (acc)dy[p];
            *ds *= decay;
        }
        xSB += (acc)x[p] * SB;
        w->dD += (acc)dy[p] * (acc)x[p];
        dx[p] = (real)(skip * (acc)dy[p] + dt * SB);
    }
    acc ddt = (xSB + A * decay * q) * (raw > 20 ? 1 : CQ_SIGMOID(raw));
    ((real *)a->ddt_raw)[t * a->ldd_dt + h] = (real)ddt;
    w->dA += dt * decay * q;
    w->dt += ddt;
}

/* One head in one document: all states forwards, then the gradients backwards. */
static void CQ_FN(ssd_document)(const cq_ssd_backward_args *a, CQ_FN(ssd_work) * w, int64_t h,
                                int64_t begin, int64_t end) {
    const real *X = a->x, *B = a->B, *dt_raw = a->dt_raw, *dt_bias = a->dt_bias, *a_log = a->a_log;
    int64_t P = a->head_dim, N = a->state, size = P * N, g = h / (a->heads / a->groups);
    for (int64_t t = begin; t < end; t++) {
        acc raw = (acc)dt_raw[t * a->ld_dt + h] + (acc)dt_bias[h], dt = CQ_SOFTPLUS(raw);
        acc *before = w->states + (t - begin) * size;
        CQ_FN(ssd_state)
        (before + size, before, exp(-exp((acc)a_log[h]) * dt), dt, X + t * a->ldx + h * P,
         B + t * a->ldB + g * N, P, N);
    }
    memset(w->dS, 0, (size_t)size * sizeof(acc));
    for (int64_t t = end - 1; t >= begin; t--)
        CQ_FN(ssd_token)(a, w, h, t, w->states + (t - begin) * size);
}

static void CQ_FN(ssd_heads)(const cq_ssd_backward_args *a, CQ_FN(ssd_work) * w) {
    real *ddt_bias = a->ddt_bias, *da_log = a->da_log, *dd = a->dd;
    for (int64_t h = 0; h < a->heads; h++) {
        w->dA = w->dD = w->dt = 0;
        for (int64_t d = 0; d < a->n_docs; d++)
            CQ_FN(ssd_document)(a, w, h, a->starts[d], a->starts[d + 1]);
        if (!dd)
            continue;
        acc A = -exp((acc)((const real *)a->a_log)[h]);
        ddt_bias[h] = (real)((acc)ddt_bias[h] + w->dt);
        da_log[h] = (real)((acc)da_log[h] + A * w->dA);
        dd[h] = (real)((acc)dd[h] + w->dD);
    }
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t i = 0; i < a->groups * a->state; i++) {
            ((real *)a->dB)[t * a->lddB + i] = (real)w->dB[t * a->groups * a->state + i];
            ((real *)a->dC)[t * a->lddC + i] = (real)w->dC[t * a->groups * a->state + i];
        }
}

static int CQ_FN(ssd_backward)(const cq_ssd_backward_args *a) {
    int64_t longest = 0, size = a->head_dim * a->state, shared = a->tokens * a->groups * a->state;
    for (int64_t d = 0; d < a->n_docs; d++)
        longest =
            a->starts[d + 1] - a->starts[d] > longest ? a->starts[d + 1] - a->starts[d] : longest;
    acc *memory = cq_ref_zeros(2 * shared + (longest + 2) * size, sizeof(acc));
    if (!memory)
        return cq_fail(CQ_ENOMEM, "ssd: no memory for the states of a document of %lld tokens",
                       (long long)longest);
    CQ_FN(ssd_work) w = {.dB = memory, .dC = memory + shared, .dS = memory + 2 * shared};
    w.states = w.dS + size;
    CQ_FN(ssd_heads)(a, &w);
    free(memory);
    return CQ_OK;
}
