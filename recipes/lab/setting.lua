-- setting.lua - what the recipes of the study share: the two model families, the tokenizer, documents of problems.
--
-- Tokens are single bytes: the tokenizer is tokenizer.lua's with no merges, so every text can be read, 264 entries.
local cq = require "ckaqad"
local here = (debug.getinfo(1, "S").source:match "^@(.*)/" or ".") .. "/"
local tokenizer = dofile(here .. "tokenizer.lua")
local setting = { vocab = 264 }

local common = { "vocab_size", setting.vocab, "attention_bias", false, "initializer_range", 0.02, "max_position_embeddings", 4096,
  "bos_token_id", 1, "eos_token_id", 5, "pad_token_id", 3, "torch_dtype", "bfloat16" }

local function config(first)
  for _, value in ipairs(common) do first[#first + 1] = value end
  return cq.json.encode(cq.json.object(first)) .. "\n"
end

-- The architecture of Nemotron 3 Nano. Narrow, because wider models hardly suffer from four bits; parameters go into blocks and
-- experts.
local function nemotron_h(o)
  local h = o.hidden
  return config { "architectures", { "NemotronHForCausalLM" }, "model_type", "nemotron_h", "hybrid_override_pattern", o.pattern,
    "num_hidden_layers", #o.pattern, "hidden_size", h, "num_attention_heads", h / 16, "num_key_value_heads", h / 32, "head_dim", 16,
    "mamba_num_heads", h / 8, "mamba_head_dim", 16, "n_groups", 2, "ssm_state_size", 32, "conv_kernel", 4, "use_conv_bias", true,
    "chunk_size", 64, "mamba_hidden_act", "silu", "n_routed_experts", o.experts, "num_experts_per_tok", 2, "n_shared_experts", 1,
    "moe_intermediate_size", h, "moe_shared_expert_intermediate_size", 2 * h, "intermediate_size", 2 * h, "mlp_hidden_act", "relu2",
    "norm_topk_prob", true, "routed_scaling_factor", 2.5, "n_group", 1, "topk_group", 1, "layer_norm_epsilon", 1e-5,
    "tie_word_embeddings", false }
end

local function qwen3(o)
  local h = o.hidden
  return config { "architectures", { "Qwen3ForCausalLM" }, "model_type", "qwen3", "num_hidden_layers", #o.pattern, "hidden_size", h,
    "num_attention_heads", h / 16, "num_key_value_heads", h / 32, "head_dim", 16, "intermediate_size", 4 * h, "hidden_act", "silu",
    "rms_norm_eps", 1e-6, "rope_theta", 10000, "tie_word_embeddings", true, "use_sliding_window", false }
end

local function folder(path) os.execute(("mkdir -p '%s'"):format(path)) end

local function write(path, text)
  folder(path:match "^(.*)/" or ".")
  local f, why = io.open(path, "w")
  if not f then cq.refuse(why) end
  f:write(text)
  f:close()
end

--- Writes architecture and tokenizer of a model without weights. `o`: `family` ("nemotron_h" or "qwen3"), `hidden`, `pattern` (for
--- qwen3 only its length counts), `experts`.
function setting.model(dir, o)
  if o.family ~= "qwen3" and o.family ~= "nemotron_h" then
    cq.refuse(("option --family: %s is unknown, wanted nemotron_h or qwen3"):format(o.family))
  end
  if o.hidden % 32 ~= 0 or o.hidden < 32 then cq.refuse(("option --hidden: got %g, wanted a multiple of 32"):format(o.hidden)) end
  local json, tokenizer_config = tokenizer.train({}, setting.vocab)
  write(dir .. "/tokenizer.json", json)
  write(dir .. "/tokenizer_config.json", tokenizer_config)
  write(dir .. "/generation_config.json", '{"bos_token_id": 1, "eos_token_id": [5], "pad_token_id": 3, "do_sample": true}\n')
  write(dir .. "/config.json", o.family == "qwen3" and qwen3(o) or nemotron_h(o))
end

--- Writes problems as documents: prompt and written solution, which ends in the stop token.
function setting.documents(path, items, stop)
  local lines = {}
  for i, item in ipairs(items) do
    lines[i] = cq.json.encode(cq.json.object { "prompt", item.prompt, "completion", item.answer .. stop }) .. "\n"
  end
  write(path, table.concat(lines))
end

--- Text of about `tokens` bytes to read: the share `share` of it about problems (facts of their training part), the rest what
--- tasks.lua writes.
function setting.reading(problems, tasks, tokens, share, seed)
  local draw, out, bytes = cq.stats.generator(seed), {}, 0
  math.randomseed(seed)
  while bytes < tokens do
    local line
    if draw() < share then
      line = problems.facts(problems.mixes.sft, "train", draw)
    else
      local item = tasks[tasks.names[math.random(#tasks.names)]].make(math.random(1, 3))
      line = item.prompt .. "\n" .. item.answer .. "\n"
    end
    out[#out + 1], bytes = line, bytes + #line
  end
  return out
end

--- Writes texts as documents.
function setting.text(path, texts)
  local lines = {}
  for i, text in ipairs(texts) do lines[i] = cq.json.encode(cq.json.object { "text", text }) .. "\n" end
  write(path, table.concat(lines))
end

return setting
