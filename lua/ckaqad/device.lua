-- device.lua - what runs the operations: a kernel table and its device, threads, the precision of matrix products.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local ranks = require "ckaqad.ranks"
local C, call = native.C, native.call
local device = {}
local current

-- "cpu", "cuda", "cuda:1" -> kernels, index. "auto" is the first GPU where this build and this machine have one.
local function place(wanted, kernels)
  if wanted == "cpu" then return kernels, 0 end
  local index = wanted == "cuda" and 0 or tonumber(wanted:match("^cuda:(%d+)$"))
  if not index and wanted ~= "auto" then errors.choose("option --device", wanted, { "cpu", "cuda", "cuda:0", "auto" }) end
  if kernels ~= "cpu" then errors.usage("option --device: %s does not go with --kernels=%s", wanted, kernels) end
  if C.cq_kernels_find("cuda") == nil then
    if not index then return "cpu", 0 end
    errors.usage("option --device: %s is not in this build, which was made without CUDA (nvcc 12.8 or newer)", wanted)
  end
  return "cuda", index
end

-- Where mpirun started many ranks, "cuda" and "auto" are a GPU for each: that of the rank's number on its machine.
local function of_rank(wanted, kernels)
  local n, rank, here = native.new "int[1]", C.cq_comm_local_rank(native.comm), C.cq_comm_local_size(native.comm)
  if here == 1 or kernels ~= "cuda" or wanted:find ":" or C.cq_device_count(n, kernels) < 0 then return nil end
  if n[0] >= here then return rank end
  if os.getenv "NCCL_MULTI_RANK_GPU_ENABLE" == "1" then return rank % n[0] end
  errors.usage("option --device: %s for each of %d ranks on this machine, which has %d GPU%s, wanted as many; cuda:0 where each rank " ..
    "sees a GPU of its own, or NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment to share them", wanted, here, n[0], n[0] == 1 and "" or "s")
end

-- Opens the stream; with "auto" a machine without a usable GPU is no error.
local function open(o)
  local stream = native.new "cq_stream"
  local kernels, index = place(o.device, o.kernels)
  local own = of_rank(o.device, kernels)
  local status = C.cq_stream_open(stream, kernels, own or index or 0)
  if status < 0 and not index then
    kernels, status = "cpu", C.cq_stream_open(stream, "cpu", 0)
  end
  native.check(status)
  return stream, kernels
end

--- Chooses the device ("cpu", "cuda", "cuda:N", "auto"), kernels ("cpu", "ref"; on the processor), threads (0: all cores, which the
--- ranks of a machine share) and compute ("f32", "bf16", "nvfp4") for models opened from now on, `activations` ("f32"; "bf16": inside of
--- blocks, on a GPU with BF16 products), `copies` for students (see `teacher:quantize`), `offload` ("none", "teacher", "optimizer", "both":
--- what a GPU keeps in pinned host memory), `graphs` (on a GPU, passes whose shapes come again are recorded and played); `check` looks at
--- every result for NaN and Inf. A run does this from its options. Under mpirun "cuda" and "auto" are a GPU for each rank: that of its
--- number on its machine.
---
--- Example:
---     local device = cq.device { threads = 1 }
---     print(device.kernels, device.threads) --> cpu	1
function device.device(given)
  local o = errors.fill("device", given, { device = "cpu", kernels = "cpu", threads = 0, compute = "f32", copies = "f32", offload = "none",
    activations = "f32", graphs = true, check = false })
  if C.cq_kernels_find(o.kernels) == nil or o.kernels == "cuda" then
    errors.choose("option --kernels", o.kernels, { "cpu", "ref" })
  end
  errors.choose("option --compute", o.compute, { "f32", "bf16", "nvfp4" })
  errors.choose("option --copies", o.copies, { "f32", "bf16", "packed" })
  errors.choose("option --offload", o.offload, { "none", "teacher", "optimizer", "both" })
  errors.choose("option --activations", o.activations, { "f32", "bf16" })
  if o.threads < 0 or o.threads ~= math.floor(o.threads) then
    errors.usage("option --threads: got %g, wanted a whole number, 0 or more", o.threads)
  end
  local stream, kernels = open(o)
  if o.offload ~= "none" and stream.table.memory == nil then
    errors.usage("option --offload: %s goes with a GPU (--device=cuda), on the processor all is in the host's memory", o.offload)
  end
  if o.activations == "bf16" and (stream.table.memory == nil or o.compute == "f32") then
    errors.usage("option --activations: bf16 needs a GPU and --compute=bf16, got %s and --compute=%s",
      stream.table.memory == nil and "the processor" or "a GPU", o.compute)
  end
  local profiled = os.getenv "CKAQAD_PROFILE" == "ops"
  if o.check then stream.table = C.cq_kernels_checked(stream.table) end
  if profiled then stream.table = C.cq_kernels_profiled(stream.table) end
  call.cq_graphs_set(stream, o.graphs and not o.check and not profiled) -- both look at each operation
  stream.threads = C.cq_threads_set(o.threads > 0 and o.threads or ranks.threads())
  if o.compute == "nvfp4" then
    if not C.cq_stream_has_fp4(stream) then
      errors.usage("option --compute: nvfp4 wants a GPU of compute capability 10 or 12 (--device=cuda), wanted bf16 or f32")
    elseif o.copies ~= "packed" then
      errors.usage("option --compute: nvfp4 multiplies packed weights, wanted --copies=packed")
    end
  end
  stream.compute = o.compute ~= "f32" and C.CQ_COMPUTE_BF16 or C.CQ_COMPUTE_F32
  call.cq_comm_attach(native.comm, stream)
  local text = native.new "char[128]"
  call.cq_stream_describe(stream, text, 128)
  local name = native.string(text)
  current = {
    stream = stream, kernels = kernels, compute = o.compute, activations = o.activations, copies = o.copies, offload = o.offload,
    threads = tonumber(stream.threads), on_device = stream.table.memory ~= nil,
    isa = name ~= "" and name or kernels == "cpu" and native.string(C.cq_cpu_isa()) or "scalar",
  }
  return current
end

-- The device in use; the default one when nobody chose.
function device.current() return current or device.device() end

return device
