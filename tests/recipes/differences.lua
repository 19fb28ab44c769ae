-- Gradients against central differences on a device, in FP32: along the gradient of each tensor the loss must rise by its norm.
--   build/ckaqad tests/recipes/differences.lua --device=cuda --model=tests/golden/qwen3_tiny      (tests/gpu.sh)
local ffi = require "ffi"
local cq = require "ckaqad"
local native = require "ckaqad.ffi"
local C, call = native.C, native.call

local opt = cq.options {
  model = "",      -- checkpoint folder
  stride = 1,      -- looks at one tensor of so many
  tokens = 48,     -- of two documents
}
cq.device { device = opt.device, kernels = opt.kernels, compute = "f32" }
local teacher = cq.model.open(opt.model)
local student = teacher:quantize { preset = "none" }
local terms = { cq.loss.kl { tail = "full" }, cq.loss.cka { tokens = 24, estimator = "unbiased" } }
cq.plan { teacher = teacher, student = student, terms = terms, tokens = opt.tokens, trained = true }
local documents = cq.data.random(opt.model, 2, opt.tokens / 2)
local data = cq.data.open(documents, { model = teacher, seq = opt.tokens / 2, batch = 2, micro = 2, seed = 1, fraction = 0 })
os.remove(documents)
local part
for p in cq.batch(data, 1):split() do part = p end

-- The values of a tensor, and new ones.
local function values_of(t)
  local from, n = native.elements(t)
  local copy = native.new("float[?]", n)
  ffi.copy(copy, from, 4 * n)
  return copy, n
end
local function set(p, values) call.cq_tensor_fill(p.value, values, C.CQ_F32) end

-- Away from the teacher, where all losses are at their minimum.
local seed = 1
local function uniform()
  seed = (seed * 16807) % 2147483647
  return seed / 2147483647
end
local params = {}
for p in student:params() do
  if not p.buffer then
    params[#params + 1] = p
    local x, n = values_of(p.value)
    for i = 0, n - 1 do x[i] = x[i] * (0.85 + 0.3 * uniform()) end
    set(p, x)
  end
end

local function mean(pass)
  local sum = 0
  for block = 0, student.n_blocks - 1 do sum = sum + 1 - pass.cka[block] end
  return sum / student.n_blocks
end
call.cq_model_zero_grad(student.c)
local pass = cq.distill(teacher, student, part, terms)
local weight, here = pass.kl / mean(pass), 2 * pass.kl -- both terms count as much
pass:backward { kl = 1, cka = weight }
local function loss()
  local now = cq.distill(teacher, student, part, terms)
  return now.kl + weight * mean(now)
end

-- How far the rise of the loss along a tensor's gradient is from its norm; nil for an expert that saw no token.
local function off_by(p)
  local x, n = values_of(p.value)
  local g, norm, size = values_of(p.grad), 0, 0
  for k = 0, n - 1 do norm, size = norm + g[k] ^ 2, size + x[k] ^ 2 end
  if norm == 0 then return nil end
  norm, size = math.sqrt(norm), math.max(math.sqrt(size), 0.1) -- some biases are 0
  local moved, sides = native.new("float[?]", n), {}
  local h = math.min(0.02 * size, 1e-3 * here / norm) -- so that the loss changes by a thousandth: no other experts are chosen
  for _, side in ipairs { 1, -1 } do
    for k = 0, n - 1 do moved[k] = x[k] + side * h * g[k] / norm end
    set(p, moved)
    sides[side] = loss()
  end
  set(p, x)
  local noise = 4e-6 * here / h -- of the loss in FP32
  local off = math.abs((sides[1] - sides[-1]) / (2 * h) - norm) / (norm + noise)
  return off == off and off or math.huge
end

local worst, where, looked = 0, "", 0
for i = 1, #params, opt.stride do
  local off = off_by(params[i])
  looked = looked + (off and 1 or 0)
  if off and off > worst then worst, where = off, native.string(params[i].name) end
end
print(("%d of %d tensors: differences are off by at most %.2g of the gradient (%s)"):format(looked, #params, worst, where))
cq.refuse(worst >= 0.02 and "a gradient is not that of the loss" or nil)
