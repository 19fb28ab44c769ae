#!/usr/bin/env bash
# Builds a program from kernel files and a main, to run on the CPU thread by thread.
#   bash tests/cuda_on_cpu/compile.sh OUT SOURCE.cu... [-- COMPILER-OPTIONS]     then run OUT
# build/libckaqad.a must be there (cmake -S . -B build && cmake --build build --target ckaqad_static).
set -eu
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$1; shift
sources=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do sources+=("$1"); shift; done
[ $# -gt 0 ] && shift
flags=(-O2 -g -Wall -Wextra -DCQ_CUDA_ON_CPU -I"$root/tests/cuda_on_cpu" -I"$root" -fno-strict-aliasing -ffp-contract=off
  -Wno-unknown-pragmas "$@")
objects=$(mktemp -d); trap 'rm -rf "$objects"' EXIT
here=$root/tests/cuda_on_cpu
for f in cuda_on_cpu memory; do g++ -std=c++17 "${flags[@]}" -c "$here/$f.cpp" -o "$objects/$f.o"; done
for f in table library; do gcc "${flags[@]}" -c "$here/$f.c" -o "$objects/$f.o"; done
g++ -std=c++17 -rdynamic "${flags[@]}" -x c++ "${sources[@]}" -x none "$objects"/*.o "$root/build/libckaqad.a" -o "$out" -lm -fopenmp
