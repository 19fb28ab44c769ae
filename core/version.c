/// version.c - what this library is and what it was built with, as one static text for logs and
/// run.json.
#include "core/ckaqad.h"
#include <jansson.h>
#include <utf8proc.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define DOTTED(a, b, c) TEXT(a) "." TEXT(b) "." TEXT(c)

#ifdef CQ_ONEDNN
#include <oneapi/dnnl/dnnl_version.h>
#define MATMUL "oneDNN " DOTTED(DNNL_VERSION_MAJOR, DNNL_VERSION_MINOR, DNNL_VERSION_PATCH)
#else
#define MATMUL "no oneDNN"
#endif
#ifdef CQ_NCCL
#define DEVICES ", NCCL " CQ_NCCL
#else
#define DEVICES ""
#endif
#ifdef __clang__
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif
#define UTF8PROC DOTTED(UTF8PROC_VERSION_MAJOR, UTF8PROC_VERSION_MINOR, UTF8PROC_VERSION_PATCH)

#define PCRE2 TEXT(PCRE2_MAJOR) "." TEXT(PCRE2_MINOR)
#define LIBRARIES                                                                                  \
    MATMUL ", jansson " JANSSON_VERSION ", PCRE2 " PCRE2 ", utf8proc " UTF8PROC DEVICES

const char *cq_version(void) { return CQ_VERSION " (" LIBRARIES ", " COMPILER ")"; }
