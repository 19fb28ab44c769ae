-- text.lua - numbers and tables as people read them.
local text = {}

--- A count with three digits and a unit.
---
--- Example:
---     print(cq.text.count(3280000)) --> 3.28 M
function text.count(n)
  for _, unit in ipairs { { 1e12, "T" }, { 1e9, "B" }, { 1e6, "M" }, { 1e3, "k" } } do
    if n >= unit[1] then return ("%.4g %s"):format(tonumber(("%.3g"):format(n / unit[1])), unit[2]) end
  end
  return ("%d"):format(n)
end

--- Bytes in binary units.
---
--- Example:
---     print(cq.text.bytes(1536)) --> 1.5 KiB
function text.bytes(n)
  local units, i = { "B", "KiB", "MiB", "GiB", "TiB" }, 1
  while math.abs(n) >= 1024 and i < #units do
    n, i = n / 1024, i + 1
  end
  return (i == 1 and "%d %s" or "%.1f %s"):format(n, units[i])
end

--- Seconds as minutes and hours.
---
--- Example:
---     print(cq.text.duration(125), cq.text.duration(3725)) --> 2:05	1:02:05
function text.duration(seconds)
  local s = math.max(0, math.floor(seconds + 0.5))
  if s < 3600 then return ("%d:%02d"):format(math.floor(s / 60), s % 60) end
  return ("%d:%02d:%02d"):format(math.floor(s / 3600), math.floor(s / 60) % 60, s % 60)
end

-- Width on the screen of UTF-8 text without wide characters.
local function width(s) return select(2, s:gsub("[^\128-\191]", "")) end

--- Rows of strings as a list of lines: the first column left, the others right aligned, two spaces between.
---
--- Example:
---     for _, line in ipairs(cq.text.table { { "block", "cka" }, { "0", "0.99" } }) do print(line) end
---     --> block   cka
---     --> 0      0.99
function text.table(rows, indent)
  local widths, lines = {}, {}
  for _, row in ipairs(rows) do
    for i, cell in ipairs(row) do widths[i] = math.max(widths[i] or 0, width(cell)) end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(row) do
      local pad = (" "):rep(widths[i] - width(cell))
      cells[i] = i == 1 and cell .. pad or pad .. cell
    end
    lines[#lines + 1] = (indent or "") .. table.concat(cells, "  "):gsub("%s+$", "")
  end
  return lines
end

--- Ascending whole numbers as ranges.
---
--- Example:
---     print(cq.text.ranges { 0, 1, 2, 5 }) --> 0-2,5
function text.ranges(list)
  local parts, i = {}, 1
  while i <= #list do
    local j = i
    while list[j + 1] == list[j] + 1 do j = j + 1 end
    parts[#parts + 1] = j == i and tostring(list[i]) or ("%d%s%d"):format(list[i], j == i + 1 and "," or "-", list[j])
    i = j + 1
  end
  return table.concat(parts, ",")
end

return text
