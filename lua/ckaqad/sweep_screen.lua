-- sweep_screen.lua - what a person sees of a sweep: on a terminal a few lines that are drawn again and again, elsewhere a line for
-- every point that ends.
local native = require "ckaqad.ffi"
local text = require "ckaqad.text"

local screen = {}
local Screen = {}
Screen.__index = Screen

function screen.open(driver)
  local term = os.getenv("TERM")
  local live = native.columns() and term ~= nil and term ~= "dumb"
  return setmetatable({ driver = driver, live = live, shown = 0, next_draw = 0, said = {} }, Screen)
end

local function erase(self)
  if self.shown > 0 then io.stdout:write(("\27[%dA\r\27[J"):format(self.shown)) end
  self.shown = 0
end

-- A line that stays.
function Screen:say(line)
  erase(self)
  print(line)
  io.stdout:flush()
  self.next_draw = 0
end

-- "3.2 s", then minutes.
function screen.time(seconds) return seconds < 60 and ("%.1f s"):format(seconds) or text.duration(seconds) end

local function seeded(point) return point.seed and ("%s seed=%d"):format(point.name, point.seed) or point.name end
screen.label = seeded

local function fixed(value) return type(value) == "number" and ("%.4f"):format(value) or "-" end

-- Finished points, and the best of them by held-out KL.
local function tally(self)
  local n, best = 0, nil
  for _, point in ipairs(self.driver.points) do
    local known = self.said[point.hash]
    if known == nil and self.driver:finished(point) then
      local json = require "ckaqad.json"
      local f = io.open(self.driver:folder(point) .. "/summary.json", "rb")
      local ok, summary = pcall(json.decode, f and f:read("*a") or "", "summary.json")
      if f then f:close() end
      known = ok and type(summary.after) == "table" and { point = point, kl = summary.after.kl, cka = summary.after.cka } or false
      self.said[point.hash] = known
    end
    if known ~= nil then n = n + 1 end
    if known and known.kl and (not best or known.kl < best.kl) then best = known end
  end
  return n, best
end

-- Seconds that the rest may take.
local function eta(self, finished)
  local each = self.driver:seconds_of_a_point()
  if not each then return nil end
  local left = #self.driver.points - finished
  for _ in pairs(self.driver.dropped) do left = left - 1 end
  for _ in pairs(self.driver.failed) do left = left - 1 end
  local spent = 0
  for _, task in ipairs(self.driver.running) do spent = spent + math.min(each, native.clock() - task.begun) end
  return math.max(0, left * each - spent) / self.driver.jobs
end

local function count(t)
  local n = 0
  for _ in pairs(t) do n = n + 1 end
  return n
end

local function summary_line(self)
  local finished, best = tally(self)
  local rest = eta(self, finished)
  local parts = { ("%d of %d points finished"):format(finished, #self.driver.points) }
  if count(self.driver.dropped) > 0 then parts[#parts + 1] = count(self.driver.dropped) .. " dropped" end
  if count(self.driver.failed) > 0 then parts[#parts + 1] = count(self.driver.failed) .. " FAILED" end
  parts[#parts + 1] = "eta " .. (rest and text.duration(rest) or "-")
  if best then parts[#parts + 1] = ("best KL %.4f: %s"):format(best.kl, seeded(best.point)) end
  return table.concat(parts, ", ")
end

-- The live lines: the summary, then one for every running point.
function Screen:draw()
  if not self.live or native.clock() < self.next_draw then return end
  self.next_draw = native.clock() + 0.5
  local rows = { { "running", "step", "KL", "CKA", "for" } }
  for _, task in ipairs(self.driver.running) do
    local step, m = self.driver:progress(task.point)
    local total = task.stop_at or task.point.steps
    rows[#rows + 1] = { seeded(task.point), total and ("%d/%d"):format(step, total) or tostring(step), fixed(m and (m.kl or m.ce)),
      fixed(m and m.cka), text.duration(native.clock() - task.begun) }
  end
  local lines = text.table(rows, "  ")
  table.insert(lines, 1, summary_line(self))
  erase(self)
  local width = (native.columns() or 80) - 1
  for _, line in ipairs(lines) do io.stdout:write(line:sub(1, width), "\n") end
  io.stdout:flush()
  self.shown = #lines
end

function Screen:started(task)
  if not self.live then self:say(("start  %s%s"):format(seeded(task.point), task.stop_at and (" up to step " .. task.stop_at) or "")) end
end

function Screen:ended(task, seconds)
  local n, _ = tally(self)
  local known = self.said[task.point.hash]
  if task.stop_at and not known then
    self:say(("step %d  %s  (%s)"):format(task.stop_at, seeded(task.point), screen.time(seconds)))
    return
  end
  self:say(("done   %s  %s  (%s, %d of %d)"):format(seeded(task.point),
    known and ("KL %s  CKA %s"):format(fixed(known.kl), fixed(known.cka)) or "", screen.time(seconds), n, #self.driver.points))
end

function Screen:crashed(task, code, message, try)
  self:say(("FAILED %s: exit %d, %s%s"):format(seeded(task.point), code, message,
    try and (", trying again (%d of %d)"):format(try, self.driver.retry) or ", see " .. task.log))
end

-- Said once for a point that a process of an earlier driver still writes.
function Screen:waiting(point, holder)
  local key = "waiting " .. point.hash
  if not self.said[key] then self:say(("wait   %s: process %d of an earlier driver still writes it"):format(seeded(point), holder)) end
  self.said[key] = true
end

-- The end of a rung of successive halving.
function Screen:rung(rung, names, scores, kept)
  local rows = { { ("step %d"):format(rung), "KL", "" } }
  for _, name in ipairs(names) do
    rows[#rows + 1] = { name, fixed(scores[name]), kept[name] == "failed" and "failed" or kept[name] and "goes on" or "dropped" }
  end
  for _, line in ipairs(text.table(rows, "  ")) do self:say(line) end
end

function Screen:close() erase(self) end

return screen
