/* cuda_on_cpu.cpp - blocks, threads, barriers and warp operations on the CPU, and what is checked.
 *
 * A thread starts on the stack where the one before it ended, and gets a stack of its own only when
 * something waits: a kernel without barriers runs as a plain loop. The scheduler stays in a warp as
 * long as one of its lanes can run, so that warps drift as far apart as barriers allow. One launch
 * at a time. Compile this file without -fsanitize=thread, whatever the kernels are compiled with.
 */
#include "tests/cuda_on_cpu/cuda_on_cpu.h"
extern "C" {
#include "tests/cuda_on_cpu/memory.h"
}
#include <execinfo.h>
#include <map>
#include <mutex>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

/* Under TSan each thread keeps its stack: another thread's writes to it would be a race. */
#ifdef CQ_EMU_TSAN
enum { SHARES_STACKS = 0 };
#define TSAN(call) call
extern "C" {
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void *__tsan_get_current_fiber(void);
void __tsan_acquire(void *at);
void __tsan_release(void *at);
void __tsan_read_range(void *at, unsigned long bytes);
void __tsan_write_range(void *at, unsigned long bytes);
void __tsan_ignore_thread_begin(void);
void __tsan_ignore_thread_end(void);
}
#else
enum { SHARES_STACKS = 1 };
#define TSAN(call) ((void)0)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(call) call
#else
#define ASAN(call) ((void)0)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- switching stacks ---------------------------------------------------------------------------
#if defined(__x86_64__)
extern "C" void cq_emu_switch_stack(void **save, void *load);
__asm__(".text\n.p2align 4\n.type cq_emu_switch_stack,@function\ncq_emu_switch_stack:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
        ".size cq_emu_switch_stack,.-cq_emu_switch_stack\n");
static void *fresh_stack(char *low, size_t size, void (*entry)()) {
    void **top = reinterpret_cast<void **>(low + size);
    top[-2] = reinterpret_cast<void *>(entry); /* at entry rsp % 16 == 8 */
    top[-1] = nullptr;
    for (int i = 3; i <= 8; i++)
        top[-i] = nullptr;
    return top - 8;
}
#else
#include <ucontext.h>
static void cq_emu_switch_stack(void **save, void *load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t *>(load));
}
static void *fresh_stack(char *low, size_t size, void (*entry)()) {
    ucontext_t *u = reinterpret_cast<ucontext_t *>(low + size - 4096);
    getcontext(u);
    u->uc_stack.ss_sp = low;
    u->uc_stack.ss_size = size - 4096;
    u->uc_link = nullptr;
    makecontext(u, entry, 0);
    return u;
}
#endif

