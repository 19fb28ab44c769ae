/// pieces.c - reduce-scatter and all-gather of many tensors, each owned by one rank.
///
/// All owners work at once: in each round every rank's next parts, as many as its room holds, move.
/// First what moves from device to device, where a transport is attached: the owner's device adds
/// up what has arrived. Then the rest, in rooms of 1 MiB: sums are made on the host, and what lies
/// on a device is copied there and back. Both add in rank order, one rounding an addition: the same
/// bits.
#include "core/base/error.h"
#include "core/comm/comm_impl.h"
#include "core/tensor/device.h"
#include <stdlib.h>
#include <string.h>

enum { ROOM = 1 << 20, ALIGN = 16 };

/* Bytes [begin, begin + bytes) of a piece, at `room` of what its owner moves in this round. */
typedef struct part {
    const cq_piece *piece;
    int64_t begin, bytes, room;
} part;

typedef struct traffic {
    cq_comm *c;
    const cq_piece *piece;
    int64_t n;
    cq_collective kind;
    bool device;         ///< moves what goes from device to device, else the rest
    int64_t room;        ///< bytes of an owner's parts in a round
    int64_t *at, *begin; ///< [size] each owner's next piece, and where to go on in it
    part *part;          ///< [n] of this round, owner by owner
    int64_t n_parts;
    char *staged;        ///< [size, room] what leaves a device, by owner
    char *got;           ///< [size, room] what has arrived, by sender; the device's, or the host's
    char *sum;           ///< [room]
    cq_message *message; ///< [n, size]
    int64_t n_messages;
} traffic;

static void close_traffic(traffic *t) {
    free(t->at);
    free(t->begin);
    free(t->part);
    free(t->message);
    free(t->staged);
    free(t->sum);
    if (!t->device)
        free(t->got);
}

static int open_traffic(traffic *t) {
    size_t size = (size_t)t->c->size, most = (size_t)t->n + 1;
    bool rooms = true;
    t->at = calloc(size, sizeof *t->at);
    t->begin = calloc(size, sizeof *t->begin);
    t->part = calloc(most, sizeof *t->part);
    t->message = calloc(most * size, sizeof *t->message);
    if (t->device) {
        t->room = t->c->room_bytes;
        t->got = t->c->room;
    } else {
        t->room = ROOM;
        t->staged = malloc(size * ROOM);
        t->got = malloc(size * ROOM);
        t->sum = malloc(ROOM);
        rooms = t->staged && t->got && t->sum;
    }
    if (t->at && t->begin && t->part && t->message && rooms)
        return CQ_OK;
    close_traffic(t);
    return cq_fail(CQ_ENOMEM, "ranks: no memory for parts of %d ranks", t->c->size);
}

static char *of(const traffic *t, char *rooms, int rank, const part *p) {
    return rooms + rank * t->room + p->room;
}

/* The kernels of devices know no F64. */
static bool from_device(const traffic *t, const cq_piece *p) {
    return t->c->by_device && (t->kind == CQ_COMM_GATHER || p->mine.dtype == CQ_F32) &&
           cq_on_device(p->mine.data) && !cq_on_host_of_device(p->mine.data);
}

/* An owner's next parts, as many as fit its room. */
static void take_parts(traffic *t, int owner) {
    int64_t room = 0, *at = &t->at[owner], *begin = &t->begin[owner];
    for (; *at < t->n && room < t->room; room = (room + ALIGN - 1) / ALIGN * ALIGN) {
        const cq_piece *p = &t->piece[*at];
        bool moves = p->owner == owner && from_device(t, p) == t->device;
        int64_t left = moves ? cq_tensor_bytes(p->mine) - *begin : 0;
        int64_t bytes = left < t->room - room ? left : t->room - room;
        if (bytes)
            t->part[t->n_parts++] = (part){p, *begin, bytes, room};
        *begin += bytes;
        room += bytes;
        if (bytes == left) {
            ++*at;
            *begin = 0;
        }
    }
}

/* Moves every owner on; false when none has anything left. */
static bool next_round(traffic *t) {
    t->n_parts = t->n_messages = 0;
    for (int o = 0; o < t->c->size; o++)
        take_parts(t, o);
    return t->n_parts > 0;
}

static void post(traffic *t, int peer, bool send, void *data, int64_t bytes) {
    t->message[t->n_messages++] = (cq_message){peer, send, data, bytes};
}

/* A part's bytes in host memory: where they are, or copied into `room`. */
static int on_host(char **out, char *room, const part *p) {
    char *data = (char *)p->piece->mine.data + p->begin;
    *out = data;
    if (!cq_on_device(data))
        return CQ_OK;
    *out = room;
    return cq_copy(room, data, p->bytes);
}

static int run(traffic *t) {
    return t->device ? cq_comm_run_device(t->c, t->kind, t->message, t->n_messages)
                     : cq_comm_run(t->c, t->kind, t->message, t->n_messages);
}

