-- optim.lua - AdamW over a student's trainable parameters; the fake-quantized weights are written in the same pass.
local native = require "ckaqad.ffi"
local distill = require "ckaqad.distill"
local errors = require "ckaqad.errors"
local ranks = require "ckaqad.ranks"
local C, call = native.C, native.call

local optim = {}
local moments = { f32 = "CQ_MOMENTS_F32", bf16 = "CQ_MOMENTS_BF16", ["8bit"] = "CQ_MOMENTS_8BIT" }
local masters = { f32 = "CQ_MASTER_F32", split = "CQ_MASTER_SPLIT", bf16 = "CQ_MASTER_BF16" }
local Adam = errors.class("adam", {})

--- AdamW (arXiv 1711.05101). Options: `betas` { 0.9, 0.95 }, `eps`, `weight_decay` (not of vectors), `clip` (global gradient
--- norm; 0: none), `rates` = { { "globs", factor }, ... } multiplies the learning rate of parameters by name; 0 freezes.
--- `moments`: how m and v of matrices are kept: "f32" (8 bytes a parameter), "bf16" (4), "8bit" (2; blocks of 256 share a scale).
--- `master`: how trained weights of quantized linears are kept: "f32", "split" (exact: BF16 and the 16 bits below) or "bf16" (half).
--- BF16 and 8 bits are rounded stochastically, by (`seed`, parameter, step, element): repeats and resumed runs give the same bits.
---
--- Example:
---     local adam = cq.optim.adamw(student, { betas = { 0.9, 0.95 }, clip = 1, rates = { { "*.gate.weight", 0 }, { "*norm*", 0.1 } } })
function optim.adamw(student, options)
  local o = errors.fill("optim.adamw", options, { betas = { 0.9, 0.95 }, eps = 1e-8, weight_decay = 0, clip = 1, rates = {},
    moments = "f32", master = "f32", seed = 1 })
  errors.choose("option --moments", o.moments, { "f32", "bf16", "8bit" })
  errors.choose("option --master", o.master, { "f32", "split", "bf16" })
  for _, rate in ipairs(o.rates) do student:lr_scale(rate[1], rate[2]) end
  local c = native.new "cq_adamw_options"
  c.beta1, c.beta2, c.eps, c.weight_decay, c.clip = o.betas[1], o.betas[2], o.eps, o.weight_decay, o.clip
  c.moments, c.master, c.seed = C[moments[o.moments]], C[masters[o.master]], o.seed
  c.comm, c.ordered = native.comm, ranks.ordered
  return setmetatable({
    c = native.open("cq_adamw", "cq_adamw_open", student.c, c), student = student, count = 0, norm = native.new "double[1]", options = o,
  }, Adam)
end

--- Adds up the gradients of a micro-batch on each of the first `n` ranks, all ranks together; nothing where one rank adds up its own.
--- `batch:split` calls it; a loop over micro-batches of its own, under mpirun, must.
---
--- Example:
---     pass:backward { kl = 1 }
---     adam:add(1)
---     print(adam:step(1e-4) > 0) --> true
function Adam:add(n)
  call.cq_adamw_add(self.c, self.student:stream(), n)
end

--- Brings the master weights that other ranks updated to this one, all ranks together; export and save do it.
---
--- Example:
---     adam:masters()
function Adam:masters()
  call.cq_adamw_masters(self.c)
end

--- One step at this learning rate. Returns the global gradient norm before clipping; the gradients are zero afterwards.
---
--- Example:
---     print(("gradient norm %.3g"):format(adam:step(1e-4)))
function Adam:step(lr)
  call.cq_adamw_measure(self.c, self.student:stream())
  distill.read(self.student, true) -- a loss that is not a number ends the run here, with the weights as they were
  call.cq_adamw_step(self.c, self.student:stream(), lr, self.count + 1, self.norm)
  self.count = self.count + 1
  return self.norm[0]
end

return errors.strict(optim, "optim")
