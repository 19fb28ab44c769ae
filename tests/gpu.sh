#!/usr/bin/env bash
# Everything that needs a GPU: builds, tests the kernels against ref, the golden models and the recipe on the device, looks for
# memory errors and races, and measures. One line per part; no network; ends within 9 minutes. Without a GPU it exits with 77.
#   bash tests/gpu.sh [OPTION...] [PART...]    parts: build kernels golden recipe repeat forms graphs nccl bench step sanitizer,
#                              and by name only nano: Nemotron 3 Nano whole, random weights, for a GPU of 141 GB
#   --build=DIR   programs that were built before (with DIR/lib for libraries that this machine lacks); else builds into build/gpu
#   --out=DIR     results: table.md, kernels_*.csv, step_*.json, logs [build/gpu-results]
#   --no-gpu      only checks that a machine without a GPU gets one clear line
#   --ranks-on-one-gpu   part nccl with two ranks on a machine with one GPU, too: NCCL does not support that before 2.30
set -u
cd "$(dirname "$0")/.." || exit 1
dir=""; out=build/gpu-results; no_gpu=""; want=""; shared=""
for a; do
  case $a in
    --build=*) dir=${a#*=} ;;
    --out=*) out=${a#*=} ;;
    --no-gpu) no_gpu=1 ;;
    --ranks-on-one-gpu) shared=1 ;;
    -*) echo "gpu.sh: unknown option $a, wanted --build=DIR, --out=DIR, --no-gpu, --ranks-on-one-gpu or parts" >&2; exit 2 ;;
    *) want="$want $a" ;;
  esac
done
want=" ${want:-build kernels golden recipe repeat forms graphs nccl bench step sanitizer} "
[ -n "$dir" ] || { dir=build/gpu; built_here=1; }
[ ! -d "$dir/lib" ] || export LD_LIBRARY_PATH="$PWD/$dir/lib:${LD_LIBRARY_PATH:-}"
export PATH="$PATH:/usr/local/cuda/bin"

if [ -n "$no_gpu" ]; then
  rc=0; said=$(CUDA_VISIBLE_DEVICES='' "$dir/ckaqad" recipes/nemotron_nano.lua --device=cuda --dry-run 2>&1 >/dev/null) || rc=$?
  echo "exit $rc: $said"
  [ "$rc" = 2 ] && [ "$(printf '%s\n' "$said" | wc -l)" = 1 ]; exit
fi
nvidia-smi -L >/dev/null 2>&1 || { echo "gpu.sh: no GPU here, nothing was run"; exit 77; }
mkdir -p "$out"; table=$out/table.md; failed=0
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
printf '%s, %s\n\n| part | result | seconds |\n|---|---|---|\n' "$(date -u +%F)" "$gpu" >"$table"
say() { printf '%-9s %-40s %4d s  %s\n' "$1" "$2" "$3" "$4"; printf '| %s | %s %s | %d |\n' "$2" "$1" "$4" "$3" >>"$table"; }
part() { # NAME LABEL SECONDS COMMAND...: the command's last line is its result
  case "$want" in *" $1 "*) ;; *) return 0 ;; esac
  local label=$2 limit=$3 t=$SECONDS rc=0 log; log="$out/$(printf '%s' "$2" | tr -c 'a-zA-Z0-9\n' '_').log"
  shift 3
  ( set -o pipefail; timeout "$limit" bash -c "$(declare -f); dir=$dir out=$out; \"\$@\"" part "$@" ) >"$log" 2>&1 </dev/null || rc=$?
  if [ $rc = 0 ]; then say ok "$label" $((SECONDS - t)) "$(tail -n 1 "$log" | cut -c 1-160)"
  else failed=$((failed + 1)); say FAILED "$label" $((SECONDS - t)) "exit $rc"; tail -n 12 "$log" | cut -c 1-300; fi
}

