-- sweep.lua - many runs of one recipe that differ in what is swept, and the one table that compares them.
--
-- A sweep folder holds sweep.json (what is compared), attempts.jsonl (every process that ended), points/HASH/ (a run folder each),
-- table.md, table.csv, table.tex and report.html. A point is known by the hash of its resolved options: the same command again runs
-- only what is missing, and values added to a sweep find the finished ones there.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local balance = require "ckaqad.balance"
local driver = require "ckaqad.sweep_driver"
local folder = require "ckaqad.folder"
local hf = require "ckaqad.hf"
local json = require "ckaqad.json"
local options = require "ckaqad.options"
local points = require "ckaqad.sweep_points"
local ranks = require "ckaqad.ranks"
local text = require "ckaqad.text"
local sweep_screen = require "ckaqad.sweep_screen"
local call, show_time = native.call, sweep_screen.time

local sweep = { format = 1 }

-- Options of the driver itself; a point gets its own.
local own = {
  out = true, fresh = true, resume = true, dry_run = true, validate_only = true, stop_at = true, threads = true, max_time = true,
  seeds = true, jobs = true, retry = true,
}

-- The program itself, which a sweep starts again for every point.
local function program()
  local ok, host = pcall(require, "ckaqad.host")
  if not ok or not host.exe then errors.usage("sweep: wanted the program ckaqad, which starts itself for every point") end
  return host.exe
end

-- Options that a recipe would have after these arguments, with model, documents and preset chosen. The recipe runs up to its
-- cq.run; nothing is loaded or written.
local function resolve(recipe, arguments)
  local api, screen, run = require "ckaqad", require "ckaqad.screen", require "ckaqad.run"
  local chunk, why = loadfile(recipe, "t")
  if not chunk then
    errors.usage("%s", why:find("^cannot open") and ("recipe %s: no such file"):format(recipe) or why)
  end
  jit.off(chunk, true)
  local before, caught = rawget(_G, "arg"), nil
  local typed = { [0] = recipe }
  for i, argument in ipairs(arguments) do typed[i] = argument end
  rawset(_G, "arg", typed)
  api.run = function(opt, given)
    caught = { opt = opt, given = given }
    error(caught, 0)
  end
  local ok, e = pcall(chunk)
  api.run = run.run
  rawset(_G, "arg", before)
  if not ok and e ~= caught then error(e, 0) end
  if not caught then errors.usage("recipe %s: does not call cq.run, so it cannot be swept", recipe) end
  local quiet, open = { say = function() end }, screen.open
  screen.open = function() return quiet end
  rawset(caught.opt, "out", nil) -- no folder is looked at
  ok, e = pcall(run.run, caught.opt, caught.given)
  screen.open = open
  if not ok then error(e, 0) end
  return caught.opt
end

