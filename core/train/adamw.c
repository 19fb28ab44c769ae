/// adamw.c - AdamW with global-norm clipping; each weight's fake-quantized copy is written in the
/// update's own pass.
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/tensor/device.h"
#include "core/tensor/graph.h"
#include "core/train/optimizer.h"
#include "core/train/shares.h"
#include "kernels/update.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Streams of random numbers for the rounding of parameter 0, 1, ... ("adamw"). */
#define ROUNDING 0x6164616d77000000ull

struct cq_adamw {
    cq_model *model;
    cq_adamw_options o;
    int64_t n;
    cq_tensor (*moment)[2]; ///< [n] first and second, no data where not trained
    cq_tensor (*scale)[2];  ///< [n] of 8-bit moments
    cq_tensor sums;         ///< [n] results: squared gradient norms
    cq_tensor now;          ///< [n] of a device: what changes from step to step
    cq_adamw_now *fresh;    ///< [n] the same on the host
    cq_shares shares;
    bool ordered, measured;
};

int cq_adamw_open(cq_adamw **out, cq_model *m, const cq_adamw_options *o) {
    *out = NULL;
    if (!(o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 && o->beta2 < 1 && o->eps > 0 &&
          o->weight_decay >= 0 && o->clip >= 0))
        return cq_fail(CQ_EUSAGE,
                       "adamw: betas %g and %g, eps %g, weight decay %g, clip %g; wanted betas in "
                       "[0, 1), eps above 0, "
                       "the others at least 0",
                       o->beta1, o->beta2, o->eps, o->weight_decay, o->clip);
    if ((o->moments || o->master) && cq_model_dtype(m) != CQ_F32)
        return cq_fail(CQ_EUSAGE,
                       "adamw: the model is %s, wanted F32 for narrow moments or weights",
                       cq_dtype_name(cq_model_dtype(m)));
    if (o->ordered && !o->comm)
        return cq_fail(CQ_EUSAGE, "adamw: no communicator, wanted one for ordered sums");
    cq_adamw *a = calloc(1, sizeof *a);
    if (a) {
        a->n = cq_model_n_params(m);
        a->moment = calloc((size_t)a->n, sizeof *a->moment);
        a->scale = calloc((size_t)a->n, sizeof *a->scale);
        a->fresh = calloc((size_t)a->n, sizeof *a->fresh);
    }
    if (!a || !a->moment || !a->scale || !a->fresh) {
        cq_adamw_close(a);
        return cq_fail(CQ_ENOMEM, "adamw: no memory");
    }
    int status = cq_shares_open(&a->shares, m, o->comm);
    if (status) {
        cq_adamw_close(a);
        return status;
    }
    a->model = m;
    a->o = *o;
    a->ordered = o->ordered || cq_comm_size(o->comm) > 1;
    cq_model_set_master(m, o->master);
    *out = a;
    return CQ_OK;
}

void cq_adamw_close(cq_adamw *a) {
    if (a) {
        free(a->moment);
        free(a->scale);
        free(a->fresh);
        cq_shares_close(&a->shares);
    }
    free(a);
}

/* Vectors and small matrices are a thousandth of a model and keep F32. */
static cq_moments moments_of(const cq_adamw *a, const cq_param *p) {
    return p->shape.rank > 1 && cq_shape_elems(p->shape) >= 4096 ? a->o.moments : CQ_MOMENTS_F32;
}

static int plan_moment(cq_adamw *a, cq_plan *p, int64_t i, int k) {
    const cq_param *q = cq_model_param(a->model, i);
    cq_moments form = moments_of(a, q);
    cq_dtype dtype = form == CQ_MOMENTS_BF16   ? CQ_BF16
                     : form == CQ_MOMENTS_8BIT ? CQ_U8
                                               : cq_model_dtype(a->model);
    cq_purpose purpose = cq_model_moments_purpose(a->model, p);
    CQ_TRY(cq_plan_add(p, &a->moment[i][k], purpose, q->name, dtype, q->shape));
    int64_t blocks = (cq_shape_elems(q->shape) + 255) / 256;
    return form == CQ_MOMENTS_8BIT
               ? cq_plan_add(p, &a->scale[i][k], purpose, q->name, CQ_F32, CQ_SHAPE1(blocks))
               : CQ_OK;
}

