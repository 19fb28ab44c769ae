/* geometry.inc.h - the losses on hidden states, over `real` and `acc` (see ref.h): Gram matrices,
   CKA and Gram-Frobenius between two of them, and the row-wise rivals cosine and relative MSE.

     biased     K = Xc Xc', Xc = X - column means
     unbiased   K_ij = G_ij - (r_i + r_j) / (n-2) + t / ((n-1)(n-2)), K_ii = 0, where G = Xc Xc'
                without its diagonal, r its row sums, t its total (U-centring)
     1 - cka    = | K/|K| - L/|L| |^2 / 2            d/dX = -(2/|K|) (L/|L| - cka K/|K|) X

   U-centring takes any shift of the rows out again, so both forms start from centred rows, which
   keeps the digits. Differences of unit vectors, never 1 - cosine: near agreement the latter has
   none left. A loss whose norms are zero or not finite is 0, and so is its gradient.
   Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012, JMLR 13. */

static void CQ_FN(centre_columns)(real *to, const real *x, int64_t n, int64_t dim) {
    for (int64_t c = 0; c < dim; c++) {
        acc sum = 0;
        for (int64_t i = 0; i < n; i++)
            sum += (acc)x[i * dim + c];
        for (int64_t i = 0; i < n; i++)
            to[i * dim + c] = (real)((acc)x[i * dim + c] - sum / (acc)n);
    }
}

/* U-centres g [n, n] in place; r is scratch [n]. */
static void CQ_FN(u_centre)(acc *g, acc *r, int64_t n) {
    acc total = 0, m = (acc)(n - 2);
    for (int64_t i = 0; i < n; i++) {
        g[i * n + i] = 0;
        r[i] = 0;
        for (int64_t j = 0; j < n; j++)
            r[i] += g[i * n + j];
        total += r[i];
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            g[i * n + j] =
                i == j ? 0 : g[i * n + j] - (r[i] + r[j]) / m + total / ((acc)(n - 1) * m);
}

static int CQ_FN(one_gram)(const cq_gram_args *a) {
    int64_t n = a->n, least = a->unbiased ? 4 : 2;
    if (n < least)
        return cq_fail(CQ_ESHAPE, "gram: %lld rows, wanted at least %lld", (long long)n,
                       (long long)least);
    acc *g = cq_ref_zeros(n * n + n, sizeof(*g));
    if (!g)
        return cq_fail(CQ_ENOMEM, "gram: no memory for %lld rows", (long long)n);
    real *xc = a->scratch;
    CQ_FN(centre_columns)(xc, a->x, n, a->dim);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            acc sum = 0;
            for (int64_t c = 0; c < a->dim; c++)
                sum += (acc)xc[i * a->dim + c] * (acc)xc[j * a->dim + c];
            g[i * n + j] = g[j * n + i] = sum;
        }
    if (a->unbiased)
        CQ_FN(u_centre)(g, g + n * n, n);
    for (int64_t i = 0; i < n * n; i++)
        ((real *)a->gram)[i] = (real)g[i];
    free(g);
    return CQ_OK;
}

static int CQ_FN(gram)(const cq_gram_args *a) {
    int64_t rows = a->n * a->dim;
    for (int64_t i = 0; i == 0 || i < a->batch; i++) {
        cq_gram_args one = *a;
        one.x = (const real *)a->x + i * rows;
        one.scratch = (real *)a->scratch + i * rows;
        one.gram = (real *)a->gram + i * a->n * a->n;
        CQ_TRY(CQ_FN(one_gram)(&one));
    }
    return CQ_OK;
}

static bool CQ_FN(is_norm)(acc squared) { return squared > 0 && isfinite(squared); }

static void CQ_FN(one_cka)(const cq_cka_args *a, const real *k, const real *l, double *out) {
    acc kl = 0, kk = 0, ll = 0, loss = 0;
    for (int64_t i = 0; i < a->n * a->n; i++) {
        kl += (acc)k[i] * (acc)l[i];
        kk += (acc)k[i] * (acc)k[i];
        ll += (acc)l[i] * (acc)l[i];
    }
    bool cka = a->loss == CQ_GRAM_CKA;
    if (cka ? CQ_FN(is_norm)(kk) && CQ_FN(is_norm)(ll) : CQ_FN(is_norm)(ll) && isfinite(kk)) {
        acc b = cka ? sqrt(kk) : 1, c = cka ? sqrt(ll) : 1;
        for (int64_t i = 0; i < a->n * a->n; i++) {
            acc d = (acc)k[i] / b - (acc)l[i] / c;
            loss += d * d;
        }
        loss /= cka ? 2 : ll;
    }
    out[0] = (double)kl;
    out[1] = (double)kk;
    out[2] = (double)ll;
    out[3] = (double)loss;
}

static int CQ_FN(cka)(const cq_cka_args *a) {
    int64_t square = a->n * a->n;
    for (int64_t i = 0; i == 0 || i < a->batch; i++) {
        const real *k = a->k, *l = a->l;
        CQ_FN(one_cka)(a, k + i * square, l + i * square, a->out + 4 * i);
    }
    return CQ_OK;
}

/* k becomes the symmetric matrix M of dx = M x. Its rows sum to zero like those of K and L, so the
   rows of x need no centring. */
