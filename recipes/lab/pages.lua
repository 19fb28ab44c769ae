-- pages.lua - what the study says: tables in Markdown and pictures of one study.json (lab/arms.lua writes it).
--
-- Differences are paired by seed to the arm that an arm is compared with; recovery is accuracy in percent of the BF16 teacher's.
local cq = require "ckaqad"
local here = (debug.getinfo(1, "S").source:match "^@(.*)/" or ".") .. "/"
local pictures = dofile(here .. "pictures.lua")
local pages = {}

local function number(x) return type(x) == "number" end

-- The runs' values of a field by seed, times `scale`.
local function values(arm, pick, scale)
  local out = {}
  for _, run in ipairs(arm.runs) do
    local x = type(pick) == "function" and pick(run) or run[pick]
    if number(x) then out[run.seed] = x * (scale or 1) end
  end
  return out
end

local function cell(list)
  local s = cq.stats.summary(list)
  return s.n > 0 and { mean = s.mean, sd = s.sd, n = s.n, values = list } or nil
end

local function mean(list)
  local sum, n = 0, 0
  for _, x in ipairs(list or {}) do
    if number(x) then sum, n = sum + x, n + 1 end
  end
  return n > 0 and sum / n or nil
end

local function way(name) return function(run) return mean(run.geometry and run.geometry[name]) end end

--- A study with its arms by name.
function pages.load(study)
  study.by_name = {}
  for _, arm in ipairs(study.arms) do study.by_name[arm.name] = arm end
  return study
end

--- The setting in a paragraph.
function pages.setting(s)
  local seconds, runs = 0, 0
  for _, arm in ipairs(s.arms) do
    for _, run in ipairs(arm.runs) do seconds, runs = seconds + (number(run.seconds) and run.seconds or 0), runs + 1 end
  end
  return (("%s, %s, width %d. Trained arms: %d steps, %d tokens, rates %s tried %d times each on validation, then fresh seeds on " ..
    "test; %d test problems, %d drawn answers each, targets: %s. %d test runs, %.0f minutes of training in all.\n")):format(s.family,
    s.pattern, s.hidden, s.steps, s.tokens, s.rates, s.tries, s.items, s.samples, s.mask, runs, seconds / 60)
end

