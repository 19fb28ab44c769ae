/// main.c - the program: LuaJIT, the embedded modules, signals and exit codes. The command line is
/// lua/ckaqad/command.lua.
///
/// A stop signal sets a number that every checked call looks at (ffi.lua) and a debug hook that
/// interpreted code runs into; compiled code calls no hooks, so recipes are interpreted. While a
/// run takes its steps the first signal only asks for the end after this step. A third signal that
/// nobody answered ends the process. A hangup comes from the shell and from the kernel both, so
/// only the first counts; under nohup none does. SIGUSR1 asks for a checkpoint. CKAQAD_LUA=DIR
/// takes modules from DIR/ckaqad/ instead.
///
/// Of many ranks only rank 0 has a standard output, and of the ranks that fail one prints its line.
#include "core/ckaqad.h"
#include "lua/edit.h"
#include "lua/embedded.h"
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A signal handler reaches nothing but globals. */
static volatile int stop_signal, defer_stop, stop_later, save_now;
static bool many_ranks;
static volatile sig_atomic_t unanswered, insist, hung_up;
static volatile time_t last_signal;
static lua_State *interpreter;

static int interrupt_text(lua_State *L) {
    lua_getfield(L, 1, "message");
    return 1;
}

/* Throws { exit = 130, message = "interrupted" }, unless a checked call has done so already. After
 * a second signal it throws again and again, until somebody outside Lua takes the hook away: a loop
 * of protected calls may have swallowed the first. */
static void on_hook(lua_State *L, lua_Debug *ar) {
    (void)ar;
    int signal = stop_signal ? stop_signal : insist ? SIGINT : 0;
    if (!insist)
        lua_sethook(L, NULL, 0, 0);
    if (!signal)
        return;
    stop_signal = 0;
    lua_newtable(L);
    lua_pushinteger(L, 128 + signal);
    lua_setfield(L, -2, "exit");
    lua_pushstring(L, signal == SIGTERM  ? "terminated"
                      : signal == SIGHUP ? "hangup"
                                         : "interrupted");
    lua_setfield(L, -2, "message");
    lua_newtable(L);
    lua_pushcfunction(L, interrupt_text);
    lua_setfield(L, -2, "__tostring");
    lua_setmetatable(L, -2);
    lua_error(L);
}

static void on_save(int signal) {
    (void)signal;
    save_now = 1;
}

/* The terminal may be gone: what cannot be said there must not cost the checkpoint. */
static void tell(const char *line) {
    ssize_t written = write(STDERR_FILENO, line, strlen(line));
    (void)written;
}

/* The first hangup, when no other signal is being answered. Nobody may read our output from now. */
static bool new_hangup(void) {
    bool first = !hung_up && !stop_later && !stop_signal;
    hung_up = 1;
    signal(SIGPIPE, SIG_IGN);
    return first;
}

static void on_signal(int signal) {
    if (signal == SIGHUP && !new_hangup())
        return;
    if (defer_stop && !stop_later) {
        stop_later = signal;
        if (!many_ranks) /* there mpirun says so */
            tell("ckaqad: stopping after this step; again stops at once\n");
        return;
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    insist = last_signal && now.tv_sec - last_signal < 3;
    last_signal = now.tv_sec;
    unanswered = stop_signal ? unanswered + 1 : 1;
    if (unanswered == 2)
        tell("ckaqad: stopping after this operation; a third Ctrl-C kills\n");
    if (unanswered > 2)
        _exit(128 + signal);
    stop_signal = signal;
    lua_sethook(interpreter, on_hook, LUA_MASKCALL | LUA_MASKRET | LUA_MASKCOUNT, 1);
}

static int load_module(lua_State *L) {
    const cq_embedded *m = lua_touserdata(L, lua_upvalueindex(1));
    const char *folder = getenv("CKAQAD_LUA");
    char path[4096];
    int status = -1;
    if (folder && *folder) {
        snprintf(path, sizeof path, "%s/ckaqad/%s", folder, m->file);
        if (access(path, R_OK) == 0)
            status = luaL_loadfile(L, path);
    }
    if (status < 0) {
        snprintf(path, sizeof path, "=ckaqad/%s", m->file);
        status = luaL_loadbuffer(L, m->text, m->bytes, path);
    }
    if (status)
        return lua_error(L);
    lua_pushstring(L, m->name);
    lua_call(L, 1, 1);
    return 1;
}

/* ckaqad.host: what only the program knows. */
static int open_host(lua_State *L) {
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    lua_newtable(L);
    static const struct {
        const char *name;
        volatile int *flag;
    } flags[] = {{"stop", &stop_signal},
                 {"defer", &defer_stop},
                 {"later", &stop_later},
                 {"save", &save_now}};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        lua_pushlightuserdata(L, (void *)(size_t)flags[i].flag);
        lua_setfield(L, -2, flags[i].name);
    }
    lua_pushstring(L, cq_version());
    lua_setfield(L, -2, "version");
    if (n > 0) {
        exe[n] = 0;
        lua_pushstring(L, exe);
        lua_setfield(L, -2, "exe");
    }
    lua_pushlightuserdata(L, lua_touserdata(L, lua_upvalueindex(1)));
    lua_setfield(L, -2, "comm");
    edit_open(L, &stop_signal);
    return 1;
}

