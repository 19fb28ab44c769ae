-- The index of runs over folders made here. Times are set by hand (lfs), so what is read again and what is not is known exactly.
require "tests.lua.helper"
local lfs = require "lfs"
local index = require "ckaqad.index"
local sqlite = require "ckaqad.sqlite"

local root, said, holders, looks
local old = os.time() - 1000

local files = {
  stat = function(path)
    looks = looks + 1
    local a = lfs.attributes(path)
    if a then return a.modification * 1e9, a.size end
  end,
  list = function(path)
    if lfs.attributes(path, "mode") ~= "directory" then return nil end
    local names = {}
    for name in lfs.dir(path) do
      if name ~= "." and name ~= ".." then names[#names + 1] = name end
    end
    table.sort(names)
    return names
  end,
  holder = function(path) return holders[path:sub(#root + 2)] or 0 end,
  lock = function() return function() end end,
  sleep = function() end, poll = function() end,
}

local function write(path, text)
  local f = assert(io.open(root .. "/" .. path, "wb"))
  f:write(text)
  f:close()
end

-- Sets the time of a folder and of what is in it.
local function settle(path, time)
  for _, name in ipairs(files.list(root .. "/" .. path) or {}) do lfs.touch(root .. "/" .. path .. "/" .. name, time or old) end
  lfs.touch(root .. "/" .. path, time or old)
end

local function run(name, given)
  local path = root
  for part in name:gmatch "[^/]+" do
    path = path .. "/" .. part
    lfs.mkdir(path)
  end
  given = given or {}
  write(name .. "/run.json", given.json or ('{"format": 1, "program": "ckaqad", "version": "0.1.0 (x)", "recipe": "recipes/x.lua", '
    .. '"started": "2026-01-31T12:00:%02dZ", "options": {"lr": %s, "steps": 4, "seed": 2}, "point": null}'):format(given.at or 0,
    given.lr or "1e-05"))
  write(name .. "/metrics.jsonl", given.metrics or '{"step":1,"kl":0.5}\n{"step":2,"kl":0.25}\n{"step":3,"kl":0.1')
  if given.evals then write(name .. "/evals.jsonl", given.evals) end
  if given.summary ~= false then
    write(name .. "/summary.json", given.summary or '{"before": {"kl": 0.02, "cka": 0.9, "perplexity_teacher": 2}, '
      .. '"after": {"kl": 0.01, "cka": null, "cka_min": 0.8, "cka_min_block": 3}, "export_bit_equal": true, "seconds": 1.5}')
  end
  settle(name)
end

local function open() return index.open(root, { files = files, say = function(line) said[#said + 1] = line end }) end

-- The records by name, of an index opened anew.
local function records(filter)
  local i = open()
  local by_name, list = {}, i:runs(filter)
  i:close()
  for _, r in ipairs(list) do by_name[r.name] = r end
  return by_name, list
end

describe("the index of runs", function()
  before_each(function()
    root, said, holders, looks = os.tmpname(), {}, {}, 0
    os.remove(root)
    lfs.mkdir(root)
  end)
  after_each(function() os.execute("rm -rf " .. root) end)

  it("holds what the folders say", function()
    run("a", { evals = '{"step":0,"kl":0.03,"perplexity":5,"perplexity_teacher":4}\n{"step":2,"kl":0.015}\n{"step":4,"kl"' })
    local r = records().a
    assert.equal("index " .. root .. "/.index.sqlite: made from 1 run folder", said[1])
    assert.same({ "finished", "recipes/x.lua", 2, 4, 2, 0.25 }, { r.status, r.recipe, r.step, r.steps, r.seed, r.kl_train })
    assert.same({ 0.02, 0.01, 0.9, 0.8, 3, 2, 5 }, { r.kl_before, r.kl_after, r.cka_before, r.cka_min_after, r.cka_min_block,
      r.perplexity_teacher, r.perplexity_before })
    assert.same({ 0.015, 2 }, { r.kl_eval, r.eval_step })
    assert.is_nil(r.cka_after)
    assert.is_nil(r.point)
    assert.equal(1e-5, r.options.lr)
    assert.same({ 0.5, 0.25 }, { r.curve[1], r.curve[2] })
    assert.equal(root .. "/a", r.path)
    assert.equal(1769860800, r.started_at) -- date -u -d 2026-01-31T12:00:00Z +%s
    assert.matches("a  finished  step 2/4  KL 0.0200 → 0.0100", tostring(r), 1, true)
  end)

  it("takes of a stopped run what its evaluations say, BF16's perplexity too", function()
    run("a", { evals = '{"step":0,"kl":0.03,"perplexity":5,"perplexity_teacher":4}\n', summary = false })
    local r = records().a
    assert.same({ "stopped", 0.03, 5, 4 }, { r.status, r.kl_before, r.perplexity_before, r.perplexity_teacher })
  end)

  it("tells a point that its sweep dropped from one that was stopped, whenever the sweep says so", function()
    run("s/points/ab", { summary = false })
    run("s/points/cd", { summary = false })
    run "s/points/ef"
    local function sweep(dropped)
      write("s/sweep.json", ('{"points": [{"hash": "ab", "name": "1", "dropped": %s}, {"hash": "cd", "name": "2"}]}'):format(dropped))
    end
    local function statuses()
      local by_name = records()
      return { by_name["s/points/ab"].status, by_name["s/points/cd"].status, by_name["s/points/ef"].status }
    end
    sweep "null"
    settle "s"
    assert.same({ "stopped", "stopped", "finished" }, statuses())
    sweep "10" -- the folders of the points stay as they are
    assert.same({ "dropped", "stopped", "finished" }, statuses())
    assert.equal(1, #select(2, records { status = "stopped" }))
    holders["s/points/ab/lock"] = 17 -- it goes on
    assert.same({ "running", "stopped", "finished" }, statuses())
    holders = {}
    sweep "null"
    assert.same({ "stopped", "stopped", "finished" }, statuses())
    sweep '"x"'
    assert.same({ "stopped", "stopped", "finished" }, statuses())
    sweep "10"
    root = root .. "/s" -- the sweep's own folder as the root
    assert.equal("dropped", records()["points/ab"].status)
    assert.equal("1", records()["points/ab"].setting)
    assert.equal(".", records()["points/ab"].sweep)
    root = root:match "^(.*)/s$"
  end)

  it("finds the points of sweeps down to four folders, and nothing in what is no run", function()
    run "sweep/points/ab"
    run "x/sweep/points/cd"
    run "x/sweep/points/deep/ef"
    run "b"
    lfs.mkdir(root .. "/b/checkpoints")
    run "b/checkpoints/copy" -- inside of a run nothing is looked for
    settle "b"
    lfs.mkdir(root .. "/empty")
    write("notes.txt", "x")
    write("sweep/sweep.json", '{"points": [{"hash": "ab", "name": "lr=1e-05", "seed": 2}, {"hash": 3}]}')
    write("sweep/points/ab.log", "x")
    local by_name, list = records()
    assert.equal(3, #list)
    assert.equal("sweep", by_name["sweep/points/ab"].sweep)
    assert.equal("lr=1e-05 seed=2", by_name["sweep/points/ab"].setting)
    assert.equal("x/sweep", by_name["x/sweep/points/cd"].sweep)
    assert.is_nil(by_name.b.sweep)
    local i = open()
    assert.same({ "sweep" }, i:sweeps())
    assert.equal(2, #i:runs { under = "sweep" } + #i:runs { under = "b" })
    assert.equal(0, #i:runs { under = "swee" })
    i:close()
  end)

  it("looks once at a finished run and reads it only when its folder's time changed", function()
    for n = 1, 20 do run("r" .. n) end
    records()
    write("r7/summary.json", '{"before": {"kl": 9}}')
    settle "r7" -- the time says that nothing changed
    said, looks = {}, 0
    assert.equal(0.02, records().r7.kl_before)
    assert.is_true(looks <= 24, looks .. " looks at 20 finished runs")
    settle("r7", old + 1)
    assert.equal(9, records().r7.kl_before)
    assert.same({}, said)
  end)

  it("reads again what changed a moment before it was read", function()
    run "a"
    settle("a", os.time())
    records()
    write("a/summary.json", '{"before": {"kl": 9}}') -- within the same tick of the clock
    settle("a", os.time())
    assert.equal(9, records().a.kl_before)
  end)

  it("follows runs that grow, stop, end, come and go", function()
    run("a", { summary = false })
    run "gone"
    run "sweep/points/p"
    holders["a/lock"] = 77
    assert.equal("running", records().a.status)
    write("a/metrics.jsonl", '{"step":3,"kl":0.5}\n') -- only this file's size changes
    lfs.touch(root .. "/a/metrics.jsonl", old)
    lfs.touch(root .. "/a", old)
    assert.equal(3, records().a.step)
    holders = {}
    assert.equal("stopped", records().a.status)
    write("a/summary.json", "{}")
    settle("a", old + 5)
    os.execute("rm -r " .. root .. "/gone")
    run("sweep/points/q", { at = 9 })
    lfs.touch(root .. "/sweep/points", old + 5)
    local by_name, list = records()
    assert.equal("finished", by_name.a.status)
    assert.is_nil(by_name.gone)
    assert.equal("sweep/points/q", list[1].name) -- the newest first
    assert.equal(3, #list)
    os.remove(root .. "/a/run.json")
    settle("a", old + 6)
    assert.is_nil(records().a)
  end)

  it("does not look into a newer format, and says what is broken", function()
    run("new", { json = '{"format": 7, "options": 3, "recipe": "other"}' })
    run("bad", { json = '{"format": 1,' })
    run("list", { json = "[1, 2]" })
    run("torn", { summary = '{"before"' })
    run("odd", { json = '{"format": 1, "options": null, "started": 5, "model": [], "data": "x"}', summary = '{"after": [1]}' })
    local r = records()
    assert.equal("newer format 7", r.new.status)
    assert.is_nil(r.new.recipe)
    assert.equal("broken", r.bad.status)
    assert.matches("bad/run.json: line 1: broken JSON", r.bad.problem, 1, true)
    assert.equal("broken", r.list.status)
    assert.equal("broken", r.torn.status)
    assert.equal("finished", r.odd.status)
  end)

  it("is made again when lost, broken, cut off, emptied of its tables or of another version", function()
    for n = 1, 60 do run("r" .. n) end
    records()
    local path = root .. "/.index.sqlite"
    local f = assert(io.open(path, "rb"))
    local whole = f:read "*a"
    f:close()
    for _, case in ipairs {
      { function() os.remove(path) end, "made from 60 run folders" },
      { function() write(".index.sqlite", ("no database "):rep(999)) end, "made again from 60 run folders (file is not a database)" },
      { function() write(".index.sqlite", whole:sub(1, 5000)) end, "made again from 60" },
      { function() write(".index.sqlite", whole:sub(1, 4096) .. ("\255"):rep(#whole - 4096)) end, "made again from 60" },
      { function()
        local db = sqlite.open(path)
        db:exec "DROP TABLE runs"
        db:close()
      end, "(no such table: runs)" },
      { function()
        local db = sqlite.open(path)
        db:exec "PRAGMA user_version = 99"
        db:close()
      end, "made again from 60 run folders (of another version)" },
    } do
      said = {}
      case[1]()
      local _, list = records()
      assert.equal(60, #list)
      assert.equal(1, #said)
      assert.matches(case[2], said[1], 1, true)
      said = {}
      records()
      assert.same({}, said)
    end
  end)

  it("reads the folders into memory where it cannot be kept", function()
    run "a"
    lfs.mkdir(root .. "/.index.sqlite")
    local _, list = records()
    assert.equal(1, #list)
    assert.matches("cannot be kept (unable to open database file), the folders are read instead", said[1], 1, true)
  end)

  it("waits for another process and does without the index when that takes too long", function()
    run "a"
    records()
    run "b"
    local db = sqlite.open(root .. "/.index.sqlite")
    db:exec "BEGIN IMMEDIATE"
    local i = index.open(root, { files = files, timeout = 0.05, say = function(line) said[#said + 1] = line end })
    assert.equal(2, #i:runs())
    assert.matches("cannot be kept (database is locked)", said[#said], 1, true)
    db:exec "ROLLBACK"
    db:close()
    said = {}
    assert.equal(2, #select(2, records()))
    assert.same({}, said)
  end)

  it("keeps a rollback journal, which cluster file systems can do", function()
    run "a"
    local i = open()
    assert.equal("delete", i.db:prepare("PRAGMA journal_mode"):rows()[1].journal_mode)
    i:close()
  end)

  it("takes a run's own folder for a root, and writes nothing into it", function()
    run "a"
    local i = index.open(root .. "/a/", { files = files })
    assert.equal("a", i:runs()[1].name)
    assert.equal(root .. "/a", i:runs()[1].path)
    assert.is_nil(lfs.attributes(root .. "/a/.index.sqlite"))
    local ok, e = pcall(index.open, root .. "/missing", { files = files })
    assert.is_false(ok)
    assert.matches("missing: does not exist, wanted --root=DIR", e.message, 1, true)
  end)

  it("answers SQL that changes nothing, and refuses the rest", function()
    run("a", { lr = "0.5" })
    run("b", { lr = "0.25" })
    local i = open()
    local rows, columns = i:query "SELECT name, options ->> 'lr' AS lr FROM runs ORDER BY lr"
    assert.same({ "name", "lr" }, columns)
    assert.same({ { name = "b", lr = 0.25 }, { name = "a", lr = 0.5 } }, rows)
    for sql, why in pairs { ["DELETE FROM runs"] = "wanted a SELECT", ["SELECT 1; DROP TABLE runs"] = "more than one", [""] = "empty",
      ["SELECT nme FROM runs"] = "no such column: nme", ["PRAGMA user_version = 3"] = "wanted a SELECT" } do
      local ok, e = pcall(i.query, i, sql)
      assert.is_false(ok, sql)
      assert.matches(why, e.message, 1, true)
    end
    assert.equal(2, #i:runs())
    local ok, e = pcall(i.runs, i, { stats = "finished" })
    assert.is_false(ok)
    assert.matches("stats is unknown, nearest is status", e.message)
    assert.equal(1, #i:runs { last = 1 })
    i:close()
  end)

  it("shortens a long curve to 48 means", function()
    local lines = {}
    for step = 1, 1000 do lines[step] = ('{"step":%d,"kl":%d}\n'):format(step, step) end
    run("a", { metrics = table.concat(lines) })
    local r = records().a
    assert.is_true(#r.curve <= 48 and #r.curve > 40, #r.curve .. " values")
    assert.equal(11, r.curve[1]) -- mean of 1..21
    assert.equal(1000, r.step)
  end)
end)
