-- index.lua - the index of runs: what the run folders under a root hold, kept in ROOT/.index.sqlite.
--
-- The folders are the truth and the index a cache of them: each opening looks at what changed since and takes it over, and a lost or
-- broken index is made again. A finished run costs one look at its folder's time; only one that can still grow is looked into.
-- Rollback journal (WAL does not work on cluster file systems), so several processes may read and refresh at once.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local sqlite = require "ckaqad.sqlite"

local index = { file = ".index.sqlite" }
local Index = {}
Index.__index = Index

local known_format = 1 -- of run.json
local deepest = 4      -- folders below the root that may be runs
local settled = 1e9    -- ns: a folder younger than this may change again within the same tick of the file system's clock

-- Columns of the table `runs`: name, type, meaning. `runs --help` prints them.
index.columns = {
  { "name", "TEXT PRIMARY KEY", "folder of the run, below the root" },
  { "status", "TEXT", "finished, running, stopped, dropped (by its sweep), broken, or newer format N" },
  { "recipe", "TEXT", "path of the recipe" },
  { "sweep", "TEXT", "folder of the sweep it is a point of" },
  { "point", "TEXT", "hash of that point" },
  { "setting", "TEXT", "what the sweep gave that point: lr=1e-05 seed=1" },
  { "started", "TEXT", "UTC, 2026-01-31T12:00:00Z" },
  { "started_at", "INTEGER", "the same in seconds since 1970" },
  { "seed", "INTEGER", "option seed" },
  { "options", "TEXT", "JSON: options ->> 'lr'" },
  { "step", "INTEGER", "last step taken" },
  { "steps", "INTEGER", "option steps" },
  { "kl_before", "REAL", "KL to the teacher on held-out text, PTQ" },
  { "kl_after", "REAL", "the same after training" },
  { "kl_eval", "REAL", "the same at the last evaluation so far" },
  { "eval_step", "INTEGER", "step of that evaluation" },
  { "kl_train", "REAL", "KL of the last step's batch" },
  { "perplexity_teacher", "REAL", "BF16" },
  { "perplexity_before", "REAL", "PTQ" },
  { "perplexity_after", "REAL", "after training" },
  { "top1_before", "REAL", "agreement with the teacher's first choice, PTQ" },
  { "top1_after", "REAL", "after training" },
  { "cka_before", "REAL", "mean CKA over the blocks, PTQ" },
  { "cka_after", "REAL", "after training" },
  { "cka_min_after", "REAL", "lowest block" },
  { "cka_min_block", "INTEGER", "which block that is" },
  { "seconds", "REAL", "of training" },
  { "peak_bytes", "INTEGER", "most memory resident" },
  { "planned_bytes", "INTEGER", "memory planned" },
  { "export_bit_equal", "INTEGER", "1: the export is what was trained" },
  { "version", "TEXT", "of the program" },
  { "model", "TEXT", "folder of the teacher" },
  { "model_hash", "TEXT", "first digits of the SHA-256 of its files" },
  { "data_hash", "TEXT", "first digits of the SHA-256 of the documents" },
  { "curve", "TEXT", "JSON: KL of the steps, at most 48 means" },
  { "problem", "TEXT", "why a run is broken" },
}
-- Of the cache itself: times of folder and growing files when they were read, and whether the folder's time suffices.
local private = { { "folder_time", "INTEGER" }, { "growth_time", "INTEGER" }, { "growth_bytes", "INTEGER" }, { "final", "INTEGER" } }

