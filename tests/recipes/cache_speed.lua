-- How fast training from a cache is, beside the teacher running along, and beside what is left of a step without the teacher. One
-- round is a step online, the same step from the cache, and the teacher's part of it alone (forward and head); medians of rounds.
--   build/ckaqad tests/recipes/cache_speed.lua --model=DIR --data=FILE.jsonl --teacher-cache=DIR --steps=20
-- The last line is JSON: share (of the teacher in a step), speedup, ideal = 1 / (1 - share), efficiency = speedup / ideal.
local cq = require "ckaqad"
local native = require "ckaqad.ffi"
local call = native.call

local opt = cq.options {
  model = "auto",           -- BF16 checkpoint
  data = "auto",            -- documents
  holdout = "",             -- held-out documents
  teacher_cache = "",       -- folder of recipes/teacher_cache.lua
  preset = "auto",          -- full, tiny or auto
  steps = 20,               -- rounds; the first two are not counted
  batch = 16,               -- packed rows per step
  seq = 32768,              -- tokens per packed row
  micro = 0,                -- rows per micro-batch
  top_k = 1024,             -- logits KL looks at
  rows = 512,               -- tokens sampled for CKA
  seed = 1,                 -- order of the documents
}
opt.given.steps = true

local run = cq.run(opt)
local teacher = cq.model.open(opt.model)
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
  holdout = opt.holdout })
local function terms() return { cq.loss.kl { top_k = opt.top_k }, cq.loss.cka { tokens = opt.rows } } end
local sides = {}
for i, kind in ipairs { "online", "cached" } do
  local student = teacher:quantize { preset = "all" }
  local source = kind == "online" and teacher or cq.cache.open(opt.teacher_cache, { model = teacher, data = data, terms = terms(),
    steps = opt.steps, seed = opt.seed })
  local side = { student = student, teacher = source, terms = terms(), adam = cq.optim.adamw(student), balance = cq.balance.ratio() }
  run:plan { teacher = source, student = student, adam = side.adam, terms = side.terms, data = data }
  run:calibrate(student, data, 32)
  sides[i], side.times = side, {}
end

local chunk = require("ckaqad.distill").chunk(teacher.vocab, false)
local logits, alone = native.new("float[?]", chunk * teacher.vocab), {}
local function teacher_part(part)
  local stream, tokens = teacher:stream(), tonumber(part.c.tokens)
  call.cq_model_forward(teacher.c, stream, part.c)
  for at = 0, tokens - 1, chunk do
    call.cq_model_head_forward(teacher.c, stream, native.C.cq_model_final(teacher.c), at, math.min(chunk, tokens - at), logits)
  end
end

for step = 1, opt.steps do
  local batch = cq.batch(data, step)
  for i = 1, 2 do
    local side = sides[(i + step) % 2 + 1]
    local begun = cq.clock()
    for part in batch:split() do
      local pass = cq.distill(side.teacher, side.student, part, side.terms)
      pass:backward(side.balance(pass))
    end
    side.adam:step(1e-5)
    side.times[step] = cq.clock() - begun
  end
  local begun = cq.clock()
  for part in batch:split() do teacher_part(part) end
  alone[step] = cq.clock() - begun
end

local function median(list)
  local sorted = { unpack(list, opt.steps > 4 and 3 or 1) }
  table.sort(sorted)
  return sorted[math.ceil(#sorted / 2)]
end
local shares, speedups = {}, {}
for step = 1, opt.steps do
  shares[step] = alone[step] / sides[1].times[step]
  speedups[step] = sides[1].times[step] / sides[2].times[step]
end
local share, speedup = median(shares), median(speedups)
print(cq.json.encode(cq.json.object { "online_ms", 1e3 * median(sides[1].times), "cached_ms", 1e3 * median(sides[2].times), "teacher_ms",
  1e3 * median(alone), "share", share, "speedup", speedup, "ideal", 1 / (1 - share), "efficiency", speedup * (1 - share) }))
