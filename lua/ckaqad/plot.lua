-- plot.lua - curves in the terminal: braille dots where the locale is UTF-8, stars elsewhere.
--
-- Each character cell holds 2 x 4 dots; neighbouring points are joined by straight lines, so a curve of any length fits.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"

local plot = {}

-- True when the terminal shows UTF-8.
function plot.unicode()
  local locale = os.getenv "LC_ALL" or os.getenv "LC_CTYPE" or os.getenv "LANG" or ""
  return locale:lower():find("utf%-?8") ~= nil
end

-- U+2800 + bits, as UTF-8.
local function braille(bits) return string.char(0xE2, 0xA0 + math.floor(bits / 64), 0x80 + bits % 64) end

local dots = { [0] = { [0] = 1, 2, 4, 64 }, { [0] = 8, 16, 32, 128 } }

-- Cells of a curve: rows of strings. `points`: { { x, y }, ... } scaled to 0..1.
function plot.cells(points, width, height, unicode)
  local across, down = unicode and 2 or 1, unicode and 4 or 1
  local columns, lines = width * across, height * down
  local grid = {}
  local function set(x, y)
    local column, row = math.floor(x / across), math.floor(y / down)
    grid[row] = grid[row] or {}
    local bit_ = dots[x % across][y % down]
    local old = grid[row][column] or 0
    if math.floor(old / bit_) % 2 == 0 then grid[row][column] = old + bit_ end
  end
  local last
  for _, p in ipairs(points) do
    local x = math.floor(p[1] * (columns - 1) + 0.5)
    local y = math.floor((1 - p[2]) * (lines - 1) + 0.5)
    local n = last and math.max(math.abs(x - last[1]), math.abs(y - last[2]), 1) or 1
    for i = last and 1 or n, n do
      local t = i / n
      set(math.floor((last and last[1] + (x - last[1]) * t or x) + 0.5), math.floor((last and last[2] + (y - last[2]) * t or y) + 0.5))
    end
    last = { x, y }
  end
  local out = {}
  for row = 0, height - 1 do
    local cells = {}
    for column = 0, width - 1 do
      local value = grid[row] and grid[row][column]
      cells[column + 1] = not value and " " or unicode and braille(value) or "*"
    end
    out[row + 1] = table.concat(cells):gsub("%s+$", "")
  end
  return out
end

local function lines_of_file(path)
  local f, why = io.open(path, "rb")
  if not f then errors.raise(errors.IO, "plot: %s", why) end
  local list = {}
  for line in f:lines() do list[#list + 1] = json.decode(line, path) end
  f:close()
  return list
end

-- The objects of a run's steps: from a run, a spawned one, a record of cq.runs, a folder or a metrics.jsonl.
local function history(what)
  if type(what) == "string" then return lines_of_file(what:match("%.jsonl$") and what or what .. "/metrics.jsonl") end
  local path = rawget(what, "path") or rawget(what, "out")
  if rawget(what, "history") then return what.history end
  return type(path) == "string" and lines_of_file(path .. "/metrics.jsonl") or nil
end

local function points_of(what, key)
  local points, steps = {}, history(what)
  if steps then
    key = key or "kl"
    for _, step in ipairs(steps) do
      if type(step[key]) == "number" then points[#points + 1] = { step.step, step[key] } end
    end
    if #points == 0 then
      local names = steps[1] and json.keys(steps[1]) or {}
      errors.usage("plot: no step has a number %s%s", key, #names > 0 and ", nearest is " .. errors.nearest(key, names) or "")
    end
    return points
  end
  for i, value in ipairs(what) do
    local x, y = i, value
    if type(value) == "table" then x, y = value[1], value[2] end
    if type(x) ~= "number" or type(y) ~= "number" then
      errors.usage("plot: item %d is no number and no { x, y }, wanted a list of numbers, of pairs, or a run", i)
    end
    if y == y and math.abs(y) < math.huge then points[#points + 1] = { x, y } end
  end
  if #points == 0 then errors.usage("plot: nothing to draw, wanted numbers, pairs, or a run with steps") end
  return points
end

local function range(points, axis)
  local low, high = math.huge, -math.huge
  for _, p in ipairs(points) do low, high = math.min(low, p[axis]), math.max(high, p[axis]) end
  return low, high
end

-- The lines of a plot of points { x, y }.
function plot.lines(points, width, height, unicode)
  local x0, x1 = range(points, 1)
  local y0, y1 = range(points, 2)
  local scaled = {}
  for i, p in ipairs(points) do
    scaled[i] = { x1 > x0 and (p[1] - x0) / (x1 - x0) or 0.5, y1 > y0 and (p[2] - y0) / (y1 - y0) or 0.5 }
  end
  local labels = { [1] = ("%.4g"):format(y1), [height] = ("%.4g"):format(y0) }
  if height > 4 then labels[math.ceil(height / 2)] = ("%.4g"):format(y1 - (y1 - y0) * (math.ceil(height / 2) - 1) / (height - 1)) end
  local margin = 0
  for _, label in pairs(labels) do margin = math.max(margin, #label) end
  local bar, out = unicode and "│" or "|", {}
  for i, row in ipairs(plot.cells(scaled, math.max(8, width - margin - 2), height, unicode)) do
    out[i] = ("%" .. margin .. "s %s%s"):format(labels[i] or "", bar, row)
  end
  local from, to = ("%.6g"):format(x0), ("%.6g"):format(x1)
  out[#out + 1] = (" "):rep(margin + 2) .. from .. (" "):rep(math.max(1, width - margin - 2 - #from - #to)) .. to
  return out
end

--- Draws in the terminal: a list of numbers or of { x, y }, or a value of every step (`key`, "kl" unless given) of a run, a spawned
--- run, a record of `cq.runs()`, a run folder or a metrics.jsonl. Options: `width` and `height` in characters.
---
--- Example:
---     cq.plot({ 1, 4, 9, 16 }, { width = 40, height = 6 })
function plot.plot(what, key, options)
  if type(key) == "table" then key, options = nil, key end
  local o = errors.fill("plot", options, { width = 0, height = 12 })
  if type(what) ~= "table" and type(what) ~= "string" then
    errors.usage("plot: got %s, wanted a list, a run, or the path of one", type(what))
  end
  local width = o.width > 0 and o.width or math.min(100, native.columns() or 80)
  local points = points_of(what, key)
  for _, line in ipairs(plot.lines(points, math.max(20, width), math.max(2, o.height), plot.unicode())) do print(line) end
end

return plot
