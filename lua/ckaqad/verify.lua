-- verify.lua - checks an exported folder against the rules that serving programs rely on.
local native = require "ckaqad.ffi"
local hf = require "ckaqad.hf"
local C = native.C

local verify = {}

-- Failed findings, all findings of a folder as lines.
function verify.check(dir, against)
  local v = native.open("cq_verify", "cq_verify_open", dir, against)
  local failed, lines, bad = {}, {}, native.new "bool[1]"
  for i = 0, tonumber(C.cq_verify_count(v)) - 1 do
    local line = native.string(C.cq_verify_line(v, i, bad))
    if bad[0] then failed[#failed + 1] = line end
    lines[#lines + 1] = (bad[0] and "FAILED  " or "ok      ") .. line
  end
  return failed, lines
end

--- `ckaqad verify DIR [--against=DIR]`: prints every finding; true when all rules hold.
--- A run folder stands for its nvfp4/.
---
--- Example:
---     student:export("checked")
---     print(cq.verify("checked"))
function verify.verify(dir, against)
  local failed, lines = verify.check(hf.resolve(dir), against and hf.resolve(against))
  for _, line in ipairs(lines) do print(line) end
  print(#failed == 0 and "all rules hold" or ("%d findings failed"):format(#failed))
  return #failed == 0
end

return verify
