-- sweep_driver.lua - runs the points of a sweep as processes of their own: as many at a time as there are jobs, again when one
-- crashed, stopped gently when the driver is told to stop.
--
-- What is done is read from the run folders and from nothing else: summary.json there means finished. So the driver, or any of its
-- processes, may die at any instant; the next one goes on where the folders are. A process that a killed driver left behind is
-- waited for, never doubled: the lock in its run folder says that it still writes.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local hf = require "ckaqad.hf"
local json = require "ckaqad.json"
local screen = require "ckaqad.sweep_screen"
local C, call = native.C, native.call

local driver = {}
local Driver = errors.class("sweep", {})

local HUP, INT, TERM, KILL = 1, 2, 15, 9
local PATIENCE = 600 -- seconds that a process told to stop may take: a step and a checkpoint of a big model

-- The objects of a file of JSON lines; a line that a killed process left half-written is none.
function driver.read_lines(path)
  local list, f = {}, io.open(path, "rb")
  if not f then return list end
  for line in f:lines() do
    local ok, value = pcall(json.decode, line, path)
    if ok and type(value) == "table" then list[#list + 1] = value end
  end
  f:close()
  return list
end

-- The last whole line of a file of JSON lines, without reading the rest.
function driver.last_line(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local bytes = f:seek("end")
  f:seek("set", math.max(0, bytes - 65536))
  local last
  for line in f:read("*a"):gmatch("([^\n]*)\n") do
    if line:match("^{.*}$") then last = line end
  end
  f:close()
  local ok, value = pcall(json.decode, last or "", path)
  return ok and value or nil
end

-- A driver over `given`: path (the sweep's folder), points, jobs, retry, argv = function(point, extra) -> list, max_time,
-- halving and halved = function(dropped), called after every rung.
function driver.open(given)
  local self = setmetatable({ running = {}, failed = {}, dropped = {}, tried = {}, started_at = native.clock() }, Driver)
  for key, value in pairs(given) do self[key] = value end
  self.screen = screen.open(self)
  self.attempts = driver.read_lines(self.path .. "/attempts.jsonl")
  return self
end

function Driver:folder(point) return self.path .. "/points/" .. point.hash end

function Driver:holder(point) return tonumber(C.cq_lock_holder(self:folder(point) .. "/lock")) end

function Driver:finished(point) return hf.exists(self:folder(point) .. "/summary.json") end

-- The last step that a point has logged.
function Driver:progress(point)
  local m = driver.last_line(self:folder(point) .. "/metrics.jsonl")
  return m and m.step or 0, m
end

-- Appends one line to attempts.jsonl. A killed driver may have left half a line, which must not swallow this one.
local function append(self, record)
  local path = self.path .. "/attempts.jsonl"
  local f, why = io.open(path, "a+b")
  if not f then errors.raise(errors.IO, "%s", why) end
  local bytes = f:seek("end")
  if bytes > 0 then f:seek("set", bytes - 1) end
  local torn = bytes > 0 and f:read(1) ~= "\n"
  f:seek("end")
  local ok, e = pcall(errors.write, f, path, (torn and "\n" or "") .. json.encode(record) .. "\n")
  f:close()
  if not ok then error(e, 0) end
  self.attempts[#self.attempts + 1] = record
end

-- `stopped`: it ended because the driver was told to stop, so its exit code is no failure.
local function record(self, point, code, seconds, message, stop_at, stopped)
  local n = 1
  for _, a in ipairs(self.attempts) do
    if a.hash == point.hash then n = n + 1 end
  end
  append(self, json.object { "hash", point.hash, "attempt", n, "exit", code, "seconds", seconds, "stop_at", stop_at,
    "stopped", stopped, "message", message })
end

-- Notes the points that ended while no driver was there to see it, so that each has one attempt that ended well.
function Driver:reconcile()
  local ended = {}
  for _, a in ipairs(self.attempts) do
    if a.exit == 0 and not a.stop_at then ended[a.hash] = true end
  end
  for _, point in ipairs(self.points) do
    if not ended[point.hash] and self:finished(point) and self:holder(point) == 0 then
      record(self, point, 0, nil, "ended while no driver was running")
    end
  end
end

-- Mean seconds of the attempts that ran a point to its end; nil when none did.
function Driver:seconds_of_a_point()
  local sum, n = 0, 0
  for _, a in ipairs(self.attempts) do
    if a.exit == 0 and type(a.seconds) == "number" and not a.stop_at then sum, n = sum + a.seconds, n + 1 end
  end
  return n > 0 and sum / n or nil
end

local function bytes_of(path)
  local f = io.open(path, "rb")
  if not f then return 0 end
  local bytes = f:seek("end")
  f:close()
  return bytes
end

-- What a process said at its end: its error line, else its last line.
local function last_words(path, from)
  local f = io.open(path, "rb")
  if not f then return "no output" end
  f:seek("set", math.max(from, f:seek("end") - 16384))
  local last, said
  for line in f:read("*a"):gmatch("[^\r\n]+") do
    last = line
    said = line:match("^ckaqad: (.*)") or said
  end
  f:close()
  return said or last or "no output"
end

-- Starts a program with its output in `log`; returns its process number.
function driver.start(argv, env, log)
  local words = native.new("const char *[?]", #argv + 1)
  for i, word in ipairs(argv) do words[i - 1] = word end
  local over = native.new("const char *[?]", #env + 1)
  for i, word in ipairs(env) do over[i - 1] = word end
  local pid = native.new "int64_t[1]"
  call.cq_process_start(pid, words, over, log)
  return tonumber(pid[0])
end

-- Exit code of an ended process, or nil while it runs.
function driver.poll(pid)
  local code = native.new "int[1]"
  return call.cq_process_poll(pid, code) == 1 and code[0] or nil
end

local function start(self, point, stop_at)
  local folder, extra = self:folder(point), { "--threads=" .. self.threads }
  if stop_at then extra[#extra + 1] = "--stop_at=" .. stop_at end
  extra[#extra + 1] = "--out=" .. folder
  local log = folder .. ".log"
  local task = { point = point, stop_at = stop_at, begun = native.clock(), log = log, from = bytes_of(log) }
  task.pid = driver.start(self.argv(point, extra), { "CKAQAD_POINT=" .. point.hash }, log)
  self.running[#self.running + 1] = task
  self.screen:started(task)
end

-- Exit codes that another try cannot change: wrong usage and bad input.
local hopeless = { [2] = true, [3] = true }

-- True when a point that is to run to `stop_at` (nil: its end) is there.
local function there(self, point, stop_at)
  return self:finished(point) or (stop_at ~= nil and self:progress(point) >= stop_at)
end

-- Takes note of a process that ended; true when its point is to be tried again.
local function ended(self, task, code)
  local point, seconds = task.point, native.clock() - task.begun
  if code == 0 and there(self, point, task.stop_at) then
    record(self, point, 0, seconds, nil, not self:finished(point) and task.stop_at or nil)
    self.screen:ended(task, seconds)
    return false
  end
  local message = code > 128 and ("ended by signal %d"):format(code - 128) or last_words(task.log, task.from)
  if code == 0 then message = "left without an error, but also without a result" end
  local told = self.stopping and (code == 128 + HUP or code == 128 + INT or code == 128 + TERM)
  record(self, point, code, seconds, told and "stopped with the sweep" or message, task.stop_at, told or nil)
  if self.stopping then return false end
  self.tried[point.hash] = (self.tried[point.hash] or 0) + 1
  local again = not hopeless[code] and self.tried[point.hash] <= self.retry
  if not again then self.failed[point.hash] = message end
  self.screen:crashed(task, code, message, again and self.tried[point.hash] or nil)
  return again
end

-- Looks after the running processes; `again(point)` is called for one that is to be tried again.
local function collect(self, again)
  for i = #self.running, 1, -1 do
    local task = self.running[i]
    local code = driver.poll(task.pid)
    if code then
      table.remove(self.running, i)
      if ended(self, task, code) then again(task.point) end
    end
  end
end

-- Tells the running processes to stop and waits for them. A second stop signal, or too long a wait, kills them: their folders hold
-- the last checkpoint.
function Driver:stop()
  self.stopping = true
  local deadline = native.clock() + PATIENCE
  for _, task in ipairs(self.running) do C.cq_process_signal(task.pid, TERM) end
  local ok, e = pcall(function()
    while #self.running > 0 and native.clock() < deadline do
      collect(self, function() end)
      native.poll()
      C.cq_process_sleep(0.05)
    end
  end)
  for _, task in ipairs(self.running) do C.cq_process_signal(task.pid, KILL) end
  self.running = {}
  if not ok then error(e, 0) end
end

-- The first point of the list that nobody writes to, and its place; a finished one is taken out.
local function take(self, pending, stop_at)
  local i = 1
  while pending[i] do
    local point = pending[i]
    local holder = self:holder(point)
    if holder ~= 0 then
      self.screen:waiting(point, holder)
      i = i + 1
    elseif there(self, point, stop_at) then
      table.remove(pending, i)
      self:reconcile()
    else
      return table.remove(pending, i)
    end
  end
end

-- Why the driver must stop now: exit code and a word; nil when it need not.
local function must_stop(self)
  local signal = native.stop_wanted()
  if signal then return 128 + signal, native.signal_word(signal) end
  if self.max_time > 0 and native.clock() - self.started_at >= self.max_time then return 75, "time is up" end
end

-- Runs `list` to step `stop_at` (nil: to the end). Returns nil, or exit code and word when it had to stop.
local function run_list(self, list, stop_at)
  local pending = {}
  for i, point in ipairs(list) do pending[i] = point end
  while #pending > 0 or #self.running > 0 do
    local code, word = must_stop(self)
    if code then
      self.screen:say(("%s: telling %d running points to stop"):format(word, #self.running))
      self:stop()
      return code, word
    end
    while #self.running < self.jobs and #pending > 0 do
      local point = take(self, pending, stop_at)
      if not point then break end
      start(self, point, stop_at)
    end
    self.left = #pending
    self.screen:draw()
    C.cq_process_sleep(#self.running > 0 and 0.05 or 0.1)
    collect(self, function(point) table.insert(pending, 1, point) end)
  end
end

-- How good a point is at a rung, lower is better, and in what: held-out KL where the run evaluates there, else the mean of the last
-- five steps' loss (every setting sees the same documents there). nil for one that did not get there.
local function score_of(self, point, rung)
  for _, e in ipairs(driver.read_lines(self:folder(point) .. "/evals.jsonl")) do
    if e.step == rung and type(e.kl) == "number" then return e.kl, "held-out KL" end
  end
  local total, count, what, last = 0, 0, nil, 0
  for _, m in ipairs(driver.read_lines(self:folder(point) .. "/metrics.jsonl")) do
    local loss = m.kl or m.ce
    if m.step > rung - 5 and m.step <= rung and type(loss) == "number" then
      total, count, what = total + loss, count + 1, m.kl and "KL" or "cross-entropy"
    end
    last = math.max(last, m.step)
  end
  if last >= rung and count > 0 then return total / count, what end
end

-- How good a setting is at a rung, the mean over its seeds, and in what; nil when one of them failed or did not get there.
function Driver:score(list, rung)
  local sum, kind = 0, nil
  for _, point in ipairs(list) do
    local value, what = score_of(self, point, rung)
    if not value or self.failed[point.hash] then return nil end
    sum, kind = sum + value, what
  end
  return #list > 0 and sum / #list or nil, kind
end

-- Points by the setting they belong to, in order.
local function by_setting(list)
  local names, groups = {}, {}
  for _, point in ipairs(list) do
    if not groups[point.name] then
      groups[point.name] = {}
      names[#names + 1] = point.name
    end
    table.insert(groups[point.name], point)
  end
  return names, groups
end

local function halve(self, alive, rung)
  local points = require "ckaqad.sweep_points"
  local names, groups = by_setting(alive)
  local scores, out, kinds, n_kinds = {}, {}, {}, 0
  for _, name in ipairs(names) do
    local kind
    scores[name], kind = self:score(groups[name], rung)
    if kind and not kinds[kind] then kinds[kind], n_kinds = true, n_kinds + 1 end
  end
  local kept = points.promote(names, scores, self.halving.keep)
  if n_kinds > 1 then -- a cross-entropy is no worse than a KL: they are not the same measure
    self.screen:say(("step %d: the settings' losses are not of one kind, so none is dropped; wanted eval_every, which measures KL"):format(
      rung))
    for _, name in ipairs(names) do kept[name] = scores[name] ~= nil or nil end
  end
  for _, name in ipairs(names) do
    local left = 0
    for _, point in ipairs(groups[name]) do left = left + (self.failed[point.hash] and 0 or 1) end
    if left == 0 then kept[name] = "failed" end
  end
  for _, point in ipairs(alive) do
    if self.failed[point.hash] then
      self.dropped[point.hash] = nil
    elseif kept[point.name] then
      out[#out + 1] = point
    else
      self.dropped[point.hash] = rung
    end
  end
  self.halved(self.dropped)
  self.screen:rung(rung, names, scores, kept)
  return out
end

-- Runs every point; returns nil, or exit code and word when it had to stop.
function Driver:run()
  self:reconcile()
  local alive = self.points
  native.defer(true)
  local ok, code, word = pcall(function()
    for _, rung in ipairs(self.halving and self.halving.rungs or {}) do
      local todo = {}
      for _, point in ipairs(alive) do
        if not self.failed[point.hash] and (not there(self, point, rung) or self:holder(point) ~= 0) then todo[#todo + 1] = point end
      end
      local c, w = run_list(self, todo, rung)
      if c then return c, w end
      alive = halve(self, alive, rung)
    end
    local todo = {}
    for _, point in ipairs(alive) do
      if not self.failed[point.hash] and (not self:finished(point) or self:holder(point) ~= 0) then todo[#todo + 1] = point end
    end
    return run_list(self, todo)
  end)
  self.screen:close()
  if not ok then
    self:stop()
    error(code, 0)
  end
  native.defer(false)
  return code, word
end

return driver
