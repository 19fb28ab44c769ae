-- device.lua - what runs the operations: a kernel table, its threads, the precision of matrix products.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local C = native.C
local device = {}
local current

--- Chooses kernels ("cpu", "ref"), threads (0: all cores) and compute ("f32", "bf16") for models opened from now on.
--- A run does this from its options.
---
--- Example:
---     local device = cq.device { threads = 1 }
---     print(device.kernels, device.threads) --> cpu	1
function device.device(given)
  local o = errors.fill("device", given, { kernels = "cpu", threads = 0, compute = "f32" })
  errors.choose("option --kernels", o.kernels, { "cpu", "ref" })
  errors.choose("option --compute", o.compute, { "f32", "bf16" })
  if o.threads < 0 or o.threads ~= math.floor(o.threads) then
    errors.usage("option --threads: got %g, wanted a whole number, 0 or more", o.threads)
  end
  local stream = native.new "cq_stream"
  stream.table = C.cq_kernels_find(o.kernels)
  if stream.table == nil then errors.usage("option --kernels: %s is not in this build", o.kernels) end
  stream.threads = C.cq_threads_set(o.threads)
  stream.compute = o.compute == "bf16" and C.CQ_COMPUTE_BF16 or C.CQ_COMPUTE_F32
  current = {
    stream = stream, kernels = o.kernels, compute = o.compute, threads = tonumber(stream.threads),
    isa = o.kernels == "cpu" and native.string(C.cq_cpu_isa()) or "scalar",
  }
  return current
end

-- The device in use; the default one when nobody chose.
function device.current() return current or device.device() end

return device
