-- report_sweep.lua - the page of a sweep: a dot a run over the settings, settings in a table, parallel coordinates, curves of all.
--
-- A setting is what a point changes but the seed; runs of one setting share a color. A best setting is named only when table.lua
-- marks it, and nothing is marked while the runs differ in something nobody asked for. A setting that successive halving dropped has
-- no result on purpose: it is named below the table, and no comparison is called uneven for it.
local json = require "ckaqad.json"
local charts = require "ckaqad.report_charts"
local page = require "ckaqad.report_page"
local report = require "ckaqad.report"
local stats = require "ckaqad.stats"
local table_ = require "ckaqad.table"
local text = require "ckaqad.text"
local errors = require "ckaqad.errors"

local sweep = {}

local function finite(x) return type(x) == "number" and x == x and math.abs(x) ~= math.huge end

-- Names of the options that points change: the axes first, then the others in order of their names.
local function factors_of(plan)
  local list, seen, others = {}, { seed = true, out = true }, {}
  for _, axis in ipairs(type(plan.axes) == "table" and plan.axes or {}) do
    if not seen[axis.name] then list[#list + 1], seen[axis.name] = axis.name, true end
  end
  for _, p in ipairs(plan.points) do
    for key in pairs(type(p.options) == "table" and p.options or {}) do
      if not seen[key] then others[#others + 1], seen[key] = key, true end
    end
  end
  table.sort(others)
  for _, key in ipairs(others) do list[#list + 1] = key end
  return list
end

local function value_of(point, key)
  local v = type(point.plan.options) == "table" and point.plan.options[key]
  if v == nil or v == false then v = point.run.options[key] end
  return v
end

-- Attempts by hash: { n, last }.
local function attempts_of(path)
  local list = {}
  for _, a in ipairs(report.read_lines(path .. "/attempts.jsonl")) do
    if type(a.hash) == "string" then
      local e = list[a.hash] or { n = 0 }
      e.n, e.last = e.n + 1, a
      list[a.hash] = e
    end
  end
  return list
end

local function status_of(point)
  if point.run.finished then return "finished" end
  if finite(point.plan.dropped) then return ("dropped at step %d"):format(point.plan.dropped) end
  local a = point.attempts and point.attempts.last
  if a and finite(a.exit) and a.exit ~= 0 and not a.stopped then
    return ("failed, exit %d%s"):format(a.exit, type(a.message) == "string" and a.message ~= "" and ": " .. a.message or "")
  end
  local last = point.run.metrics[#point.run.metrics]
  return last and ("stopped or running, step %d"):format(last.step) or "not started"
end

-- The numbers of a finished point, and the result that it started from.
local function measure(point)
  local _, before, after = report.results(point.run)
  local r = after or before
  if not (point.run.finished and r) then return nil end
  return {
    kl = r.kl, perplexity = r.perplexity, top1 = r.top1, cka = r.cka, cka_min = r.cka_min,
    recovery = before and after and stats.recovery(before.kl, after.kl, 0) or nil, before = after and before,
  }
end

-- The sweep's points with their runs, and its settings in the plan's order.
local function load(path)
  local plan = report.read_json(path .. "/sweep.json")
  if type(plan) ~= "table" or type(plan.points) ~= "table" then
    errors.raise(errors.DATA, "report: %s/sweep.json is missing or holds no points, wanted the folder of a sweep", path)
  end
  local self = { path = path, name = path:match("([^/]+)$") or path, plan = plan, factors = factors_of(plan), points = {}, settings = {} }
  local attempts, by_name = attempts_of(path), {}
  for i, p in ipairs(plan.points) do
    local point = { plan = p, hash = tostring(p.hash), run = report.load(path .. "/points/" .. tostring(p.hash)) }
    point.attempts = attempts[point.hash]
    point.numbers = measure(point)
    local name = tostring(p.name or p.hash)
    local s = by_name[name]
    if not s then
      s = { name = name, color = #self.settings, points = {} }
      by_name[name] = s
      self.settings[#self.settings + 1] = s
    end
    point.setting, s.points[#s.points + 1] = s, point
    self.points[i] = point
  end
  for _, s in ipairs(self.settings) do
    for _, point in ipairs(s.points) do
      local at = not point.run.finished and finite(point.plan.dropped) and point.plan.dropped
      s.dropped = s.dropped ~= false and at
    end
  end
  return self
end

-- What makes the comparison unfair, in sentences.
local function flags_of(self)
  local flags, runs, seeds = {}, {}, {}
  for _, point in ipairs(self.points) do
    if point.run.finished then runs[#runs + 1] = point.run.run end
  end
  local ok, sweep_table = pcall(require, "ckaqad.sweep_table") -- needs the C library, which a page alone does not
  for _, d in ipairs(ok and #runs > 1 and sweep_table.compare(runs, self.factors) or {}) do
    local values = table.concat(d.values, " / ")
    flags[#flags + 1] = ("The runs differ in %s too: %s."):format(d.key, #values > 120 and #d.values .. " values" or values)
  end
  local confounded = #flags > 0
  for _, s in ipairs(self.settings) do
    local list = {}
    for _, point in ipairs(s.points) do
      if point.numbers then list[#list + 1] = tostring(point.plan.seed) end
    end
    table.sort(list)
    if not s.dropped then seeds[#seeds + 1] = { s.name, #list > 0 and table.concat(list, ", ") or "none" } end
  end
  for i = 2, #seeds do
    if seeds[i][2] ~= seeds[1][2] then
      flags[#flags + 1] = ("Not every setting has finished with the same seeds (%s: %s; %s: %s): means are over different runs."):format(
        seeds[1][1], seeds[1][2], seeds[i][1], seeds[i][2])
      break
    end
  end
  return flags, confounded
end

local columns = {
  { key = "kl", title = "KL", format = "%.5f", better = "low" },
  { key = "recovery", title = "recovered %", format = "%.1f", better = "high" },
  { key = "perplexity", title = "perplexity", format = "%.4f", better = "low" },
  { key = "top1", title = "top-1", format = "%.4f", better = "high" },
  { key = "cka", title = "mean CKA", format = "%.4f", better = "high" },
  { key = "cka_min", title = "lowest CKA", format = "%.4f", better = "high" },
}

-- Cells of a row over { [seed] = numbers }.
local function fill(row, by_seed)
  for _, c in ipairs(columns) do
    local values = {}
    for seed, numbers in pairs(by_seed) do
      if finite(numbers[c.key]) then values[seed] = numbers[c.key] end
    end
    if next(values) then row[c.key] = table_.cell(values) end
  end
  row.n = row.kl and row.kl.n or 0
  return row
end

-- The row of what every setting started from; nil when settings quantize differently, so that there is no such thing.
local function ptq_row(self)
  local by_seed = {}
  for i, point in ipairs(self.points) do
    local before = point.numbers and point.numbers.before
    local seed = tonumber(point.plan.seed) or i
    if before and by_seed[seed] and by_seed[seed].kl ~= before.kl then return nil end
    by_seed[seed] = by_seed[seed] or before
  end
  if not next(by_seed) then return nil end
  local row = fill({ setting = "PTQ, untrained", reference = true }, by_seed)
  for _, c in ipairs(columns) do -- the same for every seed, where those calibrate on the same documents: no spread to show
    if row[c.key] and row[c.key].sd == 0 then row[c.key] = { value = row[c.key].mean } end
  end
  return row
end

-- Fills in what the KL of every setting differs from the first one's that has any, in pairs of the same seed; that setting, and whether
-- there are too few pairs to lean on.
local function differences(self)
  local first, few
  for _, s in ipairs(self.settings) do
    local kl = s.row.kl
    if kl and first then
      local p = stats.paired(kl.values, first.row.kl.values)
      s.row.difference, few = table_.difference(p), few or p.few
    end
    first = first or kl and s
  end
  return first, few
end

-- The table of settings: mean and standard deviation over the seeds, differences in pairs of the same seed.
local function settings_table(self, confounded)
  local all, rows = { { key = "setting", title = "setting" }, { key = "n", title = "n" } }, {}
  for i, c in ipairs(columns) do all[i + 2] = { key = c.key, title = c.title, format = c.format, better = c.better } end
  local steps, dropped = {}, {}
  for _, s in ipairs(self.settings) do
    local by_seed = {}
    for k, point in ipairs(s.points) do by_seed[tonumber(point.plan.seed) or k] = point.numbers end
    s.row = fill({ setting = s.name }, by_seed)
    if s.dropped then
      if not dropped[s.dropped] then steps[#steps + 1], dropped[s.dropped] = s.dropped, {} end
      table.insert(dropped[s.dropped], s.name)
    else
      rows[#rows + 1] = s.row
    end
  end
  local notes = {
    "Mean ± standard deviation over n seeds. KL to BF16 in nats a token; recovered: what training won back of PTQ's KL, below zero " ..
    "where it lost more; top-1: agreement with BF16.",
  }
  local first, few = differences(self)
  if first and #self.settings > 1 then
    table.insert(all, 4, { key = "difference", title = "KL - KL of " .. first.name })
    notes[2] = ("Differences are over pairs of the same seed, with their 95 %% bootstrap interval; ? where it includes zero%s."):format(
      few and (". With fewer than %d pairs an interval is a hint, no proof"):format(stats.FEW) or "")
  end
  table.sort(steps)
  for _, step in ipairs(steps) do
    notes[#notes + 1] = ("Dropped at step %d, without a result: %s."):format(step, table.concat(dropped[step], "; "))
  end
  self.ptq = ptq_row(self)
  table.insert(rows, 1, self.ptq)
  local t = table_.new { columns = all, rows = rows, notes = notes }
  if not confounded then t:mark() end
  return t
end

local function verdict(self, confounded)
  local finished, failed, dropped, best, rivals = 0, 0, 0, nil, 0
  for _, point in ipairs(self.points) do
    local status = status_of(point)
    if point.run.finished then finished = finished + 1
    elseif status:match "^failed" then failed = failed + 1
    elseif status:match "^dropped" then dropped = dropped + 1 end
  end
  for _, s in ipairs(self.settings) do
    local kl = s.row.kl
    rivals = rivals + (kl and 1 or 0)
    if kl and (not best or kl.mean < best.row.kl.mean) then best = s end
  end
  local said = ("%d settings, %d of %d runs finished%s%s."):format(#self.settings, finished, #self.points,
    dropped > 0 and (", %d dropped on the way"):format(dropped) or "", failed > 0 and (", %d failed"):format(failed) or "")
  if not best or #self.settings < 2 then return said end
  local kl = best.row.kl
  said = ("%s Lowest KL: %s, %.5f%s (n = %d)"):format(said, best.name, kl.mean, kl.sd and (" ± %.5f"):format(kl.sd) or "", kl.n)
  local recovery = best.row.recovery
  if recovery and recovery.mean < 0 then said = ("%s, which is still worse than PTQ (recovered %.1f %%)"):format(said, recovery.mean) end
  if confounded then return said .. ", but the runs differ in more than was asked for." end
  local others = rivals == #self.settings and "every other setting" or
    rivals == 2 and "the one other setting that finished" or ("the %d other settings that finished"):format(rivals - 1)
  if rivals == 1 then return said .. "; no other setting finished, so nothing is compared." end
  if kl.mark then return ("%s; the paired interval against %s excludes zero."):format(said, others) end
  if kl.n == 1 then return said .. "; one seed has no interval, so the order may be chance." end
  return ("%s; not clear of %s, so more seeds may change the order."):format(said, others)
end

local function runs_table(self)
  local head, rows = { "run" }, {}
  for _, key in ipairs(self.factors) do head[#head + 1] = key end
  for _, name in ipairs { "seed", "status", "KL", "recovered %", "top-1", "mean CKA", "lowest CKA", "steps", "time", "attempts" } do
    head[#head + 1] = name ~= "status" and { name, class = "num" } or name
  end
  for i, point in ipairs(self.points) do
    local r, n, s = point.run, point.numbers or {}, point.run.summary or {}
    local short = point.hash:sub(1, 8)
    local link = ('<a href="points/%s/report.html">%s</a>'):format(page.escape(point.hash), page.escape(short))
    local row = { r.run.options and { html = link } or short }
    for _, key in ipairs(self.factors) do row[#row + 1] = { page.value(value_of(point, key)), class = "num" } end
    row[#row + 1] = { page.value(point.plan.seed), class = "num" }
    row[#row + 1] = { status_of(point), class = "wrap" }
    row[#row + 1] = page.number(n.kl, "%.5f")
    row[#row + 1] = page.number(n.recovery, "%.1f")
    row[#row + 1], row[#row + 2], row[#row + 3] = page.number(n.top1), page.number(n.cka), page.number(n.cka_min)
    row[#row + 1] = page.number(#r.metrics, "%d")
    row[#row + 1] = { finite(s.seconds) and text.duration(s.seconds) or "-", class = "num" }
    row[#row + 1] = page.number(point.attempts and point.attempts.n or 0, "%d")
    rows[i] = row
  end
  for i, key in ipairs(self.factors) do head[i + 1] = { key, class = "num" } end
  return page.table(head, rows, { all = true })
end

-- "lr=1e-4, seed 2"
local function run_name(point)
  return point.plan.seed ~= nil and ("%s, seed %s"):format(point.setting.name, page.value(point.plan.seed)) or point.setting.name
end

-- Curves of all runs; `of_cka`: of those whose metrics hold CKA and not another likeness of blocks.
local function curves(p, self, title, pick, options)
  local o, series, rows, blocks, several = options or {}, json.array {}, {}, nil, false
  for _, point in ipairs(self.points) do
    local c = not (o.of_cka and point.run.form.measured ~= "CKA") and charts.curve(point.run.metrics, pick, 160)
    if c then
      local cka = page.value(value_of(point, "cka"))
      blocks, several = blocks or cka, several or blocks ~= nil and blocks ~= cka
      series[#series + 1] = { name = run_name(point), group = point.setting.name, x = c.x, y = c.y, color = point.setting.color,
        dash = point.setting.color >= 8 or nil }
      rows[#rows + 1] = { run_name(point), page.number(c.y[1], "%.5g"), page.number(c.y[#c.y], "%.5g"), page.number(c.x[#c.x], "%d") }
    end
  end
  if #series == 0 then return end
  p:figure({ kind = "lines", series = series, zero = o.zero }, {
    title = title, label = ("%d runs, first and last values in the table below"):format(#series),
    caption = ("%d runs%s.%s"):format(#series, #self.points > #self.settings and
      "; those of one setting share a color, and their values stand side by side, one a seed" or ", one a setting", o.of_cka and several and
      " Each setting looks at the blocks of its own cka, so their curves are no comparison: the table's CKA is of all blocks." or ""),
    head = { "run", { "first", class = "num" }, { "last", class = "num" }, { "last step", class = "num" } }, rows = rows,
  })
end

-- A dot a seed and setting of one measure, with the means; for a person the first answer of a sweep.
local function dots(p, self, column)
  local rows, head, lines, seeds, n = json.array {}, { "setting", { "mean", class = "num" }, { "±", class = "num" } }, {}, json.array {}, 0
  local at, low, high = {}, nil, nil
  for _, s in ipairs(self.settings) do
    for seed in pairs(s.row[column.key] and s.row[column.key].values or {}) do
      if not at[seed] then at[seed], seeds[#seeds + 1] = true, seed end
    end
  end
  table.sort(seeds)
  for i, seed in ipairs(seeds) do head[i + 3] = { "seed " .. page.value(seed), class = "num" } end
  for _, s in ipairs(self.settings) do
    local cell = s.row[column.key]
    if cell then
      local row = { name = s.name, color = s.color, mean = charts.short(cell.mean), sd = charts.short(cell.sd), y = json.array {} }
      local line = { s.name, page.number(cell.mean, column.format), page.number(cell.sd, column.format) }
      for i, seed in ipairs(seeds) do
        row.y[i], line[i + 3] = charts.short(cell.values[seed]), page.number(cell.values[seed], column.format)
      end
      rows[#rows + 1], lines[#lines + 1], n = row, line, n + cell.n
      if not low or cell.mean < low.row[column.key].mean then low = s end
      if not high or cell.mean > high.row[column.key].mean then high = s end
    end
  end
  if #rows < 2 then return end
  local function said(s) return ("%s " .. column.format):format(s.name, s.row[column.key].mean) end
  local ptq = self.ptq and self.ptq[column.key]
  ptq = ptq and (ptq.value or ptq.mean)
  p:figure({ kind = "strip", rows = rows, seeds = seeds, name = column.title, digits = tonumber(column.format:match "%d"),
    line = ptq and { name = "PTQ", x = charts.short(ptq) } or nil }, {
    title = column.title:gsub("^%l", string.upper) .. " of every run, held out",
    label = ("%d runs of %d settings; lowest mean %s, highest %s%s"):format(n, #rows, said(low), said(high),
      ptq and (", PTQ " .. column.format):format(ptq) or ""),
    caption = ("A dot a run, a bar at each mean%s%s."):format(ptq and ("; dashed: PTQ, " .. column.format):format(ptq) or "",
      #seeds > 1 and "; the cursor joins the runs of one seed, which had the same documents" or ""),
    head = head, rows = lines,
  })
end

local function parallel(p, self)
  local axes, lines = json.array {}, json.array {}
  for i, key in ipairs(self.factors) do axes[i] = { name = key } end
  local shown = { { "kl", "KL" }, { "perplexity", "perplexity" }, { "top1", "top-1" }, { "cka", "mean CKA" }, { "cka_min", "lowest CKA" } }
  for _, item in ipairs(shown) do axes[#axes + 1] = { name = item[2] } end
  for _, point in ipairs(self.points) do
    if point.numbers then
      local v = json.array {}
      for _, key in ipairs(self.factors) do
        local x = value_of(point, key)
        v[#v + 1] = type(x) == "number" and x or page.value(x)
      end
      for _, item in ipairs(shown) do v[#v + 1] = charts.short(point.numbers[item[1]]) end
      lines[#lines + 1] = { name = run_name(point), color = point.setting.color, v = v }
    end
  end
  if #lines < 2 then return end
  p:figure({ kind = "parallel", axes = axes, lines = lines }, {
    title = "Options and results, one line a run", wide = true,
    label = ("%d finished runs; their numbers are in the table of runs"):format(#lines),
    caption = "One line a run, one axis an option or a result; runs of one setting share a color.",
  })
end

-- The page of the sweep in folder `path`.
function sweep.html(path)
  local self = load((path:gsub("(.)/+$", "%1")))
  local flags, confounded = flags_of(self)
  local t = settings_table(self, confounded)
  local p = page.new(self.name)
  p:add("<h1>%s</h1>", page.escape(self.name))
  local factors = #self.factors > 0 and table.concat(self.factors, ", ") or "nothing"
  local version = tostring(self.plan.version or "?"):match("^%S*")
  p:paragraph(("sweep of %s over %s · ckaqad %s"):format(tostring(self.plan.recipe), factors, version), "dim")
  p:paragraph(verdict(self, confounded), "verdict")
  if #flags > 0 then
    p:add('<div class="flags"><p class="warn">%s</p><ul>', confounded and "Confounded comparison" or "Uneven comparison")
    for _, flag in ipairs(flags) do p:add("<li>%s</li>", page.escape(flag)) end
    p:add "</ul></div>"
  end
  p:heading "Settings, held-out documents"
  p:add '<div class="grid2">'
  dots(p, self, columns[1])
  dots(p, self, columns[5])
  p:add "</div>"
  p:add('<div class="scroll all settings">%s</div>', t:html())
  p:add '<div class="grid2 apart">'
  parallel(p, self)
  p:add "</div>"
  p:heading "Runs"
  p:add("%s", runs_table(self))
  p:heading "Training"
  p:slider()
  p:add '<div class="grid2">'
  curves(p, self, "KL, nats a token", charts.field "kl")
  curves(p, self, "Cross-entropy, nats a token", charts.field "ce")
  curves(p, self, "Mean CKA", charts.field "cka", { of_cka = true })
  curves(p, self, "CKA of the lowest block", charts.lowest, { of_cka = true })
  curves(p, self, "Gradient norm", charts.field "grad_norm", { zero = true })
  p:add "</div>"
  local base = {}
  for _, key in ipairs(json.keys(type(self.plan.base) == "table" and self.plan.base or {})) do
    base[#base + 1] = { "--" .. key, page.value(self.plan.base[key]) }
  end
  if #base > 0 then
    p:heading "Options of every run"
    p:list(base, true)
  end
  return p:html()
end

return sweep
