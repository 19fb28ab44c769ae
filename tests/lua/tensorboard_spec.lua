-- The expected bytes were read by TensorBoard 2.21.0 (its EventAccumulators and its server, with and without --load_fast) before they
-- were committed: every number, the histogram, the table of options, and steps 4 and 5 from the second file only.
require "tests.lua.helper"
local ffi = require "ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local tensorboard = require "ckaqad.tensorboard"

local folder

local function read(path)
  local f = assert(io.open(path, "rb"))
  local bytes = f:read "*a"
  f:close()
  return bytes
end

local function open(options)
  local o = { host = "host", clock = function() return 1700000000.25 end }
  for key, value in pairs(options or {}) do o[key] = value end
  return tensorboard.open(folder, o)
end

local function message(f, ...)
  local ok, e = pcall(f, ...)
  assert.is_false(ok)
  assert.is_true(errors.is(e), tostring(e))
  return e.message, e.status
end

before_each(function()
  folder = os.tmpname()
  os.remove(folder)
  assert(os.execute("mkdir " .. folder))
end)
after_each(function() os.execute("rm -r " .. folder) end)

describe("event files", function()
  it("have the bytes that TensorBoard was seen to read", function()
    local w = open()
    w:text("options", 0, tensorboard.markdown(json.object { "lr", 1e-4, "name", "a|b", "on", true }))
    for step = 1, 5 do
      w:scalar("loss/kl", step, 1 / step, 1700000000 + step)
      w:histogram("cka/blocks", step, { 0.9, 0.95, json.null, 0.99, 1, 0 / 0 }, 1700000000 + step)
    end
    w:histogram("flat", 1, { 2, 2, 2 })
    w:scalar("far", 2 ^ 40, -3e38)
    w:close()
    local again = open { append = 3 }
    for step = 2, 5 do again:scalar("loss/kl", step, 100 + step, 1700000100 + step) end
    again:close()
    assert.equal(folder .. "/events.out.tfevents.1700000000.host", w.path)
    assert.equal(folder .. "/events.out.tfevents.1700000001.host", again.path)
    local have, want = read(w.path) .. read(again.path), read "tests/lua/tensorboard.expected"
    local same = 0
    while same < #want and have:byte(same + 1) == want:byte(same + 1) do same = same + 1 end
    assert.is_true(have == want, ("byte %d of %d differs, %d were written"):format(same, #want, #have))
  end)

  it("keep events in memory until there are many, ten seconds have passed, or flush", function()
    local w = open()
    local begun = #read(w.path)
    w:scalar("a", 1, 1, 1700000001)
    assert.equal(begun, #read(w.path))
    w:flush()
    local one = #read(w.path)
    assert.is_true(one > begun)
    w:scalar("a", 2, 1, 1700000010)
    assert.equal(one, #read(w.path))
    w:scalar("a", 3, 1, 1700000010.25)
    assert.equal(begun + 3 * (one - begun), #read(w.path))
    for step = 4, 2000 do w:scalar("a", step, 1, 1700000010.5) end
    assert.is_true(#read(w.path) > 65536)
    w:close()
    w:close()
    assert.matches("is closed", (message(w.scalar, w, "a", 2001, 1)))
  end)

  it("write nothing for a histogram without a finite value", function()
    local w = open()
    local begun = #read(w.path)
    w:histogram("a", 1, {})
    w:histogram("a", 1, { 0 / 0, 1 / 0, json.null })
    w:close()
    assert.equal(begun, #read(w.path))
  end)

  it("say what is wrong", function()
    local w = open()
    assert.matches("scalar a: the step is %-1, wanted a whole number", (message(w.scalar, w, "a", -1, 1)))
    assert.matches("scalar a: the step is 1.5", (message(w.scalar, w, "a", 1.5, 1)))
    assert.matches("histogram: the tag is nil", (message(w.histogram, w, nil, 1, { 1 })))
    w:close()
    local text, status = message(tensorboard.open, folder .. "/none")
    assert.matches("none/events.out.tfevents.*No such file", text)
    assert.equal(errors.IO, status)
    assert.matches("nearest is append", (message(tensorboard.open, folder, { apend = 1 })))
  end)

  it("say when the disk is full", function()
    local full = io.open("/dev/full", "wb")
    if not full then return pending "no /dev/full here" end
    local w = open()
    w.file:close()
    w.file = full
    w:scalar("a", 1, 1)
    local text, status = message(w.flush, w)
    assert.matches("host: No space left on device", text)
    assert.equal(errors.IO, status)
  end)

  it("cost under 0.2 ms of processor time for ten scalars", function()
    local w = open()
    local begun, n = os.clock(), 200
    for step = 1, n do
      for i = 1, 10 do w:scalar("metrics/number_" .. i, step, step / i, 1700000000 + step) end
    end
    local spent = (os.clock() - begun) / n * 1e3
    w:close()
    assert.is_true(spent < 0.2, ("%.3f ms"):format(spent))
  end)
end)

describe("bytes of numbers", function()
  it("are those of the processor", function()
    local list = { 0, -0, 1, -1, 1 / 3, 1 / 0, -1 / 0, 5e-324, 2.2250738585072014e-308, 2.2250738585072009e-308, 1.7976931348623157e308,
      3.4028234e38, 3.4028235677973366e38, 1.4e-45, 7e-46, 7.1e-46, 1.1754942e-38, 16777217, 16777219 }
    math.randomseed(7)
    for _ = 1, 2000 do
      list[#list + 1] = (math.random() - 0.5) * 2 ^ math.random(-1070, 1023)
      list[#list + 1] = (math.random() - 0.5) * 2 ^ math.random(-155, 130)
    end
    for _, x in ipairs(list) do
      assert.equal(ffi.string(ffi.new("double[1]", x), 8), tensorboard.double(x))
      assert.equal(ffi.string(ffi.new("float[1]", x), 4), tensorboard.float(x))
    end
  end)

  it("have the published check value of CRC-32C", function()
    assert.equal("e3069283", bit.tohex(tensorboard.crc32c "123456789"))
  end)
end)

describe("the table of options", function()
  it("keeps its order, and bars and line ends apart", function()
    assert.equal("| option | value |\n|---|---|\n| b | 1 |\n| a | x\\|y z |",
      tensorboard.markdown(json.object { "b", 1, "a", "x|y\nz" }))
  end)
end)
