/// plan.c - the list of declared buffers, and the one mapping per purpose that holds them.
///
/// Offsets are fixed when a buffer is declared: round the region's end up to 64, take the bytes,
/// remember the highest end. rewind() lowers the end, so later declarations share bytes with
/// earlier ones; commit() maps the highest end. Fresh pages are zero. Shared bytes hold whatever
/// their last owner wrote.
#include "core/tensor/plan.h"
#include "core/base/error.h"
#include "core/tensor/device.h"
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGN = 64 };

typedef struct decl {
    cq_tensor *slot;
    cq_purpose purpose;
    int64_t offset;
} decl;

typedef struct region {
    char *base;
    int64_t end;  ///< where the next declaration goes
    int64_t peak; ///< highest end so far
    bool used;
} region;

struct cq_plan {
    decl *decls;
    int64_t n_decls, capacity;
    region regions[CQ_N_PURPOSES];
    cq_stream stream; ///< of the device; no table: host memory
    bool committed;
    bool imagined; ///< for a device that is not here
};

static const char *const purpose_names[CQ_N_PURPOSES] = {
    [CQ_FOR_TEACHER] = "teacher weights",
    [CQ_FOR_STUDENT] = "student weights",
    [CQ_FOR_FAKEQUANT] = "fake-quantized copies",
    [CQ_FOR_GRADIENT] = "gradients",
    [CQ_FOR_MOMENTS] = "AdamW moments",
    [CQ_FOR_ACTIVATIONS] = "activations",
    [CQ_FOR_SCRATCH] = "scratch",
    [CQ_FOR_LOGITS] = "logits",
    [CQ_FOR_CKA] = "CKA",
    [CQ_FOR_RESULTS] = "results",
    [CQ_FOR_GENERATION] = "generation",
    [CQ_FOR_HOST_TEACHER] = "teacher blocks, host",
    [CQ_FOR_HOST_OPTIMIZER] = "optimizer, host",
    [CQ_FOR_KERNELS] = "kernel scratch",
};

const char *cq_purpose_name(cq_purpose purpose) {
    return (unsigned)purpose < CQ_N_PURPOSES ? purpose_names[purpose] : "all";
}

int cq_plan_open(cq_plan **out) {
    *out = calloc(1, sizeof **out);
    return *out ? CQ_OK : cq_fail(CQ_ENOMEM, "plan: out of memory");
}

void cq_plan_place(cq_plan *plan, const cq_stream *s) {
    if (s->table && s->table->memory)
        plan->stream = *s;
}

void cq_plan_imagine(cq_plan *plan) { plan->imagined = true; }

bool cq_plan_on_device(const cq_plan *plan) { return plan->stream.table || plan->imagined; }

/* A purpose with only empty tensors gets one line, so that no slot is NULL. */
static int64_t region_bytes(const region *r) { return r->peak ? r->peak : ALIGN; }

static bool on_host(int purpose) {
    return purpose == CQ_FOR_HOST_TEACHER || purpose == CQ_FOR_HOST_OPTIMIZER;
}
/* Memory of a device's plan that the host reaches, too. */
static bool is_shared(int purpose) { return purpose == CQ_FOR_RESULTS || on_host(purpose); }

static void unmap(cq_plan *plan) {
    for (int i = 0; i < CQ_N_PURPOSES; i++) {
        region *r = &plan->regions[i];
        if (r->base && cq_plan_on_device(plan)) {
            cq_region_remove(r->base);
            plan->stream.table->memory->give(r->base, region_bytes(r), is_shared(i));
        } else if (r->base)
            munmap(r->base, (size_t)region_bytes(r));
        r->base = NULL;
    }
}

static int map_region(cq_plan *plan, int purpose) {
    region *r = &plan->regions[purpose];
    int64_t bytes = region_bytes(r);
    void *base = NULL;
    if (cq_plan_on_device(plan)) {
        CQ_TRY(plan->stream.table->memory->take(&base, bytes, is_shared(purpose)));
        r->base = base; /* results are read after a wait, all else in the stream's order */
        return purpose == CQ_FOR_RESULTS
                   ? CQ_OK
                   : cq_region_add(base, bytes, &plan->stream, on_host(purpose));
    }
    base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return cq_fail(CQ_ENOMEM, "%s", strerror(errno));
    r->base = base;
    return CQ_OK;
}

void cq_plan_close(cq_plan *plan) {
    if (!plan)
        return;
    unmap(plan);
    free(plan->decls);
    free(plan);
}

static int reserve(cq_plan *plan) {
    if (plan->n_decls < plan->capacity)
        return CQ_OK;
    int64_t capacity = plan->capacity ? 2 * plan->capacity : 64;
    decl *decls = realloc(plan->decls, (size_t)capacity * sizeof *decls);
    if (!decls)
        return cq_fail(CQ_ENOMEM, "plan: out of memory");
    plan->decls = decls;
    plan->capacity = capacity;
    return CQ_OK;
}