namespace {

enum { MOST_THREADS = 1024, MOST_WARPS = 32, LANES = 32, CANARY = 64 };
enum { SHARED_PLAIN = 48 << 10, SHARED_MOST = 227 << 10, ARENA = 512 << 10 };
const size_t PAGE = 4096, STACK = 256 << 10;
const uint32_t POISON = 0xffffffa5u; /* NaN as FP32, FP64 and BF16 */

struct pending_copy {
    void *to;
    const void *from;
    int bytes, from_bytes, group;
};
struct fiber {
    void *sp;
    int stack;
    bool started, ended;
    const char *what, *file; ///< what it waits for; file is NULL while it does not
    int line;
    int groups; ///< cp.async groups committed
    std::vector<pending_copy> copies;
    void *fake_stack, *tsan;
};
struct collective {
    unsigned mask, arrived;
    void (*fn)(void *const *);
    const char *what, *file;
    int line, first;
    void *lanes[LANES];
};
struct warp {
    unsigned ready, ended;
    int n_waiting;
    collective waiting[LANES];
};
struct piece {
    unsigned char *at;
    size_t bytes;
    const char *name, *file;
    int line;
};
struct engine {
    const cq_emu_launch *launch;
    int n_threads, n_warps, n_ended, running, current_warp;
    unsigned ready_warps;
    fiber threads[MOST_THREADS];
    uint3 index[MOST_THREADS];
    warp warps[MOST_WARPS];
    void *host_sp, *host_fake_stack, *host_tsan;
    const void *host_stack_low;
    size_t host_stack_size;
    bool abandoned;
    bool watched; ///< TSan looks at this block: its clocks take most of the time, and blocks are
                  ///< alike
    /* the barrier of the block */
    int arrived, first;
    const char *file;
    int line;
    int votes, vote_result;
    /* stacks */
    char *stacks;
    int n_stacks, free_stacks[MOST_THREADS], n_free;
    /* shared memory */
    unsigned char *arena;
    size_t used, static_bytes;
    uint64_t block;
    std::vector<piece> pieces;
    std::map<const void *, int64_t> asked; ///< dynamic shared memory that a kernel may have
    /* how it runs */
    bool set_up;
    cq_emu_order order;
    bool eager;
    uint64_t random;
    char error[1024], read[1024];
};
engine E;
std::recursive_mutex turn;
[[maybe_unused]] char block_begins, block_ends; ///< addresses for TSan

uint64_t next_random() {
    E.random ^= E.random << 13;
    E.random ^= E.random >> 7;
    E.random ^= E.random << 17;
    return E.random;
}
int choose(unsigned bits) {
    if (E.order == CQ_EMU_FORWARD)
        return __builtin_ctz(bits);
    if (E.order == CQ_EMU_REVERSE)
        return 31 - __builtin_clz(bits);
    unsigned r = (unsigned)(next_random() >> 20) & 31u;
    unsigned turned = r ? bits >> r | bits << (32 - r) : bits;
    return (__builtin_ctz(turned) + (int)r) & 31;
}

void set_up() {
    if (E.set_up)
        return;
    E.set_up = true;
    E.random = 0x9e3779b97f4a7c15u;
    const char *order = getenv("CKAQAD_CUDA_ORDER"), *copies = getenv("CKAQAD_CUDA_COPIES");
    if (!cq_emu_set(order && *order ? order : nullptr, copies && *copies ? copies : nullptr)) {
        fprintf(stderr, "CKAQAD_CUDA_ORDER is forward, reverse or random:SEED, and "
                        "CKAQAD_CUDA_COPIES late or eager\n");
        abort();
    }
    size_t each = STACK + PAGE;
    void *at = mmap(nullptr, each * MOST_THREADS + PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *arena = mmap(nullptr, ARENA, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || arena == MAP_FAILED) {
        fprintf(stderr, "cuda_on_cpu: no memory for the stacks of threads\n");
        abort();
    }
    E.stacks = static_cast<char *>(at);
    E.arena = static_cast<unsigned char *>(arena);
    for (int i = 0; i <= MOST_THREADS; i++)
        mprotect(E.stacks + (size_t)i * each, PAGE, PROT_NONE);
    for (int i = 0; i < MOST_THREADS; i++)
        E.free_stacks[i] = MOST_THREADS - 1 - i;
    E.n_free = MOST_THREADS;
    cq_emu_watch();
}
char *stack_low(int i) { return E.stacks + (size_t)i * (STACK + PAGE) + PAGE; }

const char *base_name(const char *file) {
    const char *slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}
int where(char *text, size_t size) {
    const uint3 &t = E.index[E.running];
    return snprintf(text, size, "%s: block (%u, %u, %u), thread (%u, %u, %u): ", E.launch->kernel,
                    blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y, t.z);
}

// ---- the scheduler ------------------------------------------------------------------------------
void runner();

void leave_stack(bool for_good) {
    ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &E.threads[E.running].fake_stack,
                                        static_cast<const char *>(E.host_stack_low),
                                        E.host_stack_size));
    (void)for_good;
}
void arrive_on_stack(int t) {
    ASAN(__sanitizer_finish_switch_fiber(E.threads[t].fake_stack, nullptr, nullptr));
    (void)t;
}

/* The next thread that can run, no longer counted as ready; -1 when there is none. */
int pick() {
    if (!E.warps[E.current_warp].ready) {
        if (!E.ready_warps)
            return -1;
        E.current_warp = choose(E.ready_warps);
    }
    warp &w = E.warps[E.current_warp];
    int lane = choose(w.ready);
    w.ready &= ~(1u << lane);
    if (!w.ready)
        E.ready_warps &= ~(1u << E.current_warp);
    return E.current_warp * LANES + lane;
}
void make_ready(int warp_index, unsigned lanes) {
    E.warps[warp_index].ready |= lanes;
    E.ready_warps |= 1u << warp_index;
}

void enter(int t) {
    E.running = t;
    threadIdx = E.index[t];
}
/* Goes to thread t, which is not running; the stack pointer of here is kept at `save`. */
void go(void **save, int t, bool for_good) {
    fiber &f = E.threads[t];
    int from = E.running;
    if (!f.started) {
        f.started = true;
        f.stack = SHARES_STACKS ? E.free_stacks[--E.n_free] : t;
        ASAN(ASAN_UNPOISON_MEMORY_REGION(stack_low(f.stack), STACK)); /* frames never left */
        /* stacks lie a power of two apart: spread them over the cache */
        f.sp = fresh_stack(stack_low(f.stack), STACK - (size_t)(f.stack & 31) * 192, runner);
        f.fake_stack = nullptr;
        TSAN(if (!f.tsan) f.tsan = __tsan_create_fiber(0));
    }
    ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &E.threads[from].fake_stack,
                                        stack_low(f.stack), STACK));
    TSAN(__tsan_switch_to_fiber(f.tsan, 1));
    (void)from;
    (void)for_good;
    enter(t);
    cq_emu_switch_stack(save, f.sp);
}
/* Neither of these returns; saying so would make ASan look at all of the stack. */
void to_host() {
    void *dead;
    leave_stack(true);
    TSAN(__tsan_switch_to_fiber(E.host_tsan, 1));
    cq_emu_switch_stack(&dead, E.host_sp);
}
void abandon() {
    E.abandoned = true;
    to_host();
}

