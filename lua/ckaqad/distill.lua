-- distill.lua - one micro-batch: both forwards, then a backward with a weight per term.
--
-- On a device nothing waits: a pass that nobody has looked at keeps its results there, in a slot; the first look reads those of all
-- such passes. The optimizer reads them before it changes a weight, at no cost, for it waits for the gradients' norm by then.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local loss = require "ckaqad.loss"
local promise = require "ckaqad.promise"
local ranks = require "ckaqad.ranks"
local select_ = require "ckaqad.select"
local C, call = native.C, native.call

local distill = {}
local Pass = errors.class("pass", {})
local SLOTS = 64

-- Whether results may stay where they are: nil asks the device, true and false are for tests.
distill.deferred = nil
local function may_defer(student, form)
  if form == "policy" or ranks.gram == "ranks" or ranks.moe == "ranks" then return false end
  if distill.deferred ~= nil then return distill.deferred end
  return student.device.on_device
end

local results = { kl = true, ce = true, policy = true, top1 = true, cka = true, weight = true, layer_weight = true }
function Pass.__index(pass, key)
  if results[key] and rawget(pass, "slot") then
    distill.read(pass.student)
    return rawget(pass, key)
  end
  return Pass[key]
end

local forms = {
  full = "CQ_KL_FULL", renormalized = "CQ_KL_RENORMALIZED", truncated = "CQ_KL_TRUNCATED", bucket = "CQ_KL_TAIL_BUCKET",
}
local logit_losses = { kl = "CQ_LOGIT_KL", ce = "CQ_LOGIT_CE", policy = "CQ_LOGIT_POLICY" }
local layer_losses = {
  cka = "CQ_LAYER_CKA", cka_unbiased = "CQ_LAYER_CKA_UNBIASED", cosine = "CQ_LAYER_COSINE", mse = "CQ_LAYER_MSE",
  gram = "CQ_LAYER_GRAM",
}

-- Tokens of a logits chunk: about 64 MiB of F32 for both models, from 64 to 1024 tokens; 1.2 GiB on a device, where each chunk
-- reads the whole head.
function distill.chunk(vocab, on_device)
  local bytes = on_device and 1.2 * 2 ^ 30 or 2 ^ 26
  return math.max(64, math.min(1024, 2 ^ math.floor(math.log(bytes / (8 * vocab)) / math.log(2))))
end

-- The C object of a list of terms; the plan makes it, the student keeps it.
function distill.open(teacher, student, terms, seed, many)
  local logits, layers = loss.split(terms)
  local o, taps = native.new "cq_distill_options", native.new("bool[?]", student.n_blocks)
  o.logit_loss = C[logits and logit_losses[logits.logits] or "CQ_LOGIT_NONE"]
  o.form = C[forms[logits and logits.tail or "full"]]
  o.top_k = logits and logits.top_k and logits.tail ~= "full" and math.min(logits.top_k, student.vocab) or student.vocab
  o.chunk = logits and logits.chunk > 0 and logits.chunk or distill.chunk(student.vocab, student.device.on_device)
  local blocks = layers and select_.blocks(layers.blocks, student.pattern) or {}
  for _, block in ipairs(blocks) do taps[block] = true end
  o.layer_loss = #blocks > 0 and C[layer_losses[layers.layers]] or C.CQ_LAYER_NONE
  o.rows, o.taps, o.seed, o.many = layers and layers.tokens or 0, taps, seed, many
  if logits and logits.logits ~= "kl" and o.layer_loss == C.CQ_LAYER_NONE then teacher = nil end
  if ranks.gram == "ranks" then o.comm = native.comm end
  local later = may_defer(student, logits and logits.logits)
  o.slots = later and SLOTS or 1
  local seen, order, n = {}, native.new("int32_t[?]", student.n_blocks), 0
  for _, block in ipairs(blocks) do seen[block] = true end
  for block in pairs(seen) do order[n], n = block, n + 1 end -- as cq.balance.gap goes through pass.cka
  o.order = order
  if teacher and teacher.cached then o.cached_k = teacher.top_k end
  local c = native.open("cq_distill", "cq_distill_open", teacher and teacher.c, student.c, o)
  student.distillers = student.distillers or {}
  student.distillers[terms] = { c = c, teacher = teacher, logits = logits, layers = layers, blocks = blocks, taps = taps, later = later,
    slot = 0 }
  return student.distillers[terms]
