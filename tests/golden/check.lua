-- Compares this library with a golden file that other programs wrote, group by group; exits 0 only if all groups hold.
--   ckaqad tests/golden/check.lua --model=DIR --golden=FILE [--kernels=ref|cpu] [--compute=f32|f64]
--   ckaqad tests/golden/check.lua --golden=FILE                       nvfp4, nvfp4_static and losses files
--   ckaqad tests/golden/check.lua --model=DIR --tokens=FILE | --chat=FILE | --generate=FILE
local cq = require "ckaqad"
local native = require "ckaqad.ffi"
local C, call = native.C, native.call

local opt = cq.options {
  model = "",       -- checkpoint folder the file belongs to
  golden = "",      -- safetensors file of expected values
  tokens = "",      -- JSON of { text, ids, decoded }
  chat = "",        -- JSON of conversations and their rendered text
  generate = "",    -- JSON of prompts and the greedy tokens that follow
  most = 40,        -- with --generate: tokens to write
  compute = "f32",  -- f32, bf16 (see --report), or f64 (kernels ref)
  report = false,   -- errors are printed and not judged
}
local double = opt.compute == "f64"
local device = cq.device { device = opt.device, kernels = double and "ref" or opt.kernels, threads = opt.threads,
  compute = double and "f32" or opt.compute, activations = opt.activations }

-- An array where the kernels run: a copy on a device (kept until the end), itself on the host; and its values back.
local memory = device.stream.table.memory
local function put(x, bytes)
  if memory == nil then return x end
  local out = native.new "void *[1]"
  native.check(memory.take(out, bytes, false))
  native.check(memory.copy(device.stream, out[0], x, bytes))
  return out[0]
end
local function get(x, there, bytes)
  if memory ~= nil then native.check(memory.copy(device.stream, x, there, bytes)) end
end

