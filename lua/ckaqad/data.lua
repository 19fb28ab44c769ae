-- data.lua - documents: opened, split, packed, handed out.
--
-- A data object has the training documents with their loader, and the held-out documents. The same seed gives the same
-- split, the same order and the same sampled rows.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local ranks = require "ckaqad.ranks"
local C, call = native.C, native.call

local data = {}
local Data = errors.class("data", {})

local masks = { all = "CQ_MASK_ALL", assistant = "CQ_MASK_ASSISTANT" }

-- True when a JSONL file has lines that only a chat template can turn into text.
local function wants_template(paths)
  for path in paths:gmatch("[^,]+") do
    local f = io.open(path, "rb")
    if f then
      for line in f:lines() do
        if line:find('"messages"%s*:') or line:find('"prompt"%s*:') then
          f:close()
          return true
        end
      end
      f:close()
    end
  end
  return false
end

local function find_template(dir, forced, paths)
  local out, warned = native.new "cq_template[1]", native.new "bool[1]"
  if not wants_template(paths) then return C.CQ_TEMPLATE_NONE end
  call.cq_template_find(out, warned, dir, forced ~= "auto" and forced or nil)
  return out[0], warned[0]
end

local function open_corpus(self, paths)
  local o = native.new "cq_corpus_options"
  local warned
  o.chat, warned = find_template(self.model.dir, self.template, paths)
  self.unknown_template = self.unknown_template or warned
  o.mask = C[masks[self.mask]]
  o.vocab, o.max_tokens = self.model.vocab, self.seq
  return native.open("cq_corpus", "cq_corpus_open", paths, self.tokenizer, o)
end

-- What the run that this one goes on with had, else the largest divisor of `batch` whose rows hold at most 4096 tokens and give every
-- rank as many micro-batches, where there is one.
local function choose_micro(batch, seq)
  if ranks.micro > 0 and batch % ranks.micro == 0 then return ranks.micro end
  for n = batch, 2, -1 do
    if batch % n == 0 and n * seq <= 4096 and batch / n % ranks.size == 0 then return n end
  end
  return 1
end

local function whole(name, value, least)
  if type(value) ~= "number" or value ~= math.floor(value) or value < least then
    errors.usage("option --%s: got %s, wanted a whole number, at least %d", name, tostring(value), least)
  end
end

--- Opens JSONL documents (comma-separated files with text, messages, prompt/completion or input_ids lines).
--- Options: `model` (its tokenizer and template), `seq` (longest document and tokens per packed row), `batch` (rows per
--- step), `micro` (rows per micro-batch; 0: as many as hold 4096 tokens, and every rank has as many), `seed`, `mask` ("all" or
--- "assistant"), `holdout` (files; "": a seeded `fraction` of the documents), `template`, `shuffle`.
---
--- Example:
---     local documents = cq.data.open(opt.data, { model = teacher, seq = 128, batch = 4, seed = 3, fraction = 0.1 })
---     print(documents:facts().train.documents) --> 3870
function data.open(paths, options)
  local o = errors.fill("data.open", options, {
    model = errors.NONE, seq = 256, batch = 8, micro = 0, seed = 1, mask = "all", holdout = "", fraction = 0.05,
    template = "auto", shuffle = true,
  })
  if not o.model then errors.usage("data.open: model is missing, wanted an opened model") end
  if paths == "" then errors.usage("option --data: empty, wanted JSONL files") end
  errors.choose("option --mask", o.mask, { "all", "assistant" })
  whole("seq", o.seq, 2)
  whole("batch", o.batch, 1)
  whole("micro", o.micro, 0)
  if o.micro == 0 then o.micro = choose_micro(o.batch, o.seq) end
  if o.batch % o.micro ~= 0 then
    errors.usage("option --micro: %d does not divide --batch %d", o.micro, o.batch)
  end
  if o.batch / o.micro < ranks.size then
    errors.usage("option --batch: %d rows in micro-batches of %d are %d a step, wanted one for each of %d ranks at least", o.batch, o.micro,
      o.batch / o.micro, ranks.size)
  end
  if ranks.gram == "ranks" and o.batch / o.micro % ranks.size ~= 0 then
    errors.usage("option --gram: %d micro-batches a step on %d ranks, wanted as many on each (--batch, --micro)", o.batch / o.micro,
      ranks.size)
  end
  local held_files = o.holdout
  o.paths, o.holdout = paths, nil
  local self = setmetatable(o, Data)
  if o.model.device.imagined then return self end
  local tokenizer_file = io.open(o.model.dir .. "/tokenizer.json", "rb")
  if tokenizer_file then
    tokenizer_file:close()
    self.tokenizer = native.open("cq_tokenizer", "cq_tokenizer_open", o.model.dir)
  end
  self.corpus = open_corpus(self, paths)
  if held_files ~= "" then
    self.held, self.held_name = open_corpus(self, held_files), held_files
  elseif o.fraction > 0 then
    local held = native.new "cq_corpus *[1]"
    call.cq_corpus_hold_out(self.corpus, o.fraction, o.seed, held)
    self.held, self.held_name = native.adopt(held[0], "cq_corpus"), ("chosen by seed %d"):format(o.seed)
  end
  return self
