#!/usr/bin/env bash
# The prompt on a pseudo-terminal: Ctrl-C comes back within a second with everything intact; then a saved session runs as a recipe.
#   bash tests/recipes/prompt.sh [--trials=11]
set -eu
cd "$(dirname "$0")/../.."
trials=11
for a in "$@"; do
  case $a in --trials=*) trials=${a#*=} ;; *) echo "prompt.sh: unknown option $a, wanted --trials=N" >&2; exit 2 ;; esac
done
work=$(mktemp -d /tmp/ckaqad-prompt-XXXXXX); trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $1"; exit 1; }

# without a terminal: values print themselves, errors name the line, the session is a recipe
build/ckaqad >"$work/out" 2>"$work/err" <<EOT
1 + 1
_ * 10
silent = { 1, 2 };
silent
local function twice(x)
  return 2 * x
end
twice(21)
if true then
  error("on line two")
end
cq.lss
model = cq.model.open "recipes/lab/teacher"
model:parameter "lm_head.weight"
cq.save_session "$work/session.lua"
EOT
grep -qx 20 "$work/out" || fail "_ is not the last value"
grep -qx 42 "$work/out" || fail "a local function is lost"
grep -q "bf16 264x64" "$work/out" || fail "a parameter does not show its dtype and shape"
[ "$(grep -c '{ 1, 2 }' "$work/out")" = 1 ] || fail "a ; does not silence"
{ grep -q "prompt:2: on line two" "$work/err" && grep -q '2 |   error("on line two")' "$work/err"; } || fail "an error does not show the line"
grep -q "nearest is loss" "$work/err" || fail "no nearest name"
build/ckaqad "$work/session.lua" >"$work/again" || fail "the saved session does not run"
grep -qx 42 "$work/again" || fail "the saved session gives another value"

HOME="$work" XDG_STATE_HOME="$work/state" build/pty_prompt build/ckaqad "$trials"
[ -s "$work/state/ckaqad/history" ] || fail "no history was kept"
