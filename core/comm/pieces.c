/// pieces.c - reduce-scatter and all-gather of many tensors, each owned by one rank.
///
/// All owners work at once: in each round every rank's next parts, together 1 MiB, move. A sum is
/// made on the host in rank order; what lies on a device is copied there and back.
#include "core/base/error.h"
#include "core/comm/comm_impl.h"
#include "core/tensor/device.h"
#include <stdlib.h>
#include <string.h>

enum { ROOM = 1 << 20 };

/* Bytes [begin, begin + bytes) of a piece, at `room` of what its owner moves in this round. */
typedef struct part {
    const cq_piece *piece;
    int64_t begin, bytes, room;
} part;

typedef struct traffic {
    cq_comm *c;
    const cq_piece *piece;
    int64_t n;
    int64_t *at, *begin; ///< [size] each owner's next piece, and where to go on in it
    part *part;          ///< [n] of this round, owner by owner
    int64_t n_parts;
    char *staged;        ///< [size, ROOM] what leaves a device, by owner
    char *got;           ///< [size, ROOM] what has arrived, by sender
    char *sum;           ///< [ROOM]
    cq_message *message; ///< [n, size]
    int64_t n_messages;
} traffic;

static void close_traffic(traffic *t) {
    free(t->at);
    free(t->begin);
    free(t->part);
    free(t->message);
    free(t->staged);
    free(t->got);
    free(t->sum);
}

static int open_traffic(traffic *t, cq_comm *c, const cq_piece *piece, int64_t n) {
    size_t size = (size_t)c->size, most = (size_t)n + 1;
    *t = (traffic){.c = c, .piece = piece, .n = n};
    t->at = calloc(size, sizeof *t->at);
    t->begin = calloc(size, sizeof *t->begin);
    t->part = calloc(most, sizeof *t->part);
    t->message = calloc(most * size, sizeof *t->message);
    t->staged = malloc(size * ROOM);
    t->got = malloc(size * ROOM);
    t->sum = malloc(ROOM);
    if (t->at && t->begin && t->part && t->message && t->staged && t->got && t->sum)
        return CQ_OK;
    close_traffic(t);
    return cq_fail(CQ_ENOMEM, "ranks: no memory for parts of %d ranks", c->size);
}

static char *of(char *rooms, int rank, const part *p) {
    return rooms + (size_t)rank * ROOM + p->room;
}

/* An owner's next parts, as many as fit its room. */
static void take_parts(traffic *t, int owner) {
    int64_t room = 0, *at = &t->at[owner], *begin = &t->begin[owner];
    for (; *at < t->n && room < ROOM; room = (room + 7) / 8 * 8) {
        const cq_piece *p = &t->piece[*at];
        int64_t left = p->owner == owner ? cq_tensor_bytes(p->mine) - *begin : 0;
        int64_t bytes = left < ROOM - room ? left : ROOM - room;
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

static int run(traffic *t, cq_collective kind) {
    return cq_comm_run(t->c, kind, t->message, t->n_messages);
}

static void add(void *sum, const void *x, int64_t bytes, cq_dtype dtype) {
    double *s64 = sum;
    float *s32 = sum;
    for (int64_t i = 0; i < bytes / 8 && dtype == CQ_F64; i++)
        s64[i] += ((const double *)x)[i];
    for (int64_t i = 0; i < bytes / 4 && dtype == CQ_F32; i++)
        s32[i] += ((const float *)x)[i];
}

/* sum += what the ranks have of a part of this rank's, in their order. */
static int sum_part(traffic *t, const part *p, int ranks) {
    char *sum = (char *)p->piece->sum.data + p->begin, *total = sum, *own;
    if (cq_on_device(sum)) {
        CQ_TRY(cq_copy(t->sum, sum, p->bytes));
        total = t->sum;
    }
    CQ_TRY(on_host(&own, of(t->staged, t->c->rank, p), p));
    for (int r = 0; r < ranks; r++)
        add(total, r == t->c->rank ? own : of(t->got, r, p), p->bytes, p->piece->mine.dtype);
    return total == sum ? CQ_OK : cq_copy(sum, total, p->bytes);
}

static int scatter_round(traffic *t, int ranks) {
    int me = t->c->rank;
    for (int64_t i = 0; i < t->n_parts; i++) {
        const part *p = &t->part[i];
        int owner = p->piece->owner;
        char *data;
        for (int r = 0; r < ranks && owner == me; r++)
            if (r != me)
                post(t, r, false, of(t->got, r, p), p->bytes);
        if (owner == me || me >= ranks)
            continue;
        CQ_TRY(on_host(&data, of(t->staged, owner, p), p));
        post(t, owner, true, data, p->bytes);
    }
    CQ_TRY(run(t, CQ_COMM_SCATTER));
    for (int64_t i = 0; i < t->n_parts; i++)
        if (t->part[i].piece->owner == me)
            CQ_TRY(sum_part(t, &t->part[i], ranks));
    return CQ_OK;
}

static int spread_round(traffic *t) {
    int me = t->c->rank;
    for (int64_t i = 0; i < t->n_parts; i++) {
        const part *p = &t->part[i];
        int owner = p->piece->owner;
        char *data = (char *)p->piece->mine.data + p->begin;
        if (owner != me) {
            post(t, owner, false, cq_on_device(data) ? of(t->got, owner, p) : data, p->bytes);
            continue;
        }
        CQ_TRY(on_host(&data, of(t->staged, me, p), p));
        for (int r = 0; r < t->c->size; r++)
            if (r != me)
                post(t, r, true, data, p->bytes);
    }
    CQ_TRY(run(t, CQ_COMM_GATHER));
    for (int64_t i = 0; i < t->n_parts; i++) {
        const part *p = &t->part[i];
        char *data = (char *)p->piece->mine.data + p->begin;
        if (p->piece->owner != me && cq_on_device(data))
            CQ_TRY(cq_copy(data, of(t->got, p->piece->owner, p), p->bytes));
    }
    return CQ_OK;
}

int cq_comm_scatter(cq_comm *c, const cq_piece *piece, int64_t n, int ranks) {
    traffic t;
    CQ_TRY(open_traffic(&t, c, piece, n));
    int status = CQ_OK;
    while (!status && next_round(&t))
        status = scatter_round(&t, ranks);
    close_traffic(&t);
    return status;
}

int cq_comm_spread(cq_comm *c, const cq_piece *piece, int64_t n) {
    traffic t;
    int status = CQ_OK;
    if (c->size == 1)
        return CQ_OK;
    CQ_TRY(open_traffic(&t, c, piece, n));
    while (!status && next_round(&t))
        status = spread_round(&t);
    close_traffic(&t);
    return status;
}