void fail_stuck() {
    char text[800];
    int n = 0, listed = 0;
    const char *seen_file[4];
    int seen_line[4];
    for (int t = 0; t < E.n_threads && listed < 4; t++) {
        const fiber &f = E.threads[t];
        if (!f.started || f.ended || !f.file)
            continue;
        bool seen = false;
        for (int i = 0; i < listed; i++)
            seen |= seen_file[i] == f.file && seen_line[i] == f.line;
        if (seen)
            continue;
        seen_file[listed] = f.file;
        seen_line[listed++] = f.line;
        n += snprintf(text + n, sizeof text - (size_t)n, "%sthread %d at %s, %s:%d",
                      listed > 1 ? "; " : "", t, f.what, base_name(f.file), f.line);
        if (n >= (int)sizeof text)
            break;
    }
    cq_emu_fail("threads wait for each other: %s", text);
}

/* Lets others run until this thread is ready again. */
void wait_here(const char *what, const char *file, int line) {
    int self = E.running;
    fiber &f = E.threads[self];
    f.what = what;
    f.file = file;
    f.line = line;
    int t = pick();
    if (t < 0)
        fail_stuck();
    if (t != self) {
        go(&f.sp, t, false);
        arrive_on_stack(self);
    }
    f.file = nullptr;
}

void end_thread() {
    int t = E.running, w = t / LANES;
    unsigned bit = 1u << t % LANES;
    fiber &f = E.threads[t];
    if (!f.copies.empty())
        cq_emu_fail("ends with %d asynchronous copies that it did not wait for",
                    (int)f.copies.size());
    if (E.arrived > 0)
        cq_emu_fail("ends while thread %d waits at the barrier in %s:%d", E.first,
                    base_name(E.file), E.line);
    for (int i = 0; i < E.warps[w].n_waiting; i++) {
        const collective &c = E.warps[w].waiting[i];
        if (c.mask & bit)
            cq_emu_fail("ends while thread %d waits for it at %s, %s:%d", c.first, c.what,
                        base_name(c.file), c.line);
    }
    f.ended = true;
    E.warps[w].ended |= bit;
    E.n_ended++;
    TSAN(if (E.watched) __tsan_release(&block_ends); else __tsan_ignore_thread_end());
}

/* What a stack runs first: threads, one after another, as long as they need not share. */
void runner() {
#if defined(__SANITIZE_ADDRESS__)
    const void *low;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &low, &size);
    if (!E.host_stack_low) {
        E.host_stack_low = low;
        E.host_stack_size = size;
    }
#endif
    for (;;) {
        TSAN(if (E.watched) __tsan_acquire(&block_begins); else __tsan_ignore_thread_begin());
        E.launch->call(E.launch->arguments);
        int self = E.running;
        end_thread();
        int t = pick();
        if (t < 0 && E.n_ended < E.n_threads)
            fail_stuck();
        fiber &next = E.threads[t < 0 ? 0 : t];
        if (t < 0 || next.started || !SHARES_STACKS) {
            void *dead;
            if (SHARES_STACKS)
                E.free_stacks[E.n_free++] = E.threads[self].stack;
            if (t < 0)
                to_host();
            go(&dead, t, true);
        }
        next.started = true;
        next.stack = E.threads[self].stack;
        next.fake_stack = nullptr;
        enter(t);
    }
}

// ---- shared memory ------------------------------------------------------------------------------
void fill_words(unsigned char *at, size_t bytes) {
    for (size_t i = 0; i + 4 <= bytes; i += 4)
        memcpy(at + i, &POISON, 4);
}
/* Room for `bytes`, NaN, between two canaries. */
unsigned char *carve(size_t bytes, size_t align, const char *name, const char *file, int line) {
    size_t from = (E.used + CANARY + align - 1) / align * align;
    size_t to = from + bytes, end = (to + 15) / 16 * 16 + CANARY;
    if (end > ARENA)
        cq_emu_fail("%s, %s:%d: no shared memory is left", name, base_name(file), line);
    ASAN(ASAN_UNPOISON_MEMORY_REGION(E.arena + E.used, end - E.used));
    TSAN(__tsan_ignore_thread_begin()); /* memset and memcpy are looked at even here */
    fill_words(E.arena + E.used, from - E.used);
    memset(E.arena + from, 0xff, bytes);
    fill_words(E.arena + to, end - to);
    TSAN(__tsan_ignore_thread_end());
    ASAN(ASAN_POISON_MEMORY_REGION(E.arena + E.used, from - E.used));
    ASAN(ASAN_POISON_MEMORY_REGION(E.arena + to, end - to));
    E.pieces.push_back(piece{E.arena + from, bytes, name, file, line});
    E.used = end - CANARY;
    return E.arena + from;
}
bool whole(const unsigned char *at, size_t bytes) {
    for (size_t i = 0; i + 4 <= bytes; i += 4)
        if (memcmp(at + i, &POISON, 4) != 0)
            return false;
    return true;
}
void check_shared() {
    ASAN(ASAN_UNPOISON_MEMORY_REGION(E.arena, ARENA));
    for (const piece &p : E.pieces)
        if (!whole(p.at - CANARY, CANARY) || !whole(p.at + p.bytes, CANARY))
            cq_emu_note("%s: block (%u, %u, %u): shared memory was written outside %s, %s:%d",
                        E.launch->kernel, blockIdx.x, blockIdx.y, blockIdx.z, p.name,
                        base_name(p.file), p.line);
}

