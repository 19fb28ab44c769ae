-- balance.lua - how strongly the layerwise term pulls beside the KL term.
--
-- A balance is any function of a pass { step, kl, cka = { [block] = value }, ... } that returns
-- { kl = number, cka = number or { [block] = number } }. A number w means w * mean over the tapped blocks of (1 - cka);
-- a table weighs each block's 1 - cka itself. The weights are constants: no gradient flows through them.
local errors = require "ckaqad.errors"
local balance = {}

--- The mean of 1 - cka over the tapped blocks of a pass; 0 when nothing is tapped.
function balance.gap(pass)
  local sum, n = 0, 0
  for _, value in pairs(pass.cka) do
    sum, n = sum + (1 - value), n + 1
  end
  return n > 0 and sum / n or 0
end

--- Both terms get the same value: cka weight = min(kl / max(mean(1 - cka), 1e-8), max), per micro-batch.
function balance.ratio(options)
  local o = errors.fill("balance.ratio", options, { max = 100 })
  return function(pass)
    return { kl = 1, cka = math.min(math.max(pass.kl, 0) / math.max(balance.gap(pass), 1e-8), o.max) }
  end
end

--- Fixed weights. `cq.balance.fixed { kl = 1, cka = 0.5 }`
function balance.fixed(options)
  local o = errors.fill("balance.fixed", options, { kl = 1, cka = 1 })
  return function() return { kl = o.kl, cka = o.cka } end
end

--- Both terms pull equally hard on the hidden states: |dKL/dh| / |dCKA/dh| over all tapped block outputs, measured
--- every `every` steps by an extra backward pass.
function balance.gradnorm(options)
  local o = errors.fill("balance.gradnorm", options, { every = 10, max = 100 })
  if o.every < 1 then errors.usage("balance.gradnorm: every is %g, wanted at least 1", o.every) end
  local weight, measured
  return function(pass)
    if not measured or pass.step >= measured + o.every then
      local kl, cka, n = 0, 0, 0
      local norms = pass:norms()
      for block in pairs(pass.cka) do
        kl, cka, n = kl + norms.kl[block] ^ 2, cka + norms.cka[block] ^ 2, n + 1
      end
      weight = cka > 0 and math.min(n * math.sqrt(kl / cka), o.max) or 0
      measured = pass.step
    end
    return { kl = 1, cka = weight }
  end
end

local rules = {}

--- Gives a rule a name that `--balance` knows; it must be defined before the recipe that uses it runs.
function balance.define(name, rule)
  if type(name) ~= "string" or type(rule) ~= "function" then
    errors.usage("balance.define: got %s and %s, wanted a name and a function", type(name), type(rule))
  end
  rules[name] = rule
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
  if rules[name] then return rules[name] end
  if name == "none" then return balance.fixed { cka = 0 } end
  if name == "ratio" or name == "gradnorm" then return balance[name] { max = o.max } end
  local names = { "ratio", "gradnorm", "fixed:1", "none" }
  for key in pairs(rules) do names[#names + 1] = key end
  errors.choose("option --balance", name, names)
end

return errors.strict(balance, "balance")
