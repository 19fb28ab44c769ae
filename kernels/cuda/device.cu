/// device.cu - opening a GPU, its memory, copies, and the errors of the runtime.
///
/// Small host arrays go through a ring of pinned memory, so that an upload waits for nothing; when
/// the ring is full the stream is waited for once. A download waits, because its reader wants the
/// values. Kernels fail asynchronously: the error shows at the next call that looks, so with
/// CKAQAD_CUDA_SYNC=1 in the environment every operation is waited for and named.
#include "kernels/cuda/cq_cuda.h"
#include "kernels/cuda/device.h"
#include <atomic>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef CQ_CUDA_CODE /* the build says it */
#define CQ_CUDA_CODE "other devices"
#endif

namespace {

enum { RING_BYTES = 8 << 20, LARGEST_STAGED = 1 << 20 };

/// What device.cu keeps besides the fields of device.h.
struct device : cq_cuda_device {
    char *ring; ///< pinned
    int64_t ring_at;
    cudaStream_t fetches; ///< made when the first fetch is asked for, as the events are
    cudaEvent_t asked, done[2];
    bool recording;
};

std::atomic<int64_t> memory_changes{0};

device *of(cq_stream *s) { return static_cast<device *>(s->device); }

int failed(const char *what, cudaError_t e) {
    int code = e == cudaErrorMemoryAllocation ? CQ_ENOMEM : CQ_EIO;
    return cq_fail(code, "cuda: %s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
}

int no_device(cudaError_t e) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return cq_fail(CQ_EUSAGE,
                       "cuda: no driver, wanted one for CUDA %d.%d or newer, or "
                       "--device=cpu",
                       runtime / 1000, runtime % 1000 / 10);
    if (e == cudaErrorInsufficientDriver || (e != cudaSuccess && driver > 0 && driver < runtime))
        return cq_fail(CQ_EUSAGE,
                       "cuda: the driver supports CUDA %d.%d, wanted %d.%d or newer: update it, or "
                       "run with --device=cpu",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    return cq_fail(CQ_EUSAGE, "cuda: no usable GPU (%s), wanted one, or --device=cpu",
                   e == cudaSuccess ? "the driver lists none" : cudaGetErrorString(e));
}

/* The kernels of this file exist in the build's targets only. */
__global__ void probe() {}

int count(int *n) {
    *n = 0;
    cudaError_t e = cudaGetDeviceCount(n);
    return e == cudaSuccess && *n > 0 ? CQ_OK : no_device(e);
}

int check_device(int index, int *major, int *minor) {
    int n = 0;
    cudaError_t e;
    CQ_TRY(count(&n));
    if (index < 0 || index >= n)
        return cq_fail(CQ_EUSAGE, "cuda: device %d does not exist, this machine has %d (0 to %d)",
                       index, n, n - 1);
    if ((e = cudaSetDevice(index)) != cudaSuccess)
        return failed("choosing the device", e);
    cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaFuncAttributes attributes;
    e = cudaFuncGetAttributes(&attributes, probe);
    if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction)
        return cq_fail(CQ_EUSAGE,
                       "cuda: device %d has compute capability %d.%d, this build has code for %s",
                       index, *major, *minor, CQ_CUDA_CODE);
    return e == cudaSuccess ? CQ_OK : failed("looking at the device", e);
}

void close_stream(cq_stream *s) {
    device *d = of(s);
    if (!d)
        return;
    cudaSetDevice(d->index);
    cq_cuda_matmul_close(d);
    free(d->nvfp4_shapes);
    cudaFree(d->scratch);
    cudaFreeHost(d->ring);
    if (d->queue)
        cudaStreamDestroy(d->queue);
    if (d->fetches) {
        cudaStreamDestroy(d->fetches);
        cudaEventDestroy(d->asked);
        cudaEventDestroy(d->done[0]);
        cudaEventDestroy(d->done[1]);
    }
    free(d);
    s->device = s->queue = NULL;
}

int open_stream(cq_stream *s, int index) {
    int major = 0, minor = 0;
    CQ_TRY(check_device(index, &major, &minor));
    device *d = static_cast<device *>(calloc(1, sizeof *d));
    if (!d)
        return cq_fail(CQ_ENOMEM, "cuda: no memory");
    d->index = index;
    d->capability_major = major;
    d->capability_minor = minor;
    s->device = d;
    cudaError_t e = cudaStreamCreateWithFlags(&d->queue, cudaStreamNonBlocking);
    if (e == cudaSuccess)
        e = cudaHostAlloc(reinterpret_cast<void **>(&d->ring), RING_BYTES, cudaHostAllocDefault);
    int status = e == cudaSuccess ? cq_cuda_matmul_open(d) : failed("opening a stream", e);
    s->queue = d->queue;
    if (status)
        close_stream(s);
    return status;
}

/* What cannot be part of a graph. */
int while_recording(const char *what) {
    return cq_fail(CQ_EUSAGE, "cuda: %s while operations are recorded", what);
}

int take(void **out, int64_t bytes, bool shared) {
    size_t n = static_cast<size_t>(bytes > 0 ? bytes : 1);
    memory_changes++;
    cudaError_t e = shared ? cudaHostAlloc(out, n, cudaHostAllocMapped) : cudaMalloc(out, n);
    if (e != cudaSuccess) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError(); /* an allocation that failed leaves the device usable */
        if (shared)
            return cq_fail(
                CQ_ENOMEM,
                "cuda: %.1f MiB of pinned host memory wanted (%s): less --offload needs less",
                static_cast<double>(bytes) / 1048576, cudaGetErrorString(e));
        cudaMemGetInfo(&free_bytes, &total);
        return cq_fail(CQ_ENOMEM,
                       "cuda: %.1f MiB wanted, %.1f of %.1f MiB are free: a smaller --micro or "
                       "--seq needs less",
                       static_cast<double>(bytes) / 1048576,
                       static_cast<double>(free_bytes) / 1048576,
                       static_cast<double>(total) / 1048576);
    }
    if (shared)
        memset(*out, 0, n);
    else if ((e = cudaMemset(*out, 0, n)) != cudaSuccess ||
             (e = cudaDeviceSynchronize()) != cudaSuccess) /* streams do not wait for a memset */
        return failed("clearing new memory", e);
    return CQ_OK;
}

