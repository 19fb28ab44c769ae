/// taps.c - which rows of a block's output are compared, and their Gram.
#include "core/train/taps.h"
#include "core/base/error.h"
#include "core/base/rng.h"

int64_t cq_tap_candidates(int32_t *rows, const cq_batch *b) {
    int64_t n = 0;
    for (int64_t i = 0; i < b->tokens; i++)
        if (b->labels[i] >= 0 && b->positions[i] > 0)
            rows[n++] = (int32_t)i;
    return n;
}

int64_t cq_tap_sample(int32_t *rows, const cq_batch *b, int64_t most, uint64_t seed, int64_t step,
                      int64_t micro) {
    int32_t *candidate = rows + b->tokens;
    int64_t found = cq_tap_candidates(candidate, b), n = found < most ? found : most;
    cq_random_sample(rows, n, found, seed, ((uint64_t)step << 24) + (uint64_t)micro);
    for (int64_t i = 0; i < n; i++)
        rows[i] = candidate[rows[i]];
    return n;
}

int64_t cq_tap_groups(int64_t found, int64_t most) { return (found + most - 1) / most; }

int64_t cq_tap_group_begin(int64_t found, int64_t most, int64_t group) {
    int64_t groups = cq_tap_groups(found, most);
    return groups ? found * group / groups : 0;
}

int cq_tap_gram(cq_stream *s, cq_dtype dtype, const void *h, int64_t dim, const int32_t *rows,
                int64_t n, bool unbiased, void *xs, void *centred, void *gram) {
    CQ_TRY(CQ_RUN(s, gather_rows, .dtype = dtype, .rows = n, .dim = dim, .x = h, .index = rows,
                  .y = xs));
    return CQ_RUN(s, gram, .dtype = dtype, .n = n, .dim = dim, .x = xs, .unbiased = unbiased,
                  .scratch = centred, .gram = gram);
}
