#!/usr/bin/env bash
# `ckaqad runs` over 500 run folders: what it prints, several processes at once, a killed one, a broken index, what it deletes.
set -u
cd "$(dirname "$0")/../.." || exit 1
top=$PWD; work=$(mktemp -d /tmp/ckaqad-runs-XXXXXX); trap 'rm -rf "$work"' EXIT
program="${CKAQAD:-$top/build/ckaqad}"; root="$work/runs"; n=500; fails=0; checks=0
fail() { fails=$((fails + 1)); echo "FAILED: $*"; }
check() { checks=$((checks + 1)); "${@:2}" || fail "$1"; }                      # WHAT COMMAND...
runs() { "$program" runs --root="$root" "$@"; }
has() { grep -qE -- "$1" "$2"; }                                                 # REGEX FILE
bad() { # EXIT REGEX ARGUMENTS...: one line on standard error, nothing on standard output
  local want=$1 regex=$2 rc=0; shift 2; checks=$((checks + 1))
  runs "$@" >"$work/out" 2>"$work/err" || rc=$?
  if [ $rc != "$want" ] || [ "$(grep -c . "$work/err")" != 1 ] || [ -s "$work/out" ] || ! has "$regex" "$work/err"; then
    fail "runs $* -> exit $rc, wanted $want and one line with /$regex/"; cat "$work/err"
  fi
}
json() { # FILE N: N lines, each an object
  luajit - "$1" "$2" <<'EOT'
package.path = "lua/?.lua;" .. package.path
local json, n = require "ckaqad.json", 0
for line in io.lines(arg[1]) do
  assert(next(json.decode(line, arg[1])))
  n = n + 1
end
os.exit(n == tonumber(arg[2]) and 0 or 1)
EOT
}
together() { # N: as many lists at once; all must say the same, all on standard output
  local i pids=()
  for i in $(seq "$1"); do runs list >"$work/list.$i" 2>"$work/err.$i" & pids+=($!); done
  for i in "${pids[@]}"; do wait "$i" || fail "one of $1 lists at once ended with exit $?"; done
  for i in $(seq "$1"); do cmp -s "$work/list.$i" "$work/reference" || fail "list $i of $1 at once differs"; done
  cat "$work"/err.* >"$work/errs"; rm -f "$work"/list.* "$work"/err.*
}

luajit tests/recipes/make_runs.lua "$root" $n
runs >"$work/reference" 2>"$work/err"
check "the first list says that it made the index" has "made from $n run folders" "$work/err"
check "the list has every run and a title" [ "$(wc -l <"$work/reference")" = $((n + 1)) ]
check "a line of the list" has '^run-00003  +finished  nemotron_nano +20/20  0\.0080 → 0\.0060  0\.9900 → 0\.9950  [0-9]+ d$' "$work/reference"
start=$(date +%s%N); runs >"$work/out" 2>"$work/err"; took=$((($(date +%s%N) - start) / 1000000))
check "list over $n runs took $took ms, wanted less than 500" [ $took -lt 500 ]
check "the second list is silent" [ ! -s "$work/err" ]
sed -i 's/  *[0-9]* d$//' "$work/reference"; mv "$work/reference" "$work/without_age"; runs >"$work/reference"

rm "$root/.index.sqlite"; together 6
for _ in 1 2 3; do head -c 20000 /dev/urandom >"$root/.index.sqlite"; together 4; check "a broken index is announced" has 'made again' "$work/errs"; done
for i in 1 2 3 4 5 6 7 8 9 10; do # killed while it makes the index
  rm -f "$root/.index.sqlite"*; runs >/dev/null 2>&1 & pid=$!
  sleep "0.$(printf %02d $((i * 3)))"; kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
  runs >"$work/out" 2>/dev/null; check "the list after a kill" cmp -s "$work/out" "$work/reference"
done
check "the index is sound" [ "$(runs query 'PRAGMA integrity_check' --format=csv | tail -n 1 | tr -d '\r')" = ok ]

