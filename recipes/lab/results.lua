-- Tables and pictures of the study: reads study.json of one or more teachers and writes them into a Markdown file between its markers.
--   ckaqad recipes/lab/results.lua --studies="RL, seed 1=runs/study;SFT=runs/study-sft" --file=recipes/lab/RESULTS.md
local cq = require "ckaqad"
local here = (arg[0]:match "^(.*/)" or "./")
local pages = dofile(here .. "pages.lua")

local opt = cq.options {
  studies = "RL=runs/study",          -- NAME=FOLDER of each teacher's study, separated by ; - the first has the pictures
  stages = "",                        -- NAME=FILE of lab/score.lua's --scores, separated by ; - what each stage of training gained
  file = "recipes/lab/RESULTS.md",    -- what stands between "<!-- results -->" and "<!-- end of results -->" is replaced
  pictures = "recipes/lab/pictures",  -- folder for the pictures
}
local function pairs_of(text)
  local list = {}
  for item in text:gmatch "[^;]+" do
    local name, path = item:match "^%s*(.-)%s*=%s*(.-)%s*$"
    cq.refuse(not name and ("results: got %q, wanted NAME=PATH"):format(item) or nil)
    list[#list + 1] = { name = name, path = path }
  end
  return list
end

local out, studies = {}, pairs_of(opt.studies)
local stages = pairs_of(opt.stages)
for _, stage in ipairs(stages) do stage.scores = cq.json.lines(stage.path, { "scores" })[1].scores end
if #stages > 0 then out[1] = pages.stages(stages) end
for i, study in ipairs(studies) do
  local s = pages.load(cq.json.lines(study.path .. "/study.json", { "arms" })[1])
  out[#out + 1] = "### Teacher " .. study.name .. "\n\n" .. pages.setting(s)
  out[#out + 1] = pages.accuracy(s)
  out[#out + 1] = pages.tasks(s)
  out[#out + 1] = pages.geometry(s)
  out[#out + 1] = pages.rates(s)
  out[#out + 1] = pages.every_rate(s)
  out[#out + 1] = pages.correlation(s)
  if i == 1 then
    os.execute(("mkdir -p '%s'"):format(opt.pictures))
    for _, picture in ipairs(pages.pictures(s)) do
      cq.benchmark.write(("%s/%s.svg"):format(opt.pictures, picture.file), picture.svg)
      out[#out + 1] = ("![%s](pictures/%s.svg)\n"):format(picture.words, picture.file)
    end
  end
end
cq.benchmark.write(opt.file, pages.between(opt.file, table.concat(out, "\n")))
print(("results: %d studies, %s, pictures in %s"):format(#studies, opt.file, opt.pictures))