static void preload(lua_State *L, cq_comm *comm) {
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "preload");
    for (const cq_embedded *m = cq_embedded_modules; m->name; m++) {
        lua_pushlightuserdata(L, (void *)(size_t)m);
        lua_pushcclosure(L, load_module, 1);
        lua_setfield(L, -2, m->name);
    }
    lua_pushlightuserdata(L, comm);
    lua_pushcclosure(L, open_host, 1);
    lua_setfield(L, -2, "ckaqad.host");
    lua_pop(L, 2);
}

static bool wants_traceback(void) {
    const char *value = getenv("CKAQAD_TRACEBACK");
    return value && strcmp(value, "1") == 0;
}

/* Puts what errors.explain makes of a message of Lua's own in its place. */
static void explain(lua_State *L) {
    if (lua_type(L, -1) != LUA_TSTRING)
        return;
    lua_getfield(L, LUA_REGISTRYINDEX, "_LOADED");
    lua_getfield(L, -1, "ckaqad.errors");
    if (lua_istable(L, -1)) {
        lua_getfield(L, -1, "explain");
        lua_pushvalue(L, -4);
        if (lua_pcall(L, 1, 1, 0) == 0) {
            lua_replace(L, -4);
            lua_pop(L, 2);
            return;
        }
        lua_pop(L, 1);
    }
    lua_pop(L, 2);
}

/* Message handler: prints where it happened when that was asked for. */
static int on_error(lua_State *L) {
    explain(L);
    if (wants_traceback()) {
        luaL_traceback(L, L, NULL, 1);
        fprintf(stderr, "%s\n", lua_tostring(L, -1));
        lua_pop(L, 1);
    }
    return 1;
}

static int number_field(lua_State *L, const char *name, int otherwise) {
    lua_getfield(L, -1, name);
    int value = lua_isnumber(L, -1) ? (int)lua_tointeger(L, -1) : otherwise;
    lua_pop(L, 1);
    return value;
}

/* One line on stderr, in one piece: mpirun mixes what ranks write at the same time. */
static void print_error(const char *message) {
    char line[4096];
    int n = snprintf(line, sizeof line - 1, "ckaqad: %s", message ? message : "error");
    size_t end = n < (int)sizeof line - 2 ? (size_t)n : sizeof line - 2;
    for (size_t i = 0; i < end; i++)
        if (line[i] == '\n')
            line[i] = ' ';
    line[end] = '\n';
    fflush(stdout);
    fwrite(line, 1, end + 1, stderr);
}

/* Lets the command tidy up after the error on top of the stack, which stays there. */
static void tidy(lua_State *L) {
    lua_getfield(L, LUA_REGISTRYINDEX, "_LOADED");
    lua_getfield(L, -1, "ckaqad.command");
    if (lua_istable(L, -1)) {
        lua_getfield(L, -1, "failed");
        if (lua_pcall(L, 0, 0, 0))
            lua_pop(L, 1);
    }
    lua_pop(L, 2);
}

