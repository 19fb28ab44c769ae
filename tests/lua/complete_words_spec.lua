require "tests.lua.helper"
local complete = require "ckaqad.complete_words"
local options = require "ckaqad.options"

local recipe = "recipes/nemotron_nano.lua"
local folders = {
  ["."] = { "recipes/", "mine.lua", "notes.txt", "docs.jsonl", "model/", ".git/", "with space.lua" },
  ["recipes/"] = { "ablate_balance.lua", "nemotron_nano.lua", "lab/", "README.md" },
  ["model/"] = { "part/", "config.json" },
  runs = { "try/", "other/", "note.txt" },
}

local function words(...) return complete.candidates { ... } end

local function has(list, word)
  for _, w in ipairs(list) do
    if w == word then return true end
  end
  return false
end

local function source(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read "*a"
  f:close()
  return text
end

describe("completion", function()
  local kept = complete.list
  before_each(function() complete.list = function(folder) return folders[folder] end end)
  after_each(function() complete.list = kept end)

  it("offers commands, recipes by path and by name, and folders", function()
    assert.same({ "--help", "--version", "-e", "mine.lua", "model/", "recipes/", "recipes/ablate_balance.lua",
      "recipes/nemotron_nano.lua", "runs", "verify" }, words "")
    assert.same({ "recipes/nemotron_nano.lua" }, words "nemo")
    assert.same({ "recipes/ablate_balance.lua" }, words "recipes/a")
    assert.same({}, words "nothing")
  end)

  it("offers a recipe's options: flags whole, the others with their sign", function()
    local list = words(recipe, "")
    assert.is_true(has(list, "--lr="))
    assert.is_true(has(list, "--threads="))
    assert.is_true(has(list, "--fresh"))
    assert.is_true(has(list, "--no-tensorboard"))
    assert.is_false(has(list, "--no-fresh"))
    assert.same({ "--scales=", "--schedule=" }, words(recipe, "--sc"))
    assert.same({}, words("no_such.lua", "--"))
  end)

  it("offers values: words, selectors, flags, files, rules of the recipe", function()
    assert.same({ "--scales=four_over_six", "--scales=max", "--scales=mse" }, words(recipe, "--scales="))
    assert.same({ "scales=mse" }, words(recipe, "scales=ms"))
    assert.same({ "max" }, words(recipe, "--scales", "ma"))
    assert.same({ "--cka=attention,last:" }, words(recipe, "--cka=attention,l"))
    assert.same({ "--fresh=false", "--fresh=true" }, words(recipe, "--fresh="))
    assert.same({ "--data=auto", "--data=docs.jsonl", "--data=model/", "--data=recipes/" }, words(recipe, "--data="))
    assert.same({ "--model=model/part/" }, words(recipe, "--model=model/"))
    assert.same({ "--balance=by_block" }, words("recipes/ablate_balance.lua", "--balance=by"))
    assert.same({}, words(recipe, "--lr="))
  end)

  it("offers what can be swept", function()
    assert.same({ "scales=", "schedule=" }, words(recipe, "--sweep", "sc"))
    assert.same({ "--sweep=scales=" }, words(recipe, "--sweep=sca"))
    assert.same({ "balance=ratio,gradnorm" }, words(recipe, "--sweep", "balance=ratio,g"))
  end)

  it("offers commands, options and folders of runs, and folders to verify", function()
    assert.same({ "compare", "list", "prune", "query", "report", "show", "table" }, words("runs", ""))
    assert.same({ "other", "try" }, words("runs", "show", ""))
    assert.same({ "--format=csv" }, words("runs", "table", "--format=c"))
    assert.same({ "--against=model/part/" }, words("verify", "model", "--against=model/"))
    assert.same({}, words("-e", "cq."))
  end)

  it("knows the values that the program accepts", function()
    local places = {}
    for _, file in ipairs { "cache", "data", "device", "loss", "model", "preset" } do
      for key, list in source(("lua/ckaqad/%s.lua"):format(file)):gmatch 'errors%.choose%("option %-%-(%w+)", [%w_.]+, (%b{})%)' do
        places[key] = true
        local accepted, offered = loadstring("return " .. list)(), complete.values[key]
        table.sort(accepted)
        local sorted = {}
        for i, value in ipairs(offered or {}) do sorted[i] = value end
        table.sort(sorted)
        assert.same(accepted, sorted, key)
      end
    end
    for _, key in ipairs { "mask", "kernels", "tail", "layer", "scales", "preset", "storage" } do assert.is_true(places[key], key) end
    assert.same(loadstring("return " .. source "lua/ckaqad/init.lua":match "presets = (%b{})")(), complete.values.quant)
    assert.equal('{ "list", "show", "compare", "table", "query", "report", "prune" }',
      source "lua/ckaqad/runs.lua":match "local commands = (%b{})")
  end)

  it("knows no value of an option that no recipe has", function()
    local known = {}
    for _, item in ipairs(options.common) do known[item[1]] = true end
    for _, name in ipairs { "nemotron_nano", "ptq", "compare", "teacher_cache", "eval", "lab/pretrain", "lab/study", "lab/arm" } do
      for _, key in ipairs(options.read_help(source(("recipes/%s.lua"):format(name))).order) do known[key] = true end
    end
    for key in pairs(complete.values) do assert.is_true(known[key], key) end
  end)
end)
