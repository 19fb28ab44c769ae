/// mpi.c - the ranks of one mpirun: messages through Open MPI, and a watch over who is still there.
///
/// MPI waits for ever on a rank that is gone. Here nothing waits inside MPI: messages are
/// nonblocking and polled, and a thread sends every other rank a beat. Who ended on this machine is
/// seen at once (its process is gone), who is stopped or unreachable after `patience` seconds
/// without a beat, and a beat carries the message of a rank that failed. A rank that computes for
/// long still beats. The lowest rank that lives prints the one line; MPI_Abort then ends all.
/// One lock around every MPI call: MPI_THREAD_SERIALIZED is enough.
#ifdef CQ_MPI
#include "core/base/error.h"
#include "core/comm/comm_impl.h"
#include <errno.h>
#include <mpi.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST = 1 << 30, TEXT = 512 };

/* What a rank tells the others now and then. */
typedef struct beat {
    int64_t pid;
    int32_t code; ///< exit code of a rank that failed, else 0
    char host[64], text[TEXT];
} beat;

struct cq_mpi {
    cq_comm *c;
    MPI_Comm work, beats;
    pthread_t thread;
    pthread_mutex_t lock;
    atomic_bool wanted; ///< the watch waits for the lock; a mutex is not fair to who waits
    bool quit, failing; ///< under the lock, as all below
    beat mine;
    beat *sent, *got;      ///< [size]
    MPI_Request *out, *in; ///< [size] of beats
    double *heard;         ///< [size] when
    bool *near;            ///< [size] its process can be looked at
    int trouble;           ///< status of what happened to another rank, else 0
    double since;          ///< when that was
    char why[TEXT + 128];
    char name[MPI_MAX_LIBRARY_VERSION_STRING];
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void rest(double seconds) {
    struct timespec t = {.tv_sec = (time_t)seconds};
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

static double interval(const cq_mpi *m) {
    double s = m->c->patience / 8;
    return s < 0.05 ? 0.05 : s > 1 ? 1 : s;
}

static bool process_gone(const cq_mpi *m, int r) {
    return m->near[r] && kill((pid_t)m->got[r].pid, 0) != 0 && errno == ESRCH;
}

static bool silent(const cq_mpi *m, int r) { return now() - m->heard[r] > m->c->patience; }

/* Whether no rank below this one can print. */
static bool is_speaker(const cq_mpi *m) {
    for (int r = 0; r < m->c->rank; r++)
        if (!process_gone(m, r) && !silent(m, r))
            return false;
    return true;
}

/* "rank 2: message"; of rank 0, or where a rank is named already, the message itself. */
static void tag(char *out, size_t size, int rank, const char *message) {
    if (rank == 0 || !strncmp(message, "rank ", 5))
        snprintf(out, size, "%s", message);
    else
        snprintf(out, size, "rank %d: %s", rank, message);
}

static void note(cq_mpi *m, int status, int r, const char *message) {
    m->trouble = status;
    m->since = now();
    tag(m->why, sizeof m->why, r, message);
}

/* A rank is gone, or may be. */
static void miss(cq_mpi *m, int r, const char *what) {
    char text[TEXT];
    snprintf(text, sizeof text, "rank %d: %s; last collective: %s %ld (%s)", r, what,
             cq_collective_name(m->c->kind), (long)m->c->calls[m->c->kind],
             m->c->about ? m->c->about : "start");
    note(m, CQ_EPEER, r, text);
}

/* Looks for a rank that is gone, silent or failed, once. */
static void look(cq_mpi *m) {
    char text[96];
    for (int r = 0; r < m->c->size && !m->trouble; r++) {
        if (r == m->c->rank)
            continue;
        int code = m->got[r].code;
        if (code)
            note(m, code <= -CQ_EPEER ? -code : CQ_EPEER, r, m->got[r].text);
        else if (process_gone(m, r)) {
            snprintf(text, sizeof text, "process %ld has ended, wanted it to take part",
                     (long)m->got[r].pid);
            miss(m, r, text);
        } else if (silent(m, r)) {
            snprintf(text, sizeof text, "not heard of for %g s (stopped, or its machine is gone)",
                     m->c->patience);
            miss(m, r, text);
        }
    }
}

/* Sends a beat to everyone whose last one has left, and takes those that came. */
static void exchange_beats(cq_mpi *m) {
    for (int r = 0; r < m->c->size; r++) {
        int done = 0;
        if (r == m->c->rank)
            continue;
        MPI_Test(&m->out[r], &done, MPI_STATUS_IGNORE);
        if (done) {
            m->sent[r] = m->mine;
            MPI_Isend(&m->sent[r], sizeof(beat), MPI_BYTE, r, 0, m->beats, &m->out[r]);
        }
        for (done = 1; done;) {
            beat before = m->got[r];
            MPI_Test(&m->in[r], &done, MPI_STATUS_IGNORE);
            if (!done)
                break;
            m->heard[r] = now();
            if (before.code) /* what it said first is the cause */
                m->got[r] = before;
            MPI_Irecv(&m->got[r], sizeof(beat), MPI_BYTE, r, 0, m->beats, &m->in[r]);
        }
    }
}

static void say(const char *line) {
    fprintf(stderr, "ckaqad: %s\n", line);
    fflush(stderr);
}

/* Half a second after something happened to another rank, a main thread that computes has not seen
 * it: then this thread ends the program. */
static void end_if_late(cq_mpi *m) {
    if (!m->trouble || m->failing || now() - m->since < 0.5)
        return;
    if (is_speaker(m)) {
        say(m->why);
        MPI_Abort(MPI_COMM_WORLD, cq_exit_code(m->trouble));
    }
    if (now() - m->since > m->c->patience + 5)
        _exit(cq_exit_code(m->trouble));
}

static void *watch(void *context) {
    cq_mpi *m = context;
    double last = now();
    for (bool quit = false; !quit;) {
        atomic_store(&m->wanted, true);
        pthread_mutex_lock(&m->lock);
        atomic_store(&m->wanted, false);
        double gap = now() - last;
        if (gap > m->c->patience / 2) /* this process itself was stopped */
            for (int r = 0; r < m->c->size; r++)
                m->heard[r] += gap;
        last = now();
        exchange_beats(m);
        look(m);
        end_if_late(m);
        quit = m->quit;
        pthread_mutex_unlock(&m->lock);
        rest(m->trouble ? 0.05 : interval(m) / 4 < 0.1 ? interval(m) / 4 : 0.1);
    }
    return NULL;
}

static int no_memory(void) { return cq_fail(CQ_ENOMEM, "ranks: no memory"); }

static int allocate(cq_mpi *m) {
    size_t n = (size_t)m->c->size;
    m->sent = calloc(n, sizeof *m->sent);
    m->got = calloc(n, sizeof *m->got);
    m->out = calloc(n, sizeof *m->out);
    m->in = calloc(n, sizeof *m->in);
    m->heard = calloc(n, sizeof *m->heard);
    m->near = calloc(n, sizeof *m->near);
    return m->sent && m->got && m->out && m->in && m->heard && m->near ? CQ_OK : no_memory();
}

static void start_beats(cq_mpi *m) {
    m->mine.pid = getpid();
    gethostname(m->mine.host, sizeof m->mine.host - 1);
    MPI_Allgather(&m->mine, sizeof(beat), MPI_BYTE, m->got, sizeof(beat), MPI_BYTE, m->work);
    m->c->local_size = 0;
    for (int r = 0; r < m->c->size; r++) {
        bool here = !strcmp(m->got[r].host, m->mine.host);
        m->c->local_size += here;
        m->c->local_rank += here && r < m->c->rank;
        m->heard[r] = now();
        m->in[r] = m->out[r] = MPI_REQUEST_NULL;
        if (r == m->c->rank)
            continue;
        m->near[r] = here && kill((pid_t)m->got[r].pid, 0) == 0;
        MPI_Irecv(&m->got[r], sizeof(beat), MPI_BYTE, r, 0, m->beats, &m->in[r]);
    }
}

static int check_size(const cq_launch *launch, int size) {
    if (size == launch->size)
        return CQ_OK;
    return cq_fail(
        CQ_EUSAGE,
        "launcher: it gives %d ranks and MPI finds %d, wanted the mpirun of the Open MPI "
        "that this program was built with",
        launch->size, size);
}

int cq_mpi_open(cq_mpi **out, cq_comm *c, const cq_launch *launch) {
    int provided, length;
    cq_mpi *m = calloc(1, sizeof *m);
    if (!m)
        return no_memory();
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS ||
        provided < MPI_THREAD_SERIALIZED) {
        free(m);
        return cq_fail(CQ_EPEER, "launcher: MPI does not start with serialized threads");
    }
    m->c = c;
    MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &c->size);
    int status = check_size(launch, c->size);
    if (!status)
        status = allocate(m);
    if (status) { /* the process ends with it */
        MPI_Finalize();
        return status;
    }
    MPI_Comm_dup(MPI_COMM_WORLD, &m->work);
    MPI_Comm_dup(MPI_COMM_WORLD, &m->beats);
    MPI_Get_library_version(m->name, &length);
    m->name[strcspn(m->name, ",")] = 0;
    start_beats(m);
    pthread_mutex_init(&m->lock, NULL);
    if (pthread_create(&m->thread, NULL, watch, m)) {
        MPI_Finalize();
        return cq_fail(CQ_ENOMEM, "ranks: no thread for their watch");
    }
    *out = m;
    return CQ_OK;
}

