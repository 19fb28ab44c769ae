/// edit.h - what the prompt needs from C: line editing with libedit, and a loop that no error
/// leaves.
#pragma once
#include <lua.h>

/// Sets `readline`, `history` (only when the program was built with libedit) and `forever` in the
/// table on top of the stack. `stop`: the number of the last unanswered stop signal, 0 for none.
void edit_open(lua_State *L, volatile int *stop);
