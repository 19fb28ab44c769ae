require "tests.lua.helper"
package.path = "lua/?.lua;" .. package.path
local json = require "ckaqad.json"
local report = require "ckaqad.report"
local screen = require "ckaqad.screen"
local repl = require "ckaqad.repl"
local show = require "ckaqad.show"
local session = require "ckaqad.session"
local complete = require "ckaqad.complete"

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

  -- The page of a run folder with these steps and this result.
  local function page(history, after)
    local dir = os.tmpname()
    os.remove(dir)
    os.execute("mkdir '" .. dir .. "'")
    local function write(name, content)
      local f = assert(io.open(dir .. "/" .. name, "w"))
      f:write(content)
      f:close()
    end
    write("run.json", json.encode(json.object { "format", 1, "recipe", "a <b>", "version", "0.1.0", "started", "2026-11-25T00:00:00Z",
      "options", json.object { "lr", 1e-4, "name", "x&y", "steps", #history } }))
    local lines = {}
    for i, step in ipairs(history) do lines[i] = json.encode(step) .. "\n" end
    write("metrics.jsonl", table.concat(lines))
    write("summary.json", json.encode { before = result, after = after, peak_bytes = 1, planned_bytes = 2 })
    local html = report.run(dir)
    os.execute("rm -r '" .. dir .. "'")
    return html
  end

  it("needs no network and escapes what it shows", function()
    local html = page { { step = 1, kl = 1, cka = 0.9, cka_blocks = { 0.9 } }, { step = 2, kl = 0.5, cka = 0.95, cka_blocks = { 0.95 } } }
    assert.is_nil(html:find("src=", 1, true))
    assert.is_nil(html:find("a <b>", 1, true))
    assert.matches("a &lt;b&gt;", html, 1, true)
    assert.matches("x&amp;y", html, 1, true)
    assert.is_truthy(html:find('role="img"', 1, true))
  end)

  it("draws a run without steps and one whose numbers stand still", function()
    assert.matches("</html>", page({}, result), 1, true)
    local still = { { step = 1, kl = 0, cka = 1, cka_blocks = { 1 } }, { step = 2, kl = 0, cka = 1, cka_blocks = { 1 } } }
    assert.is_nil(page(still):find("[^%a]nan[^%a]"))
  end)

  it("warns when training made things worse", function()
    local worse = {}
    for key, value in pairs(result) do worse[key] = value end
    worse.kl = 0.03
    assert.matches("worse than PTQ", page({}, worse), 1, true)
    assert.is_nil(page({}, result):find("worse than PTQ", 1, true))
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
    local input = repl.compile "1 + 2"
    assert.equal(3, input.chunk())
    assert.is_true(input.expression)
    assert.is_true(repl.compile "1 + 2;".silent)
    assert.equal("x = 1", repl.compile "local x = 1".source)
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

  it("shows the line of the input that failed", function()
    assert.equal("prompt:2: no\n  2 | b", repl.message("prompt:2: no", "a\nb"))
    assert.equal("prompt:1: no", repl.message("prompt:1: no", "a"))
  end)

  it("shows values as people read them", function()
    assert.equal('"a\\n"', show.value "a\n")
    assert.equal("{ 1, 2 }", show.value { 1, 2 })
    assert.equal('{ a = 1, b = "x" }', show.value { b = "x", a = 1 })
  end)

  it("completes names, methods, options and nothing by calling", function()
    local env = { cq = { balance = { ratio = print, gap = print } }, text = "x" }
    local context = { env = env, entries = { { name = "cq.loss.kl", call = "cq.loss.kl(options)", options = { "top_k", "tail" } } } }
    assert.same({ "io", "" }, { complete.line("x = cq.balance.rat", context) })
    assert.equal("p_k = ", (complete.line("cq.loss.kl { to", context)))
    assert.same({ "", "" }, { complete.line("nothing.like.it.", context) })
  end)

  it("writes a session as a recipe that compiles", function()
    local text = session.text({ { source = "x = 1" }, { source = "x + 1", expression = true } }, "today")
    assert.is_function(loadstring(text))
    assert.matches("_ = cq.show(x + 1)", text, 1, true)
  end)
end)
