#!/usr/bin/env bash
# What the documentation says is run: every example of the API's comments, every command of the tutorial, completion, the man page.
set -eu
cd "$(dirname "$0")/../.."
top=$PWD; program=${CKAQAD:-$top/build/ckaqad}; work=$(mktemp -d /tmp/ckaqad-docs-XXXXXX); trap 'rm -rf "$work"' EXIT
fail() { echo "docs.sh: $*"; exit 1; }

# --- examples: in a scratch folder, on a few held-out documents
mkdir "$work/examples"; ln -s "$top/recipes" "$work/examples/recipes"
head -n 6 recipes/lab/teacher/holdout.jsonl >"$work/examples/holdout.jsonl"
(cd "$work/examples" && "$program" "$top/tests/recipes/examples.lua" --lua="$top/lua" --data=recipes/lab/teacher/train.jsonl \
  --holdout=holdout.jsonl) || fail "an example of the API does not run"
cat >"$work/broken.lua" <<'END'
local examples = require "gen_api"
examples.examples = function() return { { name = "x", file = "x.lua", line = 3, code = "print(1) --> 2\n" } } end
END
# the runner itself has to notice: an example that prints something else, with its line
if (cd "$work/examples" && LUA_INIT="" "$program" -e "
  package.path = '$top/lua/?.lua;' .. package.path
  dofile '$work/broken.lua'
  arg = { '--lua=$top/lua', '--data=recipes/lab/teacher/train.jsonl', '--holdout=holdout.jsonl', '--out=broken' }
  dofile '$top/tests/recipes/examples.lua'" >"$work/broken.log" 2>&1); then fail "a wrong example passed"; fi
grep -q 'x.lua:3: line 1 printed is 1, the example says 2' "$work/broken.log" || { cat "$work/broken.log"; fail "a wrong example was not named"; }

# --- tutorial: its sh blocks in order, one shell, 3 steps a run
mkdir -p "$work/tutorial/build" "$work/tutorial/runs"; ln -s "$top/recipes" "$work/tutorial/recipes"; ln -s "$program" "$work/tutorial/build/ckaqad"
awk '/^```sh$/ { inside = 1; next } /^```$/ { inside = 0 } inside' recipes/TUTORIAL.md |
  sed -E 's/^(build.*)--steps=[0-9]+/\1--steps=3/' >"$work/tutorial.sh"
[ "$(grep -c '^build/ckaqad' "$work/tutorial.sh")" -ge 7 ] || fail "the tutorial lost its commands"
begun=$SECONDS
(cd "$work/tutorial" && bash -eux "$work/tutorial.sh") || fail "a command of the tutorial fails"
echo "tutorial: $((SECONDS - begun)) s"
(
  cd "$work/tutorial"
  [ -s runs/first/report.html ] && [ -s runs/my-balance/report.html ] || fail "a report of the tutorial is missing"
  [ "$(find runs/my-balance/points -name summary.json | wc -l)" = 9 ] || fail "three rules with three seeds are not nine finished points"
  for word in ratio fixed:1 fading recovery; do grep -q "$word" runs/my-balance/table.md || fail "table.md has no $word"; done
)

# --- completion: as bash calls it, words split at = and :
# shellcheck source=core/packaging/ckaqad.bash
. core/packaging/ckaqad.bash
complete -p ckaqad | grep -q -- '-F _ckaqad' || fail "no completion of ckaqad"
offers() { # WANTED WORD...
  local wanted=$1; shift
  COMP_WORDS=("$program" "$@"); COMP_CWORD=$#; COMPREPLY=()
  _ckaqad
  [ "${COMPREPLY[*]}" = "$wanted" ] || fail "completion of $*: got '${COMPREPLY[*]}', wanted '$wanted'"
}
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
offers 'recipes/nemotron_nano.lua ' nemo
offers 'verify ' ver
offers '--scales= --schedule=' recipes/nemotron_nano.lua --sc
offers 'mse ' recipes/nemotron_nano.lua --scales = ms
offers 'constant  cosine  linear ' recipes/qwen3.lua --schedule =
offers 'attention,last:' recipes/qwen3.lua --cka = attention,l
offers '8,mamba ' recipes/qwen3.lua --cka = last : 8,ma
offers 'gradnorm ' recipes/qwen3.lua --sweep balance = grad
offers 'by_block ' recipes/ablate_balance.lua --balance = by_
offers 'compare ' runs co
COMP_WORDBREAKS=$' \t\n'
offers '--scales=mse ' recipes/nemotron_nano.lua --scales=ms

# --- the man page renders without a warning
if command -v groff >/dev/null; then
  [ -z "$(groff -man -ww -Tutf8 core/packaging/ckaqad.1 2>&1 >/dev/null)" ] || fail "the man page has warnings"
  groff -man -Tascii -P-cbu core/packaging/ckaqad.1 | grep -q 'recipes/sweep_lr.lua' || fail "the man page names no recipes"
else
  echo "groff is missing, the man page was not rendered"
fi
echo "docs: all run"
