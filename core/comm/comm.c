/// comm.c - collectives as lists of messages between pairs of ranks.
///
/// Every rank sends to every other directly: with the few ranks that share a step that moves no
/// more bytes than a ring, and each sum can run in rank order. Bytes are counted where they are
/// sent.
#include "core/base/error.h"
#include "core/base/hash.h"
#include "core/comm/comm_impl.h"
#include "core/tensor/device.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {"barrier",        "broadcast",  "all-reduce",
                                    "reduce-scatter", "all-gather", "all-to-all"};

const char *cq_collective_name(cq_collective kind) { return names[kind]; }
int cq_comm_rank(const cq_comm *c) { return c ? c->rank : 0; }
int cq_comm_size(const cq_comm *c) { return c ? c->size : 1; }
int cq_comm_local_rank(const cq_comm *c) { return c ? c->local_rank : 0; }
int cq_comm_local_size(const cq_comm *c) { return c ? c->local_size : 1; }
const char *cq_comm_backend(const cq_comm *c) { return c->backend; }
int64_t cq_comm_bytes(const cq_comm *c, cq_collective kind) { return c->sent[kind]; }
void cq_comm_set_patience(cq_comm *c, double seconds) { c->patience = seconds; }
void cq_comm_about(cq_comm *c, const char *what) {
    if (c)
        c->about = what;
}

#ifdef CQ_MPI
static int open_mpi(cq_comm *c, const cq_launch *launch) { return cq_mpi_open(&c->mpi, c, launch); }
static const char *host_backend(const cq_comm *c) { return c->mpi ? cq_mpi_name(c->mpi) : "self"; }
static void close_mpi(cq_comm *c) { cq_mpi_close(c->mpi); }
static int transfer(cq_comm *c, const cq_message *message, int64_t n) {
    return c->mpi ? cq_mpi_transfer(c->mpi, message, n) : CQ_OK;
}
const char *cq_comm_failed(cq_comm *c, int code, const char *message) {
    return c && c->mpi ? cq_mpi_failed(c->mpi, code, message) : message;
}
void cq_comm_abort(cq_comm *c, int code) {
    if (c && c->mpi)
        cq_mpi_abort(c->mpi, code);
}
int cq_comm_look(const cq_comm *c) { return c->mpi ? cq_mpi_look(c->mpi) : CQ_OK; }
int cq_comm_give_up(cq_comm *c) { return c->mpi ? cq_mpi_give_up(c->mpi) : CQ_OK; }
#else
static int open_mpi(cq_comm *c, const cq_launch *launch) {
    (void)c;
    return cq_fail(
        CQ_EUSAGE,
        "launcher: mpirun started %d ranks, this build has no MPI; wanted one process, or "
        "a build where libopenmpi-dev is installed",
        launch->size);
}
static const char *host_backend(const cq_comm *c) {
    (void)c;
    return "self";
}
static void close_mpi(cq_comm *c) { (void)c; }
static int transfer(cq_comm *c, const cq_message *message, int64_t n) {
    (void)c, (void)message, (void)n;
    return CQ_OK;
}
const char *cq_comm_failed(cq_comm *c, int code, const char *message) {
    (void)c, (void)code;
    return message;
}
void cq_comm_abort(cq_comm *c, int code) { (void)c, (void)code; }
int cq_comm_look(const cq_comm *c) {
    (void)c;
    return CQ_OK;
}
int cq_comm_give_up(cq_comm *c) {
    (void)c;
    return CQ_OK;
}
#endif

int cq_comm_open(cq_comm **out, const cq_launch *launch, double patience) {
    *out = NULL;
    cq_comm *c = calloc(1, sizeof *c);
    if (!c)
        return cq_fail(CQ_ENOMEM, "ranks: no memory");
    *c = (cq_comm){
        .rank = launch->rank, .size = launch->size, .local_size = 1, .patience = patience};
    int status = c->size > 1 ? open_mpi(c, launch) : CQ_OK;
    if (status) {
        free(c);
        return status;
    }
    snprintf(c->backend, sizeof c->backend, "%s", host_backend(c));
    *out = c;
    return CQ_OK;
}

