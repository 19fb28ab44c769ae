require "tests.lua.helper"
local hf = require "ckaqad.hf"
local errors = require "ckaqad.errors"

describe("the Hugging Face cache", function()
  local root, real
  local function write(path, text)
    os.execute(("mkdir -p '%s'"):format(path:match "^(.*)/"))
    local f = assert(io.open(path, "w"))
    f:write(text)
    f:close()
  end

  before_each(function()
    root = os.tmpname()
    os.remove(root)
    local repo = root .. "/hub/models--org--name"
    write(repo .. "/refs/main", "abc\n")
    write(repo .. "/refs/v2", "def")
    write(repo .. "/snapshots/abc/config.json", "{}")
    write(repo .. "/snapshots/def/config.json", "{}")
    write(root .. "/run/nvfp4/config.json", "{}")
    real = os.getenv
    os.getenv = function(name) return ({ HF_HOME = root, HOME = root })[name] end -- luacheck: ignore
  end)
  after_each(function()
    os.getenv = real -- luacheck: ignore
    os.execute("rm -rf '" .. root .. "'")
  end)

  it("is found by HF_HUB_CACHE, then HF_HOME, then the home folder", function()
    assert.equal(root .. "/hub", hf.cache())
    os.getenv = function(name) return ({ HF_HUB_CACHE = "/x", HF_HOME = root })[name] end -- luacheck: ignore
    assert.equal("/x", hf.cache())
    os.getenv = function(name) return ({ HOME = "/h", HF_HOME = "" })[name] end -- luacheck: ignore
    assert.equal("/h/.cache/huggingface/hub", hf.cache())
  end)

  it("gives the snapshot that a ref names", function()
    assert.equal(root .. "/hub/models--org--name/snapshots/abc", hf.resolve "org/name")
    assert.equal(root .. "/hub/models--org--name/snapshots/def", hf.resolve "org/name@v2")
    assert.equal(root .. "/hub/models--org--name/snapshots/abc", hf.resolve "org/name@abc")
  end)

  it("says what to type when the model is not there", function()
    local ok, e = pcall(hf.resolve, "org/other")
    assert.is_false(ok)
    assert.equal(errors.USAGE, e.status)
    assert.matches("hf download org/other", e.message, 1, true)
    local dir, why = hf.cached "org/name@v3"
    assert.is_nil(dir)
    assert.matches("not in the Hugging Face cache", why, 1, true)
  end)

  it("takes a run folder for its export and refuses a folder without config.json", function()
    assert.equal(root .. "/run/nvfp4", hf.resolve(root .. "/run"))
    local ok, e = pcall(hf.resolve, root)
    assert.is_false(ok)
    assert.matches("config.json is missing", e.message, 1, true)
  end)
end)
