/// device.c - the list of device regions, and copies that look there.
///
/// There are few regions (one per purpose of a plan), so the list is searched from end to end. It
/// is shared by the threads of the process.
#include "core/tensor/device.h"
#include "core/base/error.h"
#include "core/tensor/graph.h"
#include "core/tensor/plan.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_REGIONS = 256 };

typedef struct region {
    const char *base;
    int64_t bytes;
    cq_stream stream;
    bool pinned;
} region;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static region regions[MOST_REGIONS];
static int n_regions;

int cq_stream_open(cq_stream *s, const char *kernels, int index) {
    s->table = cq_kernels_find(kernels);
    if (!s->table)
        return cq_fail(CQ_EUSAGE, "kernels %s: not in this build", kernels);
    return s->table->memory ? s->table->memory->open(s, index) : CQ_OK;
}

int cq_device_count(int *n, const char *kernels) {
    const cq_kernels *table = cq_kernels_find(kernels);
    *n = 0;
    if (!table)
        return cq_fail(CQ_EUSAGE, "kernels %s: not in this build", kernels);
    return table->memory ? table->memory->count(n) : CQ_OK;
}

void cq_stream_close(cq_stream *s) {
    cq_graphs_set(s, false);
    if (s->table && s->table->memory)
        s->table->memory->close(s);
    s->table = NULL;
}

int cq_stream_describe(const cq_stream *s, char *text, int64_t size) {
    if (size > 0)
        text[0] = 0;
    return s->table->memory ? s->table->memory->describe(text, size) : CQ_OK;
}

int64_t cq_stream_available(const cq_stream *s) {
    int64_t bytes = 0;
    if (!s->table->memory)
        return cq_memory_available();
    return s->table->memory->available(&bytes) == CQ_OK ? bytes : 0;
}

bool cq_stream_has_fp4(const cq_stream *s) {
    return s->table->memory && s->table->memory->has_fp4(s);
}

int cq_stream_wait(cq_stream *s) { return s->table->memory ? s->table->memory->wait(s) : CQ_OK; }

int cq_region_add(void *base, int64_t bytes, const cq_stream *s, bool pinned) {
    int status = CQ_OK;
    pthread_mutex_lock(&lock);
    if (n_regions == MOST_REGIONS)
        status = cq_fail(CQ_ENOMEM, "device memory: %d regions, wanted fewer", MOST_REGIONS);
    else
        regions[n_regions++] = (region){base, bytes, *s, pinned};
    pthread_mutex_unlock(&lock);
    return status;
}

void cq_region_remove(const void *base) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_regions; i++)
        if (regions[i].base == base) {
            regions[i] = regions[--n_regions];
            break;
        }
    pthread_mutex_unlock(&lock);
}

/* The region that holds p; false when p is the host's. */
static bool find_region(region *out, const void *p) {
    const char *at = p;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_regions && !found; i++)
        if (at >= regions[i].base && at < regions[i].base + regions[i].bytes) {
            *out = regions[i];
            found = true;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static bool find(cq_stream *out, const void *p) {
    region r;
    bool found = find_region(&r, p);
    if (found)
        *out = r.stream;
    return found;
}

bool cq_on_device(const void *p) {
    region r;
    return find_region(&r, p);
}

bool cq_on_host_of_device(const void *p) {
    region r;
    return find_region(&r, p) && r.pinned;
}

int cq_copy(void *to, const void *from, int64_t bytes) {
    cq_stream s;
    if (bytes <= 0)
        return CQ_OK;
    if (find(&s, to) || find(&s, from))
        return s.table->memory->copy(&s, to, from, bytes);
    memcpy(to, from, (size_t)bytes);
    return CQ_OK;
}

int cq_zero(void *to, int64_t bytes) {
    cq_stream s;
    if (bytes <= 0)
        return CQ_OK;
    if (find(&s, to))
        return s.table->memory->zero(&s, to, bytes);
    memset(to, 0, (size_t)bytes);
    return CQ_OK;
}

int cq_tensor_fill(cq_tensor to, const void *from, cq_dtype from_dtype) {
    int64_t n = cq_tensor_elems(to), bytes = cq_tensor_bytes(to);
    if (!cq_on_device(to.data))
        return cq_convert(to.data, to.dtype, from, from_dtype, n);
    if (to.dtype == from_dtype)
        return cq_copy(to.data, from, bytes);
    void *staging = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (!staging)
        return cq_fail(CQ_ENOMEM, "device memory: no host memory for %ld bytes on their way there",
                       (long)bytes);
    int status = cq_convert(staging, to.dtype, from, from_dtype, n);
    if (!status)
        status = cq_copy(to.data, staging, bytes);
    free(staging);
    return status;
}

int cq_tensor_on_host(cq_tensor *out, void **owned, cq_tensor t) {
    int64_t bytes = cq_tensor_bytes(t);
    *out = t;
    *owned = NULL;
    if (!t.data || !cq_on_device(t.data))
        return CQ_OK;
    if (!(*owned = malloc((size_t)(bytes > 0 ? bytes : 1))))
        return cq_fail(CQ_ENOMEM, "device memory: no host memory for %ld bytes of it", (long)bytes);
    out->data = *owned;
    int status = cq_copy(*owned, t.data, bytes);
    if (status) {
        free(*owned);
        *owned = NULL;
    }
    return status;
}