static void detach(cq_comm *c) {
    if (c->transport)
        c->transport->close(c->link);
    if (c->room)
        c->stream.table->memory->give(c->room, c->size * c->room_bytes, false);
    c->transport = NULL;
    c->link = c->room = NULL;
    c->by_device = false;
    snprintf(c->backend, sizeof c->backend, "%s", host_backend(c));
}

void cq_comm_close(cq_comm *c) {
    if (c)
        detach(c);
    if (c && c->mpi)
        close_mpi(c);
    free(c);
}

/* Test programs may have nccl.c with an emulated library (tests/cuda_on_cpu). */
#ifndef CQ_NCCL
extern const cq_transport cq_nccl __attribute__((weak));
#endif

static const cq_transport *device_transport(const cq_stream *s) {
    const char *wanted = getenv("CKAQAD_NCCL");
    return s->table->memory && (!wanted || strcmp(wanted, "0")) ? &cq_nccl : NULL;
}

int cq_comm_attach(cq_comm *c, const cq_stream *s) {
    enum { ROOMS = 64 << 20, LEAST = 1 << 20, ALIGN = 256 };
    const cq_transport *x = device_transport(s);
    int64_t with = x != NULL;
    char name[64];
    detach(c);
    c->stream = *s;
    c->room_bytes = ROOMS / c->size / ALIGN * ALIGN;
    if (c->room_bytes < LEAST)
        c->room_bytes = LEAST;
    c->by_device = c->size == 1 && s->table->memory;
    if (c->size == 1)
        return CQ_OK;
    cq_comm_about(c, "devices");
    CQ_TRY(cq_comm_sum_int(c, &with, 1));
    if (!x || with < c->size)
        return CQ_OK;
    CQ_TRY(x->open(&c->link, c, s));
    c->transport = x;
    c->by_device = true;
    x->name(name, sizeof name);
    snprintf(c->backend, sizeof c->backend, "%s, %s", host_backend(c), name);
    return s->table->memory->take((void **)&c->room, c->size * c->room_bytes, false);
}

static void count(cq_comm *c, cq_collective kind, const cq_message *message, int64_t n) {
    c->kind = kind;
    c->calls[kind]++;
    for (int64_t i = 0; i < n; i++)
        if (message[i].send)
            c->sent[kind] += message[i].bytes;
}

int cq_comm_run(cq_comm *c, cq_collective kind, const cq_message *message, int64_t n) {
    count(c, kind, message, n);
    return transfer(c, message, n);
}

int cq_comm_run_device(cq_comm *c, cq_collective kind, const cq_message *message, int64_t n) {
    count(c, kind, message, n);
    return n ? c->transport->transfer(c->link, message, n) : CQ_OK;
}

/* Room for a message to and one from each rank. */
static int messages(cq_message **out, const cq_comm *c) {
    *out = calloc(2 * (size_t)c->size, sizeof **out);
    return *out ? CQ_OK : cq_fail(CQ_ENOMEM, "ranks: no memory for %d messages", 2 * c->size);
}

static int gather(cq_comm *c, cq_collective kind, void *all, const void *mine,
                  const int64_t *bytes) {
    cq_message *list;
    CQ_TRY(messages(&list, c));
    int64_t n = 0;
    char *at = all;
    for (int r = 0; r < c->size; at += bytes[r++]) {
        if (r == c->rank) {
            memmove(at, mine, (size_t)bytes[r]);
            continue;
        }
        list[n++] = (cq_message){r, false, at, bytes[r]};
        list[n++] = (cq_message){r, true, (void *)(size_t)mine, bytes[c->rank]};
    }
    int status = cq_comm_run(c, kind, list, n);
    free(list);
    return status;
}

