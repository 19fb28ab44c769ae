-- server.lua - answers from an OpenAI-compatible server (vLLM, SGLang, TensorRT-LLM), asked by curl, many requests at a time.
--
-- Requests and replies are files of a folder in /tmp that is removed at the end; the key (environment variable OPENAI_API_KEY) stands in
-- one of them, which nobody else may read, and not on a command line.
local native = require "ckaqad.ffi"
local errors = require "ckaqad.errors"
local json = require "ckaqad.json"
local C, call = native.C, native.call

local server = {}

local function read(path)
  local f = io.open(path, "rb")
  local text = f and f:read "*a" or ""
  if f then f:close() end
  return text
end

-- A file that nobody needs after a crash.
local function put(path, text)
  local f, why = io.open(path, "wb")
  if not f then errors.raise(errors.IO, "%s", why) end
  errors.write(f, path, text)
  f:close()
end

local function quoted(text) return '"' .. text:gsub('[\\"]', "\\%0"):gsub("\n", "\\n") .. '"' end

-- Runs curl on requests { url, body (none: GET), out }; each reply lands in its file. Returns the list of HTTP statuses, 0 for none.
local function fetch(dir, list, parallel)
  local key, config, statuses = os.getenv "OPENAI_API_KEY", {}, {}
  for i, one in ipairs(list) do
    local lines = { "url = " .. quoted(one.url), "output = " .. quoted(one.out), "header = \"Content-Type: application/json\"",
      ("write-out = \"%d %%{http_code}\\n\""):format(i) }
    if key and key ~= "" then lines[#lines + 1] = "header = " .. quoted("Authorization: Bearer " .. key) end
    if one.body then
      put(one.out .. ".request", one.body)
      lines[#lines + 1] = "data-binary = " .. quoted("@" .. one.out .. ".request")
    end
    config[i] = table.concat(lines, "\n") .. "\n"
  end
  local text = table.concat(config, "next\n")
  put(dir .. "/config", text)
  os.remove(dir .. "/log")
  local arguments = { "curl", "--config", dir .. "/config", "--silent", "--show-error", "--parallel", "--parallel-max", tostring(parallel),
    "--connect-timeout", "10", "--retry", "3", "--noproxy", "127.0.0.1,localhost" }
  local argv, pid, code = native.new("const char *[?]", #arguments + 1), native.new "int64_t[1]", native.new "int[1]"
  for i, word in ipairs(arguments) do argv[i - 1] = word end
  call.cq_process_start(pid, argv, nil, dir .. "/log")
  while call.cq_process_poll(pid[0], code) == 0 do
    C.cq_process_sleep(0.02)
    local ok, stopped = pcall(native.poll)
    if not ok then
      C.cq_process_signal(pid[0], 15)
      error(stopped, 0)
    end
  end
  if code[0] == 127 then errors.raise(errors.IO, "curl is missing, wanted it in PATH to ask a server") end
  local log = read(dir .. "/log")
  for i, status in log:gmatch "(%d+) (%d%d%d)\n" do statuses[tonumber(i)] = tonumber(status) end
  return statuses, log:match "curl: [^\n]+"
end

-- The reply to a request as a table, or an error that says what came instead.
local function reply(one, status, why, what)
  local text = read(one.out)
  if (status or 0) == 0 then
    errors.raise(errors.IO, "%s: no answer to %s (%s), wanted an OpenAI-compatible server", one.url, what, why or "curl says nothing")
  end
  local ok, value = pcall(json.decode, text, one.url)
  if status ~= 200 or not ok or type(value) ~= "table" then
    local said = ok and type(value) == "table" and type(value.error) == "table" and value.error.message or text:gsub("%s+", " "):sub(1, 200)
    errors.raise(errors.DATA, "%s: HTTP %d to %s: %s", one.url, status, what, tostring(said))
  end
  return value
end

-- "http://host:8000" and "http://host:8000/v1/" are the same server.
local function base(url)
  if not url:find "^https?://[^/]" then errors.usage("option --server: got %q, wanted http://HOST:PORT", url) end
  url = url:gsub("/+$", "")
  return url:find "/v%d+$" and url or url .. "/v1"
end

local function ask(dir, url, questions, o)
  local root, requests, places = base(url), {}, {}
  local name = o.model
  if not name then
    local one = { url = root .. "/models", out = dir .. "/models" }
    local statuses, why = fetch(dir, { one }, 1)
    local list = reply(one, statuses[1], why, "the question for its models").data
    name = type(list) == "table" and type(list[1]) == "table" and list[1].id
    if type(name) ~= "string" then errors.raise(errors.DATA, "%s: names no model, wanted --served=NAME", one.url) end
  end
  for i, question in ipairs(questions) do
    for sample = 1, o.samples do
      local k = #requests + 1
      requests[k] = { url = root .. "/chat/completions", out = ("%s/%d"):format(dir, k), body = json.encode(json.object {
        "model", name, "messages", json.array { json.object { "role", "user", "content", question } }, "max_tokens", o.max_tokens,
        "temperature", o.temperature, "top_p", o.top_p, "seed", o.seed * 1000003 + k }) }
      places[k] = { prompt = i, sample = sample }
    end
  end
  local begun, tokens = native.clock(), 0
  local statuses, why = fetch(dir, requests, o.parallel)
  for k, one in ipairs(requests) do
    local place = places[k]
    local value = reply(one, statuses[k], why, ("question %d"):format(place.prompt))
    local choice = type(value.choices) == "table" and value.choices[1]
    local message = type(choice) == "table" and choice.message
    if type(message) ~= "table" then
      errors.raise(errors.DATA, "%s: the answer to question %d holds no choices[1].message", one.url, place.prompt)
    end
    place.text = type(message.content) == "string" and message.content or "" -- all of it was thinking, and none was left for an answer
    place.stopped = choice.finish_reason == "stop"
    tokens = tokens + (type(value.usage) == "table" and tonumber(value.usage.completion_tokens) or 0)
  end
  return places, { tokens = tokens, seconds = native.clock() - begun, model = name }
end

--- Asks an OpenAI-compatible server (`url`: http://HOST:PORT) a list of questions, each on its own, through its chat template.
--- Returns what `model:generate` does, { prompt, sample, text, stopped }, and { tokens, seconds, model }. Options: `model` (name there;
--- none: the first one it lists), `samples` (1), `max_tokens` (1024), `temperature` (1), `top_p` (1), `seed` (1; every request has
--- another), `parallel` (requests at a time, 16). An error line names the address, what came and to which question; curl must be there.
--- Source: OpenAI's API reference, POST /v1/chat/completions.
function server.chat(url, questions, options)
  local o = errors.fill("server", options, { model = errors.NONE, samples = 1, max_tokens = 1024, temperature = 1, top_p = 1, seed = 1,
    parallel = 16 })
  base(url)
  local pipe = io.popen "mktemp -d /tmp/ckaqad-ask-XXXXXX" -- nobody else may look into it
  local dir = pipe:read "*l"
  pipe:close()
  if not dir then errors.raise(errors.IO, "no folder could be made in /tmp, wanted one for requests") end
  local ok, answers, work = pcall(ask, dir, url, questions, o)
  call.cq_folder_remove(dir)
  if not ok then error(answers, 0) end
  return answers, work
end

return server
