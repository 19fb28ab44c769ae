-- command.lua - the command line of the program: a recipe, verify, a prompt, -e.
local errors = require "ckaqad.errors"

local command = {}

local usage = [[
ckaqad: wins back what NVFP4 costs a language model, by distilling it into its own 4-bit copy (KL on logits + CKA of hidden states)

  ckaqad RECIPE.lua [--option=value ...]    run a recipe; RECIPE.lua --help lists its options
  mpirun -n N ckaqad RECIPE.lua ...         the same on N ranks that share each step's micro-batches
  ckaqad verify DIR [--against=DIR]         check an exported NVFP4 folder, and its tokenizer against the teacher's
  ckaqad runs [COMMAND]                     list, show, compare, table, query, report or prune run folders; runs --help
  ckaqad                                    prompt with the same API as `cq`
  ckaqad -e CODE                            run Lua code
  ckaqad --help, --version

Recipes: recipes/nemotron_nano.lua, qwen3.lua (distil), teacher_cache.lua (the teacher once, for many of these),
  ptq.lua (calibrate and export), compare.lua, generate.lua (text), eval.lua (benchmarks), bench.lua, bench_generate.lua,
  ablate_cka_layers.lua, ablate_balance.lua, ablate_loss.lua, sweep_lr.lua (many runs and one table)
Exit: 0 success, 1 failure, 2 usage or recipe, 3 invalid data or model, 4 memory, 5 not finite, 6 mismatch, 7 a rank is gone,
  75 --max_time is up, 129 hangup (a closed ssh session), 130 Ctrl-C, 143 SIGTERM
Environment: HF_HOME, HF_HUB_CACHE, NO_COLOR, CKAQAD_TRACEBACK=1 (where an error came from), CKAQAD_LUA=DIR (other modules),
  CKAQAD_PROFILE=1 (time the driver takes beside the C library)]]

-- "recipes/x.lua:12: " of the line that is running, two calls up.
local function here()
  local info = debug.getinfo(3, "Sl")
  return info and info.currentline > 0 and ("%s:%d: "):format(info.short_src, info.currentline) or ""
end

-- Reading or making a global by accident is an error in a recipe.
local function strict_globals()
  setmetatable(_G, {
    __newindex = function(_, key) errors.usage("%sglobal %s: not declared, wanted local", here(), tostring(key)) end,
    __index = function(_, key)
      local names = { "cq" }
      for name in next, _G do names[#names + 1] = tostring(name) end
      errors.usage("%sglobal %s: does not exist, nearest is %s", here(), tostring(key), errors.nearest(tostring(key), names))
    end,
  })
end

local function run_recipe(path, rest)
  local chunk, why = loadfile(path, "t")
  if not chunk then
    errors.usage("%s", why:find("^cannot open") and ("recipe %s: no such file (commands: verify, runs, -e, --help)"):format(path) or why)
  end
  rest[0] = path
  rawset(_G, "arg", rest)
  strict_globals()
  jit.off(chunk, true)
  chunk()
end

local function run_code(code, rest)
  if not code then errors.usage("-e: the code is missing") end
  local chunk, why = loadstring(code, "=-e")
  if not chunk then errors.usage("%s", why) end
  rawset(_G, "cq", require "ckaqad")
  rawset(_G, "arg", rest)
  jit.off(chunk, true)
  chunk()
end

local function run_verify(rest)
  local dir, against
  for _, a in ipairs(rest) do
    local value = a:match("^%-%-against=(.+)$")
    if value then
      against = value
    elseif a == "--help" or a == "-h" then
      print("ckaqad verify DIR [--against=DIR]: checks an exported NVFP4 folder; --against: the teacher's folder")
      return
    elseif a:match("^%-") then
      errors.usage("option %s is unknown, nearest is --against", a)
    elseif dir then
      errors.usage("verify: two folders, wanted one: ckaqad verify DIR [--against=DIR]")
    else
      dir = a
    end
  end
  if not dir then errors.usage("verify: the folder is missing: ckaqad verify DIR [--against=DIR]") end
  if not require "ckaqad.verify".verify(dir, against) then errors.exit(6) end
end

-- Called after an error: a run that has nothing to show takes its folder away.
function command.failed()
  local run = package.loaded["ckaqad.run"]
  if run then run.abandon() end
end

-- Runs the command line `arguments`; throws what went wrong.
function command.main(arguments)
  local host = require "ckaqad.host"
  local first = arguments[1]
  if not first then return require("ckaqad.prompt").run(host) end
  local rest = {}
  for i = 2, #arguments do rest[#rest + 1] = arguments[i] end
  if first == "--help" or first == "-h" then return print(usage) end
  if first == "--version" or first == "-V" then return print("ckaqad " .. host.version) end
  if first == "verify" then return run_verify(rest) end
  if first == "runs" then return require("ckaqad.runs").command(rest) end
  if first == "complete" then return require("ckaqad.complete_words").command(rest) end -- the shell's completion calls it
  if first == "-e" then return run_code(table.remove(rest, 1), rest) end
  if first:match("^%-") then
    errors.usage("option %s is unknown, nearest is %s", first, errors.nearest(first, { "--help", "--version", "-e" }))
  end
  run_recipe(first, rest)
end

return command
