// Recording a fixed sequence of ops as one launch.
#pragma once

#include <memory>
#include <utility>

#include "kernels/backend.h"

namespace fathom {

/// What `ops` asks of the backend, recorded and not run. Where `ops` throws, nothing stays recorded and the
/// backend goes on. The backend can_capture().
template <typename Ops>
std::unique_ptr<CapturedWork> capture(Backend& backend, Ops&& ops) {
  backend.begin_capture();
  try {
    std::forward<Ops>(ops)();
    return backend.end_capture();
  } catch (...) {
    backend.abandon_capture();
    throw;
  }
}

}  // namespace fathom
