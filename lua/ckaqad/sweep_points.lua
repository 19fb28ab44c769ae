-- sweep_points.lua - the points of a sweep, as values: what is tried, in which order, under which name. No process and no file is
-- touched here.
--
-- A setting is what a sweep compares: { name, set = { key = value }, keys = { ordered } }. A point is a setting with a seed. Every
-- setting gets the same seeds, so that two settings can be compared in pairs. A point's name on disk is the hash of its resolved
-- options, whatever order they were typed in and however the run is shown: the same hash is the same run.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local points = {}

-- A value as a person reads it in a name.
function points.show(value)
  if type(value) == "number" and value ~= math.floor(value) then return ("%.6g"):format(value) end
  return value == "" and "none" or tostring(value)
end

-- A value as a command line takes it: a number with as many digits as bring back its bits.
function points.typed(value)
  if type(value) ~= "number" then return tostring(value) end
  if value == math.floor(value) and math.abs(value) < 2 ^ 53 then return ("%d"):format(value) end
  local short = ("%.15g"):format(value)
  return tonumber(short) == value and short or ("%.17g"):format(value)
end

local MOST = 100000

local function range(text)
  local first, last = text:match("^(%-?%d+)%.%.(%-?%d+)$")
  if not first then return nil end
  first, last = tonumber(first), tonumber(last)
  if last < first then errors.usage("--sweep: the range %s is empty, wanted FIRST..LAST", text) end
  if last - first >= MOST then errors.usage("--sweep: the range %s has %d values, wanted at most %d", text, last - first + 1, MOST) end
  local values = {}
  for i = first, last do values[#values + 1] = tostring(i) end
  return values
end

--- Axes of `--sweep` texts: "lr=1e-5,3e-5", "seed=1..3". A value that holds a comma itself: "cka=3,7;all" (then ; separates).
function points.parse(specs)
  local axes, seen = {}, {}
  for _, spec in ipairs(specs) do
    local name, text = spec:match("^%-?%-?([%a_][%w_%-]*)%s*=%s*(.-)%s*$")
    if not name or text == "" then errors.usage("--sweep: got %q, wanted KEY=A,B,C or KEY=1..5", spec) end
    name = name:gsub("-", "_")
    if seen[name] then errors.usage("--sweep: %s is named twice, wanted one --sweep %s=A,B,C", name, name) end
    seen[name] = true
    local separator, values = text:find(";", 1, true) and ";" or ",", range(text)
    if not values then
      values = {}
      for value in (text .. separator):gmatch("(.-)" .. separator) do
        value = value:match("^%s*(.-)%s*$")
        if value == "" then errors.usage("--sweep: %s has an empty value, wanted %s=A,B,C", spec, name) end
        values[#values + 1] = value
      end
    end
    axes[#axes + 1] = { name = name, values = values }
  end
  return axes
end

local function setting(keys, set, name)
  if not name then
    local parts = {}
    for i, key in ipairs(keys) do parts[i] = key .. "=" .. points.show(set[key]) end
    name = #parts > 0 and table.concat(parts, " ") or "base"
  end
  return { name = name, set = set, keys = keys }
end

local function scalar(value, what)
  local kind = type(value)
  if kind ~= "number" and kind ~= "string" and kind ~= "boolean" then
    errors.usage("sweep: %s: got a %s, wanted a number, a text or true and false", what, kind == "nil" and "hole" or kind)
  end
  return value
end

-- { name = { a, b } } -> axes sorted by name, or the axes that --sweep gave.
local function axes_of(form, given)
  local axes = {}
  if given[1] then return given end
  for name, values in pairs(given) do
    if type(values) ~= "table" or #values == 0 then errors.usage("sweep: %s.%s: wanted a list of values", form, tostring(name)) end
    for i = 1, table.maxn(values) do scalar(values[i], form .. "." .. name) end
    axes[#axes + 1] = { name = name, values = values }
  end
  table.sort(axes, function(a, b) return a.name < b.name end)
  if #axes == 0 then errors.usage("sweep: %s is empty, wanted %s = { option = { values }, ... }", form, form) end
  return axes
end

local function names_of(axes)
  local keys = {}
  for i, axis in ipairs(axes) do keys[i] = axis.name end
  return keys
end

local function expand_grid(axes)
  local keys, total = names_of(axes), 1
  for _, axis in ipairs(axes) do total = total * #axis.values end
  if total > MOST then errors.usage("sweep: the grid has %d points, wanted at most %d", total, MOST) end
  local settings = {}
  for i = 0, total - 1 do
    local set, rest = {}, i
    for j = #axes, 1, -1 do -- the last axis runs fastest
      local values = axes[j].values
      set[axes[j].name] = values[rest % #values + 1]
      rest = math.floor(rest / #values)
    end
    settings[#settings + 1] = setting(keys, set)
  end
  return settings
end

local function expand_paired(axes)
  local keys, n, settings = names_of(axes), #axes[1].values, {}
  for _, axis in ipairs(axes) do
    if #axis.values ~= n then
      errors.usage("sweep: paired.%s has %d values and paired.%s has %d, wanted the same number", axes[1].name, n, axis.name, #axis.values)
    end
  end
  for i = 1, n do
    local set = {}
    for _, axis in ipairs(axes) do set[axis.name] = axis.values[i] end
    settings[i] = setting(keys, set)
  end
  return settings
end

-- A uniform or log-uniform number with four digits, so that what is printed is what ran.
local function draw_range(name, r, draw)
  local o = errors.fill("sweep: random.space." .. name, r, { min = errors.NONE, max = errors.NONE, log = false, integer = false })
  if type(o.min) ~= "number" or type(o.max) ~= "number" or o.max < o.min or (o.log and o.min <= 0) then
    errors.usage("sweep: random.space.%s: wanted min <= max%s, or a list of values", name, o.log and " and min > 0 for log" or "")
  end
  local u = draw()
  local value = o.log and o.min * (o.max / o.min) ^ u or o.min + (o.max - o.min) * u
  if o.integer then return math.max(math.ceil(o.min), math.min(math.floor(o.max), math.floor(value + 0.5))) end
  return math.max(o.min, math.min(o.max, tonumber(("%.4g"):format(value))))
end

local function expand_random(given)
  local o = errors.fill("sweep: random", given, { count = 10, seed = 1, space = errors.NONE })
  if type(o.space) ~= "table" or not next(o.space) then
    errors.usage("sweep: random.space is missing, wanted { lr = { min = 1e-5, max = 1e-3, log = true }, cka = { \"all\", \"none\" } }")
  end
  if type(o.count) ~= "number" or o.count < 1 or o.count > MOST then
    errors.usage("sweep: random.count is %s, wanted 1 to %d", tostring(o.count), MOST)
  end
  local keys, settings, axes = {}, {}, {}
  for name in pairs(o.space) do keys[#keys + 1] = name end
  table.sort(keys)
  for i, key in ipairs(keys) do axes[i] = { name = key, values = {} } end
  local draw = require "ckaqad.stats".generator(o.seed)
  for i = 1, o.count do
    local set = {}
    for j, key in ipairs(keys) do
      local space = o.space[key]
      if type(space) ~= "table" then errors.usage("sweep: random.space.%s: wanted min and max, or a list of values", key) end
      if #space > 0 then
        set[key] = scalar(space[1 + math.floor(draw() * #space)], "random.space." .. key)
      else
        set[key] = draw_range(key, space, draw)
      end
      axes[j].values[i] = set[key]
    end
    settings[i] = setting(keys, set)
  end
  return settings, axes
end

local function expand_list(given)
  local settings, axes, axis = {}, {}, {}
  for i, item in ipairs(given) do
    if type(item) ~= "table" then errors.usage("sweep: list[%d]: wanted { name = \"...\", option = value, ... }", i) end
    local keys, set = {}, {}
    for key, value in pairs(item) do
      if key ~= "name" then
        keys[#keys + 1] = tostring(key)
        set[key] = scalar(value, ("list[%d].%s"):format(i, tostring(key)))
      end
    end
    table.sort(keys)
    settings[i] = setting(keys, set, item.name)
    for _, key in ipairs(keys) do
      if not axis[key] then
        axis[key] = { name = key, values = {} }
        axes[#axes + 1] = axis[key]
      end
      axis[key].values[#axis[key].values + 1] = set[key]
    end
  end
  if #settings == 0 then errors.usage("sweep: list is empty, wanted { { name = \"...\", option = value }, ... }") end
  table.sort(axes, function(a, b) return a.name < b.name end)
  return settings, axes
end

-- Takes an axis named seed out of a list: it is a factor of every setting, not a setting.
local function take_seeds(axes)
  for i, axis in ipairs(axes) do
    if axis.name == "seed" then return table.remove(axes, i).values end
  end
end

-- The seeds: a list, or how many from `first` on; nil for the recipe's own.
local function seeds_of(seeds, first)
  if seeds == nil or seeds == 0 then return nil end
  local list = {}
  if type(seeds) == "number" then
    if seeds < 1 or seeds ~= math.floor(seeds) then errors.usage("sweep: seeds is %g, wanted a whole number, 1 or more", seeds) end
    for i = 0, seeds - 1 do list[#list + 1] = (first or 1) + i end
    return list
  end
  for i, seed in ipairs(seeds) do
    local value = tonumber(seed)
    if not value or value ~= math.floor(value) then
      errors.usage("sweep: seed %s: wanted a whole number", tostring(seed))
    end
    list[i] = value
  end
  return list
end

--- Settings, axes and seeds of a sweep's description: exactly one of `grid`, `random`, `paired`, `list`, and `seeds`.
--- `first` is the seed that counting starts at.
function points.expand(given, first)
  local form, count = nil, 0
  for _, name in ipairs { "grid", "random", "paired", "list" } do
    if given[name] ~= nil then form, count = name, count + 1 end
  end
  if count ~= 1 or type(given[form]) ~= "table" then
    errors.usage("sweep: got %s, wanted exactly one of grid, random, paired, list, and in it a table", count == 0 and "none" or count == 1
      and form .. " as a " .. type(given[form]) or count .. " of them")
  end
  local settings, axes, seeds
  if form == "random" then
    settings, axes = expand_random(given.random)
  elseif form == "list" then
    settings, axes = expand_list(given.list)
  else
    axes = axes_of(form, given[form])
    seeds = take_seeds(axes)
    if #axes == 0 then
      settings = { setting({}, {}) }
    else
      settings = form == "grid" and expand_grid(axes) or expand_paired(axes)
    end
  end
  return settings, axes, seeds_of(seeds or given.seeds, first)
end

--- The text that is hashed: every option but those in `passing`, sorted, and what `more` adds (the recipe, a rule's source).
function points.canonical(options, passing, more)
  local keys, lines = {}, {}
  for key in pairs(options) do
    if not passing[key] then keys[#keys + 1] = key end
  end
  table.sort(keys)
  for _, key in ipairs(keys) do lines[#lines + 1] = key .. "=" .. json.encode(options[key]) end
  for _, line in ipairs(more or {}) do lines[#lines + 1] = line end
  return table.concat(lines, "\n")
end

--- The points of `list` with every hash once, and how many were dropped; the first name stays.
function points.unique(list)
  local out, seen = {}, {}
  for _, point in ipairs(list) do
    if not seen[point.hash] then
      seen[point.hash] = point
      out[#out + 1] = point
    end
  end
  return out, #list - #out
end

local function show_values(values)
  local seen, parts = {}, {}
  for _, value in ipairs(values) do
    local text = points.show(value)
    if not seen[text] then
      seen[text] = true
      parts[#parts + 1] = text
    end
  end
  return parts
end

--- What differs between runs besides the named factors: { { key, values = { texts } } }, sorted. `runs` are tables of options (and of
--- facts like "program version"); `allowed[key]` is true for factors, the seed and how a run is shown.
function points.differences(runs, allowed)
  local keys, list = {}, {}
  for _, options in ipairs(runs) do
    for key in pairs(options) do keys[key] = true end
  end
  for key in pairs(keys) do
    if not allowed[key] then
      local values = {}
      for i, options in ipairs(runs) do
        local value = options[key]
        values[i] = value == nil and "absent" or value
      end
      local shown = show_values(values)
      if #shown > 1 then list[#list + 1] = { key = key, values = shown } end
    end
  end
  table.sort(list, function(a, b) return a.key < b.key end)
  return list
end

--- Successive halving: the keys of the best `keep` share (at least one) of `scores` = { [key] = number }, lowest first; a score
--- that is missing or no number loses.
function points.promote(keys, scores, keep)
  local order = {}
  for i, key in ipairs(keys) do order[i] = { key = key, at = i, score = scores[key] } end
  local function worth(e) return e.score and e.score == e.score and e.score or math.huge end
  table.sort(order, function(a, b)
    if worth(a) ~= worth(b) then return worth(a) < worth(b) end
    return a.at < b.at
  end)
  local out = {}
  for i = 1, math.max(1, math.floor(#order * keep + 1e-9)) do out[order[i].key] = true end
  return out
end

return points
