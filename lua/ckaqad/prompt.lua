-- prompt.lua - the prompt's surroundings: terminal or pipe, history file, completion, what survives a Ctrl-C.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local complete = require "ckaqad.complete"
local help = require "ckaqad.help"
local ranks = require "ckaqad.ranks"
local repl = require "ckaqad.repl"

local prompt = {}

local function history_file()
  local base = os.getenv("XDG_STATE_HOME")
  if not base or base == "" then base = (os.getenv("HOME") or ".") .. "/.local/state" end
  return base .. "/ckaqad/history"
end

-- Names in a folder, or nil.
local function list(path)
  local ok, text = pcall(native.take_text, function(out) return native.C.cq_folder_list(out, path) end)
  if not ok then return nil end
  local names = {}
  for name in text:gmatch("[^\n]+") do names[#names + 1] = name end
  return names
end

local function completer()
  local context = { env = _G, list = list, is_folder = function(path) return list(path) ~= nil end, entries = help.entries(),
    width = native.columns }
  return function(text) return complete.line(text, context) end
end

local function plain_reader(shown)
  return function(text)
    if shown then
      io.write(text)
      io.flush()
    end
    return io.read("*l")
  end
end

local function terminal_reader(host)
  local file, propose = history_file(), completer()
  pcall(native.call.cq_folder_make, (file:gsub("/[^/]*$", "")))
  host.history(file)
  return function(text)
    local line, second = host.readline(text, propose)
    if not line and second then
      local e = errors.new(0, native.signal_word(second))
      e.exit = 128 + second
      error(e, 0)
    end
    return line, second
  end
end

-- Runs the prompt until its input ends. `host`: what only the program knows.
function prompt.run(host)
  ranks.refuse("prompt")
  native.interactive = true
  rawset(_G, "cq", require "ckaqad")
  local terminal = native.isatty(0)
  if terminal then print(("ckaqad %s; the API is cq, ? explains, Ctrl-D leaves"):format(native.version)) end
  local read = terminal and host.readline and terminal_reader(host) or plain_reader(terminal)
  host.forever(function()
    repl.loop(read, native.clock)
  end)
  if terminal then print() end
end

return prompt
