-- Quantize only: calibrate on a few documents, report what it costs, export an NVFP4 folder. A model that does not fit the memory is
-- quantized block by block: no report then; stopped, the same command goes on.
--   ckaqad recipes/ptq.lua --model=DIR --data=FILE.jsonl --out=DIR
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",        -- BF16 checkpoint: folder, org/name, or auto (the embedded one)
  data = "auto",         -- documents to calibrate on: JSONL files, none (weights only: activations stay as they are), or auto
                         -- (the embedded text for the embedded model, none for others)
  holdout = "",          -- JSONL files to report on; none: a seeded 5 % of the documents
  preset = "auto",       -- full, tiny (under 100 M parameters: seq 256, batch 8), paper, or auto
  out = "runs/ptq",      -- the NVFP4 folder lands in nvfp4/ here, with log and report
  quant = "auto",        -- nemotron_nano, qwen3, all, experts, mlp, weights_only, or auto (the family's own)
  scales = "max",        -- weight scales: max, or searched: mse, four_over_six
  exclude = "",          -- globs of modules to leave out
  calibrate = 32,        -- documents the activation scales come from
  stream = "auto",       -- block by block, one in memory at a time: yes, no, or auto (when the model does not fit, or data is none)
  shard_bytes = 4831838208, -- largest file of the export (4.5 GiB)
  batch = 16,            -- packed rows a step of the distilling recipes has
  seq = 32768,           -- tokens per packed row, and longest document
  micro = 0,             -- rows per micro-batch (0: as many as hold 4096 tokens)
  seed = 1,              -- of the held-out split
}
opt.given.scales = true -- a preset has no say in it
if opt.data == "auto" and opt.model ~= "auto" then opt.data = "none" end

local run = cq.run(opt)
local teacher = cq.model.open(opt.model)
local family = teacher.family == "qwen3" and "qwen3" or "nemotron_nano"
local student = teacher:quantize { preset = opt.quant == "auto" and family or opt.quant, scales = opt.scales, exclude = opt.exclude,
  weights_only = opt.data == "none" }
local data = opt.data ~= "none" and cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro,
  seed = opt.seed, holdout = opt.holdout, template = opt.template }) or nil

local streams, why = cq.ptq.streams(opt, student)
if streams then
  cq.ptq.stream(run, student, { teacher = teacher, data = data, calibrate = opt.calibrate, shard_bytes = opt.shard_bytes, why = why })
else
  run:plan { teacher = teacher, student = student, data = data, eval = true }
  run:calibrate(student, data, opt.calibrate)
  local before = run:result("PTQ", cq.eval.compare(teacher, student, data:holdout()))
  run:export(student, { shard = opt.shard_bytes })
  run:finish { before = before }
end
