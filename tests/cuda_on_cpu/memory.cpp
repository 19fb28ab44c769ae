/* memory.cpp - the emulated device's memory.
 *
 * All of it lies in one reserved region. Each piece that is taken has pages of its own, ends at the
 * end of its last page and is followed by a page that nobody may touch; the bytes between its end
 * and the next multiple of 256 hold a pattern that is looked at when it is given back. Addresses
 * are used again as late as possible. While the host runs, the pieces' pages are closed to it; with
 * large pages that costs little.
 */
#include "tests/cuda_on_cpu/cuda_on_cpu.h"
extern "C" {
#include "tests/cuda_on_cpu/memory.h"
}
#include <functional>
#include <map>
#include <stdarg.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace {

const uintptr_t REGION = uintptr_t(1) << 36, PAGE = 4096, HUGE = 2 << 20;
enum { ALIGN = 256, TAIL = 0xa5 };

struct piece {
    uintptr_t end_of_pages; ///< without the page that follows
    uintptr_t at;
    int64_t bytes;
};
struct region {
    uintptr_t base = 0, cursor = 0;
    std::map<uintptr_t, piece> pieces;   ///< by first page
    std::map<uintptr_t, int64_t> shared; ///< the host's, too
    int open = 0;
};
region R;

struct device {
    void *scratch;
    int64_t scratch_bytes;
};
device orphan; ///< of streams that were never opened

uintptr_t up(uintptr_t n, uintptr_t to) { return (n + to - 1) / to * to; }

bool reserve() {
    if (R.base)
        return true;
    void *at = mmap(nullptr, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return false;
    R.base = R.cursor = reinterpret_cast<uintptr_t>(at);
    cq_emu_watch();
    return true;
}

/* A free range of `bytes` that starts at or after `from`; 0 when there is none. */
uintptr_t find(uintptr_t from, uintptr_t bytes) {
    uintptr_t at = from;
    auto next = R.pieces.upper_bound(from);
    if (next != R.pieces.begin()) {
        auto before = std::prev(next);
        at = std::max(at, before->second.end_of_pages + PAGE);
    }
    for (; next != R.pieces.end() && next->first - at < bytes; ++next)
        at = next->second.end_of_pages + PAGE;
    return at + bytes <= R.base + REGION ? at : 0;
}

const piece *piece_at(uintptr_t p) {
    auto next = R.pieces.upper_bound(p);
    if (next == R.pieces.begin())
        return nullptr;
    const piece *q = &std::prev(next)->second;
    return p >= q->at && p < q->at + (uintptr_t)q->bytes ? q : nullptr;
}

void protect(const std::pair<const uintptr_t, piece> &p, int how) {
    mprotect(reinterpret_cast<void *>(p.first), p.second.end_of_pages - p.first, how);
}

void check_tail(const piece &p) {
    const unsigned char *end = reinterpret_cast<unsigned char *>(p.at + (uintptr_t)p.bytes);
    int64_t n = int64_t(p.end_of_pages - p.at) - p.bytes;
    ASAN_UNPOISON_MEMORY_REGION(end, (size_t)n);
    for (int64_t i = 0; i < n; i++)
        if (end[i] != TAIL) {
            cq_emu_note("device memory was written %lld bytes after the end of a piece of %lld",
                        (long long)i, (long long)p.bytes);
            break;
        }
}

} // namespace

extern "C" bool cq_emu_memory_locked(void) { return R.open == 0; }
extern "C" void cq_emu_memory_unlock(void) {
    if (R.open++ == 0)
        for (auto &p : R.pieces)
            protect(p, PROT_READ | PROT_WRITE);
}
extern "C" void cq_emu_memory_lock(void) {
    if (--R.open == 0)
        for (auto &p : R.pieces)
            protect(p, PROT_NONE);
}

extern "C" bool cq_emu_memory_has(const void *p, int64_t *left) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p);
    const piece *q = piece_at(at);
    if (q) {
        *left = q->bytes - int64_t(at - q->at);
        return true;
    }
    auto next = R.shared.upper_bound(at);
    if (next == R.shared.begin())
        return false;
    --next;
    *left = next->second - int64_t(at - next->first);
    return *left > 0;
}

