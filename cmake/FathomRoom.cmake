# A room is a top-level folder, one CMake target, and one include root.
#
# Headers are included as "<room>/path.h". The include root of a room is a folder in the build tree that holds
# nothing but a link to that room, so a target sees the headers of the rooms it links to and of no other: an
# include against the one way  kernels <- src <- {train, infer <- serve} <- app  does not compile (tests/build proves it).

function(fathom_room_include_root room out)
  set(root "${CMAKE_BINARY_DIR}/rooms/${room}")
  file(MAKE_DIRECTORY "${root}")
  if(NOT EXISTS "${root}/${room}")
    file(CREATE_LINK "${CMAKE_SOURCE_DIR}/${room}" "${root}/${room}" SYMBOLIC)
  endif()
  set(${out} "${root}" PARENT_SCOPE)
endfunction()

# fathom_room(NAME PUBLIC <targets> PRIVATE <targets> SOURCES <files>): the room's library, fathom::NAME.
function(fathom_room room)
  cmake_parse_arguments(ARG "" "" "PUBLIC;PRIVATE;SOURCES" ${ARGN})
  fathom_room_include_root(${room} root)
  add_library(fathom_${room} STATIC ${ARG_SOURCES})
  add_library(fathom::${room} ALIAS fathom_${room})
  target_include_directories(fathom_${room} PUBLIC
    $<BUILD_INTERFACE:${root}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/fathom>)
  target_link_libraries(fathom_${room} PUBLIC ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE} $<BUILD_INTERFACE:fathom::options>)
  set_target_properties(fathom_${room} PROPERTIES EXPORT_NAME ${room})
endfunction()
