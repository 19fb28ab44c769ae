/// types.h - the fixed-width types every header uses, and the export mark of public functions.
///
/// The preprocessed headers are the LuaJIT cdef, so with CQ_CDEF nothing of the system is included.
#pragma once
#ifdef CQ_CDEF
#define CQ_API
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#define CQ_API __attribute__((visibility("default")))
#endif
