#include "src/ops/check.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom::ops {

void fail(const Context& c, const char* op, const char* what, const Tensor& given, const Shape& expected) {
  throw InternalError(fmt::format("[{}]{}{} {} is {}, expected {}", op, c.layer().empty() ? "" : " ",
                                  c.layer(), what, given.defined() ? given.shape().str() : "undefined",
                                  expected.str()));
}

void expect_shape(const Context& c, const char* op, const char* what, const Tensor& x,
                  const Shape& expected) {
  if (!x.defined() || x.shape() != expected) fail(c, op, what, x, expected);
}

void expect_matrix(const Context& c, const char* op, const char* what, const Tensor& x) {
  if (!x.defined() || x.shape().rank() != 2) fail(c, op, what, x, Shape{-1, -1});
}

std::int64_t expect_rows(const Context& c, const char* op, const char* what, const Tensor& x,
                         std::int64_t width) {
  if (!x.defined() || x.shape().rank() != 2 || x.dim(1) != width) fail(c, op, what, x, Shape{-1, width});
  return x.dim(0);
}

}  // namespace fathom::ops
