-- Teach a pretrained small model to solve the study's problems: written solutions, loss on the solution only.
--   ckaqad recipes/lab/sft.lua --model=runs/pretrain --out=runs/sft
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting = dofile(here .. "problems.lua"), dofile(here .. "setting.lua")

local opt = cq.options {
  model = "runs/pretrain/model", -- what lab/pretrain.lua made
  out = "runs/sft",           -- the run; the checkpoint is in OUT/model
  mix = "sft",                -- problems: sft (easy ones first in number), rl, test, easy (one step, for trying things)
  documents = 300000,         -- problems of the training part
  steps = 4000,               -- optimizer steps
  batch = 32,                 -- packed rows per step
  seq = 128,                  -- tokens per packed row
  lr = 3e-3,                  -- peak learning rate
  items = 400,                -- validation problems that say what was learnt; 0: none
  seed = 1,                   -- problems and their order
}
local run = cq.run(opt)
local text = opt.out .. ".text.jsonl"
local train = problems.set(setting.mix(problems, opt.mix), "train", opt.documents, cq.stats.generator(opt.seed))
local held = setting.held(problems, opt.mix, opt.items)
cq.refuse(problems.overlap(train, held))
setting.documents(text, train, problems.stop)

local model = cq.model.open(opt.model)
local data = cq.data.open(text, { model = model, seq = opt.seq, batch = opt.batch, seed = opt.seed, mask = "assistant", fraction = 0 })
local terms = { cq.loss.ce {} }
local adam = cq.optim.adamw(model, { betas = { 0.9, 0.95 }, weight_decay = 0.05, clip = 1 })
local rate = cq.schedule.cosine { peak = opt.lr, warmup = 0.03, steps = opt.steps, floor = opt.lr / 50 }
run:plan { student = model, adam = adam, terms = terms, data = data,
  generate = opt.items > 0 and { slots = 256, room = setting.room } or nil }
run:track { student = model, adam = adam, data = data }
for step, batch in run:steps(opt.steps, data) do
  for part in batch:split() do cq.distill(nil, model, part, terms):backward { kl = 1 } end
  run:log(step, { norm = adam:step(rate(step)), lr = rate(step) })
end
if opt.items > 0 then
  local list = setting.answers(problems, model, held, { temperature = 0, tokens = 80, seed = 1 })
  run:say("greedy: " .. setting.words(problems, setting.score(problems, list, 1)))
end
model:save(opt.out .. "/model")
os.remove(text)
run:finish {}
