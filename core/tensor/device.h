/// device.h - which memory is a device's, and moving bytes between it and the host.
///
/// A plan that lies on a device notes its regions here, so that a pointer is enough to know where
/// its bytes are. Kernels take device pointers; host code reads and writes through these functions,
/// which cost nothing but a look where everything is the host's.
#pragma once
#include "core/tensor/tensor.h"
#include "kernels/kernels.h"

/// Chooses a kernel table by name ("cpu", "ref", "cuda") and opens its device `index`. CQ_EUSAGE
/// for a table that this build lacks; the table's own error where there is no such device.
CQ_API int cq_stream_open(cq_stream *s, const char *kernels, int index);
CQ_API void cq_stream_close(cq_stream *s);
/// Devices of this machine for a kernel table; an error where none can be used, 0 for the host's.
CQ_API int cq_device_count(int *n, const char *kernels);
/// "NVIDIA H200 ..." of a stream with a device into text[size], else "".
CQ_API int cq_stream_describe(const cq_stream *s, char *text, int64_t size);
/// Free bytes of the stream's device, or of the host.
CQ_API int64_t cq_stream_available(const cq_stream *s);
/// Whether the stream's device has FP4 tensor cores.
CQ_API bool cq_stream_has_fp4(const cq_stream *s);
/// Waits until the stream's device has done everything asked of it; reports what failed there.
CQ_API int cq_stream_wait(cq_stream *s);

/// Notes a region of the stream's device; CQ_ENOMEM when there are too many.
int cq_region_add(void *base, int64_t bytes, const cq_stream *s, bool pinned);
void cq_region_remove(const void *base);
CQ_API bool cq_on_device(const void *p);
/// Whether it is pinned memory of the host that the plan counts as a device's (CQ_FOR_HOST).
CQ_API bool cq_on_host_of_device(const void *p);
/// memcpy and memset(0) between any two memories; ordered after the operations asked before. Host
/// memory may be changed when they return.
CQ_API int cq_copy(void *to, const void *from, int64_t bytes);
CQ_API int cq_zero(void *to, int64_t bytes);
/// to = from converted to its dtype, wherever it lies; `from` is host memory.
CQ_API int cq_tensor_fill(cq_tensor to, const void *from, cq_dtype from_dtype);
/// The tensor itself where it is the host's, else a copy there in new memory: *owned, which the
/// caller frees (NULL for none).
CQ_API int cq_tensor_on_host(cq_tensor *out, void **owned, cq_tensor t);
