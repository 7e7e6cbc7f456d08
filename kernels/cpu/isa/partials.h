// Scratch memory, and sums over rows that do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/host.h"
#include "kernels/cpu/isa/parallel.h"

namespace fathom::cpu::FATHOM_ISA {

/// Elements of a piece of an elementwise loop: 64 KiB of floats.
constexpr std::int64_t kGrain = 16384;

/// Rows of a piece when a row has `width` elements.
inline std::int64_t row_grain(std::int64_t width) {
  return width >= kGrain ? 1 : kGrain / (width < 1 ? 1 : width);
}

/// Uninitialised memory for the length of a call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(std::int64_t n)
      : data_(static_cast<T*>(allocate(static_cast<std::size_t>(n) * sizeof(T)))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(data_); }
  T* data() const { return data_; }

 private:
  T* data_;
};

/// A vector summed over rows: each piece of at most 1/16 of the rows has its own sum, and the pieces' sums
/// are added in order. Pieces depend on the number of rows alone.
template <typename T>
class RowSums {
 public:
  RowSums(std::int64_t rows, std::int64_t width)
      : grain_((rows + kPieces - 1) / kPieces < kLeastRows ? kLeastRows : (rows + kPieces - 1) / kPieces),
        width_(width),
        pieces_((rows + grain_ - 1) / grain_),
        sums_(pieces_ * width) {}

  std::int64_t grain() const { return grain_; }
  /// The sums of the piece that begins at row `begin`, set to zero.
  T* start(std::int64_t begin) {
    T* sums = sums_.data() + begin / grain_ * width_;
    for (std::int64_t j = 0; j < width_; ++j) sums[j] = T(0);
    return sums;
  }
  /// out[j] += the sum over all pieces of their element first + j, j < n.
  void add_to(T* out, std::int64_t n, std::int64_t first = 0) const {
    for (std::int64_t p = 1; p < pieces_; ++p) {
      T* total = sums_.data() + first;
      const T* sums = total + p * width_;
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) total[j] += sums[j];
    }
    if (pieces_ == 0) return;
    const T* total = sums_.data() + first;
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) out[j] += total[j];
  }

 private:
  static constexpr std::int64_t kPieces = 16;
  static constexpr std::int64_t kLeastRows = 16;
  std::int64_t grain_, width_, pieces_;
  Scratch<T> sums_;
};

}  // namespace fathom::cpu::FATHOM_ISA
