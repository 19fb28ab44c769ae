-- eval.lua - how far a student is from its teacher on documents it was not trained on, and what 4 bits cost its weights.
--
-- C sums, this file divides. The weights' statistics come from the master weights of the moment, not from the last forward.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local ranks = require "ckaqad.ranks"
local C, call = native.C, native.call

local eval = {}

--- The comparison of a pair as C sees it; `cq.plan { eval = true }` calls it.
function eval.open(teacher, student)
  student.evaluators = student.evaluators or {}
  student.evaluators[teacher] = teacher.cached and native.open("cq_eval", "cq_eval_open_cached", student.c, teacher.top_k,
    teacher.holdout_rows) or
    native.open("cq_eval", "cq_eval_open", teacher.c, student.c)
  return student.evaluators[teacher]
end

-- Sums of KL by octaves of the position as { first, last, kl, tokens }, positions from 0.
local function positions(r)
  local list = {}
  for k = 0, tonumber(r.n_octaves) - 1 do
    local tokens = tonumber(r.octave_tokens[k])
    if tokens > 0 then
      list[#list + 1] = { first = 2 ^ k - 1, last = 2 ^ (k + 1) - 2, kl = r.octave_kl[k] / tokens, tokens = tokens }
    end
  end
  return list
end

local function map_of(r, n)
  if r.map == nil then return nil end
  local map = {}
  for teacher = 0, n - 1 do
    local row = {}
    for student = 0, n - 1 do row[student + 1] = r.map[teacher * n + student] end
    map[teacher + 1] = row
  end
  return map
end

local ways = { "raw_unbiased", "raw_biased", "standard_unbiased", "standard_biased" }

local function geometry_of(r, n)
  if r.geometry == nil then return nil end
  local out = {}
  for way, name in ipairs(ways) do
    out[name] = {}
    for block = 0, n - 1 do out[name][block + 1] = r.geometry[#ways * block + way - 1] end
  end
  return out
end

--- Compares two models of a plan on batches (`data:holdout()`): { kl (nats a token), perplexity, perplexity_teacher, top1
--- (fraction), cka (mean), cka_min, cka_min_block, cka_blocks = list over blocks, tokens }.
--- Unless `extras = false`, also { kl_positions = list of { first, last, kl, tokens } over octaves of the position in the
--- document, cka_map[teacher block + 1][student block + 1] = unbiased CKA over 128 rows of each batch, sqnr and scales = what
--- `student:quantization_error()` and `student:scale_histogram()` give (absent when the student has no master weights) }.
--- With `geometry = true` also { geometry = { raw_unbiased, raw_biased, standard_unbiased, standard_biased } }: lists over blocks of CKA
--- over groups of at most 512 rows, of the block outputs as they are and with every dimension divided by its standard deviation in
--- the teacher; for small models.
--- With a cached teacher (`cq.cache.open`) the batches are those it was made of, KL is over its logits and one bucket, and there is
--- no map.
---
--- Example:
---     local r = cq.eval.compare(teacher, student, data:holdout(), { extras = false })
---     print(("KL %.4f, CKA %.4f, lowest at block %d"):format(r.kl, r.cka, r.cka_min_block))
function eval.compare(teacher, student, batches, options)
  local o = errors.fill("eval.compare", options, { extras = true, geometry = false })
  local e = student.evaluators and student.evaluators[teacher]
  if not e then errors.usage("eval: this pair is not in the plan, wanted run:plan { eval = true, ... }") end
  C.cq_eval_want_map(e, o.extras)
  C.cq_eval_want_geometry(e, o.geometry)
  C.cq_eval_reset(e)
  for i, batch in ipairs(batches) do
    if teacher.cached then call.cq_eval_from(e, teacher:held_file(i)) end
    call.cq_eval_add(e, student:stream(), batch)
  end
  local r = native.new "cq_eval_result"
  call.cq_eval_result_get(e, r)
  local blocks = {}
  for i = 0, student.n_blocks - 1 do blocks[i + 1] = r.cka[i] end
  local masters = o.extras and student.quant ~= nil
  return {
    kl = r.kl, top1 = r.top1, perplexity = r.perplexity_student, perplexity_teacher = r.perplexity_teacher,
    tokens = tonumber(r.tokens), cka = r.cka_mean, cka_min = r.cka_min, cka_min_block = tonumber(r.cka_min_block),
    cka_blocks = blocks, kl_positions = o.extras and positions(r) or nil, cka_map = map_of(r, student.n_blocks),
    geometry = geometry_of(r, student.n_blocks),
    sqnr = masters and student:quantization_error() or nil, scales = masters and student:scale_histogram() or nil,
  }
end

-- backbone.layers.3.mixer.experts.7.up_proj.weight -> experts.*.up_proj
local function module_kind(name)
  local s = name:gsub("%.weight$", ""):gsub("^.*layers%.%d+%.", ""):gsub("^mixer%.", "")
  return (s:gsub("%.%d+%.", ".*."))
end

-- Statistics of experts that are dealt out become those of all ranks' experts, and are added to `total`.
local function add_up(stats, total)
  local mine, n = { stats.signal, stats.noise }, 2 + 127
  for code = 0, 126 do mine[3 + code] = tonumber(stats.scales[code]) end
  local all = ranks.gather(mine, n, "statistics of experts")
  for i = 1, n do
    mine[i] = 0
    for r = 0, ranks.size - 1 do mine[i] = mine[i] + all[r * n + i] end
  end
  stats.signal, stats.noise = mine[1], mine[2]
  total.signal, total.noise = total.signal + mine[1], total.noise + mine[2]
  for code = 0, 126 do
    stats.scales[code] = mine[3 + code]
    total.scales[code] = total.scales[code] + mine[3 + code]
  end
end

-- Statistics of the quantized weights as { [block] = { total, kinds = { [kind] = stats }, order = kinds in checkpoint order } }.
local function weights(student)
  local blocks = {}
  for p in student:params() do
    if p.quantized then
      local block, kind = tonumber(p.block), module_kind(native.string(p.name))
      local b = blocks[block] or { total = native.new "cq_quant_stats", kinds = {}, order = {} }
      blocks[block] = b
      if not b.kinds[kind] then
        b.kinds[kind], b.order[#b.order + 1] = { stats = native.new "cq_quant_stats", n = 0 }, kind
      end
      b.kinds[kind].n, b.kinds[kind].dealt = b.kinds[kind].n + 1, p.holder >= 0
      if p.holder < 0 then call.cq_quant_stats_add(b.total, p) end
      if p.holder < 0 or p.holder == ranks.rank then call.cq_quant_stats_add(b.kinds[kind].stats, p) end
    end
  end
  for block = 0, student.n_blocks - 1 do
    local b = blocks[block]
    for _, kind in ipairs(b and b.order or {}) do
      if b.kinds[kind].dealt then add_up(b.kinds[kind].stats, b.total) end
    end
  end
  return blocks
end

-- Signal to noise in dB; infinite for weights that lose nothing.
local function decibel(s) return s.noise > 0 and 10 * math.log10(s.signal / s.noise) or math.huge end

--- The same as `student:quantization_error()`.
function eval.quantization_error(student)
  local list, blocks = {}, weights(student)
  for block = 0, student.n_blocks - 1 do
    local b = blocks[block]
    if b then
      local linears = {}
      for i, kind in ipairs(b.order) do
        linears[i] = { name = kind, n = b.kinds[kind].n, db = decibel(b.kinds[kind].stats) }
      end
      list[#list + 1] = { block = block, db = decibel(b.total), linears = linears }
    end
  end
  return list
end

-- A bin is half an octave: E4M3 has eight values in an octave, and the fifth, 1.5, is the first above the octave's middle.
--- The same as `student:scale_histogram()`.
function eval.scale_histogram(student)
  local low, n_bins, list, blocks = -9, 36, {}, weights(student)
  for block = 0, student.n_blocks - 1 do
    local b = blocks[block]
    if b then
      local counts = {}
      for bin = 1, n_bins do counts[bin] = 0 end
      for code = 1, 126 do
        local bin = math.floor(2 * (C.cq_quant_scale_log2(code) - low)) + 1
        counts[bin] = counts[bin] + tonumber(b.total.scales[code])
      end
      list[#list + 1] = { block = block, counts = counts }
    end
  end
  return { low = low, width = 0.5, blocks = list }
end

-- Six digits are more than a picture shows, and a map of 52 blocks has 2704 numbers.
local function short(x)
  if x ~= x or math.abs(x) == math.huge then return json.null end
  return tonumber(("%.6g"):format(x))
end

local function extras(r)
  local places, map, sqnr, scales = {}, {}, {}, {}
  for i, p in ipairs(r.kl_positions or {}) do
    places[i] = json.object { "first", p.first, "last", p.last, "kl", p.kl, "tokens", p.tokens }
  end
  for i, row in ipairs(r.cka_map or {}) do
    map[i] = json.array {}
    for j = 1, #row do map[i][j] = short(row[j]) end
  end
  for i, b in ipairs(r.sqnr or {}) do
    local linears = json.array {}
    for j, l in ipairs(b.linears) do linears[j] = json.object { "name", l.name, "n", l.n, "db", short(l.db) } end
    sqnr[i] = json.object { "block", b.block, "db", short(b.db), "linears", linears }
  end
  for i, b in ipairs(r.scales and r.scales.blocks or {}) do
    scales[i] = json.object { "block", b.block, "counts", json.array(b.counts) }
  end
  return r.kl_positions and json.array(places), r.cka_map and json.array(map), r.sqnr and json.array(sqnr),
    r.scales and json.object { "low", r.scales.low, "width", r.scales.width, "blocks", json.array(scales) }
end

--- A result of `cq.eval.compare` as the JSON object that summary.json holds, keys in a fixed order; nil for nil.
function eval.record(r)
  if not r then return nil end
  local places, map, sqnr, scales = extras(r)
  return json.object {
    "kl", r.kl, "perplexity", r.perplexity, "top1", r.top1, "cka", r.cka, "cka_min", r.cka_min, "cka_min_block", r.cka_min_block,
    "cka_blocks", json.array(r.cka_blocks), "tokens", r.tokens, "perplexity_teacher", r.perplexity_teacher,
    "kl_positions", places, "cka_map", map, "sqnr", sqnr, "scales", scales, "geometry", r.geometry,
  }
end

return errors.strict(eval, "eval")
