/// graph.c - the passes of a stream that were seen, by key. The longest unused one leaves first, of
/// those that are recorded and of the others.
#include "core/tensor/graph.h"
#include "core/base/error.h"
#include "core/base/process.h"
#include <stdlib.h>
#include <string.h>

enum { MOST = 256, MOST_GRAPHS = 32 };

typedef struct entry {
    cq_graph_key key;
    int64_t used; ///< 0: empty
    void *graph;  ///< NULL: not recorded
    bool refused; ///< cannot be recorded
} entry;

struct cq_graphs {
    entry seen[MOST];
    int64_t clock, played, changes, recorded;
};

static void forget(cq_stream *s, entry *e) {
    if (e->graph) {
        s->table->memory->forget(s, e->graph);
        s->graphs->recorded--;
    }
    *e = (entry){.used = 0};
}

void cq_graphs_forget(cq_stream *s) {
    for (int i = 0; i < MOST && s->graphs; i++)
        forget(s, &s->graphs->seen[i]);
}

int cq_graphs_set(cq_stream *s, bool on) {
    if (!on && s->graphs) {
        cq_graphs_forget(s);
        free(s->graphs);
        s->graphs = NULL;
    }
    if (!on || s->graphs || !s->table->memory)
        return CQ_OK;
    s->graphs = calloc(1, sizeof *s->graphs);
    return s->graphs ? CQ_OK : cq_fail(CQ_ENOMEM, "graphs: no memory");
}

int64_t cq_graphs_played(const cq_stream *s) { return s->graphs ? s->graphs->played : 0; }

/* The longest unused entry of those with or without a graph. */
static entry *oldest(cq_graphs *g, bool recorded) {
    entry *found = NULL;
    for (int i = 0; i < MOST; i++)
        if ((g->seen[i].graph != NULL) == recorded && (!found || g->seen[i].used < found->used))
            found = &g->seen[i];
    return found;
}

/* The entry of a key, an empty one where there was none. */
static entry *find(cq_stream *s, const cq_graph_key *key) {
    cq_graphs *g = s->graphs;
    for (int i = 0; i < MOST; i++)
        if (g->seen[i].used && memcmp(&g->seen[i].key, key, sizeof *key) == 0)
            return &g->seen[i];
    entry *e = oldest(g, false);
    *e = (entry){.key = *key};
    return e;
}

/* Nothing has been done when it fails. */
static int record(cq_stream *s, entry *e, cq_pass pass, void *argument) {
    const cq_memory *m = s->table->memory;
    void *graph = NULL;
    if (s->graphs->recorded == MOST_GRAPHS)
        forget(s, oldest(s->graphs, true));
    CQ_TRY(m->record(s));
    int status = pass(s, argument), ended = m->recorded(s, &graph);
    if (status && graph)
        m->forget(s, graph);
    if (status || ended)
        return status ? status : ended;
    e->graph = graph;
    s->graphs->recorded++;
    return CQ_OK;
}

int cq_graphs_run(cq_stream *s, const cq_graph_key *key, cq_pass pass, void *argument) {
    cq_graphs *g = s->graphs;
    if (!g)
        return pass(s, argument);
    int64_t changes = s->table->memory->changes();
    if (changes != g->changes)
        cq_graphs_forget(s);
    g->changes = changes;
    entry *e = find(s, key);
    bool first = !e->used;
    e->used = ++g->clock;
    if (!first && !e->graph && !e->refused)
        e->refused = record(s, e, pass, argument) != CQ_OK;
    if (!e->graph)
        return pass(s, argument);
    CQ_TRY(cq_stop_check());
    g->played++;
    return s->table->memory->play(s, e->graph);
}
