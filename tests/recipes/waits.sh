#!/usr/bin/env bash
# Results that stay on the device until somebody looks: the bits of looking at once, with the kernels of the host and on the emulated
# device, where a step with a rule of ckaqad waits once and one with a rule that looks also waits for each of its four micro-batches.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/ckaqad-waits-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 60 tests/data/gsm8k_train.jsonl >"$work/train.jsonl"
fail() { echo "waits.sh: $1" >&2; exit 1; }
go() { # PROGRAM OUT OPTION...
  local program=$1 out=$2; shift 2
  "$program" tests/recipes/waits.lua --model=tests/golden/qwen3_gsm8k --data="$work/train.jsonl" "$@" >"$out.all" 2>&1 || fail "$*: $(tail -n 3 "$out.all")"
  grep -v '^waits \|^played ' "$out.all" >"$out"
}
same() { # FILE FILE: the same results
  cmp -s "$work/$1" "$work/$2" || fail "$1 and $2 differ: $(diff "$work/$1" "$work/$2" | head -n 4)"
}
both() { # PROGRAM OPTION...
  local program=$1; shift
  go "$program" "$work/later" --later=true "$@"
  go "$program" "$work/at_once" --later=false "$@"
  cmp -s "$work/later" "$work/at_once" || fail "$program $*: other results than when waiting: $(diff "$work/later" "$work/at_once" | head -n 4)"
  [ "$(grep -c '^step' "$work/later")" = 2 ] || [ -n "${fault:-}" ] || fail "$program $*: no two steps"
}
waits() { # FILE TIMES
  [ "$(grep -c "^waits $2 in step" "$work/$1.all")" = 2 ] || fail "$1: $(grep '^waits' "$work/$1.all" | tr '\n' ' '), wanted $2 in each step"
}
broken() { # PROGRAM OPTION...
  fault=1 both "$@" --fault=true
  names_block "$1"
}
names_block() { # PROGRAM
  grep -q '^step 1: KL is .*nan; the first output that is not finite is block 1.s.*weights as before' "$work/later" || fail "$1: $(head -n 1 "$work/later")"
}

cpu=build/ckaqad
for options in "--rule=ratio" "--rule=fixed:0.5" "--rule=none" "--rule=look" "--rule=gradnorm" "--layer=mse" "--layer=gram --cka=3,1,5" "--layer=none"; do
  # shellcheck disable=SC2086
  both $cpu $options
done
broken $cpu
go $cpu "$work/ratio" --rule=ratio
go $cpu "$work/late" --rule=late
same ratio late
[ -x build/ckaqad_on_cpu ] || { echo "the bits of looking at once; no C++ compiler: waits were not counted"; exit 0; }
device=build/ckaqad_on_cpu
both $device --device=cuda --rule=ratio
waits later 1
waits at_once 5
go $device "$work/look" --device=cuda --rule=look --later=true
waits look 5
go $device "$work/later" --device=cuda --fault=true --later=true
names_block $device
echo "the bits of looking at once; a step of four micro-batches waits once, five times where the rule looks"
