require "tests.lua.helper"
local select_ = require "ckaqad.select"
local schedule = require "ckaqad.schedule"
local balance = require "ckaqad.balance"
local loss = require "ckaqad.loss"
local preset = require "ckaqad.preset"

describe("block selectors", function()
  local pattern = "MEM*-MME"

  it("pick by kind, place and number", function()
    assert.same({ 0, 1, 2, 3, 4, 5, 6, 7 }, select_.blocks("all", pattern))
    assert.same({}, select_.blocks("none", pattern))
    assert.same({ 0, 2, 5, 6 }, select_.blocks("mamba", pattern))
    assert.same({ 3 }, select_.blocks("attention", pattern))
    assert.same({ 1, 7 }, select_.blocks("moe", pattern))
    assert.same({ 4 }, select_.blocks("mlp", pattern))
    assert.same({ 6, 7 }, select_.blocks("last:2", pattern))
    assert.same({ 0, 1 }, select_.blocks("first:2", pattern))
    assert.same({ 3, 7 }, select_.blocks("every:4", pattern))
    assert.same({ 3, 7 }, select_.blocks("3,7", pattern))
    assert.same({ 1, 3, 7 }, select_.blocks("moe, 3", pattern))
    assert.same({ 0, 1 }, select_.blocks("last:9", "QQ"))
    assert.same({ 0, 1 }, select_.blocks("mlp", "QQ"))
  end)

  it("name the valid ones when there is no such selector", function()
    for selector, finding in pairs { mambo = "nearest is mamba", ["last:0"] = "at least 1", ["8"] = "0 to 7", ["every:9"] = "8 blocks",
      [""] = "empty", ["last:"] = "unknown", ["-1"] = "unknown" } do
      local ok, e = pcall(select_.blocks, selector, pattern)
      assert.is_false(ok, selector)
      assert.matches(finding, e.message, 1, true)
    end
    local ok, e = pcall(select_.blocks, "moe", "QQ")
    assert.is_false(ok)
    assert.matches("QQ has no such block", e.message, 1, true)
  end)
end)

describe("schedules", function()
  it("warm up in a straight line and reach the peak", function()
    local rate = schedule.constant { peak = 2, warmup = 4 }
    assert.same({ 0.5, 1, 1.5, 2, 2, 2 }, { rate(1), rate(2), rate(3), rate(4), rate(5), rate(1000) })
  end)

  it("take a warm-up below one as a fraction", function()
    local rate = schedule.cosine { peak = 1, warmup = 0.1, steps = 60 }
    assert.near(1 / 6, rate(1), 1e-12)
    assert.equal(1, rate(6))
    assert.equal(1, rate(7))
    assert.is_true(rate(8) < 1)
    assert.is_true(rate(60) > 0 and rate(60) < 0.01)
  end)

  it("end at the floor", function()
    assert.near(0.1, schedule.cosine { peak = 1, steps = 10, floor = 0.1 }(11), 1e-12)
    assert.near(0.1, schedule.linear { peak = 1, steps = 10, floor = 0.1 }(11), 1e-12)
    assert.near(0.55, schedule.linear { peak = 1, steps = 10, floor = 0.1 }(6), 1e-12)
  end)

  it("refuse unknown names and a missing peak", function()
    assert.has_error(function() return schedule.cosin end)
    assert.has_error(function() schedule.cosine { steps = 3 } end)
    assert.has_error(function() schedule.cosine { peak = 1, wamrup = 3 } end)
  end)
end)

describe("balances", function()
  local pass = { step = 1, kl = 0.3, cka = { [0] = 0.99, [2] = 0.97 } }

  it("ratio gives both terms the same value", function()
    local w = balance.ratio()(pass)
    assert.equal(1, w.kl)
    assert.near(0.3, w.cka * 0.02, 1e-12)
  end)

  it("ratio is capped, and defined when the models coincide", function()
    assert.equal(5, balance.ratio { max = 5 }(pass).cka)
    assert.equal(100, balance.ratio()({ step = 1, kl = 1, cka = { [0] = 1 } }).cka)
    assert.equal(0, balance.ratio()({ step = 1, kl = 0, cka = { [0] = 1 } }).cka)
  end)

  it("gradnorm makes both terms pull equally and measures every few steps", function()
    local calls = 0
    local rule = balance.gradnorm { every = 3 }
    local function at(step)
      return rule { step = step, kl = 1, cka = { [0] = 0.9, [1] = 0.9 }, norms = function()
        calls = calls + 1
        return { kl = { [0] = 3, [1] = 4 }, cka = { [0] = 0.6, [1] = 0.8 } }
      end }
    end
    -- w * |d mean(1 - cka)| = w * 1 / 2 = 5 = |dKL|
    assert.near(10, at(1).cka, 1e-12)
    at(2)
    at(3)
    assert.equal(1, calls)
    at(4)
    assert.equal(2, calls)
  end)

  it("fixed gives what it was told", function()
    assert.same({ kl = 1, cka = 0.5 }, balance.fixed { cka = 0.5 }(pass))
  end)
end)

describe("terms", function()
  it("split into one loss on logits and one between blocks", function()
    local kl, cka = loss.kl(), loss.cka { blocks = "last:2" }
    local logits, layers = loss.split { kl, cka }
    assert.equal(kl, logits)
    assert.equal(cka, layers)
    assert.has_error(function() loss.split { kl, loss.ce() } end)
    assert.has_error(function() loss.split { cka, loss.mse() } end)
    assert.has_error(function() loss.split {} end)
    assert.has_error(function() loss.kl { tail = "buckets" } end)
  end)
end)

describe("presets", function()
  local function opt(values, given) return setmetatable(values, { __index = { given = given or {} } }) end

  it("go by size and leave what was typed", function()
    local o = opt({ preset = "auto", seq = 32768, lr = 5e-6, steps = 400 }, { lr = true })
    assert.matches("^preset tiny %(3.28 M parameters", preset.apply(o, 3.28e6))
    assert.same({ "tiny", 256, 5e-6, 60 }, { o.preset, o.seq, o.lr, o.steps })
    o = opt { preset = "auto", seq = 1 }
    assert.matches("^preset full", preset.apply(o, 4e9))
    assert.equal(32768, o.seq)
    assert.is_nil(rawget(o, "batch"))
  end)

  it("paper changes the loss and keeps the size's settings", function()
    local o = opt { preset = "paper", seq = 32768, tail = "bucket", estimator = "unbiased" }
    preset.apply(o, 1e6)
    assert.same({ 256, "renormalized", "biased", "paper" }, { o.seq, o.tail, o.estimator, o.preset })
  end)

  it("are named when unknown", function()
    assert.has_error(function() preset.apply(opt { preset = "tinny" }, 1) end)
  end)
end)
