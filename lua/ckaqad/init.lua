-- init.lua - the public API: `local cq = require "ckaqad"`. Reading a name that is not here is an error with the nearest one.
local benchmark = require "ckaqad.benchmark"
local cache = require "ckaqad.cache"
local errors = require "ckaqad.errors"
local native = require "ckaqad.ffi"
local data = require "ckaqad.data"
local device = require "ckaqad.device"
local distill = require "ckaqad.distill"
local dry = require "ckaqad.dry"
local model = require "ckaqad.model"
local options = require "ckaqad.options"
local plan = require "ckaqad.plan"
local run = require "ckaqad.run"
local select_ = require "ckaqad.select"
local tensorboard = require "ckaqad.tensorboard"
local verify = require "ckaqad.verify"

return errors.strict({
  version = native.version,
  options = options.options,
  run = run.run,
  batch = run.batch,
  batch_of = run.batch_of,
  device = device.device,
  plan = plan.plan,
  model = errors.strict({ open = model.open, create = model.create }, "model"),
  data = errors.strict({ open = data.open, show = data.show, random = data.random }, "data"),
  cache = errors.strict({ create = cache.create, open = cache.open }, "cache"),
  ptq = require "ckaqad.ptq",
  blocks = select_.blocks,
  distill = distill.distill,
  loss = require "ckaqad.loss",
  balance = require "ckaqad.balance",
  optim = require "ckaqad.optim",
  schedule = require "ckaqad.schedule",
  eval = require "ckaqad.eval",
  quant = errors.strict({ presets = { "nemotron_nano", "qwen3", "all", "experts", "mlp", "weights_only", "none" } }, "quant"),
  sweep = require "ckaqad.sweep".sweep,
  runs = require "ckaqad.runs".runs,
  compare = errors.strict(require "ckaqad.compare", "compare"),
  stats = require "ckaqad.stats",
  table = require "ckaqad.table".new,
  benchmark = errors.strict({ open = benchmark.open, ask = benchmark.ask, shares = benchmark.shares, recovery = benchmark.recovery,
    write = benchmark.write, server = require("ckaqad.server").chat }, "benchmark"),
  verify = verify.verify,
  tensorboard = errors.strict({ open = tensorboard.open, markdown = tensorboard.markdown }, "tensorboard"),
  spawn = require("ckaqad.spawn").spawn,
  plot = require("ckaqad.plot").plot,
  show = require("ckaqad.show").show,
  save_session = require("ckaqad.session").save_session,
  refuse = errors.refuse,
  json = require "ckaqad.json",
  text = require "ckaqad.text",
  operations = dry.step,
  matrix_rate = dry.rate,
  clock = native.clock,
  peak_bytes = native.peak_bytes,
}, "cq")
