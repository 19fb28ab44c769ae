-- sweep_table.lua - the table at the end of a sweep: settings down, measures across, and what a comparison does not show by itself.
--
-- Settings are compared in pairs of the same seed. A row that differs from the first in more than one option has no single cause;
-- runs that differ in an option nobody named (by a preset, another build, other files) make the whole table confounded. Both are
-- said below the table, and a confounded table marks nothing as best. The files hold every column; a terminal gets those that fit.
local native = require "ckaqad.ffi"
local folder = require "ckaqad.folder"
local json = require "ckaqad.json"
local options = require "ckaqad.options"
local points = require "ckaqad.sweep_points"
local stats = require "ckaqad.stats"
local table_ = require "ckaqad.table"

local sweep_table = {}

-- What a run did, as options and further facts that must agree for a fair comparison. `run` is the content of its run.json.
function sweep_table.facts(run)
  local facts = {}
  for key, value in pairs(type(run.options) == "table" and run.options or {}) do facts[key] = value end
  facts["program version"] = run.version
  local device = type(run.device) == "table" and run.device or {}
  facts["kernels in use"], facts["instructions"] = device.kernels, device.instructions
  local model = type(run.model) == "table" and run.model or {}
  facts["model files"] = model.sha256 and json.encode(model.sha256)
  return facts
end

--- Options and facts in which runs differ besides `factors` (a list of names), the seed, and how a run is shown:
--- { { key, values } }. `runs`: contents of run.json files.
function sweep_table.compare(runs, factors)
  local allowed, list = { seed = true }, {}
  for key in pairs(options.passing) do allowed[key] = true end
  for _, name in ipairs(factors) do
    allowed[name] = true
    if name == "model" then allowed["model files"] = true end
    if name == "kernels" then allowed["kernels in use"], allowed["instructions"] = true, true end
  end
  for i, run in ipairs(runs) do list[i] = sweep_table.facts(run) end
  return points.differences(list, allowed)
end

