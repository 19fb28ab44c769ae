-- run.lua - one run of a recipe: its options, what it prints, its folder, its loop.
--
-- Nothing is written before models and documents have been read, planned and loaded, so bad input leaves no half of a run.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local device = require "ckaqad.device"
local dry = require "ckaqad.dry"
local eval = require "ckaqad.eval"
local folder = require "ckaqad.folder"
local hf = require "ckaqad.hf"
local json = require "ckaqad.json"
local model = require "ckaqad.model"
local plan = require "ckaqad.plan"
local preset = require "ckaqad.preset"
local ranks = require "ckaqad.ranks"
local report = require "ckaqad.report"
local screen = require "ckaqad.screen"
local tensorboard = require "ckaqad.tensorboard"
local text = require "ckaqad.text"

local call = native.call
local run = {}
local current -- the run that an error ends
local Run = errors.class("run", {})

-- The folder that holds the embedded teacher: beside the recipe, or where the program was installed or built.
local function embedded(recipe)
  local ok, host = pcall(require, "ckaqad.host")
  local bin = ok and host.exe and host.exe:match("^(.*)/[^/]*$")
  local places = { (recipe:match("^(.*)/[^/]*$") or ".") .. "/lab/teacher", "recipes/lab/teacher" }
  if bin then
    places[#places + 1] = bin .. "/../recipes/lab/teacher"
    places[#places + 1] = bin .. "/../share/ckaqad/recipes/lab/teacher"
  end
  for _, place in ipairs(places) do
    if hf.exists(place .. "/config.json") then return place end
  end
  errors.raise(errors.DATA, "embedded teacher: %s/config.json is missing, wanted --model=DIR", places[1])
end

local function choose_model(opt, named)
  if opt.model ~= "auto" then
    local dir = hf.resolve(opt.model)
    return dir, dir == opt.model and dir or ("%s (%s)"):format(opt.model, dir)
  end
  local dir, why = nil, "the recipe names no model"
  if named then dir, why = hf.cached(named) end
  if dir then return dir, ("%s (auto: found in the Hugging Face cache, %s)"):format(named, dir) end
  dir = embedded(opt.recipe)
  return dir, ("%s (auto: the embedded teacher; %s)"):format(dir, why)
end

local function choose_data(opt)
  if opt.data ~= "auto" then return opt.data end
  local dir = embedded(opt.recipe)
  opt.data = dir .. "/train.jsonl"
  if rawget(opt, "holdout") == "" then opt.holdout = dir .. "/holdout.jsonl" end
  if rawget(opt, "mask") and not opt.given.mask then opt.mask = "assistant" end -- its prompts are random, only answers can be learnt
  return ("%s (auto: the embedded text%s)"):format(opt.data, rawget(opt, "mask") == "assistant" and ", targets in its answers" or "")
end

-- A run that goes on adds up its micro-batches as it did before, on however many ranks.
local function goes_on_as(place)
  local state = place.same and place:state()
  if not state then return end
  ranks.ordered = ranks.ordered or state.ordered == true
  ranks.micro = state.micro or 0
  if state.gram and state.gram ~= ranks.gram then
    errors.usage("option --gram: %s, the run in %s had %s, wanted that or --fresh", ranks.gram, place.path, state.gram)
  end
end

--- Starts a run from a recipe's options. Chooses device, model (`auto`: `named` when the Hugging Face cache has it, else the
--- embedded teacher), preset and documents, puts the choices into `opt`, prints them, and checks the output folder.
--- `quiet`: what the run says is kept for log.txt and not printed.
---
--- Example:
---     local opt = cq.options { model = "auto", data = "auto", holdout = "", preset = "auto", out = "try", seq = 0, batch = 0 }
---     local run = cq.run(opt)
---     print(opt.preset, opt.seq, opt.batch) --> tiny	256	8
function run.run(opt, given)
  local o = errors.fill("run", given, { named = errors.NONE, quiet = false })
  local self = setmetatable({ opt = opt, early = {}, history = {}, evals = {}, facts = {}, started_at = native.clock(),
    quiet = o.quiet }, Run)
  self.screen = screen.open(function(line) self:note(line) end, native.columns)
  local imagined = opt.gpus ~= ""
  native.C.cq_comm_set_patience(native.comm, opt.patience)
  ranks.ordered, ranks.gram = opt.ordered, errors.choose("option --gram", opt.gram, { "micro", "ranks" })
  ranks.moe = errors.choose("option --moe", opt.moe, { "local", "ranks" })
  self.device = device.device { device = imagined and "cpu" or opt.device, threads = opt.threads, kernels = opt.kernels,
    compute = opt.compute, copies = opt.copies, offload = imagined and "none" or opt.offload,
    activations = imagined and "f32" or opt.activations, graphs = opt.graphs, check = opt.check }
  if imagined then require "ckaqad.plan_gpus".imagine(opt) end
  local elsewhere = (rawget(opt, "server") or "") ~= "" -- the model is a server's
  local has_model = not elsewhere and (rawget(opt, "model") or rawget(opt, "teacher"))
  local said
  if has_model and rawget(opt, "model") then
    opt.model, said = choose_model(opt, o.named)
  elseif has_model then
    opt.teacher = hf.resolve(opt.teacher)
    opt.student = hf.resolve(opt.student)
  end
  if has_model and rawget(opt, "preset") then
    self:say(preset.apply(opt, model.count(rawget(opt, "model") or opt.teacher)))
  end
  if said then self:say("model " .. said) end
  if rawget(opt, "data") and not imagined then self:say("data %s", choose_data(opt)) end
  if rawget(opt, "out") then
    local out = opt.out:gsub("(.)/+$", "%1")
    self.folder = folder.open(out, opt)
    goes_on_as(self.folder)
    local done = self.folder.same and folder.read_json(out .. "/summary.json")
    local ended = done and (done.after or not done.before and (done.steps or 0) > 0) -- trained, with or without a comparison
    if ended and not opt.dry_run and not opt.validate_only then
      self:say("finished already%s: %s (--fresh runs it again)",
        done.after and (", KL %.4f -> %.4f"):format(done.before.kl, done.after.kl) or "", out)
      errors.exit(0)
    end
  end
  current = self
  if imagined then return self end
  self:say("device %s, %d threads, %s kernels (%s)%s", native.version, self.device.threads, self.device.kernels, self.device.isa,
    (self.device.compute ~= "f32" and (", %s matrix products"):format(self.device.compute) or "") ..
    (self.device.activations == "bf16" and " and activations" or ""))
  if ranks.many then
    self:say("%d ranks, %s%s", ranks.size, native.string(native.C.cq_comm_backend(native.comm)),
      ranks.moe == "ranks" and ", experts dealt out" or "")
  end
  return self
end

--- Prints a line (printf format) and puts it into log.txt.
---
--- Example:
---     run:say("lowest CKA %.3f at block %d", 0.971, 4)
function Run:say(format, ...)
  local line = select("#", ...) > 0 and tostring(format):format(...) or tostring(format)
  if self.quiet then return self:note(line) end
  self.screen:say(line)
end

--- Puts a line into log.txt without printing it; lines wait until the folder exists.
function Run:note(line)
  if not ranks.first then return end
  if self.made then return self.folder:append("log.txt", line) end
  self.early[#self.early + 1] = line
end

-- What must be the same on all ranks: the program, options that make the run what it is, documents.
local function agree(self)
  if not ranks.many then return end
  ranks.agree("program", native.version .. native.sha256("/proc/self/exe"))
  for _, key in ipairs(self.opt.order) do
    if key ~= "threads" then ranks.agree("option --" .. key, tostring(rawget(self.opt, key))) end
  end
  local model_ = self.facts.model
  ranks.agree("model", model_ and json.encode(folder.hashes(model_.dir)) or "")
  ranks.agree("data", self.facts.data and self.facts.data:facts().train.sha256 or "")
end

--- Makes the folder, writes run.json and the lines said so far. `unfinished`: work that goes on lies there, besides checkpoints.
function Run:begin(unfinished)
  if not self.folder or self.made or self.joined then return end
  agree(self)
  local stopped = self.folder.same and not hf.exists(self.folder.path .. "/summary.json")
  self.resumable = ranks.decide(stopped and self.folder:latest() and self.facts.adam ~= nil)
  local goes_on = self.resumable or (stopped and unfinished)
  if self.opt.resume and not goes_on then
    errors.usage("option --resume: %s holds no stopped run of these options, wanted one (or leave --resume out)", self.folder.path)
  end
  self.joined = not ranks.first -- the folder is rank 0's
  if self.joined then return end
  self.folder:make(goes_on)
  self.made = true
  self.folder:record(self)
  for _, line in ipairs(self.early) do self:note(line) end
end

-- Removes the folder of a run that failed before its first step or result: nothing half-written stays.
function run.abandon()
  if not current or not current.made then return end
  if #current.history == 0 and not current.kept then return current.folder:remove() end
  current.folder:unlock()
end

--- Plans, prints the planned bytes by purpose, allocates and loads; then makes the run folder.
--- Takes what `cq.plan` takes; `limit` and `seed` come from the options.
function Run:plan(options)
  local o = {}
  for key, value in pairs(options) do o[key] = value end
  o.limit = o.limit or self.opt.memory
  o.seed = o.seed or rawget(self.opt, "seed") or 1
  o.show = function(p)
    for _, line in ipairs(p.lines) do self:say(line) end
  end
  if o.teacher then self:say("teacher %s", o.teacher:describe()) end
  if o.student.quant then
    for _, line in ipairs(o.student:quantization()) do self:say(line) end
  else
    self:say("%s %s%s", o.cache and "teacher" or "student", o.student:describe(), o.student.nvfp4 and ", NVFP4" or "")
  end
  if self.opt.gpus ~= "" then
    o.show = nil
    return require "ckaqad.plan_gpus".show(function(line) self:say(line) end, self.opt, o)
  end
  if o.data then
    for _, line in ipairs(o.data:describe()) do self:say(line) end
  end
  self.facts = { model = o.teacher and (o.teacher.model or o.teacher) or o.student, data = o.data, adam = o.adam }
  o.dry = self.opt.dry_run
  self.plan_made = plan.plan(o)
  if o.dry then
    for _, line in ipairs(dry.lines(self.opt, o)) do self:say(line) end
    errors.exit(0)
  end
  self:begin()
  return self.plan_made
end

--- Calibrates a student on the first `n` training documents and says what came of it.
function Run:calibrate(student, data, n)
  local unreached = student:calibrate(data:take(n))
  self:say("calibrated on %d documents%s", math.min(n, data:facts().train.documents),
    unreached > 0 and (", %d expert projections saw no token and take their layer's largest maximum"):format(unreached) or "")
end

-- Keeps an evaluation in evals.jsonl; a resumed run has it there already.
local function keep(self, step, r)
  for _, known in ipairs(self.evals) do
    if known.step == step then return end
  end
  self.evals[#self.evals + 1] = { step = step, kl = r.kl }
  if not self.made then return end
  self.folder:append("evals.jsonl", json.encode(json.object {
    "step", step, "kl", r.kl, "perplexity", r.perplexity, "perplexity_teacher", r.perplexity_teacher, "top1", r.top1, "cka", r.cka,
    "cka_min", r.cka_min, "cka_min_block", r.cka_min_block, "cka_blocks", json.array(r.cka_blocks),
  }))
end

-- The step of the lowest KL among the evaluations after step 0.
local function best(self)
  local found
  for _, e in ipairs(self.evals) do
    if e.step > 0 and (not found or e.kl < found.kl) then found = e end
  end
  return found and found.step
end

local function say_result(self, name, r)
  self:say("%s: KL %.4f, perplexity %.4f (BF16 %.4f), top-1 %.4f, CKA %.4f, lowest %.4f at block %d, %d held-out tokens", name,
    r.kl, r.perplexity, r.perplexity_teacher, r.top1, r.cka, r.cka_min, r.cka_min_block, r.tokens)
end

--- Says how a compared pair stands, in one line, and keeps it in evals.jsonl: as step 0 before the loop, as the last step after.
function Run:result(name, r)
  say_result(self, name, r)
  if self.resumable and #self.evals == 0 then self.evals = self.folder:rewind("evals.jsonl", math.huge, self.joined) end
  keep(self, self.total or 0, r)
  self.first_result = self.first_result or r
  return r
end

--- Compares a calibrated student with its teacher on held-out documents and returns that. PTQ has each block's maximum as its scale;
--- where the student searches its scales, so that training starts from better ones, that stands beside it, in a row of its own.
---
--- Example:
---     local before = run:ptq(teacher, student, data)
function Run:ptq(teacher, student, data)
  local function compared(extras) return eval.compare(teacher, student, data:holdout(), { extras = extras }) end
  local scales = student.quant.scales
  if scales == "max" then return self:result("PTQ", compared(true)) end
  local before = self:result("PTQ", student:with_max_scales(function() return compared(true) end))
  self.searched = { "PTQ, " .. scales, compared(false) }
  say_result(self, unpack(self.searched))
  return before
end

--- What is saved and restored together: `student`, `adam`, `data`; with `teacher` too, --eval_every can compare. A run that was
--- stopped goes on from its last checkpoint.
function Run:track(what)
  local none = errors.NONE
  self.tracked = errors.fill("track", what, { teacher = none, student = none, adam = none, data = none })
  if self.opt.validate_only then
    self:finish { before = self.first_result }
    errors.exit(0)
  end
  if self.made and self.opt.tensorboard then
    call.cq_folder_make(self.folder.path .. "/tensorboard")
    self.board = tensorboard.open(self.folder.path .. "/tensorboard", {})
  end
  if not self.resumable then return end
  local state = self.folder:restore(self.tracked.student, self.tracked.adam)
  self.tracked.adam.count = state.step
  if self.tracked.data then self.tracked.data:seek(state.position) end
  self.history, self.at = self.folder:rewind("metrics.jsonl", state.step, self.joined), state.step
  self.evals = self.folder:rewind("evals.jsonl", state.step, self.joined)
  self:say("resumed after step %d", state.step)
end

local function save(self, step)
  local t = self.tracked
  if not t or not (self.made or self.joined) or self.last_saved == step then return end
  self.folder:save(t.student, t.adam, json.object {
    "step", step, "position", t.data and t.data:position(), "seed", rawget(self.opt, "seed"), "version", native.version,
    "ranks", ranks.size, "ordered", ranks.ordered or ranks.many, "micro", t.data and t.data.micro,
    "gram", ranks.gram,
  }, { keep = self.opt.keep, keep_every = self.opt.keep_every, best = best(self) })
  self.last_saved = step
end

-- Saves, says why the run stops here, and leaves with `code`.
local function leave(self, step, code, why)
  save(self, step)
  if self.board then self.board:close() end
  local saved = self.last_saved == step and ", saved: the same command goes on from there" or ""
  self:say("%s after step %d of %d%s", why, step, self.total, saved)
  if self.folder then self.folder:close() end
  if self.folder then self.folder:unlock() end
  errors.exit(code)
end

-- What is due between two steps: evaluation, checkpoint, and the reasons to stop.
local function between(self, step)
  local opt, t = self.opt, self.tracked
  local due = opt.save > 0 and step % opt.save == 0
  if opt.eval_every > 0 and step % opt.eval_every == 0 and step < self.total and t and t.teacher then
    local r = eval.compare(t.teacher, t.student, t.data:holdout(), { extras = false })
    self:say("step %d held out: KL %.4f, top-1 %.4f, CKA %.4f, lowest %.4f at block %d", step, r.kl, r.top1, r.cka, r.cka_min,
      r.cka_min_block)
    t.student:saturated()
    keep(self, step, r)
    due = due or best(self) == step
  end
  local late = opt.max_time > 0 and native.clock() - self.started_at >= opt.max_time
  local asked = ranks.most({ native.save_wanted() and 1 or 0, native.stop_wanted() or 0, late and 1 or 0 }, "decision")
  if due or asked[1] > 0 then save(self, step) end
  local signal = asked[2] > 0 and asked[2]
  if signal then leave(self, step, 128 + signal, native.signal_word(signal)) end
  if step >= self.total then return end
  if opt.stop_at > 0 and step >= opt.stop_at then leave(self, step, 0, "stopped by --stop_at") end
  if asked[3] > 0 then leave(self, step, 75, "time is up") end
end

local Batch = errors.class("batch", {})

-- After each round of micro-batches, one on every rank that has one, their gradients are added up.
local function add_up(self, round)
  local pass = self.passes[#self.passes]
  local adam = self.adam or (pass and pass.student.adam)
  if adam then adam:add(math.min(ranks.size, self.count - round * ranks.size)) end
end

-- What a rank without a micro-batch does for the others', whose rows its experts compute.
local function serve(self)
  if ranks.moe ~= "ranks" then return end
  local pass, d = self.passes[#self.passes], nil
  local student = pass and pass.student or self.adam and self.adam.student
  if pass then d = pass.d end
  if not pass and student then -- no pass yet says which terms: there must be one list
    local terms = next(student.distillers)
    d = terms and not next(student.distillers, terms) and student.distillers[terms]
  end
  if not d then errors.usage("option --moe: %d micro-batches on %d ranks, wanted one for each", self.count, ranks.size) end
  call.cq_distill_serve(d.c, student:stream())
end

--- The micro-batches of a step, one after another; under mpirun those of this rank.
---
--- Example:
---     for part in batch:split() do
---       local pass = cq.distill(teacher, student, part, terms)
---       pass:backward { kl = 1, cka = 0.5 }
---     end
---     print(adam:step(1e-4) > 0) --> true
function Batch:split()
  local round = -1
  return function()
    if round >= 0 and round * ranks.size < self.count then add_up(self, round) end
    round = round + 1
    local i = round * ranks.size + ranks.rank
    if i >= self.count and round * ranks.size < self.count then
      serve(self)
      add_up(self, round)
    end
    if i < self.count then
      local own = self.own and self.own[i + 1]
      return { c = own and own.c or self.list + i, weights = own and own.weights, index = i, step = self.step, valid = self.valid,
        batch = self }
    end
  end
end

--- The next step's batch of a data object: `tokens`, `valid` (targets), `split()`. `run:steps` calls it.
---
--- Example:
---     local batch = cq.batch(data, 1)
---     print(batch.tokens >= batch.valid) --> true
function run.batch(data, step)
  local list, n = data:next()
  local self = setmetatable({ list = list, count = n, step = step, valid = 0, tokens = 0, passes = {} }, Batch)
  for i = 0, n - 1 do
    self.valid = self.valid + tonumber(list[i].valid)
    self.tokens = self.tokens + tonumber(list[i].tokens)
  end
  return self
end

-- Answers [from, to] of a list as one micro-batch of `tokens` tokens with weights.
local function micro_batch(answers, from, to, tokens)
  local ids, labels = native.new("int32_t[?]", tokens), native.new("int32_t[?]", tokens)
  local weights, starts = native.new("float[?]", tokens), native.new("int64_t[?]", to - from + 2)
  local at = 0
  for i = from, to do
    local a = answers[i]
    local prompt, n = #a.prompt_ids, #a.prompt_ids + #a.ids
    starts[i - from] = at
    for j = 1, n do
      local next_ = j + 1 > prompt and a.ids[j + 1 - prompt]
      ids[at], labels[at], weights[at] = j > prompt and a.ids[j - prompt] or a.prompt_ids[j], next_ or -100, a.weight
      at = at + 1
    end
  end
  starts[to - from + 1] = at
  return { c = native.open("cq_batch", "cq_batch_make", ids, labels, tokens, starts, to - from + 1), weights = weights }
end

--- A batch of answers as `model:generate` gives them, { prompt_ids, ids } with a `weight` each: what `cq.loss.policy` trains on. The
--- answers' tokens are its targets. Options: `tokens` of a micro-batch, at most (4096), `step` (1).
---
--- Example:
---     local batch = cq.batch_of({ { prompt_ids = { 5, 6 }, ids = { 7, 2 }, weight = 0.5 } }, { tokens = 64 })
---     print(batch.tokens, batch.valid) --> 4	2
function run.batch_of(answers, options)
  local o = errors.fill("batch_of", options, { tokens = 4096, step = 1 })
  local self = setmetatable({ own = {}, count = 0, step = o.step, valid = 0, tokens = 0, passes = {} }, Batch)
  local from, room = 1, 0
  local function close(to)
    if to < from then return end
    local part = micro_batch(answers, from, to, room)
    self.count = self.count + 1
    self.own[self.count], self.valid, self.tokens = part, self.valid + tonumber(part.c.valid), self.tokens + room
    from, room = to + 1, 0
  end
  for i, a in ipairs(answers) do
    local n = #a.prompt_ids + #a.ids
    if type(a.weight) ~= "number" then errors.usage("batch_of: answer %d has no weight, wanted a number", i) end
    if n < 2 or n > o.tokens then errors.usage("batch_of: answer %d has %d tokens with its prompt, wanted 2 to %d", i, n, o.tokens) end
    if room + n > o.tokens then close(i - 1) end
    room = room + n
  end
  close(#answers)
  return self
end

--- `for step, batch in run:steps(n, data) do`: counts, watches the clock, evaluates, saves checkpoints. One Ctrl-C ends the run
--- after the step, saved (exit code 130; 143 for SIGTERM, 129 for a hangup), a second one at once; SIGUSR1 saves. Without `data` the
--- loop makes its own batches and gives them to `run:log`.
---
--- Example:
---     for step, batch in run:steps(2, data) do
---       for part in batch:split() do
---         local pass = cq.distill(teacher, student, part, terms)
---         pass:backward(balance(pass))
---       end
---       run:log(step, { norm = adam:step(rate(step)), lr = rate(step), mine = 42 })
---     end
function Run:steps(n, data)
  local step = self.at or 0
  self.total = n
  self.begun = native.clock()
  self.first = step
  if self.tracked then self.tracked.student:saturated() end -- what calibration and evaluation counted is no step's
  self.c_before = native.in_c
  native.defer(true)
  return function()
    if self.batch then between(self, step) end
    native.poll()
    if step >= n then
      if self.batch then save(self, step) end
      self.batch = nil
      native.defer(false)
      if native.in_c then -- CKAQAD_PROFILE=1
        local spent = native.clock() - self.begun
        self:say("driver: %.3f s before the first step, %.2f %% of the steps' time", self.begun - self.started_at - self.c_before,
          100 * (1 - (native.in_c - self.c_before) / spent))
      end
      return nil
    end
    step = step + 1
    self.started = native.clock()
    self.batch = data and run.batch(data, step) or run.batch_of({}, { step = step })
    self.batch.adam = self.facts.adam
    return step, self.batch
  end
end

-- Means of the passes of a step, weighted by their targets.
local function measure(passes, n_blocks)
  local m, valid, weights, per_block = { kl = 0, top1 = 0, weight = 0 }, 0, 0, {}
  local function add(name, pass)
    if pass[name] then m[name] = (m[name] or 0) + pass[name] * pass.tokens end
  end
  for _, pass in ipairs(passes) do
    m.kl, m.top1, valid = m.kl + pass.kl * pass.tokens, m.top1 + pass.top1 * pass.tokens, valid + pass.tokens
    add("ce", pass)
    add("policy", pass)
    weights = weights + (pass.layer_weight or 0) * pass.tokens
    for block, value in pairs(pass.cka) do
      local b = per_block[block] or { 0, 0 }
      b[1], b[2] = b[1] + value * pass.tokens, b[2] + pass.tokens
      per_block[block] = b
    end
  end
  if valid == 0 then return m end
  m.kl, m.top1, m.weight, m.ce = m.kl / valid, m.top1 / valid, weights / valid, m.ce and m.ce / valid
  m.policy = m.policy and m.policy / valid
  local blocks, sum, count = {}, 0, 0
  for i = 0, n_blocks - 1 do
    local b = per_block[i]
    blocks[i + 1] = b and b[1] / b[2] or json.null
    if b then
      local value = blocks[i + 1]
      sum, count = sum + value, count + 1
      if not m.cka_min or value < m.cka_min then m.cka_min, m.cka_min_block = value, i end
    end
  end
  m.cka, m.cka_blocks = count > 0 and sum / count or nil, json.array(blocks)
  return m
end

--- Writes a step to metrics.jsonl and shows it. `values`: `lr`, `norm` (gradient norm), `batch` when the loop made it, and what else
--- you want to keep.
function Run:log(step, values)
  local batch = values.batch or self.batch
  local student = self.tracked and self.tracked.student or (batch.passes[1] and batch.passes[1].student)
  local passes = ranks.passes(batch.passes, batch.count, student.n_blocks)
  local m = measure(passes, student.n_blocks)
  m.step, m.lr, m.grad_norm, m.tokens = step, values.lr, values.norm, batch.tokens
  m.seconds = native.clock() - self.started
  m.saturated, m.reward = ranks.sum(student:saturated(), "results"), values.reward
  if m.ce or m.policy or #passes == 0 then m.kl = nil end
  local list = {
    "step", step, "ce", m.ce, "policy", m.policy, "kl", m.kl, "top1", m.top1, "cka", m.cka or json.null, "cka_blocks", m.cka_blocks,
    "weight", m.weight, "lr", m.lr, "grad_norm", m.grad_norm, "tokens", m.tokens, "seconds", m.seconds,
    "saturated", m.saturated,
  }
  for _, key in ipairs(json.keys(values)) do
    if key ~= "lr" and key ~= "norm" and key ~= "batch" then list[#list + 1], list[#list + 2] = key, values[key] end
  end
  local record_ = json.object(list)
  self.history[#self.history + 1] = record_
  if self.made then self.folder:append("metrics.jsonl", json.encode(record_)) end
  if self.board then self:draw(step, record_) end
  local spent = native.clock() - self.begun
  local eta = spent / math.max(1, step - self.first) * (self.total - step)
  self.screen:step(screen.status(m, self.total, eta), step, self.total, math.max(1, self.opt.every))
  return m
end

--- Scalars of a step for TensorBoard, and every tenth step the blocks' CKA as a histogram. `run:log` calls it.
function Run:draw(step, m)
  local now = os.time()
  for _, key in ipairs { "reward", "kl", "ce", "policy", "top1", "cka", "weight", "lr", "grad_norm", "seconds", "saturated" } do
    if type(m[key]) == "number" then self.board:scalar("train/" .. key, step, m[key], now) end
  end
  if step % 10 ~= 1 and step ~= self.total then return end
  local values = {}
  for _, value in ipairs(m.cka_blocks or {}) do
    if type(value) == "number" then values[#values + 1] = value end
  end
  if #values > 0 then self.board:histogram("train/cka_blocks", step, values, now) end
end

--- Exports a student to `out/nvfp4`, reads the folder back and says whether every bit is what was trained. Returns that. `options` are
--- those of `student:export`.
---
--- Example:
---     print(run:export(student)) --> true
function Run:export(student, options)
  local dir = self.folder.path .. "/nvfp4"
  student:export(dir, options)
  local differing = student:differing(dir)
  local verify = require "ckaqad.verify"
  local failed = verify.check(dir, student.dir)
  self:say("exported to %s: %s, %s", dir,
    differing == 0 and "dequantizes to the trained weights, every bit" or ("%d weights DIFFER from the trained ones"):format(differing),
    #failed == 0 and "all rules of verify hold" or ("%d rules of verify FAIL: %s"):format(#failed, failed[1]))
  self.export_equal = differing == 0
  self.export_failed = #failed
  return differing == 0 and #failed == 0
end

--- Peak memory so far less what there was before the first planned allocation.
---
--- Example:
---     print(cq.text.bytes(run:peak_bytes()))
function Run:peak_bytes()
  local free = self.plan_made.free -- on a device nothing is given back before the end, so what is in use is the peak
  if free then return free - tonumber(native.C.cq_stream_available(self.device.stream)) end
  return native.peak_bytes() - self.plan_made.before
end

local function memory_line(self)
  local p = self.plan_made
  self.peak = self:peak_bytes()
  local off = self.peak - p.bytes
  self:say("memory: measured peak %s, planned %s (%+.1f %%)", text.bytes(self.peak), text.bytes(p.bytes), 100 * off / p.bytes)
end

--- The run has what it was made for: its files are closed, and no error takes them away.
function Run:close()
  if self.board then self.board:close() end
  self.folder:close()
  self.folder:unlock()
  current = nil
end

--- Ends a run: the table BF16 / PTQ / CKA-QAD, a warning when QAD is worse than PTQ, summary.json and report.html.
--- `before` comes from `run:ptq` or `cq.eval.compare`, `after` from the latter; a recipe without training gives only `before`.
--- `more`: a table of other results, kept in summary.json.
function Run:finish(results)
  local o = errors.fill("finish", results, { before = errors.NONE, after = errors.NONE, more = errors.NONE })
  local rows = {}
  if o.before then rows[#rows + 1] = { "PTQ", o.before } end
  if o.before and self.searched then rows[#rows + 1] = self.searched end
  local name = report.form(self.folder and self.folder.options or {}).name
  if o.after then rows[#rows + 1] = { name, o.after } end
  if #rows > 0 then
    self:say("")
    for _, line in ipairs(text.table(screen.rows(rows))) do self:say(line) end
  end
  for i = 1, o.after and #rows - 1 or 0 do
    local untrained, worse = rows[i], {}
    if o.after.kl > untrained[2].kl then worse[#worse + 1] = "KL" end
    if o.after.cka < untrained[2].cka then worse[#worse + 1] = "mean CKA" end
    if #worse > 0 then self:say("warning: %s is worse than %s in %s", name, untrained[1], table.concat(worse, " and ")) end
  end
  memory_line(self)
  local sent = ranks.bytes()
  if not self.made then return end
  self.folder:write_json("summary.json", json.object {
    "before", eval.record(o.before), "searched", self.searched and eval.record(self.searched[2]), "after", eval.record(o.after),
    "export_bit_equal", self.export_equal, "export_rules_failed", self.export_failed, "more", o.more,
    "peak_bytes", self.peak, "planned_bytes", self.plan_made.bytes, "steps", #self.history,
    "sent_bytes", sent and json.object(sent),
    "seconds", self.begun and native.clock() - self.begun,
  })
  self.folder:write("report.html", report.run(self.folder.path))
  self:say("report %s/report.html", self.folder.path)
  self:close()
  if self.export_equal == false or (self.export_failed or 0) > 0 then
    errors.raise(errors.MISMATCH, "export: %s/nvfp4 is not what was trained", self.folder.path)
  end
end

return run
