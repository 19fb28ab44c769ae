#!/usr/bin/env bash
# --copies: packed or BF16 copies of the weights train the same bits as F32 ones, with every form of master weights, frozen experts, many
# ranks, and on a device (the emulated one), there also with teacher and optimizer in the host's memory (--offload).
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/ckaqad-copies-XXXXXX); trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
head -n 2 recipes/lab/teacher/holdout.jsonl >"$work/few.jsonl"
fail() { echo "copies.sh: $1" >&2; exit 1; }
go() { # NAME COMMAND...: a training of two steps
  local name=$1; shift
  "$@" recipes/nemotron_nano.lua --holdout="$work/few.jsonl" --preset=tiny --seq=32 --batch=2 --micro=1 --rows=16 --calibrate=1 \
    --no-tensorboard --steps=2 --threads=1 "${more[@]}" --out="$work/$name" >"$work/$name.log" 2>&1 || { tail -n 3 "$work/$name.log"; fail "$name failed"; }
}
bits() { luajit tests/recipes/bits.lua "$work/$1" | sha256sum; }
same() { # NAME NAME...
  local first=$1; shift
  for name in "$@"; do [ "$(bits "$first")" = "$(bits "$name")" ] || fail "$name: other bits than $first"; done
}
planned() { sed -n 's/^  fake-quantized copies *\([0-9.]*\) KiB$/\1/p' "$work/$1.log"; }

for form in f32 packed; do
  more=("--copies=$form")
  go "cpu-$form" build/ckaqad & one=$!
  more=("--copies=$form" --master=split --scales=max "--freeze=*.experts.*"); go "split-$form" build/ckaqad
  more=("--copies=$form" --master=bf16 --moments=8bit --scales=four_over_six); go "narrow-$form" build/ckaqad
  wait $one
done
same cpu-f32 cpu-packed; same split-f32 split-packed; same narrow-f32 narrow-packed
# 476 k quantized values in 9 bits each for their codes, scales and, searched, block maxima; 4.5 without those
awk -v kib="$(planned split-packed)" 'BEGIN { exit !(kib > 261 && kib < 300) }' || fail "packed copies take $(planned split-packed) KiB"
# an exported folder whose weights stay packed writes the same text
for form in f32 packed; do
  build/ckaqad recipes/generate.lua --model="$work/cpu-packed/nvfp4" --prompt="Tom has 3 apples" --tokens=8 --threads=1 --json --quiet --copies=$form >"$work/text-$form"
done
cmp "$work/text-f32" "$work/text-packed" || fail "an NVFP4 folder that stays packed writes something else"
# and is refused in both forms when a block scale is no number
cp -r "$work/cpu-packed/nvfp4" "$work/nan"
luajit - "$work/nan/model.safetensors" <<'LUA'
local f = assert(io.open(arg[1], "r+b"))
local n = 0
for i, byte in ipairs { f:read(8):byte(1, 8) } do n = n + byte * 256 ^ (i - 1) end
local at = assert(f:read(n):match('"[^"]*%.weight_scale":{[^}]*"data_offsets":%[(%d+),'))
f:seek("set", 8 + n + at)
f:write("\127") -- NaN in E4M3
f:close()
LUA
for form in f32 packed; do
  rc=0; build/ckaqad recipes/generate.lua --model="$work/nan" --prompt=Tom --tokens=1 --quiet --copies=$form >/dev/null 2>"$work/err" || rc=$?
  { [ $rc != 0 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q "holds NaN at element 0, wanted finite" "$work/err"; } ||
    fail "a scale that is NaN, $form: exit $rc: $(cat "$work/err")"
done
what=cpu
if command -v mpirun >/dev/null; then
  more=(--copies=packed --moe=ranks --scales=four_over_six); go ranks mpirun --oversubscribe -n 2 build/ckaqad
  more=(--copies=f32 --moe=ranks --scales=four_over_six); go ranks-f32 mpirun --oversubscribe -n 2 build/ckaqad
  same ranks ranks-f32
  what="$what, 2 ranks"
fi
if [ -x build/ckaqad_on_cpu ]; then
  more=(--device=cuda --compute=bf16 --master=split --steps=1)
  go device build/ckaqad_on_cpu & one=$!
  more+=(--copies=bf16); go device-bf16 build/ckaqad_on_cpu
  more+=(--copies=packed --offload=both); go device-packed build/ckaqad_on_cpu
  wait $one
  same device device-bf16 device-packed
  what="$what, device"
fi
for bad in --copies=bf16 --copies=fp4 --offload=both --offload=disk; do
  rc=0; build/ckaqad recipes/nemotron_nano.lua --dry-run $bad >/dev/null 2>"$work/err" || rc=$?
  { [ $rc = 2 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q "^ckaqad: option ${bad%=*}: " "$work/err"; } || fail "$bad: exit $rc: $(cat "$work/err")"
done
echo "packed and BF16 copies of the weights, teacher and optimizer on the host: the bits of F32 ones ($what)"
