require "tests.lua.helper"
local ranks = require "ckaqad.plan_ranks"

-- Nemotron 3 Nano: 23 Mamba-2, 23 MoE and 6 attention blocks; Qwen3-4B: 36 blocks, tied head. Counted here from the published shapes.
local D, V = 2688, 131072
local mamba, attention = 10304 * D + D * 4096, 2 * 4096 * D + 2 * 256 * D
local function class(n, flags)
  local c = { n = n, trained = true }
  for flag in flags:gmatch "%S+" do c[flag] = true end
  return c
end

local none = { activations = 0, scratch = 0, logits = 0, cka = 0 }
local no_work = { f32 = { no = none, yes = none }, bf16 = { no = none, yes = none } }

local function nano(freeze)
  local experts = class(23 * 128 * 2 * 1856 * D, "expert quantized matrix linear product block")
  experts.trained = not freeze
  return {
    classes = {
      experts, class(23 * 2 * 3712 * D + 17 * mamba, "quantized matrix linear product block"),
      class(6 * mamba + 6 * attention, "matrix linear product block"), class(V * D, "matrix linear product"), class(V * D, ""),
      class(23 * 128 * D, "product block"), class(23 * 6144 * 4, "block"),
      class(52 * D + D + 23 * (6144 + 3 * 64 + 4096), "vector block"),
    },
    block = 128 * 2 * 1856 * D + 2 * 3712 * D + 128 * D, quantized_block = 128 * 2 * 1856 * D + 2 * 3712 * D,
    shape = { top_k = 6, experts = 128, heads = 32, head_dim = 128, chunk = 128, vocab = V, hidden = D, mamba_heads = 64,
      mamba_head_dim = 64, state = 128, groups = 8, attention = 6, mamba = 23, moe = 23 },
    work = no_work, cka_operations = 0,
  }
end

local function qwen()
  local d, linear = 2560, 36 * (2560 * 2 * 4096 + 2560 * 2 * 1024 + 3 * 2560 * 9728)
  return {
    classes = { class(linear, "quantized matrix linear product block"), class(151936 * d, "matrix product"),
      class(36 * (2 * d + 2 * 128) + d, "vector block") },
    block = linear / 36, quantized_block = linear / 36,
    shape = { top_k = 0, experts = 0, heads = 32, head_dim = 128, chunk = 0, vocab = 151936, hidden = d, mamba_heads = 0,
      mamba_head_dim = 0, state = 0, groups = 0, attention = 36, mamba = 0, moe = 0 },
    work = no_work, cka_operations = 0,
  }
end

local function combo(changes)
  local c = { freeze = "none", copies = "f32", master = "f32", gradients = "f32", moments = "f32", activations = "f32", recompute = "no",
    offload = "none" }
  for key, value in pairs(changes or {}) do c[key] = value end
  return c
end
local one = { gpus = 1, experts = 1 }

local function near(want, got, relative) assert.is_true(math.abs(got / want - 1) <= relative, ("%.6g, wanted %.6g"):format(got, want)) end

local function count(model)
  local n = 0
  for _, c in ipairs(model.classes) do n = n + c.n end
  return n
end

