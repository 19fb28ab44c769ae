require "tests.lua.helper"
package.path = "lua/?.lua;" .. package.path
local json = require "ckaqad.json"
local report = require "ckaqad.report"
local screen = require "ckaqad.screen"
local repl = require "ckaqad.repl"

describe("API.md", function()
  it("is what the comments say (luajit lua/gen_api.lua > lua/API.md)", function()
    local f = assert(io.open "lua/API.md")
    local have = f:read "*a"
    f:close()
    assert.equal(require "gen_api".text "lua/ckaqad" .. "\n", have)
  end)
end)

describe("the report", function()
  local result = { kl = 0.02, top1 = 0.9, perplexity = 3, perplexity_teacher = 2.9, tokens = 10, cka = 0.98, cka_min = 0.97,
    cka_min_block = 1, cka_blocks = { 0.99, 0.97 } }
  local function page(history, after)
    return report.html { title = "a <b>", options = json.object { "lr", 1e-4, "name", "x&y" }, history = history, before = result,
      after = after, version = "0.1.0 (x)", peak = 1, planned = 2 }
  end

  it("needs no network and escapes what it shows", function()
    local html = page { { step = 1, kl = 1, cka = 0.9, cka_blocks = { 0.9 } },
      { step = 2, kl = 0.5, cka = 0.95, cka_blocks = { 0.95 } } }
    assert.is_nil(html:find("https?://"))
    assert.is_nil(html:find("a <b>", 1, true))
    assert.matches("a &lt;b&gt;", html, 1, true)
    assert.matches("x&amp;y", html, 1, true)
    assert.equal(3, select(2, html:gsub("<svg", "")))
    assert.equal(3, select(2, html:gsub('role="img" aria%-label="[^"]+"', "")))
    assert.is_nil(html:find("nan", 1, true))
  end)

  it("draws a run without steps and one whose numbers stand still", function()
    assert.matches("<svg", page({}, result), 1, true)
    local still = { { step = 1, kl = 0, cka = 1, cka_blocks = { 1 } }, { step = 2, kl = 0, cka = 1, cka_blocks = { 1 } } }
    assert.is_nil(page(still):find("inf"))
  end)

  it("warns when training made things worse", function()
    local worse = setmetatable({ kl = 0.03 }, { __index = result })
    assert.matches("worse than PTQ", page({}, worse), 1, true)
    assert.is_nil(page({}, result):find("worse than PTQ", 1, true))
  end)

  it("puts ticks on round numbers inside the range", function()
    assert.same({ 0, 5, 10 }, (report.ticks(0, 10, 2)))
    for _, range in ipairs { { 0.981, 0.9963 }, { -1, 3 }, { 1, 60 }, { 1e-7, 2e-7 } } do
      local list = report.ticks(range[1], range[2], 4)
      assert.is_true(#list >= 2 and #list <= 7, #list .. " ticks")
      for _, t in ipairs(list) do assert.is_true(t >= range[1] - 1e-12 and t <= range[2] + 1e-12) end
    end
  end)
end)

describe("the status line", function()
  it("says all that a step has, and nothing that it lacks", function()
    local line = screen.status({ step = 12, kl = 0.0312, cka = 0.9921, cka_min = 0.981, cka_min_block = 7, weight = 3.4, lr = 9.1e-5,
      grad_norm = 0.42, tokens = 2000, seconds = 0.5 }, 60, 41)
    assert.equal("step 12/60  20 %  eta 0:41  kl 0.0312  cka 0.9921 (lowest 0.9810 at 7)  weight 3.4  lr 9.1e-05  |g| 0.42"
      .. "  4 k tok/s", line)
    assert.is_nil(screen.status({ step = 1, ce = 1, tokens = 1, seconds = 1 }, 2, 0):find("cka"))
  end)
end)

describe("the prompt", function()
  it("tells expressions, statements, unfinished and broken lines apart", function()
    assert.equal(3, repl.compile "1 + 2"())
    assert.is_function(repl.compile "local x = 1")
    local chunk, _, unfinished = repl.compile "for i = 1, 2 do"
    assert.is_nil(chunk)
    assert.is_true(unfinished)
    chunk, _, unfinished = repl.compile "x ="
    assert.is_nil(chunk)
    assert.is_true(unfinished)
    chunk, _, unfinished = repl.compile "x = )"
    assert.is_nil(chunk)
    assert.is_false(unfinished)
  end)

  it("shows values as people read them", function()
    assert.equal('"a\\n"', repl.show "a\n")
    assert.equal("{ 1, 2 }", repl.show { 1, 2 })
    assert.equal('{ a = 1, b = "x" }', repl.show { b = "x", a = 1 })
  end)
end)
