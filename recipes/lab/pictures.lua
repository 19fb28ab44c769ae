-- pictures.lua - the study's pictures as SVG files: dots over two axes, or curves over named places, with a legend.
--
-- Series are told apart by eight colors (Okabe and Ito 2008, which the color-blind can tell) times four shapes. The same input gives
-- the same bytes.
local pictures = {}

local colors = { "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a8a" }
local width, height, left, right, top, bottom = 860, 440, 64, 220, 40, 52

local function escape(s) return (s:gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" })) end

-- Bounds of all numbers of an axis with a little air, and round places for its ticks.
local function axis(series, k)
  local low, high = math.huge, -math.huge
  for _, s in ipairs(series) do
    for _, p in ipairs(s.points) do low, high = math.min(low, p[k]), math.max(high, p[k]) end
  end
  if low > high then low, high = 0, 1 end
  local span = high > low and high - low or math.max(math.abs(high), 1) / 10
  low, high = low - 0.06 * span, high + 0.06 * span
  local step = 10 ^ math.floor(math.log10((high - low) / 4))
  for _, factor in ipairs { 5, 2 } do
    if (high - low) / (step * factor) >= 3 then
      step = step * factor
      break
    end
  end
  local places = {}
  for i = math.ceil(low / step), math.floor(high / step) do places[#places + 1] = i * step end
  -- + 0: a zero has no sign
  return { low = low, high = high, places = places, digits = math.max(0, -math.floor(math.log10(step) + 1e-9)) + 0 }
end

local function mark(i, x, y, size)
  local color, shape = colors[(i - 1) % 8 + 1], math.floor((i - 1) / 8) % 4
  local style = ('fill="%s" fill-opacity="0.8"'):format(color)
  if shape == 0 then return ('<circle cx="%.1f" cy="%.1f" r="%.1f" %s/>'):format(x, y, size, style) end
  if shape == 1 then
    return ('<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" %s/>'):format(x - size, y - size, 2 * size, 2 * size, style)
  end
  local d = shape == 2 and "M%.1f %.1fl%.1f %.1fh%.1fz" or "M%.1f %.1fl%.1f %.1fl%.1f %.1fl%.1f %.1fz"
  if shape == 2 then return ('<path d="' .. d .. '" %s/>'):format(x, y - size, size, 2 * size, -2 * size, style) end
  return ('<path d="' .. d .. '" %s/>'):format(x, y - size, size, size, -size, size, -size, -size, style)
end

local function text(x, y, s, anchor, more)
  return ('<text x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>'):format(x, y, anchor or "start", more or "", escape(s))
end

local function rule(x1, y1, x2, y2, color)
  return ('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>'):format(x1, y1, x2, y2, color)
end

-- Axes with their names, ticks and grid; `names` stand at x = 1, 2, ...
local function frame(out, o, ax, ay, px, py)
  for _, v in ipairs(ay.places) do
    out[#out + 1] = rule(left, py(v), width - right, py(v), "#e4e4e4")
    out[#out + 1] = text(left - 6, py(v) + 4, ("%." .. ay.digits .. "f"):format(v + 0), "end")
  end
  for i, name in ipairs(o.names or {}) do out[#out + 1] = text(px(i), height - bottom + 16, name, "middle") end
  for _, v in ipairs(o.names and {} or ax.places) do
    out[#out + 1] = rule(px(v), top, px(v), height - bottom, "#e4e4e4")
    out[#out + 1] = text(px(v), height - bottom + 16, ("%." .. ax.digits .. "f"):format(v + 0), "middle")
  end
  out[#out + 1] = rule(left, height - bottom, width - right, height - bottom, "#444")
  out[#out + 1] = text((left + width - right) / 2, height - 14, o.x, "middle")
  local middle = (top + height - bottom) / 2
  out[#out + 1] = text(16, middle, o.y, "middle", (' transform="rotate(-90 16 %.1f)"'):format(middle))
end

--- The SVG text of a picture. `o`: `title`, `x` and `y` (names of the axes), `series` (list of { name, points = { { x, y }, ... }, look =
--- number of color and shape, its place unless told }), `lines` (true: the points of a series are joined), `names` (texts at x = 1, 2, ...
--- in the place of numbers).
function pictures.svg(o)
  local ax, ay = axis(o.series, 1), axis(o.series, 2)
  local function px(x) return left + (x - ax.low) / (ax.high - ax.low) * (width - right - left) end
  local function py(y) return height - bottom - (y - ay.low) / (ay.high - ay.low) * (height - bottom - top) end
  local tall = math.max(height, top + 18 * #o.series + 10)
  local out = { ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" ' ..
    'font-family="sans-serif" font-size="12" fill="#222">'):format(width, tall, width, tall), "<title>" .. escape(o.title) .. "</title>",
    ('<rect width="%d" height="%d" fill="#fff"/>'):format(width, tall), text(left, 22, o.title, "start", ' font-size="15"') }
  frame(out, o, ax, ay, px, py)
  for i, s in ipairs(o.series) do
    local path, look = {}, s.look or i
    for j, p in ipairs(s.points) do
      path[j] = ("%s%.1f %.1f"):format(j == 1 and "M" or "L", px(p[1]), py(p[2]))
      out[#out + 1] = mark(look, px(p[1]), py(p[2]), 3.5)
    end
    if o.lines and #path > 1 then
      out[#out + 1] = ('<path d="%s" fill="none" stroke="%s"/>'):format(table.concat(path), colors[(look - 1) % 8 + 1])
    end
    out[#out + 1] = mark(look, width - right + 18, top + 18 * i - 10, 4.5)
    out[#out + 1] = text(width - right + 30, top + 18 * i - 6, s.name)
  end
  out[#out + 1] = "</svg>\n"
  return table.concat(out, "\n")
end

return pictures
