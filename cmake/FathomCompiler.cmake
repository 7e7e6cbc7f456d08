# Warnings, sanitizers and the compiler cache: what every target of ours is built with.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Paths below the source folder count relative to it, so that two build folders, and two clones, share what they compile.
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env "CCACHE_BASEDIR=${CMAKE_SOURCE_DIR}" CCACHE_NOHASHDIR=1
      "${CCACHE_PROGRAM}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_CXX_COMPILER_LAUNCHER}")
endif()

# Release without NDEBUG's surprises: -O2 is as fast as -O3 outside the kernels, and builds sooner.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O1 -g1")

add_library(fathom_options INTERFACE)
add_library(fathom::options ALIAS fathom_options)
target_compile_options(fathom_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
                       -Woverloaded-virtual -Wno-unknown-pragmas -Werror)
# gcc 12's -Wrestrict and -Wmaybe-uninitialized report false positives inside libstdc++ (GCC bugs 105329, 105562).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(fathom_options INTERFACE -Wno-restrict -Wno-maybe-uninitialized)
endif()
if(FATHOM_SANITIZE)
  target_compile_options(fathom_options INTERFACE -fsanitize=${FATHOM_SANITIZE} -fno-omit-frame-pointer
                         -fno-sanitize-recover=all)
  target_link_options(fathom_options INTERFACE -fsanitize=${FATHOM_SANITIZE})
endif()
