-- folder.lua - the run folder: whose it is, and its files.
--
-- run.json, metrics.jsonl, summary.json, log.txt, report.html, checkpoints/step-N, nvfp4/. A folder belongs to the run whose
-- options its run.json holds; another run gets it only with --fresh, which removes these names and nothing else.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local hf = require "ckaqad.hf"
local call = native.call

local folder = {}
local Folder = {}
Folder.__index = Folder

local files = { "run.json", "metrics.jsonl", "summary.json", "log.txt", "report.html" }
local folders = { "checkpoints", "nvfp4" }
-- How a run is shown and how much memory it may use do not make it another run.
local passing = { fresh = true, every = true, memory = true, save = true, threads = true, out = true }

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

-- The first option in which two runs differ, or nil.
local function difference(old, new)
  for _, key in ipairs(json.keys(new)) do
    if not passing[key] and old[key] ~= new[key] then return key end
  end
end

-- True when a folder exists and holds something; an empty one is removed by the question.
local function occupied(path)
  if not hf.exists(path) then return false end
  return not os.remove(path)
end

-- Opens a run folder without writing anything yet. Returns it; `same` when it holds this very run.
function folder.open(path, opt)
  local self = setmetatable({ path = path, options = folder.options(opt) }, Folder)
  local old = folder.read_json(path .. "/run.json")
  if opt.fresh then return self end
  if old then
    local key = difference(type(old.options) == "table" and old.options or {}, self.options)
    if key then
      errors.usage("output folder %s: belongs to another run (--%s differs), wanted a new folder or --fresh", path, key)
    end
    self.same = true
  elseif occupied(path) then
    errors.usage("output folder %s: is not empty and holds no run, wanted a new folder or --fresh", path)
  end
  return self
end

-- Removes what a run writes, and the folder when nothing else is in it.
function Folder:remove()
  self:close()
  for _, name in ipairs(files) do os.remove(self.path .. "/" .. name) end
  for _, name in ipairs(folders) do call.cq_folder_remove(self.path .. "/" .. name) end
  os.remove(self.path)
end

-- Makes the folder; what an older run left in it goes first, unless this run resumes it.
function Folder:make(resumes)
  if not resumes then self:remove() end
  call.cq_folder_make(self.path)
end

-- Writes a whole file, all of it or nothing.
function Folder:write(name, text)
  call.cq_file_write(self.path .. "/" .. name, text, #text)
end

function Folder:write_json(name, value) self:write(name, json.encode(value, true) .. "\n") end

-- Appends one line to a file of the folder, on disk when the call returns.
function Folder:append(name, line)
  self.streams = self.streams or {}
  local path = self.path .. "/" .. name
  if not self.streams[name] then
    local f, why = io.open(path, "a")
    if not f then errors.raise(errors.IO, "%s", why) end
    self.streams[name] = f
  end
  local ok, why = self.streams[name]:write(line, "\n")
  if ok then ok, why = self.streams[name]:flush() end
  if not ok then errors.raise(errors.IO, "%s: %s", path, why) end
end

function Folder:close()
  for _, f in pairs(self.streams or {}) do f:close() end
  self.streams = nil
end

-- Saves a checkpoint and removes all but the two newest.
function Folder:save(student, adam, state)
  local root = self.path .. "/checkpoints"
  call.cq_folder_make(root)
  call.cq_checkpoint_save(("%s/step-%d"):format(root, state.step), student.c, adam and adam.c, json.encode(state))
  self.saved = self.saved or {}
  if self.saved[#self.saved] ~= state.step then self.saved[#self.saved + 1] = state.step end
  self:write_json("checkpoints/latest.json", json.object { "step", state.step })
  if #self.saved > 2 then call.cq_folder_remove(("%s/step-%d"):format(root, table.remove(self.saved, 1))) end
end

-- The step of the newest checkpoint, or nil.
function Folder:latest()
  local latest = folder.read_json(self.path .. "/checkpoints/latest.json")
  return latest and latest.step
end

-- Restores the newest checkpoint and returns its state.
function Folder:restore(student, adam)
  local step = self:latest()
  local out = native.new "char *[1]"
  call.cq_checkpoint_load(("%s/checkpoints/step-%d"):format(self.path, step), student.c, adam and adam.c, student:stream(), out)
  local state = json.decode(native.string(out[0]), "state.json")
  native.free(out[0])
  self.saved = { step }
  return state
end

-- The metrics of steps up to `last`; the file keeps only those.
function Folder:rewind(last)
  local lines, history = {}, {}
  for line in (read(self.path .. "/metrics.jsonl") or ""):gmatch("[^\n]+") do
    local ok, value = pcall(json.decode, line, "metrics.jsonl")
    if ok and value.step and value.step <= last then
      lines[#lines + 1] = line
      history[#history + 1] = value
    end
  end
  self:write("metrics.jsonl", table.concat(lines, "\n") .. (#lines > 0 and "\n" or ""))
  return history
end

return folder
