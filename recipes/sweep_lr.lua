-- Which learning rate wins most back? Starts with many and a few steps, drops the worse half twice, and gives the best the full run.
--   ckaqad recipes/sweep_lr.lua --jobs=2
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",         -- BF16 checkpoint: folder, org/name, or auto (Nemotron 3 Nano if cached, else the embedded one)
  data = "auto",          -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",           -- JSONL files to report on; none: a seeded 5 % of the documents
  out = "runs/sweep-lr",  -- table, report and a run folder for every point land here
  steps = 60,             -- optimizer steps of a point that is never dropped
  halve = true,           -- drop the worse half after a sixth and after a third of the steps; false: run all to their end
  seeds = 2,              -- every rate runs with the same seeds 1, 2, ...
  jobs = 1,               -- points that run at the same time
  retry = 1,              -- further tries of a point that crashed
}

local first = math.max(2, math.ceil(opt.steps / 6))
cq.sweep(opt, {
  recipe = "nemotron_nano.lua",
  grid = { lr = { 3e-6, 1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3 } },
  stop = opt.halve and { rungs = { first, 2 * first }, keep = 0.5 } or nil,
})
