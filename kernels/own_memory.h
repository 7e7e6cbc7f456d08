// Memory that a backend's ops take for themselves, and whom it asks when the device has none left.
#pragma once

#include <cstddef>
#include <functional>
#include <new>
#include <utility>

#include "kernels/backend.h"

namespace fathom {

/// A backend whose ops take memory beside what others asked of it. Only the allocator above knows what is
/// kept for reuse and could go back to the device, and what the rest is for.
class OwnMemory {
 public:
  /// `bytes` of the device, after what is kept for reuse was given back. MemoryError: there are none, with an
  /// account of what is held. std::bad_alloc: there is nobody to ask any more.
  using Reserve = std::function<void*(std::size_t bytes)>;

  virtual ~OwnMemory() = default;
  /// The newest one is asked.
  void set_reserve(Reserve reserve) { reserve_ = std::move(reserve); }

 protected:
  /// The backend's allocate(), or the reserve's answer. Throws what they do.
  void* allocate_own(Backend& backend, std::size_t bytes) const {
    try {
      return backend.allocate(bytes);
    } catch (const std::bad_alloc&) {
      if (!reserve_) throw;
    }
    return reserve_(bytes);
  }

 private:
  Reserve reserve_;
};

}  // namespace fathom
