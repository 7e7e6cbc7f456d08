#include "kernels/cuda/shared_library.h"

#include <cstdlib>
#include <filesystem>

#include <dlfcn.h>

namespace fathom::cuda {

OpenedLibrary open_library(const LibraryPlaces& places) {
  std::vector<std::string> candidates;
  const char* given = std::getenv(places.variable.c_str());
  if (given != nullptr && *given != '\0') {
    std::error_code ignored;
    const std::filesystem::path path = given;
    candidates.push_back(std::filesystem::is_directory(path, ignored) ? path / places.name : path);
  } else {
    candidates.push_back(places.name);
    for (const std::string& folder : places.folders) candidates.push_back(folder + "/" + places.name);
  }
  OpenedLibrary out;
  for (const std::string& candidate : candidates) {
    out.handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (out.handle != nullptr) {
      out.why_not.clear();
      return out;
    }
    const char* message = dlerror();
    if (!out.why_not.empty()) out.why_not += "; ";
    out.why_not += message != nullptr ? message : candidate + ": dlopen failed";
  }
  return out;
}

}  // namespace fathom::cuda
