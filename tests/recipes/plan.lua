-- What plan_ranks adds up is what the plan declares, and what the plan declares for a GPU that is not here is what it allocates here,
-- where the two are the same. Run by plan.sh: plan.lua MODEL...
local cq = require "ckaqad"
local native = require "ckaqad.ffi"
local device = require "ckaqad.device"
local gpus = require "ckaqad.plan_gpus"
local plan = require "ckaqad.plan"
local ranks = require "ckaqad.plan_ranks"
local C = native.C

local weights = { teacher = 0, student = 1, fakequant = 2, gradients = 3, moments = 4 } -- numbers in core/tensor/plan.h

local function prepare(dir, freeze, copies)
  local teacher = cq.model.open(dir)
  local student = teacher:quantize { preset = "all", freeze = freeze, copies = copies }
  local adam = cq.optim.adamw(student, {})
  local terms = { cq.loss.kl {}, cq.loss.cka { tokens = 32 } }
  return { teacher = teacher, student = student, adam = adam, terms = terms, tokens = 256, longest = 128, eval = true }
end

local function combination(activations, recompute)
  local c = {}
  for _, knob in ipairs(ranks.knobs) do c[knob.name] = knob.values[1] end
  c.activations, c.recompute = activations, recompute
  return c
end

for _, dir in ipairs(arg) do
  for _, freeze in ipairs { "", "*.experts.*", "*norm*" } do
    device.device {}
    local real = prepare(dir, freeze)
    local made = plan.plan(real)
    local allocated = {}
    for name, purpose in pairs(weights) do allocated[name] = tonumber(C.cq_plan_bytes(made.c, purpose)) end

    gpus.imagine { dry_run = true }
    local o = plan.prepare(prepare(dir, freeze))
    local model, buffers = gpus.model(o), 0
    for _ in o.student:params() do buffers = buffers + 1 end
    local slack = 64 * 4 * buffers -- every buffer begins at a multiple of 64, and scales of quantized matrices are not counted
    for _, c in ipairs { combination("f32", "no"), combination("f32", "yes"), combination("bf16", "no"), combination("bf16", "yes") } do
      local sum, declared = ranks.bytes(model, c, { gpus = 1, experts = 1 }), model.planned[c.activations][c.recompute]
      for _, purpose in ipairs(ranks.purposes) do
        local off = declared[purpose] - sum[purpose]
        assert(off >= 0 and off <= slack, ("%s, freeze %q, recompute %s: %s is %d declared, %d added up"):format(dir, freeze, c.recompute,
          purpose, declared[purpose], sum[purpose]))
      end
      assert(math.abs(sum.total - declared.total) <= 3 * slack)
    end
    local wide, narrow = model.planned.f32.no, model.planned.bf16.no
    assert(narrow.activations < 0.75 * wide.activations and narrow.scratch < wide.scratch, "activations in BF16 take less")

    for _, copies in ipairs { "bf16", "packed" } do
      local kept, c = gpus.model(plan.prepare(prepare(dir, freeze, copies))), combination("f32", "yes")
      c.copies = copies
      local sum, declared = ranks.bytes(kept, c, { gpus = 1, experts = 1 }), kept.planned.f32.yes
      for name in pairs(weights) do
        local off = declared[name] - sum[name]
        assert(off >= 0 and off <= slack, ("%s, freeze %q, copies %s: %s is %d declared, %d added up"):format(dir, freeze, copies, name,
          declared[name], sum[name]))
      end
    end
    for _, m in ipairs { o.teacher, o.student } do C.cq_model_set_compute(m.c, C.CQ_COMPUTE_F32) end
    local counted = plan.count(o, C.CQ_MODE_SAVE)
    for name, purpose in pairs(weights) do
      assert(counted[purpose] == allocated[name], ("%s, freeze %q: %s is %d counted, %d allocated"):format(dir, freeze, name,
        counted[purpose], allocated[name]))
    end
    print(("%s, freeze %q: %d bytes on a GPU with recompute, as declared"):format(dir, freeze, model.planned.f32.yes.total))
  end
end
