/// device_ranks.c - pieces in device memory over many ranks: the bits and the bytes of the same
/// pieces in host memory. Run under mpirun, on GPUs (tests/gpu.sh) and on the emulated device
/// (ctest, tests/recipes/nccl.sh); alone, one rank sends to itself.
///
///   device_ranks [nccl | host]     what has to move the pieces
#include "core/ckaqad.h"
#include "core/comm/comm_impl.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 7 };
static const int64_t elems[N] = {5, 600000, 1, 0, 262144, 300001, 17};

static int failures;

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            failures++;                                                                            \
            fprintf(stderr, "rank %d: line %d: %s (%s)\n", cq_comm_rank(c), __LINE__, #what,       \
                    cq_error());                                                                   \
        }                                                                                          \
    } while (0)

/* Ends all ranks with one line, as the program does. */
static void end(cq_comm *c, int status) {
    const char *line = cq_comm_failed(c, cq_exit_code(status), cq_error());
    fprintf(stderr, "device_ranks: %s\n", line);
    cq_comm_abort(c, cq_exit_code(status));
    exit(cq_exit_code(status));
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_)                                                                               \
            end(c, status_);                                                                       \
    } while (0)

/* Sums of these depend on their order. */
static float value_of(int r, int64_t i) {
    return (float)(r + 1) * 1e-3f + (float)(i % 1000) * 0.37f * (float)(r % 2 ? -1 : 1);
}

typedef struct set {
    cq_piece piece[N];
} set;

static void *memory_of(cq_comm *c, const cq_stream *s, int64_t bytes) {
    void *p = NULL;
    if (!s->table->memory)
        return malloc((size_t)bytes);
    TRY(s->table->memory->take(&p, bytes, false));
    TRY(cq_region_add(p, bytes, s, false));
    return p;
}

static void give(const cq_stream *s, void *p, int64_t bytes) {
    if (!s->table->memory) {
        free(p);
        return;
    }
    cq_region_remove(p);
    s->table->memory->give(p, bytes, false);
}

/* What this rank has: mine = its values, sum = a quarter. */
static void fill(cq_comm *c, const cq_piece *p, int64_t shift) {
    int64_t n = cq_tensor_elems(p->mine);
    float *x = malloc((size_t)n * 8 + 8), *quarter = x + n;
    for (int64_t i = 0; i < n; i++)
        x[i] = value_of(cq_comm_rank(c), i + shift), quarter[i] = 0.25f;
    TRY(cq_copy(p->mine.data, x, 4 * n));
    TRY(cq_copy(p->sum.data, quarter, 4 * n));
    free(x);
}

static void make(set *x, cq_comm *c, const cq_stream *s) {
    for (int k = 0; k < N; k++) {
        cq_tensor t = {NULL, CQ_SHAPE1(elems[k]), CQ_F32};
        x->piece[k] = (cq_piece){k % cq_comm_size(c), t, t};
        x->piece[k].mine.data = memory_of(c, s, 4 * elems[k] + 4);
        x->piece[k].sum.data = memory_of(c, s, 4 * elems[k] + 4);
        fill(c, &x->piece[k], k);
    }
}

static void drop(set *x, const cq_stream *s) {
    for (int k = 0; k < N; k++) {
        give(s, x->piece[k].mine.data, 4 * elems[k] + 4);
        give(s, x->piece[k].sum.data, 4 * elems[k] + 4);
    }
}

static bool same(cq_comm *c, cq_tensor a, cq_tensor b) {
    cq_tensor x, y;
    void *owned[2];
    TRY(cq_tensor_on_host(&x, &owned[0], a));
    TRY(cq_tensor_on_host(&y, &owned[1], b));
    int64_t bytes = cq_tensor_bytes(a);
    bool equal = bytes == 0 || !memcmp(x.data, y.data, (size_t)bytes);
    free(owned[0]);
    free(owned[1]);
    return equal;
}

/* Both collectives on both sets: the same bits, and as many bytes sent. */
static void compare(cq_comm *c, set *host, set *device, int ranks) {
    int64_t sent[2][2];
    for (int k = 0; k < 2; k++) {
        const cq_piece *p = k ? device->piece : host->piece;
        for (int i = 0; i < N; i++)
            fill(c, &p[i], i);
        int64_t scattered = cq_comm_bytes(c, CQ_COMM_SCATTER), spread;
        TRY(cq_comm_scatter(c, p, N, ranks));
        sent[k][0] = cq_comm_bytes(c, CQ_COMM_SCATTER) - scattered;
        spread = cq_comm_bytes(c, CQ_COMM_GATHER);
        TRY(cq_comm_spread(c, p, N));
        sent[k][1] = cq_comm_bytes(c, CQ_COMM_GATHER) - spread;
    }
    CHECK(sent[0][0] == sent[1][0] && sent[0][1] == sent[1][1]);
    for (int i = 0; i < N; i++) {
        CHECK(same(c, host->piece[i].sum, device->piece[i].sum));
        CHECK(same(c, host->piece[i].mine, device->piece[i].mine));
    }
}