void give(void *memory, int64_t bytes, bool shared) {
    (void)bytes;
    memory_changes++;
    if (shared)
        cudaFreeHost(memory);
    else
        cudaFree(memory);
}

bool is_host(const void *p) {
    cudaPointerAttributes a;
    if (cudaPointerGetAttributes(&a, p) != cudaSuccess) {
        cudaGetLastError();
        return true;
    }
    return a.type == cudaMemoryTypeUnregistered || a.type == cudaMemoryTypeHost;
}

/* A place in the ring for `bytes`; what was there has been copied. */
int stage(device *d, char **out, int64_t bytes) {
    int64_t size = (bytes + 63) / 64 * 64;
    if (d->ring_at + size > RING_BYTES) {
        cudaError_t e = cudaStreamSynchronize(d->queue);
        if (e != cudaSuccess)
            return failed("waiting for uploads", e);
        d->ring_at = 0;
    }
    *out = d->ring + d->ring_at;
    d->ring_at += size;
    return CQ_OK;
}

int copy(cq_stream *s, void *to, const void *from, int64_t bytes) {
    device *d = of(s);
    size_t n = static_cast<size_t>(bytes);
    bool up = is_host(from), down = is_host(to);
    if (bytes <= 0)
        return CQ_OK;
    if (d->recording && (up || down))
        return while_recording("a copy of the host's memory");
    if (up && !down && bytes <= LARGEST_STAGED) {
        char *place = NULL;
        CQ_TRY(stage(d, &place, bytes));
        memcpy(place, from, n);
        from = place;
        up = false;
    }
    cudaError_t e = cudaMemcpyAsync(to, from, n, cudaMemcpyDefault, d->queue);
    if (e == cudaSuccess && (up || down))
        e = cudaStreamSynchronize(d->queue);
    return e == cudaSuccess ? CQ_OK : failed("copying", e);
}

int zero(cq_stream *s, void *to, int64_t bytes) {
    cudaError_t e = cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), of(s)->queue);
    return e == cudaSuccess ? CQ_OK : failed("clearing", e);
}

int wait(cq_stream *s) {
    if (of(s)->recording)
        return while_recording("waiting");
    cudaError_t e = cudaStreamSynchronize(of(s)->queue);
    return e == cudaSuccess ? CQ_OK
                            : failed("an operation failed on the device (CKAQAD_CUDA_SYNC=1 names "
                                     "it)",
                                     e);
}

int open_fetches(device *d) {
    cudaError_t e = cudaStreamCreateWithFlags(&d->fetches, cudaStreamNonBlocking);
    cudaEvent_t *events[] = {&d->asked, &d->done[0], &d->done[1]};
    for (int i = 0; i < 3 && e == cudaSuccess; i++)
        e = cudaEventCreateWithFlags(events[i], cudaEventDisableTiming);
    return e == cudaSuccess ? CQ_OK : failed("opening a second stream", e);
}

int fetch(cq_stream *s, int slot, void *to, const void *from, int64_t bytes) {
    device *d = of(s);
    if (d->recording)
        return while_recording("a fetch");
    if (!d->fetches)
        CQ_TRY(open_fetches(d));
    cudaError_t e = cudaEventRecord(d->asked, d->queue);
    if (e == cudaSuccess)
        e = cudaStreamWaitEvent(d->fetches, d->asked, 0);
    if (e == cudaSuccess)
        e = cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, d->fetches);
    if (e == cudaSuccess)
        e = cudaEventRecord(d->done[slot], d->fetches);
    return e == cudaSuccess ? CQ_OK : failed("fetching", e);
}

