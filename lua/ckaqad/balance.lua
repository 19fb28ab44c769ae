-- balance.lua - how strongly the layerwise term pulls beside the KL term.
--
-- A balance is any function of a pass { step, kl, cka = { [block] = value }, ... } that returns
-- { kl = number, cka = number or { [block] = number } }. A number w means w * mean over the tapped blocks of (1 - cka);
-- a table weighs each block's 1 - cka itself. The weights are constants: no gradient flows through them.
local errors = require "ckaqad.errors"
local promise = require "ckaqad.promise"
local ranks = require "ckaqad.ranks"
local balance = {}

--- The mean of 1 - cka over the tapped blocks of a pass; 0 when nothing is tapped.
---
--- Example:
---     print(cq.balance.gap { cka = { [0] = 0.9, [1] = 0.7 } }) --> 0.2
function balance.gap(pass)
  local sum, n = 0, 0
  for _, value in pairs(pass.cka) do
    sum, n = sum + (1 - value), n + 1
  end
  return n > 0 and sum / n or 0
end

--- Both terms get the same value: cka weight = min(kl / max(mean(1 - cka), 1e-8), max), per micro-batch. On a device it is worked
--- out there, and `cka` becomes a number when it is looked at.
---
--- Example:
---     local balance = cq.balance.ratio { max = 100 }
---     print(balance({ step = 1, kl = 0.3, cka = { [0] = 0.9 } }).cka) --> 3
function balance.ratio(options)
  local o = errors.fill("balance.ratio", options, { max = 100 })
  local function weight(pass) return math.min(math.max(pass.kl, 0) / math.max(balance.gap(pass), 1e-8), o.max) end
  return function(pass)
    if not rawget(pass, "slot") then return { kl = 1, cka = weight(pass) } end
    return promise.make(pass, weight, o.max)
  end
end

--- Fixed weights.
---
--- Example:
---     local balance = cq.balance.fixed { kl = 1, cka = 0.5 }
function balance.fixed(options)
  local o = errors.fill("balance.fixed", options, { kl = 1, cka = 1 })
  return function() return { kl = o.kl, cka = o.cka } end
end

-- |dKL/dh| / |dCKA/dh| over the tapped blocks of a pass, at most `max`; for a weight of their mean.
local function pull(pass, max)
  local kl, cka, n = 0, 0, 0
  local norms = pass:norms()
  for block in pairs(pass.cka) do
    kl, cka, n = kl + norms.kl[block] ^ 2, cka + norms.cka[block] ^ 2, n + 1
  end
  return cka > 0 and math.min(n * math.sqrt(kl / cka), max) or 0
end

--- Both terms pull equally hard on the hidden states: |dKL/dh| / |dCKA/dh| over all tapped block outputs, measured
--- every `every` steps by an extra backward pass, on the step's first micro-batch: rank 0's weight is that of all ranks.
---
--- Example:
---     local balance = cq.balance.gradnorm { every = 10, max = 100 }
---     print(balance(pass).cka > 0) --> true
function balance.gradnorm(options)
  local o = errors.fill("balance.gradnorm", options, { every = 10, max = 100 })
  if o.every < 1 then errors.usage("balance.gradnorm: every is %g, wanted at least 1", o.every) end
  local weight, measured
  return function(pass)
    if not measured or pass.step >= measured + o.every then
      local taking_part = ranks.first or ranks.moe == "ranks" -- experts that are dealt out want all ranks in a backward
      weight = ranks.gather({ taking_part and pull(pass, o.max) or 0 }, 1, "balance")[1]
      measured = pass.step
    end
    return { kl = 1, cka = weight }
  end
end

local rules = {}

-- "recipes/x.lua:12" of a function.
local function place(rule)
  local info = debug.getinfo(rule, "S")
  return ("%s:%d"):format(info.source:gsub("^[@=]", ""), info.linedefined)
end

local function finite(x) return type(x) == "number" and x == x and math.abs(x) ~= math.huge end

local function kind(x)
  if type(x) == "number" then return ("%g"):format(x) end
  return type(x) == "string" and ("%q"):format(x) or x == nil and "nil" or "a " .. type(x)
end

