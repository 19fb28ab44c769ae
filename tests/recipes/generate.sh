#!/usr/bin/env bash
# Text from a prompt: BF16 and an NVFP4 export, one answer and many, the same bits for the same seed whatever shares a pass, and that kept
# keys and states pay.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/ckaqad-generate-XXXXXX); trap 'rm -rf "$work"' EXIT
g=tests/golden
fail() { echo "generate.sh: $*"; exit 1; }
write() { build/ckaqad recipes/generate.lua --threads=2 "$@"; }

write --prompt='A47+85:' >"$work/out"
grep -qx '7+5+0=12,4+8+1=13;132' "$work/out" || fail "the embedded model does not add: $(cat "$work/out")"
grep -q '^  generation ' "$work/out" || fail "the plan says nothing of generation"

printf '%s\n' '{"prompt": "Natalia sold clips to 48 of her friends"}' '{"messages": [{"role": "user", "content": "What is 3 + 4?"}]}' \
  '{"prompt": "Tom"}' >"$work/prompts.jsonl"
for model in nemotron_h_gsm8k qwen3_gsm8k; do
  build/ckaqad recipes/ptq.lua --model="$g/$model" --data=tests/data/gsm8k_test.jsonl --out="$work/$model" >"$work/log" 2>&1 ||
    fail "$(tail -n 3 "$work/log")"
  for dir in "$g/$model" "$work/$model/nvfp4"; do
    draw="--model=$dir --prompts=$work/prompts.jsonl --tokens=24 --temperature=0.8 --top_p=0.95 --samples=3 --seed=4 --json --quiet"
    # shellcheck disable=SC2086
    { write $draw >"$work/a"; write $draw --slots=2 --threads=1 >"$work/b"; write $draw --seed=5 >"$work/c"; }
    cmp "$work/a" "$work/b" || fail "$dir: slots or threads changed an answer"
    cmp -s "$work/a" "$work/c" && fail "$dir: another seed draws the same"
    [ "$(grep -c '"sample":[123],"text":' "$work/a")" = 9 ] || fail "$dir: wanted 9 answers, got $(cat "$work/a")"
  done
done

line=$(build/ckaqad recipes/bench_generate.lua --model="$g/nemotron_h_gsm8k" --data=tests/data/gsm8k_train.jsonl --sequences=16 --prompt=32 \
  --tokens=64 --rounds=1 --again=2 --threads=2 | tail -n 1)
ratio=${line##*\"ratio\":}
awk "BEGIN { exit !(${ratio%\}} >= 5) }" || fail "kept keys and states do not pay: $line"
echo "generate: all hold, $line"

# benchmarks, on hand-made files of their form: five questions each
eval_() { build/ckaqad recipes/eval.lua --model="$g/qwen3_gsm8k" --threads=2 --samples=2 --tokens=160 "$@" >"$work/eval" || fail "eval.lua $*"; }
for i in 1 2 3 4 5; do echo "{\"id\": \"p$i\", \"problem\": \"Tom has $i apples and buys 4. How many?\", \"answer\": \"$((i + 4))\"}"; done >"$work/aime.jsonl"
{ echo 'Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3'
  for i in 1 2 3 4 5; do echo "\"What is $i, doubled?\",$((i * 2)),7,11,13"; done; } >"$work/gpqa.csv"
for i in 1 2 3 4 5; do echo "{\"question_id\": \"q$i\", \"question_content\": \"Print $i\", \"starter_code\": \"\"}"; done >"$work/lcb.jsonl"
eval_ --suite=aime25 --file="$work/aime.jsonl" --answers="$work/bf16.jsonl"
tail -n 1 "$work/eval" | grep -q '"n":5,"samples":2,"pass":' || fail "aime25: $(tail -n 1 "$work/eval")"
[ "$(grep -c '"right":' "$work/bf16.jsonl")" = 10 ] || fail "aime25: wanted 10 answers"
sed -i 's/"right":false/"right":true/' "$work/bf16.jsonl"
eval_ --suite=aime25 --file="$work/aime.jsonl" --against="$work/bf16.jsonl"
grep -q '^BF16 100.0 %: difference -' "$work/eval" || fail "aime25 against: $(cat "$work/eval")"
eval_ --suite=gpqa --file="$work/gpqa.csv"
grep -q '^gpqa: pass@1 .* k = 2 samples, n = 5 questions' "$work/eval" || fail "gpqa: $(cat "$work/eval")"
eval_ --suite=lcb --file="$work/lcb.jsonl" --answers="$work/lcb.json"
[ "$(grep -o '"code_list":\["' "$work/lcb.json" | wc -l)" = 5 ] || fail "lcb: $(cat "$work/lcb.json")"

# the same questions to a server: three in a row, a key, refusals
build/fake_server >"$work/port" & server=$!
build/fake_server secret >"$work/port2" & other=$!
trap 'kill $server $other; rm -rf "$work"' EXIT
for _ in $(seq 100); do [ -s "$work/port" ] && [ -s "$work/port2" ] && break; sleep 0.05; done
at=http://127.0.0.1:$(cat "$work/port"); with_key=http://127.0.0.1:$(cat "$work/port2")/v1/
asked() { build/ckaqad recipes/eval.lua --suite=aime25 --file="$work/aime.jsonl" "$@" >"$work/eval" 2>&1; }
asked --server="$at" --samples=3 --parallel=4 --answers="$work/served.jsonl" || fail "server: $(cat "$work/eval")"
grep -q "^answers of fake at $at" "$work/eval" && grep -q '^aime25: pass@1 100.0 %.*k = 3 samples, n = 5' "$work/eval" ||
  fail "server: $(cat "$work/eval")"
[ "$(grep -c '"text":"It is \\\\boxed{' "$work/served.jsonl")" = 15 ] || fail "server: $(cat "$work/served.jsonl")"
OPENAI_API_KEY=secret asked --server="$with_key" --served=fake || fail "key: $(cat "$work/eval")"
no() { # PATTERN OPTIONS...
  local pattern=$1; shift
  if asked "$@"; then fail "$*: not refused"; fi
  grep -q "$pattern" "$work/eval" || fail "$*: wanted $pattern, got $(cat "$work/eval")"
}
no 'HTTP 401 to the question for its models: who are you' --server="$with_key"
no 'HTTP 404 to question 1: no such model' --server="$at" --served=other
no 'names no model, wanted --served=NAME' --server="$at/empty"
no 'the answer to question 1 holds no choices' --server="$at/odd"
no 'no answer to the question for its models (curl: (7).*wanted an OpenAI-compatible server' --server=http://127.0.0.1:9
no 'option --server: got "localhost", wanted http://HOST:PORT' --server=localhost
ls -d /tmp/ckaqad-ask-* 2>/dev/null && fail "a folder of requests stays"
echo "eval: all hold"
