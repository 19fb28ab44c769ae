/// hash.h - SHA-256 (FIPS 180-4) of bytes and files.
#pragma once
#include "core/base/types.h"

typedef struct cq_sha256 {
    uint32_t h[8];
    uint64_t bytes;
    uint8_t block[64];
} cq_sha256;

CQ_API void cq_sha256_init(cq_sha256 *s);
CQ_API void cq_sha256_add(cq_sha256 *s, const void *data, size_t n);
/// Writes 64 lower-case hex digits and a zero.
CQ_API void cq_sha256_hex(cq_sha256 *s, char hex[65]);
/// CQ_EIO naming the file when it cannot be read.
CQ_API int cq_sha256_file(const char *path, char hex[65]);
