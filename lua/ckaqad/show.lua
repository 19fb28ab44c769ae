-- show.lua - values as a person at the prompt reads them: tensors, models, runs, tables.
--
-- What is shown is bounded: a table one level deep and some forty lines, a string two thousand bytes, a tensor its corners.
local json = require "ckaqad.json"
local text = require "ckaqad.text"

local show = {}

local most_items, most_bytes, line_width = 40, 2000, 110

-- A number with `digits` significant ones; NaN and infinities by name.
function show.number(x, digits)
  if x ~= x then return "nan" end
  if x == math.huge then return "inf" end
  if x == -math.huge then return "-inf" end
  return (("%%.%dg"):format(digits or 4)):format(x)
end

local function quoted(s, most)
  if #s <= most then return json.encode(s) end
  return ("%s... (%d bytes)"):format(json.encode(s:sub(1, most)):sub(1, -2) .. '"', #s)
end

local function corner(size, edge)
  local list = {}
  if size <= 2 * edge then
    for i = 0, size - 1 do list[#list + 1] = i end
  else
    for i = 0, edge - 1 do list[#list + 1] = i end
    list[#list + 1] = false -- the gap
    for i = size - edge, size - 1 do list[#list + 1] = i end
  end
  return list
end

-- The corner values as lines. `at(row, column)`: of the matrix [rows, columns].
function show.corners(rows, columns, at)
  local cells, widths = {}, {}
  for r, i in ipairs(corner(rows, 2)) do
    cells[r] = {}
    for c, j in ipairs(corner(columns, 3)) do
      local cell = i and j and show.number(at(i, j), 4) or "..."
      cells[r][c] = cell
      widths[c] = math.max(widths[c] or 0, #cell)
    end
  end
  local lines = {}
  for r, row in ipairs(cells) do
    for c, cell in ipairs(row) do row[c] = (" "):rep(widths[c] - #cell) .. cell end
    lines[r] = "  " .. table.concat(row, "  ")
  end
  return lines
end

-- A tensor from { dtype, shape, device, note, stats, at(row, column) }; without `stats` it has no numbers yet.
function show.tensor(t)
  local lines = { ("[%s %s %s]%s"):format(t.dtype, #t.shape > 0 and table.concat(t.shape, "x") or "scalar", t.device,
    t.note and " " .. t.note or "") }
  local s = t.stats
  if not s then
    lines[2] = "  not in memory: a plan loads it (cq.plan, run:plan)"
    return table.concat(lines, "\n")
  end
  lines[2] = ("  min %s  mean %s  max %s  non-finite %d"):format(show.number(s.min), show.number(s.mean), show.number(s.max), s.nonfinite)
  local columns = t.shape[#t.shape] or 1
  local rows = columns > 0 and s.n / columns or 0
  for _, line in ipairs(show.corners(rows, columns, t.at)) do lines[#lines + 1] = line end
  return table.concat(lines, "\n")
end

-- A parameter of a model (parameter.lua).
function show.parameter(p)
  local note = p.name .. (p.quantized and ", NVFP4" or p.reason and ", not quantized: " .. p.reason or "")
  if p.disk ~= p:dtype() then note = ("%s, %s in the checkpoint"):format(note, p.disk) end
  local columns = p.shape[#p.shape] or 1
  return show.tensor {
    dtype = p:dtype() or p.disk, shape = p.shape, device = "cpu", note = note, stats = p:stats(),
    at = function(row, column)
      local indices, rest = {}, row
      indices[#p.shape] = column
      for axis = #p.shape - 1, 1, -1 do
        indices[axis] = rest % p.shape[axis]
        rest = math.floor(rest / p.shape[axis])
      end
      return columns > 0 and p:at(unpack(indices, 1, #p.shape)) or 0
    end,
  }
end

local kind_names = { M = "mamba", E = "moe", ["*"] = "attention", ["-"] = "mlp", Q = "attention + mlp" }

-- Parameters of a model by block: { [block] = { n, linears, quantized } }, block -1 for what is outside.
local function by_block(list)
  local blocks = {}
  for _, p in ipairs(list) do
    local b = blocks[p.block] or { n = 0, linears = 0, quantized = 0, names = {} }
    blocks[p.block] = b
    b.n = b.n + p.n
    if p.linear then b.linears = b.linears + 1 end
    if p.quantized then b.quantized = b.quantized + 1 end
    b.names[#b.names + 1] = p
  end
  return blocks
end

-- Rows of the blocks of a model, equal neighbours on one.
local function block_rows(m, blocks)
  local rows, last = {}, nil
  for i = 0, m.n_blocks - 1 do
    local b = blocks[i] or { n = 0, linears = 0, quantized = 0 }
    local kind = m.pattern:sub(i + 1, i + 1)
    local row = { kind = kind_names[kind] or kind, n = b.n, linears = b.linears, quantized = b.quantized, from = i, to = i }
    if last and last.kind == row.kind and last.n == row.n and last.quantized == row.quantized and last.linears == row.linears then
      last.to = i
    else
      rows[#rows + 1], last = row, row
    end
  end
  return rows
end

-- A model: one line about it, then its blocks. `list`: its parameters, when they are at hand.
function show.model(m, list)
  local blocks = by_block(list or require "ckaqad.parameter".list(m))
  local cells = {}
  local function add(label, kind, n, note) cells[#cells + 1] = { label, kind, text.count(n), note } end
  local outside = { before = {}, after = {} }
  for _, p in ipairs(blocks[-1] and blocks[-1].names or {}) do
    local side = p.name:find("embed", 1, true) and outside.before or outside.after
    side[#side + 1] = p
  end
  for _, p in ipairs(outside.before) do add("", p.name, p.n, p.quantized and "NVFP4" or "") end
  for _, row in ipairs(block_rows(m, blocks)) do
    local label = row.from == row.to and ("block %d"):format(row.from) or ("blocks %d-%d"):format(row.from, row.to)
    local each = row.to > row.from and " each" or ""
    local nvfp4 = row.quantized > 0 and (", %d NVFP4"):format(row.quantized) or ""
    add(label, row.kind, row.n, ("%d linear%s%s%s"):format(row.linears, row.linears == 1 and "" or "s", nvfp4, each))
  end
  for _, p in ipairs(outside.after) do add("", p.name, p.n, p.quantized and "NVFP4" or "") end
  local widths = { 0, 0, 0 }
  for _, row in ipairs(cells) do
    for c = 1, 3 do widths[c] = math.max(widths[c], #row[c]) end
  end
  local lines = { m:describe() .. (m.quant and ", 4-bit student" or m.nvfp4 and ", NVFP4" or "") }
  for _, row in ipairs(cells) do
    local line = ("  %-" .. widths[1] .. "s  %-" .. widths[2] .. "s  %" .. widths[3] .. "s  %s"):format(row[1], row[2], row[3], row[4])
    lines[#lines + 1] = (line:gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

-- KL (or cross-entropy) of a list of steps as one line: "kl 0.0412 ▇▅▃▂▁ 0.0180".
function show.curve(history)
  local values, name = {}, nil
  for _, step in ipairs(history) do
    local key = type(step.kl) == "number" and "kl" or type(step.ce) == "number" and "ce"
    if key then values[#values + 1], name = step[key], key end
  end
  if #values == 0 then return nil end
  local bars = require "ckaqad.plot".unicode() and require "ckaqad.runs".sparkline(values, 40) or "->"
  return ("%s %s %s %s"):format(name, show.number(values[1]), bars, show.number(values[#values]))
end

-- A run from { name, status, step, steps, history }.
function show.run_line(r)
  local step = r.step and (r.steps and ("step %d/%d"):format(r.step, r.steps) or ("step %d"):format(r.step)) or "no step yet"
  local curve = show.curve(r.history)
  return ("run %s: %s, %s%s"):format(r.name, r.status, step, curve and "\n  " .. curve or "")
end

-- True for what cq.run gave.
local function is_run(value)
  local meta = debug.getmetatable(value)
  local methods = type(meta) == "table" and rawget(meta, "__index")
  return type(methods) == "table" and rawget(methods, "steps") and rawget(methods, "track") and rawget(value, "opt") ~= nil
end

local function own_run(run)
  local last = run.history[#run.history]
  local step = last and last.step
  local total = rawget(run, "total")
  local finished = run.folder and require "ckaqad.hf".exists(run.folder.path .. "/summary.json")
  return show.run_line {
    name = run.folder and run.folder.path or "without a folder", history = run.history, step = step, steps = total,
    status = finished and "finished" or step and (step == total and "all steps done" or "at the prompt") or "begun",
  }
end

local function item(value)
  if type(value) == "string" then return quoted(value, 80) end
  if type(value) == "number" then return show.number(value, 14) end
  if type(value) ~= "table" then return (tostring(value):gsub("^function: .*", "function")) end
  local meta = debug.getmetatable(value)
  if type(meta) == "table" and type(rawget(meta, "__tostring")) == "function" then
    local first = tostring(value):match("^[^\n]*")
    return #first > 80 and first:sub(1, 80) .. "..." or first
  end
  if is_run(value) then return "run" end
  local n = 0
  for _ in next, value do
    n = n + 1
    if n > 1000 then break end
  end
  return n == 0 and "{}" or n > 1000 and "{ over 1000 items }" or ("{ %d item%s }"):format(n, n == 1 and "" or "s")
end

local function plain_key(key) return type(key) == "string" and key:match("^[%a_][%w_]*$") and key or ("[%s]"):format(item(key)) end

local function plain_table(t)
  local parts, length, n = {}, 0, 0
  local function add(part)
    n = n + 1
    if n <= most_items then parts[n], length = part, length + #part + 2 end
  end
  for _, value in ipairs(t) do
    add(item(value))
    if n > most_items then break end
  end
  local list = n
  if n <= most_items then
    local keys, budget = {}, 10000
    for key in next, t do
      if not (type(key) == "number" and key >= 1 and key <= list and key == math.floor(key)) then keys[#keys + 1] = key end
      budget = budget - 1
      if budget == 0 then break end
    end
    table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
    for _, key in ipairs(keys) do add(("%s = %s"):format(plain_key(key), item(rawget(t, key)))) end
  end
  if n > most_items then parts[most_items + 1] = list > most_items and ("... (%d in all)"):format(#t) or ("... (%d in all)"):format(n) end
  if #parts == 0 then return "{}" end
  if length <= line_width then return "{ " .. table.concat(parts, ", ") .. " }" end
  return "{\n  " .. table.concat(parts, ",\n  ") .. "\n}"
end

-- The text for one value.
function show.value(value)
  if type(value) == "string" then return quoted(value, most_bytes) end
  if type(value) == "number" then return show.number(value, 14) end
  if type(value) == "function" then
    local entry, name = require "ckaqad.help".entry_of(value, rawget(_G, "cq"))
    return entry and ("%s  (?%s)"):format(entry.call, entry.name) or name or tostring(value)
  end
  if type(value) ~= "table" then return tostring(value) end
  local meta = debug.getmetatable(value)
  if type(meta) == "table" and type(rawget(meta, "__tostring")) == "function" then return tostring(value) end
  if is_run(value) then return own_run(value) end
  return plain_table(value)
end

--- Prints values as the prompt does, and returns them: `local kl = cq.show(student)`.
function show.show(...)
  local n, parts = select("#", ...), {}
  for i = 1, n do parts[i] = show.value((select(i, ...))) end
  if n > 0 then print(table.concat(parts, n > 1 and not table.concat(parts):find("\n") and "\t" or "\n")) end
  return ...
end

return show
