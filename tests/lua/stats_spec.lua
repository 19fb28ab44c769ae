require "tests.lua.helper"
local stats = require "ckaqad.stats"
local errors = require "ckaqad.errors"

describe("a summary", function()
  it("has the sample's deviation, and none of one number", function()
    local s = stats.summary { 2, 4, 4, 4, 5, 5, 7, 9 }
    assert.equal(8, s.n)
    assert.equal(5, s.mean)
    assert.near(2.138089935299395, s.sd, 1e-15)
    assert.equal(4.5, s.median)
    assert.equal(2, s.min)
    assert.equal(9, s.max)
    assert.is_nil(stats.summary({ 3 }).sd)
    assert.same({ n = 0, missing = 0 }, stats.summary {})
    local same = stats.summary { 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1 }
    assert.equal(0.1, same.mean)
    assert.equal(0, same.sd)
  end)

  it("counts what is no number instead of hiding it", function()
    local s = stats.summary { 1, 0 / 0, 3, 1 / 0 }
    assert.equal(2, s.n)
    assert.equal(2, s.missing)
    assert.equal(2, s.mean)
  end)

  it("does not depend on the order of its numbers", function()
    local a, b = stats.summary { 0.1, 0.2, 0.3, 1e16, -1e16 }, stats.summary { -1e16, 0.3, 1e16, 0.1, 0.2 }
    assert.equal(a.mean, b.mean)
    assert.equal(a.sd, b.sd)
  end)
end)

describe("the generator", function()
  it("gives the same numbers everywhere, others for another seed", function()
    local a, b, c = stats.generator(1), stats.generator(1), stats.generator(2)
    local same = 0
    for _ = 1, 100 do
      local x = a()
      assert.equal(x, b())
      if x == c() then same = same + 1 end
    end
    assert.equal(0, same)
  end)

  it("starts like L'Ecuyer's where the seeds are his", function()
    local draw = stats.generator(0) -- 12345 six times, sixteen numbers skipped
    local m1, m2 = 4294967087, 4294944443
    local s = { 12345, 12345, 12345, 12345, 12345, 12345 }
    local function reference()
      local p1 = (1403580 * s[2] - 810728 * s[1]) % m1
      s[1], s[2], s[3] = s[2], s[3], p1
      local p2 = (527612 * s[6] - 1370589 * s[4]) % m2
      s[4], s[5], s[6] = s[5], s[6], p2
      return ((p1 - p2) % m1) / (m1 + 1)
    end
    assert.near(0.127011122046577, reference(), 1e-14)
    for _ = 2, 16 do reference() end
    for _ = 1, 1000 do assert.equal(reference(), draw()) end
  end)

  it("is even over (0, 1)", function()
    local draw, bins, n = stats.generator(7), {}, 200000
    for _ = 1, n do
      local x = draw()
      assert.is_true(x > 0 and x < 1)
      local k = math.floor(x * 10)
      bins[k] = (bins[k] or 0) + 1
    end
    for k = 0, 9 do assert.near(n / 10, bins[k], 5 * math.sqrt(n * 0.09)) end
  end)
end)

describe("a paired comparison", function()
  it("sees a small shift that two means with their deviations would not show", function()
    local a, b = {}, {}
    for seed = 1, 8 do
      a[seed] = seed -- seeds differ by far more than the settings
      b[seed] = seed + 0.1 + 0.01 * (seed % 3)
    end
    local p = stats.paired(a, b)
    assert.equal(8, p.n)
    assert.is_true(p.clear)
    assert.is_false(p.few)
    assert.is_true(p.low < p.difference and p.difference < p.high and p.high < 0)
  end)

  it("calls no difference that goes both ways clear", function()
    local p = stats.paired({ 1, 2, 3, 4, 5, 6, 7 }, { 1.1, 1.9, 3.1, 3.9, 5.1, 5.9, 7 })
    assert.is_false(p.clear)
    assert.is_true(p.low < 0 and p.high > 0)
  end)

  it("is never clear with one pair, and says when pairs are few", function()
    assert.same({ n = 1, difference = -1, clear = false, few = true }, stats.paired({ 1 }, { 2 }))
    assert.same({ n = 0, clear = false, few = true }, stats.paired({ a = 1 }, { b = 2 }))
    assert.is_true(stats.paired({ 1, 2, 3 }, { 2, 3.1, 4 }).few)
  end)

  it("pairs by key and leaves out what one side lacks", function()
    local p = stats.paired({ [1] = 5, [2] = 6, [4] = 0 / 0 }, { [2] = 4, [3] = 100, [4] = 1 })
    assert.equal(1, p.n)
    assert.equal(2, p.difference)
  end)

  it("covers the true difference about as often as it says", function()
    local draw, hits, trials = stats.generator(3), 0, 300
    local function normal() return math.sqrt(-2 * math.log(draw())) * math.cos(2 * math.pi * draw()) end
    for t = 1, trials do
      local a, b = {}, {}
      for i = 1, 20 do a[i], b[i] = normal() + 0.5, 0 end
      local p = stats.paired(a, b, { seed = t, resamples = 500 })
      if p.low <= 0.5 and p.high >= 0.5 then hits = hits + 1 end
    end
    assert.is_true(hits / trials > 0.87 and hits / trials < 0.98, "covered " .. hits .. " of " .. trials)
  end)

  it("gives the same interval for the same seed and refuses nonsense", function()
    local a, b = { 1, 2, 4, 8 }, { 1.5, 2, 3, 9 }
    assert.same(stats.paired(a, b, { seed = 5 }), stats.paired(a, b, { seed = 5 }))
    for _, bad in ipairs { { level = 1 }, { level = 0 }, { resamples = 0 }, { sed = 1 } } do
      local ok, e = pcall(stats.paired, a, b, bad)
      assert.is_false(ok)
      assert.equal(errors.USAGE, e.status)
    end
  end)
end)

describe("recovery", function()
  it("is 0 for PTQ, 100 for the teacher, negative when it got worse, unknown when nothing was lost", function()
    assert.equal(0, stats.recovery(0.02, 0.02, 0))
    assert.equal(100, stats.recovery(0.02, 0, 0))
    assert.equal(-50, stats.recovery(2, 3, 0))
    assert.equal(50, stats.recovery(0.8, 0.9, 1)) -- a measure that grows
    assert.is_nil(stats.recovery(1, 1, 1))
    assert.is_nil(stats.recovery(nil, 1, 0))
    assert.is_nil(stats.recovery(0 / 0, 1, 0))
  end)
end)

describe("an interval of a mean", function()
  it("holds it, and narrows with more numbers", function()
    local few, many = {}, {}
    for i = 1, 20 do few[i] = i % 2 end
    for i = 1, 2000 do many[i] = i % 2 end
    local a, b = stats.interval(few, { resamples = 2000 }), stats.interval(many, { resamples = 2000 })
    assert.same({ 20, 0.5, 2000, 0.5 }, { a.n, a.mean, b.n, b.mean })
    assert.is_true(a.low < b.low and b.low < 0.5 and 0.5 < b.high and b.high < a.high)
    assert.near(1.96 * 0.5 / math.sqrt(2000), b.high - 0.5, 0.004)
  end)

  it("of one number is no interval, of none nothing", function()
    assert.same({ n = 1, mean = 3 }, stats.interval { 3 })
    assert.same({ n = 0 }, stats.interval {})
  end)
end)