static void CQ_FN(one_cka_backward)(const cq_cka_backward_args *a) {
    int64_t n = a->n;
    real *k = a->k, *dx = a->dx;
    const real *l = a->l, *x = a->x;
    acc kk = (acc)a->stats[1], ll = (acc)a->stats[2], of_k = 0, of_l = 0;
    if (a->loss == CQ_GRAM_CKA && CQ_FN(is_norm)(kk) && CQ_FN(is_norm)(ll)) {
        acc b = sqrt(kk), c = sqrt(ll), factor = -2 * (acc)a->weight / b;
        of_k = -factor * ((acc)a->stats[0] / (b * c)) / b;
        of_l = factor / c;
    }
    if (a->loss == CQ_GRAM_FROBENIUS && CQ_FN(is_norm)(ll) && isfinite(kk)) {
        of_k = 4 * (acc)a->weight / ll;
        of_l = -of_k;
    }
    memset(dx, 0, (size_t)(n * a->dim) * sizeof(*dx));
    if (of_l == 0)
        return;
    for (int64_t i = 0; i < n * n; i++)
        k[i] = (real)(of_k * (acc)k[i] + of_l * (acc)l[i]);
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < a->dim; c++) {
            acc sum = 0;
            for (int64_t j = 0; j < n; j++)
                sum += (acc)k[i * n + j] * (acc)x[j * a->dim + c];
            dx[i * a->dim + c] = (real)sum;
        }
}

static int CQ_FN(cka_backward)(const cq_cka_backward_args *a) {
    int64_t rows = a->n * a->dim, square = a->n * a->n;
    for (int64_t i = 0; i == 0 || i < a->batch; i++) {
        cq_cka_backward_args one = *a;
        one.k = (real *)a->k + i * square;
        one.l = (const real *)a->l + i * square;
        one.x = (const real *)a->x + i * rows;
        one.weight = a->weights ? a->weights[i] : a->weight;
        one.stats = a->stats + 4 * i;
        one.dx = (real *)a->dx + i * rows;
        CQ_FN(one_cka_backward)(&one);
    }
    return CQ_OK;
}

static acc CQ_FN(squared_norm)(const real *x, int64_t n) {
    acc sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (acc)x[i] * (acc)x[i];
    return sum;
}

/* |x / xn - y / yn|^2 */
static acc CQ_FN(squared_distance)(const real *x, acc xn, const real *y, acc yn, int64_t n) {
    acc sum = 0;
    for (int64_t i = 0; i < n; i++) {
        acc d = (acc)x[i] / xn - (acc)y[i] / yn;
        sum += d * d;
    }
    return sum;
}

static int CQ_FN(rowloss)(const cq_rowloss_args *a) {
    const real *x = a->x, *y = a->y;
    *a->out = 0;
    if (a->form == CQ_ROWLOSS_MSE) {
        acc yy = CQ_FN(squared_norm)(y, a->n * a->dim);
        if (CQ_FN(is_norm)(yy))
            *a->out = (double)(CQ_FN(squared_distance)(x, 1, y, 1, a->n * a->dim) / yy);
        return CQ_OK;
    }
    acc sum = 0;
    for (int64_t i = 0; i < a->n; i++, x += a->dim, y += a->dim) {
        acc xx = CQ_FN(squared_norm)(x, a->dim), yy = CQ_FN(squared_norm)(y, a->dim);
        if (CQ_FN(is_norm)(xx) && CQ_FN(is_norm)(yy))
            sum += CQ_FN(squared_distance)(x, sqrt(xx), y, sqrt(yy), a->dim) / 2;
    }
    *a->out = a->n ? (double)(sum / (acc)a->n) : 0;
    return CQ_OK;
}

/* cosine: dx = weight / (n |x|) (cos x/|x| - y/|y|); mse: dx = weight 2 (X - Y) / |Y|^2. */
static int CQ_FN(rowloss_backward)(const cq_rowloss_backward_args *a) {
    const real *x = a->x, *y = a->y;
    real *dx = a->dx;
    acc weight = (acc)(a->weights ? *a->weights : a->weight);
    memset(dx, 0, (size_t)(a->n * a->dim) * sizeof(*dx));
    if (a->form == CQ_ROWLOSS_MSE) {
        acc yy = CQ_FN(squared_norm)(y, a->n * a->dim);
        for (int64_t i = 0; CQ_FN(is_norm)(yy) && i < a->n * a->dim; i++)
            dx[i] = (real)(weight * 2 * ((acc)x[i] - (acc)y[i]) / yy);
        return CQ_OK;
    }
    for (int64_t i = 0; i < a->n; i++, x += a->dim, y += a->dim, dx += a->dim) {
        acc xx = CQ_FN(squared_norm)(x, a->dim), yy = CQ_FN(squared_norm)(y, a->dim), xy = 0;
        if (!CQ_FN(is_norm)(xx) || !CQ_FN(is_norm)(yy))
            continue;
        acc xn = sqrt(xx), yn = sqrt(yy);
        for (int64_t c = 0; c < a->dim; c++)
            xy += (acc)x[c] / xn * ((acc)y[c] / yn);
        for (int64_t c = 0; c < a->dim; c++)
            dx[c] = (real)(weight / ((acc)a->n * xn) * (xy * ((acc)x[c] / xn) - (acc)y[c] / yn));
    }
    return CQ_OK;
}
