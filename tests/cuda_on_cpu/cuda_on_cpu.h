/// cuda_on_cpu.h - the part of CUDA C++ that kernels/cuda uses, for a host compiler.
///
/// Every thread of a block is a fiber; blocks run one after another. A thread runs until it waits
/// at a barrier, in a warp operation, or ends. A warp operation is carried out by the last lane
/// that arrives. What a GPU would do wrong in silence is an error here: it names the kernel, the
/// block, the thread and the line (README.md lists what is noticed). Vector types, conversions and
/// intrinsics have CUDA's names and meaning; what is missing here is not needed yet.
#pragma once
// clang-format off
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
// clang-format on

#ifndef CQ_CUDA_ON_CPU
#error "compile with -DCQ_CUDA_ON_CPU"
#endif

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ __inline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __shared__ _Pragma("GCC error \"shared memory is declared with CQ_SHARED or CQ_DYN_SMEM\"")
#define __noinline__ __attribute__((noinline))

// ---- types --------------------------------------------------------------------------------------
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return uint3{x, y, z}; }
};
#define CQ_EMU_VECTORS(T, name, a2, a4)                                                            \
    struct name##1 {                                                                               \
        T x;                                                                                       \
    };                                                                                             \
    struct __align__(a2) name##2 {                                                                 \
        T x, y;                                                                                    \
    };                                                                                             \
    struct __align__(a4) name##4 {                                                                 \
        T x, y, z, w;                                                                              \
    };                                                                                             \
    static inline name##1 make_##name##1(T x) { return name##1 {x}; }                              \
    static inline name##2 make_##name##2(T x, T y) { return name##2 {x, y}; }                      \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4 {x, y, z, w}; }
CQ_EMU_VECTORS(signed char, char, 2, 4)
CQ_EMU_VECTORS(unsigned char, uchar, 2, 4)
CQ_EMU_VECTORS(short, short, 4, 8)
CQ_EMU_VECTORS(unsigned short, ushort, 4, 8)
CQ_EMU_VECTORS(int, int, 8, 16)
CQ_EMU_VECTORS(unsigned, uint, 8, 16)
CQ_EMU_VECTORS(long long, longlong, 16, 16)
CQ_EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
CQ_EMU_VECTORS(float, float, 8, 16)
CQ_EMU_VECTORS(double, double, 16, 16)
struct float3 {
    float x, y, z;
};
struct int3 {
    int x, y, z;
};
static inline float3 make_float3(float x, float y, float z) { return float3{x, y, z}; }
static inline int3 make_int3(int x, int y, int z) { return int3{x, y, z}; }
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return uint3{x, y, z}; }

typedef struct CUstream_st *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t e);
/// On device memory only, like the operations of kernels/cuda.
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t queue = nullptr);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t queue = nullptr);

// ---- the emulator's own interface ---------------------------------------------------------------
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
enum { warpSize = 32 };

/// Where a collective was called.
#define CQ_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct cq_emu_launch {
    const char *kernel, *file;
    int line;
    const void *address;
    dim3 grid, block;
    int64_t dynamic_bytes;
    void (*call)(const void *); ///< runs one thread with what `arguments` points at
    const void *arguments;
};
/// Runs a kernel over its grid, or notes why not: cq_cuda_status reports it.
void cq_emu_run(const cq_emu_launch *launch);
/// A pointer argument of a kernel of a stream that has an open device: it must point there.
void cq_emu_check_argument(const cq_emu_launch *launch, bool open, uintptr_t p, int index);

/// One declaration of static shared memory.
struct cq_emu_site {
    uint64_t block;
    void *at;
};
void *cq_emu_shared(cq_emu_site *site, size_t bytes, size_t align, const char *name,
                    const char *file, int line);
void *cq_emu_dynamic(const char *file, int line);
bool cq_emu_in_shared(const void *p, size_t bytes);
/// Ends the kernel with a message, as the detectors do.
[[noreturn]] void cq_emu_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/// A warp operation: when the last lane of `mask` has called this, `fn` runs once, with the
/// argument pointers of all 32 lanes (NULL for lanes outside the mask); then every lane returns.
/// `orders_memory`: writes before it are seen after it, as with __syncwarp.
void cq_emu_collective(unsigned mask, void (*fn)(void *const *lanes), void *arguments,
                       const char *what, bool orders_memory, const char *file, int line);
