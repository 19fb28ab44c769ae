-- preset.lua - the settings a recipe starts from.
--
--   full   what is published for 30 B models: 32768-token rows, 16 a step, 5e-6
--   tiny   for models under 100 M parameters on a processor: at a constant 3e-4 such students end worse than PTQ, and searched weight
--          scales end 8 % lower in KL than plain ones
--   paper  either of the two, with the loss as CKA-QAD (arXiv 2606.05682) is read: renormalized top-k KL, biased CKA
--
-- A preset fills the options that the user did not type and that the recipe has.
local errors = require "ckaqad.errors"
local text = require "ckaqad.text"

local full = {
  seq = 32768, batch = 16, lr = 5e-6, steps = 400, schedule = "constant", warmup = 0, rows = 512, calibrate = 32,
}
local tiny = {
  seq = 256, batch = 8, lr = 1e-4, steps = 60, schedule = "cosine", warmup = 0.1, rows = 128, calibrate = 32,
  scales = "mse",
}
local paper = { tail = "renormalized", estimator = "biased", scales = "max" }

local preset = { full = full, tiny = tiny, paper = paper, small = 100e6 }

-- Chooses by `params`, fills `opt`, returns the line that says so.
function preset.apply(opt, params)
  local name = errors.choose("option --preset", opt.preset, { "auto", "full", "tiny", "paper" })
  local small = params < preset.small
  local why = ("%s parameters, %s 100 M"):format(text.count(params), small and "below" or "at least")
  local layers = { small and tiny or full }
  if name == "full" or name == "tiny" then layers = { preset[name] } end
  if name == "paper" then layers[2] = paper end
  for _, layer in ipairs(layers) do
    for key, value in pairs(layer) do
      if rawget(opt, key) ~= nil and not opt.given[key] then opt[key] = value end
    end
  end
  local size = layers[1] == tiny and "tiny" or "full"
  opt.preset = name == "paper" and "paper" or size
  return ("preset %s (%s)"):format(name == "paper" and "paper, sizes of " .. size or size, why)
end

return preset
