-- gen_api.lua - writes lua/API.md from the `---` comments of lua/ckaqad/*.lua.
--
--   luajit lua/gen_api.lua > lua/API.md        run in the project's root; a test checks that the file is fresh
local files = {
  { "options", "Options", "cq." }, { "run", "Runs", "cq." }, { "model", "Models", "cq.model." },
  { "data", "Documents", "cq.data." }, { "loss", "Losses", "cq.loss." }, { "distill", "Distillation", "cq." },
  { "balance", "Balances", "cq.balance." }, { "optim", "Optimizers", "cq.optim." },
  { "schedule", "Schedules", "cq.schedule." }, { "select", "Block selectors", "cq." },
  { "plan", "Memory", "cq." }, { "eval", "Evaluation", "cq.eval." }, { "device", "Device", "cq." },
  { "verify", "Checking exports", "cq." }, { "ffi", "Clock and memory", "cq." },
}

-- Objects whose methods are documented, and the name a reader knows them by.
local objects = { Run = "run", Batch = "batch", Model = "model", Data = "data", Pass = "pass", Adam = "adam" }

local function signature(line, prefix)
  local owner, separator, name, arguments = line:match("^function ([%w_]+)([.:])([%w_]+)(%b())")
  if not owner then return nil end
  if objects[owner] then return objects[owner] .. ":" .. name .. arguments end
  if separator == "." and arguments:match("^%(self, ") then arguments = "(data, " .. arguments:sub(8) end
  return prefix .. name .. arguments
end

local api = {}

-- The Markdown text from the modules under `folder`.
function api.text(folder)
  local out = {
    "# The Lua API", "", "Made by `lua/gen_api.lua` from the comments in `lua/ckaqad/`; do not edit.",
    "`local cq = require \"ckaqad\"`. The last argument of a function is an options table; an unknown key is an error that names",
    "the nearest valid one. Errors are thrown as `{ status, message }`. Blocks are counted from 0.", "",
  }
  for _, file in ipairs(files) do
    local path = ("%s/%s.lua"):format(folder, file[1])
    local f = assert(io.open(path, "rb"))
    out[#out + 1] = "## " .. file[2]
    out[#out + 1] = ""
    local comment = {}
    for line in f:lines() do
      local text = line:match("^%-%-%-%s?(.*)$")
      if text then
        comment[#comment + 1] = text
      elseif #comment > 0 then
        local name = assert(signature(line, file[3]), path .. ": a --- comment without a function below it: " .. line)
        out[#out + 1] = "**`" .. name .. "`**  "
        for _, part in ipairs(comment) do out[#out + 1] = part end
        out[#out + 1] = ""
        comment = {}
      end
    end
    f:close()
  end
  return (table.concat(out, "\n"):gsub("\n+$", "\n"))
end

if arg and arg[0] and arg[0]:match("gen_api%.lua$") then io.write(api.text("lua/ckaqad"), "\n") end
return api