int cq_adamw_plan(cq_adamw *a, cq_plan *p) {
    CQ_TRY(cq_plan_add(p, &a->sums, CQ_FOR_RESULTS, "gradient norms", CQ_F64, CQ_SHAPE1(a->n)));
    if (cq_plan_on_device(p))
        CQ_TRY(cq_plan_add(p, &a->now, CQ_FOR_LOGITS, "numbers of the step", CQ_U8,
                           CQ_SHAPE2(a->n, (int64_t)sizeof *a->fresh)));
    if (a->ordered)
        CQ_TRY(cq_shares_plan(&a->shares, p));
    for (int64_t i = 0; i < a->n; i++) {
        bool here = cq_model_param(a->model, i)->trainable && cq_shares_own(&a->shares, i);
        for (int k = 0; k < 2 && here; k++)
            CQ_TRY(plan_moment(a, p, i, k));
    }
    return CQ_OK;
}

const cq_tensor *cq_adamw_moment(const cq_adamw *a, int64_t param, int which) {
    return &a->moment[param][which];
}

const cq_tensor *cq_adamw_scale(const cq_adamw *a, int64_t param, int which) {
    return &a->scale[param][which];
}

bool cq_adamw_owns(const cq_adamw *a, int64_t param) { return cq_shares_own(&a->shares, param); }
cq_comm *cq_adamw_comm(const cq_adamw *a) { return a->shares.comm; }
int cq_adamw_masters(cq_adamw *a) { return cq_shares_masters(&a->shares); }
void cq_adamw_fresh(cq_adamw *a) { a->shares.stale = false; }

int cq_adamw_add(cq_adamw *a, cq_stream *s, int ranks) {
    return a->ordered ? cq_shares_add(&a->shares, s, ranks) : CQ_OK;
}

/* The step's gradient where it is updated; no data elsewhere. */
static cq_tensor gradient_of(const cq_adamw *a, int64_t i) {
    const cq_param *p = cq_model_param(a->model, i);
    return a->ordered && p->holder < 0 ? a->shares.sum[i] : p->grad;
}

enum { MEASURE, UPDATE };

static int measure_pass(cq_stream *s, void *of) {
    const cq_adamw *a = of;
    double *sum = a->sums.data;
    for (int64_t i = 0; i < a->n; i++) {
        cq_tensor g = gradient_of(a, i);
        if (g.data)
            CQ_TRY(CQ_RUN(s, sumsq, .dtype = g.dtype, .n = cq_tensor_elems(g), .x = g.data,
                          .out = &sum[i]));
    }
    return CQ_OK;
}

int cq_adamw_measure(cq_adamw *a, cq_stream *s) {
    cq_graph_key key = {a, {MEASURE}};
    memset(a->sums.data, 0, (size_t)cq_tensor_bytes(a->sums));
    CQ_TRY(cq_graphs_run(s, &key, measure_pass, a));
    CQ_TRY(cq_stream_wait(s));
    a->measured = true;
    return CQ_OK;
}

static int gradient_norm(cq_adamw *a, cq_stream *s, double *norm) {
    double total = 0, *sum = a->sums.data;
    if (!a->measured)
        CQ_TRY(cq_adamw_measure(a, s));
    a->measured = false;
    cq_comm_about(a->shares.comm, "gradient norms");
    if (cq_comm_size(a->shares.comm) > 1) /* one owner each, all else adds zeros */
        CQ_TRY(cq_comm_sum(a->shares.comm, sum, a->n));
    for (int64_t i = 0; i < a->n; i++) {
        const cq_param *p = cq_model_param(a->model, i);
        if (!isfinite(sum[i]))
            return cq_fail(CQ_ENUMERIC, "adamw: the gradient of %s is not finite (block %d)",
                           p->name, (int)p->block);
        total += sum[i];
    }
    *norm = sqrt(total);
    return CQ_OK;
}