build() {
  cmake -S . -B "$dir" -G Ninja -DCKAQAD_CUDA=ON -DCKAQAD_ONEDNN=OFF -DCKAQAD_WERROR=ON && cmake --build "$dir"
}
kernels() { # PROGRAM
  "$dir/$1" --verbose=0 && echo "all tests pass"
}
golden() { # MODEL
  "$dir/ckaqad" tests/golden/check.lua --device=cuda --model="tests/golden/$1" --golden="tests/golden/$1.golden.safetensors" && echo "all groups hold"
}
golden_quantizer() {
  for f in nvfp4 nvfp4_static; do "$dir/ckaqad" tests/golden/check.lua --device=cuda --golden=tests/golden/$f.golden.safetensors || return 1; done
  echo "bit for bit"
}
golden_bf16() { # MODEL: errors at most twice those of the processor's own BF16 evaluation
  local where
  for where in cpu cuda; do
    "$dir/ckaqad" tests/golden/check.lua --device=$where --compute=bf16 --report --model="tests/golden/$1" --golden="tests/golden/$1.golden.safetensors" >"$out/bf16-$1-$where.txt" || return 1
  done
  paste "$out/bf16-$1-cpu.txt" "$out/bf16-$1-cuda.txt"
  awk -f tests/golden/bf16.awk "$out/bf16-$1-cpu.txt" "$out/bf16-$1-cuda.txt"
}
golden_act() { # MODEL: activations in BF16; errors at most twice those of the plain evaluation that is kept beside it
  "$dir/ckaqad" tests/golden/check.lua --device=cuda --compute=bf16 --activations=bf16 --report --model="tests/golden/$1" \
    --golden="tests/golden/$1.golden.safetensors" >"$out/act-$1.txt" || return 1
  paste "tests/golden/$1.bf16.txt" "$out/act-$1.txt"
  awk -f tests/golden/bf16.awk "tests/golden/$1.bf16.txt" "$out/act-$1.txt"
}
differences() { # MODEL: gradients against central differences of the loss, every tensor
  "$dir/ckaqad" tests/recipes/differences.lua --device=cuda --model="tests/golden/$1" --stride=1
}
recipe() { # COMPUTE: the embedded run on both devices: the same lines, close numbers
  local where
  for where in cpu cuda; do
    "$dir/ckaqad" recipes/nemotron_nano.lua --device=$where --compute="$1" --steps=20 --out="$out/run-$where-$1" --fresh >"$out/run-$where-$1.txt" 2>&1 || { cat "$out/run-$where-$1.txt"; return 1; }
    grep -c . "$out/run-$where-$1.txt"
  done
  awk -F'"kl":' '{ split($2, a, ","); v[FILENAME] = v[FILENAME] " " a[1]; k[FILENAME, ++n[FILENAME]] = a[1] }
    END { f = ARGV[1]; g = ARGV[2]; for (i = 1; i <= n[f]; i++) { d = k[f, i] - k[g, i]; if (d < 0) d = -d; d /= k[f, i]; if (i == 1) first = d; if (d > most) most = d }
      printf "KL of step 1 differs by %.2g of itself, of 20 steps by at most %.2g\n", first, most; exit !(n[f] == n[g] && n[f] == 20 && first < 0.02) }' \
    "$out/run-cpu-$1/metrics.jsonl" "$out/run-cuda-$1/metrics.jsonl"
}
repeat() { # ACTIVATIONS: two runs, the same bits
  local i
  for i in 1 2; do
    "$dir/ckaqad" recipes/nemotron_nano.lua --device=cuda --compute=bf16 --activations="$1" --steps=10 --out="$out/again-$i" --fresh >"$out/again-$i.txt" 2>&1 ||
      { tail -n 3 "$out/again-$i.txt"; return 1; }
  done
  cmp "$out/again-1/nvfp4/model.safetensors" "$out/again-2/nvfp4/model.safetensors" && echo "two runs of 10 steps, the same bits"
}
ranks() { # N COMMAND...: under mpirun; "shared" for N: two ranks on the first GPU
  local n=$1; shift
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  [ "$n" = shared ] || { mpirun --oversubscribe -n "$n" "$@"; return; }
  export CUDA_VISIBLE_DEVICES=0 NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=4
  if "$dir/ckaqad" --version | grep -qE 'NCCL 2\.[12]?[0-9]\.'; then # each rank a machine of its own, with a socket between them
    export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_MNNVL_ENABLE=0
    mpirun --oversubscribe -n 2 bash -c 'NCCL_HOSTID=rank$OMPI_COMM_WORLD_RANK exec "$@"' rank "$@"
  else mpirun --oversubscribe -n 2 "$@"; fi
}
nccl() { # [N]: pieces of every size: the bits and the bytes of the way through the host
  if [ $# = 0 ]; then "$dir/device_ranks" nccl; else ranks "$1" "$dir/device_ranks" nccl; fi && echo "the same bits and bytes as through the host"
}
nccl_recipe() { # N: a run over NCCL and one through the host
  local way
  for way in 1 0; do
    CKAQAD_NCCL=$way ranks "$1" "$dir/ckaqad" recipes/nemotron_nano.lua --device=cuda --micro=1 --steps=10 --out="$out/nccl-$1-$way" --fresh >"$out/nccl-$1-$way.txt" 2>&1 ||
      { tail -n 12 "$out/nccl-$1-$way.txt"; return 1; }
    grep -m 1 ' ranks, ' "$out/nccl-$1-$way.txt"
  done
  cmp "$out/nccl-$1-1/nvfp4/model.safetensors" "$out/nccl-$1-0/nvfp4/model.safetensors" && echo "10 steps, the same bits as through the host"
}
bench() { # COMPUTE
  "$dir/ckaqad_bench" --kernels=cuda --compute="$1" --seconds=0.1 --csv="$out/kernels_$1.csv" && echo "$(($(wc -l <"$out/kernels_$1.csv") - 2)) cases"
}
step() { # NAME MODEL SEQ BATCH MICRO OPTION...
  local name=$1 model=$2 seq=$3 batch=$4 micro=$5; shift 5
  "$dir/ckaqad" recipes/bench.lua --device=cuda --model="$model" --weights=random --data=random --seq="$seq" --batch="$batch" --micro="$micro" \
    --rows=512 --compute=bf16 --steps=6 --calibrate=2 "$@" >"$out/step_$name.log" 2>&1 || { tail -n 12 "$out/step_$name.log"; return 1; }
  tail -n 3 "$out/step_$name.log" | tee "$out/step_$name.txt" | grep -v '^{'
}
nano() { # all 52 blocks at their true size, of which the slice is 8
  mkdir -p "$out/nano"
  sed 's/"hybrid_override_pattern": "[^"]*"/"hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"/; s/"num_hidden_layers": 8/"num_hidden_layers": 52/' \
    kernels/bench/nano_slice/config.json >"$out/nano/config.json"
  step nano "$out/nano" 8192 2 1 --activations=bf16 --copies=packed "--freeze=*.experts.*"
}
forms() { # weights and optimizer in every form and place: the same bits
  local form n=0
  for form in --copies=f32 --copies=bf16 --copies=packed "--copies=packed --offload=both"; do
    # shellcheck disable=SC2086
    "$dir/ckaqad" recipes/nemotron_nano.lua --device=cuda --compute=bf16 $form --steps=5 --out="$out/form-$n" --fresh >"$out/form-$n.txt" 2>&1 || { tail -n 3 "$out/form-$n.txt"; return 1; }
    cmp "$out/form-0/nvfp4/model.safetensors" "$out/form-$n/nvfp4/model.safetensors" || return 1
    n=$((n + 1))
  done
  echo "$n forms of 5 steps, the same bits"
}
graphs() { # recorded passes: the bits of passes that run, in training and in generation; tokens/s of generation
  local on played model="--device=cuda --model=tests/golden/qwen3_gsm8k"
  for on in true false; do
    # shellcheck disable=SC2086
    { "$dir/ckaqad" tests/recipes/waits.lua --device=cuda --compute=bf16 --model=tests/golden/nemotron_h_gsm8k --data=random --steps=6 --graphs=$on >"$out/train-$on.txt" &&
      "$dir/ckaqad" recipes/generate.lua $model --prompt="Tom has 3 apples" --samples=8 --tokens=64 --json --graphs=$on >"$out/text-$on.txt" &&
      "$dir/ckaqad" recipes/bench_generate.lua $model --compute=bf16 --again=1 --graphs=$on >"$out/speed-$on.txt"; } 2>&1 || return 1
  done
  cmp <(grep -v '^played ' "$out/train-true.txt") <(grep -v '^played ' "$out/train-false.txt") && cmp <(grep '^{' "$out/text-true.txt") <(grep '^{' "$out/text-false.txt") || return 1
  played=$(sed -n 's/^played \([0-9]*\) passes$/\1/p' "$out/train-true.txt")
  echo "the same bits, $played of 60 passes played;$(grep -h -o 'kept: [0-9]* tokens/s\|alone: [0-9]*' "$out/speed-true.txt" "$out/speed-false.txt" | tr '\n' ' ')"
  [ "$played" -gt 30 ]
}
fp4() { # on FP4 tensor cores: KL near that of BF16 products; one line where there are none
  local rc=0
  "$dir/ckaqad" recipes/nemotron_nano.lua --device=cuda --compute=nvfp4 --copies=packed --steps=20 --out="$out/fp4" --fresh >"$out/fp4.txt" 2>&1 || rc=$?
  if [ $rc = 2 ]; then grep "^ckaqad: option --compute: nvfp4 wants a GPU" "$out/fp4.txt"; return; fi
  [ $rc = 0 ] || { tail -n 3 "$out/fp4.txt"; return 1; }
  grep "^PTQ:\|^after" "$out/fp4.txt" "$out/run-cuda-bf16.txt"; grep "^after" "$out/fp4.txt"
}
sanitizer() { # TOOL MODEL: both passes, losses and quantizer of a golden model, in FP32 and (racecheck is too slow) in BF16
  local both="f32 bf16"
  [ "$1" != racecheck ] || both=f32
  for compute in $both; do
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "$dir/ckaqad" tests/golden/check.lua --device=cuda --report --compute=$compute \
      --model="tests/golden/$2" --golden="tests/golden/$2.golden.safetensors" | grep '=====' || return 9
  done
}

[ -z "${built_here:-}" ] || part build "build" 200 build
for program in "$dir"/test_cuda_*; do
  case $program in *on_cpu*) continue ;; esac
  [ -x "$program" ] && part kernels "kernels: $(basename "$program")" 90 kernels "$(basename "$program")"
