-- embed.lua - run by the build: puts the Lua modules into a C file and the preprocessed headers into the module ckaqad.cdef.
--
--   luajit embed.lua VERSION CDEF.i OUT.c OUT_CDEF.lua API.md OUT_API.lua MODULE.lua...
--
-- The cdef is parsed here, so a header that LuaJIT cannot read fails the build. OUT.c also asserts that every struct has
-- the size in C that the FFI will give it. API.md becomes the module ckaqad.api_text, which the prompt's help reads.
local ffi = require "ffi"
local version, cdef_path, out_c, out_cdef, api_path, out_api = unpack(arg, 1, 6)

local function read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read("*a")
  f:close()
  return text
end

local function write(path, text)
  local f = assert(io.open(path, "wb"))
  assert(f:write(text))
  assert(f:close())
end

local cdef = read(cdef_path):gsub("__attribute__%s*%b()", "")
ffi.cdef(cdef)
local module = ("-- Made from the headers by the build.\nreturn { version = %q, text = [==[\n%s]==] }\n"):format(version, cdef)
assert(loadstring(module))
write(out_cdef, module)
write(out_api, ("-- Made from API.md by the build.\nreturn [====[\n%s]====]\n"):format(read(api_path)))

local escapes = { ["\n"] = "\\n", ['"'] = '\\"', ["\\"] = "\\\\", ["?"] = "\\?" }
local function literal(text)
  local lines = {}
  for line in text:gmatch("[^\n]*\n?") do
    if line ~= "" then
      lines[#lines + 1] = '    "' .. line:gsub('[%c"\\?\128-\255]', function(c) return escapes[c] or ("\\%03o"):format(c:byte()) end) .. '"'
    end
  end
  return #lines > 0 and table.concat(lines, "\n") or '    ""'
end

local out = {
  "/* Made by lua/embed.lua. */", '#include "core/ckaqad.h"', '#include "lua/embedded.h"', "",
}
for name in cdef:gmatch("typedef struct ([%w_]+) {") do
  out[#out + 1] = ('_Static_assert(sizeof(%s) == %d, "%s: the FFI sees another size");'):format(name, ffi.sizeof(name), name)
end
-- a public function that nobody wrote fails the link here, not a recipe later
out[#out + 1] = "\nvoid (*const cq_embedded_api[])(void) = {"
for name in cdef:gmatch("[%s%*](cq_[%w_]+)%([^;{}]*%)%s*;") do out[#out + 1] = ("    (void (*)(void))%s,"):format(name) end
out[#out + 1] = "    0};"
out[#out + 1] = "\nconst cq_embedded cq_embedded_modules[] = {"
local paths = { out_cdef, out_api }
for i = 7, #arg do paths[#paths + 1] = arg[i] end
for _, path in ipairs(paths) do
  local file = path:match("([^/]+)%.lua$")
  local name = file == "init" and "ckaqad" or "ckaqad." .. file
  local text = read(path)
  assert(loadstring(text, "@" .. path))
  out[#out + 1] = ('    {"%s", "%s.lua", %d,\n%s},'):format(name, file, #text, literal(text))
end
out[#out + 1] = "    {0, 0, 0, 0}};\n"
write(out_c, table.concat(out, "\n"))