extern "C" bool cq_emu_memory_explain(const void *p, char *text, size_t size) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (!R.base || at < R.base || at >= R.base + REGION)
        return false;
    const piece *q = piece_at(at);
    if (q) {
        snprintf(text, size, "byte %lld of a piece of %lld", (long long)(at - q->at),
                 (long long)q->bytes);
        return true;
    }
    auto next = R.pieces.upper_bound(at);
    uintptr_t before = REGION, after = REGION;
    if (next != R.pieces.end())
        before = next->second.at - at;
    if (next != R.pieces.begin())
        after = at - std::prev(next)->second.at - (uintptr_t)std::prev(next)->second.bytes;
    if (before < after)
        snprintf(text, size, "%lld bytes before a piece of %lld", (long long)before,
                 (long long)next->second.bytes);
    else if (after < REGION)
        snprintf(text, size, "%lld bytes after the end of a piece of %lld", (long long)after,
                 (long long)std::prev(next)->second.bytes);
    else
        snprintf(text, size, "memory that was given back or never taken");
    return true;
}

/* CKAQAD_CUDA_MEMORY=BYTES: what the device has. */
static int64_t free_bytes() {
    const char *text = getenv("CKAQAD_CUDA_MEMORY");
    int64_t all =
        text ? atoll(text) : (int64_t)sysconf(_SC_AVPHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
    for (auto &p : R.pieces)
        all -= text ? p.second.bytes : 0;
    return all > 0 ? all : 0;
}

/* Operations that are kept instead of done, and whether one of them could not be. */
struct recording {
    std::vector<std::function<int()>> list;
    bool spoilt;
};
static recording *now = nullptr;
static int64_t memory_changes = 0;

extern "C" bool cq_emu_recording(void) { return now != nullptr; }
extern "C" int cq_emu_keep(cq_stream *s, cq_emu_operation operation, const void *arguments,
                           size_t bytes) {
    std::string copy(static_cast<const char *>(arguments), bytes);
    cq_stream as_now = *s;
    now->list.push_back([=]() mutable { return operation(&as_now, copy.data()); });
    return CQ_OK;
}

static int while_recording(const char *what) {
    now->spoilt = true;
    return cq_fail(CQ_EUSAGE, "cuda: %s while operations are recorded", what);
}

static int take(void **out, int64_t bytes, bool shared) {
    int64_t n = bytes > 0 ? bytes : 1;
    memory_changes++;
    if (now)
        return while_recording("taking memory");
    if (!shared && n > free_bytes())
        return cq_fail(CQ_ENOMEM, "cuda: %lld bytes wanted, %lld are free", (long long)n,
                       (long long)free_bytes());
    if (shared) {
        void *at = nullptr;
        if (posix_memalign(&at, ALIGN, up((uintptr_t)n, ALIGN)) != 0)
            return cq_fail(CQ_ENOMEM, "cuda: %lld bytes wanted", (long long)bytes);
        memset(at, 0, up((uintptr_t)n, ALIGN));
        R.shared[reinterpret_cast<uintptr_t>(at)] = n;
        *out = at;
        return CQ_OK;
    }
    uintptr_t size = up((uintptr_t)n, ALIGN), pages = up(size, PAGE);
    if (size >= HUGE / 2)
        pages = up(size, HUGE);
    if (!reserve())
        return cq_fail(CQ_ENOMEM, "cuda: no address space for the emulated device");
    uintptr_t slack = size >= HUGE / 2 ? HUGE : 0;
    uintptr_t first = find(R.cursor, pages + PAGE + slack);
    if (!first)
        first = find(R.base, pages + PAGE + slack);
    if (slack)
        first = up(first, HUGE);
    if (!first)
        return cq_fail(CQ_ENOMEM, "cuda: %lld bytes wanted, the emulated device is full",
                       (long long)bytes);
    R.cursor = first + pages + PAGE;
    piece p = {first + pages, first + pages - size, n};
    mprotect(reinterpret_cast<void *>(first), pages, PROT_READ | PROT_WRITE);
    if (slack)
        madvise(reinterpret_cast<void *>(first), pages, MADV_HUGEPAGE);
    char *at = reinterpret_cast<char *>(p.at);
    memset(at + n, TAIL, size - (uintptr_t)n);
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<void *>(first), p.at - first);
    ASAN_POISON_MEMORY_REGION(at + n, size - (uintptr_t)n);
    auto placed = R.pieces.emplace(first, p).first;
    if (cq_emu_memory_locked())
        protect(*placed, PROT_NONE);
    *out = at;
    return CQ_OK;
}

