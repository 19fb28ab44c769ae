-- plan_ranks.lua - what one step of distillation takes on each of N GPUs: bytes by purpose, operations, bytes between ranks, seconds.
--
-- Arithmetic on counts, no C: `plan_gpus.lua` counts a model's parameters and plans its work buffers with the code that allocates. A
-- combination names how values are stored (knobs below; the first value of each is how this program began: all F32, products from BF16
-- copies). A layout is { gpus, experts }: rows of a step go round all GPUs, routed experts are dealt out over `experts` of them, so
-- gpus / experts ranks hold the same expert and all hold the same of everything else. Moments of what several ranks
-- hold are sharded over them, master weights are whole on each: gradients are reduce-scattered, with a sum of the step's at their owner,
-- and the new weights gathered, quantized ones packed.
local ranks = {}

-- loss: 0 exact, else how far the stored values are from F32. What `today` cannot do, `plan_gpus` finds out by asking the options.
ranks.knobs = {
  { name = "freeze", values = { "none", "experts" } },
  { name = "copies", values = { "f32", "bf16", "packed" } }, -- packed: quantized ones as NVFP4, opened block by block
  { name = "master", values = { "f32", "split", "bf16" }, loss = { bf16 = 1 } },
  { name = "gradients", values = { "f32", "bf16" }, loss = { bf16 = 1 } },
  { name = "moments", values = { "f32", "bf16", "8bit" }, loss = { bf16 = 1, ["8bit"] = 2 } },
  { name = "activations", values = { "f32", "bf16" }, loss = { bf16 = 1 } },
  { name = "recompute", values = { "no", "yes" } },
  { name = "offload", values = { "none", "teacher", "optimizer", "both" } },
}

local packed = 0.5625 -- bytes of an NVFP4 value: 4 bits, and 8 bits of scale for 16 of them
local master_bytes = { f32 = 4, split = 4, bf16 = 2 }
local value_bytes = { f32 = 4, bf16 = 2 }
local moment_bytes = { f32 = 8, bf16 = 4, ["8bit"] = 2 + 2 * 4 / 256 } -- 8bit: blocks of 256 with an F32 scale each

-- Purposes of bytes in the order of the tables; the names are those of core/tensor/plan.h.
ranks.purposes = { "teacher", "student", "fakequant", "gradients", "moments", "activations", "scratch", "logits", "cka" }

-- Planning values of one GPU (H200) and what it hangs on.
ranks.rates = {
  matmul = 790e12,  -- BF16 product of 8192^3, operations/s: measured on an H200, as the next two
  fraction = 0.45,  -- of it in a whole step: of Qwen3-4B; 0.16 in 8 blocks of Nemotron 3 Nano (kernels/cuda/README.md)
  copy = 4.3e12,    -- bytes/s read and written in device memory
  link = 370e9,     -- bytes/s of one GPU to others of its node: assumed, as all below
  node = 50e9,      -- bytes/s of one GPU to another node
  host = 55e9,      -- bytes/s to host memory, each way
  per_node = 8,     -- GPUs in a node
}

-- What a rank holds of a class of parameters, and how many ranks hold the same.
local function held(class, layout)
  if class.expert then return class.n / layout.experts, layout.gpus / layout.experts end
  return class.n, layout.gpus
end

local function offloads(combo, what) return combo.offload == what or combo.offload == "both" end

-- Adds the student's values of a class: `n` values here, `share` of them updated here. Narrow masters and copies are for quantized
-- linears: what is multiplied with as it is stays F32, with a BF16 copy for products.
local function student(out, class, combo, n, share)
  local wide, copy = combo.copies == "f32", class.trained and class.matrix and 2 or 0
  if class.quantized then
    out.fakequant = out.fakequant + n * (wide and 4 or combo.copies == "bf16" and 2 or packed)
    copy = wide and 2 or 0
  end
  out.student = out.student + n * copy
  if not class.trained then return end
  local whole = not class.quantized -- the forward reads the master itself
  local master = class.quantized and master_bytes[combo.master] * n or 4 * n
  local moments = moment_bytes[class.vector and "f32" or combo.moments] * share
  out.gradients = out.gradients + value_bytes[combo.gradients] * (n + (share < n and share or 0))
  if offloads(combo, "optimizer") then
    local moved = moments + (whole and 0 or master)
    out.host, out.optimizer = out.host + moved, out.optimizer + moved
    master, moments = whole and master or 0, 0
  end
  out.student, out.moments = out.student + master, out.moments + moments
end

