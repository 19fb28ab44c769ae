-- arms.lua - the arms of the study: what each changes, and against which other arm; their runs, and what must be equal among them.
--
-- An arm differs from the one it is compared with (`from`) in the named options and in nothing else but the learning rate, which every
-- trained arm chooses for itself among the same ones. `full`: the full protocol; the others run with few seeds and are marked so.
local cq = require "ckaqad"
local arms = {}

arms.list = {
  { name = "BF16", set = { quant = "none", steps = 0 }, full = true },
  { name = "PTQ max", from = "BF16", factors = { "quant" }, set = { steps = 0 }, full = true },
  { name = "PTQ MSE", from = "PTQ max", factors = { "scales" }, set = { steps = 0, scales = "mse" }, full = true },
  { name = "PTQ four-over-six", from = "PTQ max", factors = { "scales" }, set = { steps = 0, scales = "four_over_six" }, full = true },
  { name = "QAD", from = "PTQ max", factors = { "steps" }, set = {}, trained = true, full = true },
  { name = "QAT", from = "QAD", factors = { "loss" }, set = { loss = "ce" }, trained = true, full = true },
  { name = "QAD top-k, bucket", from = "QAD", factors = { "tail" }, set = { tail = "bucket" }, trained = true, full = true },
  { name = "QAD top-k, renormalized", from = "QAD", factors = { "tail" }, set = { tail = "renormalized" }, trained = true, full = true },
  { name = "QAD top-k, truncated", from = "QAD", factors = { "tail" }, set = { tail = "truncated" }, trained = true, full = true },
  { name = "CKA-QAD", from = "QAD", factors = { "layer" }, set = { layer = "cka" }, trained = true, full = true },
  { name = "paper-like", from = "CKA-QAD", factors = { "estimator", "tail" }, set = { layer = "cka", estimator = "biased",
    tail = "renormalized" }, trained = true, full = true },
  { name = "cosine", from = "CKA-QAD", factors = { "layer" }, set = { layer = "cosine" }, trained = true, full = true },
  { name = "MSE", from = "CKA-QAD", factors = { "layer" }, set = { layer = "mse" }, trained = true, full = true },
  { name = "Gram", from = "CKA-QAD", factors = { "layer" }, set = { layer = "gram" }, trained = true },
  { name = "CKA, fixed weight 1", from = "CKA-QAD", factors = { "balance" }, set = { layer = "cka", balance = "fixed:1" }, trained = true },
  { name = "CKA without KL", from = "CKA-QAD", factors = { "balance" }, set = { layer = "cka", balance = "alone" }, trained = true },
  { name = "CKA on attention", from = "CKA-QAD", factors = { "cka" }, set = { layer = "cka", cka = "attention" }, trained = true },
  { name = "CKA on Mamba", from = "CKA-QAD", factors = { "cka" }, set = { layer = "cka", cka = "mamba" }, trained = true },
  { name = "CKA on MoE", from = "CKA-QAD", factors = { "cka" }, set = { layer = "cka", cka = "moe" }, trained = true },
  { name = "CKA on the last half", from = "CKA-QAD", factors = { "cka" }, set = { layer = "cka", cka = "half" }, trained = true },
  { name = "CKA, n = 64", from = "CKA-QAD", factors = { "rows" }, set = { layer = "cka", rows = 64 }, trained = true },
  { name = "CKA, n = 256", from = "CKA-QAD", factors = { "rows" }, set = { layer = "cka", rows = 256 }, trained = true },
}

local short = { BF16 = true, ["PTQ max"] = true, QAD = true, ["CKA-QAD"] = true }
local kinds = { attention = "*", mamba = "M", moe = "E" }

--- Configuration and pattern of a teacher's folder.
function arms.teacher(dir)
  local f = io.open(dir .. "/config.json", "rb")
  cq.refuse(not f and ("model: %s/config.json is missing, wanted a folder with a teacher"):format(dir) or nil)
  local config = cq.json.decode(f:read "*a", dir .. "/config.json")
  f:close()
  return config, config.hybrid_override_pattern or ("Q"):rep(config.num_hidden_layers)
end

