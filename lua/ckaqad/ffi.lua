-- ffi.lua - the only file that touches C: the library's functions, ownership, statuses turned into errors.
--
-- The cdef is made from the headers by the build. Symbols are looked up in the program itself first and then in the
-- shared library (CKAQAD_LIBRARY or libckaqad.so), so the same modules run in `ckaqad` and in a plain `luajit`.
-- Every checked call first looks at the program's stop flag: compiled loops never see a debug hook.
local ffi = require "ffi"
local errors = require "ckaqad.errors"
local cdef = require "ckaqad.cdef"

ffi.cdef(cdef.text)
ffi.cdef [[
void free(void *p);
int isatty(int fd);
struct cq_timespec { long seconds, nanoseconds; };
int clock_gettime(int clock, struct cq_timespec *t);
struct cq_winsize { unsigned short rows, columns, x, y; };
int ioctl(int fd, unsigned long request, ...);
]]

local function find_library()
  if pcall(function() return ffi.C.cq_version end) then return ffi.C end
  local path = os.getenv("CKAQAD_LIBRARY")
  local ok, library = pcall(ffi.load, path or "ckaqad")
  if not ok then errors.raise(errors.IO, "libckaqad: %s", tostring(library)) end
  return library
end
local C = find_library()

local version = ffi.string(C.cq_version())
if version:match("^%S+") ~= cdef.version then
  errors.raise(errors.USAGE, "libckaqad: version %s, wanted %s as these Lua modules", version:match("^%S+"), cdef.version)
end

local native = { C = C, new = ffi.new, cast = ffi.cast, copy = ffi.copy, sizeof = ffi.sizeof, version = version }

-- The program leaves pointers to what its signal handler writes; a plain luajit has none. `stop`: stop now, the number of the
-- signal. While `defer` is set the first signal goes to `later` instead. `save`: SIGUSR1 came.
local has_host, host = pcall(require, "ckaqad.host")
local function shared(name) return has_host and ffi.cast("volatile int *", host[name]) or ffi.new "int[1]" end
local stop, defer, later, save = shared "stop", shared "defer", shared "later", shared "save"
C.cq_stop_watch(stop)

-- The ranks of this run: the program opened them; a plain luajit is the only one.
if has_host then
  native.comm = ffi.cast("cq_comm *", host.comm)
else
  local out = ffi.new "cq_comm *[1]"
  if C.cq_comm_open(out, ffi.new("cq_launch", { 0, 1 }), 60) < 0 then errors.raise(errors.NOMEM, "%s", ffi.string(C.cq_error())) end
  native.comm = out[0]
end
native.rank, native.ranks = C.cq_comm_rank(native.comm), C.cq_comm_size(native.comm)
local many_ranks = native.ranks > 1

-- What a message calls a stop signal.
function native.signal_word(signal) return signal == 15 and "terminated" or signal == 1 and "hangup" or "interrupted" end

function native.poll()
  if stop[0] ~= 0 then
    local signal = stop[0]
    stop[0] = 0
    native.broken = true -- a step may have ended halfway
    local e = errors.new(0, native.signal_word(signal))
    e.exit = 128 + signal
    error(e, 0)
  end
end

-- From now on the first stop signal waits until somebody asks with stop_wanted; not at the prompt.
function native.defer(on)
  defer[0] = on and not native.interactive and 1 or 0
  if not on then later[0] = 0 end
end

-- The signal that waits, or nil.
function native.stop_wanted() return later[0] ~= 0 and later[0] or nil end

-- True once after each SIGUSR1.
function native.save_wanted()
  local wanted = save[0] ~= 0
  save[0] = 0
  return wanted
end

function native.check(status)
  native.poll()
  if status < 0 then errors.raise(tonumber(status), "%s", ffi.string(C.cq_error())) end
  return tonumber(status)
end

-- With CKAQAD_PROFILE=1 the seconds spent in checked calls are summed in native.in_c; else `f` itself.
native.in_c = os.getenv "CKAQAD_PROFILE" == "1" and 0 or nil
function native.timed(f)
  if not native.in_c then return f end
  return function(...)
    local begun = native.clock()
    local status = f(...)
    native.in_c = native.in_c + (native.clock() - begun)
    return status
  end
end

-- native.call.cq_x(...) calls a function that returns a status and throws when it failed.
native.call = setmetatable({}, {
  __index = function(t, name)
    local f = native.timed(C[name])
    local function checked(...) return native.check(f(...)) end
    t[name] = checked
    return checked
  end,
})

local closers = { cq_batch = "cq_batch_free" }

