/// model_offload.c - a forward whose blocks lie in pinned host memory: two windows on the device,
/// one of which is filled while the block in the other runs.
///
/// The parameters of a block lie together, so one copy brings it. For the time of its forward the
/// layers' pointers are moved by the distance between the window and the block's place; at all
/// other times they point to the host's memory, which the device reaches, too.
#include "core/base/error.h"
#include "core/model/model_impl.h"
#include <stdlib.h>

/* The bytes of a block: from the first to behind the last. */
typedef struct place {
    char *first, *end;
} place;

static void widen_place(place *at, cq_tensor t) {
    char *first = t.data, *end = first + cq_tensor_bytes(t);
    if (!first)
        return;
    at->first = !at->first || first < at->first ? first : at->first;
    at->end = end > at->end ? end : at->end;
}

static place place_of(const cq_model *m, int64_t block) {
    place at = {NULL, NULL};
    for (int64_t i = 0; i < m->n_linears; i++)
        if (m->linear[i]->part[0]->block == block) {
            widen_place(&at, m->linear[i]->value);
            widen_place(&at, m->linear[i]->fq16);
        }
    for (int64_t i = 0; i < m->n_params; i++)
        if (m->param[i]->block == block && !cq_param_stacked(m, m->param[i]))
            widen_place(&at, m->param[i]->value);
    return at;
}

static void move(cq_tensor *t, const char *first, const char *end, ptrdiff_t by) {
    char *data = t->data;
    if (data && data >= first && data < end)
        t->data = data + by;
}

/* Points what lies from `first` to `end` elsewhere. */
static void move_block(cq_model *m, int64_t block, const char *first, const char *end,
                       ptrdiff_t by) {
    for (int64_t i = 0; i < m->n_linears; i++) {
        cq_linear *w = m->linear[i];
        cq_tensor *all[] = {&w->value, &w->fq, &w->fq16};
        for (int k = 0; k < 3 && w->part[0]->block == block; k++)
            move(all[k], first, end, by);
    }
    for (int64_t i = 0; i < m->n_params; i++) {
        cq_param *p = m->param[i];
        cq_tensor *all[] = {&p->value, &p->fq, &p->fq16};
        for (int k = 0; k < 3 && p->block == block; k++)
            move(all[k], first, end, by);
    }
}

int cq_model_plan_windows(cq_model *m, cq_plan *p) {
    int64_t largest = 0;
    for (int64_t block = 0; block < m->config.n_blocks; block++) {
        int64_t bytes = 0; /* every buffer begins on a multiple of 64 */
        for (int64_t i = 0; i < m->n_linears; i++)
            if (m->linear[i]->part[0]->block == block)
                bytes += cq_tensor_bytes(m->linear[i]->value) +
                         cq_tensor_bytes(m->linear[i]->fq16) + 128;
        for (int64_t i = 0; i < m->n_params; i++)
            if (m->param[i]->block == block && !cq_param_stacked(m, m->param[i]))
                bytes += cq_tensor_bytes(m->param[i]->value) + 64;
        largest = bytes > largest ? bytes : largest;
    }
    for (int i = 0; i < 2; i++)
        CQ_TRY(cq_plan_add(p, &m->window[i], CQ_FOR_TEACHER, "window for blocks", CQ_U8,
                           CQ_SHAPE1(largest)));
    return CQ_OK;
}

static int ask(cq_model *m, cq_stream *s, int64_t block) {
    int slot = (int)(block % 2);
    if (m->in_window[slot].block == block)
        return CQ_OK;
    place at = place_of(m, block);
    m->in_window[slot].block = -1;
    if (at.end - at.first > cq_tensor_bytes(m->window[slot]))
        return cq_fail(CQ_EUSAGE, "model: block %ld takes %ld bytes, its window has %ld",
                       (long)block, (long)(at.end - at.first),
                       (long)cq_tensor_bytes(m->window[slot]));
    CQ_TRY(s->table->memory->fetch(s, slot, m->window[slot].data, at.first, at.end - at.first));
    m->in_window[slot].block = block;
    m->in_window[slot].first = at.first, m->in_window[slot].end = at.end;
    return CQ_OK;
}

int cq_model_block_in(cq_model *m, cq_stream *s, int64_t block) {
    int slot = (int)(block % 2);
    CQ_TRY(ask(m, s, block));
    if (block + 1 < m->config.n_blocks)
        CQ_TRY(ask(m, s, block + 1));
    CQ_TRY(s->table->memory->arrived(s, slot));
    char *first = m->in_window[slot].first, *end = m->in_window[slot].end;
    m->moved = (char *)m->window[slot].data - first;
    move_block(m, block, first, end, m->moved);
    return CQ_OK;
}

int cq_model_block_out(cq_model *m, cq_stream *s, int64_t block) {
    int slot = (int)(block % 2);
    if (m->moved)
        move_block(m, block, m->in_window[slot].first + m->moved, m->in_window[slot].end + m->moved,
                   -m->moved);
    m->moved = 0;
    return block + 1 == m->config.n_blocks ? ask(m, s, 0) : CQ_OK; /* the next forward's first */
}
