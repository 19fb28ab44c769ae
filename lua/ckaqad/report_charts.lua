-- report_charts.lua - charts of one run: what each shows, what it says in words, and the table of its numbers.
--
-- Curves are thinned to at most 400 points (means of neighbours) and heat maps to 100 columns before they go into the page.
-- Numbers are cut to five digits: a picture shows no more.
local json = require "ckaqad.json"
local page = require "ckaqad.report_page"

local charts = {}

local function known(x) return type(x) == "number" and x == x and math.abs(x) ~= math.huge end

local function short(x)
  if not known(x) then return json.null end
  return tonumber(("%.5g"):format(x))
end
charts.short = short

-- Bounds of at most `most` groups of n neighbours.
local function groups(n, most)
  local list, count = {}, math.min(n, most)
  for i = 1, count do list[i] = { math.floor((i - 1) * n / count) + 1, math.floor(i * n / count) } end
  return list
end

-- Mean of the known numbers of list[from..to] by `pick`; nil when there is none.
local function mean(list, from, to, pick)
  local sum, n = 0, 0
  for i = from, to do
    local v = pick(list[i])
    if known(v) then sum, n = sum + v, n + 1 end
  end
  return n > 0 and sum / n or nil
end

-- { x, y } of a curve over the steps of `history`, by `pick`; nil when nothing is known. A group stands at its last step, the first
-- one at its first, so that both ends are on their places.
function charts.curve(history, pick, most)
  local x, y, any = json.array {}, json.array {}, false
  for i, g in ipairs(groups(#history, most or 400)) do
    local v = mean(history, g[1], g[2], pick)
    any = any or v ~= nil
    x[i], y[i] = history[i == 1 and g[1] or g[2]].step, short(v)
  end
  return any and { x = x, y = y } or nil
end

local function field(key) return function(m) return m[key] end end
charts.field = field

-- The lowest CKA of a step's blocks.
function charts.lowest(m)
  local low
  for _, v in ipairs(type(m.cka_blocks) == "table" and m.cka_blocks or {}) do
    if known(v) and (not low or v < low) then low = v end
  end
  return low
end

function charts.rate(m)
  return known(m.tokens) and known(m.seconds) and m.seconds > 0 and m.tokens / m.seconds or nil
end

local function first_last(s)
  local from, to
  for i, v in ipairs(s.y) do
    if v ~= json.null then
      from = from or i
      to = i
    end
  end
  local function said(v) return (math.abs(v) >= 1e4 and "%.0f" or "%.4g"):format(v) end
  if from == to then return ("%s %s at step %d"):format(s.name, said(s.y[from]), s.x[from]) end
  return ("%s from %s at step %d to %s at step %d"):format(s.name, said(s.y[from]), s.x[from], said(s.y[to]), s.x[to])
end

-- Rows of a table of series: about 20 steps.
local function series_rows(series)
  local main, head, rows = series[1], { "step" }, {}
  for _, s in ipairs(series) do head[#head + 1] = { s.name, class = "num" } end
  for _, g in ipairs(groups(#main.x, 20)) do
    local row = { ("%d"):format(main.x[g[2]]) }
    for _, s in ipairs(series) do
      local v
      for i, x in ipairs(s.x) do
        if x <= main.x[g[2]] then v = s.y[i] end
      end
      row[#row + 1] = page.number(v, "%.5g")
    end
    rows[#rows + 1] = row
  end
  return head, rows
end

-- Curves over steps. `list`: { name, curve, color, points (measured at these steps only), exact (not smoothed) }.
local function lines(p, title, list, zero)
  local series, said = json.array {}, {}
  for _, item in ipairs(list) do
    local c = item[2]
    if c then
      local s = { name = item[1], x = c.x, y = c.y, color = item[3], points = item.points, exact = item.exact }
      series[#series + 1], said[#said + 1] = s, first_last(s)
    end
  end
  if #series == 0 then return end
  local head, rows = series_rows(series)
  p:figure({ kind = "lines", series = series, zero = zero }, {
    title = title, label = (table.concat(said, "; "):gsub("^%l", string.upper)), head = head, rows = rows,
  })
end

-- The curves of a run: `history` (metrics.jsonl), `evals` (evals.jsonl) and what it was trained on (report.lua's form).
function charts.curves(p, history, evals, form)
  local function of(pick) return charts.curve(history, pick) end
  local function held(key) return #evals > 0 and charts.curve(evals, field(key)) or nil end
  lines(p, "KL, nats a token", { { "training", of(field "kl"), 0 }, { "held out", held "kl", 1, points = true } })
  lines(p, "Cross-entropy, nats a token", { { "training", of(field "ce"), 0 } })
  lines(p, "Reward, mean over a step's answers", { { "training", of(field "reward"), 0 } })
  local mean_, lowest = { "mean", of(field "cka"), 0 }, { "lowest block", of(charts.lowest), 1 }
  local held_out = { "mean, held out", held "cka", 2, points = true }
  if form.measured == "CKA" then
    lines(p, "CKA", { mean_, lowest, held_out })
  else -- another likeness, on another scale
    lines(p, form.measured .. " between blocks", { mean_, lowest })
    lines(p, "CKA", { held_out })
  end
  local weighed = false
  for _, m in ipairs(history) do weighed = weighed or known(m.weight) and m.weight ~= 0 end
  if form.layer and weighed then
    lines(p, ("Weight of %s beside %s"):format(form.layer:match "^1 %- (.*)" or form.layer, form.logits),
      { { "weight", of(field "weight"), 0 } }, true)
  end
  lines(p, "Learning rate", { { "learning rate", of(field "lr"), 0, exact = true } }, true)
  lines(p, "Gradient norm", { { "gradient norm", of(field "grad_norm"), 0 } }, true)
  lines(p, "Tokens a second", { { "tokens a second", of(charts.rate), 0 } }, true)
end

local function block_names(n, pattern)
  local names = json.array {}
  for i = 0, n - 1 do names[i + 1] = ("%d%s"):format(i, pattern and pattern:sub(i + 1, i + 1) or "") end
  return names
end

local function n_blocks(history)
  for _, m in ipairs(history) do
    if type(m.cka_blocks) == "table" and #m.cka_blocks > 0 then return #m.cka_blocks end
  end
  return 0
end

-- CKA, or what stands for it, of every block (rows) over the steps (columns).
function charts.steps_map(p, history, pattern, form)
  local n, columns, values, rows = n_blocks(history), groups(#history, 100), json.array {}, {}
  if n == 0 or #history < 2 then return end
  local names, steps, low, low_block, low_step = block_names(n, pattern), json.array {}, math.huge, nil, nil
  for k, g in ipairs(columns) do steps[k] = ("%d"):format(history[g[2]].step) end
  for b = 1, n do
    local row, least = json.array {}, math.huge
    for k, g in ipairs(columns) do
      local v = mean(history, g[1], g[2], function(m) return type(m.cka_blocks) == "table" and m.cka_blocks[b] end)
      row[k] = short(v)
      least = math.min(least, v or math.huge)
      if v and v < low then low, low_block, low_step = v, names[b], steps[k] end
    end
    values[b] = row
    rows[b] = { names[b], page.number(row[1]), page.number(row[#row]), page.number(least) }
  end
  if not low_block then return end
  p:figure({
    kind = "heat", rows = names, cols = steps, values = values, rowname = "block", colname = "step", what = form.measured, digits = 4,
    color = 1, invert = true,
  }, {
    title = form.measured .. " of every block in training", wide = true,
    label = ("lowest %.4f in block %s at step %s"):format(low, low_block, low_step),
    caption = ("Stronger color is further from BF16; lowest %.4f in block %s at step %s."):format(low, low_block, low_step),
    head = { "block", { "first", class = "num" }, { "last", class = "num" }, { "lowest", class = "num" } }, rows = rows,
  })
end

local function map_rows(map, names)
  local rows, stray = {}, 0
  for t, row in ipairs(map) do
    local best
    for s, v in ipairs(row) do
      if known(v) and (not best or v > row[best]) then best = s end
    end
    if best and best ~= t then stray = stray + 1 end
    rows[t] = { names[t], page.number(row[t]), best and names[best] or "-", page.number(best and row[best]) }
  end
  return rows, stray
end

-- Teacher's blocks (rows) against the student's (columns), before and after on one scale.
function charts.block_map(p, results, pattern)
  local low, high = math.huge, -math.huge
  for _, item in ipairs(results) do
    for _, row in ipairs(item[2].cka_map or {}) do
      for _, v in ipairs(row) do
        if known(v) then low, high = math.min(low, v), math.max(high, v) end
      end
    end
  end
  if low > high then return end
  for _, item in ipairs(results) do
    local map = item[2].cka_map
    if map and #map > 0 then
      local names, values = block_names(#map, pattern), json.array {}
      for t, row in ipairs(map) do
        values[t] = json.array {}
        for s, v in ipairs(row) do values[t][s] = short(v) end
      end
      local rows, stray = map_rows(map, names)
      local said = stray == 0 and "every teacher block is most like the student's block of the same number" or
        ("%d of %d teacher blocks are more like another block of the student than like their own"):format(stray, #map)
      p:figure({
        kind = "heat", rows = names, cols = names, values = values, rowname = "teacher block", colname = "student block", what = "CKA",
        digits = 4, color = 0, square = true, range = { low, high },
      }, {
        title = "Teacher and student, block by block: " .. item[1], label = said,
        caption = ("Unbiased CKA on held-out rows, stronger color is more alike; %s."):format(said),
        head = { "teacher block", { "own", class = "num" }, "most like", { "CKA", class = "num" } }, rows = rows,
      })
    end
  end
end

-- One value per category and result: { name, y }.
local function compared(p, o)
  local series, head, rows = json.array {}, { o.name }, {}
  for i, s in ipairs(o.series) do
    series[i] = { name = s.name, color = s.color, y = json.array(s.y) }
    head[#head + 1] = { s.name, class = "num" }
  end
  for k, cat in ipairs(o.cats) do
    rows[k] = { cat }
    for i, s in ipairs(series) do
      rows[k][i + 1] = page.number(s.y[k], "%.5g")
      s.y[k] = short(s.y[k])
    end
  end
  p:figure({ kind = o.kind, cats = json.array(o.cats), series = series, name = o.name, unit = o.unit, digits = o.digits }, {
    title = o.title, wide = o.wide, label = o.label, caption = o.caption, head = head, rows = rows,
  })
end

-- The colors of PTQ, of PTQ with searched scales and of what was trained, the same in every chart.
local function tone(item) return item[1] == "PTQ" and 1 or item[1]:find "^PTQ" and 2 or 0 end

local function extreme(cats, y, better)
  local at
  for i, v in ipairs(y) do
    if known(v) and (not at or better(v, y[at])) then at = i end
  end
  return at and cats[at], at and y[at]
end
local function less(a, b) return a < b end
local function more(a, b) return a > b end

function charts.by_block(p, results, pattern)
  local first = results[1] and results[1][2].cka_blocks
  if type(first) ~= "table" or #first == 0 then return end
  local cats, series, said = block_names(#first, pattern), {}, {}
  for i, item in ipairs(results) do
    series[i] = { name = item[1], color = tone(item), y = { unpack(item[2].cka_blocks) } }
    local cat, v = extreme(cats, series[i].y, less)
    said[i] = cat and ("%s lowest %.4f in block %s"):format(item[1], v, cat) or item[1] .. " has no CKA"
  end
  compared(p, { kind = "dots", title = "CKA of every block, held out", name = "block", cats = cats, series = series, wide = true,
    digits = 4, label = table.concat(said, ", ") })
end

-- Signal to noise of the 4-bit weights in every block.
function charts.sqnr(p, results, pattern)
  local series, cats, said = {}, nil, {}
  for _, item in ipairs(results) do
    local list = item[2].sqnr
    if type(list) == "table" and #list > 0 then
      local y, names = {}, {}
      for i, b in ipairs(list) do
        names[i] = ("%d%s"):format(b.block, pattern and pattern:sub(b.block + 1, b.block + 1) or "")
        y[i] = b.db
      end
      cats = names
      series[#series + 1] = { name = item[1], color = tone(item), y = y }
      local cat, v = extreme(names, y, less)
      said[#said + 1] = cat and ("%s lowest %.2f dB in block %s"):format(item[1], v, cat) or item[1]
    end
  end
  if not cats then return end
  compared(p, { kind = "dots", title = "What 4 bits keep of the weights, dB", name = "block", cats = cats, series = series, unit = " dB",
    digits = 2, wide = #cats > 24, label = "Signal to quantization noise: " .. table.concat(said, ", ") })
end

function charts.positions(p, results)
  local series, cats, said = {}, nil, {}
  for _, item in ipairs(results) do
    local list = item[2].kl_positions
    if type(list) == "table" and #list > 0 then
      local y, names = {}, {}
      for i, bin in ipairs(list) do
        names[i] = bin.first == bin.last and ("%d"):format(bin.first) or ("%d-%d"):format(bin.first, bin.last)
        y[i] = bin.kl
      end
      cats = names
      series[#series + 1] = { name = item[1], color = tone(item), y = y }
      local cat, v = extreme(names, y, more)
      said[#said + 1] = cat and ("%s highest %.4g at %s"):format(item[1], v, cat) or item[1]
    end
  end
  if not cats then return end
  compared(p, { kind = "bars", title = "KL by position in the document, held out", name = "position", cats = cats, series = series,
    label = table.concat(said, ", ") })
end

-- Shares of a block's 16-weight groups by log2 of their E4M3 scale; empty bins at both ends are left out.
function charts.scales(p, results, pattern)
  local item = results[#results]
  local h = item and item[2].scales
  if type(h) ~= "table" or type(h.blocks) ~= "table" or #h.blocks == 0 then return end
  local from, to = math.huge, 0
  for _, b in ipairs(h.blocks) do
    for i, n in ipairs(b.counts) do
      if n > 0 then from, to = math.min(from, i), math.max(to, i) end
    end
  end
  if to == 0 then return end
  local names, bins, values, rows = json.array {}, json.array {}, json.array {}, {}
  for i = from, to do bins[#bins + 1] = ("%g"):format(h.low + (i - 1) * h.width) end
  for k, b in ipairs(h.blocks) do
    local total, row, sum, peak = 0, json.array {}, 0, from
    for _, n in ipairs(b.counts) do total = total + n end
    for i = from, to do
      row[#row + 1] = short(100 * b.counts[i] / math.max(1, total))
      sum = sum + b.counts[i] * (h.low + (i - 0.5) * h.width)
      if b.counts[i] > b.counts[peak] then peak = i end
    end
    names[k] = ("%d%s"):format(b.block, pattern and pattern:sub(b.block + 1, b.block + 1) or "")
    values[k] = row
    rows[k] = { names[k], page.number(total, "%d"), page.number(sum / math.max(1, total), "%.2f"),
      ("%g to %g"):format(h.low + (peak - 1) * h.width, h.low + peak * h.width) }
  end
  local said = ("log2 of the scales lies between %g and %g"):format(h.low + (from - 1) * h.width, h.low + to * h.width)
  p:figure({
    kind = "heat", rows = names, cols = bins, values = values, rowname = "block", colname = "log2 of the scale", what = "share",
    unit = " %", color = 4, digits = 1,
  }, {
    title = "Block scales of the weights, " .. item[1], label = said,
    caption = "Share of each block's groups of 16 weights by the E4M3 scale they got; " .. said .. " (448, the largest, is 8.8).",
    head = { "block", { "groups of 16", class = "num" }, { "mean log2", class = "num" }, "fullest bin" }, rows = rows,
  })
end

return charts
