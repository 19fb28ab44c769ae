/// process.h - other processes, locks between processes, and the request to stop.
///
/// A child is started with its output appended to a file, in a process group of its own (Ctrl-C
/// reaches the parent only), and gets SIGTERM when its parent dies.
#pragma once
#include "core/base/types.h"

/// Starts argv (found in PATH, ended by NULL). `env`: "NAME=value" strings put over this process'
/// environment, ended by NULL, or NULL. Output and errors are appended to `log`; NULL: they go to
/// this process' own. Input is /dev/null. CQ_EIO when it cannot be started.
CQ_API int cq_process_start(int64_t *pid, const char *const *argv, const char *const *env,
                            const char *log);
/// 1 when a child of this process has ended, 0 when it still runs; *code is its exit code, or 128 +
/// the signal that killed it. Each ended child is reported once; then CQ_EIO.
CQ_API int cq_process_poll(int64_t pid, int *code);
/// Sends a signal. CQ_EIO when there is no such process.
CQ_API int cq_process_signal(int64_t pid, int signal);
/// Number of this process.
CQ_API int64_t cq_process_id(void);
/// Sleeps; returns early when a signal arrives.
CQ_API void cq_process_sleep(double seconds);

/// Held by one process at a time; the system gives it back when the process ends, however it ends.
typedef struct cq_lock cq_lock;
/// Takes the lock file `path` (made when missing; holds the holder's pid). CQ_EUSAGE naming path
/// and holder when another process has it.
CQ_API int cq_lock_take(cq_lock **out, const char *path);
/// Gives it back and removes the file. Accepts NULL.
CQ_API void cq_lock_close(cq_lock *lock);
/// Pid of the process that holds the lock file, 0 when nobody does or it is missing.
CQ_API int64_t cq_lock_holder(const char *path);

/// Names of a folder's entries, sorted, each ended by a newline, without . and ..; the caller frees
/// *out.
CQ_API int cq_folder_list(char **out, const char *path);
/// Bytes and time of last change, in nanoseconds since 1970; CQ_EIO when missing.
CQ_API int cq_file_stat(const char *path, int64_t *bytes, int64_t *changed);

/// From now on long operations of this thread look at *flag and return CQ_ESTOPPED when it is not
/// 0. NULL: they look at nothing.
CQ_API void cq_stop_watch(const volatile int *flag);
/// CQ_ESTOPPED when a stop was asked for, else CQ_OK.
CQ_API int cq_stop_check(void);
