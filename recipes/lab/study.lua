-- The study on one teacher: every arm tries the same learning rates on validation problems, then runs at its best one with fresh paired
-- seeds on test problems. Stopped or killed, the same command goes on. lab/results.lua makes the tables and pictures.
--   ckaqad recipes/lab/study.lua --model=runs/rl/model --data=runs/mix --out=runs/study --jobs=2
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local arms = dofile(here .. "arms.lua")

local opt = cq.options {
  model = "runs/rl/model",    -- the BF16 teacher
  data = "runs/mix",          -- what lab/mix.lua made of it
  out = "runs/study",         -- the sweeps and study.json land here
  arms = "all",               -- all of lab/arms.lua, main (those of the full protocol), short (BF16, PTQ, QAD, CKA-QAD)
  rates = "1e-4,2e-4,5e-4",   -- peak learning rates that each trained arm tries
  tries = 2,                  -- validation runs of each rate
  seeds = 6,                  -- test runs of an arm of the full protocol; their seeds are no validation run's
  few = 3,                    -- test runs of the others
  both = "QAD,CKA-QAD",       -- arms that run on test at every rate, whatever validation chose
  updates = 200,              -- optimizer steps of each trained run
  batch = 32,                 -- packed rows per step
  mask = "all",               -- tokens trained on and compared on: all, or assistant (the answers)
  mix = "test",               -- problems to answer: test (hard ones), easy
  items = 2000,               -- how many, of validation and of test
  samples = 2,                -- drawn answers to each
  damage = 3,                 -- points of validation accuracy that PTQ must cost before anything is distilled
  jobs = 1,                   -- runs at the same time
  retry = 1,                  -- further tries of a run that crashed
}
local out, rates = opt.out, {}
for rate in opt.rates:gmatch "[^,]+" do rates[#rates + 1] = tonumber(rate) end
if #rates == 0 then error(("option --rates: got %s, wanted numbers like 1e-4,2e-4"):format(opt.rates), 0) end
local config, pattern = arms.teacher(opt.model)
local list = arms.choose(opt.arms, pattern)

-- A sweep in a folder of its own. A point's process does not come back from the first.
local function sweep(name, part, seeds, settings)
  if not os.getenv "CKAQAD_POINT" then rawset(opt, "out", out .. "/" .. name) end
  local points = {}
  if #settings > 0 then points = cq.sweep(opt, { recipe = "arm.lua", list = settings, seeds = seeds, set = { part = part } }).points end
  return arms.runs(opt.out, points)
end
local function seeds(first, n)
  local numbers = {}
  for i = 1, n do numbers[i] = first + i end
  return numbers
end

local function untrained(arm) return arm.name == "BF16" or arm.name == "PTQ max" end
local lost = arms.damage(sweep("damage", "validation", seeds(100, opt.tries), arms.settings(list, untrained)))
cq.refuse(lost < opt.damage and ("study: four bits cost %.1f points of validation accuracy, wanted --damage=%g or more: a narrower " ..
  "model, or more of it quantized"):format(lost, opt.damage) or nil)
local tried = sweep("rates", "validation", seeds(100, opt.tries), arms.settings(list, function(arm) return arm.trained end,
  function() return rates end, opt.updates))
local chosen = arms.rates(list, tried)
local function best(arm) return { chosen[arm.name].lr } end
local function others(arm) return arms.others(rates, chosen[arm.name].lr) end
local runs = sweep("main", "test", seeds(0, opt.seeds), arms.settings(list, function(arm) return arm.full end, best, opt.updates))
local rest = arms.settings(list, function(arm) return not arm.full end, best, opt.updates)
for name, more in pairs(sweep("more", "test", seeds(0, opt.few), rest)) do
  runs[name] = more
end
cq.refuse(arms.confounded(list, runs))
local named = (",%s,"):format(opt.both)
local both = sweep("both", "test", seeds(0, opt.seeds), arms.settings(list, function(arm)
  return arm.trained and named:find("," .. arm.name .. ",", 1, true) end, others, opt.updates))
cq.benchmark.write(out .. "/study.json", cq.json.encode(arms.record(list, runs, chosen, both, opt, config, pattern)) .. "\n")
print(("study: %d arms, results in %s/study.json"):format(#list, out))