end

--- Writes `n` documents of `seq` random token ids of the model in `dir` (its config.json is enough) to a new file in the folder
--- for temporary files, for benches. Returns the path; the caller removes it.
---
--- Example:
---     local path = cq.data.random(opt.model, 4, 32)
---     os.remove(path)
function data.random(dir, n, seq)
  local config = native.new "cq_config"
  call.cq_config_load(config, dir)
  local vocab, path, x = tonumber(config.vocab), os.tmpname(), 1
  local f, why = io.open(path, "w")
  if not f then errors.raise(errors.IO, "%s", why) end
  for _ = 1, n do
    local ids = {}
    for i = 1, seq do
      x = (1103515245 * x + 12345) % 2147483648
      ids[i] = math.floor(x / 256) % vocab
    end
    f:write('{"input_ids": [', table.concat(ids, ","), "]}\n")
  end
  f:close()
  return path
end

local function open_loader(self, corpus, batch, shuffle, once)
  local o = native.new "cq_loader_options"
  o.seq, o.batch, o.micro, o.seed, o.shuffle, o.once = self.seq, batch, self.micro, self.seed, shuffle, once
  return native.open("cq_loader", "cq_loader_open", corpus, o)
end

--- The next step's micro-batches as a C array and their number; the documents never end.
function Data:next()
  self.loader = self.loader or open_loader(self, self.corpus, self.batch, self.shuffle, false)
  local out, n = native.new "const cq_batch *[1]", native.new "int64_t[1]"
  call.cq_loader_next(self.loader, out, n)
  return out[0], tonumber(n[0])
end

--- Documents handed out so far; `seek` goes on from there with the same bits.
function Data:position() return self.loader and tonumber(C.cq_loader_position(self.loader)) or 0 end

--- Goes on from a position that `position` gave.
function Data:seek(position)
  self.loader = self.loader or open_loader(self, self.corpus, self.batch, self.shuffle, false)
  call.cq_loader_seek(self.loader, position)
end

-- Ids and mask of one document.
local function document(corpus, i)
  local ids, mask, n = native.new "const int32_t *[1]", native.new "const uint8_t *[1]", native.new "int64_t[1]"
  call.cq_corpus_doc(corpus, i, ids, mask, n)
  return ids[0], mask[0], tonumber(n[0])
end

