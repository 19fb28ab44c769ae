-- Which blocks should CKA look at? Compares none, all, each kind of block, the first, the last and every fourth.
--   ckaqad recipes/ablate_cka_layers.lua --model=auto --seeds=6 --jobs=2
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",                 -- BF16 checkpoint: folder, org/name, or auto (Nemotron 3 Nano if cached, else the embedded one)
  data = "auto",                  -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",                   -- JSONL files to report on; none: a seeded 5 % of the documents
  out = "runs/ablate-cka-layers", -- table, report and a run folder for every point land here
  steps = 60,                     -- optimizer steps of every point
  seeds = 3,                      -- every choice runs with the same seeds 1, 2, ...
  jobs = 1,                       -- points that run at the same time
  retry = 1,                      -- further tries of a point that crashed
}

cq.sweep(opt, {
  recipe = "nemotron_nano.lua",
  grid = { cka = { "none", "all", "mamba", "attention", "moe", "first:4", "last:4", "every:4" } },
})
