/// stream.h - what an operation runs on: a backend's table, its threads and scratch, or an open
/// device; and the memory of a backend whose buffers the host may not touch.
#pragma once
#include "core/base/dtype.h"

typedef struct cq_kernels cq_kernels;
typedef struct cq_graphs cq_graphs;

/// CQ_COMPUTE_BF16 rounds the operands of matrix products to BF16 and accumulates in FP32; all else
/// stays FP32.
typedef enum cq_compute { CQ_COMPUTE_F32 = 0, CQ_COMPUTE_BF16 = 1 } cq_compute;

/// What runs an operation: a table, its threads, and scratch that the plan paid for.
typedef struct cq_stream {
    const cq_kernels *table;
    int threads;
    cq_compute compute;
    void *scratch;         ///< threads * scratch_bytes, 64-byte aligned; owned by the plan
    int64_t scratch_bytes; ///< per thread; an operation that needs more fails with CQ_ENOMEM
    void *bf16_scratch;    ///< operands of one matmul in BF16, or NULL; owned by the plan
    int64_t bf16_scratch_bytes;
    bool fp4; ///< of a device, where compute is BF16: products of a quantized linear's forward may
              ///< be matmul_nvfp4
    bool by_row;  ///< FP32 products C = A W' sum every row of C in an order that the other rows do
                  ///< not change: a row's bits are the same in any batch (generation)
    void *queue;  ///< of a device: its CUDA stream
    void *device; ///< of a device: its scratch and handles; memory->open makes both
    cq_graphs *graphs; ///< of a device: recorded passes (core/tensor/graph.h), or NULL
} cq_stream;

/// The memory of a backend whose buffers the host may not touch. Calls are ordered like operations
/// of their stream.
typedef struct cq_memory {
    /// Makes s->queue and s->device for device `index`; close frees them.
    int (*open)(cq_stream *s, int index);
    void (*close)(cq_stream *s);
    /// Zeroed memory of the open device. `shared` memory is the host's, pinned, and the device
    /// reaches it, too.
    int (*take)(void **out, int64_t bytes, bool shared);
    void (*give)(void *memory, int64_t bytes, bool shared);
    /// Either side may be host memory; when it returns, host memory may be read or changed.
    int (*copy)(cq_stream *s, void *to, const void *from, int64_t bytes);
    int (*zero)(cq_stream *s, void *to, int64_t bytes);
    /// Waits until all that was asked of the stream is done; an error of any of it is reported.
    int (*wait)(cq_stream *s);
    /// Copies shared memory to the device beside the operations that are asked from now on, but
    /// after those asked before; `arrived` makes what is asked after it wait for that. Slots are 0
    /// and 1.
    int (*fetch)(cq_stream *s, int slot, void *to, const void *from, int64_t bytes);
    int (*arrived)(cq_stream *s, int slot);
    /// What is asked between `record` and `recorded` is not done but kept: *graph, which `play`
    /// does with the arguments of then, as often as it is wanted. Waiting, taking memory, a copy
    /// from or to the host and a fetch cannot be kept: they fail, and so does `recorded`.
    int (*record)(cq_stream *s);
    int (*recorded)(cq_stream *s, void **graph);
    int (*play)(cq_stream *s, void *graph);
    void (*forget)(cq_stream *s, void *graph);
    /// Changes whenever memory of a device, scratch too, is taken or given back: what was recorded
    /// before may point there.
    int64_t (*changes)(void);
    int (*available)(int64_t *bytes);
    /// "NVIDIA H200, compute capability 9.0" into text[size].
    int (*describe)(char *text, int64_t size);
    /// Devices of this machine; an error where none can be used.
    int (*count)(int *n);
    /// Whether the stream's device has FP4 tensor cores.
    bool (*has_fp4)(const cq_stream *s);
} cq_memory;
