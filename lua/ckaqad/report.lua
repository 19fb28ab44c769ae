-- report.lua - report.html of a run or a sweep, made from the files of its folder: one file, no network, light and dark.
--
-- Only what the folder says goes in, so a report can be made again at any time, by another process, of a run that was stopped.
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local charts = require "ckaqad.report_charts"
local page = require "ckaqad.report_page"
local stats = require "ckaqad.stats"
local text = require "ckaqad.text"

local report = {}

local function read(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local s = f:read("*a")
  f:close()
  return s
end

-- A JSON file of a folder; nil when it is missing.
function report.read_json(path)
  local s = read(path)
  return s and json.decode(s, path)
end

-- The objects of a JSON-lines file, in order; [] when it is missing. A line that does not parse is left out: a run that was killed
-- can leave half of its last one.
function report.read_lines(path)
  local list = {}
  for line in (read(path) or ""):gmatch("[^\n]+") do
    local ok, value = pcall(json.decode, line, path)
    if ok and type(value) == "table" then list[#list + 1] = value end
  end
  return list
end

-- What was trained on, from a run's options: `name` of the trained student, `logits` and `layer` (what metrics.jsonl calls cka; nil
-- when nothing between blocks counts) in words. A recipe without these options is taken for KL and CKA.
function report.form(options)
  local layer = options.layer or "cka"
  if layer == "none" or options.cka == "none" or options.balance == "none" then layer = nil end
  local form = { logits = options.loss == "ce" and "cross-entropy" or "KL", name = options.loss == "ce" and "QAT" or "QAD" }
  form.layer = layer and (layer == "cka" and "CKA" or ("1 - %s loss"):format(layer))
  if layer then form.name = ("%s-%s"):format(layer == "cka" and "CKA" or layer, form.name) end
  form.measured = options.layer and options.layer ~= "cka" and options.layer ~= "none" and ("1 - %s loss"):format(options.layer) or "CKA"
  return form
end

-- What the folder of a run holds: { path, name, run, summary, metrics, evals, options, model, form, finished }.
function report.load(path)
  local folder = path:gsub("(.)/+$", "%1")
  local self = {
    path = folder, name = folder:match("([^/]+)$") or folder, run = report.read_json(folder .. "/run.json") or {},
    summary = report.read_json(folder .. "/summary.json"), metrics = {}, evals = {},
  }
  for _, m in ipairs(report.read_lines(folder .. "/metrics.jsonl")) do
    if type(m.step) == "number" then self.metrics[#self.metrics + 1] = m end
  end
  for _, e in ipairs(report.read_lines(folder .. "/evals.jsonl")) do
    if type(e.step) == "number" then self.evals[#self.evals + 1] = e end
  end
  self.options = type(self.run.options) == "table" and self.run.options or {}
  self.model = type(self.run.model) == "table" and self.run.model or {}
  self.form = report.form(self.options)
  self.finished = self.summary ~= nil
  return self
end

-- A measured result with all that the table needs, or nil.
local function result(r)
  return type(r) == "table" and type(r.kl) == "number" and type(r.cka_blocks) == "table" and r or nil
end

-- { name, result } of what the run measured. A run that was stopped has the evaluations of its steps.
function report.results(r)
  local before, after = result(r.summary and r.summary.before), result(r.summary and r.summary.after)
  if not r.summary then
    before = result(r.evals[1] and r.evals[1].step == 0 and r.evals[1])
    after = #r.evals > 1 and result(r.evals[#r.evals]) or nil
  end
  local list = {}
  if before then list[1] = { "PTQ", before } end
  local searched = before and result(r.summary and r.summary.searched)
  if searched then list[2] = { "PTQ, " .. tostring(r.options.scales), searched } end
  if after then list[#list + 1] = { r.summary and r.form.name or ("step %d"):format(after.step), after } end
  return list, before, after
end

local function finite(x) return type(x) == "number" and x == x and math.abs(x) ~= math.huge end

local function percent(x) return x and ("%.1f %%"):format(x) or "-" end

-- One sentence, and whether it is a warning.
function report.verdict(r)
  local _, before, after = report.results(r)
  local last, of = r.metrics[#r.metrics], r.options.steps
  local where = not r.summary and ("No result yet: the run was stopped or still goes on%s. "):format(last and
    (" after step %d%s"):format(last.step, type(of) == "number" and (" of %d"):format(of) or "") or ", before its first step") or ""
  if not before then return where ~= "" and where or "The run ended without an evaluation.", false end
  if not after then
    return where .. ("NVFP4 without training costs KL %.4f nats a token; top-1 agreement %.1f %%, mean CKA %.4f, lowest %.4f."):format(
      before.kl, 100 * before.top1, before.cka, before.cka_min), false
  end
  if not r.summary then where = ("%sAt step %d: "):format(where, after.step) end
  local worse, also = {}, {}
  if after.kl > before.kl then worse[1] = ("KL (%.4f to %.4f)"):format(before.kl, after.kl) end
  if after.cka < before.cka then worse[#worse + 1] = ("mean CKA (%.4f to %.4f)"):format(before.cka, after.cka) end
  if #worse > 0 then return ("%s%s is worse than PTQ in %s."):format(where, r.form.name, table.concat(worse, " and ")), true end
  if after.top1 < before.top1 then also[1] = "top-1 agreement" end
  if finite(after.perplexity) and finite(before.perplexity) and after.perplexity > before.perplexity then also[#also + 1] = "perplexity" end
  if finite(after.cka_min) and finite(before.cka_min) and after.cka_min < before.cka_min then also[#also + 1] = "the lowest CKA" end
  local but = #also > 0 and (" But it is worse than PTQ in %s."):format(table.concat(also, ", "):gsub("(.*), ", "%1 and ")) or ""
  return ("%s%s won back %s of the KL that NVFP4 costs: %.4f to %.4f nats a token; top-1 agreement %.1f %% to %.1f %%, mean CKA %.4f " ..
    "to %.4f.%s"):format(where, r.form.name, percent(stats.recovery(before.kl, after.kl, 0)), before.kl, after.kl, 100 * before.top1,
    100 * after.top1, before.cka, after.cka, but), false
end

local function results_table(p, list, before)
  if #list == 0 then return end
  local n, teacher = page.number, list[1][2].perplexity_teacher
  local function class(s) return { s, class = "num" } end
  local any = #list > 1
  local head = { "", class "KL", any and class "recovered", class "perplexity", any and class "recovered", class "top-1",
    class "mean CKA", class "lowest CKA" }
  local rows = { { "BF16", n(0), any and class "", n(teacher), any and class "", n(1), n(1), n(1) } }
  for _, item in ipairs(list) do
    local r, better = item[2], before and item[2] ~= before
    rows[#rows + 1] = {
      item[1], n(r.kl), any and class(better and percent(stats.recovery(before.kl, r.kl, 0)) or ""), n(r.perplexity),
      any and class(better and percent(stats.recovery(before.perplexity, r.perplexity, teacher)) or ""), n(r.top1), n(r.cka),
      class(("%.4f (block %d)"):format(r.cka_min, r.cka_min_block)), main = better and item == list[#list],
    }
  end
  if not any then
    for _, row in ipairs { head, unpack(rows) } do
      table.remove(row, 5)
      table.remove(row, 3)
    end
  end
  p:heading "Held-out documents"
  p:add("%s", page.table(head, rows, { all = true }))
  local tokens = list[1][2].tokens
  p:paragraph((tokens and text.count(tokens) .. " tokens. " or "") .. "KL to BF16 in nats a token" ..
    (any and "; recovered: what was won back of PTQ's loss" or "") .. "; top-1: agreement with BF16.", "dim")
end

local letters = { { "M", "Mamba" }, { "*", "attention" }, { "E", "experts" }, { "-", "MLP" }, { "Q", "attention and MLP" } }

-- "12 blocks MEM*E... (M Mamba, * attention)"
local function blocks_of(pattern)
  local list = {}
  for _, item in ipairs(letters) do
    if pattern:find(item[1], 1, true) then list[#list + 1] = item[1] .. " " .. item[2] end
  end
  return ("%d blocks %s%s"):format(#pattern, pattern, #list > 0 and (" (%s)"):format(table.concat(list, ", ")) or "")
end

local function heading(p, r)
  p:add("<h1>%s</h1>", page.escape(r.name))
  local facts = {}
  if r.model.family then
    facts[1] = ("%s, %s parameters"):format(r.model.family, text.count(r.model.parameters or 0))
    if type(r.model.pattern) == "string" then facts[1] = facts[1] .. ", " .. blocks_of(r.model.pattern) end
  end
  if r.run.recipe then facts[#facts + 1] = tostring(r.run.recipe):match("[^/]+$") end
  if r.run.started then facts[#facts + 1] = (tostring(r.run.started):gsub("^([%d-]+)T(%d+:%d+):%d+Z$", "%1 %2 UTC")) end
  if r.run.version then facts[#facts + 1] = "ckaqad " .. tostring(r.run.version):match("^%S+") end
  p:paragraph(table.concat(facts, " · "), "dim")
  if r.run.point then p:add '<p class="dim">A point of a sweep: <a href="../../report.html">its report</a></p>' end
  local verdict, bad = report.verdict(r)
  p:paragraph(verdict, bad and "verdict warn" or "verdict")
end

local function closing(p, r)
  local s, facts = r.summary or {}, {}
  local planned = s.planned_bytes or r.run.planned_bytes
  if type(planned) == "number" then facts[#facts + 1] = { "planned memory", text.bytes(planned) } end
  if type(s.peak_bytes) == "number" then facts[#facts + 1] = { "measured peak", text.bytes(s.peak_bytes) } end
  if type(s.seconds) == "number" then facts[#facts + 1] = { "training took", text.duration(s.seconds) } end
  if type(s.export_bit_equal) == "boolean" then
    facts[#facts + 1] = { "export", s.export_bit_equal and "dequantizes to the trained weights, every bit" or
      "DIFFERS from the trained weights" }
  end
  for _, item in ipairs { { "device", r.run.device }, { "model", r.run.model }, { "data", r.run.data } } do
    if type(item[2]) == "table" then
      for _, key in ipairs(json.keys(item[2])) do
        local value = item[2][key]
        if type(value) ~= "table" then facts[#facts + 1] = { item[1] .. " " .. key, page.value(value) } end
      end
    end
  end
  if #facts > 0 then
    p:heading "The run"
    p:list(facts, true)
  end
  local options = {}
  for _, key in ipairs(json.keys(r.options)) do options[#options + 1] = { "--" .. key, page.value(r.options[key]) } end
  if #options > 0 then
    p:heading "Options"
    p:list(options, true)
  end
end

--- The report of a run as HTML, from the files in its folder (run.json, metrics.jsonl, evals.jsonl, summary.json); a run that was
--- stopped has fewer of them and still gets one. A broken file is an error that names it and its line.
--- `local html = require("ckaqad.report").run("runs/try")`
function report.run(path)
  local r = report.load(path)
  local list, before = report.results(r)
  if #list == 0 and #r.metrics == 0 and not r.run.options then
    errors.raise(errors.DATA, "report: %s holds no run, wanted a folder with run.json", r.path)
  end
  local pattern = type(r.model.pattern) == "string" and r.model.pattern or nil
  local p = page.new(r.name)
  heading(p, r)
  results_table(p, list, before)
  if #r.metrics > 0 then
    p:heading "Training"
    p:slider()
    p:add '<div class="grid2">'
    charts.curves(p, r.metrics, r.evals, r.form)
    charts.steps_map(p, r.metrics, pattern, r.form)
    p:add "</div>"
  end
  if #list > 0 then
    p:heading "Blocks and weights"
    p:add '<div class="grid2">'
    charts.by_block(p, list, pattern)
    charts.block_map(p, list, pattern)
    charts.sqnr(p, list, pattern)
    charts.positions(p, list)
    charts.scales(p, list, pattern)
    p:add "</div>"
  end
  closing(p, r)
  return p:html()
end

--- The report of a sweep as HTML, from sweep.json, attempts.jsonl and the run folders under points/ that are there so far.
--- `local html = require("ckaqad.report").sweep("runs/sweep-lr")`
function report.sweep(path) return require("ckaqad.report_sweep").html(path) end

return report
