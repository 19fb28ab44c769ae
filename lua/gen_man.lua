-- gen_man.lua - writes the man page from the program's own sources.
--
--   luajit lua/gen_man.lua > core/packaging/ckaqad.1        run in the project's root; a test checks that the file is fresh
--
-- Commands, exit codes and variables come from the usage in lua/ckaqad/command.lua and runs.lua, options from options.lua, recipes from
-- their first comments. What stands in prose below is only what no source says; a variable of the usage without its words is an error.
local man = {}

local variables = {
  HF_HOME = "folder of the Hugging Face cache, where \fIorg/name\fR models are looked up (its \fIhub\fR folder)",
  HF_HUB_CACHE = "the folder of models itself; wins over HF_HOME",
  NO_COLOR = "set, output has no colour on a terminal",
  CKAQAD_TRACEBACK = "set to 1, errors say where in the Lua code they came from",
  CKAQAD_LUA = "a folder whose \fIckaqad/\fR modules are used in place of those inside the program",
  CKAQAD_CUDA_SYNC = "set to 1, every operation on a GPU is waited for, so that an error names the operation it is of",
  CKAQAD_CUDA_TUNE = "set to 1, algorithms of matrix products on a GPU are timed, and the best kept in ~/.cache/ckaqad",
  CKAQAD_PROFILE = "set to 1, a run says how much time the driver took beside the C library; set to ops, how much each operation took",
}

local files = {
  { "OUT/run.json", "options, seeds, versions and hashes: what is needed to do the run again" },
  { "OUT/metrics.jsonl, OUT/evals.jsonl", "one object a step, one object an evaluation on held-out documents" },
  { "OUT/summary.json, OUT/log.txt, OUT/report.html", "results, what was printed, and one page that needs no network" },
  { "OUT/checkpoints/, OUT/tensorboard/", "what a stopped run goes on from; event files" },
  { "OUT/nvfp4/", "the exported folder that vLLM, TensorRT-LLM and SGLang load" },
  { "OUT/points/, OUT/table.md, .csv, .tex", "of a sweep: a run folder for every point, and their comparison" },
  { "runs/.index.sqlite", "cache of \fBckaqad runs\fR; may be deleted" },
}

local function read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read "*a"
  f:close()
  return text
end

-- Text as roff shows it, character by character; "\f" of the prose above stays a font change.
local function escape(s)
  s = s:gsub("\\", "\\e"):gsub("\f", "\\f"):gsub("%-", "\\-"):gsub("±", "\\(+-"):gsub("[\128-\255]+", "?")
  return (s:gsub("^([.'])", "\\&%1"):gsub("`", "\\(ga"))
end

local function bold(s) return "\\fB" .. escape(s) .. "\\fR" end

-- A called form: words in capitals are places for something, all others are typed as they stand.
local function form(s)
  return (escape(s):gsub("[^%s%[%]|]+", function(word)
    if word:match "^[A-Z]+%.lua$" or word:match "^[A-Z]+$" or word == "..." or word:match "^[A-Z]+%.%.%.$" then
      return "\\fI" .. word .. "\\fR"
    end
    local option, place = word:match "^(.+=)([A-Z]+)$"
    return option and ("\\fB%s\\fI%s\\fR"):format(option, place) or "\\fB" .. word .. "\\fR"
  end))
end

