-- spawn.lua - a recipe in the background: a process of its own, its output in a file beside its folder.
--
-- The process gets SIGTERM when the prompt ends: it saves, and the same options go on from there.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local hf = require "ckaqad.hf"
local C, call = native.C, native.call

local spawn = {}
local Spawned = errors.class("spawned", {})

local function free_folder(recipe)
  local name = recipe:match("([^/]+)%.lua$") or "run"
  for i = 1, 10000 do
    local path = ("runs/%s-%d"):format(name, i)
    if not hf.exists(path) and not hf.exists(path .. ".log") then return path end
  end
end

-- The arguments of a process, in a C array that keeps them alive.
local function strings(list)
  local array = native.new("const char *[?]", #list + 1)
  for i, s in ipairs(list) do array[i - 1] = s end
  return array
end

--- Starts a recipe in the background with these options and returns at once. Without `out` the run lands in a new folder under
--- runs/; what it prints goes to OUT.log. The value has `status()` ("running", "finished", "stopped", "failed"), `wait(seconds)`,
--- `stop()`, `log(lines)`; printed it shows the step and a curve of KL.
function spawn.spawn(recipe, options)
  if type(recipe) ~= "string" then errors.usage("spawn: got %s, wanted the path of a recipe", type(recipe)) end
  if not hf.exists(recipe) then errors.usage("spawn: recipe %s does not exist", recipe) end
  local ok, host = pcall(require, "ckaqad.host")
  if not ok or not host.exe then errors.usage "spawn: works in the program ckaqad only" end
  local o, arguments = {}, { host.exe, recipe }
  for key, value in pairs(options or {}) do o[key] = value end
  o.out = o.out or free_folder(recipe)
  for _, key in ipairs(json.keys(o)) do arguments[#arguments + 1] = ("--%s=%s"):format(key, tostring(o[key])) end
  local parent = o.out:match("^(.*)/[^/]*$")
  if parent then call.cq_folder_make(parent) end
  os.remove(o.out .. ".log")
  local pid = native.new "int64_t[1]"
  call.cq_process_start(pid, strings(arguments), nil, o.out .. ".log")
  return setmetatable({ pid = pid[0], path = o.out, recipe = recipe }, Spawned)
end

-- Looks whether the process has ended; each end is reported once by the system.
local function poll(self)
  if self.code then return end
  local code = native.new "int[1]"
  if call.cq_process_poll(self.pid, code) == 1 then self.code = code[0] end
end

--- "running", "finished", "stopped" (saved; the same command goes on) or "failed"; then the exit code when it has ended.
function Spawned:status()
  poll(self)
  if not self.code then return "running" end
  if self.code == 0 and hf.exists(self.path .. "/summary.json") then return "finished", 0 end
  local saved = self.code == 0 or self.code == 75 or self.code > 128
  return saved and "stopped" or "failed", self.code
end

--- Waits until it has ended, at most `seconds` (none: as long as it takes). Returns its status.
function Spawned:wait(seconds)
  local ends = seconds and native.clock() + seconds
  while self:status() == "running" and not (ends and native.clock() >= ends) do
    native.poll()
    C.cq_process_sleep(0.05)
  end
  return (self:status())
end

--- Asks it to end after its step and save.
function Spawned:stop()
  poll(self)
  if not self.code then call.cq_process_signal(self.pid, 15) end
end

--- The last lines it printed (10 unless told), as one string.
function Spawned:log(lines)
  local f, list = io.open(self.path .. ".log", "rb"), {}
  if not f then return "" end
  for line in f:lines() do list[#list + 1] = line end
  f:close()
  return table.concat(list, "\n", math.max(1, #list - (lines or 10) + 1))
end

local function read_lines(path)
  local f, list = io.open(path, "rb"), {}
  if not f then return list end
  for line in f:lines() do
    local ok, value = pcall(json.decode, line, path)
    if ok then list[#list + 1] = value end
  end
  f:close()
  return list
end

function Spawned:__tostring()
  local steps = read_lines(self.path .. "/metrics.jsonl")
  local status, code = self:status()
  if status == "failed" then status = ("failed with exit code %d: %s"):format(code, self:log(1)) end
  local total = self:log(1):match("^step %d+/(%d+)")
  return require "ckaqad.show".run_line {
    name = self.path, status = status, step = steps[#steps] and steps[#steps].step, steps = tonumber(total), history = steps,
  }
end

return spawn
