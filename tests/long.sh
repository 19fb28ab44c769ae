#!/usr/bin/env bash
# Long measurements; prints a dated Markdown table. Run by hand; its table is kept in tests/long.md.
#   bash tests/long.sh [--share=N] [--peer=PYTHON]      1/N of the trials; PYTHON has torch and transformers: measured beside
set -eu
cd "$(dirname "$0")/.."
share=1; peer=""
for a in "$@"; do
  case $a in
    --share=*) share=${a#*=} ;;
    --peer=*) peer=${a#*=} ;;
    *) echo "long.sh: unknown option $a, wanted --share=N or --peer=PYTHON" >&2; exit 2 ;;
  esac
done
top=$PWD; work=$(mktemp -d /tmp/ckaqad-long-XXXXXX); trap 'rm -rf "$work"' EXIT
train=$top/tests/data/gsm8k_train.jsonl; test=$top/tests/data/gsm8k_test.jsonl
part() { local n=$(($1 / share)); echo $((n > $2 ? n : $2)); } # FULL LEAST
field() { # NAME: of the JSON object on standard input
  FIELD=$1 luajit -e 'print(("%.6g"):format(require("cjson").decode(io.read("*l"))[os.getenv "FIELD"]))'
}
median() { sort -g | awk '{v[NR] = $1} END {print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'; }
failed=0

echo "$(date -u +%Y-%m-%d), $(awk -F': ' '/model name/ {print $2; exit}' /proc/cpuinfo), $(nproc) cores, share 1/$share"
echo
echo "| recipe, model | seed | steps | KL PTQ | KL PTQ, mse | KL after | ratio | CKA PTQ | CKA after | export |"
echo "|---|---|---|---|---|---|---|---|---|---|"
seeds=$(part 3 1); steps=$(part 60 8)
[ "$share" = 1 ] || head -n 24 "$test" >"$work/short.jsonl"
[ "$share" = 1 ] || test=$work/short.jsonl
for pair in nemotron_nano:nemotron_h_gsm8k qwen3:qwen3_gsm8k; do
  recipe=${pair%%:*}; model=${pair##*:}
  for seed in $(seq 1 "$seeds"); do
    out=$work/$recipe-$seed
    build/ckaqad "recipes/$recipe.lua" --model="tests/golden/$model" --data="$train" --holdout="$test" --steps="$steps" --seed="$seed" --out="$out" >"$work/log" || { cat "$work/log"; exit 1; }
    luajit - "$out/summary.json" "$recipe, $model" "$seed" "$steps" "$share" <<'EOT' || failed=1
local f = assert(io.open(arg[1])); local s = require("cjson").decode(f:read("*a")); f:close()
local ratio = s.after.kl / s.before.kl
print(("| %s | %s | %s | %.4f | %.4f | %.4f | %.3f | %.5f | %.5f | %s |"):format(arg[2], arg[3], arg[4], s.before.kl, s.searched.kl, s.after.kl,
  ratio, s.before.cka, s.after.cka, s.export_bit_equal and "equal, every bit" or "DIFFERS"))
local whole = arg[5] == "1" -- a few steps of warm-up say nothing about CKA yet
os.exit(ratio <= (whole and 0.8 or 1) and (not whole or s.after.cka > s.before.cka) and s.export_bit_equal and 0 or 1)
EOT
    rm -rf "$out"
  done
done

echo
echo "| full QAD step, F32, preset all, full KL, batch 8 x 256, 2 threads | ours, tokens/s | with CKA n = 128 | CKA costs | peak MiB | PyTorch, tokens/s | peak MiB | ours / PyTorch | peak ratio |"
echo "|---|---|---|---|---|---|---|---|---|"
rounds=$(part 5 1); steps=$(part 20 3)
for model in qwen3_gsm8k nemotron_h_gsm8k; do
  : >"$work/a"; : >"$work/b"; : >"$work/m"; : >"$work/p"; : >"$work/q"
  for _ in $(seq 1 "$rounds"); do # interleaved, so that a busy neighbour slows both
    line=$(build/ckaqad recipes/bench.lua --model="tests/golden/$model" --data="$train" --steps="$steps" --batch=8 --seq=256 --threads=2 | tail -n 1)
    echo "$line" | field tokens_per_s >>"$work/a"
    echo "$line" | field tokens_per_s_cka >>"$work/b"
    echo "$line" | field peak_bytes >>"$work/m"
    if [ -n "$peer" ]; then
      line=$("$peer" tests/peer/qad_torch.py "tests/golden/$model" "$train" --steps 6 --holdout 8 --calib 8 2>/dev/null | tail -n 1)
      echo "$line" | field tokens_per_s >>"$work/p"
      echo "$line" | field peak_MiB >>"$work/q"
    fi
  done
  a=$(median <"$work/a"); b=$(median <"$work/b"); m=$(median <"$work/m"); p=""; q=""
  [ -z "$peer" ] || { p=$(median <"$work/p"); q=$(median <"$work/q"); }
  awk -v model="$model" -v a="$a" -v b="$b" -v m="$m" -v p="$p" -v q="$q" 'BEGIN {
    m /= 1048576
    printf "| %s | %.0f | %.0f | %.1f %% | %.0f |", model, a, b, 100 * (a / b - 1), m
    if (p != "") printf " %.0f | %.0f | %.2f | %.2f |\n", p, q, a / p, m / q; else print " - | - | - | - |" }'
