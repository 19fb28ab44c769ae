/// checkpoint.c - a training state on disk, whole or not at all.
///
/// `state.safetensors` holds, for each parameter NAME of the student: master.NAME (and low.NAME
/// where it is split), and where trained m.NAME and v.NAME, of 8 bits with m_scale.NAME and
/// v_scale.NAME; all in the form they have in memory. Where quantized amax.NAME, amax_x.NAME and
/// block_amax.NAME, so that a resumed run quantizes as the stopped one did. `state.json` is the
/// driver's. The folder is written beside its place and renamed.
#include "core/train/checkpoint.h"
#include "core/base/error.h"
#include "core/base/file.h"
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

static int visit_all(cq_model *m, cq_adamw *adam, visit_fn visit, void *context) {
    for (int64_t i = 0; i < cq_model_n_params(m); i++)
        CQ_TRY(visit_param(cq_model_param(m, i), adam, i, visit, context));
    return CQ_OK;
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

static int write_files(const char *dir, cq_st_writer *w, const char *json) {
    char path[4096];
    CQ_TRY(cq_folder_make(dir));
    CQ_TRY(cq_path_join(path, sizeof path, dir, "state.safetensors"));
    CQ_TRY(cq_st_writer_file(w, path));
    CQ_TRY(cq_path_join(path, sizeof path, dir, "state.json"));
    return cq_file_write(path, json, (int64_t)strlen(json));
}

int cq_checkpoint_save(const char *dir, cq_model *student, cq_adamw *adam, const char *json) {
    char part[4200];
    copies c = {0};
    snprintf(part, sizeof part, "%s.part.%ld", dir, (long)getpid());
    CQ_TRY(cq_st_writer_open(&c.writer));
    int status = visit_all(student, adam, add_tensor, &c);
    if (!status)
        status = write_files(part, c.writer, json);
    if (!status)
        status = cq_folder_replace(dir, part);
    cq_st_writer_close(c.writer);
    for (int64_t i = 0; i < c.n; i++)
        free(c.owned[i]);
    free(c.owned);
    if (status) {
        char message[1024];
        snprintf(message, sizeof message, "%s", cq_error());
        cq_folder_remove(part);
        return cq_fail(status, "%s", message);
    }
    return CQ_OK;
}

typedef struct reader {
    const cq_safetensors *st;
    const char *dir;
    int64_t used;
} reader;

static const char other_form[] = " (saved with another --master or --moments)";

/* Tensors that only narrow forms have. */
static bool is_part(const char *name) {
    return !strncmp(name, "low.", 4) || !strncmp(name + 1, "_scale.", 7);
}

static int read_tensor(void *context, const char *name, cq_tensor t) {
    reader *r = context;
    const cq_entry *e = cq_safetensors_find(r->st, name);
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

int cq_checkpoint_load(const char *dir, cq_model *student, cq_adamw *adam, cq_stream *s,
                       char **json) {
    char path[4096];
    cq_safetensors *st = NULL;
    int64_t bytes;
    *json = NULL;
    CQ_TRY(cq_path_join(path, sizeof path, dir, "state.safetensors"));
    CQ_TRY(cq_safetensors_open(&st, path));
    reader r = {st, dir, 0};
    int status = visit_all(student, adam, read_tensor, &r);
    if (!status && r.used != cq_safetensors_count(st))
        status = cq_fail(CQ_EDATA, "%s: holds %ld tensors, the run wants %ld", dir,
                         (long)cq_safetensors_count(st), (long)r.used);
    cq_safetensors_close(st);
    CQ_TRY(status);
    CQ_TRY(cq_model_requantize(student, s));
    CQ_TRY(cq_path_join(path, sizeof path, dir, "state.json"));
    return cq_file_read(json, &bytes, path);
}
