-- Quantize only: calibrate on a few documents, report what it costs, export an NVFP4 folder.
--   ckaqad recipes/ptq.lua --model=DIR --data=FILE.jsonl --out=DIR
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",        -- BF16 checkpoint: folder, org/name, or auto (the embedded one)
  data = "auto",         -- documents to calibrate on: JSONL files, or auto (the embedded text)
  holdout = "",          -- JSONL files to report on; none: a seeded 5 % of the documents
  preset = "auto",       -- full, tiny (under 100 M parameters: seq 256, batch 8), paper, or auto
  out = "runs/ptq",      -- the NVFP4 folder lands in nvfp4/ here, with log and report
  quant = "auto",        -- nemotron_nano, qwen3, all, experts, mlp, weights_only, or auto (the family's own)
  scales = "max",        -- weight scales: max, or searched: mse, four_over_six
  exclude = "",          -- globs of modules to leave out
  calibrate = 32,        -- documents the activation scales come from
  batch = 16,            -- packed rows a step of the distilling recipes has
  seq = 32768,           -- tokens per packed row, and longest document
  micro = 0,             -- rows per micro-batch (0: as many as hold 4096 tokens)
  seed = 1,              -- of the held-out split
}

local run = cq.run(opt)
local teacher = cq.model.open(opt.model)
if opt.quant == "auto" then opt.quant = teacher.family == "qwen3" and "qwen3" or "nemotron_nano" end
local student = teacher:quantize { preset = opt.quant, scales = opt.scales, exclude = opt.exclude }
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
  holdout = opt.holdout, template = opt.template })

run:plan { teacher = teacher, student = student, data = data, eval = true }
run:calibrate(student, data, opt.calibrate)
local before = run:result("PTQ", cq.eval.compare(teacher, student, data:holdout()))
run:export(student)
run:finish { before = before }
