#!/usr/bin/env bash
# Builds a program from kernel files and a main or a test_cpu_*.c, to run on the CPU thread by thread.
#   bash tests/cuda_on_cpu/compile.sh OUT SOURCE.cu|TEST.c... [-- COMPILER-OPTIONS]     then run OUT
# build/libckaqad.a and build/libckaqad_plain.a must be there; CKAQAD_BUILD names another folder.
set -eu
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${CKAQAD_BUILD:-$root/build}
out=$1; shift
kernels=(); tests=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in *.c) tests+=("$1") ;; *) kernels+=("$1") ;; esac
  shift
done
[ $# -gt 0 ] && shift
flags=(-O2 -g -Wall -Wextra -DCQ_CUDA_ON_CPU -I"$root/tests/cuda_on_cpu" -I"$root" -fno-strict-aliasing -ffp-contract=off
  -fno-math-errno -Wno-unknown-pragmas "$@")
objects=$(mktemp -d); trap 'rm -rf "$objects"' EXIT
here=$root/tests/cuda_on_cpu
for f in cuda_on_cpu memory; do g++ -std=c++17 "${flags[@]}" -c "$here/$f.cpp" -o "$objects/$f.o"; done
for f in table plain library; do gcc "${flags[@]}" -c "$here/$f.c" -o "$objects/$f.o"; done
for f in ${tests+"${tests[@]}"}; do
  gcc "${flags[@]}" -fopenmp -DWAYS_CUDA -DWAYS_EMULATED '-DWAYS_TABLE="cuda_on_cpu"' -c "$f" -o "$objects/$(basename "$f").o"
done
for f in ${kernels+"${kernels[@]}"}; do g++ -std=c++17 "${flags[@]}" -x c++ -c "$f" -o "$objects/$(basename "$f").o"; done
g++ -rdynamic "${flags[@]}" "$objects"/*.o "$build/libckaqad_plain.a" "$build/libckaqad.a" -o "$out" -lm -fopenmp -ldnnl \
  ${tests+-lcriterion}
