-- options.lua - what a recipe can be told: names and types come from the defaults, help from the comments beside them.
--
-- Command line: --key=value, --key value for non-flags, key=value, --flag, --no-flag. Numbers take units: 4GiB, 2k, 10m (600 s).
-- --options=FILE reads them from a file (lines `key = value`, or the run.json of an older run); what is typed wins.
-- --sweep key=a,b,c (or key=1..5; repeatable) runs the recipe once for every combination (sweep.lua).
-- Options that every recipe has (threads, memory ...) are added below; a recipe may give them other defaults.
-- `given[key]` is true for what the user typed: a preset fills only the rest.
local errors = require "ckaqad.errors"
local options = {}

local common = {
  { "threads", 0, "processor threads (0: all cores)" },
  { "device", "cpu", "cpu, cuda (under mpirun one for each rank), cuda:N, or auto (a GPU where there is one)" },
  { "kernels", "cpu", "kernel table: cpu, or ref (the slow specification)" },
  { "compute", "f32", "matrix products: f32, bf16 operands with f32 sums, or nvfp4 (forward on FP4 tensor cores, packed copies)" },
  { "offload", "none", "on a GPU, what stays in pinned host memory: teacher (its blocks, fetched in turn), optimizer, both, or none" },
  { "copies", "f32", "fake-quantized weights: f32, bf16 (half; for bf16 products on a GPU), packed (NVFP4, opened before each product)" },
  { "activations", "f32", "inside of blocks: f32, or bf16 (2 bytes each; needs a GPU and --compute=bf16)" },
  { "graphs", true, "on a GPU, record passes whose shapes come again, and play them (CUDA graphs; the same bits)" },
  { "check", false, "look at every operation's result for NaN and Inf and name the first (slow)" },
  { "memory", 0, "bytes the plan may use, for example 4GiB (0: what the system has)" },
  { "template", "auto", "chat template: nano3, qwen3-thinking, or auto (by its hash)" },
  { "every", 10, "steps between lines when the output is no terminal" },
  { "save", 0, "steps between checkpoints (0: one at the end)" },
  { "keep", 2, "newest checkpoints that stay" },
  { "keep_every", 0, "checkpoints of steps divisible by this stay too (0: none)" },
  { "eval_every", 0, "steps between evaluations on the held-out documents; the best one's checkpoint stays (0: only before and after)" },
  { "max_time", 0, "stop after this long, for example 10m, save and leave with exit code 75 (0: no limit)" },
  { "stop_at", 0, "stop after this step, save and leave; the same command without it goes on (0: run to the end)" },
  { "tensorboard", true, "event files for TensorBoard in OUT/tensorboard" },
  { "patience", 60, "under mpirun: seconds without a sign of life after which a rank counts as gone" },
  { "ordered", false, "add up the gradients of micro-batches as many ranks do, for the same bits on one (one more buffer of them)" },
  { "gram", "micro", "under mpirun, rows of a Gram: micro (of one micro-batch, as on one rank), or ranks (of those they have at once)" },
  { "moe", "local", "under mpirun, experts of MoE blocks: local (all on every rank), or ranks (dealt out: each computes its own for all)" },
  { "resume", false, "refuse to start over: the folder must hold a stopped run of these options" },
  { "fresh", false, "overwrite a run folder that holds another run, or run a finished one again" },
  { "dry_run", false, "print options, memory, FLOPs and time, and leave without reading weights" },
  { "gpus", "", "with --dry-run: plan for 1, 1,2,4 or 1..16 (powers of two) GPUs that need not be here, from config.json alone" },
  { "gpu_memory", 141e9, "bytes of each of them (141GB: an H200)" },
  { "host_memory", 0, "bytes of the host that up to 8 of them share (0: as many as it takes)" },
  { "rates", "", "planning rates to change, as link=300GB,host=25GB: matmul (790T), fraction (0.45), copy, link, node, host, per_node" },
  { "validate_only", false, "calibrate, measure what PTQ costs, and leave" },
}
local special = {
  { "options", "FILE", "options from a file: lines `key = value`, or an older run's run.json; what is typed wins" },
  { "sweep", "KEY=A,B", "run once for each value, KEY=1..5 too; several --sweep make a grid" },
  { "jobs", "N", "with --sweep: points that run at the same time [1]" },
  { "retry", "N", "with --sweep: further tries of a point that crashed [1]" },
}

options.common, options.special = common, special -- for shell completion and the man page

local is_special = {}
for _, item in ipairs(special) do is_special[item[1]] = true end

