# install.cmake - what `cmake --install` puts where: program, libraries, headers, package files, man page, completion.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS ckaqad RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(TARGETS ckaqad_static ckaqad_shared
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
file(GLOB PUBLIC_HEADERS CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR} core/*.h core/*/*.h)
list(FILTER PUBLIC_HEADERS EXCLUDE REGEX "_impl\\.h$")
list(APPEND PUBLIC_HEADERS kernels/kernels.h kernels/losses.h kernels/stream.h kernels/kernels.def kernels/nvfp4.h)
foreach(header ${PUBLIC_HEADERS})
  get_filename_component(folder ${header} DIRECTORY)
  install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/ckaqad/${folder})
endforeach()

install(FILES ${LUA_MODULES} DESTINATION ${CMAKE_INSTALL_DATADIR}/lua/5.1/ckaqad)
install(DIRECTORY recipes/ DESTINATION ${CMAKE_INSTALL_DATADIR}/ckaqad/recipes
  FILES_MATCHING PATTERN "*.lua" PATTERN "*.json" PATTERN "*.jsonl" PATTERN "*.safetensors")
install(FILES core/packaging/ckaqad.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES core/packaging/ckaqad.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
  RENAME ckaqad)

# the file finds its own prefix, so an installed tree can be moved
file(RELATIVE_PATH PC_UP /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
set(PC_PREFIX "\${pcfiledir}/${PC_UP}")
configure_file(core/packaging/ckaqad.pc.in ckaqad.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/ckaqad.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
configure_package_config_file(core/packaging/ckaqad-config.cmake.in ckaqad-config.cmake
  PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ckaqad)
write_basic_package_version_file(ckaqad-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/ckaqad-config.cmake ${CMAKE_BINARY_DIR}/ckaqad-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ckaqad)