--- The rates but one.
function arms.others(rates, but)
  local out = {}
  for _, rate in ipairs(rates) do
    if rate ~= but then out[#out + 1] = rate end
  end
  return out
end

--- The arms that `which` names (all, main, short) for a model of `pattern`: blocks that it does not have are left out.
function arms.choose(which, pattern)
  if which ~= "all" and which ~= "main" and which ~= "short" then
    cq.refuse(("option --arms: %s is unknown, wanted all, main or short"):format(which))
  end
  local list = {}
  for _, arm in ipairs(arms.list) do
    local set, letter = {}, kinds[arm.set.cka]
    for key, value in pairs(arm.set) do set[key] = value end
    if set.cka == "half" then set.cka = ("last:%d"):format(math.ceil(#pattern / 2)) end
    local wanted = which == "all" or which == "main" and arm.full or short[arm.name]
    if wanted and not (letter and not pattern:find(letter, 1, true)) then
      list[#list + 1] = { name = arm.name, from = arm.from, factors = arm.factors, set = set, trained = arm.trained,
        full = arm.full }
    end
  end
  return list
end

--- Settings of cq.sweep: every arm that `keep` wants, `steps` long at each rate of `rates(arm)`; untrained ones once.
function arms.settings(list, keep, rates, steps)
  local out = {}
  for _, arm in ipairs(list) do
    for _, rate in ipairs(keep(arm) and (arm.trained and rates(arm) or { false }) or {}) do
      local item = { name = arm.name }
      if rate then item.name, item.lr, item.steps = ("%s, lr %g"):format(arm.name, rate), rate, steps end
      for key, value in pairs(arm.set) do item[key] = value end
      out[#out + 1] = item
    end
  end
  return out
end

local function object(path) return cq.json.lines(path)[1] end

--- The runs of a sweep by arm: { [name] = list of { seed, lr, options, facts, summary, seconds } }.
function arms.runs(folder, points)
  local out = {}
  for _, p in ipairs(points) do
    local dir = ("%s/points/%s/"):format(folder, p.hash)
    local run, summary = object(dir .. "run.json"), object(dir .. "summary.json")
    local name = p.name:gsub(", lr %S+$", "")
    out[name] = out[name] or {}
    table.insert(out[name], { seed = p.seed, lr = run.options.lr, options = run.options, summary = summary, more = summary.more,
      facts = { ["program version"] = run.version, ["model files"] = cq.json.encode(run.model.sha256),
        ["training documents"] = run.data.train.sha256, ["held-out documents"] = run.data.holdout.sha256,
        kernels = run.device.kernels .. " " .. run.device.instructions } })
  end
  return out
end

--- Points of accuracy that PTQ costs.
function arms.damage(runs)
  local function mean(name)
    local sum = 0
    for _, run in ipairs(runs[name]) do sum = sum + 100 * run.more.pass / #runs[name] end
    return sum
  end
  return mean "BF16" - mean "PTQ max"
end

local compared = { "model", "data", "part", "mix", "items", "samples", "quant", "scales", "calibrate", "steps", "batch", "seq", "mask",
  "loss", "top_k", "tail", "layer", "cka", "rows", "estimator", "balance" }

-- The first thing besides `factors` in which two runs differ, in words.
local function difference(a, b, factors)
  local named = {}
  for _, key in ipairs(factors) do named[key] = true end
  for _, key in ipairs(compared) do
    if not named[key] and a.options[key] ~= b.options[key] then
      return ("%s (%s and %s)"):format(key, tostring(a.options[key]), tostring(b.options[key]))
    end
  end
  for _, key in ipairs(cq.json.keys(a.facts)) do
    if a.facts[key] ~= b.facts[key] then return key end
  end
end

--- A line that says in what an arm's runs differ from those of the arm it is compared with besides its factors, or that they have
--- other seeds or fewer; nil when the comparison is sound.
function arms.confounded(list, runs)
  for _, arm in ipairs(list) do
    local own, theirs = runs[arm.name] or {}, runs[arm.from] or {}
    for _, run in ipairs(own) do
      local pair
      for _, other in ipairs(theirs) do pair = other.seed == run.seed and other or pair end
      if arm.from and not pair then
        return ("study: arm %s has seed %s, which %s has not; wanted paired seeds"):format(arm.name, tostring(run.seed), arm.from)
      end
      local what = pair and difference(run, pair, arm.factors) or difference(run, own[1], {})
      if what then
        return ("study: arm %s, seed %s, differs from %s in %s too; wanted %s only"):format(arm.name, tostring(run.seed),
          pair and arm.from or "its other seeds", what, arm.factors and table.concat(arm.factors, " and ") or "the seed")
      end
    end
  end
end

--- The rate of every trained arm: the one whose mean accuracy over the validation runs is highest, of equals the one with less KL.
--- Gives { [name] = { lr, tried = { { lr, pass, kl, n }, ... } } }; an error when the arms did not try the same rates the same number of
--- times.
function arms.rates(list, runs)
  local out, first = {}, nil
  for _, arm in ipairs(list) do
    local by_rate, tried = {}, {}
    for _, run in ipairs(arm.trained and runs[arm.name] or {}) do
      local t = by_rate[run.lr] or { lr = run.lr, pass = 0, kl = 0, n = 0 }
      if not by_rate[run.lr] then by_rate[run.lr], tried[#tried + 1] = t, t end
      t.pass, t.kl, t.n = t.pass + run.more.pass, t.kl + run.summary.after.kl, t.n + 1
    end
    table.sort(tried, function(a, b) return a.lr < b.lr end)
    local said, best = {}, nil
    for i, t in ipairs(tried) do
      t.pass, t.kl, said[i] = t.pass / t.n, t.kl / t.n, ("%g x %d"):format(t.lr, t.n)
      if not best or t.pass > best.pass or t.pass == best.pass and t.kl < best.kl then best = t end
    end
    if best then
      out[arm.name] = { lr = best.lr, tried = tried }
      said = table.concat(said, ", ")
      first = first or { arm.name, said }
      cq.refuse(said ~= first[2] and ("study: %s tried rates %s and %s tried %s; wanted the same for all"):format(first[1], first[2],
        arm.name, said) or nil)
    end
  end
  return out
end

-- What a report needs of one run.
local function measured(run)
  local after, more = run.summary.after, run.more
  return cq.json.object { "seed", run.seed, "pass", more.pass, "greedy", more.greedy, "tasks", more.tasks, "kl", after.kl,
    "top1", after.top1, "outside_kl", more.outside_kl, "outside_top1", more.outside_top1, "cka", after.cka, "cka_min", after.cka_min,
    "cka_min_block", after.cka_min_block, "geometry", after.geometry, "seconds", run.summary.seconds }
end

-- The test runs of the arms in `both` at each rate: those at other rates than the chosen one, and the arm's own.
local function every_rate(list, runs, both)
  local out = cq.json.array {}
  for _, arm in ipairs(list) do
    if both[arm.name] then
      local own = cq.json.array {}
      for _, from in ipairs { both, runs } do
        for _, run in ipairs(from[arm.name]) do own[#own + 1] = cq.json.object { "lr", run.lr, "run", measured(run) } end
      end
      out[#out + 1] = cq.json.object { "name", arm.name, "runs", own }
    end
  end
  return out
end

--- The whole study of one teacher as a JSON object: what study.json holds.
function arms.record(list, runs, chosen, both, opt, config, pattern)
  local records = cq.json.array {}
  for i, arm in ipairs(list) do
    local own = cq.json.array {}
    for j, run in ipairs(runs[arm.name] or {}) do own[j] = measured(run) end
    records[i] = cq.json.object { "name", arm.name, "from", arm.from, "factors", arm.factors, "full", arm.full or false,
      "lr", chosen[arm.name] and chosen[arm.name].lr, "tried", chosen[arm.name] and chosen[arm.name].tried, "runs", own }
  end
  local first = runs[list[1].name][1].options
  return cq.json.object { "family", config.model_type, "pattern", pattern, "hidden", config.hidden_size, "steps", opt.updates, "tokens",
    opt.updates * opt.batch * first.seq, "items", opt.items, "samples", opt.samples, "mask", opt.mask,
    "rates", opt.rates, "tries", opt.tries, "arms", records, "every_rate", every_rate(list, runs, both) }
end

return arms
