-- One run of the study: quantize a teacher, train the copy in one way, then measure accuracy, KL and geometry. study.lua runs it often.
--   ckaqad recipes/lab/arm.lua --model=runs/rl/model --data=runs/mix --layer=cka --out=runs/arm
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting = dofile(here .. "problems.lua"), dofile(here .. "setting.lua")

local opt = cq.options {
  model = "runs/rl/model",  -- the BF16 teacher
  data = "runs/mix",        -- what lab/mix.lua made of it
  out = "runs/arm",         -- log, report, checkpoints
  part = "validation",      -- problems to answer at the end: validation (to choose by), test (to report)
  mix = "test",             -- which: test (hard ones), easy
  items = 2000,             -- how many
  samples = 2,              -- drawn answers to each, besides the greedy one
  quant = "all",            -- projections in NVFP4: all (first and last blocks too), nemotron_nano, none (BF16)
  scales = "max",           -- weight scales: max, mse, four_over_six
  calibrate = 64,           -- documents the activation scales come from
  steps = 200,              -- optimizer steps; 0: PTQ
  batch = 32,               -- packed rows per step
  seq = 128,                -- tokens per packed row
  mask = "all",             -- tokens trained on and compared on: all, or assistant (the answers)
  lr = 2e-4,                -- peak learning rate, cosine to nothing
  loss = "kl",              -- on the logits: kl, ce (QAT)
  top_k = 16,               -- teacher logits that KL looks at, unless tail is full
  tail = "full",            -- the others: full, bucket, renormalized, truncated
  layer = "none",           -- between block outputs: none, cka, cosine, mse, gram
  cka = "all",              -- blocks it looks at
  rows = 512,               -- tokens sampled for it
  estimator = "unbiased",   -- of CKA: unbiased, biased
  balance = "ratio",        -- its weight: ratio, fixed:1, alone (nothing else trains)
  seed = 1,                 -- order of the documents, sampled rows, drawn answers
}
cq.balance.define("alone", function() return { kl = 0, cka = 1 } end)
local run = cq.run(opt)
if opt.part ~= "validation" and opt.part ~= "test" then error(("option --part: got %s, wanted validation or test"):format(opt.part), 0) end
local items = problems.set(setting.mix(problems, opt.mix), opt.part, opt.items, cq.stats.generator(1))
cq.refuse(problems.overlap(setting.prompts(opt.data .. "/train.jsonl"), items))
local teacher = cq.model.open(opt.model)
local student = teacher:quantize { preset = opt.quant, scales = opt.scales }
local documents = { model = teacher, seq = opt.seq, batch = opt.batch, seed = opt.seed, mask = opt.mask,
  fraction = 0 }
local outside = cq.data.open(opt.data .. "/outside.jsonl", documents)
documents.holdout = ("%s/%s.jsonl"):format(opt.data, opt.part)
local data = cq.data.open(opt.data .. "/train.jsonl", documents)
local terms = { cq.loss.logits(opt.loss, { top_k = opt.top_k, tail = opt.tail }),
  cq.loss.layer(opt.layer, { blocks = opt.cka, tokens = opt.rows, estimator = opt.estimator }) }
local balance = cq.balance.get(opt.balance)
local adam = cq.optim.adamw(student, { betas = { 0.9, 0.95 }, clip = 1 })
local rate = cq.schedule.cosine { peak = opt.lr, warmup = 0.05, steps = math.max(1, opt.steps) }

run:plan { teacher = teacher, student = student, adam = adam, terms = terms, data = data, eval = true,
  generate = { slots = 256, room = setting.room } }
run:calibrate(student, data, opt.calibrate)
local before = run:result("PTQ", cq.eval.compare(teacher, student, data:holdout(), { extras = false, geometry = true }))
run:track { teacher = teacher, student = student, adam = adam, data = data }
for step, batch in run:steps(opt.steps, data) do
  for part in batch:split() do
    local pass = cq.distill(teacher, student, part, terms)
    pass:backward(balance(pass))
  end
  run:log(step, { norm = adam:step(rate(step)), lr = rate(step) })
end

local after = run:result("after training", cq.eval.compare(teacher, student, data:holdout(), { extras = false, geometry = true }))
local apart = cq.eval.compare(teacher, student, outside:all(), { extras = false })
run:finish { before = before, after = after, more = setting.measures(run, problems, student, items, opt, apart) }
