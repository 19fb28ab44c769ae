#!/usr/bin/env bash
# Bad input: the exit code of the table, one line that names file, finding and wish, and nothing half-written.
set -u
cd "$(dirname "$0")/../.." || exit 1
top=$PWD; work=$(mktemp -d /tmp/ckaqad-bad-XXXXXX); trap 'rm -rf "$work"' EXIT
run="$top/build/ckaqad"; nano="$top/recipes/nemotron_nano.lua"
good="$top/tests/golden/nemotron_h_tiny"; fails=0; cases=0

bad() { # EXIT REGEX COMMAND...
  local want=$1 regex=$2 rc=0 lines
  shift 2; cases=$((cases + 1))
  (cd "$work" && timeout 60 "$@" >out.txt 2>err.txt </dev/null) || rc=$?
  lines=$(grep -c . "$work/err.txt")
  if [ $rc != "$want" ] || [ "$lines" != 1 ] || ! grep -qE -- "$regex" "$work/err.txt"; then
    fails=$((fails + 1)); echo "FAILED: $* -> exit $rc (wanted $want), $lines lines on stderr, wanted one with /$regex/:"; head -5 "$work/err.txt"
  fi
  if [ -e "$work/run/nvfp4" ] || ls "$work"/run/nvfp4.* "$work"/*.tmp.* >/dev/null 2>&1; then
    fails=$((fails + 1)); echo "FAILED: $* left something half-written:"; ls -R "$work/run" | head
  fi
  rm -rf "$work/run"
}
model() { rm -rf "$work/m"; cp -r "$good" "$work/m"; chmod -R u+w "$work/m"; } # a copy to break
edit() { # LUA-CODE with the file's text in s, header h (safetensors): rewrites the copy's model file
  luajit - "$work/m/model.safetensors" <<EOT
local path = arg[1]; local f = io.open(path, "rb"); local s = f:read("*a"); f:close()
local n = 0; for i = 8, 1, -1 do n = n * 256 + s:byte(i) end
local h, d = s:sub(9, 8 + n), s:sub(9 + n)
$1
local len = {}; local k = #h; for i = 1, 8 do len[i] = string.char(k % 256); k = math.floor(k / 256) end
f = io.open(path, "wb"); f:write(raw or (table.concat(len) .. h .. d)); f:close()
EOT
}
data() { printf '%s\n' "$@" >"$work/d.jsonl"; }
quick() { echo "$run $nano --model=$work/m --data=$work/d.jsonl --steps=1 --out=$work/run"; }

model; data '{"text": "a b c d e f"}' '{"text": "g h i j k l"}' '{"text": "m n o p"}'
# shellcheck disable=SC2046
{
rm "$work/m/model.safetensors";                                      bad 3 'm.*safetensors' $(quick)
model; truncate -s 5 "$work/m/model.safetensors";                    bad 3 'model.safetensors: ' $(quick)
model; truncate -s 100000 "$work/m/model.safetensors";               bad 3 'model.safetensors: .*wanted' $(quick)
model; edit 'raw = ("\255"):rep(7) .. "\127" .. s:sub(9)';           bad 3 'header.*100000000' $(quick)
model; edit 'h = h:gsub("\"data_offsets\":%[0,", "\"data_offsets\":[2,", 1)'; bad 3 'model.safetensors: .*wanted' $(quick)
model; edit 'h = h:gsub("BF16", "BF17", 1)';                         bad 3 'BF17' $(quick)
model; edit 'h = h:gsub("dt_bias", "dt_bios", 1)';                   bad 3 'dt_bias.* missing' $(quick)
model; edit 'h = h:gsub("%[80%]", "[40,2]", 1)';                     bad 3 'shape \[40, 2\], wanted \[80\]' $(quick)
model; edit 'd = d:sub(1, 100000) .. "\255\127" .. d:sub(100003)';   bad 5 'NaN' $(quick)
model; edit 'h = h:gsub("{", "{\"extra\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[" .. #d .. "," .. #d .. "]},", 1)'; bad 3 'extra' $(quick)
model; sed -i 's/"hidden_size": 80/"hidden_size": 96/' "$work/m/config.json";    bad 3 'wanted' $(quick)
model; sed -i 's/"nemotron_h"/"gpt_oss"/' "$work/m/config.json";     bad 3 'gpt_oss.*nemotron_h' $(quick)
model; echo '{' >"$work/m/config.json";                              bad 3 'config.json' $(quick)
model; data '{"text": "a b"}' '{"text": "c d"}' '{"text": ';         bad 3 'd.jsonl:3: ' $(quick)
data '{"txt": "a b"}';                                               bad 3 'd.jsonl:1: ' $(quick)
: >"$work/d.jsonl";                                                  bad 3 'd.jsonl' $(quick)
data '{"input_ids": [1, 2, 5000, 3]}' '{"input_ids": [1, 2, 3]}';    bad 3 'd.jsonl:1: .*5000.*416' $(quick)
data '{"text": "a b c d e f"}' '{"text": "g h i j k l"}' '{"text": "m n o p"}'
bad 3 'missing.jsonl' "$run" "$nano" --model="$work/m" --data="$work/missing.jsonl" --out="$work/run"
bad 2 'stepz.*steps' $(quick) --stepz=3
bad 2 'steps.*many' $(quick) --steps=many
bad 2 'mamba' $(quick) --cka=mambo
bad 2 'preset' $(quick) --preset=tinny
printf '%s\n' '{"prompt": "a"}' '{"text": "b"}' >"$work/p.jsonl"
gen="$run $top/recipes/generate.lua --model=$work/m"
bad 2 'wanted --prompt' $gen
bad 2 'top_p is 1.5' $gen --prompt=a --top_p=1.5
bad 2 'temperature is -1' $gen --prompt=a --temperature=-1
bad 2 'sequences of 1000[0-9]* tokens.*positions' $gen --prompt=a --tokens=10000000
bad 2 'stop "nope"' $gen --prompt=a --stop=nope
bad 3 'p.jsonl: object 2 has no prompt' $gen --prompts="$work/p.jsonl"
score="$run $top/recipes/eval.lua --model=$work/m"
bad 2 'wanted --file' $score
bad 2 'wanted --answers' $score --suite=lcb --file=d.jsonl
bad 2 'lcbb.*lcb' $score --suite=lcbb --file=d.jsonl
bad 3 'd.jsonl: line 1: no problem' $score --file=d.jsonl
bad 1 'nope/a' $score --file=d.jsonl --answers=nope/a
bad 2 'no-such-recipe' "$run" no-such-recipe.lua
bad 4 'MiB' $(quick) --memory=1MiB
mkdir -p "$work/run"; touch "$work/run/lock" "$work/run/thesis.txt";    bad 2 'not empty and holds no run' $(quick) # what is not a run's stays
bad 2 'hf download|no/such' "$run" "$nano" --model=no/such --out="$work/run"
bad 3 'nvfp4|hf_quant_config|config.json' "$run" verify "$work/m"
mkdir -p "$work/run" && echo mine >"$work/run/file"
# shellcheck disable=SC2091
(cd "$work" && $(quick) >out.txt 2>err.txt </dev/null); rc=$?; cases=$((cases + 1))
if [ $rc != 2 ] || ! [ -f "$work/run/file" ]; then fails=$((fails + 1)); echo "FAILED: a folder of somebody else's: exit $rc"; cat "$work/err.txt"; fi
rm -rf "$work/run"
# a full disk: a small tmpfs for the run folder
if [ "$(id -u)" = 0 ] && mkdir -p "$work/small" && mount -t tmpfs -o size=200k none "$work/small" 2>/dev/null; then
  cases=$((cases + 1))
  (cd "$work" && timeout 60 "$run" "$top/recipes/ptq.lua" --model="$work/m" --data="$work/d.jsonl" --out="$work/small/out" >out.txt 2>err.txt </dev/null); rc=$?
  if [ $rc != 1 ] || ! grep -qiE 'no space' "$work/err.txt" || [ -e "$work/small/out" ] || ls "$work"/small/*.tmp.* >/dev/null 2>&1; then
    fails=$((fails + 1)); echo "FAILED: full disk: exit $rc"; cat "$work/err.txt"; ls -R "$work/small"; fi
  umount "$work/small"
fi
}
echo "$cases cases, $fails failed"
[ "$fails" = 0 ]
