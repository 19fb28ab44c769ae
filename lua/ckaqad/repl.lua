-- repl.lua - the plain prompt: an expression prints its value, an error keeps the state, an unfinished line goes on.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"

local repl = {}

-- A chunk from text, as an expression when it is one; nil, message, unfinished when it does not compile.
function repl.compile(source)
  local chunk = loadstring("return " .. source, "=prompt")
  if chunk then return chunk end
  local why
  chunk, why = loadstring(source, "=prompt")
  if chunk then return chunk end
  return nil, why, why:find("'?<eof>'?") ~= nil
end

-- Values as a person reads them: tables one level deep.
function repl.show(value)
  if type(value) == "string" then return json.encode(value) end
  if type(value) ~= "table" or (getmetatable(value) or {}).__tostring then return tostring(value) end
  local parts = {}
  for _, key in ipairs(json.keys(value)) do
    if #parts == 20 then
      parts[21] = "..."
      break
    end
    local item = rawget(value, key)
    local shown = type(item) == "string" and json.encode(item) or tostring(item)
    parts[#parts + 1] = type(key) == "number" and shown or ("%s = %s"):format(tostring(key), shown)
  end
  return "{ " .. table.concat(parts, ", ") .. " }"
end

local function print_all(n, ...)
  local parts = {}
  for i = 1, n do parts[i] = repl.show((select(i, ...))) end
  if n > 0 then print(table.concat(parts, "\t")) end
end

local function returned(ok, ...)
  if ok then return print_all(select("#", ...), ...) end
  local e = ...
  io.stderr:write("ckaqad: ", tostring(e), "\n")
end

-- Runs one chunk. The user's code is interpreted, so that Ctrl-C reaches it.
function repl.run(chunk)
  jit.off(chunk, true)
  returned(xpcall(chunk, function(e)
    if errors.is(e) or not os.getenv("CKAQAD_TRACEBACK") then return e end
    return debug.traceback(tostring(e), 2)
  end))
end

local function loop(read)
  local pending
  while true do
    local line, cancelled = read(pending and ">> " or "> ")
    if not line then return end
    local source = pending and not cancelled and pending .. "\n" .. line or line
    pending = nil
    if source:match("%S") then
      local chunk, why, unfinished = repl.compile(source)
      pending = unfinished and source or nil
      if chunk then
        repl.run(chunk)
      elseif not unfinished then
        io.stderr:write("ckaqad: ", why, "\n")
      end
    end
  end
end

-- Reads with `read(prompt)` until it gives nil. What escapes a line (a late Ctrl-C) is shown and the prompt goes on.
function repl.loop(read)
  repeat
    local ok, e = pcall(loop, read)
    if not ok then io.stderr:write("ckaqad: ", tostring(e), "\n") end
  until ok
end

return repl