int arrived(cq_stream *s, int slot) {
    cudaError_t e = cudaStreamWaitEvent(of(s)->queue, of(s)->done[slot], 0);
    return e == cudaSuccess ? CQ_OK : failed("waiting for what was fetched", e);
}

bool waits_always() {
    static int on = -1;
    if (on < 0) {
        const char *value = getenv("CKAQAD_CUDA_SYNC");
        on = value && *value && strcmp(value, "0") != 0;
    }
    return on == 1;
}

int record(cq_stream *s) {
    device *d = of(s);
    if (waits_always())
        return while_recording("waiting for each of them (CKAQAD_CUDA_SYNC)");
    cudaError_t e = cudaStreamBeginCapture(d->queue, cudaStreamCaptureModeThreadLocal);
    d->recording = e == cudaSuccess;
    return e == cudaSuccess ? CQ_OK : failed("recording", e);
}

int recorded(cq_stream *s, void **graph) {
    device *d = of(s);
    cudaGraph_t list = NULL;
    cudaGraphExec_t ready = NULL;
    d->recording = false;
    cudaError_t e = cudaStreamEndCapture(d->queue, &list);
    if (e == cudaSuccess)
        e = cudaGraphInstantiate(&ready, list, 0);
    if (list)
        cudaGraphDestroy(list);
    cudaGetLastError(); /* a recording that failed leaves the device usable */
    *graph = e == cudaSuccess ? ready : NULL;
    return e == cudaSuccess ? CQ_OK : failed("recording", e);
}

int play(cq_stream *s, void *graph) {
    cudaError_t e = cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), of(s)->queue);
    return e == cudaSuccess ? CQ_OK : failed("playing recorded operations", e);
}

void forget(cq_stream *s, void *graph) {
    cudaStreamSynchronize(of(s)->queue); /* it may be running */
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

int64_t changes() { return memory_changes; }

int available(int64_t *bytes) {
    size_t free_bytes = 0, total = 0;
    cudaError_t e = cudaMemGetInfo(&free_bytes, &total);
    *bytes = static_cast<int64_t>(free_bytes);
    return e == cudaSuccess ? CQ_OK : failed("asking for free memory", e);
}

int describe(char *text, int64_t size) {
    int index = 0;
    cudaDeviceProp p;
    cudaError_t e = cudaGetDevice(&index);
    if (e == cudaSuccess)
        e = cudaGetDeviceProperties(&p, index);
    if (e != cudaSuccess)
        return failed("asking for its name", e);
    snprintf(text, static_cast<size_t>(size), "%s, compute capability %d.%d", p.name, p.major,
             p.minor);
    return CQ_OK;
}

bool has_fp4(const cq_stream *s) {
    const device *d = static_cast<const device *>(s->device);
    return d->capability_major == 10 ||
           d->capability_major == 12; /* as the build has code for it */
}

} // namespace

extern "C" {
extern const cq_memory cq_cuda_memory;
const cq_memory cq_cuda_memory = {
    open_stream, close_stream, take, give,   copy,    zero,      wait,     fetch, arrived,
    record,      recorded,     play, forget, changes, available, describe, count, has_fp4};
}

extern "C" void *cq_cuda_scratch(cq_stream *s, int64_t bytes) {
    device *d = of(s);
    if (bytes > d->scratch_bytes) {
        if (d->recording) {
            while_recording("more scratch");
            return NULL;
        }
        void *bigger = NULL;
        int64_t wanted = (bytes + (1 << 20) - 1) / (1 << 20) * (1 << 20);
        give(d->scratch, d->scratch_bytes, false); /* waits for who uses it */
        d->scratch = NULL;
        d->scratch_bytes = 0;
        if (take(&bigger, wanted, false) != CQ_OK)
            return NULL;
        d->scratch = bigger;
        d->scratch_bytes = wanted;
    }
    return d->scratch;
}

extern "C" int cq_cuda_shared_bytes(const void *kernel, int64_t bytes, const char *op) {
    if (bytes <= 48 << 10)
        return CQ_OK;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes));
    if (e == cudaSuccess)
        return CQ_OK;
    cudaGetLastError();
    return cq_fail(CQ_ESHAPE, "cuda: %s: %ld bytes of shared memory: %s", op,
                   static_cast<long>(bytes), cudaGetErrorString(e));
}

extern "C" int cq_cuda_status(const char *op) {
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess && waits_always())
        e = cudaDeviceSynchronize();
    return e == cudaSuccess ? CQ_OK : failed(op, e);
}
