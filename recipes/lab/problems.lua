-- problems.lua - the study's tasks: four kinds of problem with written solutions, each step of which a program checks.
--
--   sum   A706-343:              6-3-0=3,0-4-0=-4,7-3-1=3;363    column by column, lowest digit first, carry or borrow third
--   game  C4,9,3>23:             9*3=27,27-4=23                  every number once, any order, any solution
--   path  Dfa,bf,ga;g>f:         gaf                             along directed edges, no letter twice, any path
--   list  L4127>7421:            s1247,r7421                     a program (s sort, r reverse, i add one, l rotate left, d drop the
--                                                                last), the list after each operation; any program
--
-- A prompt belongs to one of three parts by a hash of its canonical form (what stays the same when numbers, edges or summands
-- change places), so train, validation and test have nothing in common whatever seeds draw them. `draw` is a source of numbers
-- in (0, 1), cq.stats.generator(seed).
local bit = require "bit"

local problems = { names = { "sum", "game", "path", "list" }, levels = 4, stop = "<|im_end|>" }

local function whole(draw, low, high) return low + math.floor(draw() * (high - low + 1)) end

local function shuffle(list, draw)
  for i = #list, 2, -1 do
    local j = whole(draw, 1, i)
    list[i], list[j] = list[j], list[i]
  end
  return list
end

-- Multi-digit arithmetic. 10^6 and less, so doubles are exact.
local sum = { letter = "A" }
local digits = { { 1, 2 }, { 3, 3 }, { 4, 4 }, { 5, 6 } }

