-- hf.lua - finds a model by folder or by org/name in the Hugging Face cache (huggingface.co/docs/hub/local-cache).
--
-- The cache is HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub; models--org--name/refs/<ref> holds the commit
-- whose files lie in snapshots/<commit>. Nothing is ever downloaded.
local errors = require "ckaqad.errors"
local hf = {}

local function exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

local function getenv(name)
  local value = os.getenv(name)
  return value ~= "" and value or nil
end

-- The cache folder.
function hf.cache()
  if getenv("HF_HUB_CACHE") then return getenv("HF_HUB_CACHE") end
  if getenv("HF_HOME") then return getenv("HF_HOME") .. "/hub" end
  return (getenv("XDG_CACHE_HOME") or (getenv("HOME") or "") .. "/.cache") .. "/huggingface/hub"
end

-- The snapshot folder of `org/name` or `org/name@ref`; nil and the reason when it is not there.
function hf.cached(name)
  local repo, ref = name:match("^([^@]+)@(.+)$")
  repo, ref = repo or name, ref or "main"
  local base = hf.cache() .. "/models--" .. repo:gsub("/", "--")
  local f = io.open(base .. "/refs/" .. ref, "rb")
  local commit = ref
  if f then
    commit = f:read("*a"):match("^%s*(%S+)") or ""
    f:close()
  end
  local dir = base .. "/snapshots/" .. commit
  if exists(dir .. "/config.json") then return dir end
  return nil, ("%s is not in the Hugging Face cache %s"):format(name, hf.cache())
end

-- The folder of a model given as folder, run folder (its nvfp4/), or org/name.
function hf.resolve(name)
  if name == "" then errors.usage("model: no folder given, wanted a Hugging Face folder or org/name") end
  if exists(name .. "/config.json") then return name end
  if exists(name .. "/nvfp4/config.json") then return name .. "/nvfp4" end
  if name:match("^[%w_.%-]+/[%w_.%-]+@?[%w_./%-]*$") and not exists(name) then
    local dir, why = hf.cached(name)
    if dir then return dir end
    errors.usage("model: no folder %s and %s: hf download %s", name, why, name:gsub("@.*", ""))
  end
  errors.raise(errors.DATA, "model: %s/config.json is missing, wanted a Hugging Face folder or org/name", name)
end

hf.exists = exists
return hf
