-- report.lua - report.html: one file, no network, SVG written by hand, light and dark.
local json = require "ckaqad.json"
local screen = require "ckaqad.screen"
local text = require "ckaqad.text"

local report = {}

local function escape(s)
  return (tostring(s):gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end

local style = [[
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#66707c;--line:#dde2e8;--a:#1f6feb;--b:#d1570a;--warn:#b42318}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e8ed;--dim:#939daa;--line:#2d333b;--a:#79b0ff;--b:#ffa45c;--warn:#ff8a7a}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:2rem 1.5rem 3rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}h1{font-size:1.35rem;margin:0}h2{font-size:1rem;margin:2rem 0 .5rem}p{margin:.25rem 0}
.dim{color:var(--dim)}.warn{color:var(--warn);font-weight:600}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));
gap:0 1.5rem}figure{margin:0}svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
.grid{stroke:var(--line)}.a{stroke:var(--a)}.b{stroke:var(--b)}.fa{fill:var(--a)}.fb{fill:var(--b)}.l{fill:none;stroke-width:1.8;
stroke-linejoin:round}.thin{stroke-width:1;opacity:.4}svg text.fa{fill:var(--a)}svg text.fb{fill:var(--b)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem 1.1rem .25rem 0;text-align:right;
border-bottom:1px solid var(--line);font-weight:400}th{color:var(--dim)}td:first-child,th:first-child{text-align:left}
tr.last td{font-weight:600}.scroll{overflow-x:auto}dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1.2rem;margin:0}
@media(min-width:44rem){.wide{grid-template-columns:max-content 1fr max-content 1fr}}dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
]]

