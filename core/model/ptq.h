/// ptq.h - a checkpoint of any size into an NVFP4 folder: one block at a time, tensor by tensor.
///
/// The bytes are those of cq_model_calibrate_* and cq_export_nvfp4 of the same student, but neither
/// the model nor a tensor has to fit memory. Life: open - plan - (commit) - begin - unit 0, 1, ...
/// - finish. Host kernels only.
#pragma once
#include "core/model/model.h"

typedef struct cq_ptq_options {
    const char *dir;     ///< the folder that is made; it is called DIR.partial until it is whole
    int64_t shard_bytes; ///< of the largest file; 0: one file
    const cq_batch *const *batches; ///< [n_batches] documents to calibrate on; they must outlive it
    int64_t n_batches;              ///< 0 only for a student whose inputs stay as they are
    int64_t moe_tokens; ///< tokens that experts see at a time; 0: as many as half a GiB takes
} cq_ptq_options;

typedef struct cq_ptq_facts {
    int64_t units, done;  ///< steps of the work, and those that were done
    int64_t saved;        ///< of them, those that are on disk: at most one less
    int64_t continued;    ///< of them, those that an earlier process did
    int64_t tensors;      ///< in the folder
    int64_t bytes;        ///< of their data
    int64_t source_bytes; ///< of data in the checkpoint
    int64_t shards;       ///< known from begin on
    int64_t tokens;       ///< calibrated on
    int64_t unreached;    ///< expert matrices that no token reached, so far
} cq_ptq_facts;

typedef struct cq_ptq cq_ptq;
/// Lays the folder out; writes nothing. CQ_EUSAGE for a target that is no earlier export, for a
/// student without quantized matrices, and for one that needs documents and has none. The student
/// must be new: its teacher needs no memory and gets none.
CQ_API int cq_ptq_open(cq_ptq **out, cq_model *student, const cq_ptq_options *o);
CQ_API void cq_ptq_close(cq_ptq *q);
/// Declares the largest block's weights (of a mixture of experts one expert's) and what a
/// micro-batch needs.
CQ_API int cq_ptq_plan(cq_ptq *q, cq_plan *plan, int threads);
/// After commit: makes DIR.partial, or goes on with it when a process that was stopped made it from
/// the same checkpoint, options and documents.
CQ_API int cq_ptq_begin(cq_ptq *q);
/// The next unit: embedding, a block, or what follows the last; on disk when the next one or
/// `close` returns. After a failure (a full disk, a signal) the next process goes on from what is.
CQ_API int cq_ptq_unit(cq_ptq *q, cq_stream *s);
/// After the last unit: writes the index and gives the folder its name.
CQ_API int cq_ptq_finish(cq_ptq *q);
CQ_API void cq_ptq_facts_get(const cq_ptq *q, cq_ptq_facts *facts);
/// *rate = bytes of BF16 a second that this machine quantizes from memory to memory with as many
/// threads: what a disk cannot make faster. A quarter of a second of work; after commit.
CQ_API int cq_ptq_rate(cq_ptq *q, double *rate);
