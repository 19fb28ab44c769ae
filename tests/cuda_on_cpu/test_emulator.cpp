/* test_emulator.cpp - the emulated device: right kernels run right in every order of threads, and
 * each mistake of the list below is noticed, in a process of its own. */
#include "kernels/cuda/cq_cuda.h"
extern "C" {
#include "core/model/model.h"
#include "core/tensor/plan.h"
#include "tests/cuda_on_cpu/memory.h"
}
#include <signal.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

extern "C" const cq_kernels cq_cuda_on_cpu_kernels;

namespace {

int failures;
#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("%s:%d: ", __FILE__, __LINE__);                                                 \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)
const char *const orders[] = {"forward", "reverse", "random:1", "random:2"};

/* Device memory of an opened stream. */
struct buffer {
    cq_stream *s;
    float *at;
    int64_t bytes;
    buffer(cq_stream *stream, int64_t n) : s(stream), at(nullptr), bytes(4 * n) {
        void *p = nullptr;
        s->table->memory->take(&p, bytes, false);
        at = static_cast<float *>(p);
    }
    ~buffer() { s->table->memory->give(at, bytes, false); }
    std::vector<float> read() {
        std::vector<float> v((size_t)(bytes / 4));
        s->table->memory->copy(s, v.data(), at, bytes);
        return v;
    }
};
cq_stream open_stream() {
    cq_stream s = {};
    s.table = &cq_cuda_on_cpu_kernels;
    s.table->memory->open(&s, 0);
    return s;
}

// ---- kernels with a mistake each, chosen by `bug`; 0 is right -----------------------------------
enum { N = 64 };
/* Each block turns its row around through shared memory, twice. */
__global__ void turn_around(int bug, const float *x, float *y) {
    CQ_SHARED(float, row, [N]);
    int t = (int)threadIdx.x, first = (int)blockIdx.x * N;
    row[t] = x[first + t];
    if (bug != 1)
        __syncthreads();
    float v = row[N - 1 - t];
    if (bug != 2)
        __syncthreads();
    row[t] = v + 1;
    __syncthreads();
    y[first + t] = row[N - 1 - t];
}
__global__ void uneven(int bug, float *y) {
    CQ_SHARED(float, room, [N + 1]);
    int t = (int)threadIdx.x;
    if (bug == 1 && t == 37)
        return;
    if (bug == 2 && t < 32)
        __syncthreads();
    else
        __syncthreads();
    if (bug == 3 && t % 32 < 16)
        y[t] = __shfl_xor_sync(0xffffffffu, (float)t, 1);
    else if (bug == 3)
        y[t] = __shfl_xor_sync(0xffffffffu, (float)t, 2);
    if (bug == 4)
        y[t] = __shfl_sync(0x0000ffffu, (float)t, 0);
    if (bug == 5 && t < 16)
        y[t] = __shfl_sync(0x0000ffffu, (float)t, 20);
    if (bug == 6 && t < 16)
        y[t] = __shfl_xor_sync(0xffffffffu, (float)t, 1);
    if (bug == 7 && (t < 32 || t == 40))
        __syncthreads();
    else if (bug == 7)
        __syncwarp();
    if (bug == 8)
        y[t] = room[t];
    float *beyond = room + 2;
    if (bug == 9)
        beyond[t] = 1.0f;
}
__global__ void overrun_dynamic(float *y) {
    CQ_DYN_SMEM(float, rows);
    rows[threadIdx.x + 1] = 1.0f;
    y[0] = rows[0];
}
/* Sums `chunks` pieces of x, two in flight. */
__global__ void pipeline(int bug, int chunks, const float *x, float *y) {
    CQ_SHARED(float, room, [2][4 * N]);
    int t = (int)threadIdx.x;
    float sum = 0.0f;
    cq_emu_cp_async(&room[0][4 * t], x + 4 * t, 16, 16);
    cq_emu_cp_commit();
    for (int c = 0; c < chunks; c++) {
        int next = c + 1;
        if (next < chunks)
            cq_emu_cp_async(&room[next % 2][4 * t], x + 4 * (next * N + t), 16, 16);
        cq_emu_cp_commit();
        if (!(bug == 1 && next == chunks))
            cq_emu_cp_wait(bug == 2 && next < chunks ? 2 : 1);
        __syncthreads();
        for (int i = 0; i < 4; i++)
            sum += (float)(c + 1) * room[c % 2][(4 * t + 5 + i) % (4 * N)];
        if (bug != 3)
            __syncthreads();
    }
    y[t] = sum;
}
__global__ void touch(float *p, int64_t at) {
    if (threadIdx.x == 5)
        p[at] = 1.0f;
}
__attribute__((noinline)) int deep(int n, volatile char *above) {
    volatile char room[4096];
    room[0] = (char)n;
    return n == 0 ? above[0] : deep(n - 1, room) + room[0];
}
__global__ void overflow(float *y) {
    volatile char c = 0;
    y[0] = (float)deep(200, &c);
}
__global__ void nothing(float *) {}
__global__ void sum_twice(const float *scratch, float *y) { y[threadIdx.x] = scratch[threadIdx.x]; }
template <int KIB> __global__ void large_static(float *y) {
    CQ_SHARED(float, room, [KIB * 256]);
    room[threadIdx.x] = 1.0f;
    y[threadIdx.x] = room[threadIdx.x];
}

// ---- right results ------------------------------------------------------------------------------
std::vector<float> turned(int bug) {
    cq_stream st = open_stream(), *s = &st;
    buffer x(s, 3 * N), y(s, 3 * N);
    std::vector<float> v(3 * N);
    for (int i = 0; i < 3 * N; i++)
        v[(size_t)i] = (float)i;
    s->table->memory->copy(s, x.at, v.data(), x.bytes);
    CQ_LAUNCH(turn_around, 3, N, 0, s, bug, x.at, y.at);
    if (cq_cuda_status("test") != CQ_OK)
        printf("%s\n", cq_error());
    std::vector<float> result = y.read();
    s->table->memory->close(s);
    return result;
}
bool turned_right(int bug) {
    std::vector<float> y = turned(bug);
    for (int i = 0; i < 3 * N; i++)
        if (y[(size_t)i] != (float)(i + 1))
            return false;
    return true;
}
float piped(int bug) {
    enum { CHUNKS = 5 };
    static float x[4 * N * CHUNKS], y[N];
    cq_stream st = {}, *s = &st;
    float wrong = 0.0f;
    for (int i = 0; i < 4 * N * CHUNKS; i++)
        x[i] = (float)(i % 97);
    CQ_LAUNCH(pipeline, 1, N, 0, s, bug, (int)CHUNKS, x, y);
    if (cq_cuda_status("test") != CQ_OK) {
        printf("%s\n", cq_error());
        return 1.0f;
    }
    for (int t = 0; t < N; t++) {
        float sum = 0.0f;
        for (int c = 0; c < CHUNKS; c++)
            for (int i = 0; i < 4; i++)
                sum += (float)(c + 1) * x[4 * N * c + (4 * t + 5 + i) % (4 * N)];
        if (!(y[t] == sum))
            wrong = 1.0f;
    }
    return wrong;
}

__global__ void collectives(int64_t *out) {
    unsigned all = 0xffffffffu, lane = threadIdx.x % 32, half = lane < 16 ? 0xffffu : 0xffff0000u;
    int wrong = 0, l = (int)lane;
    wrong += __shfl_sync(all, l * 3, 7) != 21;
    wrong += __shfl_sync(all, l, l + 5, 8) != (l & ~7) + (l + 5) % 8;
    wrong += __shfl_up_sync(all, l, 3u) != (l >= 3 ? l - 3 : l);
    wrong += __shfl_up_sync(all, l, 3u, 16) != (l % 16 >= 3 ? l - 3 : l);
    wrong += __shfl_down_sync(all, (double)l, 5u) != (l + 5 < 32 ? l + 5 : l);
    wrong += __shfl_xor_sync(all, 1ll << 40 | l, 9) != (1ll << 40 | (l ^ 9));
    wrong += __shfl_xor_sync(half, l, 5) != (l ^ 5);
    wrong += __ballot_sync(all, l % 3 == 0) != 0x49249249u;
    wrong += __any_sync(half, l == 20) != (l >= 16);
    wrong += __all_sync(half, l < 16) != (l < 16);
    wrong += __reduce_add_sync(all, lane) != 496u;
    wrong += __reduce_min_sync(all, l - 7) != -7;
    wrong += __reduce_max_sync(half, lane) != (l < 16 ? 15u : 31u);
    wrong += __reduce_xor_sync(all, 1u << lane) != all;
    wrong += __match_any_sync(all, l % 16) != 0x10001u << l % 16;
    wrong += __syncthreads_count(l == 4) != (int)(blockDim.x * blockDim.y / 32);
    wrong += __syncthreads_or(threadIdx.y == 1 && l == 0) != 1;
    wrong += __syncthreads_and(l < 31) != 0;
    wrong += cq_warp_sum((float)l) != 496.0f;
    atomicAdd((unsigned long long *)out, (unsigned long long)wrong);
    atomicAdd((unsigned long long *)out + 1, 1ull);
    atomicMax((int *)(out + 2), (int)(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z));
}
void check_right() {
    for (const char *order : orders)
        for (const char *copies : {"late", "eager"}) {
            EXPECT(cq_emu_set(order, copies), "cq_emu_set");
            EXPECT(turned_right(0), "turn_around, %s", order);
            EXPECT(piped(0) == 0.0f, "pipeline, %s, %s", order, copies);
            cq_stream st = {}, *s = &st;
            int64_t out[3] = {0, 0, 0};
            CQ_LAUNCH(collectives, dim3(3, 2, 4), dim3(32, 3), 0, s, out);
            EXPECT(cq_cuda_status("collectives") == CQ_OK, "%s", cq_error());
            EXPECT(out[0] == 0, "%s: %lld wrong collectives", order, (long long)out[0]);
            EXPECT(out[1] == 24 * 96, "%lld threads ran", (long long)out[1]);
            EXPECT(out[2] == 312, "last block %lld", (long long)out[2]);
        }
    EXPECT(!cq_emu_set("backward", nullptr) && !cq_emu_set(nullptr, "never"), "cq_emu_set");
    for (uint32_t i = 0; i < 1u << 20; i++) {
        uint32_t bits = i * 4099u + (i >> 8);
        float f, back;
        memcpy(&f, &bits, 4);
        uint16_t want;
        cq_convert(&want, CQ_BF16, &f, CQ_F32, 1);
        unsigned short got = __bfloat16_as_ushort(__float2bfloat16_rn(f));
        back = __bfloat162float(__ushort_as_bfloat16(got));
        if (f == f)
            EXPECT(got == want, "BF16 of %08x is %04x, wanted %04x", bits, got, want);
        else
            EXPECT(back != back, "BF16 of NaN %08x is %04x", bits, got);
        if (failures > 20)
            break;
    }
}

// ---- mistakes -----------------------------------------------------------------------------------
struct mistake {
    const char *name, *text; ///< what is printed; NULL: results are wrong in some order
    void (*run)();
};
/* Prints the error of a launch, or that there was none. */
void tell() { printf("%s\n", cq_cuda_status("test") == CQ_OK ? "no error" : cq_error()); }
template <int BUG> void run_uneven() {
    static float y[4 * N];
    cq_stream st = {}, *s = &st;
    CQ_LAUNCH(uneven, 1, N, 0, s, (int)BUG, y);
    tell();
    bool nan = false;
    for (int i = 0; i < N; i++)
        nan |= y[i] != y[i];
    if (nan)
        printf("NaN in the results\n");
}
template <int BUG> void run_turned() {
    for (const char *order : orders) {
        cq_emu_set(order, nullptr);
        if (!turned_right(BUG))
            printf("wrong results\n");
    }
}
template <int BUG> void run_piped() {
    for (const char *copies : {"late", "eager"})
        for (const char *order : orders) {
            cq_emu_set(order, copies);
            if (piped(BUG) != 0.0f)
                printf("wrong results\n");
        }
}
void launch(unsigned grid, unsigned block, int64_t bytes) {
    cq_stream st = {}, *s = &st;
    CQ_LAUNCH(nothing, grid, block, bytes, s, nullptr);
    tell();
}
void run_dynamic() {
    float y;
    cq_stream st = {}, *s = &st;
    CQ_LAUNCH(overrun_dynamic, 1, N, 4 * N, s, &y);
    tell();
}
template <int KIB> void run_static() {
    static float y[32];
    cq_stream st = {}, *s = &st;
    CQ_LAUNCH((large_static<KIB>), 1, 32, KIB == 40 ? 9 << 10 : 0, s, y);
    tell();
}
void run_touch(int64_t at, bool given, bool read_by_host) {
    cq_stream st = open_stream(), *s = &st;
    buffer *x = new buffer(s, 100), y(s, 10);
    float *p = x->at;
    if (read_by_host)
        printf("%g\n", (double)p[3]);
    if (given)
        delete x;
    uintptr_t hidden = reinterpret_cast<uintptr_t>(p); /* an address inside a struct, say */
    st.device = nullptr;
    CQ_LAUNCH(touch, 1, 32, 0, s, reinterpret_cast<float *>(hidden), at);
    tell();
    if (!given)
        delete x;
    tell();
}
void run_host_pointer() {
    cq_stream st = open_stream(), *s = &st;
    float host[32] = {0};
    CQ_LAUNCH(nothing, 1, 32, 0, s, host);
    tell();
}
void run_host_argument() {
    cq_stream st = open_stream(), *s = &st;
    buffer x(s, 10);
    double host = 0.0;
    cq_sumsq_args a = {};
    a.n = 10;
    a.x = x.at;
    a.out = &host;
    s->table->sumsq(s, &a);
    printf("%s\n", cq_error());
}
void run_scratch() {
    static float y[32];
    cq_stream st = open_stream(), *s = &st;
    for (int i = 0; i < 2; i++) {
        float *scratch = static_cast<float *>(cq_cuda_scratch(s, 128));
        st.device = nullptr;
        CQ_LAUNCH(sum_twice, 1, 32, 0, s, scratch, y);
        tell();
        printf("%s\n", y[7] != y[7] ? "NaN in the results" : "numbers");
    }
}
/* An operation is recorded, then `mistake`: neither may be kept or have happened. */
template <typename F> void run_recorded(F mistake) {
    cq_stream st = open_stream(), *s = &st;
    const cq_memory *m = s->table->memory;
    buffer x(s, 10);
    void *graph = s;
    cq_axpy_args a = {};
    a.n = 10, a.alpha = 1, a.beta = 1, a.x = x.at, a.y = x.at;
    float value = 1;
    m->copy(s, x.at, &value, sizeof value);
    m->record(s);
    s->table->axpy(s, &a);
    mistake(s, x.at);
    printf("%s\n", cq_error());
    int status = m->recorded(s, &graph);
    if (status == CQ_OK || graph || x.read()[0] != 1)
        printf("it was kept, or done");
    else
        printf("%s\n", cq_error());
}
void run_recorded_copy() {
    static float host[10];
    run_recorded([](cq_stream *s, float *x) { s->table->memory->copy(s, x, host, 40); });
}
void run_recorded_wait() {
    run_recorded([](cq_stream *s, float *) { s->table->memory->wait(s); });
}
void run_recorded_take() {
    run_recorded([](cq_stream *s, float *) { cq_cuda_scratch(s, 1 << 20); });
}
void run_overflow() {
    float y;
    cq_stream st = {}, *s = &st;
    CQ_LAUNCH(overflow, 1, 32, 0, s, &y);
    tell();
}
const mistake mistakes[] = {
    {"a missing barrier", "wrong results", run_turned<1>},
    {"a missing barrier before reuse", "wrong results", run_turned<2>},
    {"a copy that the last round does not wait for", "asynchronous copies", run_piped<1>},
    {"a wait that leaves too many groups", "wrong results", run_piped<2>},
    {"a missing barrier before a copy into the same place", "wrong results", run_piped<3>},
    {"an early return", "thread (37, 0, 0): ends while thread 0 waits at the barrier in",
     run_uneven<1>},
    {"two barriers", "thread 0 at the one in test_emulator.cpp", run_uneven<2>},
    {"two shuffles", "of its warp at a shuffle, test_emulator.cpp", run_uneven<3>},
    {"a mask without the lane", "lacks this lane", run_uneven<4>},
    {"a shuffle from outside its mask", "reads lane 20", run_uneven<5>},
    {"a shuffle that half of a warp calls", "waits for it at a shuffle", run_uneven<6>},
    {"a barrier beside a warp barrier", "threads wait for each other", run_uneven<7>},
    {"shared memory that nobody wrote", "NaN in the results", run_uneven<8>},
    {"shared memory overrun", "written outside room", run_uneven<9>},
    {"dynamic shared memory overrun", "written outside dynamic shared memory", run_dynamic},
    {"too much static shared memory", "at most 49152", run_static<50>},
    {"static and dynamic over 48 KiB", "need cq_cuda_shared_bytes", run_static<40>},
    {"49 KiB not asked for", "50176 bytes of dynamic", [] { launch(1, 32, 49 << 10); }},
    {"1056 threads", "at most 1024", [] { launch(1, 1056, 0); }},
    {"no whole warps", "wanted whole warps", [] { launch(1, 100, 0); }},
    {"an empty grid", "none, or too many", [] { launch(0, 32, 0); }},
    {"device memory touched by the host", "host code touched device memory",
     [] { run_touch(0, false, true); }},
    {"device memory after its end", "after the end of a piece of 400",
     [] { run_touch(1000, false, false); }},
    {"device memory just after its end", "written 0 bytes after the end of a piece of 400",
     [] { run_touch(100, false, false); }},
    {"device memory before its beginning", "bytes before a piece",
     [] { run_touch(-1024, false, false); }},
    {"device memory given back", "touches device memory", [] { run_touch(0, true, false); }},
    {"a kernel's host pointer", "points to the host's memory", run_host_pointer},
    {"an operation's host pointer", "sumsq: out points to the host's memory", run_host_argument},
    {"scratch that nobody wrote", "NaN in the results", run_scratch},
    {"a copy of the host's, recorded", "memory while operations are recorded\ncuda: recording",
     run_recorded_copy},
    {"a wait, recorded", "waiting while operations are recorded\ncuda: recording",
     run_recorded_wait},
    {"more scratch, recorded", "taking memory while operations are recorded\ncuda: recording",
     run_recorded_take},
    {"a stack that overflows", "its stack of 256 KiB overflows", run_overflow},
};

std::string in_child(void (*run)()) {
    int ends[2];
    std::string text;
    char piece[4096];
    fflush(stdout);
    if (pipe(ends) != 0)
        return text;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        alarm(60);
        cq_emu_set("forward", "late");
        run();
        fflush(stdout);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;)
        text.append(piece, (size_t)n);
    close(ends[0]);
    waitpid(child, nullptr, 0);
    return text;
}

