-- report_page.lua - the HTML around a report: style, tables, figures, and the data its script draws.
--
-- Every text goes through page.escape, whoever wrote it; the JSON of the charts escapes "</" so that no text can end its element.
-- A figure says in words what it shows (its label and caption) and holds its numbers as a table, so nothing needs the script.
local json = require "ckaqad.json"
local script = require "ckaqad.report_script"

local page = {}
local Page = {}
Page.__index = Page

local signs = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;" }
function page.escape(s) return (tostring(s):gsub("[&<>\"']", signs)) end
local escape = page.escape

local style = [[
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#5b6570;--line:#dfe4ea;--box:#f5f7f9;--warn:#b42318;--s0:#1f6feb;
  --s1:#c2410c;--s2:#15803d;--s3:#9333ea;--s4:#0e7490;--s5:#be185d;--s6:#854d0e;--s7:#475569}
@media(prefers-color-scheme:dark){
  :root{--bg:#14171b;--fg:#e6eaef;--dim:#9aa5b1;--line:#2e353d;--box:#1c2127;--warn:#ff8a7a;--s0:#79b0ff;--s1:#ffa45c;
    --s2:#6ee7a0;--s3:#d0a6ff;--s4:#67dcec;--s5:#ff94c8;--s6:#e5c07b;--s7:#b4bfcc}
}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.75rem clamp(.9rem,3vw,2rem) 3rem;background:var(--bg);color:var(--fg);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.4rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
h3{font-size:.95rem;margin:0 0 .3rem}
p{margin:.3rem 0}
a{color:var(--s0)}
.dim{color:var(--dim)}
.verdict{font-size:1.08rem;margin:.9rem 0 0;max-width:62rem}
.warn{color:var(--warn);font-weight:600}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1.6rem 2rem}
.apart{margin-top:2rem}
.wide{grid-column:1/-1}
figure{margin:0;min-width:0}
.plot{border-radius:4px;touch-action:pan-y}
.plot:focus-visible{outline:2px solid var(--s0);outline-offset:3px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--dim)}
svg .strong{fill:var(--fg);font-weight:600}
svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px}
.grid{stroke:var(--line)}
.axis{stroke:var(--dim)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.thin{stroke-width:1;opacity:.35}
.dashed{stroke-dasharray:6 4}
.cross{stroke:var(--dim);stroke-dasharray:2 3}
.hit{stroke:var(--bg);stroke-width:1.5}
.join{stroke:var(--dim);stroke-width:1.5;opacity:.6}
.edge{fill:none;stroke:var(--line)}
.cell{fill:none;stroke:var(--fg);stroke-width:1.6}
.column{fill:var(--fg);opacity:.07}
.pick{stroke-width:3.5}
.mean{stroke-width:3}
.dot{fill-opacity:.55}
.ring{fill:none;stroke:var(--fg);stroke-width:1.6}
.picked .line:not(.pick){opacity:.25}
.legend{display:flex;flex-wrap:wrap;gap:.05rem 1rem;min-height:1.5em;font-size:.85rem;color:var(--dim);
  font-variant-numeric:tabular-nums;margin-bottom:.2rem}
.legend b{color:var(--fg);font-weight:600}
.legend .at{color:var(--fg)}
.legend i{display:inline-block;width:1rem;height:0;border-top:3px solid var(--c);vertical-align:.28em;margin-right:.35rem}
.legend i.dash{border-top-style:dashed}
.legend i.ramp{width:5rem;height:.6rem;border:1px solid var(--line);margin:0 .2rem;vertical-align:-.05em;
  background:linear-gradient(var(--d),transparent,var(--c))}
figcaption{font-size:.85rem;color:var(--dim);margin-top:.3rem}
details{font-size:.85rem;margin-top:.25rem}
summary{color:var(--dim);cursor:pointer;width:max-content}
.scroll{overflow-x:auto;max-height:26rem}
.all{max-height:none}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim)}
td,th{padding:.22rem 1.1rem .22rem 0;text-align:left;border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
thead th{color:var(--dim)}
th:first-child{position:sticky;left:0;background:var(--bg)}
.num{text-align:right}
.settings{font-size:.84rem;margin-top:1.2rem}
.settings td,.settings th{padding-right:.7rem}
.settings th{white-space:normal}
td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
tr.main th,tr.main td{font-weight:600}
.smooth{display:flex;align-items:center;gap:.6rem;font-size:.9rem;color:var(--dim);margin:0 0 .8rem}
.smooth input{accent-color:var(--s0);width:11rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.1rem 1.2rem;margin:0}
dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
@media(min-width:48rem){
  dl.two{grid-template-columns:max-content minmax(0,1fr) max-content minmax(0,1fr)}
}
.flags{margin:.5rem 0;padding:.6rem .9rem;background:var(--box);border-left:3px solid var(--warn)}
.flags ul{margin:.2rem 0;padding-left:1.2rem}
@media print{
  :root{--bg:#fff;--fg:#000;--dim:#444;--line:#ccc;--s0:#1f6feb;--s1:#c2410c;--s2:#15803d;--s3:#9333ea;--s4:#0e7490;--s5:#be185d;
    --s6:#854d0e;--s7:#475569}
  body{max-width:none;padding:0;font-size:11px}
  .smooth,details:not([open]){display:none}
  figure,tr{break-inside:avoid}
  .scroll{overflow:visible;max-height:none}
  *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
]]

-- A page of a title; `page:html()` is its text.
function page.new(title)
  return setmetatable({ title = title, out = {}, charts = {} }, Page)
end

function Page:add(format, ...)
  self.out[#self.out + 1] = select("#", ...) > 0 and format:format(...) or format
end

function Page:heading(s) self:add("<h2>%s</h2>", escape(s)) end
function Page:paragraph(s, class) self:add("<p%s>%s</p>", class and (' class="%s"'):format(class) or "", escape(s)) end

-- A table of texts; a cell may be { html = ... } or { text, class = ... }, numbers are { text, class = "num" } by page.number.
function page.table(head, rows, options)
  local o = options or {}
  local out = { ('<div class="scroll%s" tabindex="0"><table>'):format(o.all and " all" or "") }
  local function cell(tag, c, extra)
    local t = type(c) == "table" and c or { c }
    local class = t.class and (' class="%s"'):format(t.class) or ""
    return ("<%s%s%s>%s</%s>"):format(tag, extra or "", class, t.html or escape(t[1] or "-"), tag)
  end
  local cells = {}
  for i, c in ipairs(head) do cells[i] = cell("th", c, ' scope="col"') end
  out[#out + 1] = "<thead><tr>" .. table.concat(cells) .. "</tr></thead><tbody>"
  for _, row in ipairs(rows) do
    for i = 1, #head do cells[i] = i == 1 and cell("th", row[i], ' scope="row"') or cell("td", row[i]) end
    out[#out + 1] = ("<tr%s>%s</tr>"):format(row.main and ' class="main"' or "", table.concat(cells, "", 1, #head))
  end
  out[#out + 1] = "</tbody></table></div>"
  return table.concat(out)
end

-- A number for a cell; "-" for what is none.
function page.number(x, format)
  local known = type(x) == "number" and x == x and math.abs(x) ~= math.huge
  return { known and (format or "%.4f"):format(x) or "-", class = "num" }
end

-- A name and value list.
function Page:list(pairs_, two)
  self:add("<dl%s>", two and ' class="two"' or "")
  for _, p in ipairs(pairs_) do self:add("<dt>%s</dt><dd>%s</dd>", escape(p[1]), escape(p[2])) end
  self:add "</dl>"
end

-- An option or another value as people write it.
function page.value(v)
  if v == nil or v == json.null then return "none" end
  if type(v) == "number" then return ("%.10g"):format(v) end
  if type(v) == "table" then return json.encode(v) end
  return v == "" and "none" or tostring(v)
end

-- A chart. `chart` is what the script draws, { kind, ... }; `words`: { title, label (what a reader who cannot see it is told),
-- caption, head and rows of the table, wide }.
function Page:figure(chart, words)
  local id = #self.charts
  self.charts[id + 1] = chart
  self:add('<figure id="chart%d"%s><h3>%s</h3><div class="legend" aria-live="polite"></div>', id, words.wide and ' class="wide"' or "",
    escape(words.title))
  self:add('<div class="plot" role="img" tabindex="0" aria-label="%s"></div>',
    escape(words.title .. ". " .. words.label .. ". Arrow keys move through the values."))
  self:add("<figcaption>%s</figcaption>", escape(words.caption or words.label))
  if words.rows then self:add("<details><summary>Numbers</summary>%s</details>", page.table(words.head, words.rows)) end
  self:add "</figure>"
end

-- The slider of all curves that follow.
function Page:slider()
  self:add('<label class="smooth">Smoothing <input type="range" id="smoothing" min="0" max="100" value="25"></label>')
end

function Page:html()
  local head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">' ..
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
  local data = json.encode(json.array(self.charts)):gsub("</", "<\\/"):gsub("<!%-%-", "<\\u0021--")
  return table.concat({
    head, ('<title>%s</title><link rel="icon" href="data:,"><style>%s</style></head><body>'):format(escape(self.title), style),
    "<noscript><p class=\"dim\">The charts need JavaScript; their numbers are in the tables below them.</p></noscript>",
    table.concat(self.out, "\n"),
    '<script type="application/json" id="data">' .. data .. "</script>", "<script>" .. script .. "</script></body></html>\n",
  }, "\n")
end

return page
