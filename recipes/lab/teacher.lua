-- Train the embedded teacher from random weights: a small NemotronH on arithmetic and small programs that our own Lua writes.
--   ckaqad recipes/lab/teacher.lua --out=runs/teacher        made recipes/lab/teacher (see its README.md for the log)
local cq = require "ckaqad"
local here = arg[0]:match("^(.*)/") or "."
local tasks, tokenizer = dofile(here .. "/tasks.lua"), dofile(here .. "/tokenizer.lua")

local opt = cq.options {
  out = "runs/teacher",       -- the run; the finished checkpoint is in OUT/teacher
  pattern = "MEM*EMEM*EME",   -- blocks: M mamba, E moe, * attention, - mlp
  hidden = 64,                -- residual width; wider models hardly suffer from four bits
  experts = 8,                -- routed experts of each E block, two of them active
  vocab = 320,                -- entries of the tokenizer
  documents = 60000,          -- documents to train on; 2000 fresh ones become the text to distil on, 300 are held out
  steps = 3000,               -- optimizer steps
  batch = 16,                 -- packed rows per step
  seq = 128,                  -- tokens per packed row
  lr = 3e-3,                  -- peak learning rate
  seed = 1,                   -- weights, documents and their order
}
local run = cq.run(opt)
local dir = opt.out .. ".model" -- architecture, tokenizer and text; the weights join them at the end

local function write(name, text)
  local f = assert(io.open(dir .. "/" .. name, "w"))
  f:write(text)
  f:close()
end

local function jsonl(documents)
  local lines = {}
  for i, text in ipairs(documents) do lines[i] = cq.json.encode(cq.json.object { "text", text }) .. "\n" end
  return table.concat(lines)
end

os.execute(("mkdir -p '%s'"):format(dir))
local seen = {}
local documents = tasks.documents(opt.documents, opt.seed, seen)
write("train.jsonl", jsonl(tasks.documents(2000, opt.seed + 1, seen)))
write("holdout.jsonl", jsonl(tasks.documents(300, opt.seed + 2, seen)))
local json, config = tokenizer.train({ unpack(documents, 1, 5000) }, opt.vocab)
write("tokenizer.json", json)
write("tokenizer_config.json", config)
write("generation_config.json", '{"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3, "do_sample": false}\n')
local h = opt.hidden
write("config.json", cq.json.encode(cq.json.object { "architectures", { "NemotronHForCausalLM" }, "model_type", "nemotron_h",
  "hybrid_override_pattern", opt.pattern, "num_hidden_layers", #opt.pattern, "hidden_size", h, "vocab_size", opt.vocab,
  "num_attention_heads", h / 16, "num_key_value_heads", h / 32, "head_dim", 16, "attention_bias", false,
  "mamba_num_heads", h / 8, "mamba_head_dim", 16, "n_groups", 2, "ssm_state_size", 32, "conv_kernel", 4, "use_conv_bias", true,
  "chunk_size", 64, "mamba_hidden_act", "silu", "n_routed_experts", opt.experts, "num_experts_per_tok", 2, "n_shared_experts", 1,
  "moe_intermediate_size", h, "moe_shared_expert_intermediate_size", 2 * h, "intermediate_size", 2 * h, "mlp_hidden_act", "relu2",
  "norm_topk_prob", true, "routed_scaling_factor", 2.5, "n_group", 1, "topk_group", 1, "layer_norm_epsilon", 1e-5,
  "initializer_range", 0.02, "tie_word_embeddings", false, "max_position_embeddings", 4096, "bos_token_id", 1, "eos_token_id", 2,
  "pad_token_id", 3, "torch_dtype", "bfloat16" }) .. "\n")
local pretrain = opt.out .. ".text.jsonl" -- large and made again by this recipe, so it is not kept with the checkpoint
local f = assert(io.open(pretrain, "w"))
f:write(jsonl(documents))
f:close()

local model = cq.model.create(dir)
local data = cq.data.open(pretrain, { model = model, seq = opt.seq, batch = opt.batch, seed = opt.seed, holdout = dir .. "/holdout.jsonl" })
local terms = { cq.loss.ce {} }
local adam = cq.optim.adamw(model, { betas = { 0.9, 0.95 }, weight_decay = 0.05, clip = 1 })
local rate = cq.schedule.cosine { peak = opt.lr, warmup = 0.02, steps = opt.steps, floor = opt.lr / 50 }
run:plan { student = model, adam = adam, terms = terms, data = data, load = false }
model:init(opt.seed)
for step, batch in run:steps(opt.steps, data) do
  for part in batch:split() do cq.distill(nil, model, part, terms):backward { kl = 1 } end
  run:log(step, { norm = adam:step(rate(step)), lr = rate(step) })
end
model:save(opt.out .. "/teacher")
os.remove(pretrain)
run:finish {}
