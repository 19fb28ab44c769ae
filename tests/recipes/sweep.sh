#!/usr/bin/env bash
# Sweeps: bad input is answered, equal points run once, a point that crashes stops no other, a full disk and Ctrl-C lose nothing, what
# successive halving drops is no failure, and a sweep whose driver or workers are killed ends as one that was left alone.
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
fail() { tail -n 12 "$work/log"; echo "FAILED: $1, --seed=$seed"; exit 1; } # the reason last: long.sh shows one line
go() { # EXIT ARGUMENTS...: the program with them, all it says in $work/log
  local want=$1 rc=0; shift
  "$run" "$@" >"$work/log" 2>&1 </dev/null || rc=$?
  [ "$rc" = "$want" ] || fail "exit $rc, wanted $want: $*"
}
said() { grep -qE -- "$1" "$work/log" || fail "nothing says /$1/"; }            # REGEX
count() { [ "$(grep -cE -- "$2" "$3")" = "$1" ] || { cp "$3" "$work/log"; fail "wanted $1 times /$2/ in $3"; }; } # N REGEX FILE
nano="$top/recipes/nemotron_nano.lua"

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

# ---- what is typed wrong
bad() { go 2 "${@:2}"; count 1 . "$work/log"; said "$1"; }                        # REGEX ARGUMENTS...
bad 'sweep over lrr: the recipe has no such option, nearest is lr' "$nano" --sweep lrr=1,2
bad '--sweep: got "lr=", wanted KEY=A,B,C' "$nano" --sweep lr=
bad 'lr is named twice' "$nano" --sweep lr=1 --sweep lr=2
bad 'option --lr: got "fast", wanted a number' "$nano" --sweep lr=1e-4,fast --out="$work/none"
bad 'sweep over threads: this option does not change what a run computes' "$nano" --sweep threads=1,2
bad 'sweep over seed: it is given as --seed=2 too' "$nano" --sweep seed=1..3 --seed=2
bad 'is a sweep itself' "$top/recipes/ablate_balance.lua" --sweep lr=1e-4,3e-4
bad 'ablate_balance.lua:[0-9]+: sweep: seeds is -1' "$top/recipes/ablate_balance.lua" --seeds=-1
bad 'ablate_balance.lua:[0-9]+: --validate_only: not for a sweep' "$top/recipes/ablate_balance.lua" --validate-only --out="$work/none"
bad '^ckaqad: --stop_at: not for a sweep' "$nano" --sweep lr=1e-4,3e-4 --stop-at=3 --out="$work/none"
bad '--resume: .*none holds no sweep' "$nano" --sweep lr=1e-4,3e-4 --resume --out="$work/none"
[ ! -e "$work/none" ] || fail "a refused sweep leaves a folder"

