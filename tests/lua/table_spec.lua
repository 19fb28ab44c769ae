require "tests.lua.helper"
local compare = require "ckaqad.compare"
local errors = require "ckaqad.errors"
local table_ = require "ckaqad.table"

local function sample(rows, notes)
  local columns = { { key = "name", title = "na|me" }, { key = "kl", title = "KL", format = "%.3f", better = "low" } }
  return table_.new { title = "A & b_c", columns = columns, rows = rows, notes = notes }
end
local awkward = { { name = 'x,"y"\n<z>', kl = 0.5 }, { name = "50 %_#", kl = table_.cell { 0.25, 0.75 } } }

describe("a table", function()
  it("aligns text by what is seen, numbers on the right, with spread and n", function()
    local rows = { { name = "a", kl = table_.cell { 1 } }, { name = "bb", kl = table_.cell { 0.25, 0.75 } }, { name = "c" } }
    local t = sample(rows, { "note" })
    assert.equal(table.concat({ "A & b_c", "na|me                   KL", "a              1.000 (n=1)", "bb     0.500 ± 0.354 (n=2)",
      "c                        -", "note", "" }, "\n"), t:text())
  end)

  it("leaves n to the row's own column, unless a cell has another", function()
    local cell = table_.cell { 1, 3 }
    local rows = { { n = 2, x = cell, y = table_.cell { 1 } } }
    local t = table_.new { columns = { { key = "n" }, { key = "x" }, { key = "y" } }, rows = rows }
    assert.equal("n          x        y\n2  2 ± 1.414  1 (n=1)\n", t:text())
  end)

  it("writes CSV that keeps quotes, commas, line ends and every digit", function()
    local third = 1 / 3
    local csv = sample({ awkward[1], awkward[2], { name = "t", kl = { mean = third, low = 0.25, high = 0.5, n = 3, mark = true } } }):csv()
    assert.equal(table.concat({ "name,kl,kl_sd,kl_low,kl_high,kl_n,kl_best", '"x,""y""\n<z>",0.5,,,,,',
      "50 %_#,0.5,0.35355339059327379,,,2,", "t,0.33333333333333331,,0.25,0.5,3,1", "" }, "\r\n"), csv)
  end)

  it("escapes Markdown, LaTeX and HTML", function()
    local t = sample(awkward, { "a < b & c" })
    assert.matches("| na\\|me | KL |\n|---|---:|\n", t:markdown(), 1, true)
    assert.matches('| x,"y" \\<z\\> | 0.500 |', t:markdown(), 1, true)
    local latex = t:latex()
    for _, part in ipairs { "\\caption{A \\& b\\_c}", "{lr}", "\\toprule", "na\\textbar{}me & KL \\\\", "\\midrule", "\\bottomrule",
      "50 \\%\\_\\# & 0.500 $\\pm$ 0.354 (n=2) \\\\", "a \\textless{} b \\& c" } do
      assert.is_true(latex:find(part, 1, true) ~= nil, part .. " is not in\n" .. latex)
    end
    assert.is_nil(latex:find("±", 1, true))
    local html = t:html()
    assert.is_nil(html:find("<z>", 1, true))
    assert.matches("x,&quot;y&quot;\n&lt;z&gt;", html, 1, true)
    assert.matches("<caption>A &amp; b_c</caption>", html, 1, true)
    assert.matches('<td class="num">0.500<span class="dim"> ± 0.354 (n=2)</span></td>', html, 1, true)
  end)

  it("marks the best in every form", function()
    local t = sample { { name = "a", kl = { mean = 1, sd = 0, n = 2, mark = true } }, { name = "b", kl = 2 } }
    assert.matches("1.000 ± 0.000 (n=2)*", t:text(), 1, true)
    assert.matches("* best: ", t:text(), 1, true)
    assert.matches("**1.000 ± 0.000 (n=2)**", t:markdown(), 1, true)
    assert.matches("\\textbf{1.000 $\\pm$ 0.000 (n=2)}", t:latex(), 1, true)
    assert.matches('<strong class="best" title="best">1.000</strong>', t:html(), 1, true)
  end)

  it("refuses unknown forms, columns without key and unknown fields", function()
    for _, f in ipairs { function() sample({}):render "pdf" end, function() table_.new { columns = {} } end,
      function() table_.new { columns = { { "kl" } } } end, function() table_.new { columns = { { key = "a", beter = "low" } } } end,
      function() table_.new { columns = { { key = "a", better = "lower" } } } end } do
      local ok, e = pcall(f)
      assert.is_false(ok)
      assert.equal(errors.USAGE, e.status)
    end
    assert.equal("na|me,KL", sample({}):markdown():match("%*%*\n\n| (.-) |\n"):gsub("\\", ""):gsub(" | ", ","))
  end)
end)