// ---- blocks -------------------------------------------------------------------------------------
bool run_block() {
    E.block++;
    E.pieces.clear();
    E.used = 0;
    E.static_bytes = 0;
    E.n_ended = E.arrived = E.votes = 0;
    E.abandoned = false;
    E.host_stack_low = nullptr;
    E.ready_warps = 0;
    for (int w = 0; w < E.n_warps; w++) {
        E.warps[w].ended = 0;
        E.warps[w].n_waiting = 0;
        E.warps[w].ready = 0;
        make_ready(w, 0xffffffffu);
    }
    for (int t = 0; t < E.n_threads; t++) {
        fiber &f = E.threads[t];
        f.started = f.ended = false;
        f.file = nullptr;
        f.groups = 0;
        f.copies.clear();
    }
    E.running = 0;
    if (E.launch->dynamic_bytes > 0)
        carve((size_t)E.launch->dynamic_bytes, 1024, "dynamic shared memory", E.launch->file,
              E.launch->line);
    E.current_warp = choose(E.ready_warps);
    TSAN(E.host_tsan = __tsan_get_current_fiber());
    TSAN(__tsan_release(&block_begins));
    int t = pick();
#if defined(__SANITIZE_ADDRESS__)
    fiber &f = E.threads[t];
    f.started = true;
    f.stack = E.free_stacks[--E.n_free];
    ASAN_UNPOISON_MEMORY_REGION(stack_low(f.stack), STACK);
    f.sp = fresh_stack(stack_low(f.stack), STACK, runner);
    f.fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&E.host_fake_stack, stack_low(f.stack), STACK);
    enter(t);
    cq_emu_switch_stack(&E.host_sp, f.sp);
    __sanitizer_finish_switch_fiber(E.host_fake_stack, nullptr, nullptr);
#else
    go(&E.host_sp, t, false);
#endif
    TSAN(__tsan_acquire(&block_ends));
    if (E.abandoned) {
        E.n_free = 0;
        for (int i = 0; i < MOST_THREADS; i++)
            E.free_stacks[E.n_free++] = MOST_THREADS - 1 - i;
        ASAN(ASAN_UNPOISON_MEMORY_REGION(E.stacks, MOST_THREADS * (STACK + PAGE)));
        ASAN(ASAN_UNPOISON_MEMORY_REGION(E.arena, ARENA));
        TSAN(for (fiber &g : E.threads) g.tsan = nullptr);
        return false;
    }
    check_shared();
    return E.error[0] == 0;
}

bool launch_is_right(const cq_emu_launch *l) {
    uint64_t threads = (uint64_t)l->block.x * l->block.y * l->block.z;
    auto asked = E.asked.find(l->address);
    int64_t most = asked == E.asked.end() ? (int64_t)SHARED_PLAIN : asked->second;
    if (threads == 0 || threads > MOST_THREADS || l->block.z > 64)
        cq_emu_note("%s, %s:%d: a block of %u x %u x %u threads, at most 1024 are allowed",
                    l->kernel, base_name(l->file), l->line, l->block.x, l->block.y, l->block.z);
    else if (threads % LANES != 0)
        cq_emu_note("%s, %s:%d: a block of %d threads, wanted whole warps", l->kernel,
                    base_name(l->file), l->line, (int)threads);
    else if (l->grid.x == 0 || l->grid.y == 0 || l->grid.z == 0 || l->grid.x > 0x7fffffffu ||
             l->grid.y > 65535 || l->grid.z > 65535)
        cq_emu_note("%s, %s:%d: a grid of %u x %u x %u blocks: none, or too many", l->kernel,
                    base_name(l->file), l->line, l->grid.x, l->grid.y, l->grid.z);
    else if (l->dynamic_bytes < 0 || l->dynamic_bytes > most)
        cq_emu_note("%s, %s:%d: %lld bytes of dynamic shared memory, %lld were asked for with "
                    "cq_cuda_shared_bytes or are there anyway",
                    l->kernel, base_name(l->file), l->line, (long long)l->dynamic_bytes,
                    (long long)most);
    else
        return true;
    return false;
}

uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }

} // namespace

