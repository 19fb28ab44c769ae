-- The study's documents: to train on, the teacher's training problems, its own answers to others and other text; to compare on, its answers
-- to validation and to test problems, and fresh other text.
--   ckaqad recipes/lab/mix.lua --model=runs/rl/model --out=runs/mix
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting, tasks = dofile(here .. "problems.lua"), dofile(here .. "setting.lua"), dofile(here .. "tasks.lua")

local opt = cq.options {
  model = "runs/rl/model",  -- the BF16 teacher
  out = "runs/mix",         -- train.jsonl, validation.jsonl, test.jsonl, outside.jsonl land here
  written = 10000,          -- documents of SFT data: problems with written solutions
  drawn = 10000,            -- documents of RL's kind: hard problems with an answer the teacher draws
  other = 1500,             -- documents outside the domain: what tasks.lua writes
  held = 200,               -- documents of each file to compare on: the first problems that are scored, too
  items = 4000,             -- validation and test problems that none of the training documents may hold
  least = 5,                -- percent of the held documents' problems that the teacher must solve, or there is nothing to study
  seed = 1,                 -- of everything
}
local run = cq.run(opt)
local model = cq.model.open(opt.model)
run:plan { student = model, tokens = 1024, generate = { slots = 256, room = setting.room } }
local function draw(k) return cq.stats.generator(opt.seed * 1000003 + k) end

local function answered(items, k)
  local list = setting.answers(problems, model, items, { tokens = 80, seed = opt.seed * 10 + k })
  local right = 0
  for _, one in ipairs(list) do one.item.answer, right = one.text, right + (one.right and 1 or 0) end
  return items, 100 * right / #list
end
math.randomseed(opt.seed)
local seen = {}
local function others(n) -- no prompt twice, so what is compared on was not trained on
  local list = {}
  while #list < n do
    local item = tasks[tasks.names[math.random(#tasks.names)]].make(math.random(1, 3))
    if not seen[item.prompt] then
      list[#list + 1], seen[item.prompt] = { prompt = item.prompt .. "\n", answer = item.answer .. "\n", stop = "" }, true
    end
  end
  return list
end

local written = problems.set(problems.mixes.sft, "train", opt.written, draw(1))
local drawn = answered(problems.set(problems.mixes.rl, "train", opt.drawn, draw(2)), 2)
local train, held = {}, {}
for _, list in ipairs { written, drawn, others(opt.other) } do
  for _, item in ipairs(list) do train[#train + 1] = item end
end
for _, part in ipairs { "validation", "test" } do
  for _, item in ipairs(problems.set(problems.mixes.test, part, opt.items, cq.stats.generator(1))) do held[#held + 1] = item end
  local items, right = answered(problems.set(problems.mixes.test, part, opt.held, cq.stats.generator(1)), 3)
  cq.refuse(right < opt.least and ("mix: the teacher solves %.1f %% of %d %s problems, wanted --least=%g or more"):format(right, opt.held,
    part, opt.least) or nil)
  setting.documents(("%s/%s.jsonl"):format(opt.out, part), items, problems.stop)
end
cq.refuse(problems.overlap(train, held))
setting.documents(opt.out .. "/train.jsonl", train, problems.stop)
setting.documents(opt.out .. "/outside.jsonl", others(opt.held), "")
run:say("%d documents to train on: %d with written solutions, %d with the teacher's answers, %d of other text; no problem of %d held out",
  #train, #written, #drawn, opt.other, #held)
run:finish {}
