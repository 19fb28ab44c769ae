-- json.lua - a small JSON writer and reader (RFC 8259).
--
-- Written objects keep the order of their keys: json.object { "a", 1, "b", 2 } or the sorted keys of a plain table.
-- Numbers are written with as many digits as bring back the same bits, NaN and infinity as null, so every line we write can be read.
-- Read objects remember the order they came in; null is json.null.
local errors = require "ckaqad.errors"
local json = { null = setmetatable({}, { __tostring = function() return "null" end }) }

local Array = {}
local order = setmetatable({}, { __mode = "k" }) -- object -> list of its keys

--- An object with ordered keys from a list key, value, key, value ...; a nil value is left out with its key.
---
--- Example:
---     print(cq.json.encode(cq.json.object { "step", 1, "cka", 0.5 })) --> {"step":1,"cka":0.5}
function json.object(list)
  local t, keys = {}, {}
  for i = 1, table.maxn(list), 2 do
    local key, value = list[i], list[i + 1]
    if value ~= nil then
      if t[key] == nil then keys[#keys + 1] = key end
      t[key] = value
    end
  end
  order[t] = keys
  return t
end

--- Marks a table as an array, needed only for empty ones.
function json.array(t) return setmetatable(t or {}, Array) end

--- The keys of an object: in the order they were written or read, sorted for a plain table.
function json.keys(t)
  if order[t] then return order[t] end
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
  return keys
end

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }
local function quote(s)
  return '"' .. s:gsub('[%c"\\\127]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

local function number(x)
  if x ~= x or x == math.huge or x == -math.huge then return "null" end
  if x == math.floor(x) and math.abs(x) < 2 ^ 53 then return ("%d"):format(x) end
  local short = ("%.15g"):format(x)
  return tonumber(short) == x and short or ("%.17g"):format(x)
end

local function is_array(t)
  return getmetatable(t) == Array or (not order[t] and (#t > 0))
end

local encode
local function encode_table(t, indent, here)
  local items, array = {}, is_array(t)
  local inner = indent and here .. indent
  if array then
    for i = 1, table.maxn(t) do items[i] = encode(t[i], nil, "") end
    return "[" .. table.concat(items, indent and ", " or ",") .. "]"
  end
  for _, key in ipairs(json.keys(t)) do
    if t[key] ~= nil then
      items[#items + 1] = quote(tostring(key)) .. (indent and ": " or ":") .. encode(t[key], indent, inner)
    end
  end
  if #items == 0 then return "{}" end
  if not indent then return "{" .. table.concat(items, ",") .. "}" end
  return "{\n" .. inner .. table.concat(items, ",\n" .. inner) .. "\n" .. here .. "}"
end

function encode(x, indent, here)
  local kind = type(x)
  if x == nil or x == json.null then return "null" end
  if kind == "boolean" then return tostring(x) end
  if kind == "number" then return number(x) end
  if kind == "string" then return quote(x) end
  if kind == "table" then return encode_table(x, indent, here) end
  errors.usage("json: cannot write a %s", kind)
end

--- JSON text of a value on one line; with `pretty` objects go over several lines. NaN and infinity become null.
function json.encode(x, pretty) return encode(x, pretty and "  " or nil, "") end

local function utf8(code)
  if code < 0x80 then return string.char(code) end
  if code < 0x800 then return string.char(0xC0 + math.floor(code / 64), 0x80 + code % 64) end
  if code < 0x10000 then
    return string.char(0xE0 + math.floor(code / 4096), 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
  end
  return string.char(0xF0 + math.floor(code / 262144), 0x80 + math.floor(code / 4096) % 64,
    0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
end

local plain = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t", ['"'] = '"', ["\\"] = "\\", ["/"] = "/" }

local function line_of(text, at) return select(2, text:sub(1, at):gsub("\n", "")) + 1 end

local function fail(what, text, at)
  errors.raise(errors.DATA, "%s: line %d: broken JSON near %q", what, line_of(text, at), text:sub(at, at + 15))
end

local function read_string(text, at, what)
  local parts, i = {}, at + 1
  while true do
    local stop = text:find('["\\]', i)
    if not stop then fail(what, text, at) end
    parts[#parts + 1] = text:sub(i, stop - 1)
    if text:byte(stop) == 34 then return table.concat(parts), stop + 1 end
    local c = text:sub(stop + 1, stop + 1)
    i = stop + 2
    if c == "u" then
      local code = tonumber(text:match("^%x%x%x%x", i), 16)
      if not code then fail(what, text, stop) end
      i = i + 4
      local low = code >= 0xD800 and code < 0xDC00 and tonumber(text:match("^\\u([dD][c-fC-F]%x%x)", i) or "", 16)
      if low then
        code, i = 0x10000 + (code - 0xD800) * 1024 + (low - 0xDC00), i + 6
      end
      parts[#parts + 1] = utf8(code)
    elseif plain[c] then
      parts[#parts + 1] = plain[c]
    else
      fail(what, text, stop)
    end
  end
end

local read
local words = { ["true"] = true, ["false"] = false, ["null"] = json.null }

local function skip(text, at) return text:find("[^ \t\r\n]", at) or #text + 1 end

local function read_array(text, at, what)
  local t, i = json.array {}, skip(text, at + 1)
  if text:sub(i, i) == "]" then return t, i + 1 end
  while true do
    t[#t + 1], i = read(text, i, what)
    i = skip(text, i)
    local c = text:sub(i, i)
    if c == "]" then return t, i + 1 end
    if c ~= "," then fail(what, text, i) end
    i = skip(text, i + 1)
  end
end

local function read_object(text, at, what)
  local t, keys, i = {}, {}, skip(text, at + 1)
  order[t] = keys
  if text:sub(i, i) == "}" then return t, i + 1 end
  while true do
    if text:sub(i, i) ~= '"' then fail(what, text, i) end
    local key
    key, i = read_string(text, i, what)
    i = skip(text, i)
    if text:sub(i, i) ~= ":" then fail(what, text, i) end
    if t[key] == nil then keys[#keys + 1] = key end
    t[key], i = read(text, skip(text, i + 1), what)
    i = skip(text, i)
    local c = text:sub(i, i)
    if c == "}" then return t, i + 1 end
    if c ~= "," then fail(what, text, i) end
    i = skip(text, i + 1)
  end
end

function read(text, at, what)
  local c = text:sub(at, at)
  if c == '"' then return read_string(text, at, what) end
  if c == "{" then return read_object(text, at, what) end
  if c == "[" then return read_array(text, at, what) end
  local word = text:match("^%a+", at)
  if word and words[word] ~= nil then return words[word], at + #word end
  local digits = text:match("^-?%d+%.?%d*[eE]?[-+]?%d*", at)
  local value = digits and tonumber(digits)
  if not value then fail(what, text, at) end
  return value, at + #digits
end

--- The value of a JSON text; null is `cq.json.null`. `what` names the source in the error, which says the line.
---
--- Example:
---     print(cq.json.decode('{ "lr": [1e-4, null] }').lr[1]) --> 0.0001
function json.decode(text, what)
  what = what or "json"
  local value, at = read(text, skip(text, 1), what)
  at = skip(text, at)
  if at <= #text then fail(what, text, at) end
  return value
end

--- The objects of a JSONL file, in a list. `fields` names what each must have; an error names file and line.
---
--- Example:
---     print(#cq.json.lines("holdout.jsonl", { "prompt" })) --> 6
function json.lines(path, fields)
  local f, why = io.open(path, "rb")
  if not f then errors.raise(errors.IO, "%s", why) end
  local text, list = f:read "*a" or "", {}
  f:close()
  local at = skip(text, 1)
  while at <= #text do
    local value, stop = read(text, at, path)
    for _, name in ipairs(fields or {}) do
      if type(value) ~= "table" or value[name] == nil or value[name] == json.null then
        errors.raise(errors.DATA, "%s: line %d: no %s, wanted an object with %s", path, line_of(text, at), name, table.concat(fields, ", "))
      end
    end
    list[#list + 1], at = value, skip(text, stop)
  end
  if #list == 0 then errors.raise(errors.DATA, "%s: no objects, wanted one a line", path) end
  return list
end

--- The elements of a JSON array as pieces of the text itself, unchanged to the byte.
function json.elements(text, what)
  what = what or "json"
  local out, i = {}, skip(text, 1)
  if text:sub(i, i) ~= "[" then fail(what, text, i) end
  i = skip(text, i + 1)
  if text:sub(i, i) == "]" then return out end
  while true do
    local _, stop = read(text, i, what)
    out[#out + 1] = text:sub(i, stop - 1)
    i = skip(text, stop)
    local c = text:sub(i, i)
    if c == "]" then return out end
    if c ~= "," then fail(what, text, i) end
    i = skip(text, i + 1)
  end
end

return json
