#!/usr/bin/env bash
# An include goes down the layers or stays in its own; a recipe requires "ckaqad" and nothing else.
#
# Bottom to top: core/base, kernels, core/tensor, core/comm, core/text, core/quant, core/block, core/model, core/train,
# core (the umbrella header, the version), lua. kernels/nvfp4.h is a leaf without includes of ours: every layer may use it.
set -eu
cd "$(dirname "$0")/../.."
files() { git ls-files --cached --others --exclude-standard "$@" | while read -r f; do [ -f "$f" ] && echo "$f"; done; }

includes=$(files 'core/*' 'kernels/*' 'lua/*' | grep -E '\.(c|h|cu|cuh|def)$' | xargs grep -nE '^[[:space:]]*#[[:space:]]*include')
requires=$(files 'recipes/*.lua' 'lua/*.lua' | xargs grep -nE "require *\(? *[\"']" || true)

printf '%s\n' "$includes" | awk '
  BEGIN {
    n = split("core/base kernels core/tensor core/comm core/text core/quant core/block core/model core/train core lua", order, " ")
    for (i = 1; i <= n; i++) rank[order[i]] = i
  }
  function layer(path,   part, k) {
    k = split(path, part, "/")
    if (part[1] != "core") return part[1]
    return k > 2 ? part[1] "/" part[2] : part[1]
  }
  function complain(what, fix) { printf "%s: %s\n    fix: %s\n", at, what, fix; failed = 1 }
  {
    match($0, /:[0-9]+:/)
    file = substr($0, 1, RSTART - 1); at = substr($0, 1, RSTART + RLENGTH - 2)
    ours = $0 ~ /include[ \t]*"/
    target = $0; sub(/^[^"<]*["<]/, "", target); sub(/[">].*/, "", target)
    from = layer(file); to = layer(target)
    if (!(from in rank)) complain("the folder " from " has no layer", "add it to the order in tests/lint/layers.sh")
    else if (target ~ /^(lua|lauxlib|lualib|luajit)\.h/) {
      if (from != "lua") complain("includes " target, "C below lua/ knows no Lua: move the code to lua/")
    } else if (file == "kernels/nvfp4.h" && ours) complain("includes " target, "the codec header is a leaf: C library headers only")
    else if (target == "kernels/nvfp4.h") next
    else if (target ~ /^(core|kernels|lua)\//) {
      if (!(to in rank)) complain("includes " target ", whose folder has no layer", "add it to the order in tests/lint/layers.sh")
      else if (rank[to] > rank[from]) complain("includes " target ", but " from " lies below " to, "move what is needed down, or the code that needs it up")
    } else if (ours) complain("includes \"" target "\"", "write the path from the repository root")
  }
  END { if (!failed) printf "layers: %d includes, all go down\n", NR; exit failed }' || bad=1

# the Lua API sees C through one module; recipes see the Lua API only (recipes/lab is the study, not an example)
printf '%s\n' "$requires" | awk '
  function complain(what, fix) { printf "%s: %s\n    fix: %s\n", at, what, fix; failed = 1 }
  NF {
    match($0, /:[0-9]+:/)
    file = substr($0, 1, RSTART - 1); at = substr($0, 1, RSTART + RLENGTH - 2); rest = substr($0, RSTART + RLENGTH)
    while (match(rest, /require *\(? *["\047][^"\047]*/)) {
      module = substr(rest, RSTART, RLENGTH); sub(/.*["\047]/, "", module); rest = substr(rest, RSTART + RLENGTH)
      if (module == "ffi" && file != "lua/ckaqad/ffi.lua" && file != "lua/embed.lua" && file != "lua/ckaqad/sqlite.lua") # functions of SQLite only
        complain("requires ffi", "C is touched in lua/ckaqad/ffi.lua only: add the function there")
      else if (file ~ /^recipes\/[^\/]*$/ && module != "ckaqad")
        complain("requires " module, "a recipe requires \"ckaqad\" only: move the code into lua/ckaqad/")
    }
  }
  END { exit failed }' || bad=1
exit "${bad:-0}"
