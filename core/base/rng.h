/// rng.h - counter-based random numbers: Philox4x32-10 (Salmon et al. 2011,
/// doi 10.1145/2063384.2063405).
///
/// A value is a function of (seed, stream, counter) alone, so draws do not depend on order, threads
/// or ranks.
#pragma once
#include "core/base/types.h"

/// 64 random bits.
CQ_API uint64_t cq_random_bits(uint64_t seed, uint64_t stream, uint64_t counter);
/// Uniform in [0, 1) with 53 bits.
CQ_API double cq_random_uniform(uint64_t seed, uint64_t stream, uint64_t counter);
/// Standard normal (Box-Muller).
CQ_API double cq_random_normal(uint64_t seed, uint64_t stream, uint64_t counter);
/// Uniform integer in [0, n), n > 0.
CQ_API int64_t cq_random_below(uint64_t seed, uint64_t stream, uint64_t counter, int64_t n);
/// A random permutation of 0 .. n-1 (Fisher-Yates).
CQ_API void cq_random_permutation(int64_t *out, int64_t n, uint64_t seed, uint64_t stream);
/// k distinct values of 0 .. n-1 in ascending order; k <= n.
CQ_API void cq_random_sample(int32_t *out, int64_t k, int64_t n, uint64_t seed, uint64_t stream);
