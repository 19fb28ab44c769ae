#!/usr/bin/env bash
# Installs the build into a folder and uses it from outside: pkg-config, find_package, plain luajit, man page, completion.
set -eu
cd "$(dirname "$0")/../.."
top=$PWD; to=$top/build/installed; work=$top/build/install-test
rm -rf "$to" "$work"; mkdir -p "$work"
cmake --install build --prefix "$to" >/dev/null
lib=$(dirname "$(find "$to" -name 'libckaqad.so' | head -n 1)")
export PKG_CONFIG_PATH=$lib/pkgconfig LD_LIBRARY_PATH=$lib

echo "== pkg-config"
# shellcheck disable=SC2046
gcc -std=gnu11 -Wall -Wextra -Werror tests/install/example.c $(pkg-config --cflags --libs ckaqad) -o "$work/example"
"$work/example" tests/golden/qwen3_gsm8k tests/data/gsm8k_test.jsonl "$work/nvfp4"
"$to/bin/ckaqad" verify "$work/nvfp4" --against=tests/golden/qwen3_gsm8k

echo "== find_package"
mkdir -p "$work/consumer"
cp tests/install/example.c "$work/consumer/"
cat >"$work/consumer/CMakeLists.txt" <<'EOT'
cmake_minimum_required(VERSION 3.20)
project(consumer C)
find_package(ckaqad 0.1 REQUIRED)
add_executable(example example.c)
target_link_libraries(example PRIVATE ckaqad::ckaqad)
EOT
cmake -S "$work/consumer" -B "$work/consumer/build" -G Ninja -DCMAKE_PREFIX_PATH="$to" >/dev/null
cmake --build "$work/consumer/build"

echo "== plain luajit"
LUA_PATH="$to/share/lua/5.1/?.lua;$to/share/lua/5.1/?/init.lua;;" luajit -e '
  local cq = require "ckaqad"
  print(cq.version)
  local m = cq.model.open("tests/golden/qwen3_tiny")
  print(m)'

echo "== headers stand alone, also in C++"
for h in $(cd "$to/include/ckaqad" && find . -name '*.h'); do
  echo "#include \"${h#./}\"" | gcc -std=gnu11 -fsyntax-only -I"$to/include/ckaqad" -x c -
done
test -s "$to/share/man/man1/ckaqad.1"
bash -n "$to/share/bash-completion/completions/ckaqad"
