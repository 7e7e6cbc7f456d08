# What src/core/build_info.cpp says. The commit is asked for at every build, not when CMake ran; its header is
# rewritten only when it changed, and one source file includes it, so that a commit recompiles one file.
#
# Run as a script (cmake -DOUTPUT=... -DSOURCE=... -P FathomBuildInfo.cmake) this writes that header.
if(CMAKE_SCRIPT_MODE_FILE)
  set(sha "unknown")
  find_program(git git)
  # Another project's repository around an unpacked release does not count.
  if(git AND EXISTS "${SOURCE}/.git")
    execute_process(COMMAND "${git}" -C "${SOURCE}" rev-parse HEAD
                    RESULT_VARIABLE failed OUTPUT_VARIABLE head ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed)
      set(sha "${head}")
      execute_process(COMMAND "${git}" -C "${SOURCE}" --no-optional-locks diff --quiet HEAD --
                      RESULT_VARIABLE changed OUTPUT_QUIET ERROR_QUIET)
      if(changed)
        string(APPEND sha "-dirty")
      endif()
    endif()
  endif()
  set(text "#define FATHOM_BUILD_GIT_SHA \"${sha}\"\n")
  set(old "")
  if(EXISTS "${OUTPUT}")
    file(READ "${OUTPUT}" old)
  endif()
  if(NOT text STREQUAL old)
    file(WRITE "${OUTPUT}" "${text}")
  endif()
  return()
endif()

# fathom_build_info(TARGET SOURCE ISAS): gives SOURCE of TARGET its facts.
function(fathom_build_info target source isas)
  set(header "${CMAKE_BINARY_DIR}/generated/fathom_git_sha.h")
  add_custom_target(fathom_git_sha
    COMMAND "${CMAKE_COMMAND}" "-DOUTPUT=${header}" "-DSOURCE=${CMAKE_SOURCE_DIR}"
            -P "${CMAKE_SOURCE_DIR}/cmake/FathomBuildInfo.cmake"
    BYPRODUCTS "${header}" VERBATIM COMMENT "")
  add_dependencies(${target} fathom_git_sha)
  list(JOIN isas " " isa_names)
  set(cuda 0)
  if(FATHOM_CUDA)
    set(cuda 1)
  endif()
  set_source_files_properties(${source} PROPERTIES
    INCLUDE_DIRECTORIES "${CMAKE_BINARY_DIR}/generated"
    COMPILE_DEFINITIONS
      "FATHOM_BUILD_VERSION=\"${PROJECT_VERSION}\";FATHOM_BUILD_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\";FATHOM_BUILD_TYPE=\"${CMAKE_BUILD_TYPE}\";FATHOM_BUILD_ISAS=\"${isa_names}\";FATHOM_BUILD_SANITIZERS=\"${FATHOM_SANITIZE}\";FATHOM_BUILD_CUDA=${cuda}")
endfunction()
