/// edit.c - line editing at the prompt through libedit: a line, the history, Ctrl-C.
#include "lua/edit.h"
#include <lauxlib.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef CQ_EDIT
#include <editline/readline.h>

/* libedit keeps one editor a process; so is the flag that ends a line. */
static volatile int *stop_signal;

static int edit_history(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    using_history();
    stifle_history(2000);
    read_history(path);
    lua_pushstring(L, path);
    lua_setfield(L, LUA_REGISTRYINDEX, "ckaqad.history");
    return 0;
}

/* readline(prompt) -> line or nil; after Ctrl-C an empty line and true. */
static int edit_readline(lua_State *L) {
    char *line = readline(luaL_checkstring(L, 1));
    if (*stop_signal) {
        *stop_signal = 0;
        lua_sethook(L, NULL, 0, 0);
        free(line);
        fputc('\n', stdout);
        lua_pushliteral(L, "");
        lua_pushboolean(L, 1);
        return 2;
    }
    if (!line)
        return 0;
    if (*line) {
        add_history(line);
        lua_getfield(L, LUA_REGISTRYINDEX, "ckaqad.history");
        if (lua_tostring(L, -1))
            write_history(lua_tostring(L, -1));
    }
    lua_pushstring(L, line);
    free(line);
    return 1;
}
#endif

void edit_open(lua_State *L, volatile int *stop) {
#ifdef CQ_EDIT
    stop_signal = stop;
    lua_pushcfunction(L, edit_readline);
    lua_setfield(L, -2, "readline");
    lua_pushcfunction(L, edit_history);
    lua_setfield(L, -2, "history");
#else
    (void)L, (void)stop;
#endif
}
