-- complete_words.lua - what a shell can put in the place of the word that is being typed: `ckaqad complete -- WORD...`.
--
-- Candidates are whole words, one a line; one that ends in "/" or "=" goes on. A recipe is read, never run: its options come from
-- the comments of its option block. Nothing is ever an error here, a shell would print it into the line.
local options = require "ckaqad.options"

local complete = {}

local models, documents = { "auto" }, { "auto" }
-- Values of options; a test holds the lists against what the program accepts.
complete.values = {
  preset = { "auto", "full", "tiny", "paper" }, quant = { "nemotron_nano", "qwen3", "all", "experts", "mlp", "weights_only", "none" },
  scales = { "max", "mse", "four_over_six" }, schedule = { "constant", "cosine", "linear" }, mask = { "all", "assistant" },
  loss = { "kl", "ce" }, tail = { "bucket", "renormalized", "truncated", "full" }, layer = { "cka", "cosine", "mse", "gram", "none" },
  cka = { "all", "mamba", "attention", "moe", "mlp", "first:", "last:", "every:", "none" }, estimator = { "unbiased", "biased" },
  balance = { "ratio", "gradnorm", "fixed:", "none" }, kernels = { "cpu", "ref" }, storage = { "f16", "f32" },
  moments = { "f32", "bf16", "8bit" }, master = { "f32", "split", "bf16" }, copies = { "f32", "bf16", "packed" },
  offload = { "none", "teacher", "optimizer", "both" },
  suite = { "aime25", "gpqa", "lcb" }, mix = { "sft", "rl", "test", "easy" }, part = { "validation", "test" },
  arms = { "all", "main", "short" }, family = { "nemotron_h", "qwen3" },
  device = { "cpu", "cuda", "cuda:0", "auto" }, compute = { "f32", "bf16", "nvfp4" }, activations = { "f32", "bf16" },
  gram = { "micro", "ranks" }, moe = { "local", "ranks" }, template = { "auto", "nano3", "qwen3-thinking" },
  stream = { "auto", "yes", "no" },
}
-- Options that name files, the words that may stand for one, and the file names that fit.
local paths = {
  model = { models, "/$" }, teacher = { {}, "/$" }, student = { {}, "/$" }, out = { {}, "/$" }, data = { documents, "%.jsonl$" },
  holdout = { {}, "%.jsonl$" }, prompts = { {}, "%.jsonl$" }, file = { {}, "" },
  cache = { {}, "/$" }, teacher_cache = { {}, "/$" }, options = { {}, "" },
}
local runs = {
  commands = { "list", "show", "compare", "table", "query", "report", "prune" },
  options = { "--root=", "--json", "--status=", "--last=", "--by=", "--against=", "--format=", "--yes", "--stopped", "--help" },
  values = { format = { "text", "markdown", "csv", "latex", "html" }, status = { "running", "finished", "stopped" } },
}
local commands = { "runs", "verify", "-e", "--help", "--version" }

local function is_folder(path)
  local f = io.open(path .. "/.", "rb")
  if f then f:close() end
  return f ~= nil
end

