/* sequence.c - the scratch that attention and SSD of the cpu backend ask of the plan. */
#include "kernels/cpu/sequence.h"

int64_t cq_attention_scratch_bytes(int64_t longest, int64_t head_dim) {
    (void)longest; /* keys are read in blocks, so a longer document needs no more */
    return attention_scratch_floats(head_dim) * (int64_t)sizeof(float);
}

int64_t cq_ssd_scratch_bytes(int64_t longest, int64_t chunk, int64_t heads, int64_t head_dim,
                             int64_t groups, int64_t state) {
    return ssd_scratch_floats(longest, chunk, heads, head_dim, groups, state) *
           (int64_t)sizeof(float);
}
