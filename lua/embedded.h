/// embedded.h - the Lua modules inside the program, written by embed.lua.
#pragma once
#include <stddef.h>

typedef struct cq_embedded {
    const char *name; ///< what `require` takes, for example ckaqad.json
    const char *file; ///< json.lua
    size_t bytes;
    const char *text;
} cq_embedded;

/// Ends with a NULL name.
extern const cq_embedded cq_embedded_modules[];

/// Every function of the public headers, so that the linker finds them all; ends with NULL.
extern void (*const cq_embedded_api[])(void);