-- Names in a folder, those of folders with "/" behind them; nil when there is none.
local function list_folder(folder)
  local native = require "ckaqad.ffi"
  local ok, names = pcall(native.take_text, function(out) return native.C.cq_folder_list(out, folder) end)
  if not ok then return nil end
  local list = {}
  for name in names:gmatch "[^\n]+" do list[#list + 1] = is_folder(folder .. "/" .. name) and name .. "/" or name end
  return list
end

local function read(path)
  local f = io.open(path, "rb")
  local text = f and f:read "*a"
  if f then f:close() end
  return text
end

-- Adds prefix .. word for the words that begin with `start`.
local function add(out, words, start, prefix)
  for _, word in ipairs(words) do
    if word:sub(1, #start) == start then out[#out + 1] = (prefix or "") .. word end
  end
end

-- Adds the files of the folder that `typed` names whose names match, and all folders.
local function add_files(out, typed, pattern, prefix)
  local folder, start = typed:match "^(.*/)([^/]*)$"
  folder, start = folder or "", start or typed
  for _, name in ipairs(complete.list(folder == "" and "." or folder) or {}) do
    local hidden = name:sub(1, 1) == "." and start == ""
    if name:sub(1, #start) == start and not hidden and not name:find "%s" and (name:match "/$" or name:match(pattern)) then
      out[#out + 1] = (prefix or "") .. folder .. name
    end
  end
end

-- The first word: a command, a recipe by its path, or by its name when it lies in recipes/.
local function first_word(out, typed)
  add(out, commands, typed)
  add_files(out, typed, "%.lua$")
  if typed:find "/" then return end
  local ok, host = pcall(require, "ckaqad.host")
  local bin = ok and host.exe and host.exe:match "^(.*)/[^/]*$"
  for _, folder in ipairs { "recipes/", bin and bin .. "/../share/ckaqad/recipes/" } do
    local names = complete.list(folder)
    for _, name in ipairs(names or {}) do
      if name:match "%.lua$" and name:sub(1, #typed) == typed then out[#out + 1] = folder .. name end
    end
    if names then return end
  end
end

-- Options of a recipe: names in order, which of them are flags, and the recipe's text.
local function options_of(recipe)
  local source = read(recipe)
  if not source then return nil end
  local names, flags, seen = {}, {}, {}
  for _, name in ipairs(options.read_help(source).order) do
    if not seen[name] then names[#names + 1], seen[name] = name, true end
    flags[name] = source:match("\n%s*" .. name .. "%s*=%s*(%a+)%s*,")
    if flags[name] ~= "true" and flags[name] ~= "false" then flags[name] = nil end
  end
  for _, item in ipairs(options.common) do
    if not seen[item[1]] then names[#names + 1] = item[1] end
    if not seen[item[1]] and type(item[2]) == "boolean" then flags[item[1]] = tostring(item[2]) end
  end
  return names, flags, source
end

-- Values of one option; `prefix` stands before each candidate.
local function add_values(out, key, typed, prefix, flags, source)
  if key == "balance" then
    for name in source:gmatch 'balance%.define%(%s*["\']([^"\']+)' do add(out, { name }, typed, prefix) end
  end
  if flags[key] then return add(out, { "true", "false" }, typed, prefix) end
  if paths[key] then
    add(out, paths[key][1], typed, prefix)
    return add_files(out, typed, paths[key][2], prefix)
  end
  -- a selector is a list: what stands before the last comma is kept
  local head, last = "", typed
  if key == "cka" then head, last = typed:match "^(.-)([^,]*)$" end
  add(out, complete.values[key] or {}, last, prefix .. head)
end

-- A word behind a recipe; `before` is the one in front of it.
local function recipe_word(out, recipe, typed, before)
  local names, flags, source = options_of(recipe)
  if not names then return end
  local axis, tried = typed:match "^%-%-sweep=([%a_][%w_]*)=(.*)$"
  if not axis and before == "--sweep" then axis, tried = typed:match "^([%a_][%w_]*)=(.*)$" end
  if axis then
    local head, last = tried:match "^(.-)([^,]*)$"
    return add_values(out, axis, last, typed:sub(1, #typed - #tried) .. head, flags, source)
  end
  local unfinished = before == "--sweep" and typed or typed:match "^%-%-sweep=([^=]*)$"
  if unfinished then
    local prefix = typed:sub(1, #typed - #unfinished)
    for _, name in ipairs(names) do add(out, { name .. "=" }, unfinished, prefix) end
    return
  end
  local dashes, key, value = typed:match "^(%-?%-?)([%a_][%w_%-]*)=(.*)$"
  if key then return add_values(out, key:gsub("-", "_"), value, dashes .. key .. "=", flags, source) end
  local named = before:match "^%-%-([%a_][%w_%-]*)$"
  if named and not flags[named] and (complete.values[named] or paths[named]) then
    return add_values(out, named, typed, "", flags, source)
  end
  for _, name in ipairs(names) do
    add(out, { flags[name] and "--" .. name or "--" .. name .. "=" }, typed)
    if flags[name] == "true" then add(out, { "--no-" .. name }, typed) end
  end
  add(out, { "--options=", "--sweep=", "--help" }, typed)
end

local function runs_word(out, words, typed)
  local key, value = typed:match "^%-%-(%w+)=(.*)$"
  if key == "root" then return add_files(out, value, "/$", "--root=") end
  if key then return add(out, runs.values[key] or {}, value, "--" .. key .. "=") end
  if typed:sub(1, 1) == "-" then return add(out, runs.options, typed) end
  if #words == 2 then return add(out, runs.commands, typed) end
  local root = "runs"
  for _, word in ipairs(words) do root = word:match "^%-%-root=(.+)$" or root end
  for _, name in ipairs(complete.list(root) or {}) do
    if name:match "/$" then add(out, { (name:gsub("/$", "")) }, typed) end
  end
end

-- Names in a folder; a test puts its own here.
complete.list = list_folder

-- Candidates for the last of the words that follow the program's name, sorted.
function complete.candidates(words)
  local out, typed, first = {}, words[#words] or "", words[1] or ""
  if #words <= 1 then
    first_word(out, typed)
  elseif first == "runs" then
    runs_word(out, words, typed)
  elseif first == "verify" then
    local value = typed:match "^%-%-against=(.*)$"
    add_files(out, value or typed, "/$", value and "--against=")
    add(out, { "--against=", "--help" }, typed)
  elseif first:match "%.lua$" then
    recipe_word(out, first, typed, words[#words - 1])
  end
  table.sort(out)
  local seen, list = {}, {}
  for _, word in ipairs(out) do
    if not seen[word] then list[#list + 1], seen[word] = word, true end
  end
  return list
end

-- `ckaqad complete -- WORD...`: prints the candidates for the last word.
function complete.command(arguments)
  if arguments[1] == "--" then table.remove(arguments, 1) end
  local ok, list = pcall(complete.candidates, arguments)
  for _, word in ipairs(ok and list or {}) do print(word) end
end

return complete