-- The weights of a table must be those of the tapped blocks, each and no other.
local function check_blocks(pass, weights, fail)
  local missing, n, given = {}, 0, 0
  for block in pairs(pass.cka) do
    n = n + 1
    if weights[block] == nil then missing[#missing + 1] = block end
  end
  for block, w in pairs(weights) do
    given = given + 1
    if pass.cka[block] == nil then
      fail(errors.USAGE, ("cka has a weight for block %s, which CKA does not look at (blocks count from 0)"):format(tostring(block)))
    end
    if not finite(w) then
      fail(type(w) == "number" and errors.NUMERIC or errors.USAGE, ("cka[%s] is %s, wanted a finite number"):format(block, kind(w)))
    end
  end
  if #missing > 0 then
    table.sort(missing)
    fail(errors.USAGE, ("cka has %d weights for %d blocks, block %d has none"):format(given, n, missing[1]))
  end
end

--- Checks what a rule returned for a pass and gives it back; an error names the rule, its line in the recipe and the step.
---
--- Example:
---     local weights = cq.balance.check(pass, { kl = 1, cka = 0.5 }, "mine", "recipes/x.lua:12")
---     print(weights.cka) --> 0.5
function balance.check(pass, weights, name, where)
  local function fail(status, what)
    errors.raise(status, "%s: balance rule %s, step %d: %s", where, name, pass.step, what)
  end
  if type(weights) ~= "table" then
    fail(errors.USAGE, ("returned %s, wanted { kl = number, cka = number or { [block] = number } }"):format(kind(weights)))
  end
  for key in pairs(weights) do
    if key ~= "kl" and key ~= "cka" then fail(errors.USAGE, ("returned a weight %s, wanted kl and cka"):format(tostring(key))) end
  end
  for _, key in ipairs { "kl", "cka" } do
    local w = weights[key]
    if key == "cka" and type(w) == "table" then
      check_blocks(pass, w, fail)
    elseif w ~= nil and not finite(w) then
      fail(type(w) == "number" and errors.NUMERIC or errors.USAGE, ("%s is %s, wanted a finite number"):format(key, kind(w)))
    end
  end
  return weights
end

-- A rule whose errors and results are answered with its name and line.
local function checked(name, rule)
  local where = place(rule)
  return function(pass)
    local ok, weights = pcall(rule, pass)
    if not ok then
      if type(weights) ~= "string" then error(weights, 0) end
      errors.usage("%s: balance rule %s, step %d: %s", where, name, pass.step, weights)
    end
    return balance.check(pass, weights, name, where)
  end
end

--- Gives a rule a name that `--balance` knows; it must be defined before the recipe that uses it runs.
---
--- Example:
---     cq.balance.define("gentle", function(p) return { kl = 1, cka = 0.1 * p.kl } end)
---     local balance = cq.balance.get "gentle"
---     print(balance(pass).cka == 0.1 * pass.kl) --> true
function balance.define(name, rule)
  if type(name) ~= "string" or type(rule) ~= "function" then
    errors.usage("balance.define: got %s and %s, wanted a name and a function", type(name), type(rule))
  end
  if name == "ratio" or name == "gradnorm" or name == "none" or name:find("^fixed:") then
    errors.usage("balance.define: %s is a rule of ckaqad, wanted another name", name)
  end
  rules[name] = rule
end

--- The lines of a defined rule's source, nil for other names: what a sweep's hash needs to know of it.
function balance.source(name)
  local rule = rules[name]
  if not rule then return nil end
  local info, lines, n = debug.getinfo(rule, "S"), {}, 0
  local f = io.open((info.source:gsub("^@", "")), "rb")
  if not f then return string.dump(rule, true) end
  for line in f:lines() do
    n = n + 1
    if n >= info.linedefined and n <= info.lastlinedefined then lines[#lines + 1] = line end
  end
  f:close()
  return table.concat(lines, "\n")
end

--- A balance by its name: "ratio", "gradnorm", "fixed:0.5" (weight of the layerwise term), "none", or a defined rule.
--- Options: `max`, the largest weight of ratio and gradnorm.
function balance.get(name, options)
  local o = errors.fill("balance.get", options, { max = 100 })
  local fixed = name:match("^fixed:(.+)$")
  if fixed then
    if not tonumber(fixed) then errors.usage("option --balance: got %s, wanted fixed:NUMBER", name) end
    return balance.fixed { cka = tonumber(fixed) }
  end
  if rules[name] then return checked(name, rules[name]) end
  if name == "none" then return balance.fixed { cka = 0 } end
  if name == "ratio" or name == "gradnorm" then return balance[name] { max = o.max } end
  local names = { "ratio", "gradnorm", "fixed:1", "none" }
  for key in pairs(rules) do names[#names + 1] = key end
  errors.choose("option --balance", name, names)
end

return errors.strict(balance, "balance")