local function columns(a, sign, b)
  local steps, carry, x, y = {}, 0, a, b
  repeat
    local p, q = x % 10, y % 10
    local value = sign == "+" and p + q + carry or p - q - carry
    steps[#steps + 1] = ("%d%s%d%s%d=%d"):format(p, sign, q, sign, carry, value)
    carry = sign == "+" and math.floor(value / 10) or (value < 0 and 1 or 0)
    x, y = math.floor(x / 10), math.floor(y / 10)
  until x == 0 and y == 0
  return table.concat(steps, ",") .. ";" .. (sign == "+" and a + b or a - b)
end

function sum.make(level, draw)
  local n = {}
  for i = 1, 2 do
    local count = whole(draw, digits[level][1], digits[level][2])
    n[i] = whole(draw, count == 1 and 0 or 10 ^ (count - 1), 10 ^ count - 1)
  end
  local sign = draw() < 0.5 and "+" or "-"
  if sign == "-" and n[1] < n[2] then n[1], n[2] = n[2], n[1] end
  return ("%d%s%d"):format(n[1], sign, n[2]), columns(n[1], sign, n[2])
end

function sum.key(body)
  local a, sign, b = body:match("^(%d+)([+-])(%d+)$")
  if sign == "+" and tonumber(a) > tonumber(b) then a, b = b, a end
  return a .. sign .. b
end

function sum.check(body, answer)
  local a, sign, b = body:match("^(%d+)([+-])(%d+)$")
  return answer == columns(tonumber(a), sign, tonumber(b))
end

-- The number game. No number is below zero, no product above 99.
local game = { letter = "C" }
local rules = { { n = 2, most = 12 }, { n = 3, most = 9 }, { n = 3, most = 20 }, { n = 4, most = 12 } }

local function apply(a, op, b)
  if op == "+" then return a + b end
  return op == "-" and a - b or a * b
end

function game.make(level, draw)
  local rule, numbers, values, steps = rules[level], {}, {}, {}
  for i = 1, rule.n do numbers[i] = whole(draw, 1, rule.most) end
  for i, n in ipairs(numbers) do values[i] = n end
  while #values > 1 do
    local a = table.remove(values, whole(draw, 1, #values))
    local b = table.remove(values, whole(draw, 1, #values))
    local at = whole(draw, 1, 3)
    local op = ("+-*"):sub(at, at)
    if op == "-" and a < b then a, b = b, a end
    if op == "*" and a * b > 99 then op = "+" end
    local value = apply(a, op, b)
    steps[#steps + 1] = ("%d%s%d=%d"):format(a, op, b, value)
    values[#values + 1] = value
  end
  return table.concat(numbers, ",") .. ">" .. values[1], table.concat(steps, ",")
end

local function read_game(body)
  local numbers, inside, target = {}, body:match("^([%d,]+)>(%d+)$")
  for n in inside:gmatch("%d+") do numbers[#numbers + 1] = tonumber(n) end
  return numbers, tonumber(target)
end

function game.key(body)
  local numbers, target = read_game(body)
  table.sort(numbers)
  return table.concat(numbers, ",") .. ">" .. target
end

local function take(values, n)
  for i, value in ipairs(values) do
    if value == n then return table.remove(values, i) end
  end
end

function game.check(body, answer)
  local values, target = read_game(body)
  local written = {}
  for a, op, b, value in answer:gmatch("(%d+)([+*-])(%d+)=(%d+)") do
    a, b, value = tonumber(a), tonumber(b), tonumber(value)
    if not (take(values, a) and take(values, b) and apply(a, op, b) == value) then return false end
    values[#values + 1], written[#written + 1] = value, ("%d%s%d=%d"):format(a, op, b, value)
  end
  return #values == 1 and values[1] == target and #written > 0 and table.concat(written, ",") == answer
end

-- Directed paths among the letters a to j.
local path = { letter = "D" }

function path.make(level, draw)
  local letters, edges, seen = {}, {}, {}
  for i = 1, 10 do letters[i] = ("abcdefghij"):sub(i, i) end
  shuffle(letters, draw)
  local way = table.concat(letters, "", 1, level + 2)
  local function add(edge)
    if not seen[edge] then edges[#edges + 1], seen[edge] = edge, true end
  end
  for i = 1, level + 1 do add(way:sub(i, i + 1)) end
  while #edges < 2 * (level + 1) do
    local a, b = letters[whole(draw, 1, level + 4)], letters[whole(draw, 1, level + 4)]
    if a ~= b and a .. b ~= way:sub(1, 1) .. way:sub(-1) then add(a .. b) end
  end
  return table.concat(shuffle(edges, draw), ",") .. ";" .. way:sub(1, 1) .. ">" .. way:sub(-1), way
end

function path.key(body)
  local inside, ends = body:match("^([%a,]+);(.*)$")
  local edges = {}
  for edge in inside:gmatch("%a+") do edges[#edges + 1] = edge end
  table.sort(edges)
  return table.concat(edges, ",") .. ";" .. ends
end

function path.check(body, answer)
  local inside, from, to = body:match("^([%a,]+);(%a)>(%a)$")
  local edges, seen = {}, {}
  for edge in inside:gmatch("%a+") do edges[edge] = true end
  if #answer < 2 or answer:sub(1, 1) ~= from or answer:sub(-1) ~= to then return false end
  for i = 1, #answer do
    local letter = answer:sub(i, i)
    if seen[letter] or (i > 1 and not edges[answer:sub(i - 1, i)]) then return false end
    seen[letter] = true
  end
  return true
end

-- Programs on a list of digits.
local list = { letter = "L" }
local lengths = { 3, 4, 4, 5 }
local operations = {
  s = function(l)
    local out = {}
    for c in l:gmatch(".") do out[#out + 1] = c end
    table.sort(out)
    return table.concat(out)
  end,
  r = function(l) return l:reverse() end,
  i = function(l) return (l:gsub("%d", function(c) return (c + 1) % 10 end)) end,
  l = function(l) return l:sub(2) .. l:sub(1, 1) end,
  d = function(l) return #l > 1 and l:sub(1, -2) or l end,
}

function list.make(level, draw)
  local start = {}
  for i = 1, lengths[level] do start[i] = whole(draw, 0, 9) end
  local first = table.concat(start)
  local now, steps, seen = first, {}, { [first] = true }
  while #steps < level do
    local at = whole(draw, 1, 5)
    local op = ("srild"):sub(at, at)
    local after = operations[op](now)
    if not seen[after] then
      steps[#steps + 1], seen[after], now = op .. after, true, after
    elseif op == "i" then
      break -- ten times one more is the list itself: cannot go on for ever
    end
  end
  return first .. ">" .. now, table.concat(steps, ",")
end

function list.key(body) return body end

function list.check(body, answer)
  local now, target = body:match("^(%d+)>(%d+)$")
  local steps = {}
  for op, after in answer:gmatch("(%a)(%d+)") do
    if not operations[op] or operations[op](now) ~= after then return false end
    now, steps[#steps + 1] = after, op .. after
  end
  return #steps > 0 and now == target and table.concat(steps, ",") == answer
end

local tasks = { sum = sum, game = game, path = path, list = list }
local by_letter = {}
for name, task in pairs(tasks) do by_letter[task.letter] = name end
local forms = { sum = "^%d+[+-]%d+$", game = "^%d[%d,]*>%d+$", path = "^%a%a[%a,]*;%a>%a$", list = "^%d+>%d+$" }

-- FNV-1a, so that one prompt is in one part on every machine and in every release.
local function hash(text)
  local h = bit.tobit(2166136261)
  for i = 1, #text do
    h = bit.bxor(h, text:byte(i))
    h = bit.tobit(h + bit.lshift(h, 1) + bit.lshift(h, 4) + bit.lshift(h, 7) + bit.lshift(h, 8) + bit.lshift(h, 24))
  end
  return h % 2 ^ 32
end

local function parse(prompt)
  local letter, body = prompt:match("^(%u)(.*):$")
  local name = by_letter[letter]
  if name and body:match(forms[name]) then return name, body end
end

--- The canonical form of a prompt: equal for prompts that are one problem.
function problems.key(prompt)
  local name, body = parse(prompt)
  return tasks[name].letter .. tasks[name].key(body)
end

--- Which part a prompt belongs to: "train" (90 %), "validation" (5 %), "test" (5 %).
function problems.part(prompt)
  local at = hash(problems.key(prompt)) % 100
  return at < 90 and "train" or at < 95 and "validation" or "test"
end

--- The name of a prompt's task, nil when it is none of ours.
function problems.task(prompt) return (parse(prompt)) end

--- Whether `answer` solves `prompt`: the whole of it, every step, nothing more.
function problems.check(prompt, answer)
  local name, body = parse(prompt)
  return name ~= nil and tasks[name].check(body, answer)
end

--- A problem of one task, level and part: { prompt, answer, task, level }.
function problems.make(name, level, part, draw)
  repeat
    local body, answer = tasks[name].make(level, draw)
    local item = { prompt = tasks[name].letter .. body .. ":", answer = answer, task = name, level = level }
    if answer ~= "" and problems.part(item.prompt) == part then return item end
  until false
end

-- How often each level and task is drawn. Training leans to the easy levels, the hard one teaches little at first; what is
-- measured is hard, so that something can be lost.
problems.mixes = {
  sft = { levels = { 0.2, 0.3, 0.3, 0.2 }, tasks = { sum = 0.25, game = 0.25, path = 0.25, list = 0.25 } },
  rl = { levels = { 0, 0.2, 0.4, 0.4 }, tasks = { sum = 0.15, game = 0.35, path = 0.2, list = 0.3 } },
  easy = { levels = { 1, 0, 0, 0 }, tasks = { sum = 0, game = 0, path = 0.5, list = 0.5 } }, -- seconds of training show something
  test = { levels = { 0, 0.2, 0.4, 0.4 }, tasks = { sum = 0.25, game = 0.25, path = 0.25, list = 0.25 } },
}

local function choose(weights, order, draw)
  local x = draw()
  for _, key in ipairs(order) do
    x = x - weights[key]
    if x < 0 then return key end
  end
  return order[#order]
end

--- One problem of a mix and part.
function problems.draw(mix, part, draw)
  local name = choose(mix.tasks, problems.names, draw)
  return problems.make(name, choose(mix.levels, { 1, 2, 3, 4 }, draw), part, draw)
end

--- `n` problems of a mix and part, none twice: in validation and test no two have one canonical form; in training no two have
--- one prompt (the order of numbers or edges may differ). A level that has run dry gives way to the next one.
function problems.set(mix, part, n, draw)
  local out, seen = {}, {}
  local dry = 0
  while #out < n do
    local item = problems.draw(mix, part, draw)
    for _ = 1, 20 do
      item.key = part == "train" and item.prompt or problems.key(item.prompt)
      if not seen[item.key] then break end
      item = problems.make(item.task, math.min(item.level + 1, problems.levels), part, draw)
      item.key = part == "train" and item.prompt or problems.key(item.prompt)
    end
    dry = seen[item.key] and dry + 1 or 0
    if dry > 100 then error(("problems: only %d of %d problems of part %s are different"):format(#out, n, part)) end
    if dry == 0 then out[#out + 1], seen[item.key] = item, true end
  end
  return out
end

-- What a solution says apart from its question: single steps, edges with a walk along them, lists with one operation.
local function facts(item)
  local out, before = {}, item.prompt:match("^L(%d+)")
  if item.task == "path" then return { item.prompt:match("^D(.*);") .. ";" .. item.answer } end
  for step in item.answer:gsub(";.*", ""):gmatch("[^,]+") do
    out[#out + 1] = before and before .. step or step
    before = before and step:match("%d+")
  end
  return out
end

--- A line of text without a question, for pretraining: what is said in the solutions of four problems of the part, shuffled.
function problems.facts(mix, part, draw)
  local out = {}
  for _ = 1, 4 do
    for _, fact in ipairs(facts(problems.draw(mix, part, draw))) do out[#out + 1] = fact end
  end
  return table.concat(shuffle(out, draw), " ") .. "\n"
end

--- A line that names the first problem of `train` that is one of `held` too; nil when there is none. Prompts that are no problems of
--- ours (other text) are compared as they are.
function problems.overlap(train, held)
  local seen = {}
  local function key(prompt) return problems.task(prompt) and problems.key(prompt) or prompt end
  for _, item in ipairs(held) do seen[key(item.prompt)] = item.prompt end
  for _, item in ipairs(train) do
    local other = seen[key(item.prompt)]
    if other then return ("data: training has %s, the same problem as the held-out %s; wanted none in both"):format(item.prompt, other) end
  end
end

return problems
