-- Run a BF16 teacher once over the documents of a distillation and keep what it says: each token's largest logits, the Grams of
-- the sampled rows. Trainings with --teacher-cache then need neither its memory nor its time. Stopped, the same command goes on.
--   ckaqad recipes/teacher_cache.lua --model=DIR --data=FILE.jsonl --holdout=FILE.jsonl --cache=runs/teacher
--   ckaqad recipes/nemotron_nano.lua --model=DIR --data=FILE.jsonl --holdout=FILE.jsonl --teacher-cache=runs/teacher
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",               -- BF16 checkpoint: folder, org/name, or auto (the embedded one)
  data = "auto",                -- documents to distil on: JSONL files, or auto (the embedded text)
  holdout = "",                 -- JSONL files to report on; none: a seeded 5 % of the documents
  preset = "auto",              -- full, tiny (under 100 M parameters: seq 256, batch 8, 60 steps), paper, or auto
  cache = "runs/teacher-cache", -- folder that is made
  steps = 400,                  -- optimizer steps of the longest training
  batch = 16,                   -- packed rows per step
  seq = 32768,                  -- tokens per packed row, and longest document
  micro = 0,                    -- rows per micro-batch (0: as many as hold 4096 tokens)
  mask = "all",                 -- targets: all tokens, or assistant (what the embedded text has by itself)
  top_k = 1024,                 -- logits kept of each token; a training may use fewer
  storage = "f16",              -- log-probabilities and Grams: f16, or f32
  cka = "all",                  -- blocks whose Grams are kept; a training may use fewer
  rows = 512,                   -- tokens sampled for CKA in each micro-batch
  holdout_rows = 512,           -- tokens in a Gram of held-out documents (512: their CKA as without a cache; fewer take less room)
  seed = 1,                     -- order of the documents, split and sampled tokens
}

local run = cq.run(opt)
local teacher = cq.model.open(opt.model)
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
  holdout = opt.holdout, mask = opt.mask, template = opt.template })
local cache = cq.cache.create(opt.cache, { teacher = teacher, data = data, steps = opt.steps, top_k = opt.top_k,
  storage = opt.storage, blocks = opt.cka, tokens = opt.rows, holdout_tokens = opt.holdout_rows, seed = opt.seed })

run:plan { student = teacher, data = data, cache = cache }
local started = cq.clock()
for step = 1, opt.steps do
  for part in cq.batch(data, step):split() do cache:write(part) end -- a file that is there is passed over
  if step % opt.every == 0 then run:say("step %d of %d, %s", step, opt.steps, cq.text.duration(cq.clock() - started)) end
end
for i, batch in ipairs(data:holdout()) do cache:write_holdout(i, batch) end
run:say(cache:finish())
