-- model.lua - models: the BF16 teacher, the 4-bit student made from it, calibration, export.
--
-- Opening reads names and shapes only; the bytes come when the plan that the model is part of is committed.
local native = require "ckaqad.ffi"
local device = require "ckaqad.device"
local errors = require "ckaqad.errors"
local hf = require "ckaqad.hf"
local ranks = require "ckaqad.ranks"
local text = require "ckaqad.text"
local C, call = native.C, native.call

local model = {}
local Model = errors.class("model", {})

local kind_names = { M = "mamba", E = "moe", ["*"] = "attention", ["-"] = "mlp", Q = "attention + mlp" }
local kind_order = { "M", "E", "*", "-", "Q" }

local copies = { f32 = "CQ_COPIES_F32", bf16 = "CQ_COPIES_BF16", packed = "CQ_COPIES_PACKED" }

local function wrap(c, extra)
  local config = C.cq_model_config(c)
  local m = {
    c = c, config = config, dir = native.string(C.cq_model_dir(c)), pattern = native.string(config.pattern),
    n_blocks = tonumber(config.n_blocks), vocab = tonumber(config.vocab), hidden = tonumber(config.hidden),
    n_params = tonumber(C.cq_config_params(config)), nvfp4 = C.cq_model_is_nvfp4(c), device = device.current(),
  }
  m.family = config.family == C.CQ_NEMOTRON_H and "nemotron_h" or "qwen3"
  for key, value in pairs(extra or {}) do m[key] = value end
  C.cq_model_set_compute(c, m.device.stream.compute)
  if m.nvfp4 then C.cq_model_set_copies(c, C[copies[m.device.copies == "packed" and "packed" or "f32"]]) end
  C.cq_model_set_fp4(c, m.device.compute == "nvfp4")
  C.cq_model_set_activations(c, m.device.activations == "bf16" and C.CQ_BF16 or C.CQ_F32)
  if ranks.moe == "ranks" and not m.device.imagined then call.cq_model_share_experts(c, native.comm) end
  setmetatable(m, Model)
  m:set_offload(m.device.offload)
  return m
end

local offloads = { none = "CQ_OFFLOAD_NONE", teacher = "CQ_OFFLOAD_TEACHER", optimizer = "CQ_OFFLOAD_OPTIMIZER", both = "CQ_OFFLOAD_BOTH" }

--- What the model keeps in pinned host memory where it runs on a GPU: "none", "teacher" (of a model that only runs forward, its blocks,
--- fetched as the forward comes to them), "optimizer" (moments, and master weights of quantized linears), "both". Before the plan;
--- --offload says it for all models of a run.
---
--- Example:
---     teacher:set_offload "teacher"
function Model:set_offload(what)
  if not offloads[what] then errors.choose("set_offload", what, { "none", "teacher", "optimizer", "both" }) end
  C.cq_model_set_offload(self.c, C[offloads[what]])
end

local dtypes = { f32 = "CQ_F32", f64 = "CQ_F64" }

--- Opens a checkpoint: a Hugging Face folder (BF16, F32, F16 or exported NVFP4), a run folder, or org/name in the cache.
--- Options: `dtype` "f32" (default) or "f64" (checks; needs kernels = "ref").
---
--- Example:
---     local model = cq.model.open(opt.model)
---     print(model.family, model.n_blocks, model.pattern) --> nemotron_h	8	ME*ME*ME
function model.open(name, options)
  local o = errors.fill("model.open", options, { dtype = "f32" })
  errors.choose("model.open: dtype", o.dtype, { "f32", "f64" })
  local dir = hf.resolve(name)
  if device.current().imagined then return model.create(dir, o) end
  return wrap(native.open("cq_model", "cq_model_open", dir, C[dtypes[o.dtype]]), { dtype = o.dtype })
end

--- A model with the architecture of `dir/config.json` and no weights: `model:init(seed)` after the plan fills them.
---
--- Example:
---     local model = cq.model.create(opt.model)
---     cq.plan { student = model, tokens = 64 }
---     model:init(7)
function model.create(dir, options)
  local o = errors.fill("model.create", options, { dtype = "f32" })
  return wrap(native.open("cq_model", "cq_model_create", dir, C[dtypes[o.dtype]]), { dtype = o.dtype, random = true })
end

-- Parameters of the model in `dir`, from its config.json alone.
function model.count(dir)
  local config = native.new "cq_config"
  call.cq_config_load(config, dir)
  return tonumber(C.cq_config_params(config))
end

