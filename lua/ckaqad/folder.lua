-- folder.lua - the run folder: whose it is, and its files.
--
-- run.json, metrics.jsonl, evals.jsonl, summary.json, log.txt, report.html, checkpoints/step-N, tensorboard/, nvfp4/ (nvfp4.partial/
-- while it is made block by block). A folder
-- belongs to the run whose options its run.json holds; another run gets it only with --fresh, which removes these names and
-- nothing else. The file `lock` is held while a process writes here.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local hf = require "ckaqad.hf"
local ranks = require "ckaqad.ranks"
local passing = require "ckaqad.options".passing
local C, call = native.C, native.call

local folder = {}
local Folder = {}
Folder.__index = Folder

folder.format = 1 -- of run.json; a newer one is another program's

local files = { "run.json", "metrics.jsonl", "evals.jsonl", "summary.json", "log.txt", "report.html" }
local folders = { "checkpoints", "nvfp4", "nvfp4.partial", "tensorboard" }

local function read(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local text = f:read("*a")
  f:close()
  return text
end

-- Reads a JSON file; nil when it is missing.
function folder.read_json(path)
  local text = read(path)
  return text and json.decode(text, path)
end

-- Options as plain values in the recipe's order.
function folder.options(opt)
  local list = {}
  for _, key in ipairs(opt.order) do
    list[#list + 1] = key
    list[#list + 1] = rawget(opt, key)
  end
  return json.object(list)
end

local function show(value) return value == nil and "absent" or value == "" and "none" or tostring(value) end

-- "lr 0.0001 -> 0.0003" for every option in which two runs differ.
local function differences(old, new)
  local list, seen = {}, {}
  for _, options in ipairs { new, old } do
    for _, key in ipairs(json.keys(options)) do
      if not passing[key] and not seen[key] and old[key] ~= new[key] then
        list[#list + 1] = ("%s %s -> %s"):format(key, show(old[key]), show(new[key]))
      end
      seen[key] = true
    end
  end
  return list
end

-- run.json of a folder, or nil; a format that this program does not know is an error.
function folder.read_run(path)
  local run = folder.read_json(path .. "/run.json")
  if run and type(run.format) == "number" and run.format > folder.format then
    errors.raise(errors.DATA, "%s/run.json: format %d, made by version %s, wanted at most format %d", path, run.format,
      tostring(run.version), folder.format)
  end
  return run
end

local ours = { lock = true }
for _, list in ipairs { files, folders } do
  for _, name in ipairs(list) do ours[name] = true end
end

-- True when a folder exists and holds something; an empty one is removed by the question. What a run left that was killed
-- before its run.json was whole is nothing: a lock (in the folders of a sweep not even that), and only names that a run writes.
local function occupied(path)
  if not hf.exists(path) or os.remove(path) then return false end
  if not hf.exists(path .. "/lock") and not os.getenv "CKAQAD_POINT" then return true end
  local names = native.take_text(function(out) return C.cq_folder_list(out, path) end)
  for name in names:gmatch("[^\n]+") do
    if not ours[name:gsub("%.tmp%.%d+$", "")] then return true end
  end
  return false
end

-- Opens a run folder without writing anything yet. Returns it; `same` when it holds this very run.
function folder.open(path, opt)
  local self = setmetatable({ path = path, options = folder.options(opt) }, Folder)
  self:refuse_held()
  if opt.fresh then return self end
  local old = folder.read_run(path)
  if old then
    local list = differences(type(old.options) == "table" and old.options or {}, self.options)
    if #list > 0 then
      errors.usage("output folder %s: belongs to another run (%s), wanted its options, a new folder or --fresh", path,
        table.concat(list, ", "))
    end
    self.same = true
  elseif occupied(path) then
    errors.usage("output folder %s: is not empty and holds no run, wanted a new folder or --fresh", path)
  end
  return self
end

-- An error when another process writes here. A sweep's point waits: an orphan of a killed sweep may still be saving.
function Folder:refuse_held()
  local patience = os.getenv("CKAQAD_POINT") and native.clock() + 30
  while true do
    local holder = tonumber(C.cq_lock_holder(self.path .. "/lock"))
    if holder == 0 then return end
    if not patience or native.clock() > patience then
      errors.usage("output folder %s: process %d is writing there, wanted a folder of its own", self.path, holder)
    end
    native.poll()
    C.cq_process_sleep(0.1)
  end
end

-- Gives the lock back.
function Folder:unlock()
  if self.lock then native.close(self.lock, "cq_lock") end
  self.lock = nil
end

-- Removes what a run writes, and the folder when nothing else is in it. The lock goes last: who waits for it finds nothing.
function Folder:remove()
  self:close()
  for _, name in ipairs(files) do os.remove(self.path .. "/" .. name) end
  for _, name in ipairs(folders) do call.cq_folder_remove(self.path .. "/" .. name) end
  self:unlock()
  os.remove(self.path)
end

-- Makes the folder and locks it; what an older run left in it goes first, unless this run resumes it.
function Folder:make(resumes)
  call.cq_folder_make(self.path)
  self.lock = native.open("cq_lock", "cq_lock_take", self.path .. "/lock")
  if resumes then return end
  native.take_text(function(out) return C.cq_folder_list(out, self.path) end):gsub("[^\n]+%.tmp%.%d+", function(name)
    os.remove(self.path .. "/" .. name)
  end)
  for _, name in ipairs(files) do os.remove(self.path .. "/" .. name) end
  for _, name in ipairs(folders) do call.cq_folder_remove(self.path .. "/" .. name) end
end

-- Writes a whole file, all of it or nothing.
function Folder:write(name, text)
  call.cq_file_write(self.path .. "/" .. name, text, #text)
end

function Folder:write_json(name, value) self:write(name, json.encode(value, true) .. "\n") end

-- SHA-256 of a model folder's files.
function folder.hashes(dir)
  local list, room = {}, 2 ^ 30
  for _, name in ipairs { "config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors" } do
    local f = io.open(dir .. "/" .. name, "rb")
    if f then
      local bytes = f:seek("end")
      f:close()
      if bytes <= room then
        list[#list + 1] = name
        list[#list + 1] = native.sha256(dir .. "/" .. name)
      end
    end
  end
  return json.object(list)
end

-- run.json: everything that is needed to do this run again.
function Folder:record(run)
  local p, f, device = run.plan_made, run.facts, run.device
  self:write_json("run.json", json.object {
    "format", folder.format, "program", "ckaqad", "version", native.version, "recipe", run.opt.recipe,
    "point", os.getenv "CKAQAD_POINT", "started", os.date("!%Y-%m-%dT%H:%M:%SZ"),
    "options", folder.options(run.opt),
    "seeds", json.object { "data", rawget(run.opt, "seed"), "rows", rawget(run.opt, "seed") },
    "device", json.object { "kernels", device.kernels, "instructions", device.isa, "threads", device.threads,
      "compute", device.compute, "activations", device.activations },
    "ranks", json.object { "size", ranks.size, "backend", native.string(C.cq_comm_backend(native.comm)),
      "ordered", ranks.ordered or ranks.many, "gram", ranks.gram, "moe", ranks.moe },
    "model", f.model and json.object { "dir", f.model.dir, "family", f.model.family, "pattern", f.model.pattern,
      "parameters", f.model.n_params, "sha256", folder.hashes(f.model.dir) },
    "data", f.data and f.data:facts(),
    "planned_bytes", p and p.bytes,
  })
end

-- Appends one line to a file of the folder, on disk when the call returns.
function Folder:append(name, line)
  self.streams = self.streams or {}
  local path = self.path .. "/" .. name
  if not self.streams[name] then
    local f, why = io.open(path, "a")
    if not f then errors.raise(errors.IO, "%s", why) end
    self.streams[name] = f
  end
  errors.write(self.streams[name], path, line .. "\n")
end

function Folder:close()
  for _, f in pairs(self.streams or {}) do f:close() end
  self.streams = nil
end

-- Steps of the checkpoints that are whole, in order.
function Folder:saved()
  local root, steps = self.path .. "/checkpoints", {}
  if not hf.exists(root .. "/latest.json") then return steps end
  local names = native.take_text(function(out) return C.cq_folder_list(out, root) end)
  for name in names:gmatch("[^\n]+") do
    local step = tonumber(name:match("^step%-(%d+)$"))
    if step then steps[#steps + 1] = step end
  end
  table.sort(steps)
  return steps
end

-- Saves a checkpoint, all ranks together; removes all but the `keep` newest, the best, and those of every `keep_every`-th step.
function Folder:save(student, adam, state, options)
  local root = self.path .. "/checkpoints"
  if ranks.first then call.cq_folder_make(root) end
  call.cq_checkpoint_save(("%s/step-%d"):format(root, state.step), student.c, adam and adam.c, json.encode(state))
  if not ranks.first then return end
  self:write_json("checkpoints/latest.json", json.object { "step", state.step, "best", options.best })
  local steps = self:saved()
  for i = 1, #steps - math.max(1, options.keep) do
    local step = steps[i]
    local kept = step == options.best or (options.keep_every > 0 and step % options.keep_every == 0)
    if not kept then call.cq_folder_remove(("%s/step-%d"):format(root, step)) end
  end
end

-- The step of the newest checkpoint, or nil.
function Folder:latest()
  local latest = folder.read_json(self.path .. "/checkpoints/latest.json")
  return latest and latest.step
end

-- The driver's state of the newest checkpoint, or nil.
function Folder:state()
  local step = self:latest()
  return step and folder.read_json(("%s/checkpoints/step-%d/state.json"):format(self.path, step))
end

-- Restores the newest checkpoint and returns its state.
function Folder:restore(student, adam)
  local step = self:latest()
  local out = native.new "char *[1]"
  call.cq_checkpoint_load(("%s/checkpoints/step-%d"):format(self.path, step), student.c, adam and adam.c, student:stream(), out)
  local state = json.decode(native.string(out[0]), "state.json")
  native.free(out[0])
  return state
end

-- The objects of a file of lines whose step is at most `last`; the file keeps only those, unless somebody else sees to that.
function Folder:rewind(name, last, look_only)
  local lines, history = {}, {}
  for line in (read(self.path .. "/" .. name) or ""):gmatch("[^\n]+") do
    local ok, value = pcall(json.decode, line, name)
    if ok and value.step and value.step <= last then
      lines[#lines + 1] = line
      history[#history + 1] = value
    end
  end
  if look_only then return history end
  if #lines > 0 or hf.exists(self.path .. "/" .. name) then
    self:write(name, table.concat(lines, "\n") .. (#lines > 0 and "\n" or ""))
  end
  return history
end

return folder
