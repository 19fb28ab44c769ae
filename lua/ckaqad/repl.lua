-- repl.lua - the prompt: what a piece of input means, what is printed for it, what stays.
--
-- Every chunk and every function in it is interpreted, so that Ctrl-C reaches it (compiled code calls no hooks). Names are
-- globals and stay, also when a chunk fails halfway; a `local` in front of a statement is dropped for that reason.
local errors = require "ckaqad.errors"
local session = require "ckaqad.session"
local show = require "ckaqad.show"

local repl = {}

-- Input as a chunk: { chunk, expression, silent, source }; nil, message, unfinished when it does not compile.
function repl.compile(source)
  local text, silent = source:gsub(";%s*$", "")
  local chunk = loadstring("return " .. text, "=prompt")
  if chunk then return { chunk = chunk, expression = true, silent = silent > 0, source = text } end
  text = source:gsub("^%s*local%s+function%s", "function "):gsub("^%s*local%s+([%a_][%w_,%s]*=)", "%1")
  local why
  chunk, why = loadstring(text, "=prompt")
  if chunk then return { chunk = chunk, source = text } end
  return nil, why, why:find("'?<eof>'?") ~= nil
end

-- "prompt:3: message" with the text of that line below it, when the input had several.
function repl.message(e, source)
  local message = tostring(errors.is(e) and e or errors.explain(e))
  local number = tonumber(message:match("^prompt:(%d+):"))
  local n, line = 0, nil
  for text in (source .. "\n"):gmatch("(.-)\n") do
    n = n + 1
    if n == number then line = text end
  end
  return number and n > 1 and line and ("%s\n  %d | %s"):format(message, number, line) or message
end

local function print_values(input, n, ...)
  if n == 0 then return end
  rawset(_G, "_", (...))
  if input.silent then return end
  show.show(...)
end

local function finish(input, clock, ok, ...)
  local spent = clock and clock() - input.begun or 0
  if not ok then
    local e = ...
    if type(e) == "table" and rawget(e, "exit") and not rawget(e, "quiet") then error(e, 0) end -- a stop: shown by the loop
    if type(e) == "table" and rawget(e, "quiet") then return end
    io.stderr:write("ckaqad: ", repl.message(e, input.source), "\n")
    return
  end
  if not input.source:find("save_session", 1, true) then
    session.add(input.source, input.expression and select("#", ...) > 0, input.silent)
  end
  if input.expression then print_values(input, select("#", ...), ...) end
  if spent >= 1 then print(("(%.1f s)"):format(spent)) end
end

-- Runs a compiled piece of input.
function repl.run(input, clock)
  jit.off(input.chunk, true)
  input.begun = clock and clock()
  finish(input, clock, xpcall(input.chunk, function(e)
    if os.getenv "CKAQAD_TRACEBACK" == "1" and not (type(e) == "table" and rawget(e, "exit")) then
      io.stderr:write(debug.traceback(tostring(e), 2), "\n")
    end
    return e
  end))
end

local pending

-- Takes one line; returns true when more lines are needed.
function repl.line(line, clock)
  local source = pending and pending .. "\n" .. line or line
  pending = nil
  if not source:match("%S") then return false end
  if source:match("^%s*%?") then
    print(require "ckaqad.help".text(source:match("^%s*%?(.*)$"), _G))
    return false
  end
  local input, why, unfinished = repl.compile(source)
  if input then
    repl.run(input, clock)
  elseif unfinished then
    pending = source
  else
    io.stderr:write("ckaqad: ", repl.message(why, source), "\n")
  end
  return pending ~= nil
end

-- Reads with `read(prompt)` until it gives nil. What escapes a line (a stop) goes to the caller, who calls again.
function repl.loop(read, clock)
  while true do
    local line, cancelled = read(pending and ">> " or "> ")
    if cancelled then
      pending = nil
    elseif not line then
      return
    else
      repl.line(line, clock)
    end
  end
end

-- Forgets an unfinished piece of input.
function repl.reset() pending = nil end

return repl
