-- table.lua - one table, five ways to print it: text, Markdown, CSV, LaTeX, HTML.
--
-- A cell is a value, or { mean, sd, n, values = { [seed] = x } } of several runs, or { mean, low, high, n } with an interval instead of
-- a deviation; spread and n are printed in every form.
-- `mark` decides what is best, and marks nothing unless the paired interval against every other row excludes zero.
local errors = require "ckaqad.errors"
local stats = require "ckaqad.stats"

local table_ = {}
local Table = {}
Table.__index = Table

--- A table from `{ title, columns, rows, notes }`. A column is `{ key, title, format, better }`: `format` a printf format or a
--- function from value to text, `better` "low" or "high" where a best row can be marked. A row maps keys to values or to cells
--- `{ mean, sd, n, values, mark }` (or `{ mean, low, high, n }`, `{ value, mark }`); `reference = true` in a row keeps it out of the
--- marking; a row's own `n` is not repeated in its cells. `notes` are lines below. Methods: `mark()`, `text()`, `markdown()`, `csv()`,
--- `latex()`, `html()`, `render(format)`.
---
--- Example:
---     local t = cq.table { columns = { { key = "lr" }, { key = "kl" } }, rows = { { lr = 0.25, kl = { mean = 3, sd = 1, n = 2 } } } }
---     io.write(t:markdown())
---     print(t:csv():match "\n(.-)\r") --> 0.25,3,1,2
function table_.new(given)
  local o = errors.fill("table", given, { title = "", columns = errors.NONE, rows = errors.NONE, notes = errors.NONE })
  if type(o.columns) ~= "table" or #o.columns == 0 then errors.usage("table: no columns, wanted columns = { { key = NAME }, ... }") end
  local self = setmetatable({ title = o.title, columns = {}, rows = o.rows or {}, notes = {} }, Table)
  for i, column in ipairs(o.columns) do
    local c = errors.fill("table column " .. i, column,
      { key = errors.NONE, title = errors.NONE, format = errors.NONE, better = errors.NONE })
    if type(c.key) ~= "string" then errors.usage("table: column %d has no key, wanted { key = NAME, title = ... }", i) end
    if c.better then errors.choose("table: column " .. c.key .. ", better", c.better, { "low", "high" }) end
    c.title = c.title or c.key
    self.columns[i] = c
  end
  for _, note in ipairs(o.notes or {}) do self.notes[#self.notes + 1] = note end
  return self
end

-- A cell of several runs: values by seed, summed up.
function table_.cell(values)
  local s = stats.summary(values)
  return { mean = s.mean, sd = s.sd, n = s.n, values = values }
end

-- A paired difference (what stats.paired gives) as a cell, "+0.00002 [-0.00041, +0.00040] ?": "?" where the interval includes zero.
function table_.difference(p)
  if p.n == 0 then return nil end
  if not p.low then return ("%+.5f"):format(p.difference) end
  return ("%+.5f [%+.5f, %+.5f]%s"):format(p.difference, p.low, p.high, p.clear and "" or " ?")
end

local function plain(x)
  if type(x) ~= "number" then return tostring(x) end
  if x == math.floor(x) and math.abs(x) < 1e15 then return ("%d"):format(x) end
  return ("%.4g"):format(x)
end

local function shown(column, x)
  if x == nil then return "-" end
  if type(column.format) == "function" then return tostring(column.format(x)) end
  if type(x) == "number" and column.format then return column.format:format(x) end
  return plain(x)
end

-- The parts of a cell: main value, its text, sd text, n, mark.
local function parts(column, cell)
  if type(cell) ~= "table" then return { value = cell, text = shown(column, cell) } end
  if cell.n == nil then
    local value = cell.value
    if value == nil then value = cell.mean end
    return { value = value, text = shown(column, value), mark = cell.mark }
  end
  return {
    value = cell.mean, text = shown(column, cell.mean), sd = cell.sd and shown(column, cell.sd), raw_sd = cell.sd, n = cell.n,
    mark = cell.mark, spread = true, low = cell.low, high = cell.high,
    interval = cell.low and ("[%s, %s]"):format(shown(column, cell.low), shown(column, cell.high)),
  }
end

-- "0.0053 ± 0.0002 (n=3)", "0.0053 [0.0051, 0.0055] (n=3)"; n is left to the row's own column n where that says the same.
local function line_of(p, row)
  if not p.spread or p.n == 0 then return p.text end
  local n = row.n == p.n and "" or (" (n=%d)"):format(p.n)
  if p.interval then return ("%s %s%s"):format(p.text, p.interval, n) end
  if not p.sd then return p.text .. n end
  return ("%s ± %s%s"):format(p.text, p.sd, n)
end

-- A column of numbers stands on the right; one with any text in it on the left.
local function numeric(self, column)
  local any = false
  for _, row in ipairs(self.rows) do
    local value = row[column.key]
    if type(value) == "table" then value = parts(column, value).value end
    if value ~= nil and type(value) ~= "number" then return false end
    any = any or value ~= nil
  end
  return any
end

local function marked(self)
  for _, row in ipairs(self.rows) do
    for _, column in ipairs(self.columns) do
      local cell = row[column.key]
      if type(cell) == "table" and cell.mark then return true end
    end
  end
  return false
end

-- Notes with the legend of the mark, `sign` being how the form shows it.
local function notes_of(self, sign)
  local list = {}
  if marked(self) then
    local hint = self.few and ("; with fewer than %d pairs that is a hint, no proof"):format(stats.FEW) or ""
    list[1] = ("%s best: the paired %s interval against every other row excludes zero%s"):format(sign, self.level or "95 %", hint)
  end
  for _, note in ipairs(self.notes) do list[#list + 1] = note end
  return list
end

-- The row whose mean is best in a column, and the other rows that compete.
local function contest(self, column)
  local best, others, at = nil, {}, nil
  for _, row in ipairs(self.rows) do
    local cell = row[column.key]
    local mean = type(cell) == "table" and cell.mean
    if not row.reference and mean then
      others[#others + 1] = row
      if not best or (column.better == "low" and mean < best) or (column.better == "high" and mean > best) then best, at = mean, row end
    end
  end
  return at, others
end

--- Marks the best cell of every column that has `better`, where its cells carry `values` by seed and the paired interval of the
--- best row against every other row excludes zero. Options as for `stats.paired`. Gives the number of marks.
function Table:mark(given)
  local count = 0
  self.few = false
  self.level = ("%g %%"):format(100 * (given and given.level or 0.95))
  for _, column in ipairs(self.columns) do
    local best, rows = nil, {}
    if column.better then best, rows = contest(self, column) end
    local clear, few = #rows > 1, false
    for _, row in ipairs(rows) do
      local cell = row[column.key]
      cell.mark = nil
      if clear and row ~= best then
        local p = stats.paired(best[column.key].values or {}, cell.values or {}, given)
        clear, few = p.clear and (p.difference < 0) == (column.better == "low"), few or p.few
      end
    end
    if clear then best[column.key].mark, count, self.few = true, count + 1, self.few or few end
  end
  return count
end

-- Width on the screen of UTF-8 text without wide characters.
local function width(s)
  if not s:find "[\128-\255]" then return #s end
  return select(2, s:gsub("[^\128-\191]", ""))
end

--- The table as lines of text for a terminal; the best is marked by `*`.
function Table:text()
  local lines, grid, widths, right = {}, {}, {}, {}
  for i, column in ipairs(self.columns) do
    right[i] = numeric(self, column)
    widths[i] = width(column.title)
  end
  for r, row in ipairs(self.rows) do
    grid[r] = {}
    for i, column in ipairs(self.columns) do
      local cell = row[column.key]
      if type(cell) == "table" then
        local p = parts(column, cell)
        grid[r][i] = line_of(p, row) .. (p.mark and "*" or "")
      else
        grid[r][i] = shown(column, cell) -- a list of 10,000 runs has only such cells
      end
      widths[i] = math.max(widths[i], width(grid[r][i]))
    end
  end
  local function add(cells)
    local out = {}
    for i, cell in ipairs(cells) do
      local pad = (" "):rep(widths[i] - width(cell))
      out[i] = right[i] and pad .. cell or cell .. pad
    end
    lines[#lines + 1] = (table.concat(out, "  "):gsub("%s+$", ""))
  end
  if self.title ~= "" then lines[1] = self.title end
  local titles = {}
  for i, column in ipairs(self.columns) do titles[i] = column.title end
  add(titles)
  for _, cells in ipairs(grid) do add(cells) end
  for _, note in ipairs(notes_of(self, "*")) do lines[#lines + 1] = note end
  return table.concat(lines, "\n") .. "\n"
end

local function markdown_escape(s)
  return (s:gsub("[\\`*_|<>%[%]]", "\\%0"):gsub("\r?\n", " "))
end

--- The table in Markdown (GitHub's form); the best is bold.
function Table:markdown()
  local out, rule, titles = {}, {}, {}
  if self.title ~= "" then out[1] = "**" .. markdown_escape(self.title) .. "**\n" end
  for i, column in ipairs(self.columns) do
    titles[i] = markdown_escape(column.title)
    rule[i] = numeric(self, column) and "---:" or "---"
  end
  out[#out + 1] = "| " .. table.concat(titles, " | ") .. " |"
  out[#out + 1] = "|" .. table.concat(rule, "|") .. "|"
  for _, row in ipairs(self.rows) do
    local cells = {}
    for i, column in ipairs(self.columns) do
      local p = parts(column, row[column.key])
      local text = markdown_escape(line_of(p, row))
      cells[i] = p.mark and "**" .. text .. "**" or text
    end
    out[#out + 1] = "| " .. table.concat(cells, " | ") .. " |"
  end
  for _, note in ipairs(notes_of(self, "Bold:")) do out[#out + 1] = "\n" .. markdown_escape(note) end
  return table.concat(out, "\n") .. "\n"
end

local function csv_field(x)
  if x == nil then return "" end
  local s
  if type(x) == "number" then
    s = ("%.15g"):format(x)
    if tonumber(s) ~= x then s = ("%.17g"):format(x) end
  else
    s = tostring(x)
  end
  return s:find('[",\r\n]') and '"' .. s:gsub('"', '""') .. '"' or s
end

-- Fields of the CSV: suffix of the key, and what of a cell's parts they hold; a field that no row has is left out.
local csv_fields = {
  { "", function(p) return p.value end }, { "_sd", function(p) return p.raw_sd end }, { "_low", function(p) return p.low end },
  { "_high", function(p) return p.high end }, { "_n", function(p) return p.n end }, { "_best", function(p) return p.mark and 1 end },
}

--- The table as CSV (RFC 4180: CRLF, quotes doubled), numbers with all their digits. A column of means is followed by KEY_sd (or
--- KEY_low, KEY_high) and KEY_n, one with a mark by KEY_best; title and notes are left out.
function Table:csv()
  local grid, lines = {}, {}
  for r = 0, #self.rows do grid[r] = {} end
  for _, column in ipairs(self.columns) do
    for _, field in ipairs(csv_fields) do
      local list, any = {}, field[1] == ""
      for r, row in ipairs(self.rows) do
        list[r] = field[2](parts(column, row[column.key]))
        any = any or list[r] ~= nil
      end
      if any then
        grid[0][#grid[0] + 1] = csv_field(column.key .. field[1])
        for r = 1, #self.rows do grid[r][#grid[0]] = csv_field(list[r]) end
      end
    end
  end
  for r = 0, #self.rows do lines[#lines + 1] = table.concat(grid[r], ",") .. "\r\n" end
  return table.concat(lines)
end

local latex_signs = {
  ["\\"] = "\\textbackslash{}", ["{"] = "\\{", ["}"] = "\\}", ["$"] = "\\$", ["&"] = "\\&", ["#"] = "\\#", ["%"] = "\\%",
  ["_"] = "\\_", ["~"] = "\\textasciitilde{}", ["^"] = "\\textasciicircum{}", ["<"] = "\\textless{}", [">"] = "\\textgreater{}",
  ["|"] = "\\textbar{}",
}
local function latex_escape(s)
  return (s:gsub("[\\{}$&#%%_~^<>|]", latex_signs):gsub("±", "$\\pm$"):gsub("\r?\n", " "))
end

--- The table in LaTeX (needs the package booktabs); the best is bold.
function Table:latex()
  local out, align, titles = { "\\begin{table}", "  \\centering" }, {}, {}
  if self.title ~= "" then out[#out + 1] = "  \\caption{" .. latex_escape(self.title) .. "}" end
  for i, column in ipairs(self.columns) do
    align[i] = numeric(self, column) and "r" or "l"
    titles[i] = latex_escape(column.title)
  end
  out[#out + 1] = "  \\begin{tabular}{" .. table.concat(align) .. "}"
  out[#out + 1] = "    \\toprule"
  out[#out + 1] = "    " .. table.concat(titles, " & ") .. " \\\\"
  out[#out + 1] = "    \\midrule"
  for _, row in ipairs(self.rows) do
    local cells = {}
    for i, column in ipairs(self.columns) do
      local p = parts(column, row[column.key])
      local text = latex_escape(line_of(p, row))
      cells[i] = p.mark and "\\textbf{" .. text .. "}" or text
    end
    out[#out + 1] = "    " .. table.concat(cells, " & ") .. " \\\\"
  end
  out[#out + 1] = "    \\bottomrule"
  out[#out + 1] = "  \\end{tabular}"
  for _, note in ipairs(notes_of(self, "Bold:")) do out[#out + 1] = "  \\par\\smallskip{\\footnotesize " .. latex_escape(note) .. "}" end
  out[#out + 1] = "\\end{table}"
  return table.concat(out, "\n") .. "\n"
end

local html_signs = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;" }
local function html_escape(s) return (s:gsub("[&<>\"']", html_signs)) end

--- The table as an HTML fragment without style: classes `num` (a number) and `best`, spread and n in a `span class="dim"`.
function Table:html()
  local out, right = { "<table>" }, {}
  if self.title ~= "" then out[#out + 1] = "<caption>" .. html_escape(self.title) .. "</caption>" end
  local head = {}
  for i, column in ipairs(self.columns) do
    right[i] = numeric(self, column) and ' class="num"' or ""
    head[i] = ('<th scope="col"%s>%s</th>'):format(right[i], html_escape(column.title))
  end
  out[#out + 1] = "<thead><tr>" .. table.concat(head) .. "</tr></thead>"
  out[#out + 1] = "<tbody>"
  for _, row in ipairs(self.rows) do
    local cells = {}
    for i, column in ipairs(self.columns) do
      local p = parts(column, row[column.key])
      local main = html_escape(p.text)
      local rest = html_escape(line_of(p, row):sub(#p.text + 1))
      if p.mark then main = '<strong class="best" title="best">' .. main .. "</strong>" end
      if rest ~= "" then main = main .. '<span class="dim">' .. rest .. "</span>" end
      cells[i] = i == 1 and ('<th scope="row"%s>%s</th>'):format(right[i], main) or ("<td%s>%s</td>"):format(right[i], main)
    end
    out[#out + 1] = "<tr>" .. table.concat(cells) .. "</tr>"
  end
  out[#out + 1] = "</tbody></table>"
  for _, note in ipairs(notes_of(self, "Bold:")) do out[#out + 1] = '<p class="dim">' .. html_escape(note) .. "</p>" end
  return table.concat(out, "\n") .. "\n"
end

local forms = { text = Table.text, markdown = Table.markdown, csv = Table.csv, latex = Table.latex, html = Table.html }
table_.formats = { "text", "markdown", "csv", "latex", "html" }

--- The table in the form `format`: text, markdown, csv, latex or html.
function Table:render(format)
  return forms[errors.choose("table format", format, table_.formats)](self)
end

return table_
