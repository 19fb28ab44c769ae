#!/usr/bin/env bash
# clang-format over every C, CUDA and header file; luacheck (with .luacheckrc) over every Lua file.
set -u
cd "$(dirname "$0")/../.." || exit 1
files() { git ls-files --cached --others --exclude-standard "$@" | while read -r f; do [ -f "$f" ] && echo "$f"; done; }
bad=0

if ! places=$(files '*.c' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror 2>&1); then
  unformatted=$(printf '%s\n' "$places" | grep -oE '^[^ :]+:[0-9]+' | cut -d: -f1 | sort -u)
  printf 'not formatted, first places:\n%s\n' "$(printf '%s\n' "$places" | grep -E '^[^ :]+:[0-9]+' | sort -t: -k1,1 -u)"
  printf '    fix: clang-format -i %s' "$(printf '%s' "$unformatted" | tr '\n' ' ')"
  printf '\n    (.clang-format in the root; clang-format %s)\n' "$(clang-format --version | grep -oE '[0-9]+\.[0-9.]+' | head -1)"
  bad=1
fi

if ! problems=$(files '*.lua' | xargs luacheck --quiet --no-color --codes); then
  printf '%s\n    fix: the lines above; a warning that is wrong gets "-- luacheck: ignore CODE" and a reason on its line\n' "$problems"
  bad=1
fi

[ $bad = 0 ] && echo "format: $(files '*.c' '*.h' '*.cu' '*.cuh' | wc -l) C files, $(files '*.lua' | wc -l) Lua files"
exit $bad
