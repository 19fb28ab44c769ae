-- options.lua - what a recipe can be told: names and types come from the defaults, help from the comments beside them.
--
-- Command line: --key=value, --key value for non-flags, key=value, --flag, --no-flag. Numbers take units: 4GiB, 2k, 10m (600 s).
-- Options that every recipe has (threads, memory ...) are added below; a recipe may give them other defaults.
-- `given[key]` is true for what the user typed: a preset fills only the rest.
local errors = require "ckaqad.errors"
local options = {}

local common = {
  { "threads", 0, "processor threads (0: all cores)" },
  { "kernels", "cpu", "kernel table: cpu, or ref (the slow specification)" },
  { "compute", "f32", "matrix products: f32, or bf16 operands with f32 sums" },
  { "memory", 0, "bytes the plan may use, for example 4GiB (0: what the system has)" },
  { "template", "auto", "chat template: nano3, qwen3-thinking, or auto (by its hash)" },
  { "every", 10, "steps between lines when the output is no terminal" },
  { "save", 0, "steps between checkpoints (0: one at the end)" },
  { "fresh", false, "overwrite a run folder that holds another run" },
}

local units = {
  k = 1e3, M = 1e6, G = 1e9, T = 1e12, KiB = 2 ^ 10, MiB = 2 ^ 20, GiB = 2 ^ 30, TiB = 2 ^ 40,
  KB = 1e3, MB = 1e6, GB = 1e9, TB = 1e12, s = 1, m = 60, h = 3600, d = 86400,
}

-- "4GiB" -> 4294967296; nil when it is no number.
function options.number(value)
  local plain = value:match("^[-+]?[%d.]+[eE]?[-+]?%d*$") and tonumber(value)
  if plain then return plain end
  local digits, unit = value:match("^([-+]?[%d.]+)%s*(%a+)$")
  return digits and units[unit] and tonumber(digits) and tonumber(digits) * units[unit] or nil
end

local truth = { ["true"] = true, yes = true, on = true, ["1"] = true, ["false"] = false, no = false, off = false, ["0"] = false }

local function convert(key, value, default)
  if type(default) == "number" then
    local n = options.number(value)
    if not n then
      errors.usage("option --%s: got %q, wanted a number (units: k M G, KiB MiB GiB, s m h)", key, value)
    end
    return n
  end
  if type(default) == "boolean" then
    if truth[value] == nil then errors.usage("option --%s: got %q, wanted true or false", key, value) end
    return truth[value]
  end
  return value
end