void cq_emu_run(const cq_emu_launch *l) {
    std::lock_guard<std::recursive_mutex> mine(turn);
    set_up();
    if (E.error[0] || !launch_is_right(l) || cq_emu_rehearses())
        return;
    E.launch = l;
    blockDim = l->block;
    gridDim = l->grid;
    E.n_threads = (int)(l->block.x * l->block.y * l->block.z);
    E.n_warps = E.n_threads / LANES;
    for (int t = 0; t < E.n_threads; t++) {
        unsigned u = (unsigned)t, x = l->block.x, y = l->block.y;
        E.index[t] = uint3{u % x, u / x % y, u / x / y};
    }
    uint64_t n = (uint64_t)l->grid.x * l->grid.y * l->grid.z, step = 1, at = 0;
    if (E.order == CQ_EMU_REVERSE)
        step = n - 1, at = n - 1;
    else if (E.order == CQ_EMU_RANDOM) {
        step = next_random() % n;
        while (gcd(step, n) != 1)
            step = (step + 1) % n;
        at = next_random() % n;
    }
    cq_emu_memory_unlock();
    for (uint64_t i = 0; i < n; i++, at = (at + step) % n) {
        E.watched = n <= 4 || at % 4 == 0 || at + 1 == n;
        blockIdx = uint3{(unsigned)(at % l->grid.x), (unsigned)(at / l->grid.x % l->grid.y),
                         (unsigned)(at / l->grid.x / l->grid.y)};
        if (!run_block())
            break;
    }
    cq_emu_memory_lock();
    E.launch = nullptr;
}

void cq_emu_check_argument(const cq_emu_launch *l, bool open, uintptr_t address, int index) {
    const void *p = reinterpret_cast<const void *>(address);
    int64_t left;
    char text[96];
    if (!open || !p || cq_emu_memory_has(p, &left))
        return;
    if (!cq_emu_memory_explain(p, text, sizeof text))
        snprintf(text, sizeof text, "the host's memory");
    cq_emu_note("%s, %s:%d: argument %d points to %s, wanted device memory", l->kernel,
                base_name(l->file), l->line, index, text);
}

// ---- what kernels call --------------------------------------------------------------------------
void cq_emu_fail(const char *format, ...) {
    char text[900];
    int n = where(text, sizeof text);
    va_list list;
    va_start(list, format);
    vsnprintf(text + n, sizeof text - (size_t)n, format, list);
    va_end(list);
    cq_emu_note("%s", text);
    abandon();
    __builtin_trap();
}

void *cq_emu_shared(cq_emu_site *site, size_t bytes, size_t align, const char *name,
                    const char *file, int line) {
    if (site->block == E.block)
        return site->at;
    site->at = carve(bytes, align < 16 ? 16 : align, name, file, line);
    site->block = E.block;
    E.static_bytes += (bytes + 15) / 16 * 16;
    int64_t dynamic = E.launch->dynamic_bytes;
    if (E.static_bytes > SHARED_PLAIN)
        cq_emu_fail("%s, %s:%d: %d bytes of static shared memory, at most 49152 are allowed", name,
                    base_name(file), line, (int)E.static_bytes);
    if ((int64_t)E.static_bytes + dynamic > SHARED_PLAIN && !E.asked.count(E.launch->address))
        cq_emu_fail("%s, %s:%d: %lld bytes of static and dynamic shared memory, more than 49152 "
                    "need cq_cuda_shared_bytes",
                    name, base_name(file), line, (long long)E.static_bytes + (long long)dynamic);
    if ((int64_t)E.static_bytes + dynamic > SHARED_MOST)
        cq_emu_fail("%s, %s:%d: %lld bytes of shared memory, at most %d are there", name,
                    base_name(file), line, (long long)E.static_bytes + (long long)dynamic,
                    (int)SHARED_MOST);
    return site->at;
}
void *cq_emu_dynamic(const char *file, int line) {
    if (E.launch->dynamic_bytes <= 0)
        cq_emu_fail("%s:%d: the launch gave no dynamic shared memory", base_name(file), line);
    return E.pieces[0].at;
}
bool cq_emu_in_shared(const void *p, size_t bytes) {
    const unsigned char *at = static_cast<const unsigned char *>(p);
    for (const piece &q : E.pieces)
        if (at >= q.at && at + bytes <= q.at + q.bytes)
            return true;
    return false;
}

static void arrive(const char *file, int line) {
    if (E.n_ended > 0) {
        int t = 0;
        while (!E.threads[t].ended)
            t++;
        cq_emu_fail("waits at the barrier in %s:%d after thread %d has ended", base_name(file),
                    line, t);
    }
    if (E.arrived == 0) {
        E.first = E.running;
        E.file = file;
        E.line = line;
    } else if (E.line != line || (E.file != file && strcmp(E.file, file) != 0))
        cq_emu_fail("waits at the barrier in %s:%d, thread %d at the one in %s:%d", base_name(file),
                    line, E.first, base_name(E.file), E.line);
    TSAN(if (E.watched) __tsan_release(&E.arrived));
    if (++E.arrived == E.n_threads) {
        E.arrived = 0;
        E.vote_result = E.votes;
        E.votes = 0;
        for (int w = 0; w < E.n_warps; w++)
            make_ready(w, 0xffffffffu);
    }
    wait_here("the barrier", file, line);
    TSAN(if (E.watched) __tsan_acquire(&E.arrived));
}
void cq_emu_barrier(const char *file, int line) { arrive(file, line); }
int cq_emu_barrier_vote(int predicate, int what, const char *file, int line) {
    E.votes += predicate != 0;
    arrive(file, line);
    return what == 0 ? E.vote_result
                     : (what == 1 ? E.vote_result == E.n_threads : E.vote_result > 0);
}

