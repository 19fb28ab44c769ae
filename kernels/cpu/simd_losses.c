/* simd_losses.c - the losses on logits: KL in all its forms, and cross-entropy. Formulas are
 * kernels/ref/logits.inc.h's.
 *
 * One row: find S (top-k forms), the maxima inside and outside S, then one pass of exponentials
 * that leaves them where the student's logits were, then one pass for the gradient. Each side of S
 * has its own maximum, so a tail that is tiny beside the head keeps its digits. Row values are
 * doubles, summed in row order within at most PARTS runs of rows and then over the runs, whatever
 * the number of threads.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/error.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vec.h"

enum { PARTS = 64, SPAN = 2048 };

/// S = { j: t_j > least, or t_j == least and j <= last }.
typedef struct kept {
    float least;
    int last;
} kept;

/// What one row of logits is on one side of S.
typedef struct side {
    float teacher_top, student_top;
    double teacher, student; ///< sums of exp(logit - top)
    double difference;       ///< sum of exp(t - top_t) ((t - top_t) - (s - top_s))
} side;

/// What a run of rows adds to the results.
typedef struct totals {
    double sum, nll_teacher, nll_student;
    int64_t agree, valid;
} totals;

static int64_t part_start(int64_t n, int64_t part) { return n * part / PARTS; }

/// The floats in ascending order, numbered: -inf is 0x007fffff, inf 0xff800000.
static float float_of_rank(uint32_t rank) {
    return vec_float(rank ^ ((rank >> 31) ? 0x80000000u : 0xffffffffu));
}

/// The k largest of z [n], the lower id first of equals, 1 <= k < n: a four-way search over the
/// ranks of floats for the largest value that k entries reach. Sixteen passes of comparisons, all
/// vectors.
static kept keep_largest(const float *z, int n, int k) {
    uint32_t low = 0x007fffffu, high = 0xff800001u; /* low is reached by k entries, high is not */
    int reach = n;
    while (high - low > 1) {
        uint32_t step = (high - low + 3) / 4, left = high - low;
        uint32_t at[3] = {low + step, low + (left > 2 * step ? 2 * step : step),
                          low + (left > 3 * step ? 3 * step : step)};
        float p = float_of_rank(at[0]), q = float_of_rank(at[1]), r = float_of_rank(at[2]);
        int by_p = 0, by_q = 0, by_r = 0;
#pragma omp simd reduction(+ : by_p, by_q, by_r)
        for (int j = 0; j < n; j++) {
            by_p += z[j] >= p;
            by_q += z[j] >= q;
            by_r += z[j] >= r;
        }
        int by[3] = {by_p, by_q, by_r};
        for (int i = 0; i < 3; i++) {
            if (by[i] >= k && at[i] > low) {
                low = at[i];
                reach = by[i];
            }
            if (by[i] < k && at[i] < high)
                high = at[i];
        }
    }
    kept s = {.least = float_of_rank(low), .last = n - 1};
    for (int surplus = reach - k, j = n - 1; surplus > 0 && j >= 0; j--)
        if (z[j] == s.least) { /* more equals than wanted: the last ones stay out */
            s.last = j - 1;
            surplus--;
        }
    return s;
}

static inline bool is_kept(const kept *s, float t, int j) {
    return (t > s->least) | ((t == s->least) & (j <= s->last));
}

/// Index of the first entry equal to `value`; blocks are tested as vectors before one is looked
/// into.
static int64_t first_at(const float *z, int64_t n, float value) {
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) {
        int hit = 0;
        for (int64_t i = j; i < j + 64; i++)
            hit |= z[i] == value;
        if (hit)
            break;
    }
    while (j < n - 1 && z[j] != value)
        j++;
    return j;
}

enum { LANES = 16 };
/// Largest values of the teacher and the student in S and outside it, by lane.
typedef struct tops {
    float teacher_in[LANES], student_in[LANES], teacher_out[LANES], student_out[LANES];
} tops;

