-- Train a small model from random weights to read: single steps of the study's problems without their questions, and other text.
--   ckaqad recipes/lab/pretrain.lua --out=runs/pretrain        then lab/sft.lua
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting, tasks = dofile(here .. "problems.lua"), dofile(here .. "setting.lua"), dofile(here .. "tasks.lua")

local opt = cq.options {
  out = "runs/pretrain",      -- the run; the checkpoint is in OUT/model
  family = "nemotron_h",      -- nemotron_h or qwen3
  pattern = "ME*ME*ME",       -- blocks: M mamba, E moe, * attention, - mlp; of qwen3 only the number counts
  hidden = 64,                -- residual width; wider models hardly suffer from four bits
  experts = 16,               -- routed experts of each E block, two of them active
  share = 0.7,                -- of the text that is about our problems; the rest is tasks.lua's
  steps = 300,                -- optimizer steps
  batch = 32,                 -- packed rows per step
  seq = 128,                  -- tokens per packed row
  lr = 3e-3,                  -- peak learning rate
  seed = 1,                   -- weights, text and its order
}
local run = cq.run(opt)
local dir, text = opt.out .. ".model", opt.out .. ".text.jsonl"
setting.model(dir, opt)
setting.text(text, setting.reading(problems, tasks, opt.steps * opt.batch * opt.seq, opt.share, opt.seed))

local model = cq.model.create(dir)
local data = cq.data.open(text, { model = model, seq = opt.seq, batch = opt.batch, seed = opt.seed, fraction = 0.01 })
local terms = { cq.loss.ce {} }
local adam = cq.optim.adamw(model, { betas = { 0.9, 0.95 }, weight_decay = 0.05, clip = 1 })
local rate = cq.schedule.cosine { peak = opt.lr, warmup = 0.03, steps = opt.steps, floor = opt.lr / 20 }
run:plan { student = model, adam = adam, terms = terms, data = data, load = false }
model:init(opt.seed)
run:track { student = model, adam = adam, data = data }
for step, batch in run:steps(opt.steps, data) do
  for part in batch:split() do cq.distill(nil, model, part, terms):backward { kl = 1 } end
  run:log(step, { norm = adam:step(rate(step)), lr = rate(step) })
end
model:save(opt.out .. "/model")
os.remove(text)
run:finish {}
