-- eval.lua - how far a student is from its teacher on documents it was not trained on.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local C, call = native.C, native.call

local eval = {}

-- The C object of a pair, made by the plan.
function eval.open(teacher, student)
  student.evaluators = student.evaluators or {}
  student.evaluators[teacher] = native.open("cq_eval", "cq_eval_open", teacher.c, student.c)
  return student.evaluators[teacher]
end

--- Compares two models of a plan on batches (`data:holdout()`): { kl (nats a token), perplexity, perplexity_teacher, top1
--- (fraction), cka (mean), cka_min, cka_min_block, cka_blocks = list over blocks, tokens }.
function eval.compare(teacher, student, batches)
  local e = student.evaluators and student.evaluators[teacher]
  if not e then errors.usage("eval: this pair is not in the plan, wanted run:plan { eval = true, ... }") end
  C.cq_eval_reset(e)
  for _, batch in ipairs(batches) do call.cq_eval_add(e, student:stream(), batch) end
  local r = native.new "cq_eval_result"
  call.cq_eval_result_get(e, r)
  local blocks = {}
  for i = 0, student.n_blocks - 1 do blocks[i + 1] = r.cka[i] end
  return {
    kl = r.kl, top1 = r.top1, perplexity = r.perplexity_student, perplexity_teacher = r.perplexity_teacher,
    tokens = tonumber(r.tokens), cka = r.cka_mean, cka_min = r.cka_min, cka_min_block = tonumber(r.cka_min_block),
    cka_blocks = blocks,
  }
end

return errors.strict(eval, "eval")