--- Random weights from a seed, for a model made by `cq.model.create`; after the plan is committed.
function Model:init(seed)
  call.cq_model_init(self.c, seed or 1)
  call.cq_model_round_weights(self.c, self:stream(), false)
end

local scale_methods = { max = "CQ_SCALE_MAX", mse = "CQ_SCALE_MSE", four_over_six = "CQ_SCALE_FOUR_OVER_SIX" }

--- The 4-bit student of a teacher.
--- Options: `preset` (nemotron_nano, qwen3, all, experts, mlp, none), `scales` (max, mse, four_over_six), `exclude`, `include` and
--- `freeze` (comma-separated globs of module or parameter names), `weights_only` (W4A16), `copies`: how the fake-quantized weights
--- are kept (as --copies says): "f32" (4 bytes a value; 6 where a GPU's products are BF16), "bf16" (2, there only) or "packed" (0.56: NVFP4
--- codes and scales, opened before each product). The bits of training are the same. An exported folder that is opened stays
--- packed with --copies=packed, else its weights are opened once.
---
--- Example:
---     local w4a16 = teacher:quantize { preset = "experts", scales = "mse", freeze = "*.gate.weight", weights_only = true }
---     for _, line in ipairs(w4a16:quantization()) do print(line) end
function Model:quantize(options)
  local o = errors.fill("quantize", options, {
    preset = "all", scales = "max", copies = self.device.copies, exclude = "", include = "", freeze = "", weights_only = false,
  })
  errors.choose("option --scales", o.scales, { "max", "mse", "four_over_six" })
  errors.choose("option --copies", o.copies, { "f32", "bf16", "packed" })
  if o.copies == "bf16" and not (self.device.on_device and self.device.compute == "bf16") then
    errors.usage("option --copies: bf16 goes with BF16 products on a GPU (--device=cuda --compute=bf16), wanted f32 or packed")
  end
  if o.preset == "weights_only" then o.preset, o.weights_only = "all", true end
  local q = native.new "cq_quant_options"
  local function globs(value) return value ~= "" and value or nil end
  q.preset, q.exclude, q.include, q.freeze = o.preset, globs(o.exclude), globs(o.include), globs(o.freeze)
  q.weights_only, q.scales, q.copies = o.weights_only, C[scale_methods[o.scales]], C[copies[o.copies]]
  call.cq_quant_check(q)
  local c = native.open("cq_model", "cq_model_quantize", self.c, q)
  return wrap(c, { dtype = self.dtype, teacher = self, quant = o })
end

--- The C stream that operations on this model take, with its scratch; for code that calls C by itself.
function Model:stream()
  local stream = self.device.stream
  C.cq_model_bind_stream(self.c, stream)
  return stream
end

