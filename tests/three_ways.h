/// three_ways.h - one call of an operation done three ways: ref in F64, the plain FP32 loops, and
/// the backend under test, which is cpu, or with WAYS_CUDA the table WAYS_TABLE ("cuda", or
/// "cuda_on_cpu": its kernels on the CPU, tests/cuda_on_cpu).
///
/// The arguments are written once, with FP32 buffers; a list of fields says which pointers are
/// buffers, and each way gets its own copies of them. The backend is right when its largest error
/// against the F64 result is at most `times` that of the plain loops plus one ulp of the largest
/// value. What lies between the rows of a buffer must stay as it was. cpu runs with two threads,
/// with two again and with one: the bits must be the same. A device runs twice, and gets copies of
/// all buffers in memory of its own.
///
/// Fields that ways_act names are BF16 on a device where w->act says so: their values are rounded
/// to it for every way, and what is written into one may be off by its rounding and no more than an
/// FP32 result besides. Where that is too much to ask, `coarse` holds it, and the plain result
/// rounded, against the bound above in ulp of BF16.
#pragma once
#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "tests/plain_kernels.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

/// One buffer of `rows` rows of `cols` elements, ld apart, behind the pointer at `offset` of the
/// arguments.
typedef struct ways_field {
    const char *name;
    size_t offset;
    int64_t rows, cols, ld;
    float *values;
    int times;   ///< 0: an input; else a result, and its factor: 2, or 3 for a gradient
    bool wide;   ///< double in every way
    bool narrow; ///< BF16 on a device
} ways_field;
#ifdef WAYS_CUDA
enum { REF_WAY, PLAIN_WAY, CPU_WAY, AGAIN_WAY, N_WAYS, ALONE_WAY = N_WAYS, MOST_FIELDS = 24 };
/// Of the emulated device.
bool cq_emu_set(const char *order, const char *copies) __attribute__((weak));
#else
#define WAYS_TABLE "cpu"
enum { REF_WAY, PLAIN_WAY, CPU_WAY, AGAIN_WAY, ALONE_WAY, N_WAYS, MOST_FIELDS = 24 };
#endif
#ifdef WAYS_EMULATED
#define WAYS_PICK(emulated, real) (emulated) ///< numbers of what takes long thread by thread
#else
#define WAYS_PICK(emulated, real) (real)
#endif
#ifdef WAYS_RACES /* under a sanitizer: once, and errors are for the other builds */
enum { WAYS_ORDERS = 1, WAYS_JUDGES = 0 };
#define WAYS_SEEDS(emulated, real) 1
#else
enum { WAYS_ORDERS = 3, WAYS_JUDGES = 1 };
#define WAYS_SEEDS(emulated, real) WAYS_PICK(emulated, real)
#endif
/// Rows under a sanitizer, where more of them find nothing more, and elsewhere.
#define WAYS_ROWS(few, many) (WAYS_JUDGES ? (many) : (few))
/// A pointer in the arguments to `bytes` of whatever type.
typedef struct ways_raw {
    size_t offset;
    int64_t bytes;
    void *host, *there; ///< while it is on the device
} ways_raw;
/// Errors of one result in ulp of its largest value, summed over the runs of one `ways`.
typedef struct ways_tally {
    const char *op, *name;
    int runs, times;
    double plain, cpu;
} ways_tally;
typedef struct ways {
    char what[160]; ///< names the case and its seed in messages
    ways_field field[MOST_FIELDS];
    int n_fields;
    ways_tally tally[MOST_FIELDS];
    int n_tallies;
    ways_raw raw[6]; ///< pointers that are the same in every way
    int n_raw;
    int at; ///< of ways_next
    uint64_t seed, drawn;
    int64_t scratch_bytes;
    bool by_team;       ///< one thread may give other bits than two
    cq_compute compute; ///< of cpu; BF16 asks for operands that are BF16 already
    int64_t bf16_bytes;
    cq_dtype act; ///< of the fields that ways_act names
    bool coarse;
} ways;