static void give(void *memory, int64_t bytes, bool shared) {
    uintptr_t at = reinterpret_cast<uintptr_t>(memory);
    memory_changes++;
    if (!memory)
        return;
    if (shared) {
        if (R.shared.erase(at))
            free(memory);
        else
            cq_emu_note("shared memory is given back that was not taken");
        return;
    }
    const piece *p = piece_at(at);
    if (!p || p->at != at || p->bytes != (bytes > 0 ? bytes : 1)) {
        cq_emu_note("device memory is given back that was not taken, or with another size");
        return;
    }
    auto place = std::prev(R.pieces.upper_bound(at));
    cq_emu_memory_unlock();
    check_tail(*p);
    cq_emu_memory_lock();
    uintptr_t first = place->first, length = p->end_of_pages - first;
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void *>(first), length);
    R.pieces.erase(place);
    madvise(reinterpret_cast<void *>(first), length, MADV_DONTNEED);
    mprotect(reinterpret_cast<void *>(first), length, PROT_NONE);
}

/* A range on the device must lie in one live piece. */
static int check_range(const void *p, int64_t bytes, const char *what) {
    int64_t left = 0;
    char where[96];
    if (cq_emu_memory_has(p, &left)) {
        if (left >= bytes)
            return CQ_OK;
        return cq_fail(CQ_EIO, "cuda: %s: %lld bytes wanted, %lld lie there", what,
                       (long long)bytes, (long long)left);
    }
    if (cq_emu_memory_explain(p, where, sizeof where))
        return cq_fail(CQ_EIO, "cuda: %s: %s", what, where);
    return CQ_OK;
}

static int64_t waits = 0;
extern "C" int64_t cq_emu_waits(void) { return waits; }

