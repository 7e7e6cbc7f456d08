#include "src/io/hdf5_handle.h"

namespace fathom::hdf5 {

std::string library_error() {
  std::string text;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* out) -> herr_t {
        auto& message = *static_cast<std::string*>(out);
        if (n < 3 && error->desc != nullptr) message += (n == 0 ? "" : "; ") + std::string(error->desc);
        return 0;
      },
      &text);
  H5Eclear2(H5E_DEFAULT);
  return text.empty() ? "unknown HDF5 error" : text;
}

std::string shape_text(const std::vector<std::int64_t>& dims) {
  return fmt::format("[{}]", fmt::join(dims, ", "));
}

std::vector<hsize_t> to_hsize(const std::vector<std::int64_t>& dims) { return {dims.begin(), dims.end()}; }

Handle simple_space(const std::vector<hsize_t>& dims, const hsize_t* maximum) {
  return {H5Screate_simple(static_cast<int>(dims.size()), dims.data(), maximum), H5Sclose};
}

}  // namespace fathom::hdf5
