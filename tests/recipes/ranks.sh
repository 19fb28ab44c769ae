#!/usr/bin/env bash
# Many ranks: the same bits as one rank that adds up its micro-batches in the same order, experts whole or dealt out, checkpoints that
# go on with any number of ranks, a killed and a stopped rank named within seconds, launchers and differences refused in one line.
#   bash tests/recipes/ranks.sh [--steps=2] [--trials=2] [--build=build]     trials: ranks killed or stopped
set -eu
cd "$(dirname "$0")/../.."
steps=2; trials=2; build=build
for a in "$@"; do
  case $a in
    --steps=*) steps=${a#*=} ;;
    --trials=*) trials=${a#*=} ;;
    --build=*) build=${a#*=} ;;
    *) echo "ranks.sh: unknown option $a, wanted --steps=N, --trials=N or --build=DIR" >&2; exit 2 ;;
  esac
done
command -v mpirun >/dev/null || { echo "skipped: no mpirun here"; exit 77; }
$build/ckaqad --help >/dev/null
work=$(mktemp -d /tmp/ckaqad-ranks-XXXXXX); trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
data=$work
head -n 60 tests/data/gsm8k_train.jsonl >"$work/train.jsonl"
head -n 6 tests/data/gsm8k_test.jsonl >"$work/few.jsonl"
fail() { echo "ranks.sh: $1" >&2; tail -n 12 "$work/log" >&2; exit 1; }
go() { # RANKS RECIPE OUT OPTIONS...
  local n=$1 recipe=$2 out=$3 start=""; shift 3
  [ "$n" = 1 ] || start="mpirun --oversubscribe -n $n"
  $start $build/ckaqad "recipes/$recipe.lua" --model="tests/golden/$family" --data="$data/train.jsonl" --holdout="$data/few.jsonl" --preset=tiny --seq=64 \
    --batch=8 --micro=1 --rows=32 --calibrate=4 --no-tensorboard --threads=1 --steps="$steps" --out="$out" "$@" >"$work/log" 2>&1
}
bits() { # RUN: every tensor of the last checkpoint whichever file it is in, metrics without times, evaluations, the export
  luajit tests/recipes/bits.lua "$1" | sha256sum | cut -d' ' -f1
}

