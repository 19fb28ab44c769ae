#!/usr/bin/env bash
# Installs what is missing, builds, runs every test. Each part prints one line; the last line counts them.
#   bash tests/run.sh [PART...]      only these parts: gcc clang sanitize cuda lint lua golden recipes install long
set -u
cd "$(dirname "$0")/.." || exit 1
. recipes/packages.sh
# shellcheck disable=SC2086
need $build_packages libcriterion-dev lua-busted lua-check lua-cjson clang libomp-dev clang-format shellcheck libclang-rt-14-dev groff-base chromium openmpi-bin curl || exit 1

want=" ${*:-gcc clang sanitize cuda lint lua golden recipes install long} "
logs=build/logs; mkdir -p "$logs"
passed=0; failed=0; skipped=0
part() { # NAME LABEL COMMAND...
  case "$want" in *" $1 "*) ;; *) return 0 ;; esac
  local label=$2 log t=$SECONDS rc=0
  log="$logs/$(printf '%s' "$2" | tr -c 'a-zA-Z0-9\n' '_').log"
  shift 2
  "$@" >"$log" 2>&1 </dev/null || rc=$?
  case $rc in
    0) passed=$((passed + 1)); printf 'ok      %-52s %4d s\n' "$label" $((SECONDS - t)) ;;
    77) skipped=$((skipped + 1)); printf 'skipped %-52s %4d s\n' "$label" $((SECONDS - t)) ;;
    *) failed=$((failed + 1)); printf 'FAILED  %-52s %4d s  exit %d, end of %s:\n' "$label" $((SECONDS - t)) $rc "$log"; tail -n 30 "$log" ;;
  esac
}
build() { # FOLDER CMAKE-OPTIONS...
  local dir=$1; shift
  cmake -S . -B "$dir" -G Ninja -DCKAQAD_WERROR=ON -DCKAQAD_CUDA=OFF -DCKAQAD_TESTS=ON "$@" && cmake --build "$dir"
}
each_test() { ctest --test-dir "$1" --no-tests=error --output-on-failure --timeout 300 -j 2; }
sanitized() {
  build build/asan -DCKAQAD_SANITIZE=address,undefined '-DCKAQAD_ISAS=generic;avx512' && ASAN_OPTIONS=detect_leaks=1 LSAN_OPTIONS=suppressions=tests/lint/lsan.supp each_test build/asan
}

race_detector() { # the kernels on the CPU under ThreadSanitizer; beside them the program without oneDNN, MPI and vectors
  cmake -S . -B build/races -G Ninja -DCKAQAD_WERROR=ON -DCKAQAD_ONEDNN=OFF -DCKAQAD_MPI=OFF -DCKAQAD_CUDA=OFF -DCKAQAD_CUDA_RACES=ON -DCKAQAD_ISAS=generic &&
    cmake --build build/races --target ckaqad test_emulator test_cuda_on_cpu_{dense,losses,experts,cached,past,quant,sequence} &&
    ctest --test-dir build/races --no-tests=error --output-on-failure --timeout 600 -j 2 -R 'test_cuda_on_cpu|test_emulator' &&
    build/races/ckaqad tests/golden/check.lua --model=tests/golden/qwen3_tiny --golden=tests/golden/qwen3_tiny.golden.safetensors
}
with_nvcc() { # code for every target compiles and links (quickly, not well), and a machine without a GPU gets one line
  local nvcc; nvcc=$(PATH="$PATH:/usr/local/cuda/bin" command -v nvcc) || { echo "CUDA: not built, no nvcc"; return 77; }
  echo "with $nvcc"
  cmake -S . -B build/cuda -G Ninja -DCKAQAD_WERROR=ON -DCKAQAD_ONEDNN=OFF -DCKAQAD_ISAS=generic \
    -DCMAKE_CUDA_FLAGS="-Xcicc -O1 -Xptxas -O1" && grep -q CKAQAD_NVCC build/cuda/CMakeCache.txt || return 1
  [ -e build/cuda/CMakeFiles/ckaqad_cuda.dir ] || { echo "CUDA: not built, nvcc is too old"; return 77; }
  local nccl=""; [ ! -e build/cuda/CMakeFiles/ckaqad_nccl.dir ] || nccl=device_ranks
  cmake --build build/cuda --target ckaqad ckaqad_bench $nccl && bash tests/gpu.sh --build=build/cuda --no-gpu
}

part gcc "build with gcc, warnings are errors" build build
part gcc "unit tests" each_test build
part clang "build with clang, warnings are errors" build build/clang -DCMAKE_C_COMPILER=clang -DCMAKE_BUILD_TYPE=Debug
part sanitize "unit tests under address and undefined sanitizers" sanitized
part cuda "race detector over the cuda kernels; no oneDNN, no MPI" race_detector
part cuda "the cuda backend compiles for sm_90a and sm_100a" with_nvcc
recipe() { for name; do part recipes "recipes: $name" bash "tests/recipes/$name.sh"; done; }
golden() { for name; do part golden "golden: $name" bash "tests/golden/$name.sh"; done; }
beside="copies graphs device_activations device_faults device_ranks waits" # on the emulated device: mostly one thread, so beside the others
alone="ranks sweep"                                                 # they look at the clock
# shellcheck disable=SC2086
{ (passed=0; failed=0; skipped=0; golden device; recipe $beside; echo "$passed $failed $skipped" >"$logs/beside.counts") >"$logs/beside.txt" 2>&1 & }
for script in tests/lint/*.sh; do part lint "lint: $(basename "$script" .sh)" bash "$script"; done
part lua "Lua unit tests" busted --lua=/usr/bin/luajit tests/lua
golden models
for script in tests/recipes/*.sh; do
  name=$(basename "$script" .sh)
  case " $beside $alone " in *" $name "*) ;; *) recipe "$name" ;; esac
done
wait; cat "$logs/beside.txt"
read -r more_passed more_failed more_skipped <"$logs/beside.counts"
passed=$((passed + more_passed)); failed=$((failed + more_failed)); skipped=$((skipped + more_skipped))
# shellcheck disable=SC2086
recipe $alone
part install "install, and a program against the installed library" bash tests/install/run.sh
part long "long measurements, a twentieth of the trials" bash tests/long.sh --share=20

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
