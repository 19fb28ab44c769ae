/// rng.c - Philox4x32-10: ten rounds of multiply and exchange turn (counter, key) into 128 random
/// bits.
///
/// key = seed, counter = { counter, stream } as four words, low word first. Salmon, Moraes, Dror,
/// Shaw 2011, table 2 and the constants of its section 4.3 (doi 10.1145/2063384.2063405). There is
/// no state: every draw names its counter.
#include "core/base/rng.h"
#include <math.h>

static void philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t counter) {
    uint32_t c[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), (uint32_t)stream,
                     (uint32_t)(stream >> 32)};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xd2511f53u * c[0], b = (uint64_t)0xcd9e8d57u * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    for (int i = 0; i < 4; i++)
        out[i] = c[i];
}

static uint64_t join(uint32_t low, uint32_t high) { return (uint64_t)high << 32 | low; }

static double unit(uint64_t bits) { return (double)(bits >> 11) * 0x1p-53; }

uint64_t cq_random_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint32_t w[4];
    philox(w, seed, stream, counter);
    return join(w[0], w[1]);
}

double cq_random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
    return unit(cq_random_bits(seed, stream, counter));
}

double cq_random_normal(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint32_t w[4];
    philox(w, seed, stream, counter);
    double u = 1.0 - unit(join(w[0], w[1])); /* in (0, 1]: its logarithm is finite */
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * unit(join(w[2], w[3])));
}

int64_t cq_random_below(uint64_t seed, uint64_t stream, uint64_t counter, int64_t n) {
    /* 128 bits scaled by n: a value is off from 1/n by less than n / 2^128, so nothing is rejected
     * and one counter is one draw */
    uint32_t w[4];
    philox(w, seed, stream, counter);
    unsigned __int128 low = (unsigned __int128)join(w[2], w[3]) * (uint64_t)n;
    unsigned __int128 high = (unsigned __int128)join(w[0], w[1]) * (uint64_t)n;
    return (int64_t)((high + (low >> 64)) >> 64);
}

void cq_random_permutation(int64_t *out, int64_t n, uint64_t seed, uint64_t stream) {
    for (int64_t i = 0; i < n; i++) {
        int64_t j = cq_random_below(seed, stream, (uint64_t)i, i + 1);
        out[i] = out[j];
        out[j] = i;
    }
}

void cq_random_sample(int32_t *out, int64_t k, int64_t n, uint64_t seed, uint64_t stream) {
    /* selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S): ascending by construction */
    int64_t taken = 0;
    for (int64_t i = 0; i < n && taken < k; i++)
        if (cq_random_below(seed, stream, (uint64_t)i, n - i) < k - taken)
            out[taken++] = (int32_t)i;
}