int cq_comm_gather(cq_comm *c, void *all, const void *mine, const int64_t *bytes) {
    return gather(c, CQ_COMM_GATHER, all, mine, bytes);
}

/* The ranks' `bytes` bytes each, one after another, in new memory. */
static int gather_equal(cq_comm *c, cq_collective kind, void **all, const void *mine,
                        int64_t bytes) {
    int64_t *each = calloc((size_t)c->size, sizeof *each);
    *all = calloc((size_t)c->size, (size_t)bytes + 1);
    int status = each && *all ? CQ_OK : cq_fail(CQ_ENOMEM, "ranks: no memory to gather");
    for (int r = 0; r < c->size && !status; r++)
        each[r] = bytes;
    if (!status)
        status = gather(c, kind, *all, mine, each);
    free(each);
    return status;
}

int cq_comm_barrier(cq_comm *c) {
    void *all;
    char here = 1;
    int status = gather_equal(c, CQ_COMM_BARRIER, &all, &here, 1);
    free(all);
    return status;
}

int cq_comm_broadcast(cq_comm *c, void *data, int64_t bytes, int root) {
    cq_message *list;
    CQ_TRY(messages(&list, c));
    int64_t n = 0;
    for (int r = 0; r < c->size; r++)
        if (r != c->rank && (r == root || c->rank == root))
            list[n++] = (cq_message){r, c->rank == root, data, bytes};
    int status = cq_comm_run(c, CQ_COMM_BROADCAST, list, n);
    free(list);
    return status;
}

static void add_double(void *x, const void *y, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        ((double *)x)[i] += ((const double *)y)[i];
}
static void add_int(void *x, const void *y, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        ((int64_t *)x)[i] += ((const int64_t *)y)[i];
}

/* x, n numbers of 8 bytes, becomes the sum of the ranks'. */
static int sum(cq_comm *c, void *x, int64_t n, void (*add)(void *, const void *, int64_t)) {
    void *all;
    int64_t bytes = 8 * n;
    int status = gather_equal(c, CQ_COMM_SUM, &all, x, bytes);
    if (!status)
        memcpy(x, all, (size_t)bytes);
    for (int r = 1; r < c->size && !status; r++)
        add(x, (const char *)all + r * bytes, n);
    free(all);
    return status;
}
int cq_comm_sum(cq_comm *c, double *x, int64_t n) { return sum(c, x, n, add_double); }
int cq_comm_sum_int(cq_comm *c, int64_t *x, int64_t n) { return sum(c, x, n, add_int); }

int cq_comm_exchange(cq_comm *c, void *in, const int64_t *in_bytes, const void *out,
                     const int64_t *out_bytes) {
    cq_message *list;
    CQ_TRY(messages(&list, c));
    int64_t n = 0;
    char *to = in;
    const char *from = out;
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank)
            memmove(to, from, (size_t)in_bytes[r]);
        else {
            list[n++] = (cq_message){r, false, to, in_bytes[r]};
            list[n++] = (cq_message){r, true, (void *)(size_t)from, out_bytes[r]};
        }
        to += in_bytes[r];
        from += out_bytes[r];
    }
    int status = cq_comm_run(c, CQ_COMM_EXCHANGE, list, n);
    free(list);
    return status;
}

int cq_comm_agree(cq_comm *c, const char *subject, const char *text) {
    enum { HEX = 65 };
    cq_sha256 sha;
    char hex[HEX];
    void *all;
    cq_sha256_init(&sha);
    cq_sha256_add(&sha, text, strlen(text));
    cq_sha256_hex(&sha, hex);
    c->about = subject;
    int status = gather_equal(c, CQ_COMM_GATHER, &all, hex, HEX);
    const char *each = all;
    for (int r = 1; r < c->size && !status; r++)
        if (memcmp(each, each + r * HEX, HEX))
            status = cq_fail(CQ_EMISMATCH,
                             "rank %d: %s is not that of rank 0, wanted the same on all %d ranks",
                             r, subject, c->size);
    free(all);
    return status;
}
