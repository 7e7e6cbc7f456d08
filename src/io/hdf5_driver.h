// An HDF5 file driver over a file descriptor of ours. Private to src/io.
//
// Why not HDF5's own: when a write fails (disk full), the library cannot close the file, keeps it open for
// ever and tries again when the process ends. This driver remembers the first failure in
// `DriverState::error`, pretends that the write went well, and lets the library close in peace; the caller
// looks at `error` and throws the file away. Reading happens on the descriptor whose checksum was verified,
// so nothing can change in between.
#pragma once

#include <cstdint>

#include <hdf5.h>

namespace fathom {

struct DriverState {
  int fd = -1;
  int error = 0;  // errno of the first failed write or truncation
};

/// A file access property list (to be closed by the caller) whose files live on `state`, which must outlive
/// them; negative when HDF5 cannot make one.
hid_t make_fd_access(DriverState& state);

}  // namespace fathom
