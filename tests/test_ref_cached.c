/* test_ref_cached.c - the reference KL against a cached teacher: with top_logits before it, it is
   kl; its gradient is that of finite differences; half precision moves it by what is promised. */
#include "tests/ref_check.h"

enum { T = 7, V = 13 };
static const int32_t labels[T] = {4, -100, 0, 12, -1, 7, 3};
static const int32_t at[T] = {3, -7, 1, 0, 99, 4, 2}; /* rows of a cache lie in any order */

typedef struct cache {
    int64_t k;
    int32_t ids[T * V];
    double log_p[T * V], log_tail[T], log_label[T];
    uint16_t half[T * V];
} cache;

static void fill(cache *c, const double *teacher, int64_t k) {
    c->k = k;
    REF(top_logits, .rows = T, .vocab = V, .k = k, .logits = teacher, .labels = labels, .at = at,
        .ids = c->ids, .log_p = c->log_p, .log_tail = c->log_tail, .log_label = c->log_label);
    OK(cq_convert(c->half, CQ_F16, c->log_p, CQ_F64, 5 * k));
}

typedef struct counts {
    double sum, nll_teacher, nll_student;
    int64_t agree, valid;
} counts;

/* z becomes the gradient when `scale`. */
static counts cached(const cache *c, cq_kl_form form, int64_t top, double *z, double scale,
                     bool half) {
    counts n = {0};
    REF(kl_cached, .rows = T, .vocab = V, .form = form, .top_k = top, .k = c->k, .ids = c->ids,
        .log_p = half ? (const void *)c->half : c->log_p, .half = half, .log_tail = c->log_tail,
        .log_label = c->log_label, .at = at, .student = z, .labels = labels, .scale = scale,
        .gradient = scale != 0, .sum = &n.sum, .nll_teacher = &n.nll_teacher,
        .nll_student = &n.nll_student, .agree = &n.agree, .valid = &n.valid);
    return n;
}

static counts online(const double *teacher, cq_kl_form form, int64_t top, double *z, double scale) {
    counts n = {0};
    REF(kl, .rows = T, .vocab = V, .form = form, .top_k = top, .teacher = teacher, .student = z,
        .labels = labels, .scale = scale, .gradient = scale != 0, .sum = &n.sum,
        .nll_teacher = &n.nll_teacher, .nll_student = &n.nll_student, .agree = &n.agree,
        .valid = &n.valid);
    return n;
}

Test(kl_cached, equals_kl_in_every_form_and_for_every_k_up_to_the_cached_one) {
    double *teacher = finite_normal(T * V, 31, 0, 2, 0),
           *student = finite_normal(T * V, 32, 0, 2, 0);
    for (int64_t k = 1; k <= V; k++)
        for (int64_t top = 1; top <= k; top++)
            for (int form = k == V ? CQ_KL_FULL : CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET;
                 form++) {
                cache c;
                char what[64];
                double *a = check_copy(student, T * V), *b = check_copy(student, T * V);
                fill(&c, teacher, k);
                counts got = cached(&c, (cq_kl_form)form, top, a, 0.5, false);
                counts want = online(teacher, (cq_kl_form)form, top, b, 0.5);
                snprintf(what, sizeof what, "form %d, top %d of %d, seeds 31 32", form, (int)top,
                         (int)k);
                check_near(got.sum, want.sum, 1e-13, what);
                check_near(got.nll_teacher, want.nll_teacher, 1e-13, what);
                check_near(got.nll_student, want.nll_student, 1e-13, what);
                cr_expect(got.agree == want.agree && got.valid == want.valid, "%s: counts", what);
                if (form != CQ_KL_RENORMALIZED || top > 1)
                    check_close(a, b, T * V, 1e-13, what);
                free(a);
                free(b);
            }
    free(teacher);
    free(student);
}

typedef struct cached_case {
    const cache *c;
    cq_kl_form form;
    int64_t top;
    double *z, *value;
    bool half;
} cached_case;

static int forward(const void *args) {
    const cached_case *c = args;
    *c->value = cached(c->c, c->form, c->top, c->z, 0, c->half).sum;
    return CQ_OK;
}