static void add(void *sum, const void *x, int64_t bytes, cq_dtype dtype) {
    double *s64 = sum;
    float *s32 = sum;
    for (int64_t i = 0; i < bytes / 8 && dtype == CQ_F64; i++)
        s64[i] += ((const double *)x)[i];
    for (int64_t i = 0; i < bytes / 4 && dtype == CQ_F32; i++)
        s32[i] += ((const float *)x)[i];
}

static int sum_on_device(traffic *t, const part *p, int ranks) {
    char *own = (char *)p->piece->mine.data + p->begin,
         *sum = (char *)p->piece->sum.data + p->begin;
    cq_stream *s = &t->c->stream;
    for (int r = 0; r < ranks; r++)
        CQ_TRY(CQ_RUN(s, axpy, .dtype = CQ_F32, .n = p->bytes / 4, .alpha = 1, .beta = 1,
                      .x = r == t->c->rank ? own : of(t, t->got, r, p), .y = sum));
    return CQ_OK;
}

/* sum += what the ranks have of a part of this rank's, in their order. */
static int sum_part(traffic *t, const part *p, int ranks) {
    char *sum = (char *)p->piece->sum.data + p->begin, *total = sum, *own;
    if (cq_on_device(sum)) {
        CQ_TRY(cq_copy(t->sum, sum, p->bytes));
        total = t->sum;
    }
    CQ_TRY(on_host(&own, of(t, t->staged, t->c->rank, p), p));
    for (int r = 0; r < ranks; r++)
        add(total, r == t->c->rank ? own : of(t, t->got, r, p), p->bytes, p->piece->mine.dtype);
    return total == sum ? CQ_OK : cq_copy(sum, total, p->bytes);
}

static int scatter_round(traffic *t, int ranks) {
    int me = t->c->rank;
    for (int64_t i = 0; i < t->n_parts; i++) {
        const part *p = &t->part[i];
        int owner = p->piece->owner;
        char *data = (char *)p->piece->mine.data + p->begin;
        for (int r = 0; r < ranks && owner == me; r++)
            if (r != me)
                post(t, r, false, of(t, t->got, r, p), p->bytes);
        if (owner == me || me >= ranks)
            continue;
        if (!t->device)
            CQ_TRY(on_host(&data, of(t, t->staged, owner, p), p));
        post(t, owner, true, data, p->bytes);
    }
    CQ_TRY(run(t));
    for (int64_t i = 0; i < t->n_parts; i++)
        if (t->part[i].piece->owner == me)
            CQ_TRY((t->device ? sum_on_device : sum_part)(t, &t->part[i], ranks));
    return CQ_OK;
}

static int spread_round(traffic *t, int ranks) {
    int me = t->c->rank;
    for (int64_t i = 0; i < t->n_parts; i++) {
        const part *p = &t->part[i];
        int owner = p->piece->owner;
        char *data = (char *)p->piece->mine.data + p->begin;
        bool staged = !t->device && cq_on_device(data);
        if (owner != me) {
            post(t, owner, false, staged ? of(t, t->got, owner, p) : data, p->bytes);
            continue;
        }
        if (staged)
            CQ_TRY(on_host(&data, of(t, t->staged, me, p), p));
        for (int r = 0; r < ranks; r++)
            if (r != me)
                post(t, r, true, data, p->bytes);
    }
    CQ_TRY(run(t));
    for (int64_t i = 0; i < t->n_parts && !t->device; i++) {
        const part *p = &t->part[i];
        char *data = (char *)p->piece->mine.data + p->begin;
        if (p->piece->owner != me && cq_on_device(data))
            CQ_TRY(cq_copy(data, of(t, t->got, p->piece->owner, p), p->bytes));
    }
    return CQ_OK;
}

/* All rounds of what goes from device to device, or of the rest. */
static int move(traffic t, int (*one_round)(traffic *, int), int ranks) {
    CQ_TRY(open_traffic(&t));
    bool more = next_round(&t);
    int status = CQ_OK;
    if (more && t.device && t.c->size > 1)
        status = cq_comm_barrier(t.c); /* a transfer that is late now is the transport's fault */
    for (; more && !status; more = next_round(&t))
        status = one_round(&t, ranks);
    close_traffic(&t);
    return !status && t.device ? cq_stream_wait(&t.c->stream) : status;
}

static int move_all(traffic t, int (*one_round)(traffic *, int), int ranks) {
    t.device = t.c->by_device;
    if (t.device)
        CQ_TRY(move(t, one_round, ranks));
    t.device = false;
    return move(t, one_round, ranks);
}

int cq_comm_scatter(cq_comm *c, const cq_piece *piece, int64_t n, int ranks) {
    return move_all((traffic){.c = c, .piece = piece, .n = n, .kind = CQ_COMM_SCATTER},
                    scatter_round, ranks);
}

int cq_comm_spread(cq_comm *c, const cq_piece *piece, int64_t n) {
    if (c->size == 1)
        return CQ_OK;
    return move_all((traffic){.c = c, .piece = piece, .n = n, .kind = CQ_COMM_GATHER}, spread_round,
                    c->size);
}
