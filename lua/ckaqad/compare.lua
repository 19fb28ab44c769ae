-- compare.lua - runs beside each other: in which options they differ, and a table of settings over seeds.
--
-- Two runs are a pair when they agree in everything but the named options: same seed, hence same documents, calibration and sampled
-- rows. What differs besides is said, never averaged away in silence.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local passing = require "ckaqad.options".passing
local stats = require "ckaqad.stats"
local table_ = require "ckaqad.table"

local compare = {}

--- An option's value as a person reads it.
---
--- Example:
---     print(cq.compare.show(1e-5)) --> 1e-05
function compare.show(value)
  if value == nil then return "-" end
  if type(value) == "number" then return ("%.10g"):format(value) end
  if type(value) == "table" then return json.encode(value) end
  return value == "" and '""' or tostring(value)
end

local function short(recipe) return (recipe or "-"):match("[^/]*$") end

-- What a run was told, as far as it makes it another run, with its recipe; and the names in the recipe's order.
local function settings(record)
  local values, names = { recipe = short(record.recipe) }, { "recipe" }
  local options = record.options or {}
  for _, name in ipairs(json.keys(options)) do
    if not passing[name] and options[name] ~= json.null then
      names[#names + 1] = name
      values[name] = options[name]
    end
  end
  return values, names
end

--- Options in which records of runs differ: a list of `{ name, values }`, values in the records' order. How a run is shown, kept and
--- stopped does not count.
---
--- Example:
---     local a, b = { options = { lr = 1e-5, out = "a" } }, { options = { lr = 1e-4, out = "b" } }
---     local list = cq.compare.differences { a, b }
---     print(#list, list[1].name, list[1].values[2]) --> 1	lr	0.0001
function compare.differences(records)
  local all, order, known = {}, {}, {}
  for i, record in ipairs(records) do
    local values, names = settings(record)
    all[i] = values
    for _, name in ipairs(names) do
      if not known[name] then order[#order + 1], known[name] = name, true end
    end
  end
  local list = {}
  for _, name in ipairs(order) do
    local values, differ, first = {}, false, compare.show((all[1] or {})[name])
    for i = 1, #all do
      values[i] = compare.show(all[i][name])
      differ = differ or values[i] ~= first
    end
    if differ then list[#list + 1] = { name = name, values = values } end
  end
  return list
end

local facts = {
  { "version", "versions of the program" }, { "model_hash", "models (files' hashes)" }, { "data_hash", "sets of documents (hashes)" },
}

--- What differs between records besides options, as lines.
---
--- Example:
---     print(cq.compare.origins { { version = "0.1.0" }, { version = "0.2.0" } }[1])
---     --> the runs come from 2 versions of the program: 0.1.0, 0.2.0
function compare.origins(records)
  local lines = {}
  for _, fact in ipairs(facts) do
    local seen, list = {}, {}
    for _, record in ipairs(records) do
      local value = record[fact[1]]
      value = value and value:match("^%S+")
      if value and not seen[value] then seen[value], list[#list + 1] = true, value end
    end
    table.sort(list)
    if #list > 1 then lines[#lines + 1] = ("the runs come from %d %s: %s"):format(#list, fact[2], table.concat(list, ", ")) end
  end
  return lines
end

-- ---- settings over seeds --------------------------------------------------------------------------------------------

local function split(list)
  local out = {}
  for item in list:gmatch("[^,%s]+") do out[#out + 1] = item end
  return out
end

-- Names of the options that make the rows: the wanted ones, or all that differ but the seed.
local function factors(differing, by, records)
  if by and by ~= "" then
    local known = {}
    for _, record in ipairs(records) do
      for _, name in ipairs(select(2, settings(record))) do known[#known + 1] = name end
    end
    local names = split(by)
    for i, name in ipairs(names) do
      names[i] = name:gsub("-", "_")
      local found = false
      for _, k in ipairs(known) do found = found or k == names[i] end
      if not found then errors.usage("--by: option %s is unknown, nearest is %s", name, errors.nearest(name, known)) end
    end
    return names
  end
  local names = {}
  for _, d in ipairs(differing) do
    if d.name ~= "seed" then names[#names + 1] = d.name end
  end
  return #names > 0 and names or { "recipe" }
end

-- Sorts groups by their options' values: numbers by size, others in the order in which they were first run.
local function sort_groups(groups, names)
  local ranks = {}
  for j in ipairs(names) do
    local all, seen, n = true, {}, 0
    for _, g in ipairs(groups) do all = all and tonumber(g.shown[j]) ~= nil end
    for _, g in ipairs(groups) do
      local value = g.shown[j]
      if not seen[value] then n, seen[value] = n + 1, all and tonumber(value) or n + 1 end
    end
    ranks[j] = seen
  end
  table.sort(groups, function(a, b)
    for j in ipairs(names) do
      local x, y = ranks[j][a.shown[j]], ranks[j][b.shown[j]]
      if x ~= y then return x < y end
    end
    return false
  end)
end

-- Groups records by the values of `names`; inside a group a run is known by what else it was told (its partner key). Of two equal runs
-- the newest counts.
local function group(records, names, differing)
  local is_factor, groups, by_key, repeated = {}, {}, {}, 0
  for _, name in ipairs(names) do is_factor[name] = true end
  for i = #records, 1, -1 do
    local record = records[i]
    local values = settings(record)
    local mine, rest = {}, {}
    for _, name in ipairs(names) do mine[#mine + 1] = compare.show(values[name]) end
    for _, d in ipairs(differing) do
      if not is_factor[d.name] then rest[#rest + 1] = d.name .. "=" .. d.values[i] end
    end
    local key, partner = table.concat(mine, "\0"), table.concat(rest, ", ")
    local g = by_key[key]
    if not g then
      g = { values = values, shown = mine, runs = {}, count = 0 }
      groups[#groups + 1], by_key[key] = g, g
    end
    if g.runs[partner] then repeated = repeated + 1 else g.count = g.count + 1 end
    g.runs[partner] = record
  end
  sort_groups(groups, names)
  return groups, repeated
end

local function cell(g, field)
  local values = {}
  for partner, record in pairs(g.runs) do values[partner] = type(field) == "function" and field(record) or record[field] end
  local c = table_.cell(values)
  return c.n > 0 and c or nil
end

local function kl_recovery(r) return stats.recovery(r.kl_before, r.kl_after, 0) end

local measures = {
  { key = "kl", title = "KL", field = "kl_after", before = "kl_before", teacher = function() return 0 end, format = "%.5f",
    better = "low" },
  { key = "perplexity", title = "perplexity", field = "perplexity_after", before = "perplexity_before", teacher = "perplexity_teacher",
    format = "%.4f", better = "low" },
  { key = "top1", title = "top-1", field = "top1_after", before = "top1_before", teacher = function() return 1 end, format = "%.4f",
    better = "high" },
  { key = "cka", title = "CKA", field = "cka_after", before = "cka_before", teacher = function() return 1 end, format = "%.5f",
    better = "high" },
  { key = "recovery", title = "recovery %", field = kl_recovery, before = function() return 0 end, teacher = function() return 100 end,
    format = "%.1f" },
}

-- All runs as one group when PTQ is the same for every setting (nothing that changes it differs), else nil.
local function common_ptq(groups)
  local all = { runs = {} }
  for _, g in ipairs(groups) do
    for partner, record in pairs(g.runs) do
      local other = all.runs[partner]
      if other and other.kl_before ~= record.kl_before then return nil end
      if record.kl_before then all.runs[partner] = record end
    end
  end
  return next(all.runs) and all or nil
end

-- "lr=1e-05,cka=all"
local function named(g, names)
  local list = {}
  for j, name in ipairs(names) do list[j] = name .. "=" .. g.shown[j] end
  return table.concat(list, ",")
end

-- The group whose options are `wanted` ("lr=1e-5,cka=all"), the first one without a wish.
local function baseline(groups, names, wanted)
  if not wanted or wanted == "" then return groups[1] end
  local said = {}
  for i, g in ipairs(groups) do
    local all = true
    said[i] = named(g, names)
    for _, part in ipairs(split(wanted)) do
      local hit = false
      for j, name in ipairs(names) do
        local key, value = part:match("^(.-)=(.*)$")
        hit = hit or (key == name and (value == g.shown[j] or (tonumber(value) and tonumber(value) == tonumber(g.shown[j]))))
      end
      all = all and hit
    end
    if all then return g end
  end
  errors.usage("--against: no setting has %s, nearest is %s", wanted, errors.nearest(wanted, said))
end

-- What a reader must know before believing the table.
local function notes_of(groups, names, differing, records)
  local notes, is_factor, also = {}, {}, {}
  for _, name in ipairs(names) do is_factor[name] = true end
  for _, d in ipairs(differing) do
    if d.name ~= "seed" and not is_factor[d.name] then also[#also + 1] = d.name end
  end
  if #also > 0 then
    notes[#notes + 1] = ("flag: the runs differ in more than %s: %s too; only runs equal in it are paired"):format(
      table.concat(names, ", "), table.concat(also, ", "))
  end
  local lonely, counts = 0, {}
  for _, g in ipairs(groups) do
    for partner in pairs(g.runs) do counts[partner] = (counts[partner] or 0) + 1 end
  end
  for _, n in pairs(counts) do
    if n < #groups then lonely = lonely + n end
  end
  if lonely > 0 then
    notes[#notes + 1] = ("flag: %d of %d runs lack a partner of the same seed%s in some other setting"):format(lonely, #records,
      #also > 0 and " and options" or "")
  end
  for _, line in ipairs(compare.origins(records)) do notes[#notes + 1] = "flag: " .. line end
  return notes
end

local function worse_than_ptq(groups, names)
  local list = {}
  for _, g in ipairs(groups) do
    local after, before = cell(g, "kl_after"), cell(g, "kl_before")
    if after and before and after.mean > before.mean then
      list[#list + 1] = named(g, names)
    end
  end
  return #list > 0 and ("warning: KL is worse than PTQ's with " .. table.concat(list, "; ")) or nil
end

--- The table of settings over seeds from records of finished runs: mean ± sd and n, paired KL difference to the first setting with its
--- bootstrap interval, recovery of KL in percent, the best marked where it is clear, and flags where the runs differ in more than the
--- named options. Options: `by` ("lr,cka": options that make the rows; else all that differ but the seed), `against` ("lr=1e-5": the
--- setting that differences are taken to), `title`.
---
--- Example:
---     local list = {}
---     for i = 1, 4 do
---       list[i] = { recipe = "x.lua", kl_before = 0.02, kl_after = 0.01 * i, options = { lr = i % 2, seed = i } }
---     end
---     print(cq.compare.table(list, { by = "lr" }):text())
function compare.table(records, given)
  local o = errors.fill("compare.table", given, { by = errors.NONE, against = errors.NONE, title = "" })
  local usable = {}
  for _, record in ipairs(records) do
    if record.kl_after or record.kl_before then usable[#usable + 1] = record end
  end
  local differing = compare.differences(usable)
  local names = factors(differing, o.by, usable)
  local groups, repeated = group(usable, names, differing)
  local columns, rows = {}, {}
  for _, name in ipairs(names) do columns[#columns + 1] = { key = "option_" .. name, title = name } end
  columns[#columns + 1] = { key = "n" }
  for _, m in ipairs(measures) do columns[#columns + 1] = { key = m.key, title = m.title, format = m.format, better = m.better } end
  local ptq = common_ptq(groups)
  if not ptq then table.insert(columns, #names + 1, { key = "kl_ptq", title = "KL of PTQ", format = "%.5f" }) end
  if #groups > 1 then columns[#columns + 1] = { key = "kl_difference", title = "KL difference", format = "%+.5f" } end
  local base = #groups > 0 and baseline(groups, names, o.against)
  local few = false
  for _, g in ipairs(groups) do
    local row = { n = g.count, kl_ptq = cell(g, "kl_before") }
    for j, name in ipairs(names) do row["option_" .. name] = g.shown[j] end
    for _, m in ipairs(measures) do row[m.key] = cell(g, m.field) end
    if g ~= base and row.kl and base then
      local p = stats.paired(row.kl.values, (cell(base, "kl_after") or { values = {} }).values)
      row.kl_difference = p.n > 0 and { mean = p.difference, low = p.low, high = p.high, n = p.n } or nil
      few = few or p.few
    end
    rows[#rows + 1] = row
  end
  if ptq then
    local bf16, row = { reference = true, ["option_" .. names[1]] = "(BF16)" }, { ["option_" .. names[1]] = "(PTQ)" }
    for _, m in ipairs(measures) do bf16[m.key], row[m.key] = cell(ptq, m.teacher), cell(ptq, m.before) end
    row.recovery, bf16.recovery = row.recovery and row.recovery.mean, bf16.recovery and bf16.recovery.mean
    bf16.kl, bf16.top1, bf16.cka = 0, 1, 1
    bf16.n, row.n = row.kl.n, row.kl.n
    table.insert(rows, 1, row)
    table.insert(rows, 1, bf16)
  end
  local t = table_.new { title = o.title, columns = columns, rows = rows, notes = notes_of(groups, names, differing, usable) }
  t:mark()
  if #groups > 1 then
    table.insert(t.notes, 1, ("KL difference: mean over pairs of the same seed, less the setting %s [95 %% bootstrap interval]"):format(
      named(base, names)))
    if few then t.notes[#t.notes + 1] = ("fewer than %d pairs: such an interval is a hint, no proof"):format(stats.FEW) end
  end
  if repeated > 0 then t.notes[#t.notes + 1] = ("%d runs repeat another one's options; the newest counts"):format(repeated) end
  t.notes[#t.notes + 1] = worse_than_ptq(groups, names)
  return t
end

return compare