/* Prints an error and returns its exit code; where there are other ranks, ends them too. */
static int fail(cq_comm *comm, int code, const char *message) {
    print_error(cq_comm_failed(comm, code, message));
    cq_comm_abort(comm, code);
    return code;
}

/* The exit code of the error on top of the stack. */
static int report(lua_State *L, cq_comm *comm, int status) {
    if (status == LUA_ERRMEM)
        return fail(comm, cq_exit_code(CQ_ENOMEM), "not enough memory");
    if (!lua_istable(L, -1))
        return fail(comm, cq_exit_code(CQ_EUSAGE), lua_tostring(L, -1));
    lua_getfield(L, -1, "quiet");
    bool quiet = lua_toboolean(L, -1);
    lua_pop(L, 1);
    int code = number_field(L, "exit", -1);
    if (code < 0)
        code = cq_exit_code(number_field(L, "status", CQ_EUSAGE));
    lua_getfield(L, -1, "message");
    if (!quiet)
        fail(comm, code, lua_tostring(L, -1));
    lua_pop(L, 1);
    return code;
}

static int run(lua_State *L, cq_comm *comm, int argc, char **argv) {
    lua_pushcfunction(L, on_error);
    lua_getglobal(L, "require");
    lua_pushliteral(L, "ckaqad.command");
    int status = lua_pcall(L, 1, 1, 1);
    if (!status) {
        lua_getfield(L, -1, "main");
        lua_createtable(L, argc, 0);
        for (int i = 1; i < argc; i++) {
            lua_pushstring(L, argv[i]);
            lua_rawseti(L, -2, i);
        }
        status = lua_pcall(L, 1, 0, 1);
    }
    if (!status)
        return 0;
    signal(SIGINT, SIG_IGN); /* what is begun here is short and ends */
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    insist = stop_signal = 0;
    lua_sethook(L, NULL, 0, 0);
    tidy(L);
    return report(L, comm, status);
}

/* Signals get a stack of their own: oneDNN 2.6's AVX kernels keep values far below the stack
 * pointer, where the system would put the signal's frame, and the heap was found corrupted. */
static void use_signal_stack(void) {
    enum { BYTES = 1 << 17 };
    static char room[BYTES];
    sigaltstack(&(stack_t){.ss_sp = room, .ss_size = BYTES}, NULL);
}

/* The ranks of this run; an error has been printed, by one of the processes. */
static int open_ranks(cq_comm **comm, int argc, char **argv) {
    enum { PATIENCE = 60 };
    char command[1024] = "";
    size_t at = 0;
    for (int i = 0; i < argc && at < sizeof command; i++)
        at += (size_t)snprintf(command + at, sizeof command - at, i ? " %s" : "%s", argv[i]);
    cq_launch launch;
    int status = cq_launch_find(&launch, command);
    if (!status)
        status = cq_comm_open(comm, &launch, PATIENCE);
    if (status && launch.rank == 0)
        print_error(cq_error());
    if (status)
        return status;
    many_ranks = cq_comm_size(*comm) > 1;
    if (cq_comm_rank(*comm) > 0 && !freopen("/dev/null", "w", stdout))
        return cq_fail(CQ_EIO, "standard output: cannot be silenced");
    return CQ_OK;
}

int main(int argc, char **argv) {
    cq_comm *comm = NULL;
    int status = open_ranks(&comm, argc, argv);
    if (status)
        return cq_exit_code(status);
    lua_State *L = luaL_newstate();
    if (!L)
        return fail(comm, cq_exit_code(CQ_ENOMEM), "not enough memory");
    interpreter = L;
    use_signal_stack();
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    struct sigaction before;
    if (sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        sigaction(SIGHUP, &action, NULL);
    action = (struct sigaction){.sa_handler = on_save, .sa_flags = SA_RESTART | SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    luaL_openlibs(L);
    preload(L, comm);
    int code = run(L, comm, argc, argv);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    lua_close(L);
    if (fflush(stdout) != 0 && code == 0)
        return fail(comm, cq_exit_code(CQ_EIO), "standard output: cannot be written");
    cq_comm_close(comm);
    return code;
}
