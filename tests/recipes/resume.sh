#!/usr/bin/env bash
# A run stopped at step k and resumed equals the run that was never stopped: weights, moments, scales and every metric but times.
#   bash tests/recipes/resume.sh [--trials=2]      so many values of k of a 40-step run, spread evenly; 40: every one
set -eu
cd "$(dirname "$0")/../.."
trials=2
for a in "$@"; do
  case $a in --trials=*) trials=${a#*=} ;; *) echo "resume.sh: unknown option $a" >&2; exit 2 ;; esac
done
work=$(mktemp -d /tmp/ckaqad-resume-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 60 recipes/lab/teacher/train.jsonl >"$work/train.jsonl"
head -n 10 recipes/lab/teacher/holdout.jsonl >"$work/holdout.jsonl"
hangup=--default-signal=HUP # nohup may have started this script
go() { # OUT OPTIONS...
  local out=$1; shift
  env "$hangup" build/ckaqad recipes/nemotron_nano.lua --data="$work/train.jsonl" --holdout="$work/holdout.jsonl" --steps=40 --seq=64 --batch=4 --micro=2 \
    --rows=32 --calibrate=4 --threads=1 --no-tensorboard --out="$out" "$@" >"$work/log" 2>&1
}
bits() { # weights, moments and scales of the last checkpoint, exported tensors, metrics without times
  sha256sum "$1/checkpoints/step-40/state.safetensors" "$1/nvfp4/model.safetensors" | cut -d' ' -f1
  sed -E 's/"seconds":[^,}]*,?//' "$1/metrics.jsonl" | sha256sum
  cat "$1/evals.jsonl"
}
fail() { echo "resume.sh: $1" >&2; tail -n 5 "$work/log" >&2; exit 1; }

go "$work/whole" --eval_every=10 || fail "the undisturbed run failed"
bits "$work/whole" >"$work/want"
differing=0
for i in $(seq 1 "$trials"); do
  k=$((i * 40 / trials)); [ "$trials" -ge 40 ] || k=$((k - 40 / trials / 2 - 1))
  go "$work/again" --eval_every=10 --stop_at="$k" || fail "stopping at step $k failed"
  if [ "$k" -lt 40 ]; then
    [ ! -e "$work/again/summary.json" ] || fail "the run did not stop at step $k"
    go "$work/again" --eval_every=10 --resume || fail "resuming after step $k failed"
    grep -q "resumed after step $k" "$work/log" || fail "the run did not resume after step $k"
  fi
  bits "$work/again" >"$work/got"
  cmp -s "$work/want" "$work/got" || { differing=$((differing + 1)); echo "stopped at $k: differs" >&2; diff "$work/want" "$work/got" >&2 || true; }
  rm -rf "$work/again"
done

# signals: one lets the step end and saves, 130, 143 and 129; SIGUSR1 saves and goes on; a second run on the same folder is refused; a
# closed session hangs up twice, and under nohup not at all
for signal in INT:130 TERM:143 HUP:129; do
  hangup=--default-signal=HUP; [ "$signal" != TERM:143 ] || hangup=--ignore-signal=HUP
  go "$work/signal" --steps=4000 &
  pid=$!
  until [ -s "$work/signal/metrics.jsonl" ]; do sleep 0.05; kill -0 $pid || fail "the run ended before its first step"; done
  child=$(tr -d '[:space:]' <"$work/signal/lock")
  if [ "$signal" = INT:130 ]; then
    rc=0; build/ckaqad recipes/nemotron_nano.lua --out="$work/signal" 2>"$work/second" >/dev/null || rc=$?
    { [ $rc = 2 ] && grep -q "process $child is writing there" "$work/second"; } || fail "a second run on a folder in use: exit $rc, $(cat "$work/second")"
    kill -USR1 "$child"
    for _ in $(seq 1 100); do [ -e "$work/signal/checkpoints/latest.json" ] && break; sleep 0.05; done
    [ -e "$work/signal/checkpoints/latest.json" ] || fail "SIGUSR1 saved nothing"
  fi
  [ "$signal" = INT:130 ] || kill -HUP "$child"
  kill -"${signal%%:*}" "$child"
  rc=0; wait $pid || rc=$?
  [ $rc = "${signal##*:}" ] || fail "SIG${signal%%:*}: exit $rc"
  [ "$(grep -c . "$work/signal/metrics.jsonl")" = "$(sed -E 's/.*"step": ?([0-9]+).*/\1/' "$work/signal/checkpoints/latest.json" | tr -dc 0-9)" ] || fail "SIG${signal%%:*}: the last step was not saved"
  rm -rf "$work/signal"
done

# other options are refused with what differs; a newer format is named
rc=0; go "$work/whole" --lr=0.5 || rc=$?
{ [ $rc = 2 ] && grep -q "lr 0.0001 -> 0.5" "$work/log"; } || fail "other options on the same folder: exit $rc"
sed -i 's/"format": *1/"format": 9/' "$work/whole/run.json"
rc=0; go "$work/whole" || rc=$?
{ [ $rc = 3 ] && grep -q "run.json: format 9" "$work/log"; } || fail "a newer run.json: exit $rc"

echo "$trials values of k, $differing differ; signals, locks, refusals hold"
[ "$differing" = 0 ]
