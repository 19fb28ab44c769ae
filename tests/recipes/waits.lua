-- A few steps; prints what they gave, how many passes were played instead of run, and on the emulated device how often
-- the host waited in a step.
--   build/ckaqad tests/recipes/waits.lua --model=DIR --data=FILE --rule=ratio --later=true    (tests/recipes/waits.sh)
local ffi = require "ffi"
local cq = require "ckaqad"
local native = require "ckaqad.ffi"
local distill = require "ckaqad.distill"
local C, call = native.C, native.call

local opt = cq.options {
  model = "",       -- checkpoint folder
  data = "",        -- documents, or random: all of one length
  rule = "ratio",   -- a balance; look: a rule of one's own; late: ratio, then a look
  layer = "cka",    -- loss on hidden states
  cka = "all",      -- blocks
  later = true,     -- results stay where they are until somebody looks
  steps = 2,        -- steps
  batch = 4,        -- micro-batches of a step
  again = false,    -- calibrates once more after half of the steps
  fault = false,    -- a weight of the student is not a number
}
distill.deferred = opt.later
cq.device { device = opt.device, kernels = opt.kernels, threads = 2, compute = opt.compute, copies = opt.copies,
  activations = opt.activations, graphs = opt.graphs }
cq.balance.define("look", function(pass) return { kl = 1, cka = pass.kl / 2 } end)

local teacher = cq.model.open(opt.model)
local student = teacher:quantize { preset = "all" }
local documents = opt.data == "random" and cq.data.random(opt.model, 8, 32) or opt.data
local data = cq.data.open(documents, { model = teacher, seq = 32, batch = opt.batch, micro = 1, seed = 3 })
local terms = { cq.loss.kl { top_k = 16 }, cq.loss.layer(opt.layer, { blocks = opt.cka, tokens = 16 }) }
local adam = cq.optim.adamw(student)
local balance = cq.balance.get(opt.rule == "late" and "ratio" or opt.rule, { max = 100 })
cq.plan { teacher = teacher, student = student, adam = adam, terms = terms, data = data }
student:calibrate(data:take(1))

local function waits() return 0 end
ffi.cdef "int64_t cq_emu_waits(void);"
local counts = pcall(function() return ffi.C.cq_emu_waits end)
if counts then
  function waits() return tonumber(ffi.C.cq_emu_waits()) end
end

-- SHA-256 over the trained weights.
local function weights()
  local all = {}
  for i = 0, tonumber(C.cq_model_n_params(student.c)) - 1 do
    local values, n = native.master(C.cq_model_param(student.c, i))
    all[#all + 1] = ffi.string(values, 4 * n)
  end
  return native.sha256_text(table.concat(all))
end

if opt.fault then
  local p = C.cq_model_find(student.c, "model.layers.1.input_layernorm.weight")
  call.cq_copy(p.fq.data, ffi.new("float[1]", 0 / 0), 4)
  call.cq_copy(p.value.data, ffi.new("float[1]", 0 / 0), 4)
end
local before = weights()
local ok, problem = pcall(function()
  for step = 1, opt.steps do
    if opt.again and step == opt.steps / 2 + 1 then student:calibrate(data:take(1)) end
    local batch, begun = cq.batch(data, step), waits()
    for part in batch:split() do
      local pass = cq.distill(teacher, student, part, terms)
      local w = balance(pass)
      if opt.rule == "late" then assert(pass.kl > 0) end
      pass:backward(w)
    end
    local norm = adam:step(1e-3)
    if counts then print(("waits %d in step %d"):format(waits() - begun, step)) end
    print(("step %d: norm %.17g"):format(step, norm))
    for _, pass in ipairs(batch.passes) do
      print(("  kl %.17g, top1 %.17g, rows %d, weight %.17g %.17g"):format(pass.kl, pass.top1, pass.rows, pass.layer_weight,
        pass.weight.cka))
      for block = 0, student.n_blocks - 1 do
        if pass.cka[block] then print(("    %d %.17g"):format(block, pass.cka[block])) end
      end
    end
  end
end)
if not ok then print(problem, weights() == before and "weights as before" or "weights changed") end
print("weights " .. weights())
print(("played %d passes"):format(tonumber(C.cq_graphs_played(student:stream()))))
if documents ~= opt.data then os.remove(documents) end
