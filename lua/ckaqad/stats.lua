-- stats.lua - what a few numbers say: mean and spread, paired differences with a bootstrap interval, recovery.
--
-- Runs are compared in pairs of the same seed, never by two means: the seed moves both runs of a pair alike, and what it does
-- drops out of their difference. The random numbers are our own and seeded, so the same runs give the same interval everywhere.
local errors = require "ckaqad.errors"

local stats = {}

-- Fewer pairs than this cannot reach 5 % in a sign test (2 / 2^5 > 0.05): an interval over them is a hint, no proof.
stats.FEW = 6

-- MRG32k3a (L'Ecuyer, Operations Research 47, 1999): all products stay below 2^53, so doubles hold them exactly.
local m1, m2 = 4294967087, 4294944443

--- A generator of uniform numbers in (0, 1), the same ones on every machine for the same `seed` (a whole number).
---
--- Example:
---     local draw = cq.stats.generator(1)
---     print(draw() < 1) --> true
function stats.generator(seed)
  local start = 12345 + math.floor(seed or 1) % 4294900000
  local a, b, c, d, e, f = start, 12345, 12345, start, 12345, 12345
  local function draw()
    local p = (1403580 * b - 810728 * a) % m1
    a, b, c = b, c, p
    local q = (527612 * f - 1370589 * d) % m2
    d, e, f = e, f, q
    local z = (p - q) % m1
    return (z == 0 and m1 or z) / (m1 + 1)
  end
  for _ = 1, 16 do draw() end -- neighbouring seeds start close together
  return draw
end

local function finite(x) return type(x) == "number" and x == x and math.abs(x) ~= math.huge end

-- The value below which the share `q` of a sorted list lies, linear between two entries.
local function quantile(sorted, q)
  local at = 1 + q * (#sorted - 1)
  local low = math.floor(at)
  local high = math.min(low + 1, #sorted)
  return sorted[low] + (at - low) * (sorted[high] - sorted[low])
end

--- Summary of a list of numbers: `{ n, mean, sd, min, max, median, missing }`. `sd` is the sample's (n - 1), nil for one number.
--- What is no finite number is left out and counted in `missing`; of no numbers at all only `n = 0` is known.
---
--- Example:
---     print(cq.stats.summary({ 1, 2, 4 }).median) --> 2
function stats.summary(list)
  local kept, missing, sum = {}, 0, 0
  for _, x in pairs(list) do
    if finite(x) then kept[#kept + 1] = x else missing = missing + 1 end
  end
  table.sort(kept) -- the order of a sum decides its last bits: pairs() promises none
  local n = #kept
  if n == 0 then return { n = 0, missing = missing } end
  for _, x in ipairs(kept) do sum = sum + (x - kept[1]) end -- from the least: equal numbers have exactly their mean, and no spread
  local mean, squares = kept[1] + sum / n, 0
  for _, x in ipairs(kept) do squares = squares + (x - mean) ^ 2 end
  return {
    n = n, mean = mean, sd = n > 1 and math.sqrt(squares / (n - 1)) or nil, min = kept[1], max = kept[n],
    median = quantile(kept, 0.5), missing = missing,
  }
end

-- Differences a[key] - b[key] of the keys that both have, in the keys' order.
local function differences(a, b)
  local keys, list = {}, {}
  for key, x in pairs(a) do
    if finite(x) and finite(b[key]) then keys[#keys + 1] = key end
  end
  table.sort(keys, function(x, y)
    if type(x) == type(y) then return x < y end
    return type(x) < type(y)
  end)
  for i, key in ipairs(keys) do list[i] = a[key] - b[key] end
  return list
end

-- Sorted means of `resamples` draws of n differences with replacement.
local function bootstrap(list, resamples, seed)
  local n, draw, means = #list, stats.generator(seed), {}
  for r = 1, resamples do
    local sum = 0
    for _ = 1, n do sum = sum + list[1 + math.floor(draw() * n)] end
    means[r] = sum / n
  end
  table.sort(means)
  return means
end

--- Paired comparison of two settings: `a[key] - b[key]` over the keys (seeds, or places in two lists) that both have.
--- Gives `{ n, difference, low, high, clear, few }`: the mean difference, its percentile bootstrap interval, whether that excludes
--- zero (never with fewer than two pairs), and whether there are too few pairs to lean on it. Options: `seed` (1), `resamples`
--- (10000), `level` (0.95).
---
--- Example:
---     local p = cq.stats.paired({ 1, 2, 3 }, { 2, 3.1, 4 }) -- three seeds of two settings
---     print(p.n, p.clear, p.few) --> 3	true	true
function stats.paired(a, b, given)
  local o = errors.fill("stats.paired", given, { seed = 1, resamples = 10000, level = 0.95 })
  if not (o.level > 0 and o.level < 1) then errors.usage("stats.paired: level %s, wanted a number between 0 and 1", tostring(o.level)) end
  if o.resamples < 1 then errors.usage("stats.paired: %s resamples, wanted 1 or more", tostring(o.resamples)) end
  local list = differences(a, b)
  local n = #list
  if n == 0 then return { n = 0, clear = false, few = true } end
  local sum = 0
  for _, d in ipairs(list) do sum = sum + d end
  if n == 1 then return { n = 1, difference = sum, clear = false, few = true } end
  local means = bootstrap(list, o.resamples, o.seed)
  local low, high = quantile(means, (1 - o.level) / 2), quantile(means, (1 + o.level) / 2)
  return { n = n, difference = sum / n, low = low, high = high, clear = low > 0 or high < 0, few = n < stats.FEW }
end

--- The mean of a list of numbers with its percentile bootstrap interval: `{ n, mean, low, high }`. Of the answers to a benchmark the
--- list has one number for each question, the share of its samples that is right: the mean is pass@1. Options as of `paired`.
---
--- Example:
---     local pass = cq.stats.interval { 1, 0.5, 0, 1 } -- four questions
---     print(pass.n, pass.mean, pass.low < pass.mean and pass.mean < pass.high) --> 4	0.625	true
function stats.interval(list, given)
  local nothing = {}
  for key in pairs(list) do nothing[key] = 0 end
  local p = stats.paired(list, nothing, given)
  return { n = p.n, mean = p.difference, low = p.low, high = p.high }
end

--- How much of the loss between teacher and PTQ the student won back, in percent: 0 is PTQ, 100 the teacher; negative when it got
--- worse. Any measure does, KL with 0 for the teacher too. nil when PTQ lost nothing.
---
--- Example:
---     print(cq.stats.recovery(0.008, 0.005, 0)) --> 37.5
function stats.recovery(ptq, student, teacher)
  if not (finite(ptq) and finite(student) and finite(teacher)) or ptq == teacher then return nil end
  return 100 * (ptq - student) / (ptq - teacher)
end

return stats
