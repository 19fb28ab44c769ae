#!/usr/bin/env bash
# The whole study: trains the teachers, writes the documents, runs every arm, and puts tables and pictures into RESULTS.md. Says what it
# will cost first. Stopped or killed, the same command goes on; what has ended is not run again.
#   bash recipes/lab/reproduce.sh [--tiny] [--estimate] [--out=FOLDER] [--jobs=N] [--program=FILE]
#     --tiny       all of it on models and budgets of seconds, results in FOLDER too: a test of the machinery, not a result
#     --estimate   say the cost and leave
set -eu
cd "$(dirname "$0")/../.."
tiny=""; only=""; out=""; jobs=$(nproc); program=build/ckaqad
for a in "$@"; do
  case $a in
    --tiny) tiny=1 ;;
    --estimate) only=1 ;;
    --out=*) out=${a#*=} ;;
    --jobs=*) jobs=${a#*=} ;;
    --program=*) program=${a#*=} ;;
    *) echo "reproduce.sh: unknown option $a, wanted --tiny, --estimate, --out=FOLDER, --jobs=N or --program=FILE" >&2; exit 2 ;;
  esac
done
[ -x "$program" ] || { echo "reproduce.sh: $program is missing, wanted a build: bash recipes/quickstart.sh" >&2; exit 2; }
out=${out:-runs/lab${tiny:+-tiny}}
file=recipes/lab/RESULTS.md; pictures=recipes/lab/pictures
first="ME*ME*ME"; pretrain=300; sft=4000; rl=500; updates=200; rates=3; tries=1; seeds=5; few=3; pretrain_options=""
sft_options=""; rl_options=""; mix_options=""; score_options=""; study_options=""; qwen_sft=2000
if [ -n "$tiny" ]; then
  file=$out/RESULTS.md; pictures=$out/pictures
  first="ME*M"; pretrain=5; sft=80; qwen_sft=80; rl=12; updates=4; rates=2; tries=1; seeds=2; few=1
  pretrain_options="--hidden=32 --experts=4 --batch=4"
  sft_options="--mix=easy --documents=4000 --batch=16 --lr=1e-2 --items=100"
  rl_options="--mix=easy --prompts=16 --items=100 --lr=1e-3"
  mix_options="--written=200 --drawn=200 --other=20 --held=20 --items=60 --least=0"
  score_options="--mix=easy --items=80 --samples=1"
  study_options="--mix=easy --items=60 --samples=1 --batch=4 --rates=1e-3,3e-3 --damage=-100"
fi
mkdir -p "$out"

# One recipe, unless it has ended; its last lines on an error.
go() { # NAME RECIPE OPTIONS...
  local name=$1 recipe=$2; shift 2
  [ ! -e "$out/$name/summary.json" ] || return 0
  echo "$(date +%H:%M:%S) $name"
  "$program" "recipes/lab/$recipe.lua" --no-tensorboard --out="$out/$name" "$@" >>"$out/$name.log" 2>&1 || {
    rc=$?; tail -n 3 "$out/$name.log" >&2; echo "reproduce.sh: $name ended with $rc; the same command goes on" >&2; exit "$rc"; }
}
score() { # NAME
  [ -e "$out/$1.json" ] || { echo "$(date +%H:%M:%S) score of $1"
    # shellcheck disable=SC2086
    "$program" recipes/lab/score.lua --model="$out/$1/model" --scores="$out/$1.json" $score_options >"$out/$1.score.log" 2>&1 || {
      tail -n 2 "$out/$1.score.log" >&2; exit 1; }; }
}
study() { # NAME TEACHER ARMS RATES
  [ ! -e "$out/$1/study.json" ] || return 0
  go "$1-mix" mix --model="$out/$2/model" $mix_options
  echo "$(date +%H:%M:%S) $1: arms $3"
  "$program" recipes/lab/study.lua --model="$out/$2/model" --data="$out/$1-mix" --out="$out/$1" --arms="$3" --rates="$4" --updates=$updates \
    --tries=$tries --seeds=$seeds --few=$few --jobs="$jobs" $study_options >>"$out/$1.log" 2>&1 || {
    rc=$?; tail -n 3 "$out/$1.log" >&2; echo "reproduce.sh: $1 ended with $rc; the same command goes on" >&2; exit "$rc"; }
}