done
part golden "golden: quantizer" 60 golden_quantizer
for model in nemotron_h_tiny qwen3_tiny; do
  part golden "golden: $model, f32" 60 golden $model
  part golden "golden: $model, differences" 60 differences $model
  part golden "golden: $model, bf16" 60 golden_bf16 $model
  part golden "golden: $model, bf16 activations" 60 golden_act $model
done
part recipe "recipe: cpu and cuda, f32" 90 recipe f32
part recipe "recipe: cpu and cuda, bf16" 90 recipe bf16
part repeat "repeat: two runs" 60 repeat f32
part repeat "repeat: two runs, bf16 activations" 60 repeat bf16
part forms "forms: copies and offload" 60 forms
part graphs "graphs: recorded and not" 60 graphs
part forms "forms: FP4 tensor cores" 60 fp4
if [ -x "$dir/device_ranks" ]; then
  part nccl "nccl: one rank" 60 nccl
  gpus=$(nvidia-smi -L | wc -l)
  command -v mpirun >/dev/null && [ "$gpus" -gt 1 ] && many=$gpus || many=${shared:+shared}
  if [ -n "$many" ]; then
    part nccl "nccl: $many ranks" 60 nccl "$many"
    part nccl "nccl: recipe, $many ranks" 120 nccl_recipe "$many"
  fi
fi
part bench "bench: bf16" 100 bench bf16
part bench "bench: f32" 100 bench f32
part step "step (qwen3_4b)" 120 step qwen3_4b kernels/bench/qwen3_4b 2048 4 1
part step "step (qwen3_4b, narrow)" 120 step qwen3_4b_narrow kernels/bench/qwen3_4b 2048 4 1 --activations=bf16 --copies=bf16
part step "step (nano_slice)" 90 step nano_slice kernels/bench/nano_slice 2048 4 1
part step "step (nano_slice, no graphs)" 90 step nano_slice_no_graphs kernels/bench/nano_slice 2048 4 1 --graphs=false
part step "step (nano_slice, narrow)" 90 step nano_slice_narrow kernels/bench/nano_slice 2048 4 1 --activations=bf16 --copies=packed
part nano "step (nano, whole, experts frozen)" 500 nano
for tool in memcheck racecheck initcheck synccheck; do
  for model in nemotron_h_tiny qwen3_tiny; do part sanitizer "$tool: $model" 60 sanitizer $tool $model; done
done
echo "$failed parts failed; $table"
[ "$failed" = 0 ]