done

echo
echo "| driver and faults | trials | result | seconds |"
echo "|---|---|---|---|"
trial() { # NAME TRIALS COMMAND...: its last line is the result
  local name=$1 n=$2 t=$SECONDS line rc=0
  shift 2
  "$@" >"$work/log" 2>&1 </dev/null || rc=$?
  line=$(tail -n 1 "$work/log")
  [ $rc = 0 ] || { failed=1; line="FAILED: $line"; }
  [ $rc != 77 ] || line="skipped: $line"
  printf '| %s | %s | %s | %d |\n' "$name" "$n" "$line" $((SECONDS - t))
}
# the twentieth of these is what tests/run.sh calls by itself
[ "$share" != 1 ] || trial "stop at step k of 40 and resume" 40 bash tests/recipes/resume.sh --trials=40
[ "$share" != 1 ] || trial "kills in a sweep of 12 runs" 100 bash tests/recipes/sweep.sh --trials=100
[ "$share" != 1 ] || trial "kills while a cache is made" 20 bash tests/recipes/teacher_cache.sh --kills=20
[ "$share" != 1 ] || trial "PTQ block by block killed, begun again" 20 bash tests/recipes/ptq.sh --kills=20
[ "$share" != 1 ] || trial "ranks killed or stopped; bits of 2, 3 and 4 ranks over 20 steps" 50 bash tests/recipes/ranks.sh --trials=50 --steps=20
# shellcheck disable=SC2317
cached() { # ROUNDS LEAST: training from a cache beside the ideal of a step without its teacher, both gsm8k models
  local model documents="--data=$train --holdout=$work/few.jsonl --steps=$1 --top_k=64"
  head -n 20 tests/data/gsm8k_test.jsonl >"$work/few.jsonl"
  for model in nemotron_h_gsm8k qwen3_gsm8k; do
    # shellcheck disable=SC2086
    build/ckaqad recipes/teacher_cache.lua --model="tests/golden/$model" $documents --cache="$work/cache" >/dev/null || return 1
    # shellcheck disable=SC2086
    build/ckaqad tests/recipes/cache_speed.lua --model="tests/golden/$model" $documents --teacher-cache="$work/cache" | tail -n 1 >"$work/speed" || return 1
    rm -rf "$work/cache"
    LEAST=$2 luajit - "$work/speed" "$model" <<'EOT' >>"$work/speeds" || return 1
local f = io.open(arg[1]); local r = require("cjson").decode(f:read "*l"); f:close()
io.write(("%s: teacher %.0f %% of a step, %.2f times as fast, %.0f %% of the ideal; "):format(arg[2], 100 * r.share, r.speedup, 100 * r.efficiency))
os.exit(r.efficiency >= tonumber(os.getenv "LEAST") and 0 or 1)
EOT
  done
  cat "$work/speeds"; echo
}
n=$(part 30 5); least=0.9; [ "$share" = 1 ] || least=0.7 # few rounds say little on a busy machine
trial "steps from a cache, at least 90 % of 1 / (1 - teacher's share)" "$n" cached "$n" "$least"
n=$(part 200 10); trial "Ctrl-C at the prompt" "$n" bash tests/recipes/prompt.sh --trials="$n"
# shellcheck disable=SC2317
listed() { # RUNS: seconds of `runs list` once the index is there
  luajit tests/recipes/make_runs.lua "$work/many" "$1" && build/ckaqad runs list --root="$work/many" >"$work/list" || return 1
  local begun; begun=$(date +%s.%N)
  build/ckaqad runs list --root="$work/many" >"$work/list"
  begun=$begun awk -v now="$(date +%s.%N)" -v lines="$(wc -l <"$work/list")" 'BEGIN { s = now - ENVIRON["begun"]; printf "%.2f s, %d lines\n", s, lines; exit s > 0.5 }' || return 1
}
n=$(part 10000 500); trial "runs list over so many runs, at most 0.5 s" "$n" listed "$n"
# shellcheck disable=SC2317
driver() { # seconds before the first step beyond loading, calibration and evaluation; share of the steps' time
  CKAQAD_PROFILE=1 build/ckaqad recipes/nemotron_nano.lua --steps="$1" --out="$work/driver" | awk '
    /^driver:/ { line = $0; ok = $2 < 0.3 && $8 < 1 } END { print line; exit !ok }'
}
trial "driver cost: at most 0.3 s and 1 %" 120 driver 120 # all of them: in fewer, compiling its loops is most of what it costs
exit "$failed"