-- Bytes on one rank by purpose, `total` and `host`. `model`: classes = list of { n, expert, quantized, matrix (products read a BF16
-- copy), linear (not what embeds, too), product (a token meets it in a product), trained, vector, block (it lies in one) }, block =
-- values of the largest block, quantized_block, work = { f32 = { no = ..., yes = ... }, bf16 = ... } bytes of the work buffers by
-- activations, without and with recompute.
function ranks.bytes(model, combo, layout)
  local out = { host = 0, optimizer = 0, stream = 0 }
  for _, purpose in ipairs(ranks.purposes) do out[purpose] = 0 end
  for _, class in ipairs(model.classes) do
    local n, copies = held(class, layout)
    local teacher = n * (class.linear and 2 or class.matrix and 6 or 4) -- it is BF16 as published
    if combo.cached and class.trained then teacher = 0 end -- frozen ones are the student's
    if offloads(combo, "teacher") and class.block then
      out.host, out.stream = out.host + teacher, out.stream + teacher
    else
      out.teacher = out.teacher + teacher
    end
    student(out, class, combo, n, n / copies)
  end
  if offloads(combo, "teacher") then out.teacher = out.teacher + 2 * 2 * model.block / layout.experts end
  local work = model.work[combo.activations][combo.recompute]
  out.activations, out.scratch = work.activations, work.scratch
  if combo.copies == "packed" then out.scratch = out.scratch + 2 * model.quantized_block / layout.experts end
  out.logits, out.cka, out.total = work.logits, work.cka, 0
  for _, purpose in ipairs(ranks.purposes) do out.total = out.total + out[purpose] end
  return out
end

-- Operations of one token: { linear, attention, scan, forward, teacher, student, backward, again, total }. `shape` holds the model's
-- dimensions; a row is one document of `seq` tokens, so attention looks at half of it.
function ranks.operations(model, combo, seq)
  local s, linear, trained = model.shape, 0, 0
  for _, class in ipairs(model.classes) do
    local met = class.product and class.n * (class.expert and s.top_k / s.experts or 1) or 0
    linear, trained = linear + met, trained + (class.trained and met or 0)
  end
  local attention = s.attention * 4 * (seq / 2) * s.heads * s.head_dim
  local scan = s.mamba * (2 * s.chunk * s.state * s.groups + 2 * s.chunk * s.mamba_head_dim * s.mamba_heads
    + 4 * s.state * s.mamba_head_dim * s.mamba_heads)
  local forward = 2 * linear + attention + scan
  local o = { linear = 2 * linear, attention = attention, scan = scan, forward = forward, student = forward }
  o.teacher = combo.cached and 0 or forward
  o.backward = 2 * linear + 2 * trained + 2 * attention + 2 * scan
  o.again = combo.recompute == "yes" and forward - 2 * s.vocab * s.hidden or 0
  o.total = o.teacher + o.student + o.backward + o.again
  return o
end

-- What a rank sends of a class: gradients, and new weights.
local function sent(class, combo, layout)
  local n, copies = held(class, layout)
  if not class.trained or copies == 1 then return 0, 0, copies end
  local part = n * (copies - 1) / copies
  return part * value_bytes[combo.gradients], part * (class.quantized and packed or 4), copies
end

-- What a rank sends to experts on other ranks and back: teacher 2 ways, forward 2, backward 2, forward again 2.
local function tokens_sent(model, combo, layout, step)
  local s, ways = model.shape, (combo.recompute == "yes" and 8 or 6) - (combo.cached and 2 or 0)
  local away = step.batch * step.seq / layout.gpus * (layout.experts - 1) / layout.experts
  return ways * away * s.moe * s.top_k * s.hidden * value_bytes[combo.activations]
end

-- Bytes that one rank sends in a step: `reduce` (gradients), `gather` (new weights), `tokens` (to experts and back), `total`.
function ranks.moved(model, combo, layout, step)
  local out = { reduce = 0, gather = 0, tokens = tokens_sent(model, combo, layout, step) }
  for _, class in ipairs(model.classes) do
    local reduce, gather = sent(class, combo, layout)
    out.reduce, out.gather = out.reduce + reduce, out.gather + gather
  end
  out.total = out.reduce + out.gather + out.tokens
  return out
end

-- Bytes/s of a ring through `size` ranks that are `stride` apart: through as many network cards as ranks of a node take part.
local function ring(rates, gpus, size, stride)
  if gpus <= rates.per_node or size * stride <= rates.per_node then return rates.link end
  return math.min(rates.link, math.max(1, rates.per_node / stride) * rates.node)
end

-- Seconds between ranks: nothing overlaps with anything.
local function between(model, combo, layout, step, rates)
  local seconds = 0
  for _, class in ipairs(model.classes) do
    local reduce, gather, copies = sent(class, combo, layout)
    seconds = seconds + (reduce + gather) / ring(rates, layout.gpus, copies, class.expert and layout.experts or 1)
  end
  local tokens = tokens_sent(model, combo, layout, step)
  local far = layout.experts > rates.per_node and (layout.experts - rates.per_node) / (layout.experts - 1) or 0
  return seconds + math.max(tokens * (1 - far) / rates.link, tokens * far / rates.node)
end

-- Seconds of the optimizer's pass over memory.
local function update(model, combo, layout, rates)
  local bytes = 0
  for _, class in ipairs(model.classes) do
    if class.trained then
      local n, copies = held(class, layout)
      local copy = class.quantized and (combo.copies == "f32" and 6 or combo.copies == "bf16" and 2 or packed) or 2
      local master = class.quantized and master_bytes[combo.master] or 4
      bytes = bytes + n / copies * (2 * master + 2 * moment_bytes[combo.moments] + value_bytes[combo.gradients] + copy)
    end
  end
  return bytes / rates.copy
