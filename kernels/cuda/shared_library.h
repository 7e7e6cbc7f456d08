// NVIDIA's libraries are opened at run time, so that the program starts on a machine without them.
#pragma once

#include <string>
#include <vector>

namespace fathom::cuda {

/// Where a library may be: in the place that the environment variable names, which is then the only one;
/// otherwise wherever the dynamic linker finds it, or in one of `folders`.
struct LibraryPlaces {
  std::string name;                  // "libcublasLt.so.13"
  std::string variable;              // holds the library's path or its folder
  std::vector<std::string> folders;  // absolute
};

struct OpenedLibrary {
  void* handle = nullptr;  // of dlopen; never closed, since CUDA libraries do not bear it. Null: none opened
  std::string why_not;     // what was tried, and what the dynamic linker said of each
};

/// Its symbols are global, since a library's parts look for each other by name.
OpenedLibrary open_library(const LibraryPlaces& places);

}  // namespace fathom::cuda
