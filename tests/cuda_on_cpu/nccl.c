/* nccl.c - NCCL between processes of one machine, over Unix sockets, for tests.

   Everything happens while the caller polls, as core/comm/nccl.c does: connecting in
   ncclCommGetAsyncError, moving bytes in cudaStreamQuery. What NCCL asks of its callers is checked:
   a call while another one is in progress, a message outside a group, host memory, sizes that
   differ between sender and receiver, cudaErrorNotReady left for the next kernel to report, two
   ranks on one device without NCCL_MULTI_RANK_GPU_ENABLE=1.

   CKAQAD_NCCL_FAULT=RANK:GROUP:KIND makes one rank fail in its GROUP-th transfer, or, 0, while it
   connects.

     system   an asynchronous ncclSystemError
     call     ncclSend returns an error
     die      the process is killed with half of its bytes moved
     stop     it is stopped there
     hang     nothing moves any more */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/cuda_on_cpu/memory.h"
#include "tests/cuda_on_cpu/nccl.h"

enum { MOST_RANKS = 64, POLLS = 3 };

typedef struct hello {
    int rank, device;
} hello;

typedef struct message {
    bool send;
    int peer;
    char *data;
    size_t bytes, at; ///< at: bytes moved, the size in front of them counted in
    size_t front;     ///< the size as the sender tells it
} message;

enum phase { CONNECTING, READY, LAUNCHING, MOVING, FINALIZING, FINAL };

struct ncclComm {
    int rank, size;
    char id[32];
    enum phase phase;
    int polls; ///< how long a call stays in progress
    ncclResult_t error;
    char last[128];
    int listener, unknown[MOST_RANKS], n_unknown; ///< connections that have not said who they are
    int socket[MOST_RANKS];
    int device[MOST_RANKS]; ///< -1: not heard of
    message *list;
    size_t n, room, moved, total;
    int groups;
};

static ncclComm_t current; ///< the one that the stream works for
static int depth;          ///< of groups
static cudaError_t last_error;

static ncclResult_t note(ncclComm_t c, ncclResult_t e, const char *what, int peer) {
    snprintf(c->last, sizeof c->last, what, peer);
    c->error = e;
    return e;
}

/* Whether a fault of this kind is asked for here and now. */
static bool fault(const ncclComm_t c, const char *kind) {
    int rank, group;
    char wanted[16];
    const char *text = getenv("CKAQAD_NCCL_FAULT");
    return text && sscanf(text, "%d:%d:%15s", &rank, &group, wanted) == 3 && rank == c->rank &&
           group == c->groups && !strcmp(kind, wanted);
}

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t e) {
    static const char *const text[] = {"no error",
                                       "unhandled cuda error",
                                       "unhandled system error",
                                       "internal error",
                                       "invalid argument",
                                       "invalid usage",
                                       "remote process exited or there was a network error",
                                       "operation in progress"};
    return text[e];
}

const char *ncclGetLastError(ncclComm_t c) { return c->last; }

const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : "device not ready";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    unsigned long x = 0;
    memset(id, 0, sizeof *id);
    if (getrandom(&x, sizeof x, 0) != sizeof x)
        return ncclSystemError;
    snprintf(id->internal, sizeof id->internal, "%lx", x);
    return ncclSuccess;
}

