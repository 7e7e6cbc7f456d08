#include "src/io/hdf5_driver.h"

#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>

#include <sys/stat.h>
#include <unistd.h>

namespace fathom {

namespace {

struct Info {
  DriverState* state;
};

struct FdFile {
  H5FD_t pub;  // the library's part; must be the first member
  DriverState* state;
  haddr_t eoa;  // end of the addresses in use
  haddr_t eof;  // end of the file
};

FdFile* self(H5FD_t* file) { return reinterpret_cast<FdFile*>(file); }
const FdFile* self(const H5FD_t* file) { return reinterpret_cast<const FdFile*>(file); }

H5FD_t* fd_open(const char*, unsigned, hid_t fapl, haddr_t) {
  const auto* info = static_cast<const Info*>(H5Pget_driver_info(fapl));
  struct stat status {};
  if (info == nullptr || ::fstat(info->state->fd, &status) != 0) return nullptr;
  auto* file = new (std::nothrow) FdFile();
  if (file == nullptr) return nullptr;
  file->state = info->state;
  file->eof = static_cast<haddr_t>(status.st_size);
  return &file->pub;
}

herr_t fd_close(H5FD_t* file) {
  delete self(file);  // the descriptor is the caller's
  return 0;
}

// Every open file is a file of its own, whatever its inode.
int fd_compare(const H5FD_t* a, const H5FD_t* b) {
  if (self(a)->state == self(b)->state) return 0;
  return std::less<>()(self(a)->state, self(b)->state) ? -1 : 1;
}

herr_t fd_query(const H5FD_t*, unsigned long* flags) {
  *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
           H5FD_FEAT_AGGREGATE_SMALLDATA;
  return 0;
}

haddr_t fd_get_eoa(const H5FD_t* file, H5FD_mem_t) { return self(file)->eoa; }
haddr_t fd_get_eof(const H5FD_t* file, H5FD_mem_t) { return self(file)->eof; }
herr_t fd_set_eoa(H5FD_t* file, H5FD_mem_t, haddr_t address) {
  self(file)->eoa = address;
  return 0;
}

herr_t fd_read(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, size_t size, void* buffer) {
  auto* out = static_cast<char*>(buffer);
  while (size > 0) {
    const ssize_t n = ::pread(self(file)->state->fd, out, size, static_cast<off_t>(address));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    if (n == 0) {  // beyond the end of the file there are zeros
      std::memset(out, 0, size);
      return 0;
    }
    out += n;
    address += static_cast<haddr_t>(n);
    size -= static_cast<size_t>(n);
  }
  return 0;
}

herr_t fd_write(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, size_t size, const void* buffer) {
  DriverState& state = *self(file)->state;
  self(file)->eof = std::max(self(file)->eof, address + size);
  const auto* in = static_cast<const char*>(buffer);
  while (size > 0 && state.error == 0) {
    const ssize_t n = ::pwrite(state.fd, in, size, static_cast<off_t>(address));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      state.error = n < 0 ? errno : ENOSPC;
      break;
    }
    in += n;
    address += static_cast<haddr_t>(n);
    size -= static_cast<size_t>(n);
  }
  return 0;
}

herr_t fd_truncate(H5FD_t* file, hid_t, hbool_t) {
  FdFile& f = *self(file);
  if (f.eoa != f.eof) {
    if (f.state->error == 0 && ::ftruncate(f.state->fd, static_cast<off_t>(f.eoa)) != 0)
      f.state->error = errno;
    f.eof = f.eoa;
  }
  return 0;
}

hid_t register_driver() {
  static H5FD_class_t driver{};
#if H5_VERSION_GE(1, 13, 0)
  driver.version = H5FD_CLASS_VERSION;
  driver.value = static_cast<H5FD_class_value_t>(600);  // 512-1023 are for drivers outside the library
#endif
  driver.name = "fathom_fd";
  driver.maxaddr = (haddr_t{1} << 62) - 1;
  driver.fc_degree = H5F_CLOSE_STRONG;
  driver.fapl_size = sizeof(Info);
  driver.open = fd_open;
  driver.close = fd_close;
  driver.cmp = fd_compare;
  driver.query = fd_query;
  driver.get_eoa = fd_get_eoa;
  driver.set_eoa = fd_set_eoa;
  driver.get_eof = fd_get_eof;
  driver.read = fd_read;
  driver.write = fd_write;
  driver.truncate = fd_truncate;
  const H5FD_mem_t map[] = H5FD_FLMAP_DICHOTOMY;
  std::copy(std::begin(map), std::end(map), std::begin(driver.fl_map));
  return H5FDregister(&driver);
}

}  // namespace

hid_t make_fd_access(DriverState& state) {
  static const hid_t driver = register_driver();
  if (driver < 0) return -1;
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  const Info info{&state};
  if (access >= 0 && H5Pset_driver(access, driver, &info) < 0) {
    H5Pclose(access);
    return -1;
  }
  return access;
}

}  // namespace fathom
