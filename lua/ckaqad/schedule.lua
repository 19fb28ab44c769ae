-- schedule.lua - learning rates: each constructor returns a function from the step (counted from 1) to the rate.
--
-- Warm-up is linear and in steps; a value below 1 is a fraction of `steps`. The first step after it runs at the peak.
local errors = require "ckaqad.errors"
local schedule = {}

local function make(name, given, shape)
  local o = errors.fill("schedule." .. name, given, { peak = errors.NONE, warmup = 0, steps = 0, floor = 0 })
  if type(o.peak) ~= "number" then errors.usage("schedule.%s: peak is missing, wanted a number", name) end
  local warmup = o.warmup < 1 and math.floor(o.warmup * o.steps + 0.5) or o.warmup
  return function(step)
    if step <= warmup then return o.peak * step / warmup end
    local span = math.max(1, o.steps - warmup)
    local progress = math.min(1, (step - 1 - warmup) / span)
    return o.floor + (o.peak - o.floor) * shape(progress)
  end
end

--- The same rate after the warm-up.
---
--- Example:
---     local rate = cq.schedule.constant { peak = 5e-6, warmup = 10 }
---     print(rate(5), rate(10), rate(400)) --> 2.5e-06	5e-06	5e-06
function schedule.constant(options)
  return make("constant", options, function() return 1 end)
end

--- Falls in a straight line from `peak` to `floor` at `steps`.
---
--- Example:
---     local rate = cq.schedule.linear { peak = 1, steps = 4 }
---     print(rate(1), rate(3), rate(5)) --> 1	0.5	0
function schedule.linear(options)
  return make("linear", options, function(progress) return 1 - progress end)
end

--- Falls along half a cosine from `peak` to `floor` at `steps`.
---
--- Example:
---     local rate = cq.schedule.cosine { peak = 1e-4, warmup = 0.1, steps = 60, floor = 0 }
---     print(rate(6), rate(7)) --> 0.0001	0.0001
function schedule.cosine(options)
  return make("cosine", options, function(progress) return 0.5 + 0.5 * math.cos(math.pi * progress) end)
end

return errors.strict(schedule, "schedule")
