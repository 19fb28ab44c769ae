require "tests.lua.helper"
local options = require "ckaqad.options"

describe("options", function()
  local function parse(arguments, values)
    local given = {}
    local help = options.parse(arguments, values, given)
    return values, given, help
  end

  it("take the type of their default", function()
    local v, given = parse({ "--steps=60", "lr=1e-4", "--fresh", "--name", "x y", "--no-log" },
      { steps = 1, lr = 0.1, fresh = false, name = "", log = true, other = 3 })
    assert.same({ steps = 60, lr = 1e-4, fresh = true, name = "x y", log = false, other = 3 }, v)
    assert.same({ steps = true, lr = true, fresh = true, name = true, log = true }, given)
  end)

  it("read numbers with units", function()
    assert.equal(4 * 2 ^ 30, options.number "4GiB")
    assert.equal(1e-4, options.number "1e-4")
    assert.equal(600, options.number "10m")
    assert.equal(2000, options.number "2k")
    assert.equal(-3, options.number "-3")
    assert.equal(1.5 * 2 ^ 20, options.number "1.5 MiB")
    for _, bad in ipairs { "many", "", "4 gib", "1e", "1.2.3", "0x" } do assert.is_nil(options.number(bad), bad) end
  end)

  it("accept dashes for underscores and end at --", function()
    assert.equal(3, parse({ "--top-k=3" }, { top_k = 1 }).top_k)
    assert.has_error(function() parse({ "--", "--what" }, { a = 1 }) end)
  end)

  it("name the nearest valid option, and what was wanted", function()
    for argument, finding in pairs {
      ["--stpes=3"] = "option --stpes is unknown, nearest is --steps", ["--steps=many"] = "wanted a number",
      ["--fresh=perhaps"] = "wanted true or false", ["60"] = "wanted --option=value", ["--steps"] = "the value is missing",
    } do
      local ok, e = pcall(parse, { argument }, { steps = 1, seed = 1, fresh = false })
      assert.is_false(ok, argument)
      assert.matches(finding, e.message, 1, true)
    end
  end)

  it("ask for help", function()
    local _, _, help = parse({ "--help" }, { a = 1 })
    assert.is_true(help)
  end)

  it("take their help from the comments beside the defaults", function()
    local parsed = options.read_help [[
-- Does a thing.
--   ckaqad thing.lua
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",   -- the model: a folder,
                    -- or org/name
  steps = 60,       -- optimizer steps
}
local later = { nope = 1 } -- not an option
]]
    assert.same({ "model", "steps" }, parsed.order)
    assert.same({ model = "the model: a folder, or org/name", steps = "optimizer steps" }, parsed.help)
    assert.equal("Does a thing.", parsed.header[1])
    local help = options.help(parsed, { model = "auto", steps = 60, threads = 0 }, "thing.lua")
    assert.matches("--steps    optimizer steps [60]", help, 1, true)
    assert.matches("--threads  processor threads (0: all cores) [0]", help, 1, true)
  end)
end)

describe("the recipes", function()
  local f = assert(io.popen "ls recipes/*.lua; grep -l 'cq.options' recipes/lab/*.lua")
  for path in f:lines() do
    local file = assert(io.open(path))
    local source = file:read "*a"
    file:close()
    it(path .. " explains every option and stays short", function()
      local parsed = options.read_help(source)
      assert.is_true(#parsed.order > 0)
      for _, key in ipairs(parsed.order) do assert.is_true(#parsed.help[key] > 0, key .. " has no comment") end
      local _, lines = source:gsub("\n", "")
      assert.is_true(lines <= 66, lines .. " lines")
      for name in source:gmatch "require \"([^\"]+)\"" do assert.equal("ckaqad", name) end
    end)
  end
  f:close()
end)
