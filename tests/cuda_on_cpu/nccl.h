/// nccl.h - the part of NCCL that core/comm/nccl.c uses, between processes of this machine.
///
/// Stands in for NVIDIA's header of this name, and for what that one takes from cuda_runtime.h. The
/// emulation is stricter than the library: what NCCL leaves undefined is an error here (nccl.c).
#pragma once
#include <limits.h>
#include <stddef.h>

typedef struct CUstream_st *cudaStream_t;
typedef enum cudaError { cudaSuccess = 0, cudaErrorNotReady = 600 } cudaError_t;
/// Moves the messages of the transfer that is under way on, as far as that goes now.
cudaError_t cudaStreamQuery(cudaStream_t queue);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t e);

#define NCCL_VERSION_CODE 22809

typedef struct ncclComm *ncclComm_t;
typedef struct ncclUniqueId {
    char internal[128];
} ncclUniqueId;
typedef enum ncclResult {
    ncclSuccess,
    ncclUnhandledCudaError,
    ncclSystemError,
    ncclInternalError,
    ncclInvalidArgument,
    ncclInvalidUsage,
    ncclRemoteError,
    ncclInProgress
} ncclResult_t;
typedef enum ncclDataType { ncclInt8, ncclUint8 } ncclDataType_t;
typedef struct ncclConfig {
    size_t size;
    unsigned magic;
    int blocking;
} ncclConfig_t;
#define NCCL_CONFIG_INITIALIZER                                                                    \
    { sizeof(ncclConfig_t), 0xcafebeef, INT_MIN }

ncclResult_t ncclGetVersion(int *version);
const char *ncclGetErrorString(ncclResult_t e);
const char *ncclGetLastError(ncclComm_t c);
ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config);
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state);
ncclResult_t ncclCommFinalize(ncclComm_t c);
ncclResult_t ncclCommDestroy(ncclComm_t c);
ncclResult_t ncclCommAbort(ncclComm_t c);
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);
ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t queue);
ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t queue);
