-- plan.lua - every buffer of a run is declared before the first one is allocated, and the table of them is printed.
--
-- Activations are kept for backward (save) when that fits the limit, else block inputs only (recompute). Scratch, logits
-- and Grams of things that are never alive together share bytes: teacher and student, training and evaluation.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local distill = require "ckaqad.distill"
local eval = require "ckaqad.eval"
local generate = require "ckaqad.generate"
local loss = require "ckaqad.loss"
local text = require "ckaqad.text"
local C, call = native.C, native.call

local plan = {}

-- One list of terms or several.
local function term_lists(terms)
  if not terms then return {} end
  local first = terms[1]
  return type(first) == "table" and (first.logits or first.layers) and { terms } or terms
end

-- Runs each function with the purposes' regions starting at the same place.
local function side_by_side(p, purposes, functions)
  local marks = {}
  for _, purpose in ipairs(purposes) do marks[purpose] = C.cq_plan_mark(p, purpose) end
  for i, f in ipairs(functions) do
    f()
    for _, purpose in ipairs(purposes) do
      if i < #functions then C.cq_plan_rewind(p, purpose, marks[purpose]) end
    end
  end
end

local function declare(o, mode)
  local p = native.open("cq_plan", "cq_plan_open")
  if o.student.device.imagined then C.cq_plan_imagine(p) else C.cq_plan_place(p, o.student.device.stream) end
  local tokens, longest, trained = o.tokens, o.longest, o.trained
  local models = {}
  if o.teacher and not o.teacher.cached then models[1] = { o.teacher, C.CQ_MODE_INFER, false } end
  models[#models + 1] = { o.student, trained and mode or C.CQ_MODE_INFER, trained }
  for _, m in ipairs(models) do call.cq_model_plan_params(m[1].c, p, m[3]) end
  if o.adam then call.cq_adamw_plan(o.adam.c, p) end
  local work = {}
  for i, m in ipairs(models) do
    work[i] = function() call.cq_model_plan_work(m[1].c, p, tokens, longest, m[2], m[1].device.threads) end
  end
  side_by_side(p, { C.CQ_FOR_SCRATCH }, work)
  local heads = {}
  for _, terms in ipairs(o.lists) do
    heads[#heads + 1] = function() call.cq_distill_plan(o.student.distillers[terms].c, p, tokens) end
  end
  if o.eval then
    local e = o.student.evaluators[o.teacher]
    local chunk = distill.chunk(o.student.vocab, o.student.device.on_device)
    heads[#heads + 1] = function() call.cq_eval_plan(e, p, tokens, math.min(tokens, chunk)) end
  end
  if o.cache then heads[#heads + 1] = function() call.cq_recorder_plan(o.cache.c, p, tokens) end end
  side_by_side(p, { C.CQ_FOR_LOGITS, C.CQ_FOR_CKA }, heads)
  if o.generate then generate.declare(o.student, p, o.generate) end
  return p
end

-- Bytes by purpose (numbered as in core/tensor/plan.h) of what plan.plan would declare with these options and activations mode.
function plan.count(o, mode)
  local p, bytes = declare(o, mode), {}
  for purpose = 0, tonumber(C.CQ_N_PURPOSES) do bytes[purpose] = tonumber(C.cq_plan_bytes(p, purpose)) end
  native.close(p, "cq_plan")
  return bytes
end

local function on_host(p) return tonumber(C.cq_plan_bytes(p, C.CQ_FOR_HOST_TEACHER) + C.cq_plan_bytes(p, C.CQ_FOR_HOST_OPTIMIZER)) end
local function total(p) return tonumber(C.cq_plan_bytes(p, C.CQ_N_PURPOSES)) end

-- oneDNN packs operands in buffers of its own, outside the plan: about 8 MiB a thread, measured.
local function library_bytes(d)
  local packs = d.kernels == "cpu" and native.version:find("oneDNN %d") ~= nil
  return packs and d.threads * 2 ^ 23 or 0
end

local function lines_of(self)
  local rows = {}
  for purpose = 0, tonumber(C.CQ_N_PURPOSES) - 1 do
    local bytes = tonumber(C.cq_plan_bytes(self.c, purpose))
    if bytes > 0 and purpose ~= C.CQ_FOR_RESULTS then rows[#rows + 1] = { native.string(C.cq_purpose_name(purpose)), text.bytes(bytes) } end
  end
  if self.mapped > 0 then rows[#rows + 1] = { "file of the cache", text.bytes(self.mapped) } end
  if self.library > 0 then rows[#rows + 1] = { "oneDNN's own, about", text.bytes(self.library) } end
  rows[#rows + 1] = { self.host > 0 and "total on the GPU" or "total", text.bytes(self.bytes) }
  local choice = not self.trained and "forward only" or self.mode == C.CQ_MODE_SAVE and "activations saved" or
    "activations recomputed: saving them would need " .. text.bytes(self.saved_bytes)
  local lines = { ("memory plan, %d tokens a micro-batch, %s:"):format(self.tokens, choice) }
  for _, line in ipairs(text.table(rows, "  ")) do lines[#lines + 1] = line end
  return lines
end

-- The options of plan.plan with what follows from them; makes the objects of the losses.
function plan.prepare(options)
  local o = errors.fill("plan", options, {
    teacher = errors.NONE, student = errors.NONE, adam = errors.NONE, terms = errors.NONE, data = errors.NONE, tokens = 0,
    longest = 0, cache = errors.NONE, eval = false, generate = errors.NONE, seed = 1, limit = 0, load = true, trained = false,
    show = errors.NONE, dry = false,
  })
  o.trained = o.trained or o.adam ~= nil
  if not o.student then errors.usage("plan: student is missing") end
  if o.data then o.tokens, o.longest = o.data.micro * o.data.seq, o.data.seq end
  if o.longest == 0 then o.longest = o.tokens end
  o.lists = term_lists(o.terms)
  if o.teacher and o.teacher.cached then call.cq_model_alone(o.student.c) end
  local many = o.data ~= nil and o.data.batch > o.data.micro
  for _, terms in ipairs(o.lists) do many = many or (loss.split(terms) or {}).logits == "policy" end -- as many as its answers need
  for _, terms in ipairs(o.lists) do distill.open(o.teacher, o.student, terms, o.seed, many) end
  if o.eval then eval.open(o.teacher, o.student) end
  return o
end

--- Plans, allocates and loads models. Options: `teacher`, `student`, `adam` (absent: forward only), `terms` (one list or a
--- list of lists), `cache` (of `cq.cache.create`), `data` (its `micro` * `seq` tokens), or `tokens` and `longest`; `eval` (true: the
--- pair can be compared), `generate` ({ slots, room }: sequences that the student writes at once and their tokens; absent:
--- `student:generate` plans its memory when it is called), `seed` (sampled rows), `limit` in bytes (0: what the system has), `load`
--- (false: weights come from `model:init`), `trained` (gradients without `adam`), `dry` (true: nothing is allocated or loaded).
--- Returns { bytes, mode, lines, before (peak before the first planned allocation) }.
---
--- Example:
---     local model = cq.model.open(opt.model)
---     local p = cq.plan { student = model, tokens = 256, dry = true }
---     for _, line in ipairs(p.lines) do print(line) end
function plan.plan(options)
  local o = plan.prepare(options)
  local limit = o.limit > 0 and o.limit or tonumber(C.cq_stream_available(o.student.device.stream))
  local p, mode = declare(o, C.CQ_MODE_SAVE), C.CQ_MODE_SAVE
  local saved_bytes = total(p)
  if o.trained and saved_bytes > limit then
    native.close(p, "cq_plan")
    p, mode = declare(o, C.CQ_MODE_RECOMPUTE), C.CQ_MODE_RECOMPUTE
  end
  local library, mapped = library_bytes(o.student.device), o.teacher and o.teacher.cached and o.teacher:largest() or 0
  local self = {
    c = p, mode = mode, bytes = total(p) + library + mapped, library = library, mapped = mapped, host = on_host(p),
    saved_bytes = saved_bytes,
    trained = o.trained, tokens = o.tokens,
    before = native.peak_bytes(), free = o.student.device.on_device and tonumber(C.cq_stream_available(o.student.device.stream)),
  }
  self.lines = lines_of(self)
  if o.show then o.show(self) end
  if o.dry then return self end
  call.cq_plan_commit(p, o.limit)
  if not o.generate then generate.replanned(o.student) end
  if o.teacher and not o.teacher.cached then generate.replanned(o.teacher) end
  o.student.plan, o.student.adam = self, o.adam
  if o.teacher and not o.teacher.cached then
    o.teacher.plan = self
    if o.teacher.random then o.teacher:init(o.seed) else call.cq_model_load(o.teacher.c) end
  end
  if o.load and not o.student.random then call.cq_model_load(o.student.c) end
  local both = { o.teacher and not o.teacher.cached and o.teacher or o.student, o.student }
  for _, model in ipairs(both) do
    if o.load and not model.random then call.cq_model_round_weights(model.c, model:stream(), false) end
  end
  return self
end

return plan
