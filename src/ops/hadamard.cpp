#include "src/ops/hadamard.h"

#include <utility>
#include <vector>

#include "kernels/error.h"
#include "kernels/hadamard.h"
#include "src/autograd/tape.h"
#include "src/ops/check.h"

namespace fathom::ops {

Hadamard::Hadamard(Context& c, std::int64_t size, std::int64_t inner) : size_(size) {
  const HadamardTransform transform(size);
  shape_.blocks = size / transform.block();
  shape_.factor = transform.factor();
  shape_.power = transform.block() / transform.factor();
  shape_.inner = inner;
  if (shape_.factor == 1) return;
  matrix_ = c.empty({shape_.factor, shape_.factor}, DType::F32, MemoryTag::Parameters);
  from_host(c.backend(), matrix_, std::vector<float>(transform.matrix().begin(), transform.matrix().end()));
}

HadamardShape Hadamard::shape(std::int64_t rows, std::int64_t count) const {
  HadamardShape s = shape_;
  s.rows = rows;
  s.blocks *= count;
  return s;
}

void Hadamard::apply(Context& c, View y, ConstView x, std::int64_t rows, std::int64_t count,
                     std::int64_t x_stride, std::int64_t y_stride) const {
  HadamardShape s = shape(rows, count);
  s.x_stride = x_stride;
  s.y_stride = y_stride;
  c.backend().hadamard_forward(y, x, matrix_, s);
}

// By value: who gives the only handle away lets it be written over.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Tensor hadamard_heads(Context& c, Tensor x, std::int64_t heads, const Hadamard& h) {
  expect_matrix(c, "hadamard_heads", "x", x);
  const std::int64_t rows = x.dim(0), row = x.dim(1), width = heads * h.width();
  if (width > row) fail(c, "hadamard_heads", "x", x, {rows, width});
  if (c.tape() != nullptr) throw InternalError("[hadamard_heads] a transform has no gradient to record");
  Tensor y = x.owners() == 1 ? x.detach() : c.empty(x.shape());
  if (y.data() != x.data()) c.backend().copy(y, x);
  if (rows == 0) return y;
  const View part{y.data(), (rows - 1) * row + width, y.dtype()};
  h.apply(c, part, part, rows, heads, row, row);
  c.check("hadamard_heads", "", y);
  return y;
}

}  // namespace fathom::ops
