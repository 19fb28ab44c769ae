/// checkpoint.c - a training state on disk, whole or not at all.
///
/// `state.safetensors` holds, for each parameter NAME of the student: master.NAME (and low.NAME
/// where it is split), and where trained m.NAME and v.NAME, of 8 bits with m_scale.NAME and
/// v_scale.NAME; all in the form they have in memory. Where quantized amax.NAME, amax_x.NAME and
/// block_amax.NAME, so that a resumed run quantizes as the stopped one did. `state.json` is the
/// driver's. The folder is written beside its place and renamed.
///
/// R ranks write `state-0000k-of-0000R.safetensors`, each what it owns; any number of ranks reads
/// them: all of them take every weight, and the moments of what they own.
#include "core/train/checkpoint.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/process.h"
#include "core/tensor/device.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One named tensor of the state; data may be a scalar inside a parameter. */
typedef int (*visit_fn)(void *context, const char *name, cq_tensor t);

static int visit_param(cq_param *p, cq_adamw *adam, int64_t i, visit_fn visit, void *context) {
    char name[160];
    static const char *const moments[] = {"m", "v"};
    snprintf(name, sizeof name, "master.%s", p->name);
    if (p->value.data) /* else another rank's expert */
        CQ_TRY(visit(context, name, p->value));
    snprintf(name, sizeof name, "low.%s", p->name);
    if (p->low.data)
        CQ_TRY(visit(context, name, p->low));
    for (int k = 0; k < 2 && adam && cq_adamw_moment(adam, i, k)->data; k++) {
        snprintf(name, sizeof name, "%s.%s", moments[k], p->name);
        CQ_TRY(visit(context, name, *cq_adamw_moment(adam, i, k)));
        snprintf(name, sizeof name, "%s_scale.%s", moments[k], p->name);
        if (cq_adamw_scale(adam, i, k)->data)
            CQ_TRY(visit(context, name, *cq_adamw_scale(adam, i, k)));
    }
    if (!p->quantized)
        return CQ_OK;
    snprintf(name, sizeof name, "amax.%s", p->name);
    CQ_TRY(visit(context, name, (cq_tensor){&p->amax, CQ_SHAPE1(1), CQ_F32}));
    snprintf(name, sizeof name, "amax_x.%s", p->name);
    CQ_TRY(visit(context, name, (cq_tensor){p->amax_x, CQ_SHAPE1(1), CQ_F32}));
    snprintf(name, sizeof name, "block_amax.%s", p->name);
    return p->block_amax.data ? visit(context, name, p->block_amax) : CQ_OK;
}

/* The writer reads when it writes, so copies of what lies on a device live until then. */
typedef struct copies {
    cq_st_writer *writer;
    void **owned;
    int64_t n, capacity;
} copies;

static int add_tensor(void *context, const char *name, cq_tensor t) {
    copies *c = context;
    void *owned;
    if (c->n == c->capacity) {
        int64_t capacity = c->capacity ? 2 * c->capacity : 64;
        void **more = realloc(c->owned, (size_t)capacity * sizeof *more);
        if (!more)
            return cq_fail(CQ_ENOMEM, "checkpoint: no memory for its tensor list");
        c->owned = more;
        c->capacity = capacity;
    }
    CQ_TRY(cq_tensor_on_host(&t, &owned, t));
    c->owned[c->n++] = owned;
    return cq_st_writer_add(c->writer, name, t);
}

/* What this rank owns; the first owns what nobody trains. */
static int add_all(cq_model *m, cq_adamw *adam, copies *c) {
    for (int64_t i = 0; i < cq_model_n_params(m); i++)
        if (!adam || cq_adamw_owns(adam, i))
            CQ_TRY(visit_param(cq_model_param(m, i), adam, i, add_tensor, c));
    return CQ_OK;
}

static int file_name(char *out, size_t size, const char *dir, int rank, int ranks) {
    char name[64] = "state.safetensors";
    if (ranks > 1)
        snprintf(name, sizeof name, "state-%05d-of-%05d.safetensors", rank + 1, ranks);
    return cq_path_join(out, size, dir, name);
}

static int write_shard(const char *dir, cq_st_writer *w, int rank, int ranks) {
    char path[4096];
    CQ_TRY(file_name(path, sizeof path, dir, rank, ranks));
    return cq_st_writer_file(w, path);
}

static int finish(const char *dir, const char *part, const char *json) {
    char path[4096];
    CQ_TRY(cq_path_join(path, sizeof path, part, "state.json"));
    CQ_TRY(cq_file_write(path, json, (int64_t)strlen(json)));
    return cq_folder_replace(dir, part);
}

/* The steps that ranks take together; what one of them cannot do ends all. */
static int write_together(const char *dir, const char *part, cq_st_writer *w, cq_comm *comm,
                          const char *json) {
    int rank = cq_comm_rank(comm), ranks = cq_comm_size(comm);
    cq_comm_about(comm, "checkpoint");
    if (rank == 0)
        CQ_TRY(cq_folder_make(part));
    if (ranks > 1)
        CQ_TRY(cq_comm_barrier(comm));
    CQ_TRY(write_shard(part, w, rank, ranks));
    if (ranks > 1)
        CQ_TRY(cq_comm_barrier(comm));
    if (rank == 0)
        CQ_TRY(finish(dir, part, json));
    return ranks > 1 ? cq_comm_barrier(comm) : CQ_OK;
}

/* The number of the process that names the unfinished folder. */
static int writer_id(int64_t *pid, cq_comm *comm) {
    *pid = getpid();
    return cq_comm_size(comm) > 1 ? cq_comm_broadcast(comm, pid, sizeof *pid, 0) : CQ_OK;
}