/* What a plan counts for the scratch of a device is what the operations of a training ask for at
 * these shapes, and less than half as much again. */
void check_scratch(const char *folder, cq_compute compute, cq_dtype act, int64_t tokens) {
    cq_model *m = nullptr;
    cq_plan *p = nullptr;
    EXPECT(!cq_model_create(&m, folder, CQ_F32) && !cq_plan_open(&p), "%s", cq_error());
    cq_model_set_compute(m, compute);
    cq_model_set_activations(m, act);
    cq_plan_imagine(p);
    EXPECT(!cq_model_plan_params(m, p, true) &&
               !cq_model_plan_work(m, p, tokens, tokens, CQ_MODE_SAVE, 1),
           "%s", cq_error());
    const cq_config *c = cq_model_config(m);
    int64_t planned = cq_plan_bytes(p, CQ_FOR_KERNELS), docs[2] = {0, tokens};
    cq_stream s = {};
    s.compute = compute;
    float sums;
    cq_rmsnorm_backward_args n = {};
    n.rows = tokens, n.dim = c->hidden, n.dw = &sums;
    cq_emu_rehearse(true);
    EXPECT(!cq_cuda_rmsnorm_backward(&s, &n), "%s", cq_error());
    if (c->heads > 0) {
        cq_attention_backward_args a = {};
        a.tokens = tokens, a.n_docs = 1, a.starts = docs, a.act = act;
        a.heads = c->heads, a.kv_heads = c->kv_heads, a.head_dim = c->head_dim, a.scale = 0.1;
        a.ldq = a.lddq = c->heads * c->head_dim;
        a.ldk = a.ldv = a.lddk = a.lddv = c->kv_heads * c->head_dim;
        EXPECT(!cq_cuda_attention_backward(&s, &a), "%s", cq_error());
    }
    if (c->mamba_heads > 0) {
        cq_ssd_backward_args a = {};
        a.tokens = tokens, a.n_docs = 1, a.starts = docs, a.act = act;
        a.heads = c->mamba_heads, a.head_dim = c->mamba_head_dim, a.groups = c->mamba_groups;
        a.state = c->mamba_state, a.ldx = a.lddx = a.heads * a.head_dim;
        a.ldB = a.ldC = a.lddB = a.lddC = a.groups * a.state, a.ld_dt = a.ldd_dt = a.heads;
        EXPECT(!cq_cuda_ssd_backward(&s, &a), "%s", cq_error());
        cq_conv_backward_args v = {};
        v.tokens = tokens, v.n_docs = 1, v.starts = docs, v.act = act, v.width = c->conv_width;
        v.channels = v.ldx = v.lddx = a.ldx + 2 * a.ldB, v.dw = v.db = &sums;
        EXPECT(!cq_cuda_conv_backward(&s, &v), "%s", cq_error());
    }
    int64_t asked = cq_emu_scratch();
    cq_emu_rehearse(false);
    EXPECT(asked <= planned && planned < asked + asked / 2 + (8 << 20),
           "%s, compute %d, act %d: %.1f MiB of scratch planned, %.1f asked for", folder, compute,
           act, (double)planned / 1048576, (double)asked / 1048576);
    printf("%s, %d tokens: scratch %.1f MiB, planned %.1f\n", folder, (int)tokens,
           (double)asked / 1048576, (double)planned / 1048576);
    cq_plan_close(p);
    cq_model_close(m);
}

} // namespace