/// Adds a buffer of random values, normal with the given size and shift, everywhere (gaps too);
/// returns it.
static inline float *ways_add(ways *w, const char *name, size_t offset, int64_t rows, int64_t cols,
                              int64_t ld, double size, double shift, int times) {
    cr_assert(w->n_fields < MOST_FIELDS);
    float *x = malloc((size_t)(rows * ld + 1) * sizeof(*x));
    cr_assert_not_null(x);
    w->drawn++;
    for (int64_t i = 0; i < rows * ld; i++)
        x[i] = (float)(shift + size * cq_random_normal(w->seed, w->drawn, (uint64_t)i));
    w->field[w->n_fields++] = (ways_field){name, offset, rows, cols, ld, x, times, false, false};
    return x;
}
#define WAYS_IN(w, op, name, rows, cols, ld, size)                                                 \
    ways_add(w, #name, offsetof(cq_##op##_args, name), rows, cols, ld, size, 0.0, 0)
#define WAYS_OUT(w, op, name, rows, cols, ld, times)                                               \
    ways_add(w, #name, offsetof(cq_##op##_args, name), rows, cols, ld, 1.0, 0.0, times)

/// Says how much lies behind a pointer of the arguments that is no field.
#define WAYS_RAW(w, op, name, size_bytes)                                                          \
    ((w)->raw[(w)->n_raw++] =                                                                      \
         (ways_raw){.offset = offsetof(cq_##op##_args, name), .bytes = (int64_t)(size_bytes)})

static inline float ways_widened(uint16_t h) {
    float x;
    cq_convert(&x, CQ_F32, &h, CQ_BF16, 1);
    return x;
}
static inline uint16_t ways_bf16(float x) {
    uint16_t h;
    cq_convert(&h, CQ_BF16, &x, CQ_F32, 1);
    return h;
}

/// Where w->act is BF16, makes the fields of the given names ("q k v out") so. After they are
/// added; returns w->act, for the arguments.
static inline cq_dtype ways_act(ways *w, const char *names) {
    for (int f = 0; w->act == CQ_BF16 && f < w->n_fields; f++) {
        ways_field *d = &w->field[f];
        size_t length = strlen(d->name);
        for (const char *at = names; !d->narrow && (at = strstr(at, d->name)); at += length)
            d->narrow = (at == names || at[-1] == ' ') && (!at[length] || at[length] == ' ');
        for (int64_t i = 0; d->narrow && i < d->rows * d->ld; i++)
            d->values[i] = ways_widened(ways_bf16(d->values[i]));
    }
    return w->act;
}

static inline bool ways_narrow(const ways_field *f, int way) { return f->narrow && way >= CPU_WAY; }
static inline size_t ways_bytes(const ways_field *f, int way) {
    size_t one = f->wide || way == REF_WAY ? sizeof(double) : sizeof(float);
    return (size_t)(f->rows * f->ld) * (ways_narrow(f, way) ? sizeof(uint16_t) : one);
}
static inline size_t ways_total(const ways *w, int way) {
    size_t total = 0;
    for (int f = 0; f < w->n_fields; f++)
        total += ways_bytes(&w->field[f], way) + 8;
    return total;
}

/// A result of n doubles, whatever the dtype; starts at 1 so that it shows whether it is added to.
#define WAYS_DOUBLE(w, op, name, n)                                                                \
    do {                                                                                           \
        ways_add(w, #name, offsetof(cq_##op##_args, name), 1, n, n, 0.0, 1.0, 2);                  \
        (w)->field[(w)->n_fields - 1].wide = true;                                                 \
    } while (0)

/// Gives `args`, a copy of the arguments, its own buffers; returns the block that holds them.
static inline char *ways_place(const ways *w, void *args, int way) {
    char *block = calloc(ways_total(w, way) + 1, 1), *at = block;
    cr_assert_not_null(block);
    for (int f = 0; f < w->n_fields; f++) {
        const ways_field *d = &w->field[f];
        memcpy((char *)args + d->offset, &at, sizeof(at));
        for (int64_t i = 0; i < d->rows * d->ld; i++)
            if (way == REF_WAY || d->wide)
                ((double *)at)[i] = (double)d->values[i];
            else if (ways_narrow(d, way))
                ((uint16_t *)at)[i] = ways_bf16(d->values[i]);
            else
                ((float *)at)[i] = d->values[i];
        at += (ways_bytes(d, way) + 7) / 8 * 8;
    }
    return block;
}

/// Element i of what a way left in a field.
static inline double ways_value(const ways_field *d, const void *values, int64_t i, int way) {
    return d->wide               ? ((const double *)values)[i]
           : ways_narrow(d, way) ? (double)ways_widened(((const uint16_t *)values)[i])
                                 : (double)((const float *)values)[i];
}
/// The most that rounding `x` to BF16 is off.
static inline double ways_half(double x) {
    return x == 0.0 ? 0.0 : ldexp(1.0, (fabs(x) < 0x1p-126 ? -126 : ilogb(x)) - 8);
}

static inline void ways_compare_field(ways *w, const char *op, const ways_field *d,
                                      const double *ref, const void *plain, const void *cpu) {
    double top = 0.0, plain_error = 0.0, cpu_error = 0.0;
    int64_t at = 0;
    for (int64_t i = 0; i < d->rows * d->ld; i++) {
        double there = ways_value(d, cpu, i, CPU_WAY), loops = ways_value(d, plain, i, PLAIN_WAY);
        if (i % d->ld >= d->cols) {
            float gap = (float)there;
            cr_expect(d->wide || memcmp(&gap, d->values + i, sizeof(float)) == 0,
                      "%s: %s was written between its rows, at %lld", w->what, d->name,
                      (long long)i);
            continue;
        }
        if (d->narrow && w->coarse)
            loops = (double)ways_widened(ways_bf16((float)loops));
        double error = fabs(there - ref[i]);
        if (d->narrow && !w->coarse)
            error = error != error ? error : fmax(error - ways_half(ref[i]), 0.0);
        top = fmax(top, fabs(ref[i]));
        plain_error = fmax(plain_error, fabs(loops - ref[i]));
        if (!(error <= cpu_error)) {
            cpu_error = error;
            at = i;
        }
    }
    double ulp = top > 0.0 ? ldexp(1.0, ilogb(top) - (d->narrow && w->coarse ? 7 : 23)) : 0x1p-149;
    cr_expect(cpu_error <= 16 * plain_error + 16 * ulp,
              "%s: %s.%s[%lld] is %.9g, wanted %.9g; error %.3g, plain loops' %.3g, ulp %.3g",
              w->what, op, d->name, (long long)at, ways_value(d, cpu, at, CPU_WAY), ref[at],
              cpu_error, plain_error, ulp);
    int i = 0;
    while (i < w->n_tallies && (w->tally[i].name != d->name || w->tally[i].op != op))
        i++;
    cr_assert(i < MOST_FIELDS);
    if (i == w->n_tallies)
        w->tally[w->n_tallies++] = (ways_tally){.op = op, .name = d->name, .times = d->times};
    w->tally[i].runs++;
    w->tally[i].plain += plain_error / ulp;
    w->tally[i].cpu += cpu_error / ulp;
}

/// Holds the errors of all runs so far against the bound; a result of a few elements can be right
/// by luck in one run.
static inline void ways_judge(ways *w) {
    for (int i = 0; WAYS_JUDGES && i < w->n_tallies; i++) {
        const ways_tally *t = &w->tally[i];
        if (getenv("CQ_TEST_ERRORS"))
            printf("%s: %s.%s: error in ulp: plain %.2f, " WAYS_TABLE " %.2f\n", w->what, t->op,
                   t->name, t->plain / t->runs, t->cpu / t->runs);
        cr_expect(
            t->cpu <= t->times * t->plain + t->runs,
            "%s, and %d seeds before: %s.%s is off by %.2f ulp on average, the plain loops by %.2f",
            w->what, t->runs - 1, t->op, t->name, t->cpu / t->runs, t->plain / t->runs);
    }
    w->n_tallies = 0;
}

static inline void ways_compare(ways *w, const char *op, const void *const args[N_WAYS]) {
    for (int f = 0; f < w->n_fields; f++) {
        const void *p[N_WAYS];
        for (int way = 0; way < N_WAYS; way++)
            memcpy(&p[way], (const char *)args[way] + w->field[f].offset, sizeof(p[way]));
        if (w->field[f].times)
            ways_compare_field(w, op, &w->field[f], p[REF_WAY], p[PLAIN_WAY], p[CPU_WAY]);
        for (int way = AGAIN_WAY; way < (w->by_team ? ALONE_WAY : N_WAYS); way++)
            cr_expect(memcmp(p[CPU_WAY], p[way], ways_bytes(&w->field[f], way)) == 0, "%s: %s: %s",
                      w->what, w->field[f].name,
                      way == AGAIN_WAY ? "two runs differ" : "one thread differs from two");
    }
}

static inline cq_stream ways_stream(const ways *w, int way) {
    cq_stream s = {.table = cq_kernels_find(WAYS_TABLE), .threads = way == ALONE_WAY ? 1 : 2};
    cr_assert_not_null(s.table, "this build has no table %s", WAYS_TABLE);
    s.compute = w->compute;
    if (s.table->memory) {
        cr_assert_eq(s.table->memory->open(&s, 0), CQ_OK, "%s", cq_error());
        return s;
    }
    s.scratch_bytes = (w->scratch_bytes + 63) / 64 * 64;
    s.scratch = aligned_alloc(64, (size_t)(s.threads * s.scratch_bytes + 64));
    s.bf16_scratch_bytes = w->bf16_bytes;
    s.bf16_scratch = aligned_alloc(64, (size_t)(w->bf16_bytes + 63) / 64 * 64 + 64);
    cr_assert(s.scratch && s.bf16_scratch);
    return s;
}

static inline void ways_stream_free(cq_stream *s) {
    free(s->scratch);
    free(s->bf16_scratch);
    if (s->table->memory)
        s->table->memory->close(s);
}

/// Puts what the pointers reach on the device of s, and the pointers to there into `args`; pointers
/// to one place stay so. Nothing to do where the table works in the host's memory.
static inline void ways_up(cq_stream *s, void *args, ways_raw *raw, int n) {
    const cq_memory *m = s->table->memory;
    for (int i = 0; m && i < n; i++) {
        char *at = (char *)args + raw[i].offset;
        memcpy(&raw[i].host, at, sizeof(raw[i].host));
        raw[i].there = NULL;
        for (int j = 0; j < i && raw[i].host; j++)
            if (raw[j].host == raw[i].host && raw[j].bytes == raw[i].bytes)
                raw[i].there = raw[j].there;
        if (raw[i].host && !raw[i].there) {
            cr_assert_eq(m->take(&raw[i].there, raw[i].bytes, false), CQ_OK, "%s", cq_error());
            cr_assert_eq(m->copy(s, raw[i].there, raw[i].host, raw[i].bytes), CQ_OK, "%s",
                         cq_error());
        }
        memcpy(at, &raw[i].there, sizeof(raw[i].there));
    }
}
/// Brings everything back, and waits.
static inline void ways_down(cq_stream *s, void *args, ways_raw *raw, int n) {
    const cq_memory *m = s->table->memory;
    for (int i = 0; m && i < n; i++) {
        memcpy((char *)args + raw[i].offset, &raw[i].host, sizeof(raw[i].host));
        bool twice = false;
        for (int j = 0; j < i; j++)
            twice |= raw[j].there == raw[i].there;
        if (!raw[i].there || twice)
            continue;
        char *now = malloc((size_t)raw[i].bytes + 1);
        cr_assert_not_null(now);
        cr_assert_eq(m->copy(s, now, raw[i].there, raw[i].bytes), CQ_OK, "%s", cq_error());
        if (memcmp(now, raw[i].host, (size_t)raw[i].bytes) != 0) /* inputs may be constants */
            memcpy(raw[i].host, now, (size_t)raw[i].bytes);
        free(now);
    }
    for (int i = 0; m && i < n; i++) {
        bool again = false;
        for (int j = i + 1; j < n; j++)
            again |= raw[j].there == raw[i].there;
        if (raw[i].there && !again)
            m->give(raw[i].there, raw[i].bytes, false);
    }
    if (m)
        cr_assert_eq(m->wait(s), CQ_OK, "%s", cq_error());
}
/// Runs one operation on host buffers, named with their sizes: WAYS_CALL(&s, sumsq, a, WAYS_AT(x, 4
/// * n), WAYS_AT(out, 8)); the status.
#define WAYS_AT(name, size_bytes)                                                                  \
    { .offset = (size_t)((char *)&a_.name - (char *)&a_), .bytes = (int64_t)(size_bytes) }
#define WAYS_CALL(s, op, a, ...)                                                                   \
    ({                                                                                             \
        cq_##op##_args a_ = (a);                                                                   \
        ways_raw raw_[] = {__VA_ARGS__};                                                           \
        int n_ = (int)(sizeof(raw_) / sizeof(*raw_));                                              \
        ways_up((s), &a_, raw_, n_);                                                               \
        int status_ = (s)->table->op((s), &a_);                                                    \
        ways_down((s), &a_, raw_, n_);                                                             \
        status_;                                                                                   \
    })

/// The next way to run the backend after number *at, which starts at -1; false when there is none.
/// For cpu an instruction set that runs here: the tables are looked up by CKAQAD_ISA. For an
/// emulated device an order of its threads.
static inline bool ways_next(int *at) {
#ifdef WAYS_CUDA
    static const char *const orders[] = {"forward", "reverse", "random:1"};
    ++*at;
    return cq_emu_set ? *at < WAYS_ORDERS && cq_emu_set(orders[*at], "late") : *at < 1;
#else
    static const char *const isas[] = {"generic", "avx2", "avx512"};
    while (++*at < 3) {
        setenv("CKAQAD_ISA", isas[*at], 1);
        cq_threads_set(2);
        if (strcmp(cq_cpu_isa(), isas[*at]) == 0)
            return true;
    }
    return false;
#endif
}
/// What ways_next chose, for messages.
static inline const char *ways_name(int at) {
#ifdef WAYS_CUDA
    static const char *const names[] = {WAYS_TABLE ", forward", WAYS_TABLE ", reverse",
                                        WAYS_TABLE ", random"};
    return cq_emu_set && at >= 0 && at < 3 ? names[at] : WAYS_TABLE;
#else
    (void)at;
    return cq_cpu_isa();
#endif
}
/// The second run of an emulated device has its threads in another order, and cp.async copies
/// early.
static inline void ways_shake(int at, int way) {
#ifdef WAYS_CUDA
    static const char *const orders[] = {"forward", "reverse", "random:2"};
    if (cq_emu_set && way >= CPU_WAY)
        cq_emu_set(orders[(at + (way == AGAIN_WAY)) % 3], way == AGAIN_WAY ? "eager" : "late");
#else
    (void)at, (void)way;
#endif
}

/// The fields and the raw pointers of one way as pointers that go to its device.
static inline int ways_moved(const ways *w, int way, ways_raw out[MOST_FIELDS + 4]) {
    int n = 0;
    for (int f = 0; f < w->n_fields; f++)
        out[n++] = (ways_raw){.offset = w->field[f].offset,
                              .bytes = (int64_t)ways_bytes(&w->field[f], way)};
    for (int r = 0; r < w->n_raw; r++)
        out[n++] = w->raw[r];
    return n;
}

/// Runs `op` with the arguments `a` (buffers left NULL) all ways, compares every result and frees
/// the fields.
#define WAYS_RUN(w, op, a)                                                                         \
    do {                                                                                           \
        cq_##op##_args args_[N_WAYS];                                                              \
        const void *pointers_[N_WAYS];                                                             \
        char *block_[N_WAYS];                                                                      \
        for (int way_ = 0; way_ < N_WAYS; way_++) {                                                \
            args_[way_] = (a);                                                                     \
            args_[way_].dtype = way_ == REF_WAY ? CQ_F64 : CQ_F32;                                 \
            pointers_[way_] = &args_[way_];                                                        \
            block_[way_] = ways_place((w), &args_[way_], way_);                                    \
            int status_;                                                                           \
            if (way_ < CPU_WAY)                                                                    \
                status_ = way_ == REF_WAY ? cq_ref_##op(NULL, &args_[way_])                        \
                                          : cq_plain_##op(NULL, &args_[way_]);                     \
            else {                                                                                 \
                cq_stream s_ = ways_stream((w), way_);                                             \
                ways_raw moved_[MOST_FIELDS + 4];                                                  \
                int n_ = ways_moved((w), way_, moved_);                                            \
                ways_shake((w)->at, way_);                                                         \
                ways_up(&s_, &args_[way_], moved_, n_);                                            \
                status_ = s_.table->op(&s_, &args_[way_]);                                         \
                cr_assert_eq(status_, CQ_OK, "%s: %s", (w)->what, cq_error());                     \
                ways_down(&s_, &args_[way_], moved_, n_);                                          \
                ways_stream_free(&s_);                                                             \
            }                                                                                      \
            cr_assert_eq(status_, CQ_OK, "%s: %s", (w)->what, cq_error());                         \
        }                                                                                          \
        ways_compare((w), #op, pointers_);                                                         \
        for (int way_ = 0; way_ < N_WAYS; way_++)                                                  \
            free(block_[way_]);                                                                    \
        for (int f_ = 0; f_ < (w)->n_fields; f_++)                                                 \
            free((w)->field[f_].values);                                                           \
        (w)->n_fields = (w)->n_raw = 0;                                                            \
    } while (0)
