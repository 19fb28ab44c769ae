/// graph.h - passes whose operations come again with the same arguments are recorded once and
/// played from then on, on a device that can (CUDA graphs).
///
/// A pass is a function that only asks operations of a stream: no upload, no look at a result. The
/// first time with a key it runs as it is, the second time it is recorded, and what was recorded is
/// played from then on, without calling the function. The key must tell apart all that the function
/// bases its arguments on and that may change while memory stays where it is. What is recorded is
/// forgotten when memory of the device is taken or given back. A pass that cannot be recorded runs
/// as it is.
#pragma once
#include "kernels/kernels.h"

/// Whose pass, and the numbers in its arguments; unused ones are 0.
typedef struct cq_graph_key {
    const void *of;
    int64_t n[6];
} cq_graph_key;

/// Whether passes of this stream are recorded; off at first, and nothing to do on the host. CQ_OK
/// or CQ_ENOMEM. cq_stream_close forgets them.
CQ_API int cq_graphs_set(cq_stream *s, bool on);
/// How often passes were played instead of run.
CQ_API int64_t cq_graphs_played(const cq_stream *s);

/// Where what a pass bases its arguments on has changed.
void cq_graphs_forget(cq_stream *s);

typedef int (*cq_pass)(cq_stream *s, void *argument);
/// Runs, records or plays a pass. The function may be called twice in one call.
int cq_graphs_run(cq_stream *s, const cq_graph_key *key, cq_pass pass, void *argument);
