/// shares.c - gradients to their owners in rank order, weights back packed.
///
/// A quantized parameter's forward copy is decode(encode(master)), so 4.5 bits a value carry it
/// without loss: the receiver decodes the owner's codes and scales with the frozen tensor maximum
/// that all ranks share. Everything else goes as it is.
#include "core/train/shares.h"
#include "core/base/error.h"
#include "core/quant/scales.h"
#include "core/tensor/device.h"
#include <stdlib.h>

enum { WINDOW = 64 << 20 }; ///< bytes of codes on their way at once, or one parameter's

typedef struct sized {
    int64_t param, elems;
} sized;

static int by_size(const void *a, const void *b) {
    const sized *x = a, *y = b;
    if (x->elems != y->elems)
        return x->elems < y->elems ? 1 : -1;
    return x->param < y->param ? -1 : 1;
}

static int deal_out(cq_shares *x) {
    size_t ranks = (size_t)cq_comm_size(x->comm), n = 0;
    int64_t *load = calloc(ranks, sizeof *load);
    sized *list = calloc((size_t)x->n, sizeof *list);
    for (int64_t i = 0; i < x->n && load && list; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        if (p->trainable && p->holder < 0)
            list[n++] = (sized){i, cq_shape_elems(p->shape)};
        if (p->holder >= 0)
            load[x->owner[i] = p->holder] += p->trainable ? cq_shape_elems(p->shape) : 0;
    }
    if (load && list) {
        qsort(list, n, sizeof *list, by_size);
        for (size_t k = 0; k < n; k++) {
            int least = 0;
            for (int r = 1; r < (int)ranks; r++)
                least = load[r] < load[least] ? r : least;
            x->owner[list[k].param] = least;
            load[least] += list[k].elems;
        }
    }
    int status = load && list ? CQ_OK : cq_fail(CQ_ENOMEM, "ranks: no memory to share parameters");
    free(load);
    free(list);
    return status;
}

int cq_shares_open(cq_shares *x, cq_model *m, cq_comm *comm) {
    size_t n = (size_t)cq_model_n_params(m);
    *x = (cq_shares){.comm = comm, .model = m, .n = (int64_t)n};
    x->owner = calloc(n, sizeof *x->owner);
    x->sum = calloc(n, sizeof *x->sum);
    x->piece = calloc(n, sizeof *x->piece);
    x->coded = calloc(n, sizeof *x->coded);
    if (!x->owner || !x->sum || !x->piece || !x->coded)
        return cq_fail(CQ_ENOMEM, "ranks: no memory to share parameters");
    return deal_out(x);
}

void cq_shares_close(cq_shares *x) {
    free(x->owner);
    free(x->sum);
    free(x->piece);
    free(x->coded);
}

bool cq_shares_own(const cq_shares *x, int64_t i) { return x->owner[i] == cq_comm_rank(x->comm); }

int cq_shares_plan(cq_shares *x, cq_plan *p) {
    for (int64_t i = 0; i < x->n; i++) {
        const cq_param *q = cq_model_param(x->model, i);
        if (q->trainable && cq_shares_own(x, i) && q->holder < 0)
            CQ_TRY(cq_plan_add(p, &x->sum[i], CQ_FOR_GRADIENT, q->name, cq_model_dtype(x->model),
                               q->shape));
    }
    return CQ_OK;
}

int cq_shares_add(cq_shares *x, cq_stream *s, int ranks) {
    int64_t n = 0;
    for (int64_t i = 0; i < x->n; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        if (p->grad.data && p->holder < 0)
            x->piece[n++] = (cq_piece){x->owner[i], p->grad, x->sum[i]};
    }
    CQ_TRY(cq_stream_wait(s));
    cq_comm_about(x->comm, "gradients");
    CQ_TRY(cq_comm_scatter(x->comm, x->piece, n, ranks));
    return cq_model_zero_round(x->model);
}

int cq_shares_zero(cq_shares *x) {
    for (int64_t i = 0; i < x->n; i++)
        if (x->sum[i].data)
            CQ_TRY(cq_zero(x->sum[i].data, cq_tensor_bytes(x->sum[i])));
    return CQ_OK;
}

/* F64 models are for checks: their copies do not fit FP32 arithmetic. */
static bool goes_packed(const cq_shares *x, const cq_param *p) {
    return p->quantized && p->holder < 0 && cq_model_dtype(x->model) == CQ_F32;
}

static int64_t packed_bytes(const cq_param *p) {
    int64_t n = cq_shape_elems(p->shape);
    return n / 2 + n / 16;
}

static int pack(const cq_param *p, uint8_t *codes) {
    cq_tensor x, blocks = {0};
    void *owned = NULL, *blocks_owned = NULL;
    float scale_2;
    if (p->codes.data) {
        CQ_TRY(cq_copy(codes, p->codes.data, cq_tensor_bytes(p->codes)));
        return cq_copy(codes + cq_tensor_bytes(p->codes), p->scales.data,
                       cq_tensor_bytes(p->scales));
    }
    CQ_TRY(cq_param_master(&x, &owned, p));
    int status =
        p->block_amax.data ? cq_tensor_on_host(&blocks, &blocks_owned, p->block_amax) : CQ_OK;
    if (!status)
        status = cq_nvfp4_pack(codes, codes + cq_shape_elems(p->shape) / 2, &scale_2, x.data,
                               p->shape.dim[0], p->shape.dim[1], p->amax, blocks.data, p->top);
    free(owned);
    free(blocks_owned);
    return status ? cq_fail_in(status, p->name) : CQ_OK;
}

