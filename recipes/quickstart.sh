#!/usr/bin/env bash
# The main job on the embedded teacher: installs what is missing, builds, distils, reports. Opens nothing.
#   bash recipes/quickstart.sh [--steps=60 ...]      further options go to recipes/nemotron_nano.lua
set -eu
cd "$(dirname "$0")/.."
. recipes/packages.sh
# shellcheck disable=SC2086
need $build_packages
cuda=OFF; ! nvidia-smi -L >/dev/null 2>&1 || cuda=AUTO # the cuda backend takes minutes to build: only where it can be used
cmake -S . -B build -G Ninja -DCKAQAD_TESTS=OFF -DCKAQAD_CUDA=$cuda >build-quickstart.log 2>&1 || { tail -n 20 build-quickstart.log; exit 1; }
cmake --build build --target ckaqad >>build-quickstart.log 2>&1 || { tail -n 40 build-quickstart.log; exit 1; }
mv build-quickstart.log build/
exec build/ckaqad recipes/nemotron_nano.lua --out=runs/quickstart --fresh "$@"