/* The abstract address where a rank listens. */
static socklen_t address(struct sockaddr_un *out, const ncclComm_t c, int rank) {
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    int n = snprintf(out->sun_path + 1, sizeof out->sun_path - 1, "nccl-%s-%d", c->id, rank);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

static int new_socket(void) {
    return socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    struct sockaddr_un at;
    ncclComm_t c = calloc(1, sizeof *c);
    if (!c)
        return ncclSystemError;
    *out = current = c;
    if (size > MOST_RANKS || config->magic != 0xcafebeef || config->blocking != 0)
        return note(c, ncclInvalidArgument, "wanted a non-blocking communicator", 0);
    c->rank = rank;
    c->size = size;
    snprintf(c->id, sizeof c->id, "%.31s", id.internal);
    for (int r = 0; r < size; r++)
        c->socket[r] = c->device[r] = -1;
    c->device[rank] = cq_emu_device();
    c->listener = new_socket();
    if (bind(c->listener, (struct sockaddr *)&at, address(&at, c, rank)) ||
        listen(c->listener, MOST_RANKS))
        return note(c, ncclSystemError, "bind failed", 0);
    return ncclInProgress;
}

static void greet(ncclComm_t c, int peer) {
    hello mine = {c->rank, c->device[c->rank]};
    if (send(c->socket[peer], &mine, sizeof mine, MSG_NOSIGNAL) != sizeof mine)
        note(c, ncclRemoteError, "rank %d does not answer", peer);
}

/* Reads who is at the other end, when that has arrived. */
static bool hear(ncclComm_t c, int fd, hello *who) {
    ssize_t n = recv(fd, who, sizeof *who, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        note(c, ncclRemoteError, "connection closed by a rank", 0);
    return n == sizeof *who;
}

static void connect_to(ncclComm_t c, int peer) {
    struct sockaddr_un at;
    int fd = new_socket();
    if (connect(fd, (struct sockaddr *)&at, address(&at, c, peer))) {
        close(fd); /* it does not listen yet */
        return;
    }
    c->socket[peer] = fd;
    greet(c, peer);
}

static void accept_one(ncclComm_t c) {
    int fd = accept4(c->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0)
        c->unknown[c->n_unknown++] = fd;
    for (int i = 0; i < c->n_unknown; i++) {
        hello who;
        if (!hear(c, c->unknown[i], &who))
            continue;
        c->socket[who.rank] = c->unknown[i];
        c->device[who.rank] = who.device;
        c->unknown[i--] = c->unknown[--c->n_unknown];
        greet(c, who.rank);
    }
}

static void check_devices(ncclComm_t c) {
    const char *shared = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    for (int r = 0; r < c->size; r++)
        if (r != c->rank && c->device[r] == c->device[c->rank] && !(shared && *shared == '1'))
            note(c, ncclInvalidUsage, "Duplicate GPU detected: rank %d has the same", r);
}

static void connect_all(ncclComm_t c) {
    bool all = true;
    if (fault(c, "system"))
        note(c, ncclSystemError, "no socket", 0);
    if (fault(c, "die"))
        raise(SIGKILL);
    accept_one(c);
    for (int r = 0; r < c->size && !c->error; r++) {
        hello who;
        if (r < c->rank && c->socket[r] < 0)
            connect_to(c, r);
        if (r < c->rank && c->socket[r] >= 0 && c->device[r] < 0 && hear(c, c->socket[r], &who))
            c->device[r] = who.device;
        all = all && c->device[r] >= 0;
    }
    if (!all || fault(c, "hang"))
        return;
    check_devices(c);
    c->phase = READY;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state) {
    if (c->phase == CONNECTING && !c->error)
        connect_all(c);
    else if (c->phase == LAUNCHING && c->polls-- <= 0)
        c->phase = MOVING;
    else if (c->phase == FINALIZING && c->polls-- <= 0)
        c->phase = FINAL;
    bool busy = c->phase == CONNECTING || c->phase == LAUNCHING || c->phase == FINALIZING;
    *state = c->error ? c->error : busy ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}

static void free_comm(ncclComm_t c) {
    for (int r = 0; r < c->size; r++)
        if (c->socket[r] >= 0)
            close(c->socket[r]);
    for (int i = 0; i < c->n_unknown; i++)
        close(c->unknown[i]);
    close(c->listener);
    free(c->list);
    if (current == c)
        current = NULL;
    free(c);
}

ncclResult_t ncclCommFinalize(ncclComm_t c) {
    if (c->phase != READY)
        return note(c, ncclInvalidUsage, "finalized while something is in progress", 0);
    c->phase = FINALIZING;
    c->polls = POLLS;
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t c) {
    ncclResult_t e = c->phase == FINAL ? ncclSuccess : ncclInvalidUsage;
    free_comm(c);
    return e;
}

ncclResult_t ncclCommAbort(ncclComm_t c) {
    free_comm(c);
    depth = 0;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void) {
    if (!current || current->phase != READY)
        return ncclInvalidUsage;
    depth++;
    return ncclSuccess;
}

static ncclResult_t add(ncclComm_t c, message m) {
    int64_t left = 0;
    if (depth != 1 || c->phase != READY)
        return note(c, ncclInvalidUsage, "a message outside a group", 0);
    if (m.peer < 0 || m.peer >= c->size || (m.peer != c->rank && c->socket[m.peer] < 0))
        return note(c, ncclInvalidArgument, "rank %d does not exist", m.peer);
    if (!cq_emu_memory_has(m.data, &left) || left < (int64_t)m.bytes)
        return note(c, ncclInvalidArgument, "not device memory; peer %d", m.peer);
    if (c->n == c->room) {
        c->room = 2 * c->room + 16;
        c->list = realloc(c->list, c->room * sizeof *c->list);
        if (!c->list)
            abort();
    }
    c->list[c->n++] = m;
    c->total += m.bytes;
    return ncclSuccess;
}

ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t queue) {
    (void)type, (void)queue;
    c->groups++;
    bool fails = fault(c, "call");
    c->groups--;
    if (fails)
        return note(c, ncclInvalidArgument, "an injected fault", 0);
    return add(c, (message){true, peer, (char *)(size_t)from, n, 0, n});
}

ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t queue) {
    (void)type, (void)queue;
    return add(c, (message){false, peer, to, n, 0, 0});
}