describe("plan_ranks", function()
  it("counts what is published", function()
    assert.equal(31577937344, count(nano()))
    assert.equal(29374808064, nano().classes[1].n)
    assert.equal(30491811840, nano().classes[1].n + nano().classes[2].n)
    assert.equal(4022468096, count(qwen()))
  end)

  it("has the published operations of a token", function()
    for seq, gf in pairs { [4096] = 0.20, [8192] = 0.40, [32768] = 1.61 } do
      near(gf, ranks.operations(nano(), combo(), seq).attention / 1e9, 0.02)
      near(6 * gf, ranks.operations(qwen(), combo(), seq).attention / 1e9, 0.02)
    end
    local o = ranks.operations(nano(), combo(), 4096)
    near(6.454, o.linear / 1e9, 1e-3)
    near(0.078, o.scan / 1e9, 0.01)
    near(26.9, o.total / 1e9, 2e-3)
    near(33.0, ranks.operations(nano(), combo { recompute = "yes" }, 4096).total / 1e9, 2e-3)
    near(27.7, ranks.operations(nano(), combo(), 8192).total / 1e9, 2e-3)
    near(8.045, ranks.operations(qwen(), combo(), 4096).linear / 1e9, 1e-3)
    near(37.0, ranks.operations(qwen(), combo(), 4096).total / 1e9, 2e-3)
    near(45.5, ranks.operations(qwen(), combo { recompute = "yes" }, 4096).total / 1e9, 2e-3)
  end)

  it("leaves the weight gradients of frozen experts out", function()
    local all, some = ranks.operations(nano(), combo(), 4096), ranks.operations(nano(true), combo(), 4096)
    near(2 * 29374808064 * 6 / 128, all.total - some.total, 1e-9)
  end)

  it("gives the memory of Qwen3-4B's four variants in GiB", function()
    for want, c in pairs {
      [76.4] = combo { copies = "bf16" }, [68.9] = combo { copies = "bf16", gradients = "bf16" },
      [53.9] = combo { copies = "bf16", gradients = "bf16", moments = "bf16" },
      [46.5] = combo { copies = "bf16", gradients = "bf16", moments = "8bit" },
    } do
      near(want, ranks.bytes(qwen(), c, one).total / 2 ^ 30, 3e-3)
    end
  end)

  it("deals out experts and shards what several ranks hold", function()
    local m = nano()
    m.classes = { m.classes[1] }
    local n, c = m.classes[1].n, combo { copies = "bf16" }
    assert.equal(n * (2 + 2 + 4 + 4 + 8), ranks.bytes(m, c, one).total)
    assert.equal(n / 8 * 20, ranks.bytes(m, c, { gpus = 8, experts = 8 }).total)
    assert.equal(n * 12 + n / 8 * 12, ranks.bytes(m, c, { gpus = 8, experts = 1 }).total)
    local b = ranks.bytes(m, c, { gpus = 16, experts = 8 })
    assert.equal(n / 8 + n / 16, b.gradients / 4)
    assert.equal(n / 16, b.moments / 8)
    assert.equal(n * 2, ranks.bytes(m, combo { copies = "bf16" }, one).teacher)
    assert.equal(0.5625 * n, ranks.bytes(m, combo { copies = "packed" }, one).fakequant)
  end)

  it("keeps one copy of frozen experts", function()
    local m, c = nano(true), combo { copies = "packed" }
    local b = ranks.bytes(m, c, one)
    near(2 * 31577937344 + 2 * V * D + 2 * 23 * 128 * D, b.teacher, 1e-4) -- embedding and routers F32
    local trained = 31577937344 - 29374808064
    near(4 * trained, b.gradients, 1e-9)
    near(8 * trained, b.moments, 1e-9)
    near(0.5625 * 30491811840, b.fakequant, 1e-9)
    near(4 * trained + 2 * (6 * mamba + 6 * attention + V * D), b.student, 1e-9)
    assert.is_true(b.total < 140e9)
  end)

  it("needs no teacher beside a cache, but what is frozen", function()
    local plain, cached = combo { copies = "packed" }, combo { copies = "packed", cached = true }
    assert.equal(0, ranks.bytes(nano(), cached, one).teacher)
    assert.equal(2 * 29374808064, ranks.bytes(nano(true), cached, one).teacher)
    local a, b = ranks.operations(qwen(), plain, 4096), ranks.operations(qwen(), cached, 4096)
    near(0.75, b.total / a.total, 1e-9)
    local step, layout = { batch = 8, seq = 1000, micro = 1 }, { gpus = 8, experts = 8 }
    near(4 / 6, ranks.moved(nano(), cached, layout, step).tokens / ranks.moved(nano(), plain, layout, step).tokens, 1e-9)
  end)

  it("moves master and moments, or the teacher's blocks, to the host", function()
    local m, c = nano(true), combo { copies = "packed" }
    local kept, moved = ranks.bytes(m, c, one), ranks.bytes(m, combo { copies = "packed", offload = "optimizer" }, one)
    assert.equal(0, moved.moments)
    near(kept.total - moved.total, moved.host, 1e-9)
    local far = ranks.bytes(m, combo { copies = "packed", offload = "teacher" }, one)
    near(2 * (31577937344 - 2 * V * D + 23 * 128 * D), far.host, 1e-4)
    near(6 * V * D + 4 * m.block, far.teacher, 1e-4)
  end)

  it("sends 742 KB of a token each way to the experts of eight ranks", function()
    local step = { batch = 8, seq = 1000, micro = 1 }
    local moved = ranks.moved(nano(), combo { activations = "bf16" }, { gpus = 8, experts = 8 }, step)
    near(6 * 742e3 * 1000 * 7 / 8, moved.tokens, 1e-3)
    near(8 / 6 * moved.tokens, ranks.moved(nano(), combo { activations = "bf16", recompute = "yes" }, { gpus = 8, experts = 8 },
      step).tokens, 1e-9)
    local data = ranks.moved(qwen(), combo { copies = "bf16" }, { gpus = 4, experts = 1 }, step)
    near(4022468096 * 4 * 3 / 4, data.reduce, 1e-9)
    near((3633315840 * 0.5625 + (4022468096 - 3633315840) * 4) * 3 / 4, data.gather, 1e-9)
    assert.equal(0, ranks.moved(qwen(), combo(), one, step).total)
  end)

  it("adds up seconds, through the slowest cards it needs", function()
    local rates, step = {}, { batch = 16, seq = 4096, micro = 1 }
    for key, value in pairs(ranks.rates) do rates[key] = value end
    local m, c = qwen(), combo()
    local s = ranks.seconds(m, c, one, step, rates, ranks.bytes(m, c, one))
    near(16 * 4096 * 37.0e9 / (790e12 * 0.45), s.compute, 2e-3)
    near(s.compute + s.update, s.total, 1e-12)
    local near_, far = { gpus = 8, experts = 8 }, { gpus = 16, experts = 16 }
    local inside = ranks.seconds(nano(), c, near_, step, rates, ranks.bytes(nano(), c, near_)).between
    local across = ranks.seconds(nano(), c, far, step, rates, ranks.bytes(nano(), c, far)).between
    assert.is_true(across > inside)
    rates.node = rates.link
    assert.is_true(ranks.seconds(nano(), c, far, step, rates, ranks.bytes(nano(), c, far)).between < across)
    c = combo { offload = "optimizer" }
    s = ranks.seconds(m, c, one, step, rates, ranks.bytes(m, c, one))
    near(ranks.bytes(m, c, one).host / 55e9, s.host, 1e-9)
  end)

  it("lays out GPUs by divisors of both", function()
    local function of(gpus, experts)
      local list = {}
      for _, layout in ipairs(ranks.layouts(gpus, experts)) do list[#list + 1] = layout.experts end
      return table.concat(list, " ")
    end
    assert.equal("1", of(4, 0))
    assert.equal("1 2 4", of(4, 128))
    assert.equal("1 2", of(6, 128))
  end)

  it("puts what fits first, the faster before the slower, the exact before the others", function()
    local m = nano(true)
    local o = { step = { batch = 16, seq = 4096, micro = 1 }, limit = 140e9, host = 0, rates = ranks.rates,
      has = function(_, value) return value ~= "packed" end, has_ranks = function() return true end, fixed = {} }
    local list = ranks.search({ experts = m }, 1, o)
    assert.is_true(list[1].fits)
    local seen_short = false
    for _, r in ipairs(list) do
      if not r.fits then seen_short = true end
      assert.is_true(r.fits or seen_short)
      assert.equal(r.combo.copies == "packed", r.lacks.copies == true)
    end
    assert.is_true(seen_short)
    for i = 2, #list do
      assert.is_true(not list[i].fits or list[i].seconds.total > 0.95 * list[1].seconds.total)
    end
    o.limit = 250e9
    assert.equal(0, ranks.search({ experts = m }, 1, o)[1].loss)
    o.fixed = { moments = { ["8bit"] = true } }
    for _, r in ipairs(ranks.search({ experts = m }, 1, o)) do assert.equal("8bit", r.combo.moments) end
    o.limit, o.fixed = 1e9, {}
    list = ranks.search({ experts = m }, 1, o)
    assert.is_false(list[1].fits)
    for _, r in ipairs(list) do assert.is_true(r.short >= list[1].short) end
  end)
end)
