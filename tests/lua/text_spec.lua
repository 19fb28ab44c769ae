require "tests.lua.helper"
local json = require "ckaqad.json"
local errors = require "ckaqad.errors"
local text = require "ckaqad.text"

describe("json", function()
  it("keeps the order of keys, in writing and in reading back", function()
    local o = json.object { "z", 1, "a", 2, "m", 3 }
    assert.equal('{"z":1,"a":2,"m":3}', json.encode(o))
    assert.same({ "z", "a", "m" }, json.keys(json.decode '{"z":1,"a":2,"m":3}'))
  end)

  it("writes numbers that read back to the same bits", function()
    local seed = os.time()
    math.randomseed(seed)
    for _ = 1, 2000 do
      local x = (math.random() - 0.5) * 10 ^ math.random(-300, 300)
      assert.equal(x, json.decode(json.encode(x)), "seed " .. seed)
    end
    assert.equal("0.1", json.encode(0.1))
    assert.equal("123456789012", json.encode(123456789012))
  end)

  it("writes NaN and infinity as null", function()
    assert.equal("[null,null,null,1]", json.encode { 0 / 0, 1 / 0, -1 / 0, 1 })
  end)

  it("keeps null in arrays and leaves absent values out of objects", function()
    assert.equal('{"a":[1,null,2]}', json.encode(json.object { "a", { 1, json.null, 2 }, "b", nil }))
  end)

  it("reads escapes, surrogate pairs and control characters", function()
    assert.equal("a\n\"\\/\240\159\152\128\0", json.decode [["a\n\"\\\/\ud83d\ude00\u0000"]])
    assert.equal([["\u0000\u001f\"\\\n"]], json.encode "\0\31\"\\\n")
  end)

  it("tells an empty array from an empty object", function()
    assert.equal("[]", json.encode(json.decode "[]"))
    assert.equal("{}", json.encode(json.decode "{}"))
  end)

  it("names source and line of broken text", function()
    for _, bad in ipairs { '{"a":1,}', "[1 2]", '{"a"}', "[1", '"x', "nul", "1 2", "{1:2}", "" } do
      local ok, e = pcall(json.decode, "\n" .. bad, "f.json")
      assert.is_false(ok, bad)
      assert.equal(errors.DATA, e.status)
      assert.matches("^f%.json: line %d", e.message)
    end
  end)

  it("hands out the elements of an array unchanged to the byte", function()
    assert.same({ '{"a": 1.0}', "[ 2 ]", '"x,]"' }, json.elements ' [ {"a": 1.0} , [ 2 ],"x,]"] ')
  end)
end)

describe("errors", function()
  it("say that the disk is full in a loop that is compiled too", function()
    local full = io.open("/dev/full", "wb")
    if not full then return pending "no /dev/full here" end
    local good = assert(io.open("/dev/null", "wb"))
    local at
    local ok, e = pcall(function()
      for i = 1, 2000 do
        at = i
        errors.write(i <= 1000 and good or full, "metrics", "a line\n")
      end
    end)
    assert.is_false(ok)
    assert.same({ 1001, "metrics: No space left on device", errors.IO }, { at, e.message, e.status })
  end)

  it("count edits, a swap as one", function()
    assert.equal(0, errors.distance("steps", "steps"))
    assert.equal(1, errors.distance("stpes", "steps"))
    assert.equal(1, errors.distance("step", "steps"))
    assert.equal(3, errors.distance("kitten", "sitting"))
    assert.equal(4, errors.distance("", "seed"))
  end)

  it("name the nearest key", function()
    assert.equal("steps", errors.nearest("stepz", { "seq", "steps", "seed" }))
    local ok, e = pcall(errors.fill, "thing", { wamrup = 1 }, { warmup = 0, peak = 1 })
    assert.is_false(ok)
    assert.equal(errors.USAGE, e.status)
    assert.matches("wamrup is unknown, nearest is warmup", tostring(e))
    local t = errors.strict({ cosine = 1 }, "schedule")
    assert.has_error(function() return t.cosin end)
    assert.equal(1, t.cosine)
  end)

  it("let a default of NONE stay absent", function()
    assert.same({ a = 1 }, errors.fill("thing", nil, { a = 1, b = errors.NONE }))
  end)
end)

describe("text", function()
  it("writes counts, bytes and durations as people read them", function()
    assert.equal("3.28 M", text.count(3.28e6))
    assert.equal("999", text.count(999))
    assert.equal("1.5 KiB", text.bytes(1536))
    assert.equal("2:05", text.duration(125))
    assert.equal("1:02:05", text.duration(3725))
    assert.equal("0-2,5", text.ranges { 0, 1, 2, 5 })
  end)

  it("aligns columns by what is seen, not by bytes", function()
    assert.same({ "a\206\177   1", "b   22" }, text.table { { "a\206\177", "1" }, { "b", "22" } })
  end)
end)
