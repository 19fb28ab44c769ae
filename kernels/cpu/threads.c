/* threads.c - the thread count, and how OpenMP's threads wait.
 *
 * Between two parallel regions GNU's libgomp spins for milliseconds before it sleeps. Beside any
 * other busy process that stops the work it waits for: a product of 384 x 96 x 192 was measured at
 * 2 to 12 ms instead of 0.3. OMP_WAIT_POLICY=passive would cure it, but libgomp reads the
 * environment in its own constructor, which runs before any code of this library and of a program
 * linked to it.
 *
 * libgomp spins a thousandth of that as soon as there are more OpenMP threads than cores. So a
 * sleeping thread holds a team that makes them more: the team never works again, costs its stacks
 * and no time. With OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment nothing is done: they
 * already say how to wait. On a machine of one's own GOMP_SPINCOUNT=300000, libgomp's default, is
 * up to a tenth faster: a sleeping thread takes a tenth of a millisecond to wake in a virtual
 * machine.
 */
#include <limits.h>
#include <omp.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/kernels.h"

static void *hold_team(void *started) {
    int team = omp_get_num_procs() + 1, here = 0;
#pragma omp parallel num_threads(team) reduction(+ : here)
    here += 1;
    if (here > 0)
        sem_post(started);
    for (;;)
        pause();
    return NULL;
}

static void make_waiting_short(void) {
    pthread_t thread;
    pthread_attr_t attr;
    sem_t started;
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || omp_get_num_procs() < 2)
        return;
    if (pthread_attr_init(&attr) != 0)
        return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sem_init(&started, 0, 0);
    if (pthread_create(&thread, &attr, hold_team, &started) == 0)
        while (sem_wait(&started) != 0)
            ;
    sem_destroy(&started);
    pthread_attr_destroy(&attr);
}

int cq_processors(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }

int cq_threads_set(int threads) {
    /* a property of the process, like libgomp's own state */
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_waiting_short);
    if (threads < 1)
        threads = omp_get_num_procs();
    omp_set_num_threads(threads);
    return threads;
}