static int unpack(const cq_param *p, const uint8_t *codes) {
    int64_t n = cq_shape_elems(p->shape);
    float scale_2, *y = p->fq.data;
    if (p->codes.data) {
        CQ_TRY(cq_copy(p->codes.data, codes, cq_tensor_bytes(p->codes)));
        return cq_copy(p->scales.data, codes + n / 2, cq_tensor_bytes(p->scales));
    }
    bool apart = cq_on_device(y) || p->fq.dtype != CQ_F32;
    CQ_TRY(cq_nvfp4_scale_2(&scale_2, p->amax, cq_param_top(p)));
    if (apart && !(y = malloc((size_t)n * sizeof *y)))
        return cq_fail(CQ_ENOMEM, "ranks: no memory to decode %s", p->name);
    int status =
        cq_nvfp4_unpack(y, codes, codes + n / 2, scale_2, p->shape.dim[0], p->shape.dim[1]);
    if (apart && !status)
        status = cq_tensor_fill(p->fq, y, CQ_F32);
    if (apart)
        free(y);
    return status;
}

/* Sends the quantized parameters [first, end), whose codes find room in `room`. */
static int spread_window(cq_shares *x, int64_t first, int64_t end, uint8_t *room) {
    int64_t n = 0;
    for (int64_t i = first; i < end; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        if (!p->trainable || !goes_packed(x, p))
            continue;
        x->coded[i] = (cq_tensor){room, CQ_SHAPE1(packed_bytes(p)), CQ_U8};
        if (cq_shares_own(x, i))
            CQ_TRY(pack(p, room));
        room += packed_bytes(p);
        x->piece[n++] = (cq_piece){.owner = x->owner[i], .mine = x->coded[i]};
    }
    CQ_TRY(cq_comm_spread(x->comm, x->piece, n));
    for (int64_t i = first; i < end; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        if (p->trainable && goes_packed(x, p) && !cq_shares_own(x, i))
            CQ_TRY(unpack(p, x->coded[i].data));
    }
    return CQ_OK;
}

static int spread_packed(cq_shares *x) {
    int64_t *end = calloc((size_t)x->n + 1, sizeof *end), n_windows = 0, most = 0, bytes = 0;
    if (!end)
        return cq_fail(CQ_ENOMEM, "ranks: no memory to send weights");
    for (int64_t i = 0; i < x->n; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        int64_t b = p->trainable && goes_packed(x, p) ? packed_bytes(p) : 0;
        if (bytes && bytes + b > WINDOW) {
            end[n_windows++] = i;
            bytes = 0;
        }
        bytes += b;
        most = bytes > most ? bytes : most;
    }
    end[n_windows++] = x->n;
    uint8_t *room = malloc((size_t)most + 1);
    int status = room ? CQ_OK : cq_fail(CQ_ENOMEM, "ranks: no memory to send weights");
    for (int64_t w = 0; w < n_windows && !status; w++)
        status = spread_window(x, w ? end[w - 1] : 0, end[w], room);
    free(room);
    free(end);
    return status;
}

/* Sends one tensor of each parameter that `of` chooses, as it is. */
static int spread_raw(cq_shares *x, cq_tensor (*of)(const cq_shares *, const cq_param *)) {
    int64_t n = 0;
    for (int64_t i = 0; i < x->n; i++) {
        const cq_param *p = cq_model_param(x->model, i);
        cq_tensor t = p->trainable ? of(x, p) : (cq_tensor){0};
        if (t.data)
            x->piece[n++] = (cq_piece){.owner = x->owner[i], .mine = t};
    }
    return cq_comm_spread(x->comm, x->piece, n);
}

static cq_tensor forward_copy(const cq_shares *x, const cq_param *p) {
    return goes_packed(x, p) || p->holder >= 0 ? (cq_tensor){0} : p->fq;
}

static cq_tensor master(const cq_shares *x, const cq_param *p) {
    (void)x;
    return p->quantized && p->holder < 0 ? p->value : (cq_tensor){0};
}

static cq_tensor low_half(const cq_shares *x, const cq_param *p) {
    (void)x;
    return p->quantized && p->holder < 0 ? p->low : (cq_tensor){0};
}

int cq_shares_spread(cq_shares *x, cq_stream *s) {
    if (cq_comm_size(x->comm) == 1)
        return CQ_OK;
    CQ_TRY(cq_stream_wait(s)); /* the updates; one rank need not wait */
    cq_comm_about(x->comm, "weights");
    x->stale = true;
    CQ_TRY(spread_raw(x, forward_copy));
    return spread_packed(x);
}

int cq_shares_masters(cq_shares *x) {
    if (!x->stale)
        return CQ_OK;
    cq_comm_about(x->comm, "master weights");
    CQ_TRY(spread_raw(x, master));
    CQ_TRY(spread_raw(x, low_half));
    x->stale = false;
    return CQ_OK;
}
