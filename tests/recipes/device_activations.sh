#!/usr/bin/env bash
# --activations=bf16 on the emulated device, Mamba-2, attention and experts: the same bits again, other bits than with f32, under --check,
# and with experts dealt out over two ranks the bits of one rank; one line where there is no device or no BF16 products.
#   bash tests/recipes/device_activations.sh [--build=build]
set -eu
cd "$(dirname "$0")/../.."
build=build
case ${1:-} in --build=*) build=${1#*=} ;; esac
[ -x $build/ckaqad_on_cpu ] || { echo "skipped: no C++ compiler, the emulated device was not built"; exit 77; }
work=$(mktemp -d /tmp/ckaqad-device-activations-XXXXXX); trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CKAQAD_CUDA_DEVICES=2
head -n 60 tests/data/gsm8k_train.jsonl >"$work/train.jsonl"
head -n 1 tests/data/gsm8k_test.jsonl >"$work/few.jsonl"
fail() { echo "device_activations.sh: $1" >&2; tail -n 12 "$work/log" >&2; exit 1; }
go() { # OUT RANKS OPTION...
  local out=$work/$1 start=""
  [ "$2" = 1 ] || start="mpirun --oversubscribe -n $2"
  shift 2
  $start $build/ckaqad_on_cpu recipes/nemotron_nano.lua --device=cuda --compute=bf16 --model=tests/golden/nemotron_h_tiny --data="$work/train.jsonl" \
    --holdout="$work/few.jsonl" --preset=tiny --scales=max --quant=all --seq=32 --batch=2 --micro=1 --rows=16 --calibrate=1 --no-tensorboard --threads=1 \
    --steps=1 --ordered --out="$out" "$@" >"$work/log" 2>&1
}
bits() { luajit tests/recipes/bits.lua "$work/$1" | sha256sum | cut -d' ' -f1; }

go one 1 --activations=bf16 || fail "a run failed"
grep -q "bf16 matrix products and activations" "$work/log" || fail "the run does not say how it keeps activations"
go again 1 --activations=bf16 --check || fail "a run under --check failed"
[ "$(bits one)" = "$(bits again)" ] || fail "two runs give other bits"
go wide 1 || fail "a run with activations in F32 failed"
[ "$(bits one)" != "$(bits wide)" ] || fail "activations in BF16 give the bits of F32"
if command -v mpirun >/dev/null; then
  go dealt 2 --activations=bf16 --moe=ranks || fail "experts dealt out failed"
  [ "$(bits one)" = "$(bits dealt)" ] || fail "experts dealt out give other bits"
fi

refused() { # OPTION...
  local rc=0
  $build/ckaqad_on_cpu recipes/nemotron_nano.lua --activations=bf16 --dry-run "$@" >"$work/log" 2>&1 || rc=$?
  { [ $rc = 2 ] && [ "$(grep -c "^ckaqad: option --activations: bf16 needs a GPU and --compute=bf16, got " "$work/log")" = 1 ]; } ||
    fail "exit $rc, wanted 2 and one line: $*"
}
refused --device=cuda
refused --compute=bf16
echo "activations in BF16: the same bits again, under --check, and with experts dealt out"
