-- Time generation with kept keys, values and states against computing the whole text again for each token, in turn; medians.
--   ckaqad recipes/bench_generate.lua --model=DIR --sequences=64 --prompt=64 --tokens=128
-- The last line is one JSON object: tokens_per_s, tokens_per_s_again, tokens_per_s_alone (one sequence), ratio.
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",     -- checkpoint, BF16 or NVFP4: folder, org/name, or auto (the embedded one)
  quantize = "none",  -- none, or all: W4A4 in every projection, scales from the prompts
  data = "auto",      -- texts that the prompts are the beginnings of: JSONL files, or auto (the embedded text)
  sequences = 64,     -- sequences at once
  prompt = 64,        -- tokens of each prompt
  tokens = 128,       -- tokens to write
  rounds = 5,         -- measurements of each kind
  again = 8,          -- tokens that the slow way writes, spread over the length
}

local run = cq.run(opt)
local teacher = cq.model.open(opt.model)
local model = opt.quantize == "none" and teacher or teacher:quantize { preset = opt.quantize }
local data = cq.data.open(opt.data, { model = teacher, seq = opt.prompt, batch = 8, fraction = 0 })
run:plan { teacher = model ~= teacher and teacher or nil, student = model, tokens = math.max(1024, 2 * opt.sequences),
  generate = { slots = opt.sequences, room = opt.prompt + opt.tokens + 1 } }
if model ~= teacher then run:calibrate(model, data, 32) end

local prompts = {}
for _, batch in ipairs(data:all()) do -- documents that are at least as long as a prompt, again and again if they are few
  for d = 0, tonumber(batch.n_docs) - 1 do
    local from, n = tonumber(batch.starts[d]), tonumber(batch.starts[d + 1] - batch.starts[d])
    if n >= opt.prompt and #prompts < opt.sequences then
      prompts[#prompts + 1] = {}
      for i = 0, opt.prompt - 1 do table.insert(prompts[#prompts], batch.ids[from + i]) end
    end
  end
end
cq.refuse(#prompts == 0 and ("data: no document has %d tokens, wanted --prompt=N or longer ones"):format(opt.prompt) or nil)
local n = #prompts
for i = n + 1, opt.sequences do prompts[i] = prompts[i - n] end

local function timed(list, tokens)
  local out, work = model:generate { prompts = list, max_tokens = tokens, stop = {} }
  return work.tokens / work.seconds, out, work.seconds
end
local fast, alone, slow = {}, {}, {}
for round = 1, opt.rounds do
  local speed, out = timed(prompts, opt.tokens)
  fast[round] = speed
  alone[round] = timed({ prompts[round] }, opt.tokens)
  local seconds = 0
  for k = 1, opt.again do -- the text so far, at lengths spread evenly from the first token to the last
    local written, texts = math.floor((k - 0.5) / opt.again * opt.tokens), {}
    for i, one in ipairs(out) do
      texts[i] = { unpack(one.prompt_ids) }
      for j = 1, written do table.insert(texts[i], one.ids[j]) end
    end
    seconds = seconds + select(3, timed(texts, 1))
  end
  slow[round] = opt.again * opt.sequences / seconds
end
local function median(list)
  table.sort(list)
  return list[math.ceil(#list / 2)]
end
run:say("%d sequences of %d + %d tokens, median of %d rounds:", opt.sequences, opt.prompt, opt.tokens, opt.rounds)
run:say("  kept: %.0f tokens/s; computed again: %.0f; one sequence alone: %.0f", median(fast), median(slow), median(alone))
print(cq.json.encode(cq.json.object { "tokens_per_s", median(fast), "tokens_per_s_again", median(slow), "tokens_per_s_alone",
  median(alone), "ratio", median(fast) / median(slow) }))