/// The same over the whole warp, for wrappers of tensor-core instructions. Results go through the
/// lanes' own argument structs.
static inline void cq_warp_collective(void (*fn)(void *const *lanes), void *arguments,
                                      const char *what = "warp operation", CQ_EMU_SITE) {
    cq_emu_collective(0xffffffffu, fn, arguments, what, true, file, line);
}

/// cp.async of one thread: 4, 8 or 16 bytes into shared memory, of which the first `from_bytes` are
/// read and the rest become zero. Copied at the wait, or at once, as CKAQAD_CUDA_COPIES says.
void cq_emu_cp_async(void *to, const void *from, int bytes, int from_bytes, CQ_EMU_SITE);
void cq_emu_cp_commit();
/// All but the newest `pending` groups are complete when it returns.
void cq_emu_cp_wait(int pending);
/// cp.async.wait_all: what was not committed, too.
void cq_emu_cp_wait_all();

enum cq_emu_order { CQ_EMU_FORWARD, CQ_EMU_REVERSE, CQ_EMU_RANDOM };
extern "C" {
/// Sets the order of threads and blocks ("forward", "reverse", "random:SEED") and when cp.async
/// copies ("late", "eager"); NULL leaves one as it is. False for another word. The environment
/// (CKAQAD_CUDA_ORDER, CKAQAD_CUDA_COPIES) says what holds at the start.
bool cq_emu_set(const char *order, const char *copies);
/// The error noted last, "" when there is none; reading it forgets it.
const char *cq_emu_error(void);
}

template <typename... P> struct cq_emu_call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    static void run(const void *self) {
        const cq_emu_call *c = static_cast<const cq_emu_call *>(self);
        std::apply(c->kernel, c->arguments);
    }
};
template <typename T> inline void cq_emu_check(const cq_emu_launch *l, bool open, T v, int index) {
    if constexpr (std::is_pointer_v<T>)
        cq_emu_check_argument(l, open, (uintptr_t)v, index);
    else
        (void)l, (void)open, (void)v, (void)index;
}
template <typename... P, typename... A>
inline void cq_emu_start(const char *name, const char *file, int line, dim3 grid, dim3 block,
                         int64_t bytes, bool open, void (*kernel)(P...), A &&...a) {
    cq_emu_call<P...> call = {kernel, std::tuple<P...>(static_cast<P>(a)...)};
    cq_emu_launch launch = {name, file,  line,  reinterpret_cast<const void *>(kernel),
                            grid, block, bytes, cq_emu_call<P...>::run,
                            &call};
    int index = 0;
    std::apply([&](auto... v) { (cq_emu_check(&launch, open, v, index++), ...); }, call.arguments);
    cq_emu_run(&launch);
}
#define CQ_LAUNCH(kernel, grid, block, bytes, s, ...)                                              \
    cq_emu_start(#kernel, __FILE__, __LINE__, (grid), (block), (int64_t)(bytes),                   \
                 (s)->device != nullptr, kernel, __VA_ARGS__)
#define CQ_SHARED(T, name, dims)                                                                   \
    typedef T cq_type_##name dims;                                                                 \
    static cq_emu_site cq_site_##name;                                                             \
    cq_type_##name &name = *static_cast<cq_type_##name *>(                                         \
        cq_emu_shared(&cq_site_##name, sizeof(cq_type_##name), alignof(cq_type_##name), #name,     \
                      __FILE__, __LINE__))
#define CQ_DYN_SMEM(T, name) T *name = static_cast<T *>(cq_emu_dynamic(__FILE__, __LINE__))