/// Takes n <= LANES entries, from id j0 on; a constant n makes vectors of it.
VEC_INLINE void tops_take(tops *m, const kept *s, const float *t, const float *z, int j0, int n) {
    for (int i = 0; i < n; i++) {
        bool k = is_kept(s, t[i], j0 + i);
        float ti = k ? t[i] : -INFINITY, si = k ? z[i] : -INFINITY;
        float to = k ? -INFINITY : t[i], so = k ? -INFINITY : z[i];
        m->teacher_in[i] = ti > m->teacher_in[i] ? ti : m->teacher_in[i];
        m->student_in[i] = si > m->student_in[i] ? si : m->student_in[i];
        m->teacher_out[i] = to > m->teacher_out[i] ? to : m->teacher_out[i];
        m->student_out[i] = so > m->student_out[i] ? so : m->student_out[i];
    }
}
/// The largest lane; 0 when all entries are masked, whose exponentials then sum to 0.
static float tops_fold(const float *lanes) {
    float top = vec_max(lanes, LANES, -INFINITY);
    return top > -INFINITY ? top : 0.0f;
}

/// Tops of the entries in S (`in`) and outside it.
static void split_tops(side *in, side *out, const kept *s, const float *t, const float *z, int n) {
    tops m;
    int j = 0;
    for (int i = 0; i < LANES; i++)
        m.teacher_in[i] = m.student_in[i] = m.teacher_out[i] = m.student_out[i] = -INFINITY;
    for (; j + LANES <= n; j += LANES)
        tops_take(&m, s, t + j, z + j, j, LANES);
    tops_take(&m, s, t + j, z + j, j, n - j);
    *in = (side){.teacher_top = tops_fold(m.teacher_in), .student_top = tops_fold(m.student_in)};
    *out = (side){.teacher_top = tops_fold(m.teacher_out), .student_top = tops_fold(m.student_out)};
}

/// One span of a row without S; e receives the student's exponentials and may be z or NULL.
static inline void exponentials(side *all, const float *t, const float *z, float *e, int64_t n) {
    float mt = all->teacher_top, ms = all->student_top, sum_t = 0.0f, sum_s = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum_t, sum_s, dot)
    for (int64_t j = 0; j < n; j++) {
        float dt = t[j] - mt, ds = z[j] - ms, pt = vec_exp(dt), ps = vec_exp(ds);
        sum_t += pt;
        sum_s += ps;
        dot += dt > -87.0f ? pt * (dt - ds) : 0.0f;
        if (e)
            e[j] = ps;
    }
    all->teacher += (double)sum_t;
    all->student += (double)sum_s;
    all->difference += (double)dot;
}
/// The same with S; j0 is the span's first id.
static inline void split_exponentials(side *in, side *out, const kept *s, const float *t,
                                      const float *z, float *e, int j0, int n) {
    float ti = 0.0f, si = 0.0f, to = 0.0f, so = 0.0f, dot = 0.0f;
    float mti = in->teacher_top, msi = in->student_top, mto = out->teacher_top,
          mso = out->student_top;
#pragma omp simd reduction(+ : ti, si, to, so, dot)
    for (int j = 0; j < n; j++) {
        bool k = is_kept(s, t[j], j0 + j);
        float dt = t[j] - (k ? mti : mto), ds = z[j] - (k ? msi : mso);
        float pt = vec_exp(dt), ps = vec_exp(ds);
        ti += k ? pt : 0.0f;
        si += k ? ps : 0.0f;
        to += k ? 0.0f : pt;
        so += k ? 0.0f : ps;
        dot += (k & (dt > -87.0f)) ? pt * (dt - ds) : 0.0f;
        if (e)
            e[j] = ps;
    }
    in->teacher += (double)ti;
    in->student += (double)si;
    in->difference += (double)dot;
    out->teacher += (double)to;
    out->student += (double)so;
}

/// KL of the softmaxes over one side alone.
static double side_kl(const side *s) {
    return s->difference / s->teacher + log(s->student / s->teacher);
}
/// log of the sum over both sides.
static double log_sum(double top_a, double sum_a, double top_b, double sum_b) {
    double a = top_a + log(sum_a), b = top_b + log(sum_b), top = a > b ? a : b;
    return top + log(exp(a - top) + exp(b - top));
}