void cq_emu_collective(unsigned mask, void (*fn)(void *const *), void *arguments, const char *what,
                       bool orders_memory, const char *file, int line) {
    int t = E.running, lane = t % LANES, i = 0;
    orders_memory = orders_memory && E.watched;
    (void)orders_memory;
    warp &w = E.warps[t / LANES];
    if (!(mask >> lane & 1u))
        cq_emu_fail("%s, %s:%d: mask %08x lacks this lane, %d", what, base_name(file), line, mask,
                    lane);
    if (mask & w.ended)
        cq_emu_fail("%s, %s:%d: mask %08x names lanes that have ended (%08x)", what,
                    base_name(file), line, mask, mask & w.ended);
    while (i < w.n_waiting && w.waiting[i].mask != mask)
        i++;
    collective &c = w.waiting[i];
    if (i == w.n_waiting) {
        w.n_waiting++;
        c.mask = mask;
        c.arrived = 0;
        c.fn = fn;
        c.what = what;
        c.file = file;
        c.line = line;
        c.first = t;
        TSAN(__tsan_ignore_thread_begin());
        memset(c.lanes, 0, sizeof c.lanes);
        TSAN(__tsan_ignore_thread_end());
    } else if (c.line != line || c.fn != fn || (c.file != file && strcmp(c.file, file) != 0))
        cq_emu_fail("is at %s, %s:%d, thread %d of its warp at %s, %s:%d", what, base_name(file),
                    line, c.first, c.what, base_name(c.file), c.line);
    c.arrived |= 1u << lane;
    c.lanes[lane] = arguments;
    TSAN(if (orders_memory) __tsan_release(&w));
    if (c.arrived == mask) {
        TSAN(if (orders_memory) __tsan_acquire(&w));
        TSAN(if (!orders_memory) __tsan_ignore_thread_begin());
        if (fn)
            fn(c.lanes);
        TSAN(if (!orders_memory) __tsan_ignore_thread_end());
        TSAN(if (orders_memory) __tsan_release(&w));
        make_ready(t / LANES, mask);
        w.n_waiting--;
        if (i < w.n_waiting)
            w.waiting[i] = w.waiting[w.n_waiting];
    }
    wait_here(what, file, line);
    TSAN(if (orders_memory) __tsan_acquire(&w));
}
void cq_emu_syncwarp(unsigned mask, const char *file, int line) {
    cq_emu_collective(mask, nullptr, nullptr, "__syncwarp", true, file, line);
}

namespace {
struct shuffle_lane {
    const void *from;
    char to[8];
    int bytes, lane;
};
void shuffle_all(void *const *lanes) {
    for (int i = 0; i < LANES; i++) {
        shuffle_lane *l = static_cast<shuffle_lane *>(lanes[i]);
        if (!l)
            continue;
        const shuffle_lane *source = static_cast<const shuffle_lane *>(lanes[l->lane]);
        if (!source)
            cq_emu_fail("a shuffle reads lane %d for lane %d, which is outside its mask", l->lane,
                        i);
        memcpy(l->to, source->from, (size_t)l->bytes);
    }
}
struct vote_lane {
    int predicate;
    unsigned result;
};
void vote_all(void *const *lanes) {
    unsigned result = 0;
    for (int i = 0; i < LANES; i++)
        if (lanes[i] && static_cast<vote_lane *>(lanes[i])->predicate)
            result |= 1u << i;
    for (int i = 0; i < LANES; i++)
        if (lanes[i])
            static_cast<vote_lane *>(lanes[i])->result = result;
}
struct match_lane {
    uint64_t value;
    unsigned result;
};
void match_all(void *const *lanes) {
    for (int i = 0; i < LANES; i++) {
        match_lane *l = static_cast<match_lane *>(lanes[i]);
        for (int j = 0; l && j < LANES; j++)
            if (lanes[j] && static_cast<match_lane *>(lanes[j])->value == l->value)
                l->result |= 1u << j;
    }
}
struct reduce_lane {
    cq_emu_reduction kind;
    bool is_signed;
    unsigned value, result;
};
unsigned reduced(const reduce_lane *l, unsigned a, unsigned b) {
    switch (l->kind) {
    case CQ_EMU_ADD:
        return a + b;
    case CQ_EMU_AND:
        return a & b;
    case CQ_EMU_OR:
        return a | b;
    case CQ_EMU_BITXOR:
        return a ^ b;
    case CQ_EMU_MIN:
        return (l->is_signed ? (int)a < (int)b : a < b) ? a : b;
    default:
        return (l->is_signed ? (int)a > (int)b : a > b) ? a : b;
    }
}
void reduce_all(void *const *lanes) {
    unsigned result = 0;
    bool first = true;
    for (int i = 0; i < LANES; i++)
        if (const reduce_lane *l = static_cast<const reduce_lane *>(lanes[i])) {
            result = first ? l->value : reduced(l, result, l->value);
            first = false;
        }
    for (int i = 0; i < LANES; i++)
        if (lanes[i])
            static_cast<reduce_lane *>(lanes[i])->result = result;
}
} // namespace

