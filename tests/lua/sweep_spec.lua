-- Sweeps as values: points, hashes, what makes a comparison unfair, what a wrong rule or a wrong list is answered with. No process
-- is started; the C library is a stand-in that writes files.
require "tests.lua.helper"
local lfs = require "lfs"

local function write(path, content)
  local f = assert(io.open(path, "wb"))
  f:write(content)
  f:close()
  return 0
end

package.loaded["ckaqad.ffi"] = {
  C = {}, version = "0.1.0", clock = os.clock, columns = function() return nil end, poll = function() end,
  call = { cq_file_write = function(path, content) return write(path, content) end },
}

local balance = require "ckaqad.balance"
local driver = require "ckaqad.sweep_driver"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local options = require "ckaqad.options"
local points = require "ckaqad.sweep_points"
local stats = require "ckaqad.stats"
local sweep_table = require "ckaqad.sweep_table"

local function names(settings)
  local list = {}
  for i, s in ipairs(settings) do list[i] = s.name end
  return list
end

-- The message of the error that `f(...)` must throw.
local function refused(status, f, ...)
  local ok, e = pcall(f, ...)
  assert.is_false(ok)
  assert.is_true(errors.is(e), tostring(e))
  assert.equal(status, e.status)
  return e.message
end

local function wrong(finding, f, ...) assert.matches(finding, refused(errors.USAGE, f, ...), 1, true) end

describe("--sweep", function()
  it("takes lists and ranges, in any writing of the name", function()
    assert.same({ { name = "lr", values = { "1e-5", "3e-5" } }, { name = "seed", values = { "1", "2", "3" } } },
      points.parse { "lr=1e-5,3e-5", "seed=1..3" })
    assert.same({ { name = "top_k", values = { "16", "32" } } }, points.parse { "--top-k = 16 , 32 " })
    assert.same({ { name = "steps", values = { "-2", "-1" } } }, points.parse { "steps=-2..-1" })
    assert.same({ { name = "out", values = { "../a" } } }, points.parse { "out=../a" })
  end)

  it("takes values that hold a comma when ; separates", function()
    assert.same({ { name = "cka", values = { "3,7", "all" } } }, points.parse { "cka=3,7;all" })
  end)

  it("answers what is no list with what was wanted", function()
    wrong('got "lr", wanted KEY=A,B,C', points.parse, { "lr" })
    wrong('got "lr=", wanted KEY=A,B,C', points.parse, { "lr=" })
    wrong('got "=1,2", wanted KEY=A,B,C', points.parse, { "=1,2" })
    wrong("lr=1,,2 has an empty value", points.parse, { "lr=1,,2" })
    wrong("lr=1, has an empty value", points.parse, { "lr=1," })
    wrong("the range 3..1 is empty", points.parse, { "seed=3..1" })
    wrong("the range 1..900000 has 900000 values", points.parse, { "seed=1..900000" })
    wrong("lr is named twice", points.parse, { "lr=1,2", "lr=3" })
    wrong("top_k is named twice", points.parse, { "top-k=1,2", "top_k=3" })
  end)
end)

