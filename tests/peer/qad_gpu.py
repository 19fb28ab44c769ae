#!/usr/bin/env python3
"""The peer on a GPU: one quantization-aware distillation step of a Qwen3 or NemotronH shape with PyTorch, transformers, ModelOpt and Liger.

    python qad_gpu.py CONFIG_DIR [--seq 2048] [--batch 4] [--micro 1] [--steps 6] [--rows 512] [--lr 1e-4] [--device cuda] [--no-liger]

The same work as `recipes/bench.lua --device=cuda --weights=random --data=random --compute=bf16`: random weights from CONFIG_DIR/config.json,
random tokens, teacher in BF16, student with FP32 weights under autocast to BF16, every linear but the head in NVFP4 W4A4 by ModelOpt's
quantizers (maxima frozen after calibration on two rows), forward KL over the whole vocabulary in chunks, AdamW, clipping at 1; steps with
and without CKA (unbiased, every block, --rows sampled tokens a micro-batch) in turn.
Prints one JSON line: median tokens per second without and with CKA, peak device memory, versions.
Needs: torch transformers nvidia-modelopt liger-kernel. `--device cpu --no-liger` runs a small shape anywhere, unquantized, as a check of this program.
"""
import argparse, json, statistics, time, warnings
warnings.filterwarnings("ignore")
import torch, torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
import modelopt, modelopt.torch.quantization as mtq, transformers

a = argparse.ArgumentParser()
a.add_argument("config")
for k, v in dict(seq=2048, batch=4, micro=1, steps=6, rows=512, seed=1).items(): a.add_argument("--" + k, type=int, default=v)
a.add_argument("--lr", type=float, default=1e-4); a.add_argument("--device", default="cuda"); a.add_argument("--no-liger", action="store_true")
o = a.parse_args()
torch.manual_seed(o.seed)
on_gpu = o.device != "cpu"
CHUNK = 1024  # tokens whose logits exist at a time

cfg = json.load(open(o.config + "/config.json"))
kind = cfg["model_type"]
if kind == "nemotron_h":
    from transformers import NemotronHConfig as Config, NemotronHForCausalLM as Model
    cfg["time_step_min"] = 1e-30  # the public module clamps dt from below; the published model does not
    for k in ("norm_eps", "mamba_proj_bias", "num_hidden_layers"): cfg.pop(k, None)
else:
    from transformers import Qwen3Config as Config, Qwen3ForCausalLM as Model
for k in ("architectures", "model_type", "torch_dtype", "transformers_version"): cfg.pop(k, None)
liger = None
if not o.no_liger:
    import liger_kernel.transformers as liger
    if kind == "qwen3": liger.apply_liger_kernel_to_qwen3(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)

with torch.device(o.device):
    teacher = Model(Config(**cfg)).to(torch.bfloat16).eval().requires_grad_(False)
    student = Model(Config(**cfg)).train()
student.load_state_dict(teacher.state_dict())  # BF16 values in FP32 masters
student.config.use_cache = teacher.config.use_cache = False
tokens = torch.randint(0, teacher.config.vocab_size, (2 * o.batch, o.seq), device=o.device)
autocast = lambda: torch.autocast(o.device.split(":")[0], torch.bfloat16)

def calibrate(m):
    with torch.no_grad(), autocast():
        for row in tokens[:2]: m.model(input_ids=row[None])

mtq.quantize(student, mtq.NVFP4_DEFAULT_CFG, calibrate)
mtq.disable_quantizer(student, "*lm_head*" if on_gpu else "*")  # ModelOpt quantizes blocks of 16 on a GPU only

def cka(X, Y):
    n = len(X); X, Y = X.float(), Y.float()
    def u(K):
        K = K - torch.diag(torch.diag(K)); r = K.sum(1); K = K - r[:, None] / (n - 2) - r[None] / (n - 2) + K.sum() / ((n - 1) * (n - 2))
        return K - torch.diag(torch.diag(K))
    K, L = u(X @ X.T), u(Y @ Y.T)
    return (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()

def hidden(m, x, taps):
    """The final hidden states, and with `taps` the output of every decoder block."""
    got = []
    hooks = [l.register_forward_hook(lambda _, i, out: got.append(out[0] if isinstance(out, tuple) else out)) for l in m.model.layers] if taps else []
    h = m.model(input_ids=x).last_hidden_state
    for hook in hooks: hook.remove()
    return h, got

fused = liger.LigerFusedLinearJSD(jsd_beta=0.0) if liger else None  # beta 0: KL(teacher || student)
def kl_chunk(s, t, ws, wt):
    lt, ls = F.linear(t, wt).float().log_softmax(-1), F.linear(s, ws.to(s.dtype)).float().log_softmax(-1)
    return (lt.exp() * (lt - ls)).sum()
def kl(s, t):
    s, t, ws, wt = s.flatten(0, 1), t.flatten(0, 1), student.lm_head.weight, teacher.lm_head.weight
    if fused: return fused(s, ws.to(s.dtype), t, wt, None)
    return sum(checkpoint(kl_chunk, s[i:i + CHUNK], t[i:i + CHUNK], ws, wt, use_reentrant=False) for i in range(0, len(s), CHUNK)) / len(s)

adam = torch.optim.AdamW(student.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
def step(at, rows):
    adam.zero_grad()
    parts = range(0, o.batch, o.micro)
    for i in parts:
        x = tokens[at + i:at + i + o.micro]
        with autocast():
            with torch.no_grad(): t, th = hidden(teacher, x, rows > 0)
            s, sh = hidden(student, x, rows > 0)
            loss = kl(s, t)
        if rows:
            pick = torch.randperm(x.numel(), device=o.device)[:rows]
            value = torch.stack([cka(p.flatten(0, 1)[pick], q.flatten(0, 1)[pick]) for p, q in zip(sh, th)])
            loss = loss + (loss.detach() / (1 - value).mean().detach().clamp(min=1e-8)).clamp(max=100) * (1 - value).mean()
        (loss / len(parts)).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    adam.step()
    return loss

def timed(i, rows):
    if on_gpu: torch.cuda.synchronize()
    t = time.perf_counter()
    loss = step(i % 2 * o.batch, rows)
    if on_gpu: torch.cuda.synchronize()
    if not torch.isfinite(loss): raise SystemExit("qad_gpu.py: the loss is not finite")
    return o.batch * o.seq / (time.perf_counter() - t)
speeds = {0: [], o.rows: []}
for i in range(o.steps):
    for rows in ((0, o.rows) if i % 2 == 0 else (o.rows, 0)):
        v = timed(i, rows)
        if i >= 2 or o.steps < 4: speeds[rows].append(v)
plain, with_cka = statistics.median(speeds[0]), statistics.median(speeds[o.rows])
print(json.dumps({"tokens_per_s": round(plain, 1), "tokens_per_s_cka": round(with_cka, 1), "cka_costs": round(plain / with_cka - 1, 4),
                  "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None, "parameters": sum(p.numel() for p in teacher.parameters()),
                  "seq": o.seq, "batch": o.batch, "micro": o.micro, "rows": o.rows, "liger": liger is not None, "torch": torch.__version__,
                  "transformers": transformers.__version__, "modelopt": modelopt.__version__, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}))
