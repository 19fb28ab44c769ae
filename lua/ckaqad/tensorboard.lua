-- tensorboard.lua - event files that TensorBoard reads: scalars, histograms and text by step.
--
-- A file is a row of TFRecords { u64 length, u32 crc(length), bytes, u32 crc(bytes) } with the masked CRC-32C, little endian; each
-- record holds one Event protobuf, encoded here by hand. A file is only ever appended to: a resumed run opens a new one whose first
-- record tells TensorBoard to forget the steps that are done again, and steps up to the resumed one are not written twice.
local bit = require "bit"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local band, bxor, bor, rshift, lshift = bit.band, bit.bxor, bit.bor, bit.rshift, bit.lshift
local char, floor, frexp = string.char, math.floor, math.frexp

local tensorboard = {}
local Writer = {}
Writer.__index = Writer

local ROOM = 65536  -- bytes that wait in memory at most
local PATIENCE = 10 -- seconds of event time that they wait at most
local BUCKETS = 30  -- of a histogram, equally wide

local crc_table = {}
for i = 0, 255 do
  local c = i
  for _ = 1, 8 do c = band(c, 1) == 1 and bxor(rshift(c, 1), 0x82F63B78) or rshift(c, 1) end
  crc_table[i] = c
end

-- CRC-32C (Castagnoli) of a string, as a signed 32-bit number.
function tensorboard.crc32c(s)
  local c = -1
  for i = 1, #s do c = bxor(crc_table[band(bxor(c, s:byte(i)), 255)], rshift(c, 8)) end
  return bxor(c, -1)
end

local function u32(x) return char(band(x, 255), band(rshift(x, 8), 255), band(rshift(x, 16), 255), rshift(x, 24)) end

local function masked(s)
  local c = tensorboard.crc32c(s)
  return u32(bit.tobit(bor(rshift(c, 15), lshift(c, 17)) + 0xA282EAD8))
end

