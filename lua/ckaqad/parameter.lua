-- parameter.lua - one parameter of a model, as a value to look at: shape, numbers, what quantization makes of it.
--
-- It points into the model's memory and copies nothing; the numbers exist once a plan has loaded the model.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local C = native.C

local parameter = {}
local Parameter = errors.class("parameter", {})

local dtypes = { [0] = "f32", "f64", "bf16", "f16", "f8", "u8", "i32", "i64" }
local fields = { value = true, fq = true, grad = true }

local function dimensions(shape)
  local list = {}
  for i = 0, tonumber(shape.rank) - 1 do list[i + 1] = tonumber(shape.dim[i]) end
  return list
end

-- The C parameter `c` of a model.
function parameter.wrap(c, model)
  return setmetatable({
    c = c, model = model, name = native.string(c.name), shape = dimensions(c.shape), disk = dtypes[tonumber(c.disk)],
    block = tonumber(c.block), linear = c.linear, quantized = c.quantized, trainable = c.trainable, reason = native.string(c.reason),
    n = tonumber(C.cq_shape_elems(c.shape)),
  }, Parameter)
end

-- All parameters of a model, in checkpoint order.
function parameter.list(model)
  local list = {}
  for c in model:params() do list[#list + 1] = parameter.wrap(c, model) end
  return list
end

-- The C tensor, its elements as a pointer and their number; nil when it has no memory.
local function elements(self, which)
  which = which or "value"
  if not fields[which] then errors.choose("parameter", which, { "value", "fq", "grad" }) end
  local tensor = self.c[which]
  if which == "fq" and (self.c.codes.data ~= nil or dtypes[tonumber(tensor.dtype)] == "bf16") then return native.quantized(self.c) end
  if tensor.data == nil then return nil end
  if which == "value" and dtypes[tonumber(tensor.dtype)] == "bf16" then return native.master(self.c) end
  local pointer, n = native.elements(tensor)
  return pointer, n, dtypes[tonumber(tensor.dtype)]
end

--- The dtype it is computed in ("f32" or "f64"); nil before a plan has loaded it. The checkpoint's is `parameter.disk`.
function Parameter:dtype()
  local _, _, dtype = elements(self)
  return dtype
end

--- The element at these indices, counted from 0: `model:parameter("lm_head.weight"):at(0, 3)`. Indices that are left out are 0.
--- `which`, after the indices: "value" (the master weight; default), "fq" (fake-quantized), "grad".
function Parameter:at(...)
  local indices, which, at = { ... }, nil, 0
  if type(indices[#indices]) == "string" then which = table.remove(indices) end
  local pointer = elements(self, which)
  if not pointer then errors.usage("%s: has no %s in memory, wanted a planned model", self.name, which or "value") end
  for axis, size in ipairs(self.shape) do
    local i = indices[axis] or 0
    if i < 0 or i >= size or i ~= math.floor(i) then
      errors.usage("%s: index %s on axis %d, wanted 0 to %d", self.name, tostring(i), axis - 1, size - 1)
    end
    at = at * size + i
  end
  return tonumber(pointer[at])
end

local function add(pointer, from, to, s)
  local low, high, sum, bad = s.min, s.max, s.sum, s.nonfinite
  for i = from, to - 1 do
    local x = pointer[i]
    if x - x == 0 then
      if x < low then low = x end
      if x > high then high = x end
      sum = sum + x
    else
      bad = bad + 1
    end
  end
  s.min, s.max, s.sum, s.nonfinite = low, high, sum, bad
end

--- { min, mean, max, nonfinite, n } of its elements; min, mean and max are of the finite ones. `which` as in `at`. nil when there
--- is nothing in memory.
function Parameter:stats(which)
  local pointer, n = elements(self, which)
  if not pointer then return nil end
  local s = { min = math.huge, max = -math.huge, sum = 0, nonfinite = 0, n = n }
  -- worth compiling; in pieces, because compiled code does not see a Ctrl-C
  local compiled = jit.status()
  jit.on()
  local ok, e = pcall(function()
    for from = 0, n - 1, 2 ^ 18 do
      add(pointer, from, math.min(n, from + 2 ^ 18), s)
      native.poll()
    end
  end)
  if not compiled then jit.off() end
  if not ok then error(e, 0) end
  s.mean = s.sum / (n - s.nonfinite)
  s.sum = nil
  return s
end

function Parameter:__tostring() return require "ckaqad.show".parameter(self) end

return parameter
