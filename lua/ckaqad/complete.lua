-- complete.lua - what Tab proposes: names, fields, methods, options of a known call, files inside quotes.
--
-- Only raw reads: no metamethod runs and nothing is called, so completion changes nothing, cannot fail on a strict table
-- and looks at a bounded number of keys. A Ctrl-C in it goes back to an empty prompt (lua/edit.c).
local help = require "ckaqad.help"

local complete = {}

local most_keys, most_shown = 20000, 200
local keywords = {
  "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil", "not", "or", "repeat",
  "return", "then", "true", "until", "while",
}

-- Where the text stands: the open brackets outside strings { { char, at }, ... }, and where an open string began (or nil).
function complete.scan(text)
  local stack, quote, opened, i = {}, nil, nil, 1
  while i <= #text do
    local c = text:sub(i, i)
    if quote then
      if c == "\\" then
        i = i + 1
      elseif c == quote or c == "\n" then
        quote = nil
      end
    elseif c == '"' or c == "'" then
      quote, opened = c, i
    elseif text:find("^%-%-", i) then
      i = text:find("\n", i, true) or #text
    elseif c == "{" or c == "(" or c == "[" then
      stack[#stack + 1] = { c, i }
    elseif c == "}" or c == ")" or c == "]" then
      stack[#stack] = nil
    end
    i = i + 1
  end
  return stack, quote and opened
end

-- The name before position `at`: "cq.loss.kl" of `x = cq.loss.kl {`.
local function name_before(text, at) return text:sub(1, at - 1):match("([%a_][%w_.:]*)%s*$") end

-- The function whose options table is open at the end of the text.
function complete.call(text, stack)
  local top, below = stack[#stack], stack[#stack - 1]
  if not top or top[1] ~= "{" then return nil end
  local name = name_before(text, top[2])
  if name then return name end
  return below and below[1] == "(" and text:sub(1, top[2] - 1):match("[,(]%s*$") and name_before(text, below[2]) or nil
end

-- Adds to `out` the string keys of a table and of the tables it inherits from that begin with `prefix`.
local function keys_of(value, prefix, functions_only, out)
  local seen, budget = {}, most_keys
  for _ = 1, 5 do
    if type(value) ~= "table" then return end
    for key, item in next, value do
      budget = budget - 1
      if budget < 0 then return end
      if type(key) == "string" and not seen[key] and key:sub(1, #prefix) == prefix and key:match("^[%a_][%w_]*$")
        and (not functions_only or type(item) == "function") and (prefix ~= "" or key:sub(1, 1) ~= "_") then
        seen[key], out[#out + 1] = true, key
      end
    end
    local meta = debug.getmetatable(value)
    value = type(meta) == "table" and rawget(meta, "__index") or nil
  end
end

local function options(text, stack, prefix, out, entries)
  local call = complete.call(text, stack)
  if not call then return end
  local found = help.find(call, entries)
  if #found == 0 and call:find(":", 1, true) then found = help.find(call:match("([%w_]+)$"), entries) end
  local seen = {}
  for _, entry in ipairs(found) do
    for _, name in ipairs(entry.options) do
      if name:sub(1, #prefix) == prefix and not seen[name] then seen[name], out[#out + 1] = true, name end
    end
  end
end

-- Files that begin with `partial`, folders with a slash; `list(folder)` gives names, or nil.
local function files(partial, list, is_folder)
  local folder, prefix = partial:match("^(.*/)([^/]*)$")
  folder, prefix = folder or "", prefix or partial
  local out = {}
  for i, name in ipairs(list(folder == "" and "." or folder) or {}) do
    if i > most_keys then break end
    if name:sub(1, #prefix) == prefix and (prefix ~= "" or name:sub(1, 1) ~= ".") then out[#out + 1] = name end
  end
  if #out == 1 then out[1] = out[1] .. (is_folder(folder .. out[1]) and "/" or '"') end
  return prefix, out
end

-- The word under the cursor and the list of what it can become, sorted. `context`: { env, list, is_folder, entries }.
function complete.candidates(text, context)
  local stack, opened = complete.scan(text)
  local out = {}
  if opened then
    local prefix, names = files(text:sub(opened + 1), context.list, context.is_folder)
    if #names == 1 then names[1] = names[1]:gsub('"$', text:sub(opened, opened)) end
    return prefix, names
  end
  local word = text:match("[%w_.:]*$")
  local base, separator, prefix = word:match("^(.*)([.:])([%w_]*)$")
  if base then
    local value = help.lookup(base, context.env)
    if type(value) == "string" then value = string end
    if base ~= "" then keys_of(value, prefix, separator == ":", out) end
  else
    prefix = word
    local before = text:sub(1, #text - #word)
    if before:match("[{,;]%s*$") then options(text, stack, prefix, out, context.entries) end
    if #out == 1 then out[1] = out[1] .. " = " end
    if #out == 0 and (prefix ~= "" or not before:match("[{,;]%s*$")) then
      keys_of(context.env, prefix, false, out)
      for _, name in ipairs(keywords) do
        if prefix ~= "" and name:sub(1, #prefix) == prefix then out[#out + 1] = name end
      end
    end
  end
  table.sort(out)
  return prefix, out
end

local function common(list)
  local first, last = list[1], list[#list] -- sorted: what these two share, all share
  local n = 0
  while n < #first and first:byte(n + 1) == last:byte(n + 1) do n = n + 1 end
  while n < #first and n > 0 and (first:byte(n + 1) or 0) >= 128 and first:byte(n + 1) < 192 do n = n - 1 end -- whole characters
  return first:sub(1, n)
end

-- Names in columns that fit `width`.
function complete.columns(names, width)
  local shown, longest = math.min(#names, most_shown), 0
  for i = 1, shown do longest = math.max(longest, #names[i]) end
  local across = math.max(1, math.floor(width / (longest + 2)))
  local down = math.ceil(shown / across)
  local lines = {}
  for row = 1, down do
    local cells = {}
    for column = 0, across - 1 do
      local name = names[column * down + row]
      if name and column * down + row <= shown then cells[#cells + 1] = name .. (" "):rep(longest + 2 - #name) end
    end
    lines[row] = table.concat(cells):gsub("%s+$", "")
  end
  if #names > shown then lines[#lines + 1] = ("... and %d more"):format(#names - shown) end
  return table.concat(lines, "\n")
end

-- What lua/edit.c asks for: the text to insert at the cursor, and lines to show below when that is not enough.
function complete.line(text, context)
  local prefix, names = complete.candidates(text, context)
  if #names == 0 then return "", "" end
  local insert = common(names):sub(#prefix + 1)
  if insert ~= "" or #names == 1 then return insert, "" end
  return "", complete.columns(names, context.width and context.width() or 80)
end

return complete
