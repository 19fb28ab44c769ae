/// process.c - fork and exec, locks, and the stop flag.
///
/// Between fork and exec only async-signal-safe calls: the parent has OpenMP threads. A lock
/// belongs to an open file description (fcntl's OFD locks), so that a killed process leaves none
/// behind and asking for the holder takes nothing.
#define _GNU_SOURCE
#include "core/base/process.h"
#include "core/base/error.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static size_t count(const char *const *list) {
    size_t n = 0;
    while (list && list[n])
        n++;
    return n;
}

/* `over` before what is inherited; a name of `over` is inherited no more. */
static const char **environment(const char *const *over) {
    size_t n = count((const char *const *)environ), k = count(over), at = k;
    const char **out = malloc((n + k + 1) * sizeof *out);
    if (!out)
        return NULL;
    for (size_t j = 0; j < k; j++)
        out[j] = over[j];
    for (size_t i = 0; i < n; i++) {
        bool replaced = false;
        for (size_t j = 0; j < k; j++) {
            size_t name = strcspn(over[j], "=") + 1;
            replaced = replaced || strncmp(environ[i], over[j], name) == 0;
        }
        if (!replaced)
            out[at++] = environ[i];
    }
    out[at] = NULL;
    return out;
}

/* In the child: never returns. */
static void become(const char *const *argv, const char **env, const char *log, pid_t parent) {
    int in = open("/dev/null", O_RDONLY);
    int out = log ? open(log, O_WRONLY | O_CREAT | O_APPEND, 0666) : STDOUT_FILENO;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGUSR1, SIG_DFL);
    if (signal(SIGHUP, SIG_DFL) == SIG_IGN) /* nohup holds for what it starts too */
        signal(SIGHUP, SIG_IGN);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(143);
    if (in < 0 || out < 0 || dup2(in, STDIN_FILENO) < 0)
        _exit(127);
    if (log && (dup2(out, STDOUT_FILENO) < 0 || dup2(out, STDERR_FILENO) < 0))
        _exit(127);
    environ = (char **)(size_t)env;
    execvp(argv[0], (char *const *)(size_t)argv);
    _exit(127);
}

int cq_process_start(int64_t *pid, const char *const *argv, const char *const *env,
                     const char *log) {
    if (!argv || !argv[0])
        return cq_fail(CQ_EUSAGE, "process: no program given");
    const char **all = environment(env);
    if (!all)
        return cq_fail(CQ_ENOMEM, "process: no memory for its environment");
    pid_t parent = getpid(), child = fork();
    if (child == 0)
        become(argv, all, log, parent);
    free(all);
    if (child < 0)
        return cq_fail(CQ_EIO, "process: %s cannot be started: %s", argv[0], strerror(errno));
    *pid = child;
    return CQ_OK;
}

int cq_process_poll(int64_t pid, int *code) {
    int status;
    pid_t got;
    do
        got = waitpid((pid_t)pid, &status, WNOHANG);
    while (got < 0 && errno == EINTR);
    if (got == 0)
        return 0;
    if (got < 0)
        return cq_fail(CQ_EIO, "process %ld: %s", (long)pid, strerror(errno));
    *code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return 1;
}

int cq_process_signal(int64_t pid, int signal) {
    return kill((pid_t)pid, signal) == 0
               ? CQ_OK
               : cq_fail(CQ_EIO, "process %ld: %s", (long)pid, strerror(errno));
}

int64_t cq_process_id(void) { return getpid(); }

void cq_process_sleep(double seconds) {
    struct timespec t = {.tv_sec = (time_t)seconds};
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

struct cq_lock {
    int fd;
    char *path;
};

static int64_t written_pid(int fd) {
    char text[32] = "";
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    return n > 0 ? strtoll(text, NULL, 10) : 0;
}

/* The file that was locked is still the one `path` names: its last holder may have removed it. */
static bool still_there(int fd, const char *path) {
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_ino == b.st_ino &&
           a.st_dev == b.st_dev;
}

static int lock_file(int *out, const char *path) {
    for (;;) {
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0)
            return cq_fail(CQ_EIO, "%s: %s", path, strerror(errno));
        struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        if (fcntl(fd, F_OFD_SETLK, &whole) != 0) {
            int why = errno;
            int64_t pid = written_pid(fd);
            close(fd);
            return why == EAGAIN || why == EACCES
                       ? cq_fail(CQ_EUSAGE, "%s: process %ld holds it, wanted a free one", path,
                                 (long)pid)
                       : cq_fail(CQ_EIO, "%s: %s", path, strerror(why));
        }
        if (still_there(fd, path)) {
            *out = fd;
            return CQ_OK;
        }
        close(fd);
    }
}

int cq_lock_take(cq_lock **out, const char *path) {
    char text[32];
    int fd = -1, n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
    CQ_TRY(lock_file(&fd, path));
    cq_lock *lock = calloc(1, sizeof *lock);
    if (lock)
        *lock = (cq_lock){.fd = fd, .path = strdup(path)};
    if (!lock || !lock->path) {
        free(lock);
        close(fd);
        return cq_fail(CQ_ENOMEM, "%s: no memory for a lock", path);
    }
    if (ftruncate(fd, 0) != 0 || pwrite(fd, text, (size_t)n, 0) != n) {
        int why = errno;
        cq_lock_close(lock);
        return cq_fail(CQ_EIO, "%s: %s", path, strerror(why));
    }
    *out = lock;
    return CQ_OK;
}

void cq_lock_close(cq_lock *lock) {
    if (!lock)
        return;
    unlink(lock->path);
    close(lock->fd);
    free(lock->path);
    free(lock);
}

int64_t cq_lock_holder(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    struct flock whole = {.l_type = F_RDLCK, .l_whence = SEEK_SET};
    bool held = fcntl(fd, F_OFD_GETLK, &whole) == 0 && whole.l_type != F_UNLCK;
    int64_t pid = held ? written_pid(fd) : 0;
    close(fd);
    return pid;
}

static int other_than_dots(const struct dirent *e) {
    return strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
}

static int by_bytes(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

int cq_folder_list(char **out, const char *path) {
    struct dirent **list;
    int n = scandir(path, &list, other_than_dots, by_bytes);
    if (n < 0)
        return cq_fail(CQ_EIO, "%s: %s", path, strerror(errno));
    size_t bytes = 1, at = 0;
    for (int i = 0; i < n; i++)
        bytes += strlen(list[i]->d_name) + 1;
    char *text = malloc(bytes);
    for (int i = 0; i < n; i++) {
        if (text)
            at += (size_t)sprintf(text + at, "%s\n", list[i]->d_name);
        free(list[i]);
    }
    free(list);
    if (!text)
        return cq_fail(CQ_ENOMEM, "%s: no memory for %d names", path, n);
    text[at] = 0;
    *out = text;
    return CQ_OK;
}

int cq_file_stat(const char *path, int64_t *bytes, int64_t *changed) {
    struct stat s;
    if (stat(path, &s) != 0)
        return cq_fail(CQ_EIO, "%s: %s", path, strerror(errno));
    *bytes = s.st_size;
    *changed = s.st_mtim.tv_sec * 1000000000L + s.st_mtim.tv_nsec;
    return CQ_OK;
}

/* Per thread: the flag belongs to whoever set it, and worker threads look at none. */
static _Thread_local const volatile int *stop_flag;

void cq_stop_watch(const volatile int *flag) { stop_flag = flag; }

int cq_stop_check(void) {
    return stop_flag && *stop_flag ? cq_fail(CQ_ESTOPPED, "stopped by a signal") : CQ_OK;
}
