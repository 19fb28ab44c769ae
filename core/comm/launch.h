/// launch.h - which launcher started this process, and as which rank of how many.
#pragma once
#include "core/base/types.h"

typedef struct cq_launch {
    int rank, size; ///< as the launcher's environment says; 0 of 1 without one
} cq_launch;

/// Reads the environment. Open MPI's mpirun, and srun with PMIx, give ranks. CQ_EUSAGE for
/// torchrun, for srun without PMIx, and for another MPI's launcher, naming the mpirun command for
/// `command` (the program and its arguments as typed); `rank` and `size` are right then too, so
/// that one process says it.
CQ_API int cq_launch_find(cq_launch *out, const char *command);
