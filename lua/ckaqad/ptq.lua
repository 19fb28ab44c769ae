-- ptq.lua - a checkpoint of any size quantized block by block, in the memory of one block; what C does in units is driven here.
--
-- The folder out/nvfp4.partial becomes out/nvfp4 when it is whole. Stopped by a signal, a kill or a full disk, the same command goes
-- on with the block it was at. Nothing is measured on held-out documents: that would need the model in memory.
local native = require "ckaqad.ffi"
local dry = require "ckaqad.dry"
local errors = require "ckaqad.errors"
local hf = require "ckaqad.hf"
local json = require "ckaqad.json"
local ranks = require "ckaqad.ranks"
local text = require "ckaqad.text"
local verify = require "ckaqad.verify"
local C, call = native.C, native.call

local ptq = {}

-- Bytes of F32 that the whole model takes: teacher, master weights of the student, their fake-quantized copies.
local function whole_bytes(student) return 12 * student.n_params end

--- Whether a recipe's `stream` option ("auto", "yes", "no") asks for block by block: auto does where there are no documents
--- (`data` "none") and where the models do not fit the memory together. Returns that and the reason in words.
---
--- Example:
---     local opt = cq.options { stream = "auto", data = "none" }
---     print(cq.ptq.streams(opt, teacher:quantize { weights_only = true })) --> true	no documents, so nothing to measure
function ptq.streams(opt, student)
  errors.choose("option --stream", opt.stream, { "auto", "yes", "no" })
  local none = rawget(opt, "data") == "none"
  local room = opt.memory > 0 and opt.memory or tonumber(C.cq_memory_available())
  local small = whole_bytes(student) <= room
  if none and opt.stream == "no" then errors.usage("option --stream: no goes with documents to measure on, wanted --data=FILE.jsonl") end
  if opt.gpus ~= "" or opt.stream == "no" or (opt.stream == "auto" and not none and small) then return false end
  if student.device.on_device then errors.usage "option --device: block by block runs on the processor, wanted --device=cpu" end
  if opt.stream == "yes" then return true, "as asked" end
  if none then return true, "no documents, so nothing to measure" end
  return true, ("%s for both models at once, %s are free"):format(text.bytes(whole_bytes(student)), text.bytes(room))
end

local kinds = { M = "mamba", E = "moe", ["*"] = "attention", ["-"] = "mlp", Q = "attention + mlp" }

-- What unit `u` (from 0) was.
local function unit_name(student, u)
  if u == 0 then return "embedding" end
  if u > student.n_blocks then return "norm and head" end
  return ("block %d of %d, %s"):format(u, student.n_blocks, kinds[student.pattern:sub(u, u)] or student.pattern:sub(u, u))
end

