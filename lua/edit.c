/// edit.c - line editing at the prompt through libedit: history, completion, Ctrl-C.
///
/// A line is waited for with the signals blocked and pselect unblocking them, so a Ctrl-C is either
/// seen before the wait or ends it; none is lost in between and none hits the next line. What
/// completion proposes is decided in Lua (lua/ckaqad/complete.lua), called protected: an error
/// there is a beep, a Ctrl-C there ends the line.
#include "lua/edit.h"
#include <lauxlib.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#ifdef CQ_EDIT
#include <errno.h>
#include <histedit.h>
#include <locale.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>
#include <wchar.h>
#endif

/* One terminal, one editor: libedit's callbacks and signal handlers reach nothing but globals. */
static volatile int *stop_signal;

/* Stop signals that end the prompt, not only what runs there. */
static bool leaves(int signal) { return signal == SIGTERM || signal == SIGHUP; }

/* forever(f): calls f until it returns without an error, and returns what it returned. Errors are
 * shown here, where no instruction of Lua runs that a late Ctrl-C could turn into another error.
 * SIGTERM and SIGHUP go on up. */
static int edit_forever(lua_State *L) {
    luaL_checktype(L, 1, LUA_TFUNCTION);
    for (;;) {
        lua_settop(L, 1);
        lua_pushvalue(L, 1);
        if (lua_pcall(L, 0, 1, 0) == 0)
            return 1;
        lua_sethook(L, NULL, 0, 0); /* a hook that insists has been heard */
        const char *message = lua_tostring(L, -1);
        if (lua_istable(L, -1)) {
            lua_pushliteral(L, "exit");
            lua_rawget(L, 2);
            if (leaves((int)lua_tointeger(L, -1) - 128)) {
                lua_settop(L, 2);
                return lua_error(L);
            }
            lua_pushliteral(L, "message");
            lua_rawget(L, 2);
            message = lua_tostring(L, -1);
        }
        fflush(stdout);
        fprintf(stderr, "ckaqad: %s\n", message ? message : "error");
    }
}

#ifdef CQ_EDIT
/* A Ctrl-C that has been answered is forgotten, with its hook. */
static void forget_stop(lua_State *L) {
    *stop_signal = 0;
    lua_sethook(L, NULL, 0, 0);
}

static EditLine *editor;
static History *past;
static const char *prompt_text = "> ";
static lua_State
    *completing; /* where the completion function is callable; NULL: nobody completes */
static int completer = LUA_NOREF;
static volatile sig_atomic_t resized, continued;

static void on_terminal(int signal) {
    if (signal == SIGWINCH)
        resized = 1;
    else
        continued = 1;
}

static char *show_prompt(EditLine *el) {
    (void)el;
    return (char *)(size_t)prompt_text;
}

/* After a new window size or a return from Ctrl-Z the line is drawn again. */
static void restore_terminal(EditLine *el) {
    if (resized)
        el_resize(el);
    if (continued)
        el_set(el, EL_PREP_TERM, 1);
    if (resized || continued)
        el_set(el, EL_REFRESH);
    resized = continued = 0;
}

/* One character of the terminal: 1, 0 at the end of input, -1 after a stop signal. */
static int next_char(EditLine *el, wchar_t *out) {
    sigset_t block, before;
    mbstate_t state;
    int result = -1;
    memset(&state, 0, sizeof state);
    sigemptyset(&block);
    sigaddset(&block, SIGINT);
    sigaddset(&block, SIGTERM);
    sigaddset(&block, SIGHUP);
    sigaddset(&block, SIGWINCH);
    sigaddset(&block, SIGCONT);
    sigprocmask(SIG_BLOCK, &block, &before);
    while (!*stop_signal) {
        char byte;
        fd_set set;
        restore_terminal(el);
        FD_ZERO(&set);
        FD_SET(STDIN_FILENO, &set);
        if (pselect(STDIN_FILENO + 1, &set, NULL, NULL, NULL, &before) < 0 && errno == EINTR)
            continue;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n <= 0) {
            result = 0;
            break;
        }
        if (byte == 0) /* a Ctrl-D typed before the terminal was raw, or Ctrl-Space */
            continue;
        size_t used = mbrtowc(out, &byte, 1, &state);
        if (used == (size_t)-2)
            continue;
        if (used == (size_t)-1) { /* no character of this locale: drop it */
            memset(&state, 0, sizeof state);
            continue;
        }
        result = 1;
        break;
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    return result;
}

