#!/usr/bin/env bash
# A device (the emulated one) that is lost in mid-run, has too little memory, or does not exist: one line each; the last checkpoint stays,
# and the run goes on from it to the bits of one that nothing happened to.
set -eu
cd "$(dirname "$0")/../.."
[ -x build/ckaqad_on_cpu ] || { echo "skipped: no C++ compiler, the emulated device was not built"; exit 77; }
work=$(mktemp -d /tmp/ckaqad-device-faults-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 2 recipes/lab/teacher/holdout.jsonl >"$work/few.jsonl"
fail() { echo "device_faults.sh: $1" >&2; cat "$work/err" >&2; exit 1; }
go() { # NAME OPTION...: a training of two steps
  local name=$1; shift
  build/ckaqad_on_cpu recipes/nemotron_nano.lua --device=cuda --compute=bf16 --holdout="$work/few.jsonl" --preset=tiny --seq=32 --batch=2 --micro=1 \
    --rows=16 --calibrate=1 --no-tensorboard --steps=2 --save=1 --threads=1 --out="$work/$name" "$@"
}
bits() { luajit tests/recipes/bits.lua "$work/$1" | sha256sum; }
refused() { # CODE TEXT COMMAND...
  local code=$1 text=$2 rc=0; shift 2
  "$@" >/dev/null 2>"$work/err" || rc=$?
  { [ $rc = "$code" ] && [ "$(grep -c "^ckaqad: " "$work/err")" = 1 ] && grep -q "^ckaqad: $text" "$work/err"; } || fail "exit $rc, wanted $code and one line: $text"
}
go whole >/dev/null 2>&1 & one=$!
CKAQAD_CUDA_LOST=$work/lost/checkpoints/latest.json refused 1 'cuda: [a-z_0-9]*: the device was lost' go lost
[ "$(ls "$work/lost/checkpoints")" = "latest.json
step-1" ] || fail "checkpoints of the lost run: $(ls "$work/lost/checkpoints")"
go lost >"$work/err" 2>&1 || fail "the lost run does not go on"
grep -q "step 1" "$work/err" || fail "the lost run does not say where it goes on"
wait $one || fail "the whole run failed"
[ "$(bits whole)" = "$(bits lost)" ] || fail "the run that went on has other bits"
CKAQAD_CUDA_MEMORY=5000000 refused 4 'memory plan: .* MiB planned (largest: .*), wanted at most 4.8 MiB (available memory); --dry-run --gpus=1' go small
[ ! -e "$work/small" ] || fail "a run without room left a folder"
refused 2 'cuda: device 7 does not exist, this machine has 1 (0 to 0)' go seven --device=cuda:7
echo "a lost device, too little memory, no such device: one line each; the lost run went on to the same bits"
