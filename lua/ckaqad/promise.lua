-- promise.lua - weights of a balance that a device works out.
--
-- What `ratio` gives for a pass whose losses are on a device: a backward of that pass has the device work `cka` out. Who looks at
-- `cka` first waits for the losses, and it is a number from then on.
local promise = {}
local rules, Promise = setmetatable({}, { __mode = "k" }), {}

function Promise.__index(weights, key)
  local p = rules[weights]
  if key ~= "cka" or not p then return nil end
  weights.cka = p.weight(p.pass)
  return weights.cka
end

-- Weights of a pass: `weight` works them out here, `most` is what a device needs to know of the rule.
function promise.make(pass, weight, most)
  local weights = setmetatable({ kl = 1 }, Promise)
  rules[weights] = { pass = pass, weight = weight, most = most }
  return weights
end

-- Makes the weight of a promise a number; other weights are as they were.
function promise.keep(weights)
  if rules[weights] then weights.cka = weights.cka end
end

-- The largest weight of a promise for this pass that nobody has looked at or changed, else nil.
function promise.most(weights, pass)
  local p = rules[weights]
  return p and p.pass == pass and rawget(weights, "cka") == nil and weights.kl == 1 and p.most or nil
end

return promise