# ---- equal points once; two drivers; Ctrl-C
# shellcheck disable=SC2086
equal="$tiny --sweep lr=1e-4,0.0001,1e-4 --sweep layer=none,cka --out=$work/equal"
# shellcheck disable=SC2086
go 0 "$nano" $equal; said '4 equal points run once'; count 2 '"exit":0' "$work/equal/attempts.jsonl"
# shellcheck disable=SC2086
go 0 "$nano" $equal --jobs=2; said '2 of 2 points are finished'; count 2 '"exit":0' "$work/equal/attempts.jsonl"
# shellcheck disable=SC2086
long="$tiny --steps=400 --save=1 --no-tensorboard --sweep lr=1e-4,3e-4 --jobs=2 --out=$work/long"
# shellcheck disable=SC2086
"$run" "$nano" $long >"$work/first" 2>&1 </dev/null & driver=$!
until [ "$(cat "$work"/long/points/*/metrics.jsonl 2>/dev/null | wc -l)" -gt 1 ]; do sleep 0.05; kill -0 $driver || fail "the sweep ended early"; done
# shellcheck disable=SC2086
bad "sweep folder $work/long: process [0-9]+ runs a sweep there" "$nano" $long
kill -INT $driver; rc=0; wait $driver || rc=$?
[ $rc = 130 ] || fail "Ctrl-C: exit $rc, wanted 130"
count 1 '0 of 2 points are finished; the same command goes on' "$work/first"
count 2 '"exit":143,.*"stopped":true' "$work/long/attempts.jsonl"
go 0 runs report "$work/long"; count 0 'failed, exit' "$work/long/report.html"; grep -q "stopped or running, step" "$work/long/report.html" || fail "a stopped point has no status"
# shellcheck disable=SC2086
"$run" "$nano" $long >"$work/log" 2>&1 </dev/null & driver=$!
until grep -q 'resumed after step' "$work"/long/points/*.log; do sleep 0.05; kill -0 $driver || fail "the stopped sweep did not go on"; done
kill -TERM $driver; rc=0; wait $driver || rc=$?
[ $rc = 143 ] || fail "SIGTERM: exit $rc, wanted 143"

# ---- settings that break, with and without successive halving
cat >"$work/breaks.lua" <<EOT
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
  halve = false,    -- successive halving
  retry = 1,        -- tries
}
cq.balance.define("breaks", function(pass) if pass.step == 2 then error("on purpose") end return { kl = 1, cka = 0 } end)
cq.balance.define("dies", function(pass)
  if pass.step == 2 then os.execute("kill -SEGV " .. io.open("/proc/self/stat"):read("*n")) end
  return { kl = 1, cka = 0 }
end)
cq.sweep(opt, { recipe = "$nano", grid = { balance = { "ratio", "breaks", "dies", "fixed:1" } }, jobs = 2,
  stop = opt.halve and { rungs = { 2 }, keep = 0.25 } or nil })
EOT
# shellcheck disable=SC2086
go 1 "$work/breaks.lua" $tiny --retry=1 --out="$work/breaks"
said '^ckaqad: sweep: 2 of 4 points failed, first balance=breaks.*breaks.lua:15: balance rule breaks, step 2: .*on purpose'
count 2 '"exit":0' "$work/breaks/attempts.jsonl"; count 2 '"exit":139' "$work/breaks/attempts.jsonl"; count 1 '"exit":2' "$work/breaks/attempts.jsonl"
count 2 '\(1 failed\)' "$work/breaks/table.md"
# the first step of a setting that broke must not count as its result at the rung
# shellcheck disable=SC2086
go 1 "$work/breaks.lua" $tiny --retry=0 --halve=true --steps=4 --out="$work/halved"
said 'balance=breaks +- +failed'; said 'balance=dies +- +failed'; said 'goes on'; said 'dropped'
count 1 '"dropped":2' "$work/halved/sweep.json"; count 1 'dropped at step 2' "$work/halved/report.html"
go 0 runs list --root="$work/halved"; count 1 ' dropped ' "$work/log"; count 2 ' stopped ' "$work/log"; count 1 ' finished ' "$work/log"
go 0 runs prune --stopped --yes --root="$work"; count 2 'halved/points/' "$work/log"
# without halving what was dropped goes on where it was stopped
# shellcheck disable=SC2086
go 1 "$work/breaks.lua" $tiny --retry=0 --steps=4 --out="$work/halved"; said '2 of 4 points failed'; count 0 '"dropped"' "$work/halved/sweep.json"
grep -q 'resumed after step 2' "$work"/halved/points/*.log || fail "a dropped point does not go on"

# ---- a disk that is full in the middle: what ran stays, the table is shown, and with room the same command ends it
if [ "$(id -u)" = 0 ] && mkdir -p "$work/small" && mount -t tmpfs -o size=30m none "$work/small" 2>/dev/null; then
  trap 'umount "$work/small" 2>/dev/null || true; rm -rf "$work"' EXIT
  # shellcheck disable=SC2086
  full="$tiny --sweep lr=1e-4,3e-4 --retry=0 --out=$work/small/s"
  # shellcheck disable=SC2086
  "$run" "$nano" $full >"$work/log" 2>&1 </dev/null & driver=$!
  until [ -s "$work/small/s/attempts.jsonl" ]; do sleep 0.02; kill -0 $driver 2>/dev/null || fail "the sweep ended early"; done
  i=0
  while kill -0 $driver 2>/dev/null; do i=$((i + 1)); cat /dev/zero >"$work/small/filler.$i" 2>/dev/null || true; sleep 0.02; done
  rc=0; wait $driver || rc=$?
  [ $rc = 1 ] || fail "a full disk: exit $rc, wanted 1"
  said '1 of 2 points failed'; said '^lr=1e-4 +1 '; said 'lr=3e-4 \(1 failed\)'
  rm -f "$work"/small/filler.*
  # shellcheck disable=SC2086
  go 0 "$nano" $full; said '1 of 2 points are finished'; count 2 '"exit":0' "$work/small/s/attempts.jsonl"
  umount "$work/small"
fi
echo "bad input, equal points, stops, crashes, halving, a full disk: answered"

# ---- kills at random
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
  cmp -s "$work/want" "$work/got" || fail "sweep $sweeps differs from the undisturbed one: $(diff "$work/want" "$work/got" | head -n 4 | tr "\n" " ")"
  sed -n 's/.*"hash":"\([0-9a-f]*\)".*"exit":0.*/\1/p' "$out/attempts.jsonl" | sort >"$work/ended"
  [ "$(uniq "$work/ended" | wc -l)" = 12 ] && [ "$(wc -l <"$work/ended")" = 12 ] || fail "a point did not end exactly once"
done
echo "$kills kills ($workers of workers) in $sweeps sweeps of 12 points: every point ended once, every metric and weight equal"
