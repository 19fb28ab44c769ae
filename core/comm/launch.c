/// launch.c - the environment variables by which launchers tell a process its rank.
///
/// There is one launcher, mpirun: under another one every process would take itself for the only
/// one, and all would write the same folder.
#include "core/comm/launch.h"
#include "core/base/error.h"
#include <stdlib.h>

/* The value of a variable as a number, or `otherwise`. */
static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

static int refuse(const char *launcher, int n, const char *command) {
    return cq_fail(CQ_EUSAGE, "launcher: %s started %d processes, wanted: mpirun -n %d %s",
                   launcher, n, n, command);
}

int cq_launch_find(cq_launch *out, const char *command) {
    *out = (cq_launch){0, 1};
    int n = number("OMPI_COMM_WORLD_SIZE", 0);
    if (n > 0) {
        *out = (cq_launch){number("OMPI_COMM_WORLD_RANK", 0), n};
        return CQ_OK;
    }
    n = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1));
    if (getenv("SLURM_PROCID") && n > 1) {
        *out = (cq_launch){number("SLURM_PROCID", 0), n};
        return getenv("PMIX_RANK") ? CQ_OK : refuse("srun without --mpi=pmix", n, command);
    }
    if (getenv("TORCHELASTIC_RUN_ID") || (getenv("LOCAL_RANK") && getenv("MASTER_ADDR"))) {
        *out = (cq_launch){number("RANK", 0), number("WORLD_SIZE", 1)};
        return refuse("torchrun", out->size, command);
    }
    n = number("PMI_SIZE", 1);
    if (getenv("PMI_RANK") && n > 1) {
        *out = (cq_launch){number("PMI_RANK", 0), n};
        return refuse("an MPI other than Open MPI", n, command);
    }
    return CQ_OK;
}
