/// dtype.h - element types of tensors and files.
#pragma once
#include "core/base/types.h"

typedef enum cq_dtype {
    CQ_F32 = 0,
    CQ_F64 = 1,
    CQ_BF16 = 2,
    CQ_F16 = 3,
    CQ_F8_E4M3 = 4,
    CQ_U8 = 5,
    CQ_I32 = 6,
    CQ_I64 = 7,
    CQ_N_DTYPES = 8
} cq_dtype;

/// Bytes of one element.
CQ_API int64_t cq_dtype_bytes(cq_dtype dtype);
/// The safetensors name, for example "BF16".
CQ_API const char *cq_dtype_name(cq_dtype dtype);
/// Finds a dtype by its safetensors name; false when unknown.
CQ_API bool cq_dtype_find(cq_dtype *out, const char *name);
/// Converts n elements between any two float dtypes (round to nearest even; E4M3 saturates at 448).
/// Integer dtypes convert to themselves only (a copy), else CQ_EUSAGE. No pointer needs alignment.
CQ_API int cq_convert(void *to, cq_dtype to_dtype, const void *from, cq_dtype from_dtype,
                      int64_t n);
