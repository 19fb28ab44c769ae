#!/usr/bin/env bash
# --dry-run --gpus: true sizes from config.json alone, what fits and what does not, and the sums against the plan that allocates.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/ckaqad-plan-XXXXXX); trap 'rm -rf "$work"' EXIT
program=$PWD/build/ckaqad

build/ckaqad tests/recipes/plan.lua tests/golden/nemotron_h_gsm8k tests/golden/qwen3_gsm8k

nemotron() { # FOLDER PATTERN MORE: the keys that the two published models share, and more
  mkdir -p "$work/$1"
  cat >"$work/$1/config.json" <<JSON
{"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "$2", "conv_kernel": 4, "head_dim": 128,
 "layer_norm_epsilon": 1e-5, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "n_groups": 8, "ssm_state_size": 128,
 "tie_word_embeddings": false, "use_conv_bias": true, "vocab_size": 131072, "max_position_embeddings": 262144, $3}
JSON
}
nemotron nano 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME' '"hidden_size": 2688, "num_attention_heads": 32,
 "num_key_value_heads": 2, "mamba_num_heads": 64, "mamba_head_dim": 64, "chunk_size": 128, "intermediate_size": 1856,
 "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "num_experts_per_tok": 6,
 "n_shared_experts": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1'
nemotron nano-4b 'M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-' '"hidden_size": 3136, "num_attention_heads": 40, "num_key_value_heads": 8,
 "mamba_num_heads": 96, "mamba_head_dim": 80, "chunk_size": 256, "intermediate_size": 12544'
mkdir -p "$work/qwen3-4b"
cat >"$work/qwen3-4b/config.json" <<'JSON'
{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128, "hidden_act": "silu",
 "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "num_attention_heads": 32, "num_hidden_layers": 36,
 "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "tie_word_embeddings": true, "vocab_size": 151936}
JSON
cd "$work"

plan() { # MODEL RECIPE MORE...: the plan goes to MODEL.txt
  local model=$1 recipe=$2; shift 2
  "$program" "$OLDPWD/recipes/$recipe.lua" --model="$model" --dry-run "$@" >"$model.txt" 2>"$model.err"
}
refused() { # CODE TEXT COMMAND...: leaves with CODE and one line that holds TEXT
  local code=$1 text=$2 rc=0; shift 2
  "$@" || rc=$?
  [ "$rc" = "$code" ] || { echo "exit $rc, wanted $code: $*"; cat ./*.err; exit 1; }
  if [ "$(cat ./*.err | wc -l)" != 1 ] || ! grep -q -e "$text" ./*.err; then echo "wanted one line with: $text"; cat ./*.err; exit 1; fi
  rm ./*.err
}

for gb in 80 141; do
  for pair in nano:nemotron_nano nano-4b:nemotron_nano qwen3-4b:qwen3; do
    model=${pair%%:*}; TIMEFORMAT='%U %S'
    { time plan "$model" "${pair##*:}" --gpus=1..16 --gpu-memory=${gb}GB; } 2>"$model.time"
    luajit - "$model" <<'LUA'
local model = arg[1]
local function read(name) local f = assert(io.open(model .. name)); local s = f:read "*a"; f:close(); return s end
local user, system = read(".time"):match "([%d.]+) ([%d.]+)"
local spent = tonumber(user) + tonumber(system)
assert(spent < 1, ("%s took %.2f s of the processor"):format(model, spent))
local text, fits = read ".txt", {}
for n, fit in text:gmatch "\n  (%d+) +(%S+)" do fits[tonumber(n)] = fits[tonumber(n)] or fit end
for _, n in ipairs { 1, 2, 4, 8, 16 } do assert(fits[n] == "yes", ("%s on %d GPUs: %s\n%s"):format(model, n, tostring(fits[n]), text)) end
print(("%s: %.2f s"):format(model, spent))
LUA
    rm -f "$model.time" "$model.err"
  done
done

says() { grep -q -e "$2" "$1.txt" || { echo "wanted a line with: $2"; cat "$1.txt"; exit 1; }; } # MODEL TEXT
plan nano nemotron_nano --gpus=1
says nano '^  1 *yes .*all but routed experts'
says nano '^  1 *[0-9.]* short .*all parameters [^*]*recompute, offload=both$' # what is there today: the plan that allocates
says nano '^  teacher weights, GiB  *59\.5 '
plan nano nemotron_nano --gpus=1 --seq=8192 # there today, on one GPU of 141 GB
says nano '^  1 *yes .*all but routed experts  *copies=packed, recompute$'
plan nano nemotron_nano --gpus=1 --teacher-cache=no-such-folder
says nano 'come from a cache'
plan nano nemotron_nano --gpus=1 --freeze='*.experts.*'
if grep -q 'all parameters' nano.txt; then echo "--freeze is not kept"; cat nano.txt; exit 1; fi
if [ -e runs ]; then echo "a plan left a run folder"; exit 1; fi
rm ./*.err

# the run that was measured on an H200: 124.1 GiB in use, 10457 tokens/s (kernels/cuda/README.md), when the teacher's 3.6 G parameters in
# matrices still had an F32 form, 13.5 GiB
cp -r "$OLDPWD/kernels/bench/qwen3_4b" measured
plan measured bench --weights=random --seq=2048 --batch=4 --micro=1 --rows=512 --gpus=1 --gpu-memory=150GB
luajit - <<'LUA'
local text = io.open("measured.txt"):read "*a"
local gib, rate = text:match "\n  1 +yes +([%d.]+) +%- +[%d.]+ +(%d+) +%d+ +all parameters +all F32"
assert(gib, "no row without options:\n" .. text)
assert(math.abs(gib - (124.1 - 13.5)) < 1.5 and math.abs(rate / 10457 - 1) < 0.1, ("%s GiB, %s tokens/s"):format(gib, rate))
LUA
rm ./*.err

refused 4 'nothing fits: the nearest on 1 GPU' plan nano nemotron_nano --gpus=1 --gpu-memory=10GB
refused 2 'option --gpus' plan nano nemotron_nano --gpus=many
refused 2 'option --gpus' plan nano nemotron_nano --gpus=0
refused 2 'option --rates: lnk is unknown, nearest is link' plan nano nemotron_nano --gpus=1 --rates=lnk=3GB
refused 2 'option --rates' plan nano nemotron_nano --gpus=1 --rates=link=fast
refused 2 'goes with --dry-run' plan nano nemotron_nano --gpus=1 --no-dry-run
refused 2 'does not distil' plan nano ptq --gpus=1