/* The arguments of parameter i, but for the numbers of the step. */
static cq_adamw_args arguments(const cq_adamw *a, int64_t i) {
    const cq_param *p = cq_model_param(a->model, i);
    int64_t rows = p->shape.rank > 1 ? p->shape.dim[0] : 1;
    return (cq_adamw_args){.dtype = cq_model_dtype(a->model),
                           .rows = rows,
                           .cols = cq_tensor_elems(p->value) / rows,
                           .w = p->value.data,
                           .m = a->moment[i][0].data,
                           .v = a->moment[i][1].data,
                           .g = gradient_of(a, i).data,
                           .beta1 = a->o.beta1,
                           .beta2 = a->o.beta2,
                           .eps = a->o.eps,
                           .weight_decay = p->shape.rank > 1 ? a->o.weight_decay : 0,
                           .moments = moments_of(a, p),
                           .master = p->value.dtype == CQ_BF16 ? a->o.master : CQ_MASTER_F32,
                           .m_scale = a->scale[i][0].data,
                           .v_scale = a->scale[i][1].data,
                           .low = p->low.data};
}

/* A step's numbers. */
typedef struct numbers {
    cq_adamw *a;
    double lr, scale;
    int64_t step;
} numbers;

static void add_numbers(cq_adamw_args *u, const numbers *k, int64_t i) {
    u->lr = k->lr * cq_model_param(k->a->model, i)->lr_scale;
    u->grad_scale = k->scale;
    u->step = k->step;
    u->key = cq_random_bits(k->a->o.seed, ROUNDING + (uint64_t)i, (uint64_t)k->step);
}

static int update(const numbers *k, cq_stream *s, int64_t i) {
    const cq_adamw *a = k->a;
    cq_param *p = cq_model_param(a->model, i);
    cq_adamw_args u = arguments(a, i);
    if (a->now.data)
        u.now = (const cq_adamw_now *)a->now.data + i;
    else
        add_numbers(&u, k, i);
    bool in_pass = p->fq.data && p->fq.dtype == cq_model_dtype(a->model);
    if (p->quantized && in_pass) {
        u.wq = p->fq.data;
        u.fq = (cq_fq){
            .amax = p->amax_at.data, .n_groups = 1, .saturated = cq_model_saturation(a->model)};
        u.block_amax = p->block_amax.data;
        u.top = p->top;
    }
    CQ_TRY(s->table->adamw(s, &u));
    return p->quantized && !in_pass ? cq_model_write_copy(a->model, s, p) : CQ_OK;
}

static bool updates(const cq_adamw *a, int64_t i) {
    return a->moment[i][0].data && gradient_of(a, i).data;
}

static int update_pass(cq_stream *s, void *of) {
    const numbers *k = of;
    cq_adamw *a = k->a;
    for (int64_t i = 0; i < a->n; i++)
        if (updates(a, i))
            CQ_TRY(update(k, s, i));
    CQ_TRY(cq_shares_spread(&a->shares, s));
    if (a->ordered)
        CQ_TRY(cq_shares_zero(&a->shares));
    CQ_TRY(cq_model_round_weights(a->model, s, true));
    return cq_model_zero_grad(a->model);
}

static int send_numbers(const numbers *k) {
    cq_adamw *a = k->a;
    if (!a->now.data)
        return CQ_OK;
    for (int64_t i = 0; i < a->n; i++)
        if (updates(a, i)) {
            cq_adamw_args u = {.beta1 = a->o.beta1, .beta2 = a->o.beta2};
            add_numbers(&u, k, i);
            a->fresh[i] = cq_update_now(&u);
        }
    return cq_copy(a->now.data, a->fresh, cq_tensor_bytes(a->now));
}

int cq_adamw_step(cq_adamw *a, cq_stream *s, double lr, int64_t step, double *norm) {
    if (step < 1)
        return cq_fail(CQ_EUSAGE, "adamw: step is %ld, wanted at least 1", (long)step);
    cq_model_bind_stream(a->model, s);
    CQ_TRY(gradient_norm(a, s, norm));
    double scale = a->o.clip > 0 && *norm > a->o.clip ? a->o.clip / *norm : 1;
    numbers k = {a, lr, scale, step};
    cq_graph_key key = {a, {UPDATE}};
    CQ_TRY(send_numbers(&k));
    return a->ordered ? update_pass(s, &k) : cq_graphs_run(s, &key, update_pass, &k);
}
