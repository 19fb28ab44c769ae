-- Everything a run computed, for comparing bits: every tensor of the last checkpoint whichever file it is in, metrics without times,
-- evaluations, the export.   luajit tests/recipes/bits.lua RUN | sha256sum
local run, hashes = arg[1], {}
local json = require "cjson"
local function read(path) local f = assert(io.open(path, "rb")); local s = f:read "*a"; f:close(); return s end
local last = json.decode(read(run .. "/checkpoints/latest.json")).step
for path in io.popen(("ls %s/checkpoints/step-%d/state*.safetensors"):format(run, last)):lines() do
  local s, n = read(path), 0
  for i = 8, 1, -1 do n = n * 256 + s:byte(i) end
  for name, t in pairs(json.decode(s:sub(9, 8 + n))) do
    if name ~= "__metadata__" then hashes[#hashes + 1] = name .. " " .. s:sub(9 + n + t.data_offsets[1], 8 + n + t.data_offsets[2]) end
  end
end
table.sort(hashes)
print(last, #hashes)
io.write(table.concat(hashes), (read(run .. "/metrics.jsonl"):gsub('"seconds":[^,}]*,?', "")), read(run .. "/evals.jsonl"),
  read(run .. "/nvfp4/model.safetensors"))