/* Both kinds in one list. */
static void mixed(cq_comm *c, set *host, set *device) {
    cq_piece p[2 * N];
    for (int i = 0; i < N; i++) {
        fill(c, &host->piece[i], i);
        fill(c, &device->piece[i], i);
        p[2 * i] = host->piece[i];
        p[2 * i + 1] = device->piece[i];
    }
    TRY(cq_comm_scatter(c, p, 2 * N, cq_comm_size(c)));
    for (int i = 0; i < N; i++)
        CHECK(same(c, p[2 * i].sum, p[2 * i + 1].sum));
}

/* What the emulation notices, and the line that tells it. */
static void mistakes(cq_comm *c, const cq_stream *s, const cq_piece *p) {
    char host[8];
    const cq_message list[3][2] = {{{0, true, host, 8}, {0, false, p->sum.data, 8}},
                                   {{0, true, p->mine.data, 8}, {0, false, p->sum.data, 4}},
                                   {{1, true, p->mine.data, 8}, {0, false, p->sum.data, 8}}};
    static const char *const line[] = {
        "rank 0: ncclSend returned 4 (invalid argument: not device memory; peer 0)",
        "rank 0: ncclGroupEnd returned 5 (invalid usage: sent to rank 0 itself and not received)",
        "rank 0: ncclSend returned 4 (invalid argument: rank 1 does not exist)"};
    for (int i = 0; i < 3; i++) {
        void *link = NULL;
        TRY(cq_nccl.open(&link, c, s));
        CHECK(cq_nccl.transfer(link, list[i], 2) == CQ_EIO);
        CHECK(!strncmp(cq_error(), line[i], strlen(line[i])));
        cq_nccl.close(link);
    }
}

/* One rank: the transport by itself, a message to this rank. */
static void alone(cq_comm *c, cq_stream *s) {
    enum { COUNT = 1 << 20 };
    cq_tensor t = {NULL, CQ_SHAPE1(COUNT), CQ_F32};
    cq_piece p = {0, t, t};
    void *link = NULL;
    p.mine.data = memory_of(c, s, 4 * COUNT);
    p.sum.data = memory_of(c, s, 4 * COUNT);
    fill(c, &p, 3);
    TRY(cq_nccl.open(&link, c, s));
    for (int i = 0; i < 3; i++) {
        cq_message m[2] = {{0, true, p.mine.data, 4 * COUNT}, {0, false, p.sum.data, 4 * COUNT}};
        TRY(cq_zero(p.sum.data, 4 * COUNT));
        TRY(cq_nccl.transfer(link, m, 2));
        CHECK(same(c, p.mine, p.sum));
    }
    cq_nccl.close(link);
    if (!strcmp(WAYS_TABLE, "cuda_on_cpu"))
        mistakes(c, s, &p);
    give(s, p.mine.data, 4 * COUNT);
    give(s, p.sum.data, 4 * COUNT);
}

/* A GPU for each rank of this machine, in turn where there are fewer. */
static void open_device(cq_comm *c, cq_stream *s) {
    int n = 0;
    TRY(cq_device_count(&n, WAYS_TABLE));
    TRY(cq_stream_open(s, WAYS_TABLE, cq_comm_local_rank(c) % n));
}

int main(int argc, char **argv) {
    cq_launch launch;
    cq_comm *c;
    cq_stream s = {.threads = 1}, host = {.threads = 1};
    const char *patience = getenv("PATIENCE");
    if (cq_launch_find(&launch, "device_ranks") ||
        cq_comm_open(&c, &launch, patience ? atof(patience) : 30)) {
        fprintf(stderr, "device_ranks: %s\n", cq_error());
        return 1;
    }
    int size = cq_comm_size(c);
    open_device(c, &s);
    TRY(cq_stream_open(&host, "ref", 0));
    TRY(cq_comm_attach(c, &s));
    if (cq_comm_rank(c) == 0)
        printf("%d ranks, %s\n", size, cq_comm_backend(c));
    if (argc > 1 && size > 1)
        CHECK((strstr(cq_comm_backend(c), "NCCL") != NULL) == !strcmp(argv[1], "nccl"));
    cq_comm_about(c, "pieces");
    set a, b;
    make(&a, c, &host);
    make(&b, c, &s);
    compare(c, &a, &b, size);
    if (size > 2)
        compare(c, &a, &b, size - 1);
    if (c->room)
        c->room_bytes = 1 << 20; /* many rounds */
    compare(c, &a, &b, size);
    mixed(c, &a, &b);
    if (size == 1 && argc > 1 && !strcmp(argv[1], "nccl"))
        alone(c, &s);
    TRY(cq_comm_barrier(c));
    drop(&a, &host);
    drop(&b, &s);
    cq_comm_close(c);
    return failures > 0;
}
