-- Write on: a prompt in, the model's text out. BF16 or NVFP4 checkpoints, greedy or drawn, one answer or several.
--   ckaqad recipes/generate.lua --model=DIR --prompt="Tom has 3 apples and buys 4 more."
--   ckaqad recipes/generate.lua --model=DIR --chat --prompt="What is 3 + 4?" --temperature=0.7 --samples=4
--   ckaqad recipes/generate.lua --model=DIR --prompts=FILE.jsonl --json --quiet > answers.jsonl
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",     -- checkpoint, BF16 or NVFP4: folder, run folder, org/name, or auto (the embedded one)
  prompt = "",        -- the text to go on from
  prompts = "",       -- or a JSONL file of many: {"prompt": TEXT} or {"messages": [...]} (these by the chat template)
  chat = false,       -- the prompt is what a user says: put it into the model's chat template
  tokens = 256,       -- most tokens to write
  temperature = 0,    -- 0: always the likeliest token
  top_p = 1,          -- draw from the likeliest tokens that hold this probability together
  samples = 1,        -- answers to each prompt
  stop = "",          -- tokens that end an answer, comma separated (none: the model's own end tokens)
  seed = 1,           -- of the draws
  pass = 512,         -- tokens of one forward: pieces of prompts, and a token of every answer being written
  slots = 0,          -- answers written at once (0: up to 64)
  json = false,       -- one JSON object a line instead of text: prompt, sample, text, ids, logprobs, stopped
  quiet = false,      -- print only what the model writes
}

local run = cq.run(opt, { quiet = opt.quiet and not opt.dry_run })
local model = cq.model.open(opt.model)
if (opt.prompt == "") == (opt.prompts == "") then error("generate: wanted --prompt=TEXT or --prompts=FILE.jsonl", 0) end

local prompts, longest = {}, 0
for i, line in ipairs(opt.prompts ~= "" and cq.json.lines(opt.prompts) or { { prompt = opt.prompt } }) do
  local said = line.messages or opt.chat and { { role = "user", content = line.prompt } }
  cq.refuse(not (line.prompt or said) and ("%s: object %d has no prompt and no messages"):format(opt.prompts, i) or nil)
  prompts[i] = model:encode(said and model:chat(said, { template = opt.template }) or line.prompt)
  longest = math.max(longest, #prompts[i])
end
local stop = {}
for name in opt.stop:gmatch "[^,]+" do stop[#stop + 1] = tonumber(name) or name end
local slots = opt.slots > 0 and opt.slots or math.min(#prompts * opt.samples, 64, math.max(1, opt.pass / 2))
run:plan { student = model, tokens = opt.pass, generate = { slots = slots, room = longest + opt.tokens } }
local out, work = model:generate { prompts = prompts, max_tokens = opt.tokens, temperature = opt.temperature, top_p = opt.top_p,
  samples = opt.samples, seed = opt.seed, stop = #stop > 0 and stop or nil }

for _, one in ipairs(out) do
  if opt.json then
    print(cq.json.encode(cq.json.object { "prompt", one.prompt, "sample", one.sample, "text", one.text, "ids", cq.json.array(one.ids),
      "logprobs", cq.json.array(one.logprobs), "stopped", one.stopped }))
  else
    if #out > 1 and not opt.quiet then print(("--- prompt %d, answer %d"):format(one.prompt, one.sample)) end
    print(one.text or table.concat(one.ids, " "))
  end
end
run:say("%d tokens after %d of prompts in %.2f s: %.0f tokens/s", work.tokens, work.prompt_tokens, work.seconds, work.tokens / work.seconds)
