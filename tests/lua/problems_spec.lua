require "tests.lua.helper"
local stats = require "ckaqad.stats"
local problems = dofile "recipes/lab/problems.lua"

local function each(f)
  local draw = stats.generator(5)
  for _, name in ipairs(problems.names) do
    for level = 1, problems.levels do
      for _ = 1, 50 do f(problems.make(name, level, "train", draw), draw) end
    end
  end
end

describe("a problem", function()
  it("is solved by its own written solution, and by no other text near it", function()
    local odd = {}
    each(function(item, draw)
      if not problems.check(item.prompt, item.answer) then odd[#odd + 1] = item.prompt .. item.answer end
      local at = 1 + math.floor(draw() * #item.answer)
      local zero = item.answer:sub(1, at - 1) .. "0" .. item.answer:sub(at + 1)
      local list = { item.answer .. ",", " " .. item.answer, item.answer:sub(1, -2), "", item.answer .. "1", item.prompt }
      if item.task == "sum" and zero ~= item.answer then list[7] = zero end
      for _, wrong in ipairs(list) do
        if problems.check(item.prompt, wrong) then odd[#odd + 1] = item.prompt .. wrong end
      end
    end)
    assert.same({}, odd)
  end)

  it("is checked step by step, whatever the way", function()
    local function check(prompt, right, wrong)
      for _, answer in ipairs(right) do assert.is_true(problems.check(prompt, answer), prompt .. answer) end
      for _, answer in ipairs(wrong) do assert.is_false(problems.check(prompt, answer), prompt .. answer) end
    end
    check("A706-343:", { "6-3-0=3,0-4-0=-4,7-3-1=3;363" },
      { "363", "6-3-0=3,0-4-0=-4,7-3-0=4;363", "6-3-0=3,0-4-0=6,7-3-1=3;363", "6-3-0=3,0-4-0=-4,7-3-1=3;364", ";363" })
    check("A99+1:", { "9+1+0=10,9+0+1=10;100" }, { "9+1+0=10,9+0+1=10;110", "9+1=10,9+0+1=10;100" })
    check("C4,9,3>23:", { "9*3=27,27-4=23", "3*9=27,27-4=23" },
      { "9*3=27,27-4=22", "9*3=26,27-4=23", "27-4=23", "9*3=27", "9+3=12,4+9=13" })
    check("C5,5,5>15:", { "5+5=10,10+5=15", "5+5=10,5+10=15" }, { "5+10=15", "5+5=10", "5+5=10,5+5=10,10+5=15", "5+5=10;10+5=15" })
    check("C2,3>6:", { "2*3=6", "3*2=6" }, { "2*3=6,", "2*3=06", "6", "2x3=6" })
    check("Dfa,bf,ga,gb;g>f:", { "gbf" }, { "gaf", "gf", "gb", "bf", "gbfa", "g", "" })
    check("Dab,bc,ca,bd;a>d:", { "abd" }, { "abcabd", "acbd" })
    check("L4127>7421:", { "s1247,r7421", "r7214,s1247,r7421" }, { "s1247", "s1247,r7412", "r7421", "x7421", "s1247r7421", "7421" })
    check("L312>23:", { "r213,l132,r231,l312,s123,l231,d23" }, { "d31,s13" })
    check("L12>1:", { "d1", "d1,d1" }, { "d1,d" })
    check("L199>200:", { "i200" }, { "i2000", "i210" })
  end)

  it("is nothing where the prompt is none of ours", function()
    for _, prompt in ipairs { "", "A1+1", "X1+1:", "1+1:", "how many?", "A1:", "C>3:", "Dab;a:", "L12:" } do
      assert.is_nil(problems.task(prompt))
      assert.is_false(problems.check(prompt, "1"))
    end
  end)

  it("has one canonical form for what changes nothing", function()
    assert.equal(problems.key "A12+345:", problems.key "A345+12:")
    assert.not_equal(problems.key "A12-5:", problems.key "A5-12:")
    assert.equal(problems.key "C4,9,3>23:", problems.key "C9,3,4>23:")
    assert.not_equal(problems.key "C4,9,3>23:", problems.key "C4,9,3>24:")
    assert.equal(problems.key "Dfa,bf;b>a:", problems.key "Dbf,fa;b>a:")
    assert.not_equal(problems.key "Dfa,bf;b>a:", problems.key "Dfa,bf;b>f:")
  end)
end)

describe("a set", function()
  local train = problems.set(problems.mixes.sft, "train", 6000, stats.generator(1))
  local rl, draw = {}, stats.generator(11)
  for i = 1, 2000 do rl[i] = problems.draw(problems.mixes.rl, "train", draw) end
  local validation = problems.set(problems.mixes.test, "validation", 2000, stats.generator(1))
  local test = problems.set(problems.mixes.test, "test", 2400, stats.generator(1))

  it("of one part shares no canonical prompt with another part", function()
    local owner = {}
    for name, set in pairs { train = train, validation = validation, test = test } do
      for _, item in ipairs(set) do
        local key = problems.key(item.prompt)
        if owner[key] and owner[key] ~= name then error(item.prompt) end
        owner[key] = name
      end
    end
    assert.is_nil(problems.overlap(train, test))
    assert.is_nil(problems.overlap(rl, validation))
    assert.is_nil(problems.overlap(rl, test))
    assert.is_nil(problems.overlap(validation, test))
  end)

  it("holds nothing twice", function()
    for _, set in ipairs { validation, test } do
      local seen = {}
      for _, item in ipairs(set) do
        local key = problems.key(item.prompt)
        if seen[key] then error(key) end
        seen[key] = true
      end
    end
    local seen = {}
    for _, item in ipairs(train) do
      if seen[item.prompt] then error(item.prompt) end
      seen[item.prompt] = true
    end
  end)

  it("has 600 test problems of every task or about, none of the easiest", function()
    local n = { sum = 0, game = 0, path = 0, list = 0 }
    for _, item in ipairs(test) do
      n[item.task] = n[item.task] + 1
      if item.level < 2 then error(item.prompt) end
    end
    for name, count in pairs(n) do assert.is_true(count > 500 and count < 750, name .. count) end
  end)

  it("is the same for one seed, another for another", function()
    local a = problems.set(problems.mixes.sft, "train", 100, stats.generator(1))
    local b = problems.set(problems.mixes.sft, "train", 100, stats.generator(2))
    local same = 0
    for i = 1, 100 do
      assert.equal(train[i].prompt, a[i].prompt)
      same = same + (a[i].prompt == b[i].prompt and 1 or 0)
    end
    assert.is_true(same < 20)
  end)

  it("says so when there are not that many different problems", function()
    local mix = { levels = { 1, 0, 0, 0 }, tasks = { sum = 0, game = 1, path = 0, list = 0 } }
    problems.levels = 1
    local ok, message = pcall(problems.set, mix, "test", 1000, stats.generator(1))
    problems.levels = 4
    assert.is_false(ok)
    assert.matches("only %d+ of 1000 problems of part test are different", message)
  end)

  it("that overlaps another is refused by name", function()
    local other = { { prompt = "C3,4,9>23:" } }
    local message = problems.overlap({ { prompt = "some text" }, { prompt = "C9,4,3>23:" } }, other)
    assert.equal("data: training has C9,4,3>23:, the same problem as the held-out C3,4,9>23:; wanted none in both", message)
    assert.matches("training has some text", problems.overlap({ { prompt = "some text" } }, { { prompt = "some text" } }))
  end)

  it("of text to read has no question of a held-out problem", function()
    local source = stats.generator(3)
    for _ = 1, 200 do
      local text = problems.facts(problems.mixes.sft, "train", source)
      assert.is_nil(text:match "[>:]")
    end
  end)
end)
