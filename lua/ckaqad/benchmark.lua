-- benchmark.lua - AIME 2025, GPQA and LiveCodeBench from the user's own files: what is asked, and whether an answer is right.
--
-- Nothing of a benchmark is here. AIME is scored by the integer in the last \boxed{}, GPQA by the letter after the last "Answer:" (or
-- in a \boxed{}) with options shuffled item by item; LiveCodeBench's code is written down for the official scorer and not run.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local ranks = require "ckaqad.ranks"
local stats = require "ckaqad.stats"

local benchmark = {}

-- What the last \boxed{...} of a text holds, braces inside it too; nil when there is none.
local function boxed(text)
  local found
  for inside in text:gmatch "\\boxed%s*(%b{})" do found = inside:sub(2, -2) end
  return found
end

-- The integer that a text is, "$ 042 $" or "1,000" too; nil when it is none.
local function integer(text)
  local digits = text and text:gsub("[%s$,]", ""):gsub("\\[!,; ]?", ""):match "^-?%d+$"
  return digits and tonumber(digits)
end

local function aime(path)
  local items = {}
  for i, row in ipairs(json.lines(path, { "problem", "answer" })) do
    local right = integer(tostring(row.answer))
    if not right then
      errors.raise(errors.DATA, "%s: object %d has the answer %q, wanted an integer", path, i, tostring(row.answer))
    end
    items[i] = { id = tostring(row.id or i),
      question = row.problem .. "\n\nReason step by step, and put the final answer, an integer, within \\boxed{}.",
      check = function(text) return integer(boxed(text)) == right end }
  end
  return items
end

