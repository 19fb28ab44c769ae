#!/usr/bin/env bash
# An offline teacher: made, stopped, continued and made again it is the same bytes, as many as its formula says; a training from it
# sees the losses of the teacher; a cache of anything else, or one that is cut short, is refused in a line.
#   bash tests/recipes/teacher_cache.sh [--kills=1]      makings that are killed and continued; more than 1: nothing else
set -eu
cd "$(dirname "$0")/../.."
kills=1
for a in "$@"; do
  case $a in --kills=*) kills=${a#*=} ;; *) echo "teacher_cache.sh: unknown option $a" >&2; exit 2 ;; esac
done
work=$(mktemp -d /tmp/ckaqad-cache-XXXXXX); trap 'rm -rf "$work"' EXIT
head -n 60 tests/data/gsm8k_train.jsonl >"$work/train.jsonl"
head -n 8 tests/data/gsm8k_test.jsonl >"$work/holdout.jsonl"
for i in $(seq 8); do echo '{"input_ids": [5,6,7,8], "labels": [-100,-100,7,8]}'; done >"$work/ids.jsonl"
model=tests/golden/nemotron_h_gsm8k
docs="--data=$work/train.jsonl --holdout=$work/holdout.jsonl --seq=64 --batch=4 --micro=2 --rows=32 --threads=1"
fail() { echo "teacher_cache.sh: $1" >&2; [ ! -e "$work/log" ] || tail -n 5 "$work/log" >&2; exit 1; }
# shellcheck disable=SC2086
make() { build/ckaqad recipes/teacher_cache.lua --model="$model" $docs --steps=6 --top_k=48 "$@" >"$work/log" 2>&1; } # OPTIONS...
# shellcheck disable=SC2086
train() { # RECIPE OPTIONS...
  local recipe=$1; shift
  build/ckaqad "recipes/$recipe.lua" --model="$model" $docs --steps=4 --top_k=48 --calibrate=4 --no-tensorboard --out="$work/run" --fresh "$@" >"$work/log" 2>&1
}
refused() { # REGEX EXIT COMMAND...
  local regex=$1 want=$2 rc=0; shift 2
  "$@" || rc=$?
  { [ $rc = "$want" ] && [ "$(grep -c '^ckaqad: ' "$work/log")" = 1 ] && grep -qE -- "$regex" "$work/log"; } || fail "$* -> exit $rc, wanted $want and /$regex/"
}

make --cache="$work/a" || fail "the making failed"
for i in $(seq "$kills"); do # killed when a few files are there, half of one or less, then continued
  rm -rf "$work/b"
  # shellcheck disable=SC2086
  build/ckaqad recipes/teacher_cache.lua --model="$model" $docs --steps=6 --top_k=48 --cache="$work/b" >"$work/killed" 2>&1 &
  pid=$!
  until [ "$(find "$work/b" -name 'step-*.safetensors' 2>/dev/null | wc -l)" -ge $((1 + (2 + i) % 7)) ]; do sleep 0.003; kill -0 $pid 2>/dev/null || break; done
  kill -KILL $pid 2>/dev/null || true
  wait $pid 2>/dev/null || true
  grep -q '"complete": true' "$work/b/teacher.json" || refused 'not finished' 3 train nemotron_nano --teacher-cache="$work/b"
  make --cache="$work/b" || fail "continuing failed"
  grep -qE ' [1-9][0-9]* were there' "$work/log" || fail "nothing of the stopped making was used"
  diff -r "$work/a" "$work/b" || fail "stopped and continued: other bytes"
done
if [ "$kills" -gt 1 ]; then echo "$kills makings killed and continued: the same bytes"; exit 0; fi
{ make --cache="$work/a" && grep -q ' 0 files made' "$work/log"; } || fail "made again, something was made"
make --cache="$work/f" --storage=f32 || fail "the making in F32 failed"

# k (4 + 2) + 8 bytes for every target, the triangles, rows and their table: counted from the tensors
luajit - "$work/a" <<'EOT' || fail "bytes are not those of the formula"
local json, n = require "cjson", 0
for path in io.popen("ls " .. arg[1] .. "/step-*"):lines() do
  local f = io.open(path, "rb"); local s = f:read "*a"; f:close()
  local size = 0
  for i = 8, 1, -1 do size = 256 * size + s:byte(i) end
  local h = json.decode(s:sub(9, 8 + size))
  local valid, k, rows, taps = h.ids.shape[1], h.ids.shape[2], h.rows.shape[1], h.taps.shape[1]
  assert(k == 48 and rows == 32 and taps == 12)
  assert(#s - 8 - size == valid * (k * 6 + 8) + taps * (rows * (rows + 1) / 2 * 2 + 4 + 4) + 4 * rows + 4, path)
  n = n + 1
end
assert(n == 12, n)
EOT

# first step: KL within 1e-3 of itself from F16 and 1e-5 from F32, CKA within 3e-6 and 1e-8; frozen parameters and other losses too
check() { # RELATIVE-KL ABSOLUTE-CKA: first steps of run and want
  luajit - "$work/want" "$work/run" "$1" "$2" <<'EOT' || fail "the losses differ"
local function first(dir) local f = io.open(dir .. "/metrics.jsonl"); local l = f:read "*l"; f:close(); return require("cjson").decode(l) end
local a, b = first(arg[1]), first(arg[2])
local kl, cka = math.abs(b.kl / a.kl - 1), a.cka ~= require("cjson").null and math.abs(b.cka - a.cka) or 0
assert(kl <= tonumber(arg[3]) and cka <= tonumber(arg[4]), ("KL %g of itself, CKA %g"):format(kl, cka))
EOT
}
for options in "" "--top_k=16 --tail=truncated --estimator=biased --cka=last:3 --freeze=*norm*,*.gate.weight" "--layer=gram --tail=renormalized --balance=gradnorm"; do
  rm -rf "$work/want"
  # shellcheck disable=SC2086
  train nemotron_nano $options || fail "online: $options"
  mv "$work/run" "$work/want"
  # shellcheck disable=SC2086
  train nemotron_nano --teacher-cache="$work/a" $options || fail "from the cache: $options"
  check 1e-3 3e-6
  grep -q "teacher weights" "$work/log" && fail "teacher weights are in the plan"
  # shellcheck disable=SC2086
  train nemotron_nano --teacher-cache="$work/f" $options || fail "from the cache in F32: $options"
  check 1e-5 1e-8
  [ -n "$options" ] || grep -q "PTQ" "$work/run/log.txt" || fail "no held-out measure"
done

from() { train nemotron_nano --teacher-cache="$work/a" "$@"; } # the last option wins
refused 'seed 1, wanted 2' 3 from --seed=2
refused 'top_k 48, wanted at least 49' 3 from --top_k=49
refused 'top_k 48, wanted at least 1024 \(--tail=full\)' 3 from --tail=full
refused 'rows 32, wanted 31' 3 from --rows=31
refused 'seq 64, wanted 63' 3 from --seq=63
refused 'batch 4, wanted 8' 3 from --batch=8
refused 'micro 2, wanted 4' 3 from --micro=4
refused 'mask all, wanted assistant' 3 from --mask=assistant --data="$work/ids.jsonl" --holdout="$work/ids.jsonl"
refused 'steps 6, wanted at least 7' 3 from --steps=7
refused 'documents [0-9a-f]{12}, wanted [0-9a-f]{12}$' 3 from --data="$work/holdout.jsonl"
refused 'held-out documents [0-9a-f]{12}, wanted [0-9a-f]{12}$' 3 from --holdout="$work/train.jsonl"
refused 'gpus: plans trainings' 2 make --cache="$work/a" --dry-run --gpus=1
refused 'cosine needs the teacher' 2 from --layer=cosine
refused 'model [0-9a-f]{12}, wanted' 3 train nemotron_nano --model=recipes/lab/teacher --teacher-cache="$work/a"
mkdir "$work/m"; cp "$model"/*.json "$model"/*.safetensors "$work/m"; chmod u+w "$work/m/tokenizer.json"; echo >>"$work/m/tokenizer.json"
refused 'tokenizer [0-9a-f]{12}, wanted' 3 train nemotron_nano --model="$work/m" --teacher-cache="$work/a"
make --cache="$work/c" --cka=last:2 --steps=2 || fail "a cache of two blocks"
refused 'Grams of blocks 10,11, wanted block 0 too' 3 train nemotron_nano --steps=2 --teacher-cache="$work/c"
refused 'made with --top_k 48, wanted 16' 2 make --cache="$work/c" --cka=last:2 --top_k=16
refused 'teacher.json is missing' 3 train nemotron_nano --teacher-cache="$work/none"
refused 'not empty and holds no cache' 2 make --cache="$work/m"
truncate -s -100 "$work/c/step-000002-001.safetensors"
refused 'step-000002-001.safetensors: is [0-9]+ bytes long, its header wanted [0-9]+: cut short' 3 train nemotron_nano --steps=2 --cka=last:2 --teacher-cache="$work/c"
rm "$work/c/step-000002-001.safetensors"
refused 'step-000002-001.safetensors: is missing' 3 train nemotron_nano --steps=2 --cka=last:2 --teacher-cache="$work/c"
cp "$work/f/step-000001-000.safetensors" "$work/a/step-000001-001.safetensors"
refused 'step-000001-001.safetensors: is of the micro-batch' 3 from
echo "a cache made in pieces is the same bytes, losses are the teacher's, 22 others are refused"
