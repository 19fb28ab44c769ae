-- examples.lua - runs every example of the API's comments in this program; docs.sh calls it.
--
--   ckaqad examples.lua --lua=LUA_FOLDER [--only=NAME]
--
-- Runs in a scratch folder, so an example may write where it likes. Each one sees cq and the objects below, opened once from the
-- embedded model; `--> text` in an example is the next line it has to print. One that begins with `local cq = require "ckaqad"` is a whole
-- recipe: it becomes a file and runs as a process of its own.
local cq = require "ckaqad"

local opt = cq.options {
  lua = "lua",          -- folder of the API's sources
  only = "",            -- part of the name of the examples to run
  model = "auto",       -- the embedded model
  data = "auto",        -- the embedded documents
  holdout = "",         -- those it is compared on
  out = "examples",     -- the run folder of `run`
  seq = 128,            -- tokens per row
  batch = 2,            -- rows per step
  micro = 1,            -- rows per micro-batch
  seed = 1,             -- of everything
}

local function open_fixture()
  local run = cq.run(opt)
  local teacher = cq.model.open(opt.model)
  local student = teacher:quantize { preset = "all" }
  local data = cq.data.open(opt.data, { model = teacher, seq = opt.seq, batch = opt.batch, micro = opt.micro, seed = opt.seed,
    holdout = opt.holdout })
  local terms = { cq.loss.kl { top_k = 64 }, cq.loss.cka { tokens = 32 } }
  local adam = cq.optim.adamw(student)
  run:plan { teacher = teacher, student = student, adam = adam, terms = terms, data = data, eval = true }
  run:calibrate(student, data, 4)
  run:track { student = student, adam = adam, data = data }
  local batch = cq.batch(data, 1)
  local part = batch:split()()
  local pass = cq.distill(teacher, student, part, terms)
  pass:backward { kl = 1, cka = 1 }
  return { cq = cq, opt = opt, run = run, teacher = teacher, student = student, data = data, terms = terms, adam = adam, batch = batch,
    part = part, pass = pass, balance = cq.balance.ratio(), rate = cq.schedule.constant { peak = 1e-4 } }
end

-- Runs a whole recipe and returns what is wrong with it, or nil.
local function run_recipe(example)
  local f = assert(io.open("example.lua", "wb"))
  f:write(("\n"):rep(example.line - 1), example.code)
  f:close()
  local code = os.execute(("'%s' example.lua"):format(require "ckaqad.host".exe))
  return code ~= 0 and ("%s:%d: the recipe ends with %d"):format(example.file, example.line, code) or nil
end

-- Runs one example and returns what is wrong with it, or nil.
local function run_example(example, fixture)
  if example.code:match '^local cq = require "ckaqad"' then return run_recipe(example) end
  local printed, wanted = {}, {}
  for text in example.code:gmatch "%-%->%s?([^\n]*)" do wanted[#wanted + 1] = text end
  local environment = setmetatable({
    print = function(...)
      local parts = {}
      for i = 1, select("#", ...) do parts[i] = tostring((select(i, ...))) end
      for line in (table.concat(parts, "\t") .. "\n"):gmatch "(.-)\n" do printed[#printed + 1] = line end
    end,
  }, { __index = function(_, key)
    if fixture[key] ~= nil then return fixture[key] end
    return _G[key]
  end, __newindex = function(_, key) error("global " .. tostring(key) .. ": not declared", 2) end })
  -- the code keeps its lines in the source file, so that an error says where it is
  local chunk, why = loadstring(("\n"):rep(example.line - 1) .. example.code, "@" .. example.file)
  if not chunk then return why end
  local ok, e = pcall(setfenv(chunk, environment))
  if not ok then return tostring(e) end
  if #wanted == 0 then return nil end
  for i = 1, math.max(#wanted, #printed) do
    if wanted[i] ~= printed[i] then
      return ("%s:%d: line %d printed is %s, the example says %s"):format(example.file, example.line, i, tostring(printed[i]),
        tostring(wanted[i]))
    end
  end
end

package.path = opt.lua .. "/?.lua;" .. package.path
local examples = require "gen_api".examples(opt.lua .. "/ckaqad")
local fixture, failed, n = open_fixture(), 0, 0
rawset(_G, "arg", {})
for _, example in ipairs(examples) do
  if example.name:find(opt.only, 1, true) then
    local begun = cq.clock()
    local why = run_example(example, fixture)
    n = n + 1
    print(("%s %-44s %.2f s"):format(why and "FAILED" or "ok    ", example.name, cq.clock() - begun))
    if why then
      failed = failed + 1
      print("  " .. why)
    end
  end
end
print(("%d examples, %d failed"):format(n, failed))
if failed > 0 or n == 0 then os.exit(1) end