-- The finished points by setting: { name, options, keys, runs = { [seed] = { summary, run } } }, in the plan's order.
local function gather(plan, d)
  local groups, order, finished = {}, {}, 0
  for _, p in ipairs(plan.points) do
    local g = groups[p.name]
    if not g then
      g = { name = p.name, options = p.options, keys = p.keys, runs = {}, resolved = p.resolved }
      groups[p.name] = g
      order[#order + 1] = g
    end
    local dir = d:folder(p)
    local ok, summary = pcall(folder.read_json, dir .. "/summary.json")
    local known, run = pcall(folder.read_json, dir .. "/run.json")
    if not (ok and known) then d.failed[p.hash] = tostring(not ok and summary or run) end -- a damaged file is no result
    if ok and known and summary then
      g.runs[p.seed or 0] = { summary = summary, run = run or {} }
      finished = finished + 1
    elseif d.failed[p.hash] then
      g.failed = (g.failed or 0) + 1
    elseif d.dropped[p.hash] then
      g.dropped = d.dropped[p.hash]
    end
  end
  return order, finished
end

local function values_of(group, part, key)
  local values = {}
  for seed, r in pairs(group.runs) do
    local section = r.summary[part]
    local value = type(section) == "table" and section[key]
    if type(value) == "number" then values[seed] = value end
  end
  return values
end

local function recovery(group)
  local values = {}
  for seed, r in pairs(group.runs) do
    local before, after = r.summary.before, r.summary.after
    if type(before) == "table" and type(after) == "table" then values[seed] = stats.recovery(before.kl, after.kl, 0) end
  end
  return values
end

local function cell(values) return next(values) and table_.cell(values) or nil end

-- The PTQ row, when quantization is the same in every setting.
local function ptq_row(groups)
  local first
  for _, g in ipairs(groups) do
    for seed, kl in pairs(values_of(g, "before", "kl")) do
      first = first or {}
      if first[seed] and first[seed] ~= kl then return nil end
      first[seed] = kl
    end
  end
  if not first then return nil end
  local row = { setting = "PTQ", reference = true }
  row.n = stats.summary(first).n
  for _, key in ipairs { "kl", "perplexity", "top1", "cka" } do
    local all = {}
    for _, g in ipairs(groups) do
      for seed, value in pairs(values_of(g, "before", key)) do all[seed] = value end
    end
    row[key] = cell(all)
    -- seeds that calibrate on the same documents have the very same PTQ: no spread to show
    if row[key] and row[key].sd == 0 then row[key] = { value = row[key].mean } end
  end
  return row
end

-- Names of the options in which two settings differ.
local function changed(a, b)
  local list = {}
  for _, d in ipairs(points.differences({ a.resolved, b.resolved }, (function()
    local allowed = { seed = true }
    for key in pairs(options.passing) do allowed[key] = true end
    return allowed
  end)())) do list[#list + 1] = d.key end
  return list
end

-- The setting that the others are compared with: the first that has a finished point.
local function reference(groups)
  for _, g in ipairs(groups) do
    if next(g.runs) then return g end
  end
  return groups[1]
end

-- Rows, and what is to be said below them: { several, few, unclear, single }.
local function rows_of(groups)
  local rows, first, said = {}, reference(groups), {}
  for _, g in ipairs(groups) do
    local kl = values_of(g, "after", "kl")
    local row = {
      setting = g.name, n = stats.summary(kl).n, kl = cell(kl), perplexity = cell(values_of(g, "after", "perplexity")),
      top1 = cell(values_of(g, "after", "top1")), cka = cell(values_of(g, "after", "cka")), recovery = cell(recovery(g)),
    }
    if g ~= first then
      local keys = changed(first, g)
      row.changed = table.concat(keys, ", ") .. (#keys > 1 and " (!)" or "")
      local p = stats.paired(kl, values_of(first, "after", "kl"))
      row.difference = table_.difference(p)
      said.several, said.few, said.single = said.several or #keys > 1, said.few or (p.n > 1 and p.few), said.single or p.n == 1
      said.unclear = said.unclear or (p.n > 1 and not p.clear)
    end
    if g.dropped then row.setting = ("%s (dropped at step %d)"):format(g.name, g.dropped) end
    if g.failed then row.setting = ("%s (%d failed)"):format(g.name, g.failed) end
    rows[#rows + 1] = row
  end
  return rows, said
end

local function notes_of(plan, groups, said)
  local notes, runs, factors = {}, {}, {}
  for _, g in ipairs(groups) do
    for _, r in pairs(g.runs) do runs[#runs + 1] = r.run end
  end
  for i, axis in ipairs(plan.axes) do factors[i] = axis.name end
  local differing = sweep_table.compare(runs, factors)
  for _, item in ipairs(differing) do
    local values = table.concat(item.values, " / ")
    if #values > 60 then values = #item.values .. " values" end
    notes[#notes + 1] = ("CONFOUNDED: the runs differ in %s too (%s)"):format(item.key, values)
  end
  if said.several then
    notes[#notes + 1] = "(!) differs from the first setting in more than one option: the difference has no single cause"
  end
  if said.unclear then notes[#notes + 1] = "? the paired 95 % interval includes zero" end
  if said.single then notes[#notes + 1] = "one seed in common: a difference has no interval, wanted --seeds=2 or more" end
  return notes, #differing > 0
end

local function columns_of(plan, groups, rows)
  local columns = {
    { key = "setting", title = "setting" },
    { key = "n", title = "n" },
    { key = "kl", title = "KL", format = "%.5f", better = "low" },
    { key = "perplexity", title = "perplexity", format = "%.4f", better = "low" },
    { key = "top1", title = "top-1", format = "%.4f", better = "high" },
    { key = "cka", title = "CKA", format = "%.4f", better = "high" },
    { key = "recovery", title = "recovery %", format = "%.1f", better = "high" },
  }
  if #groups < 2 then return columns end
  columns[#columns + 1] = { key = "difference", title = "KL - KL of " .. reference(groups).name }
  for _, row in ipairs(rows) do
    -- names of one axis say themselves what changed
    if row.changed and (#plan.axes ~= 1 or row.changed ~= plan.axes[1].name) then
      columns[#columns + 1] = { key = "changed", title = "changed" }
      break
    end
  end
  return columns
end

local function title_of(plan, d, groups, finished)
  local dropped = 0
  for _ in pairs(d.dropped) do dropped = dropped + 1 end
  return ("%s: %d setting%s, %d of %d points%s"):format(plan.recipe:match("[^/]*$"), #groups, #groups == 1 and "" or "s", finished,
    #plan.points, dropped > 0 and (", %d dropped on the way"):format(dropped) or "")
end

-- Width of the widest row on the screen; notes may wrap.
local function width_of(t)
  local most, i = 0, 0
  for line in t:text():gmatch("[^\n]*") do
    i = i + (line ~= "" and 1 or 0)
    if i <= #t.rows + 2 then most = math.max(most, select(2, line:gsub("[^\128-\191]", ""))) end
  end
  return most
end

--- The text of a sweep's table for a screen of `columns` characters: top-1, then perplexity stay out when they do not fit.
function sweep_table.text(t, columns)
  local all, hidden = t.columns, {}
  for _, key in ipairs { "top1", "perplexity" } do
    if width_of(t) <= columns then break end
    local left = {}
    for _, column in ipairs(t.columns) do
      if column.key == key then hidden[#hidden + 1] = column.title else left[#left + 1] = column end
    end
    t.columns = left
  end
  local shown = t:text()
  t.columns = all
  return shown .. (#hidden > 0 and ("too wide for here, so only in the files: %s\n"):format(table.concat(hidden, ", ")) or "")
end

-- Writes files; what went wrong, or nil. Files that cannot be written must not cost the table of a night.
local function write_all(path, files)
  for name, content in pairs(files) do
    local ok, e = pcall(native.call.cq_file_write, path .. "/" .. name, content, #content)
    if not ok and type(e) == "table" and e.exit then error(e, 0) end
    if not ok then return tostring(e) end
  end
end

--- Builds the table of a sweep and writes table.md, table.csv, table.tex and report.html. Gives { table, finished, confounded,
--- report, unwritten = why a file could not be written }.
function sweep_table.make(plan, d)
  local groups, finished = gather(plan, d)
  local rows, said = rows_of(groups)
  local notes, confounded = notes_of(plan, groups, said)
  local columns = columns_of(plan, groups, rows)
  local ptq = ptq_row(groups)
  if ptq then table.insert(rows, 1, ptq) end
  local t = table_.new { title = title_of(plan, d, groups, finished), columns = columns, rows = rows, notes = notes }
  -- the legend of a mark says itself that few seeds prove little
  if (confounded or t:mark() == 0) and said.few then
    t.notes[#t.notes + 1] = ("fewer than %d seeds: an interval is a hint, not a proof"):format(stats.FEW)
  end
  local result = { table = t, finished = finished, confounded = confounded, points = plan.points }
  result.unwritten = write_all(plan.path, { ["table.md"] = t:markdown(), ["table.csv"] = t:csv(), ["table.tex"] = t:latex() })
  if finished > 0 then
    local ok, html = pcall(function() return require "ckaqad.report".sweep(plan.path) end)
    if ok then
      local why = write_all(plan.path, { ["report.html"] = html })
      result.unwritten = result.unwritten or why
      result.report = not why and plan.path .. "/report.html" or nil
    elseif type(html) == "table" and html.exit then
      error(html, 0)
    else
      print("report: not drawn: " .. tostring(html))
    end
  end
  return result
end

return sweep_table
