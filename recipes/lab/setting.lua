-- setting.lua - what the recipes of the study share: the two model families, the tokenizer, documents of problems, answers and scores.
--
-- Tokens are single bytes: the tokenizer is tokenizer.lua's with no merges, so every text can be read, 264 entries.
local cq = require "ckaqad"
local here = (debug.getinfo(1, "S").source:match "^@(.*)/" or ".") .. "/"
local tokenizer = dofile(here .. "tokenizer.lua")
local setting = { vocab = 264, room = 160 } -- tokenizer entries; tokens of a problem with its answer, at most

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

--- Writes problems as documents: prompt and written solution, which ends in the stop token (or the item's own `stop`).
function setting.documents(path, items, stop)
  local lines = {}
  for i, item in ipairs(items) do
    lines[i] = cq.json.encode(cq.json.object { "prompt", item.prompt, "completion", item.answer .. (item.stop or stop) }) .. "\n"
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

--- A mix of problems.lua by name.
function setting.mix(problems, name)
  local mix = problems.mixes[name]
  if not mix then cq.refuse(("option --mix: %s is unknown, wanted sft, rl, test or easy"):format(name)) end
  return mix
end

--- `n` validation problems for a model that practises on a mix.
function setting.held(problems, name, n)
  return problems.set(problems.mixes[name == "easy" and "easy" or "test"], "validation", math.max(1, n), cq.stats.generator(1))
end

--- The problems of a step, from seed and step alone, so that a resumed run has the same ones.
function setting.practice(problems, mix, n, seed, step)
  return problems.set(mix, "train", n, cq.stats.generator(seed * 1000003 + step))
end

--- Answers of a model to problems as model:generate gives them, each with `item` and `right` (ended by the stop token, and every step
--- holds), an item's samples side by side. `o`: `samples` (1), `temperature` (1), `tokens`, `seed`. Returns them, the seconds of
--- sampling and those of checking.
function setting.answers(problems, model, items, o)
  local prompts, begun = {}, cq.clock()
  for i, item in ipairs(items) do prompts[i] = item.prompt end
  local list = model:generate { prompts = prompts, max_tokens = o.tokens, temperature = o.temperature or 1, samples = o.samples or 1,
    seed = o.seed }
  local written = cq.clock()
  for _, one in ipairs(list) do
    one.item = items[one.prompt]
    one.right = one.stopped and problems.check(one.item.prompt, one.text)
  end
  return list, written - begun, cq.clock() - written
end

--- What GRPO learns from answers: { kept = those of groups with both right and wrong ones, each with its `weight` (reward minus the
--- group's mean, in the group's standard deviations), groups = how many such, reward = mean, tasks = { [task] = mean } }.
function setting.rewards(list, samples)
  local out, sums = { kept = {}, groups = 0, reward = 0, tasks = {} }, {}
  for at = 1, #list, samples do
    local right, task = 0, list[at].item.task
    for i = at, at + samples - 1 do right = right + (list[i].right and 1 or 0) end
    local mean = right / samples
    sums[task] = { (sums[task] or { 0, 0 })[1] + mean, (sums[task] or { 0, 0 })[2] + 1 }
    out.reward = out.reward + mean * samples / #list
    if right > 0 and right < samples then
      out.groups = out.groups + 1
      for i = at, at + samples - 1 do
        list[i].weight = ((list[i].right and 1 or 0) - mean) / math.sqrt(mean * (1 - mean))
        out.kept[#out.kept + 1] = list[i]
      end
    end
  end
  for task, sum in pairs(sums) do out.tasks[task] = sum[1] / sum[2] end
  return out
end

--- pass@1 with its 95 % bootstrap interval over items, in all, by task and by task and level: { all, tasks = { [task] = pass }, levels
--- = { [task] = { [level] = pass } }, shares = share of right samples of each item }.
function setting.score(problems, list, samples)
  local shares, parts, out = {}, {}, { tasks = {}, levels = {} }
  for i, one in ipairs(list) do
    local at = math.ceil(i / samples)
    shares[at] = (shares[at] or 0) + (one.right and 1 or 0) / samples
  end
  for at, share in ipairs(shares) do
    local item = list[at * samples].item
    for _, key in ipairs { item.task, item.task .. item.level } do
      parts[key] = parts[key] or {}
      table.insert(parts[key], share)
    end
  end
  local function pass(values) return cq.stats.interval(values, { resamples = 2000 }) end
  out.all, out.shares = pass(shares), shares
  for _, task in ipairs(problems.names) do
    out.tasks[task], out.levels[task] = parts[task] and pass(parts[task]), {}
    for level = 1, problems.levels do
      out.levels[task][level] = parts[task .. level] and pass(parts[task .. level])
    end
  end
  return out
end

--- A score in one line.
function setting.words(problems, score)
  local parts = { ("%.1f %% of %d problems [%.1f, %.1f]"):format(100 * score.all.mean, score.all.n, 100 * (score.all.low or 0),
    100 * (score.all.high or 1)) }
  for _, task in ipairs(problems.names) do
    if score.tasks[task] then parts[#parts + 1] = ("%s %.1f"):format(task, 100 * score.tasks[task].mean) end
  end
  return table.concat(parts, "  ")
end

--- The prompts of a file of documents, as `problems.overlap` takes them.
function setting.prompts(path) return cq.json.lines(path, { "prompt" }) end

--- What a run of the study has besides its comparison with the teacher on the domain: accuracy (drawn and greedy) on `items`, and the
--- comparison `apart` outside the domain.
function setting.measures(run, problems, model, items, opt, apart)
  local drawn = setting.score(problems, (setting.answers(problems, model, items, { samples = opt.samples, tokens = 80, seed = opt.seed })),
    opt.samples)
  local greedy = setting.score(problems, (setting.answers(problems, model, items, { temperature = 0, tokens = 80, seed = 1 })), 1)
  run:say("%s, drawn: %s", opt.part, setting.words(problems, drawn))
  run:say("%s, greedy: %s", opt.part, setting.words(problems, greedy))
  run:say("outside the domain: KL %.4f, top-1 %.4f", apart.kl, apart.top1)
  local tasks = {}
  for _, task in ipairs(problems.names) do
    if drawn.tasks[task] then tasks[task] = cq.json.object { "pass", drawn.tasks[task].mean, "greedy", greedy.tasks[task].mean } end
  end
  return cq.json.object { "part", opt.part, "items", #items, "samples", opt.samples, "pass", drawn.all.mean, "greedy", greedy.all.mean,
    "tasks", tasks, "outside_kl", apart.kl, "outside_top1", apart.top1, "outside_cka", apart.cka }
end

--- Where the time of the steps of RL went, in one line.
function setting.split(history)
  local sums, all = { sampling = 0, scoring = 0, update = 0 }, 0
  for _, m in ipairs(history) do
    for key in pairs(sums) do sums[key], all = sums[key] + m[key], all + m[key] end
  end
  return ("%.2f s a step: sampling %.1f %%, scoring %.1f %%, update %.1f %%"):format(all / #history, 100 * sums.sampling / all,
    100 * sums.scoring / all, 100 * sums.update / all)
end

return setting