-- The option block of a recipe's source: { header = lines, order = names, help = { [name] = text } }.
function options.read_help(source)
  local out = { header = {}, order = {}, help = {} }
  local inside, last, started = false, nil, false
  for line in (source .. "\n"):gmatch("(.-)\r?\n") do
    if not started and line:match("^#!") then
      started = false
    elseif not started and line:match("^%-%-") then
      out.header[#out.header + 1] = line:gsub("^%-%- ?", "")
    else
      started = true
    end
    if not inside then
      inside = line:match("options%s*[({]") ~= nil and not line:match("^%s*%-%-")
    elseif line:match("^}") or line:match("^%s*}%s*%)?%s*$") then
      break
    else
      local name = line:match("^%s*([%a_][%w_]*)%s*=[^=]")
      local comment = line:match("%-%-%s*(.-)%s*$")
      if name then
        out.order[#out.order + 1] = name
        out.help[name] = comment or ""
        last = name
      elseif comment and last and line:match("^%s*%-%-") then
        out.help[last] = out.help[last] .. " " .. comment
      end
    end
  end
  return out
end

local function show_default(value)
  if value == "" then return "none" end
  if type(value) ~= "number" then return tostring(value) end
  return value == math.floor(value) and math.abs(value) < 1e15 and ("%d"):format(value) or ("%g"):format(value)
end

-- The text of --help.
function options.help(parsed, defaults, name)
  local lines = {}
  for _, line in ipairs(parsed.header) do lines[#lines + 1] = line end
  if #lines == 0 then lines[1] = name end
  local width = 0
  for key in pairs(defaults) do width = math.max(width, #key) end
  local function add(key, help)
    local default = show_default(defaults[key])
    lines[#lines + 1] = ("  --%s%s  %s [%s]"):format(key, (" "):rep(width - #key), help, default)
  end
  lines[#lines + 1] = "\nOptions [default]:"
  local seen = {}
  for _, key in ipairs(parsed.order) do
    if defaults[key] ~= nil then
      add(key, parsed.help[key])
      seen[key] = true
    end
  end
  lines[#lines + 1] = "\nOptions of every recipe:"
  for _, item in ipairs(common) do
    if not seen[item[1]] then add(item[1], item[3]) end
  end
  return table.concat(lines, "\n")
end

-- Takes command line arguments into `values`; `given` notes what was typed. Returns true when help was asked for.
function options.parse(arguments, values, given)
  local names, i, ended = {}, 1, false
  for key in pairs(values) do names[#names + 1] = key end
  while arguments[i] do
    local argument = arguments[i]
    if not ended and (argument == "--help" or argument == "-h") then return true end
    if not ended and argument == "--" then
      ended = true
    else
      local key, value = argument:match("^%-?%-?([%a_][%w_%-]*)=(.*)$")
      local flag = not key and argument:match("^%-%-([%a_][%w_%-]*)$")
      key = (key or flag or ""):gsub("-", "_")
      local off = flag and values[key] == nil and key:match("^no_(.+)$")
      if off and type(values[off]) == "boolean" then
        key, value = off, "false"
      elseif flag and type(values[key]) == "boolean" then
        value = "true"
      elseif flag and values[key] ~= nil then
        i = i + 1
        value = arguments[i]
        if not value then errors.usage("option --%s: the value is missing, wanted --%s=VALUE", key, key) end
      end
      if key == "" then errors.usage("argument %q: wanted --option=value; --help lists the options", argument) end
      if values[key] == nil then
        errors.usage("option --%s is unknown, nearest is --%s", key, errors.nearest(key, names))
      end
      values[key] = convert(key, value, values[key])
      given[key] = true
    end
    i = i + 1
  end
end

-- Where the caller of cq.options keeps its source, and the options it declares.
local function source_of(level)
  local info = debug.getinfo(level + 1, "S")
  local path = info and info.source:match("^@(.*)$")
  local f = path and io.open(path, "rb")
  if not f then return options.read_help(""), path or "recipe" end
  local text = f:read("*a")
  f:close()
  return options.read_help(text), path
end

--- Options of a recipe: a table of defaults, overridden by the command line (the global `arg`).
--- Each option's type is its default's; the comment beside it is its help; `--help` prints both and leaves. An unknown
--- option is an error that names the nearest valid one. `opt.given[key]` is true for what the user typed.
function options.options(defaults)
  local parsed, path = source_of(2)
  local values, given = {}, {}
  for _, item in ipairs(common) do values[item[1]] = item[2] end
  for key, value in pairs(defaults) do values[key] = value end
  local copy = {}
  for key, value in pairs(values) do copy[key] = value end
  if options.parse(rawget(_G, "arg") or {}, values, given) then
    print(options.help(parsed, copy, path))
    errors.exit(0)
  end
  local order, seen = {}, {}
  for _, key in ipairs(parsed.order) do
    if values[key] ~= nil and not seen[key] then order[#order + 1], seen[key] = key, true end
  end
  local rest = {}
  for key in pairs(values) do
    if not seen[key] then rest[#rest + 1] = key end
  end
  table.sort(rest)
  for _, key in ipairs(rest) do order[#order + 1] = key end
  local hidden = { given = given, order = order, recipe = path, defaults = copy }
  return setmetatable(values, {
    __index = function(_, key)
      if hidden[key] ~= nil then return hidden[key] end
      errors.usage("options: the recipe has no option %s, nearest is %s", tostring(key), errors.nearest(tostring(key), order))
    end,
  })
end

return options
