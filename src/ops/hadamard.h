// Hadamard transforms while a model runs (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 4): of what
// products read, whose weights have the inverse in them, and of queries and keys, whose products they leave
// as they are. Nothing is recorded of them: they belong to models that are not trained.
#pragma once

#include <cstdint>

#include "src/autograd/context.h"

namespace fathom::ops {

/// A transform of vectors of `size` elements (kernels/hadamard.h: as a whole or in blocks), `inner` of which
/// lie side by side: element i of each at i * inner. Cheap to copy. Undefined: none.
class Hadamard {
 public:
  Hadamard() = default;
  /// InternalError: no positive size.
  Hadamard(Context& c, std::int64_t size, std::int64_t inner = 1);

  bool defined() const { return size_ > 0; }
  /// Elements of all the vectors side by side.
  std::int64_t width() const { return size_ * shape_.inner; }
  /// Of `rows` rows of count * width() elements without gaps.
  HadamardShape shape(std::int64_t rows, std::int64_t count) const;
  /// As Backend::hadamard_forward has it.
  ConstView matrix() const { return matrix_; }
  /// y [rows, count * width()], from as many elements of rows of x every `x_stride`, each width() of them by
  /// itself. y may be x.
  void apply(Context& c, View y, ConstView x, std::int64_t rows, std::int64_t count, std::int64_t x_stride,
             std::int64_t y_stride) const;

 private:
  std::int64_t size_ = 0;
  HadamardShape shape_;  // of one vector's blocks
  Tensor matrix_;        // fp32 [K, K]; undefined where K is 1
};

/// The first `heads` heads of each row of x [N, any], transformed. `h` is of a head's size. Where who calls
/// gives the only handle of x away, it is written over. InternalError: a tape records.
Tensor hadamard_heads(Context& c, Tensor x, std::int64_t heads, const Hadamard& h);

}  // namespace fathom::ops