/* Tab: complete(text before the cursor) -> what to insert, a text to show below. */
static unsigned char complete_line(EditLine *el, int key) {
    (void)key;
    const LineInfo *info = el_line(el);
    lua_State *L = completing;
    if (!L || !lua_checkstack(L, 4))
        return CC_ERROR;
    int top = lua_gettop(L);
    unsigned char result = CC_REFRESH;
    lua_rawgeti(L, LUA_REGISTRYINDEX, completer);
    lua_pushlstring(L, info->buffer, (size_t)(info->cursor - info->buffer));
    if (lua_pcall(L, 1, 2, 0)) {
        result = CC_ERROR;
        if (lua_istable(L, -1)) { /* a stop: what was typed is given up, as without completion */
            lua_pushliteral(L, "exit");
            lua_rawget(L, -2);
            if (lua_tointeger(L, -1) > 128) {
                *stop_signal = (int)lua_tointeger(L, -1) - 128;
                result = CC_EOF;
            }
        }
    } else {
        const char *insert = lua_tostring(L, top + 1), *below = lua_tostring(L, top + 2);
        if (insert && *insert && el_insertstr(el, insert) < 0)
            result = CC_ERROR;
        else if (below && *below) {
            printf("\n%s\n", below);
            fflush(stdout);
            result = CC_REDISPLAY;
        } else if (!insert || !*insert)
            result = CC_REFRESH_BEEP;
    }
    lua_settop(L, top);
    return result;
}

static void open_editor(void) {
    struct sigaction action = {.sa_handler = on_terminal, .sa_flags = SA_RESTART};
    sigaction(SIGWINCH, &action, NULL);
    sigaction(SIGCONT, &action, NULL);
    setlocale(LC_CTYPE, "");
    editor = el_init("ckaqad", stdin, stdout, stderr);
    if (!editor)
        return;
    el_wset(editor, EL_GETCFN, next_char);
    el_set(editor, EL_PROMPT, show_prompt);
    el_set(editor, EL_EDITOR, "emacs");
    el_set(editor, EL_ADDFN, "cq-complete", "complete names", complete_line);
    el_set(editor, EL_BIND, "^I", "cq-complete", NULL);
    el_set(editor, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_set(editor, EL_BIND, "\033[3~", "ed-delete-next-char", NULL);
    el_set(editor, EL_BIND, "\033[1;5C", "em-next-word", NULL);
    el_set(editor, EL_BIND, "\033[1;5D", "ed-prev-word", NULL);
    el_source(editor, NULL);
    past = history_init();
    HistEvent event;
    if (past) {
        history(past, &event, H_SETSIZE, 2000);
        history(past, &event, H_SETUNIQUE, 1);
        el_set(editor, EL_HIST, history, past);
    }
}

/* history(path): reads what was typed before; lines are written there as they come. */
static int edit_history(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    HistEvent event;
    if (!editor)
        open_editor();
    if (past)
        history(past, &event, H_LOAD, path);
    lua_pushstring(L, path);
    lua_setfield(L, LUA_REGISTRYINDEX, "ckaqad.history");
    return 0;
}

static void remember(lua_State *L, const char *line) {
    HistEvent event;
    if (!past || line[strspn(line, " \t\r\n")] == 0)
        return;
    history(past, &event, H_ENTER, line);
    lua_getfield(L, LUA_REGISTRYINDEX, "ckaqad.history");
    if (lua_tostring(L, -1))
        history(past, &event, H_SAVE, lua_tostring(L, -1));
    lua_pop(L, 1);
}

/* Keeps the completion function of this call, if there is one. */
static void set_completer(lua_State *L, int index) {
    luaL_unref(L, LUA_REGISTRYINDEX, completer);
    completer = LUA_NOREF;
    completing = NULL;
    if (!lua_isfunction(L, index))
        return;
    lua_pushvalue(L, index);
    completer = luaL_ref(L, LUA_REGISTRYINDEX);
    completing = L;
}

/* readline(prompt, complete) -> a line without its newline; nil at the end of input, nil and the
 * signal after SIGTERM and SIGHUP; after Ctrl-C an empty line and true. */
static int edit_readline(lua_State *L) {
    prompt_text = luaL_checkstring(L, 1);
    set_completer(L, 2);
    if (!editor)
        open_editor();
    if (!editor)
        return luaL_error(L, "the terminal cannot be used for line editing");
    if (!leaves(*stop_signal))
        forget_stop(L);
    resized = 1;
    int n = 0;
    const char *line = el_gets(editor, &n);
    int signal = *stop_signal;
    completing = NULL;
    forget_stop(L);
    if (leaves(signal)) {
        lua_pushnil(L);
        lua_pushinteger(L, signal);
        return 2;
    }
    if (signal) {
        puts("^C");
        lua_pushliteral(L, "");
        lua_pushboolean(L, 1);
        return 2;
    }
    if (!line)
        return 0;
    size_t length = strlen(line);
    if (length && line[length - 1] == '\n')
        length--;
    lua_pushlstring(L, line, length);
    remember(L, lua_tostring(L, -1));
    return 1;
}
#endif

void edit_open(lua_State *L, volatile int *stop) {
    stop_signal = stop;
    lua_pushcfunction(L, edit_forever);
    lua_setfield(L, -2, "forever");
#ifdef CQ_EDIT
    lua_pushcfunction(L, edit_readline);
    lua_setfield(L, -2, "readline");
    lua_pushcfunction(L, edit_history);
    lua_setfield(L, -2, "history");
#endif
}
