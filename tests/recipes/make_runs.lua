-- Makes N run folders as finished runs leave them, for tests of the run index: luajit make_runs.lua ROOT N
-- Three learning rates; every three runs share a seed, so rates are paired. KL after training falls with the rate.
local root, n = arg[1], tonumber(arg[2])

local function write(path, text)
  local f = assert(io.open(path, "w"))
  f:write(text)
  f:close()
end

local dirs = {}
for i = 1, n do dirs[i] = ("%s/run-%05d"):format(root, i) end
local p = assert(io.popen("xargs mkdir -p", "w"))
p:write(table.concat(dirs, "\n"))
p:close()

local blocks = ("0.99133413379800173,"):rep(12):gsub(",$", "")
for i, dir in ipairs(dirs) do
  local rate, seed = ({ 1e-5, 3e-5, 1e-4 })[1 + i % 3], 1 + math.floor((i - 1) / 3)
  write(dir .. "/run.json", ([[{
  "format": 1, "program": "ckaqad", "version": "0.1.0 (test)", "recipe": "recipes/nemotron_nano.lua",
  "started": "2026-01-%02dT%02d:%02d:00Z",
  "options": {"model": "lab/teacher", "out": "%s", "steps": 20, "lr": %g, "cka": "all", "seed": %d, "threads": 0},
  "seeds": {"data": %d}, "model": {"dir": "lab/teacher", "sha256": {"config.json": "01bc4574d0808789"}}, "planned_bytes": 121021824
}]]):format(1 + i % 28, i % 24, i % 60, dir, rate, seed, seed))
  local lines = {}
  for step = 1, 20 do
    lines[step] = ('{"step":%d,"kl":%.6f,"cka":0.99,"cka_blocks":[%s],"lr":%g,"tokens":2044,"seconds":0.17}\n'):format(step,
      0.01 / step, blocks, rate)
  end
  write(dir .. "/metrics.jsonl", table.concat(lines))
  write(dir .. "/summary.json", ([[{
  "before": {"kl": 0.008, "perplexity": 1.55, "top1": 0.93, "cka": 0.99, "perplexity_teacher": 1.5},
  "after": {"kl": %.6f, "perplexity": 1.52, "top1": 0.96, "cka": 0.995},
  "export_bit_equal": true, "peak_bytes": 129224704, "seconds": 11.5
}]]):format(0.006 - 1e-3 * (i % 3) + 1e-5 * (seed % 7)))
end
