/// test_comm.c - launchers by their environment, and a communicator of one rank (many:
/// comm_ranks.c).
#include "tests/harness.h"
#include <stdlib.h>

static void only(const char *const *env) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE",
                                        "OMPI_COMM_WORLD_RANK",
                                        "PMIX_RANK",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "SLURM_STEP_NUM_TASKS",
                                        "TORCHELASTIC_RUN_ID",
                                        "LOCAL_RANK",
                                        "MASTER_ADDR",
                                        "RANK",
                                        "WORLD_SIZE",
                                        "PMI_RANK",
                                        "PMI_SIZE"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    for (; *env; env += 2)
        setenv(env[0], env[1], 1);
}

#define ENV(...) only((const char *const[]){__VA_ARGS__, NULL})

Test(launch, mpirun_gives_rank_and_size) {
    cq_launch l;
    only((const char *const[]){NULL});
    cr_expect(!cq_launch_find(&l, "x") && l.rank == 0 && l.size == 1);
    ENV("OMPI_COMM_WORLD_SIZE", "4", "OMPI_COMM_WORLD_RANK", "3", "SLURM_PROCID", "0",
        "SLURM_NTASKS", "2");
    cr_expect(!cq_launch_find(&l, "x") && l.rank == 3 && l.size == 4);
    ENV("SLURM_PROCID", "1", "SLURM_NTASKS", "2", "PMIX_RANK", "1");
    cr_expect(!cq_launch_find(&l, "x") && l.rank == 1 && l.size == 2);
    ENV("SLURM_PROCID", "0", "SLURM_NTASKS", "1");
    cr_expect(!cq_launch_find(&l, "x") && l.size == 1);
}

Test(launch, other_launchers_are_answered_with_the_mpirun_command) {
    cq_launch l;
    ENV("TORCHELASTIC_RUN_ID", "none", "RANK", "1", "WORLD_SIZE", "8");
    cr_expect(cq_launch_find(&l, "ckaqad r.lua") == CQ_EUSAGE && l.rank == 1);
    cr_expect_str_eq(cq_error(),
                     "launcher: torchrun started 8 processes, wanted: mpirun -n 8 ckaqad r.lua");
    ENV("LOCAL_RANK", "0", "MASTER_ADDR", "here", "RANK", "0", "WORLD_SIZE", "2");
    cr_expect(cq_launch_find(&l, "ckaqad r.lua") == CQ_EUSAGE && l.rank == 0);
    ENV("SLURM_PROCID", "2", "SLURM_NTASKS", "4");
    cr_expect(cq_launch_find(&l, "ckaqad r.lua") == CQ_EUSAGE && l.rank == 2);
    cr_expect_str_eq(
        cq_error(),
        "launcher: srun without --mpi=pmix started 4 processes, wanted: mpirun -n 4 ckaqad r.lua");
    ENV("PMI_RANK", "0", "PMI_SIZE", "2");
    cr_expect(cq_launch_find(&l, "ckaqad r.lua") == CQ_EUSAGE);
}

Test(comm, one_rank_sums_and_gathers_itself_and_sends_nothing) {
    cq_comm *c;
    double x = 3, y[4] = {1, 2, 3, 4};
    float mine[3] = {1, 2, 3}, sum[3] = {10, 10, 10};
    int64_t bytes = 8;
    cr_assert(!cq_comm_open(&c, &(cq_launch){0, 1}, 60));
    cr_expect(!cq_comm_sum(c, &x, 1) && x == 3);
    cr_expect(!cq_comm_gather(c, y, &x, &bytes) && y[0] == 3);
    cr_expect(!cq_comm_agree(c, "data", "text") && !cq_comm_barrier(c));
    cq_piece p = {0, {mine, CQ_SHAPE1(3), CQ_F32}, {sum, CQ_SHAPE1(3), CQ_F32}};
    cr_expect(!cq_comm_scatter(c, &p, 1, 1) && sum[0] == 11 && sum[2] == 13);
    cr_expect(!cq_comm_spread(c, &p, 1) && mine[0] == 1);
    for (int k = 0; k < CQ_COMM_N; k++)
        cr_expect(cq_comm_bytes(c, (cq_collective)k) == 0);
    cr_expect_str_eq(cq_comm_failed(c, 3, "text"), "text");
    cq_comm_close(c);
}