--- Runs batches unquantized, keeps the largest |input| of every quantized linear, freezes the scales and writes the
--- fake-quantized weights. Returns the number of experts that no token reached (they take their layer's maximum).
---
--- Example:
---     print(student:calibrate(data:take(16)) >= 0) --> true
function Model:calibrate(batches)
  call.cq_model_calibrate_begin(self.c)
  for _, batch in ipairs(batches) do call.cq_model_forward(self.c, self:stream(), batch) end
  local unreached = native.new "int64_t[1]"
  call.cq_model_calibrate_end(self.c, self:stream(), unreached)
  return tonumber(unreached[0])
end

--- What `f` returns when the weights take each block's maximum as their scale in the place of the searched ones, which come back
--- after it: what searching wins.
---
--- Example:
---     local plain = student:with_max_scales(function() return cq.eval.compare(teacher, student, data:holdout()) end)
---     print(plain.kl > cq.eval.compare(teacher, student, data:holdout()).kl)
function Model:with_max_scales(f)
  call.cq_model_searched_scales(self.c, self:stream(), false)
  local ok, result = pcall(f)
  call.cq_model_searched_scales(self.c, self:stream(), true)
  if not ok then error(result, 0) end
  return result
end

--- Blocks of 16 whose scale was clamped since the last call.
function Model:saturated() return tonumber(C.cq_model_saturated(self.c)) end

--- Signal to quantization noise of the fake-quantized weights against the master weights, block by block: list of { block, db,
--- linears = list of { name, n, db } }, experts of a kind pooled (`n` of them). Blocks without a quantized linear are left out; dB is
--- infinite where nothing is lost. Reads every weight once.
---
--- Example:
---     local worst = student:quantization_error()[1]
---     for _, b in ipairs(student:quantization_error()) do
---       if b.db < worst.db then worst = b end
---     end
---     print(("block %d loses most: %.1f dB"):format(worst.block, worst.db))
function Model:quantization_error()
  if self.adam then self.adam:masters() end
  return require("ckaqad.eval").quantization_error(self)
end

--- How the E4M3 block scales of the weights are spread, block by block: { low = -9, width = 0.5, blocks = list of { block, counts } };
--- counts[i] blocks of 16 have log2(scale) in [low + (i - 1) width, low + i width). 448, the largest scale, is in bin 36.
---
--- Example:
---     local h = student:scale_histogram()
---     print(h.low, h.width, #h.blocks[1].counts) --> -9	0.5	36
function Model:scale_histogram() return require("ckaqad.eval").scale_histogram(self) end

--- Multiplies the learning rate of the parameters that match `globs`; 0 freezes them. Returns how many matched.
---
--- Example:
---     print(student:lr_scale("*.gate.weight", 0) > 0) --> true
function Model:lr_scale(globs, factor)
  return native.check(tonumber(C.cq_model_lr_scale(self.c, globs, factor)))
end

--- Parameters in checkpoint order, each with name, shape, value, grad, quantized, reason (a C struct).
---
--- Example:
---     local quantized = 0
---     for p in student:params() do
---       if p.quantized then quantized = quantized + 1 end
---     end
---     print(quantized) --> 116
function Model:params()
  local i, n = -1, tonumber(C.cq_model_n_params(self.c))
  return function()
    i = i + 1
    if i < n then return C.cq_model_param(self.c, i) end
  end
end

--- Names of the parameters, in checkpoint order; of those that match `globs`, when given: `student:parameters "*.up_proj.weight"`.
function Model:parameters(globs)
  local names = {}
  for p in self:params() do
    if not globs or C.cq_glob_match(globs, p.name) then names[#names + 1] = native.string(p.name) end
  end
  return names
end

--- One parameter by name, to look at: `name`, `shape`, `disk` (dtype in the checkpoint), `block`, `quantized`, `reason`, `at(i, j)`,
--- `stats()`; printed with its range and its corner values. An unknown name is an error that names the nearest.
function Model:parameter(name)
  local c = C.cq_model_find(self.c, name)
  if c == nil then
    errors.usage("model: parameter %s is unknown, nearest is %s", tostring(name), errors.nearest(tostring(name), self:parameters()))
  end
  if self.adam then self.adam:masters() end
  return require "ckaqad.parameter".wrap(c, self)
end

--- Continues prompts token by token, many at once. The model must be in a plan: `cq.plan { student = model, tokens = 512 }`.
--- Options: `prompts` (a list of texts or of id lists), `max_tokens` (64), `temperature` (0: the likeliest token), `top_p` (1), `stop` (ids
--- or token texts; absent: the model's own end tokens; {}: none), `seed` (1), `samples` (1) of each prompt, `slots` (sequences at once; 0:
--- up to 64), `given` (for each prompt the id list that its answers begin with, to get their log-probabilities).
--- Returns a list, the samples of a prompt side by side: { prompt, sample (numbers from 1), prompt_ids, ids (the stop token included), text
--- (without it; absent when the folder has no tokenizer), logprobs (of each id under the plain softmax), stopped (by a stop token) },
--- and { tokens, prompt_tokens, passes, seconds }. On the processor in FP32 an answer depends on model, plan, options and its place in
--- the list of prompts, not on the other prompts.
---
--- Example:
---     local out = student:generate { prompts = { "Natalia sold", "Tom has 3" }, max_tokens = 8, temperature = 1, samples = 2 }
---     print(#out, out[4].prompt, out[4].sample, #out[4].ids == #out[4].logprobs) --> 4	2	2	true
function Model:generate(options) return require "ckaqad.generate".generate(self, options) end

--- The ids of a text. An error when the model's folder has no tokenizer.
---
--- Example:
---     print(#student:encode "Natalia sold clips" > 0) --> true
function Model:encode(text_) return require "ckaqad.generate".encode(self, text_) end

--- The text of a list of ids, special tokens included.
---
--- Example:
---     print(student:decode(student:encode "Natalia sold clips")) --> Natalia sold clips
function Model:decode(ids) return require "ckaqad.generate".decode(self, ids) end

--- The text of a conversation { { role = "user", content = "..." }, ... } by the model's chat template, with the opening of the answer.
--- Options: `template` ("auto", "nano3", "qwen3-thinking"), `thinking` (absent: as the template has it).
---
--- Example:
---     print(#student:chat({ { role = "user", content = "2 + 2?" } }, { template = "nano3" }) > 0) --> true
function Model:chat(messages, options) return require "ckaqad.generate".chat(self, messages, options) end

function Model:__tostring() return require "ckaqad.show".model(self) end

--- Writes the NVFP4 checkpoint that vLLM, TensorRT-LLM and SGLang load. `options.shard` is the largest file (4.5 GiB).
---
--- Example:
---     student:export("served")
---     print(student:differing "served") --> 0
function Model:export(dir, options)
  local o = errors.fill("export", options, { shard = 4.5 * 2 ^ 30 })
  if self.adam then self.adam:masters() end
  ranks.alone("export", function() call.cq_export_nvfp4(self.c, dir, o.shard) end, function() call.cq_export_lend(self.c, true) end)
  return dir
end

--- Elements of an exported folder whose dequantized value differs from this model's fake-quantized weights, by bits; with `--moe=ranks`
--- what the ranks find, all together.
function Model:differing(dir)
  local n = native.new "int64_t[1]"
  call.cq_export_compare(self.c, dir, n)
  return ranks.moe == "ranks" and ranks.sum(tonumber(n[0]), "comparison of the export") or tonumber(n[0])
end

--- Writes the master weights as an ordinary checkpoint folder.
---
--- Example:
---     student:save("bf16")
---     print(cq.model.open("bf16").n_params == student.n_params) --> true
function Model:save(dir, options)
  local o = errors.fill("save", options, { shard = 4.5 * 2 ^ 30 })
  if self.adam then self.adam:masters() end
  ranks.alone("export", function() call.cq_export_weights(self.c, dir, o.shard) end, function() call.cq_export_lend(self.c, false) end)
  return dir
end

--- Blocks by kind, for example "5 mamba, 5 moe, 2 attention".
function Model:kinds()
  local parts = {}
  for _, letter in ipairs(kind_order) do
    local n = tonumber(C.cq_config_count(self.config, letter:byte()))
    if n > 0 then parts[#parts + 1] = ("%d %s"):format(n, kind_names[letter]) end
  end
  return table.concat(parts, ", ")
end

--- One line: family, parameters, blocks by kind.
---
--- Example:
---     print(teacher:describe())
function Model:describe()
  return ("%s, %s parameters, %d blocks: %s (%s)"):format(self.family, text.count(self.n_params), self.n_blocks,
    self:kinds(), self.pattern:sub(1, 60))
end

-- backbone.layers.3.mixer.experts.7.up_proj.weight -> experts.*.up_proj
local function short(name)
  local s = name:gsub("%.weight$", ""):gsub("^.*layers%.%d+%.", ""):gsub("^.*%.(lm_head)$", "%1")
  return (s:gsub("^mixer%.", ""):gsub("%.%d+%.", ".*."))
end

--- Lines that say which linears are quantized, and why the others are not.
function Model:quantization()
  local n, of, params, reasons, order = 0, 0, 0, {}, {}
  for p in self:params() do
    if p.quantized then
      n, params = n + 1, params + tonumber(C.cq_shape_elems(p.shape))
    end
    if p.linear then of = of + 1 end
    local reason = native.string(p.reason)
    if p.linear and not p.quantized then
      reason = reason or "kept"
      if not reasons[reason] then
        reasons[reason] = { n = 0, names = {}, list = {} }
        order[#order + 1] = reason
      end
      local r, name = reasons[reason], short(native.string(p.name))
      r.n = r.n + 1
      if not r.names[name] then r.names[name], r.list[#r.list + 1] = true, name end
    end
  end
  local never = { "embeddings", "norms" }
  for p in self:params() do
    local name = native.string(p.name)
    if name:find("conv1d.weight", 1, true) and not never.conv then never.conv, never[#never + 1] = true, "conv1d" end
    if name:find(".gate.weight", 1, true) and not never.gate then never.gate, never[#never + 1] = true, "router" end
  end
  local q = self.quant or { preset = "as exported", scales = "max" }
  local lines = { ("%d of %d linears (%s parameters) in NVFP4: preset %s, %s, scales %s"):format(n, of, text.count(params), q.preset,
    q.weights_only and "weights only" or "weights and activations", q.scales) }
  for _, reason in ipairs(order) do
    local r = reasons[reason]
    local names = table.concat(r.list, ", ", 1, math.min(4, #r.list)) .. (#r.list > 4 and ", ..." or "")
    lines[#lines + 1] = ("  not: %d %s (%s)"):format(r.n, reason, names)
  end
  lines[#lines + 1] = "  never: " .. table.concat(never, ", ")
  return lines
end

return model