Test(kl_cached, gradients_equal_finite_differences) {
    double *teacher = finite_normal(T * V, 33, 0, 2, 0), *z = finite_normal(T * V, 34, 0, 2, 0);
    for (int form = CQ_KL_RENORMALIZED; form <= CQ_KL_TAIL_BUCKET; form++)
        for (int half = 0; half < 2; half++)
            for (int64_t top = 2; top <= 6; top += 2) {
                cache c;
                char what[64];
                double value, one = 1, *dz = check_copy(z, T * V);
                fill(&c, teacher, 6);
                cached_case args = {&c, (cq_kl_form)form, top, z, &value, half};
                cached(&c, args.form, top, dz, 1, half);
                snprintf(what, sizeof what, "form %d, top %d, half %d, seeds 33 34", form, (int)top,
                         half);
                finite_check(what, &(finite_forward){forward, &args, &value, &one, 1},
                             &(finite_input){"student", z, dz, T * V, 1}, 1);
                free(dz);
            }
    free(teacher);
    free(z);
}

/* |change of a row's KL| <= sum p d (|log p/q| + 1) (1 + d) with d = 2 * 2^-11 |log p|: rounding
   and renormalization each at most half of it. Near the teacher the measured change is far below.
 */
Test(kl_cached, half_precision_moves_the_loss_by_no_more_than_its_bound) {
    for (int near = 0; near < 2; near++) {
        double *teacher = finite_normal(T * V, 35, 0, 4, 0), *z = finite_normal(T * V, 36, 0, 1, 0);
        double bound = 0;
        cache c;
        fill(&c, teacher, 8);
        for (int i = 0; i < T * V; i++)
            z[i] = teacher[i] + (near ? 0.05 : 2) * z[i];
        for (int r = 0; r < T; r++)
            for (int64_t i = 0; i < c.k && labels[r] >= 0; i++) {
                double log_p = c.log_p[at[r] * c.k + i], d = 0x1p-10 * fabs(log_p), log_q = 0;
                for (int j = 0; j < V; j++)
                    log_q += exp(z[r * V + j]);
                log_q = z[r * V + c.ids[at[r] * c.k + i]] - log(log_q);
                bound += exp(log_p) * d * (fabs(log_p - log_q) + (near ? 0.05 : 1)) * (1 + d);
            }
        double exact = cached(&c, CQ_KL_TAIL_BUCKET, c.k, z, 0, false).sum;
        double rounded = cached(&c, CQ_KL_TAIL_BUCKET, c.k, z, 0, true).sum;
        cr_expect(fabs(rounded - exact) <= bound && rounded != exact, "%g, exact %g, bound %g",
                  rounded, exact, bound);
        free(teacher);
        free(z);
    }
}

Test(kl_cached, wrong_arguments_are_refused) {
    double *teacher = finite_normal(T * V, 37, 0, 2, 0), sum = 0;
    cache c;
    fill(&c, teacher, 5);
    const struct {
        cq_kl_form form;
        int64_t top, k;
    } bad[] = {{CQ_KL_FULL, 5, 5},
               {CQ_KL_TAIL_BUCKET, 6, 5},
               {CQ_KL_TAIL_BUCKET, 0, 5},
               {CQ_KL_TRUNCATED, V, 5},
               {CQ_KL_TRUNCATED, 3, V + 1}};
    for (int i = 0; i < 5; i++)
        for (int cpu = 0; cpu < 2; cpu++) {
            cq_kl_cached_args a = {.dtype = CQ_F32,
                                   .rows = 0,
                                   .vocab = V,
                                   .form = bad[i].form,
                                   .top_k = bad[i].top,
                                   .k = bad[i].k,
                                   .sum = &sum};
            cq_stream s = {.threads = 1};
            cr_expect_eq(cpu ? cq_cpu_kl_cached(&s, &a) : cq_ref_kl_cached(&s, &a), CQ_EUSAGE,
                         "case %d", i);
        }
    for (int64_t k = 0; k <= V + 1; k += V + 1)
        cr_expect_eq(REF_STATUS(top_logits, .dtype = CQ_F64, .vocab = V, .k = k), CQ_EUSAGE);
    free(teacher);
}
