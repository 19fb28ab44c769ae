-- errors.lua - what went wrong, as a value: { status = C status, message = one line }.
--
-- Every error the API throws is such a table, so the program knows its exit code and a test can look at the status.
-- A wrong name is always answered with the nearest right one.
local errors = {
  IO = -1, USAGE = -2, DATA = -3, NOMEM = -4, NUMERIC = -5, MISMATCH = -6, PEER = -7, SHAPE = -8,
}

local Error = {}
Error.__index = Error
Error.__tostring = function(e) return e.message end

function errors.new(status, message)
  return setmetatable({ status = status, message = message }, Error)
end

function errors.is(e) return getmetatable(e) == Error end

function errors.raise(status, format, ...)
  error(errors.new(status, select("#", ...) > 0 and format:format(...) or format), 0)
end

function errors.usage(format, ...) errors.raise(errors.USAGE, format, ...) end

-- Leaves the program with this exit code and no message (--help, a failed verify).
function errors.exit(code)
  error(setmetatable({ exit = code, quiet = true, message = "exit " .. code }, Error), 0)
end

-- Writes to an open file and hands it to the system; an error names `path`. Never compiled: where fflush fails in a trace, LuaJIT
-- leaves the trace and calls it again, which finds nothing left to write and says that all is well.
function errors.write(file, path, bytes)
  local ok, why = file:write(bytes)
  if ok then ok, why = file:flush() end
  if not ok then errors.raise(errors.IO, "%s: %s", path, tostring(why)) end
end
jit.off(errors.write)

--- Ends a recipe with one line, `reason`, and exit code 3 (data or models that it cannot work with); goes on when `reason` is nil.
---
--- Example:
---     cq.refuse(data:facts().train.documents < 1 and "no documents" or nil)
function errors.refuse(reason)
  if reason then errors.raise(errors.DATA, "%s", reason) end
end

-- Edit distance in which swapping two neighbours counts one (optimal string alignment).
function errors.distance(a, b)
  local before, last = nil, {}
  for j = 0, #b do last[j] = j end
  for i = 1, #a do
    local row = { [0] = i }
    for j = 1, #b do
      local same = a:byte(i) == b:byte(j)
      local best = math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (same and 0 or 1))
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        best = math.min(best, before[j - 2] + 1)
      end
      row[j] = best
    end
    before, last = last, row
  end
  return last[#b]
end

-- The name of the list that is closest to `name`; the first of equals in sorted order.
function errors.nearest(name, names)
  local best, least
  local sorted = {}
  for i, n in ipairs(names) do sorted[i] = n end
  table.sort(sorted)
  for _, n in ipairs(sorted) do
    local d = errors.distance(name:lower(), n:lower())
    if not least or d < least then best, least = n, d end
  end
  return best
end

local classes = {}

-- Makes the methods of a class known by the name a reader has for its objects. Returns the class.
function errors.class(name, class)
  classes[name] = class
  class.__index = class
  return class
end

-- Lua's own message about a method that does not exist, with the nearest one that does.
function errors.explain(message)
  local where, name = tostring(message):match("^(.-)attempt to call method '([%w_]+)' %(a nil value%)")
  if not where then return message end
  local names = {}
  for object, class in pairs(classes) do
    for key, value in pairs(class) do
      if type(value) == "function" and not key:match("^__") then names[#names + 1] = object .. ":" .. key end
    end
  end
  local best, least
  table.sort(names)
  for _, full in ipairs(names) do
    local d = errors.distance(name:lower(), full:match(":(.*)"):lower())
    if not least or d < least then best, least = full, d end
  end
  return ("%smethod %s does not exist%s"):format(where, name, best and ", nearest is " .. best or "")
end

-- `name` when the list has it, else an error that names the nearest one and all of them.
function errors.choose(what, name, names)
  for _, n in ipairs(names) do
    if n == name then return name end
  end
  errors.usage("%s: %s is unknown, nearest is %s (of %s)", what, tostring(name),
    errors.nearest(tostring(name), names), table.concat(names, ", "))
end

-- A copy of `defaults` with the keys of `given` over it. A key that `defaults` lacks is an error; errors.NONE stands
-- for "no default".
errors.NONE = setmetatable({}, { __tostring = function() return "none" end })
function errors.fill(what, given, defaults)
  if given ~= nil and type(given) ~= "table" then
    errors.usage("%s: got %s, wanted an options table", what, type(given))
  end
  local out, names = {}, {}
  for key, value in pairs(defaults) do
    names[#names + 1] = key
    if value ~= errors.NONE then out[key] = value end
  end
  for key, value in pairs(given or {}) do
    if defaults[key] == nil then
      errors.usage("%s: option %s is unknown, nearest is %s", what, tostring(key), errors.nearest(tostring(key), names))
    end
    out[key] = value
  end
  return out
end

-- Makes reading an absent key of `t` an error that names the nearest one.
function errors.strict(t, what)
  return setmetatable(t, {
    __index = function(_, key)
      local names = {}
      for name in pairs(t) do names[#names + 1] = tostring(name) end
      errors.usage("%s: %s is unknown, nearest is %s", what, tostring(key), errors.nearest(tostring(key), names))
    end,
  })
end

return errors