end

-- Seconds of a step of `step.batch` rows: { compute, update, unpack, between, host, total }, from `bytes` of the same combination.
function ranks.seconds(model, combo, layout, step, rates, bytes)
  local tokens = step.batch * step.seq / layout.gpus
  local micros = step.batch / (step.micro * layout.gpus)
  model.operations = model.operations or {}
  model.operations[combo.recompute] = model.operations[combo.recompute] or ranks.operations(model, combo, step.seq)
  local o, rate = model.operations[combo.recompute], rates.matmul * rates.fraction
  local out = { compute = (tokens * o.total + micros * model.cka_operations) / rate, update = update(model, combo, layout, rates) }
  local opened = 0
  for _, class in ipairs(model.classes) do
    if class.quantized and combo.copies == "packed" then opened = opened + held(class, layout) * (packed + 2) end
  end
  out.unpack = micros * opened * (combo.recompute == "yes" and 3 or 2) / rates.copy
  out.between = layout.gpus > 1 and between(model, combo, layout, step, rates) or 0
  local hidden = tokens / micros * o.teacher / rate -- the teacher's blocks arrive while it computes
  out.host = micros * math.max(0, bytes.stream / rates.host - hidden) + bytes.optimizer / rates.host
  out.total = out.compute + out.update + out.unpack + out.between + out.host
  return out
end

-- All combinations as a list of { knob = value }.
local function combinations(fixed)
  local list = { {} }
  for _, knob in ipairs(ranks.knobs) do
    local more = {}
    for _, combo in ipairs(list) do
      for _, value in ipairs(knob.values) do
        local wanted = fixed[knob.name]
        if wanted and wanted[value] or not wanted and value ~= "split" then -- split takes F32's bytes: only where it is asked for
          local c = {}
          for key, v in pairs(combo) do c[key] = v end
          c[knob.name] = value
          more[#more + 1] = c
        end
      end
    end
    list = more
  end
  return list
end

-- Layouts of `gpus` GPUs that a model with `experts` routed experts (0: none) can have.
function ranks.layouts(gpus, experts)
  local list = {}
  for n = 1, gpus do
    if n == 1 or (gpus % n == 0 and experts > 0 and experts % n == 0) then list[#list + 1] = { gpus = gpus, experts = n } end
  end
  return list
end

local trouble = { packed = 1, bf16 = 1, teacher = 1, optimizer = 1, both = 2 } -- of `copies` and `offload`

-- What the list is sorted by: fitting ones first, then the nearest; faster; within 5 % the more exact, then what this program has, then
-- the simpler, then the smaller.
local function cost(r)
  local time = math.floor(math.log(r.seconds.total) / math.log(1.05))
  local short = r.fits and 0 or 1e12 + 1e3 * (r.short + r.short_host)
  local simple = (trouble[r.combo.copies] or 0) + (trouble[r.combo.offload] or 0) + (r.layout.experts > 1 and 1 or 0)
  return short + time * 1e6 + r.loss * 1e5 + r.missing * 1e4 + simple * 1e3 + math.min(999, r.bytes.total / 2 ^ 30)
end

-- Every combination and layout of `gpus` GPUs, those that fit first and by expected time: { combo, layout, bytes, seconds, short,
-- short_host, fits, loss, missing, lacks }. `models` = { none = model, experts = model } by what is frozen. Options: `step` { batch,
-- seq, micro }, `limit` and `host` bytes of a GPU and of a node's host (0: any), `rates`, `fixed` (knob name -> set of values),
-- `has(name, value)` and `has_ranks(layout)`: what this program has; `cached`: the teacher's outputs come from a file.
function ranks.search(models, gpus, o)
  local list, nodes = {}, math.min(gpus, o.rates.per_node)
  for _, combo in ipairs(combinations(o.fixed or {})) do
    local model = models[combo.freeze]
    combo.cached = o.cached
    local loss, missing, lacks = 0, 0, {}
    for _, knob in ipairs(ranks.knobs) do
      local value = combo[knob.name]
      loss = loss + (knob.loss and knob.loss[value] or 0)
      if not o.has(knob.name, value) then missing, lacks[knob.name] = missing + 1, true end
    end
    for _, layout in ipairs(model and ranks.layouts(gpus, model.shape.experts) or {}) do
      local bytes = ranks.bytes(model, combo, layout)
      local r = { combo = combo, layout = layout, bytes = bytes, loss = loss, missing = missing, lacks = lacks }
      if gpus > 1 and not o.has_ranks(layout) then
        r.missing, r.lacks_ranks = missing + 1, true
      end
      r.short = math.max(0, bytes.total - o.limit)
      r.short_host = o.host > 0 and math.max(0, bytes.host * nodes - o.host) or 0
      r.fits = r.short == 0 and r.short_host == 0
      r.seconds = ranks.seconds(model, combo, layout, o.step, o.rates, bytes)
      r.cost = cost(r) + 1e-5 * #list -- of equals the earlier: the plainer
      list[#list + 1] = r
    end
  end
  table.sort(list, function(a, b) return a.cost < b.cost end)
  return list
end

return ranks