# Cost: a few steps of pretraining here, and how much dearer the other work is, in such steps: an RL step 4.3, a step of an arm 1.17 where as
# many arms as cores share them, the measuring at an arm's end 43 (processor time on 2 cores, LOG.md). A tiny run starts up 0.3 s.
estimate() {
  local probe=$out/probe rate trained_runs other_runs
  # shellcheck disable=SC2086
  [ -e "$probe/summary.json" ] || "$program" recipes/lab/pretrain.lua --pattern="$first" --steps=24 --threads="$jobs" --no-tensorboard \
    $pretrain_options --out="$probe" >"$probe.log" 2>&1 || { tail -n 2 "$probe.log" >&2; exit 1; }
  rate=$(sed -nE 's/.*"step":([0-9]+),.*"tokens":([0-9]+),"seconds":([0-9.e-]+).*/\1 \2 \3/p' "$probe/metrics.jsonl" |
    awk '$1 > 8 { t += $2; s += $3 } END { print t / s }')
  trained_runs=$((18 * rates * tries + 9 * seeds + 9 * few + 2 * (rates - 1) * seeds + 3 * (4 * tries + 4 * seeds)))
  other_runs=$((2 * tries + 4 * seeds + 3 * (2 * tries + 2 * seeds)))
  awk -v rate="$rate" -v jobs="$jobs" -v tiny="${tiny:-0}" -v own=$((2 * pretrain + sft + qwen_sft)) -v rl=$((3 * rl)) -v up=$updates \
    -v trained=$trained_runs -v other=$other_runs 'BEGIN {
      step = 4096 / rate
      seconds = tiny ? 15 + (trained + other) * 0.6 / jobs : step * (own + 4.3 * rl + trained * (1.17 * up + 43) + other * 43 + 600)
      minutes = int(seconds / 60) + 1
      printf "cost: about %d:%02d h with %d arms at a time, %d runs of arms; pretraining does %.0f k tokens/s here\n", minutes / 60,
        minutes % 60, jobs, trained + other, rate / 1000 }'
}
estimate
[ -z "$only" ] || exit 0

# shellcheck disable=SC2086
{
  go pretrain pretrain --pattern="$first" --steps=$pretrain --save=100 $pretrain_options
  go sft sft --model="$out/pretrain/model" --steps=$sft --save=200 $sft_options
  go rl-1 rl --model="$out/sft/model" --steps=$rl --save=50 --seed=1 $rl_options
  go rl-2 rl --model="$out/sft/model" --steps=$rl --save=50 --seed=2 $rl_options
  go qwen-pretrain pretrain --family=qwen3 --pattern=MMMM --steps=$pretrain --save=100 $pretrain_options
  go qwen-sft sft --model="$out/qwen-pretrain/model" --steps=$qwen_sft --save=200 $sft_options
  go qwen-rl rl --model="$out/qwen-sft/model" --steps=$rl --save=50 $rl_options
  for name in sft rl-1 rl-2 qwen-sft qwen-rl; do score $name; done
  study study-rl-1 rl-1 all 1e-4,2e-4,5e-4
  study study-rl-2 rl-2 short 1e-4,5e-4
  study study-sft sft short 1e-4,5e-4
  study study-qwen qwen-rl short 1e-4,5e-4
}
"$program" recipes/lab/results.lua --file="$file" --pictures="$pictures" \
  --stages="SFT=$out/sft.json;RL, seed 1=$out/rl-1.json;RL, seed 2=$out/rl-2.json;Qwen3 shape, SFT=$out/qwen-sft.json;Qwen3 shape, RL=$out/qwen-rl.json" \
  --studies="RL, seed 1=$out/study-rl-1;RL, seed 2=$out/study-rl-2;SFT=$out/study-sft;Qwen3 shape, RL=$out/study-qwen"
