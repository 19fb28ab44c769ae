/* norms.inc.h - the three RMS norms: of rows, gated by group (Mamba-2), and of heads with rotary
   embedding.

       forward   xhat = x r, r = 1 / sqrt(mean x^2 + eps), y = w xhat
       backward  g = w dy, dx = r (g - xhat mean(g xhat)), dw += sum dy xhat

   Weight gradients are summed over all rows first and added to the buffer once; they are taken
   before dx is written, so dx may lie over dy. */

/* r of n values */
static acc CQ_FN(rstd_of)(const real *x, int64_t n, acc eps) {
    acc sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (acc)x[i] * (acc)x[i];
    return 1 / sqrt(sum / (acc)n + eps);
}

static int CQ_FN(rmsnorm_forward)(const cq_rmsnorm_forward_args *a) {
    const real *w = a->w;
    real *rstd = a->rstd, *out = a->y ? a->y : a->yq;
    for (int64_t r = 0; r < a->rows; r++) {
        const real *x = (const real *)a->x + r * a->dim;
        acc scale = CQ_FN(rstd_of)(x, a->dim, (acc)a->eps);
        if (rstd)
            rstd[r] = (real)scale;
        for (int64_t i = 0; out && i < a->dim; i++)
            out[r * a->dim + i] = (real)((acc)w[i] * (acc)x[i] * scale);
    }
    if (!a->yq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->dim, out, a->yq, NULL, 448.0f);
}

static int CQ_FN(rmsnorm_backward)(const cq_rmsnorm_backward_args *a) {
    const real *X = a->x, *w = a->w, *rstd = a->rstd, *DY = a->dy;
    real *dw = a->dw;
    int64_t dim = a->dim;
    for (int64_t i = 0; dw && i < dim; i++) {
        acc sum = 0;
        for (int64_t r = 0; r < a->rows; r++)
            sum += (acc)DY[r * dim + i] * (acc)X[r * dim + i] * (acc)rstd[r];
        dw[i] = (real)((acc)dw[i] + sum);
    }
    for (int64_t r = 0; r < a->rows; r++) {
        const real *x = X + r * dim, *dy = DY + r * dim;
        real *dx = (real *)a->dx + r * dim;
        acc scale = (acc)rstd[r], mean = 0;
        for (int64_t i = 0; i < dim; i++)
            mean += (acc)w[i] * (acc)dy[i] * (acc)x[i] * scale;
        mean /= (acc)dim;
        for (int64_t i = 0; i < dim; i++) {
            acc d = scale * ((acc)w[i] * (acc)dy[i] - (acc)x[i] * scale * mean);
            dx[i] = (real)(a->accumulate ? (acc)dx[i] + d : d);
        }
    }
    return CQ_OK;
}

static int CQ_FN(gatednorm_forward)(const cq_gatednorm_forward_args *a) {
    const real *w = a->w;
    real *rstd = a->rstd, *out = a->out ? a->out : a->outq;
    int64_t width = a->dim / a->groups;
    for (int64_t r = 0; r < a->rows; r++) {
        const real *y = (const real *)a->y + r * a->dim, *z = (const real *)a->z + r * a->ldz;
        for (int64_t g = 0; g < a->groups; g++) {
            acc sum = 0;
            for (int64_t i = g * width; i < (g + 1) * width; i++) {
                acc u = (acc)y[i] * (acc)z[i] * CQ_SIGMOID((acc)z[i]);
                sum += u * u;
            }
            acc scale = 1 / sqrt(sum / (acc)width + (acc)a->eps);
            if (rstd)
                rstd[r * a->groups + g] = (real)scale;
            for (int64_t i = g * width; out && i < (g + 1) * width; i++) {
                acc u = (acc)y[i] * (acc)z[i] * CQ_SIGMOID((acc)z[i]);
                out[r * a->dim + i] = (real)((acc)w[i] * u * scale);
            }
        }
    }
    if (!a->outq)
        return CQ_OK;
    return cq_ref_fake_rows(&a->fq, a->dtype, a->rows, a->dim, out, a->outq, NULL, 448.0f);
}

/* dy and dz of one group of one row */
static void CQ_FN(gatednorm_group)(int64_t n, const real *y, const real *z, const real *w,
                                   acc scale, const real *dout, real *dy, real *dz) {
    acc mean = 0;
    for (int64_t i = 0; i < n; i++) {
        acc uhat = (acc)y[i] * (acc)z[i] * CQ_SIGMOID((acc)z[i]) * scale;
        mean += (acc)w[i] * (acc)dout[i] * uhat;
    }
    mean /= (acc)n;
    for (int64_t i = 0; i < n; i++) {
        acc v = (acc)y[i], gate = (acc)z[i], s = CQ_SIGMOID(gate);
        acc du = scale * ((acc)w[i] * (acc)dout[i] - v * gate * s * scale * mean);
        dy[i] = (real)(du * gate * s);
        dz[i] = (real)(du * v * s * (1 + gate * (1 - s)));
    }
}