local groups, failed = {}, 0
-- Notes an error of a group; the worst one is printed with its place.
local function note(group, value, bound, place)
  local g = groups[group]
  if not g then
    g = { name = group, worst = -1, bound = bound, n = 0 }
    groups[group], groups[#groups + 1] = g, g
  end
  g.n = g.n + 1
  if value ~= value then value = math.huge end
  if value > g.worst then g.worst, g.place = value, place end
end
local function finish()
  for _, g in ipairs(groups) do
    local holds = g.worst <= g.bound or opt.report
    if not holds then failed = failed + 1 end
    print(("%s  %-28s %5d compared, worst %.3g (bound %g)%s"):format(holds and "ok    " or "FAILED", g.name, g.n, g.worst,
      g.bound, g.worst > 0 and g.place and " at " .. g.place or ""))
  end
  if #groups == 0 then error("golden file: no group that this program knows", 0) end
  if failed > 0 then require "ckaqad.errors".exit(6) end
end

local function largest_relative(a, b, n)
  local worst, largest = 0, 0
  for i = 0, n - 1 do
    local d = math.abs(a[i] - b[i])
    if d ~= d then return math.huge end
    worst, largest = math.max(worst, d), math.max(largest, math.abs(b[i]))
  end
  return worst / largest
end

-- |a - b| / |b| in L2; where b is zero a must be exactly zero.
local function l2_relative(a, b, n)
  local d, s, own = 0, 0, 0
  for i = 0, n - 1 do d, s, own = d + (a[i] - b[i]) ^ 2, s + b[i] ^ 2, own + a[i] ^ 2 end
  if s == 0 then return own == 0 and 0 or math.huge end
  return math.sqrt(d / s)
end

-- Relative error of a number; the error itself where zero is expected.
local function relative(a, b) return math.abs(b == 0 and a or a / b - 1) end

local function bits_differing(a, b, n)
  local count = 0
  a, b = native.cast("uint32_t *", a), native.cast("uint32_t *", b)
  for i = 0, n - 1 do
    if a[i] ~= b[i] then count = count + 1 end
  end
  return count
end

local function differing(a, b, n)
  local count = 0
  for i = 0, n - 1 do
    if a[i] ~= b[i] then count = count + 1 end
  end
  return count
end

local file
local function find(name)
  local e = C.cq_safetensors_find(file, name)
  return e ~= nil and e.tensor or nil
end
local function values(name)
  local t = find(name)
  if not t then error(("golden file: %s is missing"):format(name), 0) end
  if t.dtype == C.CQ_I32 or t.dtype == C.CQ_U8 then return native.elements(t) end
  return native.convert(t, "CQ_F64")
end
local function names(pattern)
  local list = {}
  for i = 0, tonumber(C.cq_safetensors_count(file)) - 1 do
    local m = native.string(C.cq_safetensors_at(file, i).name):match(pattern)
    if m then list[#list + 1] = m end
  end
  return list
end

-- ---- models ----

local function golden_batch()
  local ids, n = values "ids"
  local starts, docs = values "starts"
  local at = native.new("int64_t[?]", docs + 1)
  for i = 0, docs - 1 do at[i] = starts[i] end
  at[docs] = n
  return native.open("cq_batch", "cq_batch_make", ids, values "labels", n, at, docs), n
end

local function logits_of(model, tokens)
  local z = native.new(double and "double[?]" or "float[?]", tokens * model.vocab)
  local there = put(z, native.sizeof(z))
  call.cq_model_head_forward(model.c, model:stream(), C.cq_model_final(model.c), 0, tokens, there)
  get(z, there, native.sizeof(z))
  return z
end

local function check_logits(group, model, tokens, expected)
  note(group, largest_relative(logits_of(model, tokens), values(expected), tokens * model.vocab), 1e-4, expected)
end

local function open(dir) return cq.model.open(dir, { dtype = double and "f64" or "f32" }) end

local function check_forward(model, batch, tokens)
  call.cq_model_embed_forward(model.c, model:stream(), batch)
  for block = 0, model.n_blocks - 1 do
    call.cq_model_block_forward(model.c, model:stream(), batch, block)
    local h, n = native.elements(C.cq_model_hidden(model.c, block)[0])
    n = math.min(n, tokens * model.hidden)
    note("hidden states", largest_relative(h, values("hidden." .. block), n), 1e-4, "block " .. block)
  end
  call.cq_model_norm_forward(model.c, model:stream(), batch)
  check_logits("logits", model, tokens, "logits")
end

local function check_gradients(group, model, prefix)
  local have = {}
  for p in model:params() do
    local name = native.string(p.name)
    if not p.buffer then
      local a, n = native.elements(p.grad)
      note(group, l2_relative(a, values(prefix .. name), n), 1e-3, name)
      have[name] = true
    end
  end
  for _, name in ipairs(names("^" .. prefix:gsub("%.", "%%.") .. "(.+)$")) do
    note(group, have[name] and 0 or math.huge, 1e-3, name .. ", which the model lacks")
  end
end

local function part_of(batch) return { c = batch, index = 0, step = 1, valid = tonumber(batch.valid) } end

local function check_teacher(dir, batch, tokens)
  local model, terms = open(dir), { cq.loss.ce() }
  cq.plan { student = model, terms = terms, tokens = tokens, trained = true }
  check_forward(model, batch, tokens)
  local pass = cq.distill(nil, model, part_of(batch), terms)
  local expected = values "ce"
  note("cross-entropy", relative(pass.ce, expected[0]), 1e-4)
  call.cq_model_zero_grad(model.c)
  pass = cq.distill(nil, model, part_of(batch), terms)
  pass:backward { kl = 1 }
  check_gradients("cross-entropy gradient", model, "ce_grad.")
end

-- The golden student: its weights and frozen maxima.
local function set_student(student)
  for p in student:params() do
    local name = native.string(p.name)
    local t = find("student." .. name)
    if not t then error(("golden file: student.%s is missing"):format(name), 0) end
    call.cq_tensor_fill(p.value, t.data, t.dtype)
    if p.quantized then
      local module = name:gsub("%.weight$", "")
      p.amax = values("amax_w." .. module)[0]
      p.amax_x[0] = values("amax_x." .. module)[0]
    end
  end
  call.cq_model_requantize(student.c, student:stream())
end

local function check_student(dir, batch, tokens, mode, bound)
  local teacher, modules = open(dir), names "^amax_w%.(.+)$"
  local student = teacher:quantize { preset = "none", include = table.concat(modules, ","), weights_only = mode == "w4a16" }
  local rows, n_rows = values "rows"
  local function terms(estimator)
    return { cq.loss.kl { tail = "full" }, cq.loss.cka { tokens = n_rows, estimator = estimator } }
  end
  local unbiased, biased = terms "unbiased", terms "biased"
  cq.plan { teacher = teacher, student = student, terms = { unbiased, biased }, tokens = tokens, trained = true }
  set_student(student)
  local quantized = 0
  for p in student:params() do quantized = quantized + (p.quantized and 1 or 0) end
  note("quantized linears", math.abs(quantized - #modules), 0, ("%d, file %d"):format(quantized, #modules))
  local function distill(list)
    call.cq_distill_set_rows(student.distillers[list].c, rows, n_rows)
    return cq.distill(teacher, student, part_of(batch), list)
  end
  local function compare_cka(pass, name)
    local expected = values(mode .. name)
    for block = 0, student.n_blocks - 1 do
      note(mode .. name:gsub("[._]", " "), relative(pass.cka[block], expected[block]), bound, "block " .. block)
    end
  end
  compare_cka(distill(biased), ".cka_biased")
  call.cq_model_zero_grad(student.c)
  local pass = distill(unbiased)
  compare_cka(pass, ".cka_unbiased")
  note(mode .. " kl", relative(pass.kl, values(mode .. ".kl")[0]), bound)
  pass:backward { kl = 1, cka = 0.7 }
  if mode == "w4a16" then
    check_logits("w4a16 logits", student, tokens, "w4a16.logits")
    return check_gradients("w4a16 gradient", student, "w4a16.grad.")
  end
  local sum = 0
  for p in student:params() do
    if not p.buffer then
      local g, n = native.elements(p.grad)
      for i = 0, n - 1 do sum = sum + g[i] ^ 2 end
    end
  end
  note("w4a4 gradient norm", relative(math.sqrt(sum), values("w4a4.grad_norm")[0]), bound)
end

local function check_model(dir)
  if dir == "" then error("golden file: holds a model's values, wanted --model=DIR too", 0) end
  local batch, tokens = golden_batch()
  check_teacher(dir, batch, tokens)
  check_student(dir, batch, tokens, "w4a16", 1e-4)
  check_student(dir, batch, tokens, "w4a4", 1e-2)
end

-- ---- NVFP4 ----

local function check_nvfp4(case)
  local t = find(case .. ".x")
  local rows, cols = tonumber(t.shape.dim[0]), tonumber(t.shape.dim[1])
  local x = native.convert(t, "CQ_F32")
  local amax, scale_2 = values(case .. ".amax")[0], values(case .. ".scale_2")[0]
  local static = find(case .. ".block_amax")
  local top = static and amax / (6 * scale_2) < 300 and 256 or 448
  local bytes, scales = native.new("uint8_t[?]", rows * cols / 2), native.new("uint8_t[?]", rows * cols / 16)
  local own_scale_2, y = native.new "float[1]", native.new("float[?]", rows * cols)
  local block_amax = static and native.convert(static, "CQ_F32")
  call.cq_nvfp4_pack(bytes, scales, own_scale_2, x, rows, cols, amax, block_amax, top)
  call.cq_nvfp4_unpack(y, bytes, scales, own_scale_2[0], rows, cols)
  local kind = static and "static " or ""
  local expected = native.convert(find(case .. ".dequantized"), "CQ_F32")
  -- the static reference writes +0 for the code of -0, so its values are compared as numbers, the dynamic ones as bits
  local compare = static and differing or bits_differing
  note(kind .. "bytes that differ", differing(bytes, values(case .. ".bytes"), rows * cols / 2), 0, case)
  note(kind .. "scales that differ", differing(scales, values(case .. ".scale"), rows * cols / 16), 0, case)
  note(kind .. "scale_2 that differs", differing(own_scale_2, values(case .. ".scale_2"), 1), 0, case)
  note(kind .. "values that differ", compare(y, expected, rows * cols), 0, case)
  local a = native.new("cq_fake_quant_args", { dtype = C.CQ_F32, rows = rows, cols = cols, x = x, y = y, top = top })
  a.x, a.y = put(x, native.sizeof(x)), put(y, native.sizeof(y))
  a.fq.amax, a.fq.n_groups = put(native.new("float[1]", amax), 4), 1
  a.block_amax = block_amax and put(block_amax, native.sizeof(block_amax))
  native.check(device.stream.table.fake_quant(device.stream, a))
  get(y, a.y, native.sizeof(y))
  note(kind .. "fake quantization", compare(y, expected, rows * cols), 0, case)
  if not static then return 0, 0 end
  local found = native.new("float[?]", rows * cols / 16)
  call.cq_nvfp4_search(found, x, rows, cols, amax, top == 256 and C.CQ_SCALE_FOUR_OVER_SIX or C.CQ_SCALE_MSE)
  return differing(found, values(case .. ".block_amax"), rows * cols / 16), rows * cols / 16
end

-- ---- losses ----

local forms = {
  full = C.CQ_KL_FULL, renormalized = C.CQ_KL_RENORMALIZED, truncated = C.CQ_KL_TRUNCATED, tail_bucket = C.CQ_KL_TAIL_BUCKET,
}

local function run_kernel(name, args) native.check(device.stream.table[name](device.stream, args)) end

local function check_kl(case)
  local form, k = case:match("^(.-)_top(%d+)$")
  local shape = find("kl.student").shape
  local rows, vocab = tonumber(shape.dim[0]), tonumber(shape.dim[1])
  local mask, z = values "kl.mask", values "kl.student"
  local labels, valid = native.new("int32_t[?]", rows), 0
  for i = 0, rows - 1 do
    labels[i] = mask[i] ~= 0 and 0 or -100
    valid = valid + (mask[i] ~= 0 and 1 or 0)
  end
  local sum, teacher = native.new "double[1]", values "kl.teacher"
  local a = native.new("cq_kl_args", {
    dtype = C.CQ_F64, rows = rows, vocab = vocab, form = forms[form or case], top_k = tonumber(k) or vocab, teacher = teacher,
    student = z, labels = labels, scale = 1 / valid, gradient = true, sum = sum,
  })
  run_kernel("kl", a)
  note("kl", relative(sum[0] / valid, values("kl." .. case)[0]), 1e-9, case)
  note("kl gradient", l2_relative(z, values("kl." .. case .. ".grad"), rows * vocab), 1e-9, case)
end

local function check_cka(case)
  local shape = find("cka.student").shape
  local n, dim = tonumber(shape.dim[0]), tonumber(shape.dim[1])
  local x, y, scratch = values "cka.student", values "cka.teacher", native.new("double[?]", n * dim)
  local function gram(of)
    local g = native.new("double[?]", n * n)
    run_kernel("gram", native.new("cq_gram_args", { dtype = C.CQ_F64, n = n, dim = dim, x = of, unbiased = case == "unbiased",
      scratch = scratch, gram = g }))
    return g
  end
  local k, l, out, dx = gram(x), gram(y), native.new "double[4]", native.new("double[?]", n * dim)
  run_kernel("cka", native.new("cq_cka_args", { dtype = C.CQ_F64, loss = C.CQ_GRAM_CKA, n = n, k = k, l = l, out = out }))
  note("cka", relative((1 - out[3]), values("cka." .. case)[0]), 1e-9, case)
  run_kernel("cka_backward", native.new("cq_cka_backward_args", { dtype = C.CQ_F64, loss = C.CQ_GRAM_CKA, n = n, dim = dim, k = k,
    l = l, x = x, weight = -1, stats = out, dx = dx }))
  note("cka gradient", l2_relative(dx, values("cka." .. case .. ".grad"), n * dim), 1e-9, case)
end

-- ---- text ----

local function read(path)
  local f, why = io.open(path, "rb")
  if not f then error(why, 0) end
  local text = f:read("*a")
  f:close()
  return text
end

local function check_tokens(path)
  local tokenizer = native.open("cq_tokenizer", "cq_tokenizer_open", opt.model)
  for i, case in ipairs(cq.json.decode(read(path), path)) do
    local ids, n = native.new "int32_t *[1]", native.new "int64_t[1]"
    call.cq_tokenizer_encode(tokenizer, case.text, #case.text, ids, n)
    local same = tonumber(n[0]) == #case.ids
    for j, id in ipairs(case.ids) do same = same and ids[0][j - 1] == id end
    native.free(ids[0])
    note("encodings that differ", same and 0 or 1, 0, ("case %d, %q"):format(i, case.text:sub(1, 40)))
    local list = native.new("int32_t[?]", math.max(1, #case.ids), case.ids)
    local text = native.take_text(function(out, bytes) return C.cq_tokenizer_decode(tokenizer, list, #case.ids, out, bytes) end)
    note("decodings that differ", text == case.decoded and 0 or 1, 0, ("case %d, %q"):format(i, case.decoded:sub(1, 40)))
  end
end

local function check_chat(path)
  local template, warned = native.new "cq_template[1]", native.new "bool[1]"
  call.cq_template_find(template, warned, opt.model, opt.template ~= "auto" and opt.template or nil)
  for i, raw in ipairs(cq.json.elements(read(path), path)) do
    local text = native.take_text(function(out, bytes) return C.cq_template_render(template[0], raw, out, bytes, nil, nil) end)
    note("renderings that differ", text == cq.json.decode(raw, path).text and 0 or 1, 0, "case " .. i)
  end
end

-- ---- generation ----

local function expect_ids(group, got, wanted, place)
  local off = math.abs(#got - #wanted)
  for i = 1, math.min(#got, #wanted) do off = off + (got[i] == wanted[i] and 0 or 1) end
  note(group, off, 0, place)
end

-- The log-probabilities of an answer by one forward over prompt and answer.
local function check_logprobs(model, one)
  local ids = {}
  for _, list in ipairs { one.prompt_ids, one.ids } do
    for _, id in ipairs(list) do ids[#ids + 1] = id end
  end
  local n, from = #ids, #one.prompt_ids
  local labels, starts = native.new("int32_t[?]", n), native.new("int64_t[2]", { 0, n })
  for i = 0, n - 1 do labels[i] = -100 end
  local batch = native.open("cq_batch", "cq_batch_make", native.new("int32_t[?]", n, ids), labels, n, starts, 1)
  call.cq_model_forward(model.c, model:stream(), batch)
  local z = logits_of(model, n)
  for i, id in ipairs(one.ids) do
    local row, top, sum = z + (from + i - 2) * model.vocab, -math.huge, 0
    for v = 0, model.vocab - 1 do top = math.max(top, row[v]) end
    for v = 0, model.vocab - 1 do sum = sum + math.exp(row[v] - top) end
    local error = math.abs(row[id] - top - math.log(sum) - one.logprobs[i])
    note("log-probabilities", error, 1e-4, ("prompt %d, token %d"):format(one.prompt, i))
  end
end

local function check_generation(path)
  local cases, model, prompts = cq.json.decode(read(path), path), open(opt.model), {}
  for i, case in ipairs(cases) do prompts[i] = case.prompt end
  cq.plan { student = model, tokens = 256 }
  local out = model:generate { prompts = prompts, max_tokens = opt.most, stop = {} }
  for i, case in ipairs(cases) do
    expect_ids("prompt ids that differ", out[i].prompt_ids, case.prompt_ids, "prompt " .. i)
    for k = #case.greedy_ids, opt.most + 1, -1 do case.greedy_ids[k] = nil end
    expect_ids("greedy tokens that differ", out[i].ids, case.greedy_ids, "prompt " .. i)
    check_logprobs(model, out[i])
  end
end

if opt.generate ~= "" then check_generation(opt.generate) end
if opt.tokens ~= "" then check_tokens(opt.tokens) end
if opt.chat ~= "" then check_chat(opt.chat) end
if opt.golden ~= "" then
  file = native.open("cq_safetensors", "cq_safetensors_open", opt.golden)
  if find "ids" then check_model(opt.model) end
  local off, blocks = 0, 0
  for _, case in ipairs(names "^(.+)%.x$") do
    local d, n = check_nvfp4(case)
    off, blocks = off + d, blocks + n
  end
  if blocks > 0 then note("searched blocks that differ", off / blocks, 1e-3, off .. " of " .. blocks) end
  if find "kl.teacher" then
    for _, case in ipairs(names "^kl%.(.+)%.grad$") do check_kl(case) end
  end
  if find "cka.teacher" then
    for _, case in ipairs(names "^cka%.(.+)%.grad$") do check_cka(case) end
  end
end
finish()