describe("the mark", function()
  local function marked(...)
    local rows = {}
    for i, values in ipairs { ... } do rows[i] = { name = "r" .. i, kl = table_.cell(values) } end
    local t = sample(rows)
    t:mark()
    local list = {}
    for i, row in ipairs(rows) do list[i] = row.kl.mark and "best" or "" end
    return table.concat(list, ",")
  end

  it("goes to the row that is clearly better than every other one", function()
    assert.equal(",best,", marked({ 5, 6, 7, 8 }, { 4, 5, 6, 7 }, { 9, 9, 9, 9 }))
    local t = sample { { name = "a", kl = table_.cell { 1, 2 } }, { name = "b", kl = table_.cell { 3, 4 } } }
    t:mark()
    assert.matches("fewer than 6 pairs that is a hint", t:text(), 1, true)
    t = sample { { name = "a", kl = table_.cell { 1, 2, 3, 4, 5, 6 } }, { name = "b", kl = table_.cell { 3, 4, 5, 6, 7, 8 } } }
    assert.equal(1, t:mark())
    assert.is_nil(t:text():find "hint")
  end)

  it("goes to nobody when one other row is not clearly worse", function()
    assert.equal(",,", marked({ 4.1, 4.9, 6.1, 6.9 }, { 4, 5, 6, 7 }, { 9, 9, 9, 9 }))
  end)

  it("goes to nobody alone, with one seed, or without common seeds", function()
    assert.equal("", marked { 1, 2, 3 })
    assert.equal(",", marked({ 1 }, { 9 }))
    assert.equal(",", marked({ [1] = 1, [2] = 2 }, { [3] = 9, [4] = 9 }))
  end)

  it("does not go to a reference, nor does a reference stand in the way", function()
    local rows = { { name = "BF16", reference = true, kl = table_.cell { 0, 0, 0 } }, { name = "a", kl = table_.cell { 1, 2, 3 } },
      { name = "b", kl = table_.cell { 2, 3, 4 } } }
    assert.equal(1, sample(rows):mark())
    assert.is_nil(rows[1].kl.mark)
    assert.is_true(rows[2].kl.mark)
  end)
end)

-- Records as the index gives them, the newest first.
local function record(options, kl, more)
  local r = { recipe = "recipes/x.lua", options = options, kl_before = 0.02, kl_after = kl, cka_before = 0.9, cka_after = 0.95,
    version = "0.1.0 (x)" }
  for key, value in pairs(more or {}) do r[key] = value end
  return r