int cq_plan_add(cq_plan *plan, cq_tensor *slot, cq_purpose purpose, const char *name,
                cq_dtype dtype, cq_shape shape) {
    if (plan->committed)
        return cq_fail(CQ_EUSAGE, "%s: declared after the plan was committed", name);
    if ((unsigned)purpose >= CQ_N_PURPOSES)
        return cq_fail(CQ_EUSAGE, "%s: purpose is %d, wanted 0 to %d", name, (int)purpose,
                       CQ_N_PURPOSES - 1);
    if (cq_dtype_bytes(dtype) == 0)
        return cq_fail(CQ_EUSAGE, "%s: dtype is %d, wanted 0 to %d", name, (int)dtype,
                       CQ_N_DTYPES - 1);
    region *r = &plan->regions[purpose];
    int64_t bytes, offset, end;
    int status = cq_shape_bytes(&bytes, shape, dtype);
    if (status)
        return cq_fail_in(status, name);
    if (__builtin_add_overflow(r->end, ALIGN - 1, &offset) ||
        __builtin_add_overflow(offset & ~(int64_t)(ALIGN - 1), bytes, &end))
        return cq_fail(CQ_ESHAPE, "%s: the %s region grows beyond 2^63 bytes", name,
                       cq_purpose_name(purpose));
    CQ_TRY(reserve(plan));
    offset &= ~(int64_t)(ALIGN - 1);
    *slot = (cq_tensor){.shape = shape, .dtype = dtype};
    plan->decls[plan->n_decls++] = (decl){slot, purpose, offset};
    r->used = true;
    r->end = end;
    if (end > r->peak)
        r->peak = end;
    return CQ_OK;
}

void cq_plan_reserve(cq_plan *plan, int64_t bytes) {
    region *r = &plan->regions[CQ_FOR_KERNELS]; /* never `used`, so never mapped */
    int64_t whole = (bytes + (1 << 20) - 1) / (1 << 20) * (1 << 20); /* as they take it */
    r->peak = whole > r->peak ? whole : r->peak;
}

int64_t cq_plan_mark(const cq_plan *plan, cq_purpose purpose) { return plan->regions[purpose].end; }

void cq_plan_rewind(cq_plan *plan, cq_purpose purpose, int64_t mark) {
    assert(mark >= 0 && mark <= plan->regions[purpose].peak);
    plan->regions[purpose].end = mark;
}

int64_t cq_plan_bytes(const cq_plan *plan, cq_purpose purpose) {
    if (purpose != CQ_N_PURPOSES)
        return plan->regions[purpose].peak;
    int64_t total = 0;
    for (int i = 0; i < CQ_N_PURPOSES; i++) /* a sum beyond 2^63 fits nowhere: say the largest */
        if (!on_host(i) && __builtin_add_overflow(total, plan->regions[i].peak, &total))
            return INT64_MAX;
    return total;
}

static double mib(int64_t bytes) { return (double)bytes / 1048576.0; }

/// "student 5600.0, teacher 2800.0, moments 700.0": the three largest purposes in MiB.
static void largest_text(char *text, size_t size, const cq_plan *plan) {
    bool told[CQ_N_PURPOSES] = {false};
    size_t at = 0;
    text[0] = 0;
    for (int k = 0; k < 3; k++) {
        int best = -1;
        for (int i = 0; i < CQ_N_PURPOSES; i++)
            if (!told[i] && !on_host(i) &&
                plan->regions[i].peak > (best < 0 ? 0 : plan->regions[best].peak))
                best = i;
        if (best < 0 || at >= size)
            return;
        told[best] = true;
        at += (size_t)snprintf(text + at, size - at, "%s%s %.1f", k ? ", " : "",
                               purpose_names[best], mib(plan->regions[best].peak));
    }
}

static int refuse(const cq_plan *plan, int64_t limit, const char *what) {
    char largest[160];
    largest_text(largest, sizeof largest, plan);
    return cq_fail(CQ_ENOMEM,
                   "memory plan: %.1f MiB planned (largest: %s), wanted at most %.1f MiB %s%s",
                   mib(cq_plan_bytes(plan, CQ_N_PURPOSES)), largest, mib(limit), what,
                   cq_plan_on_device(plan) ? "; --dry-run --gpus=1 lists what fits a GPU" : "");
}

int cq_plan_commit(cq_plan *plan, int64_t limit_bytes) {
    if (plan->committed)
        return cq_fail(CQ_EUSAGE, "plan: committed twice");
    if (plan->imagined)
        return cq_fail(CQ_EUSAGE, "plan: made for a device that is not here, it only counts");
    int64_t limit = limit_bytes > 0           ? limit_bytes
                    : cq_plan_on_device(plan) ? cq_stream_available(&plan->stream)
                                              : cq_memory_available();
    if (cq_plan_bytes(plan, CQ_N_PURPOSES) > limit)
        return refuse(plan, limit, limit_bytes > 0 ? "(the limit)" : "(available memory)");
    int64_t host =
        plan->regions[CQ_FOR_HOST_TEACHER].peak + plan->regions[CQ_FOR_HOST_OPTIMIZER].peak;
    if (host > cq_memory_available())
        return cq_fail(
            CQ_ENOMEM,
            "memory plan: %.1f MiB planned on the host beside the device, wanted at most %.1f "
            "MiB (available memory)",
            mib(host), mib(cq_memory_available()));
    for (int i = 0; i < CQ_N_PURPOSES; i++) {
        region *r = &plan->regions[i];
        if (!r->used)
            continue;
        int status = map_region(plan, i);
        if (status) {
            char reason[512];
            snprintf(reason, sizeof reason, "%s", cq_error());
            unmap(plan);
            return cq_fail(status, "memory plan: mapping %.1f MiB for %s: %s", mib(r->peak),
                           purpose_names[i], reason);
        }
    }
    for (int64_t i = 0; i < plan->n_decls; i++) {
        const decl *d = &plan->decls[i];
        d->slot->data = plan->regions[d->purpose].base + d->offset;
    }
    plan->committed = true;
    return CQ_OK;
}

bool cq_plan_committed(const cq_plan *plan) { return plan->committed; }
