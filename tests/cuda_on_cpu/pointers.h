/// pointers.h - the pointers in the arguments of each operation (kernels.h), P(field) for each:
/// what must lie on the device.
#pragma once

#define CQ_EMU_POINTERS_matmul P(a) P(b) P(c) P(b16)
#define CQ_EMU_POINTERS_matmul_grouped P(offsets) P(x) P(w) P(y) P(w16)
#define CQ_EMU_POINTERS_rmsnorm_forward                                                            \
    P(x) P(w) P(y) P(yq) P(fq.amax) P(fq.offsets) P(fq.saturated) P(rstd)
#define CQ_EMU_POINTERS_rmsnorm_backward P(x) P(w) P(rstd) P(dy) P(dx) P(dw)
#define CQ_EMU_POINTERS_gatednorm_forward                                                          \
    P(y) P(z) P(w) P(out) P(outq) P(fq.amax) P(fq.offsets) P(fq.saturated) P(rstd)
#define CQ_EMU_POINTERS_gatednorm_backward P(y) P(z) P(w) P(rstd) P(dout) P(dy) P(dz) P(dw)
#define CQ_EMU_POINTERS_headnorm_forward P(x) P(w) P(positions) P(y)
#define CQ_EMU_POINTERS_headnorm_backward P(x) P(w) P(positions) P(dy) P(dx) P(dw)
#define CQ_EMU_POINTERS_attention_forward                                                          \
    P(starts) P(q) P(k) P(v) P(out) P(lse) P(outq) P(fq.amax) P(fq.offsets) P(fq.saturated)
#define CQ_EMU_POINTERS_attention_backward                                                         \
    P(starts) P(q) P(k) P(v) P(out) P(lse) P(dout) P(dq) P(dk) P(dv)
#define CQ_EMU_POINTERS_attention_cached                                                           \
    P(starts) P(slot) P(past) P(q) P(k) P(v) P(k_cache) P(v_cache) P(out)
#define CQ_EMU_POINTERS_conv_forward P(starts) P(x) P(w) P(b) P(y)
#define CQ_EMU_POINTERS_conv_backward P(starts) P(x) P(w) P(b) P(dy) P(dx) P(dw) P(db)
#define CQ_EMU_POINTERS_conv_cached P(starts) P(slot) P(past) P(x) P(w) P(b) P(state) P(y)
#define CQ_EMU_POINTERS_ssd_forward P(starts) P(x) P(B) P(C) P(dt_raw) P(dt_bias) P(a_log) P(d) P(y)
#define CQ_EMU_POINTERS_ssd_backward                                                               \
    P(starts)                                                                                      \
    P(x)                                                                                           \
    P(B)                                                                                           \
    P(C)                                                                                           \
    P(dt_raw)                                                                                      \
    P(dt_bias) P(a_log) P(d) P(dy) P(dx) P(dB) P(dC) P(ddt_raw) P(ddt_bias) P(da_log) P(dd)
#define CQ_EMU_POINTERS_ssd_cached                                                                 \
    P(starts) P(slot) P(past) P(x) P(B) P(C) P(dt_raw) P(dt_bias) P(a_log) P(d) P(S) P(y)
#define CQ_EMU_POINTERS_swiglu_forward P(gu) P(h) P(hq) P(fq.amax) P(fq.offsets) P(fq.saturated)
#define CQ_EMU_POINTERS_swiglu_backward P(gu) P(dh) P(dgu)
#define CQ_EMU_POINTERS_relu2_forward P(x) P(h) P(hq) P(fq.amax) P(fq.offsets) P(fq.saturated)
#define CQ_EMU_POINTERS_relu2_backward P(x) P(dh) P(dx)
#define CQ_EMU_POINTERS_fake_quant P(x) P(y) P(fq.amax) P(fq.offsets) P(fq.saturated) P(block_amax)
#define CQ_EMU_POINTERS_matmul_nvfp4                                                               \
    P(a_codes) P(a_scales) P(b_codes) P(b_scales) P(a_amax) P(b_amax) P(c)
#define CQ_EMU_POINTERS_pack P(x) P(fq.amax) P(fq.saturated) P(block_amax) P(codes) P(scales)
#define CQ_EMU_POINTERS_unpack P(codes) P(scales) P(amax) P(y) P(offsets)
#define CQ_EMU_POINTERS_amax P(x) P(offsets) P(amax)
#define CQ_EMU_POINTERS_route_forward P(logits) P(bias) P(sel) P(weight)
#define CQ_EMU_POINTERS_route_backward P(logits) P(sel) P(dweight) P(dlogits)
#define CQ_EMU_POINTERS_route_sort P(sel) P(offsets) P(token) P(position)
#define CQ_EMU_POINTERS_gather_rows                                                                \
    P(x) P(index) P(y) P(yq) P(fq.amax) P(fq.offsets) P(fq.saturated)
#define CQ_EMU_POINTERS_combine_forward P(y) P(weight) P(position) P(out)
#define CQ_EMU_POINTERS_combine_backward P(y) P(weight) P(dout) P(position) P(dy) P(dweight)
#define CQ_EMU_POINTERS_ungather_rows P(dy) P(position) P(dx)
#define CQ_EMU_POINTERS_embed_forward P(ids) P(table) P(h)
#define CQ_EMU_POINTERS_embed_backward P(ids) P(dh) P(dtable)
#define CQ_EMU_POINTERS_kl                                                                         \
    P(teacher) P(student) P(labels) P(sum) P(nll_teacher) P(nll_student) P(agree) P(valid)
#define CQ_EMU_POINTERS_top_logits                                                                 \
    P(logits) P(labels) P(at) P(ids) P(log_p) P(log_tail) P(log_label)
#define CQ_EMU_POINTERS_kl_cached                                                                  \
    P(ids)                                                                                         \
    P(log_p)                                                                                       \
    P(log_tail)                                                                                    \
    P(log_label) P(at) P(student) P(labels) P(sum) P(nll_teacher) P(nll_student) P(agree) P(valid)
#define CQ_EMU_POINTERS_cross_entropy P(logits) P(labels) P(weights) P(sum) P(correct) P(valid)
#define CQ_EMU_POINTERS_gram P(x) P(scratch) P(gram)
#define CQ_EMU_POINTERS_cka P(k) P(l) P(out)
#define CQ_EMU_POINTERS_cka_backward P(k) P(l) P(x) P(weights) P(stats) P(dx)
#define CQ_EMU_POINTERS_rowloss P(x) P(y) P(out)
#define CQ_EMU_POINTERS_rowloss_backward P(x) P(y) P(weights) P(dx)
#define CQ_EMU_POINTERS_balance P(sum) P(right) P(stats) P(order) P(weights) P(report)
#define CQ_EMU_POINTERS_scatter_rows P(y) P(index) P(x)
#define CQ_EMU_POINTERS_adamw                                                                      \
    P(w)                                                                                           \
    P(m)                                                                                           \
    P(v)                                                                                           \
    P(g)                                                                                           \
    P(now) P(wq) P(fq.amax) P(fq.offsets) P(fq.saturated) P(block_amax) P(low) P(m_scale) P(v_scale)
#define CQ_EMU_POINTERS_sumsq P(x) P(out)
#define CQ_EMU_POINTERS_axpy P(x) P(y)
#define CQ_EMU_POINTERS_round_bf16 P(x) P(y)
#define CQ_EMU_POINTERS_widen P(x) P(low) P(y)
