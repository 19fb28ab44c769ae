#!/usr/bin/env bash
# The study's machinery on a model of seconds: reinforcement learning raises the reward, goes on after a stop to the same bits, and
# refuses what cannot work.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/ckaqad-lab-XXXXXX); trap 'rm -rf "$work"' EXIT
fail() { echo "lab.sh: $1" >&2; tail -n 12 "$work/log" >&2; exit 1; }
go() { # EXIT RECIPE OPTIONS...: all it says in $work/log
  local want=$1 recipe=$2 rc=0; shift 2
  "${CKAQAD:-build/ckaqad}" "recipes/lab/$recipe.lua" --threads=1 --no-tensorboard "$@" >"$work/log" 2>&1 </dev/null || rc=$?
  [ "$rc" = "$want" ] || fail "exit $rc, wanted $want: $recipe $*"
}
said() { grep -qE -- "$1" "$work/log" || fail "nothing says /$1/"; } # REGEX
percent() { sed -nE "s/^$1.*: ([0-9.]+) % of .*/\1/p" "$work/log"; } # WHEN

# rewards: a group's weights have mean 0 and deviation 1, groups of one kind are left out; pass@1 is the mean over problems
"${CKAQAD:-build/ckaqad}" -e '
  local setting, problems = dofile "recipes/lab/setting.lua", dofile "recipes/lab/problems.lua"
  local list, right = {}, { 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0 }
  for i, r in ipairs(right) do list[i] = { right = r == 1, item = { task = i > 8 and "game" or "sum", level = 2 } } end
  local got, sum, squares = setting.rewards(list, 4), 0, 0
  for _, one in ipairs(got.kept) do sum, squares = sum + one.weight, squares + one.weight ^ 2 / 4 end
  assert(#got.kept == 4 and got.groups == 1 and math.abs(sum) < 1e-12 and math.abs(squares - 1) < 1e-12)
  assert(math.abs(got.reward - 5 / 12) < 1e-12 and got.tasks.sum == 5 / 8 and got.tasks.game == 0)
  local score = setting.score(problems, list, 4)
  assert(math.abs(score.all.mean - 5 / 12) < 1e-12 and score.tasks.sum.mean == 5 / 8 and score.levels.game[2].n == 1)
' >"$work/log" 2>&1 || fail "rewards or scores are not the definition's"

for i in 1 2 3 4 5 6 7 8; do echo "{\"text\": \"Dab,bc,cd,a$i;a>c:abc L$i$i>$i:d$i\"}"; done >"$work/text.jsonl"
go 0 pretrain --pattern='M*' --hidden=32 --experts=4 --steps=1 --batch=4 --out="$work/raw"
go 0 sft --model="$work/raw/model" --mix=easy --documents=4000 --steps=80 --batch=16 --lr=1e-2 --items=200 --out="$work/sft"
said '^greedy: [0-9.]+ % of 200 problems \[[0-9.]+, [0-9.]+\]  path [0-9.]+  list [0-9.]+$'
rl="--model=$work/sft/model --mix=easy --lr=1e-3"
# shellcheck disable=SC2086
go 0 rl $rl --steps=100 --out="$work/rl"
said 'a step: sampling [0-9.]+ %, scoring [0-9.]+ %, update [0-9.]+ %$'
gained=$(percent before,); gained="$gained $(percent after)"
awk "BEGIN { split(\"$gained\", p, \" \"); exit !(p[2] > p[1] + 5) }" || fail "RL gained nothing: $gained"
grep -q '"reward":.*"tasks":.*"path":' "$work/rl/metrics.jsonl" || fail "no reward or no pass@1 by task in metrics.jsonl"

# shellcheck disable=SC2086
go 0 rl $rl --steps=100 --out="$work/rl"; said '^finished already: '
grep -q 'Reward, mean over' "$work/rl/report.html" || fail "the report shows no reward"

# scores: the same for the same seed, of 4-bit models too, compared by problem
score="--mix=easy --items=120 --samples=2"
# shellcheck disable=SC2086
{ go 0 score $score --model="$work/sft/model" --scores="$work/a.json"; said '^all +120 +[0-9.]+ \[[0-9.]+, [0-9.]+\] +[0-9.]+ \[[0-9.]+, [0-9.]+\]$'
  go 0 score $score --model="$work/sft/model" --scores="$work/b.json" --pass=64; cmp "$work/a.json" "$work/b.json" || fail "slots changed a score"
  go 0 score $score --model="$work/rl/model" --against="$work/a.json"; said '^teacher [0-9.]+ %: difference \+[0-9.]+ \[\+[0-9.]+, \+[0-9.]+\] points, recovery [0-9.]+ %$'
  go 0 ../ptq --model="$work/sft/model" --data="$work/text.jsonl" --quant=all --out="$work/ptq"
  go 0 score $score --model="$work/ptq" --against="$work/a.json"; said 'recovery [0-9.]+ %$'; tail -n 1 "$work/log" | grep -q '"recovery":[0-9]' || fail "no recovery in the JSON"; }

# stopped and resumed: the same bits; with a KL to the SFT model too
bits() { sha256sum <"$1/model/model.safetensors"; sed -E 's/"(seconds|sampling|scoring|update)":[^,}]*,?//g' "$1/metrics.jsonl" | sha256sum; }
short="$rl --steps=12 --prompts=16 --items=0 --kl=0.1"
# shellcheck disable=SC2086
{ go 0 rl $short --out="$work/whole"; go 0 rl $short --out="$work/again" --stop_at=5; go 0 rl $short --out="$work/again" --resume; }
said 'resumed after step 5'
[ "$(bits "$work/whole")" = "$(bits "$work/again")" ] || fail "a resumed run of RL differs"

# what cannot work is one line
bad() { go "$@"; [ "$(grep -c '^ckaqad:' "$work/log")" = 1 ] || fail "wanted one error line"; } # EXIT RECIPE OPTIONS...
bad 3 rl --model="$work/raw/model" --mix=easy --steps=50 --patience=4 --prompts=8 --items=0 --out="$work/idle"
said '^ckaqad: rl: 4 steps without a group of both right and wrong answers, mean reward 0.000; wanted a model that solves some of --mix=easy'
bad 2 score --model="$work/sft/model" --part=train; said 'option --part: got train, wanted test or validation'
bad 3 score --model="$work/sft/model" --mix=easy --items=60 --against="$work/a.json"; said 'question .* was answered by the BF16 model only'
bad 3 rl --model="$work/sft/model" --mix=hard --out="$work/none"; said 'option --mix: hard is unknown, wanted sft, rl, test or easy'
bad 3 rl --model="$work/nowhere" --out="$work/none"; said "nowhere"
bad 3 rl --model="$work/sft/model" --samples=1 --out="$work/none"; said "option --samples: got 1, wanted 2 or more"
[ ! -e "$work/none" ] || fail "a refused run leaves a folder"
bad 3 mix --model="$work/raw/model" --written=20 --drawn=20 --other=5 --held=20 --items=60 --out="$work/m"
said '^ckaqad: mix: the teacher solves 0.0 % of 20 validation problems, wanted --least=5 or more'

# all of the study: killed in the middle and continued, it ends with the tables of one that was left alone
begun=$SECONDS
bash recipes/lab/reproduce.sh --tiny --out="$work/left" --program="${CKAQAD:-build/ckaqad}" >"$work/log" 2>&1 || fail "reproduce.sh --tiny"
took=$((SECONDS - begun)); [ "$took" -le 90 ] || echo "lab.sh: warning: reproduce.sh --tiny took $took s, wanted 90 at most on two free cores"
said '^cost: about 0:0[0-9] h with [0-9]+ arms at a time, [0-9]+ runs of arms'; grep -q '^| CKA-QAD | 2 |' "$work/left/RESULTS.md" || fail "no row of CKA-QAD"
for picture in accuracy_kl cka_blocks cka_accuracy; do grep -q '^</svg>$' "$work/left/pictures/$picture.svg" || fail "no picture $picture"; done
setsid bash recipes/lab/reproduce.sh --tiny --out="$work/killed" --program="${CKAQAD:-build/ckaqad}" >"$work/log" 2>&1 & pid=$!
until [ -e "$work/killed/study-rl-1/main/attempts.jsonl" ]; do sleep 0.1; kill -0 $pid || fail "the study ended early"; done
kill -KILL -- -$pid; wait $pid 2>/dev/null || true
bash recipes/lab/reproduce.sh --tiny --out="$work/killed" --program="${CKAQAD:-build/ckaqad}" >"$work/log" 2>&1 || fail "the continued study"
grep -q ' sft$' "$work/log" && fail "what had ended ran again"
diff "$work/left/RESULTS.md" "$work/killed/RESULTS.md" >"$work/log" || fail "the killed study has other tables"

# a comparison that is none is refused
s=$work/left/study-rl-2; tiny="--updates=4 --tries=1 --seeds=2 --few=1 --arms=short --mix=easy --items=60 --samples=1 --batch=4 --rates=1e-3,3e-3"
# shellcheck disable=SC2086
again() { bad 3 study --model="$work/left/rl-2/model" --data="$work/left/study-rl-2-mix" --out="$s" $tiny "$@"; } # OPTIONS...
again --damage=90; said '^ckaqad: study: four bits cost -?[0-9.]+ points of validation accuracy, wanted --damage=90 or more'
point=$(grep -l '"layer": "cka"' "$s"/main/points/*/run.json | head -n 1); sed -i 's/"calibrate": 64/"calibrate": 32/' "$point"
again --damage=-100; said '^ckaqad: study: arm CKA-QAD, seed [12], differs from QAD in calibrate \(32 and 64\) too; wanted layer only'
sed -n 's/"prompt":"\([^"]*\)".*/"prompt":"\1","completion":"x"}/p' "$work/left/study-rl-2-mix/test.jsonl" | head -n 1 >>"$work/left/study-rl-2-mix/train.jsonl"
bad 3 arm --model="$work/left/rl-2/model" --data="$work/left/study-rl-2-mix" --part=test --items=60 --steps=0 --out="$work/none"
said '^ckaqad: data: training has .*, the same problem as the held-out .*; wanted none in both'
[ ! -e "$work/none" ] || fail "a refused run leaves a folder"
echo "lab: RL from $gained % on validation, resumed runs equal, the tiny study in $took s, killed and continued the same, bad input answered"
