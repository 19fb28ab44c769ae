-- Win back what NVFP4 costs Qwen3: distil the BF16 model into its own 4-bit copy, by logits (KL) and block outputs (CKA).
--   ckaqad recipes/qwen3.lua --model=DIR --data=FILE.jsonl --holdout=FILE.jsonl --out=runs/try
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",               -- BF16 checkpoint: folder, org/name, or auto (Qwen3-4B-Thinking-2507 if cached, else the embedded one)
  data = "auto",                -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",                 -- JSONL files to report on; none: a seeded 5 % of the documents
  preset = "auto",              -- full, tiny (under 100 M parameters: seq 256, batch 8, lr 1e-4, 60 steps, mse), paper, or auto
  out = "runs/qwen3",           -- options, log, report, checkpoints and the NVFP4 folder land here
  teacher_cache = "",           -- folder of recipes/teacher_cache.lua in the teacher's place; none: the teacher runs along
  quant = "qwen3",              -- linears in NVFP4: qwen3 (every projection), mlp, weights_only
  scales = "max",               -- weight scales: max, or searched before training: mse, four_over_six
  calibrate = 32,               -- documents the activation scales come from
  steps = 400,                  -- optimizer steps
  batch = 16,                   -- packed rows per step
  seq = 32768,                  -- tokens per packed row, and longest document
  micro = 0,                    -- rows per micro-batch (0: as many as hold 4096 tokens)
  lr = 5e-6,                    -- peak learning rate
  schedule = "constant",        -- after the warm-up: constant, cosine, linear
  warmup = 0,                   -- warm-up steps; below 1 a fraction of all
  clip = 1,                     -- global gradient norm (0: no clipping)
  freeze = "",                  -- globs of parameters that are not trained, for example *norm.weight
  moments = "f32",              -- AdamW's m and v of matrices: f32 (8 bytes a parameter), bf16 (4), 8bit (2)
  master = "f32",               -- trained weights of quantized linears: f32 or split (4 bytes, exact), bf16 (2, stochastic rounding)
  mask = "all",                 -- targets: all tokens, or assistant (what the embedded text has by itself)
  loss = "kl",                  -- on the logits: kl (distillation) or ce (cross-entropy with the text: plain QAT)
  top_k = 1024,                 -- teacher logits KL looks at
  tail = "bucket",              -- the others: bucket, renormalized, truncated, full
  layer = "cka",                -- between block outputs: cka, cosine, mse, gram, none
  cka = "all",                  -- blocks CKA looks at: all, last:8, first:2, every:4, 3,7,11, none
  rows = 512,                   -- tokens sampled for CKA in each micro-batch
  estimator = "unbiased",       -- of CKA: unbiased, biased
  balance = "ratio",            -- weight of that term: ratio, gradnorm, fixed:0.5, none, or a rule of cq.balance.define
  max_weight = 100,             -- largest weight that ratio and gradnorm give
  seed = 1,                     -- order of the documents, split and sampled tokens
}

local run = cq.run(opt, { named = "Qwen/Qwen3-4B-Thinking-2507" })
local teacher = cq.model.open(opt.model)
local student = teacher:quantize { preset = opt.quant, scales = opt.scales, freeze = opt.freeze }
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
  holdout = opt.holdout, mask = opt.mask, template = opt.template })

local terms = { cq.loss.logits(opt.loss, { top_k = opt.top_k, tail = opt.tail }),
  cq.loss.layer(opt.layer, { blocks = opt.cka, tokens = opt.rows, estimator = opt.estimator }) }
teacher = cq.cache.open(opt.teacher_cache, { model = teacher, data = data, terms = terms, steps = opt.steps, seed = opt.seed })
local balance = cq.balance.get(opt.balance, { max = opt.max_weight }) -- or function(p) return { kl = 1, cka = p.kl } end
local adam = cq.optim.adamw(student, { clip = opt.clip, moments = opt.moments, master = opt.master, seed = opt.seed }) -- betas 0.9, 0.95
local rate = cq.schedule[opt.schedule] { peak = opt.lr, warmup = opt.warmup, steps = opt.steps }

run:plan { teacher = teacher, student = student, adam = adam, terms = terms, data = data, eval = true }
run:calibrate(student, data, opt.calibrate)
local before = run:ptq(teacher, student, data)
run:track { teacher = teacher, student = student, adam = adam, data = data } -- saved together, restored together
for step, batch in run:steps(opt.steps, data) do
  for part in batch:split() do
    local pass = cq.distill(teacher, student, part, terms) -- both forwards; pass.kl and pass.cka[block] are known here
    pass:backward(balance(pass))                           -- one weight per term
  end
  run:log(step, { norm = adam:step(rate(step)), lr = rate(step) })
end

local after = run:result("after training", cq.eval.compare(teacher, student, data:holdout()))
run:export(student)
run:finish { before = before, after = after }
