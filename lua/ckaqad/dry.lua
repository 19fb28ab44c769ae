-- dry.lua - what a run would cost, from config.json and the plan alone: operations, and time at this machine's matrix rate.
--
-- A token passes every matrix of the teacher once (2 N operations, N = weights it meets: routed experts count by the share
-- that is active), every matrix of the student three times (6 N). CKA adds 6 n^2 d per Gram. Attention scores and scans are
-- left out: below a tenth at these lengths.
local native = require "ckaqad.ffi"
local device = require "ckaqad.device"
local json = require "ckaqad.json"
local text = require "ckaqad.text"
local loss = require "ckaqad.loss"
local select_ = require "ckaqad.select"
local folder = require "ckaqad.folder"

local dry = {}

-- Matrix weights that one token meets.
function dry.active(model)
  local c, n = model.config, 0
  for p in model:params() do
    local rank = tonumber(p.shape.rank)
    local size = tonumber(native.C.cq_shape_elems(p.shape))
    local name = native.string(p.name)
    if rank >= 2 and not name:find("conv1d", 1, true) and not name:find("embed", 1, true) then
      local share = name:find("%.experts%.%d") and tonumber(c.top_k) / tonumber(c.experts) or 1
      n = n + size * share
    end
  end
  return c.tied and n + model.vocab * model.hidden or n
end

--- Operations (multiplies and adds of matrix products) of one optimizer step of what `run:plan` takes: `teacher`, `student`,
--- `adam`, `terms`, `data`. Attention scores and scans are left out.
---
--- Example:
---     local teacher = cq.model.open(opt.model)
---     print(cq.operations { student = teacher:quantize {}, teacher = teacher } == 0) --> true
function dry.step(o)
  local n = dry.active(o.student)
  local per_token = (o.teacher and not o.teacher.cached and 2 or 0) * n + (o.adam and 6 or 2) * n
  local tokens = o.data and o.data.batch * o.data.seq or 0
  local total = per_token * tokens
  local list = o.terms and (o.terms[1].logits or o.terms[1].layers) and o.terms or o.terms and o.terms[1]
  local _, layers = loss.split(list or { { logits = "kl" } })
  if layers and o.data then
    local rows = math.min(layers.tokens, o.data.micro * o.data.seq)
    local grams = #select_.blocks(layers.blocks, o.student.pattern) * o.data.batch / o.data.micro
    total = total + 6 * rows ^ 2 * o.student.hidden * grams
  end
  return total
end

--- Operations per second that matrix products of F32 tensors reach on the device in use, measured now.
---
--- Example:
---     print(cq.matrix_rate() > 1e8) --> true
function dry.rate()
  local rate = native.new "double[1]"
  native.call.cq_matmul_rate(device.current().stream, rate)
  return rate[0]
end

-- The lines of --dry-run: resolved options, operations, an estimate of the time.
function dry.lines(opt, o)
  local lines = { "options:" }
  local values = folder.options(opt)
  local rows = {}
  for _, key in ipairs(json.keys(values)) do rows[#rows + 1] = { key, tostring(values[key]) } end
  local width = 0
  for _, row in ipairs(rows) do width = math.max(width, #row[1]) end
  for _, row in ipairs(rows) do
    lines[#lines + 1] = ("  %s%s  %s"):format(row[1], (" "):rep(width - #row[1]), row[2])
  end
  if not o.adam or not o.data then return lines end
  local step, rate = dry.step(o), dry.rate()
  lines[#lines + 1] = ("operations: %s a step, %s in %d steps (%s tokens a step)"):format(text.count(step), text.count(step * opt.steps),
    opt.steps, text.count(o.data.batch * o.data.seq))
  lines[#lines + 1] = ("time: about %s at 40 %% of the %s operations/s this machine's matrix products reach (no weights were read)"):format(
    text.duration(step * opt.steps / (0.4 * rate)), text.count(rate))
  return lines
end

return dry
