-- select.lua - which blocks a layerwise loss looks at, in words.
--
-- A selector is a comma-separated list of: all, none, mamba, attention, moe, mlp, first:N, last:N, every:N, and block
-- numbers counted from 0 as in the checkpoint. every:4 takes the last block of every four, so the last block of a model
-- whose depth is a multiple of 4 is among them.
local errors = require "ckaqad.errors"
local select_ = {}

local letters = { mamba = "M", attention = "*Q", moe = "E", mlp = "-Q" }
local words = { "all", "none", "mamba", "attention", "moe", "mlp", "first:N", "last:N", "every:N" }

local function add_kind(picked, pattern, kind)
  local found = false
  for i = 1, #pattern do
    if letters[kind]:find(pattern:sub(i, i), 1, true) then
      picked[i - 1], found = true, true
    end
  end
  if not found then
    errors.usage("block selector: %s: the model %s has no such block, wanted one of %s or block numbers", kind, pattern,
      table.concat(words, ", "))
  end
end

local function add(picked, pattern, part)
  local n = #pattern
  if part == "none" then return end
  if part == "all" then
    for i = 0, n - 1 do picked[i] = true end
    return
  end
  if letters[part] then return add_kind(picked, pattern, part) end
  local word, count = part:match("^(%a+):(%d+)$")
  count = tonumber(count)
  if word and count == 0 then errors.usage("block selector: %s: got 0, wanted at least 1", part) end
  if word == "first" or word == "last" then
    local from = word == "first" and 0 or math.max(0, n - count)
    for i = from, math.min(n, from + count) - 1 do picked[i] = true end
  elseif word == "every" then
    for i = count - 1, n - 1, count do picked[i] = true end
    if count > n then errors.usage("block selector: %s: the model has only %d blocks", part, n) end
  elseif part:match("^%d+$") then
    if tonumber(part) >= n then errors.usage("block selector: block %s: the model has blocks 0 to %d", part, n - 1) end
    picked[tonumber(part)] = true
  else
    errors.usage("block selector: %s is unknown, nearest is %s (of %s, or block numbers such as 3,7,11)", part,
      errors.nearest(part, words), table.concat(words, ", "))
  end
end

--- Blocks that a selector names, ascending, counted from 0.
--- `pattern` has one letter per block (M mamba, E moe, * attention, - mlp,
--- Q attention and mlp).
---
--- Example:
---     print(table.concat(cq.blocks("last:2", "MEM*"), " "))               --> 2 3
---     print(table.concat(cq.blocks("attention,0", teacher.pattern), " ")) --> 0 2 5
function select_.blocks(selector, pattern)
  local picked, list = {}, {}
  local empty = true
  for part in tostring(selector):gmatch("[^,%s]+") do
    empty = false
    add(picked, pattern, part)
  end
  if empty then errors.usage("block selector: empty, wanted one of %s, or block numbers", table.concat(words, ", ")) end
  for i = 0, #pattern - 1 do
    if picked[i] then list[#list + 1] = i end
  end
  return list
end

return select_