/// Whole-vocabulary row: full KL.
static double full_row(const cq_kl_args *a, const float *t, float *z, float teacher_top,
                       float student_top, double *lt, double *ls) {
    side all = {.teacher_top = teacher_top, .student_top = student_top};
    for (int64_t j = 0; j < a->vocab; j += SPAN)
        exponentials(&all, t + j, z + j, a->gradient ? z + j : NULL,
                     a->vocab - j < SPAN ? a->vocab - j : SPAN);
    *lt = (double)all.teacher_top + log(all.teacher);
    *ls = (double)all.student_top + log(all.student);
    float top = all.teacher_top, p = (float)(a->scale / all.teacher),
          q = (float)(a->scale / all.student);
    for (int64_t j = 0; a->gradient && j < a->vocab; j++)
        z[j] = z[j] * q - vec_exp(t[j] - top) * p;
    return side_kl(&all);
}

/// Gradient of a top-k row from the exponentials e: inside S by_q e - by_p exp(t - top), outside S
/// by_out e.
static void split_gradient(float *e, const float *t, const kept *s, float top, double by_q,
                           double by_p, double by_out, int n) {
    float q = (float)by_q, p = (float)by_p, o = (float)by_out;
    for (int j = 0; j < n; j++) {
        bool k = is_kept(s, t[j], j);
        float both = e[j] * (k ? q : o);
        e[j] = both - (k ? vec_exp(t[j] - top) * p : 0.0f);
    }
}

/// One row of a top-k form.
static double top_k_row(const cq_kl_args *a, const float *t, float *z, double *lt, double *ls) {
    kept s = keep_largest(t, (int)a->vocab, (int)a->top_k);
    int vocab = (int)a->vocab;
    side in, out;
    split_tops(&in, &out, &s, t, z, vocab);
    for (int j = 0; j < vocab; j += SPAN)
        split_exponentials(&in, &out, &s, t + j, z + j, a->gradient ? z + j : NULL, j,
                           vocab - j < SPAN ? vocab - j : SPAN);
    *lt = log_sum(in.teacher_top, in.teacher, out.teacher_top, out.teacher);
    *ls = log_sum(in.student_top, in.student, out.student_top, out.student);
    if (a->form == CQ_KL_RENORMALIZED) {
        if (a->gradient)
            split_gradient(z, t, &s, in.teacher_top, a->scale / in.student, a->scale / in.teacher,
                           0.0, vocab);
        return side_kl(&in) + 0.0 * (*lt + *ls); /* a NaN outside S must show */
    }
    double p_top = exp((double)in.teacher_top - *lt), q_top = exp((double)in.student_top - *ls);
    double o_top = exp((double)out.student_top - *ls), mass = p_top * in.teacher;
    double value = p_top * (in.difference + in.teacher * (((double)in.teacher_top - *lt) -
                                                          ((double)in.student_top - *ls)));
    double rest = exp((double)out.teacher_top - *lt) * out.teacher;
    bool bucket = a->form == CQ_KL_TAIL_BUCKET;
    if (bucket && rest > 0.0)
        value += rest * (((double)out.teacher_top + log(out.teacher) - *lt) -
                         ((double)out.student_top + log(out.student) - *ls));
    double by_q = bucket ? q_top : q_top * mass, by_out = bucket ? o_top : o_top * mass;
    if (bucket && rest > 0.0)
        by_out -= rest / out.student;
    if (a->gradient)
        split_gradient(z, t, &s, in.teacher_top, a->scale * by_q, a->scale * p_top,
                       a->scale * by_out, vocab);
    return value;
}

static int check_labels(const int32_t *labels, int64_t rows, int64_t vocab) {
    for (int64_t r = 0; r < rows; r++)
        if (labels[r] >= vocab)
            return cq_fail(CQ_EDATA, "loss: label %d of row %lld, wanted less than %lld", labels[r],
                           (long long)r, (long long)vocab);
    return CQ_OK;
}

static void kl_row(const cq_kl_args *a, int64_t r, bool whole, totals *to) {
    const float *t = (const float *)a->teacher + r * a->vocab;
    float *z = (float *)a->student + r * a->vocab;
    int32_t label = a->labels[r];
    if (label < 0) {
        if (a->gradient)
            memset(z, 0, (size_t)a->vocab * sizeof(float));
        return;
    }
    double lt, ls, zt = (double)t[label], zs = (double)z[label];
    float mt = vec_max(t, a->vocab, -INFINITY), ms = vec_max(z, a->vocab, -INFINITY);
    if (a->agree)
        to->agree += first_at(t, a->vocab, mt) == first_at(z, a->vocab, ms);
    to->sum += whole ? full_row(a, t, z, mt, ms, &lt, &ls) : top_k_row(a, t, z, &lt, &ls);
    to->nll_teacher += lt - zt;
    to->nll_student += ls - zs;
    to->valid++;
}

