// Cosines and sines of RoPE's angles, kept between calls.
#pragma once

#include <cstdint>

#include "kernels/rope_scaling.h"

namespace fathom::cpu::FATHOM_ISA {

/// Rows of head_dim/2 values for the positions 0, 1, ...: one (theta, head size, scaling) at a time, grown on
/// demand.
template <typename T>
class RopeTable {
 public:
  RopeTable() = default;
  RopeTable(const RopeTable&) = delete;
  RopeTable& operator=(const RopeTable&) = delete;
  ~RopeTable();

  /// Makes the table hold the positions below `positions`. Call it outside of parallel loops.
  void prepare(std::int64_t positions, std::int64_t head_dim, double theta, const RopeScaling& scaling);
  const T* cosines(std::int64_t position) const { return cosines_ + position * half_; }
  const T* sines(std::int64_t position) const { return sines_ + position * half_; }

 private:
  T* cosines_ = nullptr;  // one block of memory with the sines
  T* sines_ = nullptr;
  std::int64_t positions_ = 0;
  std::int64_t half_ = 0;
  double theta_ = 0;
  RopeScaling scaling_;
};

extern template class RopeTable<float>;
extern template class RopeTable<double>;

}  // namespace fathom::cpu::FATHOM_ISA
