-- Small problems whose answers a program can check: the text that models of the study are pretrained on.
--
-- A task makes { prompt = string, answer = string }; `check(prompt, answer)` accepts exactly the right worked answers.
-- Randomness is LuaJIT's own generator, so one seed gives one text on every machine.
local tasks = {}

local function digits(n)
  local lo = n == 1 and 0 or 10 ^ (n - 1)
  return math.random(lo, 10 ^ n - 1)
end

-- Column addition and subtraction, lowest digit first, with the carry or borrow written out:
--   "47+85" -> "7+5+0=12,4+8+1=13;132"      "52-17" -> "2-7-0=-5,5-1-1=3;35"
local function columns(a, sign, b)
  local steps, carry, result, scale = {}, 0, 0, 1
  local x, y = a, b
  repeat
    local p, q = x % 10, y % 10
    local value = sign == "+" and p + q + carry or p - q - carry
    steps[#steps + 1] = ("%d%s%d%s%d=%d"):format(p, sign, q, sign, carry, value)
    result = result + (value % 10) * scale
    carry = sign == "+" and math.floor(value / 10) or (value < 0 and 1 or 0)
    x, y, scale = math.floor(x / 10), math.floor(y / 10), scale * 10
  until x == 0 and y == 0
  if sign == "+" then result = result + carry * scale end
  return table.concat(steps, ",") .. ";" .. result
end

tasks.sum = {
  make = function(level)
    local a, b = digits(math.random(1, level + 1)), digits(math.random(1, level + 1))
    local sign = math.random() < 0.5 and "+" or "-"
    if sign == "-" and a < b then a, b = b, a end
    return { prompt = ("%d%s%d"):format(a, sign, b), answer = columns(a, sign, b) }
  end,
  check = function(prompt, answer)
    local a, sign, b = prompt:match("^(%d+)([+-])(%d+)$")
    return a ~= nil and answer == columns(tonumber(a), sign, tonumber(b))
  end,
}

-- A program on one register, modulo 100; the answer is its trace:  "x=3;x+4;x*2;x-5" -> "3,7,14,9"
local function trace(program)
  local states, x = {}, nil
  for op, n in program:gmatch("x([=+*-])(%d+)") do
    n = tonumber(n)
    if op == "=" then x = n
    elseif x == nil then return nil
    elseif op == "+" then x = x + n
    elseif op == "-" then x = x - n
    else x = x * n end
    x = x % 100
    states[#states + 1] = x
  end
  return table.concat(states, ",")
end

tasks.register = {
  make = function(level)
    local program = { "x=" .. math.random(0, 30) }
    for i = 2, 2 + level + math.random(0, 1) do
      local op = ({ "+", "-", "*" })[math.random(3)]
      program[i] = "x" .. op .. (op == "*" and math.random(2, 3) or math.random(1, 20))
    end
    program = table.concat(program, ";")
    return { prompt = program, answer = trace(program) }
  end,
  check = function(prompt, answer) return answer == trace(prompt) end,
}

-- A program on a list; the answer is the list after every operation:
--   "[3,1,2] sort rev" -> "[1,2,3] [3,2,1]"
local list_ops = {
  sort = function(l) table.sort(l) end,
  rev = function(l) for i = 1, math.floor(#l / 2) do l[i], l[#l + 1 - i] = l[#l + 1 - i], l[i] end end,
  inc = function(l) for i = 1, #l do l[i] = (l[i] + 1) % 10 end end,
  rot = function(l) table.insert(l, table.remove(l, 1)) end,
  drop = function(l) if #l > 1 then table.remove(l) end end,
}
local list_names = { "sort", "rev", "inc", "rot", "drop" }

local function run_list(prompt)
  local list, states = {}, {}
  local inside, program = prompt:match("^%[([%d,]+)%](.*)$")
  if not inside then return nil end
  for n in inside:gmatch("%d+") do list[#list + 1] = tonumber(n) end
  for name in program:gmatch("%a+") do
    if not list_ops[name] then return nil end
    list_ops[name](list)
    states[#states + 1] = "[" .. table.concat(list, ",") .. "]"
  end
  return table.concat(states, " ")
end

tasks.list = {
  make = function(level)
    local list, program = {}, {}
    for i = 1, math.random(2, 3 + level) do list[i] = math.random(0, 9) end
    for i = 1, math.random(1, 1 + level) do program[i] = list_names[math.random(#list_names)] end
    local prompt = "[" .. table.concat(list, ",") .. "] " .. table.concat(program, " ")
    return { prompt = prompt, answer = run_list(prompt) }
  end,
  check = function(prompt, answer) return answer == run_list(prompt) end,
}

-- A sentence with two steps of arithmetic in words.
local names = { "Ana", "Ben", "Cho", "Dov", "Eve", "Finn" }
local things = { "apples", "pens", "coins", "books", "eggs" }

local function story(prompt)
  local a, verb, b, groups = prompt:match("has (%d+) %a+ and (%a+) (%d+)%.%D*(%d+) times")
  if not a then return nil end
  a, b, groups = tonumber(a), tonumber(b), tonumber(groups)
  local sign = verb == "finds" and "+" or "-"
  local left = sign == "+" and a + b or a - b
  return ("%d%s%d=%d, %d*%d=%d"):format(a, sign, b, left, left, groups, left * groups)
end

tasks.story = {
  make = function()
    local a = math.random(3, 40)
    local finds = math.random() < 0.5
    local b = finds and math.random(1, 30) or math.random(1, a)
    local prompt = ("%s has %d %s and %s %d. Then it is done %d times. How many?"):format(names[math.random(#names)], a,
      things[math.random(#things)], finds and "finds" or "loses", b, math.random(2, 4))
    return { prompt = prompt, answer = story(prompt) }
  end,
  check = function(prompt, answer) return answer == story(prompt) end,
}

tasks.names = { "sum", "register", "list", "story" }

return tasks
