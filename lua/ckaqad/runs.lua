-- runs.lua - `ckaqad runs`: list, show, compare, table, query, report, prune over the run folders below a root.
--
-- Answers go to standard output, everything else to standard error, so `--json` and `--format=csv` can be piped. Nothing is deleted
-- without --yes, and nothing of a run that a process holds.
local compare = require "ckaqad.compare"
local errors = require "ckaqad.errors"
local index = require "ckaqad.index"
local json = require "ckaqad.json"
local table_ = require "ckaqad.table"
local text = require "ckaqad.text"

local runs = {}

local usage = [[
ckaqad runs: what was run, what came of it, and how it compares

  ckaqad runs [list]                        all runs, the newest first; --status=NAME, --last=N
  ckaqad runs show RUN                      options, results, KL of the steps
  ckaqad runs compare RUN RUN...            the options that differ, the results side by side
  ckaqad runs table [NAME...]               finished runs (of these folders or sweeps) over seeds: mean ± sd, paired differences
                                            --by=lr,cka   options that make the rows (else all that differ but the seed)
                                            --against=lr=1e-5   the setting that differences are taken to (else the first)
                                            --format=text|markdown|csv|latex|html
  ckaqad runs query "SELECT ..."            SQL on the index, read-only; --format as above
  ckaqad runs report RUN|SWEEP              writes its report.html again
  ckaqad runs prune [NAME...]               checkpoints of finished runs; --stopped: whole stopped runs. Only --yes deletes

  --root=DIR   where the run folders are [runs]        --json   JSON, one object a line

RUN: a name of the list, a path, or the last part of a name (a point's hash). The index is ROOT/.index.sqlite, a cache that may be deleted.
Columns of its table `runs`:]]

function runs.help()
  local lines = { usage }
  for _, column in ipairs(index.columns) do
    lines[#lines + 1] = ("  %-19s %-8s %s"):format(column[1], column[2]:match("^%w+"), column[3])
  end
  return table.concat(lines, "\n")
end

local function note(format, ...) io.stderr:write(format:format(...), "\n") end

local function number(value, format) return value and format:format(value) or "-" end

-- 7300 -> "2 h"
function runs.age(seconds)
  if not seconds then return "-" end
  for _, unit in ipairs { { 2 * 86400, 86400, "d" }, { 2 * 3600, 3600, "h" }, { 120, 60, "min" } } do
    if seconds >= unit[1] then return ("%d %s"):format(math.floor(seconds / unit[2]), unit[3]) end
  end
  return ("%d s"):format(math.max(0, seconds))
end

local bars = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

-- Numbers as a row of small bars, at most `width` of them.
function runs.sparkline(list, width)
  local low, high, out = math.huge, -math.huge, {}
  for _, x in ipairs(list) do low, high = math.min(low, x), math.max(high, x) end
  local n = math.min(#list, width or 48)
  for i = 1, n do
    local x = list[math.ceil(i * #list / n)]
    out[i] = bars[high > low and 1 + math.floor((x - low) / (high - low) * 7 + 0.5) or 4]
  end
  return table.concat(out)
end

local function steps_of(r)
  if not r.step then return "-" end
  return r.steps and ("%d/%d"):format(r.step, r.steps) or ("%d"):format(r.step)
end

local function kl_of(r)
  if r.kl_after then return ("%s → %.4f"):format(number(r.kl_before, "%.4f"), r.kl_after) end
  if r.kl_eval and r.eval_step > 0 then return ("%s → %.4f @%d"):format(number(r.kl_before, "%.4f"), r.kl_eval, r.eval_step) end
  return number(r.kl_before, "%.4f")
end

local function cka_of(r)
  if r.cka_after then return ("%s → %.4f"):format(number(r.cka_before, "%.4f"), r.cka_after) end
  return number(r.cka_before, "%.4f")
end

-- Adds a key and its value to a list for json.object, unless there is none.
local function put(list, key, value)
  if value == nil then return end
  local n = #list
  list[n + 1], list[n + 2] = key, value
end

-- A record as an object for --json.
local function plain(r)
  local list = {}
  for _, column in ipairs(index.columns) do put(list, column[1], r[column[1]]) end
  local o = json.object(list)
  if o.export_bit_equal then o.export_bit_equal = o.export_bit_equal == 1 end
  return o
end

-- ---- finding a run --------------------------------------------------------------------------------------------------

local function trim(self, name) return (name:gsub("(.)/+$", "%1"):gsub("^%./", ""):gsub("^" .. self.root:gsub("%p", "%%%0") .. "/", "")) end

local function exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

-- The record that `given` means: a name, a path, the last part of one name.
local function find(self, given)
  local name = trim(self, given)
  local hit = self:runs { name = name }[1]
  if hit then return hit end
  if exists(given .. "/run.json") then return index.open(given):runs()[1] end
  local names, ends = {}, {}
  for _, r in ipairs(self:runs { only = { "name" } }) do
    names[#names + 1] = r.name
    if r.name:sub(-#name - 1) == "/" .. name then ends[#ends + 1] = r.name end
  end
  if #ends == 1 then return self:runs { name = ends[1] }[1] end
  if #ends > 1 then errors.usage("run %s: means %d runs: %s", given, #ends, table.concat(ends, ", ", 1, math.min(#ends, 5))) end
  if #names == 0 then errors.usage("run %s: not found, %s holds no runs", given, self.root) end
  errors.usage("run %s: not found below %s, nearest is %s", given, self.root, errors.nearest(name, names))
end

-- All records below the named folders, or all.
local function below(self, names, filter)
  if #names == 0 then return self:runs(filter) end
  local list, seen = {}, {}
  for _, given in ipairs(names) do
    local f = { under = trim(self, given) }
    for key, value in pairs(filter or {}) do f[key] = value end
    local found = self:runs(f)
    if #found == 0 and #self:runs { under = f.under, only = { "name" } } == 0 then found = { find(self, given) } end
    for _, r in ipairs(found) do
      if not seen[r.name] then seen[r.name], list[#list + 1] = true, r end
    end
  end
  table.sort(list, function(a, b)
    if a.started_at ~= b.started_at then return (a.started_at or 0) > (b.started_at or 0) end
    return a.name < b.name
  end)
  return list
end

-- ---- the commands ---------------------------------------------------------------------------------------------------

local command = {}
local listed = { "name", "status", "recipe", "setting", "started_at", "step", "steps", "kl_before", "kl_after", "kl_eval", "eval_step",
  "cka_before", "cka_after" }

function command.list(self, names, o)
  local filter = { only = not o.json and listed or nil, status = o.status ~= "" and o.status or nil, last = o.last > 0 and o.last or nil }
  local list = below(self, names, filter)
  if o.json then
    for _, r in ipairs(list) do print(json.encode(plain(r))) end
    return
  end
  if #list == 0 then return note("no runs below %s%s", self.root, o.status ~= "" and " with status " .. o.status or "") end
  local now, rows, swept = os.time(), {}, false
  for i, r in ipairs(list) do
    swept = swept or r.setting ~= nil
    rows[i] = { name = r.name, setting = r.setting, status = r.status, steps = steps_of(r), kl = kl_of(r), cka = cka_of(r),
      recipe = (r.recipe or "-"):match("([^/]*)$"):gsub("%.lua$", ""),
      age = runs.age(r.started_at and now - r.started_at) }
  end
  local columns = { { key = "name", title = "run" }, { key = "status" }, { key = "recipe" }, { key = "steps", title = "step" },
    { key = "kl", title = "KL" }, { key = "cka", title = "CKA" }, { key = "age" } }
  if swept then table.insert(columns, 4, { key = "setting" }) end
  io.write(table_.new({ columns = columns, rows = rows }):text())
end

local function results(r)
  local rows = {
    { what = "BF16", kl = 0, perplexity = r.perplexity_teacher, top1 = 1, cka = 1 },
    { what = "PTQ", kl = r.kl_before, perplexity = r.perplexity_before, top1 = r.top1_before, cka = r.cka_before },
    { what = "trained", kl = r.kl_after, perplexity = r.perplexity_after, top1 = r.top1_after, cka = r.cka_after },
  }
  if not r.kl_after then rows[3] = nil end
  return table_.new { columns = { { key = "what", title = "" }, { key = "kl", title = "KL", format = "%.5f" },
    { key = "perplexity", format = "%.4f" }, { key = "top1", title = "top-1", format = "%.4f" },
    { key = "cka", title = "CKA", format = "%.5f" } }, rows = rows }
end

function command.show(self, names, o)
  if #names ~= 1 then errors.usage("runs show: %d runs, wanted one: ckaqad runs show RUN", #names) end
  local r = find(self, names[1])
  if o.json then return print(json.encode(plain(r))) end
  print(("%s: %s%s"):format(r.path, r.status, r.problem and " (" .. r.problem .. ")" or ""))
  if not r.options then return end
  if r.setting then print(("point of %s: %s"):format(r.sweep, r.setting)) end
  local age = runs.age(r.started_at and os.time() - r.started_at)
  print(("recipe %s, started %s (%s ago)"):format(r.recipe or "-", r.started or "-", age))
  local memory = r.peak_bytes and (", peak %s (planned %s)"):format(text.bytes(r.peak_bytes), text.bytes(r.planned_bytes or 0)) or ""
  print(("step %s%s%s, version %s"):format(steps_of(r), r.seconds and " in " .. text.duration(r.seconds) or "", memory,
    (r.version or "-"):match("^%S+")))
  local equal = r.export_bit_equal
  if equal then print("export: " .. (equal == 1 and "bit for bit what was trained" or "NOT what was trained")) end
  if r.curve and #r.curve > 0 then
    print(("KL of the steps: %s  %.4f → %.4f"):format(runs.sparkline(r.curve), r.curve[1], r.curve[#r.curve]))
  end
  if r.kl_before then
    print()
    io.write(results(r):text())
    local won = r.kl_after and require("ckaqad.stats").recovery(r.kl_before, r.kl_after, 0)
    if won then print(("recovery of KL: %.1f %%%s"):format(won, won < 0 and " (worse than PTQ)" or "")) end
  end
  print "\noptions"
  local rows = {}
  for i, name in ipairs(json.keys(r.options)) do rows[i] = { "  " .. name, compare.show(r.options[name]) } end
  local width = 0
  for _, row in ipairs(rows) do width = math.max(width, #row[1]) end
  for _, row in ipairs(rows) do print(row[1] .. (" "):rep(width - #row[1] + 2) .. row[2]) end
end

local side_by_side = {
  { "status", "%s" }, { "step", "%d" }, { "kl_before", "%.5f", "KL of PTQ" }, { "kl_after", "%.5f", "KL" },
  { "perplexity_after", "%.4f", "perplexity" }, { "top1_after", "%.4f", "top-1" }, { "cka_after", "%.5f", "CKA" },
  { "cka_min_after", "%.5f", "lowest CKA" }, { "seconds", "%.1f" },
}

function command.compare(self, names, o)
  if #names < 2 then errors.usage("runs compare: %d run, wanted two or more: ckaqad runs compare RUN RUN...", #names) end
  local list, titles = {}, {}
  for i, name in ipairs(names) do
    list[i] = find(self, name)
    titles[i] = list[i].name
  end
  local differing, factors = compare.differences(list), {}
  local columns, rows = { { key = "what", title = "" } }, {}
  for i, title in ipairs(titles) do columns[i + 1] = { key = "run" .. i, title = title } end
  local function add(what, values)
    local row = { what = what }
    for i in ipairs(list) do row["run" .. i] = values[i] end
    rows[#rows + 1] = row
  end
  for _, d in ipairs(differing) do
    if d.name ~= "seed" then factors[#factors + 1] = d.name end
    add(d.name == "recipe" and d.name or "--" .. d.name, d.values)
  end
  for _, item in ipairs(side_by_side) do
    local values, any = {}, false
    for i, r in ipairs(list) do
      values[i], any = number(r[item[1]], item[2]), any or r[item[1]] ~= nil
    end
    if any then add(item[3] or item[1], values) end
  end
  local notes = {}
  if #differing == 0 then notes[1] = "the options are the same" end
  if #factors > 1 then
    notes[1] = ("flag: the runs differ in %d options besides the seed (%s): a difference in results has no single cause"):format(#factors,
      table.concat(factors, ", "))
  end
  for _, line in ipairs(compare.origins(list)) do notes[#notes + 1] = "flag: " .. line end
  if not o.json then return io.write(table_.new({ columns = columns, rows = rows, notes = notes }):render(o.format)) end
  local options, records = {}, json.array {}
  for _, d in ipairs(differing) do put(options, d.name, d.values) end
  for i, r in ipairs(list) do records[i] = plain(r) end
  print(json.encode(json.object { "runs", titles, "differ", json.object(options), "flags", json.array(notes), "confounded", #factors > 1,
    "records", records }))
end

-- A table's rows as JSON objects, numbers with all digits.
local function print_rows(t)
  for _, row in ipairs(t.rows) do
    local list = {}
    for _, column in ipairs(t.columns) do
      local c = row[column.key]
      if type(c) == "table" then
        c = json.object { "mean", c.mean, "sd", c.sd, "low", c.low, "high", c.high, "n", c.n, "best", c.mark }
      end
      put(list, column.key, c)
    end
    print(json.encode(json.object(list)))
  end
  for _, line in ipairs(t.notes) do note("%s", line) end
end

function command.table(self, names, o)
  local list = below(self, names, { status = "finished" })
  if #list == 0 then return note("no finished runs below %s", self.root) end
  local all = #below(self, names, { only = { "name", "started_at" } })
  local t = compare.table(list, { by = o.by, against = o.against })
  if all > #list then t.notes[#t.notes + 1] = ("%d runs that are not finished are left out"):format(all - #list) end
  if o.json then return print_rows(t) end
  io.write(t:render(o.format))
end

function command.query(self, names, o)
  if #names ~= 1 then errors.usage("runs query: %d arguments, wanted one: ckaqad runs query \"SELECT ...\"", #names) end
  local rows, columns = self:query(names[1])
  if o.json then
    for _, row in ipairs(rows) do
      local list = {}
      for _, name in ipairs(columns) do put(list, name, row[name] == nil and json.null or row[name]) end
      print(json.encode(json.object(list)))
    end
    return
  end
  for i, name in ipairs(columns) do columns[i] = { key = name, format = "%.10g" } end
  io.write(table_.new({ columns = columns, rows = rows }):render(o.format))
end

local function write_report(path)
  local native, report = require "ckaqad.ffi", require "ckaqad.report"
  local html = exists(path .. "/sweep.json") and report.sweep(path) or report.run(path)
  native.call.cq_file_write(path .. "/report.html", html, #html)
  print(path .. "/report.html")
end

-- True for a folder that holds a run or a sweep: it needs no index.
local function is_folder(path) return exists(path .. "/run.json") or exists(path .. "/sweep.json") end

function command.report(self, names)
  if #names ~= 1 then errors.usage("runs report: %d names, wanted one run or sweep: ckaqad runs report NAME", #names) end
  local name = trim(self, names[1])
  local sweep
  for _, path in ipairs { self.root .. "/" .. name, names[1] } do
    if exists(path .. "/sweep.json") then sweep = sweep or path end
  end
  write_report(sweep or find(self, names[1]).path)
end

-- Bytes of a folder with all below it.
local function bytes_of(files, path)
  local sum = 0
  for _, name in ipairs(files.list(path) or {}) do
    local inner = path .. "/" .. name
    local _, bytes = files.stat(inner)
    sum = sum + (files.list(inner) and bytes_of(files, inner) or bytes or 0)
  end
  return sum
end

-- Removes what belongs to a run unless a process holds the run or its sweep; true when it is gone.
local function remove(self, r, path)
  local native = require "ckaqad.ffi"
  require "ckaqad.ranks".refuse "runs prune"
  local driver = r.sweep and self.files.holder(("%s/%s/lock"):format(self.root, r.sweep)) or 0
  local release = driver == 0 and self.files.lock(r.path .. "/lock")
  if not release then
    note("kept %s: held by a running process", path)
    return false
  end
  local ok, e = pcall(native.call.cq_folder_remove, path)
  release()
  if not ok then error(e, 0) end
  return true
end

function command.prune(self, names, o)
  local sum, count = 0, 0
  for _, r in ipairs(below(self, names, { only = { "name", "sweep", "started_at" }, status = o.stopped and "stopped" or "finished" })) do
    local path = o.stopped and r.path or r.path .. "/checkpoints"
    if self.files.stat(path) then
      local bytes = bytes_of(self.files, path)
      if not o.yes or remove(self, r, path) then
        sum, count = sum + bytes, count + 1
        print(o.json and json.encode(json.object { "path", path, "bytes", bytes, "deleted", o.yes })
          or ("%s  %s%s"):format(path, text.bytes(bytes), o.yes and "  deleted" or ""))
      end
    end
  end
  if count == 0 then return note("nothing to delete below %s", self.root) end
  local what = count == 1 and "1 folder" or ("%d folders"):format(count)
  note(o.yes and "deleted %s, %s" or "would delete %s, %s; --yes does it", what, text.bytes(sum))
end

-- ---- the command line -----------------------------------------------------------------------------------------------

local commands = { "list", "show", "compare", "table", "query", "report", "prune" }
local flags = { json = true, yes = true, stopped = true }

-- Options, and what is left: a command and names.
local function parse(arguments)
  local o = { root = "runs", json = false, format = "text", by = "", against = "", yes = false, stopped = false, last = 0, status = "" }
  local known, rest, i = {}, {}, 1
  for key in pairs(o) do known[#known + 1] = key end
  while arguments[i] do
    local a = arguments[i]
    if a == "--help" or a == "-h" then return nil end
    local key, value = a:match("^%-%-([%w_-]+)=(.*)$")
    key = key or a:match("^%-%-?([%w_-]+)$")
    if not key then
      rest[#rest + 1] = a
    elseif o[key] == nil then
      errors.usage("runs: option --%s is unknown, nearest is --%s", key, errors.nearest(key, known))
    elseif flags[key] then
      o[key] = true
    else
      if not value then i, value = i + 1, arguments[i + 1] end
      if not value then errors.usage("runs: option --%s: the value is missing, wanted --%s=VALUE", key, key) end
      o[key], o.given = value, key == "root" or o.given
    end
    i = i + 1
  end
  local last = tonumber(o.last)
  if not last or last < 0 or last ~= math.floor(last) then errors.usage("runs: --last=%s, wanted a whole number", o.last) end
  o.last = last
  errors.choose("runs: --format", o.format, table_.formats)
  return o, rest
end

-- Runs `ckaqad runs` with its arguments.
function runs.command(arguments)
  local o, names = parse(arguments)
  if not o then return print(runs.help()) end
  local name = table.remove(names, 1) or "list"
  errors.choose("runs", name, commands)
  if name == "report" and #names == 1 and is_folder(names[1]) then return write_report((names[1]:gsub("(.)/+$", "%1"))) end
  if not o.given and not exists(o.root .. "/.") then return note("no runs: folder %s does not exist (--root=DIR)", o.root) end
  local self = index.open(o.root)
  command[name](self, names, o)
  self:close()
end

--- Records of the runs below a folder, the newest first: columns of `ckaqad runs --help`, `options` and `curve` as tables. Options:
--- `root` ("runs"), and filters: a column and its value, `under`, `last`. An absent folder holds no runs.
---
--- Example:
---     for _, r in ipairs(cq.runs { status = "finished" }) do print(r.name, r.kl_before, r.kl_after, r.options.lr) end
function runs.runs(given)
  local root, filter = given and given.root or "runs", {}
  for key, value in pairs(given or {}) do
    if key ~= "root" then filter[key] = value end
  end
  if not exists(root .. "/.") then return {} end
  local self = index.open(root)
  local list = self:runs(filter)
  self:close()
  return list
end

return runs
