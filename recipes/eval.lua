-- Score a model on a benchmark whose file you have: pass@1 over k samples, its interval over questions, recovery of the BF16 model's.
--   ckaqad recipes/eval.lua --model=DIR --suite=aime25 --file=aime25.jsonl --samples=32 --answers=student.jsonl
--   ckaqad recipes/eval.lua --model=DIR --suite=gpqa --file=gpqa_diamond.csv --samples=8 --against=teacher.jsonl
--   ckaqad recipes/eval.lua --model=DIR --suite=lcb --file=test6.jsonl --samples=4 --answers=for_the_official_scorer.json
--   ckaqad recipes/eval.lua --server=http://127.0.0.1:8000 --suite=aime25 --file=aime25.jsonl --samples=32      (vLLM, SGLang, ...)
-- The last line is one JSON object: n, samples, pass, low, high, recovery.
local cq = require "ckaqad"

local opt = cq.options {
  model = "auto",      -- checkpoint, BF16 or NVFP4: folder, run folder, org/name, or auto (the embedded one)
  suite = "aime25",    -- aime25 (JSONL: problem, answer), gpqa (CSV), or lcb (JSONL: question_id, question_content)
  file = "",           -- the benchmark's own file
  samples = 1,         -- answers to each question
  temperature = 1,     -- 0: always the likeliest token
  top_p = 1,           -- draw from the likeliest tokens that hold this probability together
  tokens = 1024,       -- most tokens of an answer
  seed = 1,            -- of the draws and of the order of options
  pass = 512,          -- tokens of one forward
  server = "",         -- ask this OpenAI-compatible server (http://HOST:PORT, key in OPENAI_API_KEY) and run no model here
  served = "",         -- name of the model there; none: the first one it lists
  parallel = 16,       -- requests at a time
  answers = "",        -- write the answers here: JSONL (id, sample, right, text), or what the scorer of LiveCodeBench reads
  against = "",        -- --answers of the BF16 model on the same questions: recovery and the paired difference
}

local run = cq.run(opt)
if opt.file == "" then error("eval: no questions, wanted --file=FILE", 0) end
if opt.suite == "lcb" and opt.answers == "" then error("eval: code is scored elsewhere, wanted --answers=FILE", 0) end
if opt.answers ~= "" then cq.benchmark.write(opt.answers) end
local bf16 = opt.against ~= "" and cq.benchmark.shares(opt.against)
local items = cq.benchmark.open(opt.suite, opt.file, opt.seed)
local out, work = cq.benchmark.ask(run, opt, items)

local shares, lines, codes, cut = {}, {}, {}, 0
for _, one in ipairs(out) do
  local item = items[one.prompt]
  local right = item.check and one.stopped and item.check(one.text)
  cut = cut + (one.stopped and 0 or 1)
  shares[item.id] = (shares[item.id] or 0) + (right and 1 or 0) / opt.samples
  lines[#lines + 1] = cq.json.encode(cq.json.object { "id", item.id, "sample", one.sample, "right", right, "text", one.text })
  codes[one.prompt] = codes[one.prompt] or cq.json.object { "question_id", item.id, "code_list", cq.json.array {} }
  if item.code then table.insert(codes[one.prompt].code_list, item.code(one.text)) end
end
if opt.answers ~= "" then
  cq.benchmark.write(opt.answers, (opt.suite == "lcb" and cq.json.encode(cq.json.array(codes)) or table.concat(lines, "\n")) .. "\n")
end
run:say("%d questions, %d answers, %d cut off at %d tokens and so wrong; %.0f tokens/s", #items, #out, cut, opt.tokens,
  work.tokens / work.seconds)
if opt.suite == "lcb" then return run:say("code is scored by LiveCodeBench's own evaluator, from %s", opt.answers) end

local pass, recovery = cq.stats.interval(shares), nil
run:say("%s: pass@1 %.1f %% [%.1f, %.1f], k = %d samples, n = %d questions", opt.suite, 100 * pass.mean, 100 * (pass.low or 0),
  100 * (pass.high or 1), opt.samples, pass.n)
if bf16 then
  local p = cq.benchmark.recovery(shares, bf16)
  recovery = p.recovery
  run:say("BF16 %.1f %%: difference %+.1f [%+.1f, %+.1f] points, recovery %s", 100 * p.pass, 100 * p.difference, 100 * (p.low or -1),
    100 * (p.high or 1), recovery and ("%.1f %%"):format(recovery) or "unknown, it solves nothing")
end
print(cq.json.encode(cq.json.object { "n", pass.n, "samples", opt.samples, "pass", pass.mean, "low", pass.low, "high", pass.high,
  "recovery", recovery }))
