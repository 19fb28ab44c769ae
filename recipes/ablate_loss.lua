-- What should the student match? Cross-entropy with the text (plain QAT), the teacher's logits (KL), and what is added between blocks:
-- CKA, cosine, squared error; then how many of the teacher's logits KL needs, and what becomes of the rest.
--   ckaqad recipes/ablate_loss.lua --seeds=6 --jobs=2
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",            -- BF16 checkpoint: folder, org/name, or auto (Nemotron 3 Nano if cached, else the embedded one)
  data = "auto",             -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",              -- JSONL files to report on; none: a seeded 5 % of the documents
  out = "runs/ablate-loss",  -- table, report and a run folder for every point land here
  steps = 60,                -- optimizer steps of every point
  few = 16,                  -- teacher logits of the lines "top-k"
  seeds = 3,                 -- every loss runs with the same seeds 1, 2, ...
  jobs = 1,                  -- points that run at the same time
  retry = 1,                 -- further tries of a point that crashed
}

cq.sweep(opt, {
  recipe = "nemotron_nano.lua",
  list = {
    { name = "KL alone", layer = "none" },
    { name = "CE (QAT)", layer = "none", loss = "ce" },
    { name = "KL + CKA", layer = "cka" },
    { name = "KL + cosine", layer = "cosine" },
    { name = "KL + MSE", layer = "mse" },
    { name = "KL + Gram", layer = "gram" },
    { name = "KL, top-k, bucket", layer = "none", top_k = opt.few },
    { name = "KL, top-k, renormalized", layer = "none", top_k = opt.few, tail = "renormalized" },
    { name = "KL, top-k, truncated", layer = "none", top_k = opt.few, tail = "truncated" },
  },
})