runs list --json --last=7 >"$work/out"; check "JSON of the list" json "$work/out" 7
runs show run-00004 --json >"$work/out"; check "JSON of a run" json "$work/out" 1
check "absent values have no key" [ "$(grep -c '"point"\|"kl_eval"' "$work/out")" = 0 ]
runs show run-00004 >"$work/out"; check "a run's curve" has 'KL of the steps: █.*▁  0\.0100 → 0\.0005' "$work/out"
check "a run's recovery" has '^recovery of KL: 37\.[23] %$' "$work/out"
runs compare run-00004 run-00005 >"$work/out"; check "what differs" has '^--lr +3e-05 +0\.0001$' "$work/out"
check "one factor is no flag" [ "$(grep -c flag: "$work/out")" = 0 ]
sed -i 's/"cka": "all", "seed"/"cka": "none", "seed"/' "$root/run-00005/run.json"; touch "$root/run-00005"
runs compare run-00004 run-00005 >"$work/out"; check "two factors are flagged" has '^flag: the runs differ in 2 options besides the seed \(lr, cka\)' "$work/out"
runs table --by=lr --format=csv >"$work/out"
check "the table's title" has '^option_lr,n,kl,kl_sd,kl_n,kl_best,perplexity,' "$work/out"
check "the table's rows" [ "$(wc -l <"$work/out")" = 6 ]
check "the best is marked" has '^0\.0001,16[67],0\.00403.*,16[67],1,' "$work/out"
runs table --by=lr >"$work/out"; check "the table flags a second factor" has '^flag: the runs differ in more than lr: cka too' "$work/out"
runs table --json >"$work/out" 2>/dev/null; check "JSON of the table" json "$work/out" 6
runs query "SELECT options ->> 'lr' AS lr, count(*) AS n FROM runs GROUP BY 1 ORDER BY 1" --json >"$work/out"
check "SQL on the options" has '^\{"lr":3e-05,"n":167\}$' "$work/out"

bad 2 'lst is unknown, nearest is list' lst
bad 2 'run-0001: not found .*, nearest is run-0000' show run-0001
bad 2 'option --rot is unknown, nearest is --root' --rot=x
bad 2 'pdf is unknown, nearest is csv' table --format=pdf
bad 2 'option lrr is unknown, nearest is lr' table --by=lrr
bad 2 'changes the index' query 'DELETE FROM runs'
bad 2 'no such column: kl' query 'SELECT kl FROM runs'
bad 2 'wanted two or more' compare run-00001
bad 2 'does not exist' --root="$work/none"

mkdir "$root/run-00001/checkpoints" "$root/run-00002/checkpoints"; echo x >"$root/run-00001/checkpoints/state"
rm "$root/run-00006/summary.json"; rm "$root/run-00007/summary.json"; echo '{"format": 9}' >"$root/run-00008/run.json"; touch "$root/run-00008"
runs list run-00008 >"$work/out"; check "a newer format is named" has 'newer format 9' "$work/out"
runs prune >"$work/out" 2>"$work/err"; check "what would be deleted" has "run-00001/checkpoints  2 B$" "$work/out"
check "nothing is deleted without --yes" [ -e "$root/run-00001/checkpoints/state" ]
runs prune --yes >/dev/null 2>&1; check "checkpoints are deleted" [ ! -e "$root/run-00001/checkpoints" ]
check "and nothing else" [ -e "$root/run-00001/summary.json" ]
"$program" -e 'local n = require "ckaqad.ffi"; local out = n.new "cq_lock *[1]"; n.call.cq_lock_take(out, arg[1]); print "held"; io.stdout:flush(); io.read()' \
  "$root/run-00007/lock" < <(sleep 20) >"$work/held" 2>/dev/null & holder=$!
until [ -s "$work/held" ]; do sleep 0.05; kill -0 $holder 2>/dev/null || { fail "no lock is held"; exit 1; }; done
runs list --status=running >"$work/out"; check "a held run is running" has '^run-00007 +running' "$work/out"
runs prune --stopped --yes >/dev/null 2>&1
check "a stopped run is deleted" [ ! -e "$root/run-00006" ]
check "a running one is kept" [ -e "$root/run-00007/run.json" ]
kill $holder; wait $holder 2>/dev/null
# points that successive halving ended early are no leftovers: their sweep is finished
mkdir -p "$root/halved/points"; mv "$root/run-00009" "$root/halved/points/aa"; mv "$root/run-00010" "$root/halved/points/bb"
rm "$root/halved/points/aa/summary.json" "$root/halved/points/bb/summary.json"
echo '{"format": 1, "points": [{"hash": "aa", "name": "lr=1", "dropped": 10}, {"hash": "bb", "name": "lr=2"}]}' >"$root/halved/sweep.json"
runs list halved >"$work/out"; check "a dropped point" has '^halved/points/aa +dropped' "$work/out"; check "a stopped point" has '^halved/points/bb +stopped' "$work/out"
runs prune halved --stopped >"$work/out" 2>&1; check "a dropped point is not offered" [ "$(grep -c points/aa "$work/out")" = 0 ]
runs prune halved --stopped --yes >"$work/out" 2>&1
check "a dropped point stays" [ -e "$root/halved/points/aa/run.json" ]; check "a stopped one goes" [ ! -e "$root/halved/points/bb" ]
mv "$root/halved/points/aa" "$root/run-00009"; rm -r "$root/halved"
runs list >"$work/out"; check "the list follows" [ "$(wc -l <"$work/out")" = $((n - 1)) ]
runs report run-00003 >"$work/out"; check "a report is written" [ -s "$(cat "$work/out")" ]

echo "runs: $checks checks, $fails failed; list over $n runs $took ms"
[ $fails = 0 ]
