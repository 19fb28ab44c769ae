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

  local function with(changes)
    local copy = {}
    for key, value in pairs(result) do copy[key] = value end
    for key, value in pairs(changes) do copy[key] = value end
    return copy
  end

  local function write(path, content)
    local f = assert(io.open(path, "w"))
    f:write(content)
    f:close()
  end

  local function lines(list)
    local out = {}
    for i, value in ipairs(list) do out[i] = json.encode(value) .. "\n" end
    return table.concat(out)
  end

  -- What `make` gives for an empty folder that is gone afterwards.
  local function in_folder(make)
    local dir = os.tmpname()
    os.remove(dir)
    os.execute("mkdir '" .. dir .. "'")
    local ok, html = pcall(make, dir)
    os.execute("rm -r '" .. dir .. "'")
    return assert(ok and html, html)
  end

  local function write_run(dir, run)
    local options = run.options or {}
    options.lr, options.name, options.steps = 1e-4, "x&y", run.steps or #run.history
    write(dir .. "/run.json", json.encode(json.object { "format", 1, "recipe", "a <b>", "version", "0.1.0", "started",
      "2026-11-25T00:00:00Z", "options", options }))
    write(dir .. "/metrics.jsonl", lines(run.history))
    if run.evals then write(dir .. "/evals.jsonl", lines(run.evals)) end
    if not run.stopped then
      write(dir .. "/summary.json", json.encode { before = result, after = run.after, peak_bytes = 1, planned_bytes = 2 })
    end
  end

  -- The page of a run folder: { history, after, evals, options, steps, stopped }.
  local function page_of(run)
    return in_folder(function(dir)
      write_run(dir, run)
      return report.run(dir)
    end)
  end

  local function page(history, after) return page_of { history = history, after = after } end

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
    assert.matches("CKA-QAD is worse than PTQ in KL (0.0200 to 0.0300).", page({}, with { kl = 0.03 }), 1, true)
    assert.is_nil(page({}, result):find("worse than PTQ", 1, true))
    local mixed = page({}, with { kl = 0.015, top1 = 0.8, perplexity = 4, cka_min = 0.9 })
    assert.matches("won back 25.0 % of the KL", mixed, 1, true)
    assert.matches("But it is worse than PTQ in top-1 agreement, perplexity and the lowest CKA.", mixed, 1, true)
  end)

  it("says where a stopped run stands", function()
    local step = { step = 1, kl = 1, cka = 0.9, cka_blocks = { 0.9 } }
    local early = with { step = 0 } -- evals.jsonl does not know the tokens, an older one not the teacher's perplexity
    early.tokens, early.perplexity_teacher = nil, nil
    local html = page_of { history = { step }, evals = { early }, steps = 9, stopped = true }
    assert.matches("No result yet: the run was stopped or still goes on after step 1 of 9.", html, 1, true)
    assert.matches("held out 0.02 at step 0", html, 1, true)
    assert.is_nil(html:find("recovered", 1, true))
    assert.is_nil(html:find("0 tokens", 1, true))
    html = page_of { history = {}, steps = 9, stopped = true }
    assert.matches("before its first step", html, 1, true)
  end)

  it("names a run by what it was trained on", function()
    local function of(options, history) return page_of { history = history or {}, after = result, options = options } end
    local steps = { { step = 1, kl = 1, cka = 0.9, weight = 2, cka_blocks = { 0.9 } }, { step = 2, kl = 1, cka = 0.9, weight = 2,
      cka_blocks = { 0.8 } } }
    assert.matches("Weight of CKA beside KL", of({ layer = "cka" }, steps), 1, true)
    for _, options in ipairs { { layer = "none" }, { cka = "none" }, { balance = "none" } } do
      local html = of(options, steps)
      assert.matches(">QAD<", html, 1, true)
      assert.is_nil(html:find("Weight of", 1, true))
    end
    assert.matches(">CKA-QAT<", of { loss = "ce" }, 1, true)
    local cosine = of({ layer = "cosine" }, steps)
    assert.matches(">cosine-QAD<", cosine, 1, true)
    assert.matches("1 - cosine loss of every block in training", cosine, 1, true)
    assert.is_nil(cosine:find("CKA of every block in training", 1, true))
  end)

  -- The page of a sweep over lr with two seeds a setting: the KL that each point ended with; `less(i)` makes a point other than finished.
  local function page_of_sweep(kl, less)
    return in_folder(function(dir)
      local points = {}
      os.execute("mkdir '" .. dir .. "/points'")
      for i, after in ipairs(kl) do
        local hash, lr = ("%08d"):format(i), math.ceil(i / 2)
        local run = { history = {}, after = with { kl = after } }
        points[i] = { hash = hash, name = "lr=" .. lr, options = { lr = lr }, seed = (i - 1) % 2 + 1 }
        if less then less(i, points[i], run) end
        os.execute("mkdir '" .. dir .. "/points/" .. hash .. "'")
        write_run(dir .. "/points/" .. hash, run)
      end
      write(dir .. "/sweep.json", json.encode { format = 1, recipe = "r.lua", base = json.object {}, axes = { { name = "lr",
        values = { 1, 2 } } }, seeds = { 1, 2 }, points = points })
      return report.sweep(dir)
    end)
  end

  it("compares a sweep's settings with PTQ, over the seeds that finished", function()
    local html = page_of_sweep({ 0.03, 0.035, 0.04, 0.045 }, function(i, _, run) run.stopped = i == 4 end)
    assert.matches("2 settings, 3 of 4 runs finished. Lowest KL: lr=1, 0.03250", html, 1, true)
    assert.matches("still worse than PTQ (recovered -62.5 %)", html, 1, true)
    assert.matches("PTQ, untrained", html, 1, true)
    assert.matches("Not every setting has finished with the same seeds (lr=1: 1, 2; lr=2: 1)", html, 1, true)
  end)

  it("shows paired differences, and no spread of what all began with", function()
    local html = page_of_sweep { 0.015, 0.016, 0.01, 0.012 }
    assert.matches("KL - KL of lr=1", html, 1, true)
    assert.matches("-0.00450 [-0.00500, -0.00400]<", html, 1, true)
    assert.matches("<td class=\"num\">0.02000</td>", html, 1, true)
    assert.is_nil(html:find("± 0.00000", 1, true))
    assert.matches("4 runs of 2 settings; lowest mean lr=2 0.01100, highest lr=1 0.01550, PTQ 0.02000", html, 1, true)
  end)

  it("does not call a halved sweep uneven, nor compares with what was dropped", function()
    local function drop(first) return function(i, point, run)
      if i >= first then point.dropped, run.stopped = 10, true end
    end end
    local html = page_of_sweep({ 0.015, 0.016, 0.01, 0.012, 1, 1 }, drop(5))
    assert.is_nil(html:find("Uneven", 1, true))
    assert.matches("3 settings, 4 of 6 runs finished, 2 dropped on the way.", html, 1, true)
    assert.matches("the paired interval against the one other setting that finished excludes zero.", html, 1, true)
    assert.matches("Dropped at step 10, without a result: lr=3.", html, 1, true)
    assert.matches("no other setting finished, so nothing is compared.", page_of_sweep({ 0.015, 0.016, 1, 1 }, drop(3)), 1, true)
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
