-- generate.lua - text and ids in, continued sequences out; the memory for them is planned here when no plan has it.
--
-- The pieces of a prompt and the passes are C's business (core/model/generate.h).
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local C, call = native.C, native.call

local generate = {}

local function tokenizer(model)
  if not model.tokenizer then model.tokenizer = native.open("cq_tokenizer", "cq_tokenizer_open", model.dir) end
  return model.tokenizer
end

-- The tokenizer, or nil when the folder has none.
local function tokenizer_if_any(model)
  local f = io.open(model.dir .. "/tokenizer.json", "rb")
  if not f then return nil end
  f:close()
  return tokenizer(model)
end

local function list_of(pointer, n)
  local list = {}
  for i = 1, n do list[i] = pointer[i - 1] end
  return list
end

-- The C array of a list of ids.
local function array_of(ids)
  local array = native.new("int32_t[?]", math.max(1, #ids))
  for i, id in ipairs(ids) do
    if type(id) ~= "number" or id ~= math.floor(id) or math.abs(id) >= 2 ^ 31 then
      errors.usage("generate: token %s at position %d, wanted a whole number", tostring(id), i)
    end
    array[i - 1] = id
  end
  return array
end

function generate.encode(model, text)
  if type(text) ~= "string" then errors.usage("encode: got %s, wanted a text", type(text)) end
  local ids, n = native.new "int32_t *[1]", native.new "int64_t[1]"
  call.cq_tokenizer_encode(tokenizer(model), text, #text, ids, n)
  local list = list_of(ids[0], tonumber(n[0]))
  native.free(ids[0])
  return list
end

function generate.decode(model, ids)
  local array, t = array_of(ids), tokenizer(model)
  return native.take_text(function(out, bytes) return C.cq_tokenizer_decode(t, array, #ids, out, bytes) end)
end

function generate.chat(model, messages, options)
  local o = errors.fill("chat", options, { template = "auto", thinking = errors.NONE })
  local out, warned = native.new "cq_template[1]", native.new "bool[1]"
  call.cq_template_find(out, warned, model.dir, o.template ~= "auto" and o.template or nil)
  if out[0] == C.CQ_TEMPLATE_NONE then
    errors.raise(errors.DATA, "%s: no chat template, wanted --template=nano3 or qwen3-thinking", model.dir)
  end
  local list = json.array {}
  for i, m in ipairs(messages) do list[i] = json.object { "role", m.role, "content", m.content } end
  local conversation = json.encode(json.object { "messages", list, "add_generation_prompt", true, "enable_thinking", o.thinking })
  return native.take_text(function(text, bytes) return C.cq_template_render(out[0], conversation, text, bytes, nil, nil) end)
end

-- The ids that end an answer by the model's own files: eos of config.json and of generation_config.json.
local function own_stops(model)
  local list, seen = {}, {}
  local function add(id)
    if type(id) == "number" and id >= 0 and id < model.vocab and not seen[id] then seen[id], list[#list + 1] = true, id end
  end
  add(tonumber(model.config.eos))
  local f = io.open(model.dir .. "/generation_config.json", "rb")
  if f then
    local text = f:read "*a"
    f:close()
    local eos = json.decode(text, model.dir .. "/generation_config.json").eos_token_id
    if type(eos) == "table" then
      for _, id in ipairs(eos) do add(id) end
    else
      add(eos)
    end
  end
  return list
end

local function stops_of(model, wanted)
  if wanted == nil then return own_stops(model) end
  local list = {}
  for i, stop in ipairs(wanted) do
    list[i] = stop
    if type(stop) == "string" then
      list[i] = tonumber(C.cq_tokenizer_id(tokenizer(model), stop))
      if list[i] < 0 then errors.usage("generate: stop %q is no token of %s", stop, model.dir) end
    end
  end
  return list
end

local function open(model, plan, slots, room)
  local g = native.open("cq_generator", "cq_generator_open", model.c, slots, room)
  call.cq_generator_plan(g, plan)
  return { c = g, plan = plan, slots = slots, room = room }
end

-- For cq.plan: declares the memory of `options.slots` sequences of `options.room` tokens.
function generate.declare(model, plan, options)
  local o = errors.fill("plan: generate", options, { slots = 16, room = 256 })
  model.generator = open(model, plan, o.slots, o.room)
  model.generator.planned = true
end

-- Closes a generator that `generator` made, with its memory.
local function drop(model)
  local g = model.generator
  model.generator = nil
  if not g or g.planned then return end
  native.close(g.plan, "cq_plan")
  native.close(g.c, "cq_generator")
end

-- The model's generator, with memory for sequences of `room` tokens, of which `n` are wanted.
local function generator(model, n, slots, room)
  if not model.plan then errors.usage("generate: the model is not in a plan, wanted cq.plan { student = model, tokens = 512 }") end
  local g = model.generator
  if g and g.planned then
    if g.room < room then
      errors.usage("generate: prompt and max_tokens are %d tokens, wanted at most the planned %d", room, g.room)
    end
    return g
  end
  local wanted = slots > 0 and slots or math.min(n, 64, math.max(1, math.floor(model.plan.tokens / 2)))
  if g and g.room >= room and (g.slots == wanted or slots == 0 and g.slots > wanted) then return g end
  drop(model)
  local plan, most = native.open("cq_plan", "cq_plan_open"), tonumber(model.config.max_positions)
  C.cq_plan_place(plan, model.device.stream)
  room = math.ceil(room / 64) * 64
  g = open(model, plan, wanted, most > 0 and math.min(room, math.max(most, 2)) or room)
  call.cq_plan_commit(plan, 0)
  model.generator = g
  return g
end

-- For cq.plan: another plan of a model, so its generator must be planned anew.
function generate.replanned(model) drop(model) end

-- Adds every prompt and writes to the end of all.
local function add_prompts(model, g, o, prompts)
  for i, ids in ipairs(prompts) do
    local given = o.given and o.given[i] or {}
    call.cq_generator_add(g.c, array_of(ids), #ids, array_of(given), #given, o.samples)
  end
  call.cq_generator_run(g.c, model:stream())
end

local function results(model, g, o, prompts)
  local out, r, t = {}, native.new "cq_generated", tokenizer_if_any(model)
  local tokens, prompt_tokens = 0, 0
  for i, ids in ipairs(prompts) do
    prompt_tokens = prompt_tokens + #ids
    for sample = 1, o.samples do
      call.cq_generator_result(g.c, #out, r)
      local n = tonumber(r.n)
      local one = { prompt = i, sample = sample, prompt_ids = ids, ids = list_of(r.ids, n), logprobs = list_of(r.logprob, n),
        stopped = r.stopped }
      local said = n - (one.stopped and 1 or 0)
      one.text = t and native.take_text(function(text, bytes) return C.cq_tokenizer_decode(t, r.ids, said, text, bytes) end) or nil
      out[#out + 1], tokens = one, tokens + n
    end
  end
  return out, tokens, prompt_tokens
end

local function whole(name, value, least)
  if type(value) ~= "number" or value ~= math.floor(value) or value < least then
    errors.usage("generate: %s is %s, wanted a whole number, at least %d", name, tostring(value), least)
  end
end

-- Refuses what is no list of texts or id lists; nothing is a list of none.
local function list_given(name, list)
  if list == nil and name == "given" then return end
  if type(list) ~= "table" then errors.usage("generate: %s is a %s, wanted a list of texts or id lists", name, type(list)) end
  for i, one in ipairs(list) do
    if type(one) ~= "table" and (type(one) ~= "string" or name == "given") then
      errors.usage("generate: %s[%d] is a %s, wanted %sa list of ids", name, i, type(one), name == "given" and "" or "a text or ")
    end
  end
end

function generate.generate(model, options)
  local o = errors.fill("generate", options, { prompts = errors.NONE, max_tokens = 64, temperature = 0, top_p = 1, stop = errors.NONE,
    seed = 1, samples = 1, slots = 0, given = errors.NONE })
  list_given("prompts", o.prompts)
  list_given("given", o.given)
  if o.stop ~= nil and type(o.stop) ~= "table" then errors.usage("generate: stop is a %s, wanted a list", type(o.stop)) end
  whole("max_tokens", o.max_tokens, 1)
  whole("samples", o.samples, 1)
  whole("slots", o.slots, 0)
  whole("seed", o.seed, 0)
  if #o.prompts == 0 then return {}, { tokens = 0, prompt_tokens = 0, passes = 0, seconds = 0 } end
  local begun, prompts, longest = native.clock(), {}, 1
  for i, p in ipairs(o.prompts) do
    prompts[i] = type(p) == "string" and generate.encode(model, p) or p
    longest = math.max(longest, #prompts[i])
  end
  local g = generator(model, #prompts * o.samples, o.slots, longest + o.max_tokens)
  local c, stops = native.new "cq_generate_options", stops_of(model, o.stop)
  local stop_ids = array_of(stops)
  c.max_tokens, c.temperature, c.top_p, c.stop, c.n_stop, c.seed = o.max_tokens, o.temperature, o.top_p, stop_ids, #stops, o.seed
  call.cq_generator_begin(g.c, c)
  add_prompts(model, g, o, prompts)
  local out, tokens, prompt_tokens = results(model, g, o, prompts)
  local passes, processed = native.new "int64_t[1]", native.new "int64_t[1]"
  C.cq_generator_work(g.c, passes, processed)
  return out, { tokens = tokens, prompt_tokens = prompt_tokens, passes = tonumber(passes[0]), seconds = native.clock() - begun }
end

return generate