local function make_batch(corpus, from, to, tokens)
  local ids, labels = native.new("int32_t[?]", tokens), native.new("int32_t[?]", tokens)
  local starts, at = native.new("int64_t[?]", to - from + 2), 0
  for i = from, to do
    local doc, mask, n = document(corpus, i)
    native.copy(ids + at, doc, 4 * n)
    for j = 0, n - 1 do labels[at + j] = j + 1 < n and mask[j + 1] ~= 0 and doc[j + 1] or -100 end
    starts[i - from], at = at, at + n
  end
  starts[to - from + 1] = at
  return native.open("cq_batch", "cq_batch_make", ids, labels, tokens, starts, to - from + 1)
end

-- Packs documents [0, n) of a corpus in file order into batches of at most `room` tokens.
local function pack(corpus, n, room)
  local list, from, tokens = {}, 0, 0
  for i = 0, n - 1 do
    local _, _, length = document(corpus, i)
    if tokens > 0 and tokens + length > room then
      list[#list + 1] = make_batch(corpus, from, i - 1, tokens)
      from, tokens = i, 0
    end
    tokens = tokens + length
  end
  if tokens > 0 then list[#list + 1] = make_batch(corpus, from, n - 1, tokens) end
  return list
end

--- The first `n` training documents in file order, packed into micro-batches: for calibration.
---
--- Example:
---     student:calibrate(data:take(32))
function Data:take(n)
  whole("calibrate", n, 1)
  return pack(self.corpus, math.min(n, tonumber(C.cq_corpus_count(self.corpus))), self.micro * self.seq)
end

--- All training documents in file order, packed into micro-batches.
function Data:all() return pack(self.corpus, tonumber(C.cq_corpus_count(self.corpus)), self.micro * self.seq) end

--- All held-out documents in file order, packed into micro-batches.
---
--- Example:
---     local r = cq.eval.compare(teacher, student, data:holdout())
---     print(r.tokens > 0) --> true
function Data:holdout()
  if not self.held then errors.usage("data: nothing is held out, wanted holdout files or a fraction above 0") end
  self.held_batches = self.held_batches or pack(self.held, tonumber(C.cq_corpus_count(self.held)), self.micro * self.seq)
  return self.held_batches
end

-- Counts and hash of a corpus.
local function facts(corpus)
  return {
    documents = tonumber(C.cq_corpus_count(corpus)), tokens = tonumber(C.cq_corpus_tokens(corpus)),
    truncated = tonumber(C.cq_corpus_truncated(corpus)), sha256 = native.string(C.cq_corpus_hash(corpus)),
  }
end

--- { train = { documents, tokens, truncated, sha256 }, holdout = the same, or nil when nothing is held out }.
function Data:facts() return { train = facts(self.corpus), holdout = self.held and facts(self.held) } end

--- Lines that say what was read: documents, tokens, how many were cut to `seq`.
function Data:describe()
  local f = self:facts()
  local function line(x, name)
    return ("%d documents, %d tokens%s"):format(x.documents, x.tokens,
      x.truncated > 0 and (" (%d cut to %d tokens)"):format(x.truncated, self.seq) or "") .. name
  end
  local lines = { line(f.train, " to train on, " .. self.paths) }
  if f.holdout then lines[2] = line(f.holdout, " held out, " .. self.held_name) end
  if self.unknown_template then
    lines[#lines + 1] = "warning: the model's chat template is unknown, --template=" .. self.template .. " is used in its place"
  end
  return lines
end

--- Prints the first `n` training documents; tokens that are targets are coloured on a terminal, [[bracketed]] elsewhere.
---
--- Example:
---     cq.data.show(data, 2)
function data.show(self, n)
  local colour = native.isatty(1) and not os.getenv("NO_COLOR")
  for i = 0, math.min(n or 3, tonumber(C.cq_corpus_count(self.corpus))) - 1 do
    local _, _, length = document(self.corpus, i)
    print(("-- document %d, %d tokens"):format(i, length))
    print(native.take_text(function(out) return C.cq_corpus_show(self.corpus, self.tokenizer, i, colour, out) end))
  end
end

return data
