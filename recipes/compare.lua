-- Compare any two models of one vocabulary on documents: KL, top-1, perplexity, and CKA of every block.
--   ckaqad recipes/compare.lua --teacher=DIR --student=DIR --data=FILE.jsonl
local cq = require "ckaqad"

local opt = cq.options {
  teacher = "",       -- the model to compare with: folder or org/name, BF16 or NVFP4
  student = "",       -- the other one: folder, run folder or org/name, BF16 or NVFP4
  data = "auto",      -- documents to compare on: JSONL files, or auto (the embedded text)
  preset = "auto",    -- full, tiny (under 100 M parameters: seq 256, batch 8), paper, or auto
  batch = 16,         -- packed rows a step of the distilling recipes has
  seq = 32768,        -- tokens per packed row, and longest document
  micro = 0,          -- rows per micro-batch (0: as many as hold 4096 tokens)
  mask = "all",       -- tokens that count: all, or assistant
  json = false,       -- the result as one JSON object on the last line
}

local run = cq.run(opt)
local teacher, student = cq.model.open(opt.teacher), cq.model.open(opt.student)
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, mask = opt.mask,
  fraction = 0, template = opt.template })
run:plan { teacher = teacher, student = student, data = data, eval = true }
local r = cq.eval.compare(teacher, student, data:all())

local rows = { { "block", "kind", "CKA" } }
local kinds = { M = "mamba", E = "moe", ["*"] = "attention", ["-"] = "mlp", Q = "attention + mlp" }
for i, cka in ipairs(r.cka_blocks) do
  rows[#rows + 1] = { tostring(i - 1), kinds[student.pattern:sub(i, i)], ("%.6f"):format(cka) }
end
for _, line in ipairs(cq.text.table(rows)) do run:say(line) end
run:say("KL %.6f nats, top-1 %.4f, perplexity %.4f (teacher %.4f), mean CKA %.6f, lowest %.6f at block %d, %d tokens",
  r.kl, r.top1, r.perplexity, r.perplexity_teacher, r.cka, r.cka_min, r.cka_min_block, r.tokens)
if opt.json then print(cq.json.encode(r)) end
