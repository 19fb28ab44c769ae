-- gen_api.lua - writes lua/API.md from the `---` comments of lua/ckaqad/*.lua.
--
--   luajit lua/gen_api.lua > lua/API.md        run in the project's root; a test checks that the file is fresh
--
-- What is public is not listed anywhere: `require "ckaqad"` is loaded over a stand-in for the C library and walked. Every function it
-- reaches, and every method of a class (errors.class, Class.__index) in a module that gave one, needs a comment directly above it.
-- A comment may end in `Example:` and indented code; tests/recipes/docs.sh runs it. `--> text` in it says what is printed.
local api = {}

-- Order and titles of the sections; the modules that are not named follow under their own names.
local titles = {
  { "options", "Options" }, { "run", "Runs" }, { "model", "Models" }, { "data", "Documents" }, { "loss", "Losses" },
  { "distill", "Distillation" }, { "balance", "Balances" }, { "optim", "Optimizers" }, { "schedule", "Schedules" },
  { "select", "Block selectors" }, { "plan", "Memory" }, { "eval", "Evaluation" }, { "sweep", "Sweeps" }, { "stats", "Statistics" },
  { "table", "Tables" }, { "runs", "The run index" }, { "compare", "Comparing runs" }, { "plot", "Plots" },
  { "device", "Device" }, { "benchmark", "Benchmarks" }, { "verify", "Checking exports" }, { "tensorboard", "TensorBoard" },
  { "ffi", "Clock and memory" }, { "json", "JSON" }, { "text", "Text" },
}

-- Anything goes with a stand-in: it is indexed, called and compared; it remembers the path it was reached by.
local function stand_in(path)
  return setmetatable({ path = path }, {
    __index = function(t, key)
      if type(key) == "number" then return 0 end
      local item = stand_in(path .. "." .. tostring(key))
      rawset(t, key, item)
      return item
    end,
    __call = function() return stand_in(path .. "()") end,
    __concat = function() return path end,
    __tostring = function() return path end,
  })
end

-- The public API as `require "ckaqad"` gives it, and the stand-in for ckaqad.ffi.
local function load_api(folder)
  local kept_path, kept_loaded = package.path, {}
  package.path = folder .. "/../?.lua;" .. folder .. "/../?/init.lua;" .. package.path
  for name, module in pairs(package.loaded) do
    if name:match "^ckaqad" then kept_loaded[name], package.loaded[name] = module, nil end
  end
  local native = stand_in "native"
  native.version = "0 (stand-in)"
  package.loaded["ckaqad.ffi"], package.loaded["ckaqad.host"] = native, { version = "0", exe = "ckaqad" }
  local ok, cq = pcall(require, "ckaqad")
  for name in pairs(package.loaded) do
    if name:match "^ckaqad" then package.loaded[name] = nil end
  end
  for name, module in pairs(kept_loaded) do package.loaded[name] = module end
  package.path = kept_path
  if not ok then error("ckaqad cannot be loaded without its library: " .. tostring(cq), 0) end
  return cq, native
end

local function by_name(t)
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
  return keys
end

-- Calls visit(name, function) for every function below `t`, and visit(name, stand-in) for what the C side gives.
local function walk(t, name, native, visit, seen)
  if seen[t] then return end
  seen[t] = true
  local called = (getmetatable(t) or {}).__call
  if type(called) == "function" then visit(name, called) end
  for _, key in ipairs(by_name(t)) do
    local value, path = t[key], name .. "." .. tostring(key)
    if type(value) == "function" or (type(value) == "table" and getmetatable(value) and rawget(value, "path") and
      native[rawget(value, "path"):match "^native%.(.*)$" or 1] == value) then
      visit(path, value)
    elseif type(value) == "table" then
      walk(value, path, native, visit, seen)
    end
  end
end

local function read_lines(path)
  local f = assert(io.open(path, "rb"))
  local lines = {}
  for line in f:lines() do lines[#lines + 1] = line end
  f:close()
  return lines
end

-- The comment of `---` lines right above a line.
local function comment_above(lines, at)
  local first = at
  while first > 1 and lines[first - 1]:match "^%s*%-%-%-" do first = first - 1 end
  local comment = {}
  for i = first, at - 1 do comment[#comment + 1] = lines[i]:match "^%s*%-%-%-%s?(.*)$" end
  return comment
end

-- "(a, b)" of a function that begins on a line; its list of arguments may go over several.
local function arguments(lines, at)
  local list = table.concat(lines, " ", at, math.min(#lines, at + 4)):match "function[^(]*(%b())"
  if not list then return "()" end
  return (list:gsub("%s+", " "):gsub("%(self, ", "(data, "):gsub("%(self%)", "(data)")) -- cq.data.show takes what cq.data.open gave
end

-- Public functions of the modules in `folder`: { [module] = { { name, file, line, comment }, ... in the file's order } }.
-- `name` is written as a reader calls it: cq.loss.kl(options), run:steps(n, data).
function api.functions(folder)
  local cq, native = load_api(folder)
  local found, sources = {}, {}
  local function lines_of(module)
    sources[module] = sources[module] or read_lines(("%s/%s.lua"):format(folder, module))
    return sources[module]
  end
  local function add(module, line, name)
    found[module] = found[module] or {}
    local known = found[module][line]
    if known and #known.name <= #name then return end
    found[module][line] = { name = name, file = module .. ".lua", line = line, comment = comment_above(lines_of(module), line) }
  end
  walk(cq, "cq", native, function(name, f)
    if type(f) == "table" then -- a function of ffi.lua, found by its name there
      local own = f.path:match "[%w_]+$"
      for i, line in ipairs(lines_of "ffi") do
        if line:match("^function native%." .. own .. "%(") then add("ffi", i, name .. arguments(sources.ffi, i)) end
      end
      return
    end
    local info = debug.getinfo(f, "S")
    local module = info.source:match "ckaqad/([%w_]+)%.lua$"
    if not module then return end -- the standard library
    local list = arguments(lines_of(module), info.linedefined)
    add(module, info.linedefined, name .. list)
  end, {})
  for module in pairs(found) do
    local classes = {}
    for i, line in ipairs(lines_of(module)) do
      local plain = line:match "^([%w_]+)%.__index%s*="
      local class, object = line:match '^local ([%w_]+) = errors%.class%("([%w_]+)"'
      if plain then classes[plain] = plain:lower() end
      if class then classes[class] = object end
      local owner, separator, method = line:match "^function ([%w_]+)([.:])([%w_]+)"
      if owner and classes[owner] and not method:match "^__" then
        add(module, i, classes[owner] .. separator .. method .. arguments(sources[module], i))
      end
    end
  end
  local out = {}
  for module, list in pairs(found) do
    out[module] = {}
    for _, entry in pairs(list) do table.insert(out[module], entry) end
    table.sort(out[module], function(a, b) return a.line < b.line end)
  end
  return out
end

-- Modules in the order of API.md, each with its title.
local function sections(functions)
  local list, seen = {}, {}
  for _, item in ipairs(titles) do
    if functions[item[1]] then list[#list + 1] = item end
    seen[item[1]] = true
  end
  for _, module in ipairs(by_name(functions)) do
    if not seen[module] then list[#list + 1] = { module, (module:gsub("^%l", string.upper)) } end
  end
  return list
end

-- Public functions without a comment, as "file:line: name".
function api.undocumented(folder)
  local list = {}
  for _, entries in pairs(api.functions(folder)) do
    for _, e in ipairs(entries) do
      if #e.comment == 0 or not e.comment[1]:match "%S" then list[#list + 1] = ("%s:%d: %s"):format(e.file, e.line, e.name) end
    end
  end
  table.sort(list)
  return list
end

-- The examples of all comments in the order of API.md: { name, file, line of the code's beginning, code }.
function api.examples(folder)
  local list, functions = {}, api.functions(folder)
  for _, section in ipairs(sections(functions)) do
    for _, e in ipairs(functions[section[1]]) do
      local code
      for i, line in ipairs(e.comment) do
        if line:match "^Example:%s*$" then
          code = {}
          list[#list + 1] = { name = e.name, file = e.file, line = e.line - #e.comment + i, code = code }
        elseif code and (line:match "^   " or line == "") then
          code[#code + 1] = line:gsub("^    ", "")
        elseif code then
          code = nil
        end
      end
    end
  end
  for _, example in ipairs(list) do example.code = table.concat(example.code, "\n") .. "\n" end
  return list
end

-- The Markdown text from the modules under `folder`.
function api.text(folder)
  local out = {
    "# The Lua API", "", "Made by `lua/gen_api.lua` from the comments in `lua/ckaqad/`; do not edit.",
    "`local cq = require \"ckaqad\"`. The last argument of a function is an options table; an unknown key is an error that names",
    "the nearest valid one. Errors are thrown as `{ status, message }`. Blocks are counted from 0.",
    "Every example runs in a test, after `tests/recipes/examples.lua` has opened the embedded model as `teacher`, `student` and so on.", "",
  }
  local functions = api.functions(folder)
  for _, section in ipairs(sections(functions)) do
    out[#out + 1] = "## " .. section[2]
    out[#out + 1] = ""
    for _, e in ipairs(functions[section[1]]) do
      out[#out + 1] = "**`" .. e.name .. "`**  "
      for _, line in ipairs(e.comment) do
        if line:match "^Example:%s*$" then
          if out[#out] ~= "" then out[#out + 1] = "" end
          line = "Example:\n"
        end
        out[#out + 1] = line
      end
      out[#out + 1] = ""
    end
  end
  return (table.concat(out, "\n"):gsub("\n+$", "\n"))
end

if arg and arg[0] and arg[0]:match("gen_api%.lua$") then io.write(api.text("lua/ckaqad"), "\n") end
return api