local function entry(out, head, text)
  out[#out + 1] = ".TP\n" .. head
  out[#out + 1] = escape(text)
end

-- { "called form", "what it does" } of the lines of a usage that begin with "  name"; further lines go on with the text.
local function forms(usage, name)
  local list = {}
  for line in (usage .. "\n"):gmatch "(.-)\n" do
    local called, text = line:match("^  (" .. name .. ".-)%s%s+(%S.*)$")
    called = called or line:match("^  (" .. name .. ".*)$")
    if called then
      list[#list + 1] = { called, text or "" }
    elseif line:match "^%s%s%s%s%s%s" and #list > 0 then
      list[#list][2] = list[#list][2] .. "; " .. line:match "^%s*(.-)%s*$":gsub("%s%s+", " ")
    end
  end
  return list
end

-- A paragraph of the usage that begins with a word and a colon, on one line.
local function paragraph(usage, word)
  local text = usage:match("\n" .. word .. ": (.-)\n%f[%w]") or usage:match("\n" .. word .. ": (.*)$")
  return (assert(text, "usage: no " .. word):gsub("%s*\n%s*", " "))
end

-- A recipe's first comment up to its first indented line, which shows how it is called.
local function about(path)
  local words = {}
  for line in read(path):gmatch "[^\n]+" do
    local text = line:match "^%-%- (%S.*)$"
    if not text then break end
    words[#words + 1] = text
  end
  return table.concat(words, " ")
end

local function recipes(folder)
  local pipe = assert(io.popen("LC_ALL=C ls " .. folder))
  local list = {}
  for name in pipe:lines() do
    if name:match "%.lua$" then list[#list + 1] = { folder .. "/" .. name, about(folder .. "/" .. name) } end
  end
  pipe:close()
  return list
end

local function default(value)
  if value == "" then return "none" end
  return type(value) == "number" and ("%g"):format(value) or tostring(value)
end

local function commands(out, usage, runs)
  out[#out + 1] = ".SH COMMANDS"
  for _, f in ipairs(forms(usage, "ckaqad")) do
    if f[2] ~= "" then entry(out, form(f[1]), f[2]) end
  end
  out[#out + 1] = ".SH RUNS"
  for _, f in ipairs(forms(runs, "ckaqad runs")) do entry(out, form(f[1]), f[2]) end
  out[#out + 1] = ".PP\n" .. escape("\fIRUN\fR is a name of the list, a path, or the unique end of a name. \fB--root=\fIDIR\fR says where "
    .. "the run folders are (runs), \fB--json\fR prints one object a line.")
end

local function option_list(out)
  local options = require "ckaqad.options"
  out[#out + 1] = ".SH OPTIONS OF EVERY RECIPE"
  out[#out + 1] = escape("\fB--key=value\fR, \fBkey=value\fR, \fB--flag\fR or \fB--no-flag\fR; numbers take units: 4GiB, 2k, 10m (600 s). "
    .. "A recipe's own options are in its \fB--help\fR. Defaults are in brackets.")
  for _, item in ipairs(options.common) do
    entry(out, bold("--" .. item[1]) .. (type(item[2]) == "boolean" and "" or "=\\fIVALUE\\fR"),
      ("%s [%s]"):format(item[3], default(item[2])))
  end
  for _, item in ipairs(options.special) do entry(out, bold("--" .. item[1]) .. " \\fI" .. escape(item[2]) .. "\\fR", item[3]) end
end

local function environment(out, usage)
  out[#out + 1] = ".SH ENVIRONMENT"
  for name in paragraph(usage, "Environment"):gsub("%b()", ""):gmatch "([%u_]+)[=%w]*" do
    if name:find "_" then entry(out, bold(name), assert(variables[name], "gen_man.lua: no words for " .. name)) end
  end
end

-- The page as roff text; the current folder is the project's root.
function man.text()
  local version = read "CMakeLists.txt":match "VERSION (%d+%.%d+%.%d+)"
  local usage = read "lua/ckaqad/command.lua":match "local usage = %[%[\n?(.-)%]%]"
  local runs = read "lua/ckaqad/runs.lua":match "local usage = %[%[\n?(.-)%]%]"
  local out = {
    ".\\\" Made by lua/gen_man.lua; do not edit.",
    (".TH CKAQAD 1 \"\" \"ckaqad %s\" \"User Commands\""):format(version),
    ".SH NAME", escape "ckaqad" .. " \\- win back what 4\\-bit (NVFP4) quantization costs a language model", ".SH SYNOPSIS",
  }
  for i, f in ipairs(forms(usage, "ckaqad")) do
    if i > 1 then out[#out + 1] = ".br" end
    out[#out + 1] = form(f[1])
  end
  out[#out + 1] = ".SH DESCRIPTION\n" .. escape("Runs a Lua recipe: it loads a BF16 checkpoint, quantizes it to NVFP4, distils the "
    .. "original into the quantized copy by KL on the logits and a layerwise CKA term, reports, and exports a folder that vLLM, "
    .. "TensorRT-LLM and SGLang load. Recipes that end in a sweep start many runs and compare them in one table. The same command again "
    .. "goes on with what was stopped. Without arguments a prompt opens with the same API.")
  commands(out, usage, runs)
  option_list(out)
  out[#out + 1] = ".SH RECIPES"
  for _, r in ipairs(recipes "recipes") do entry(out, "\\fI" .. escape(r[1]) .. "\\fR", r[2]) end
  out[#out + 1] = ".SH EXIT STATUS"
  for code, text in (paragraph(usage, "Exit") .. ", "):gmatch "(%d+) (.-),%s+" do entry(out, bold(code), text) end
  environment(out, usage)
  out[#out + 1] = ".SH FILES\n" .. escape "\fIOUT\fR is the folder of \fB--out\fR."
  for _, f in ipairs(files) do entry(out, "\\fI" .. escape(f[1]) .. "\\fR", f[2]) end
  out[#out + 1] = ".SH SECURITY\n" .. escape "Model folders and data files are untrusted and checked. Recipes are programs: run only those "
    .. "you trust."
  out[#out + 1] = ".SH EXAMPLE\n.nf\n" .. escape "ckaqad recipes/nemotron_nano.lua --model=DIR --data=train.jsonl --steps=60 --out=runs/try"
  out[#out + 1] = escape "ckaqad recipes/nemotron_nano.lua --steps=40 --sweep lr=1e-5,3e-5,1e-4 --sweep seed=1..3" .. "\n.fi"
  return table.concat(out, "\n") .. "\n"
end

if arg and arg[0] and arg[0]:match "gen_man%.lua$" then
  package.path = "lua/?.lua;" .. package.path
  io.write(man.text())
end
return man
