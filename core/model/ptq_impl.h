/// ptq_impl.h - the inside of a cq_ptq, for core/model/ptq*.c only.
#pragma once
#include "core/model/model_impl.h"
#include "core/model/ptq.h"
#include <pthread.h>

struct cq_ptq {
    cq_model *m;
    cq_ptq_options o;
    char *dir, *partial;
    const cq_batch **batches;
    bool calibrates;
    bool forgets; ///< the source does not fit memory: what was read is not kept in the cache
    cq_st_writer *writer;
    cq_st_folder *out;
    cq_ptq_facts facts;
    bool again;        ///< tensors of now are read once more: they stay in the cache
    int journal;       ///< open for appending, or -1
    int activation[3]; ///< files of the residual stream [tokens, hidden] F32: unit u writes u % 3
    pthread_t saver;   ///< brings a unit to the disk while the next is computed
    bool saving;
    int64_t save_unit, save_unreached; ///< what it notes
    int save_status;
    char save_message[512];
    int64_t moe_tokens;
    int threads;
    cq_tensor workers; ///< buffers of the threads that read, quantize and write
    float *own;        ///< [n_params] maximum of each quantized matrix by itself
};

/* ptq_tensor.c: tensors through the window, by all threads */

/// Bytes of one thread's buffers.
int64_t cq_ptq_worker_bytes(void);
/// Reads a quantized matrix: its maximum into q->own[i] and p->amax; its F32 form into `value`
/// unless that is NULL. CQ_ENUMERIC names a value that is not finite.
int cq_ptq_read(cq_ptq *q, int64_t i, float *value);
/// Packs and writes a matrix whose maximum p->amax is final.
int cq_ptq_pack(cq_ptq *q, int64_t i);
/// The same after cq_ptq_pack: nothing but the F32 form.
int cq_ptq_read_again(cq_ptq *q, int64_t i, float *value);
/// Copies a tensor that stays as it is.
int cq_ptq_copy(cq_ptq *q, int64_t i, float *value);
/// Writes a scalar beside a quantized matrix.
int cq_ptq_scalar(cq_ptq *q, const cq_param *p, const char *suffix, float value);

/* ptq_journal.c: what is on disk, and whether it belongs to this work */

/// Opens DIR.partial: makes it, goes on with it, or replaces one of other work. q->facts.done and
/// .unreached are set.
int cq_ptq_journal_open(cq_ptq *q);
/// Begins to bring the last unit to the disk and to note it, after the one before has arrived
/// there.
int cq_ptq_save(cq_ptq *q);
/// Waits until the last unit is noted; reports what failed.
int cq_ptq_save_wait(cq_ptq *q);
/// Removes what is not part of an export.
int cq_ptq_journal_remove(cq_ptq *q);
/// Rows [row, row + n) of the residual stream from or to a file.
int cq_ptq_rows_read(const cq_ptq *q, int file, int64_t row, int64_t n, float *to);
int cq_ptq_rows_write(const cq_ptq *q, int file, int64_t row, int64_t n, const float *from);