/// Adds the runs of rows in order; all but the first may be NULL.
static void add_parts(const totals *part, double *sum, double *nll_teacher, double *nll_student,
                      int64_t *agree, int64_t *valid) {
    for (int64_t p = 0; p < PARTS; p++) {
        *sum += part[p].sum;
        if (nll_teacher)
            *nll_teacher += part[p].nll_teacher;
        if (nll_student)
            *nll_student += part[p].nll_student;
        if (agree)
            *agree += part[p].agree;
        if (valid)
            *valid += part[p].valid;
    }
}

int CQ_OP(kl)(cq_stream *s, const cq_kl_args *a) {
    CQ_F32_OR_REF(kl);
    bool whole = a->form == CQ_KL_FULL || a->top_k >= a->vocab;
    if (!whole && a->top_k < 1)
        return cq_fail(CQ_EUSAGE, "kl: top_k is %lld, wanted at least 1", (long long)a->top_k);
    CQ_TRY(check_labels(a->labels, a->rows, a->vocab));
    totals part[PARTS] = {{0}};
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t p = 0; p < PARTS; p++) {
        totals mine = {0};
        for (int64_t r = part_start(a->rows, p); r < part_start(a->rows, p + 1); r++)
            kl_row(a, r, whole, &mine);
        part[p] = mine;
    }
    add_parts(part, a->sum, a->nll_teacher, a->nll_student, a->agree, a->valid);
    return CQ_OK;
}

/// Sum of exp(z - top), which e receives; e is z or NULL.
static double exponential_sum(const float *z, float *e, float top, int64_t n) {
    double total = 0.0;
    for (int64_t first = 0; first < n; first += SPAN) {
        int64_t end = n - first < SPAN ? n : first + SPAN;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) {
            float v = vec_exp(z[j] - top);
            sum += v;
            if (e)
                e[j] = v;
        }
        total += (double)sum;
    }
    return total;
}

typedef struct ranked {
    float value;
    int32_t id;
} ranked;

static int by_rank(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->value != y->value)
        return x->value > y->value ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/// One row into row a->at[r] of the results; `order` is scratch [k].
static void top_row(const cq_top_logits_args *a, int64_t r, ranked *order) {
    const float *t = (const float *)a->logits + r * a->vocab;
    int vocab = (int)a->vocab, n = 0;
    int64_t at = a->at[r];
    kept s = {.least = -INFINITY, .last = vocab};
    if (a->k < a->vocab)
        s = keep_largest(t, vocab, (int)a->k);
    for (int j = 0; j < vocab && n < (int)a->k; j++)
        if (is_kept(&s, t[j], j))
            order[n++] = (ranked){t[j], j};
    for (; n < (int)a->k; n++) /* NaN is kept nowhere */
        order[n] = (ranked){NAN, 0};
    qsort(order, (size_t)a->k, sizeof *order, by_rank);
    side in, out;
    split_tops(&in, &out, &s, t, t, vocab);
    for (int j = 0; j < vocab; j += SPAN)
        split_exponentials(&in, &out, &s, t + j, t + j, NULL, j,
                           vocab - j < SPAN ? vocab - j : SPAN);
    double all = log_sum(in.teacher_top, in.teacher, out.teacher_top, out.teacher);
    float *log_p = (float *)a->log_p + at * a->k;
    for (int i = 0; i < (int)a->k; i++) {
        a->ids[at * a->k + i] = order[i].id;
        log_p[i] = (float)((double)order[i].value - all);
    }
    ((float *)a->log_tail)[at] = (float)((double)out.teacher_top + log(out.teacher) - all);
    if (a->log_label)
        ((float *)a->log_label)[at] = (float)((double)t[a->labels[r]] - all);
}

