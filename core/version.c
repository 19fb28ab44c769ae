/// version.c - what this library is and what it was built with.
#include "core/ckaqad.h"

#ifndef CQ_VERSION
#define CQ_VERSION "unknown"
#endif
#ifdef CQ_ONEDNN
#define CQ_WITH "oneDNN"
#else
#define CQ_WITH "no oneDNN"
#endif

const char *cq_version(void) { return CQ_VERSION " (" CQ_WITH ", gcc-compatible " __VERSION__ ")"; }
