/// pieces.c - reduce-scatter and all-gather of many tensors, each owned by one rank.
///
/// All owners work at once: in each round every rank's next part, of at most 1 MiB, moves. A sum is
/// made on the host in rank order; what lies on a device is copied there and back.
#include "core/base/error.h"
#include "core/comm/comm_impl.h"
#include "core/tensor/device.h"
#include <stdlib.h>
#include <string.h>

enum { PART = 1 << 20 };

/* Bytes [begin, begin + bytes) of a piece; `piece` is NULL when its owner has no more. */
typedef struct part {
    const cq_piece *piece;
    int64_t begin, bytes;
} part;

typedef struct traffic {
    cq_comm *c;
    const cq_piece *piece;
    int64_t n;
    int64_t *at;  ///< [size] each owner's next piece
    part *next;   ///< [size] each owner's part of this round
    char *staged; ///< [size, PART] what leaves a device, by owner
    char *got;    ///< [size, PART] what has arrived, by sender
    char *sum;    ///< [PART]
    cq_message *message;
    int64_t n_messages;
} traffic;

static void close_traffic(traffic *t) {
    free(t->at);
    free(t->next);
    free(t->message);
    free(t->staged);
    free(t->got);
    free(t->sum);
}

static int open_traffic(traffic *t, cq_comm *c, const cq_piece *piece, int64_t n) {
    size_t size = (size_t)c->size;
    *t = (traffic){.c = c, .piece = piece, .n = n};
    t->at = calloc(size, sizeof *t->at);
    t->next = calloc(size, sizeof *t->next);
    t->message = calloc(2 * size, sizeof *t->message);
    t->staged = malloc(size * PART);
    t->got = malloc(size * PART);
    t->sum = malloc(PART);
    if (t->at && t->next && t->message && t->staged && t->got && t->sum)
        return CQ_OK;
    close_traffic(t);
    return cq_fail(CQ_ENOMEM, "ranks: no memory for parts of %d ranks", c->size);
}

static char *of(char *rooms, int rank) { return rooms + (size_t)rank * PART; }

/* Moves every owner on to its next part; false when none has one. */
static bool next_round(traffic *t) {
    bool any = false;
    for (int o = 0; o < t->c->size; o++) {
        part *p = &t->next[o];
        int64_t end = p->begin + p->bytes;
        if (p->piece && end == cq_tensor_bytes(p->piece->mine)) {
            t->at[o]++;
            end = 0;
        }
        while (t->at[o] < t->n &&
               (t->piece[t->at[o]].owner != o || !cq_tensor_bytes(t->piece[t->at[o]].mine)))
            t->at[o]++;
        *p = (part){0};
        if (t->at[o] == t->n)
            continue;
        int64_t left = cq_tensor_bytes(t->piece[t->at[o]].mine) - end;
        *p = (part){&t->piece[t->at[o]], end, left < PART ? left : PART};
        any = true;
    }
    t->n_messages = 0;
    return any;
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

/* sum += what the ranks have of this rank's own part, in their order. */
static int sum_part(traffic *t, const part *p, int ranks) {
    char *sum = (char *)p->piece->sum.data + p->begin, *total = sum, *own;
    if (cq_on_device(sum)) {
        CQ_TRY(cq_copy(t->sum, sum, p->bytes));
        total = t->sum;
    }
    CQ_TRY(on_host(&own, of(t->staged, t->c->rank), p));
    for (int r = 0; r < ranks; r++)
        add(total, r == t->c->rank ? own : of(t->got, r), p->bytes, p->piece->mine.dtype);
    return total == sum ? CQ_OK : cq_copy(sum, total, p->bytes);
}

static int scatter_round(traffic *t, int ranks) {
    int me = t->c->rank;
    for (int o = 0; o < t->c->size; o++) {
        const part *p = &t->next[o];
        char *data;
        if (!p->piece || o == me || me >= ranks)
            continue;
        CQ_TRY(on_host(&data, of(t->staged, o), p));
        post(t, o, true, data, p->bytes);
    }
    const part *own = &t->next[me];
    for (int r = 0; r < ranks && own->piece; r++)
        if (r != me)
            post(t, r, false, of(t->got, r), own->bytes);
    CQ_TRY(run(t, CQ_COMM_SCATTER));
    return own->piece ? sum_part(t, own, ranks) : CQ_OK;
}

static int spread_round(traffic *t) {
    int me = t->c->rank;
    char *data;
    for (int o = 0; o < t->c->size; o++) {
        const part *p = &t->next[o];
        if (!p->piece || o == me)
            continue;
        data = (char *)p->piece->mine.data + p->begin;
        post(t, o, false, cq_on_device(data) ? of(t->got, o) : data, p->bytes);
    }
    if (t->next[me].piece) {
        CQ_TRY(on_host(&data, of(t->staged, me), &t->next[me]));
        for (int r = 0; r < t->c->size; r++)
            if (r != me)
                post(t, r, true, data, t->next[me].bytes);
    }
    CQ_TRY(run(t, CQ_COMM_GATHER));
    for (int o = 0; o < t->c->size; o++) {
        const part *p = &t->next[o];
        data = p->piece ? (char *)p->piece->mine.data + p->begin : NULL;
        if (data && o != me && cq_on_device(data))
            CQ_TRY(cq_copy(data, of(t->got, o), p->bytes));
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