end

-- Puts results into a pass.
local function fill(pass, out)
  local form = pass.d.logits and pass.d.logits.logits
  pass.slot, pass.cka, pass.kl, pass.top1 = nil, {}, out.logit_loss, out.accuracy
  pass.ce = form == "ce" and out.logit_loss or nil
  pass.policy = form == "policy" and out.logit_loss or nil
  for _, block in ipairs(pass.d.blocks) do
    local value = out.layer_loss[block]
    if value == value then pass.cka[block] = 1 - value end
  end
  if pass.by_ratio then pass.weight, pass.layer_weight = { kl = 1, cka = out.weight }, out.weight end
end

local function forward(pass, start, ...)
  local d, part = pass.d, pass.part
  if d.teacher and d.teacher.cached then call.cq_distill_from(d.c, d.teacher:step_file(part.step, part.index)) end
  call[start](d.c, pass.student:stream(), part.c, part.step, part.index, part.valid, ...)
end

local function finite(x) return x - x == 0 end

-- An error when a loss is not a number: that of a forward which waits, where the micro-batch is still there.
local function check(pass, out, there)
  local bad = not finite(out.logit_loss)
  for _, block in ipairs(pass.rows >= 4 and pass.d.blocks or {}) do bad = bad or not finite(out.layer_loss[block]) end
  if not bad then return end
  if there then forward(pass, "cq_distill_forward", native.new "cq_distill_result") end
  errors.raise(errors.NUMERIC, "step %d: a loss of micro-batch %d is not a number", pass.step, pass.part.index)
end

