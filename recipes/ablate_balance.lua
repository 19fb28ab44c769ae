-- How strongly should CKA pull beside KL? Compares no CKA at all, a fixed weight, the published rule (both terms equal), equally hard
-- gradients, and a rule written here.
--   ckaqad recipes/ablate_balance.lua --seeds=6 --jobs=2
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",               -- BF16 checkpoint: folder, org/name, or auto (Nemotron 3 Nano if cached, else the embedded one)
  data = "auto",                -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",                 -- JSONL files to report on; none: a seeded 5 % of the documents
  out = "runs/ablate-balance",  -- table, report and a run folder for every point land here
  steps = 60,                   -- optimizer steps of every point
  seeds = 3,                    -- every rule runs with the same seeds 1, 2, ...
  jobs = 1,                     -- points that run at the same time
  retry = 1,                    -- further tries of a point that crashed
}

-- Every block weighs its own distance from the teacher, so that the farthest are pulled hardest.
cq.balance.define("by_block", function(pass)
  local weights, n, gap = {}, 0, math.max(cq.balance.gap(pass), 1e-8)
  for _ in pairs(pass.cka) do n = n + 1 end
  for block, cka in pairs(pass.cka) do weights[block] = math.min(pass.kl / gap, 100) * (1 - cka) / gap / n end
  return { kl = 1, cka = weights }
end)

cq.sweep(opt, {
  recipe = "nemotron_nano.lua",
  grid = { balance = { "none", "fixed:1", "ratio", "gradnorm", "by_block" } },
})