same() { # WHAT RUN WANT
  [ "$(bits "$2")" = "$3" ] || fail "$1: other bits than one rank"
  rm -rf "$2"
}
whole() { # FAMILY RECIPE: 2 and 4 ranks with all experts each
  local family=$1 want n
  rm -rf "$work/one"
  go 1 "$2" "$work/one" --ordered || fail "one rank failed"
  want=$(bits "$work/one")
  for n in 2 4; do
    go $n "$2" "$work/many" || fail "$n ranks failed"
    same "$n ranks on $family" "$work/many" "$want"
  done
}
narrow() { # 3 ranks, so that a round has a rank without a micro-batch; another form of masters and moments
  local family=nemotron_h_gsm8k form="--master=split --moments=8bit --scales=mse"
  # shellcheck disable=SC2086
  go 1 nemotron_nano "$work/narrow" --ordered $form || fail "one rank failed with narrow moments"
  # shellcheck disable=SC2086
  go 3 nemotron_nano "$work/many" $form || fail "3 ranks failed"
  same "3 ranks with narrow moments" "$work/many" "$(bits "$work/narrow")"
}
continued() { # checkpoints of 4 ranks and of one go on with any number, with experts dealt out, too
  local family=nemotron_h_gsm8k recipe=nemotron_nano want n
  go 1 $recipe "$work/one" --ordered || fail "one rank failed"
  want=$(bits "$work/one")
  go 4 $recipe "$work/four" --stop_at=1 || fail "4 ranks failed to stop"
  [ "$(find "$work/four/checkpoints/step-1" -name 'state-*-of-00004.safetensors' | wc -l)" = 4 ] || fail "4 ranks did not write 4 files"
  for n in 1 2; do
    cp -r "$work/four" "$work/goes-on"
    go $n $recipe "$work/goes-on" --resume || fail "a checkpoint of 4 ranks did not go on with $n"
    same "a checkpoint of 4 ranks continued on $n" "$work/goes-on" "$want"
  done
  go 1 $recipe "$work/goes-on" --ordered --stop_at=1 || fail "one rank failed to stop"
  go 2 $recipe "$work/goes-on" --resume || fail "a checkpoint of 1 rank did not go on with 2"
  same "a checkpoint of 1 rank continued on 2" "$work/goes-on" "$want"
  go 2 $recipe "$work/four" --moe=ranks --resume || fail "a checkpoint of 4 ranks did not go on with experts dealt out"
  same "a checkpoint of 4 ranks continued with experts dealt out" "$work/four" "$want"
  for n in 2 4; do
    go $n $recipe "$work/many" --moe=ranks || fail "$n ranks with experts dealt out failed"
    same "$n ranks with experts dealt out" "$work/many" "$want"
  done
}
three() { # 3 micro-batches on 2 ranks: one without computes the other's rows; frozen experts, scales that only a holder has
  local family=nemotron_h_gsm8k form="--batch=3 --scales=mse --freeze=*.experts.*.down_proj.weight"
  set -f
  # shellcheck disable=SC2086
  go 1 nemotron_nano "$work/three" --ordered $form || fail "one rank failed with 3 micro-batches"
  # shellcheck disable=SC2086
  go 2 nemotron_nano "$work/many" --moe=ranks $form || fail "2 ranks failed with 3 micro-batches"
  same "3 micro-batches on 2 ranks with experts dealt out" "$work/many" "$(bits "$work/three")"
}
# refusals: one line and the exit code of its kind
refused() { # EXIT TEXT COMMAND...
  local want=$1 text=$2 rc=0; shift 2
  "$@" >"$work/log" 2>&1 || rc=$?
  { [ $rc = "$want" ] && [ "$(grep -c "^ckaqad: " "$work/log")" = 1 ] && grep -q "^ckaqad: $text" "$work/log"; } || fail "exit $rc, wanted $want and one line: $text"
}
refusals() {
  pair="mpirun --oversubscribe -n 2"
  refused 2 "launcher: torchrun started 4 processes, wanted: mpirun -n 4 $build/ckaqad recipes/qwen3.lua --steps=3" \
    env TORCHELASTIC_RUN_ID=1 RANK=0 WORLD_SIZE=4 $build/ckaqad recipes/qwen3.lua --steps=3
  refused 2 "launcher: srun without --mpi=pmix started 2 processes, wanted: mpirun -n 2" env SLURM_PROCID=0 SLURM_NTASKS=2 $build/ckaqad recipes/qwen3.lua
  refused 2 "recipe none.lua: no such file" $pair $build/ckaqad none.lua
  refused 2 "option --batch: 8 rows in micro-batches of 8 are 1 a step, wanted one for each of 2 ranks" \
    $pair $build/ckaqad recipes/nemotron_nano.lua --batch=8 --micro=8 --out="$work/no"
  dealt="recipes/nemotron_nano.lua --data=$data/train.jsonl --preset=tiny --seq=64 --micro=1 --out=$work/no --moe=ranks"
  # shellcheck disable=SC2086
  refused 2 "experts: tests/golden/nemotron_h_gsm8k has 8 in a block, wanted a multiple of the 3 ranks" \
    mpirun --oversubscribe -n 3 $build/ckaqad $dealt --model=tests/golden/nemotron_h_gsm8k
  # shellcheck disable=SC2086
  refused 2 "experts: tests/golden/qwen3_gsm8k has no mixture of experts, wanted one to deal out over 2 ranks" \
    $pair $build/ckaqad $dealt --model=tests/golden/qwen3_gsm8k
  refused 2 "sweep: mpirun started 2 ranks, wanted one process" $pair $build/ckaqad recipes/nemotron_nano.lua --sweep lr=1e-4,2e-4 --out="$work/no"
  cat >"$work/differ.sh" <<'EOT'
#!/bin/sh
[ "$OMPI_COMM_WORLD_RANK" = 1 ] && exec "$OTHER" "$@" $EXTRA
exec "$PROGRAM" "$@"
EOT
  chmod +x "$work/differ.sh"; cp $build/ckaqad "$work/other"; printf x >>"$work/other"; export PROGRAM=$build/ckaqad
  tail -n 50 "$data/train.jsonl" >"$work/others.jsonl"; cp -r tests/golden/qwen3_gsm8k "$work/model"; sed -i 's/{/{ /' "$work/model/config.json"
  common="recipes/qwen3.lua --model=tests/golden/qwen3_gsm8k --data=$data/train.jsonl --preset=tiny --seq=64 --micro=1 --threads=1 --steps=1 --out=$work/no"
  for case in "program:$work/other:" "option --lr:$PROGRAM:--lr=1" "option --model:$PROGRAM:--model=$work/model"; do
    subject=${case%%:*}; rest=${case#*:}; export OTHER=${rest%%:*} EXTRA=${rest#*:}
    # shellcheck disable=SC2086
    refused 6 "rank 1: $subject is not that of rank 0, wanted the same on all 2 ranks" $pair "$work/differ.sh" $common
  done
  cp "$data/train.jsonl" "$work/here.jsonl"; cp "$work/others.jsonl" "$work/there.jsonl"
  cat >"$work/differ.sh" <<'EOT'
#!/bin/sh
cd "$DIR$OMPI_COMM_WORLD_RANK" && exec "$PROGRAM" "$@"
EOT
  PROGRAM=$PWD/$build/ckaqad; [ -x "$PROGRAM" ] || PROGRAM=$build/ckaqad
  export PROGRAM DIR=$work/rank
  mkdir "$work/rank0" "$work/rank1"; cp "$work/here.jsonl" "$work/rank0/d.jsonl"; cp "$work/there.jsonl" "$work/rank1/d.jsonl"
  refused 6 "rank 1: data is not that of rank 0" $pair "$work/differ.sh" "$PWD/recipes/qwen3.lua" --model="$PWD/tests/golden/qwen3_gsm8k" --data=d.jsonl --preset=tiny --seq=64 \
    --micro=1 --threads=1 --steps=1 --out="$work/no"
  [ ! -e "$work/no" ] || fail "a refused run left a folder"
  # what goes wrong on one rank alone is said by rank 0, with its number
  printf '%s\n' 'local cq = require "ckaqad"' 'cq.clock()' 'if os.getenv "OMPI_COMM_WORLD_RANK" == "1" then cq.refuse "no room" end' \
    'while true do cq.clock() os.execute "sleep 0.1" end' >"$work/one.lua"
  refused 3 "rank 1: no room" $pair $build/ckaqad "$work/one.lua"
}
# side by side: half of such a run is starting and ending it
first() { whole qwen3_gsm8k qwen3; whole nemotron_h_gsm8k nemotron_nano; narrow; three; }
inside() { local work=$1; mkdir "$work"; "$2"; }
inside "$work/first" first & one=$!
inside "$work/second" continued & two=$!
inside "$work/third" refusals & three=$!
failed=0
for chain in $one $two $three; do wait "$chain" || failed=1; done
[ $failed = 0 ] || exit 1

# one rank killed, one stopped: the others end within patience and a second, one line names it, the last checkpoint goes on
family=nemotron_h_gsm8k; slowest=0
for i in $(seq 1 "$trials"); do
  n=$((i % 2 ? 4 : 2)); hit=$((i / 2 % n)); signal=$([ $((i % 2)) = 1 ] && echo KILL || echo STOP)
  rm -rf "$work/fault"; moe=$([ $((i / 2 % 2)) = 0 ] && echo ranks || echo local)
  go $n nemotron_nano "$work/fault" --save=1 --steps=4000 --patience=3 --moe="$moe" &
  shell=$!
  until [ -e "$work/fault/checkpoints/latest.json" ]; do sleep 0.05; kill -0 $shell 2>/dev/null || fail "trial $i: the run ended before a checkpoint"; done
  sleep "0.$((i * 37 % 100 + 100))"
  mpirun_=$(pgrep -P $shell mpirun || echo $shell)
  mapfile -t pids < <(pgrep -P "$mpirun_")
  begun=$(date +%s%N)
  kill -$signal "${pids[$hit]}"
  rc=0; wait $shell || rc=$?
  took=$((($(date +%s%N) - begun) / 1000000)); [ $took -le $slowest ] || slowest=$took
  [ $rc != 0 ] || fail "trial $i: SIG$signal to rank $hit of $n: exit 0"
  [ $took -lt 8000 ] || fail "trial $i: SIG$signal to rank $hit of $n: the others took $took ms to end"
  [ "$(grep -c "^ckaqad: " "$work/log")" = 1 ] && grep -q "^ckaqad: rank $hit: .*last collective: " "$work/log" || fail "trial $i: SIG$signal to rank $hit of $n: no single line that names it"
  for pid in "${pids[@]}"; do
    for _ in $(seq 1 40); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.05; done
    fail "trial $i: process $pid still runs"
  done
  at=$(tr -dc 0-9 <"$work/fault/checkpoints/latest.json")
  go $((i % 3 + 1)) nemotron_nano "$work/fault" --save=1 --steps=4000 --stop_at=$((at + 1)) --resume || fail "trial $i: the last checkpoint does not go on"
  grep -q "resumed after step $at" "$work/log" || fail "trial $i: went on from another step than $at"
done

echo "layouts of 2, 3 and 4 ranks equal one rank over $steps steps bit for bit, checkpoints of 4 go on with 1 and 2, $trials ranks killed or stopped: the others ended within $slowest ms"