local function system_files()
  local native = require "ckaqad.ffi"
  local C = native.C
  local bytes, changed = native.new "int64_t[1]", native.new "int64_t[1]"
  return {
    stat = function(path)
      if C.cq_file_stat(path, bytes, changed) < 0 then return nil end
      return tonumber(changed[0]), tonumber(bytes[0])
    end,
    list = function(path)
      local out, names = native.new "char *[1]", {}
      if C.cq_folder_list(out, path) < 0 then return nil end
      for name in native.string(out[0]):gmatch("[^\n]+") do names[#names + 1] = name end
      native.free(out[0])
      return names
    end,
    holder = function(path) return tonumber(C.cq_lock_holder(path)) end,
    lock = function(path)
      local out = native.new "cq_lock *[1]"
      if C.cq_lock_take(out, path) < 0 then return nil end
      local lock = out[0]
      return function() C.cq_lock_close(lock) end
    end,
    sleep = C.cq_process_sleep, poll = native.poll,
  }
end

local function read(path)
  local f = io.open(path, "rb")
  local text = f and f:read("*a")
  if f then f:close() end
  return text
end

local function number(x) return type(x) == "number" and x or nil end
local function text_of(x) return type(x) == "string" and x or nil end
local function object(x) return type(x) == "table" and x ~= json.null and x or {} end

-- "2026-01-31T12:00:00Z" -> seconds since 1970
function index.epoch(stamp)
  local y, m, d, H, M, S = (stamp or ""):match("^(%d+)-(%d+)-(%d+)T(%d+):(%d+):(%d+)")
  if not y then return nil end
  y, m = tonumber(y), tonumber(m)
  if m <= 2 then y, m = y - 1, m + 12 end
  local days = 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400) + math.floor((153 * (m - 3) + 2) / 5) + d - 719469
  return days * 86400 + H * 3600 + M * 60 + S
end

-- ---- one run folder -------------------------------------------------------------------------------------------------

