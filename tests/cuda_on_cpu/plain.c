/* plain.c - operations on activations in BF16 as ref does them: on the widened values, each result
   rounded once. With CKAQAD_CUDA_PLAIN=1 they run in the place of the kernels: what these are held
   against over a whole model (tests/golden/device.sh).

   Each gives CQ_EMU_NOT_PLAIN where it has no activations in BF16. How far a field reaches is not
   asked: all that lies behind its pointer is widened, and what then holds another value was
   written. */
#include <stdlib.h>
#include <string.h>

#include "kernels/ref/ref.h"
#include "tests/cuda_on_cpu/plain.h"

typedef struct field {
    void **at; /* in the arguments */
    uint16_t *there;
    float *wide, *before;
    int64_t n;
} field;

static int widen(field *f, void **at) {
    int64_t bytes;
    *f = (field){.at = at, .there = *at};
    if (!*at || !cq_emu_memory_has(*at, &bytes))
        return CQ_OK;
    f->n = bytes / 2;
    f->wide = malloc((size_t)f->n * sizeof(*f->wide));
    f->before = malloc((size_t)f->n * sizeof(*f->before));
    if (!f->wide || !f->before)
        return cq_fail(CQ_ENOMEM, "plain loops: no memory for %lld values", (long long)f->n);
    CQ_TRY(cq_convert(f->wide, CQ_F32, f->there, CQ_BF16, f->n));
    memcpy(f->before, f->wide, (size_t)f->n * sizeof(*f->before));
    *at = f->wide;
    return CQ_OK;
}
static void narrow(field *f) {
    for (int64_t i = 0; f->before && i < f->n; i++)
        if (memcmp(f->wide + i, f->before + i, sizeof(*f->wide)) != 0)
            cq_convert(f->there + i, CQ_BF16, f->wide + i, CQ_F32, 1);
    free(f->wide);
    free(f->before);
}

bool cq_emu_plain(void) {
    const char *plain = getenv("CKAQAD_CUDA_PLAIN");
    return plain && plain[0] == '1';
}

enum { MOST = 12 };
#define F(name)                                                                                    \
    if (!status)                                                                                   \
        status = widen(&f[n++], (void **)(uintptr_t)&b.name);
#define PLAIN(op, fields) PLAIN_AS(int cq_emu_plain_##op, op, fields)
#define PLAIN_AS(name, op, fields)                                                                 \
    name(cq_stream *s, const cq_##op##_args *a) {                                                  \
        if (a->act != CQ_BF16)                                                                     \
            return CQ_EMU_NOT_PLAIN;                                                               \
        cq_##op##_args b = *a;                                                                     \
        field f[MOST];                                                                             \
        int n = 0, status = CQ_OK;                                                                 \
        cq_emu_memory_unlock();                                                                    \
        fields;                                                                                    \
        if (!status)                                                                               \
            status = cq_ref_##op(s, &b);                                                           \
        while (n > 0)                                                                              \
            narrow(&f[--n]);                                                                       \
        cq_emu_memory_lock();                                                                      \
        return status;                                                                             \
    }
PLAIN(rmsnorm_forward, F(y) F(yq))
PLAIN(gatednorm_forward, F(y) F(z) F(out) F(outq))
PLAIN(gatednorm_backward, F(y) F(z) F(dout) F(dy) F(dz))
PLAIN(headnorm_forward, F(x) F(y))
PLAIN(headnorm_backward, F(x) F(dy) F(dx))
PLAIN_AS(static int attend, attention_forward, F(q) F(k) F(v) F(out))
PLAIN(attention_backward, F(q) F(k) F(v) F(out) F(dout) F(dq) F(dk) F(dv))
PLAIN(attention_cached, F(q) F(k) F(v) F(out))
PLAIN(conv_forward, F(x) F(y))
PLAIN(conv_backward, F(x) F(dy) F(dx))
PLAIN(conv_cached, F(x) F(y))
PLAIN(ssd_forward, F(x) F(B) F(C) F(dt_raw) F(y))
PLAIN(ssd_backward, F(x) F(B) F(C) F(dt_raw) F(dy) F(dx) F(dB) F(dC) F(ddt_raw))
PLAIN(ssd_cached, F(x) F(B) F(C) F(dt_raw) F(y))
PLAIN(swiglu_forward, F(gu) F(h) F(hq))
PLAIN(swiglu_backward, F(gu) F(dh) F(dgu))
PLAIN(relu2_forward, F(x) F(h) F(hq))
PLAIN(relu2_backward, F(x) F(dh) F(dx))
PLAIN(fake_quant, F(x) F(y))
PLAIN(amax, F(x))
PLAIN(gather_rows, F(x) F(y) F(yq))
PLAIN(combine_forward, F(y))
PLAIN(combine_backward, F(y) F(dy))
PLAIN(ungather_rows, F(dy))

int cq_emu_plain_attention_forward(cq_stream *s, const cq_attention_forward_args *a) {
    cq_attention_forward_args b = *a;
    cq_fake_quant_args fake = {.dtype = a->dtype,
                               .rows = a->tokens,
                               .cols = a->heads * a->head_dim,
                               .x = a->out,
                               .y = a->outq,
                               .fq = a->fq,
                               .top = 448.0f,
                               .act = a->act};
    b.outq = NULL;
    int status = attend(s, &b);
    return status || !a->outq ? status : cq_emu_plain_fake_quant(s, &fake);
}