--- What each stage of a teacher's training scores.
function pages.stages(stages)
  local rows = {}
  for i, stage in ipairs(stages) do
    local x = stage.scores
    local row = { stage = stage.name, n = x.n, pass = { mean = 100 * x.pass, low = 100 * x.low, high = 100 * x.high, n = x.n },
      greedy = { mean = 100 * x.greedy, low = 100 * x.greedy_low, high = 100 * x.greedy_high, n = x.n } }
    for _, task in ipairs(cq.json.keys(x.tasks)) do row[task] = 100 * x.tasks[task].pass end
    rows[i] = row
  end
  local columns = { { key = "stage" }, { key = "n", title = "problems" }, { key = "pass", title = "pass@1, %", format = "%.1f" },
    { key = "greedy", title = "greedy, %", format = "%.1f" } }
  for _, task in ipairs { "sum", "game", "path", "list" } do columns[#columns + 1] = { key = task, format = "%.1f" } end
  return "### The teachers\n\n" .. cq.table { columns = columns, rows = rows, notes = {
    "pass@1 over drawn answers at T = 1, 95 % bootstrap interval over problems; the tasks' columns are pass@1." } }:markdown()
end

-- "+0.4 [-0.2, +1.0] ?": paired by seed.
local function difference(s, arm, pick, scale, format)
  local other = s.by_name[arm.from]
  if not other then return nil end
  local p = cq.stats.paired(values(arm, pick, scale), values(other, pick, scale))
  if p.n == 0 then return nil end
  local f = "%+" .. format
  if not p.low then return f:format(p.difference) end
  return (f .. " [" .. f .. ", " .. f .. "]%s"):format(p.difference, p.low, p.high, p.clear and "" or " ?")
end

local function recovery(s, arm, pick)
  local own, bf16, out = values(arm, pick), s.by_name.BF16 and values(s.by_name.BF16, pick) or {}, {}
  for seed, x in pairs(own) do out[seed] = bf16[seed] and bf16[seed] > 0 and 100 * x / bf16[seed] or nil end
  return cell(out)
end

local function rows_of(s, fill)
  local rows = {}
  for i, arm in ipairs(s.arms) do
    local row = { arm = arm.name .. (arm.full and "" or " *"), n = #arm.runs, lr = arm.lr, reference = not arm.from }
    fill(row, arm)
    rows[i] = row
  end
  return rows
end

local head = { { key = "arm" }, { key = "n" } }
local function columns(list)
  local out = { head[1], head[2] }
  for _, column in ipairs(list) do out[#out + 1] = column end
  return out
end

--- Accuracy, recovery, KL and top-1 of every arm.
function pages.accuracy(s)
  local rows = rows_of(s, function(row, arm)
    row.from, row.pass, row.greedy = arm.from, cell(values(arm, "pass", 100)), cell(values(arm, "greedy", 100))
    row.difference, row.recovery = difference(s, arm, "pass", 100, ".1f"), recovery(s, arm, "pass")
    row.kl, row.outside, row.top1 = cell(values(arm, "kl")), cell(values(arm, "outside_kl")), cell(values(arm, "top1", 100))
  end)
  return "**Accuracy and distance to the teacher**\n\n" .. cq.table { rows = rows, columns = columns { { key = "lr", title = "rate" },
    { key = "pass", title = "pass@1, %", format = "%.1f" }, { key = "from", title = "compared with" },
    { key = "difference", title = "difference, points" }, { key = "recovery", title = "recovery, %", format = "%.1f" },
    { key = "greedy", title = "greedy, %", format = "%.1f" }, { key = "kl", title = "KL", format = "%.4f" },
    { key = "outside", title = "KL outside", format = "%.4f" }, { key = "top1", title = "top-1, %", format = "%.1f" } }, notes = {
    "Mean ± standard deviation over n seeds; * few seeds, a hint. Differences in pass@1 are paired by seed, with their 95 % bootstrap " ..
    "interval, ? where it includes zero. KL in nats a token, in the domain and outside." } }:markdown()
end

--- Accuracy by task.
function pages.tasks(s)
  local list = {}
  for _, task in ipairs { "sum", "game", "path", "list" } do list[#list + 1] = { key = task, format = "%.1f" } end
  return "**pass@1 by task, %**\n\n" .. cq.table { columns = columns(list), rows = rows_of(s, function(row, arm)
    for _, c in ipairs(list) do
      row[c.key] = cell(values(arm, function(run) return run.tasks[c.key] and run.tasks[c.key].pass end, 100))
    end
  end) }:markdown()
end

--- CKA of every arm in four ways, and its lowest block.
function pages.geometry(s)
  local ways = { { key = "raw_unbiased", title = "CKA" }, { key = "raw_biased", title = "biased" },
    { key = "standard_unbiased", title = "standardized" }, { key = "standard_biased", title = "standardized, biased" } }
  for _, c in ipairs(ways) do c.format = "%.4f" end
  local list = { ways[1], { key = "difference", title = "difference in CKA" }, ways[2], ways[3], ways[4],
    { key = "lowest", title = "lowest block", format = "%.4f" }, { key = "at", title = "which" } }
  return "**Geometry: mean CKA over the blocks' outputs**\n\n" .. cq.table { columns = columns(list), rows = rows_of(s, function(row, arm)
    local at, seen = {}, {}
    for _, c in ipairs(ways) do row[c.key] = cell(values(arm, way(c.key))) end
    for _, run in ipairs(arm.runs) do
      if not seen[run.cka_min_block] then seen[run.cka_min_block], at[#at + 1] = true, ("%d"):format(run.cka_min_block) end
    end
    table.sort(at)
    row.difference, row.lowest, row.at = difference(s, arm, "cka", 1, ".4f"), cell(values(arm, "cka_min")), table.concat(at, ", ")
  end), notes = { "On held-out documents of the domain, in groups of at most 512 tokens. Standardized: every dimension divided by its " ..
    "standard deviation in the teacher." } }:markdown()
end

--- What each rate gave on validation.
function pages.rates(s)
  local list, seen, rows = {}, {}, {}
  for _, arm in ipairs(s.arms) do
    if type(arm.tried) == "table" then
      local row = { arm = arm.name }
      for _, t in ipairs(arm.tried) do
        local key = ("%g"):format(t.lr)
        if not seen[key] then seen[key], list[#list + 1] = true, { key = key } end
        row[key] = ("%s%.1f (KL %.4f)"):format(t.lr == arm.lr and "> " or "", 100 * t.pass, t.kl)
      end
      rows[#rows + 1] = row
    end
  end
  return "**Rates: pass@1 on validation, %**\n\n" .. cq.table { columns = { head[1], unpack(list) }, rows = rows,
    notes = { "> chosen. Nothing else was chosen." } }:markdown()
end

--- Two arms on test at every rate, paired by seed: no choice of a rate stands between them.
function pages.every_rate(s)
  local a, b = unpack(s.every_rate or {})
  if not b then return "" end
  local by, rates, rows = {}, {}, {}
  for _, arm in ipairs { a, b } do
    for _, item in ipairs(arm.runs) do
      local key = ("%g"):format(item.lr)
      if not by[key] then by[key], rates[#rates + 1] = { { runs = {} }, { runs = {} } }, item.lr end
      table.insert(by[key][arm == a and 1 or 2].runs, item.run)
    end
  end
  table.sort(rates)
  for i, rate in ipairs(rates) do
    local first, second = unpack(by[("%g"):format(rate)])
    local pair = { by_name = { first = first } }
    second.from = "first"
    local row = { lr = ("%g"):format(rate), n = #second.runs, pass = difference(pair, second, "pass", 100, ".1f"),
      kl = difference(pair, second, "kl", 1, ".4f"), cka = difference(pair, second, "cka", 1, ".4f") }
    for k, arm in ipairs { first, second } do
      row["pass" .. k], row["kl" .. k] = cell(values(arm, "pass", 100)), cell(values(arm, "kl"))
      row["cka" .. k], row["lowest" .. k] = cell(values(arm, "cka")), cell(values(arm, "cka_min"))
    end
    rows[i] = row
  end
  local list = { { key = "lr", title = "rate" }, { key = "n" } }
  for _, c in ipairs { { "pass", "pass@1, %", "%.1f" }, { "kl", "KL", "%.4f" }, { "cka", "CKA", "%.4f" } } do
    list[#list + 1] = { key = c[1] .. 1, title = ("%s, %s"):format(c[2], a.name), format = c[3] }
    list[#list + 1] = { key = c[1] .. 2, title = b.name, format = c[3] }
    list[#list + 1] = { key = c[1], title = "difference" }
  end
  return ("**%s against %s at every rate, on test**\n\n"):format(b.name, a.name) .. cq.table { rows = rows, columns = list,
    notes = { "Whatever validation chose: differences are those of the term, not of a rate." } }:markdown()
end

-- Every run of a quantized arm as { x = 1 - CKA, y = points of accuracy lost to BF16 with the same seed }.
local function losses(s, arm, pick)
  local bf16, points = values(s.by_name.BF16, "pass", 100), {}
  for _, run in ipairs(arm.runs) do
    local cka = pick(run)
    if number(cka) and bf16[run.seed] then points[#points + 1] = { 1 - cka, bf16[run.seed] - 100 * run.pass } end
  end
  return points
end

local function correlation(points)
  local n, mx, my, xx, yy, xy = #points, 0, 0, 0, 0, 0
  for _, p in ipairs(points) do mx, my = mx + p[1] / n, my + p[2] / n end
  for _, p in ipairs(points) do
    xx, yy, xy = xx + (p[1] - mx) ^ 2, yy + (p[2] - my) ^ 2, xy + (p[1] - mx) * (p[2] - my)
  end
  return n > 2 and xx > 0 and yy > 0 and xy / math.sqrt(xx * yy) or nil
end

local function all_losses(s, pick, trained)
  local points = {}
  for _, arm in ipairs(s.arms) do
    local wanted = arm.from and (not trained or arm.lr and arm.name ~= "QAT")
    for _, p in ipairs(wanted and losses(s, arm, pick) or {}) do points[#points + 1] = p end
  end
  return points
end

--- The correlation of what CKA and what accuracy lost, over all quantized runs and over the distilled ones (QAT's lie far from
--- all others: with them it would be 1).
function pages.correlation(s)
  local rows = {}
  for _, item in ipairs { { "CKA", way "raw_unbiased" }, { "standardized CKA", way "standard_unbiased" },
    { "lowest block's CKA", function(run) return run.cka_min end }, { "KL", function(run) return 1 - run.kl end } } do
    local all, trained = all_losses(s, item[2]), all_losses(s, item[2], true)
    rows[#rows + 1] = { what = item[1], all = correlation(all), trained = correlation(trained), n = #all, n_trained = #trained }
  end
  return "**Correlation with the accuracy lost (Pearson), over runs**\n\n" .. cq.table { rows = rows, columns = { { key = "what",
    title = "loss in" }, { key = "all", title = "all quantized runs", format = "%.2f" }, { key = "n" },
    { key = "trained", title = "distilled runs", format = "%.2f" }, { key = "n_trained", title = "n" } } }:markdown()
end

--- The three pictures: { file, svg, words }. QAT lies so far from the others that it would hide what they differ in: it is left out.
function pages.pictures(s)
  local kl, cka, blocks, names = {}, {}, {}, {}
  for i = 1, #s.pattern do names[i] = ("%d %s"):format(i - 1, s.pattern:sub(i, i)) end
  for i, arm in ipairs(s.arms) do -- with one look in all pictures
    local dots, curve = {}, {}
    for j, run in ipairs(arm.runs) do dots[j] = { run.kl, 100 * run.pass } end
    for b = 1, #s.pattern do curve[b] = { b, cq.stats.summary(values(arm, function(run) return run.geometry.raw_unbiased[b] end)).mean } end
    if arm.name ~= "QAT" then kl[#kl + 1] = { name = arm.name, points = dots, look = i } end
    if arm.from and arm.name ~= "QAT" then
      cka[#cka + 1] = { name = arm.name, points = losses(s, arm, way "raw_unbiased"), look = i }
      blocks[#blocks + 1] = arm.full and { name = arm.name, points = curve, look = i } or nil
    end
  end
  local list = {
    { "accuracy_kl", { title = "Accuracy against KL to the teacher, a dot a run (QAT: off the scale)", x = "KL, nats a token",
      y = "pass@1, %", series = kl } },
    { "cka_blocks", { title = "CKA of every block, mean over seeds (without QAT)", x = "block", y = "CKA, unbiased", series = blocks,
      names = names, lines = true } },
    { "cka_accuracy", { title = "What CKA lost against what accuracy lost, a dot a run (without QAT)", x = "1 - mean CKA",
      y = "points of pass@1 below BF16", series = cka } },
  }
  for i, item in ipairs(list) do list[i] = { file = item[1], svg = pictures.svg(item[2]), words = item[2].title } end
  return list
end

local open, close = "<!-- results -->", "<!-- end of results -->"

--- The text of a file with what stands between its markers replaced; a missing file is nothing but markers.
function pages.between(path, content)
  local f = io.open(path, "rb")
  local text = f and f:read "*a" or open .. "\n" .. close .. "\n"
  if f then f:close() end
  local from, to = select(2, text:find(open, 1, true)), text:find(close, 1, true)
  cq.refuse(not (from and to and from < to) and ("%s: has no %s before %s, wanted both"):format(path, open, close) or nil)
  return text:sub(1, from) .. "\n" .. content .. text:sub(to)
end

return pages