-- Round numbers that span [low, high] in about `n` steps.
function report.ticks(low, high, n)
  if high <= low then high = low + 1 end
  local raw = (high - low) / n
  local unit = 10 ^ math.floor(math.log10(raw))
  local step = unit
  for _, k in ipairs { 1, 2, 2.5, 5, 10 } do
    step = k * unit
    if step >= raw * 0.999 then break end
  end
  local list, first = {}, math.ceil(low / step - 1e-9)
  for i = first, math.floor(high / step + 1e-9) do list[#list + 1] = i * step + 0 end -- + 0: no tick reads -0
  return list, step
end

-- Digits after the point that tell ticks `step` apart.
local function decimals(step)
  for n = 0, 8 do
    local scaled = step * 10 ^ n
    if math.abs(scaled - math.floor(scaled + 0.5)) < 1e-6 then return n end
  end
  return 8
end

local width, height, left, right, top, bottom = 460, 230, 58, 12, 26, 34

-- An SVG frame: axes with ticks, and functions from values to places.
local function frame(o)
  local x0, x1, y0, y1 = o.x[1], o.x[2], o.y[1], o.y[2]
  local w = o.width or width
  if x1 <= x0 then x1 = x0 + 1 end
  if y1 <= y0 then y0, y1 = y0 - math.abs(y0) * 0.01 - 1e-9, y1 + math.abs(y1) * 0.01 + 1e-9 end
  local function px(x) return left + (x - x0) / (x1 - x0) * (w - left - right) end
  local function py(y) return top + (y1 - y) / (y1 - y0) * (height - top - bottom) end
  local out = {}
  local function add(format, ...) out[#out + 1] = format:format(...) end
  add('<svg viewBox="0 0 %d %d" role="img" aria-label="%s"><title>%s</title>', w, height, escape(o.alt), escape(o.alt))
  local ticks, step = report.ticks(y0, y1, 4)
  for _, y in ipairs(ticks) do
    add('<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>', left, w - right, py(y), py(y))
    add('<text x="%d" y="%.1f" text-anchor="end">%.' .. decimals(step) .. 'f</text>', left - 7, py(y) + 4, y)
  end
  for _, x in ipairs(o.xticks or report.ticks(x0, x1, 6)) do
    if x == math.floor(x) then
      local label = o.label and o.label(x) or ("%d"):format(x)
      add('<text x="%.1f" y="%d" text-anchor="middle">%s</text>', px(x), height - bottom + 17, escape(label))
    end
  end
  add('<text x="%d" y="%d" text-anchor="end">%s</text>', w - right, height - 3, escape(o.xname))
  return out, add, px, py
end

local function extent(lists)
  local low, high = math.huge, -math.huge
  for _, list in ipairs(lists) do
    for _, v in ipairs(list) do
      if v[2] == v[2] and math.abs(v[2]) < math.huge then low, high = math.min(low, v[2]), math.max(high, v[2]) end
    end
  end
  if low > high then return 0, 1 end
  local pad = (high - low) * 0.06
  return low - pad, high + pad
end

-- Mean over a window of about an eighth of the curve around each point, narrower at the ends so that nothing lags.
local function smooth(points)
  local out, half = {}, math.max(1, math.floor(#points / 16))
  for i, p in ipairs(points) do
    local w, sum = math.min(half, i - 1, #points - i), 0
    for j = i - w, i + w do sum = sum + points[j][2] end
    out[i] = { p[1], sum / (2 * w + 1) }
  end
  return out
end

local function path(points, px, py)
  local parts = {}
  for i, p in ipairs(points) do parts[i] = ("%s%.1f %.1f"):format(i == 1 and "M" or "L", px(p[1]), py(p[2])) end
  return table.concat(parts)
end

-- Curves over steps: each series as it is (thin) and smoothed.
local function curves(title, series, alt, floor)
  local lists, first, last = {}, math.huge, 1
  for i, s in ipairs(series) do
    lists[i] = s.points
    if s.points[1] then first, last = math.min(first, s.points[1][1]), math.max(last, s.points[#s.points][1]) end
  end
  if first == math.huge then return "" end
  local low, high = extent(lists)
  if floor and low > floor and low - floor < 0.5 * (high - low) or floor and low < floor then low = floor end
  local out, add, px, py = frame { x = { first, last }, y = { low, high }, alt = alt, xname = "step" }
  local at = left
  for _, s in ipairs(series) do
    add('<path class="l %s thin" d="%s"/>', s.class, path(s.points, px, py))
    add('<path class="l %s" d="%s"/>', s.class, path(smooth(s.points), px, py))
    add('<text class="f%s" x="%d" y="14">%s</text>', s.class, at, escape(s.name))
    at = at + 14 + 7 * #s.name
  end
  add "</svg>"
  return ("<figure><h2>%s</h2>%s</figure>"):format(escape(title), table.concat(out))
end

local function points(history, key)
  local list = {}
  for _, m in ipairs(history) do
    if type(m[key]) == "number" then list[#list + 1] = { m.step, m[key] } end
  end
  return list
end

local function lowest(history)
  local list = {}
  for _, m in ipairs(history) do
    local low
    for _, v in ipairs(type(m.cka_blocks) == "table" and m.cka_blocks or {}) do
      if type(v) == "number" and (not low or v < low) then low = v end
    end
    if low then list[#list + 1] = { m.step, low } end
  end
  return list
end

local function change(list, format)
  if #list == 0 then return "" end
  return (" from " .. format .. " at step %d to " .. format .. " at step %d"):format(list[1][2], list[1][1], list[#list][2], list[#list][1])
end

-- CKA of every block before and after, joined by a line.
local function by_block(before, after, pattern)
  local n = #before.cka_blocks
  local lists, alt = { {}, {} }, {}
  for i = 1, n do
    lists[1][i] = { i - 1, before.cka_blocks[i] }
    if after then lists[2][i] = { i - 1, after.cka_blocks[i] } end
    alt[i] = after and ("%d: %.4f to %.4f"):format(i - 1, before.cka_blocks[i], after.cka_blocks[i]) or
      ("%d: %.4f"):format(i - 1, before.cka_blocks[i])
  end
  local low, high = extent(lists)
  local ticks, every = {}, math.ceil(n / 26)
  for i = 0, n - 1, every do ticks[#ticks + 1] = i end
  local out, add, px, py = frame {
    x = { -0.5, n - 0.5 }, y = { low, math.min(high, 1) }, width = 920, xname = "block", xticks = ticks,
    label = function(i) return ("%d%s"):format(i, pattern and pattern:sub(i + 1, i + 1) or "") end,
    alt = "CKA by block, " .. (after and "PTQ to CKA-QAD: " or "PTQ: ") .. table.concat(alt, ", "),
  }
  for i = 1, n do
    local b, a = before.cka_blocks[i], after and after.cka_blocks[i]
    local x = px(i - 1)
    if a then
      add('<line class="%s" stroke-width="2" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" opacity=".55"/>', a >= b and "a" or "b",
        x, x, py(b), py(a))
    end
    add('<circle class="fb" cx="%.1f" cy="%.1f" r="4"><title>block %d, PTQ %.5f</title></circle>', x, py(b), i - 1, b)
    if a then add('<circle class="fa" cx="%.1f" cy="%.1f" r="4"><title>block %d, CKA-QAD %.5f</title></circle>', x, py(a), i - 1, a) end
  end
  add('<text class="fb" x="%d" y="14">PTQ</text>', left)
  if after then add('<text class="fa" x="%d" y="14">CKA-QAD</text>', left + 40) end
  add "</svg>"
  return "<h2>CKA by block, held out</h2>" .. table.concat(out)
end

local function html_table(rows)
  local out = { '<div class="scroll"><table>' }
  for i, row in ipairs(rows) do
    local tag = i == 1 and "th" or "td"
    local cells = {}
    for j, cell in ipairs(row) do cells[j] = ("<%s>%s</%s>"):format(tag, escape(cell), tag) end
    out[#out + 1] = ('<tr%s>%s</tr>'):format(i == #rows and ' class="last"' or "", table.concat(cells))
  end
  out[#out + 1] = "</table></div>"
  return table.concat(out)
end

-- The page. r: title, model, options, history (metrics), before, after, version, peak, planned, export_equal.
function report.html(r)
  local out = {}
  local function add(s) out[#out + 1] = s end
  add(('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">' ..
    "<title>%s</title><style>%s</style>"):format(escape(r.title), style))
  add(("<h1>%s</h1>"):format(escape(r.title)))
  local facts = {}
  if r.model then facts[1] = r.model:describe() end
  facts[#facts + 1] = "ckaqad " .. r.version:match("^%S+")
  add(('<p class="dim">%s</p>'):format(escape(table.concat(facts, " - "))))
  local results = {}
  if r.before then results[1] = { "PTQ", r.before } end
  if r.after then results[#results + 1] = { "CKA-QAD", r.after } end
  if #results > 0 then
    add("<h2>Held-out documents</h2>" .. html_table(screen.rows(results)))
    add(('<p class="dim">%d tokens; KL to BF16 in nats a token; top-1: agreement with BF16</p>'):format(results[1][2].tokens))
  end
  if r.before and r.after and (r.after.kl > r.before.kl or r.after.cka < r.before.cka) then
    add '<p class="warn">CKA-QAD is worse than PTQ in KL or mean CKA.</p>'
  end
  local kl, cka, low, ce = points(r.history, "kl"), points(r.history, "cka"), lowest(r.history), points(r.history, "ce")
  add '<div class="pair">'
  if #kl > 1 then
    add(curves("KL in training, nats a token", { { name = "KL", class = "a", points = kl } }, "KL" .. change(kl, "%.4f"), 0))
  end
  if #ce > 1 then
    add(curves("Cross-entropy, nats a token", { { name = "cross-entropy", class = "a", points = ce } },
      "Cross-entropy" .. change(ce, "%.4f"), 0))
  end
  if #cka > 1 then
    add(curves("CKA in training", { { name = "mean", class = "a", points = cka }, { name = "lowest block", class = "b", points = low } },
      "Mean CKA" .. change(cka, "%.4f") .. "; lowest block" .. change(low, "%.4f")))
  end
  add "</div>"
  if r.before then add(by_block(r.before, r.after, r.model and r.model.pattern)) end
  add "<h2>Memory and export</h2><dl>"
  local function pair(name, value) add(("<dt>%s</dt><dd>%s</dd>"):format(escape(name), escape(value))) end
  pair("planned", text.bytes(r.planned))
  pair("measured peak", text.bytes(r.peak))
  if r.export_equal ~= nil then
    pair("export", r.export_equal and "dequantizes to the trained weights, every bit" or "differs from the trained weights")
  end
  add '</dl><h2>Options</h2><dl class="wide">'
  for _, key in ipairs(json.keys(r.options)) do
    local value = r.options[key]
    pair("--" .. key, value == "" and "none" or type(value) == "number" and ("%.10g"):format(value) or tostring(value))
  end
  add "</dl></html>\n"
  return table.concat(out, "\n")
end

return report