/* Messages of this rank to itself: the k-th sent is the k-th received. */
static void move_own(ncclComm_t c) {
    size_t j = 0;
    for (size_t i = 0; i < c->n; i++) {
        message *from = &c->list[i];
        if (!from->send || from->peer != c->rank)
            continue;
        while (j < c->n && (c->list[j].send || c->list[j].peer != c->rank))
            j++;
        if (j == c->n || c->list[j].bytes != from->bytes) {
            note(c, ncclInvalidUsage, "sent to rank %d itself and not received", c->rank);
            return;
        }
        memcpy(c->list[j].data, from->data, from->bytes);
        from->at = c->list[j++].at = from->bytes + sizeof from->front;
    }
}

ncclResult_t ncclGroupEnd(void) {
    ncclComm_t c = current;
    if (depth != 1)
        return ncclInvalidUsage;
    depth = 0;
    c->groups++;
    c->moved = 0;
    c->phase = LAUNCHING;
    c->polls = POLLS;
    if (fault(c, "system"))
        note(c, ncclSystemError, "an injected fault", 0);
    cq_emu_memory_unlock();
    move_own(c);
    cq_emu_memory_lock();
    return ncclInProgress;
}

/* Moves a message on; false when no more goes now. */
static bool move_on(ncclComm_t c, message *m) {
    enum { FRONT = sizeof m->front };
    bool front = m->at < FRONT;
    char *at = front ? (char *)&m->front + m->at : m->data + (m->at - FRONT);
    size_t left = front ? FRONT - m->at : m->bytes + FRONT - m->at;
    ssize_t n = m->send ? send(c->socket[m->peer], at, left, MSG_NOSIGNAL)
                        : recv(c->socket[m->peer], at, left, 0);
    if (n < 0 && errno == EAGAIN)
        return false;
    if (n <= 0) {
        note(c, ncclRemoteError, "connection closed by rank %d", m->peer);
        return false;
    }
    m->at += (size_t)n;
    c->moved += front ? 0 : (size_t)n;
    if (!m->send && m->at == FRONT && m->front != m->bytes)
        note(c, ncclInvalidUsage, "rank %d sends another size than is received", m->peer);
    if (2 * c->moved >= c->total && (fault(c, "die") || fault(c, "stop")))
        raise(fault(c, "die") ? SIGKILL : SIGSTOP);
    return true;
}

/* Every pair's messages of one direction in their order. True when all have arrived. */
static bool move_all(ncclComm_t c) {
    bool done = true;
    for (int way = 0; way < 2; way++) {
        bool blocked[MOST_RANKS] = {false};
        for (size_t i = 0; i < c->n && !c->error; i++) {
            message *m = &c->list[i];
            if (m->send != (way == 0) || m->at == m->bytes + sizeof m->front)
                continue;
            while (!blocked[m->peer] && m->at < m->bytes + sizeof m->front && !c->error)
                blocked[m->peer] = !move_on(c, m);
            done = done && m->at == m->bytes + sizeof m->front;
        }
    }
    return done && !c->error;
}

/* Whether a socket is ready for anything: opening the device's memory is slow. */
static bool any_ready(const ncclComm_t c) {
    struct pollfd fds[MOST_RANKS];
    for (int r = 0; r < c->size; r++)
        fds[r] = (struct pollfd){c->socket[r], 0, 0};
    for (size_t i = 0; i < c->n; i++)
        if (c->list[i].at < c->list[i].bytes + sizeof c->list[i].front)
            fds[c->list[i].peer].events |= c->list[i].send ? POLLOUT : POLLIN;
    bool waits = false;
    for (int r = 0; r < c->size; r++) {
        waits = waits || fds[r].events;
        if (!fds[r].events)
            fds[r].fd = -1;
    }
    return !waits || poll(fds, (nfds_t)c->size, 0) > 0;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}

static cudaError_t query(ncclComm_t c) {
    if (!c || c->phase == READY)
        return cudaSuccess;
    if (c->phase != MOVING || c->error || fault(c, "hang") || !any_ready(c))
        return cudaErrorNotReady;
    cq_emu_memory_unlock();
    bool done = move_all(c);
    cq_emu_memory_lock();
    if (!done)
        return cudaErrorNotReady;
    c->phase = READY;
    c->n = c->total = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t queue) {
    (void)queue;
    if (last_error)
        cq_emu_note("the device was not ready, and that error is still there");
    return last_error = query(current);
}
