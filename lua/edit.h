/// edit.h - line editing at the prompt: libedit behind two Lua functions.
#pragma once
#include <lua.h>

/// Sets `readline` and `history` in the table on top of the stack; nothing when the program was
/// built without libedit. `stop` is the number of the last unanswered signal.
void edit_open(lua_State *L, volatile int *stop);