-- Calls `opener(&object, ...)` and returns the object, closed when it is collected.
function native.open(kind, opener, ...)
  local out = ffi.new(kind .. " *[1]")
  native.check(native.timed(C[opener])(out, ...))
  return ffi.gc(out[0], C[closers[kind] or kind .. "_close"])
end

-- Takes ownership of an object that a C function gave out.
function native.adopt(object, kind) return ffi.gc(object, C[closers[kind] or kind .. "_close"]) end

-- Closes an object now.
function native.close(object, kind)
  ffi.gc(object, nil)
  C[closers[kind] or kind .. "_close"](object)
end

-- Calls `f(..., &text, &bytes)`-like functions through `fill(text, bytes)` and returns the malloc'd text as a string.
function native.take_text(fill)
  local out, bytes = ffi.new "char *[1]", ffi.new("int64_t[1]", -1)
  native.check(fill(out, bytes))
  local s = bytes[0] < 0 and ffi.string(out[0]) or ffi.string(out[0], bytes[0])
  C.free(out[0])
  return s
end

-- nil for a null pointer, else the string.
function native.string(pointer, bytes)
  if pointer == nil then return nil end
  return bytes and ffi.string(pointer, bytes) or ffi.string(pointer)
end

function native.free(pointer) C.free(pointer) end

--- The most memory this process has had resident, in bytes.
---
--- Example:
---     print(cq.text.bytes(cq.peak_bytes()))
function native.peak_bytes() return tonumber(C.cq_memory_peak()) end

local now = ffi.new "struct cq_timespec"
--- Seconds of a clock that only goes forward.
---
--- Example:
---     local begun = cq.clock()
---     print(cq.clock() >= begun) --> true
function native.clock()
  C.clock_gettime(1, now)
  return tonumber(now.seconds) + tonumber(now.nanoseconds) * 1e-9
end

function native.isatty(fd) return not many_ranks and C.isatty(fd) == 1 end -- mpirun's pseudo-terminals are none

-- Columns of the terminal on standard output; nil when it is none.
function native.columns()
  local size = ffi.new "struct cq_winsize"
  local TIOCGWINSZ = 0x5413
  if many_ranks or C.ioctl(1, TIOCGWINSZ, size) ~= 0 then return nil end
  return size.columns > 0 and size.columns or 80
end

local element = { [0] = "float", "double", "uint16_t", "uint16_t", "uint8_t", "uint8_t", "int32_t", "int64_t" }

-- A pointer to a tensor's elements (BF16 and F16 as their bits), and their number. What lies on a device is copied, so that only
-- host tensors change through it.
function native.elements(tensor)
  local kind, n = element[tonumber(tensor.dtype)], tonumber(C.cq_tensor_elems(tensor))
  if not C.cq_on_device(tensor.data) then return ffi.cast(kind .. " *", tensor.data), n end
  local copy = ffi.new(kind .. "[?]", math.max(1, n))
  native.check(C.cq_copy(copy, tensor.data, C.cq_tensor_bytes(tensor)))
  return copy, n
end

local function form(of, c)
  local out, owned = ffi.new "cq_tensor", ffi.new "void *[1]"
  native.check(of(out, owned, c))
  local n, wide = tonumber(C.cq_tensor_elems(out)), out.dtype == C.CQ_F64
  local copy = ffi.new(wide and "double[?]" or "float[?]", math.max(1, n))
  ffi.copy(copy, out.data, n * (wide and 8 or 4))
  C.free(owned[0])
  return copy, n, wide and "f64" or "f32"
end

-- A new array of the F32 form of a parameter's master weight, its number, its dtype; for those that are kept in fewer bits.
function native.master(c) return form(C.cq_param_master, c) end
-- The same of its fake-quantized weight.
function native.quantized(c) return form(C.cq_param_copy, c) end

-- A new array of a tensor's values in another float dtype ("CQ_F32" or "CQ_F64").
function native.convert(tensor, dtype)
  local n = C.cq_tensor_elems(tensor)
  local to = ffi.new(dtype == "CQ_F64" and "double[?]" or "float[?]", math.max(1, tonumber(n)))
  native.check(C.cq_convert(to, C[dtype], native.elements(tensor), tensor.dtype, n))
  return to, tonumber(n)
end

function native.sha256(path)
  local hex = ffi.new "char[65]"
  native.check(C.cq_sha256_file(path, hex))
  return ffi.string(hex)
end

function native.sha256_text(s)
  local hex, state = ffi.new "char[65]", ffi.new "cq_sha256"
  C.cq_sha256_init(state)
  C.cq_sha256_add(state, s, #s)
  C.cq_sha256_hex(state, hex)
  return ffi.string(hex)
end

return native