void cq_emu_shuffled(cq_emu_shuffle kind, unsigned mask, void *value, int bytes, int by, int width,
                     const char *file, int line) {
    int lane = E.running % LANES, first = lane & ~(width - 1), to = lane;
    if (width < 1 || width > LANES || (width & (width - 1)) != 0)
        cq_emu_fail("a shuffle of width %d, %s:%d", width, base_name(file), line);
    if (kind == CQ_EMU_INDEX)
        to = first | (by & (width - 1));
    else if (kind == CQ_EMU_UP)
        to = lane - by >= first ? lane - by : lane;
    else if (kind == CQ_EMU_DOWN)
        to = lane + by < first + width ? lane + by : lane;
    else
        to = (lane ^ by) < first + width ? (lane ^ by) & (LANES - 1) : lane;
    shuffle_lane l = {value, {}, bytes, to};
    cq_emu_collective(mask, shuffle_all, &l, "a shuffle", false, file, line);
    TSAN(__tsan_ignore_thread_begin());
    memcpy(value, l.to, (size_t)bytes);
    TSAN(__tsan_ignore_thread_end());
}
unsigned cq_emu_ballot(unsigned mask, int predicate, const char *file, int line) {
    vote_lane l = {predicate, 0};
    cq_emu_collective(mask, vote_all, &l, "a vote", false, file, line);
    return l.result;
}
unsigned cq_emu_match(unsigned mask, uint64_t value, const char *file, int line) {
    match_lane l = {value, 0};
    cq_emu_collective(mask, match_all, &l, "__match_any_sync", false, file, line);
    return l.result;
}
unsigned cq_emu_reduce(cq_emu_reduction kind, bool is_signed, unsigned mask, unsigned value,
                       const char *file, int line) {
    reduce_lane l = {kind, is_signed, value, 0};
    cq_emu_collective(mask, reduce_all, &l, "a reduction", false, file, line);
    return l.result;
}

// ---- cp.async -----------------------------------------------------------------------------------
static void do_copy(const pending_copy &c) {
    TSAN(__tsan_read_range(const_cast<void *>(c.from), (unsigned long)c.from_bytes));
    TSAN(__tsan_write_range(c.to, (unsigned long)c.bytes));
    memcpy(c.to, c.from, (size_t)c.from_bytes);
    memset(static_cast<char *>(c.to) + c.from_bytes, 0, (size_t)(c.bytes - c.from_bytes));
}
void cq_emu_cp_async(void *to, const void *from, int bytes, int from_bytes, const char *file,
                     int line) {
    if ((bytes != 4 && bytes != 8 && bytes != 16) || from_bytes < 0 || from_bytes > bytes)
        cq_emu_fail("%s:%d: an asynchronous copy of %d of %d bytes", base_name(file), line,
                    from_bytes, bytes);
    if (reinterpret_cast<uintptr_t>(to) % (uintptr_t)bytes != 0 ||
        reinterpret_cast<uintptr_t>(from) % (uintptr_t)bytes != 0)
        cq_emu_fail("%s:%d: an asynchronous copy of %d bytes between addresses that are no "
                    "multiples of it",
                    base_name(file), line, bytes);
    if (!cq_emu_in_shared(to, (size_t)bytes))
        cq_emu_fail("%s:%d: an asynchronous copy to an address outside shared memory",
                    base_name(file), line);
    fiber &f = E.threads[E.running];
    pending_copy c = {to, from, bytes, from_bytes, f.groups};
    f.copies.push_back(c);
    if (E.eager)
        do_copy(c);
    else
        memset(to, 0xff, (size_t)bytes);
}
void cq_emu_cp_commit() { E.threads[E.running].groups++; }
static void finish(int before) {
    fiber &f = E.threads[E.running];
    size_t kept = 0;
    for (const pending_copy &c : f.copies)
        if (c.group >= before)
            f.copies[kept++] = c;
        else if (!E.eager)
            do_copy(c);
    f.copies.resize(kept);
}
void cq_emu_cp_wait(int pending) { finish(E.threads[E.running].groups - pending); }
void cq_emu_cp_wait_all() { finish(E.threads[E.running].groups + 1); }

