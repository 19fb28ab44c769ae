/// comm_impl.h - the inside of a communicator, for core/comm/*.c only.
#pragma once
#include "core/comm/comm.h"

typedef struct cq_mpi cq_mpi;             ///< MPI's side, in mpi.c
typedef struct cq_transport cq_transport; ///< see below

struct cq_comm {
    int rank, size;
    int local_rank, local_size; ///< among the ranks of this machine
    double patience;
    cq_mpi *mpi;                   ///< NULL: the only rank
    const cq_transport *transport; ///< of device memory; NULL: through the host
    void *link;                    ///< what it opened
    bool by_device;                ///< what lies on devices moves and is added up there
    cq_stream stream;              ///< the device's
    char *room;                    ///< [size, room_bytes] device memory, for what is added up
    int64_t room_bytes;
    char backend[256];
    const char *about;
    cq_collective kind; ///< of the last collective
    int64_t sent[CQ_COMM_N], calls[CQ_COMM_N];
};

/// Bytes from or to another rank. Those of one pair arrive in the order in which they are listed.
typedef struct cq_message {
    int peer;
    bool send;
    void *data;
    int64_t bytes;
} cq_message;

/// Notes a collective and the bytes it sends, then has it done.
int cq_comm_run(cq_comm *c, cq_collective kind, const cq_message *message, int64_t n);
/// The same for the memory of devices, through c->transport.
int cq_comm_run_device(cq_comm *c, cq_collective kind, const cq_message *message, int64_t n);

/// What moves device memory.
struct cq_transport {
    /// Opens it between all ranks for the stream's device, which is the current one.
    int (*open)(void **link, cq_comm *c, const cq_stream *s);
    /// Ends it, for all ranks. Accepts NULL.
    void (*close)(void *link);
    /// "NCCL 2.28.9" into text[size].
    void (*name)(char *text, size_t size);
    /// Moves all messages, after what the stream was asked before, and waits for them as
    /// cq_mpi_transfer does.
    int (*transfer)(void *link, const cq_message *message, int64_t n);
};
/// nccl.c; not there in a build without it.
extern const cq_transport cq_nccl;

/// The status of what has happened to another rank, or CQ_OK.
int cq_comm_look(const cq_comm *c);
/// That status, with the message that names the rank; this one will fail with it.
int cq_comm_give_up(cq_comm *c);

#ifdef CQ_MPI
int cq_mpi_open(cq_mpi **out, cq_comm *c, const cq_launch *launch);
void cq_mpi_close(cq_mpi *m);
const char *cq_mpi_name(const cq_mpi *m);
/// Posts all messages and waits for all. CQ_EPEER names the rank that is gone or silent; a rank's
/// own failure comes back with its exit code's status and its message.
int cq_mpi_transfer(cq_mpi *m, const cq_message *message, int64_t n);
/// See cq_comm_look and cq_comm_give_up.
int cq_mpi_look(cq_mpi *m);
int cq_mpi_give_up(cq_mpi *m);
/// See cq_comm_failed and cq_comm_abort.
const char *cq_mpi_failed(cq_mpi *m, int code, const char *message);
void cq_mpi_abort(cq_mpi *m, int code);
#endif