int CQ_OP(top_logits)(cq_stream *s, const cq_top_logits_args *a) {
    CQ_F32_OR_REF(top_logits);
    if (a->k < 1 || a->k > a->vocab)
        return cq_fail(CQ_EUSAGE, "top_logits: k is %lld, wanted 1 to %lld", (long long)a->k,
                       (long long)a->vocab);
    CQ_TRY(check_labels(a->labels, a->rows, a->vocab));
    ranked *order = malloc((size_t)(PARTS * a->k) * sizeof *order);
    if (!order)
        return cq_fail(CQ_ENOMEM, "top_logits: no memory to rank %lld logits", (long long)a->k);
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t p = 0; p < PARTS; p++)
        for (int64_t r = part_start(a->rows, p); r < part_start(a->rows, p + 1); r++)
            if (a->labels[r] >= 0)
                top_row(a, r, order + p * a->k);
    free(order);
    return CQ_OK;
}

/// F16 to float: the exponent is moved by a product, which is exact and serves subnormals too.
static void from_half(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = from[i];
        to[i] = vec_float((u & 0x8000u) << 16 | (u & 0x7fffu) << 13) * 0x1p112f;
    }
}

/// Scratch of one thread, [k] each.
typedef struct cached_room {
    float *log_p, *e, *z; ///< the teacher's entries; exponentials and logits of the student in S
} cached_room;

/// Entries come in descending order, in which a long sum of floats forgets the small ones.
enum { SHORT = 16 };

/// A row whose teacher is k log-probabilities l: the student's entries in S are taken out of the
/// row, so that what stays is the tail, and put back when all sums are known.
static double cached_row(const cq_kl_cached_args *a, int64_t at, float *z, cached_room m,
                         double *ls) {
    int64_t top = a->form == CQ_KL_FULL || a->top_k > a->vocab ? a->vocab : a->top_k;
    const int32_t *ids = a->ids + at * a->k;
    double tail = (double)((const float *)a->log_tail)[at], others = 0.0;
    const float *l = (const float *)a->log_p + at * a->k;
    if (a->half)
        from_half(m.log_p, (const uint16_t *)a->log_p + at * a->k, a->k), l = m.log_p;
    float first = l[0], most = -INFINITY;
    for (int64_t i = 0; i < top; i++) {
        m.z[i] = z[ids[i]];
        most = m.z[i] > most ? m.z[i] : most;
        z[ids[i]] = -INFINITY;
    }
    side in = {.teacher_top = first, .student_top = most > -INFINITY ? most : 0.0f}, out = {0};
    for (int64_t i = 0; i < top; i += SHORT)
        exponentials(&in, l + i, m.z + i, m.e + i, top - i < SHORT ? top - i : SHORT);
    for (int64_t i = top; i < a->k; i += SHORT)
        others += exponential_sum(l + i, NULL, first, a->k - i < SHORT ? a->k - i : SHORT);
    double unit = -expm1(tail) / (in.teacher + others), rest = exp(tail) + others * unit;
    bool all = top == a->vocab;
    float least = all ? -INFINITY : vec_max(z, a->vocab, -INFINITY);
    out.student_top = least > -INFINITY ? least : 0.0f;
    if (!all)
        out.student = exponential_sum(z, a->gradient ? z : NULL, out.student_top, a->vocab);
    *ls = log_sum(in.student_top, in.student, out.student_top, out.student);
    bool alone = all || a->form == CQ_KL_RENORMALIZED, bucket = a->form == CQ_KL_TAIL_BUCKET;
    double q_top = exp((double)in.student_top - *ls), mass = unit * in.teacher, value;
    double by_q = bucket ? q_top : q_top * mass, by_p = unit, by_out;
    by_out = exp((double)out.student_top - *ls) * (bucket ? 1.0 : mass);
    if (alone) {
        value = side_kl(&in) + 0.0 * *ls; /* a NaN outside S must show */
        by_q = 1.0 / in.student, by_p = 1.0 / in.teacher, by_out = 0.0;
    } else {
        value = unit * (in.difference + in.teacher * (log(unit) - ((double)in.student_top - *ls)));
        if (bucket && rest > 0.0) {
            value += rest * (log(rest) - ((double)out.student_top + log(out.student) - *ls));
            by_out -= rest / out.student;
        }
    }
    float q = (float)(a->scale * by_q), p = (float)(a->scale * by_p),
          o = (float)(a->scale * by_out);
    if (a->gradient && !all)
        for (int64_t j = 0; j < a->vocab; j++)
            z[j] *= o;
    if (a->gradient)
        for (int64_t i = 0; i < top; i++)
            m.z[i] = m.e[i] * q - vec_exp(l[i] - first) * p;
    for (int64_t i = 0; i < top; i++)
        z[ids[i]] = m.z[i];
    return value;
}