int main(int argc, char **argv) {
    int noticed = 0;
    check_right();
    std::string root = argc > 1 ? argv[1] : ".";
    for (const char *folder : {"/kernels/bench/nano_slice", "/kernels/bench/qwen3_4b"})
        for (int64_t tokens : {2048, 8192}) {
            check_scratch((root + folder).c_str(), CQ_COMPUTE_F32, CQ_F32, tokens);
            check_scratch((root + folder).c_str(), CQ_COMPUTE_BF16, CQ_F32, tokens);
            check_scratch((root + folder).c_str(), CQ_COMPUTE_BF16, CQ_BF16, tokens);
        }
    for (const mistake &m : mistakes) {
        std::string text = in_child(m.run);
        /* with AddressSanitizer the program may end there, with its report */
        bool found = text.find(m.text) != std::string::npos ||
                     (text.find("AddressSanitizer: use-after-poison") != std::string::npos);
#ifdef __SANITIZE_THREAD__
        if (strcmp(m.text, "wrong results") == 0 && strstr(m.name, "missing"))
            found &= text.find("ThreadSanitizer: data race") != std::string::npos;
#endif
        EXPECT(found, "%s: not noticed: %s", m.name, text.c_str());
        noticed += found;
    }
    printf("%d of %d mistakes noticed, %d failures\n", noticed,
           (int)(sizeof mistakes / sizeof *mistakes), failures);
    return failures != 0;
}
