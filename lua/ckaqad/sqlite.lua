-- sqlite.lua - the few functions of SQLite that the run index needs, with its result codes turned into errors.
--
-- The program is linked with the library, so its symbols are found in the process; a plain luajit loads libsqlite3.so.0. An error
-- has `sqlite`, SQLite's primary result code. No callback from C into Lua: LuaJIT's compiled code cannot take one.
local ffi = require "ffi"
local errors = require "ckaqad.errors"

ffi.cdef [[
typedef struct sqlite3 sqlite3;
typedef struct sqlite3_stmt sqlite3_stmt;
int sqlite3_libversion_number(void);
int sqlite3_open_v2(const char *path, sqlite3 **out, int flags, const char *vfs);
int sqlite3_close_v2(sqlite3 *db);
int sqlite3_busy_timeout(sqlite3 *db, int milliseconds);
const char *sqlite3_errmsg(sqlite3 *db);
int sqlite3_exec(sqlite3 *db, const char *sql, void *callback, void *argument, char **message);
int sqlite3_prepare_v2(sqlite3 *db, const char *sql, int bytes, sqlite3_stmt **out, const char **rest);
int sqlite3_step(sqlite3_stmt *s);
int sqlite3_reset(sqlite3_stmt *s);
int sqlite3_finalize(sqlite3_stmt *s);
int sqlite3_stmt_readonly(sqlite3_stmt *s);
int sqlite3_bind_null(sqlite3_stmt *s, int at);
int sqlite3_bind_double(sqlite3_stmt *s, int at, double value);
int sqlite3_bind_int64(sqlite3_stmt *s, int at, int64_t value);
int sqlite3_bind_text(sqlite3_stmt *s, int at, const char *text, int bytes, intptr_t release);
int sqlite3_column_count(sqlite3_stmt *s);
const char *sqlite3_column_name(sqlite3_stmt *s, int at);
int sqlite3_column_type(sqlite3_stmt *s, int at);
double sqlite3_column_double(sqlite3_stmt *s, int at);
const char *sqlite3_column_text(sqlite3_stmt *s, int at);
int sqlite3_column_bytes(sqlite3_stmt *s, int at);
]]

local function find_library()
  if pcall(function() return ffi.C.sqlite3_libversion_number end) then return ffi.C end
  local ok, library = pcall(ffi.load, "libsqlite3.so.0")
  if not ok then errors.raise(errors.IO, "SQLite: %s (Debian package libsqlite3-0)", tostring(library)) end
  return library
end
local C -- found when the first database is opened

local OK, ROW, DONE = 0, 100, 101
local READONLY, READWRITE, CREATE = 1, 2, 4
local INTEGER, FLOAT, NULL = 1, 2, 5
local COPY = -1 -- SQLITE_TRANSIENT: SQLite keeps a copy of bound text

local sqlite = { ERROR = 1, BUSY = 5, READONLY = 8, IOERR = 10, CORRUPT = 11, FULL = 13, CANTOPEN = 14, NOTADB = 26 }
local Database = {}
Database.__index = Database
local Statement = {}
Statement.__index = Statement

local function fail(self, code)
  local e = errors.new(code % 256 == sqlite.ERROR and errors.USAGE or errors.IO,
    ("%s: %s"):format(self.path, ffi.string(C.sqlite3_errmsg(self.c))))
  e.sqlite = code % 256
  error(e, 0)
end

-- Opens a database, made when missing. Options: `readonly` (then it must exist), `timeout` in seconds that a call waits for another
-- process (10).
function sqlite.open(path, given)
  local o = errors.fill("sqlite.open", given, { readonly = false, timeout = 10 })
  C = C or find_library()
  local out = ffi.new "sqlite3 *[1]"
  local code = C.sqlite3_open_v2(path, out, o.readonly and READONLY or READWRITE + CREATE, nil)
  local self = setmetatable({ c = ffi.gc(out[0], C.sqlite3_close_v2), path = path }, Database)
  if code ~= OK then fail(self, code) end
  C.sqlite3_busy_timeout(self.c, o.timeout * 1000)
  return self
end

function Database:close()
  if not self.c then return end
  C.sqlite3_close_v2(ffi.gc(self.c, nil))
  self.c = nil
end

-- Runs statements that give no rows.
function Database:exec(sql)
  local code = C.sqlite3_exec(self.c, sql, nil, nil, nil)
  if code ~= OK then fail(self, code) end
end

-- One statement, compiled. `s:run(...)` binds values and runs it, `s:rows(...)` gives its rows.
function Database:prepare(sql)
  local out, rest = ffi.new "sqlite3_stmt *[1]", ffi.new "const char *[1]"
  local text = ffi.new("char[?]", #sql + 1, sql)
  local code = C.sqlite3_prepare_v2(self.c, text, #sql, out, rest)
  if code ~= OK then fail(self, code) end
  if out[0] == nil then errors.usage("%s: empty SQL statement", self.path) end
  local s = setmetatable({ c = ffi.gc(out[0], C.sqlite3_finalize), db = self }, Statement)
  s.more = ffi.string(rest[0]):find("[^%s;]") ~= nil
  return s
end

local function bind_one(s, i, value)
  local kind = type(value)
  if kind == "nil" then return C.sqlite3_bind_null(s, i) end
  if kind == "string" then return C.sqlite3_bind_text(s, i, value, #value, COPY) end
  if kind == "boolean" then return C.sqlite3_bind_int64(s, i, value and 1 or 0) end
  if value == math.floor(value) and math.abs(value) < 2 ^ 62 then return C.sqlite3_bind_int64(s, i, value) end
  return C.sqlite3_bind_double(s, i, value)
end

local function bind(self, count, ...)
  for i = 1, count do
    local code = bind_one(self.c, i, (select(i, ...)))
    if code ~= OK then fail(self.db, code) end
  end
end

-- Runs the statement to its end; values replace its question marks.
function Statement:run(...)
  bind(self, select("#", ...), ...)
  local code
  repeat code = C.sqlite3_step(self.c) until code ~= ROW
  C.sqlite3_reset(self.c)
  if code ~= DONE then fail(self.db, code) end
end

-- Columns' names, in order.
function Statement:columns()
  local names = {}
  for i = 1, C.sqlite3_column_count(self.c) do names[i] = ffi.string(C.sqlite3_column_name(self.c, i - 1)) end
  return names
end

local function value_of(s, i)
  local kind = C.sqlite3_column_type(s, i)
  if kind == NULL then return nil end
  if kind == INTEGER or kind == FLOAT then return C.sqlite3_column_double(s, i) end
  local text = C.sqlite3_column_text(s, i)
  return ffi.string(text, C.sqlite3_column_bytes(s, i))
end

-- A list of the rows, each a table from column name to value; NULL is absent. `poll` is called before each row.
function Statement:rows(poll, ...)
  bind(self, select("#", ...), ...)
  local names, list, s = self:columns(), {}, self.c
  while true do
    if poll then poll() end
    local code = C.sqlite3_step(s)
    if code ~= ROW then
      C.sqlite3_reset(s)
      if code ~= DONE then fail(self.db, code) end
      return list
    end
    local row = {}
    for i = 1, #names do row[names[i]] = value_of(s, i - 1) end
    list[#list + 1] = row
  end
end

-- Whether the statement changes nothing.
function Statement:readonly() return C.sqlite3_stmt_readonly(self.c) ~= 0 end

-- Ends the statement now instead of when it is collected: an unfinished one holds a lock.
function Statement:close()
  C.sqlite3_finalize(ffi.gc(self.c, nil))
  self.c = nil
end

return sqlite
