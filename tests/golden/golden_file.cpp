#include "tests/golden/golden_file.h"

#include <stdexcept>

#include <hdf5.h>

namespace fathom::golden {

namespace {

/// Closes an HDF5 handle when it leaves.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle(hid_t id, Close close, const std::string& what) : id_(id), close_(close) {
    if (id < 0) throw std::runtime_error("golden file: cannot read " + what);
  }
  ~Handle() { close_(id_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }  // NOLINT: used as the id that it holds

 private:
  hid_t id_;
  Close close_;
};

}  // namespace

GoldenFile::GoldenFile(const std::string& name) : name_(name) {
  const std::string path = std::string(FATHOM_SOURCE_DIR) + "/tests/golden/" + name;
  file_ = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (file_ < 0) throw std::runtime_error("golden file: cannot open " + path);
}

GoldenFile::~GoldenFile() { H5Fclose(file_); }

bool GoldenFile::has(const std::string& path) const {
  for (std::size_t end = path.find('/'); end != std::string::npos; end = path.find('/', end + 1)) {
    if (H5Lexists(file_, path.substr(0, end).c_str(), H5P_DEFAULT) <= 0) return false;
  }
  return H5Lexists(file_, path.c_str(), H5P_DEFAULT) > 0;
}

template <typename T>
std::vector<T> GoldenFile::read(const std::string& path, std::int64_t memory_type) const {
  const std::string what = name_ + ":" + path;
  const Handle set(H5Dopen2(file_, path.c_str(), H5P_DEFAULT), H5Dclose, what);
  const Handle space(H5Dget_space(set), H5Sclose, what);
  std::vector<T> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
  if (H5Dread(set, memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0) {
    throw std::runtime_error("golden file: cannot read " + what);
  }
  return values;
}

std::vector<double> GoldenFile::doubles(const std::string& path) const {
  return read<double>(path, H5T_NATIVE_DOUBLE);
}

std::vector<std::int32_t> GoldenFile::ints(const std::string& path) const {
  return read<std::int32_t>(path, H5T_NATIVE_INT32);
}

double GoldenFile::attribute(const std::string& name) const {
  const Handle a(H5Aopen(file_, name.c_str(), H5P_DEFAULT), H5Aclose, name_ + ", attribute " + name);
  double value = 0;
  if (H5Aread(a, H5T_NATIVE_DOUBLE, &value) < 0) throw std::runtime_error("golden file: attribute " + name);
  return value;
}

bool GoldenFile::has_attribute(const std::string& name) const { return H5Aexists(file_, name.c_str()) > 0; }

std::vector<std::string> GoldenFile::names(const std::string& group) const {
  const Handle g(H5Gopen2(file_, group.c_str(), H5P_DEFAULT), H5Gclose, name_ + ":" + group);
  std::vector<std::string> found;
  const auto collect = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  if (H5Literate(g, H5_INDEX_NAME, H5_ITER_INC, nullptr, collect, &found) < 0) {
    throw std::runtime_error("golden file: cannot list " + group);
  }
  return found;
}

}  // namespace fathom::golden