// ---- barriers and warp operations ---------------------------------------------------------------
void cq_emu_barrier(const char *file, int line);
/// what: 0 count, 1 and, 2 or
int cq_emu_barrier_vote(int predicate, int what, const char *file, int line);
static inline void __syncthreads(CQ_EMU_SITE) { cq_emu_barrier(file, line); }
static inline int __syncthreads_count(int p, CQ_EMU_SITE) {
    return cq_emu_barrier_vote(p, 0, file, line);
}
static inline int __syncthreads_and(int p, CQ_EMU_SITE) {
    return cq_emu_barrier_vote(p, 1, file, line);
}
static inline int __syncthreads_or(int p, CQ_EMU_SITE) {
    return cq_emu_barrier_vote(p, 2, file, line);
}
void cq_emu_syncwarp(unsigned mask, const char *file, int line);
static inline void __syncwarp(unsigned mask = 0xffffffffu, CQ_EMU_SITE) {
    cq_emu_syncwarp(mask, file, line);
}
static inline void __threadfence() { __sync_synchronize(); }
static inline void __threadfence_block() { __sync_synchronize(); }

enum cq_emu_shuffle { CQ_EMU_INDEX, CQ_EMU_UP, CQ_EMU_DOWN, CQ_EMU_XOR };
void cq_emu_shuffled(cq_emu_shuffle kind, unsigned mask, void *value, int bytes, int by, int width,
                     const char *file, int line);
#define CQ_EMU_SHFL(name, kind, by_type)                                                           \
    template <typename T>                                                                          \
    static inline T name(unsigned mask, T v, by_type by, int width = 32, CQ_EMU_SITE) {            \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "as in CUDA");           \
        cq_emu_shuffled(kind, mask, &v, (int)sizeof(T), (int)by, width, file, line);               \
        return v;                                                                                  \
    }
CQ_EMU_SHFL(__shfl_sync, CQ_EMU_INDEX, int)
CQ_EMU_SHFL(__shfl_up_sync, CQ_EMU_UP, unsigned)
CQ_EMU_SHFL(__shfl_down_sync, CQ_EMU_DOWN, unsigned)
CQ_EMU_SHFL(__shfl_xor_sync, CQ_EMU_XOR, int)

unsigned cq_emu_ballot(unsigned mask, int predicate, const char *file, int line);
static inline unsigned __ballot_sync(unsigned mask, int p, CQ_EMU_SITE) {
    return cq_emu_ballot(mask, p, file, line);
}
static inline int __any_sync(unsigned mask, int p, CQ_EMU_SITE) {
    return cq_emu_ballot(mask, p, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, CQ_EMU_SITE) {
    return cq_emu_ballot(mask, p, file, line) == mask;
}
unsigned cq_emu_match(unsigned mask, uint64_t value, const char *file, int line);
template <typename T> static inline unsigned __match_any_sync(unsigned mask, T v, CQ_EMU_SITE) {
    uint64_t bits = 0;
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as in CUDA");
    memcpy(&bits, &v, sizeof(T));
    return cq_emu_match(mask, bits, file, line);
}
enum cq_emu_reduction { CQ_EMU_ADD, CQ_EMU_MIN, CQ_EMU_MAX, CQ_EMU_AND, CQ_EMU_OR, CQ_EMU_BITXOR };
unsigned cq_emu_reduce(cq_emu_reduction kind, bool is_signed, unsigned mask, unsigned value,
                       const char *file, int line);
#define CQ_EMU_REDUCE(name, kind)                                                                  \
    static inline unsigned name(unsigned mask, unsigned v, CQ_EMU_SITE) {                          \
        return cq_emu_reduce(kind, false, mask, v, file, line);                                    \
    }                                                                                              \
    static inline int name(unsigned mask, int v, CQ_EMU_SITE) {                                    \
        return (int)cq_emu_reduce(kind, true, mask, (unsigned)v, file, line);                      \
    }
CQ_EMU_REDUCE(__reduce_add_sync, CQ_EMU_ADD)
CQ_EMU_REDUCE(__reduce_min_sync, CQ_EMU_MIN)
CQ_EMU_REDUCE(__reduce_max_sync, CQ_EMU_MAX)
static inline unsigned __reduce_and_sync(unsigned mask, unsigned v, CQ_EMU_SITE) {
    return cq_emu_reduce(CQ_EMU_AND, false, mask, v, file, line);
}
static inline unsigned __reduce_or_sync(unsigned mask, unsigned v, CQ_EMU_SITE) {
    return cq_emu_reduce(CQ_EMU_OR, false, mask, v, file, line);
}
static inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, CQ_EMU_SITE) {
    return cq_emu_reduce(CQ_EMU_BITXOR, false, mask, v, file, line);
}