-- Last step, its KL, and the KL of all steps as at most 48 means. Lines are searched, not parsed: of a long file that is a tenth of
-- the time. A last line without its end is being written.
local function read_metrics(text)
  local list, last, last_kl = {}, nil, nil
  for line in text:gmatch("([^\n]*)\n") do
    local step = tonumber(line:match('"step":%s*(%d+)'))
    if step then
      last, last_kl = step, tonumber(line:match('"kl":%s*([-+%d.eE]+)'))
      if last_kl then list[#list + 1] = last_kl end
    end
  end
  local width, curve = math.ceil(#list / 48), json.array {}
  for i = 1, #list, math.max(1, width) do
    local sum, n = 0, 0
    for j = i, math.min(i + width - 1, #list) do sum, n = sum + list[j], n + 1 end
    curve[#curve + 1] = tonumber(("%.5g"):format(sum / n))
  end
  return last, last_kl, curve
end

local function take_evals(run, text)
  for line in text:gmatch("([^\n]*)\n") do
    local ok, e = pcall(json.decode, line, "evals.jsonl")
    if ok and type(e) == "table" and number(e.step) then
      if e.step == 0 then
        run.kl_before, run.perplexity_before, run.top1_before, run.cka_before =
          number(e.kl), number(e.perplexity), number(e.top1), number(e.cka)
      end
      run.perplexity_teacher = number(e.perplexity_teacher) or run.perplexity_teacher
      run.kl_eval, run.eval_step = number(e.kl), e.step
    end
  end
end

local function take_summary(run, summary)
  for _, when in ipairs { "before", "after" } do
    local r = object(summary[when])
    for _, what in ipairs { "kl", "perplexity", "top1", "cka" } do
      run[what .. "_" .. when] = number(r[what]) or run[what .. "_" .. when]
    end
    run.perplexity_teacher = number(r.perplexity_teacher) or run.perplexity_teacher
  end
  local after = object(summary.after)
  run.cka_min_after, run.cka_min_block = number(after.cka_min), number(after.cka_min_block)
  run.seconds, run.peak_bytes = number(summary.seconds), number(summary.peak_bytes)
  if type(summary.export_bit_equal) == "boolean" then run.export_bit_equal = summary.export_bit_equal end
end

-- The first digits of all hashes of an object of files.
local function short_hash(list)
  local parts = {}
  for _, hash in ipairs(list) do parts[#parts + 1] = text_of(hash) and hash:sub(1, 8) end
  return #parts > 0 and table.concat(parts, "-") or nil
end

local function take_document(run, doc)
  local options, model, data = object(doc.options), object(doc.model), object(doc.data)
  run.recipe, run.version, run.point = text_of(doc.recipe), text_of(doc.version), text_of(doc.point)
  run.started, run.started_at = text_of(doc.started), index.epoch(text_of(doc.started))
  run.options, run.steps, run.seed = json.encode(options), number(options.steps), number(options.seed)
  run.planned_bytes, run.model = number(doc.planned_bytes), text_of(model.dir)
  local files = object(model.sha256)
  run.model_hash = short_hash { files["config.json"], files["model.safetensors"] or files["model.safetensors.index.json"] }
  run.data_hash = short_hash { object(data.train).sha256, object(data.holdout).sha256 }
end

-- What a sweep says of its points: { names = { [hash] = text }, dropped = { [hash] = step } }. A sweep.json is read once a refresh.
local function read_sweep(self, sweep)
  self.sweeps_read = self.sweeps_read or {}
  local known = self.sweeps_read[sweep]
  if known then return known end
  local ok, doc = pcall(json.decode, read(("%s/%s/sweep.json"):format(self.root, sweep)) or "", "sweep.json")
  doc = object(ok and doc)
  known = { names = {}, dropped = {} }
  self.sweeps_read[sweep] = known
  for _, point in ipairs(object(doc.points)) do
    if type(point) == "table" and text_of(point.hash) and text_of(point.name) then
      known.names[point.hash] = point.name .. (number(point.seed) and not point.name:find "seed=" and (" seed=%d"):format(point.seed) or "")
      known.dropped[point.hash] = number(point.dropped)
    end
  end
  return known
end

-- The sweep whose point a run is, and the point's hash; "." when the root itself is a sweep's folder.
local function sweep_of(name)
  local hash = name:match("^points/([^/]+)$")
  if hash then return ".", hash end
  return name:match("^(.*)/points/([^/]+)$")
end

-- True for a point that its sweep ended early on purpose (successive halving).
local function is_dropped(self, name)
  local sweep, hash = sweep_of(name)
  return sweep ~= nil and read_sweep(self, sweep).dropped[hash] ~= nil
end

-- What the files of a run folder say; `growth` and `held` are the caller's look at it. nil when it holds no run.json.
local function read_run(self, name, growth, held)
  local dir = self.root .. "/" .. name
  local text = read(dir .. "/run.json")
  if not text then return nil end
  local run = { name = name, sweep = sweep_of(name), final = false }
  local ok, doc = pcall(json.decode, text, dir .. "/run.json")
  if ok and not text:match "^%s*{" then ok, doc = false, dir .. "/run.json: holds no object" end
  if not ok then
    run.status, run.problem, run.final = "broken", tostring(doc), true
    return run
  end
  local format = doc.format == nil and known_format or doc.format
  if not number(format) or format > known_format then
    run.status, run.final = "newer format " .. tostring(format), true
    return run
  end
  take_document(run, doc)
  if run.sweep then run.setting = read_sweep(self, run.sweep).names[name:match "[^/]*$"] end
  local curve
  run.step, run.kl_train, curve = read_metrics(growth > 0 and read(dir .. "/metrics.jsonl") or "")
  run.curve = json.encode(curve)
  take_evals(run, read(dir .. "/evals.jsonl") or "")
  local summary = read(dir .. "/summary.json")
  if summary then
    local good, s = pcall(json.decode, summary, dir .. "/summary.json")
    if good then take_summary(run, object(s)) else run.problem = tostring(s) end
  end
  run.status = held and "running" or run.problem and "broken" or summary and "finished" or is_dropped(self, name) and "dropped"
    or "stopped"
  run.final = run.status == "finished" or run.status == "broken"
  return run
end

-- ---- what changed ---------------------------------------------------------------------------------------------------

local function parent_of(name) return name:match("^(.*)/[^/]+$") or "" end

-- Times as they may be trusted next time: what changed a moment ago can change again without a new time.
local function trusted(self, time) return time < self.now - settled and time or -1 end

local Scan = {}
Scan.__index = Scan

local function load_cache(self)
  local scan = setmetatable({ self = self, runs = {}, folders = {}, children = {}, seen = {}, changed = {}, made = {} }, Scan)
  local function below(name)
    local parent = parent_of(name)
    if parent == "" then return end -- the root is always listed: writing the index changes its time
    local list = scan.children[parent] or {}
    scan.children[parent] = list
    list[#list + 1] = name:sub(#parent + 2)
  end
  for _, row in ipairs(self.db:prepare("SELECT name, status, folder_time, growth_time, growth_bytes, final FROM runs"):rows()) do
    scan.runs[row.name] = row
    below(row.name)
  end
  for _, row in ipairs(self.db:prepare("SELECT name, folder_time, sweep FROM folders"):rows()) do
    scan.folders[row.name] = row
    below(row.name)
  end
  return scan
end

-- Looks at a run folder; true when it is (still) a run.
function Scan:run(name, was)
  local self_, files = self.self, self.self.files
  local dir = self_.root .. "/" .. name
  local time = files.stat(dir)
  if not time then return false end
  if was and was.final == 1 and was.folder_time == time then
    self.seen[name] = true
    return true
  end
  local m_time, m_bytes = files.stat(dir .. "/metrics.jsonl")
  local e_time, e_bytes = files.stat(dir .. "/evals.jsonl")
  local growth_time, growth_bytes = math.max(m_time or 0, e_time or 0), (m_bytes or 0) + (e_bytes or 0)
  local held = files.holder(dir .. "/lock") ~= 0
  if was and was.folder_time == time and was.growth_time == growth_time and was.growth_bytes == growth_bytes
    and (was.status == "running" and held or not held and was.status == (is_dropped(self_, name) and "dropped" or "stopped")) then
    self.seen[name] = true
    return true
  end
  local record = read_run(self_, name, m_bytes or 0, held)
  if not record then return false end
  record.folder_time, record.growth_time, record.growth_bytes = trusted(self_, time), trusted(self_, growth_time), growth_bytes
  self.seen[name] = true
  self.changed[#self.changed + 1] = record
  if #self.changed == 1000 then self_.say(("index %s: reading the run folders"):format(self_.shown)) end
  return true
end

local skipped = { log = true, json = true, jsonl = true, md = true, csv = true, tex = true, html = true, lua = true, lock = true }

-- Looks at a folder that is no run as far as is known.
function Scan:folder(name, depth, was)
  local files, dir = self.self.files, self.self.root .. "/" .. name
  local time = files.stat(dir)
  local same = was and was.folder_time == time
  local names = same and (self.children[name] or {}) or files.list(dir)
  if not names then return end
  local sweep = same and was.sweep == 1
  if not same then
    for _, entry in ipairs(names) do
      if entry == "run.json" and self:run(name) then return end
      sweep = sweep or entry == "sweep.json"
    end
    self.made[#self.made + 1] = { name = name, folder_time = trusted(self.self, time), sweep = sweep }
  end
  self.seen[name] = true
  if depth < deepest then self:children_of(name, names, depth) end
end

function Scan:children_of(parent, names, depth)
  for _, entry in ipairs(names) do
    local name = parent == "" and entry or parent .. "/" .. entry
    local run = self.runs[name]
    self.self.files.poll()
    if not (run and self:run(name, run)) and entry:sub(1, 1) ~= "." and not skipped[entry:match("%.(%w+)$") or ""] then
      self:folder(name, depth + 1, self.folders[name])
    end
  end
end

local function upsert(db, name, columns, rows)
  if #rows == 0 then return end
  local names, marks = {}, {}
  for i, column in ipairs(columns) do names[i], marks[i] = column, "?" end
  local s = db:prepare(("INSERT OR REPLACE INTO %s (%s) VALUES (%s)"):format(name, table.concat(names, ", "), table.concat(marks, ", ")))
  for _, row in ipairs(rows) do
    local values = {}
    for i, column in ipairs(names) do values[i] = row[column] end
    s:run(unpack(values, 1, #names))
  end
  s:close()
end

local function names_of(...)
  local list = {}
  for _, columns in ipairs { ... } do
    for _, column in ipairs(columns) do list[#list + 1] = column[1] end
  end
  return list
end

local function store(self, scan)
  local gone = { runs = {}, folders = {} }
  for _, what in ipairs { "runs", "folders" } do
    for name in pairs(scan[what]) do
      if not scan.seen[name] then gone[what][#gone[what] + 1] = name end
    end
  end
  for _, record in ipairs(scan.changed) do
    if scan.folders[record.name] then gone.folders[#gone.folders + 1] = record.name end
  end
  for _, folder in ipairs(scan.made) do
    if scan.runs[folder.name] then gone.runs[#gone.runs + 1] = folder.name end
  end
  if #scan.changed + #scan.made + #gone.runs + #gone.folders == 0 then return end
  local db = self.db
  db:exec "BEGIN IMMEDIATE"
  local ok, e = pcall(function()
    for _, what in ipairs { "runs", "folders" } do
      local s = db:prepare("DELETE FROM " .. what .. " WHERE name = ?")
      for _, name in ipairs(gone[what]) do s:run(name) end
      s:close()
    end
    upsert(db, "runs", names_of(index.columns, private), scan.changed)
    upsert(db, "folders", { "name", "folder_time", "sweep" }, scan.made)
    db:exec "COMMIT"
  end)
  if not ok then
    pcall(db.exec, db, "ROLLBACK")
    error(e, 0)
  end
end

-- Takes over what changed in the folders since the last time.
local function refresh(self)
  self.now = os.time() * 1e9
  local scan = load_cache(self)
  if self.only then
    scan:run(self.only, scan.runs[self.only])
  else
    scan:children_of("", self.files.list(self.root) or {}, 0)
  end
  store(self, scan)
  return #scan.changed
end

-- ---- the database ---------------------------------------------------------------------------------------------------

local function schema()
  local lines = {}
  for _, list in ipairs { index.columns, private } do
    for _, column in ipairs(list) do lines[#lines + 1] = column[1] .. " " .. column[2] end
  end
  return ("CREATE TABLE IF NOT EXISTS runs (%s); "):format(table.concat(lines, ", "))
    .. "CREATE TABLE IF NOT EXISTS folders (name TEXT PRIMARY KEY, folder_time INTEGER, sweep INTEGER)"
end

-- The version is a sum over the schema itself: an index with other columns is another version, whoever forgot to count.
local schema_version = 5381
for c in schema():gmatch "." do schema_version = (schema_version * 33 + c:byte()) % 2 ^ 31 end

-- Opens the file and makes its tables; true when it was new.
local function connect(self, path)
  self.db = sqlite.open(path, { timeout = self.timeout })
  local version = self.db:prepare("PRAGMA user_version"):rows()[1].user_version
  if version == schema_version then return false end
  if version ~= 0 then
    local e = errors.new(errors.DATA, path .. ": of another version")
    e.sqlite = sqlite.CORRUPT
    error(e, 0)
  end
  if path ~= ":memory:" then self.db:exec "PRAGMA journal_mode = DELETE" end
  self.db:exec "BEGIN IMMEDIATE"
  self.db:exec(schema())
  self.db:exec(("PRAGMA user_version = %d"):format(schema_version))
  self.db:exec "COMMIT"
  return true
end

local function damaged(e)
  return type(e) == "table" and (e.sqlite == sqlite.CORRUPT or e.sqlite == sqlite.NOTADB or e.sqlite == sqlite.ERROR)
end

-- Connects and refreshes; gives what came of it.
local function attempt(self, path)
  return pcall(function()
    local new = connect(self, path)
    return new, refresh(self)
  end)
end

local function folders(n) return n == 1 and "1 run folder" or ("%d run folders"):format(n) end

local function reason_of(e) return (tostring(e):gsub("^.-: ", "")) end

-- One process at a time removes a broken index; who comes second finds it whole again.
local function rebuild(self, path, reason)
  local release
  for _ = 1, 200 do
    release = self.files.lock(path .. ".lock")
    if release then break end
    self.files.sleep(0.05)
  end
  local ok, e = attempt(self, path)
  if not ok and damaged(e) and release then
    local count
    if self.db then self.db:close() end
    os.remove(path .. "-journal")
    os.remove(path)
    ok, e, count = attempt(self, path)
    if ok then self.say(("index %s: made again from %s (%s)"):format(path, folders(count), reason)) end
  end
  if release then release() end
  if not ok then error(e, 0) end
end

-- Opens the index of the run folders below `root` and brings it up to date. Where the index cannot be kept (no right to write, a full
-- disk), the folders are read into memory, and a line on standard error says so. `timeout`: seconds to wait for another process (10).
-- `for _, r in ipairs(index.open("runs"):runs { status = "stopped" }) do print(r.name, r.step) end`
function index.open(root, given)
  local o = errors.fill("index", given, { timeout = 10, files = errors.NONE, say = function(line) io.stderr:write(line, "\n") end })
  root = root:gsub("(.)/+$", "%1")
  local self = setmetatable({ root = root, shown = root, timeout = o.timeout, say = o.say, files = o.files or system_files() }, Index)
  if not self.files.stat(root) then errors.raise(errors.USAGE, "runs folder %s: does not exist, wanted --root=DIR", root) end
  if self.files.stat(root .. "/run.json") then
    self.root, self.only = root:match("^(.*)/[^/]*$") or ".", root:match("[^/]*$")
    connect(self, ":memory:")
    refresh(self)
    return self
  end
  local path = root .. "/" .. index.file
  local ok, e, count = attempt(self, path)
  if ok and e and count > 0 then self.say(("index %s: made from %s"):format(path, folders(count))) end
  if not ok and damaged(e) then ok, e = pcall(rebuild, self, path, reason_of(e)) end
  if ok then return self end
  if type(e) ~= "table" or not e.sqlite then error(e, 0) end
  self.say(("index %s: cannot be kept (%s), the folders are read instead"):format(path, reason_of(e)))
  connect(self, ":memory:")
  refresh(self)
  return self
end

-- ---- asking ---------------------------------------------------------------------------------------------------------

local Record = {}
local decoded = { options = "options_json", curve = "curve_json" }

-- Options and curve are parsed when somebody looks at them.
function Record.__index(r, key)
  local source = decoded[key]
  local text = source and rawget(r, source)
  if not text then return nil end
  local value = json.decode(text, r.name)
  rawset(r, key, value)
  return value
end

function Record.__tostring(r)
  local kl = r.kl_before and r.kl_after and ("  KL %.4f → %.4f"):format(r.kl_before, r.kl_after) or ""
  local steps = r.step and ("  step %d%s"):format(r.step, r.steps and ("/%d"):format(r.steps) or "") or ""
  return ("%s  %s%s%s"):format(r.name, r.status, steps, kl)
end

-- Records of the runs, the newest first. A filter names columns and the values they must have; `under = "name"`: a run, or all below
-- a folder; `last = n`: only the n newest; `only = { columns }`: no others. A record has the columns of the index, `options` and
-- `curve` as tables, and `path`.
function Index:runs(filter)
  local known, wanted, where, values, limit = {}, {}, {}, {}, ""
  local under, only = filter and filter.under, filter and filter.only
  for i, column in ipairs(index.columns) do known[i] = column[1] end
  for _, name in ipairs(only or known) do wanted[#wanted + 1] = decoded[name] and name .. " AS " .. decoded[name] or name end
  for key, value in pairs(filter or {}) do
    if key == "last" then
      limit = (" LIMIT %d"):format(value)
    elseif key ~= "under" and key ~= "only" then
      where[#where + 1] = errors.choose("runs filter", key, known) .. " = ?"
      values[#values + 1] = value
    end
  end
  if under then
    where[#where + 1] = "(name = ? OR substr(name, 1, ?) = ?)"
    for _, value in ipairs { under, #under + 1, under .. "/" } do values[#values + 1] = value end
  end
  local list = self.db:prepare(("SELECT %s FROM runs%s ORDER BY started_at DESC, name%s"):format(table.concat(wanted, ", "),
    #where > 0 and " WHERE " .. table.concat(where, " AND ") or "", limit)):rows(nil, unpack(values))
  for _, row in ipairs(list) do
    row.path = self.root .. "/" .. row.name
    setmetatable(row, Record)
  end
  return list
end

-- Names of all sweep folders.
function Index:sweeps()
  local list = {}
  for _, row in ipairs(self.db:prepare("SELECT name FROM folders WHERE sweep = 1 ORDER BY name"):rows()) do list[#list + 1] = row.name end
  return list
end

-- Rows of a query that changes nothing, and the names of its columns in order.
function Index:query(sql)
  local s = self.db:prepare(sql)
  if s.more then errors.usage("query: more than one statement, wanted one") end
  if not s:readonly() then errors.usage("query: changes the index, wanted a SELECT (the folders are the truth)") end
  self.db:exec "PRAGMA query_only = 1"
  return s:rows(self.files.poll), s:columns()
end

function Index:close()
  if self.db then self.db:close() end
  self.db = nil
end

return index