local function record(bytes)
  local length = u32(#bytes) .. "\0\0\0\0"
  return length .. masked(length) .. bytes .. masked(bytes)
end

-- Half to even; exact for |x| < 2^52.
local function round(x)
  local low = floor(x)
  local rest = x - low
  if rest > 0.5 or (rest == 0.5 and low % 2 == 1) then return low + 1 end
  return low
end

-- Sign and magnitude; NaN has its own bytes.
local function sign_of(x) return (x < 0 or (x == 0 and 1 / x < 0)) and 1 or 0, math.abs(x) end

-- IEEE 754 double, little endian.
function tensorboard.double(x)
  if x ~= x then return "\0\0\0\0\0\0\248\127" end
  local sign, a = sign_of(x)
  local high, low = 0, 0
  if a == math.huge then
    high = 0x7FF00000
  elseif a > 0 then
    local m, e = frexp(a)
    local exponent = e + 1022
    -- below the normal numbers the exponent stays 0 and the mantissa loses its leading one
    local mantissa = exponent > 0 and (m * 2 - 1) * 2 ^ 52 or m * 2 ^ (52 + exponent)
    high = math.max(exponent, 0) * 2 ^ 20 + floor(mantissa / 2 ^ 32)
    low = mantissa % 2 ^ 32
  end
  return u32(low) .. u32(high + sign * 2 ^ 31)
end

-- IEEE 754 float, little endian, rounded half to even.
function tensorboard.float(x)
  if x ~= x then return "\0\0\192\127" end
  local sign, a = sign_of(x)
  local bits = 0
  if a > 0 and a < math.huge then
    local m, e = frexp(a)
    local exponent = e + 126
    -- a mantissa that rounds up to the next power of two carries into the exponent by itself
    if exponent > 0 then
      bits = exponent * 2 ^ 23 + round((m * 2 - 1) * 2 ^ 23)
    else
      bits = round(m * 2 ^ (23 + exponent))
    end
  end
  if a == math.huge or bits > 0x7F800000 then bits = 0x7F800000 end
  return u32(bits + sign * 2 ^ 31)
end

local function varint(x)
  local out = ""
  while x >= 128 do
    out = out .. char(x % 128 + 128)
    x = floor(x / 128)
  end
  return out .. char(x)
end

-- Protobuf fields: a number of wire type 0, and bytes with their length.
local function number_field(tag, x) return char(tag * 8) .. varint(x) end
local function bytes_field(tag, s) return char(tag * 8 + 2) .. varint(#s) .. s end
local function double_field(tag, x) return char(tag * 8 + 1) .. tensorboard.double(x) end

local function host_name()
  local f = io.open "/proc/sys/kernel/hostname"
  local name = f and f:read "*l"
  if f then f:close() end
  return name and name:match "^[%w_.-]+$" or "localhost"
end

-- A new file's name: later than every file of the same second, so that files sort in the order they were opened.
local function new_name(folder, seconds, host)
  while true do
    local path = ("%s/events.out.tfevents.%010d.%s"):format(folder, seconds, host)
    local f = io.open(path, "rb")
    if not f then return path end
    f:close()
    seconds = seconds + 1
  end
end

-- Puts one Event in the queue; `field` is its content.
local function put(self, step, time, field)
  if not self.file then errors.usage("tensorboard: %s is closed", self.path) end
  local event = double_field(1, time) .. (step > 0 and number_field(2, step) or "") .. field
  local bytes = record(event)
  self.queue[#self.queue + 1] = bytes
  self.waiting = self.waiting + #bytes
  self.flushed = self.flushed or time
  if self.waiting >= ROOM or time - self.flushed >= PATIENCE then
    self:flush()
    self.flushed = time
  end
end

-- Puts one value of a summary in the queue, unless an earlier file has the step.
local function put_value(self, what, tag, step, time, value)
  if type(tag) ~= "string" or tag == "" then errors.usage("tensorboard: %s: the tag is %s, wanted a name", what, tostring(tag)) end
  if type(step) ~= "number" or step < 0 or step ~= floor(step) or step >= 2 ^ 53 then
    errors.usage("tensorboard: %s %s: the step is %s, wanted a whole number from 0", what, tag, tostring(step))
  end
  if step <= self.last then return end
  put(self, step, time or self.clock(), bytes_field(5, bytes_field(1, bytes_field(1, tag) .. value)))
end

--- Opens a new event file in an existing folder; TensorBoard takes all the files of a folder as one run.
--- Options: `append` (the step a resumed run goes on from: steps up to it are left out, TensorBoard forgets later ones of earlier
--- files), `clock` (function that returns seconds since 1970; os.time), `host` (part of the file's name).
---
--- Returns a writer; it keeps up to 64 KiB or 10 s of events in memory. Fails when the file cannot be made or written.
---
--- Example:
---     local writer = cq.tensorboard.open(".", { append = 20 })
---     writer:scalar("loss/kl", 21, 0.03)
---     writer:histogram("cka", 21, { 0.97, 0.99, 0.98 })
---     writer:close()
function tensorboard.open(folder, options)
  local o = errors.fill("tensorboard.open", options, { append = errors.NONE, clock = os.time, host = errors.NONE })
  local now = o.clock()
  local path = new_name(folder, floor(now), o.host or host_name())
  local file, why = io.open(path, "wb")
  if not file then errors.raise(errors.IO, "%s", why) end
  local self = setmetatable({ path = path, file = file, clock = o.clock, last = o.append or -1, queue = {}, waiting = 0 }, Writer)
  put(self, 0, now, bytes_field(3, "brain.Event:2"))
  -- SessionLog { status = START }: TensorBoard drops what earlier files of the folder hold from this step on. It takes the first one
  -- that it meets for a beginning, so a file that resumes nothing has one too.
  put(self, self.last + 1, now, bytes_field(7, number_field(1, 1)))
  self:flush()
  return self
end

--- One number of a step. `time` is in seconds since 1970 (now); the value is kept as a float.
function Writer:scalar(tag, step, value, time)
  put_value(self, "scalar", tag, step, time, char(2 * 8 + 5) .. tensorboard.float(value))
end

-- Counts of equally wide buckets between the smallest and the largest value, and the moments TensorBoard keeps.
local function count(values)
  local h = { min = math.huge, max = -math.huge, n = 0, sum = 0, squares = 0, limits = {}, counts = {} }
  for i = 1, #values do
    local x = values[i]
    if type(x) == "number" and x - x == 0 then
      h.n, h.sum, h.squares = h.n + 1, h.sum + x, h.squares + x * x
      if x < h.min then h.min = x end
      if x > h.max then h.max = x end
    end
  end
  if h.n == 0 then return nil end
  local n = h.max > h.min and BUCKETS or 1
  local width = h.max / n - h.min / n
  for i = 1, n do h.limits[i], h.counts[i] = h.min + i * width, 0 end
  h.limits[n] = h.max
  for i = 1, #values do
    local x = values[i]
    if type(x) == "number" and x - x == 0 then
      local at = width > 0 and math.min(n, floor(x / width - h.min / width) + 1) or 1
      h.counts[at] = h.counts[at] + 1
    end
  end
  return h
end

local function doubles(list)
  local out = {}
  for i, x in ipairs(list) do out[i] = tensorboard.double(x) end
  return table.concat(out)
end

--- How a list of numbers is distributed at a step, in 30 buckets. Values that are not finite, and json.null, are left out; a list
--- without any other writes nothing.
function Writer:histogram(tag, step, values, time)
  local h = count(values)
  if not h then return end
  put_value(self, "histogram", tag, step, time, bytes_field(5, double_field(1, h.min) .. double_field(2, h.max) .. double_field(3, h.n)
    .. double_field(4, h.sum) .. double_field(5, h.squares) .. bytes_field(6, doubles(h.limits)) .. bytes_field(7, doubles(h.counts))))
end

--- Markdown text of a step, for example `cq.tensorboard.markdown(options)`.
function Writer:text(tag, step, markdown, time)
  local tensor = number_field(1, 7) .. bytes_field(2, "") .. bytes_field(8, markdown) -- a string without dimensions
  local metadata = bytes_field(1, bytes_field(1, "text")) .. number_field(4, 2)       -- the text plugin; data class: tensor
  put_value(self, "text", tag, step, time, bytes_field(8, tensor) .. bytes_field(9, metadata))
end

--- Hands everything to the file, where a TensorBoard that is open sees it.
function Writer:flush()
  if #self.queue == 0 then return end
  local bytes = table.concat(self.queue)
  self.queue, self.waiting = {}, 0
  errors.write(self.file, self.path, bytes)
end

--- Writes what waits and closes the file. A second call does nothing.
function Writer:close()
  if not self.file then return end
  self:flush()
  self.file:close()
  self.file = nil
end

--- A Markdown table of options: a plain table, or an object of ckaqad.json that keeps its order.
function tensorboard.markdown(options)
  local lines = { "| option | value |", "|---|---|" }
  for _, key in ipairs(json.keys(options)) do
    local value = options[key]
    value = type(value) == "string" and value or json.encode(value)
    lines[#lines + 1] = ("| %s | %s |"):format(tostring(key), (value:gsub("|", "\\|"):gsub("[\r\n]+", " ")))
  end
  return table.concat(lines, "\n")
end

return tensorboard
