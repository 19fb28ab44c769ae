-- screen.lua - what a person sees: lines, one live status line on a terminal, the table at the end.
local text = require "ckaqad.text"

local screen = {}
local Screen = {}
Screen.__index = Screen

-- `sink(line)` gets every full line too (the log); `columns()`: width of the terminal, nil when it is none.
function screen.open(sink, columns)
  local term = os.getenv("TERM")
  return setmetatable({ live = columns() and term ~= nil and term ~= "dumb", sink = sink, columns = columns }, Screen)
end

-- A line that stays.
function Screen:say(line)
  if self.shown then io.stdout:write("\r\27[K") end
  self.shown = nil
  print(line)
  io.stdout:flush()
  if self.sink then self.sink(line) end
end

local function fixed(value, format) return value and value == value and format:format(value) or "-" end

-- "step 12/60  20 %  eta 0:41  kl 0.0312  cka 0.9921 (lowest 0.9810 at 7)  weight 3.4  lr 9.1e-05  |g| 0.42  3.1 k tokens/s"
function screen.status(m, steps, eta)
  local parts = { ("step %d/%d  %d %%  eta %s"):format(m.step, steps, math.floor(100 * m.step / steps), text.duration(eta)) }
  if m.reward then parts[#parts + 1] = "reward " .. fixed(m.reward, "%.3f") end
  if m.ce then parts[#parts + 1] = "ce " .. fixed(m.ce, "%.4f") end
  if m.policy then parts[#parts + 1] = "policy " .. fixed(m.policy, "%.4f") end
  if m.kl then parts[#parts + 1] = "kl " .. fixed(m.kl, "%.4f") end
  if m.top1 and m.ce then parts[#parts + 1] = "accuracy " .. fixed(m.top1, "%.3f") end
  if m.cka then
    parts[#parts + 1] = ("cka %s (lowest %s at %d)"):format(fixed(m.cka, "%.4f"), fixed(m.cka_min, "%.4f"), m.cka_min_block)
    parts[#parts + 1] = "weight " .. fixed(m.weight, "%.3g")
  end
  if m.lr then parts[#parts + 1] = ("lr %.2g"):format(m.lr) end
  if m.grad_norm then parts[#parts + 1] = "|g| " .. fixed(m.grad_norm, "%.3g") end
  parts[#parts + 1] = text.count(m.tokens / m.seconds) .. " tok/s"
  return table.concat(parts, "  ")
end

-- Shows a step: in place on a terminal, else as a line every `every` steps and at both ends.
function Screen:step(line, step, steps, every)
  if self.live and step < steps then
    io.stdout:write("\r\27[K", line:sub(1, (self.columns() or 80) - 1))
    io.stdout:flush()
    self.shown = true
    if self.sink and (step % every == 0 or step == 1) then self.sink(line) end
  elseif step == 1 or step % every == 0 or step == steps then
    self:say(line)
  end
end

-- Rows of the final table, as strings: { { "", "KL", ... }, { "BF16", ... }, ... }.
function screen.rows(results)
  local rows = { { "", "KL", "perplexity", "top-1", "mean CKA", "lowest CKA" } }
  local first = results[1] and results[1][2]
  if first then
    rows[2] = { "BF16", ("%.4f"):format(0), ("%.4f"):format(first.perplexity_teacher), "1.0000", ("%.4f"):format(1), ("%.4f"):format(1) }
  end
  for _, item in ipairs(results) do
    local r = item[2]
    rows[#rows + 1] = {
      item[1], ("%.4f"):format(r.kl), ("%.4f"):format(r.perplexity), ("%.4f"):format(r.top1), ("%.4f"):format(r.cka),
      ("%.4f (block %d)"):format(r.cka_min, r.cka_min_block),
    }
  end
  return rows
end

return screen
