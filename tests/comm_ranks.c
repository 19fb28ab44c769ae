/// comm_ranks.c - every collective, checked on each rank; run under mpirun by ctest (and alone: one
/// rank).
#include "core/ckaqad.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            failures++;                                                                            \
            fprintf(stderr, "rank %d: line %d: %s (%s)\n", rank, __LINE__, #what, cq_error());     \
        }                                                                                          \
    } while (0)

/* A value that every rank can compute for every rank, and that no two share. */
static float value_of(int r, int64_t i) {
    return (float)(r + 1) * 1e-3f + (float)i * 0.37f * (float)(r % 2 ? -1 : 1);
}

static void small(cq_comm *c, int rank, int size) {
    double x[2] = {1.0 / (rank + 1), rank};
    double want[2] = {1.0, 0};
    for (int r = 1; r < size; r++)
        want[0] += 1.0 / (r + 1), want[1] += r;
    CHECK(!cq_comm_sum(c, x, 2));
    CHECK(!memcmp(x, want, sizeof x));
    int64_t n = 1L << (2 * rank);
    CHECK(!cq_comm_sum_int(c, &n, 1));
    CHECK(n == ((1L << (2 * size)) - 1) / 3);
    char word[16] = "none";
    if (rank == size - 1)
        strcpy(word, "last");
    CHECK(!cq_comm_broadcast(c, word, sizeof word, size - 1));
    CHECK(!strcmp(word, "last"));
    CHECK(!cq_comm_barrier(c));
    CHECK(!cq_comm_agree(c, "word", word));
    if (size == 1)
        return;
    CHECK(cq_comm_agree(c, "rank", rank == 1 ? "one" : "other") == CQ_EMISMATCH);
    CHECK(!strncmp(cq_error(), "rank 1: rank is not that of rank 0", 34));
}

/* Rank r gives r + 1 bytes to all, and 3 r + q + 1 bytes to rank q. */
static void uneven(cq_comm *c, int rank, int size) {
    int64_t bytes[64] = {0}, in[64] = {0}, out[64] = {0};
    char all[4096], mine[4096], sent[4096];
    for (int r = 0; r < size; r++) {
        bytes[r] = r + 1;
        in[r] = 3 * r + rank + 1;
        out[r] = 3 * rank + r + 1;
    }
    memset(mine, 'a' + rank, sizeof mine);
    CHECK(!cq_comm_gather(c, all, mine, bytes));
    int64_t at = 0;
    for (int r = 0; r < size; r++)
        for (int k = 0; k <= r; k++)
            CHECK(all[at++] == 'a' + r);
    at = 0;
    for (int r = 0; r < size; r++)
        for (int64_t k = 0; k < out[r]; k++)
            sent[at++] = (char)('a' + rank * size + r);
    CHECK(!cq_comm_exchange(c, all, in, sent, out));
    at = 0;
    for (int r = 0; r < size; r++)
        for (int64_t k = 0; k < in[r]; k++)
            CHECK(all[at++] == (char)('a' + r * size + rank));
}

/* Pieces of several parts (1 MiB), of one element and of none, dealt out over the ranks. */
static void pieces(cq_comm *c, int rank, int size) {
    enum { N = 7 };
    static const int64_t elems[N] = {5, 600000, 1, 0, 262144, 300001, 17};
    cq_piece p[N];
    for (int k = 0; k < N; k++) {
        float *mine = malloc((size_t)elems[k] * 4 + 4), *sum = malloc((size_t)elems[k] * 4 + 4);
        for (int64_t i = 0; i < elems[k]; i++)
            mine[i] = value_of(rank, i + k), sum[i] = 0.25f;
        p[k] = (cq_piece){
            k % size, {mine, CQ_SHAPE1(elems[k]), CQ_F32}, {sum, CQ_SHAPE1(elems[k]), CQ_F32}};
    }
    int64_t before = cq_comm_bytes(c, CQ_COMM_SCATTER), total = 0, owned = 0, wrong = 0;
    int ranks = size > 2 ? size - 1 : size;
    CHECK(!cq_comm_scatter(c, p, N, ranks));
    for (int k = 0; k < N; k++) {
        total += 4 * elems[k];
        owned += p[k].owner == rank ? 4 * elems[k] : 0;
        for (int64_t i = 0; i < elems[k]; i++) {
            float want = 0.25f;
            for (int r = 0; r < ranks && p[k].owner == rank; r++)
                want += value_of(r, i + k);
            wrong += want != ((float *)p[k].sum.data)[i];
        }
    }
    CHECK(wrong == 0);
    CHECK(cq_comm_bytes(c, CQ_COMM_SCATTER) - before == (rank < ranks ? total - owned : 0));
    before = cq_comm_bytes(c, CQ_COMM_GATHER);
    CHECK(!cq_comm_spread(c, p, N));
    for (int k = 0; k < N; k++) {
        for (int64_t i = 0; i < elems[k]; i++)
            wrong += ((float *)p[k].mine.data)[i] != value_of(p[k].owner, i + k);
        free(p[k].mine.data);
        free(p[k].sum.data);
    }
    CHECK(wrong == 0);
    CHECK(cq_comm_bytes(c, CQ_COMM_GATHER) - before == (size - 1) * owned);
}

int main(void) {
    cq_launch launch;
    cq_comm *c;
    if (cq_launch_find(&launch, "comm_ranks") || cq_comm_open(&c, &launch, 30)) {
        fprintf(stderr, "%s\n", cq_error());
        return 1;
    }
    int rank = cq_comm_rank(c), size = cq_comm_size(c);
    small(c, rank, size);
    uneven(c, rank, size);
    pieces(c, rank, size);
    cq_comm_close(c);
    return failures > 0;
}
