-- Lets specs find the modules without a build: the pure ones need no C library.
package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