// ---- atomics: whole numbers only; sums of floats in any order are forbidden ---------------------
#define CQ_EMU_ATOMICS(T)                                                                          \
    static inline T atomicAdd(T *at, T v) { return __atomic_fetch_add(at, v, __ATOMIC_RELAXED); }  \
    static inline T atomicExch(T *at, T v) {                                                       \
        return __atomic_exchange_n(at, v, __ATOMIC_RELAXED);                                       \
    }                                                                                              \
    static inline T atomicCAS(T *at, T old, T v) {                                                 \
        __atomic_compare_exchange_n(at, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);       \
        return old;                                                                                \
    }                                                                                              \
    static inline T atomicMax(T *at, T v) {                                                        \
        T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                             \
        if (v > old)                                                                               \
            __atomic_store_n(at, v, __ATOMIC_RELAXED);                                             \
        return old;                                                                                \
    }                                                                                              \
    static inline T atomicMin(T *at, T v) {                                                        \
        T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                             \
        if (v < old)                                                                               \
            __atomic_store_n(at, v, __ATOMIC_RELAXED);                                             \
        return old;                                                                                \
    }                                                                                              \
    static inline T atomicOr(T *at, T v) { return __atomic_fetch_or(at, v, __ATOMIC_RELAXED); }    \
    static inline T atomicAnd(T *at, T v) { return __atomic_fetch_and(at, v, __ATOMIC_RELAXED); }
CQ_EMU_ATOMICS(int)
CQ_EMU_ATOMICS(unsigned)
CQ_EMU_ATOMICS(unsigned long long)
float atomicAdd(float *, float) = delete;
double atomicAdd(double *, double) = delete;

// ---- loads and stores with a hint ---------------------------------------------------------------
template <typename T> static inline T __ldg(const T *p) { return *p; }
template <typename T> static inline T __ldcg(const T *p) { return *p; }
template <typename T> static inline T __ldcs(const T *p) { return *p; }
template <typename T> static inline T __ldca(const T *p) { return *p; }
template <typename T> static inline T __ldlu(const T *p) { return *p; }
template <typename T> static inline void __stcg(T *p, T v) { *p = v; }
template <typename T> static inline void __stcs(T *p, T v) { *p = v; }
template <typename T> static inline void __stwb(T *p, T v) { *p = v; }
template <typename T> static inline void __stwt(T *p, T v) { *p = v; }

// ---- arithmetic ---------------------------------------------------------------------------------
#define CQ_EMU_MINMAX(T)                                                                           \
    static inline T min(T a, T b) { return b < a ? b : a; }                                        \
    static inline T max(T a, T b) { return a < b ? b : a; }
CQ_EMU_MINMAX(int)
CQ_EMU_MINMAX(unsigned)
CQ_EMU_MINMAX(long)
CQ_EMU_MINMAX(unsigned long)
CQ_EMU_MINMAX(long long)
CQ_EMU_MINMAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

template <typename To, typename From> static inline To cq_emu_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &v, sizeof(to));
    return to;
}
static inline unsigned __float_as_uint(float v) { return cq_emu_bits<unsigned>(v); }
static inline int __float_as_int(float v) { return cq_emu_bits<int>(v); }
static inline float __uint_as_float(unsigned v) { return cq_emu_bits<float>(v); }
static inline float __int_as_float(int v) { return cq_emu_bits<float>(v); }
static inline long long __double_as_longlong(double v) { return cq_emu_bits<long long>(v); }
static inline double __longlong_as_double(long long v) { return cq_emu_bits<double>(v); }

// glibc declares functions of some of these names
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, (x))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf((x), (y))
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) cq_emu_sincosf((x), (s), (c))
#define sincosf(x, s, c) cq_emu_sincosf((x), (s), (c))
#define __tanhf(x) tanhf(x)
static inline void cq_emu_sincosf(float x, float *s, float *c) {
    *s = sinf(x);
    *c = cosf(x);
}
static inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline float __double2float_rn(double x) { return (float)x; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)(((uint64_t)a * b) >> 32);
}
static inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++)
        r |= (x >> i & 1u) << (31 - i);
    return r;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++)
        r |= (unsigned)(bytes >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
