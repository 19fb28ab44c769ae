/// plan.c - the plan: declarations with offsets per purpose, then one mapping per purpose.
#include "core/tensor/plan.h"
#include "core/base/error.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGN = 64 };

typedef struct slot {
    cq_tensor *tensor;
    cq_purpose purpose;
    int64_t offset;
} slot;

struct cq_plan {
    slot *slots;
    int64_t n_slots, cap_slots;
    int64_t at[CQ_N_PURPOSES], bytes[CQ_N_PURPOSES];
    void *region[CQ_N_PURPOSES];
    bool committed;
};

int cq_plan_open(cq_plan **out) {
    *out = calloc(1, sizeof **out);
    return *out ? CQ_OK : cq_fail(CQ_ENOMEM, "plan: no memory");
}

void cq_plan_close(cq_plan *p) {
    if (!p)
        return;
    for (int i = 0; i < CQ_N_PURPOSES; i++)
        if (p->region[i])
            munmap(p->region[i], (size_t)p->bytes[i]);
    free(p->slots);
    free(p);
}

static int tensor_bytes(int64_t *bytes, const char *name, cq_dtype dtype, cq_shape shape) {
    int64_t n = cq_dtype_bytes(dtype);
    for (int i = 0; i < shape.rank; i++)
        if (shape.dim[i] < 0 || __builtin_mul_overflow(n, shape.dim[i], &n))
            return cq_fail(CQ_ESHAPE, "plan: %s has a shape whose bytes do not fit 63 bits", name);
    *bytes = n;
    return CQ_OK;
}

int cq_plan_add(cq_plan *p, cq_tensor *t, cq_purpose purpose, const char *name, cq_dtype dtype,
                cq_shape shape) {
    int64_t bytes = 0, end;
    if (p->committed)
        return cq_fail(CQ_EUSAGE, "plan: %s is declared after commit", name);
    CQ_TRY(tensor_bytes(&bytes, name, dtype, shape));
    if (__builtin_add_overflow(p->at[purpose], bytes, &end) || end > INT64_MAX - ALIGN)
        return cq_fail(CQ_ESHAPE, "plan: %s makes the plan larger than 63 bits", name);
    if (p->n_slots == p->cap_slots) {
        int64_t cap = p->cap_slots ? 2 * p->cap_slots : 256;
        slot *more = realloc(p->slots, (size_t)cap * sizeof *more);
        if (!more)
            return cq_fail(CQ_ENOMEM, "plan: no memory for its list");
        p->slots = more;
        p->cap_slots = cap;
    }
    *t = (cq_tensor){NULL, shape, dtype};
    p->slots[p->n_slots++] = (slot){t, purpose, p->at[purpose]};
    p->at[purpose] = (end + ALIGN - 1) / ALIGN * ALIGN;
    if (p->at[purpose] > p->bytes[purpose])
        p->bytes[purpose] = p->at[purpose];
    return CQ_OK;
}

int64_t cq_plan_mark(const cq_plan *p, cq_purpose purpose) { return p->at[purpose]; }
void cq_plan_rewind(cq_plan *p, cq_purpose purpose, int64_t mark) { p->at[purpose] = mark; }

int64_t cq_plan_bytes(const cq_plan *p, cq_purpose purpose) {
    int64_t total = 0;
    if (purpose != CQ_N_PURPOSES)
        return p->bytes[purpose];
    for (int i = 0; i < CQ_N_PURPOSES; i++)
        total += p->bytes[i];
    return total;
}

const char *cq_purpose_name(cq_purpose purpose) {
    static const char *const names[] = {
        "teacher weights", "student weights", "fake-quantized copies",
        "gradients",       "AdamW moments",   "activations",
        "scratch",         "logits",          "CKA"};
    return purpose >= 0 && purpose < CQ_N_PURPOSES ? names[purpose] : "all";
}

static int64_t status_field(const char *path, const char *key) {
    char line[256];
    long long kib = 0;
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key)) && sscanf(line + strlen(key), ": %lld", &kib) == 1)
            break;
    fclose(f);
    return (int64_t)kib * 1024;
}

int64_t cq_memory_peak(void) { return status_field("/proc/self/status", "VmHWM"); }

int64_t cq_memory_available(void) {
    long long limit = 0, used = 0;
    int64_t available = status_field("/proc/meminfo", "MemAvailable");
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r"),
         *g = fopen("/sys/fs/cgroup/memory.current", "r");
    if (f && g && fscanf(f, "%lld", &limit) == 1 && fscanf(g, "%lld", &used) == 1 &&
        limit - used < available)
        available = limit > used ? limit - used : 0;
    if (f)
        fclose(f);
    if (g)
        fclose(g);
    return available;
}

static int refuse(const cq_plan *p, int64_t limit) {
    int first = 0, second = 1;
    for (int i = 1; i < CQ_N_PURPOSES; i++)
        if (p->bytes[i] > p->bytes[first]) {
            second = first;
            first = i;
        } else if (i != first && p->bytes[i] > p->bytes[second])
            second = i;
    return cq_fail(CQ_ENOMEM,
                   "plan: %.1f MiB planned, %.1f MiB available; the largest parts are %s (%.1f "
                   "MiB) and %s (%.1f MiB)",
                   (double)cq_plan_bytes(p, CQ_N_PURPOSES) / 1048576, (double)limit / 1048576,
                   cq_purpose_name((cq_purpose)first), (double)p->bytes[first] / 1048576,
                   cq_purpose_name((cq_purpose)second), (double)p->bytes[second] / 1048576);
}

int cq_plan_commit(cq_plan *p, int64_t limit_bytes) {
    int64_t limit = limit_bytes > 0 ? limit_bytes : cq_memory_available();
    if (p->committed)
        return cq_fail(CQ_EUSAGE, "plan: committed twice");
    if (cq_plan_bytes(p, CQ_N_PURPOSES) > limit)
        return refuse(p, limit);
    for (int i = 0; i < CQ_N_PURPOSES; i++) {
        if (!p->bytes[i])
            continue;
        void *m = mmap(NULL, (size_t)p->bytes[i], PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (m == MAP_FAILED)
            return refuse(p, limit);
        p->region[i] = m;
    }
    for (int64_t i = 0; i < p->n_slots; i++) {
        slot *s = &p->slots[i];
        s->tensor->data =
            cq_tensor_bytes(*s->tensor) ? (char *)p->region[s->purpose] + s->offset : NULL;
    }
    p->committed = true;
    return CQ_OK;
}

bool cq_plan_committed(const cq_plan *p) { return p->committed; }
