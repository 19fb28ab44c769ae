require "tests.lua.helper"
local benchmark = require "ckaqad.benchmark"

local function file(text)
  local path = os.tmpname()
  local f = assert(io.open(path, "wb"))
  f:write(text)
  f:close()
  return path
end
local function refuses(pattern, f, ...)
  local ok, why = pcall(f, ...)
  assert.is_false(ok)
  assert.truthy(tostring(type(why) == "table" and why.message or why):find(pattern), pattern .. " is not in " .. tostring(why.message))
end

describe("AIME", function()
  local items = benchmark.open("aime25", file [[
{"id": "i1", "problem": "6 * 7?", "answer": "042"}
{"id": "i2", "problem": "1000 - 1?", "answer": 999}
{"id": "i3", "problem": "0?", "answer": 0}
{"id": "i4", "problem": "70?", "answer": "70"}
{"id": "i5", "problem": "5?", "answer": "5"}
]])
  it("is scored by the integer in the last box", function()
    assert.equal(5, #items)
    for _, text in ipairs { "\\boxed{42}", "so \\boxed{7}, no: $\\boxed{ 042 }$.", "\\boxed {$42$}" } do
      assert.is_true(items[1].check(text), text)
    end
    for _, text in ipairs { "42", "\\boxed{42", "\\boxed{42} or \\boxed{43}", "\\boxed{x=42}", "\\boxed{42.5}", "" } do
      assert.is_false(items[1].check(text), text)
    end
    assert.is_true(items[2].check "\\boxed{999}")
    assert.is_true(items[3].check "\\boxed{000}")
  end)
  it("refuses what is no such file", function()
    refuses("line 2: no answer", benchmark.open, "aime25", file '{"problem": "a", "answer": 1}\n{"problem": "b"}')
    refuses("object 1 has the answer \"x\"", benchmark.open, "aime25", file '{"problem": "a", "answer": "x"}')
    refuses("two questions have the id a", benchmark.open, "aime25",
      file '{"id": "a", "problem": "a", "answer": 1}\n{"id": "a", "problem": "b", "answer": 1}')
    refuses("suite: aime is unknown, nearest is aime25", benchmark.open, "aime", "x")
  end)
end)

describe("GPQA", function()
  local csv = 'Record,Question,Incorrect Answer 1,Correct Answer,Incorrect Answer 2,Incorrect Answer 3\r\n' ..
    '1,"Which, of ""these""\nfour?",no,"yes, this",nope,never\r\n' ..
    '2,b?,w1,right,w2,w3\n3,c?,w1,right,w2,w3\n4,d?,w1,right,w2,w3\n5,e?,w1,right,w2,w3'
  it("shuffles options by seed and item, and is scored by letter", function()
    local path, seen = file(csv), {}
    local items = benchmark.open("gpqa", path, 3)
    assert.equal(5, #items)
    assert.truthy(items[1].question:find('Which, of "these"\nfour?', 1, true))
    for seed = 1, 20 do
      for i, item in ipairs(benchmark.open("gpqa", path, seed)) do
        assert.truthy(item.question:find(item.right .. ") " .. (i == 1 and "yes, this" or "right"), 1, true))
        seen[item.right] = (seen[item.right] or 0) + 1
        for letter in ("ABCD"):gmatch "." do
          for _, form in ipairs { "Answer: %s", "Answer: A? No.\n**Answer: %s**", "the answer: (%s).", "\\boxed{%s}" } do
            assert.equal(letter == item.right, item.check(form:format(letter)))
          end
        end
      end
    end
    for letter in ("ABCD"):gmatch "." do assert.is_true((seen[letter] or 0) > 10, letter) end
    for i, item in ipairs(benchmark.open("gpqa", path, 3)) do assert.equal(items[i].question, item.question) end
    assert.is_false(items[1].check("Answer: All of them"))
  end)
  it("refuses what is no such file", function()
    refuses('no column "Correct Answer"', benchmark.open, "gpqa", file "Question,Incorrect Answer 1\n1,2")
    refuses("quoted field of row 2", benchmark.open, "gpqa", file(csv:sub(1, 100)))
    refuses("no questions", benchmark.open, "gpqa", file(csv:match "^[^\r]*"))
  end)
end)

describe("LiveCodeBench", function()
  it("takes the last block of code", function()
    local items = benchmark.open("lcb", file '{"question_id": "q", "question_content": "add", "starter_code": "def f():"}')
    assert.truthy(items[1].question:find("def f():", 1, true))
    assert.equal("b = 2\n", items[1].code "```python\na = 1\n```\nbetter:\n```python\nb = 2\n```\nend")
    assert.equal("print(1)", items[1].code "print(1)")
  end)
end)

describe("recovery", function()
  it("wants the same questions", function()
    local p = benchmark.recovery({ a = 0.5, b = 1 }, { a = 1, b = 1 })
    assert.equal(75, p.recovery)
    assert.equal(-0.25, p.difference)
    refuses("no answer to question b", benchmark.recovery, { a = 1, b = 1 }, { a = 1 })
    refuses("question b was answered by the BF16 model only", benchmark.recovery, { a = 1 }, { a = 1, b = 1 })
    assert.is_nil(benchmark.recovery({ a = 1 }, { a = 0 }).recovery)
  end)
end)
