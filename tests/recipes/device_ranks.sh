#!/usr/bin/env bash
# Two ranks with a device each, on the emulated device: core/comm/nccl.c, over an emulated NCCL, gives the bits and the bytes of the way
# through the host; a rank that is lost, an error of NCCL and an NCCL that hangs end all with one line.
#   bash tests/recipes/device_ranks.sh [--build=build]
set -eu
cd "$(dirname "$0")/../.."
build=build
case ${1:-} in --build=*) build=${1#*=} ;; esac
command -v mpirun >/dev/null || { echo "skipped: no mpirun here"; exit 77; }
[ -x $build/ckaqad_on_cpu ] || { echo "skipped: no C++ compiler, the emulated device was not built"; exit 77; }
work=$(mktemp -d /tmp/ckaqad-device-ranks-XXXXXX); trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CKAQAD_CUDA_DEVICES=2
head -n 60 tests/data/gsm8k_train.jsonl >"$work/train.jsonl"
head -n 2 tests/data/gsm8k_test.jsonl >"$work/few.jsonl"
fail() { echo "device_ranks.sh: $1" >&2; tail -n 12 "$work/log" >&2; exit 1; }
go() { # OUT
  mpirun --oversubscribe -n 2 $build/ckaqad_on_cpu recipes/qwen3.lua --device=cuda --model=tests/golden/qwen3_gsm8k --data="$work/train.jsonl" \
    --holdout="$work/few.jsonl" --preset=tiny --seq=32 --batch=2 --micro=1 --rows=16 --calibrate=1 --gram=ranks --no-tensorboard --threads=1 \
    --steps=1 --out="$1" >"$work/log" 2>&1
}
bits() { luajit tests/recipes/bits.lua "$1" | sha256sum | cut -d' ' -f1; }
sent() { grep -o '"\(reduce-scatter\|all-gather\)":[ 0-9]*' "$1/summary.json" | tr '\n' ' '; }

go "$work/nccl" || fail "2 ranks failed"
grep -q "2 ranks, Open MPI.*, NCCL .* between devices" "$work/log" || fail "2 ranks do not say that NCCL moves what they have"
CKAQAD_NCCL=0 go "$work/host" || fail "2 ranks through the host failed"
grep -q "2 ranks, Open MPI [^,]*$" "$work/log" || fail "CKAQAD_NCCL=0 does not turn NCCL off"
[ "$(bits "$work/nccl")" = "$(bits "$work/host")" ] || fail "2 ranks: other bits than through the host"
{ [ -n "$(sent "$work/nccl")" ] && [ "$(sent "$work/nccl")" = "$(sent "$work/host")" ]; } || fail "other bytes than through the host: $(sent "$work/nccl"), $(sent "$work/host")"

# faults: RANK:GROUP:KIND of tests/cuda_on_cpu/nccl.c; group 0 is connecting, 1 a reduce-scatter, 2 an all-gather
faults=0
fault() { # RANKS FAULT SECONDS LINE
  local rc=0 begun took
  begun=$(date +%s%N)
  CKAQAD_CUDA_DEVICES=4 CKAQAD_NCCL_FAULT=$2 PATIENCE=3 timeout 60 mpirun --oversubscribe -n "$1" $build/device_ranks_on_cpu nccl >"$work/log" 2>&1 || rc=$?
  took=$((($(date +%s%N) - begun) / 1000000))
  { [ $rc != 0 ] && [ $rc != 124 ] && [ "$(grep -c "^device_ranks: " "$work/log")" = 1 ] && grep -q "^device_ranks: $4" "$work/log"; } ||
    fail "fault $2 of $1 ranks: exit $rc, wanted one line: $4"
  [ $took -lt $(($3 * 1000)) ] || fail "fault $2 of $1 ranks: the others took $took ms to end"
  faults=$((faults + 1))
}
fault 2 1:0:system 8 "rank 1: ncclCommInitRankConfig returned 2 (unhandled system error: no socket); last collective: broadcast 1 (NCCL's id)"
fault 3 1:1:system 8 "rank 1: ncclGroupEnd returned 2 (unhandled system error: an injected fault); last collective: reduce-scatter [0-9]* (pieces)"
fault 2 0:2:call 8 "rank 0: ncclSend returned 4 (invalid argument: an injected fault); last collective: all-gather "
fault 3 1:0:die 8 "rank 1: process [0-9]* has ended, wanted it to take part; "
fault 3 1:1:die 8 "rank 1: process [0-9]* has ended, wanted it to take part; "
fault 2 0:2:die 8 "rank 0: process [0-9]* has ended, wanted it to take part; "
fault 2 1:1:stop 12 "rank 1: not heard of for 3 s (stopped, or its machine is gone); last collective: reduce-scatter [0-9]* (pieces)"
fault 2 1:2:hang 20 "rank [01]: ncclGroupEnd returned 7 (operation in progress: not done after 13 s); last collective: all-gather "

# which GPU: one for each rank of a machine
refused() { # TEXT COMMAND...
  local text=$1 rc=0; shift
  "$@" >"$work/log" 2>&1 || rc=$?
  { [ $rc = 2 ] && [ "$(grep -c "^ckaqad: " "$work/log")" = 1 ] && grep -q "^ckaqad: $text" "$work/log"; } || fail "exit $rc, wanted 2 and one line: $text"
}
for where in cuda auto; do
  CKAQAD_CUDA_DEVICES=1 refused "option --device: $where for each of 2 ranks on this machine, which has 1 GPU, wanted as many; " \
    mpirun --oversubscribe -n 2 $build/ckaqad_on_cpu recipes/qwen3.lua --device=$where --dry-run
done
CKAQAD_CUDA_DEVICES=1 mpirun --oversubscribe -n 2 $build/device_ranks_on_cpu nccl >"$work/log" 2>&1 && fail "two ranks on one device without NCCL's setting"
grep -q "^device_ranks: rank 0: ncclCommInitRankConfig returned 5 (invalid usage: Duplicate GPU detected" "$work/log" || fail "no line about two ranks on one device"
CKAQAD_CUDA_DEVICES=1 NCCL_MULTI_RANK_GPU_ENABLE=1 mpirun --oversubscribe -n 2 $build/device_ranks_on_cpu nccl >"$work/log" 2>&1 ||
  fail "two ranks on one device failed with NCCL_MULTI_RANK_GPU_ENABLE=1"
echo "2 ranks with NCCL equal the way through the host, every bit and byte; $faults faults named in one line"
