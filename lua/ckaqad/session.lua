-- session.lua - what was typed at the prompt and ran, as a recipe that runs.
--
-- At the prompt every name is a global. A recipe may not make any, so the file gets an environment of its own.
local errors = require "ckaqad.errors"

local session = { typed = {} }

local mark = "-- What was typed at the prompt"

-- Keeps a piece of input that ran without error; `expression`: its value was asked for; `silent`: it ended in a semicolon.
function session.add(source, expression, silent)
  session.typed[#session.typed + 1] = { source = source, expression = expression, silent = silent }
end

-- The text of the recipe.
function session.text(typed, date)
  local out = {
    ("%s on %s; it runs as a recipe."):format(mark, date), 'local cq = require "ckaqad"',
    "setfenv(1, setmetatable({ cq = cq }, { __index = function(_, name) return rawget(_G, name) end }))", "",
  }
  for _, item in ipairs(typed) do
    local source = item.source:gsub("%s+$", "")
    if item.expression then
      source = item.silent and ("_ = %s"):format(source) or ("_ = cq.show(%s)"):format(source)
    end
    out[#out + 1] = source
  end
  return table.concat(out, "\n") .. "\n"
end

--- Writes what was typed at this prompt and ran without error as a recipe: `cq.save_session "mine.lua"`, then
--- `ckaqad mine.lua`. A file that is no such recipe is not overwritten. Returns the number of pieces.
function session.save_session(path)
  if type(path) ~= "string" or not path:match("%.lua$") then
    errors.usage("save_session: got %s, wanted a path ending in .lua", tostring(path))
  end
  local old = io.open(path, "rb")
  if old then
    local first = old:read "*l" or ""
    old:close()
    if first:sub(1, #mark) ~= mark then errors.usage("save_session: %s exists and is no saved session, wanted a new file", path) end
  end
  local text = session.text(session.typed, os.date "%Y-%m-%d")
  local chunk, why = loadstring(text, "=" .. path)
  if not chunk then errors.usage("save_session: what was typed does not fit into one file: %s", why) end
  local f, reason = io.open(path, "wb")
  local ok = f and f:write(text) and f:close()
  if not ok then errors.raise(errors.IO, "save_session: %s", reason or path .. ": cannot be written") end
  return #session.typed
end

return session
