-- What the documentation is made from: every public function has a comment, and what is generated is fresh.
require "tests.lua.helper"
local api = require "gen_api"

local function write(path, text)
  local f = assert(io.open(path, "wb"))
  f:write(text)
  f:close()
end

-- A tree of modules with the given texts; its ckaqad.ffi is never loaded.
local function tree(modules)
  local root = os.tmpname()
  os.remove(root)
  assert(os.execute("mkdir -p " .. root .. "/ckaqad"))
  for name, text in pairs(modules) do write(("%s/ckaqad/%s.lua"):format(root, name), text) end
  return root .. "/ckaqad", function() os.execute("rm -r " .. root) end
end

describe("the public API", function()
  it("has a comment on every function and method", function()
    assert.equal("", table.concat(api.undocumented "lua/ckaqad", "\n"))
  end)

  it("reaches what a recipe calls", function()
    local text = api.text "lua/ckaqad"
    for _, name in ipairs { "cq.options(defaults)", "cq.loss.kl(options)", "run:steps(n, data)", "batch:split()", "model:quantize(options)",
      "data:holdout()", "pass:backward(weights)", "adam:step(lr)", "cq.data.show(data, n)", "cq.clock()",
      "writer:scalar(tag, step, value, time)" } do
      assert.is_true(text:find("**`" .. name .. "`**", 1, true) ~= nil, name .. " is missing")
    end
  end)

  it("finds functions without a comment, however they are reached", function()
    local folder, remove = tree {
      init = [[
local thing = require "ckaqad.thing"
return { make = thing.make, more = { other = thing.other }, clock = require "ckaqad.ffi".clock, said = thing.said }]],
      thing = [[
local thing = {}
local Box = {}
Box.__index = Box
--- Says.
---
--- Example:
---     print(1)
---
---       print(2)
--- End.
function thing.said(a,
    b) return a, b end
function thing.make() return setmetatable({}, Box) end
-- Not enough.
function thing.other() end
function thing.inner() end
function Box:open() end
function Box.__tostring() return "" end
return thing
]],
      ffi = "error 'loaded'\n-- no help\nfunction native.clock() end\nfunction native.inner() end\n",
    }
    local missing, examples = api.undocumented(folder), api.examples(folder)
    local text = api.text(folder)
    remove()
    assert.same({ "ffi.lua:3: cq.clock()", "thing.lua:13: cq.make()", "thing.lua:15: cq.more.other()", "thing.lua:17: box:open()" },
      missing)
    assert.same({ { name = "cq.said(a, b)", file = "thing.lua", line = 7, code = "print(1)\n\n  print(2)\n" } }, examples)
    assert.matches("Says%.\n\nExample:\n\n    print%(1%)\n\n      print%(2%)\nEnd%.\n", text)
  end)
end)

describe("the man page", function()
  local man = require "gen_man"

  it("is what the sources say (luajit lua/gen_man.lua > core/packaging/ckaqad.1)", function()
    local f = assert(io.open "core/packaging/ckaqad.1")
    local have = f:read "*a"
    f:close()
    assert.equal(man.text(), have)
  end)

  it("has every recipe, common option, exit code and variable, and no line that roff would take for a request", function()
    local text, pipe = man.text(), io.popen "ls recipes/*.lua"
    for path in pipe:lines() do assert.is_true(text:find((path:gsub("%-", "\\-")), 1, true) ~= nil, path) end
    pipe:close()
    for _, item in ipairs(require "ckaqad.options".common) do
      assert.is_true(text:find("\n\\fB\\-\\-" .. item[1] .. "\\fR", 1, true) ~= nil, item[1])
    end
    for _, code in ipairs { 0, 1, 2, 3, 4, 5, 6, 75, 130, 143 } do
      assert.is_true(text:find(("\n\\fB%d\\fR\n"):format(code), 1, true) ~= nil, "exit code " .. code)
    end
    assert.is_true(text:find("\\fBCKAQAD_TRACEBACK\\fR", 1, true) ~= nil)
    for line in text:gmatch "[^\n]+" do
      if line:match "^[.']" then assert.is_true(line:match "^%.[STbPnf\\]" ~= nil, line) end
    end
  end)
end)
