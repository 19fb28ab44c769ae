-- ranks.lua - this process among those that mpirun started: what they agree on, tell each other and do in turn.
--
-- Every rank runs the whole recipe. Micro-batch m of a step is computed by rank m mod size; everything else is computed by all, or,
-- where it is written or printed, done by rank 0 alone. All functions that talk are called by all ranks in the same order.
local errors = require "ckaqad.errors"

local ranks = {}
local native, C, call

-- `rank`, `size`, `first` (this is rank 0), `many`: asked of the library when somebody looks; where it is not loaded, one rank.
setmetatable(ranks, { __index = function(_, key)
  native = package.loaded["ckaqad.ffi"]
  local rank, size = tonumber(native and native.rank) or 0, tonumber(native and native.ranks) or 1
  local known = { rank = rank, size = size, first = rank == 0, many = size > 1 }
  if not native then return known[key] end
  for name, value in pairs(known) do ranks[name] = value end
  C, call = native.C, native.call
  return known[key]
end })

-- Set by a run: one rank adds up as many do; rows of a micro-batch that the run it goes on with had (0: none); whose rows a Gram has;
-- where experts are.
ranks.ordered, ranks.micro, ranks.gram, ranks.moe = false, 0, "micro", "local"

-- Ends all ranks with one line unless their `text` is the same.
function ranks.agree(subject, text)
  if not ranks.many then return end
  call.cq_comm_agree(native.comm, subject, text)
end

-- Rank 0's string on all ranks.
function ranks.share(text)
  if not ranks.many then return text end
  local n = native.new("int64_t[1]", #text)
  C.cq_comm_about(native.comm, "decision")
  call.cq_comm_broadcast(native.comm, n, 8, 0)
  local buffer = native.new("char[?]", tonumber(n[0]) + 1)
  if ranks.first then native.copy(buffer, text, #text) end
  call.cq_comm_broadcast(native.comm, buffer, n[0], 0)
  return native.string(buffer, n[0])
end

-- Rank 0's truth value on all ranks.
function ranks.decide(value) return ranks.share(value and "yes" or "no") == "yes" end

-- The ranks' lists of `n` numbers each, as one list in rank order.
function ranks.gather(list, n, about)
  if not ranks.many then return list end
  local mine, all = native.new("double[?]", math.max(1, n)), native.new("double[?]", math.max(1, n * ranks.size))
  local bytes, out = native.new("int64_t[?]", ranks.size), {}
  for i = 1, n do mine[i - 1] = list[i] end
  for r = 0, ranks.size - 1 do bytes[r] = 8 * n end
  C.cq_comm_about(native.comm, about)
  call.cq_comm_gather(native.comm, all, mine, bytes)
  for i = 1, n * ranks.size do out[i] = all[i - 1] end
  return out
end

-- The sum of the ranks' numbers.
function ranks.sum(x, about)
  local sum = 0
  for _, each in ipairs(ranks.gather({ x }, 1, about)) do sum = sum + each end
  return sum
end

-- The largest of the ranks' numbers, place by place.
function ranks.most(list, about)
  local all, out = ranks.gather(list, #list, about), {}
  for i = 1, #list do
    for r = 0, ranks.size - 1 do out[i] = math.max(out[i] or all[i], all[r * #list + i]) end
  end
  return out
end

-- Runs `f` on rank 0; the others do `meanwhile`, if any, and wait for it.
function ranks.alone(about, f, meanwhile)
  if ranks.first then
    f()
  elseif meanwhile then
    meanwhile()
  end
  if not ranks.many then return end
  C.cq_comm_about(native.comm, about)
  call.cq_comm_barrier(native.comm)
end

-- An error where work is not shared.
function ranks.refuse(what)
  if ranks.many then errors.usage("%s: mpirun started %d ranks, wanted one process", what, ranks.size) end
end

-- Numbers of a pass, in the order of `fields`; NaN where it has none.
local fields = { "tokens", "kl", "top1", "ce", "policy" }
local function numbers(pass, n_blocks, out)
  out[#out + 1] = pass and pass.part.index or 0 / 0
  for _, name in ipairs(fields) do out[#out + 1] = pass and pass[name] or 0 / 0 end
  out[#out + 1] = pass and pass.layer_weight or 0 / 0
  for block = 0, n_blocks - 1 do out[#out + 1] = pass and pass.cka[block] or 0 / 0 end
end

local function number(x) return x == x and x or nil end

-- What `run:log` looks at of all passes of a step with `count` micro-batches, in their order; `passes` are this rank's.
function ranks.passes(passes, count, n_blocks)
  if not ranks.many then return passes end
  local each, width, mine = math.ceil(count / ranks.size), 2 + #fields + n_blocks, {}
  for i = 1, each do numbers(passes[i], n_blocks, mine) end
  local all, list = ranks.gather(mine, each * width, "results"), {}
  for at = 0, #all - 1, width do
    if number(all[at + 1]) then
      local pass = { index = all[at + 1], layer_weight = number(all[at + 2 + #fields]), cka = {} }
      for k, name in ipairs(fields) do pass[name] = number(all[at + 1 + k]) end
      for block = 0, n_blocks - 1 do pass.cka[block] = number(all[at + 3 + #fields + block]) end
      list[#list + 1] = pass
    end
  end
  table.sort(list, function(a, b) return a.index < b.index end)
  return list
end

-- Threads of this rank when nobody chose (0: all): its share of the processors, where mpirun has not bound it to some.
function ranks.threads()
  if not ranks.many then return 0 end
  local here = tonumber(os.getenv "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
  local processors = tonumber(C.cq_threads_set(0))
  if processors < tonumber(C.cq_processors()) then return processors end
  return math.max(1, math.floor(processors / here))
end

-- Bytes that all ranks have sent so far, a list of name of collective and number in turn; nil where there is one rank.
function ranks.bytes()
  if not ranks.many then return nil end
  local mine, out, n = {}, {}, tonumber(C.CQ_COMM_N)
  for kind = 0, n - 1 do mine[kind + 1] = tonumber(C.cq_comm_bytes(native.comm, kind)) end
  local all = ranks.gather(mine, n, "bytes sent")
  for kind = 0, n - 1 do
    local sum = 0
    for r = 0, ranks.size - 1 do sum = sum + all[r * n + kind + 1] end
    out[#out + 1], out[#out + 2] = native.string(C.cq_collective_name(kind)), sum
  end
  return out
end

return ranks
