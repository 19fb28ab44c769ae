-- Reinforcement learning on the study's problems from an SFT checkpoint: GRPO (Shao et al. 2024, arXiv 2402.03300), one update a batch.
-- An answer is worth 1 when every step of it is right, else 0; it counts by how far it is from its group's mean, in standard deviations.
--   ckaqad recipes/lab/rl.lua --model=runs/sft/model --out=runs/rl
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting = dofile(here .. "problems.lua"), dofile(here .. "setting.lua")

local opt = cq.options {
  model = "runs/sft/model",   -- what lab/sft.lua made
  out = "runs/rl",            -- the run; the checkpoint is in OUT/model
  mix = "rl",                 -- problems to practise on: rl (hard, little arithmetic), sft (easy ones too), test, easy (one step)
  steps = 500,                -- optimizer steps
  prompts = 64,               -- problems of a step
  samples = 8,                -- answers to each, a group; groups that are all right or all wrong teach nothing and are left out
  tokens = 80,                -- most tokens of an answer; one cut off is wrong
  lr = 3e-4,                  -- learning rate after 10 steps of warm-up
  kl = 0,                     -- weight of KL(SFT model || model) on the answers' tokens
  patience = 20,              -- steps in succession without anything to learn from, then it gives up
  items = 400,                -- validation problems that say what was learnt; 0: none
  seed = 1,                   -- problems and answers
}
local run = cq.run(opt)
cq.refuse(opt.samples < 2 and ("option --samples: got %g, wanted 2 or more"):format(opt.samples) or nil)
local held = setting.held(problems, opt.mix, opt.items)
local model, sft = cq.model.open(opt.model), opt.kl > 0 and cq.model.open(opt.model) or nil
local mix, policy, anchor = setting.mix(problems, opt.mix), { cq.loss.policy() }, { cq.loss.kl { tail = "full" } }
local adam = cq.optim.adamw(model, { betas = { 0.9, 0.95 }, clip = 1 })
local rate = cq.schedule.constant { peak = opt.lr, warmup = 10, steps = opt.steps }
run:plan { teacher = sft, student = model, adam = adam, terms = sft and { policy, anchor } or policy, tokens = 4096, longest = setting.room,
  generate = { slots = math.min(256, opt.prompts * opt.samples), room = setting.room } }

local function validate(when)
  if opt.items == 0 then return end
  local list = setting.answers(problems, model, held, { tokens = opt.tokens, seed = 1 })
  run:say("%s, T = 1: %s", when, setting.words(problems, setting.score(problems, list, 1)))
end
validate "before"
run:track { student = model, adam = adam }
local idle = 0
for i = #run.history, 1, -1 do -- what a resumed run has behind it
  if run.history[i].groups > 0 then break end
  idle = idle + 1
end
for step in run:steps(opt.steps) do
  local items = setting.practice(problems, mix, opt.prompts, opt.seed, step)
  cq.refuse(problems.overlap(items, held))
  local draw = opt.seed * 1000003 + step
  local list, sampling, scoring = setting.answers(problems, model, items, { samples = opt.samples, tokens = opt.tokens, seed = draw })
  local begun, log = cq.clock(), setting.rewards(list, opt.samples)
  local batch, anchored = cq.batch_of(log.kept, { step = step }), sft and cq.batch_of(log.kept, { step = step })
  for part in batch:split() do cq.distill(nil, model, part, policy):backward { kl = 1 } end
  for part in (anchored or cq.batch_of {}):split() do cq.distill(sft, model, part, anchor):backward { kl = opt.kl } end
  idle = log.groups > 0 and 0 or idle + 1
  cq.refuse(idle >= opt.patience and ("rl: %d steps without a group of both right and wrong answers, mean reward %.3f; wanted a model " ..
    "that solves some of --mix=%s and not all"):format(idle, log.reward, opt.mix) or nil)
  local lr = log.groups > 0 and rate(step) or 0
  run:log(step, { batch = batch, lr = lr, norm = adam:step(lr), reward = log.reward, groups = log.groups, tasks = log.tasks,
    sampling = sampling, scoring = scoring, update = cq.clock() - begun })
end
validate "after"
run:say(setting.split(run.history))
model:save(opt.out .. "/model")
run:finish {}