static int CQ_FN(gatednorm_backward)(const cq_gatednorm_backward_args *a) {
    const real *Y = a->y, *Z = a->z, *w = a->w, *rstd = a->rstd, *dout = a->dout;
    real *DY = a->dy, *DZ = a->dz, *dw = a->dw;
    int64_t width = a->dim / a->groups;
    for (int64_t i = 0; dw && i < a->dim; i++) {
        acc sum = 0;
        for (int64_t r = 0; r < a->rows; r++) {
            acc gate = (acc)Z[r * a->ldz + i];
            acc u = (acc)Y[r * a->dim + i] * gate * CQ_SIGMOID(gate);
            sum += (acc)dout[r * a->dim + i] * u * (acc)rstd[r * a->groups + i / width];
        }
        dw[i] = (real)((acc)dw[i] + sum);
    }
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t g = 0; g < a->groups; g++) {
            int64_t at = r * a->dim + g * width;
            CQ_FN(gatednorm_group)
            (width, Y + at, Z + r * a->ldz + g * width, w + g * width, (acc)rstd[r * a->groups + g],
             dout + at, DY + at, DZ + r * a->lddz + g * width);
        }
    return CQ_OK;
}

/* Rotates the pairs (v[i], v[i + n/2]) by sign * position * theta^(-2i / n). */
static void CQ_FN(rotate)(acc *v, int64_t n, int32_t position, acc theta, int sign) {
    int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        acc angle = (acc)position * pow(theta, -2 * (acc)i / (acc)n);
        acc c = cos(angle), s = (acc)sign * sin(angle), lo = v[i], hi = v[i + half];
        v[i] = lo * c - hi * s;
        v[i + half] = hi * c + lo * s;
    }
}

static int CQ_FN(headnorm_forward)(const cq_headnorm_forward_args *a) {
    const real *w = a->w;
    int64_t n = a->head_dim;
    if (a->positions && n % 2)
        return cq_fail(CQ_ESHAPE, "headnorm: head_dim is %lld, wanted an even number",
                       (long long)n);
    acc *v = cq_ref_zeros(n, sizeof(acc));
    if (!v)
        return cq_fail(CQ_ENOMEM, "headnorm: no memory for one head");
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t h = 0; h < a->heads; h++) {
            const real *x = (const real *)a->x + r * a->ldx + h * n;
            real *y = (real *)a->y + r * a->ldy + h * n;
            acc scale = w ? CQ_FN(rstd_of)(x, n, (acc)a->eps) : 1;
            for (int64_t i = 0; i < n; i++)
                v[i] = w ? (acc)w[i] * (acc)x[i] * scale : (acc)x[i];
            if (a->positions)
                CQ_FN(rotate)(v, n, a->positions[r], (acc)a->theta, 1);
            for (int64_t i = 0; i < n; i++)
                y[i] = (real)v[i];
        }
    free(v);
    return CQ_OK;
}

/* From dn, the gradient of the normalized head, to dx; adds dn xhat to dw_sum. */
static void CQ_FN(headnorm_head)(int64_t n, const real *x, const real *w, acc eps, const acc *dn,
                                 real *dx, acc *dw_sum) {
    acc scale = CQ_FN(rstd_of)(x, n, eps), mean = 0;
    for (int64_t i = 0; i < n; i++) {
        acc xhat = (acc)x[i] * scale;
        dw_sum[i] += dn[i] * xhat;
        mean += (acc)w[i] * dn[i] * xhat;
    }
    mean /= (acc)n;
    for (int64_t i = 0; i < n; i++)
        dx[i] = (real)(scale * ((acc)w[i] * dn[i] - (acc)x[i] * scale * mean));
}

static int CQ_FN(headnorm_backward)(const cq_headnorm_backward_args *a) {
    real *dw = a->dw;
    int64_t n = a->head_dim;
    if (a->positions && n % 2)
        return cq_fail(CQ_ESHAPE, "headnorm: head_dim is %lld, wanted an even number",
                       (long long)n);
    acc *dn = cq_ref_zeros(2 * n, sizeof(acc)), *dw_sum = dn + n;
    if (!dn)
        return cq_fail(CQ_ENOMEM, "headnorm: no memory for one head");
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t h = 0; h < a->heads; h++) {
            const real *x = (const real *)a->x + r * a->ldx + h * n;
            const real *dy = (const real *)a->dy + r * a->lddy + h * n;
            real *dx = (real *)a->dx + r * a->lddx + h * n;
            for (int64_t i = 0; i < n; i++)
                dn[i] = (acc)dy[i];
            if (a->positions)
                CQ_FN(rotate)(dn, n, a->positions[r], (acc)a->theta, -1);
            if (a->w)
                CQ_FN(headnorm_head)(n, x, a->w, (acc)a->eps, dn, dx, dw_sum);
            for (int64_t i = 0; !a->w && i < n; i++)
                dx[i] = (real)dn[i];
        }
    for (int64_t i = 0; a->w && dw && i < n; i++)
        dw[i] = (real)((acc)dw[i] + dw_sum[i]);
    free(dn);
    return CQ_OK;
}
