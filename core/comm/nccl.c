/// nccl.c - messages between devices, through NCCL.
///
/// The sends and receives of one transfer are one group on the rank's stream. Sums are not NCCL's,
/// whose order depends on the number of ranks and on how they are connected: pieces.c adds up in
/// rank order. The communicator is non-blocking: calls return at once and are polled, with the same
/// eye on the other ranks as in mpi.c. When one of them is gone, or NCCL hangs, the communicator is
/// aborted, which ends kernels that wait. The id goes from rank 0 to all over MPI. One thread
/// calls.
#include "core/base/error.h"
#include "core/comm/comm_impl.h"
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct joined {
    cq_comm *c;
    ncclComm_t comm; ///< NULL once it is aborted
    cudaStream_t queue;
} joined;

static void rest(long nanoseconds) { nanosleep(&(struct timespec){.tv_nsec = nanoseconds}, NULL); }

static void abort_joined(joined *x) {
    if (x->comm)
        ncclCommAbort(x->comm);
    x->comm = NULL;
}

/* "rank 1: ncclGroupEnd returned 6 (remote error: ...)". A rank that is gone breaks NCCL's
 * connections before it is missed; so the watch gets a second to name it. */
static int broken(joined *x, const char *call, int code, const char *meaning, const char *detail) {
    enum { TRIES = 100, PAUSE = 10000000 };
    const cq_comm *c = x->c;
    char last[160];
    snprintf(last, sizeof last, "%s%s", detail && *detail ? ": " : "", detail ? detail : "");
    last[strcspn(last, "\n")] = 0;
    for (int i = 0; c->size > 1 && i < TRIES && !cq_comm_look(c); i++)
        rest(PAUSE);
    abort_joined(x);
    if (cq_comm_look(c))
        return cq_comm_give_up(x->c);
    return cq_fail(CQ_EIO, "rank %d: %s returned %d (%s%s); last collective: %s %ld (%s)", c->rank,
                   call, code, meaning, last, cq_collective_name(c->kind), (long)c->calls[c->kind],
                   c->about ? c->about : "start");
}

static int failed(joined *x, const char *call, ncclResult_t e) {
    return broken(x, call, (int)e, ncclGetErrorString(e), x->comm ? ncclGetLastError(x->comm) : "");
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* All ranks have come here, so NCCL itself hangs: a connection that is lost in silence, no
 * resources for many ranks on one GPU. */
static int hangs(joined *x, const char *call, double seconds) {
    char detail[64];
    snprintf(detail, sizeof detail, "not done after %.0f s", seconds);
    return broken(x, call, ncclInProgress, ncclGetErrorString(ncclInProgress), detail);
}

static bool accepted(ncclResult_t e) { return e == ncclSuccess || e == ncclInProgress; }

/* Until the communicator has done what `call` began and, where asked, the stream all that it was
 * given; or something has happened to another rank. */
static int settle(joined *x, const char *call, ncclResult_t e, bool stream) {
    enum { SPINS = 100, SHORT_PAUSES = 1000, LONGER = 10 };
    double begun = now(), limit = x->c->patience + LONGER; /* who is silent is missed before */
    if (!accepted(e))
        return failed(x, call, e);
    for (int tries = 0;; tries++) {
        ncclResult_t state;
        if ((e = ncclCommGetAsyncError(x->comm, &state)) != ncclSuccess)
            return failed(x, "ncclCommGetAsyncError", e);
        if (!accepted(state))
            return failed(x, call, state);
        if (state == ncclSuccess) {
            cudaError_t done = stream ? cudaStreamQuery(x->queue) : cudaSuccess;
            if (done == cudaSuccess)
                return CQ_OK;
            if (done != cudaErrorNotReady)
                return broken(x, "cudaStreamQuery", (int)done, cudaGetErrorString(done), call);
            cudaGetLastError(); /* not ready counts as one, and the next kernel would report it */
        }
        if (tries < SPINS)
            continue;
        if (cq_comm_look(x->c)) {
            abort_joined(x); /* before giving up: until then the watch can end this rank */
            return cq_comm_give_up(x->c);
        }
        if (now() - begun > limit)
            return hangs(x, call, limit);
        rest(tries < SHORT_PAUSES ? 20000 : 200000);
    }
}

static int make_id(joined *x, ncclUniqueId *id) {
    ncclResult_t e = x->c->rank == 0 ? ncclGetUniqueId(id) : ncclSuccess;
    if (e != ncclSuccess)
        return failed(x, "ncclGetUniqueId", e);
    cq_comm_about(x->c, "NCCL's id");
    return cq_comm_broadcast(x->c, id, sizeof *id, 0);
}

static int join(joined *x) {
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    CQ_TRY(make_id(x, &id));
    ncclResult_t e = ncclCommInitRankConfig(&x->comm, x->c->size, id, x->c->rank, &config);
    return settle(x, "ncclCommInitRankConfig", e, false);
}

static void close_joined(void *opened) {
    joined *x = opened;
    if (!x)
        return;
    if (x->comm && !settle(x, "ncclCommFinalize", ncclCommFinalize(x->comm), false))
        ncclCommDestroy(x->comm);
    free(x);
}

static int open_joined(void **out, cq_comm *c, const cq_stream *s) {
    joined *x = calloc(1, sizeof *x);
    if (!x)
        return cq_fail(CQ_ENOMEM, "ranks: no memory");
    *x = (joined){.c = c, .queue = s->queue};
    int status = join(x);
    if (status) {
        abort_joined(x);
        free(x);
    } else
        *out = x;
    return status;
}

static void name(char *text, size_t size) {
    int v = 0;
    if (ncclGetVersion(&v) != ncclSuccess)
        v = NCCL_VERSION_CODE;
    snprintf(text, size, "NCCL %d.%d.%d between devices", v / 10000, v / 100 % 100, v % 100);
}

static int transfer(void *opened, const cq_message *message, int64_t n) {
    joined *x = opened;
    ncclResult_t e = ncclGroupStart();
    if (e != ncclSuccess)
        return failed(x, "ncclGroupStart", e);
    for (int64_t i = 0; i < n; i++) {
        const cq_message *m = &message[i];
        size_t bytes = (size_t)m->bytes;
        e = m->send ? ncclSend(m->data, bytes, ncclUint8, m->peer, x->comm, x->queue)
                    : ncclRecv(m->data, bytes, ncclUint8, m->peer, x->comm, x->queue);
        if (!accepted(e))
            return failed(x, m->send ? "ncclSend" : "ncclRecv", e);
    }
    return settle(x, "ncclGroupEnd", ncclGroupEnd(), true);
}

const cq_transport cq_nccl = {open_joined, close_joined, name, transfer};
