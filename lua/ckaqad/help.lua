-- help.lua - `?name` at the prompt, from the same text as API.md.
--
-- Entries are found by the name a reader types: cq.loss.kl, loss.kl, model:quantize, quantize; a value of the session
-- (?student:export, ?adam.step) is looked up by its methods. Nothing here calls what it describes.
local errors = require "ckaqad.errors"

local help = {}

help.general = [[
expression           its value is printed and kept in _; a ; at the end silences it
name = value         kept; a `local` at the start of a line is kept too
?name                what cq.NAME, object:METHOD or a value of yours is, for example ?cq.loss.kl or ?model:quantize; ?cq lists all
Tab                  completes names, fields, methods, options and files; Ctrl-R searches the history; Ctrl-D leaves
Ctrl-C               stops what runs; everything you made stays. One call of string.rep, string.gsub, table.sort or
                     table.concat on a huge value cannot be stopped halfway, nor can the training step that a stop came into
                     be taken up again: its gradients are dropped with adam:reset() or by the next run:plan
cq.spawn(recipe, t)  runs a recipe in the background; cq.runs() lists runs; cq.plot(run, "kl") draws; cq.show(x) prints
cq.save_session "x.lua"   writes what was typed and ran as a recipe]]

-- The entries of API.md: { { name = "cq.loss.kl", call = "cq.loss.kl(options)", text = "...", options = { names } } }.
function help.parse(text)
  local list, entry = {}, nil
  for line in (text .. "\n"):gmatch("(.-)\r?\n") do
    local call = line:match("^[%*#%s]+`([%a_][%w_.:]*%b()[^`]*)`")
    if call then
      entry = { call = call, name = call:match("^[%w_.:]+"), lines = {} }
      list[#list + 1] = entry
    elseif line:match("^#") then
      entry = nil
    elseif entry then
      entry.lines[#entry.lines + 1] = line
    end
  end
  for _, e in ipairs(list) do
    e.text = table.concat(e.lines, "\n"):gsub("^%s+", ""):gsub("%s+$", "")
    e.lines = nil
    e.options = help.options_of(e)
  end
  return list
end

-- Names in backticks are options where the text says "Options:" or the function takes nothing but options.
function help.options_of(entry)
  local arguments = entry.call:match("%((.-)%)")
  if not (arguments:match("options$") or arguments:match("given$") or arguments:match("what$") or arguments:match("values$")) then
    return {}
  end
  local text = entry.text:match("Options:(.*)$") or entry.text
  local names, seen = {}, {}
  for name in text:gmatch("`([%a_][%w_]*)`") do
    if not seen[name] then names[#names + 1], seen[name] = name, true end
  end
  return names
end

local entries
-- All entries; empty when the text was not built in.
function help.entries()
  if not entries then
    local ok, text = pcall(require, "ckaqad.api_text")
    entries = ok and type(text) == "string" and help.parse(text) or {}
  end
  return entries
end

-- Entries whose name is `name` or ends in it after a dot or colon; exact ones alone when there are any.
function help.find(name, list)
  list = list or help.entries()
  local exact, ending = {}, {}
  local wanted = name:gsub(":", ".")
  for _, e in ipairs(list) do
    local have = e.name:gsub(":", ".")
    if have == wanted then
      exact[#exact + 1] = e
    elseif have:sub(-#wanted - 1) == "." .. wanted then
      ending[#ending + 1] = e
    end
  end
  return #exact > 0 and exact or ending
end

-- The value a dotted name stands for, read without calling anything; nil when there is none.
function help.lookup(name, env)
  local value = env
  for part in name:gmatch("[^.:]+") do
    local found
    for _ = 1, 5 do -- a field, or a method a few metatables up
      if type(value) ~= "table" then return nil end
      found = rawget(value, part)
      if found ~= nil then break end
      local meta = debug.getmetatable(value)
      value = type(meta) == "table" and rawget(meta, "__index") or nil
    end
    value = found
  end
  return value
end

-- The entry of a function that is a field of the public API, found by identity.
function help.entry_of(f, cq, list)
  local function search(t, prefix, depth)
    for key, value in next, t do
      if value == f then return prefix .. key end
      if type(value) == "table" and depth > 0 and type(key) == "string" then
        local name = search(value, prefix .. key .. ".", depth - 1)
        if name then return name end
      end
    end
  end
  local name = type(cq) == "table" and search(cq, "cq.", 1)
  return name and help.find(name, list)[1] or nil, name
end

local function describe(e) return e.call .. "\n  " .. e.text:gsub("\n", "\n  ") end

local function index(list)
  local names = {}
  for _, e in ipairs(list) do names[#names + 1] = "  " .. e.call end
  return table.concat(names, "\n")
end

-- Comment lines right above a function of a file, else nil.
local function comment_above(f)
  local info = debug.getinfo(f, "S")
  local path = info and info.source:match("^@(.*)$")
  local file = path and io.open(path, "rb")
  if not file then return nil end
  local lines, number = {}, 0
  for line in file:lines() do
    number = number + 1
    if number >= info.linedefined then break end
    local text = line:match("^%s*%-%-+%s?(.*)$")
    if text then lines[#lines + 1] = text else lines = {} end
  end
  file:close()
  return #lines > 0 and table.concat(lines, "\n") or nil
end

-- The text for `?name`; `env` holds the globals.
function help.text(name, env, list)
  list = list or help.entries()
  name = name:gsub("%s+", ""):gsub("%(.*$", "")
  if name == "" then return help.general end
  if name == "cq" then return index(list) end
  local found = help.find(name, list)
  if #found == 0 then
    local value = help.lookup(name, env)
    if type(value) == "function" then
      local entry = help.entry_of(value, rawget(env, "cq"), list)
      if entry then return describe(entry) end
      local method = name:match("[.:]([%w_]+)$")
      local methods = method and debug.getinfo(value, "S").source:find("ckaqad", 1, true) and help.find(method, list) or {}
      if #methods > 0 then return describe(methods[1]) end
      return comment_above(value) or ("%s is a function without a comment"):format(name)
    end
    if type(value) == "table" then
      local inside = {}
      for _, e in ipairs(list) do
        if e.name:sub(1, #name + 1) == name .. "." or e.name:sub(1, #name + 1) == name .. ":" then inside[#inside + 1] = e end
      end
      if #inside > 0 then return index(inside) end
    end
    if value ~= nil then return require "ckaqad.show".value(value) end
    local names = { "cq" }
    for i, e in ipairs(list) do names[i + 1] = e.name end
    return ("no %s; nearest is ?%s"):format(name, errors.nearest(name, names))
  end
  local parts = {}
  for i, e in ipairs(found) do parts[i] = describe(e) end
  return table.concat(parts, "\n\n")
end

return help