static void cached_kl_row(const cq_kl_cached_args *a, int64_t r, cached_room m, totals *to) {
    float *z = (float *)a->student + r * a->vocab;
    int32_t label = a->labels[r];
    if (label < 0) {
        if (a->gradient)
            memset(z, 0, (size_t)a->vocab * sizeof(float));
        return;
    }
    int64_t at = a->at[r];
    double ls, at_label = (double)z[label];
    if (a->agree)
        to->agree += first_at(z, a->vocab, vec_max(z, a->vocab, -INFINITY)) == a->ids[at * a->k];
    to->sum += cached_row(a, at, z, m, &ls);
    if (a->log_label)
        to->nll_teacher -= (double)((const float *)a->log_label)[at];
    to->nll_student += ls - at_label;
    to->valid++;
}

int CQ_OP(kl_cached)(cq_stream *s, const cq_kl_cached_args *a) {
    CQ_F32_OR_REF(kl_cached);
    int64_t top = a->form == CQ_KL_FULL || a->top_k > a->vocab ? a->vocab : a->top_k;
    if (top < 1 || top > a->k || a->k > a->vocab)
        return cq_fail(CQ_EUSAGE, "kl_cached: top_k is %lld of %lld, wanted 1 to %lld",
                       (long long)top, (long long)a->vocab, (long long)a->k);
    CQ_TRY(check_labels(a->labels, a->rows, a->vocab));
    int64_t ld = (a->k + 15) / 16 * 16;
    float *room = malloc((size_t)(3 * ld * PARTS) * sizeof *room);
    if (!room)
        return cq_fail(CQ_ENOMEM, "kl_cached: no memory for %lld entries", (long long)a->k);
    totals part[PARTS] = {{0}};
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t p = 0; p < PARTS; p++) {
        totals mine = {0};
        float *at = room + 3 * ld * p;
        cached_room m = {at, at + ld, at + 2 * ld};
        for (int64_t r = part_start(a->rows, p); r < part_start(a->rows, p + 1); r++)
            cached_kl_row(a, r, m, &mine);
        part[p] = mine;
    }
    free(room);
    add_parts(part, a->sum, a->nll_teacher, a->nll_student, a->agree, a->valid);
    return CQ_OK;
}

static void entropy_row(const cq_cross_entropy_args *a, int64_t r, totals *to) {
    float *z = (float *)a->logits + r * a->vocab;
    int32_t label = a->labels[r];
    if (label < 0) {
        if (a->gradient)
            memset(z, 0, (size_t)a->vocab * sizeof(float));
        return;
    }
    float top = vec_max(z, a->vocab, -INFINITY);
    double at_label = (double)z[label] - (double)top;
    if (a->correct)
        to->agree += first_at(z, a->vocab, top) == label;
    double sum = exponential_sum(z, a->gradient ? z : NULL, top, a->vocab);
    double weight = a->weights ? (double)a->weights[r] : 1.0, scale = a->scale * weight;
    to->sum += weight * (log(sum) - at_label);
    to->valid++;
    if (!a->gradient)
        return;
    float q = (float)(scale / sum);
    for (int64_t j = 0; j < a->vocab; j++)
        z[j] *= q;
    z[label] = (float)(scale * (exp(at_label) / sum - 1.0));
}

int CQ_OP(cross_entropy)(cq_stream *s, const cq_cross_entropy_args *a) {
    CQ_F32_OR_REF(cross_entropy);
    CQ_TRY(check_labels(a->labels, a->rows, a->vocab));
    totals part[PARTS] = {{0}};
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t p = 0; p < PARTS; p++) {
        totals mine = {0};
        for (int64_t r = part_start(a->rows, p); r < part_start(a->rows, p + 1); r++)
            entropy_row(a, r, &mine);
        part[p] = mine;
    }
    for (int64_t p = 0; p < PARTS; p++) {
        *a->sum += part[p].sum;
        if (a->correct)
            *a->correct += part[p].agree;
        if (a->valid)
            *a->valid += part[p].valid;
    }
    return CQ_OK;
}