-- Reads what the passes of a student left on its device, after one wait for all of them. `waited`: by the optimizer, in whose step
-- all micro-batches are still there; else the newest is.
function distill.read(student, waited)
  local list = student.unread
  if not list or #list == 0 then return end
  if not waited then call.cq_stream_wait(student:stream()) end
  student.unread = {}
  local out, bad = native.new "cq_distill_result", nil
  for i, pass in ipairs(list) do
    call.cq_distill_read(pass.d.c, pass.slot, out)
    fill(pass, out)
    local ok, e = pcall(check, pass, out, waited or i == #list)
    bad = bad or not ok and e or nil
  end
  if bad then error(bad, 0) end
end

-- A micro-batch's forwards without waiting.
local function start(pass)
  local d, student = pass.d, pass.student
  if student.unread and #student.unread == SLOTS then distill.read(student) end
  pass.slot, d.slot = d.slot, (d.slot + 1) % SLOTS
  forward(pass, "cq_distill_start", pass.slot)
  student.unread = student.unread or {}
  student.unread[#student.unread + 1] = pass
end

--- Both forwards of one micro-batch (`part` of a batch) with a list of terms that the plan knows. `teacher` is nil for
--- cross-entropy, and may be what `cq.cache.open` gives. Returns a pass: `step`, `kl` (nats; the cross-entropy as `ce`, the weighted
--- one as `policy`), `top1` agreement or accuracy, `cka` = { [block] = value } with value = 1 - layer loss (blocks counted from 0,
--- untapped ones absent), `tokens` that are targets, `rows`. On a device the losses stay there until somebody looks at one of
--- `kl`, `ce`, `top1` and `cka`, which waits; `cq.balance.ratio` does not look.
---
--- Example:
---     local pass = cq.distill(teacher, student, part, terms)
---     print(pass.kl > 0, pass.cka[0] <= 1) --> true	true
function distill.distill(teacher, student, part, terms)
  local d = student.distillers and student.distillers[terms]
  if not d then errors.usage("distill: these terms are not in the plan, wanted run:plan { terms = terms, ... }") end
  if d.teacher and d.teacher ~= teacher then errors.usage("distill: the plan was made with another teacher") end
  if native.broken then -- an interrupted step left gradients behind
    native.broken, student.unread = nil, nil
    call.cq_model_zero_grad(student.c)
  end
  local form = d.logits and d.logits.logits
  if form == "policy" then
    if not part.weights then errors.usage("distill: this batch has no weights, which a policy loss needs; wanted one of cq.batch_of") end
    call.cq_distill_set_weights(d.c, part.weights, part.c.tokens)
  end
  local pass = setmetatable({ d = d, student = student, part = part, step = part.step, tokens = tonumber(part.c.valid) }, Pass)
  if d.later then
    start(pass)
    pass.rows = tonumber(C.cq_distill_rows(d.c))
  else
    local out = native.new "cq_distill_result"
    forward(pass, "cq_distill_forward", out)
    pass.rows = tonumber(out.rows)
    fill(pass, out)
  end
  if part.batch then part.batch.passes[#part.batch.passes + 1] = pass end
  return pass
end

-- Whether a pass has layer losses, and so a cka of its tapped blocks.
local function has_layers(pass) return pass.rows >= 4 and #pass.d.blocks > 0 end

local function layer_weights(pass, cka)
  local w, d = native.new("double[?]", pass.student.n_blocks), pass.d
  if type(cka) == "number" then
    for _, block in ipairs(d.blocks) do w[block] = cka / #d.blocks end
    return w
  end
  for block, value in pairs(cka) do
    local known = type(block) == "number" and block >= 0 and block < pass.student.n_blocks and block % 1 == 0 and d.taps[block]
    if not known then errors.usage("backward: block %s has a weight but no cka in this pass", tostring(block)) end
    w[block] = value
  end
  return w
end

-- One number for a weight of the layerwise term: itself, or the mean of the blocks'.
local function mean_weight(cka)
  if type(cka) ~= "table" then return cka end
  local sum, count = 0, 0
  for _, value in pairs(cka) do sum, count = sum + value, count + 1 end
  return count > 0 and sum / count or 0
end

--- Adds the gradient of kl * KL + cka * mean(1 - cka) to the student's parameters.
--- `weights` is what a balance returns: `kl` (1), `cka` a number, or { [block] = weight of its 1 - cka }.
---
--- Example:
---     pass:backward { kl = 1, cka = pass.kl }                   -- one weight for the mean over the tapped blocks
---     pass:backward { kl = 1, cka = { [0] = 0.1, [7] = 0.3 } }  -- or one for each block
function Pass:backward(weights)
  local most = rawget(self, "slot") and promise.most(weights, self)
  if most then
    self.by_ratio = true
    call.cq_distill_backward_ratio(self.d.c, self.student:stream(), self.part.c, most)
    return
  end
  promise.keep(weights)
  local w = errors.fill("backward", weights, { kl = 1, cka = 0 })
  if w.kl ~= w.kl or w.cka ~= w.cka then
    errors.raise(errors.NUMERIC, "step %d: a weight of the balance is not a number", self.step)
  end
  self.weight, self.layer_weight = w, mean_weight(w.cka)
  local layers = has_layers(self) and w.cka ~= 0 and layer_weights(self, w.cka) or nil
  call.cq_distill_backward(self.d.c, self.student:stream(), self.part.c, w.kl, layers)
end

--- Norms of the gradients at the tapped block outputs at weight 1: { kl = { [block] = n }, cka = { [block] = n } }.
---
--- Example:
---     local norms = pass:norms()
---     print(norms.kl[3] > 0, norms.cka[3] > 0) --> true	true
function Pass:norms()
  local n = self.student.n_blocks
  local kl, layer = native.new("double[?]", n), native.new("double[?]", n)
  call.cq_distill_norms(self.d.c, self.student:stream(), self.part.c, kl, layer)
  local out = { kl = {}, cka = {} }
  for block in pairs(self.cka) do out.kl[block], out.cka[block] = kl[block], layer[block] end
  return out
end

return distill
