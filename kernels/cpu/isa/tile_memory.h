// Working memory of an op: one allocation by the calling thread, cut into aligned parts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/host.h"

namespace fathom::cpu::FATHOM_ISA {

class TileMemory {
 public:
  explicit TileMemory(std::int64_t bytes) : data_(cpu::allocate(static_cast<std::size_t>(bytes))) {}
  ~TileMemory() { cpu::release(data_); }
  TileMemory(const TileMemory&) = delete;
  TileMemory& operator=(const TileMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

/// The size of a part, so that the next one starts on a cache line again.
template <typename T>
constexpr std::int64_t part_bytes(std::int64_t elements) {
  return (elements * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
}

/// Hands out the parts of a block of memory one after the other.
class Parts {
 public:
  explicit Parts(void* data) : next_(static_cast<char*>(data)) {}
  template <typename T>
  T* take(std::int64_t elements) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += part_bytes<T>(elements);
    return part;
  }

 private:
  char* next_;
};

}  // namespace fathom::cpu::FATHOM_ISA