-- How a run is shown, kept and stopped, and how much memory it may use, do not make it another run.
options.passing = {
  fresh = true, resume = true, every = true, memory = true, save = true, keep = true, keep_every = true, max_time = true, stop_at = true,
  eval_every = true, tensorboard = true, threads = true, check = true, out = true, dry_run = true, validate_only = true,
  graphs = true, patience = true, ordered = true, gram = true, moe = true, gpus = true, gpu_memory = true, host_memory = true, rates = true,
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
  for _, item in ipairs(special) do
    local label = ("%s %s"):format(item[1], item[2])
    if defaults[item[1]] == nil then lines[#lines + 1] = ("  --%s%s  %s"):format(label, (" "):rep(width - #label), item[3]) end
  end
  return table.concat(lines, "\n")
end

-- Sets one option from text; `where` says where it stands.
local function set(values, given, key, value, where)
  if values[key] == nil then
    local names = { "options", "sweep", "jobs" }
    for name in pairs(values) do names[#names + 1] = name end
    errors.usage("%soption --%s is unknown, nearest is --%s", where or "", key, errors.nearest(key, names))
  end
  values[key] = convert(key, value, values[key])
  given[key] = true
end

-- Options of an older run, or of lines `key = value`; "#" starts a comment line. An older run's folder is not taken over.
local function read_file(path, values, given)
  local f, why = io.open(path, "rb")
  if not f then errors.raise(errors.IO, "option --options: %s", why) end
  local content = f:read("*a")
  f:close()
  if content:match("^%s*{") then
    local json = require "ckaqad.json"
    local object = json.decode(content, path)
    object = type(object.options) == "table" and object.options or object
    for _, key in ipairs(json.keys(object)) do
      if key ~= "out" and not options.passing[key] then
        local value = object[key]
        set(values, given, key, type(value) == "number" and ("%.17g"):format(value) or tostring(value), path .. ": ")
      end
    end
    return
  end
  local number = 0
  for line in (content .. "\n"):gmatch("(.-)\r?\n") do
    number = number + 1
    local key, value = line:match("^%s*%-?%-?([%a_][%w_%-]*)%s*=%s*(.-)%s*$")
    if key then
      set(values, given, key:gsub("-", "_"), value:match('^"(.*)"$') or value, ("%s:%d: "):format(path, number))
    elseif line:match("%S") and not line:match("^%s*#") then
      errors.usage("%s:%d: got %q, wanted key = value", path, number, line)
    end
  end
end

-- Splits the command line into { key, value } pairs; `values` says which options are flags. True: help was asked for.
local function split(arguments, values)
  local pairs_, i, ended = {}, 1, false
  while arguments[i] do
    local argument = arguments[i]
    if not ended and (argument == "--help" or argument == "-h") then return pairs_, true end
    if not ended and argument == "--" then
      ended = true
    else
      local key, value = argument:match("^%-?%-?([%a_][%w_%-]*)=(.*)$")
      local flag = not key and argument:match("^%-%-([%a_][%w_%-]*)$")
      key = (key or flag or ""):gsub("-", "_")
      if key == "" then errors.usage("argument %q: wanted --option=value; --help lists the options", argument) end
      local off = flag and values[key] == nil and key:match("^no_(.+)$")
      if off and type(values[off]) == "boolean" then
        key, value = off, "false"
      elseif flag and type(values[key]) == "boolean" then
        value = "true"
      elseif flag and (values[key] ~= nil or is_special[key]) then
        i = i + 1
        value = arguments[i]
        if not value then errors.usage("option --%s: the value is missing, wanted --%s=VALUE", key, key) end
      end
      pairs_[#pairs_ + 1] = { key, value }
    end
    i = i + 1
  end
  return pairs_
end

-- Takes command line arguments into `values`; `given` notes what was typed. Returns true when help was asked for, else
-- nil and the list of --sweep texts.
function options.parse(arguments, values, given)
  local list, help = split(arguments, values)
  if help then return true end
  local sweeps = {}
  for _, item in ipairs(list) do
    if values[item[1]] == nil and item[1] == "options" then read_file(item[2], values, given) end
  end
  for _, item in ipairs(list) do
    if values[item[1]] == nil and item[1] == "sweep" then
      sweeps[#sweeps + 1] = item[2]
    elseif values[item[1]] == nil and (item[1] == "jobs" or item[1] == "retry") then
      sweeps[item[1]] = convert(item[1], item[2], 1)
    elseif values[item[1]] ~= nil or item[1] ~= "options" then
      set(values, given, item[1], item[2])
    end
  end
  if #sweeps == 0 and (sweeps.jobs or sweeps.retry) then
    errors.usage("option --%s: goes with --sweep, wanted --sweep KEY=A,B too", sweeps.jobs and "jobs" or "retry")
  end
  return nil, sweeps
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
---
--- Example:
---     local opt = cq.options {
---       lr = 1e-4,         -- peak learning rate
---       cka = "all",       -- blocks CKA looks at
---     }
---     print(opt.lr, opt.cka, opt.given.lr) --> 0.0001	all	nil
function options.options(defaults)
  local parsed, path = source_of(2)
  local values, given = {}, {}
  for _, item in ipairs(common) do values[item[1]] = item[2] end
  for key, value in pairs(defaults) do values[key] = value end
  local copy = {}
  for key, value in pairs(values) do copy[key] = value end
  local help, sweeps = options.parse(rawget(_G, "arg") or {}, values, given)
  if help then
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
  local opt = setmetatable(values, {
    __index = function(_, key)
      if hidden[key] ~= nil then return hidden[key] end
      errors.usage("options: the recipe has no option %s, nearest is %s", tostring(key), errors.nearest(tostring(key), order))
    end,
  })
  if #sweeps > 0 then require "ckaqad.sweep".from_options(opt, sweeps) end
  return opt
end

return options
