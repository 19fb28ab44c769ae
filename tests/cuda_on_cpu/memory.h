/// memory.h - the emulated device's memory: a region that the host may not touch except while a
/// kernel, a copy or a library call runs.
#pragma once
#include "core/base/error.h"
#include "kernels/kernels.h"

extern const cq_memory cq_emu_memory;
/// Between these two the memory may be read and written. They nest.
void cq_emu_memory_unlock(void);
void cq_emu_memory_lock(void);
/// True for a pointer into a live piece, or into memory that both sides share; *left gets the bytes
/// from there to its end.
bool cq_emu_memory_has(const void *p, int64_t *left);
/// True for an address of the region, live or not; describes it for a message.
bool cq_emu_memory_explain(const void *p, char *text, size_t size);
/// True while the host must keep away.
bool cq_emu_memory_locked(void);
/// How often the host has waited for the device: for its stream, or to copy from there.
int64_t cq_emu_waits(void);
/// While operations are recorded (cq_memory.record) they are kept, with a copy of their arguments
/// and of the stream, instead of done.
bool cq_emu_recording(void);
typedef int (*cq_emu_operation)(cq_stream *s, const void *arguments);
int cq_emu_keep(cq_stream *s, cq_emu_operation operation, const void *arguments, size_t bytes);
/// The most that an operation asked of cq_cuda_scratch. While operations are rehearsed, since the
/// rehearsal began: their kernels do not run.
int64_t cq_emu_scratch(void);
void cq_emu_rehearse(bool on);
bool cq_emu_rehearses(void);
/// CQ_OK, or the error that a kernel or the memory noted, which is forgotten then.
int cq_emu_status(const char *op);
/// Notes an error unless one is noted already.
void cq_emu_note(const char *format, ...) __attribute__((format(printf, 1, 2)));
/// The device that was opened last.
int cq_emu_device(void);
/// Installs the handler that names wrong accesses.
void cq_emu_watch(void);
