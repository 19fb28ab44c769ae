#!/usr/bin/env bash
# Sweeps: bad input is answered, equal points run once, and a sweep whose driver or workers are killed ends as one that was left alone.
#   bash tests/recipes/sweep.sh [--trials=5] [--seed=N]      so many kills in all, at random instants
set -eu
cd "$(dirname "$0")/../.."
top=$PWD; run=${CKAQAD:-$top/build/ckaqad}; trials=5; seed=$((RANDOM + 1))
for a in "$@"; do
  case $a in
    --trials=*) trials=${a#*=} ;;
    --seed=*) seed=${a#*=} ;;
    *) echo "sweep.sh: unknown option $a, wanted --trials=N or --seed=N" >&2; exit 2 ;;
  esac
done
echo "seed $seed"; RANDOM=$seed
work=$(mktemp -d /tmp/ckaqad-sweep-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 40 recipes/lab/teacher/train.jsonl >"$work/train.jsonl"
head -n 10 recipes/lab/teacher/holdout.jsonl >"$work/holdout.jsonl"
tiny="--data=$work/train.jsonl --holdout=$work/holdout.jsonl --steps=3 --seq=64 --batch=4 --micro=2 --rows=32 --calibrate=4 --threads=2"
fail() { echo "FAILED: $1"; tail -n 12 "$work/log"; exit 1; }

# twelve points in an ablation of its own, with a rule that only the recipe knows
cat >"$work/twelve.lua" <<EOT
local cq = require "ckaqad"
local opt = cq.options {
  out = "x",        -- folder
  data = "",        -- documents
  holdout = "",     -- documents
  steps = 3,        -- steps
  seq = 64,         -- tokens
  batch = 4,        -- rows
  micro = 2,        -- rows
  rows = 32,        -- tokens
  calibrate = 4,    -- documents
}
cq.balance.define("half", function(pass) return { kl = 1, cka = pass.kl / 2 } end)
cq.sweep(opt, { recipe = "$top/recipes/nemotron_nano.lua", grid = { balance = { "ratio", "half" }, lr = { 1e-4, 3e-4 } }, seeds = 3,
  jobs = 2, retry = 2, set = { save = 1, tensorboard = false } })
EOT
sweep() { # OUT: starts it in the background, number in $driver
  # shellcheck disable=SC2086
  "$run" "$work/twelve.lua" $tiny --out="$1" >"$work/log" 2>&1 </dev/null &
  driver=$!
}
facts() { # what must be equal: all metrics but times and rates, evaluations, results, exported weights; one line a point
  local p
  for p in "$1"/points/*/; do
    echo "$(basename "$p") $(sed -E 's/"seconds":[^,}]*,?//; s/"tokens_per_s":[^,}]*,?//' "$p/metrics.jsonl" | sha256sum | cut -c1-16)" \
      "$(sha256sum <"$p/evals.jsonl" | cut -c1-16) $(sed -E '/"(seconds|peak_bytes|planned_bytes)"/d' "$p/summary.json" | sha256sum | cut -c1-16)" \
      "$(sha256sum <"$p/nvfp4/model.safetensors" | cut -c1-16) $(wc -l <"$p/metrics.jsonl")"
  done
}
ends() { grep -c '"exit":0' "$1/attempts.jsonl"; }

sweep "$work/whole"; wait "$driver" || fail "the undisturbed sweep exits $?"
facts "$work/whole" >"$work/want"
[ "$(wc -l <"$work/want")" = 12 ] && [ "$(ends "$work/whole")" = 12 ] || fail "12 points were wanted, $(wc -l <"$work/want") are there"
[ "$(cut -d' ' -f2 "$work/want" | sort -u | wc -l)" = 12 ] || fail "two of the 12 points have the same metrics"

pause() { sleep "$(printf '0.%03d' $((RANDOM % 1000)))"; }
kills=0; sweeps=0; workers=0; lives=0
while [ "$kills" -lt "$trials" ]; do
  out=$work/killed; rm -rf "$out"; sweeps=$((sweeps + 1)); rc=1
  while [ "$rc" != 0 ]; do
    sweep "$out"; rc=""; lives=$((lives + 1)); here=0
    while [ "$kills" -lt "$trials" ] && [ "$here" = 0 ]; do
      for _ in $(seq 0 $((RANDOM % 4))); do pause; done
      kill -0 "$driver" 2>/dev/null || break
      victim=$driver; children=$(cat "/proc/$driver/task/$driver/children" 2>/dev/null || true)
      if [ $((RANDOM % 2)) = 0 ] && [ -n "$children" ]; then
        # shellcheck disable=SC2086
        set -- $children; shift $((RANDOM % $#)); victim=$1; workers=$((workers + 1))
      else
        here=1
      fi
      kill -KILL "$victim" 2>/dev/null && kills=$((kills + 1))
    done
    rc=0; wait "$driver" || rc=$?
    case $rc in 0 | 1 | 137) ;; *) fail "a driver leaves with $rc" ;; esac
    [ "$rc" != 1 ] || grep -q 'points failed' "$work/log" || fail "a driver fails without saying that points failed"
    [ "$lives" -lt $((20 + 10 * trials)) ] || fail "the sweep does not end"
  done
  facts "$out" >"$work/got"
  cmp -s "$work/want" "$work/got" || { diff "$work/want" "$work/got" | head -n 6; fail "sweep $sweeps differs from the undisturbed one"; }
  sed -n 's/.*"hash":"\([0-9a-f]*\)".*"exit":0.*/\1/p' "$out/attempts.jsonl" | sort >"$work/ended"
  [ "$(uniq "$work/ended" | wc -l)" = 12 ] && [ "$(wc -l <"$work/ended")" = 12 ] || fail "a point did not end exactly once"
done
echo "$kills kills ($workers of workers) in $sweeps sweeps of 12 points: every point ended once, every metric and weight equal"
