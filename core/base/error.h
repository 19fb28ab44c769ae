/// error.h - errors are values: an int status, 0 or negative, and a thread-local message.
///
/// `return cq_fail(CQ_EDATA, "%s: rank is %d, wanted 2", name, rank)` sets the message and returns.
/// Messages read `noun: what was found, what was wanted`. Nothing exits, nothing jumps.
#pragma once
#include "core/base/types.h"

/// Status values; `-status` up to 7 is also the exit code of the program.
enum cq_status {
    CQ_OK = 0,
    CQ_EIO = -1,       ///< the system refused: file, disk, folder
    CQ_EUSAGE = -2,    ///< a wrong option or argument
    CQ_EDATA = -3,     ///< an invalid data or model file
    CQ_ENOMEM = -4,    ///< does not fit memory
    CQ_ENUMERIC = -5,  ///< NaN or Inf where a number was needed
    CQ_EMISMATCH = -6, ///< verify or export mismatch
    CQ_EPEER = -7,     ///< another rank failed
    CQ_ESHAPE = -8,    ///< shapes do not fit together (exit code 2)
    CQ_ESTOPPED = -9   ///< a stop was asked for while it ran (cq_stop_watch)
};

/// Sets this thread's message (printf format) and returns `status`.
CQ_API int cq_fail(int status, const char *format, ...)
#ifndef CQ_CDEF
    __attribute__((format(printf, 2, 3)))
#endif
    ;
/// Puts `prefix: ` before the current message and returns `status` unchanged.
CQ_API int cq_fail_in(int status, const char *prefix);
/// The message of this thread's last failure; valid until its next one.
CQ_API const char *cq_error(void);
/// The program's exit code for a status.
CQ_API int cq_exit_code(int status);

#ifndef CQ_CDEF
/// Passes a failing status up unchanged.
#define CQ_TRY(call)                                                                               \
    do {                                                                                           \
        int cq_try_ = (call);                                                                      \
        if (cq_try_ != CQ_OK)                                                                      \
            return cq_try_;                                                                        \
    } while (0)
#endif
