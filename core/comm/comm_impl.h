/// comm_impl.h - the inside of a communicator, for core/comm/*.c only.
#pragma once
#include "core/comm/comm.h"

typedef struct cq_mpi cq_mpi; ///< MPI's side, in mpi.c

struct cq_comm {
    int rank, size;
    double patience;
    cq_mpi *mpi; ///< NULL: the only rank
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

#ifdef CQ_MPI
int cq_mpi_open(cq_mpi **out, cq_comm *c, const cq_launch *launch);
void cq_mpi_close(cq_mpi *m);
const char *cq_mpi_name(const cq_mpi *m);
/// Posts all messages and waits for all. CQ_EPEER names the rank that is gone or silent; a rank's
/// own failure comes back with its exit code's status and its message.
int cq_mpi_transfer(cq_mpi *m, const cq_message *message, int64_t n);
/// See cq_comm_failed and cq_comm_abort.
const char *cq_mpi_failed(cq_mpi *m, int code, const char *message);
void cq_mpi_abort(cq_mpi *m, int code);
#endif