end
local function grid()
  local list = {}
  for seed = 3, 1, -1 do
    for _, lr in ipairs { 3e-5, 1e-5 } do
      local kl = 0.01 + seed * 1e-3 - (lr > 2e-5 and 2e-3 or 0)
      list[#list + 1] = record({ lr = lr, out = "runs/" .. seed .. lr, threads = seed, seed = seed }, kl)
    end
  end
  return list
end
local function has(lines, what)
  for _, line in ipairs(lines) do
    if line:find(what, 1, true) then return true end
  end
  return false
end

describe("compared runs", function()
  it("differ in what was told them, not in where they lie or how they are shown", function()
    local a = record({ lr = 1e-5, out = "a", threads = 1, cka = "all" }, 1)
    local d = compare.differences { a, record({ lr = 1e-5, out = "b", threads = 2 }, 1) }
    assert.same({ { name = "cka", values = { "all", "-" } } }, d)
    local e = compare.differences { record({}, 1), record({}, 1, { recipe = "y.lua" }) }
    assert.same({ { name = "recipe", values = { "x.lua", "y.lua" } } }, e)
  end)

  it("stand in one row per setting, oldest first, with paired differences and recovery", function()
    local t = compare.table(grid())
    for i, name in ipairs { "(BF16)", "(PTQ)", "1e-05", "3e-05" } do assert.equal(name, t.rows[i].option_lr) end
    local slow, fast = t.rows[3], t.rows[4]
    assert.equal(3, slow.kl.n)
    assert.near(0.012, slow.kl.mean, 1e-12)
    assert.near(1e-3, slow.kl.sd, 1e-12)
    assert.near(40, slow.recovery.mean, 1e-9)
    assert.is_nil(slow.kl_difference)
    assert.near(-2e-3, fast.kl_difference.mean, 1e-12)
    assert.near(-2e-3, fast.kl_difference.low, 1e-12) -- the seeds move both alike: nothing is left but the shift
    assert.is_true(fast.kl.mark)
    assert.is_true(has(t.notes, "fewer than 6 pairs"))
    assert.is_false(has(t.notes, "flag"))
  end)

  it("stand in the order of numbers, else in the order in which they were run", function()
    local t = compare.table { record({ lr = 10 }, 0.1), record({ lr = 9 }, 0.1), record({ lr = 100 }, 0.1) }
    assert.same({ "9", "10", "100" }, { t.rows[3].option_lr, t.rows[4].option_lr, t.rows[5].option_lr })
    t = compare.table { record({ lr = "10" }, 0.1), record({ lr = "none" }, 0.1), record({ lr = "all" }, 0.1) }
    assert.same({ "all", "none", "10" }, { t.rows[3].option_lr, t.rows[4].option_lr, t.rows[5].option_lr })
  end)

  it("are flagged when they differ in more than what makes the rows", function()
    local list = grid()
    list[1].options.rows = 256
    local t = compare.table(list, { by = "lr" })
    assert.is_true(has(t.notes, "flag: the runs differ in more than lr: rows too"))
    assert.is_true(has(t.notes, "flag: 2 of 6 runs lack a partner"))
    assert.equal(2, t.rows[4].kl_difference.n)
  end)

  it("are flagged when a seed is missing, the program, the model or the documents changed", function()
    local list = grid()
    table.remove(list, 1)
    list[2].version = "0.2.0 (y)"
    list[3].data_hash, list[4].data_hash = "aa", "bb"
    local t = compare.table(list)
    assert.is_true(has(t.notes, "flag: 1 of 5 runs lack a partner of the same seed in some other setting"))
    assert.is_true(has(t.notes, "flag: the runs come from 2 versions of the program: 0.1.0, 0.2.0"))
    assert.is_true(has(t.notes, "flag: the runs come from 2 sets of documents (hashes): aa, bb"))
  end)

  it("count once when their options are the same, and warn when they lost to PTQ", function()
    local list = grid()
    table.insert(list, 1, record({ lr = 1e-5, seed = 1 }, 0.5))
    local t = compare.table(list)
    assert.equal(3, t.rows[3].kl.n)
    assert.equal(0.5, t.rows[3].kl.values["seed=1"])
    assert.is_true(has(t.notes, "1 runs repeat"))
    assert.is_true(has(t.notes, "warning: KL is worse than PTQ's with lr=1e-05"))
  end)

  it("take their differences to the setting that was asked for", function()
    local t = compare.table(grid(), { against = "lr=3e-5" })
    assert.near(2e-3, t.rows[3].kl_difference.mean, 1e-12)
    assert.is_nil(t.rows[4].kl_difference)
    local ok, e = pcall(compare.table, grid(), { against = "lr=1" })
    assert.is_false(ok)
    assert.matches("no setting has lr=1, nearest is lr=", e.message)
    ok, e = pcall(compare.table, grid(), { by = "rl" })
    assert.is_false(ok)
    assert.matches("option rl is unknown, nearest is lr", e.message)
  end)

  it("show PTQ per setting where the settings change it", function()
    local list = grid()
    for _, r in ipairs(list) do
      if r.options.lr == 1e-5 then r.kl_before = 0.03 end
    end
    local t = compare.table(list)
    assert.equal("1e-05", t.rows[1].option_lr)
    assert.near(0.03, t.rows[1].kl_ptq.mean, 1e-12)
    assert.near(0.02, t.rows[2].kl_ptq.mean, 1e-12)
  end)
end)
