/// comm.h - what ranks say to each other: one communicator, of this process alone or of all that
/// mpirun started.
///
/// Sums run in rank order, so they have the same bits on every rank and in every run. Every
/// collective is made of messages that are waited for with an eye on the other ranks: one that has
/// ended, failed or fallen silent ends the wait with a message that names it. Host memory, unless
/// it is said. All ranks call the same functions in the same order.
#pragma once
#include "core/comm/launch.h"
#include "core/tensor/device.h"

typedef enum cq_collective {
    CQ_COMM_BARRIER,
    CQ_COMM_BROADCAST,
    CQ_COMM_SUM,      ///< all-reduce
    CQ_COMM_SCATTER,  ///< reduce-scatter
    CQ_COMM_GATHER,   ///< all-gather
    CQ_COMM_EXCHANGE, ///< all-to-all
    CQ_COMM_N
} cq_collective;

typedef struct cq_comm cq_comm;

/// The communicator of this process: of one rank, or, where a launcher gave it a rank, of all.
/// `patience`: seconds after which a rank that is silent counts as gone. CQ_EUSAGE when this build
/// has no MPI and more than one rank is wanted.
CQ_API int cq_comm_open(cq_comm **out, const cq_launch *launch, double patience);
/// Waits for the others and ends MPI. Accepts NULL.
CQ_API void cq_comm_close(cq_comm *c);
/// 0, and of 1, for NULL.
CQ_API int cq_comm_rank(const cq_comm *c);
CQ_API int cq_comm_size(const cq_comm *c);
/// Which of the ranks on this machine this one is, and how many they are; 0 of 1 for NULL.
CQ_API int cq_comm_local_rank(const cq_comm *c);
CQ_API int cq_comm_local_size(const cq_comm *c);
/// "self" or "Open MPI 4.1.4 ..."; with NCCL at work, its name as well.
CQ_API const char *cq_comm_backend(const cq_comm *c);
/// From here on pieces in the memory of the stream's device move from device to device, through
/// NCCL, where the build has it, every rank has a device and CKAQAD_NCCL=0 is not in the
/// environment; else through the host. One rank by itself adds up on its device. The stream stays
/// open until the communicator is closed or another one attached. Many ranks take 64 MiB of the
/// device, beside NCCL's own.
CQ_API int cq_comm_attach(cq_comm *c, const cq_stream *s);
CQ_API void cq_comm_set_patience(cq_comm *c, double seconds);
/// What the next collectives are about, for messages: "gradients". Static text.
CQ_API void cq_comm_about(cq_comm *c, const char *what);

/// Tells the other ranks that this one fails with an exit code and `message`. Returns, on the
/// lowest rank that lives, the line to print: the message, or what befell another rank before. The
/// others wait here to be ended.
CQ_API const char *cq_comm_failed(cq_comm *c, int code, const char *message);
/// Ends this process and every other rank with an exit code. Returns where there is no other.
CQ_API void cq_comm_abort(cq_comm *c, int code);

CQ_API int cq_comm_barrier(cq_comm *c);
CQ_API int cq_comm_broadcast(cq_comm *c, void *data, int64_t bytes, int root);
/// x [n] becomes its sum over the ranks, in rank order.
CQ_API int cq_comm_sum(cq_comm *c, double *x, int64_t n);
CQ_API int cq_comm_sum_int(cq_comm *c, int64_t *x, int64_t n);
/// all = the ranks' bytes one after another; rank r gives bytes[r], all know all of them.
CQ_API int cq_comm_gather(cq_comm *c, void *all, const void *mine, const int64_t *bytes);
/// Rank r gets out_bytes[r] of `out` and gives in_bytes[r] of `in`, both in rank order.
CQ_API int cq_comm_exchange(cq_comm *c, void *in, const int64_t *in_bytes, const void *out,
                            const int64_t *out_bytes);
/// CQ_EMISMATCH on all ranks, naming the first rank whose `text` differs from that of rank 0:
/// "rank 2: SUBJECT is not that of rank 0".
CQ_API int cq_comm_agree(cq_comm *c, const char *subject, const char *text);

/// Part of something that all ranks have and one of them owns; memory of any device.
typedef struct cq_piece {
    int owner;
    cq_tensor mine; ///< what this rank adds, or has; of all ranks on devices, or of none
    cq_tensor sum;  ///< on its owner, of the same dtype and elements, in the same memory
} cq_piece;

/// Reduce-scatter: sum += mine of rank 0, then of rank 1, ... up to `ranks` of them, on each
/// piece's owner. F32 and F64; what the other ranks have is not read.
CQ_API int cq_comm_scatter(cq_comm *c, const cq_piece *piece, int64_t n, int ranks);
/// All-gather: `mine` becomes that of the piece's owner.
CQ_API int cq_comm_spread(cq_comm *c, const cq_piece *piece, int64_t n);

/// Bytes this rank has sent to others.
CQ_API int64_t cq_comm_bytes(const cq_comm *c, cq_collective kind);
CQ_API const char *cq_collective_name(cq_collective kind);
