-- plan_gpus.lua - `--dry-run --gpus=...`: how a recipe's run would fit GPUs that are not here, from config.json alone.
--
-- Parameters are counted and work buffers planned by the code that allocates them on a GPU (a plan that only counts); plan_ranks.lua
-- does the rest. What a combination needs that this program does not have is marked: an option counts as there when the recipe knows
-- it and its list of values (complete_words.lua, held against the program by a test) has the value.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local device = require "ckaqad.device"
local optim = require "ckaqad.optim"
local plan = require "ckaqad.plan"
local ranks = require "ckaqad.plan_ranks"
local select_ = require "ckaqad.select"
local loss = require "ckaqad.loss"
local text = require "ckaqad.text"
local words = require "ckaqad.complete_words"
local C = native.C

local gpus = {}
local RESERVE = 1e9 -- bytes of a GPU for the driver's context, cuBLAS and what lies beside the plan

-- "4", "1,2,4" or "1..16" (powers of two) as a list of GPU counts.
function gpus.counts(value)
  local from, to = value:match "^(%d+)%.%.(%d+)$"
  local list = {}
  if from then
    for i = 0, 20 do
      if 2 ^ i >= tonumber(from) and 2 ^ i <= tonumber(to) then list[#list + 1] = 2 ^ i end
    end
  else
    for item in value:gmatch "[^,]+" do list[#list + 1] = tonumber(item:match "^%s*(%d+)%s*$") or errors.usage(
      "option --gpus: got %q, wanted a count, 1,2,4 or 1..16 (powers of two)", value) end
  end
  for _, n in ipairs(list) do
    if n < 1 or n > 1024 then errors.usage("option --gpus: %d, wanted 1 to 1024", n) end
  end
  return #list > 0 and list or errors.usage("option --gpus: got %q, wanted a count, 1,2,4 or 1..16 (powers of two)", value)
end

-- Planning rates with those of "link=300GB,fraction=0.6" in the place of the defaults.
function gpus.rates(value)
  local number, out, names = require "ckaqad.options".number, {}, {}
  for name, rate in pairs(ranks.rates) do out[name], names[#names + 1] = rate, name end
  for item in value:gmatch "[^,]+" do
    local name, rate = item:match "^%s*([%a_]+)%s*=%s*(.-)%s*$"
    errors.choose("option --rates", name or item, names)
    out[name] = number(rate)
    if not out[name] or out[name] <= 0 then errors.usage("option --rates: %s is %q, wanted a number above 0", name, rate) end
  end
  return out
end

-- From here on models are opened from config.json alone, data from nothing, and nothing can be allocated.
function gpus.imagine(opt)
  if not opt.dry_run then errors.usage("option --gpus: goes with --dry-run, nothing runs on GPUs that are not here") end
  local d = device.current()
  d.offload, d.on_device, d.imagined, d.kernels, d.compute, d.stream.compute = opt.offload or "none", true, true, "cuda", "bf16",
    C.CQ_COMPUTE_BF16
end

local kinds = { "expert", "quantized", "trained", "matrix", "linear", "product", "vector", "block" }

-- Parameters by what decides their bytes and operations; the values of the largest block, and of that with most quantized ones.
local function classes(student)
  local list, by, block, quantized = {}, {}, {}, {}
  local head, largest, opened = C.cq_model_head(student.c), 0, 0
  for p in student:params() do
    local name, n = native.string(p.name), tonumber(C.cq_shape_elems(p.shape))
    local matrix = p.linear or p == head
    local is = {
      expert = name:find(".experts.", 1, true) ~= nil, quantized = p.quantized, trained = p.trainable, matrix = matrix,
      linear = p.linear, -- a teacher has its BF16 form alone
      product = matrix or name:find("gate.weight", 1, true) ~= nil, block = p.block >= 0,
      vector = p.shape.rank < 2 or n < 4096, -- core/train/adamw.c keeps their moments in F32
    }
    local key = 0
    for i, kind in ipairs(kinds) do key = key + (is[kind] and 2 ^ i or 0) end
    local class = by[key]
    if not class then
      class = is
      class.n, by[key], list[#list + 1] = 0, class, class
    end
    class.n = class.n + n
    local b = p.block
    block[b] = (block[b] or 0) + n
    quantized[b] = (quantized[b] or 0) + (p.quantized and n or 0)
  end
  for i, n in pairs(block) do
    if i >= 0 then largest, opened = math.max(largest, n), math.max(opened, quantized[i]) end
  end
  return list, largest, opened
end

local function shape(student)
  local c, out = student.config, {}
  for _, key in ipairs { "top_k", "experts", "heads", "head_dim", "chunk", "vocab", "hidden", "mamba_heads", "mamba_head_dim" } do
    out[key] = tonumber(c[key])
  end
  out.state, out.groups = tonumber(c.mamba_state), tonumber(c.mamba_groups)
  local function count(kind) return tonumber(C.cq_config_count(c, kind:byte())) end
  out.attention, out.mamba, out.moe = count "*" + count "Q", count "M", count "E"
  return out
end

local modes = { no = C.CQ_MODE_SAVE, yes = C.CQ_MODE_RECOMPUTE }
local purposes = {
  teacher = C.CQ_FOR_TEACHER, student = C.CQ_FOR_STUDENT, fakequant = C.CQ_FOR_FAKEQUANT, gradients = C.CQ_FOR_GRADIENT,
  moments = C.CQ_FOR_MOMENTS, activations = C.CQ_FOR_ACTIVATIONS, scratch = C.CQ_FOR_SCRATCH, logits = C.CQ_FOR_LOGITS, cka = C.CQ_FOR_CKA,
}

-- Planned bytes by purpose of a prepared plan.
local function planned(o, mode)
  local count, out = plan.count(o, modes[mode]), { total = 0, host = 0, optimizer = 0, stream = 0 }
  for name, purpose in pairs(purposes) do
    out[name] = count[tonumber(purpose)] + (name == "scratch" and count[tonumber(C.CQ_FOR_KERNELS)] or 0)
    out.total = out.total + out[name]
  end
  out.stream, out.optimizer = count[tonumber(C.CQ_FOR_HOST_TEACHER)], count[tonumber(C.CQ_FOR_HOST_OPTIMIZER)]
  out.host = out.stream + out.optimizer
  return out
end

local stored = { f32 = C.CQ_F32, bf16 = C.CQ_BF16 }

-- How the models of a prepared plan keep activations inside of blocks.
local function set_activations(o, value)
  for _, m in ipairs { o.teacher, o.student } do C.cq_model_set_activations(m.c, stored[value]) end
end

-- What plan_ranks takes of a prepared plan; `planned` holds what the plan declares, by activations, without and with recompute.
function gpus.model(o)
  local list, block, quantized = classes(o.student)
  local model = { classes = list, block = block, quantized_block = quantized, shape = shape(o.student), planned = {}, work = {} }
  for _, value in ipairs { "bf16", "f32" } do
    set_activations(o, value)
    model.planned[value], model.work[value] = {}, {}
    for mode in pairs(modes) do
      local p = planned(o, mode)
      model.planned[value][mode], model.work[value][mode] = p, {}
      for _, name in ipairs { "activations", "scratch", "logits", "cka" } do model.work[value][mode][name] = p[name] end
    end
  end
  local _, layers = loss.split(o.lists[1] or { { logits = "kl" } })
  local taps = layers and #select_.blocks(layers.blocks, o.student.pattern) or 0
  model.cka_operations = layers and 6 * math.min(layers.tokens, o.tokens) ^ 2 * o.student.hidden * taps or 0
  return model
end

-- The same plan with other parameters frozen (`globs`; nil: the same) and other options of the optimizer.
local function variant(o, options, globs, changes)
  local copy, quant, adam = {}, {}, {}
  for key, value in pairs(options) do copy[key] = value end
  for key, value in pairs(o.student.quant) do quant[key] = value end
  for key, value in pairs(o.adam.options) do adam[key] = changes[key] or value end
  quant.freeze, quant.copies = globs or quant.freeze, changes.copies or quant.copies
  copy.student = o.teacher:quantize(quant)
  for _, m in ipairs { o.teacher, copy.student } do m:set_offload(changes.offload or "none") end
  copy.adam = optim.adamw(copy.student, adam)
  copy = plan.prepare(copy)
  set_activations(copy, changes.activations or "f32")
  return copy
end

-- Tokens of a micro-batch with which a combination just fits: activations and scratch grow with them.
local function longest(r, o)
  local per_token = (r.bytes.activations + r.bytes.scratch) / o.tokens
  return math.max(0, math.floor((o.limit - r.bytes.total) / per_token + o.tokens))
end

-- Shorter micro-batches would do, perhaps.
local function tokens_hint(r, o)
  local n = longest(r, o)
  return n >= 256 and (" (a micro-batch of %d tokens would fit)"):format(n) or ""
end

local function gib(bytes) return ("%.1f"):format(bytes / 2 ^ 30) end

-- What a combination is made of, where it differs from all F32 with kept activations; "*" behind what is not there.
local function describe(r)
  local parts = {}
  if r.layout.gpus > 1 then
    local name = r.layout.experts > 1 and ("experts over %d"):format(r.layout.experts) or "data parallel"
    parts[1] = name .. (r.lacks_ranks and "*" or "")
  end
  for _, knob in ipairs(ranks.knobs) do
    local value = r.combo[knob.name]
    if value ~= knob.values[1] and knob.name ~= "freeze" then
      local name = knob.name == "recompute" and "recompute" or knob.name .. "=" .. value
      parts[#parts + 1] = name .. (r.lacks[knob.name] and "*" or "")
    end
  end
  return #parts > 0 and table.concat(parts, ", ") or "all F32"
end

-- One row for what is trained: the fastest that fits, the fastest that is exact, and the fastest that is there today.
local function choose(list)
  local picked, seen, rows = {}, {}, {}
  for _, r in ipairs(list) do
    for _, want in ipairs { "any", "exact", "there" } do
      local key = r.combo.freeze .. want
      local right = want == "any" or (want == "exact" and r.loss == 0) or (want == "there" and r.missing == 0)
      if right and not picked[key] then
        picked[key] = r
        if not seen[r] then seen[r], rows[#rows + 1] = true, r end
      end
    end
  end
  return rows
end

-- A combination that the program has takes, on one GPU, what the plan declares for it: to the byte.
local function declared(r, o, options, search)
  if r.layout.gpus > 1 or r.missing > 0 then return end
  local globs = r.combo.freeze == "experts" and "*.experts.*" or nil
  local sum = r.bytes
  local c = r.combo
  local changes = { moments = c.moments, master = c.master, activations = c.activations, copies = c.copies, offload = c.offload }
  r.bytes = planned(variant(o, options, globs, changes), r.combo.recompute)
  if search.cached then r.bytes.teacher, r.bytes.total = sum.teacher, r.bytes.total - r.bytes.teacher + sum.teacher end
  r.short = math.max(0, r.bytes.total - search.limit)
  r.short_host = search.host > 0 and math.max(0, r.bytes.host - search.host) or 0
  r.fits = r.short == 0 and r.short_host == 0
end

local trained_names = { none = "all parameters", experts = "all but routed experts" }

local function row(n, r, o)
  local fit = r.fits and "yes" or r.short > 0 and ("%s short"):format(gib(r.short)) or ("host %s short"):format(gib(r.short_host))
  local rate = o.step.batch * o.step.seq / n / r.seconds.total
  return { ("%d"):format(n), fit, gib(r.bytes.total), r.bytes.host > 0 and gib(r.bytes.host) or "-", ("%.1f"):format(r.seconds.total),
    ("%.0f"):format(rate), r.fits and ("%d"):format(longest(r, o)) or "-", trained_names[r.combo.freeze] or "as --freeze says",
    describe(r) }
end

-- Rows are left-aligned in their last two columns.
local function lines_of(rows)
  local tails, body = {}, {}
  for i, cells in ipairs(rows) do
    tails[i], body[i] = {}, {}
    for k, cell in ipairs(cells) do
      if k > 7 then tails[i][k - 7] = cell else body[i][k] = cell end
    end
  end
  local width = 0
  for _, tail in ipairs(tails) do width = math.max(width, #tail[1]) end
  local lines = text.table(body, "  ")
  for i, line in ipairs(lines) do lines[i] = ("%s  %s%s  %s"):format(line, tails[i][1], (" "):rep(width - #tails[i][1]), tails[i][2]) end
  return lines
end

local purpose_names = {
  teacher = "teacher weights", student = "student weights", fakequant = "fake-quantized copies", gradients = "gradients",
  moments = "AdamW moments", activations = "activations", scratch = "scratch", logits = "logits", cka = "CKA",
}

-- Combinations side by side: bytes by purpose, operations, bytes between ranks, seconds.
local function details(best, models, o)
  local head, rows = { "a rank of" }, {}
  local function add(name, f)
    local cells = { name }
    for i, b in ipairs(best) do cells[i + 1] = f(b, models[b.combo.freeze]) end
    rows[#rows + 1] = cells
  end
  for i, b in ipairs(best) do head[i + 1] = ("%d GPU%s"):format(b.layout.gpus, b.layout.gpus > 1 and "s" or "") end
  rows[1] = head
  for _, purpose in ipairs(ranks.purposes) do
    add(purpose_names[purpose] .. ", GiB", function(b) return gib(b.bytes[purpose]) end)
  end
  add("total, GiB", function(b) return gib(b.bytes.total) end)
  add("on the host, GiB", function(b) return gib(b.bytes.host) end)
  add("operations a step, TFLOP", function(b, m)
    local per_token = ranks.operations(m, b.combo, o.step.seq).total
    local tokens = o.step.batch * o.step.seq / b.layout.gpus
    return ("%.0f"):format((per_token * tokens + m.cka_operations * o.step.batch / o.step.micro / b.layout.gpus) / 1e12)
  end)
  for _, part in ipairs { { "reduce", "gradients reduced" }, { "gather", "new weights gathered" }, { "tokens", "tokens to experts" } } do
    add(part[2] .. ", GB sent", function(b, m)
      return ("%.2f"):format(ranks.moved(m, b.combo, b.layout, o.step)[part[1]] / 1e9)
    end)
  end
  for _, part in ipairs { { "compute", "products" }, { "update", "AdamW" }, { "unpack", "opening packed weights" },
    { "between", "between ranks" }, { "host", "host link" }, { "total", "a step" } } do
    add(part[2] .. ", s", function(b) return ("%.2f"):format(b.seconds[part[1]]) end)
  end
  return text.table(rows, "  ")
end

local function holds(list, wanted)
  for _, word in ipairs(list or {}) do
    if word == wanted then return true end
  end
  return false
end

-- Whether a recipe's option of a knob's name is that knob.
local function is_option(opt, knob)
  return rawget(opt, knob.name) ~= nil and (knob.name == "freeze" or holds(words.values[knob.name], knob.values[1]))
end

-- Whether the program has a knob's value.
local function has(opt)
  local by = {}
  for _, knob in ipairs(ranks.knobs) do by[knob.name] = knob end
  return function(name, value)
    local knob = by[name]
    if value == knob.values[1] or name == "recompute" then return true end
    return is_option(opt, knob) and (name == "freeze" or holds(words.values[name], value))
  end
end

local function header(o, list, opt)
  local r, n = o.rates, table.concat(list, ", ")
  local lines = {
    ("plan for %s GPU%s of %.4g GB (%s GiB, of which 1 GB is kept back), from config.json alone, for BF16 products"):format(n,
      n == "1" and "" or "s", opt.gpu_memory / 1e9, gib(opt.gpu_memory)),
    ("  a step: %d rows of %d tokens, %d a micro-batch"):format(o.step.batch, o.step.seq, o.step.micro),
    ("  rates: products %.0f TFLOP/s (measured, H200) x %.2f in a whole step (measured, Qwen3-4B),"):format(r.matmul / 1e12, r.fraction),
    ("    memory %.1f TB/s (measured, H200); assumed: %.0f GB/s in a node, %.0f GB/s a GPU between nodes of %d, %.0f GB/s to the host,")
      :format(r.copy / 1e12, r.link / 1e9, r.node / 1e9, r.per_node, r.host / 1e9),
    "    experts chosen evenly; nothing overlaps but a streamed teacher with its own forward",
  }
  if o.cached then lines[#lines + 1] = "  the teacher's outputs come from a cache, which is not read now" end
  if o.student.family == "nemotron_h" then
    lines[#lines + 1] = "    Mamba-2 and MoE blocks are slower: 0.16 was measured on 8 of Nemotron 3 Nano's (--rates=fraction=0.16)"
  end
  return lines
end

-- What the columns mean.
local legend = {
  "  *: not in this program yet, added up; rows of one GPU without * are what it would allocate",
  "  GiB: of a rank; host: GiB on the host for a rank; tokens/s: of a GPU; longest: tokens of a micro-batch that would fit",
}

-- Prints the plan of a prepared run and leaves: exit 0, or out of memory with the smallest shortfall when nothing fits.
function gpus.show(say, opt, options)
  local o = plan.prepare(options)
  if not (o.teacher and o.adam and o.data) then
    errors.usage("option --gpus: this recipe does not distil, wanted a plan with teacher, adam and data")
  end
  local list = gpus.counts(opt.gpus)
  local data = o.data
  local typed = rawget(opt, "freeze") ~= nil and opt.freeze ~= ""
  local search = {
    step = { batch = data.batch, seq = data.seq, micro = data.micro }, limit = opt.gpu_memory - RESERVE, host = opt.host_memory,
    rates = gpus.rates(opt.rates), has = has(opt), has_ranks = function(layout) return layout.experts == 1 end, fixed = {},
    student = o.student, tokens = o.tokens, cached = (rawget(opt, "teacher_cache") or "") ~= "",
  }
  for _, knob in ipairs(ranks.knobs) do
    local typed_too = knob.name ~= "freeze" and is_option(opt, knob) and opt.given[knob.name]
    if typed_too then search.fixed[knob.name] = { [opt[knob.name]] = true } end
  end
  local models = { none = gpus.model(o) }
  if models.none.shape.experts > 0 and not typed and rawget(opt, "freeze") ~= nil and o.student.quant then
    models.experts = gpus.model(variant(o, options, "*.experts.*", {}))
  end
  trained_names.none = typed and "all but " .. opt.freeze or "all parameters"
  for _, line in ipairs(header(search, list, opt)) do say(line) end
  local rows, best, nearest = { { "GPUs", "fits", "GiB", "host", "s/step", "tokens/s", "longest", "trained", "how" } }, {}, nil
  local all = {}
  for _, n in ipairs(list) do
    if data.batch % (n * data.micro) ~= 0 then
      say(("  %d GPUs: %d rows a step are no multiple of %d ranks with %d rows a micro-batch"):format(n, data.batch, n, data.micro))
    else
      local found = ranks.search(models, n, search)
      for _, r in ipairs(choose(found)) do
        all[#all + 1] = r
        declared(r, o, options, search)
        rows[#rows + 1] = row(n, r, search)
      end
      if found[1].fits then best[#best + 1] = found[1] end
      if not nearest or found[1].short + found[1].short_host < nearest.short + nearest.short_host then nearest = found[1] end
    end
  end
  for _, line in ipairs(lines_of(rows)) do say(line) end
  for _, line in ipairs(legend) do say(line) end
  if #best == 0 then
    errors.raise(errors.NOMEM, "plan: nothing fits%s", nearest and (": the nearest on %d GPU%s is %s GiB short with %s%s"):format(
      nearest.layout.gpus, nearest.layout.gpus > 1 and "s" or "", gib(math.max(nearest.short, nearest.short_host)), describe(nearest),
      tokens_hint(nearest, search)) or "")
  end
  say(#list > 1 and "the first of each:" or "the same, in their order:")
  for _, line in ipairs(details(#list > 1 and best or all, models, search)) do say(line) end
  errors.exit(0)
end

return gpus