// ---- errors -------------------------------------------------------------------------------------
extern "C" void cq_emu_note(const char *format, ...) {
    if (E.error[0])
        return;
    va_list list;
    va_start(list, format);
    vsnprintf(E.error, sizeof E.error, format, list);
    va_end(list);
}
extern "C" const char *cq_emu_error(void) {
    memcpy(E.read, E.error, sizeof E.read);
    E.error[0] = 0;
    return E.read;
}
/* CKAQAD_CUDA_LOST=PATH: the device is lost as soon as this file is there. */
static bool lost() {
    static const char *path = getenv("CKAQAD_CUDA_LOST");
    return path && access(path, F_OK) == 0;
}
extern "C" int cq_emu_status(const char *op) {
    if (lost())
        return cq_fail(CQ_EIO, "cuda: %s: the device was lost (an injected fault)", op);
    if (!E.error[0])
        return CQ_OK;
    return cq_fail(CQ_EIO, "cuda: %s: %s", op, cq_emu_error());
}
extern "C" int cq_cuda_status(const char *op) { return cq_emu_status(op); }
extern "C" int cq_cuda_shared_bytes(const void *kernel, int64_t bytes, const char *op) {
    if (bytes > SHARED_MOST)
        return cq_fail(CQ_ESHAPE, "cuda: %s: %lld bytes of shared memory, at most %d are there", op,
                       (long long)bytes, (int)SHARED_MOST);
    if (bytes > SHARED_PLAIN) {
        int64_t &asked = E.asked[kernel];
        asked = std::max(asked, bytes);
    }
    return CQ_OK;
}
cudaError_t cudaPeekAtLastError() { return E.error[0] ? cudaErrorLaunchFailure : cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaPeekAtLastError(); }
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : E.error[0] ? E.error : "launch failed";
}

extern "C" bool cq_emu_set(const char *order, const char *copies) {
    if (order) {
        char *end = nullptr;
        if (strcmp(order, "forward") == 0)
            E.order = CQ_EMU_FORWARD;
        else if (strcmp(order, "reverse") == 0)
            E.order = CQ_EMU_REVERSE;
        else if (strncmp(order, "random:", 7) == 0 && order[7]) {
            unsigned long long seed = strtoull(order + 7, &end, 10);
            if (*end)
                return false;
            E.order = CQ_EMU_RANDOM;
            E.random = (seed + 1) * 0x9e3779b97f4a7c15u | 1u;
        } else
            return false;
    }
    if (copies) {
        if (strcmp(copies, "late") != 0 && strcmp(copies, "eager") != 0)
            return false;
        E.eager = strcmp(copies, "eager") == 0;
    }
    if (!E.set_up && (order || copies)) {
        /* what is set here holds against the environment */
        cq_emu_order kept = E.order;
        bool eager = E.eager;
        uint64_t random = E.random;
        set_up();
        if (order)
            E.order = kept, E.random = random ? random : E.random;
        if (copies)
            E.eager = eager;
    }
    return true;
}

// ---- accesses that nobody may make --------------------------------------------------------------
namespace {
struct sigaction before;
char emergency_stack[32 << 10] __attribute__((aligned(16)));
char fault_text[200];

void end_kernel_after_fault() { cq_emu_fail("%s", fault_text); }

void on_fault(int number, siginfo_t *info, void *context) {
    const char *at = static_cast<const char *>(info->si_addr);
    char text[160], line[400];
    bool stack = E.launch && at >= E.stacks && at < E.stacks + MOST_THREADS * (STACK + PAGE) + PAGE;
    bool ours = stack || cq_emu_memory_explain(at, text, sizeof text);
    if (ours && E.launch) {
        if (stack)
            snprintf(fault_text, sizeof fault_text, "its stack of %d KiB overflows",
                     (int)(STACK >> 10));
        else
            snprintf(fault_text, sizeof fault_text, "touches device memory: %s", text);
#if defined(__x86_64__)
        ucontext_t *u = static_cast<ucontext_t *>(context);
        uintptr_t sp = reinterpret_cast<uintptr_t>(emergency_stack + sizeof emergency_stack) - 8;
        u->uc_mcontext.gregs[REG_RIP] =
            static_cast<greg_t>(reinterpret_cast<uintptr_t>(end_kernel_after_fault));
        u->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(sp);
        return;
#endif
    }
    (void)context;
    if (ours && cq_emu_memory_locked()) {
        int n = snprintf(line, sizeof line,
                         "cuda_on_cpu: host code touched device memory at %p: %s; called from\n",
                         static_cast<const void *>(at), text);
        void *frames[24];
        if (write(2, line, (size_t)n) > 0)
            backtrace_symbols_fd(frames, backtrace(frames, 24), 2);
    } else if (E.launch) {
        int n = where(line, sizeof line);
        n += snprintf(line + n, sizeof line - (size_t)n, "touched address %p\n",
                      static_cast<const void *>(at));
        if (write(2, line, (size_t)n) < 0)
            _exit(1);
    }
    sigaction(number, &before, nullptr); /* the access happens again, with the handler of before */
}
} // namespace

extern "C" void cq_emu_watch(void) {
    static bool done;
    if (done)
        return;
    done = true;
    stack_t old = {};
    if (sigaltstack(nullptr, &old) == 0 && (old.ss_flags & SS_DISABLE)) {
        stack_t mine = {};
        mine.ss_size = 256 << 10;
        mine.ss_sp = malloc(mine.ss_size);
        sigaltstack(&mine, nullptr);
    }
    struct sigaction a = {};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&a.sa_mask);
    sigaction(SIGSEGV, &a, &before);
}
