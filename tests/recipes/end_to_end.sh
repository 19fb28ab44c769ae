#!/usr/bin/env bash
# The main job on both families, short: KL falls, CKA rises, the export equals what was trained, the same seed gives the same bits.
set -eu
cd "$(dirname "$0")/../.."
top=$PWD; work=$(mktemp -d /tmp/ckaqad-e2e-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 24 tests/data/gsm8k_test.jsonl >"$work/holdout.jsonl"
short="--data=$top/tests/data/gsm8k_train.jsonl --holdout=$work/holdout.jsonl"

# shellcheck disable=SC2086
for pair in nemotron_nano:nemotron_h_gsm8k qwen3:qwen3_gsm8k; do
  recipe=${pair%%:*}; model=$top/tests/golden/${pair##*:}
  build/ckaqad "recipes/$recipe.lua" --model="$model" $short --steps=12 --out="$work/$recipe"
  luajit - "$work/$recipe" <<'EOT'
package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local json = require "cjson"
local function read(name) local f = assert(io.open(arg[1] .. "/" .. name)); local s = f:read("*a"); f:close(); return s end
local s = json.decode(read "summary.json")
assert(s.after.kl < 0.95 * s.before.kl, ("KL %g -> %g after 12 steps"):format(s.before.kl, s.after.kl))
assert(s.after.kl < 0.95 * s.before.kl, ("KL %g -> %g after 12 steps"):format(s.before.kl, s.after.kl))
assert(s.searched.kl < s.before.kl, ("KL %g with searched scales, %g without"):format(s.searched.kl, s.before.kl))
assert(s.after.kl < 0.97 * s.searched.kl, ("KL %g -> %g after 12 steps"):format(s.searched.kl, s.after.kl))
assert(s.after.cka > s.searched.cka and s.searched.cka > s.before.cka, ("CKA %g, %g -> %g"):format(s.before.cka, s.searched.cka, s.after.cka))
assert(s.export_bit_equal == true, "the export differs from the trained weights")
local off = math.abs(s.peak_bytes - s.planned_bytes)
assert(off <= math.max(0.1 * s.planned_bytes, 16 * 2 ^ 20), ("peak %d, planned %d"):format(s.peak_bytes, s.planned_bytes))
local n = 0
for line in read("metrics.jsonl"):gmatch("[^\n]+") do
  local m = json.decode(line)
  n = n + 1
  assert(m.step == n, "steps out of order")
  for _, key in ipairs { "kl", "cka", "cka_blocks", "weight", "lr", "grad_norm", "tokens", "seconds", "saturated" } do
    assert(m[key] ~= nil, "metrics.jsonl has no " .. key)
  end
end
assert(n == 12, n .. " lines in metrics.jsonl, wanted 12")
local run = json.decode(read "run.json")
assert(run.options and run.options.steps == 12, "run.json holds no options")
assert(read("report.html"):find("<svg", 1, true), "report.html draws nothing")
EOT
  build/ckaqad verify "$work/$recipe/nvfp4" --against="$model"
  build/ckaqad recipes/compare.lua --teacher="$model" --student="$work/$recipe/nvfp4" --data="$work/holdout.jsonl"
done

# shellcheck disable=SC2086
for i in 1 2; do
  build/ckaqad recipes/nemotron_nano.lua --model=tests/golden/nemotron_h_gsm8k $short --steps=4 --seed=7 --out="$work/same$i" >/dev/null
  sed 's/"seconds":[^,}]*//g; s/"tokens_per_s":[^,}]*//g' "$work/same$i/metrics.jsonl" >"$work/same$i.txt"
done
cmp "$work/same1.txt" "$work/same2.txt"
cmp "$work/same1/nvfp4/model.safetensors" "$work/same2/nvfp4/model.safetensors"

build/ckaqad recipes/ptq.lua --model=tests/golden/qwen3_gsm8k --data=tests/data/gsm8k_train.jsonl --scales=four_over_six --out="$work/ptq"
build/ckaqad verify "$work/ptq" --against=tests/golden/qwen3_gsm8k
build/ckaqad recipes/bench.lua --model=tests/golden/qwen3_gsm8k --data=tests/data/gsm8k_train.jsonl --steps=2 --batch=2 --seq=128 --threads=2 | tail -n 1 | grep -q '"tokens_per_s_cka"'