local function typed_list(tables)
  local set, keys, list = {}, {}, {}
  for _, t in ipairs(tables) do
    for key, value in pairs(t) do
      if set[key] == nil then keys[#keys + 1] = key end
      set[key] = value
    end
  end
  table.sort(keys)
  for i, key in ipairs(keys) do list[i] = ("--%s=%s"):format(key, points.typed(set[key])) end
  return list
end

-- Resolves a setting with a seed into a point: its options, hash, steps.
local function resolved(plan, setting, seed)
  local arguments = typed_list { plan.base, setting.set, { seed = seed } }
  local opt = resolve(plan.recipe, arguments)
  local values, set = {}, {}
  for _, key in ipairs(opt.order) do values[key] = rawget(opt, key) end
  for _, key in ipairs(setting.keys) do set[key] = values[key] end
  local more = { "recipe " .. plan.recipe:match("[^/]*$") }
  local rule = values.balance and balance.source(values.balance)
  if rule then more[2] = "rule " .. rule end
  local canonical = points.canonical(values, options.passing, more)
  return {
    hash = native.sha256_text(canonical):sub(1, 16), name = setting.name, options = set, keys = setting.keys, seed = values.seed,
    steps = values.steps, arguments = arguments, resolved = values,
  }
end

-- Every point of a plan, seed by seed, so that all settings have their first seed before any has its second.
local function resolve_all(plan)
  local list = {}
  for _, axis in ipairs(plan.axes) do
    if own[axis.name] or options.passing[axis.name] then
      errors.usage("sweep over %s: this option does not change what a run computes", axis.name)
    end
    if plan.base[axis.name] ~= nil then
      errors.usage("sweep over %s: it is given as --%s=%s too, wanted one of both", axis.name, axis.name,
        points.typed(plan.base[axis.name]))
    end
  end
  for _, seed in ipairs(plan.seeds or { false }) do
    for _, setting in ipairs(plan.settings) do
      list[#list + 1] = resolved(plan, setting, seed or nil)
    end
  end
  return points.unique(list)
end

-- Puts the place in the recipe before an error that the plan raised.
local function at(where, f, ...)
  local result = { pcall(f, ...) }
  if result[1] then return unpack(result, 2, table.maxn(result)) end
  local e = result[2]
  if errors.is(e) and not e.quiet and where ~= "" then errors.raise(e.status, "%s%s", where, (e.message:gsub("^sweep: ", ""))) end
  error(e, 0)
end

-- The points that successive halving ended early, as sweep.json says: { [hash] = step }.
local function dropped_of(doc)
  local dropped = {}
  for _, p in ipairs(type(doc) == "table" and type(doc.points) == "table" and doc.points or {}) do
    if type(p) == "table" and type(p.dropped) == "number" then dropped[p.hash] = p.dropped end
  end
  return dropped
end

-- Opens the sweep folder and locks it. Other points in it stay where they are.
local function open_folder(plan)
  local path = plan.path
  local whole_file, old = pcall(folder.read_json, path .. "/sweep.json")
  if not whole_file and not plan.fresh then
    errors.raise(errors.DATA, "%s; without that file the same command writes it again and keeps the points", tostring(old))
  end
  old = whole_file and old or nil
  if old and type(old.format) == "number" and old.format > sweep.format then
    errors.raise(errors.DATA, "%s/sweep.json: format %d, made by a newer version, wanted at most format %d", path, old.format, sweep.format)
  end
  if hf.exists(path .. "/run.json") then
    errors.usage("sweep folder %s: holds a run, wanted a folder of its own: --out=FOLDER", path)
  end
  if old and not plan.fresh and old.recipe ~= plan.recipe:match("[^/]*$") then
    errors.usage("sweep folder %s: belongs to a sweep of %s, wanted a new folder or --fresh", path, tostring(old.recipe))
  end
  if plan.resume and not old then errors.usage("option --resume: %s holds no sweep, wanted one (or leave --resume out)", path) end
  if plan.halving and not plan.fresh then plan.dropped = dropped_of(old) end
  if plan.dry then return end
  local holder = tonumber(native.C.cq_lock_holder(path .. "/lock"))
  if holder ~= 0 then errors.usage("sweep folder %s: process %d runs a sweep there, wanted its end or --out=FOLDER", path, holder) end
  call.cq_folder_make(path)
  plan.lock = native.open("cq_lock", "cq_lock_take", path .. "/lock")
  if plan.fresh then
    call.cq_folder_remove(path .. "/points")
    for _, name in ipairs { "sweep.json", "attempts.jsonl", "table.md", "table.csv", "table.tex", "report.html" } do
      os.remove(path .. "/" .. name)
    end
  end
  call.cq_folder_make(path .. "/points")
end

local function write(path, content) call.cq_file_write(path, content, #content) end

-- Writes sweep.json; `plan.dropped`: { [hash] = step } of the points that successive halving ended there.
local function describe(plan)
  local axes, list = {}, {}
  for i, axis in ipairs(plan.axes) do axes[i] = json.object { "name", axis.name, "values", json.array(axis.values) } end
  for i, p in ipairs(plan.points) do
    list[i] = json.object { "hash", p.hash, "name", p.name, "options", p.options, "seed", p.seed,
      "dropped", plan.dropped and plan.dropped[p.hash] }
  end
  local base = {}
  for key, value in pairs(plan.base) do base[key] = value end
  write(plan.path .. "/sweep.json", json.encode(json.object {
    "format", sweep.format, "program", "ckaqad", "version", native.version, "recipe", plan.recipe:match("[^/]*$"), "base", base, "axes",
    json.array(axes), "seeds", plan.seeds and json.array(plan.seeds) or nil, "points", json.array(list),
    "stop", plan.halving and json.object { "rungs", json.array(plan.halving.rungs), "keep", plan.halving.keep } or nil,
  }, true) .. "\n")
end

-- Seconds that --dry_run of a point estimates for its steps; nil and why when it does not say. A rule of the ablation costs what
-- "ratio" does.
local function dry_seconds(plan, point)
  local log, begun = os.tmpname(), native.clock()
  local argv = { program(), plan.recipe }
  for _, argument in ipairs(point.arguments) do argv[#argv + 1] = argument end
  if balance.source(point.resolved.balance) then argv[#argv + 1] = "--balance=ratio" end
  argv[#argv + 1] = "--dry_run"
  argv[#argv + 1] = "--out=" .. plan.path .. "/points/" .. point.hash
  local pid = driver.start(argv, {}, log)
  while not driver.poll(pid) do
    if native.clock() - begun > 60 then native.C.cq_process_signal(pid, 15) end
    native.poll()
    native.C.cq_process_sleep(0.02)
  end
  local f = io.open(log, "rb")
  local said = f and f:read("*a") or ""
  if f then f:close() end
  os.remove(log)
  local clock = said:match("time: about ([%d:]+)")
  if not clock then return nil, said:match("ckaqad: ([^\n]*)") end
  local seconds = 0
  for part in clock:gmatch("%d+") do seconds = seconds * 60 + tonumber(part) end
  return seconds
end

-- What `left` points cost, counted in points that run to their end: successive halving drops most of them on the way.
local function worth(plan, left)
  local halving, steps = plan.halving, plan.points[1].steps
  if not halving or not steps then return left end
  local alive, before, sum = left, 0, 0
  for _, rung in ipairs(halving.rungs) do
    sum = sum + alive * (rung - before) / steps
    alive, before = math.max(1, math.floor(alive * halving.keep)), rung
  end
  return sum + alive * (steps - before) / steps
end

local function say_cost(plan, d, left)
  if left == 0 then return end
  local each, jobs = d:seconds_of_a_point(), math.min(plan.jobs, left)
  local full, what = worth(plan, left), left == 1 and "1 point" or ("%d points"):format(left)
  if each then
    print(("cost: %s to run%s, about %s with %d at a time (%s a point, as those that ran)"):format(what,
      full < left and " at most" or "", show_time(each * full / jobs), jobs, show_time(each)))
    return
  end
  for _, point in ipairs(plan.points) do
    if not d:finished(point) then
      local seconds, why = dry_seconds(plan, point)
      if not seconds then
        print(("cost: %s to run, %s"):format(what, why and "and the first says: " .. why or "known when the first has ended"))
      else
        print(("cost: %s to run%s, about %s of training steps in all, by the operations of the first"):format(what,
          full < left and (", as many steps as %.1f whole ones"):format(full) or "", show_time(math.max(1, seconds) * full)))
      end
      return
    end
  end
end

local function say_plan(plan, d, dropped)
  local what = {}
  for _, axis in ipairs(plan.axes) do what[#what + 1] = axis.name end
  local function counted(n, word) return ("%d %s%s"):format(n, word, n == 1 and "" or "s") end
  print(("sweep %s over %s: %s%s%s, %s"):format(plan.recipe, #what > 0 and table.concat(what, ", ") or "seed",
    counted(#plan.settings, "setting"), plan.seeds and " x " .. counted(#plan.seeds, "seed") or "",
    dropped > 0 and (", %d equal points run once"):format(dropped) or "", plan.path))
  local finished, started, gone = 0, 0, 0
  for _, point in ipairs(plan.points) do
    if d:finished(point) then
      finished = finished + 1
    elseif plan.dropped and plan.dropped[point.hash] then
      gone = gone + 1
    elseif d:progress(point) > 0 then
      started = started + 1
    end
  end
  if finished + started + gone > 0 then
    print(("resume: %d of %d points are finished, %d were stopped on the way%s"):format(finished, #plan.points, started,
      gone > 0 and (", %d were dropped"):format(gone) or ""))
  end
  return #plan.points - finished - gone
end

local function status_of(plan, d, point)
  if d:finished(point) then return "finished" end
  if plan.dropped and plan.dropped[point.hash] then return "dropped" end
  return d:progress(point) > 0 and "stopped" or "to run"
end

local function list_points(plan, d)
  local rows = { { "point", "hash", "status" } }
  for _, p in ipairs(plan.points) do
    rows[#rows + 1] = { sweep_screen.label(p), p.hash, status_of(plan, d, p) }
  end
  for _, line in ipairs(text.table(rows, "  ")) do print(line) end
end

-- Ends the driver: the table, what failed, and the exit code.
local function conclude(plan, d, code, word)
  local sweep_table = require "ckaqad.sweep_table"
  local result = sweep_table.make(plan, d)
  if code then
    print(("%s: %d of %d points are finished; the same command goes on"):format(word, result.finished, #plan.points))
    native.close(plan.lock, "cq_lock")
    errors.exit(code)
  end
  print("")
  io.stdout:write(sweep_table.text(result.table, native.columns() or 120))
  print(result.unwritten and "not written, the same command writes it: " .. result.unwritten
    or ("table %s/table.md, .csv, .tex; report %s"):format(plan.path, result.report or "not drawn"))
  native.close(plan.lock, "cq_lock")
  local failed = {}
  for _, p in ipairs(plan.points) do
    if d.failed[p.hash] then failed[#failed + 1] = p end
  end
  if #failed > 0 then
    errors.raise(errors.IO, "sweep: %d of %d points failed, first %s: %s (%s.log)", #failed, #plan.points,
      sweep_screen.label(failed[1]), d.failed[failed[1].hash], d:folder(failed[1]))
  end
  if result.unwritten then errors.raise(errors.IO, "sweep: %s", result.unwritten) end
  return result
end

local function check_halving(stop)
  if not stop then return nil end
  local o = errors.fill("sweep: stop", stop, { rungs = errors.NONE, keep = 0.5 })
  if type(o.rungs) ~= "table" or #o.rungs == 0 then errors.usage("sweep: stop.rungs is missing, wanted steps like { 10, 30 }") end
  for i, rung in ipairs(o.rungs) do
    -- the KL of a step is measured before its update, so the first step tells settings with the same start nothing apart
    if type(rung) ~= "number" or rung < 2 or rung ~= math.floor(rung) or (i > 1 and rung <= o.rungs[i - 1]) then
      errors.usage("sweep: stop.rungs[%d] is %s, wanted whole numbers from 2 on that grow", i, tostring(rung))
    end
  end
  if type(o.keep) ~= "number" or o.keep <= 0 or o.keep >= 1 then
    errors.usage("sweep: stop.keep is %s, wanted a share between 0 and 1", tostring(o.keep))
  end
  return o
end

local function whole(name, value, least)
  if type(value) ~= "number" or value < least or value ~= math.floor(value) then
    errors.usage("sweep: %s is %s, wanted a whole number, %d or more", name, tostring(value), least)
  end
  return value
end

-- Refuses options that a sweep does not have: each would run something else than was asked for.
local function refuse(where, opt)
  if opt.validate_only then errors.usage("%s--validate_only: not for a sweep, wanted one run", where) end
  if opt.stop_at > 0 then errors.usage("%s--stop_at: not for a sweep, wanted --max_time=10m or a Ctrl-C", where) end
end

-- Runs a plan: { recipe, base, settings, axes, seeds, path, jobs, retry, halving, threads, argv, where, fresh, dry, max_time }.
local function execute(plan)
  ranks.refuse("sweep")
  local dropped
  plan.points, dropped = at(plan.where, resolve_all, plan)
  for i, rung in ipairs(plan.halving and plan.halving.rungs or {}) do
    if plan.points[1].steps and rung >= plan.points[1].steps then
      errors.usage("%sstop.rungs[%d] is step %d of %d, wanted one before the end", plan.where, i, rung, plan.points[1].steps)
    end
  end
  open_folder(plan)
  local total = plan.threads > 0 and plan.threads or require "ckaqad.device".current().threads
  local function halved(dropped_points)
    plan.dropped = dropped_points
    describe(plan)
  end
  plan.jobs = math.min(plan.jobs, #plan.points)
  local d = driver.open {
    path = plan.path, points = plan.points, jobs = plan.jobs, retry = plan.retry, argv = plan.argv, halving = plan.halving,
    threads = math.max(1, math.floor(total / plan.jobs)), max_time = plan.max_time, halved = halved,
  }
  local left = say_plan(plan, d, dropped)
  if plan.dry then
    list_points(plan, d)
    say_cost(plan, d, left)
    errors.exit(0)
  end
  describe(plan)
  say_cost(plan, d, left)
  if plan.jobs > 1 and left > 0 then print(("jobs: %d at a time, %d threads each"):format(plan.jobs, d.threads)) end
  return conclude(plan, d, d:run())
end

-- In the process of a point of an ablation: runs the base recipe here, where the rules above cq.sweep are known.
local function run_point(opt, recipe, hash)
  local home = opt.out:match("^(.*)/points/[^/]+$")
  local plan = home and folder.read_json(home .. "/sweep.json")
  local found
  for _, point in ipairs(plan and plan.points or {}) do
    if point.hash == hash then found = point end
  end
  if not found then errors.raise(errors.DATA, "sweep: %s/sweep.json has no point %s", tostring(home), hash) end
  local typed = typed_list { plan.base, found.options, { seed = plan.seeds and found.seed } }
  typed[0] = recipe
  for _, key in ipairs { "threads", "stop_at", "out" } do
    if opt.given[key] then typed[#typed + 1] = ("--%s=%s"):format(key, points.typed(opt[key])) end
  end
  local chunk, why = loadfile(recipe, "t")
  if not chunk then errors.usage("%s", why) end
  rawset(_G, "arg", typed)
  jit.off(chunk, true)
  chunk()
  errors.exit(0)
end

-- The file of the recipe that an ablation names: beside the ablation, or as it stands.
local function find_recipe(name, beside)
  local near = (beside:match("^(.*/)[^/]*$") or "") .. name
  return name:sub(1, 1) ~= "/" and hf.exists(near) and near or name
end

local function declared(path)
  local f, set = io.open(path, "rb"), {}
  for _, key in ipairs(options.read_help(f and f:read("*a") or "").order) do set[key] = true end
  if f then f:close() end
  return set
end

-- What an ablation passes on: the options of its own block that the base recipe has too, and common ones that were typed.
local function passed_on(opt, recipe)
  local mine, base, passed = declared(opt.recipe), declared(recipe), {}
  for _, key in ipairs(opt.order) do
    local wanted = mine[key] and base[key] or not mine[key] and opt.given[key]
    if wanted and not own[key] and opt[key] ~= "" then passed[key] = opt[key] end
  end
  return passed
end

--- Runs a recipe once for every setting and seed, each in a process of its own, and compares them in one table.
--- What is tried, exactly one of: `grid` (all combinations), `paired` (lists walked together), `list` ({ { name = "...", option =
--- value }, ... }), `random` ({ count, seed, space = { lr = { min, max, log = true }, cka = { "all", "none" } } }).
--- `seeds`: how many (from 1) or a list; every setting gets the same ones. `set`: options of every point. `jobs`: processes at a time
--- (they share the threads); `retry`: further tries of a crashed point; `stop = { rungs = { 10, 30 }, keep = 0.5 }`: successive
--- halving, at each rung only the better share goes on.
--- The options of `opt`'s block that the recipe has too go to it (those that are "" stay its own); `opt.out` is the sweep's folder. Gives
--- { table, points, finished }. Errors carry the recipe's line; exit code 1 when points failed, 129, 130 and 143 when stopped, 75 at
--- --max_time.
---
--- Example:
---     local cq = require "ckaqad"
---     local opt = cq.options {
---       model = "auto",       -- BF16 checkpoint
---       out = "runs/rates",   -- the sweep's folder
---       steps = 2,            -- optimizer steps of every point
---     }
---     cq.sweep(opt, { recipe = "recipes/nemotron_nano.lua", grid = { lr = { 3e-5, 1e-4 } }, jobs = 2 })
function sweep.sweep(opt, given)
  local info = debug.getinfo(2, "Sl")
  local where = info and info.currentline > 0 and ("%s:%d: sweep: "):format((info.source:gsub("^@", "")), info.currentline) or "sweep: "
  local none = errors.NONE
  local o = at(where, errors.fill, "sweep", given, {
    recipe = none, grid = none, random = none, paired = none, list = none, stop = none, set = none,
    seeds = rawget(opt, "seeds") or none, jobs = rawget(opt, "jobs") or 1, retry = rawget(opt, "retry") or 1,
  })
  if type(o.recipe) ~= "string" then errors.usage("%srecipe is missing, wanted the file of a recipe", where) end
  local recipe = find_recipe(o.recipe, opt.recipe)
  local hash = os.getenv "CKAQAD_POINT"
  if hash then return run_point(opt, recipe, hash) end
  refuse((where:gsub("sweep: $", "")), opt)
  local exe, again = program(), {}
  for key in pairs(opt.given) do
    if not own[key] then again[#again + 1] = ("--%s=%s"):format(key, points.typed(opt[key])) end
  end
  table.sort(again)
  local plan = {
    recipe = recipe, where = where, path = (opt.out:gsub("(.)/+$", "%1")), jobs = at(where, whole, "jobs", o.jobs, 1),
    retry = at(where, whole, "retry", o.retry, 0), halving = at(where, check_halving, o.stop), threads = opt.threads,
    fresh = opt.fresh, resume = opt.resume, dry = opt.dry_run, max_time = opt.max_time, base = passed_on(opt, recipe),
  }
  for key, value in pairs(o.set or {}) do plan.base[key] = value end
  plan.settings, plan.axes, plan.seeds = at(where, points.expand, o, plan.base.seed)
  if plan.seeds then plan.base.seed = nil end
  plan.argv = function(_, extra)
    local argv = { exe, opt.recipe }
    for _, list in ipairs { again, extra } do
      for _, argument in ipairs(list) do argv[#argv + 1] = argument end
    end
    return argv
  end
  return execute(plan)
end

-- `--sweep` on a recipe's command line: runs the whole sweep and leaves the program. Called by cq.options before it returns.
function sweep.from_options(opt, specs)
  local f = io.open(opt.recipe, "rb")
  local source = f and f:read("*a") or ""
  if f then f:close() end
  if source:find("%f[%w]cq%.sweep") then
    errors.usage("--sweep: %s is a sweep itself, wanted the values in its own list or a recipe that runs once", opt.recipe)
  end
  local axes = points.parse(specs)
  for _, axis in ipairs(axes) do
    if rawget(opt, axis.name) == nil then
      errors.usage("sweep over %s: the recipe has no such option, nearest is %s", axis.name, errors.nearest(axis.name, opt.order))
    end
  end
  refuse("", opt)
  local exe, base = program(), {}
  for key in pairs(opt.given) do
    if not own[key] then base[key] = opt[key] end
  end
  local plan = {
    recipe = opt.recipe, where = "", path = (opt.given.out and opt.out or rawget(opt, "out") .. "-sweep"):gsub("(.)/+$", "%1"),
    jobs = whole("jobs", specs.jobs or rawget(opt, "jobs") or 1, 1),
    retry = whole("retry", specs.retry or rawget(opt, "retry") or 1, 0), threads = opt.threads,
    fresh = opt.fresh, resume = opt.resume, dry = opt.dry_run, max_time = opt.max_time, base = base,
  }
  plan.settings, plan.axes, plan.seeds = points.expand { grid = axes }
  if plan.seeds and base.seed then errors.usage("sweep over seed: it is given as --seed=%d too, wanted one of both", base.seed) end
  plan.argv = function(point, extra)
    local argv = { exe, opt.recipe }
    for _, list in ipairs { point.arguments, extra } do
      for _, argument in ipairs(list) do argv[#argv + 1] = argument end
    end
    return argv
  end
  execute(plan)
  errors.exit(0)
end

return sweep