local function open(student, dir, o)
  local options, list = native.new "cq_ptq_options", nil
  options.dir, options.shard_bytes = dir, o.shard_bytes
  if #o.batches > 0 then
    list = native.new("const cq_batch *[?]", #o.batches)
    for i, batch in ipairs(o.batches) do list[i - 1] = batch end
    options.batches, options.n_batches = list, #o.batches
  end
  local c = native.open("cq_ptq", "cq_ptq_open", student.c, options)
  return { c = c, student = student, keep = { o.batches, list, dir } }
end

local function facts(self)
  local f, out = native.new "cq_ptq_facts", {}
  C.cq_ptq_facts_get(self.c, f)
  for _, key in ipairs { "units", "done", "continued", "tensors", "bytes", "source_bytes", "shards", "tokens", "unreached" } do
    out[key] = tonumber(f[key])
  end
  return out
end

-- Plans the largest block, prints the plan, allocates.
local function make_plan(self, run)
  local p = native.open("cq_plan", "cq_plan_open")
  call.cq_ptq_plan(self.c, p, self.student.device.threads)
  local tokens = facts(self).tokens
  run:say("memory plan, one block at a time%s:", tokens > 0 and (", %d tokens to calibrate on"):format(tokens) or "")
  local rows = {}
  for purpose = 0, tonumber(C.CQ_N_PURPOSES) do
    local bytes = tonumber(C.cq_plan_bytes(p, purpose))
    if bytes > 0 then rows[#rows + 1] = { native.string(C.cq_purpose_name(purpose)):gsub("^all$", "total"), text.bytes(bytes) } end
  end
  rows[1][1] = rows[1][1]:gsub("^teacher weights$", "weights of a block")
  for _, line in ipairs(text.table(rows, "  ")) do run:say(line) end
  run.plan_made = { c = p, bytes = tonumber(C.cq_plan_bytes(p, C.CQ_N_PURPOSES)), before = native.peak_bytes() }
  if run.opt.dry_run then
    for _, line in ipairs(dry.lines(run.opt, {})) do run:say(line) end
    errors.exit(0)
  end
  call.cq_plan_commit(p, run.opt.memory)
end

-- Unit after unit, with a line about each.
local function drive(self, run)
  local first, begun = facts(self), native.clock()
  if first.continued > 0 then run:say("continued after %s", unit_name(self.student, first.continued - 1)) end
  for u = first.done, first.units - 1 do
    call.cq_ptq_unit(self.c, self.student:stream())
    local spent, share = native.clock() - begun, (u + 1 - first.done) / (first.units - first.done)
    run.screen:step(("%s  %d %%  eta %s"):format(unit_name(self.student, u), math.floor(100 * (u + 1) / first.units),
      text.duration(spent / share - spent)), u + 1, first.units, math.max(1, run.opt.every))
  end
  call.cq_ptq_finish(self.c)
  return native.clock() - begun, first
end

-- A full disk and a signal leave what is done for the next try; bad weights leave nothing.
local function guarded(self, run)
  local ok, a, b = pcall(drive, self, run)
  run.kept = ok -- a signal while the folder is looked at does not take it away
  if ok then return a, b end
  if not errors.is(a) or a.status == errors.IO or a.exit then
    run.kept = true
    pcall(run.say, run, "stopped after %d of %d parts: the same command goes on from there", facts(self).done, facts(self).units)
  end
  error(a, 0)
end

-- What one process read and quantized beside what the machine could; nothing when an earlier one did it all.
local function speed_line(self, run, seconds, first)
  local f, rate = facts(self), native.new "double[1]"
  call.cq_ptq_rate(self.c, rate)
  local share = (f.units - first.done) / f.units
  run:say("quantized %s in %s%s: %s/s; from memory this machine quantizes %s/s", text.bytes(f.source_bytes), text.duration(seconds),
    first.continued > 0 and (" (the last %d of %d parts)"):format(f.units - first.done, f.units) or "",
    text.bytes(f.source_bytes * share / seconds), text.bytes(rate[0]))
  if f.unreached > 0 then run:say("%d expert projections saw no token and take their layer's largest maximum", f.unreached) end
  return rate[0]
end

local function finish(self, run, dir, seconds, rate)
  local f, failed = facts(self), verify.check(dir, self.student.dir)
  run:say("exported to %s: %d tensors, %.0f bytes of data%s; %s", dir, f.tensors, f.bytes,
    f.shards > 0 and (" in %d file%s"):format(f.shards, f.shards == 1 and "" or "s") or "",
    #failed == 0 and "all rules of verify hold" or ("%d rules of verify FAIL: %s"):format(#failed, failed[1]))
  local peak = native.peak_bytes()
  run:say("memory: peak %s resident, planned %s beside pages of the files", text.bytes(peak), text.bytes(run.plan_made.bytes))
  run.folder:write_json("summary.json", json.object {
    "streamed", true, "tensors", f.tensors, "bytes", f.bytes, "source_bytes", f.source_bytes, "shards", seconds and f.shards,
    "tokens", f.tokens, "unreached", seconds and f.unreached, "seconds", seconds, "continued", f.continued, "memory_rate", rate,
    "peak_bytes", peak, "planned_bytes", run.plan_made.bytes, "export_rules_failed", #failed,
  })
  run:close()
  if #failed > 0 then errors.raise(errors.MISMATCH, "export: %s is not what verify wants", dir) end
end

-- True when the folder is whole and only a look at it is missing; a run that has ended leaves the program.
local function found(run, dir)
  if not run.folder.same or not hf.exists(dir .. "/config.json") or run.opt.dry_run then return false end
  if not hf.exists(run.folder.path .. "/summary.json") then return true end
  run:say("finished already: %s (--fresh runs it again)", dir)
  errors.exit(0)
end

--- Quantizes a student block by block into out/nvfp4 and ends the run. Options: `teacher` (described and recorded), `data` and
--- `calibrate` (the documents whose inputs give the activation scales; none for weights only), `shard_bytes` (largest file), `why`.
---
--- Example:
---     local student = teacher:quantize { weights_only = true }
---     cq.ptq.stream(cq.run(cq.options { stream = "yes", out = "blocks" }), student, { teacher = teacher })
---     print(cq.verify "blocks")
function ptq.stream(run, student, options)
  ranks.refuse("PTQ block by block")
  local o = errors.fill("ptq.stream", options, { teacher = errors.NONE, data = errors.NONE, calibrate = 32, shard_bytes = 4.5 * 2 ^ 30,
    why = "as asked" })
  local dir = run.folder.path .. "/nvfp4"
  local whole, seconds, rate = found(run, dir)
  if o.teacher then run:say("teacher %s", o.teacher:describe()) end
  for _, line in ipairs(student:quantization()) do run:say(line) end
  run:say("block by block: %s", o.why)
  if o.data then
    for _, line in ipairs(o.data:describe()) do run:say(line) end
  end
  o.batches = o.data and o.data:take(o.calibrate) or {}
  local self = open(student, dir, o)
  run.facts = { model = o.teacher, data = o.data }
  make_plan(self, run)
  run:begin(whole or hf.exists(dir .. ".partial/journal"))
  run.kept = whole
  if not whole then
    call.cq_ptq_begin(self.c)
    local first
    seconds, first = guarded(self, run)
    rate = speed_line(self, run, seconds, first)
  end
  finish(self, run, dir, seconds, rate)
  native.close(self.c, "cq_ptq")
end

return errors.strict(ptq, "ptq")