static int copy(cq_stream *s, void *to, const void *from, int64_t bytes) {
    int64_t left;
    (void)s;
    if (bytes <= 0)
        return CQ_OK;
    if (now && !(cq_emu_memory_has(to, &left) && cq_emu_memory_has(from, &left)))
        return while_recording("a copy of the host's memory");
    if (now) {
        now->list.push_back([=] { return copy(nullptr, to, from, bytes); });
        return CQ_OK;
    }
    CQ_TRY(check_range(to, bytes, "copying to"));
    CQ_TRY(check_range(from, bytes, "copying from"));
    waits += !piece_at(reinterpret_cast<uintptr_t>(to));
    cq_emu_memory_unlock();
    memcpy(to, from, (size_t)bytes);
    cq_emu_memory_lock();
    return CQ_OK;
}
static int zero(cq_stream *s, void *to, int64_t bytes) {
    (void)s;
    if (bytes <= 0)
        return CQ_OK;
    if (now) {
        now->list.push_back([=] { return zero(nullptr, to, bytes); });
        return CQ_OK;
    }
    CQ_TRY(check_range(to, bytes, "clearing"));
    cq_emu_memory_unlock();
    memset(to, 0, (size_t)bytes);
    cq_emu_memory_lock();
    return CQ_OK;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    if (bytes == 0)
        return cudaSuccess;
    if (check_range(to, (int64_t)bytes, "cudaMemsetAsync") != CQ_OK) {
        cq_emu_note("%s", cq_error());
        return cudaErrorInvalidValue;
    }
    cq_emu_memory_unlock();
    memset(to, value, bytes);
    cq_emu_memory_lock();
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
    if (bytes == 0)
        return cudaSuccess;
    if (copy(nullptr, to, from, (int64_t)bytes) != CQ_OK) {
        cq_emu_note("%s", cq_error());
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}

static int opened = 0;
extern "C" int cq_emu_device(void) { return opened; }

/* CKAQAD_CUDA_DEVICES: how many there seem to be. */
static int count(int *n) {
    const char *text = getenv("CKAQAD_CUDA_DEVICES");
    *n = text ? atoi(text) : 1;
    return CQ_OK;
}

static int open_stream(cq_stream *s, int index) {
    int n = 0;
    count(&n);
    if (index < 0 || index >= n)
        return cq_fail(CQ_EUSAGE, "cuda: device %d does not exist, this machine has %d (0 to %d)",
                       index, n, n - 1);
    opened = index;
    if (!reserve())
        return cq_fail(CQ_ENOMEM, "cuda: no address space for the emulated device");
    s->device = calloc(1, sizeof(device));
    s->queue = s->device;
    return s->device ? CQ_OK : cq_fail(CQ_ENOMEM, "cuda: no memory");
}
static void close_stream(cq_stream *s) {
    device *d = static_cast<device *>(s->device);
    if (!d)
        return;
    give(d->scratch, d->scratch_bytes, false);
    free(d);
    s->device = s->queue = nullptr;
}
static int wait_stream(cq_stream *s) {
    (void)s;
    if (now)
        return while_recording("waiting");
    waits++;
    return cq_emu_status("an operation failed on the device");
}
/* A fetch happens as late as it may; until then NaN lies there. */
struct fetched {
    void *to;
    const void *from;
    int64_t bytes;
};
static fetched waiting[2];
static int fetch(cq_stream *s, int slot, void *to, const void *from, int64_t bytes) {
    (void)s;
    int64_t left;
    if (now)
        return while_recording("a fetch");
    CQ_TRY(check_range(to, bytes, "fetching to"));
    CQ_TRY(check_range(from, bytes, "fetching from"));
    if (!cq_emu_memory_has(from, &left))
        return cq_fail(CQ_EIO, "cuda: fetching from the host's own memory, wanted shared memory");
    waiting[slot] = fetched{to, from, bytes};
    cq_emu_memory_unlock();
    memset(to, 0xff, (size_t)bytes);
    cq_emu_memory_lock();
    return CQ_OK;
}
static int arrived(cq_stream *s, int slot) {
    fetched f = waiting[slot];
    waiting[slot].bytes = 0;
    return copy(s, f.to, f.from, f.bytes);
}
static int record(cq_stream *s) {
    (void)s;
    now = new recording{{}, false};
    return CQ_OK;
}
static int recorded(cq_stream *s, void **graph) {
    (void)s;
    bool whole = !now->spoilt;
    *graph = whole ? now : nullptr;
    if (!whole)
        delete now;
    now = nullptr;
    return whole ? CQ_OK : cq_fail(CQ_EIO, "cuda: recording: an operation could not be kept");
}
static int play(cq_stream *s, void *graph) {
    (void)s;
    for (auto &operation : static_cast<recording *>(graph)->list)
        CQ_TRY(operation());
    return CQ_OK;
}
static void forget(cq_stream *s, void *graph) {
    (void)s;
    delete static_cast<recording *>(graph);
}
static int64_t changes() { return memory_changes; }

static int available(int64_t *bytes) {
    *bytes = free_bytes();
    return CQ_OK;
}
/* CKAQAD_CUDA_FP4=1: it seems to have FP4 tensor cores. */
static bool has_fp4(const cq_stream *s) {
    (void)s;
    const char *text = getenv("CKAQAD_CUDA_FP4");
    return text && text[0] == '1';
}
static int describe(char *text, int64_t size) {
    snprintf(text, (size_t)size, "emulated GPU, thread by thread on the CPU");
    return CQ_OK;
}
extern "C" {
extern const cq_memory cq_emu_memory;
const cq_memory cq_emu_memory = {open_stream, close_stream, take,      give,     copy,     zero,
                                 wait_stream, fetch,        arrived,   record,   recorded, play,
                                 forget,      changes,      available, describe, count,    has_fp4};
}

static int64_t most_scratch = 0;
static bool rehearses = false;
extern "C" bool cq_emu_rehearses(void) { return rehearses; }
extern "C" void cq_emu_rehearse(bool on) {
    rehearses = on;
    most_scratch = 0;
}
extern "C" int64_t cq_emu_scratch(void) { return most_scratch; }

/* The content is NaN at each call: what an operation does not write it must not read. */
extern "C" void *cq_cuda_scratch(cq_stream *s, int64_t bytes) {
    device *d = s && s->device ? static_cast<device *>(s->device) : &orphan;
    int64_t wanted = (int64_t)up((uintptr_t)(bytes > 0 ? bytes : 1), ALIGN);
    most_scratch = std::max(most_scratch, wanted);
    if (rehearses)
        return reinterpret_cast<void *>((uintptr_t)ALIGN); /* nobody looks there */
    if (wanted > d->scratch_bytes) {
        give(d->scratch, d->scratch_bytes, false);
        *d = device{nullptr, 0};
        if (take(&d->scratch, wanted, false) != CQ_OK)
            return nullptr;
        d->scratch_bytes = wanted;
    }
    char *at = static_cast<char *>(d->scratch) + (d->scratch_bytes - wanted);
    cq_emu_memory_unlock();
    memset(at, 0xff, (size_t)wanted);
    cq_emu_memory_lock();
    return at;
}
