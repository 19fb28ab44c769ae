/// plan.h - every buffer of a run is declared here before the first one is allocated.
///
/// A declaration names slot, purpose, dtype and shape once; `commit` maps one zeroed region per
/// purpose and binds the slots. Scratch that is never alive together shares bytes: `mark` before,
/// `rewind` after.
#pragma once
#include "core/tensor/tensor.h"
#include "kernels/kernels.h"

typedef enum cq_purpose {
    CQ_FOR_TEACHER = 0,         ///< teacher weights
    CQ_FOR_STUDENT = 1,         ///< student master weights
    CQ_FOR_FAKEQUANT = 2,       ///< fake-quantized copies of the weights
    CQ_FOR_GRADIENT = 3,        ///< parameter gradients
    CQ_FOR_MOMENTS = 4,         ///< AdamW moments
    CQ_FOR_ACTIVATIONS = 5,     ///< values saved for backward
    CQ_FOR_SCRATCH = 6,         ///< block and kernel scratch
    CQ_FOR_LOGITS = 7,          ///< one chunk of logits of each model
    CQ_FOR_CKA = 8,             ///< Grams and sampled rows
    CQ_FOR_RESULTS = 9,         ///< scalars that kernels write and the host reads after a wait
    CQ_FOR_GENERATION = 10,     ///< keys, values and states of sequences, their logits
    CQ_FOR_HOST_TEACHER = 11,   ///< of a device: teacher blocks in pinned host memory
    CQ_FOR_HOST_OPTIMIZER = 12, ///< of a device: moments and master weights there
    CQ_FOR_KERNELS = 13,        ///< of a device: what its operations take beside the plan
    CQ_N_PURPOSES = 14
} cq_purpose;

typedef struct cq_plan cq_plan;

CQ_API int cq_plan_open(cq_plan **out);
/// Puts the plan's memory on the stream's device, results into memory that both reach; before
/// commit. The stream must outlive the plan. Without it, or where the stream has no device: host
/// memory.
CQ_API void cq_plan_place(cq_plan *plan, const cq_stream *s);
CQ_API bool cq_plan_on_device(const cq_plan *plan);
/// Declares from now on as for the memory of a device that need not be here; such a plan only
/// counts: commit refuses it with CQ_EUSAGE.
CQ_API void cq_plan_imagine(cq_plan *plan);
/// Unmaps everything; slots dangle afterwards.
CQ_API void cq_plan_close(cq_plan *plan);
/// Declares one buffer (64-byte aligned). `slot` must stay at its address until commit; its shape
/// and dtype are filled now, its data at commit. CQ_EUSAGE after commit, CQ_ESHAPE on overflow.
CQ_API int cq_plan_add(cq_plan *plan, cq_tensor *slot, cq_purpose purpose, const char *name,
                       cq_dtype dtype, cq_shape shape);
/// Counts what operations of a device take by themselves, at most `bytes` at a time; the largest
/// call holds. Nothing is allocated for it.
CQ_API void cq_plan_reserve(cq_plan *plan, int64_t bytes);
/// The current end of a purpose's region, for `rewind`.
CQ_API int64_t cq_plan_mark(const cq_plan *plan, cq_purpose purpose);
/// Lets the next declarations of `purpose` reuse the bytes from `mark` on.
CQ_API void cq_plan_rewind(cq_plan *plan, cq_purpose purpose, int64_t mark);
/// Planned bytes of a purpose, or of all but the CQ_FOR_HOST ones with CQ_N_PURPOSES.
CQ_API int64_t cq_plan_bytes(const cq_plan *plan, cq_purpose purpose);
/// "teacher weights", "scratch" and so on; "all" with CQ_N_PURPOSES.
CQ_API const char *cq_purpose_name(cq_purpose purpose);
/// Allocates and binds. Fails with CQ_ENOMEM, naming planned, largest and available MiB, when the
/// total exceeds `limit_bytes` (0: what the system says is available), or the CQ_FOR_HOST purposes
/// what the host has.
CQ_API int cq_plan_commit(cq_plan *plan, int64_t limit_bytes);
CQ_API bool cq_plan_committed(const cq_plan *plan);
/// VmHWM of this process in bytes, and what the system says is available for new memory.
CQ_API int64_t cq_memory_peak(void);
CQ_API int64_t cq_memory_available(void);
