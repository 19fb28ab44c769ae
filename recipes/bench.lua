-- Time a whole distillation step (F32, every projection in NVFP4, full KL) with and without CKA, interleaved; medians.
--   ckaqad recipes/bench.lua --model=DIR --data=FILE.jsonl --steps=20 --batch=8 --seq=256 --threads=2
-- --weights=random --data=random need only a config.json in --model: shapes without a checkpoint.
-- The last line is one JSON object: tokens_per_s, tokens_per_s_cka, peak_bytes. Tokens are real ones; nothing is padded.
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",     -- BF16 checkpoint: folder, org/name, or auto (the embedded one)
  data = "auto",      -- documents: JSONL files, or auto (the embedded text)
  weights = "file",   -- file, or random (from config.json alone)
  preset = "auto",    -- full, tiny (under 100 M parameters: seq 256, batch 8), paper, or auto
  steps = 20,         -- steps of each kind; the first two of each are not counted
  batch = 16,         -- packed rows per step
  seq = 32768,        -- tokens per packed row
  micro = 0,          -- rows per micro-batch (0: as many as hold 4096 tokens)
  lr = 1e-4,          -- learning rate
  rows = 128,         -- tokens sampled for CKA
  cka = "all",        -- blocks CKA looks at
  freeze = "",        -- globs of parameters that are not trained, for example *.experts.*
  calibrate = 32,     -- documents the activation scales come from
  seed = 1,           -- order of the documents and sampled tokens
}
opt.given.steps, opt.given.rows, opt.given.lr = true, true, true -- a preset has no say in these

local random_file = opt.data == "random" and cq.data.random(opt.model, 2 * opt.batch, opt.seq)
opt.data = random_file or opt.data
local run = cq.run(opt)
local teacher = opt.weights == "random" and cq.model.create(opt.model) or cq.model.open(opt.model)
local student = teacher:quantize { preset = "all", freeze = opt.freeze }
local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
  fraction = 0 })
local plain = { cq.loss.kl { tail = "full" } }
local cka = { cq.loss.kl { tail = "full" }, cq.loss.cka { blocks = opt.cka, tokens = opt.rows } }
local adam, balance = cq.optim.adamw(student), cq.balance.ratio()
local plan = run:plan { teacher = teacher, student = student, adam = adam, terms = { plain, cka }, data = data }
run:calibrate(student, data, opt.calibrate)

local speeds = { [plain] = {}, [cka] = {} }
for step = 1, opt.steps do
  for i = 1, 2 do
    local terms = (i + step) % 2 == 0 and plain or cka
    local batch, started = cq.batch(data, step), cq.clock()
    for part in batch:split() do
      local pass = cq.distill(teacher, student, part, terms)
      pass:backward(terms == cka and balance(pass) or { kl = 1 })
    end
    adam:step(opt.lr)
    if step > 2 or opt.steps < 4 then table.insert(speeds[terms], batch.tokens / (cq.clock() - started)) end
  end
end

local function median(list)
  table.sort(list)
  local n = #list
  return n % 2 == 1 and list[(n + 1) / 2] or (list[n / 2] + list[n / 2 + 1]) / 2
end
local a, b = median(speeds[plain]), median(speeds[cka])
local operations = cq.operations { teacher = teacher, student = student, adam = adam, terms = plain, data = data }
local rate = cq.matrix_rate()
local share = operations / (opt.batch * opt.seq) * a / rate
run:say("%.0f tokens/s without CKA, %.0f with: CKA costs %.1f %% of the time", a, b, 100 * (a / b - 1))
run:say("%.3g operations a step: %.1f %% of the %.3g operations/s that matrix products reach here", operations, 100 * share, rate)
if random_file then os.remove(random_file) end
print(cq.json.encode(cq.json.object { "tokens_per_s", a, "tokens_per_s_cka", b, "peak_bytes", cq.peak_bytes(), "planned_bytes", plan.bytes,
  "device_bytes", plan.free and run:peak_bytes() or 0, "share_of_matrix_rate", share, "device", run.device.isa, "compute", opt.compute,
  "activations", opt.activations, "threads", run.device.threads, "batch", opt.batch, "micro", data.micro, "seq", opt.seq }))
