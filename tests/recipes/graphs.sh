#!/usr/bin/env bash
# Recorded passes on the emulated device: training on micro-batches of one shape and generation give the bits that they give without,
# and play what was recorded; after another calibration, with packed copies, too.
set -eu
cd "$(dirname "$0")/../.."
[ -x build/ckaqad_on_cpu ] || { echo "no C++ compiler, no emulated device"; exit 77; }
work=$(mktemp -d /tmp/ckaqad-graphs-XXXXXX); trap 'rm -rf "$work"' EXIT
fail() { echo "graphs.sh: $1" >&2; exit 1; }
ways() { # OPTION...: with and without
  local on pids
  for on in true false; do
    build/ckaqad_on_cpu "$@" --device=cuda --graphs=$on --threads=1 >"$work/$on" 2>&1 & pids[${#on}]=$!
  done
  for on in true false; do wait "${pids[${#on}]}" || fail "$*: $(tail -n 3 "$work/$on")"; done
}
trained() { # LEAST OPTION...: at least so many passes were played
  local least=$1 played; shift
  ways tests/recipes/waits.lua --data=random "$@"
  cmp -s <(grep -v '^waits \|^played ' "$work/true") <(grep -v '^waits \|^played ' "$work/false") || fail "$*: $(diff "$work/true" "$work/false" | head -n 4)"
  played=$(sed -n 's/^played \([0-9]*\) passes$/\1/p' "$work/true")
  [ "$played" -ge "$least" ] || fail "$*: $played passes were played, wanted $least"
}
written() { # OPTION...
  ways recipes/generate.lua --json "$@"
  cmp -s <(grep '^{' "$work/true") <(grep '^{' "$work/false") || fail "$*: $(diff "$work/true" "$work/false" | head -n 4)"
}
trained 6 --model=tests/golden/nemotron_h_gsm8k --steps=4 --batch=1 --again=true --copies=packed --compute=bf16
trained 6 --model=tests/golden/qwen3_gsm8k --steps=2 --batch=2
for model in qwen3_gsm8k nemotron_h_gsm8k; do written --model=tests/golden/$model --prompt="Tom has 3 apples" --samples=2 --tokens=6; done
echo "the bits of passes that are not recorded; passes were played"