int cq_checkpoint_save(const char *dir, cq_model *student, cq_adamw *adam, const char *json) {
    char part[4200];
    copies c = {0};
    int64_t pid;
    cq_comm *comm = adam ? cq_adamw_comm(adam) : NULL;
    CQ_TRY(writer_id(&pid, comm));
    snprintf(part, sizeof part, "%s.part.%ld", dir, (long)pid);
    CQ_TRY(cq_st_writer_open(&c.writer));
    int status = add_all(student, adam, &c);
    if (!status)
        status = write_together(dir, part, c.writer, comm, json);
    cq_st_writer_close(c.writer);
    for (int64_t i = 0; i < c.n; i++)
        free(c.owned[i]);
    free(c.owned);
    if (status) {
        char message[1024];
        snprintf(message, sizeof message, "%s", cq_error());
        if (cq_comm_rank(comm) == 0)
            cq_folder_remove(part);
        return cq_fail(status, "%s", message);
    }
    return CQ_OK;
}

/* The files of a checkpoint: one, or one of each rank that wrote it. */
typedef struct reader {
    cq_safetensors **st;
    int n;
    const char *dir;
    int64_t used;
} reader;

static const char other_form[] = " (saved with another --master or --moments)";

/* Tensors that only narrow forms have. */
static bool is_part(const char *name) {
    return !strncmp(name, "low.", 4) || !strncmp(name + 1, "_scale.", 7);
}

static const cq_entry *find(const reader *r, const char *name) {
    const cq_entry *e = NULL;
    for (int k = 0; k < r->n && !e; k++)
        e = cq_safetensors_find(r->st[k], name);
    return e;
}

static int read_tensor(void *context, const char *name, cq_tensor t) {
    reader *r = context;
    const cq_entry *e = find(r, name);
    char found[96], wanted[96];
    if (!e)
        return cq_fail(CQ_EDATA, "%s: %s is missing, the run wants it%s", r->dir, name,
                       is_part(name) ? other_form : "");
    if (e->tensor.dtype != t.dtype || !cq_shape_equal(e->tensor.shape, t.shape))
        return cq_fail(CQ_EDATA, "%s: %s is %s %s, wanted %s %s%s", r->dir, name,
                       cq_dtype_name(e->tensor.dtype),
                       cq_shape_text(found, sizeof found, e->tensor.shape), cq_dtype_name(t.dtype),
                       cq_shape_text(wanted, sizeof wanted, t.shape),
                       e->tensor.dtype != t.dtype ? other_form : "");
    r->used++;
    return cq_copy(t.data, e->tensor.data, cq_tensor_bytes(t));
}

/* Moments of a parameter that another rank owns, and the weights of its experts: counted, not read.
 */
static void pass_over(reader *r, const cq_param *p) {
    static const char *const kinds[] = {"m",      "v",   "m_scale",   "v_scale",
                                        "master", "low", "block_amax"};
    char name[160];
    for (int k = 0; k < (p->value.data ? 4 : 7); k++) {
        snprintf(name, sizeof name, "%s.%s", kinds[k], p->name);
        r->used += find(r, name) != NULL;
    }
}

static int read_all(reader *r, cq_model *m, cq_adamw *adam) {
    int64_t held = 0;
    for (int64_t i = 0; i < cq_model_n_params(m); i++) {
        cq_param *p = cq_model_param(m, i);
        CQ_TRY(visit_param(p, adam, i, read_tensor, r));
        if ((adam && p->trainable && !cq_adamw_owns(adam, i)) || !p->value.data)
            pass_over(r, p);
    }
    for (int k = 0; k < r->n; k++)
        held += cq_safetensors_count(r->st[k]);
    return r->used == held ? CQ_OK
                           : cq_fail(CQ_EDATA, "%s: holds %ld tensors, the run wants %ld", r->dir,
                                     (long)held, (long)r->used);
}

/* How many ranks wrote a checkpoint. */
static int count_shards(int *n, const char *dir) {
    char *names;
    *n = 1;
    CQ_TRY(cq_folder_list(&names, dir));
    for (const char *at = names; (at = strstr(at, "state-")) != NULL; at++)
        if (sscanf(at, "state-%*5d-of-%5d.safetensors", n) == 1)
            break;
    free(names);
    return *n >= 1 ? CQ_OK
                   : cq_fail(CQ_EDATA, "%s: the files of %d ranks, wanted 1 or more", dir, *n);
}

static int open_shards(reader *r, const char *dir) {
    char path[4096];
    int n;
    CQ_TRY(count_shards(&n, dir));
    r->st = calloc((size_t)n, sizeof(cq_safetensors *));
    if (!r->st)
        return cq_fail(CQ_ENOMEM, "%s: no memory for %d files", dir, n);
    for (; r->n < n; r->n++) {
        CQ_TRY(file_name(path, sizeof path, dir, r->n, n));
        CQ_TRY(cq_safetensors_open(&r->st[r->n], path));
    }
    return CQ_OK;
}

int cq_checkpoint_load(const char *dir, cq_model *student, cq_adamw *adam, cq_stream *s,
                       char **json) {
    char path[4096];
    int64_t bytes;
    reader r = {.dir = dir};
    *json = NULL;
    int status = open_shards(&r, dir);
    if (!status)
        status = read_all(&r, student, adam);
    for (int k = 0; k < r.n; k++)
        cq_safetensors_close(r.st[k]);
    free(r.st);
    CQ_TRY(status);
    if (adam)
        cq_adamw_fresh(adam);
    CQ_TRY(cq_model_requantize(student, s));
    CQ_TRY(cq_path_join(path, sizeof path, dir, "state.json"));
    return cq_file_read(json, &bytes, path);
}
