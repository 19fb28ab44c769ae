-- cache.lua - an offline teacher: what it says of every micro-batch of a run, made once, then used in its place.
--
-- A folder holds teacher.json, and a file for each micro-batch of the steps (step-S-M.safetensors) and of the held-out documents
-- (held-out-N.safetensors); core/train/cache.h says what is in one. Sampled rows depend on seed, step and micro-batch, so a cache
-- is of one order of documents: model, tokenizer, documents, seq, batch, micro and seed must be those of the run, else it is
-- refused with what was found and wanted. Fewer logits, blocks or steps than it holds are served.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local hf = require "ckaqad.hf"
local json = require "ckaqad.json"
local loss = require "ckaqad.loss"
local ranks = require "ckaqad.ranks"
local select_ = require "ckaqad.select"
local text = require "ckaqad.text"
local C, call = native.C, native.call

local cache = {}
local Cache = errors.class("cache", {})
local Source = errors.class("cached teacher", {})

local format = 1
local whole = 2 ^ 30 -- bytes up to which a file of weights is hashed to the last

-- SHA-256 of a file; above `whole` of its size and 64 pieces of 64 KiB, evenly spaced.
local function hash_of(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local bytes = f:seek "end"
  if bytes <= whole then
    f:close()
    return native.sha256(path)
  end
  local pieces = { ("%d"):format(bytes) }
  for i = 0, 63 do
    f:seek("set", math.floor((bytes - 65536) * i / 63))
    pieces[#pieces + 1] = f:read(65536)
  end
  f:close()
  return native.sha256_text(table.concat(pieces))
end

-- One hash over config and weights of a folder.
local function model_hash(dir)
  local parts, names = { hash_of(dir .. "/config.json") }, {}
  for name in native.take_text(function(out) return C.cq_folder_list(out, dir) end):gmatch "[^\n]+" do
    if name:find "%.safetensors$" then names[#names + 1] = name end
  end
  table.sort(names)
  for _, name in ipairs(names) do parts[#parts + 1] = name .. " " .. hash_of(dir .. "/" .. name) end
  return native.sha256_text(table.concat(parts, "\n"))
end

-- What a cache and a run must agree in, in the order in which it is looked at: { key, what it is called, value }.
local function identity(model, data, seed)
  local facts = data:facts()
  return {
    { "model", "model", model_hash(model.dir) }, { "tokenizer", "tokenizer", hash_of(model.dir .. "/tokenizer.json") or "none" },
    { "seq", "--seq", data.seq }, { "batch", "--batch", data.batch }, { "micro", "--micro", data.micro }, { "seed", "--seed", seed },
    { "mask", "--mask", data.mask }, { "data", "documents", facts.train.sha256 },
    { "holdout", "held-out documents", facts.holdout and facts.holdout.sha256 or "none" },
  }
end

local function short(value)
  local s = tostring(value)
  return #s == 64 and s:sub(1, 12) or s
end

local function manifest_path(dir) return dir .. "/teacher.json" end

local function read_manifest(dir)
  local f = io.open(manifest_path(dir), "rb")
  if not f then return nil end
  local m = json.decode(f:read "*a", manifest_path(dir))
  f:close()
  if type(m) ~= "table" or type(m.format) ~= "number" then
    errors.raise(errors.DATA, "%s: has no format, wanted the file of a teacher cache", manifest_path(dir))
  end
  if m.format > format then
    errors.raise(errors.DATA, "%s: format %d, made by version %s, wanted at most format %d", manifest_path(dir), m.format,
      tostring(m.version), format)
  end
  for _, key in ipairs { "steps", "held_out", "top_k", "rows", "holdout_rows", "blocks" } do
    local wanted = key == "blocks" and "string" or "number"
    if type(m[key]) ~= wanted then
      errors.raise(errors.DATA, "%s: %s is %s, wanted a %s", manifest_path(dir), key, tostring(m[key]), wanted)
    end
  end
  return m
end

local function refuse(dir, name, found, wanted)
  errors.raise(errors.DATA, "teacher cache %s: made with %s %s, wanted %s", dir, name, short(found), short(wanted))
end

local function step_file(dir, step, micro) return ("%s/step-%06d-%03d.safetensors"):format(dir, step, micro) end
local function held_file(dir, i) return ("%s/held-out-%05d.safetensors"):format(dir, i) end

local storages = { f16 = "CQ_F16", f32 = "CQ_F32" }

--- Starts or continues a cache in folder `dir`. Options: `teacher` and `data` (opened), `steps`, `top_k` (logits of each token that
--- are kept, at most the vocabulary), `storage` ("f16": half-precision log-probabilities and Grams, or "f32"), `blocks` (whose Grams
--- are kept), `tokens` (sampled rows of each), `holdout_tokens` (rows of each held-out Gram, at most; with 512 held-out CKA is what it
--- is without a cache, with fewer an estimate in less room), `seed`. The plan takes it as `cache`. A folder with a cache of something
--- else is refused.
---
--- Example:
---     local cache = cq.cache.create("kept", { teacher = teacher, data = data, steps = 3, top_k = 64, tokens = 32 })
---     print(cache.top_k, cache.blocks) --> 64	0,1,2,3,4,5,6,7
function cache.create(dir, options)
  ranks.refuse("teacher cache")
  local o = errors.fill("cache.create", options, {
    teacher = errors.NONE, data = errors.NONE, steps = 0, top_k = 1024, storage = "f16", blocks = "all", tokens = 512, seed = 1,
    holdout_tokens = 512,
  })
  if not o.teacher or not o.data then errors.usage("cache.create: teacher or data is missing") end
  if o.teacher.device.imagined then errors.usage("option --gpus: plans trainings, not making a cache; wanted a recipe that distils") end
  errors.choose("option --storage", o.storage, { "f16", "f32" })
  local list = select_.blocks(o.blocks, o.teacher.pattern)
  local taps = native.new("bool[?]", o.teacher.n_blocks)
  for _, block in ipairs(list) do taps[block] = true end
  local self = setmetatable({
    dir = dir, teacher = o.teacher, data = o.data, steps = o.steps, top_k = math.min(o.top_k, o.teacher.vocab), storage = o.storage,
    blocks = table.concat(list, ","), rows = math.min(o.tokens, o.data.micro * o.data.seq), seed = o.seed,
    made = 0, kept = 0, bytes = 0, tokens = 0,
  }, Cache)
  local r = native.new "cq_recorder_options"
  r.top_k, r.storage, r.rows, r.taps, r.seed = self.top_k, C[storages[o.storage]], math.max(4, self.rows), taps, o.seed
  r.held_out_rows = o.holdout_tokens
  r.chunk = require("ckaqad.distill").chunk(o.teacher.vocab, o.teacher.device.on_device)
  self.c = native.open("cq_recorder", "cq_recorder_open", o.teacher.c, r)
  self.identity = identity(o.teacher, o.data, o.seed)
  for _, item in ipairs { { "top_k", "--top_k", self.top_k }, { "storage", "--storage", self.storage }, { "rows", "--rows", self.rows },
    { "holdout_rows", "--holdout_rows", o.holdout_tokens }, { "blocks", "--cka", self.blocks } } do
    self.identity[#self.identity + 1] = item
  end
  local m = read_manifest(dir)
  for _, item in ipairs(m and self.identity or {}) do
    if m[item[1]] ~= item[3] then
      errors.usage("teacher cache %s: made with %s %s, wanted %s: another folder, or remove this one", dir, item[2], short(m[item[1]]),
        short(item[3]))
    end
  end
  if not m and hf.exists(dir) and native.take_text(function(out) return C.cq_folder_list(out, dir) end):find "%S" then
    errors.usage("teacher cache %s: the folder is not empty and holds no cache, wanted a new folder", dir)
  end
  self.steps = math.max(o.steps, m and m.steps or 0)
  return self
end

local function write_manifest(self, complete)
  local list = { "format", format, "program", "ckaqad", "version", native.version, "dir", self.teacher.dir, "vocab", self.teacher.vocab }
  for _, item in ipairs(self.identity) do list[#list + 1], list[#list + 2] = item[1], item[3] end
  local device = self.teacher.device
  for _, x in ipairs { "steps", self.steps, "held_out", self.held_out or 0, "compute", device.compute,
    "activations", device.activations, "complete", complete } do
    list[#list + 1] = x
  end
  local s = json.encode(json.object(list), true) .. "\n"
  call.cq_file_write(manifest_path(self.dir), s, #s)
end

local function begin(self)
  if self.lock then return end
  call.cq_folder_make(self.dir)
  self.lock = native.open("cq_lock", "cq_lock_take", self.dir .. "/lock")
  native.take_text(function(out) return C.cq_folder_list(out, self.dir) end):gsub("[^\n]+%.tmp%.%d+", function(name)
    os.remove(self.dir .. "/" .. name) -- of a making that was killed
  end)
  write_manifest(self, false)
end

local function write(self, batch, step, micro, held_out, path)
  begin(self)
  if hf.exists(path) then
    self.kept = self.kept + 1
    return false
  end
  local bytes = native.new "int64_t[1]"
  call.cq_recorder_write(self.c, self.teacher:stream(), batch, step, micro, held_out, path, bytes)
  self.made = self.made + 1
  if not held_out then self.bytes, self.tokens = self.bytes + tonumber(bytes[0]), self.tokens + tonumber(batch.tokens) end
  return true
end

--- Runs the teacher over a micro-batch of a step and writes its file; false when it is there already, from a making that was
--- stopped.
---
--- Example:
---     local cache = cq.cache.create("kept", { teacher = teacher, data = data, steps = 1, top_k = 64, tokens = 32 })
---     cq.plan { student = teacher, data = data, cache = cache }
---     print(cache:write(part), cache:write(part)) --> true	false
function Cache:write(part) return write(self, part.c, part.step, part.index, false, step_file(self.dir, part.step, part.index)) end

--- The same for the i-th of `data:holdout()`: with all rows of all blocks, as `cq.eval.compare` looks at.
function Cache:write_holdout(i, batch)
  self.held_out = math.max(self.held_out or 0, i)
  return write(self, batch, 0, 0, true, held_file(self.dir, i))
end

--- Marks the cache as complete. Returns a line: files made and found, bytes per token.
function Cache:finish()
  begin(self)
  write_manifest(self, true)
  native.close(self.lock, "cq_lock")
  self.lock = nil
  local made = self.tokens > 0 and (", %s for %s tokens: %.1f bytes a token"):format(text.bytes(self.bytes), text.count(self.tokens),
    self.bytes / self.tokens) or ""
  return ("cache %s: %d files made, %d were there%s"):format(self.dir, self.made, self.kept, made)
end

-- Refuses what the terms of a run want and the cache lacks.
local function check_terms(self, terms, data)
  local m, logits, layers = self.manifest, loss.split(terms)
  if logits and logits.logits == "kl" then
    local wanted = logits.tail == "full" and self.model.vocab or math.min(logits.top_k, self.model.vocab)
    if wanted > m.top_k then
      refuse(self.dir, "--top_k", m.top_k, ("at least %d (%s)"):format(wanted, logits.tail == "full" and "--tail=full" or "--top_k"))
    end
  end
  local wanted = layers and select_.blocks(layers.blocks, self.model.pattern) or {}
  if #wanted == 0 then return end
  if layers.layers == "cosine" or layers.layers == "mse" then
    errors.usage("option --layer: %s needs the teacher's hidden states, a cache holds their Grams: wanted cka, gram or none",
      layers.layers)
  end
  local rows = math.min(layers.tokens, data.micro * data.seq)
  if rows ~= m.rows then refuse(self.dir, "--rows", m.rows, rows) end
  for _, block in ipairs(wanted) do
    if not ("," .. m.blocks .. ","):find("," .. block .. ",", 1, true) then
      refuse(self.dir, "Grams of blocks", m.blocks == "" and "none" or m.blocks, ("block %d too (--cka)"):format(block))
    end
  end
end

local function check_complete(self, steps)
  local m = self.manifest
  if m.complete ~= true then
    errors.raise(errors.DATA, "teacher cache %s: its making was not finished, wanted all of it: the same command goes on", self.dir)
  end
  if m.steps < steps then refuse(self.dir, "--steps", m.steps, ("at least %d"):format(steps)) end
end

-- A file that is missing or cut short is found before the first step, not at the one that wants it. The rest is checked when a
-- file is opened.
local function check_file(path)
  local f = io.open(path, "rb")
  if not f then errors.raise(errors.DATA, "%s: is missing, wanted the file of a micro-batch", path) end
  local bytes, at, size, last = f:seek "end", f:seek "set", 0, 0
  local head = f:read(8) or ""
  for i = #head, 1, -1 do size = 256 * size + head:byte(i) end
  for stop in ((size < bytes and f:read(size)) or ""):gmatch '"data_offsets":%[%d+,(%d+)%]' do last = math.max(last, tonumber(stop)) end
  f:close()
  if at ~= 0 or bytes ~= 8 + size + last then
    errors.raise(errors.DATA, "%s: is %.0f bytes long, its header wanted %.0f: cut short", path, bytes, 8 + size + last)
  end
end

local function check_files(self, steps, data)
  for step = 1, steps do
    for micro = 0, data.batch / data.micro - 1 do check_file(step_file(self.dir, step, micro)) end
  end
  for i = 1, self.manifest.held_out do check_file(held_file(self.dir, i)) end
end

--- A cache in the teacher's place: `cq.distill`, `cq.eval.compare` and the plan take it as their teacher. Options: `model` (the
--- checkpoint, whose weights stay on disk), `data`, `terms`, `steps`, `seed` of the run. What does not fit is refused in one line.
--- With `dir` "" the model itself is the teacher.
---
--- Example:
---     local cache = cq.cache.create("whole", { teacher = teacher, data = data, steps = 0, top_k = 64, tokens = 32 })
---     cache:finish()
---     local kept = cq.cache.open("whole", { model = teacher, data = data, terms = { cq.loss.kl { top_k = 16 } }, steps = 0 })
---     print(kept.top_k) --> 64
function cache.open(dir, options)
  local o = errors.fill("cache.open", options, {
    model = errors.NONE, data = errors.NONE, terms = errors.NONE, steps = 0, seed = 1,
  })
  if not o.model or not o.data or not o.terms then errors.usage("cache.open: model, data or terms is missing") end
  if dir == "" or o.model.device.imagined then return o.model end
  local m = read_manifest(dir)
  if not m then
    errors.raise(errors.DATA, "teacher cache %s: teacher.json is missing, wanted a folder of recipes/teacher_cache.lua", dir)
  end
  local self = setmetatable({
    cached = true, dir = dir, model = o.model, manifest = m, top_k = m.top_k, holdout_rows = m.holdout_rows,
  }, Source)
  for _, item in ipairs(identity(o.model, o.data, o.seed)) do
    if m[item[1]] ~= item[3] then refuse(dir, item[2], m[item[1]], item[3]) end
  end
  check_complete(self, o.steps)
  check_terms(self, o.terms, o.data)
  check_files(self, o.steps, o.data)
  return self
end

-- The files of a micro-batch.
function Source:step_file(step, micro) return step_file(self.dir, step, micro) end
function Source:held_file(i) return held_file(self.dir, i) end

-- Bytes of the larger of the first files: one is mapped at a time.
function Source:largest()
  local largest = 0
  for _, path in ipairs { step_file(self.dir, 1, 0), held_file(self.dir, 1) } do
    local f = io.open(path, "rb")
    if f then
      largest = math.max(largest, f:seek "end")
      f:close()
    end
  end
  return largest
end

--- One line: what it holds, and what held-out KL is with it.
function Source:describe()
  local m = self.manifest
  return ("cached in %s: %d logits a token%s, %d steps; %s"):format(self.dir, m.top_k, m.storage == "f16" and " in half precision" or "",
    m.steps, m.top_k < self.model.vocab and "held-out KL is over them and one bucket, a lower bound; no map of blocks" or
      "held-out KL is the full one; no map of blocks")
end

return cache