const char *cq_mpi_name(const cq_mpi *m) { return m->name; }

void cq_mpi_close(cq_mpi *m) {
    if (!m)
        return;
    cq_comm_about(m->c, "the end");
    if (cq_comm_barrier(m->c))
        MPI_Abort(MPI_COMM_WORLD, cq_exit_code(CQ_EPEER));
    pthread_mutex_lock(&m->lock);
    m->quit = true;
    pthread_mutex_unlock(&m->lock);
    pthread_join(m->thread, NULL);
    for (int r = 0; r < m->c->size; r++) {
        if (m->in[r] == MPI_REQUEST_NULL)
            continue;
        MPI_Cancel(&m->in[r]);
        MPI_Wait(&m->in[r], MPI_STATUS_IGNORE);
    }
    MPI_Finalize();
    free(m->sent);
    free(m->got);
    free(m->out);
    free(m->in);
    free(m->heard);
    free(m->near);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

/* Posts a message in pieces that an int can count. Returns how many. */
static int post(cq_mpi *m, const cq_message *x, MPI_Request *request) {
    int n = 0;
    for (int64_t at = 0; at == 0 || at < x->bytes; at += LARGEST) {
        int bytes = (int)(x->bytes - at < LARGEST ? x->bytes - at : LARGEST);
        if (x->send)
            MPI_Isend((char *)x->data + at, bytes, MPI_BYTE, x->peer, 0, m->work, &request[n++]);
        else
            MPI_Irecv((char *)x->data + at, bytes, MPI_BYTE, x->peer, 0, m->work, &request[n++]);
    }
    return n;
}

/* Takes the lock, after the watch where that waits for it. */
static void lock_after_watch(cq_mpi *m) {
    for (int k = 0; k < 1000 && atomic_load(&m->wanted); k++)
        rest(2e-5);
    pthread_mutex_lock(&m->lock);
}

int cq_mpi_look(cq_mpi *m) {
    lock_after_watch(m);
    int status = m->trouble;
    pthread_mutex_unlock(&m->lock);
    return status;
}

int cq_mpi_give_up(cq_mpi *m) {
    lock_after_watch(m);
    m->failing = true;
    int status = m->trouble;
    pthread_mutex_unlock(&m->lock);
    return status ? cq_fail(status, "%s", m->why) : CQ_OK;
}

/* Until all requests are done, or something has happened to another rank. */
static int wait_for(cq_mpi *m, MPI_Request *request, int n) {
    for (int tries = 0;; tries++) {
        int done, status;
        lock_after_watch(m);
        MPI_Testall(n, request, &done, MPI_STATUSES_IGNORE);
        status = done ? CQ_OK : m->trouble;
        if (status)
            m->failing = true;
        pthread_mutex_unlock(&m->lock);
        if (done)
            return CQ_OK;
        if (status)
            return cq_fail(status, "%s", m->why);
        if (tries >= 100) /* sched_yield would hand a busy machine a whole slice each time */
            rest(tries < 1000 ? 2e-5 : 2e-4);
    }
}

int cq_mpi_transfer(cq_mpi *m, const cq_message *message, int64_t n) {
    int64_t most = 0;
    int posted = 0;
    for (int64_t i = 0; i < n; i++)
        most += message[i].bytes / LARGEST + 1;
    MPI_Request *request = calloc((size_t)most + 1, sizeof(MPI_Request));
    if (!request)
        return no_memory();
    pthread_mutex_lock(&m->lock);
    for (int64_t i = 0; i < n; i++)
        posted += post(m, &message[i], request + posted);
    pthread_mutex_unlock(&m->lock);
    int status = wait_for(m, request, posted);
    free(request); /* after a failure MPI still owns the messages: the process ends soon */
    return status;
}

const char *cq_mpi_failed(cq_mpi *m, int code, const char *message) {
    double begun = now();
    pthread_mutex_lock(&m->lock);
    m->failing = true;
    look(m);
    if (!m->trouble || strstr(m->why, message)) /* nothing happened before, or the same to all */
        tag(m->why, sizeof m->why, m->c->rank, message);
    m->mine.code = code > 0 ? code : 1;
    snprintf(m->mine.text, sizeof m->mine.text, "%s", message);
    exchange_beats(m);
    bool speaker = is_speaker(m);
    pthread_mutex_unlock(&m->lock);
    signal(SIGTERM, SIG_DFL);
    while (!speaker && now() - begun < m->c->patience + 5) {
        rest(0.02);
        pthread_mutex_lock(&m->lock);
        speaker = is_speaker(m);
        pthread_mutex_unlock(&m->lock);
    }
    return m->why;
}

void cq_mpi_abort(cq_mpi *m, int code) {
    fflush(NULL);
    pthread_mutex_lock(&m->lock);
    MPI_Abort(MPI_COMM_WORLD, code);
}
#else
typedef int cq_mpi_is_absent; /* ISO C wants a declaration */
#endif