-- The rows of a CSV text (RFC 4180): fields may be quoted and hold commas, doubled quotes and line ends.
local function rows_of_csv(text, path)
  local rows, row, at = {}, {}, 1
  text = text:gsub("\r\n", "\n"):gsub("^\239\187\191", "")
  while at <= #text do
    local field, stop
    if text:sub(at, at) == '"' then
      local from = at + 1
      repeat
        stop = text:find('"', from, true)
        if not stop then errors.raise(errors.DATA, "%s: a quoted field of row %d does not end", path, #rows + 1) end
        from = stop + 2
      until text:sub(stop + 1, stop + 1) ~= '"'
      field, stop = text:sub(at + 1, stop - 1):gsub('""', '"'), stop + 1
    else
      stop = text:find("[,\n]", at) or #text + 1
      field = text:sub(at, stop - 1)
    end
    row[#row + 1] = field
    if text:sub(stop, stop) ~= "," then rows[#rows + 1], row = row, {} end
    at = stop + 1
  end
  return rows
end

local columns = { "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3" }

-- The letter that an answer settles on; nil when it does not.
local function letter(text)
  local found = (boxed(text) or ""):match "^[%s(]*([A-D])[%s).]*$"
  for one in text:gmatch "[Aa]nswer%s*:?[%s*$(]*([A-D])%f[%W]" do found = one end
  return found
end

local function gpqa(path, seed)
  local f, why = io.open(path, "rb")
  if not f then errors.raise(errors.IO, "%s", why) end
  local rows, place, items = rows_of_csv(f:read "*a" or "", path), {}, {}
  f:close()
  for i, name in ipairs(rows[1] or {}) do place[name] = i end
  for _, name in ipairs(columns) do
    if not place[name] then errors.raise(errors.DATA, "%s: no column %q, wanted %s", path, name, table.concat(columns, ", ")) end
  end
  for i = 2, #rows do
    local options, draw = {}, stats.generator(seed * 1000003 + i)
    for k = 2, 5 do
      local text = rows[i][place[columns[k]]]
      if not text then errors.raise(errors.DATA, "%s: row %d has %d fields, wanted %d", path, i, #rows[i], #rows[1]) end
      options[k - 1] = { text = text:match "^%s*(.-)%s*$", right = k == 2 }
    end
    for k = 4, 2, -1 do
      local other = 1 + math.floor(draw() * k)
      options[k], options[other] = options[other], options[k]
    end
    local lines, right = { rows[i][place.Question], "" }, nil
    for k, option in ipairs(options) do
      local name = ("ABCD"):sub(k, k)
      lines[#lines + 1] = ("%s) %s"):format(name, option.text)
      if option.right then right = name end
    end
    lines[#lines + 1] = "\nReason step by step, and end with a line \"Answer: LETTER\", where LETTER is A, B, C or D."
    items[i - 1] = { id = tostring(i - 1), question = table.concat(lines, "\n"), right = right,
      check = function(text) return letter(text) == right end }
  end
  if #items == 0 then errors.raise(errors.DATA, "%s: no questions, wanted rows below the names of columns", path) end
  return items
end

-- The last fenced block of a text, or all of it.
local function code_of(text)
  local found
  for block in text:gmatch "```[^\n]*\n(.-)```" do found = block end
  return found or text
end

local function lcb(path)
  local items = {}
  for i, row in ipairs(json.lines(path, { "question_id", "question_content" })) do
    local starter = type(row.starter_code) == "string" and row.starter_code ~= "" and row.starter_code
    items[i] = { id = tostring(row.question_id), code = code_of, question = row.question_content .. (starter and
      ("\n\nComplete this Python code:\n```python\n%s\n```\nGive all of the code in one ```python block."):format(starter) or
      "\n\nWrite a Python program that reads standard input and writes standard output. Give it in one ```python block.") }
  end
  return items
end

local suites = { aime25 = aime, gpqa = gpqa, lcb = lcb }

--- The questions of a benchmark in a list, each { id, question, check }: `check(text)` says whether an answer is right. Suites: `aime25`
--- (JSONL with problem, answer), `gpqa` (CSV with Question, Correct Answer, Incorrect Answer 1 to 3; options shuffled by `seed`, item by
--- item), `lcb` (JSONL with question_id, question_content; `code(text)` in the place of `check`: running code is the official scorer's).
---
--- Example:
---     local f = io.open("aime.jsonl", "wb")
---     f:write('{"problem": "What is 6 * 7?", "answer": 42}')
---     f:close()
---     local items = cq.benchmark.open("aime25", "aime.jsonl")
---     print(items[1].check "6 * 7 = \\boxed{042}", items[1].check "it is 42") --> true	false
function benchmark.open(suite, path, seed)
  local items, seen = suites[errors.choose("suite", suite, { "aime25", "gpqa", "lcb" })](path, seed or 1), {}
  for _, item in ipairs(items) do
    if seen[item.id] then errors.raise(errors.DATA, "%s: two questions have the id %s", path, item.id) end
    seen[item.id] = true
  end
  return items
end

--- Answers to the questions of `cq.benchmark.open`: from the model of `opt.model`, run here, or from that of a server when `opt.server`
--- is not empty. `run` and `opt`: a run and its options as `recipes/eval.lua` has them. Returns what `model:generate` does: the list of
--- { prompt, sample, text, stopped }, and { tokens, seconds }.
function benchmark.ask(run, opt, items)
  local questions, prompts, longest = {}, {}, 0
  for i, item in ipairs(items) do questions[i] = item.question end
  if opt.server ~= "" then
    ranks.refuse "eval --server"
    local answers, work = require("ckaqad.server").chat(opt.server, questions, { samples = opt.samples, max_tokens = opt.tokens,
      temperature = opt.temperature, top_p = opt.top_p, seed = opt.seed, parallel = opt.parallel,
      model = opt.served ~= "" and opt.served or nil })
    run:say("answers of %s at %s", work.model, opt.server)
    return answers, work
  end
  local model = require("ckaqad.model").open(opt.model)
  for i, question in ipairs(questions) do
    prompts[i] = model:encode(model:chat({ { role = "user", content = question } }, { template = opt.template }))
    longest = math.max(longest, #prompts[i])
  end
  local slots = math.min(#prompts * opt.samples, 64, math.max(1, math.floor(opt.pass / 2)))
  run:plan { student = model, tokens = opt.pass, generate = { slots = slots, room = longest + opt.tokens } }
  return model:generate { prompts = prompts, max_tokens = opt.tokens, temperature = opt.temperature, top_p = opt.top_p,
    samples = opt.samples, seed = opt.seed }
end

--- The share of right samples of each question, { [id] = share }, of a file of answers: JSONL with id and right.
---
--- Example:
---     local f = io.open("answers.jsonl", "wb")
---     f:write('{"id": "7", "right": true} {"id": "7", "right": false}')
---     f:close()
---     print(cq.benchmark.shares("answers.jsonl")["7"]) --> 0.5
function benchmark.shares(path)
  local right, of = {}, {}
  for _, answer in ipairs(json.lines(path, { "id", "right" })) do
    right[answer.id], of[answer.id] = (right[answer.id] or 0) + (answer.right and 1 or 0), (of[answer.id] or 0) + 1
  end
  for id, n in pairs(of) do right[id] = right[id] / n end
  return right
end

--- Compares shares with those of the BF16 model on the same questions: { difference, low, high } of `cq.stats.paired`, with `pass` (of the
--- BF16 model) and `recovery` in percent (nil where it solves nothing). An error where the questions are not the same.
---
--- Example:
---     print(cq.benchmark.recovery({ a = 0.5, b = 1 }, { a = 1, b = 1 }).recovery) --> 75
function benchmark.recovery(shares, bf16)
  local n, own, theirs = 0, 0, 0
  for id, share in pairs(shares) do
    if not bf16[id] then errors.raise(errors.DATA, "benchmark: the BF16 model has no answer to question %s", id) end
    n, own, theirs = n + 1, own + share, theirs + bf16[id]
  end
  for id in pairs(bf16) do
    if not shares[id] then errors.raise(errors.DATA, "benchmark: question %s was answered by the BF16 model only", id) end
  end
  local p = stats.paired(shares, bf16)
  p.pass, p.recovery = theirs / n, theirs > 0 and 100 * own / theirs or nil
  return p
end

--- Writes a file that appears whole or not at all. Without `text` nothing is written: an error when it could not be.
---
--- Example:
---     cq.benchmark.write "answers.jsonl"
---     cq.benchmark.write("answers.jsonl", "{}")
function benchmark.write(path, text)
  local native = require "ckaqad.ffi"
  if not ranks.first then return end
  if text then return native.call.cq_file_write(path, text, #text) end
  local f, why = io.open(path .. ".try", "wb")
  if not f then errors.raise(errors.IO, "%s", (why:gsub("%.try:", ":", 1))) end
  f:close()
  os.remove(path .. ".try")
end

return benchmark
