-- loss.lua - the terms of a distillation loss, as values that a plan and cq.distill take.
--
-- A list of terms has one on the logits (kl or ce) and at most one between block outputs (cka, cosine, mse, gram).
local errors = require "ckaqad.errors"
local loss = {}

--- KL(teacher || student) on the logits, nats per valid token.
--- `top_k` entries of the teacher count; `tail` says what happens to the rest: "bucket" (one more class; default),
--- "renormalized", "truncated", or "full" (the whole vocabulary, top_k ignored). `chunk` tokens of logits exist at a time.
---
--- Example:
---     local kl = cq.loss.kl { top_k = 64, tail = "bucket" }
function loss.kl(options)
  local o = errors.fill("loss.kl", options, { top_k = 1024, tail = "bucket", chunk = 0 })
  errors.choose("option --tail", o.tail, { "bucket", "renormalized", "truncated", "full" })
  if o.top_k < 1 then errors.usage("loss.kl: top_k is %g, wanted at least 1", o.top_k) end
  o.logits = "kl"
  return o
end

--- Cross-entropy with the labels; needs no teacher.
---
--- Example:
---     local terms = { cq.loss.ce(), cq.loss.cka { blocks = "last:4", tokens = 64 } } -- quantization-aware training, tied to the teacher
function loss.ce(options)
  local o = errors.fill("loss.ce", options, { chunk = 0 })
  o.logits = "ce"
  return o
end

--- Policy gradient: the cross-entropy of a model's own answers, each token counted with its answer's weight (its advantage), so
--- that what was better than expected becomes likelier. Batches come from `cq.batch_of`; needs no teacher.
---
--- Example:
---     local terms = { cq.loss.policy() }
function loss.policy(options)
  local o = errors.fill("loss.policy", options, { chunk = 0 })
  o.logits = "policy"
  return o
end

local function layer(name, options, more)
  local defaults = { blocks = "all", tokens = 512 }
  for key, value in pairs(more or {}) do defaults[key] = value end
  local o = errors.fill("loss." .. name, options, defaults)
  if o.tokens < 4 then errors.usage("loss.%s: tokens is %g, wanted at least 4", name, o.tokens) end
  o.layers = name
  return o
end

--- 1 - linear CKA between teacher and student block outputs at `tokens` sampled rows of each micro-batch.
--- `blocks` is a selector (all, mamba, attention, moe, mlp, first:2, last:8, every:4, 3,7,11, none);
--- `estimator` "unbiased" (default) or "biased".
---
--- Example:
---     local terms = { cq.loss.kl(), cq.loss.cka { blocks = "attention,last:2", tokens = 128, estimator = "biased" } }
function loss.cka(options)
  local o = layer("cka", options, { estimator = "unbiased" })
  errors.choose("option --estimator", o.estimator, { "unbiased", "biased" })
  if o.estimator == "unbiased" then o.layers = "cka_unbiased" end
  return o
end

--- Mean over the sampled rows of 1 - cosine, in CKA's place.
---
--- Example:
---     local terms = { cq.loss.kl(), cq.loss.cosine { blocks = "every:4" } }
function loss.cosine(options) return layer("cosine", options) end

--- Relative squared error |X - Y|^2 / |Y|^2 of the sampled rows, in CKA's place.
---
--- Example:
---     local terms = { cq.loss.kl(), cq.loss.mse { tokens = 256 } }
function loss.mse(options) return layer("mse", options) end

--- Relative squared error of the centred Gram matrices, in CKA's place.
---
--- Example:
---     local terms = { cq.loss.kl(), cq.loss.gram { blocks = "mamba" } }
function loss.gram(options) return layer("gram", options) end

-- The options that a constructor knows; a recipe gives every form the same table.
local function only(options, names)
  local out = {}
  for _, name in ipairs(names) do out[name] = options[name] end
  return out
end

--- The loss on the logits by name: "kl" (options `top_k`, `tail`) or "ce" (which needs none of them).
function loss.logits(name, options)
  errors.choose("option --loss", name, { "kl", "ce" })
  local o = errors.fill("loss.logits", options, { top_k = 1024, tail = "bucket", chunk = 0 })
  return name == "kl" and loss.kl(o) or loss.ce(only(o, { "chunk" }))
end

--- The loss between block outputs by name: "cka", "cosine", "mse", "gram"; nil for "none". Options: `blocks`, `tokens`,
--- and for cka `estimator`.
---
--- Example:
---     local form = cq.loss.layer("cka", { blocks = "all", tokens = 64 })
---     print(cq.loss.layer("none")) --> nil
---     local terms = { cq.loss.logits("kl", { top_k = 64 }), form }
function loss.layer(name, options)
  errors.choose("option --layer", name, { "cka", "cosine", "mse", "gram", "none" })
  local o = errors.fill("loss.layer", options, { blocks = "all", tokens = 512, estimator = "unbiased" })
  if name == "none" then return nil end
  return name == "cka" and loss.cka(o) or loss[name](only(o, { "blocks", "tokens" }))
end

--- The term on the logits and the term between blocks of a list of terms; an error when it has two of a kind or none.
function loss.split(terms)
  local logits, layers
  for _, term in ipairs(terms) do
    if term.logits then
      if logits then errors.usage("terms: two losses on the logits, wanted one") end
      logits = term
    elseif term.layers then
      if layers then errors.usage("terms: two losses between blocks, wanted one") end
      layers = term
    else
      errors.usage("terms: got a value that is no loss, wanted cq.loss.kl {...} and the like")
    end
  end
  if not logits and not layers then errors.usage("terms: the list is empty, wanted cq.loss.kl {...} and the like") end
  return logits, layers
end

return errors.strict(loss, "loss")
