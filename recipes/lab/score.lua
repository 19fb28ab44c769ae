-- Score a model on the study's problems: pass@1 over k samples and greedily, by task and level, intervals over problems, recovery.
--   ckaqad recipes/lab/score.lua --model=runs/rl/model --scores=teacher.json
--   ckaqad recipes/lab/score.lua --model=runs/ptq --against=teacher.json
-- The last line is one JSON object: n, samples, pass, low, high, greedy, greedy_low, greedy_high, tasks, recovery.
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local problems, setting = dofile(here .. "problems.lua"), dofile(here .. "setting.lua")

local opt = cq.options {
  model = "runs/rl/model",    -- checkpoint, BF16 or NVFP4: folder, or run folder
  part = "test",              -- test, or validation
  items = 2400,               -- problems of that part, the same ones for every model
  mix = "test",               -- which: test (hard ones), sft, rl, easy
  samples = 4,                -- answers to each problem, besides the greedy one
  temperature = 1,            -- of the samples
  tokens = 80,                -- most tokens of an answer; one cut off is wrong
  seed = 1,                   -- of the samples
  pass = 1024,                -- tokens of one forward
  scores = "",                -- write the scores and every problem's shares here, as JSON
  against = "",               -- --scores of the teacher: recovery and the paired difference
}
local run = cq.run(opt)
if opt.part ~= "test" and opt.part ~= "validation" then error(("option --part: got %s, wanted test or validation"):format(opt.part), 0) end
if opt.scores ~= "" then cq.benchmark.write(opt.scores) end
local against = opt.against ~= "" and cq.json.lines(opt.against, { "shares" })[1] or nil
local items = problems.set(setting.mix(problems, opt.mix), opt.part, opt.items, cq.stats.generator(1))
local model = cq.model.open(opt.model)
run:plan { student = model, tokens = opt.pass, generate = { slots = math.min(256, opt.pass / 2), room = setting.room } }
local o = { samples = opt.samples, temperature = opt.temperature, tokens = opt.tokens, seed = opt.seed }
local sampled = setting.score(problems, (setting.answers(problems, model, items, o)), opt.samples)
local greedy = setting.score(problems, (setting.answers(problems, model, items, { temperature = 0, tokens = opt.tokens, seed = 1 })), 1)

local function percent(p) return ("%.1f [%.1f, %.1f]"):format(100 * p.mean, 100 * (p.low or 0), 100 * (p.high or 1)) end
local rows, tasks = { { "task", "level", "n", ("pass@1, k = %d"):format(opt.samples), "greedy" } }, {}
local function add(task, level, p, g) rows[#rows + 1] = { task, level, ("%d"):format(p.n), percent(p), percent(g) } end
for _, task in ipairs(problems.names) do
  for level = 1, problems.levels do
    local p = sampled.levels[task][level]
    if p then add(task, tostring(level), p, greedy.levels[task][level]) end
  end
  local p, g = sampled.tasks[task], greedy.tasks[task]
  if p then
    add(task, "all", p, g)
    tasks[task] = cq.json.object { "n", p.n, "pass", p.mean, "low", p.low, "high", p.high, "greedy", g.mean }
  end
end
add("all", "", sampled.all, greedy.all)
for _, line in ipairs(cq.text.table(rows)) do run:say(line) end

local p, g, shares = sampled.all, greedy.all, {}
for i, item in ipairs(items) do shares[item.prompt] = sampled.shares[i] end
local r = against and cq.benchmark.recovery(shares, against.shares)
if r then
  run:say("teacher %.1f %%: difference %+.1f [%+.1f, %+.1f] points, recovery %s", 100 * r.pass, 100 * r.difference, 100 * (r.low or -1),
    100 * (r.high or 1), r.recovery and ("%.1f %%"):format(r.recovery) or "unknown, it solves nothing")
end
local scores = cq.json.object { "n", p.n, "samples", opt.samples, "pass", p.mean, "low", p.low, "high", p.high, "greedy", g.mean,
  "greedy_low", g.low, "greedy_high", g.high, "tasks", tasks, "recovery", r and r.recovery }
print(cq.json.encode(scores))
if opt.scores ~= "" then cq.benchmark.write(opt.scores, cq.json.encode(cq.json.object { "scores", scores, "shares", shares }) .. "\n") end
