#!/usr/bin/env bash
# Quantizing block by block: the bytes of the whole model in memory; killed at any instant or stopped by a full disk, the same command
# goes on and gives the same bytes; weights only without documents; a broken checkpoint is refused in a line.
#   bash tests/recipes/ptq.sh [--kills=2]      instants at which it is killed; more than 2: nothing else
set -eu
cd "$(dirname "$0")/../.."
kills=2
for a in "$@"; do
  case $a in --kills=*) kills=${a#*=} ;; *) echo "ptq.sh: unknown option $a" >&2; exit 2 ;; esac
done
work=$(mktemp -d /tmp/ckaqad-ptq-XXXXXX)
trap 'umount "$work/small" 2>/dev/null || true; rm -rf "$work"' EXIT
head -n 40 tests/data/gsm8k_train.jsonl >"$work/d.jsonl"
fail() { echo "ptq.sh: $1" >&2; [ ! -e "$work/log" ] || tail -n 5 "$work/log" >&2; exit 1; }
ptq() { # MODEL OPTIONS...
  local model=$1; shift
  build/ckaqad recipes/ptq.lua --model="$model" --threads=1 "$@" >"$work/log" 2>&1
}
refused() { # EXIT REGEX MODEL OPTIONS...: one line, and nothing is left
  local want=$1 regex=$2 rc=0; shift 2
  rm -rf "$work/run"
  ptq "$@" --out="$work/run" || rc=$?
  { [ $rc = "$want" ] && [ "$(grep -c '^ckaqad: ' "$work/log")" = 1 ] && grep -qE -- "$regex" "$work/log"; } || fail "$* -> exit $rc, wanted $want and /$regex/"
  [ ! -e "$work/run" ] || fail "$* left $(find "$work/run" | head -3)"
}

# --- killed: five shards, 14 parts
nano=tests/golden/nemotron_h_gsm8k; shards=--shard-bytes=700000
begun=$(date +%s%N)
ptq $nano --data="$work/d.jsonl" --stream=yes $shards --out="$work/a" || fail "block by block failed"
whole=$(($(date +%s%N) - begun))
[ "$(find "$work/a/nvfp4" -name 'model-*-of-00005.safetensors' | wc -l)" = 5 ] || fail "not five shards"
[ "$(grep -c . "$work/a/nvfp4/model.safetensors.index.json")" -gt 100 ] || fail "no index"
continued=0
RANDOM=20261126
for i in $(seq "$kills"); do
  rm -rf "$work/b"
  # one instant in each of so many equal spans of a run, which is longer while it is killed and begun again
  wait_ns=$(((i - 1) * whole / kills + RANDOM * (whole / 32768) / kills))
  build/ckaqad recipes/ptq.lua --model=$nano --threads=1 --data="$work/d.jsonl" --stream=yes $shards --out="$work/b" >"$work/killed" 2>&1 &
  pid=$!
  sleep "$((wait_ns / 1000000000)).$(printf '%09d' $((wait_ns % 1000000000)))"
  kill -KILL $pid 2>/dev/null || true
  wait $pid 2>/dev/null || true
  ptq $nano --data="$work/d.jsonl" --stream=yes $shards --out="$work/b" || fail "continuing failed"
  if grep -q '^continued after' "$work/log"; then continued=$((continued + 1)); fi
  diff -r "$work/a/nvfp4" "$work/b/nvfp4" || fail "killed after $wait_ns ns and continued: other bytes"
done
if [ "$kills" -gt 2 ]; then echo "$kills times killed and begun again, $continued went on with a part: the same bytes"; exit 0; fi

# --- one path for every size: the export of the model in memory
model=tests/golden/qwen3_gsm8k
ptq $model --data="$work/d.jsonl" --stream=no --out="$work/c" || fail "in memory failed"
ptq $model --data="$work/d.jsonl" --stream=yes --out="$work/d" || fail "block by block failed"
diff -r "$work/c/nvfp4" "$work/d/nvfp4" || fail "block by block gives other bytes"
{ ptq $model --data="$work/d.jsonl" --stream=yes --out="$work/d" && grep -q 'finished already' "$work/log"; } || fail "a finished run did not say so"
rm "$work/d/summary.json" # a kill while the folder was looked at
{ ptq $model --data="$work/d.jsonl" --stream=yes --out="$work/d" && grep -q 'all rules of verify hold' "$work/log" && ! grep -q '^quantized' "$work/log"; } || fail "a whole folder was made again"

# --- weights only
ptq $model --out="$work/w" || fail "weights only failed"
grep -q 'no documents' "$work/log" || fail "it did not say why"
grep -q W4A16_NVFP4 "$work/w/nvfp4/hf_quant_config.json" || fail "weights only are not W4A16"
refused 2 'wanted --data=FILE.jsonl' $model --stream=no
refused 2 'stream: sometimes is unknown' $model --stream=sometimes

# --- checkpoints that are not whole
broken() { # LUA-CODE with the index i and a function drop(FILE, TENSOR)
  rm -rf "$work/m"; cp -r tests/golden/qwen3_tiny "$work/m"; chmod -R u+w "$work/m"
  luajit - "$work/m" <<EOF
local json, dir = require "cjson", arg[1]
local function read(p) local f = assert(io.open(dir .. "/" .. p, "rb")); local s = f:read "*a"; f:close(); return s end
local function write(p, s) local f = assert(io.open(dir .. "/" .. p, "wb")); f:write(s); f:close() end
local function drop(file, tensor) -- takes a tensor out of a shard, as a writer that never had it
  local s, n = read(file), 0
  for k = 8, 1, -1 do n = n * 256 + s:byte(k) end
  local h, d = json.decode(s:sub(9, 8 + n)), s:sub(9 + n)
  local o = assert(h[tensor], tensor).data_offsets
  h[tensor] = nil
  for _, t in pairs(h) do
    if t.data_offsets and t.data_offsets[1] >= o[2] then
      t.data_offsets[1], t.data_offsets[2] = t.data_offsets[1] - (o[2] - o[1]), t.data_offsets[2] - (o[2] - o[1])
    end
  end
  local text, length = json.encode(h), {}
  local k = #text
  for j = 1, 8 do length[j] = string.char(k % 256); k = math.floor(k / 256) end
  write(file, table.concat(length) .. text .. d:sub(1, o[1]) .. d:sub(o[2] + 1))
  return o[2] - o[1]
end
local i = json.decode(read "model.safetensors.index.json")
local up = "model.layers.1.mlp.up_proj.weight"
$1
write("model.safetensors.index.json", json.encode(i))
EOF
}
broken 'i.metadata.total_size = i.metadata.total_size - drop(i.weight_map[up], up); i.weight_map[up] = nil'
refused 3 'm: tensor model.layers.1.mlp.up_proj.weight is missing, the config wants it' "$work/m"
broken 'drop(i.weight_map[up], up)'
refused 3 'index.json: says model.layers.1.mlp.up_proj.weight is in model-0000.-of-00002.safetensors, where it is not' "$work/m"
broken 'i.weight_map[up] = i.weight_map[up]:gsub("0000.", function(s) return s == "00001" and "00002" or "00001" end, 1)'
refused 3 'index.json: says model.layers.1.mlp.up_proj.weight is in model-0000.-of-00002.safetensors, found it in .*model-0000.-of-00002' "$work/m"
broken 'i.weight_map[up] = nil'
refused 3 'says model.layers.1.mlp.up_proj.weight is in no file, found it in' "$work/m"
broken 'i.metadata.total_size = 7'
refused 3 'index.json: total_size is 7, wanted [0-9]+' "$work/m"
broken 'os.remove(dir .. "/" .. i.weight_map[up])'
refused 3 'model-0000.-of-00002.safetensors: No such file' "$work/m"
broken 'write("model-00002-of-00002.safetensors", read("model-00002-of-00002.safetensors"):sub(1, -3) .. "\255\127")'
refused 5 'holds NaN at element' "$work/m"

# --- a full disk at a shard in the middle; there is room later
if [ "$(id -u)" = 0 ] && mkdir "$work/small" && mount -t tmpfs -o size=17m none "$work/small" 2>/dev/null; then
  small() { ptq $nano --data="$work/d.jsonl" --stream=yes $shards --out="$work/small/run"; }
  rc=0; small || rc=$?
  { [ $rc = 1 ] && grep -qE '^ckaqad: .*nvfp4.partial/model-0000.*No space left' "$work/log"; } || fail "a full disk: exit $rc"
  grep -qE 'stopped after [1-9].*the same command goes on' "$work/log" || fail "a full disk: no word about going on"
  [ ! -e "$work/small/run/nvfp4" ] || fail "a full disk: half a folder"
  mount -o remount,size=30m "$work/small"
  small || fail "after a full disk: did not go on"
  grep -q '^continued after' "$work/log" || fail "after a full disk: began anew"
  diff -r "$work/a/nvfp4" "$work/small/run/nvfp4" || fail "after a full disk: other bytes"
fi
echo "block by block: the bytes of the model in memory, $kills kills and a full disk later too; 9 broken checkpoints and options are refused"