describe("a sweep's description", function()
  it("expands a grid, the last option fastest, in an order that does not depend on the table", function()
    local settings, axes, seeds = points.expand({ grid = { lr = { 1e-5, 3e-5 }, cka = { "all", "none" } }, seeds = 2 })
    assert.same({ "cka=all lr=1e-05", "cka=all lr=3e-05", "cka=none lr=1e-05", "cka=none lr=3e-05" }, names(settings))
    assert.same({ "cka", "lr" }, { axes[1].name, axes[2].name })
    assert.same({ 1, 2 }, seeds)
    assert.same({ cka = "none", lr = 1e-5 }, settings[3].set)
    assert.same({ "cka", "lr" }, settings[3].keys)
  end)

  it("keeps the order of --sweep, and takes seeds out of the settings", function()
    local settings, axes, seeds = points.expand { grid = points.parse { "lr=1e-5,3e-5", "seed=1..3", "cka=all,none" } }
    assert.same({ "lr=1e-5 cka=all", "lr=1e-5 cka=none", "lr=3e-5 cka=all", "lr=3e-5 cka=none" }, names(settings))
    assert.equal(2, #axes)
    assert.same({ 1, 2, 3 }, seeds)
    settings, axes, seeds = points.expand { grid = points.parse { "seed=4,2" } }
    assert.same({ "base" }, names(settings))
    assert.same({}, axes)
    assert.same({ 4, 2 }, seeds)
  end)

  it("walks paired lists together", function()
    local settings = points.expand { paired = { lr = { 1, 2, 3 }, steps = { 30, 20, 10 } } }
    assert.same({ "lr=1 steps=30", "lr=2 steps=20", "lr=3 steps=10" }, names(settings))
    wrong("paired.lr has 1 values and paired.steps has 2", points.expand, { paired = { lr = { 1 }, steps = { 1, 2 } } })
  end)

  it("takes a list of settings with names", function()
    local settings, axes = points.expand { list = { { name = "plain", layer = "none" }, { layer = "mse", lr = 0.5 } } }
    assert.same({ "plain", "layer=mse lr=0.5" }, names(settings))
    assert.same({ layer = "none" }, settings[1].set)
    assert.same({ { name = "layer", values = { "none", "mse" } }, { name = "lr", values = { 0.5 } } }, axes)
  end)

  it("draws random settings, the same for the same seed, inside their bounds", function()
    local given = { count = 40, seed = 7, space = { lr = { min = 1e-5, max = 1e-3, log = true }, n = { min = 2, max = 5, integer = true },
      cka = { "all", "none" } } }
    local a, axes = points.expand { random = given }
    local b = points.expand { random = given }
    assert.same(a, b)
    assert.same({ "cka", "lr", "n" }, { axes[1].name, axes[2].name, axes[3].name })
    local low, seen = 0, {}
    for _, s in ipairs(a) do
      assert.is_true(s.set.lr >= 1e-5 and s.set.lr <= 1e-3)
      assert.is_true(s.set.n == math.floor(s.set.n) and s.set.n >= 2 and s.set.n <= 5)
      assert.equal(tonumber(points.show(s.set.lr)), s.set.lr) -- what is printed is what runs
      low = low + (s.set.lr < 1e-4 and 1 or 0)
      seen[s.set.cka] = true
    end
    assert.is_true(low > 8 and low < 32, low .. " of 40 below the middle of the logarithm")
    assert.same({ all = true, none = true }, seen)
    given.seed = 8
    assert.is_false(points.expand({ random = given })[1].set.lr == a[1].set.lr)
  end)

  it("counts seeds on from the recipe's, or takes a list", function()
    local grid = { lr = { 1, 2 } }
    assert.same({ 1, 2, 3 }, select(3, points.expand { grid = grid, seeds = 3 }))
    assert.same({ 5, 6 }, select(3, points.expand({ grid = grid, seeds = 2 }, 5)))
    assert.same({ 7, 9 }, select(3, points.expand { grid = grid, seeds = { 7, 9 } }))
    assert.is_nil((select(3, points.expand { grid = grid })))
    wrong("seeds is 1.5, wanted a whole number", points.expand, { grid = grid, seeds = 1.5 })
    wrong("seed x: wanted a whole number", points.expand, { grid = grid, seeds = { "x" } })
  end)

  it("is refused with what is wrong in it", function()
    for finding, given in pairs {
      ["got none, wanted exactly one of grid, random, paired, list"] = { seeds = 3 },
      ["got 2 of them, wanted exactly one"] = { grid = { lr = { 1 } }, list = { {} } },
      ["got grid as a string"] = { grid = "lr" },
      ["grid is empty"] = { grid = {} },
      ["grid.lr: wanted a list of values"] = { grid = { lr = 3 } },
      ["grid.cka: wanted a list of values"] = { grid = { cka = {} } },
      ["grid.lr: got a table, wanted a number"] = { grid = { lr = { 1, {} } } },
      ["grid.lr: got a hole"] = { grid = { lr = { 1, nil, 3 } } },
      ["list is empty"] = { list = {} },
      ["list[2]: wanted { name"] = { list = { { lr = 1 }, "lr" } },
      ["list[1].lr: got a function"] = { list = { { lr = print } } },
      ["random.space is missing"] = { random = { count = 3 } },
      ["random.count is 0"] = { random = { count = 0, space = { lr = { 1 } } } },
      ["wanted min <= max and min > 0 for log"] = { random = { space = { lr = { min = 0, max = 1, log = true } } } },
      ["the grid has 1000000 points, wanted at most 100000"] = { grid = points.parse { "a=1..1000", "b=1..1000" } },
    } do
      wrong(finding, points.expand, given)
    end
  end)
end)

describe("a point", function()
  local function canonical(values) return points.canonical(values, options.passing, { "recipe x.lua" }) end

  it("is the same whatever the order of its options, and another with another value", function()
    local a, b = {}, {}
    for i = 1, 20 do a["option" .. i] = i end
    for i = 20, 1, -1 do b["option" .. i] = i end
    assert.equal(canonical(a), canonical(b))
    b.option7 = 7 + 1e-15
    assert.is_false(canonical(a) == canonical(b))
    b.option7 = "7" -- a text is no number
    assert.is_false(canonical(a) == canonical(b))
  end)

  it("is not another one by how it is shown, kept and stopped", function()
    local plain = { lr = 1e-4, seed = 1 }
    for key, value in pairs { threads = 2, out = "x", every = 3, save = 5, keep = 9, max_time = 60, stop_at = 4, tensorboard = false,
      memory = 2 ^ 30, eval_every = 5, fresh = true, resume = true, dry_run = true } do
      assert.equal(canonical(plain), canonical { lr = 1e-4, seed = 1, [key] = value }, key)
    end
    for key, value in pairs { seed = 2, lr = 2e-4, kernels = "ref", compute = "bf16", template = "nano3" } do
      assert.is_false(canonical(plain) == canonical { lr = 1e-4, seed = 1, [key] = value }, key)
    end
    assert.is_nil(canonical({ lr = 1 }):find "jobs")
    assert.is_false(points.canonical(plain, {}, { "rule a" }) == points.canonical(plain, {}, { "rule b" }))
  end)

  it("runs once, under the name it had first", function()
    local list, dropped = points.unique { { hash = "a", name = "1" }, { hash = "b", name = "2" }, { hash = "a", name = "3" } }
    assert.same({ "1", "2" }, names(list))
    assert.equal(1, dropped)
  end)

  it("is typed with every bit of its numbers", function()
    for _, value in ipairs { 0.1, 1 / 3, 3e-5, 1e300, -0.25, 2 ^ 52, 5 } do assert.equal(value, tonumber(points.typed(value))) end
    assert.equal("100000", points.typed(1e5))
    assert.equal("true", points.typed(true))
    assert.equal("none", points.show "")
  end)
end)

describe("the guard against confounded comparisons", function()
  local function run(more, facts)
    local o = { lr = 1e-4, cka = "all", seed = 1, threads = 1, out = "a" }
    for key, value in pairs(more) do o[key] = value end
    local r = { options = o, version = "0.1.0", device = { kernels = "cpu", instructions = "avx2" },
      model = { sha256 = { ["model.safetensors"] = "aa" } } }
    for key, value in pairs(facts or {}) do r[key] = value end
    return r
  end

  it("lets the named factor, the seed and how a run is shown differ", function()
    assert.same({}, sweep_table.compare({ run {}, run { lr = 3e-4, seed = 2, threads = 2, out = "b" } }, { "lr" }))
  end)

  it("names what else differs: options, program, kernels, model files", function()
    assert.same({ { key = "cka", values = { "all", "none" } } },
      sweep_table.compare({ run {}, run { lr = 3e-4, cka = "none" } }, { "lr" }))
    assert.same({ { key = "extra", values = { "absent", "1" } } }, sweep_table.compare({ run {}, run { extra = 1 } }, { "lr" }))
    local other = { version = "0.2.0", device = { kernels = "cpu", instructions = "avx512" },
      model = { sha256 = { ["model.safetensors"] = "bb" } } }
    local list = sweep_table.compare({ run {}, run({}, other) }, {})
    assert.same({ "instructions", "model files", "program version" }, { list[1].key, list[2].key, list[3].key })
    list = sweep_table.compare({ run {}, run({ model = "b" }, { model = other.model }) }, { "model" })
    assert.same({}, list)
  end)

  describe("in the table of a sweep", function()
    local root
    before_each(function()
      root = os.tmpname()
      os.remove(root)
      lfs.mkdir(root)
      lfs.mkdir(root .. "/points")
    end)
    after_each(function() os.execute("rm -rf '" .. root .. "'") end)

    -- A sweep of `list` = { { name, options, kls by seed, more facts } } as its folder holds it; gives what make() gives.
    local function make(list, axes, more)
      local plan = { recipe = "recipes/x.lua", path = root, points = {}, axes = axes or { { name = "lr", values = {} } } }
      local d = { failed = {}, dropped = {}, folder = function(_, p) return root .. "/points/" .. p.hash end }
      for i, s in ipairs(list) do
        for seed, kl in ipairs(s.kl) do
          local r, hash = run(s.options, s.facts), ("%d%d"):format(i, seed)
          r.options.seed = seed
          plan.points[#plan.points + 1] = { hash = hash, name = s.name, options = s.options, keys = {}, seed = seed, resolved = r.options }
          if kl then
            lfs.mkdir(root .. "/points/" .. hash)
            write(("%s/points/%s/run.json"):format(root, hash), json.encode(r))
            write(("%s/points/%s/summary.json"):format(root, hash), json.encode {
              before = { kl = 0.02, perplexity = 3, top1 = 0.9, cka = 0.98, cka_min = 0.9, cka_min_block = 0, cka_blocks = { 1 } },
              after = { kl = kl, perplexity = 2, top1 = 0.95, cka = 0.99, cka_min = 0.9, cka_min_block = 0, cka_blocks = { 1 } } })
          else
            d.failed[hash] = "it broke"
          end
        end
      end
      for _, p in ipairs(more or {}) do
        p.options, p.keys, p.resolved = {}, {}, {}
        plan.points[#plan.points + 1] = p
      end
      local saved = { points = {}, axes = plan.axes, recipe = "x.lua" }
      for i, p in ipairs(plan.points) do saved.points[i] = { hash = p.hash, name = p.name, options = p.options, seed = p.seed } end
      write(root .. "/sweep.json", json.encode(saved))
      return sweep_table.make(plan, d), d
    end

    it("compares in pairs of a seed, with recovery between PTQ and the teacher, and flags nothing", function()
      local t = make { { name = "lr=1", options = { lr = 1 }, kl = { 0.010, 0.012, 0.014 } },
        { name = "lr=2", options = { lr = 2 }, kl = { 0.009, 0.011, 0.013 } } }
      local rows = t.table.rows
      assert.is_false(t.confounded)
      assert.equal(6, t.finished)
      assert.same({ "PTQ", "lr=1", "lr=2" }, { rows[1].setting, rows[2].setting, rows[3].setting })
      assert.near(0.012, rows[2].kl.mean, 1e-12)
      assert.near(0.002, rows[2].kl.sd, 1e-12)
      assert.near(40, rows[2].recovery.mean, 1e-9)
      assert.equal("-0.00100 [-0.00100, -0.00100]", rows[3].difference)
      assert.is_true(rows[3].kl.mark)
      assert.matches("fewer than 6 pairs", t.table:text(), 1, true)
      -- PTQ is where both start from, no setting: nothing about it is compared or flagged
      assert.is_true(rows[1].reference)
      assert.equal(0.02, rows[1].kl.value)
      assert.is_nil(rows[1].difference)
      assert.is_nil(rows[1].changed)
      assert.is_nil(t.table:text():find("CONFOUNDED", 1, true))
      assert.is_nil(t.table:text():find("(!)", 1, true))
      for _, name in ipairs { "table.md", "table.csv", "table.tex", "report.html" } do
        assert.is_true((lfs.attributes(root .. "/" .. name, "size") or 0) > 100, name)
      end
    end)

    it("says when a difference has several causes", function()
      local t = make({ { name = "plain", options = { lr = 1 }, kl = { 0.010, 0.012 } },
        { name = "both", options = { lr = 2, cka = "none" }, kl = { 0.009, 0.011 } },
        { name = "one", options = { lr = 2 }, kl = { 0.010, 0.011 } } }, { { name = "lr", values = {} }, { name = "cka", values = {} } })
      assert.is_false(t.confounded)
      assert.equal("cka, lr (!)", t.table.rows[3].changed)
      assert.equal("lr", t.table.rows[4].changed)
      assert.matches("the difference has no single cause", t.table:text(), 1, true)
    end)

    it("marks nothing as best while runs differ in what nobody named", function()
      local t = make { { name = "lr=1", options = { lr = 1 }, kl = { 0.010, 0.012 } },
        { name = "lr=2", options = { lr = 2 }, kl = { 0.009, 0.011 }, facts = { version = "0.2.0" } } }
      assert.is_true(t.confounded)
      local said = t.table:text()
      assert.matches("CONFOUNDED: the runs differ in program version too (0.1.0 / 0.2.0)", said, 1, true)
      assert.is_nil(said:find("best: ", 1, true))
      assert.is_nil(t.table.rows[3].kl.mark)
    end)

    it("takes no result from a damaged file", function()
      local printed = stub(_G, "print")
      local list = { { name = "lr=1", options = { lr = 1 }, kl = { 0.010, 0.012 } },
        { name = "lr=2", options = { lr = 2 }, kl = { 0.009 } } }
      lfs.mkdir(root .. "/points/13")
      write(root .. "/points/13/summary.json", "{")
      lfs.mkdir(root .. "/points/22")
      write(root .. "/points/22/summary.json", "{}")
      write(root .. "/points/22/run.json", "[")
      local t, d = make(list, nil, { { hash = "13", name = "lr=1", seed = 3 }, { hash = "22", name = "lr=2", seed = 2 } })
      printed:revert()
      assert.equal(3, t.finished)
      assert.matches("13/summary.json: line 1: broken JSON", d.failed["13"], 1, true)
      assert.matches("22/run.json: line 1: broken JSON", d.failed["22"], 1, true)
      assert.equal("lr=2 (1 failed)", t.table.rows[3].setting)
      assert.is_nil(t.table:text():find("CONFOUNDED", 1, true))
    end)

    it("says what failed, and gives one seed no interval", function()
      local t = make { { name = "lr=1", options = { lr = 1 }, kl = { false, 0.012 } },
        { name = "lr=2", options = { lr = 2 }, kl = { 0.009, 0.011 } } }
      assert.equal("lr=1 (1 failed)", t.table.rows[2].setting)
      assert.equal("-0.00100", t.table.rows[3].difference)
      assert.matches("one seed in common", t.table:text(), 1, true)
      assert.matches("3 of 4 points", t.table:text(), 1, true)
    end)
  end)
end)

describe("statistics", function()
  it("of known numbers", function()
    local s = stats.summary { 0.00535, 0.00602, 0.00561 }
    assert.near(0.00566, s.mean, 1e-15)
    assert.near(0.00033778691508110, s.sd, 1e-15)
    -- of 3 pairs one resample in 27 takes the least three times: more than 2.5 %, so the interval ends at the least and the largest
    local p = stats.paired({ 2, 4, 6 }, { 1, 2, 3 })
    assert.same({ 3, 2, 1, 3 }, { p.n, p.difference, p.low, p.high })
    assert.is_true(p.clear and p.few)
    p = stats.paired({ 1, 1 }, { 0, 2 })
    assert.same({ 0, -1, 1 }, { p.difference, p.low, p.high })
    assert.is_false(p.clear)
  end)

  it("draw the same bootstrap everywhere, whatever the order of the seeds", function()
    local a, b, c, d = {}, {}, {}, {}
    local values = { 0.31, -0.12, 0.44, 0.05, 0.27, 0.18, -0.02, 0.36 }
    for seed = 1, 8 do a[seed], b[seed] = 1 + values[seed], 1 end
    for seed = 8, 1, -1 do c[seed], d[seed] = 1 + values[seed], 1 end
    local p = stats.paired(a, b)
    assert.same(p, stats.paired(c, d))
    assert.near(0.18375, p.difference, 1e-12)
    assert.near(0.04875, p.low, 1e-12)
    assert.near(0.3075, p.high, 1e-12)
    assert.is_true(p.clear)
    assert.is_false(p.few)
  end)
end)

describe("successive halving", function()
  it("keeps the better share, the first of equals, and never what has no score", function()
    local function kept(keys, scores, keep)
      local out, set = {}, points.promote(keys, scores, keep)
      for _, key in ipairs(keys) do out[#out + 1] = set[key] and key or nil end
      return table.concat(out, " ")
    end
    local keys = { "a", "b", "c", "d", "e" }
    assert.equal("b d", kept(keys, { a = 5, b = 1, c = 4, d = 2, e = 3 }, 0.5))
    assert.equal("a b", kept(keys, { a = 1, b = 1, c = 1, d = 1, e = 1 }, 0.5))
    assert.equal("c", kept(keys, { a = 0 / 0, c = 9 }, 0.2))
    assert.equal("a", kept({ "a" }, {}, 0.1))
  end)

  it("scores a setting by its evaluation at the rung, else by its last steps, over all seeds", function()
    local root = os.tmpname()
    os.remove(root)
    lfs.mkdir(root)
    lfs.mkdir(root .. "/points")
    local function point(hash, files)
      lfs.mkdir(root .. "/points/" .. hash)
      for name, content in pairs(files) do write(("%s/points/%s/%s.jsonl"):format(root, hash, name), content) end
      return { hash = hash, name = hash }
    end
    local function metrics(list)
      local lines = {}
      for i, kl in ipairs(list) do lines[i] = ('{"step":%d,"kl":%s}\n'):format(i, kl) end
      return table.concat(lines)
    end
    local d = driver.open { path = root, points = {}, jobs = 1 }
    local a = point("a", { metrics = metrics { 9, 9, 1, 2, 3, 4, 5, 100 } })
    local b = point("b", { metrics = metrics { 9, 9, 9, 9, 9, 9, 9 },
      evals = '{"step":0,"kl":8}\n{"step":7,"kl":0.5}\n{"step":9,"kl":7}\n' })
    assert.equal(3, d:score({ a }, 7)) -- steps 3 to 7
    assert.equal(0.5, d:score({ b }, 7))
    assert.equal(1.75, d:score({ a, b }, 7))
    assert.is_nil(d:score({ a, point("c", {}) }, 7))
    os.execute("rm -rf '" .. root .. "'")
  end)
end)

describe("a balancing rule of a recipe", function()
  local pass = { step = 4, kl = 0.5, cka = { [0] = 0.9, [3] = 0.8 } }

  -- What a wrong rule is answered with; it must begin with the line that the rule stands in.
  local function answer(status, rule)
    balance.define("mine", rule)
    local message = refused(status, balance.get "mine", pass)
    local at = ("tests/lua/sweep_spec.lua:%d: balance rule mine, step 4: "):format(debug.getinfo(rule, "S").linedefined)
    assert.equal(at, message:sub(1, #at):gsub("^%./", ""))
    return message:sub(#at + 1)
  end

  it("is answered with its line, its name and the step", function()
    local usage, numeric = errors.USAGE, errors.NUMERIC
    assert.matches("returned nil, wanted { kl = number", answer(usage, function() end), 1, true)
    assert.matches("returned 3, wanted { kl = number", answer(usage, function() return 3 end), 1, true)
    local nan = answer(numeric, function() return { kl = 1, cka = 0 / 0 } end):gsub("%-nan", "nan")
    assert.matches("cka is nan, wanted a finite number", nan, 1, true)
    assert.matches("kl is inf, wanted a finite number", answer(numeric, function() return { kl = 1 / 0 } end), 1, true)
    assert.matches('cka is "1"', answer(usage, function() return { kl = 1, cka = "1" } end), 1, true)
    assert.matches("cka has 1 weights for 2 blocks, block 3 has none", answer(usage, function() return { cka = { [0] = 1 } } end),
      1, true)
    assert.matches("cka has a weight for block 1, which CKA does not look at",
      answer(usage, function() return { cka = { [0] = 1, [1] = 1, [3] = 1 } } end), 1, true)
    assert.matches("cka[3] is inf", answer(numeric, function() return { cka = { [0] = 1, [3] = 1 / 0 } } end), 1, true)
    assert.matches("returned a weight ckaa, wanted kl and cka", answer(usage, function() return { kl = 1, ckaa = 1 } end), 1, true)
    assert.matches("attempt to index", answer(usage, function(p) return { kl = p.nothing.here } end), 1, true)
  end)

  it("passes what it returns when that is right", function()
    balance.define("mine", function() return { kl = 1, cka = { [0] = 1, [3] = 2 } } end)
    assert.same({ kl = 1, cka = { [0] = 1, [3] = 2 } }, balance.get "mine"(pass))
    wrong("balance.define: ratio is a rule of ckaqad", balance.define, "ratio", print)
    wrong("option --balance", balance.get, "minne")
  end)

  it("is known by its source: another rule is another point", function()
    balance.define("mine", function() return { kl = 1, cka = 1 } end)
    assert.equal('    balance.define("mine", function() return { kl = 1, cka = 1 } end)', balance.source "mine")
    assert.is_nil(balance.source "ratio")
  end)
end)
